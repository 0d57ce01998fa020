//! Jobs: durable work that is done after the answer to a call.
//!
//! A job is stored in the transaction of its cause, so an acknowledged call never loses its work.
//! A worker *claims* a job for a bounded time, does the work, and records how the run ended. A
//! claim that ends without a record (the worker was killed, or hangs) makes the job due again. Each
//! job runs at least once, and one worker at a time has it. Work must therefore be safe to repeat.
//!
//! **Time.** All waits are durations, which the store adds to its own time: that of Postgres in a
//! cluster, and the time that the clock guard accepts on a single node. Therefore a worker with a
//! wrong clock cannot write a wrong instant. The store's clock may jump too: a job that is due
//! later than the longest wait of its kind ([`ClaimRequest::horizon`]) was written by such a clock,
//! and counts as due.

use std::{borrow::Cow, fmt, time::Duration};

use async_trait::async_trait;
use qpq_domain::UnixMillis;

use crate::StoreResult;

/// The queue of jobs.
#[async_trait]
pub trait Jobs: Send + Sync {
    /// Stores jobs in a transaction of their own. Returns the number of new ones.
    ///
    /// If a job with the same key is present, the present job keeps its payload and becomes due at
    /// the earlier of the two times. If the present job is claimed, it runs once more after the
    /// present run, which may have missed the cause of the new job.
    ///
    /// A backend that stores the cause of a job stores the job in that same transaction, by its own
    /// means instead of this method.
    async fn put(&self, jobs: Vec<NewJob>, now: UnixMillis) -> StoreResult<u64>;

    /// Claims jobs that are due at `now`, in the order in which they became due. No other claim
    /// returns them before the end of the lease, on any edge.
    async fn claim(&self, request: ClaimRequest, now: UnixMillis) -> StoreResult<Vec<Job>>;

    /// Extends a claim until `now + lease`.
    async fn renew(
        &self,
        claim: Claim,
        lease: Duration,
        now: UnixMillis,
    ) -> StoreResult<ClaimState>;

    /// Records the end of a claimed job's run. Changes nothing if the claim is lost.
    async fn finish(&self, claim: Claim, end: JobEnd, now: UnixMillis) -> StoreResult<ClaimState>;

    /// Counts the jobs of each kind at `now`, in the order of the kinds' names.
    async fn stats(&self, now: UnixMillis) -> StoreResult<Vec<JobStats>>;

    /// Returns the newest `limit` dead jobs, newest first.
    async fn dead(&self, limit: u32) -> StoreResult<Vec<DeadJob>>;

    /// Makes a dead job due at `now`, with no attempts counted.
    async fn retry_dead(&self, job: JobId, now: UnixMillis) -> StoreResult<DeadChange>;

    /// Removes a dead job.
    async fn remove_dead(&self, job: JobId) -> StoreResult<DeadChange>;
}

/// The name of a kind of job, for example `sweep`: a constant of the worker that runs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobKind(&'static str);

impl JobKind {
    /// Creates the name of a kind.
    pub const fn new(name: &'static str) -> Self {
        Self(name)
    }

    /// Returns the name.
    pub const fn as_str(self) -> &'static str {
        self.0
    }
}

impl fmt::Display for JobKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

/// A job to be stored.
#[derive(Clone, PartialEq, Eq)]
pub struct NewJob {
    /// The kind of worker that runs the job.
    pub kind: JobKind,
    /// The key, which is unique among the jobs of a kind that are neither done nor dead. `None`:
    /// the job is independent of all others.
    pub key: Option<Vec<u8>>,
    /// The worker's input, in its own encoding.
    pub payload: Vec<u8>,
    /// The time after which the job is due.
    pub delay: Duration,
}

impl fmt::Debug for NewJob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NewJob")
            .field("kind", &self.kind)
            .field("bytes", &self.payload.len())
            .field("delay", &self.delay)
            .finish_non_exhaustive()
    }
}

/// The jobs that a worker asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClaimRequest {
    /// The kind of the jobs.
    pub kind: JobKind,
    /// Maximum number of jobs.
    pub limit: u32,
    /// The duration of the claim.
    pub lease: Duration,
    /// The longest wait of a job of this kind: delay, back-off, repeat or lease. A job that is due
    /// later was written while the store's clock was wrong, and is due now.
    pub horizon: Duration,
}

/// A claimed job.
#[derive(Clone, PartialEq, Eq)]
pub struct Job {
    /// The right to finish the job.
    pub claim: Claim,
    /// The worker's input.
    pub payload: Vec<u8>,
    /// The number of claims since the job was stored or last repeated, including this one.
    pub attempt: u32,
}

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Job")
            .field("claim", &self.claim)
            .field("bytes", &self.payload.len())
            .field("attempt", &self.attempt)
            .finish()
    }
}

/// The right to finish one job, until its lease ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Claim {
    /// The claimed job.
    pub job: JobId,
    /// A random value, different for each claim of the same job.
    pub token: [u8; 16],
}

/// The number of a job in its store, never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobId(pub i64);

/// The end of a claimed job's run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JobEnd {
    /// The work is done: the job is removed.
    Done,
    /// The work is done for now: the job is due again after `wait`, without failed attempts.
    RepeatAfter {
        /// Time until the job is due again.
        wait: Duration,
    },
    /// The work failed: the job is due again after `wait`.
    RetryAfter {
        /// Time until the job is due again.
        wait: Duration,
        /// The reason of the failure.
        error: Cow<'static, str>,
    },
    /// The work was interrupted, for example because the server stops: the job is due again
    /// immediately, and the attempt does not count.
    Released,
    /// The work can never succeed: the job is kept for the operator to see, and never runs again.
    Dead {
        /// The reason of the last failure.
        error: Cow<'static, str>,
    },
}

/// The validity of a claim when it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClaimState {
    /// The claim is valid: no other worker has claimed the job.
    Valid,
    /// The lease had ended and another worker claimed the job, or the job was finished.
    Lost,
}

/// The result of a change to a dead job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeadChange {
    /// The job was changed.
    Changed,
    /// No dead job has this number.
    NotFound,
    /// A newer job with the same key is waiting or running. Nothing was changed.
    Superseded,
}

/// The jobs of one kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobStats {
    /// The name of the kind.
    pub kind: String,
    /// The number of jobs that are neither claimed nor dead.
    pub waiting: u64,
    /// The number of jobs that a worker has claimed.
    pub claimed: u64,
    /// The number of dead jobs, see [`JobEnd::Dead`].
    pub dead: u64,
    /// The time since the oldest waiting job became due. Zero if none is due.
    pub overdue: Duration,
}

/// A job that never runs again by itself.
#[derive(Clone, PartialEq, Eq)]
pub struct DeadJob {
    /// The number of the job.
    pub id: JobId,
    /// The name of the kind.
    pub kind: String,
    /// The number of attempts.
    pub attempts: u32,
    /// The time of the last attempt's end.
    pub died_at: UnixMillis,
    /// The last error, as worded by the worker.
    pub error: String,
}

impl fmt::Debug for DeadJob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeadJob")
            .field("id", &self.id)
            .field("kind", &self.kind)
            .field("attempts", &self.attempts)
            .finish_non_exhaustive()
    }
}
