//! Copies of sessions in this process.
//!
//! If a session changes after a lookup has read its row, and before the lookup stores the copy,
//! that copy would be wrong. So each change increments a generation, and a lookup stores nothing if
//! the generation has changed since it began.

use std::{sync::Arc, time::Duration};

use moka::sync::Cache;
use parking_lot::Mutex;
use qpq_domain::{TokenHash, UnixMillis};
use qpq_ports::Session;
use tokio::time::Instant;

/// Maximum sessions, of about 300 bytes each.
const CAPACITY: u64 = 100_000;

/// The copies in this process. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct InProcess {
    entries: Cache<TokenHash, Entry>,
    generation: Arc<Mutex<u64>>,
}

#[derive(Clone, Debug)]
struct Entry {
    session: Session,
    /// The end of the copy's validity.
    until: Instant,
}

impl InProcess {
    /// Creates an empty cache, in which a copy is valid for at most `ttl`.
    pub(super) fn new(ttl: Duration) -> Self {
        let entries = Cache::builder().max_capacity(CAPACITY).time_to_live(ttl).build();
        Self { entries, generation: Arc::default() }
    }

    pub(super) fn get(&self, token: &TokenHash) -> Option<Session> {
        let entry = self.entries.get(token)?;
        (Instant::now() < entry.until).then_some(entry.session)
    }

    pub(super) fn generation(&self) -> u64 {
        *self.generation.lock()
    }

    /// Stores a copy, unless a session has changed since `generation` was read.
    pub(super) fn keep(&self, token: TokenHash, session: Session, until: Instant, generation: u64) {
        let current = self.generation.lock();
        if *current == generation {
            self.entries.insert(token, Entry { session, until });
        }
    }

    pub(super) fn touch(&self, token: &TokenHash, now: UnixMillis, expires_at: UnixMillis) {
        let mut current = self.generation.lock();
        *current += 1;
        if let Some(Entry { session, until }) = self.entries.get(token)
            && session.last_used_at <= now
        {
            let session = Session { last_used_at: now, expires_at, ..session };
            self.entries.insert(*token, Entry { session, until });
        }
    }

    pub(super) fn forget(&self, tokens: &[TokenHash]) {
        let mut current = self.generation.lock();
        *current += 1;
        tokens.iter().for_each(|token| self.entries.invalidate(token));
    }

    pub(super) fn clear(&self) {
        let mut current = self.generation.lock();
        *current += 1;
        self.entries.invalidate_all();
    }
}

#[cfg(test)]
mod tests {
    use qpq_domain::{AccountId, IdentityKey};

    use super::*;

    const TOKEN: TokenHash = TokenHash::new([1; 32]);
    const TTL: Duration = Duration::from_secs(15);

    fn session() -> Session {
        Session {
            account: AccountId(1),
            identity: IdentityKey::new([2; 32]),
            device: None,
            authenticated_at: UnixMillis(1),
            last_used_at: UnixMillis(1),
            expires_at: UnixMillis(9),
        }
    }

    #[tokio::test]
    async fn a_session_that_was_read_before_a_change_is_not_kept() {
        let changes: [fn(&InProcess); 3] = [
            |copies| copies.forget(&[TOKEN]),
            InProcess::clear,
            |copies| copies.touch(&TOKEN, UnixMillis(2), UnixMillis(10)),
        ];
        for change in changes {
            let copies = InProcess::new(TTL);
            let (generation, until) = (copies.generation(), Instant::now() + TTL);
            change(&copies);
            copies.keep(TOKEN, session(), until, generation);
            assert_eq!(copies.get(&TOKEN), None);
            copies.keep(TOKEN, session(), until, copies.generation());
            assert_eq!(copies.get(&TOKEN), Some(session()));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_touch_does_not_extend_the_validity_of_a_copy() {
        let copies = InProcess::new(TTL);
        copies.keep(TOKEN, session(), Instant::now() + TTL / 3, copies.generation());
        tokio::time::advance(TTL / 4).await;
        copies.touch(&TOKEN, UnixMillis(2), UnixMillis(10));
        let touched =
            Session { last_used_at: UnixMillis(2), expires_at: UnixMillis(10), ..session() };
        assert_eq!(copies.get(&TOKEN), Some(touched));
        tokio::time::advance(TTL / 4).await;
        assert_eq!(copies.get(&TOKEN), None, "a touch makes nothing younger");
    }
}
