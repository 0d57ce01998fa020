//! The sessions in use, in memory, because every call looks its session up and few calls change
//! one.
//!
//! The cache is exact, because this process is the only writer. A lookup must not cache a session
//! that was revoked after the lookup had read its row. So each change increments a generation, and
//! a lookup caches nothing if the generation has changed since it began.

use moka::sync::Cache;
use parking_lot::Mutex;
use qpq_domain::TokenHash;
use qpq_ports::Session;

use crate::effects::SessionUse;

/// Maximum sessions in memory, about 250 bytes each.
const MAX_SESSIONS: u64 = 100_000;

/// The sessions in memory. The writer applies changes after their commits.
#[derive(Debug)]
pub(crate) struct SessionCache {
    entries: Cache<TokenHash, Session>,
    generation: Mutex<Generation>,
}

/// The number of changes of sessions up to some instant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Generation(u64);

impl SessionCache {
    pub(super) fn new() -> Self {
        Self { entries: Cache::new(MAX_SESSIONS), generation: Mutex::default() }
    }

    pub(crate) fn get(&self, token: &TokenHash) -> Option<Session> {
        self.entries.get(token)
    }

    pub(crate) fn generation(&self) -> Generation {
        *self.generation.lock()
    }

    /// Caches a session that was read, unless any session has changed since `generation` was noted.
    pub(crate) fn insert(&self, token: TokenHash, session: Session, generation: Generation) {
        let current = self.generation.lock();
        if *current == generation {
            self.entries.insert(token, session);
        }
    }

    pub(super) fn touch(&self, session_use: &SessionUse) {
        let SessionUse { token, used_at, expires_at } = *session_use;
        let mut current = self.generation.lock();
        current.0 += 1;
        if let Some(session) = self.entries.get(&token) {
            self.entries.insert(token, Session { last_used_at: used_at, expires_at, ..session });
        }
    }

    /// Removes sessions that have ended, or that the next lookup must read again.
    pub(super) fn forget(&self, tokens: &[TokenHash]) {
        let mut current = self.generation.lock();
        current.0 += 1;
        tokens.iter().for_each(|token| self.entries.invalidate(token));
    }
}
