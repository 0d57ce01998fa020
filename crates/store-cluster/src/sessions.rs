//! Sessions: durable in Postgres, those in use also in Redis and in this process, each for a few seconds.
//!
//! An end of a session is a row deleted in Postgres, a tombstone over its copy in Redis, and a word to every edge. What could
//! undo it is a lookup that has read the row, is overtaken, and only then keeps what it read. In Redis it cannot, because
//! copies are only ever set where nothing is, and the tombstone outlives every lookup. In this process each end counts up a
//! generation, and a lookup keeps nothing when the generation is not the one it began with. A copy says when it was made and
//! is believed for so long; so a Redis that came back with an old state brings no session back.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::{BufMut as _, BytesMut};
use moka::sync::Cache;
use parking_lot::Mutex;
use qpq_domain::{AccountId, DeviceId, IdentityKey, TokenHash, UnixMillis};
use qpq_ports::{NewSession, Session, Sessions, StoreResult};
use redis::{Cmd, Script, Value};
use sqlx::postgres::PgRow;
use tokio::sync::broadcast::error::RecvError;

use crate::{
    metrics as names,
    nats::{Bus, Heard},
    postgres::{
        Database, Repeat,
        row::{Columns as _, millis},
    },
    redis::Redis,
};

/// Sessions in this process at most, about 250 bytes each.
const CACHED: u64 = 100_000;
/// How long a tombstone lies: longer than any lookup takes.
const TOMBSTONE: Duration = Duration::from_secs(60);

/// Sets a copy where there is none, stamped with Redis's own time.
/// KEYS: copy. ARGV: the session, for how many ms.
static KEEP: std::sync::LazyLock<Script> = std::sync::LazyLock::new(|| {
    Script::new(
        "local time = redis.call('TIME')
         local stamp = struct.pack('>I8', time[1] * 1000 + math.floor(time[2] / 1000))
         redis.call('SET', KEYS[1], stamp .. ARGV[1], 'PX', ARGV[2], 'NX')
         return 1",
    )
});

/// A copy that is not older than it may be.
/// KEYS: copy. ARGV: how many ms that is.
static LOOK: std::sync::LazyLock<Script> = std::sync::LazyLock::new(|| {
    Script::new(
        "local copy = redis.call('GET', KEYS[1])
         if not copy or #copy <= 8 then return false end
         local time = redis.call('TIME')
         if struct.unpack('>I8', copy) + ARGV[1] < time[1] * 1000 + math.floor(time[2] / 1000) then return false end
         return string.sub(copy, 9)",
    )
});

const FIND: &str = "
    SELECT s.account, a.identity, s.device, s.authenticated_at, s.last_used_at, s.expires_at
      FROM session s JOIN account a ON a.id = s.account WHERE s.token = $1";

#[derive(Debug)]
pub(crate) struct ClusterSessions {
    database: Database,
    redis: Redis,
    bus: Bus,
    ttl: Duration,
    here: Here,
}

/// The sessions in this process.
#[derive(Debug)]
struct Here {
    sessions: Cache<TokenHash, Session>,
    generation: Mutex<u64>,
}

impl Here {
    fn generation(&self) -> u64 {
        *self.generation.lock()
    }

    /// Keeps what was read, unless a session ended since `generation` was noted.
    fn keep(&self, token: TokenHash, session: Session, generation: u64) {
        let current = self.generation.lock();
        if *current == generation {
            self.sessions.insert(token, session);
        }
    }

    fn forget(&self, token: &TokenHash) {
        *self.generation.lock() += 1;
        self.sessions.invalidate(token);
    }

    fn forget_all(&self) {
        *self.generation.lock() += 1;
        self.sessions.invalidate_all();
    }
}

impl ClusterSessions {
    pub(crate) fn new(database: Database, redis: Redis, bus: Bus, ttl: Duration) -> Self {
        let sessions = Cache::builder().max_capacity(CACHED).time_to_live(ttl).build();
        Self { database, redis, bus, ttl, here: Here { sessions, generation: Mutex::default() } }
    }

