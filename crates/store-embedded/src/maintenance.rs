//! Maintenance: a commit that shows whether commits work, and the removal of expired rows.
//!
//! A disk without room for a message may still accept a commit of a few bytes, because the log
//! keeps its length and is overwritten from its start. Therefore, after a batch has failed, the
//! check commits more bytes than that batch had.

use std::time::Duration;

use async_trait::async_trait;
use qpq_domain::{StoreId, UnixMillis};
use qpq_ports::{Maintenance, NewHistory, OldSessions, StoreResult, Swept};
use sqlx::SqliteConnection;

use crate::{
    absence::{Absence, MoveAbsent, Moved},
    bans::SweepBans,
    clock::{Bounds, ClockGuard},
    damage::CheckStructure,
    deletion::SweepNames,
    effects::Effects,
    error::read_failed,
    groups::send::SweepCommits,
    history::BeginHistory,
    invites::SweepInvites,
    keys::SweepKeyPackages,
    messages::remove::{self, Removal, SWEEP_ROWS, Selection},
    reports::SweepReports,
    sessions::SweepSessions,
    statement::{Done, Scope, Statement},
    store::EmbeddedStore,
};

/// The bytes that a few rows need in addition to their content, for the changed pages of indexes.
const LOAD_MARGIN: usize = 64 << 10;

#[async_trait]
impl Maintenance for EmbeddedStore {
    async fn check(&self) -> StoreResult<()> {
        if self.damage.is_suspected() {
            self.damage.record(self.writer.run(CheckStructure).await)?;
        }
        self.damage.result()?;
        if let Some(refused) = self.writer.refused() {
            self.writer.run(WriteLoad { refused }).await?;
        }
        self.writer.run(Beat).await
    }

    async fn sweep(&self, now: UnixMillis) -> StoreResult<Swept> {
        let clock = self.memory.clock.clone();
        // Runs first, because a clock that jumped must not remove anything.
        self.writer.run(CheckClock { clock, now }).await?;
        let bounds = self.memory.clock.bounds(now);
        let now = bounds.earliest;
        let recent_ids = self.limits.delivery.recent_ids;
        // One statement for each kind of row, so that no message waits for all of them.
        let messages = self.writer.run(SweepMessages { now, recent_ids }).await?;
        let ids = self.writer.run(SweepIds { now }).await?;
        let key_packages = self.writer.run(SweepKeyPackages { now }).await?;
        let sessions = self.writer.run(SweepSessions { now }).await?;
        let commits = self.writer.run(SweepCommits { now }).await?;
        let invites = self.writer.run(SweepInvites { now }).await?;
        let names = self.writer.run(SweepNames { now }).await?;
        let bans = self.writer.run(SweepBans { now }).await?;
        let max_age = self.limits.reports.max_age;
        let reports = self.writer.run(SweepReports { now, max_age }).await?;
        let moved = self.move_absent(bounds).await?;
        Ok(Swept {
            rows: messages
                + ids
                + key_packages
                + sessions
                + commits
                + invites
                + names
                + bans
                + reports
                + moved.rows,
            moved: moved.account.into_iter().collect(),
        })
    }

    fn store_id(&self) -> StoreId {
        self.memory.history.id()
    }

    async fn begin_history(&self, sessions: OldSessions) -> StoreResult<NewHistory> {
        self.writer.run(BeginHistory(sessions)).await
    }
}

impl EmbeddedStore {
    /// Moves a device that is absent too long by one step. Does nothing if there is none.
    async fn move_absent(&self, bounds: Bounds) -> StoreResult<Moved> {
        let absence = Absence { bounds, limits: self.limits.delivery };
        // Searched outside the writer: most sweeps find no device.
        match absence.find(&self.readers).await.map_err(read_failed)? {
            Some(registration) => self.writer.run(MoveAbsent { registration, absence }).await,
            None => Ok(Moved::default()),
        }
    }
}

/// Updates the one row of the heartbeat table.
struct Beat;

impl Statement for Beat {
    type Answer = ();
    const NAME: &'static str = "beat";
    const SCOPE: Scope = Scope::Batch;

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<()>> {
        beat(tx).await.map(Done::keep)
    }
}

/// Updates the one row of the heartbeat table, and removes the load of [`WriteLoad`].
pub(crate) async fn beat(connection: &mut SqliteConnection) -> sqlx::Result<()> {
    sqlx::query("UPDATE heartbeat SET beats = beats + 1, load = NULL")
        .execute(connection)
        .await
        .map(drop)
}

/// Commits a row that needs more room than a batch of `refused` bytes. The next beat removes it.
struct WriteLoad {
    refused: usize,
}

impl Statement for WriteLoad {
    type Answer = ();
    const NAME: &'static str = "write load";
    const SCOPE: Scope = Scope::Alone;

    fn bytes(&self) -> usize {
        self.refused
    }

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<()>> {
        let load = self.refused.saturating_mul(2).saturating_add(LOAD_MARGIN);
        sqlx::query("UPDATE heartbeat SET load = zeroblob(?1)")
            .bind(i64::try_from(load).unwrap_or(i64::MAX))
            .execute(tx)
            .await?;
        Ok(Done::keep(()))
    }
}

/// Checks the clock, which shows `now`.
struct CheckClock {
    clock: ClockGuard,
    now: UnixMillis,
}

impl Statement for CheckClock {
    type Answer = ();
    const NAME: &'static str = "check clock";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<()>> {
        let clock_check = Some(self.clock.check(tx, self.now).await?);
        Ok(Done::with((), Effects { clock_check, ..Effects::default() }))
    }
}

/// Removes up to [`SWEEP_ROWS`] expired messages of any inbox. Returns their number.
struct SweepMessages {
    now: UnixMillis,
    recent_ids: Duration,
}

impl Statement for SweepMessages {
    type Answer = u64;
    const NAME: &'static str = "sweep messages";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<u64>> {
        let removal = Removal {
            selection: Selection::AnyExpired { rows: SWEEP_ROWS },
            at: self.now,
            recent_ids: self.recent_ids,
        };
        removal.run(tx).await.map(Done::keep)
    }
}

/// Removes up to [`SWEEP_ROWS`] message ids that no longer need to be remembered. Returns their
/// number.
struct SweepIds {
    now: UnixMillis,
}

impl Statement for SweepIds {
    type Answer = u64;
    const NAME: &'static str = "sweep message ids";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<u64>> {
        remove::forget_ids(tx, self.now).await.map(Done::keep)
    }
}
