//! The waits between retries: exponential with full jitter.
//!
//! All retries of the project use this back-off: those of the client's connections and calls, of
//! transactions, and of commands that wait for a store. With full jitter, clients that failed
//! together do not retry together.

use std::time::Duration;

/// The bounds of the waits between retries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backoff {
    /// The longest wait after the first failure. Each further failure doubles the longest wait.
    pub base: Duration,
    /// The longest wait after any number of failures.
    pub cap: Duration,
}

impl Backoff {
    /// Creates a back-off from its base and its cap.
    #[must_use]
    pub const fn new(base: Duration, cap: Duration) -> Self {
        Self { base, cap }
    }

    /// Returns the wait after `failures` consecutive failures: uniform between zero and the longest
    /// wait. Zero without a failure.
    ///
    /// `random` is uniform over all of `u64`. The caller passes it, so that tests are repeatable.
    #[must_use]
    pub fn delay(&self, failures: u32, random: u64) -> Duration {
        self.longest(failures).mul_f64(random as f64 / u64::MAX as f64)
    }

    /// Returns the longest wait after `failures` consecutive failures.
    #[must_use]
    pub fn longest(&self, failures: u32) -> Duration {
        let Some(doublings) = failures.checked_sub(1) else { return Duration::ZERO };
        let factor = 1u32.checked_shl(doublings).unwrap_or(u32::MAX);
        self.base.saturating_mul(factor).min(self.cap)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BACKOFF: Backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(30));

    #[test]
    fn the_longest_wait_doubles_up_to_the_cap_and_is_zero_before_the_first_failure() {
        let longest: Vec<u128> =
            (0..=9).map(|failures| BACKOFF.delay(failures, u64::MAX).as_millis()).collect();
        assert_eq!(longest, [0, 200, 400, 800, 1600, 3200, 6400, 12_800, 25_600, 30_000]);
        for failures in [31, 32, 33, 34, u32::MAX] {
            assert_eq!(BACKOFF.delay(failures, u64::MAX), BACKOFF.cap);
        }
    }

    #[test]
    fn the_jitter_ranges_from_zero_to_the_longest_wait() {
        assert_eq!(BACKOFF.delay(3, 0), Duration::ZERO);
        assert_eq!(BACKOFF.delay(3, u64::MAX / 4).as_millis(), 200);
        assert_eq!(BACKOFF.delay(3, u64::MAX).as_millis(), 800);
    }
}
