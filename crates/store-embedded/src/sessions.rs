//! Sessions in SQLite, with those in use in memory: every call looks its session up, and hardly any
//! changes it.
//!
//! The cache is exact, because this process is the only writer. What could make it wrong is a
//! lookup that reads a row, is overtaken by a revocation, and only then caches what it read; so
//! each change counts up a generation, and a lookup caches nothing when the generation is not the
//! one it began with.

use async_trait::async_trait;
use futures_util::FutureExt as _;
use moka::sync::Cache;
use parking_lot::Mutex;
use qpq_domain::{AccountId, TokenHash, UnixMillis};
use qpq_ports::{NewSession, Session, Sessions, StoreResult};
use sqlx::{SqlitePool, sqlite::SqliteRow};

use crate::{
    error::read_failed,
    row::{Columns as _, millis},
    writer::{Outcome, Scope, Writer},
};

/// Sessions in memory at most, about 250 bytes each.
const CACHED: u64 = 100_000;

/// What a session job keeps in memory.
const JOB_BYTES: usize = 256;

#[derive(Debug)]
pub(crate) struct EmbeddedSessions {
    writer: Writer,
    readers: SqlitePool,
    cache: SessionCache,
}

impl EmbeddedSessions {
    pub(crate) fn new(writer: Writer, readers: SqlitePool) -> Self {
        Self { writer, readers, cache: SessionCache::new() }
    }

    /// For who removes sessions past this port.
    pub(crate) fn cache(&self) -> &SessionCache {
        &self.cache
    }
}

#[async_trait]
impl Sessions for EmbeddedSessions {
    async fn create(&self, new: NewSession) -> StoreResult<()> {
        let NewSession { token, session } = new;
        self.writer
            .run(
                Scope::Job,
                JOB_BYTES,
                move |connection| {
                    async move {
                        // A token is 256 random bits: one that is there already is this very
                        // session, made twice.
                        sqlx::query(
                            "INSERT INTO session (token, account, device, authenticated_at, last_used_at, expires_at)
                             VALUES (?1, ?2, ?3, ?4, ?5, ?6) ON CONFLICT DO NOTHING",
                        )
                        .bind(&token.as_bytes()[..])
                        .bind(session.account.0)
                        .bind(session.device.as_ref().map(|device| &device.as_bytes()[..]))
                        .bind(millis(session.authenticated_at))
                        .bind(millis(session.last_used_at))
                        .bind(millis(session.expires_at))
                        .execute(connection)
                        .await?;
                        Ok(Outcome::Keep(()))
                    }
                    .boxed()
                },
                |()| {},
            )
            .await
    }

    async fn find(&self, token: &TokenHash) -> StoreResult<Option<Session>> {
        if let Some(session) = self.cache.entries.get(token) {
            return Ok(Some(session));
        }
        let generation = self.cache.generation();
        let found = self.confirm(token).await?;
        if let Some(session) = &found {
            self.cache.keep(*token, session.clone(), generation);
        }
        Ok(found)
    }

    async fn confirm(&self, token: &TokenHash) -> StoreResult<Option<Session>> {
        sqlx::query(
            "SELECT s.account, a.identity, s.device, s.authenticated_at, s.last_used_at, s.expires_at
               FROM session s JOIN account a ON a.id = s.account WHERE s.token = ?1",
        )
        .bind(&token.as_bytes()[..])
        .fetch_optional(&self.readers)
        .await
        .and_then(|row| row.as_ref().map(session).transpose())
        .map_err(read_failed)
    }

    async fn touch(
        &self,
        token: &TokenHash,
        now: UnixMillis,
        expires_at: UnixMillis,
    ) -> StoreResult<()> {
        let (token, cache) = (*token, self.cache.clone());
        self.writer
            .run(
                Scope::Job,
                JOB_BYTES,
                move |connection| {
                    async move {
                        sqlx::query("UPDATE session SET last_used_at = ?2, expires_at = ?3 WHERE token = ?1")
                            .bind(&token.as_bytes()[..])
                            .bind(millis(now))
                            .bind(millis(expires_at))
                            .execute(connection)
                            .await?;
                        Ok(Outcome::Keep(()))
                    }
                    .boxed()
                },
                move |()| cache.touch(&token, now, expires_at),
            )
            .await
    }

    async fn revoke(&self, token: &TokenHash) -> StoreResult<u32> {
        let (token, cache) = (*token, self.cache.clone());
        self.writer
            .run(
                Scope::Job,
                JOB_BYTES,
                move |connection| {
                    async move {
                        let done = sqlx::query("DELETE FROM session WHERE token = ?1")
                            .bind(&token.as_bytes()[..])
                            .execute(connection)
                            .await?;
                        Ok(Outcome::Keep(u32::from(done.rows_affected() > 0)))
                    }
                    .boxed()
                },
                move |_| cache.forget(&[token]),
            )
            .await
    }

    async fn revoke_all(&self, account: AccountId) -> StoreResult<u32> {
        let cache = self.cache.clone();
        let revoked = self
            .writer
            .run(
                Scope::Job,
                JOB_BYTES,
                move |connection| {
                    async move {
                        let rows =
                            sqlx::query("DELETE FROM session WHERE account = ?1 RETURNING token")
                                .bind(account.0)
                                .fetch_all(connection)
                                .await?;
                        Ok(Outcome::Keep(tokens(&rows)?))
                    }
                    .boxed()
                },
                move |tokens| cache.forget(tokens),
            )
            .await?;
        Ok(u32::try_from(revoked.len()).unwrap_or(u32::MAX))
    }
}

/// The column `token` of each row.
pub(crate) fn tokens(rows: &[SqliteRow]) -> sqlx::Result<Vec<TokenHash>> {
    rows.iter().map(|row| row.hash("token").map(TokenHash::new)).collect()
}

fn session(row: &SqliteRow) -> sqlx::Result<Session> {
    Ok(Session {
        account: row.account("account")?,
        identity: row.identity("identity")?,
        device: row.device("device")?,
        authenticated_at: row.at("authenticated_at")?,
        last_used_at: row.at("last_used_at")?,
        expires_at: row.at("expires_at")?,
    })
}

/// Sessions in memory. Changes are told to it after their commit, by the writer.
#[derive(Clone, Debug)]
pub(crate) struct SessionCache {
    entries: Cache<TokenHash, Session>,
    generation: std::sync::Arc<Mutex<u64>>,
}

impl SessionCache {
    fn new() -> Self {
        Self { entries: Cache::new(CACHED), generation: std::sync::Arc::default() }
    }

    fn generation(&self) -> u64 {
        *self.generation.lock()
    }

    /// Caches what was read, unless something changed since `generation` was noted.
    fn keep(&self, token: TokenHash, session: Session, generation: u64) {
        let current = self.generation.lock();
        if *current == generation {
            self.entries.insert(token, session);
        }
    }

    fn touch(&self, token: &TokenHash, now: UnixMillis, expires_at: UnixMillis) {
        let mut current = self.generation.lock();
        *current += 1;
        if let Some(session) = self.entries.get(token) {
            self.entries.insert(*token, Session { last_used_at: now, expires_at, ..session });
        }
    }

    /// Forgets sessions that are no more.
    pub(crate) fn forget(&self, tokens: &[TokenHash]) {
        let mut current = self.generation.lock();
        *current += 1;
        tokens.iter().for_each(|token| self.entries.invalidate(token));
    }
}
