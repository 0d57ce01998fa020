//! The one way to wait before trying again: exponential, with full jitter, so that many who failed
//! together do not come back together.

use std::time::Duration;

/// How long the waits are: the n-th is anywhere between nothing and `base · 2ⁿ`, at most `cap`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    base: Duration,
    cap: Duration,
    attempt: u32,
}

impl Backoff {
    pub const fn new(base: Duration, cap: Duration) -> Self {
        Self { base, cap, attempt: 0 }
    }

    /// The next wait. `random` is uniform over all of u64: randomness is given in, so that tests
    /// repeat.
    pub fn next(&mut self, random: u64) -> Duration {
        let ceiling = self.base.saturating_mul(1 << self.attempt.min(31)).min(self.cap);
        self.attempt = self.attempt.saturating_add(1);
        ceiling.mul_f64(random as f64 / u64::MAX as f64)
    }

    /// How many waits there were.
    pub fn attempts(&self) -> u32 {
        self.attempt
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ceiling_doubles_up_to_the_cap() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(1));
        let waits: Vec<_> = (0..6).map(|_| backoff.next(u64::MAX).as_millis()).collect();
        assert_eq!(waits, [100, 200, 400, 800, 1000, 1000]);
        assert_eq!(backoff.attempts(), 6);
    }

    #[test]
    fn jitter_reaches_down_to_nothing_and_a_long_outage_does_not_overflow() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(1));
        assert_eq!(backoff.next(0), Duration::ZERO);
        for _ in 0..100 {
            assert!(backoff.next(u64::MAX / 2) <= Duration::from_millis(500));
        }
    }
}