    /// Forgets what other edges say has ended, as long as there is a bus.
    pub(crate) async fn listen(self: Arc<Self>) {
        let mut heard = self.bus.hear();
        loop {
            match heard.recv().await {
                Ok(Heard::SessionEnded(token)) => self.here.forget(&token),
                Ok(_) => {}
                // Something was missed, and nobody knows what.
                Err(RecvError::Lagged(_)) => self.here.forget_all(),
                Err(RecvError::Closed) => return,
            }
        }
    }

    /// Sees to it that nobody believes in the sessions any more, which Postgres has not.
    pub(crate) async fn ended(&self, tokens: &[TokenHash]) {
        for token in tokens {
            self.here.forget(token);
            self.bus.session_ended(*token);
            let mut bury = Cmd::new();
            bury.arg("SET").arg(self.key(token)).arg("").arg("PX").arg(TOMBSTONE.as_millis() as u64);
            // A failure is counted where it happens; then the copy is believed for as long as it may be.
            let _: StoreResult<()> = self.redis.command("end_session", &bury).await;
        }
    }

    fn key(&self, token: &TokenHash) -> String {
        let hash = token.as_bytes().iter().fold(String::with_capacity(64), |mut hex, byte| {
            use std::fmt::Write as _;
            write!(hex, "{byte:02x}").expect("a String grows");
            hex
        });
        self.redis.key(format_args!("session:{hash}"))
    }

    fn ttl_millis(&self) -> bytes::Bytes {
        self.ttl.as_millis().to_string().into()
    }

    /// From Redis; none where that fails, because Postgres knows as well.
    async fn copy(&self, token: &TokenHash) -> Option<Session> {
        let copy: Value =
            self.redis.script("session", &LOOK, &[self.key(token)], &[self.ttl_millis()]).await.ok()?;
        match copy {
            Value::BulkString(bytes) => decode(&bytes),
            _ => None,
        }
    }

    async fn keep_copy(&self, token: &TokenHash, session: &Session) {
        let args = [encode(session), self.ttl_millis()];
        // As above.
        let _: StoreResult<u64> = self.redis.script("keep_session", &KEEP, &[self.key(token)], &args).await;
    }

    /// Deletes by one statement, and has everybody forget.
    async fn end(
        &self,
        op: &'static str,
        sql: &'static str,
        which: impl Fn(Sql) -> Sql + Send + Sync + Clone + 'static,
    ) -> StoreResult<u32> {
        let tokens = self
            .database
            .once(op, Repeat::Harmless, |connection| {
                let which = which.clone();
                Box::pin(async move {
                    let rows = which(sqlx::query(sql)).fetch_all(connection).await?;
                    rows.iter().map(token).collect::<sqlx::Result<Vec<_>>>()
                })
            })
            .await?;
        self.ended(&tokens).await;
        Ok(u32::try_from(tokens.len()).unwrap_or(u32::MAX))
    }
}

type Sql = sqlx::query::Query<'static, sqlx::Postgres, sqlx::postgres::PgArguments>;

