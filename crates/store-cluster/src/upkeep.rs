//! The store's care for itself: a commit and an answer, to see whether both work, and the removal of what has expired.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use qpq_domain::{TokenHash, UnixMillis};
use qpq_ports::{StoreResult, Upkeep};
use redis::Cmd;
use sqlx::PgConnection;

use crate::{
    inboxes::{self, SWEEP},
    postgres::{Database, Repeat, row::millis},
    redis::Redis,
    sessions::{self, ClusterSessions},
};

/// Whoever holds this advisory lock sweeps; the others leave it at that.
const SWEEPER: i64 = 0x7170_7173_7765_6570; // "qpqsweep"

#[derive(Debug)]
pub(crate) struct ClusterUpkeep {
    database: Database,
    redis: Redis,
    sessions: Arc<ClusterSessions>,
    recent_ids: Duration,
}

impl ClusterUpkeep {
    pub(crate) fn new(
        database: Database,
        redis: Redis,
        sessions: Arc<ClusterSessions>,
        recent_ids: Duration,
    ) -> Self {
        Self { database, redis, sessions, recent_ids }
    }
}

#[async_trait]
impl Upkeep for ClusterUpkeep {
    async fn check(&self) -> StoreResult<()> {
        self.database
            .once("check", Repeat::Harmless, |connection| {
                Box::pin(async move {
                    sqlx::query("UPDATE heartbeat SET beats = beats + 1").execute(connection).await.map(drop)
                })
            })
            .await?;
        let mut beat = Cmd::new();
        beat.arg("INCR").arg(self.redis.key(format_args!("heartbeat")));
        self.redis.command::<u64>("check", &beat).await.map(drop)
    }

    async fn sweep(&self, now: UnixMillis) -> StoreResult<u64> {
        let recent_ids = self.recent_ids;
        let (rows, tokens) = self
            .database
            .run("sweep", Repeat::Harmless, |connection| {
                Box::pin(async move { sweep(connection, now, recent_ids).await })
            })
            .await?;
        self.sessions.ended(&tokens).await;
        Ok(rows + tokens.len() as u64)
    }
}

/// One bounded batch of each kind; how many rows went, besides the sessions.
async fn sweep(
    connection: &mut PgConnection,
    now: UnixMillis,
    recent_ids: Duration,
) -> sqlx::Result<(u64, Vec<TokenHash>)> {
    let ours: bool = sqlx::query_scalar("SELECT pg_try_advisory_xact_lock($1)")
        .bind(SWEEPER)
        .fetch_one(&mut *connection)
        .await?;
    if !ours {
        return Ok((0, Vec::new()));
    }
    let mut rows = inboxes::sweep(connection, now, recent_ids).await?;
    for sql in [
        "DELETE FROM key_package WHERE id = ANY (ARRAY (
             SELECT id FROM key_package WHERE not_after < $1 ORDER BY not_after LIMIT $2 FOR UPDATE SKIP LOCKED))",
        "DELETE FROM key_package_given WHERE ctid = ANY (ARRAY (
             SELECT ctid FROM key_package_given WHERE not_after < $1 ORDER BY not_after LIMIT $2
                FOR UPDATE SKIP LOCKED))",
    ] {
        let swept = sqlx::query(sql).bind(millis(now)).bind(SWEEP).execute(&mut *connection).await?;
        rows += swept.rows_affected();
    }
    let ended = sqlx::query(
        "DELETE FROM session WHERE token = ANY (ARRAY (
             SELECT token FROM session WHERE expires_at <= $1 ORDER BY expires_at LIMIT $2 FOR UPDATE SKIP LOCKED))
         RETURNING token",
    )
    .bind(millis(now))
    .bind(SWEEP)
    .fetch_all(connection)
    .await?;
    Ok((rows, ended.iter().map(sessions::token).collect::<sqlx::Result<_>>()?))
}
