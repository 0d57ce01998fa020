//! Maintenance of the store: a check that Postgres commits, Redis writes and the clocks agree, and
//! the removal of expired rows, by one edge at a time.
//!
//! Each kind of row is removed in a transaction of its own, of bounded size. Absent devices are
//! moved in such transactions, too. A transaction that takes too long is retried with fewer rows,
//! so that a sweep makes progress however slow the removal is. Each success increases the number of
//! rows again.

use std::{
    sync::atomic::{AtomicI64, Ordering},
    time::Duration,
};

use async_trait::async_trait;
use parking_lot::Mutex;
use qpq_domain::{DeliveryLimits, IdentityKey, ReportLimits, StoreId, TokenHash, UnixMillis};
use qpq_ports::{
    EXPIRED_INVITES, Maintenance, NewHistory, OldSessions, StoreError, StoreResult, Swept,
};
use redis::Cmd;
use sqlx::PgConnection;
use tokio::time::Instant;

use crate::{
    ClusterStore, ConnectError, bans,
    deletion::FORGET_NAMES,
    effects::Effects,
    error::{PostgresError, Server},
    groups::FORGET_COMMITS,
    history::store_id,
    inboxes::{self, Absence, SWEEP, move_absent},
    invites, metrics as names,
    postgres::{
        Database, Repeat, Scope, Statement,
        row::{Columns as _, millis, millis_of, now_of},
    },
    reports,
    sessions::tokens,
    store::Inner,
    time::Time,
};

/// Time for which Redis keeps the value of a check.
const CHECKED: Duration = Duration::from_secs(60);

/// The number of the advisory lock of sweeps, "qpqsweep" in ASCII. No other lock uses it.
const SWEEPER: i64 = i64::from_be_bytes(*b"qpqsweep");

/// The factor by which the rows of a transaction are reduced after a timeout.
const SHRINK: i64 = 4;

const BEAT: &str = concat!(
    "UPDATE heartbeat SET beats = beats + 1 RETURNING store_now() AS postgres, ",
    store_id!(),
    " AS store_id"
);

/// Removes expired sessions. As in the statements below, locked rows are left to the next sweep.
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

/// A kind of row that a sweep removes or changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expiring {
    Messages,
    /// Positions of absent devices.
    Positions,
    Ids,
    Sessions,
    Packages,
    Given,
    /// Remembered commits of groups.
    Commits,
    Invites,
    /// Reserved names of deleted accounts.
    Names,
    /// Bans of the server that have ended.
    Bans,
    /// Bans of groups that have ended.
    GroupBans,
    Reports,
}

impl Expiring {
    const ALL: [Self; 12] = [
        Self::Messages,
        Self::Positions,
        Self::Ids,
        Self::Sessions,
        Self::Packages,
        Self::Given,
        Self::Commits,
        Self::Invites,
        Self::Names,
        Self::Bans,
        Self::GroupBans,
        Self::Reports,
    ];

    /// Returns the label in metrics.
    const fn op(self) -> &'static str {
        match self {
            Self::Messages => "sweep_messages",
            Self::Positions => "sweep_positions",
            Self::Ids => "sweep_message_ids",
            Self::Sessions => "sweep_sessions",
            Self::Packages => "sweep_key_packages",
            Self::Given => "sweep_given_key_packages",
            Self::Commits => "sweep_commits",
            Self::Invites => "sweep_invites",
            Self::Names => "sweep_reserved_names",
            Self::Bans => "sweep_bans",
            Self::GroupBans => "sweep_group_bans",
            Self::Reports => "sweep_reports",
        }
    }
}

/// Maximum rows of the next transaction of each kind.
#[derive(Debug)]
pub(crate) struct SweepSizes([AtomicI64; Expiring::ALL.len()]);

impl Default for SweepSizes {
    fn default() -> Self {
        Self(Expiring::ALL.map(|_| AtomicI64::new(SWEEP)))
    }
}

