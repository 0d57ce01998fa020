//! The runner on the embedded store.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use qpq_domain::{StoreLimits, UnixMillis};
use qpq_ports::{ClaimRequest, Clock, Job, JobKind, NewJob};
use qpq_store_embedded::EmbeddedStore;
use tokio::{sync::mpsc, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::{Completion, Failure, Policy, Runner, Wake, Work};

const KIND: JobKind = JobKind::new("test");
const NOW: UnixMillis = UnixMillis(1_800_000_000_000);

#[derive(Debug)]
struct TestClock(AtomicU64);

impl Clock for TestClock {
    fn now(&self) -> UnixMillis {
        UnixMillis(self.0.load(Ordering::Relaxed))
    }
}

/// Work whose runs are determined by the payload of the job.
struct TestWork {
    policy: Policy,
    recurring: bool,
    /// The payload and the attempt of each run that begins. Attempt 0 reports a dropped run.
    runs: mpsc::UnboundedSender<(String, u32)>,
}

/// A guard that reports a run that is dropped before its end.
struct Dropped<'a>(&'a TestWork, &'a str);

impl Drop for Dropped<'_> {
    fn drop(&mut self) {
        let _ = self.0.runs.send((self.1.to_owned(), 0));
    }
}

#[async_trait]
impl Work for TestWork {
    fn kind(&self) -> JobKind {
        KIND
    }

    fn policy(&self) -> Policy {
        self.policy
    }

    fn recurring(&self) -> Option<NewJob> {
        self.recurring.then(|| NewJob { key: Some(Vec::new()), ..job("repeats") })
    }

    async fn run(&self, job: &Job, _: UnixMillis) -> Result<Completion, Failure> {
        let payload = std::str::from_utf8(&job.payload).expect("text");
        let _ = self.runs.send((payload.to_owned(), job.attempt));
        match payload {
            "fails" => Err(Failure::Temporary("no route".into())),
            "fails permanently" => Err(Failure::Permanent("refused".into())),
            "repeats" => Ok(Completion::RepeatAfter(Duration::from_secs(60))),
            "panics" => panic!("as the test wants"),
            "hangs" => {
                let _dropped = Dropped(self, payload);
                std::future::pending().await
            }
            _ => Ok(Completion::Done),
        }
    }
}

fn job(payload: &str) -> NewJob {
    NewJob { kind: KIND, key: None, payload: payload.into(), delay: Duration::ZERO }
}

struct Bench {
    _dir: tempfile::TempDir,
    store: EmbeddedStore,
    clock: Arc<TestClock>,
    grace: Duration,
}

/// A runner and its task.
struct Running {
    runs: mpsc::UnboundedReceiver<(String, u32)>,
    wake: Wake,
    draining: CancellationToken,
    task: JoinHandle<()>,
}

impl Bench {
    async fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let store = open(dir.path()).await;
        Self { _dir: dir, store, clock: Arc::new(TestClock(NOW.0.into())), grace: Duration::MAX }
    }

    async fn put(&self, payload: &str) {
        self.store.stores().jobs.put(vec![job(payload)], NOW).await.expect("put");
    }

    /// Returns the number of jobs that are not dead.
    async fn live(&self) -> u64 {
        let stats = self.store.stores().jobs.stats(self.clock.now()).await.expect("stats");
        stats.iter().map(|kind| kind.waiting + kind.claimed).sum()
    }

    fn run(&self, policy: Policy, recurring: bool) -> Running {
        let (sender, runs) = mpsc::unbounded_channel();
        let mut runner =
            Runner::new(self.store.stores().jobs, Arc::clone(&self.clock) as Arc<dyn Clock>);
        runner.grace = self.grace;
        let wake = runner.add(Arc::new(TestWork { policy, recurring, runs: sender }));
        let draining = CancellationToken::new();
        let task = tokio::spawn(runner.run(draining.clone()));
        Running { runs, wake, draining, task }
    }
}

