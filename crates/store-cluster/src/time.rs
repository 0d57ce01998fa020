//! The two clocks of an edge: its own and Postgres'.
//!
//! Postgres' clock is the cluster's: the time passed to the ports follows it, so that all edges
//! agree to a few milliseconds, also with wrong clocks of their own. Neither clock is trusted
//! alone. Data is removed only when it has expired by both clocks, and the time for which data is
//! kept counts from the later of the two. An edge whose own clock differs by more than
//! [`Clocks::max_skew`] is not ready until the clocks agree again.

use std::{fmt, sync::Arc, time::Duration};

use parking_lot::Mutex;
use qpq_domain::UnixMillis;
use qpq_ports::{Clock, SystemClock};
use tokio::time::Instant;

use crate::metrics as names;

/// The sources of the store's time.
#[derive(Clone)]
pub struct Clocks {
    /// The clock of this machine. `None` in tests that set the time: the instant of each call then
    /// replaces this clock and the time of Redis.
    pub edge: Option<Arc<dyn Clock>>,
    /// Maximum difference between the edge's and Postgres' clock.
    pub max_skew: Duration,
}

impl Default for Clocks {
    fn default() -> Self {
        Self { edge: Some(Arc::new(SystemClock)), max_skew: Duration::from_secs(10) }
    }
}

impl fmt::Debug for Clocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Clocks").field("max_skew", &self.max_skew).finish_non_exhaustive()
    }
}

/// The clocks of the edge and of Postgres. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Time(Arc<Inner>);

struct Inner {
    clocks: Clocks,
    observed: Mutex<Observed>,
}

#[derive(Default)]
struct Observed {
    anchor: Option<Anchor>,
    skewed: bool,
}

/// Postgres' time at an instant of the monotonic clock.
#[derive(Clone, Copy)]
struct Anchor {
    postgres: UnixMillis,
    at: Instant,
}

/// The earliest and the latest instant that the present may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bounds {
    /// Data that has not expired at this instant is kept.
    pub(crate) earliest: UnixMillis,
    /// The instant from which the lifetime of new data counts.
    pub(crate) latest: UnixMillis,
    /// The time to store: Postgres' where the clocks disagree.
    pub(crate) agreed: UnixMillis,
}

/// The error if the clocks of the edge and of Postgres differ by too much.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the clock of this edge is {difference:?} {direction} that of Postgres, at most {max_skew:?} \
     is allowed: set both clocks, best by NTP; the edge becomes ready by itself"
)]
pub(crate) struct Skewed {
    difference: Duration,
    direction: &'static str,
    max_skew: Duration,
}

impl Time {
    pub(crate) fn new(clocks: Clocks) -> Self {
        Self(Arc::new(Inner { clocks, observed: Mutex::default() }))
    }

    /// Returns the time of this machine.
    fn edge(&self) -> Option<UnixMillis> {
        self.0.clocks.edge.as_ref().map(|clock| clock.now())
    }

    /// Records the time that Postgres returned to a query sent at `asked`.
    pub(crate) fn observe(&self, postgres: Option<UnixMillis>, asked: Instant) {
        let answered = Instant::now();
        let at = asked + answered.saturating_duration_since(asked) / 2;
        self.0.observed.lock().anchor = postgres.map(|postgres| Anchor { postgres, at });
        if let (Some(edge), Some(postgres)) = (self.edge(), self.postgres()) {
            let skew = (edge.0 as f64 - postgres.0 as f64) / 1_000.0;
            metrics::gauge!(names::CLOCK_SKEW).set(skew);
        }
    }

    /// Checks that the clocks agree now, by the last observation of Postgres' clock. Logs each
    /// change of the result.
    pub(crate) fn check(&self) -> Result<(), Skewed> {
        let skewed = self.skewed();
        let before = std::mem::replace(&mut self.0.observed.lock().skewed, skewed.is_some());
        match skewed {
            Some(skewed) => {
                if !before {
                    tracing::error!(
                        difference = ?skewed.difference,
                        direction = skewed.direction,
                        "the clock of this edge differs from that of postgres, edge is not ready"
                    );
                }
                Err(skewed)
            }
            None => {
                if before {
                    tracing::info!("the clock of this edge agrees with that of postgres again");
                }
                Ok(())
            }
        }
    }

