//! Jobs in Postgres. A claim moves `run_at` to the end of its lease, so the job of a killed worker
//! becomes due again by itself. Workers that claim concurrently skip each other's rows.
//!
//! `run_at` is always computed from Postgres' clock.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use qpq_domain::UnixMillis;
use qpq_ports::{
    Claim, ClaimRequest, ClaimState, DeadChange, DeadJob, Job, JobEnd, JobId, JobStats, Jobs,
    NewJob, StoreResult,
};
use sqlx::{PgConnection, Row as _, postgres::PgRow};

use crate::{
    Config, ConnectError, Migrate,
    postgres::{
        self, Database, Repeat, Scope, Statement,
        row::{Columns as _, millis, millis_of},
    },
};

/// The longest wait that is stored. The sum of an instant and a longer wait might not fit an `i64`.
const LONGEST_WAIT: Duration = Duration::from_secs(10 * 365 * 86_400);

/// Postgres' time; the caller's time if `store_now()` is NULL, as in tests that set the time.
macro_rules! time {
    ($now:literal) => {
        concat!("(SELECT coalesce(store_now(), ", $now, "))")
    };
}

/// Stores jobs, and returns the number of new ones. `ON CONFLICT DO UPDATE` locks the present job
/// with the same key, so that it cannot end unnoticed. Of jobs with equal keys in one statement,
/// the first is stored, with the earliest time. `xmax` is zero in a row that was inserted.
const PUT: &str = concat!(
    "
    WITH new AS (
        SELECT n.kind, n.key, n.payload, n.place, clock.now + n.delay AS run_at
          FROM (SELECT ",
    time!("$5"),
    " AS now) AS clock,
               unnest($1::text[], $2::bytea[], $3::bytea[], $4::int8[])
               WITH ORDINALITY AS n (kind, key, payload, delay, place)),
    single AS (
        SELECT DISTINCT ON (kind, key) kind, key, payload,
               min(run_at) OVER (PARTITION BY kind, key) AS run_at
          FROM new WHERE key IS NOT NULL ORDER BY kind, key, place),
    plain AS (
        INSERT INTO job (kind, payload, run_at)
        SELECT kind, payload, run_at FROM new WHERE key IS NULL ORDER BY place
        RETURNING 1),
    keyed AS (
        INSERT INTO job (kind, key, payload, run_at)
        SELECT kind, key, payload, run_at FROM single ORDER BY kind, key
        ON CONFLICT (kind, key) WHERE key IS NOT NULL AND died_at IS NULL DO UPDATE
           SET run_at = CASE WHEN job.claim IS NULL THEN least(job.run_at, excluded.run_at)
                             ELSE job.run_at END,
               again_at = CASE WHEN job.claim IS NULL THEN NULL
                               ELSE least(job.again_at, excluded.run_at) END
         WHERE job.claim IS NOT NULL OR job.run_at > excluded.run_at
        RETURNING xmax = 0 AS is_new)
    SELECT (SELECT count(*) FROM plain) + (SELECT count(*) FROM keyed WHERE is_new)"
);

/// Claims due jobs. A lease has ended when it is over by both Postgres' clock and the caller's, so
/// one clock that jumps ahead ends no lease. `astray` are jobs that are due later than the horizon
/// $6 allows: a wrong clock wrote them, and they are due now. `RETURNING` keeps no order, so the
/// caller sorts.
const CLAIM: &str = concat!(
    "
    WITH clock AS MATERIALIZED (SELECT ",
    time!("$2"),
    " AS now),
    due AS (
        SELECT id, run_at FROM job WHERE kind = $1 AND died_at IS NULL
           AND run_at <= (SELECT now FROM clock) AND (claim IS NULL OR run_at <= $2)
         ORDER BY run_at, id LIMIT $3 FOR UPDATE SKIP LOCKED),
    astray AS (
        SELECT id, run_at FROM job WHERE kind = $1 AND died_at IS NULL
           AND run_at > (SELECT now FROM clock) + $6
         ORDER BY run_at, id LIMIT $3 - (SELECT count(*) FROM due) FOR UPDATE SKIP LOCKED),
    found AS (SELECT * FROM due UNION ALL SELECT * FROM astray)
    UPDATE job SET run_at = (SELECT now FROM clock) + $4, claim = $5, attempts = attempts + 1,
           again_at = NULL
      FROM found WHERE job.id = found.id
    RETURNING job.id, job.payload, job.attempts, found.run_at AS due"
);

/// A claim is valid until another worker claims the job, also after its lease has ended.
const RENEW: &str =
    concat!("UPDATE job SET run_at = ", time!("$3"), " + $4 WHERE id = $1 AND claim = $2");
const DONE: &str = "DELETE FROM job WHERE id = $1 AND claim = $2 AND again_at IS NULL";
const DONE_ONCE: &str = "
    UPDATE job SET run_at = again_at, claim = NULL, again_at = NULL, attempts = 0, last_error = NULL
     WHERE id = $1 AND claim = $2 AND again_at IS NOT NULL";
const REPEAT: &str = concat!(
    "UPDATE job SET run_at = least(",
    time!("$3"),
    " + $4, again_at), claim = NULL, again_at = NULL, attempts = 0, last_error = NULL
     WHERE id = $1 AND claim = $2"
);
const RETRY: &str = concat!(
    "UPDATE job SET run_at = ",
    time!("$3"),
    " + $4, claim = NULL, again_at = NULL, last_error = $5 WHERE id = $1 AND claim = $2"
);
const RELEASE: &str = concat!(
    "UPDATE job SET run_at = ",
    time!("$3"),
    ", claim = NULL, again_at = NULL, attempts = greatest(attempts - 1, 0)
     WHERE id = $1 AND claim = $2"
);
const DIE: &str = concat!(
    "UPDATE job SET died_at = ",
    time!("$3"),
    ", claim = NULL, last_error = $4 WHERE id = $1 AND claim = $2"
);
/// Stores the job that was put while the dead one was running.
const REPLACE_DEAD: &str = "
    INSERT INTO job (kind, key, payload, run_at)
    SELECT kind, key, payload, again_at FROM job WHERE id = $1 AND again_at IS NOT NULL";

const STATS: &str = concat!(
    r#"
    SELECT kind,
           count(*) FILTER (WHERE died_at IS NULL AND (claim IS NULL OR run_at <= now)) AS waiting,
           count(*) FILTER (WHERE died_at IS NULL AND claim IS NOT NULL AND run_at > now)
           AS claimed,
           count(*) FILTER (WHERE died_at IS NOT NULL) AS dead,
           greatest(0, max(now) - min(run_at) FILTER (WHERE died_at IS NULL)) AS overdue
      FROM job, (SELECT "#,
    time!("$1"),
    r#" AS now) AS clock GROUP BY kind ORDER BY kind COLLATE "C""#
);

const DEAD: &str = "
    SELECT id, kind, attempts, died_at, last_error FROM job WHERE died_at IS NOT NULL
     ORDER BY died_at DESC, id DESC LIMIT $1";
const RETRY_DEAD: &str = concat!(
    "UPDATE job SET run_at = ",
    time!("$2"),
    ", died_at = NULL, again_at = NULL, attempts = 0
     WHERE id = $1 AND died_at IS NOT NULL AND NOT EXISTS (
           SELECT 1 FROM job AS live
            WHERE live.kind = job.kind AND live.key = job.key AND live.died_at IS NULL)"
);
const IS_DEAD: &str = "SELECT EXISTS (SELECT 1 FROM job WHERE id = $1 AND died_at IS NOT NULL)";
const REMOVE_DEAD: &str = "DELETE FROM job WHERE id = $1 AND died_at IS NOT NULL";

/// The queue of jobs in one database. Needs neither Redis nor NATS.
#[derive(Debug)]
pub(crate) struct JobQueue {
    database: Database,
}

impl JobQueue {
    pub(crate) fn new(database: Database) -> Self {
        Self { database }
    }
}

/// Returns the queue of jobs of the cluster's database, for the tools of the operator. Needs
/// neither Redis nor NATS.
pub async fn operator_jobs(config: &Config) -> Result<Arc<dyn Jobs>, ConnectError> {
    let options = postgres::options(config)?;
    postgres::prepare(&options, Migrate::Never, config.start_timeout).await?;
    Ok(Arc::new(JobQueue::new(Database::new(options, 1, config.postgres_timeout))))
}

/// Stores jobs in the transaction of their cause. Returns the number of new ones.
pub(crate) async fn put(
    connection: &mut PgConnection,
    jobs: &[NewJob],
    now: UnixMillis,
) -> sqlx::Result<u64> {
    let new: i64 = sqlx::query_scalar(PUT)
        .bind(jobs.iter().map(|job| job.kind.as_str()).collect::<Vec<_>>())
        .bind(jobs.iter().map(|job| job.key.as_deref()).collect::<Vec<_>>())
        .bind(jobs.iter().map(|job| &job.payload[..]).collect::<Vec<_>>())
        .bind(jobs.iter().map(|job| wait(job.delay)).collect::<Vec<_>>())
        .bind(millis(now))
        .fetch_one(connection)
        .await?;
    Ok(u64::try_from(new).unwrap_or_default())
}

#[async_trait]
impl Jobs for JobQueue {
    async fn put(&self, jobs: Vec<NewJob>, now: UnixMillis) -> StoreResult<u64> {
        Ok(self.database.run(&PutJobs { jobs: &jobs, now }).await?)
    }

    async fn claim(&self, request: ClaimRequest, now: UnixMillis) -> StoreResult<Vec<Job>> {
        let claim = ClaimJobs { request, token: rand::random(), now };
        let mut jobs = self.database.run(&claim).await?;
        jobs.sort_by_key(|(due, job)| (*due, job.claim.job));
        Ok(jobs.into_iter().map(|(_, job)| job).collect())
    }

    async fn renew(
        &self,
        claim: Claim,
        lease: Duration,
        now: UnixMillis,
    ) -> StoreResult<ClaimState> {
        Ok(self.database.run(&RenewClaim { claim, lease, now }).await?)
    }

    async fn finish(&self, claim: Claim, end: JobEnd, now: UnixMillis) -> StoreResult<ClaimState> {
        Ok(self.database.run(&FinishJob { claim, end, now }).await?)
    }

    async fn stats(&self, now: UnixMillis) -> StoreResult<Vec<JobStats>> {
        Ok(self.database.run(&ReadStats(now)).await?)
    }

    async fn dead(&self, limit: u32) -> StoreResult<Vec<DeadJob>> {
        Ok(self.database.run(&ReadDead { limit }).await?)
    }

    async fn retry_dead(&self, job: JobId, now: UnixMillis) -> StoreResult<DeadChange> {
        Ok(self.database.run(&RetryDead { job, now }).await?)
    }

    async fn remove_dead(&self, job: JobId) -> StoreResult<DeadChange> {
        Ok(self.database.run(&RemoveDead(job)).await?)
    }
}

struct PutJobs<'a> {
    jobs: &'a [NewJob],
    now: UnixMillis,
}

impl Statement for PutJobs<'_> {
    type Output = u64;

    /// A repeat would store jobs without a key twice.
    const REPEAT: Repeat = Repeat::Never;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "put_jobs"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<u64> {
        put(connection, self.jobs, self.now).await
    }
}

struct ClaimJobs {
    request: ClaimRequest,
    token: [u8; 16],
    now: UnixMillis,
}

impl Statement for ClaimJobs {
    /// The jobs, and the instant at which each became due.
    type Output = Vec<(UnixMillis, Job)>;

    /// A claim whose answer is lost ends with its lease.
    const REPEAT: Repeat = Repeat::Never;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "claim_jobs"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Self::Output> {
        let ClaimRequest { kind, limit, lease, horizon } = self.request;
        sqlx::query(CLAIM)
            .bind(kind.as_str())
            .bind(millis(self.now))
            .bind(i64::from(limit))
            .bind(wait(lease))
            .bind(&self.token[..])
            .bind(wait(horizon))
            .fetch_all(connection)
            .await?
            .iter()
            .map(|row| Ok((row.at("due")?, job(row, self.token)?)))
            .collect()
    }
}

struct RenewClaim {
    claim: Claim,
    lease: Duration,
    now: UnixMillis,
}

impl Statement for RenewClaim {
    type Output = ClaimState;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "renew_job"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<ClaimState> {
        let query = sqlx::query(RENEW).bind(self.claim.job.0).bind(&self.claim.token[..]);
        let query = query.bind(millis(self.now)).bind(wait(self.lease));
        Ok(state(query.execute(connection).await?.rows_affected()))
    }
}

struct FinishJob {
    claim: Claim,
    end: JobEnd,
    now: UnixMillis,
}

impl Statement for FinishJob {
    type Output = ClaimState;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Transaction;

    fn name(&self) -> &'static str {
        "finish_job"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<ClaimState> {
        finish(connection, self.claim, &self.end, self.now).await
    }
}

struct ReadStats(UnixMillis);

impl Statement for ReadStats {
    type Output = Vec<JobStats>;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "job_stats"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Vec<JobStats>> {
        let rows = sqlx::query(STATS).bind(millis(self.0)).fetch_all(connection).await?;
        rows.iter().map(stats).collect()
    }
}

struct ReadDead {
    limit: u32,
}

impl Statement for ReadDead {
    type Output = Vec<DeadJob>;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "dead_jobs"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Vec<DeadJob>> {
        let query = sqlx::query(DEAD).bind(i64::from(self.limit));
        query.fetch_all(connection).await?.iter().map(dead).collect()
    }
}

struct RetryDead {
    job: JobId,
    now: UnixMillis,
}

impl Statement for RetryDead {
    type Output = DeadChange;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Transaction;

    fn name(&self) -> &'static str {
        "retry_dead_job"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<DeadChange> {
        retry_dead(connection, self.job, self.now).await
    }
}

struct RemoveDead(JobId);

impl Statement for RemoveDead {
    type Output = DeadChange;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "remove_dead_job"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<DeadChange> {
        let removed = sqlx::query(REMOVE_DEAD).bind(self.0.0).execute(connection).await?;
        let found = removed.rows_affected() > 0;
        Ok(if found { DeadChange::Changed } else { DeadChange::NotFound })
    }
}

async fn finish(
    connection: &mut PgConnection,
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
        JobEnd::RepeatAfter { wait: after } => {
            claimed(REPEAT).bind(millis(now)).bind(wait(*after)).execute(connection).await?
        }
        JobEnd::RetryAfter { wait: after, error } => {
            let query = claimed(RETRY).bind(millis(now)).bind(wait(*after));
            query.bind(error.clone().into_owned()).execute(connection).await?
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
    connection: &mut PgConnection,
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

/// Returns a wait as a column, at most [`LONGEST_WAIT`].
fn wait(duration: Duration) -> i64 {
    millis_of(duration.min(LONGEST_WAIT))
}

fn state(rows: u64) -> ClaimState {
    if rows == 0 { ClaimState::Lost } else { ClaimState::Valid }
}

fn job(row: &PgRow, token: [u8; 16]) -> sqlx::Result<Job> {
    Ok(Job {
        claim: Claim { job: JobId(row.try_get("id")?), token },
        payload: row.bytes("payload")?,
        attempt: attempts(row)?,
    })
}

fn stats(row: &PgRow) -> sqlx::Result<JobStats> {
    let overdue = row.try_get::<Option<i64>, _>("overdue")?.unwrap_or_default();
    Ok(JobStats {
        kind: row.try_get("kind")?,
        waiting: row.unsigned("waiting")?,
        claimed: row.unsigned("claimed")?,
        dead: row.unsigned("dead")?,
        overdue: Duration::from_millis(u64::try_from(overdue).unwrap_or_default()),
    })
}

fn dead(row: &PgRow) -> sqlx::Result<DeadJob> {
    Ok(DeadJob {
        id: JobId(row.try_get("id")?),
        kind: row.try_get("kind")?,
        attempts: attempts(row)?,
        died_at: row.at("died_at")?,
        error: row.try_get::<Option<String>, _>("last_error")?.unwrap_or_default(),
    })
}

fn attempts(row: &PgRow) -> sqlx::Result<u32> {
    Ok(u32::try_from(row.unsigned("attempts")?).unwrap_or(u32::MAX))
}
