//! Jobs in SQLite. A claim moves `run_at` to the end of its lease, so the job of a worker that
//! hangs becomes due again by itself. No worker is left when the store is opened, so every claim is
//! then released.
//!
//! `run_at` follows the time that the clock guard believes ([`ClockGuard::believed`]).

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use async_trait::async_trait;
use qpq_domain::UnixMillis;
use qpq_ports::{
    Claim, ClaimRequest, ClaimState, DeadChange, DeadJob, Job, JobEnd, JobId, JobStats, Jobs,
    NewJob, StoreResult,
};
use sqlx::{
    ConnectOptions as _, Row as _, SqliteConnection,
    sqlite::{SqliteConnectOptions, SqliteRow},
};

use crate::{
    clock::{Belief, ClockGuard},
    error::{NeverWritten, read_failed},
    files::DATABASE_FILE,
    open_error::{OpenError, failed},
    row::{Columns as _, millis},
    schema::check_current,
    statement::{Done, SMALL, Statement},
    store::EmbeddedStore,
};

/// The longest wait that is stored. The instant after a longer one might not fit an `i64`.
const LONGEST_WAIT: Duration = Duration::from_secs(10 * 365 * 86_400);

/// Selects two ranges of the index: the jobs that are due, and then those beyond the horizon, which
/// is never earlier than the present.
const DUE: &str = "
    SELECT id, run_at FROM job WHERE kind = ?1 AND died_at IS NULL AND run_at <= ?2
    UNION ALL
    SELECT id, run_at FROM job WHERE kind = ?1 AND died_at IS NULL AND run_at > ?3
     ORDER BY run_at, id LIMIT +?4";
const CLAIM: &str = "
    UPDATE job SET run_at = ?2, claim = ?3, again_at = NULL, attempts = attempts + 1 WHERE id = ?1
    RETURNING payload, attempts";

const PUT: &str = "
    INSERT INTO job (kind, key, payload, run_at) VALUES (?1, ?2, ?3, ?4) ON CONFLICT DO NOTHING";
const PUT_AGAIN: &str = "
    UPDATE job SET run_at = iif(claim IS NULL, min(run_at, ?3), run_at),
           again_at = iif(claim IS NULL, NULL, min(coalesce(again_at, ?3), ?3))
     WHERE kind = ?1 AND key = ?2 AND died_at IS NULL";

/// A claim is valid until another worker claims the job, also after its lease has ended.
const RENEW: &str = "UPDATE job SET run_at = ?3 WHERE id = ?1 AND claim = ?2";
const DONE: &str = "DELETE FROM job WHERE id = ?1 AND claim = ?2 AND again_at IS NULL";
const DONE_ONCE: &str = "
    UPDATE job SET run_at = again_at, claim = NULL, again_at = NULL, attempts = 0, last_error = NULL
     WHERE id = ?1 AND claim = ?2 AND again_at IS NOT NULL";
const REPEAT: &str = "
    UPDATE job SET run_at = min(?3, coalesce(again_at, ?3)), claim = NULL, again_at = NULL,
           attempts = 0, last_error = NULL
     WHERE id = ?1 AND claim = ?2";
const RETRY: &str = "
    UPDATE job SET run_at = ?3, claim = NULL, again_at = NULL, last_error = ?4
     WHERE id = ?1 AND claim = ?2";
const RELEASE: &str = "
    UPDATE job SET run_at = ?3, claim = NULL, again_at = NULL, attempts = max(attempts - 1, 0)
     WHERE id = ?1 AND claim = ?2";
const DIE: &str = "
    UPDATE job SET died_at = ?3, claim = NULL, last_error = ?4 WHERE id = ?1 AND claim = ?2";
/// Inserts the job that was put while the dead one was running.
const REPLACE_DEAD: &str = "
    INSERT INTO job (kind, key, payload, run_at)
    SELECT kind, key, payload, again_at FROM job WHERE id = ?1 AND again_at IS NOT NULL";

const STATS: &str = "
    SELECT kind,
           count(*) FILTER (WHERE died_at IS NULL AND (claim IS NULL OR run_at <= ?1)) AS waiting,
           count(*) FILTER (WHERE died_at IS NULL AND claim IS NOT NULL AND run_at > ?1) AS claimed,
           count(*) FILTER (WHERE died_at IS NOT NULL) AS dead,
           max(0, ?1 - coalesce(min(run_at) FILTER (WHERE died_at IS NULL AND run_at > 0), ?1))
           AS overdue
      FROM job GROUP BY kind ORDER BY kind";

const DEAD: &str = "
    SELECT id, kind, attempts, died_at, last_error FROM job WHERE died_at IS NOT NULL
     ORDER BY died_at DESC, id DESC LIMIT +?1";