    /// Returns the bounds of the present, from the caller's time `now` and Postgres' time
    /// `postgres`; `None` if Postgres was not asked.
    pub(crate) fn bounds(&self, now: UnixMillis, postgres: Option<UnixMillis>) -> Bounds {
        let (edge, postgres) = (self.edge().unwrap_or(now), postgres.unwrap_or(now));
        let earliest = now.min(edge).min(postgres);
        let latest = now.max(edge).max(postgres);
        if latest.since(earliest) > self.0.clocks.max_skew {
            Bounds { earliest, latest, agreed: postgres }
        } else {
            Bounds { earliest, latest: now, agreed: now }
        }
    }

    /// Returns Postgres' time, if it was observed.
    pub(crate) fn postgres(&self) -> Option<UnixMillis> {
        let anchor = self.0.observed.lock().anchor?;
        Some(anchor.postgres.plus(anchor.at.elapsed()))
    }

    fn skewed(&self) -> Option<Skewed> {
        let (edge, postgres) = (self.edge()?, self.postgres()?);
        let max_skew = self.0.clocks.max_skew;
        let (difference, direction) = if edge > postgres {
            (edge.since(postgres), "ahead of")
        } else {
            (postgres.since(edge), "behind")
        };
        (difference > max_skew).then_some(Skewed { difference, direction, max_skew })
    }
}

impl Clock for Time {
    /// Returns Postgres' time. While the clocks disagree, returns the earlier of both times, so
    /// that nothing expires too early.
    fn now(&self) -> UnixMillis {
        match (self.edge(), self.postgres()) {
            (Some(edge), Some(postgres)) if self.skewed().is_some() => postgres.min(edge),
            (_, Some(postgres)) => postgres,
            (edge, None) => edge.unwrap_or_default(),
        }
    }
}

impl fmt::Debug for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Time").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    const NOON: UnixMillis = UnixMillis(1_800_000_000_000);
    const DAY: Duration = Duration::from_secs(86_400);

    #[derive(Clone)]
    struct Set(Arc<AtomicU64>);

    impl Clock for Set {
        fn now(&self) -> UnixMillis {
            UnixMillis(self.0.load(Ordering::Relaxed))
        }
    }

    fn time(edge: UnixMillis) -> (Time, Arc<AtomicU64>) {
        let shows = Arc::new(AtomicU64::new(edge.0));
        let clocks = Clocks { edge: Some(Arc::new(Set(Arc::clone(&shows)))), ..Clocks::default() };
        (Time::new(clocks), shows)
    }

    #[tokio::test(start_paused = true)]
    async fn the_time_is_that_of_postgres_and_advances_between_observations() {
        let (time, _) = time(NOON.plus(Duration::from_secs(9)));
        time.observe(Some(NOON), Instant::now());
        assert_eq!(time.check(), Ok(()));
        assert_eq!(time.now(), NOON);
        tokio::time::advance(Duration::from_secs(3)).await;
        assert_eq!(time.now(), NOON.plus(Duration::from_secs(3)));
    }

    #[tokio::test(start_paused = true)]
    async fn an_edge_with_a_wrong_clock_is_refused_until_the_clock_is_right() {
        for wrong in [NOON.plus(100 * DAY), NOON.minus(100 * DAY)] {
            let (time, shows) = time(wrong);
            time.observe(Some(NOON), Instant::now());
            let skewed = time.check().expect_err("100 days");
            assert_eq!(skewed.difference, 100 * DAY);
            assert_eq!(time.now(), NOON.min(wrong), "the earlier one");
            shows.store(NOON.0, Ordering::Relaxed);
            assert_eq!(time.check(), Ok(()));
            assert_eq!(time.now(), NOON);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_clock_that_jumps_between_observations_is_noticed() {
        let (time, shows) = time(NOON);
        time.observe(Some(NOON), Instant::now());
        shows.store(NOON.plus(100 * DAY).0, Ordering::Relaxed);
        time.check().expect_err("it jumped");
        assert_eq!(time.now(), NOON);
    }

    #[tokio::test]
    async fn data_expires_by_both_clocks_and_is_kept_from_the_later_one() {
        let (time, _) = time(NOON.plus(100 * DAY));
        let ahead = time.bounds(NOON, Some(NOON));
        let late = NOON.plus(100 * DAY);
        assert_eq!(ahead, Bounds { earliest: NOON, latest: late, agreed: NOON });
        let (time, _) = self::time(NOON);
        let postgres = NOON.minus(100 * DAY);
        let behind = time.bounds(NOON, Some(postgres));
        assert_eq!(behind, Bounds { earliest: postgres, latest: NOON, agreed: postgres });
    }
}
