//! Rate limits: token buckets, counted in this process or for the whole cluster.

use std::{fmt, time::Duration};

use async_trait::async_trait;
use qpq_domain::UnixMillis;

use crate::StoreResult;

/// Counts the calls, messages and bytes of callers.
#[async_trait]
pub trait RateLimiter: Send + Sync {
    /// Takes `cost` tokens from the bucket under `key`. A new bucket is full. A cost above the
    /// burst needs a full bucket and leaves a debt, so that the rate is kept.
    async fn take(
        &self,
        key: LimitKey,
        bucket: Bucket,
        cost: u32,
        now: UnixMillis,
    ) -> StoreResult<Verdict>;

    /// Remembers `key` for `lifetime`. The memory is bounded, so a key may be forgotten earlier.
    async fn remember(&self, key: LimitKey, lifetime: Duration, now: UnixMillis)
    -> StoreResult<()>;

    /// Returns whether `key` is remembered.
    async fn remembers(&self, key: LimitKey, now: UnixMillis) -> StoreResult<bool>;
}

/// The name of a bucket: a class from the table of limits, and a subject, which the caller hashes
/// if it is personal.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct LimitKey {
    /// The class, as in the table of limits.
    pub class: &'static str,
    /// The account, address or other subject that is counted.
    pub subject: [u8; 16],
}

impl fmt::Debug for LimitKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LimitKey").field("class", &self.class).finish_non_exhaustive()
    }
}

/// The size of a bucket and its rate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bucket {
    /// Tokens in a full bucket.
    pub burst: u32,
    /// Tokens added in a second.
    pub per_second: f64,
}

/// The outcome of taking tokens from a bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The tokens were taken.
    Allowed,
    /// No token was taken. The bucket has enough after this time.
    RetryAfter(Duration),
}