impl Running {
    async fn next(&mut self) -> (String, u32) {
        self.runs.recv().await.expect("the runner is at work")
    }

    async fn stop(self) {
        self.draining.cancel();
        self.task.await.expect("ends");
    }
}

fn request(lease: Duration) -> ClaimRequest {
    ClaimRequest { kind: KIND, limit: 1, lease, horizon: Policy::default().horizon }
}

async fn open(dir: &Path) -> EmbeddedStore {
    EmbeddedStore::open(dir, StoreLimits::default()).await.expect("open")
}

/// Returns a policy that never polls and retries immediately.
fn policy() -> Policy {
    Policy {
        poll: Duration::from_secs(3_600),
        backoff_base: Duration::ZERO,
        max_attempts: Some(3),
        ..Policy::default()
    }
}

#[tokio::test]
async fn an_announced_job_runs_once_and_is_removed() {
    let bench = Bench::new().await;
    let mut running = bench.run(policy(), false);
    bench.put("works").await;
    running.wake.wake();
    assert_eq!(running.next().await, ("works".to_owned(), 1));
    running.stop().await;
    assert_eq!(bench.live().await, 0);
}

#[tokio::test]
async fn jobs_stored_before_the_start_run_all_with_bounded_concurrency() {
    let bench = Bench::new().await;
    for _ in 0..10 {
        bench.put("works").await;
    }
    let mut running = bench.run(Policy { concurrency: 2, ..policy() }, false);
    for _ in 0..10 {
        assert_eq!(running.next().await, ("works".to_owned(), 1));
    }
    running.stop().await;
    assert_eq!(bench.live().await, 0);
}

#[tokio::test]
async fn a_failing_job_is_retried_until_its_attempts_are_used_up() {
    let bench = Bench::new().await;
    bench.put("fails").await;
    let mut running = bench.run(policy(), false);
    for attempt in 1..=3 {
        assert_eq!(running.next().await, ("fails".to_owned(), attempt));
        running.wake.wake();
    }
    running.stop().await;
    let dead = bench.store.stores().jobs.dead(9).await.expect("dead");
    assert_eq!(dead.len(), 1);
    assert_eq!((dead[0].attempts, dead[0].error.as_str()), (3, "no route"));
}

#[tokio::test]
async fn a_permanent_failure_is_dead_after_one_attempt() {
    let bench = Bench::new().await;
    bench.put("fails permanently").await;
    let mut running = bench.run(policy(), false);
    assert_eq!(running.next().await.1, 1);
    running.stop().await;
    assert_eq!(bench.store.stores().jobs.dead(9).await.expect("dead")[0].error, "refused");
}

#[tokio::test]
async fn a_recurring_job_exists_once_and_runs_again_when_it_is_due() {
    let bench = Bench::new().await;
    let mut first = bench.run(policy(), true);
    assert_eq!(first.next().await, ("repeats".to_owned(), 1));
    first.stop().await;
    // Another server, or the same one after a restart, finds the job.
    let mut second = bench.run(policy(), true);
    assert_eq!(bench.live().await, 1);
    bench.clock.0.fetch_add(60_000, Ordering::Relaxed);
    second.wake.wake();
    assert_eq!(second.next().await, ("repeats".to_owned(), 1));
    second.stop().await;
    assert_eq!(bench.live().await, 1);
}

#[tokio::test]
async fn a_job_whose_attempts_all_end_without_a_record_is_dead() {
    let bench = Bench::new().await;
    bench.put("hangs").await;
    let jobs = bench.store.stores().jobs;
    for _ in 0..3 {
        let lease = Duration::from_secs(60);
        assert_eq!(jobs.claim(request(lease), bench.clock.now()).await.expect("claim").len(), 1);
        bench.clock.0.fetch_add(60_000, Ordering::Relaxed);
    }
    let running = bench.run(policy(), false);
    while bench.live().await > 0 {
        tokio::task::yield_now().await;
    }
    running.stop().await;
    let dead = jobs.dead(9).await.expect("dead");
    assert_eq!(dead[0].attempts, 4);
    assert!(dead[0].error.starts_with("every attempt ended without a result"));
}