const RETRY_DEAD: &str = "
    UPDATE job SET run_at = ?2, died_at = NULL, again_at = NULL, attempts = 0
     WHERE id = ?1 AND died_at IS NOT NULL AND NOT EXISTS (
           SELECT 1 FROM job AS live
            WHERE live.kind = job.kind AND live.key = job.key AND live.died_at IS NULL)";
const IS_DEAD: &str = "SELECT EXISTS (SELECT 1 FROM job WHERE id = ?1 AND died_at IS NOT NULL)";
const REMOVE_DEAD: &str = "DELETE FROM job WHERE id = ?1 AND died_at IS NOT NULL";

/// All statements but [`STATS`], which counts all jobs and therefore reads all.
#[cfg(test)]
pub(crate) const STATEMENTS: [&str; 16] = [
    DUE,
    CLAIM,
    PUT,
    PUT_AGAIN,
    RENEW,
    DONE,
    DONE_ONCE,
    REPEAT,
    RETRY,
    RELEASE,
    DIE,
    REPLACE_DEAD,
    DEAD,
    RETRY_DEAD,
    IS_DEAD,
    REMOVE_DEAD,
];

/// The queue of jobs for the tools of the operator, whether or not a server is running.
#[derive(Debug)]
pub struct JobsOperator {
    connection: SqliteConnection,
    clock: ClockGuard,
    path: PathBuf,
}

impl JobsOperator {
    /// Opens the queue in the data directory `data_dir`.
    pub async fn open(data_dir: &Path) -> Result<Self, OpenError> {
        let path = data_dir.join(DATABASE_FILE);
        let failed = |error: sqlx::Error| failed(&path, &error);
        let mut connection = SqliteConnectOptions::new()
            .filename(&path)
            .busy_timeout(Duration::from_secs(5))
            .disable_statement_logging()
            .connect()
            .await
            .map_err(failed)?;
        check_current(&mut connection, &path).await?;
        let clock = ClockGuard::new(Belief::read(&mut connection).await.map_err(failed)?);
        Ok(Self { connection, clock, path })
    }

    /// Counts the jobs of each kind, as [`Jobs::stats`] does.
    pub async fn stats(&mut self, now: UnixMillis) -> Result<Vec<JobStats>, OpenError> {
        let query = sqlx::query(STATS).bind(millis(self.clock.believed(now)));
        let rows = query.fetch_all(&mut self.connection).await;
        let found = rows.and_then(|rows| rows.iter().map(stats).collect());
        found.map_err(|error| failed(&self.path, &error))
    }

    /// Returns the newest dead jobs, as [`Jobs::dead`] does.
    pub async fn dead(&mut self, limit: u32) -> Result<Vec<DeadJob>, OpenError> {
        let query = sqlx::query(DEAD).bind(i64::from(limit));
        let rows = query.fetch_all(&mut self.connection).await;
        let found = rows.and_then(|rows| rows.iter().map(dead).collect());
        found.map_err(|error| failed(&self.path, &error))
    }

    /// Makes a dead job due, as [`Jobs::retry_dead`] does.
    pub async fn retry_dead(
        &mut self,
        job: JobId,
        now: UnixMillis,
    ) -> Result<DeadChange, OpenError> {
        let now = self.clock.believed(now);
        let changed = retry_dead(&mut self.connection, job, now).await;
        changed.map_err(|error| failed(&self.path, &error))
    }

    /// Removes a dead job, as [`Jobs::remove_dead`] does.
    pub async fn remove_dead(&mut self, job: JobId) -> Result<DeadChange, OpenError> {
        let changed = remove_dead(&mut self.connection, job).await;
        changed.map_err(|error| failed(&self.path, &error))
    }
}

/// Releases all claims, because their workers ended with the previous process. A `run_at` of 0
/// means that a job is due since an unknown time.
pub(crate) async fn release_all(connection: &mut SqliteConnection) -> sqlx::Result<()> {
    sqlx::query("UPDATE job SET run_at = 0, claim = NULL WHERE claim IS NOT NULL")
        .execute(connection)
        .await
        .map(drop)
}

/// Stores jobs in the transaction of their cause, at the believed time `now`. Returns the number of
/// new ones.
pub(crate) async fn put(
    connection: &mut SqliteConnection,
    jobs: &[NewJob],
    now: UnixMillis,
) -> sqlx::Result<u64> {
    let mut new = 0;
    for NewJob { kind, key, payload, delay } in jobs {
        let run_at = after(now, *delay);
        let inserted = sqlx::query(PUT)
            .bind(kind.as_str())
            .bind(key.as_deref())
            .bind(&payload[..])
            .bind(run_at)
            .execute(&mut *connection)
            .await?
            .rows_affected();
        if inserted == 0 {
            let query = sqlx::query(PUT_AGAIN).bind(kind.as_str()).bind(key.as_deref());
            query.bind(run_at).execute(&mut *connection).await?;
        }
        new += inserted;
    }
    Ok(new)
}

