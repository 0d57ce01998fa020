//! How long to wait before another try: exponential with full jitter, so that the clients of an
//! edge that went away do not come back to the next one all at once.

use std::time::Duration;

use rand::Rng;

/// The shape of the waiting times.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backoff {
    /// The most that the first wait can be; it doubles with every failure.
    pub base: Duration,
    /// The most that any wait can be.
    pub cap: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { base: Duration::from_millis(200), cap: Duration::from_secs(30) }
    }
}

impl Backoff {
    /// The wait before the try after `failures` failures in a row: anything between nothing and the
    /// bound.
    pub(crate) fn delay(&self, failures: u32, rng: &mut impl Rng) -> Duration {
        rng.gen_range(Duration::ZERO..=self.bound(failures))
    }

    fn bound(&self, failures: u32) -> Duration {
        let Some(doublings) = failures.checked_sub(1) else { return Duration::ZERO };
        let factor = 1u32.checked_shl(doublings).filter(|factor| *factor != 0).unwrap_or(u32::MAX);
        self.base.saturating_mul(factor).min(self.cap)
    }
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng as _, rngs::StdRng};

    use super::*;

    #[test]
    fn the_bound_doubles_up_to_the_cap_and_the_first_try_is_at_once() {
        let backoff = Backoff::default();
        let bounds: Vec<u128> = (0..=9).map(|n| backoff.bound(n).as_millis()).collect();
        assert_eq!(bounds, [0, 200, 400, 800, 1600, 3200, 6400, 12_800, 25_600, 30_000]);
        for failures in [31, 32, 33, 34, u32::MAX] {
            assert_eq!(backoff.bound(failures), backoff.cap);
        }
    }

    #[test]
    fn the_jitter_is_full() {
        let (backoff, mut rng) = (Backoff::default(), StdRng::seed_from_u64(1));
        let delays: Vec<_> = (0..1000).map(|_| backoff.delay(3, &mut rng)).collect();
        assert!(delays.iter().all(|d| *d <= Duration::from_millis(800)));
        assert!(delays.iter().any(|d| *d < Duration::from_millis(80)), "some come early");
        assert!(delays.iter().any(|d| *d > Duration::from_millis(720)), "some come late");
        assert_eq!(backoff.delay(0, &mut rng), Duration::ZERO);
    }
}
