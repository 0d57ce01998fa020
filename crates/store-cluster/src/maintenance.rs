//! The store's care for itself: a commit and a write to see whether both are possible, a look at
//! the clocks, and the removal of what has expired, by one edge at a time.
//!
//! Each kind of row is removed in a transaction of its own, of bounded size. A transaction that
//! takes too long is tried again with fewer rows, so that a sweep makes progress however slow
//! removing is; the size grows back with each success.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use parking_lot::Mutex;
use qpq_domain::{StoreId, TokenHash, UnixMillis};
use qpq_ports::{Maintenance, NewHistory, StoreError, StoreResult};
use redis::Cmd;
use sqlx::PgConnection;
use tokio::time::Instant;

use crate::{
    ConnectError,
    error::{Server, Shared},
    history::{History, store_id},
    inboxes::{self, SWEEP},
    metrics as names,
    postgres::{
        Database, Repeat,
        row::{Columns as _, millis, now_of},
    },
    redis::Redis,
    sessions::{ClusterSessions, tokens},
    time::Time,
};

/// How long Redis keeps what a check wrote.
const CHECKED: Duration = Duration::from_secs(60);

/// Any number that nothing else in this database uses: "qpqsweep".
const SWEEPER: i64 = i64::from_be_bytes(*b"qpqsweep");

/// A transaction that timed out is tried again with a fraction of its rows.
const SHRINK: i64 = 4;

const BEAT: &str = concat!(
    "UPDATE heartbeat SET beats = beats + 1 RETURNING store_now() AS postgres, ",
    store_id!(),
    " AS store_id"
);

/// What somebody is busy with has its turn next time, so a sweep waits for nobody.
const SESSIONS: &str = "
    DELETE FROM session WHERE token = ANY (ARRAY (
        SELECT token FROM session WHERE expires_at <= (SELECT least($1, store_now()))
         ORDER BY expires_at LIMIT $2 FOR UPDATE SKIP LOCKED))
    RETURNING token";
const PACKAGES: &str = "
    DELETE FROM key_package WHERE id = ANY (ARRAY (
        SELECT id FROM key_package WHERE not_after < (SELECT least($1, store_now()))
         ORDER BY not_after LIMIT $2 FOR UPDATE SKIP LOCKED))";
const GIVEN: &str = "
    DELETE FROM key_package_given WHERE ctid = ANY (ARRAY (
        SELECT ctid FROM key_package_given WHERE not_after < (SELECT least($1, store_now()))
         ORDER BY not_after LIMIT $2 FOR UPDATE SKIP LOCKED))";

/// A kind of row that expires.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Messages,
    Ids,
    Sessions,
    Packages,
    Given,
}

impl Kind {
    const ALL: [Self; 5] = [Self::Messages, Self::Ids, Self::Sessions, Self::Packages, Self::Given];

    /// The label in metrics.
    const fn op(self) -> &'static str {
        match self {
            Self::Messages => "sweep_messages",
            Self::Ids => "sweep_message_ids",
            Self::Sessions => "sweep_sessions",
            Self::Packages => "sweep_key_packages",
            Self::Given => "sweep_given_key_packages",
        }
    }
}

/// Rows in the next transaction of each kind.
#[derive(Debug)]
struct Sizes([AtomicI64; Kind::ALL.len()]);

impl Default for Sizes {
    fn default() -> Self {
        Self(Kind::ALL.map(|_| AtomicI64::new(SWEEP)))
    }
}

impl Sizes {
    fn get(&self, kind: Kind) -> i64 {
        self.0[kind as usize].load(Ordering::Relaxed)
    }

    /// The size after one that was removed in time.
    fn grow(&self, kind: Kind) {
        self.set(kind, (self.get(kind) * 2).min(SWEEP));
    }

    /// The size after one that was not; none if it was the smallest.
    fn shrink(&self, kind: Kind) -> Option<i64> {
        let before = self.get(kind);
        let size = (before / SHRINK).max(1);
        self.set(kind, size);
        (before > 1).then_some(size)
    }

    fn set(&self, kind: Kind, size: i64) {
        self.0[kind as usize].store(size, Ordering::Relaxed);
    }
}

#[derive(Debug)]
pub(crate) struct ClusterMaintenance {
    database: Database,
    redis: Redis,
    sessions: Arc<ClusterSessions>,
    history: History,
    time: Time,
    recent_ids: Duration,
    sizes: Sizes,
}

impl ClusterMaintenance {
    pub(crate) fn new(
        database: Database,
        redis: Redis,
        sessions: Arc<ClusterSessions>,
        history: History,
        time: Time,
        recent_ids: Duration,
    ) -> Self {
        Self { database, redis, sessions, history, time, recent_ids, sizes: Sizes::default() }
    }

    async fn commit(&self) -> StoreResult<()> {
        self.history.note(beat(&self.database, &self.time).await?);
        self.time.check().map_err(StoreError::unavailable)
    }

    async fn write(&self) -> StoreResult<()> {
        let mut set = Cmd::new();
        set.arg("SET").arg(self.redis.key(format_args!("check"))).arg("1");
        set.arg("PX").arg(CHECKED.as_millis() as u64);
        self.redis.command("check", &set).await
    }

