//! Sessions in SQLite. Sessions in use are also in memory (`memory::SessionCache`).

use async_trait::async_trait;
use qpq_domain::{AccountId, TokenHash, UnixMillis};
use qpq_ports::{NewSession, Session, SessionCreation, Sessions, StoreResult};
use sqlx::{SqliteConnection, sqlite::SqliteRow};

use crate::{
    bans,
    effects::{Effects, SessionUse},
    error::read_failed,
    messages::remove::SWEEP_ROWS,
    row::{Columns as _, millis},
    statement::{Done, Statement},
    store::EmbeddedStore,
};

#[async_trait]
impl Sessions for EmbeddedStore {
    async fn create(&self, new: NewSession) -> StoreResult<SessionCreation> {
        let now = self.memory.clock.bounds(new.session.authenticated_at).earliest;
        self.writer.run(Create { new, now }).await
    }

    async fn find(&self, token: &TokenHash) -> StoreResult<Option<Session>> {
        let cache = &self.memory.sessions;
        if let Some(session) = cache.get(token) {
            return Ok(Some(session));
        }
        let generation = cache.generation();
        let found = self.confirm(token).await?;
        if let Some(session) = &found {
            cache.insert(*token, session.clone(), generation);
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
        self.writer.run(Touch(SessionUse { token: *token, used_at: now, expires_at })).await
    }

    async fn revoke(&self, token: &TokenHash) -> StoreResult<u32> {
        self.writer.run(Revoke(*token)).await
    }

    async fn revoke_all(&self, account: AccountId) -> StoreResult<u32> {
        self.writer.run(RevokeAll(account)).await
    }
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

/// Creates a session, unless the account is banned at `now`.
struct Create {
    new: NewSession,
    now: UnixMillis,
}

impl Statement for Create {
    type Answer = SessionCreation;
    const NAME: &'static str = "create session";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<SessionCreation>> {
        let NewSession { token, session } = &self.new;
        if bans::is_banned(tx, session.account, self.now).await? {
            return Ok(Done::keep(SessionCreation::Banned));
        }
        // A token is 256 random bits, so a row with the token is of the same session, created by a
        // repeat. The row counts as affected, and does not change.
        let created = sqlx::query(
            "INSERT INTO session (token, account, device, authenticated_at, last_used_at, expires_at)
             SELECT ?1, a.id, ?3, ?4, ?5, ?6 FROM account a WHERE a.id = ?2 AND a.identity = ?7
                 ON CONFLICT DO UPDATE SET expires_at = session.expires_at",
        )
        .bind(&token.as_bytes()[..])
        .bind(session.account.0)
        .bind(session.device.as_ref().map(|device| &device.as_bytes()[..]))
        .bind(millis(session.authenticated_at))
        .bind(millis(session.last_used_at))
        .bind(millis(session.expires_at))
        .bind(&session.identity.as_bytes()[..])
        .execute(tx)
        .await?;
        Ok(Done::keep(match created.rows_affected() {
            0 => SessionCreation::NoAccount,
            _ => SessionCreation::Created,
        }))
    }
}

struct Touch(SessionUse);

impl Statement for Touch {
    type Answer = ();
    const NAME: &'static str = "touch session";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<()>> {
        let SessionUse { token, used_at, expires_at } = self.0;
        sqlx::query("UPDATE session SET last_used_at = ?2, expires_at = ?3 WHERE token = ?1")
            .bind(&token.as_bytes()[..])
            .bind(millis(used_at))
            .bind(millis(expires_at))
            .execute(tx)
            .await?;
        let effects = Effects { session_used: Some(self.0), ..Effects::default() };
        Ok(Done::with((), effects))
    }
}

/// Ends one session. Returns the number of ended sessions.
struct Revoke(TokenHash);

impl Statement for Revoke {
    type Answer = u32;
    const NAME: &'static str = "revoke session";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<u32>> {
        let deleted = sqlx::query("DELETE FROM session WHERE token = ?1")
            .bind(&self.0.as_bytes()[..])
            .execute(tx)
            .await?;
        Ok(Done::with(u32::from(deleted.rows_affected() > 0), ended(vec![self.0])))
    }
}

/// Ends the sessions of an account. Returns their number.
struct RevokeAll(AccountId);

impl Statement for RevokeAll {
    type Answer = u32;
    const NAME: &'static str = "revoke sessions of account";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<u32>> {
        let rows = sqlx::query("DELETE FROM session WHERE account = ?1 RETURNING token")
            .bind(self.0.0)
            .fetch_all(tx)
            .await?;
        let count = u32::try_from(rows.len()).unwrap_or(u32::MAX);
        Ok(Done::with(count, ended(tokens(&rows)?)))
    }
}

/// Removes up to [`SWEEP_ROWS`] sessions that have expired. Returns their number.
pub(crate) struct SweepSessions {
    pub(crate) now: UnixMillis,
}

impl Statement for SweepSessions {
    type Answer = u64;
    const NAME: &'static str = "sweep sessions";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<u64>> {
        let rows = sqlx::query(
            "DELETE FROM session WHERE token IN (
                 SELECT token FROM session WHERE expires_at <= ?1 ORDER BY expires_at LIMIT +?2)
             RETURNING token",
        )
        .bind(millis(self.now))
        .bind(SWEEP_ROWS)
        .fetch_all(tx)
        .await?;
        Ok(Done::with(rows.len() as u64, ended(tokens(&rows)?)))
    }
}

pub(crate) fn tokens(rows: &[SqliteRow]) -> sqlx::Result<Vec<TokenHash>> {
    rows.iter().map(|row| row.hash("token").map(TokenHash::new)).collect()
}

fn ended(sessions_changed: Vec<TokenHash>) -> Effects {
    Effects { sessions_changed, ..Effects::default() }
}
