//! The sizes and lifetimes that users of the protocol can count on, with their defaults. Rates are
//! elsewhere (`proto`'s limit classes): these bound what one thing may be, those how often it may
//! be asked for.

use std::time::Duration;

/// Recipients or messages in one BatchEnqueue.
pub const MAX_BATCH: usize = 1_000;

/// What an inbox takes and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// Largest payload of one message, in bytes.
    pub max_payload: usize,
    /// Messages queued in one inbox.
    pub max_messages: u64,
    /// Bytes of payload queued in one inbox.
    pub max_bytes: u64,
    /// Lifetime of a message whose sender gave none.
    pub default_ttl: Duration,
    /// The longest lifetime a sender may ask for; more is cut to this.
    pub max_ttl: Duration,
    /// How long a message id is remembered once its message is gone.
    pub recent_ids: Duration,
    /// How long FetchWait waits when the client names no time.
    pub default_wait: Duration,
    /// The longest FetchWait; more is cut to this.
    pub max_wait: Duration,
}

impl Default for Delivery {
    fn default() -> Self {
        const DAY: Duration = Duration::from_secs(24 * 60 * 60);
        Self {
            max_payload: 1 << 20,
            max_messages: 10_000,
            max_bytes: 64 << 20,
            default_ttl: DAY * 30,
            max_ttl: DAY * 90,
            recent_ids: Duration::from_secs(15 * 60),
            default_wait: Duration::from_secs(30),
            max_wait: Duration::from_secs(60),
        }
    }
}

impl Delivery {
    /// The lifetime for a wire `ttl_secs`: 0 means the default, and nothing outlives the maximum.
    pub fn ttl(&self, ttl_secs: u32) -> Duration {
        if ttl_secs == 0 {
            self.default_ttl
        } else {
            Duration::from_secs(ttl_secs.into()).min(self.max_ttl)
        }
    }

    /// How long to wait for a wire `timeout_ms`: 0 means the default, and nothing waits longer than
    /// the maximum.
    pub fn wait(&self, timeout_ms: u64) -> Duration {
        if timeout_ms == 0 {
            self.default_wait
        } else {
            Duration::from_millis(timeout_ms).min(self.max_wait)
        }
    }
}

/// What one identity may keep in KeyPackages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyPackageCaps {
    /// Largest KeyPackage, in bytes.
    pub max_bytes: usize,
    /// KeyPackages of one identity, the last-resort one included.
    pub max_count: u32,
}

impl Default for KeyPackageCaps {
    fn default() -> Self {
        Self { max_bytes: 64 << 10, max_count: 1_000 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_asks_for_the_default_and_too_much_is_cut() {
        let limits = Delivery::default();
        assert_eq!(limits.ttl(0), limits.default_ttl);
        assert_eq!(limits.ttl(5), Duration::from_secs(5));
        assert_eq!(limits.ttl(u32::MAX), limits.max_ttl);
        assert_eq!(limits.wait(0), Duration::from_secs(30));
        assert_eq!(limits.wait(1), Duration::from_millis(1));
        assert_eq!(limits.wait(u64::MAX), Duration::from_secs(60));
    }
}
