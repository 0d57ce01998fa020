//! The store's care for itself: a commit to see whether commits work, and the removal of what has
//! expired.
//!
//! A few bytes may well be committed on a disk that has no room for a message: the log keeps its
//! length and is written from the start again. So once a batch was refused, the commit that is
//! tried is larger than that batch.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use futures_util::{FutureExt as _, future::BoxFuture};
use qpq_domain::{StoreId, UnixMillis};
use qpq_ports::{Maintenance, NewHistory, StoreResult};
use sqlx::SqliteConnection;

use crate::{
    clock::Guard,
    damage::Damage,
    history::History,
    inboxes,
    row::millis,
    sessions::{EmbeddedSessions, tokens},
    writer::{Outcome, Scope, Writer},
};

/// Maximum rows removed in one job: what an Enqueue may have to wait for.
pub(crate) const SWEEP: i64 = 256;

/// Bytes that a few rows can take beyond their own: each touches pages of an index or two.
const LOAD: usize = 64 << 10;

#[derive(Debug)]
pub(crate) struct EmbeddedMaintenance {
    writer: Writer,
    sessions: Arc<EmbeddedSessions>,
    history: History,
    clock: Guard,
    recent_ids: Duration,
    damage: Damage,
}

impl EmbeddedMaintenance {
    pub(crate) fn new(
        writer: Writer,
        sessions: Arc<EmbeddedSessions>,
        history: History,
        clock: Guard,
        recent_ids: Duration,
    ) -> Self {
        Self { writer, sessions, history, clock, recent_ids, damage: Damage::new() }
    }
}

#[async_trait]
impl Maintenance for EmbeddedMaintenance {
    async fn check(&self) -> StoreResult<()> {
        self.damage.check(&self.writer).await?;
        if let Some(refused) = self.writer.refused() {
            self.lift(refused).await?;
        }
        self.writer
            .run(
                Scope::Batch,
                0,
                |connection| async move { beat(connection).await.map(Outcome::Keep) }.boxed(),
                |()| {},
            )
            .await
    }

    async fn sweep(&self, now: UnixMillis) -> StoreResult<u64> {
        self.look(now).await?;
        let (now, recent_ids) = (self.clock.bounds(now).earliest, self.recent_ids);
        let messages = self
            .remove(move |connection| inboxes::sweep(connection, now, recent_ids).boxed())
            .await?;
        let ids = self.remove(move |connection| inboxes::forget(connection, now).boxed()).await?;
        let keys = self.remove(move |connection| sweep_keys(connection, now).boxed()).await?;
        Ok(messages + ids + keys + self.sweep_sessions(now).await?)
    }

    fn store_id(&self) -> StoreId {
        self.history.id()
    }

    async fn begin_history(&self) -> StoreResult<NewHistory> {
        self.history.begin(&self.writer).await
    }
}

impl EmbeddedMaintenance {
    /// Looks at the clock, before anything is removed by what it shows.
    async fn look(&self, now: UnixMillis) -> StoreResult<()> {
        let (looking, clock) = (self.clock.clone(), self.clock.clone());
        self.writer
            .run(
                Scope::Job,
                0,
                move |connection| {
                    async move { looking.look(connection, now).await.map(Outcome::Keep) }.boxed()
                },
                move |belief| clock.looked(*belief, now),
            )
            .await
            .map(drop)
    }

    /// Removes rows of one kind, in a job of its own so that no message waits for more.
    async fn remove<W>(&self, work: W) -> StoreResult<u64>
    where
        W: for<'c> FnOnce(&'c mut SqliteConnection) -> BoxFuture<'c, sqlx::Result<u64>>
            + Send
            + 'static,
    {
        self.writer
            .run(
                Scope::Job,
                0,
                move |connection| async move { work(connection).await.map(Outcome::Keep) }.boxed(),
                |_| {},
            )
            .await
    }

    async fn sweep_sessions(&self, now: UnixMillis) -> StoreResult<u64> {
        let cache = self.sessions.cache().clone();
        let swept = self
            .writer
            .run(
                Scope::Job,
                0,
                move |connection| {
                    async move {
                        let rows = sqlx::query(
                            "DELETE FROM session WHERE token IN (
                                 SELECT token FROM session WHERE expires_at <= ?1 ORDER BY expires_at LIMIT ?2)
                             RETURNING token",
                        )
                        .bind(millis(now))
                        .bind(SWEEP)
                        .fetch_all(connection)
                        .await?;
                        tokens(&rows).map(Outcome::Keep)
                    }
                    .boxed()
                },
                move |sessions| cache.forget(sessions),
            )
            .await?;
        Ok(swept.len() as u64)
    }
}

impl EmbeddedMaintenance {
    /// Commits something that needs more room than a batch of so many bytes; the next beat lets go
    /// of it.
    async fn lift(&self, refused: usize) -> StoreResult<()> {
        let load =
            i64::try_from(refused.saturating_mul(2).saturating_add(LOAD)).unwrap_or(i64::MAX);
        self.writer
            .run(
                Scope::SingleEdge,
                refused,
                move |connection| {
                    async move {
                        sqlx::query("UPDATE heartbeat SET load = zeroblob(?1)")
                            .bind(load)
                            .execute(connection)
                            .await
                            .map(|_| Outcome::Keep(()))
                    }
                    .boxed()
                },
                |()| {},
            )
            .await
    }
}

/// Writes the one row that exists for this.
pub(crate) async fn beat(connection: &mut SqliteConnection) -> sqlx::Result<()> {
    sqlx::query("UPDATE heartbeat SET beats = beats + 1, load = NULL")
        .execute(connection)
        .await
        .map(drop)
}

async fn sweep_keys(connection: &mut SqliteConnection, now: UnixMillis) -> sqlx::Result<u64> {
    let mut rows = 0;
    for sql in [
        "DELETE FROM key_package WHERE id IN (
             SELECT id FROM key_package WHERE not_after < ?1 ORDER BY not_after LIMIT ?2)",
        "DELETE FROM key_package_given WHERE (owner, fingerprint) IN (
             SELECT owner, fingerprint FROM key_package_given WHERE not_after < ?1 ORDER BY not_after LIMIT ?2)",
    ] {
        rows += sqlx::query(sql)
            .bind(millis(now))
            .bind(SWEEP)
            .execute(&mut *connection)
            .await?
            .rows_affected();
    }
    Ok(rows)
}
