//! Sessions: Postgres knows them, and those in use are in Redis and in each edge's process too,
//! because every call looks its session up and hardly any changes it.
//!
//! **No copy is believed for longer than `ttl` after Postgres was asked**, whatever happens to
//! Redis and NATS. A revocation that all goes well for is quicker: it is committed, then Redis is
//! told so, and that mark stays until every lookup that may have read the row before is too old to
//! be believed; then the other edges are told through NATS to forget their own copy. `confirm` asks
//! Postgres, always.

mod process;
mod shared;

use std::{collections::HashSet, slice, sync::Arc, time::Duration};

use async_trait::async_trait;
use parking_lot::Mutex;
use qpq_domain::{AccountId, StoreId, TokenHash, UnixMillis};
use qpq_ports::{NewSession, Session, Sessions, StoreError, StoreResult};
use sqlx::{Row as _, postgres::PgRow};
use tokio::{sync::broadcast::error::RecvError, time::Instant};

use self::{
    process::InProcess,
    shared::{Copy, ENDED, Fill, InRedis},
};
use crate::{
    history::{History, store_id},
    metrics as names,
    nats::{Bus, Heard},
    postgres::{
        Database, Repeat, Work,
        row::{Columns as _, millis},
    },
    redis::Redis,
    time::Time,
};

// A token is 256 random bits: one that is there already is this very session, made twice.
const CREATE: &str = "
    INSERT INTO session (token, account, device, authenticated_at, last_used_at, expires_at)
    VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT DO NOTHING";

/// The store id stands alone where there is no such session.
const FIND: &str = concat!(
    "SELECT h.store_id, f.account, f.identity, f.device, f.authenticated_at, f.last_used_at, f.expires_at
       FROM (SELECT ",
    store_id!(),
    " AS store_id) h LEFT JOIN (
        SELECT s.account, a.identity, s.device, s.authenticated_at, s.last_used_at, s.expires_at
          FROM session s JOIN account a ON a.id = s.account WHERE s.token = $1) f ON true"
);

/// Of two edges that note a use at a time, the later use counts.
const TOUCH: &str =
    "UPDATE session SET last_used_at = $2, expires_at = $3 WHERE token = $1 AND last_used_at <= $2";

const REVOKE: &str = "DELETE FROM session WHERE token = $1 RETURNING token";
const REVOKE_ALL: &str = "DELETE FROM session WHERE account = $1 RETURNING token";

#[derive(Debug)]
pub(crate) struct ClusterSessions {
    database: Database,
    history: History,
    copies: Copies,
    time: Time,
    ttl: Duration,
}

/// Where copies of sessions are. Cheap to clone.
#[derive(Clone, Debug)]
struct Copies {
    process: InProcess,
    redis: InRedis,
    bus: Bus,
}

impl ClusterSessions {
    pub(crate) fn new(
        database: Database,
        history: History,
        redis: Redis,
        bus: Bus,
        time: Time,
        ttl: Duration,
    ) -> Self {
        let ttl = ttl.min(ENDED);
        let copies = Copies { process: InProcess::new(ttl), redis: InRedis::new(redis, ttl), bus };
        Self { database, history, copies, time, ttl }
    }

    /// Forgets what other edges say has ended, from now on and as long as there is a bus; and
    /// everything, when something may have been missed.
    pub(crate) fn listen(self: Arc<Self>) -> impl Future<Output = ()> + Send + 'static {
        let (mut heard, mut back) = (self.copies.bus.hear(), self.copies.bus.back());
        let mut histories = self.history.changes();
        async move {
            loop {
                let word = tokio::select! {
                    word = heard.recv() => word,
                    // It ends with the bus, which the other branch notices.
                    Ok(()) = back.changed() => Err(RecvError::Lagged(0)),
                    // What the store knew before, it may not know now.
                    Ok(()) = histories.changed() => Err(RecvError::Lagged(0)),
                };
                match word {
                    Ok(Heard::SessionEnded(token)) => self.forget(&token),
                    Ok(_) => {}
                    Err(RecvError::Lagged(_)) => self.forget_all(),
                    Err(RecvError::Closed) => return,
                }
            }
        }
    }

    /// Believes this process's copy of the session no more.
    pub(crate) fn forget(&self, token: &TokenHash) {
        self.copies.process.forget(slice::from_ref(token));
    }

    /// Believes none of this process's copies any more.
    pub(crate) fn forget_all(&self) {
        self.copies.process.clear();
    }

    /// Asks Postgres for a session, and for the history that it is in.
    async fn ask(&self, token: &TokenHash) -> StoreResult<(StoreId, Option<Session>)> {
        let token = *token;
        let (store_id, session) = self
            .database
            .once("session", Repeat::Harmless, move |connection| {
                Box::pin(async move {
                    let query = sqlx::query(FIND).bind(&token.as_bytes()[..]);
                    let row = query.fetch_one(connection).await?;
                    let is_there = row.try_get::<Option<i64>, _>("account")?.is_some();
                    let session = is_there.then(|| session(&row)).transpose()?;
                    Ok((row.store_id("store_id")?, session))
                })
            })
            .await?;
        self.history.note(store_id);
        Ok((store_id, session))
    }

    /// For who has removed sessions past this port.
    pub(crate) async fn ended(&self, tokens: &[TokenHash]) {
        self.copies.ended(tokens).await;
    }

    /// Removes sessions and tells everybody, to the end, even if who waits for it goes away.
    async fn remove(
        &self,
        token: Option<TokenHash>,
        delete: impl Work<Vec<TokenHash>> + Send + Sync + 'static,
    ) -> StoreResult<u32> {
        let (database, copies) = (self.database.clone(), self.copies.clone());
        let removing = tokio::spawn(async move {
            // Of all tries: one whose commit was not answered may have been the one.
            let gone: Arc<Mutex<HashSet<TokenHash>>> = Arc::default();
            let delete = Arc::new(delete);
            let removed = database
                .run("revoke", Repeat::Harmless, |connection| {
                    let (gone, deleting) = (Arc::clone(&gone), delete(connection));
                    Box::pin(async move {
                        let tokens = deleting.await?;
                        gone.lock().extend(tokens);
                        Ok(())
                    })
                })
                .await;
            let mut tokens = std::mem::take(&mut *gone.lock());
            let count = u32::try_from(tokens.len()).unwrap_or(u32::MAX);
            tokens.extend(token);
            let tokens: Vec<_> = tokens.into_iter().collect();
            match removed {
                Ok(()) => copies.ended(&tokens).await,
                Err(_) => copies.doubted(&tokens).await,
            }
            removed.map(|()| count)
        });
        removing.await.unwrap_or_else(|error| Err(StoreError::unavailable(error)))
    }
}

