//! Arrivals at a fixed rate, independent of the server, and their outcomes.

use std::{collections::BTreeMap, future::Future, sync::Arc, time::Duration};

use hdrhistogram::Histogram;
use tokio::{
    sync::Semaphore,
    task::JoinSet,
    time::{Instant, interval},
};

/// The maximum number of unanswered arrivals. Further arrivals count as failed.
const MAX_IN_FLIGHT: usize = 20_000;

/// The outcome of an arrival: success, or the code of the failure.
pub(crate) type Ending = Result<(), String>;

/// The result of a run.
pub(crate) struct Tally {
    /// Microseconds from the due time of a call to its answer, of calls with answer Ok.
    pub(crate) latency: Histogram<u64>,
    pub(crate) answered: u64,
    /// Calls without answer Ok, by code.
    pub(crate) failed: BTreeMap<String, u64>,
    /// The time from the first arrival to the last answer.
    pub(crate) elapsed: Duration,
}

impl Default for Tally {
    fn default() -> Self {
        Self {
            latency: Histogram::new_with_bounds(1, 120_000_000, 3).expect("fixed bounds"),
            answered: 0,
            failed: BTreeMap::new(),
            elapsed: Duration::ZERO,
        }
    }
}

impl Tally {
    fn count(&mut self, ending: Ending, due: Instant, now: Instant) {
        match ending {
            Ok(()) => {
                self.answered += 1;
                let micros = u64::try_from((now - due).as_micros()).unwrap_or(u64::MAX);
                self.latency.saturating_record(micros.max(1));
            }
            Err(code) => *self.failed.entry(code).or_default() += 1,
        }
    }

    pub(crate) fn per_second(&self) -> f64 {
        self.answered as f64 / self.elapsed.as_secs_f64()
    }
}

/// Starts `act(i)` for the i-th arrival when it is due, with `rate` arrivals per second for
/// `duration`. Waits for all of them.
pub(crate) async fn open_loop<F, Fut>(rate: f64, duration: Duration, act: F) -> Tally
where
    F: Fn(usize) -> Fut,
    Fut: Future<Output = Ending> + Send + 'static,
{
    let mut tally = Tally::default();
    let permits = Arc::new(Semaphore::new(MAX_IN_FLIGHT));
    let mut running: JoinSet<(Ending, Instant, Instant)> = JoinSet::new();
    let total = (rate * duration.as_secs_f64()) as usize;
    let start = Instant::now();
    let mut tick = interval(Duration::from_millis(1));
    let mut arrived = 0;
    while arrived < total {
        tick.tick().await;
        let due_by_now = ((start.elapsed().as_secs_f64() * rate) as usize + 1).min(total);
        for i in arrived..due_by_now {
            let due = start + Duration::from_secs_f64(i as f64 / rate);
            match Arc::clone(&permits).try_acquire_owned() {
                Err(_) => tally.count(Err("load.too_many_in_flight".into()), due, due),
                Ok(permit) => {
                    let act = act(i);
                    running.spawn(async move {
                        let ending = act.await;
                        drop(permit);
                        (ending, due, Instant::now())
                    });
                }
            }
        }
        arrived = due_by_now;
        while let Some(done) = running.try_join_next() {
            let (ending, due, now) = done.expect("an arrival does not panic");
            tally.count(ending, due, now);
        }
    }
    while let Some(done) = running.join_next().await {
        let (ending, due, now) = done.expect("an arrival does not panic");
        tally.count(ending, due, now);
    }
    tally.elapsed = start.elapsed();
    tally
}

/// Measures the maximum throughput: keeps `in_flight` calls running for `duration`.
pub(crate) async fn closed_loop<F, Fut>(in_flight: usize, duration: Duration, act: F) -> Tally
where
    F: Fn(usize) -> Fut,
    Fut: Future<Output = Ending> + Send + 'static,
{
    let mut tally = Tally::default();
    let mut running: JoinSet<(Ending, Instant, Instant)> = JoinSet::new();
    let start = Instant::now();
    let begin = |running: &mut JoinSet<_>, i: usize| {
        let act = act(i);
        let due = Instant::now();
        running.spawn(async move { (act.await, due, Instant::now()) });
    };
    let mut i = 0;
    while i < in_flight {
        begin(&mut running, i);
        i += 1;
    }
    while let Some(done) = running.join_next().await {
        let (ending, due, now) = done.expect("a call does not panic");
        tally.count(ending, due, now);
        if start.elapsed() < duration {
            begin(&mut running, i);
            i += 1;
        }
    }
    tally.elapsed = start.elapsed();
    tally
}
