//! Sessions in Postgres. Sessions in use have copies in Redis and in the process of each edge,
//! because every call looks its session up, and few calls change one.
//!
//! **No copy is valid for longer than `ttl` after its row was read in Postgres**, also without
//! Redis and NATS. Normally a revocation takes effect sooner. First it is committed. Then a mark is
//! stored in Redis, until every earlier copy of the row is too old to be valid. Then the other
//! edges receive a message through NATS and drop their copies. `confirm` always asks Postgres. A
//! session that is bound to a device gets a new copy in Redis in the same way.

mod process;
mod shared;

use std::{collections::HashSet, mem, slice, time::Duration};

use async_trait::async_trait;
use parking_lot::Mutex;
use qpq_domain::{AccountId, StoreId, TokenHash, UnixMillis};
use qpq_ports::{NewSession, Session, SessionCreation, Sessions, StoreError, StoreResult};
use sqlx::{PgConnection, Row as _, postgres::PgRow};
use tokio::{sync::broadcast::error::RecvError, time::Instant};

use self::{
    process::InProcess,
    shared::{Copy, ENDED, Fill, InRedis},
};
use crate::{
    ClusterStore, bans,
    effects::Effects,
    history::{History, store_id},
    metrics as names,
    nats::{Bus, BusMessage},
    postgres::{
        Repeat, Scope, Statement,
        row::{Columns as _, millis},
    },
    redis::Redis,
    store::Inner,
};

// A token is 256 random bits, so a row with the token is of the same session, created by a repeat.
// The row counts as affected, and does not change. Locks the account, so that a deletion either
// waits and ends the session, or is seen. A trigger leaves out a session of a banned account.
const CREATE: &str = "
    INSERT INTO session (token, account, device, authenticated_at, last_used_at, expires_at)
    SELECT $1, a.id, $3, $4, $5, $6 FROM account a WHERE a.id = $2 AND a.identity = $7
       FOR KEY SHARE OF a
    ON CONFLICT (token) DO UPDATE SET expires_at = session.expires_at";

/// Finds a session by its token. Without such a session, the result is one row with the store id
/// and NULLs.
const FIND: &str = concat!(
    "SELECT h.store_id, f.account, f.identity, f.device, f.authenticated_at, f.last_used_at, f.expires_at
       FROM (SELECT ",
    store_id!(),
    " AS store_id) h LEFT JOIN (
        SELECT s.account, a.identity, s.device, s.authenticated_at, s.last_used_at, s.expires_at
          FROM session s JOIN account a ON a.id = s.account WHERE s.token = $1) f ON true"
);

/// Of two concurrent uses at different edges, the later one is stored.
const TOUCH: &str =
    "UPDATE session SET last_used_at = $2, expires_at = $3 WHERE token = $1 AND last_used_at <= $2";

const REVOKE: &str = "DELETE FROM session WHERE token = $1 RETURNING token";
const REVOKE_ALL: &str = "DELETE FROM session WHERE account = $1 RETURNING token";

/// Maximum attempts at replacing a copy while other edges store copies.
const MAX_REPLACEMENTS: usize = 8;

/// The copies of sessions: in this process, in Redis, and in the processes of other edges. Cheap to
/// clone.
#[derive(Clone, Debug)]
pub(crate) struct SessionCopies {
    process: InProcess,
    redis: InRedis,
    bus: Bus,
    /// The time for which a copy is valid after its row was read in Postgres.
    ttl: Duration,
}

impl SessionCopies {
    pub(crate) fn new(redis: Redis, bus: Bus, ttl: Duration) -> Self {
        let ttl = ttl.min(ENDED);
        Self { process: InProcess::new(ttl), redis: InRedis::new(redis, ttl), bus, ttl }
    }

    /// Drops this process's copies of sessions that other edges have ended, and all of its copies
    /// when a message may have been lost. Completes when the bus is closed.
    pub(crate) async fn listen(self, history: History) {
        let (mut messages, mut reconnects) = (self.bus.messages(), self.bus.reconnects());
        let mut histories = history.changes();
        loop {
            let message = tokio::select! {
                message = messages.recv() => message,
                // An error means that the bus has ended, which the other branch reports.
                Ok(()) = reconnects.changed() => Err(RecvError::Lagged(0)),
                // A session of the earlier history may not exist in this one.
                Ok(()) = histories.changed() => Err(RecvError::Lagged(0)),
            };
            match message {
                Ok(BusMessage::SessionEnded(token)) => self.drop_local(&token),
                Ok(_) => {}
                Err(RecvError::Lagged(_)) => self.drop_all_local(),
                Err(RecvError::Closed) => return,
            }
        }
    }

    /// Drops this process's copy of the session.
    pub(crate) fn drop_local(&self, token: &TokenHash) {
        self.process.forget(slice::from_ref(token));
    }

    /// Drops all copies of this process.
    pub(crate) fn drop_all_local(&self) {
        self.process.clear();
    }