#[async_trait]
impl Sessions for ClusterSessions {
    async fn create(&self, mut new: NewSession) -> StoreResult<()> {
        // A session whose login was answered does not end early because a clock was behind.
        let used = new.session.last_used_at;
        let behind = self.time.bounds(used, self.time.postgres()).latest.since(used);
        new.session.expires_at = new.session.expires_at.plus(behind);
        self.database
            .once("create_session", Repeat::Harmless, |connection| {
                let NewSession { token, session } = new.clone();
                Box::pin(async move {
                    sqlx::query(CREATE)
                        .bind(&token.as_bytes()[..])
                        .bind(session.account.0)
                        .bind(session.device.as_ref().map(|device| &device.as_bytes()[..]))
                        .bind(millis(session.authenticated_at))
                        .bind(millis(session.last_used_at))
                        .bind(millis(session.expires_at))
                        .execute(connection)
                        .await
                        .map(drop)
                })
            })
            .await
    }

    async fn find(&self, token: &TokenHash) -> StoreResult<Option<Session>> {
        let Copies { process, redis, .. } = &self.copies;
        if let Some(session) = process.get(token) {
            found_in("process");
            return Ok(Some(session));
        }
        let (generation, begun) = (process.generation(), Instant::now());
        let asked_at = match redis.find(token, self.history.id()).await {
            Ok(Copy::Ended) => {
                found_in("redis");
                return Ok(None);
            }
            Ok(Copy::Found { session, age }) => {
                found_in("redis");
                process.keep(
                    *token,
                    session.clone(),
                    begun + self.ttl.saturating_sub(age),
                    generation,
                );
                return Ok(Some(session));
            }
            Ok(Copy::Absent(now)) => Some(now),
            // Noted where it happens; Postgres knows too.
            Err(_) => None,
        };
        found_in("postgres");
        let (store_id, session) = self.ask(token).await?;
        let Some(session) = session else { return Ok(None) };
        if let Some(asked_at) = asked_at
            && matches!(redis.fill(token, store_id, &session, asked_at).await, Ok(Fill::Ended))
        {
            return Ok(None);
        }
        process.keep(*token, session.clone(), begun + self.ttl, generation);
        Ok(Some(session))
    }

    async fn confirm(&self, token: &TokenHash) -> StoreResult<Option<Session>> {
        self.ask(token).await.map(|(_, session)| session)
    }

    async fn touch(
        &self,
        token: &TokenHash,
        now: UnixMillis,
        expires_at: UnixMillis,
    ) -> StoreResult<()> {
        let key = *token;
        self.database
            .once("touch", Repeat::Harmless, move |connection| {
                Box::pin(async move {
                    sqlx::query(TOUCH)
                        .bind(&key.as_bytes()[..])
                        .bind(millis(now))
                        .bind(millis(expires_at))
                        .execute(connection)
                        .await
                        .map(drop)
                })
            })
            .await?;
        self.copies.process.touch(token, now, expires_at);
        // A copy that does not know is looked at by somebody who notes the use again; and Redis
        // notes its failures.
        let _ = self.copies.redis.touch(token, now, expires_at).await;
        Ok(())
    }

    async fn revoke(&self, token: &TokenHash) -> StoreResult<u32> {
        let token = *token;
        self.remove(Some(token), move |connection| {
            Box::pin(async move {
                let query = sqlx::query(REVOKE).bind(&token.as_bytes()[..]);
                tokens(&query.fetch_all(connection).await?)
            })
        })
        .await
    }

    async fn revoke_all(&self, account: AccountId) -> StoreResult<u32> {
        self.remove(None, move |connection| {
            Box::pin(async move {
                tokens(&sqlx::query(REVOKE_ALL).bind(account.0).fetch_all(connection).await?)
            })
        })
        .await
    }
}

impl Copies {
    /// The sessions are no more. The mark in Redis comes first: whoever forgets afterwards reads
    /// nothing old from there.
    async fn ended(&self, tokens: &[TokenHash]) {
        self.redis.ended(tokens).await;
        self.forget(tokens);
    }

    /// Whether the sessions are any more is for Postgres to say.
    async fn doubted(&self, tokens: &[TokenHash]) {
        self.redis.drop(tokens).await;
        self.forget(tokens);
    }

    fn forget(&self, tokens: &[TokenHash]) {
        self.process.forget(tokens);
        tokens.iter().for_each(|token| self.bus.session_ended(*token));
    }
}

/// The column `token` of each row.
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
