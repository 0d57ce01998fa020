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
    /// One sender holds at most one part of so many of an inbox that is more than half full, in
    /// messages and in bytes; 1 means no such limit.
    pub sender_share: u64,
    /// Largest BatchEnqueue, in bytes: the payload times the recipients, or the sum of the payloads.
    pub max_batch_bytes: u64,
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
            sender_share: 8,
            max_batch_bytes: 64 << 20,
            default_ttl: DAY * 30,
            max_ttl: DAY * 90,
            recent_ids: Duration::from_secs(15 * 60),
            default_wait: Duration::from_secs(30),
            max_wait: Duration::from_secs(60),
        }
    }
}

impl Delivery {
    /// Whether an inbox that holds `messages` and `bytes` has room for a payload of `size` bytes.
    pub const fn has_room(&self, messages: u64, bytes: u64, size: u64) -> bool {
        messages < self.max_messages && bytes.saturating_add(size) <= self.max_bytes
    }

    /// Whether an inbox that holds `messages` and `bytes` is more than half full, so that each
    /// sender is held to its share.
    pub const fn limits_senders(&self, messages: u64, bytes: u64) -> bool {
        self.sender_share > 1 && (messages > self.half_messages() || bytes > self.half_bytes())
    }

    /// The most messages in an inbox that is not more than half full.
    pub const fn half_messages(&self) -> u64 {
        self.max_messages / 2
    }

    /// The most bytes in an inbox that is not more than half full.
    pub const fn half_bytes(&self) -> u64 {
        self.max_bytes / 2
    }

    /// The most messages that one sender may hold in an inbox that is more than half full. At least
    /// one, or nobody could fill an inbox of a few messages.
    pub const fn sender_messages(&self) -> u64 {
        match self.max_messages / self.sender_share {
            0 => 1,
            share => share,
        }
    }

    /// The most bytes that one sender may hold in an inbox that is more than half full.
    pub const fn sender_bytes(&self) -> u64 {
        self.max_bytes / self.sender_share
    }

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

    #[test]
    fn senders_are_limited_from_the_first_message_or_byte_beyond_the_half() {
        let limits = Delivery { max_messages: 9, max_bytes: 100, ..Delivery::default() };
        assert!(!limits.limits_senders(4, 50));
        assert!(limits.limits_senders(5, 0) && limits.limits_senders(0, 51));
        assert_eq!((limits.sender_messages(), limits.sender_bytes()), (1, 12));
        assert_eq!(Delivery { max_messages: 3, ..limits }.sender_messages(), 1);
        assert!(!Delivery { sender_share: 1, ..limits }.limits_senders(9, 100));
    }

    #[test]
    fn there_is_room_up_to_the_last_message_and_byte() {
        let limits = Delivery { max_messages: 2, max_bytes: 10, ..Delivery::default() };
        assert!(limits.has_room(1, 9, 1));
        assert!(!limits.has_room(2, 0, 0) && !limits.has_room(0, 9, 2));
        assert!(!limits.has_room(0, 1, u64::MAX));
    }
}
