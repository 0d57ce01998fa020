//! The interface of a kind of work.

use std::{borrow::Cow, time::Duration};

use async_trait::async_trait;
use qpq_domain::{Backoff, UnixMillis};
use qpq_ports::{Job, JobKind, NewJob};

/// One kind of work.
#[async_trait]
pub trait Work: Send + Sync {
    /// The kind of the jobs that this work runs.
    fn kind(&self) -> JobKind;

    /// The bounds of claims, retries and attempts.
    fn policy(&self) -> Policy {
        Policy::default()
    }

    /// The job of work that repeats without end. The job must have a key, so that only one is
    /// stored.
    ///
    /// Every server stores the job when it starts. A present job keeps its time, unless the new one
    /// is due earlier. Therefore the delay is zero for work that may run at every start of a
    /// server, and the full period for other work.
    fn recurring(&self) -> Option<NewJob> {
        None
    }

    /// Does the work of `job`, claimed at `now`.
    ///
    /// A job may run again after it succeeded, if the success could not be recorded. The future is
    /// dropped when another worker has claimed the job, and when the server has stopped.
    async fn run(&self, job: &Job, now: UnixMillis) -> Result<Completion, Failure>;
}

/// The result of a run that succeeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completion {
    /// The job is removed.
    Done,
    /// The job runs again after this time.
    RepeatAfter(Duration),
}

/// The result of a run that failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The job runs again after the back-off of its [`Policy`], until its attempts are used up.
    #[error("{0}")]
    Temporary(Cow<'static, str>),
    /// The job is dead, because a retry cannot succeed.
    #[error("{0}")]
    Permanent(Cow<'static, str>),
}

impl Failure {
    /// Creates a temporary failure from an error and its causes.
    pub fn temporary(error: &dyn std::error::Error) -> Self {
        let causes = std::iter::successors(Some(error), |error| error.source());
        let causes: Vec<_> = causes.map(ToString::to_string).collect();
        Self::Temporary(causes.join(": ").into())
    }
}

/// The bounds of claims, retries and attempts for the jobs of a kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Maximum number of jobs that one edge runs concurrently.
    pub concurrency: u32,
    /// The duration of a claim. The claim is renewed while the work runs, so a job of a killed edge
    /// runs again after at most this time.
    pub lease: Duration,
    /// Interval between two claims when nothing on this edge announces a job.
    pub poll: Duration,
    /// Attempts after which a failing job is dead. `None`: the job is always retried.
    pub max_attempts: Option<u32>,
    /// Maximum wait after the first failure. Each further failure doubles it, up to the cap.
    pub backoff_base: Duration,
    /// Maximum wait after any failure.
    pub backoff_cap: Duration,
    /// The longest wait of a job of this kind; longer waits are shortened. A stored job that is due
    /// later was written while the store's clock was wrong, and runs immediately.
    pub horizon: Duration,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            concurrency: 4,
            lease: Duration::from_secs(60),
            poll: Duration::from_secs(5),
            max_attempts: Some(20),
            backoff_base: Duration::from_secs(2),
            backoff_cap: Duration::from_secs(15 * 60),
            horizon: Duration::from_secs(3_600),
        }
    }
}

impl Policy {
    /// Returns the wait after the failure of `attempt`, which counts from 1.
    ///
    /// The wait is uniform, by `random`, between half of the longest wait ([`Backoff::longest`])
    /// and all of it. `random` is uniform over all of `u64`. The lower bound keeps a job that fails
    /// immediately from running again immediately.
    pub(crate) fn backoff(&self, attempt: u32, random: u64) -> Duration {
        let backoff = Backoff::new(self.backoff_base, self.backoff_cap);
        (backoff.longest(attempt) + backoff.delay(attempt, random)) / 2
    }
}