    /// Removes a batch of one kind, in smaller ones if that takes too long.
    async fn sweep_kind(&self, kind: Kind, now: UnixMillis) -> Result<u64, Shared> {
        loop {
            let (size, recent_ids) = (self.sizes.get(kind), self.recent_ids);
            let ended: Arc<Mutex<Vec<TokenHash>>> = Arc::default();
            let swept = self
                .database
                .run_shared(kind.op(), Repeat::Harmless, |connection| {
                    let ended = Arc::clone(&ended);
                    Box::pin(async move {
                        let (rows, tokens) = sweep(connection, kind, now, size, recent_ids).await?;
                        ended.lock().extend(tokens);
                        Ok(rows)
                    })
                })
                .await;
            let ended = std::mem::take(&mut *ended.lock());
            self.sessions.ended(&ended).await;
            match swept {
                Ok(rows) => {
                    self.sizes.grow(kind);
                    return Ok(rows);
                }
                Err(error) if error.took_too_long() => {
                    metrics::counter!(names::SWEEPS_SHRUNK).increment(1);
                    let Some(smaller) = self.sizes.shrink(kind) else { return Err(error) };
                    tracing::warn!(
                        kind = kind.op(),
                        rows = smaller,
                        "sweep took too long, continuing with fewer rows"
                    );
                }
                Err(error) => return Err(error),
            }
        }
    }
}

#[async_trait]
impl Maintenance for ClusterMaintenance {
    async fn check(&self) -> StoreResult<()> {
        tokio::try_join!(self.commit(), self.write()).map(drop)
    }

    async fn sweep(&self, now: UnixMillis) -> StoreResult<u64> {
        // Postgres compares with its own clock, too.
        let now = self.time.bounds(now, None).earliest;
        let (mut rows, mut failed) = (0, None);
        for kind in Kind::ALL {
            match self.sweep_kind(kind, now).await {
                Ok(swept) => rows += swept,
                // The other kinds need not wait for this one.
                Err(error) => failed = Some(error),
            }
        }
        match failed {
            Some(error) if rows == 0 => Err(error.into()),
            _ => Ok(rows),
        }
    }

    fn store_id(&self) -> StoreId {
        self.history.id()
    }

    async fn begin_history(&self) -> StoreResult<NewHistory> {
        self.history.begin(&self.database).await
    }
}

/// Commits, and observes Postgres' time.
async fn beat(database: &Database, time: &Time) -> Result<StoreId, Shared> {
    let asked = Instant::now();
    let row = database
        .once_shared("check", Repeat::Harmless, |connection| {
            Box::pin(async move { sqlx::query(BEAT).fetch_one(connection).await })
        })
        .await?;
    time.observe(now_of(&row)?, asked);
    Ok(row.store_id("store_id")?)
}

/// Observes Postgres' time before anything uses it.
pub(crate) async fn first_beat(database: &Database, time: &Time) -> Result<(), ConnectError> {
    beat(database, time).await.map_err(|error| Server::Postgres.unreachable(error))?;
    // Logged there; the edge starts, and is not ready until the clocks agree.
    let _ = time.check();
    Ok(())
}

/// Removes at most `size` rows of one kind; returns how many, and whose sessions have ended.
async fn sweep(
    connection: &mut PgConnection,
    kind: Kind,
    now: UnixMillis,
    size: i64,
    recent_ids: Duration,
) -> sqlx::Result<(u64, Vec<TokenHash>)> {
    // Until the end of the transaction; who does not get it leaves the work to who has it.
    let mine: bool = sqlx::query_scalar("SELECT pg_try_advisory_xact_lock($1)")
        .bind(SWEEPER)
        .fetch_one(&mut *connection)
        .await?;
    if !mine {
        return Ok((0, Vec::new()));
    }
    let plain = |sql| sqlx::query(sql).bind(millis(now)).bind(size);
    let rows = match kind {
        Kind::Messages => inboxes::sweep(connection, now, size, recent_ids).await?,
        Kind::Ids => inboxes::forget(connection, now, size).await?,
        Kind::Packages => plain(PACKAGES).execute(connection).await?.rows_affected(),
        Kind::Given => plain(GIVEN).execute(connection).await?.rows_affected(),
        Kind::Sessions => {
            let tokens = tokens(&plain(SESSIONS).fetch_all(connection).await?)?;
            return Ok((tokens.len() as u64, tokens));
        }
    };
    Ok((rows, Vec::new()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_shrinks_to_one_row_and_grows_back() {
        let sizes = Sizes::default();
        let shrunk: Vec<_> = std::iter::from_fn(|| sizes.shrink(Kind::Messages)).collect();
        assert_eq!(shrunk, [64, 16, 4, 1]);
        assert_eq!(sizes.get(Kind::Ids), SWEEP, "each kind has its own");
        for expected in [2, 4, 8, 16, 32, 64, 128, 256, 256] {
            sizes.grow(Kind::Messages);
            assert_eq!(sizes.get(Kind::Messages), expected);
        }
    }
}
