//! The sizes and lifetimes that clients can rely on, with their defaults.
//!
//! These limits apply to a single message, inbox or KeyPackage. The limit classes of `proto` limit
//! the rate of requests.

use std::time::Duration;

use crate::ReportLimits;

/// The maximum number of recipients or messages in one BatchEnqueue.
pub const MAX_BATCH: usize = 1_000;

/// The maximum length of a published endpoint, in bytes.
pub const MAX_ENDPOINT: usize = 4_096;
/// The largest chunk of an upload and the largest part of a download, in bytes.
pub const MAX_BLOB_CHUNK: usize = 1 << 20;

/// The maximum length of a blob's MIME type, in bytes.
pub const MAX_MIME_TYPE: usize = 128;

/// The limits of messages and inboxes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeliveryLimits {
    /// The largest payload of a message, in bytes.
    pub max_payload: usize,
    /// The maximum number of messages queued in an inbox.
    pub max_messages: u64,
    /// The maximum number of payload bytes queued in an inbox.
    pub max_bytes: u64,
    /// The divisor of the share of one sender in an inbox that is more than half full.
    ///
    /// With 8, the sender has at most an eighth of the inbox, in messages and in bytes. 1 means no
    /// limit.
    pub sender_share: u64,
    /// The largest BatchEnqueue, in bytes: the payload times the number of recipients, or the sum
    /// of the payloads.
    pub max_batch_bytes: u64,
    /// The lifetime of a message whose request names none.
    pub default_ttl: Duration,
    /// The longest lifetime of a message. Longer ones are reduced to it.
    pub max_ttl: Duration,
    /// The time for which a message id is remembered after its message was removed.
    pub recent_ids: Duration,
    /// The time without a read after which a device can lose its position. The device loses its
    /// position only if its messages also fill more than half of the inbox.
    pub device_absence: Duration,
    /// The time that a FetchWait without a timeout waits.
    pub default_wait: Duration,
    /// The longest timeout of a FetchWait. Longer ones are reduced to it.
    pub max_wait: Duration,
}

impl Default for DeliveryLimits {
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
            device_absence: DAY * 30,
            default_wait: Duration::from_secs(30),
            max_wait: Duration::from_secs(60),
        }
    }
}

impl DeliveryLimits {
    /// Returns whether a payload of `size` bytes fits into an inbox of `messages` and `bytes`.
    pub const fn has_room(&self, messages: u64, bytes: u64, size: u64) -> bool {
        messages < self.max_messages && bytes.saturating_add(size) <= self.max_bytes
    }

    /// Returns whether an inbox of `messages` and `bytes` limits each sender to its share.
    ///
    /// The limit applies while the inbox is more than half full.
    pub const fn limits_senders(&self, messages: u64, bytes: u64) -> bool {
        self.sender_share > 1 && (messages > self.half_messages() || bytes > self.half_bytes())
    }

    /// Returns the largest number of messages in an inbox that is not more than half full.
    pub const fn half_messages(&self) -> u64 {
        self.max_messages / 2
    }

    /// Returns the largest number of bytes in an inbox that is not more than half full.
    pub const fn half_bytes(&self) -> u64 {
        self.max_bytes / 2
    }

    /// Returns one sender's share, in messages, of an inbox that is more than half full.
    ///
    /// The result is at least 1, because with a share of zero a small inbox could never be filled.
    pub const fn sender_messages(&self) -> u64 {
        match self.max_messages / self.sender_share {
            0 => 1,
            share => share,
        }
    }

    /// Returns one sender's share, in bytes, of an inbox that is more than half full.
    pub const fn sender_bytes(&self) -> u64 {
        self.max_bytes / self.sender_share
    }

    /// Returns the lifetime for `ttl_secs` of a request: the default for 0, at most the maximum.
    pub fn ttl(&self, ttl_secs: u32) -> Duration {
        if ttl_secs == 0 {
            self.default_ttl
        } else {
            Duration::from_secs(ttl_secs.into()).min(self.max_ttl)
        }
    }

