//! The store's care for itself: a commit and a write to see whether both are possible, and the
//! removal of what has expired, by one edge at a time.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use qpq_domain::{StoreId, TokenHash, UnixMillis};
use qpq_ports::{NewHistory, StoreResult, Upkeep};
use redis::Cmd;
use sqlx::PgConnection;

use crate::{
    history::{History, store_id},
    inboxes::{self, SWEEP},
    postgres::{
        Database, Repeat,
        row::{Columns as _, millis},
    },
    redis::Redis,
    sessions::{ClusterSessions, tokens},
};

/// How long Redis keeps what a check wrote.
const CHECKED: Duration = Duration::from_secs(60);

/// Any number that nothing else in this database uses: "qpqsweep".
const SWEEPER: i64 = i64::from_be_bytes(*b"qpqsweep");

const BEAT: &str =
    concat!("UPDATE heartbeat SET beats = beats + 1 RETURNING ", store_id!(), " AS store_id");

/// What somebody is busy with has its turn next time, so a sweep waits for nobody.
const SESSIONS: &str = "
    DELETE FROM session WHERE token = ANY (ARRAY (
        SELECT token FROM session WHERE expires_at <= $1 ORDER BY expires_at LIMIT $2 FOR UPDATE SKIP LOCKED))
    RETURNING token";
const PACKAGES: &str = "
    DELETE FROM key_package WHERE id = ANY (ARRAY (
        SELECT id FROM key_package WHERE not_after < $1 ORDER BY not_after LIMIT $2 FOR UPDATE SKIP LOCKED))";
const GIVEN: &str = "
    DELETE FROM key_package_given WHERE ctid = ANY (ARRAY (
        SELECT ctid FROM key_package_given WHERE not_after < $1 ORDER BY not_after LIMIT $2 FOR UPDATE SKIP LOCKED))";

#[derive(Debug)]
pub(crate) struct ClusterUpkeep {
    database: Database,
    redis: Redis,
    sessions: Arc<ClusterSessions>,
    history: History,
    recent_ids: Duration,
}

impl ClusterUpkeep {
    pub(crate) fn new(
        database: Database,
        redis: Redis,
        sessions: Arc<ClusterSessions>,
        history: History,
        recent_ids: Duration,
    ) -> Self {
        Self { database, redis, sessions, history, recent_ids }
    }

    async fn commit(&self) -> StoreResult<()> {
        let store_id = self
            .database
            .once("check", Repeat::Harmless, |connection| {
                Box::pin(async move {
                    sqlx::query(BEAT).fetch_one(connection).await?.store_id("store_id")
                })
            })
            .await?;
        self.history.note(store_id);
        Ok(())
    }

    async fn write(&self) -> StoreResult<()> {
        let mut set = Cmd::new();
        set.arg("SET").arg(self.redis.key(format_args!("check"))).arg("1");
        set.arg("PX").arg(CHECKED.as_millis() as u64);
        self.redis.command("check", &set).await
    }
}

/// What a sweep removed.
#[derive(Debug, Default)]
struct Swept {
    rows: u64,
    sessions: Vec<TokenHash>,
}

#[async_trait]
impl Upkeep for ClusterUpkeep {
    async fn check(&self) -> StoreResult<()> {
        tokio::try_join!(self.commit(), self.write()).map(drop)
    }

    async fn sweep(&self, now: UnixMillis) -> StoreResult<u64> {
        let recent_ids = self.recent_ids;
        let swept = self
            .database
            .run("sweep", Repeat::Harmless, move |connection| {
                Box::pin(sweep(connection, now, recent_ids))
            })
            .await?;
        self.sessions.ended(&swept.sessions).await;
        Ok(swept.rows)
    }

    fn store_id(&self) -> StoreId {
        self.history.id()
    }

    async fn begin_history(&self) -> StoreResult<NewHistory> {
        self.history.begin(&self.database).await
    }
}

async fn sweep(
    connection: &mut PgConnection,
    now: UnixMillis,
    recent_ids: Duration,
) -> sqlx::Result<Swept> {
    // Until the end of the transaction; who does not get it leaves the work to who has it.
    let mine: bool = sqlx::query_scalar("SELECT pg_try_advisory_xact_lock($1)")
        .bind(SWEEPER)
        .fetch_one(&mut *connection)
        .await?;
    if !mine {
        return Ok(Swept::default());
    }
    let expired =
        sqlx::query(SESSIONS).bind(millis(now)).bind(SWEEP).fetch_all(&mut *connection).await?;
    let sessions = tokens(&expired)?;
    let mut rows = sessions.len() as u64;
    for sql in [PACKAGES, GIVEN] {
        let done = sqlx::query(sql).bind(millis(now)).bind(SWEEP).execute(&mut *connection).await?;
        rows += done.rows_affected();
    }
    // Last, because these locks are in the way of messages.
    rows += inboxes::sweep(connection, now, recent_ids).await?;
    Ok(Swept { rows, sessions })
}
