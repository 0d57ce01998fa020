//! Rate limits: token buckets that somebody counts, in this process or for the whole cluster.

use std::{fmt, time::Duration};

use async_trait::async_trait;
use qpq_domain::UnixMillis;

use crate::StoreResult;

/// Counts.
#[async_trait]
pub trait RateLimiter: Send + Sync {
    /// Takes `cost` tokens from the bucket under `key`, which is full when first seen. A cost above
    /// the burst needs a full bucket and leaves a debt, so that the rate is kept.
    async fn take(
        &self,
        key: LimitKey,
        bucket: Bucket,
        cost: u32,
        now: UnixMillis,
    ) -> StoreResult<Verdict>;

    /// Remembers `key` for `lifetime`, in bounded memory. What is remembered may be lost.
    async fn remember(&self, key: LimitKey, lifetime: Duration, now: UnixMillis)
    -> StoreResult<()>;

    /// Whether `key` is remembered.
    async fn remembers(&self, key: LimitKey, now: UnixMillis) -> StoreResult<bool>;
}

/// Whose bucket: a class name (fixed, from the table of limits) and whom it counts, hashed by the
/// caller where it is personal.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct LimitKey {
    pub class: &'static str,
    pub subject: [u8; 16],
}

impl fmt::Debug for LimitKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LimitKey").field("class", &self.class).finish_non_exhaustive()
    }
}

/// The size of a bucket and how fast it fills.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bucket {
    /// Tokens in a full bucket.
    pub burst: u32,
    /// Tokens that come back in a second.
    pub per_second: f64,
}

/// Whether there were enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Allowed,
    /// Not now; there will be enough after this long.
    RetryAfter(Duration),
}
