//! Arrivals at a fixed rate, whatever the server does, and what became of each.

use std::{collections::BTreeMap, future::Future, sync::Arc, time::Duration};

use hdrhistogram::Histogram;
use tokio::{
    sync::Semaphore,
    task::JoinSet,
    time::{Instant, interval},
};

/// Arrivals that may be unanswered at a time; more are counted as dropped rather than piled up
/// without end.
const MOST_IN_FLIGHT: usize = 20_000;

/// How one arrival ended: nothing, or the code of what went wrong.
pub(crate) type Ending = Result<(), String>;

/// What a run came to.
pub(crate) struct Tally {
    /// From the moment a call was due to its answer, in microseconds; only calls that were answered
    /// Ok.
    pub(crate) latency: Histogram<u64>,
    pub(crate) answered: u64,
    /// Calls that were not answered Ok, by code.
    pub(crate) failed: BTreeMap<String, u64>,
    /// From the first arrival to the last answer.
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

/// Starts `act(i)` for the i-th arrival at its time, `rate` a second for `duration`, and waits for
/// all of them.
pub(crate) async fn open_loop<F, Fut>(rate: f64, duration: Duration, act: F) -> Tally
where
    F: Fn(usize) -> Fut,
    Fut: Future<Output = Ending> + Send + 'static,
{
    let mut tally = Tally::default();
    let room = Arc::new(Semaphore::new(MOST_IN_FLIGHT));
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
            match Arc::clone(&room).try_acquire_owned() {
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

/// The other question, how much goes through at most: keeps `in_flight` calls going for `duration`.
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