impl EmbeddedStore {
    fn believed(&self, now: UnixMillis) -> UnixMillis {
        self.memory.clock.believed(now)
    }
}

#[async_trait]
impl Jobs for EmbeddedStore {
    async fn put(&self, jobs: Vec<NewJob>, now: UnixMillis) -> StoreResult<u64> {
        self.writer.run(PutJobs { jobs, now: self.believed(now) }).await
    }

    async fn claim(&self, request: ClaimRequest, now: UnixMillis) -> StoreResult<Vec<Job>> {
        let now = self.believed(now);
        // Read outside the writer first: most claims find no job.
        let due = due(request, now).fetch_optional(&self.readers).await.map_err(read_failed)?;
        if due.is_none() {
            return Ok(Vec::new());
        }
        self.writer.run(ClaimJobs { request, now }).await
    }

    async fn renew(
        &self,
        claim: Claim,
        lease: Duration,
        now: UnixMillis,
    ) -> StoreResult<ClaimState> {
        self.writer.run(RenewClaim { claim, until: after(self.believed(now), lease) }).await
    }

    async fn finish(&self, claim: Claim, end: JobEnd, now: UnixMillis) -> StoreResult<ClaimState> {
        self.writer.run(FinishJob { claim, end, now: self.believed(now) }).await
    }

    async fn stats(&self, now: UnixMillis) -> StoreResult<Vec<JobStats>> {
        let now = millis(self.believed(now));
        let rows = sqlx::query(STATS).bind(now).fetch_all(&self.readers).await;
        rows.and_then(|rows| rows.iter().map(stats).collect()).map_err(read_failed)
    }

    async fn dead(&self, limit: u32) -> StoreResult<Vec<DeadJob>> {
        let rows = sqlx::query(DEAD).bind(i64::from(limit)).fetch_all(&self.readers).await;
        rows.and_then(|rows| rows.iter().map(dead).collect()).map_err(read_failed)
    }

    async fn retry_dead(&self, job: JobId, now: UnixMillis) -> StoreResult<DeadChange> {
        self.writer.run(RetryDead { job, now: self.believed(now) }).await
    }

    async fn remove_dead(&self, job: JobId) -> StoreResult<DeadChange> {
        self.writer.run(RemoveDead(job)).await
    }
}

struct PutJobs {
    jobs: Vec<NewJob>,
    now: UnixMillis,
}

impl Statement for PutJobs {
    type Answer = u64;
    const NAME: &'static str = "put jobs";

    fn bytes(&self) -> usize {
        self.jobs.iter().map(|job| SMALL + job.payload.len()).sum()
    }

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<u64>> {
        put(tx, &self.jobs, self.now).await.map(Done::keep)
    }
}

struct ClaimJobs {
    request: ClaimRequest,
    now: UnixMillis,
}

impl Statement for ClaimJobs {
    type Answer = Vec<Job>;
    const NAME: &'static str = "claim jobs";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<Vec<Job>>> {
        claim(tx, self.request, self.now).await.map(Done::keep)
    }
}

struct RenewClaim {
    claim: Claim,
    until: i64,
}

impl Statement for RenewClaim {
    type Answer = ClaimState;
    const NAME: &'static str = "renew claim of job";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<ClaimState>> {
        let query = sqlx::query(RENEW).bind(self.claim.job.0).bind(self.claim.token.to_vec());
        let renewed = query.bind(self.until).execute(tx).await?;
        Ok(Done::keep(state(renewed.rows_affected())))
    }
}

struct FinishJob {
    claim: Claim,
    end: JobEnd,
    now: UnixMillis,
}

impl Statement for FinishJob {
    type Answer = ClaimState;
    const NAME: &'static str = "finish job";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<ClaimState>> {
        finish(tx, self.claim, &self.end, self.now).await.map(Done::keep)
    }
}

struct RetryDead {
    job: JobId,
    now: UnixMillis,
}

impl Statement for RetryDead {
    type Answer = DeadChange;
    const NAME: &'static str = "retry dead job";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<DeadChange>> {
        retry_dead(tx, self.job, self.now).await.map(Done::keep)
    }
}

struct RemoveDead(JobId);

impl Statement for RemoveDead {
    type Answer = DeadChange;
    const NAME: &'static str = "remove dead job";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<DeadChange>> {
        remove_dead(tx, self.0).await.map(Done::keep)
    }
}

type Query = sqlx::query::QueryScalar<'static, sqlx::Sqlite, i64, sqlx::sqlite::SqliteArguments>;