#[async_trait]
impl Sessions for ClusterSessions {
    async fn create(&self, new: NewSession) -> StoreResult<()> {
        self.database
            .once("create_session", Repeat::Harmless, |connection| {
                let NewSession { token, session } = new.clone();
                Box::pin(async move {
                    // A token is 256 random bits: one that is there already is this very session, made twice.
                    sqlx::query(
                        "INSERT INTO session (token, account, device, authenticated_at, last_used_at, expires_at)
                         VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT DO NOTHING",
                    )
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
        let found = |from| metrics::counter!(names::SESSION_LOOKUPS, "from" => from).increment(1);
        if let Some(session) = self.here.sessions.get(token) {
            found("process");
            return Ok(Some(session));
        }
        let generation = self.here.generation();
        if let Some(session) = self.copy(token).await {
            found("redis");
            self.here.keep(*token, session.clone(), generation);
            return Ok(Some(session));
        }
        found("postgres");
        let session = self.confirm(token).await?;
        if let Some(session) = &session {
            self.here.keep(*token, session.clone(), generation);
            self.keep_copy(token, session).await;
        }
        Ok(session)
    }

    async fn confirm(&self, token: &TokenHash) -> StoreResult<Option<Session>> {
        let token = *token;
        self.database
            .once("session", Repeat::Harmless, |connection| {
                Box::pin(async move {
                    let row =
                        sqlx::query(FIND).bind(&token.as_bytes()[..]).fetch_optional(connection).await?;
                    row.as_ref().map(session).transpose()
                })
            })
            .await
    }

    async fn touch(&self, token: &TokenHash, now: UnixMillis, expires_at: UnixMillis) -> StoreResult<()> {
        let name = *token;
        self.database
            .once("touch_session", Repeat::Harmless, |connection| {
                Box::pin(async move {
                    sqlx::query("UPDATE session SET last_used_at = $2, expires_at = $3 WHERE token = $1")
                        .bind(&name.as_bytes()[..])
                        .bind(millis(now))
                        .bind(millis(expires_at))
                        .execute(connection)
                        .await
                        .map(drop)
                })
            })
            .await?;
        // The copies say less than is true, which only leads to another touch; these two know better at once.
        self.here.forget(token);
        let mut forget = Cmd::new();
        forget.arg("DEL").arg(self.key(token));
        let _: StoreResult<u64> = self.redis.command("touch_session", &forget).await;
        Ok(())
    }

    async fn revoke(&self, token: &TokenHash) -> StoreResult<u32> {
        const SQL: &str = "DELETE FROM session WHERE token = $1 RETURNING token";
        let name = token.as_bytes().to_vec();
        self.end("revoke", SQL, move |query| query.bind(name.clone())).await
    }

    async fn revoke_all(&self, account: AccountId) -> StoreResult<u32> {
        const SQL: &str = "DELETE FROM session WHERE account = $1 RETURNING token";
        self.end("revoke_all", SQL, move |query| query.bind(account.0)).await
    }
}

/// The column `token` of a row.
pub(crate) fn token(row: &PgRow) -> sqlx::Result<TokenHash> {
    row.hash("token").map(TokenHash::new)
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

/// account (8) ‖ authenticated_at (8) ‖ last_used_at (8) ‖ expires_at (8) ‖ identity (32) ‖ device (0 or 16), big-endian.
fn encode(session: &Session) -> bytes::Bytes {
    let mut copy = BytesMut::with_capacity(80);
    copy.put_i64(session.account.0);
    copy.put_u64(session.authenticated_at.0);
    copy.put_u64(session.last_used_at.0);
    copy.put_u64(session.expires_at.0);
    copy.put_slice(session.identity.as_bytes());
    if let Some(device) = &session.device {
        copy.put_slice(device.as_bytes());
    }
    copy.freeze()
}

fn decode(copy: &[u8]) -> Option<Session> {
    let (account, rest) = copy.split_first_chunk()?;
    let (authenticated_at, rest) = rest.split_first_chunk()?;
    let (last_used_at, rest) = rest.split_first_chunk()?;
    let (expires_at, rest) = rest.split_first_chunk()?;
    let (identity, device) = rest.split_first_chunk()?;
    Some(Session {
        account: AccountId(i64::from_be_bytes(*account)),
        identity: IdentityKey::new(*identity),
        device: if device.is_empty() { None } else { Some(DeviceId::try_from(device).ok()?) },
        authenticated_at: UnixMillis(u64::from_be_bytes(*authenticated_at)),
        last_used_at: UnixMillis(u64::from_be_bytes(*last_used_at)),
        expires_at: UnixMillis(u64::from_be_bytes(*expires_at)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_read_as_it_was_written() {
        for device in [None, Some(DeviceId::new([7; 16]))] {
            let session = Session {
                account: AccountId(-1),
                identity: IdentityKey::new([3; 32]),
                device,
                authenticated_at: UnixMillis(1),
                last_used_at: UnixMillis(2),
                expires_at: UnixMillis(3),
            };
            let copy = encode(&session);
            assert_eq!(decode(&copy), Some(session));
            assert_eq!(decode(&copy[..63]), None);
        }
    }
}
