//! Claims jobs and runs them: one task per kind, and within it one future per claimed job.
//!
//! The runner owns all tasks and stops in two steps. Once `draining` is cancelled, no further job
//! is claimed, and runs in progress have a grace period in which they may end. Then the remaining
//! runs are dropped, and their jobs are released in the store, for another edge to claim.

use std::{
    collections::HashSet, fmt, future::Future, panic::AssertUnwindSafe, pin::pin, sync::Arc,
    time::Duration,
};

use futures_util::{FutureExt as _, StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use parking_lot::Mutex;
use qpq_ports::{Claim, ClaimRequest, ClaimState, Clock, Job, JobEnd, Jobs};
use tokio::{
    sync::Notify,
    task::JoinSet,
    time::{Instant, interval, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{Completion, Failure, Work, metric};

/// Maximum time for runs in progress to end once the server stops.
const GRACE: Duration = Duration::from_secs(5);
/// Interval between two counts of the jobs, for the metrics.
const COUNT: Duration = Duration::from_secs(15);
/// The last error of a job that used up its attempts without a recorded result.
const NEVER_ENDED: &str = "every attempt ended without a result: the server was killed, or the \
                           store could not record it";

/// The last error of a job whose run panicked.
const PANICKED: &str = "the run panicked. This is a bug; please report it with the log";

/// The runner of this server's jobs, of all kinds that were added.
pub struct Runner {
    jobs: Arc<dyn Jobs>,
    clock: Arc<dyn Clock>,
    works: Vec<(Arc<dyn Work>, Arc<Notify>)>,
    random: fn() -> u64,
    pub(crate) grace: Duration,
}

/// A handle that announces new jobs of a kind, so that they do not wait for the next poll.
#[derive(Clone, Debug)]
pub struct Wake(Arc<Notify>);

impl Wake {
    /// Makes the runner claim immediately.
    pub fn wake(&self) {
        self.0.notify_one();
    }
}

impl fmt::Debug for Runner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Runner").field("kinds", &self.works.len()).finish_non_exhaustive()
    }
}

impl Runner {
    /// Creates a runner without any kind of work. `clock` is the store's own.
    pub fn new(jobs: Arc<dyn Jobs>, clock: Arc<dyn Clock>) -> Self {
        metric::describe();
        Self { jobs, clock, works: Vec::new(), random: rand::random, grace: GRACE }
    }

    /// Adds a kind of work. Returns the handle that announces new jobs of it.
    pub fn add(&mut self, work: Arc<dyn Work>) -> Wake {
        metric::expose_runs(work.kind());
        let wake = Arc::new(Notify::new());
        self.works.push((work, Arc::clone(&wake)));
        Wake(wake)
    }

    /// Runs until `draining` is cancelled, and then until all runs have ended.
    pub async fn run(self, draining: CancellationToken) {
        let mut tasks = JoinSet::new();
        let Self { jobs, clock, works, random, grace } = self;
        for (work, wake) in works {
            let lane = Lane {
                jobs: Arc::clone(&jobs),
                clock: Arc::clone(&clock),
                work,
                wake,
                random,
                grace,
                claims: Mutex::default(),
            };
            tasks.spawn(lane.run(draining.clone()));
        }
        tasks.spawn(async move {
            draining.run_until_cancelled(count(jobs, clock)).await;
        });
        while let Some(ended) = tasks.join_next().await {
            // Panics of runs are caught, so this is a panic of the runner itself.
            ended.expect("the worker of a kind of jobs ends");
        }
    }
}

/// Reports the number of jobs of each kind, once per [`COUNT`].
async fn count(jobs: Arc<dyn Jobs>, clock: Arc<dyn Clock>) {
    let mut ticks = interval(COUNT);
    loop {
        ticks.tick().await;
        let Ok(kinds) = jobs.stats(clock.now()).await else {
            metrics::counter!(metric::ERRORS, "op" => "stats").increment(1);
            continue;
        };
        for kind in kinds {
            let states =
                [("waiting", kind.waiting), ("claimed", kind.claimed), ("dead", kind.dead)];
            for (state, jobs) in states {
                metrics::gauge!(metric::JOBS, "kind" => kind.kind.clone(), "state" => state)
                    .set(jobs as f64);
            }
            metrics::gauge!(metric::OVERDUE, "kind" => kind.kind).set(kind.overdue.as_secs_f64());
        }
    }
}

/// The task that runs the jobs of one kind.
struct Lane {
    jobs: Arc<dyn Jobs>,
    clock: Arc<dyn Clock>,
    work: Arc<dyn Work>,
    wake: Arc<Notify>,
    random: fn() -> u64,
    grace: Duration,
    /// The claims of the runs in progress.
    claims: Mutex<HashSet<Claim>>,
}

impl Lane {
    async fn run(self, draining: CancellationToken) {
        let mut running = FuturesUnordered::<BoxFuture<'_, ()>>::new();
        let mut recurring_is_stored = false;
        loop {
            recurring_is_stored = recurring_is_stored || self.put_recurring().await;
            let claimed = self.claim(running.len()).await;
            let found = !claimed.is_empty();
            running.extend(
                claimed.into_iter().map(|job| -> BoxFuture<'_, ()> { Box::pin(self.run_one(job)) }),
            );
            let has_room = running.len() < self.work.policy().concurrency as usize;
            // More jobs may be due: claim again as soon as there is room.
            if found && has_room {
                continue;
            }
            tokio::select! {
                () = draining.cancelled() => break,
                Some(()) = running.next(), if !running.is_empty() => {}
                () = self.wake.notified(), if has_room => {}
                () = sleep(self.work.policy().poll), if has_room => {}
            }
        }
        let ended = timeout(self.grace, async { while running.next().await.is_some() {} }).await;
        drop(running);
        if ended.is_err() {
            self.release().await;
        }
    }

    /// Releases the jobs whose runs were dropped, so that they are due again.
    async fn release(&self) {
        let claims = std::mem::take(&mut *self.claims.lock());
        tracing::info!(kind = %self.work.kind(), jobs = claims.len(), "unfinished jobs released");
        for claim in claims {
            self.count_run("released");
            if let Err(error) = self.jobs.finish(claim, JobEnd::Released, self.clock.now()).await {
                // The lease ends by itself.
                self.store_failed("finish", &error);
            }
        }
    }

    /// Stores the recurring job. Returns false after a failure, so that the caller tries again.
    async fn put_recurring(&self) -> bool {
        let Some(job) = self.work.recurring() else { return true };
        match self.jobs.put(vec![job], self.clock.now()).await {
            Ok(_) => true,
            Err(error) => {
                self.store_failed("put", &error);
                false
            }
        }
    }

    async fn claim(&self, running: usize) -> Vec<Job> {
        let policy = self.work.policy();
        let room = policy.concurrency.saturating_sub(u32::try_from(running).unwrap_or(u32::MAX));
        if room == 0 {
            return Vec::new();
        }
        let request = ClaimRequest {
            kind: self.work.kind(),
            limit: room,
            lease: policy.lease,
            // A claimed job is due when its lease ends. If the lease were longer than the horizon,
            // the job would count as written while the clock was wrong, and would be claimed again.
            horizon: policy.horizon.max(policy.lease),
        };
        match self.jobs.claim(request, self.clock.now()).await {
            Ok(jobs) => jobs,
            Err(error) => {
                self.store_failed("claim", &error);
                Vec::new()
            }
        }
    }

    /// Runs a claimed job, renews the claim during the run, and records the end.
    async fn run_one(&self, job: Job) {
        let begun = Instant::now();
        self.claims.lock().insert(job.claim);
        let outcome = self.outcome(&job).await;
        let Some(outcome) = outcome else {
            self.claims.lock().remove(&job.claim);
            self.count_run("lost");
            tracing::warn!(kind = %self.work.kind(), "job claimed by another worker while it ran");
            return;
        };
        metrics::histogram!(metric::SECONDS, "kind" => self.work.kind().as_str())
            .record(begun.elapsed());
        let end = self.end_of(&job, outcome);
        self.count_run(match &end {
            JobEnd::Done => "done",
            JobEnd::RepeatAfter { .. } => "repeat",
            JobEnd::RetryAfter { .. } => "retry",
            JobEnd::Released => "released",
            JobEnd::Dead { .. } => "dead",
        });
        if let Err(error) = self.jobs.finish(job.claim, end, self.clock.now()).await {
            // The lease ends by itself and the job runs again.
            self.store_failed("finish", &error);
        }
        self.claims.lock().remove(&job.claim);
    }

    /// Does the work of `job`. Returns `None` once the claim is lost.
    async fn outcome(&self, job: &Job) -> Option<Result<Completion, Failure>> {
        let max = self.work.policy().max_attempts;
        // `end_of` ends a job whose last attempt fails. Here the last attempts ended without a
        // record, for example because the job kills its server.
        if max.is_some_and(|max| job.attempt > max) {
            return Some(Err(Failure::Permanent(NEVER_ENDED.into())));
        }
        let run = AssertUnwindSafe(self.work.run(job, self.clock.now())).catch_unwind();
        let outcome = self.while_claimed(job, run).await?;
        Some(outcome.unwrap_or_else(|_| Err(Failure::Temporary(PANICKED.into()))))
    }

    /// Polls `work` and renews the claim at each third of its lease. Returns `None` once the claim
    /// is lost.
    async fn while_claimed<F: Future>(&self, job: &Job, work: F) -> Option<F::Output> {
        let lease = self.work.policy().lease;
        let mut work = pin!(work);
        loop {
            match timeout(lease / 3, work.as_mut()).await {
                Ok(outcome) => return Some(outcome),
                Err(_) => match self.jobs.renew(job.claim, lease, self.clock.now()).await {
                    Ok(ClaimState::Valid) => {}
                    Ok(ClaimState::Lost) => return None,
                    Err(error) => self.store_failed("renew", &error),
                },
            }
        }
    }

    fn end_of(&self, job: &Job, outcome: Result<Completion, Failure>) -> JobEnd {
        let (kind, policy) = (self.work.kind(), self.work.policy());
        match outcome {
            Ok(Completion::Done) => JobEnd::Done,
            Ok(Completion::RepeatAfter(wait)) => {
                JobEnd::RepeatAfter { wait: wait.min(policy.horizon) }
            }
            Err(Failure::Permanent(error)) => {
                tracing::error!(%kind, %error, attempt = job.attempt, "job failed, not retried");
                JobEnd::Dead { error }
            }
            Err(Failure::Temporary(error))
                if policy.max_attempts.is_some_and(|max| job.attempt >= max) =>
            {
                tracing::error!(%kind, %error, attempt = job.attempt, "job failed at its last attempt, not retried");
                JobEnd::Dead { error }
            }
            Err(Failure::Temporary(error)) => {
                let wait = policy.backoff(job.attempt, (self.random)()).min(policy.horizon);
                tracing::warn!(%kind, %error, attempt = job.attempt, ?wait, "job failed, retrying");
                JobEnd::RetryAfter { wait, error }
            }
        }
    }

    fn count_run(&self, end: &'static str) {
        let kind = self.work.kind().as_str();
        metrics::counter!(metric::RUNS, "kind" => kind, "end" => end).increment(1);
    }

    fn store_failed(&self, op: &'static str, error: &qpq_ports::StoreError) {
        metrics::counter!(metric::ERRORS, "op" => op).increment(1);
        let error = error as &dyn std::error::Error;
        tracing::warn!(error, op, kind = %self.work.kind(), "queue of jobs unavailable, retrying");
    }
}