    /// Invalidates the copies of sessions that have ended. The mark in Redis comes first, so that
    /// an edge that drops its copy afterwards finds no older one there.
    pub(crate) async fn ended(&self, tokens: &[TokenHash]) {
        self.redis.ended(tokens).await;
        self.invalidate(tokens);
    }

    /// Drops the copies of sessions that may have ended, so that the next lookup asks Postgres.
    pub(crate) async fn uncertain(&self, tokens: &[TokenHash]) {
        self.redis.drop(tokens).await;
        self.invalidate(tokens);
    }

    /// Renews the copies of a session that has changed. The present row is stored in Redis, in
    /// place of a copy that another edge may have stored from an earlier read. Then the edges drop
    /// their own copies, and read the one in Redis.
    pub(crate) async fn changed(&self, inner: &Inner, token: &TokenHash) {
        // If Redis fails, another edge may use its copy until that is too old.
        let _ = self.replace(inner, token).await;
        self.invalidate(slice::from_ref(token));
    }

    async fn replace(&self, inner: &Inner, token: &TokenHash) -> StoreResult<()> {
        for _ in 0..MAX_REPLACEMENTS {
            self.redis.drop(slice::from_ref(token)).await;
            let asked_at = match self.redis.find(token, inner.history.id()).await? {
                Copy::Absent(asked_at) => asked_at,
                Copy::Ended => return Ok(()),
                // Another edge has stored a copy of the row, from before or after the change.
                Copy::Found { .. } => continue,
            };
            let (store_id, session) = inner.read_session(token).await?;
            let Some(session) = session else { return Ok(()) };
            self.redis.replace(token, store_id, &session, asked_at).await?;
            return Ok(());
        }
        Ok(())
    }

    fn invalidate(&self, tokens: &[TokenHash]) {
        self.process.forget(tokens);
        tokens.iter().for_each(|token| self.bus.session_ended(*token));
    }
}

impl Inner {
    /// Reads a session, and the history that it is in, from Postgres.
    async fn read_session(&self, token: &TokenHash) -> StoreResult<(StoreId, Option<Session>)> {
        let (store_id, session) = self.database.run(&FindSession(token)).await?;
        self.history.note(store_id);
        Ok((store_id, session))
    }
}

impl ClusterStore {
    /// Removes sessions and invalidates their copies, even if the caller is dropped meanwhile.
    async fn end_sessions(&self, end: EndSessions) -> StoreResult<u32> {
        let store = self.clone();
        let ending = tokio::spawn(async move {
            let Inner { database, applier, .. } = &*store.inner;
            let ended = database.run(&end).await;
            // The tokens of all attempts: an attempt whose commit was not answered may have
            // succeeded.
            let mut tokens = mem::take(&mut *end.tokens.lock());
            let count = u32::try_from(tokens.len()).unwrap_or(u32::MAX);
            if let Ending::One(token) = end.ending {
                tokens.insert(token);
            }
            let ended_sessions = tokens.into_iter().collect::<Vec<_>>();
            match ended {
                Ok(()) => {
                    applier.apply(Effects { ended_sessions, ..Effects::default() }).await;
                    Ok(count)
                }
                Err(error) => {
                    applier.sessions.uncertain(&ended_sessions).await;
                    Err(error.into())
                }
            }
        });
        ending.await.unwrap_or_else(|error| Err(StoreError::unavailable(error)))
    }
}

#[async_trait]
impl Sessions for ClusterStore {
    async fn create(&self, mut new: NewSession) -> StoreResult<SessionCreation> {
        // If the clock of the caller is behind, a new session would end early.
        let used = new.session.last_used_at;
        let time = &self.inner.time;
        let behind = time.bounds(used, time.postgres()).latest.since(used);
        new.session.expires_at = new.session.expires_at.plus(behind);
        Ok(self.inner.database.run(&CreateSession(new)).await?)
    }

    async fn find(&self, token: &TokenHash) -> StoreResult<Option<Session>> {
        let SessionCopies { process, redis, ttl, .. } = &self.inner.applier.sessions;
        if let Some(session) = process.get(token) {
            found_in("process");
            return Ok(Some(session));
        }
        let (generation, begun) = (process.generation(), Instant::now());
        let asked_at = match redis.find(token, self.inner.history.id()).await {
            Ok(Copy::Ended) => {
                found_in("redis");
                return Ok(None);
            }
            Ok(Copy::Found { session, age }) => {
                found_in("redis");
                process.keep(*token, session.clone(), begun + ttl.saturating_sub(age), generation);
                return Ok(Some(session));
            }
            Ok(Copy::Absent(now)) => Some(now),
            // The failure is counted in the metrics of Redis, and Postgres is asked.
            Err(_) => None,
        };
        found_in("postgres");
        let (store_id, session) = self.inner.read_session(token).await?;
        let Some(session) = session else { return Ok(None) };
        if let Some(asked_at) = asked_at
            && matches!(redis.fill(token, store_id, &session, asked_at).await, Ok(Fill::Ended))
        {
            return Ok(None);
        }
        process.keep(*token, session.clone(), begun + *ttl, generation);
        Ok(Some(session))
    }