#[tokio::test]
async fn a_panic_of_a_run_fails_only_its_job() {
    let bench = Bench::new().await;
    bench.put("panics").await;
    let mut running = bench.run(Policy { max_attempts: Some(1), ..policy() }, false);
    assert_eq!(running.next().await, ("panics".to_owned(), 1));
    bench.put("works").await;
    running.wake.wake();
    assert_eq!(running.next().await, ("works".to_owned(), 1));
    running.stop().await;
    let dead = bench.store.stores().jobs.dead(9).await.expect("dead");
    assert!(dead[0].error.starts_with("the run panicked"));
}

#[tokio::test]
async fn a_wait_beyond_the_horizon_is_shortened() {
    let bench = Bench::new().await;
    let horizon = Duration::from_secs(30);
    let mut running = bench.run(Policy { horizon, ..policy() }, true);
    // The work repeats after 60 s. A stored wait of 60 s would exceed the horizon of 30 s, so the
    // job would count as due immediately.
    assert_eq!(running.next().await, ("repeats".to_owned(), 1));
    running.stop().await;
    let within = ClaimRequest { horizon, ..request(horizon) };
    let jobs = bench.store.stores().jobs;
    assert!(jobs.claim(within, NOW).await.expect("claim").is_empty());
    assert_eq!(jobs.claim(within, NOW.plus(horizon)).await.expect("claim").len(), 1);
}

#[tokio::test]
async fn a_run_that_does_not_end_at_the_stop_is_released() {
    let bench = Bench { grace: Duration::ZERO, ..Bench::new().await };
    bench.put("hangs").await;
    let mut running = bench.run(policy(), false);
    assert_eq!(running.next().await, ("hangs".to_owned(), 1));
    running.stop().await;
    let again = bench
        .store
        .stores()
        .jobs
        .claim(request(Duration::from_secs(60)), NOW)
        .await
        .expect("claim");
    assert_eq!(again[0].attempt, 1, "it does not count");
}

#[tokio::test]
async fn a_run_is_dropped_when_another_worker_has_claimed_its_job() {
    let bench = Bench::new().await;
    bench.put("hangs").await;
    let lease = Duration::from_millis(30);
    let mut running = bench.run(Policy { lease, ..policy() }, false);
    assert_eq!(running.next().await, ("hangs".to_owned(), 1));
    let jobs = bench.store.stores().jobs;
    // The clock goes past the lease, and another worker claims the job. A renewal between the two
    // extends the lease, and then the loop tries again.
    let taken = loop {
        bench.clock.0.fetch_add(3_600_000, Ordering::Relaxed);
        let taken = jobs.claim(request(60 * lease), bench.clock.now()).await.expect("claim");
        if let Some(job) = taken.into_iter().next() {
            break job;
        }
    };
    assert_eq!(running.next().await, ("hangs".to_owned(), 0), "dropped");
    running.stop().await;
    assert_eq!(taken.attempt, 2);
}

#[test]
fn the_backoff_doubles_up_to_its_cap_and_is_never_zero() {
    let policy = Policy {
        backoff_base: Duration::from_secs(2),
        backoff_cap: Duration::from_secs(60),
        ..Policy::default()
    };
    let waits = |random| (1..=7).map(move |attempt| policy.backoff(attempt, random).as_secs());
    assert!(waits(u64::MAX).eq([2, 4, 8, 16, 32, 60, 60]));
    assert!(waits(0).eq([1, 2, 4, 8, 16, 30, 30]));
    assert_eq!(policy.backoff(u32::MAX, u64::MAX), Duration::from_secs(60));
}