fn due(request: ClaimRequest, now: UnixMillis) -> Query {
    sqlx::query_scalar(DUE)
        .bind(request.kind.as_str())
        .bind(millis(now))
        .bind(after(now, request.horizon))
        .bind(i64::from(request.limit))
}

async fn claim(
    connection: &mut SqliteConnection,
    request: ClaimRequest,
    now: UnixMillis,
) -> sqlx::Result<Vec<Job>> {
    let token: Vec<u8> =
        sqlx::query_scalar("SELECT randomblob(16)").fetch_one(&mut *connection).await?;
    let token: [u8; 16] = token.try_into().map_err(|_| NeverWritten("randomblob"))?;
    let ids = due(request, now).fetch_all(&mut *connection).await?;
    let mut jobs = Vec::with_capacity(ids.len());
    for id in ids {
        let row = sqlx::query(CLAIM)
            .bind(id)
            .bind(after(now, request.lease))
            .bind(&token[..])
            .fetch_one(&mut *connection)
            .await?;
        jobs.push(Job {
            claim: Claim { job: JobId(id), token },
            payload: row.bytes("payload")?,
            attempt: attempts(&row)?,
        });
    }
    Ok(jobs)
}

async fn finish(
    connection: &mut SqliteConnection,
    claim: Claim,
    end: &JobEnd,
    now: UnixMillis,
) -> sqlx::Result<ClaimState> {
    let Claim { job: JobId(job), token } = claim;
    let claimed = |sql| sqlx::query(sql).bind(job).bind(token.to_vec());
    let ended = match end {
        JobEnd::Done => {
            let removed = claimed(DONE).execute(&mut *connection).await?;
            if removed.rows_affected() > 0 {
                return Ok(ClaimState::Valid);
            }
            claimed(DONE_ONCE).execute(connection).await?
        }
        JobEnd::RepeatAfter { wait } => {
            claimed(REPEAT).bind(after(now, *wait)).execute(connection).await?
        }
        JobEnd::RetryAfter { wait, error } => {
            let query = claimed(RETRY).bind(after(now, *wait)).bind(error.clone().into_owned());
            query.execute(connection).await?
        }
        JobEnd::Released => claimed(RELEASE).bind(millis(now)).execute(connection).await?,
        JobEnd::Dead { error } => {
            let query = claimed(DIE).bind(millis(now)).bind(error.clone().into_owned());
            let died = query.execute(&mut *connection).await?;
            if died.rows_affected() > 0 {
                sqlx::query(REPLACE_DEAD).bind(job).execute(connection).await?;
            }
            died
        }
    };
    Ok(state(ended.rows_affected()))
}

async fn retry_dead(
    connection: &mut SqliteConnection,
    job: JobId,
    now: UnixMillis,
) -> sqlx::Result<DeadChange> {
    let query = sqlx::query(RETRY_DEAD).bind(job.0).bind(millis(now));
    if query.execute(&mut *connection).await?.rows_affected() > 0 {
        return Ok(DeadChange::Changed);
    }
    let dead: bool = sqlx::query_scalar(IS_DEAD).bind(job.0).fetch_one(connection).await?;
    Ok(if dead { DeadChange::Superseded } else { DeadChange::NotFound })
}

async fn remove_dead(connection: &mut SqliteConnection, job: JobId) -> sqlx::Result<DeadChange> {
    let removed = sqlx::query(REMOVE_DEAD).bind(job.0).execute(connection).await?;
    let found = removed.rows_affected() > 0;
    Ok(if found { DeadChange::Changed } else { DeadChange::NotFound })
}

/// Returns the instant `wait` after `now`, as the value of a column.
fn after(now: UnixMillis, wait: Duration) -> i64 {
    millis(now.plus(wait.min(LONGEST_WAIT)))
}

fn state(rows: u64) -> ClaimState {
    if rows == 0 { ClaimState::Lost } else { ClaimState::Valid }
}

fn stats(row: &SqliteRow) -> sqlx::Result<JobStats> {
    Ok(JobStats {
        kind: row.try_get("kind")?,
        waiting: row.unsigned("waiting")?,
        claimed: row.unsigned("claimed")?,
        dead: row.unsigned("dead")?,
        overdue: Duration::from_millis(row.unsigned("overdue")?),
    })
}

fn dead(row: &SqliteRow) -> sqlx::Result<DeadJob> {
    Ok(DeadJob {
        id: JobId(row.try_get("id")?),
        kind: row.try_get("kind")?,
        attempts: attempts(row)?,
        died_at: row.at("died_at")?,
        error: row.try_get::<Option<String>, _>("last_error")?.unwrap_or_default(),
    })
}

fn attempts(row: &SqliteRow) -> sqlx::Result<u32> {
    Ok(u32::try_from(row.unsigned("attempts")?).unwrap_or(u32::MAX))
}