    /// Returns the wait for `timeout_ms` of a request: the default for 0, at most the maximum.
    pub fn wait(&self, timeout_ms: u64) -> Duration {
        if timeout_ms == 0 {
            self.default_wait
        } else {
            Duration::from_millis(timeout_ms).min(self.max_wait)
        }
    }
}

/// The limits of stored KeyPackages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyPackageLimits {
    /// The largest KeyPackage, in bytes.
    pub max_bytes: usize,
    /// The maximum number of KeyPackages of a device, including the last-resort one. The
    /// KeyPackages that the identity key signs have the same limit.
    pub max_count: u32,
}

impl Default for KeyPackageLimits {
    fn default() -> Self {
        Self { max_bytes: 64 << 10, max_count: 1_000 }
    }
}

/// The limits of blobs and their uploads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlobLimits {
    /// The largest blob, in bytes.
    pub max_bytes: u64,
    /// The maximum size of the blobs and open uploads of one account, in bytes.
    pub quota: u64,
    /// The maximum number of open uploads of one account.
    pub max_uploads: u32,
    /// The maximum size of the open uploads of one account, in bytes.
    pub max_staged: u64,
    /// The time without a chunk after which an upload is removed.
    pub upload_idle: Duration,
    /// The lifetime of an account's reference to a blob after its last renewal.
    pub lifetime: Duration,
}

impl Default for BlobLimits {
    fn default() -> Self {
        const DAY: Duration = Duration::from_secs(24 * 60 * 60);
        Self {
            max_bytes: 50 << 20,
            quota: 1 << 30,
            max_uploads: 4,
            max_staged: 200 << 20,
            upload_idle: DAY,
            lifetime: DAY * 90,
        }
    }
}

/// The limits that a store enforces.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreLimits {
    /// Limits of messages and inboxes.
    pub delivery: DeliveryLimits,
    /// Limits of KeyPackages.
    pub key_packages: KeyPackageLimits,
    /// Limits of reports.
    pub reports: ReportLimits,
    /// Limits of blobs.
    pub blobs: BlobLimits,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_means_the_default_and_larger_values_are_reduced_to_the_maximum() {
        let limits = DeliveryLimits::default();
        assert_eq!(limits.ttl(0), limits.default_ttl);
        assert_eq!(limits.ttl(5), Duration::from_secs(5));
        assert_eq!(limits.ttl(u32::MAX), limits.max_ttl);
        assert_eq!(limits.wait(0), Duration::from_secs(30));
        assert_eq!(limits.wait(1), Duration::from_millis(1));
        assert_eq!(limits.wait(u64::MAX), Duration::from_secs(60));
    }

    #[test]
    fn senders_are_limited_in_an_inbox_that_is_more_than_half_full() {
        let limits =
            DeliveryLimits { max_messages: 9, max_bytes: 100, ..DeliveryLimits::default() };
        assert!(!limits.limits_senders(4, 50));
        assert!(limits.limits_senders(5, 0) && limits.limits_senders(0, 51));
        assert_eq!((limits.sender_messages(), limits.sender_bytes()), (1, 12));
        assert_eq!(DeliveryLimits { max_messages: 3, ..limits }.sender_messages(), 1);
        assert!(!DeliveryLimits { sender_share: 1, ..limits }.limits_senders(9, 100));
    }

    #[test]
    fn an_inbox_has_room_up_to_exactly_its_limits() {
        let limits = DeliveryLimits { max_messages: 2, max_bytes: 10, ..DeliveryLimits::default() };
        assert!(limits.has_room(1, 9, 1));
        assert!(!limits.has_room(2, 0, 0) && !limits.has_room(0, 9, 2));
        assert!(!limits.has_room(0, 1, u64::MAX));
    }
}
