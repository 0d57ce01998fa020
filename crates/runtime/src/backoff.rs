//! The waits between retries: exponential with full jitter, so that clients which failed together
//! do not retry together.

use std::time::Duration;

/// A sequence of waits: the n-th is uniform between zero and `base · 2ⁿ`, at most `cap`.
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

    /// Returns the next wait. `random` is uniform over all of u64; the caller passes it, so that
    /// tests are repeatable.
    pub fn next(&mut self, random: u64) -> Duration {
        let ceiling = self.base.saturating_mul(1 << self.attempt.min(31)).min(self.cap);
        self.attempt = self.attempt.saturating_add(1);
        ceiling.mul_f64(random as f64 / u64::MAX as f64)
    }

    /// Returns the number of waits so far.
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
    fn jitter_reaches_zero_and_many_attempts_do_not_overflow() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(1));
        assert_eq!(backoff.next(0), Duration::ZERO);
        for _ in 0..100 {
            assert!(backoff.next(u64::MAX / 2) <= Duration::from_millis(500));
        }
    }
}