    async fn confirm(&self, token: &TokenHash) -> StoreResult<Option<Session>> {
        self.inner.read_session(token).await.map(|(_, session)| session)
    }

    async fn touch(
        &self,
        token: &TokenHash,
        now: UnixMillis,
        expires_at: UnixMillis,
    ) -> StoreResult<()> {
        let Inner { database, applier, .. } = &*self.inner;
        database.run(&TouchSession { token, now, expires_at }).await?;
        applier.sessions.process.touch(token, now, expires_at);
        // Another edge that reads a copy without this use records the next use itself. Failures are
        // counted in the metrics of Redis.
        let _ = applier.sessions.redis.touch(token, now, expires_at).await;
        Ok(())
    }

    async fn revoke(&self, token: &TokenHash) -> StoreResult<u32> {
        self.end_sessions(EndSessions::new(Ending::One(*token))).await
    }

    async fn revoke_all(&self, account: AccountId) -> StoreResult<u32> {
        self.end_sessions(EndSessions::new(Ending::AllOf(account))).await
    }
}

struct CreateSession(NewSession);

impl Statement for CreateSession {
    type Output = SessionCreation;

    const REPEAT: Repeat = Repeat::Harmless;
    /// The only change is one statement.
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "create_session"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<SessionCreation> {
        let NewSession { token, session } = &self.0;
        let created = sqlx::query(CREATE)
            .bind(&token.as_bytes()[..])
            .bind(session.account.0)
            .bind(session.device.as_ref().map(|device| &device.as_bytes()[..]))
            .bind(millis(session.authenticated_at))
            .bind(millis(session.last_used_at))
            .bind(millis(session.expires_at))
            .bind(&session.identity.as_bytes()[..])
            .execute(&mut *connection)
            .await?;
        if created.rows_affected() > 0 {
            return Ok(SessionCreation::Created);
        }
        let is_banned = bans::is_banned(connection, session.account, session.authenticated_at);
        Ok(if is_banned.await? { SessionCreation::Banned } else { SessionCreation::NoAccount })
    }
}

struct FindSession<'a>(&'a TokenHash);

impl Statement for FindSession<'_> {
    type Output = (StoreId, Option<Session>);

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "session"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Self::Output> {
        let query = sqlx::query(FIND).bind(&self.0.as_bytes()[..]);
        let row = query.fetch_one(connection).await?;
        let exists = row.try_get::<Option<i64>, _>("account")?.is_some();
        let session = exists.then(|| session(&row)).transpose()?;
        Ok((row.store_id("store_id")?, session))
    }
}

struct TouchSession<'a> {
    token: &'a TokenHash,
    now: UnixMillis,
    expires_at: UnixMillis,
}

impl Statement for TouchSession<'_> {
    type Output = ();

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "touch"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<()> {
        sqlx::query(TOUCH)
            .bind(&self.token.as_bytes()[..])
            .bind(millis(self.now))
            .bind(millis(self.expires_at))
            .execute(connection)
            .await
            .map(drop)
    }
}

/// The sessions to end.
#[derive(Clone, Copy)]
enum Ending {
    One(TokenHash),
    AllOf(AccountId),
}

/// Ends sessions. Collects the tokens of all attempts.
struct EndSessions {
    ending: Ending,
    tokens: Mutex<HashSet<TokenHash>>,
}

impl EndSessions {
    fn new(ending: Ending) -> Self {
        Self { ending, tokens: Mutex::default() }
    }
}

impl Statement for EndSessions {
    type Output = ();

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Transaction;

    fn name(&self) -> &'static str {
        "revoke"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<()> {
        let query = match &self.ending {
            Ending::One(token) => sqlx::query(REVOKE).bind(&token.as_bytes()[..]),
            Ending::AllOf(account) => sqlx::query(REVOKE_ALL).bind(account.0),
        };
        let ended = tokens(&query.fetch_all(connection).await?)?;
        self.tokens.lock().extend(ended);
        Ok(())
    }
}

/// Returns the column `token` of each row.
pub(crate) fn tokens(rows: &[PgRow]) -> sqlx::Result<Vec<TokenHash>> {
    rows.iter().map(|row| row.hash("token").map(TokenHash::new)).collect()
}

fn session(row: &PgRow) -> sqlx::Result<Session> {
    Ok(Session {
        account: row.account("account")?,
        identity: row.identity("identity")?,
        device: row.device("device")?,
        authenticated_at: row.at("authenticated_at")?,
        last_used_at: row.at("last_used_at")?,
        expires_at: row.at("expires_at")?,
    })
}

fn found_in(place: &'static str) {
    metrics::counter!(names::SESSION_LOOKUPS, "from" => place).increment(1);
}