impl SweepSizes {
    fn get(&self, kind: Expiring) -> i64 {
        self.0[kind as usize].load(Ordering::Relaxed)
    }

    /// Increases the size after a transaction that ended in time.
    fn grow(&self, kind: Expiring) {
        self.set(kind, (self.get(kind) * 2).min(SWEEP));
    }

    /// Reduces and returns the size after a transaction that timed out; `None` if the size was one
    /// row.
    fn shrink(&self, kind: Expiring) -> Option<i64> {
        let before = self.get(kind);
        let size = (before / SHRINK).max(1);
        self.set(kind, size);
        (before > 1).then_some(size)
    }

    fn set(&self, kind: Expiring, size: i64) {
        self.0[kind as usize].store(size, Ordering::Relaxed);
    }
}

impl Inner {
    async fn commit(&self) -> StoreResult<()> {
        self.history.note(beat(&self.database, &self.time).await?);
        self.time.check().map_err(StoreError::unavailable)
    }

    async fn write_redis(&self) -> StoreResult<()> {
        let mut set = Cmd::new();
        set.arg("SET").arg(self.redis.key(format_args!("check"))).arg("1");
        set.arg("PX").arg(CHECKED.as_millis() as u64);
        self.redis.command("check", &set).await
    }

    /// Removes one batch of a kind. Retries with fewer rows if the transaction takes too long.
    async fn sweep_kind(&self, kind: Expiring, now: UnixMillis) -> Result<Swept, PostgresError> {
        let (sizes, limits) = (&self.sweep_sizes, &self.limits.delivery);
        let reports = self.limits.reports;
        loop {
            let (ended, moved) = (Mutex::default(), Mutex::default());
            let sweep = Sweep { kind, now, rows: sizes.get(kind), limits, reports, ended, moved };
            let swept = self.database.run(&sweep).await;
            let ended_sessions = sweep.ended.into_inner();
            self.applier.apply(Effects { ended_sessions, ..Effects::default() }).await;
            match swept {
                Ok(rows) => {
                    sizes.grow(kind);
                    return Ok(Swept { rows, moved: sweep.moved.into_inner() });
                }
                Err(error) if error.took_too_long() => {
                    metrics::counter!(names::SWEEPS_SHRUNK).increment(1);
                    let Some(smaller) = sizes.shrink(kind) else { return Err(error) };
                    tracing::warn!(
                        kind = sweep.kind.op(),
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
impl Maintenance for ClusterStore {
    async fn check(&self) -> StoreResult<()> {
        tokio::try_join!(self.inner.commit(), self.inner.write_redis()).map(drop)
    }

    async fn sweep(&self, now: UnixMillis) -> StoreResult<Swept> {
        // The statements compare with Postgres' clock, too.
        let now = self.inner.time.bounds(now, None).earliest;
        let (mut all, mut failed) = (Swept::default(), None);
        for kind in Expiring::ALL {
            match self.inner.sweep_kind(kind, now).await {
                Ok(swept) => {
                    all.rows += swept.rows;
                    all.moved.extend(swept.moved);
                }
                // A failure of one kind does not stop the others.
                Err(error) => failed = Some(error),
            }
        }
        match failed {
            Some(error) if all.rows == 0 => Err(error.into()),
            _ => Ok(all),
        }
    }

    fn store_id(&self) -> StoreId {
        self.inner.history.id()
    }

    async fn begin_history(&self, sessions: OldSessions) -> StoreResult<NewHistory> {
        let new = self.inner.history.begin(&self.inner.database, sessions).await?;
        // Other edges drop their copies when they detect the history.
        self.inner.applier.sessions.drop_all_local();
        Ok(new)
    }
}

/// Commits a heartbeat. Returns the history and Postgres' time.
struct Beat;

impl Statement for Beat {
    type Output = (StoreId, Option<UnixMillis>);

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "check"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Self::Output> {
        let row = sqlx::query(BEAT).fetch_one(connection).await?;
        Ok((row.store_id("store_id")?, now_of(&row)?))
    }
}

/// Commits a heartbeat, and observes Postgres' time.
async fn beat(database: &Database, time: &Time) -> Result<StoreId, PostgresError> {
    let asked = Instant::now();
    let (store_id, postgres) = database.run(&Beat).await?;
    time.observe(postgres, asked);
    Ok(store_id)
}

/// Observes Postgres' time before it is used.
pub(crate) async fn first_beat(database: &Database, time: &Time) -> Result<(), ConnectError> {
    beat(database, time).await.map_err(|error| Server::Postgres.unreachable(error))?;
    // `check` logs the error. The edge starts, and is not ready until the clocks agree.
    let _ = time.check();
    Ok(())
}

/// Removes at most `rows` expired rows of one kind; returns their number.
struct Sweep<'a> {
    kind: Expiring,
    now: UnixMillis,
    rows: i64,
    limits: &'a DeliveryLimits,
    reports: ReportLimits,
    /// Sessions that were removed, in all attempts.
    ended: Mutex<Vec<TokenHash>>,
    /// Accounts with a device that was marked as moved, in all attempts.
    moved: Mutex<Vec<IdentityKey>>,
}

impl Statement for Sweep<'_> {
    type Output = u64;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Transaction;

    fn name(&self) -> &'static str {
        self.kind.op()
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<u64> {
        let Self { kind, now, rows, limits, reports: report_limits, ref ended, ref moved } = *self;
        // The lock lasts until the end of the transaction. An edge without it leaves the work to
        // the edge that has it.
        let locked: bool = sqlx::query_scalar("SELECT pg_try_advisory_xact_lock($1)")
            .bind(SWEEPER)
            .fetch_one(&mut *connection)
            .await?;
        if !locked {
            return Ok(0);
        }
        let plain = |sql| sqlx::query(sql).bind(millis(now)).bind(rows);
        Ok(match kind {
            Expiring::Messages => inboxes::sweep(connection, now, rows, limits.recent_ids).await?,
            Expiring::Positions => {
                let step = move_absent(connection, Absence { limits, now, rows }).await?;
                moved.lock().extend(step.marked);
                step.rows
            }
            Expiring::Ids => inboxes::forget(connection, now, rows).await?,
            Expiring::Packages => plain(PACKAGES).execute(connection).await?.rows_affected(),
            Expiring::Given => plain(GIVEN).execute(connection).await?.rows_affected(),
            Expiring::Commits => plain(FORGET_COMMITS).execute(connection).await?.rows_affected(),
            Expiring::Invites => {
                let query = plain(invites::SWEEP).bind(millis_of(EXPIRED_INVITES));
                query.execute(connection).await?.rows_affected()
            }
            Expiring::Names => plain(FORGET_NAMES).execute(connection).await?.rows_affected(),
            Expiring::Bans => plain(bans::SWEEP).execute(connection).await?.rows_affected(),
            Expiring::GroupBans => {
                plain(bans::SWEEP_OF_GROUPS).execute(connection).await?.rows_affected()
            }
            Expiring::Reports => {
                let sweep = plain(reports::SWEEP).bind(millis_of(report_limits.max_age));
                sweep.execute(connection).await?.rows_affected()
            }
            Expiring::Sessions => {
                let tokens = tokens(&plain(SESSIONS).fetch_all(connection).await?)?;
                let rows = tokens.len() as u64;
                ended.lock().extend(tokens);
                rows
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_shrinks_to_one_row_and_grows_back() {
        let sizes = SweepSizes::default();
        let shrunk: Vec<_> = std::iter::from_fn(|| sizes.shrink(Expiring::Messages)).collect();
        assert_eq!(shrunk, [64, 16, 4, 1]);
        assert_eq!(sizes.get(Expiring::Ids), SWEEP, "each kind has its own");
        for expected in [2, 4, 8, 16, 32, 64, 128, 256, 256] {
            sizes.grow(Expiring::Messages);
            assert_eq!(sizes.get(Expiring::Messages), expected);
        }
    }
}
