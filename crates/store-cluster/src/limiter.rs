//! Rate limits, counted in Redis for all edges together.
//!
//! A bucket is stored as one number: the instant at which it is full again (the generic cell rate
//! algorithm). `redis/scripts/spend.lua` computes it as the embedded store does. After a flush of
//! Redis all buckets are full. The time is that of Redis, so that an edge with a wrong clock
//! neither empties nor fills a bucket.

use std::{sync::LazyLock, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use qpq_domain::UnixMillis;
use qpq_ports::{Bucket, LimitKey, RateLimiter, StoreResult, Verdict};
use redis::Script;

use crate::{ClusterStore, metrics as names, redis::Redis};

/// Time for which a key is kept after its bucket is full.
const KEY_SLACK: Duration = Duration::from_secs(60);
/// Maximum lifetime of a key. A bucket that would be full later than that is treated as full then.
const MAX_LIFETIME: Duration = Duration::from_secs(7 * 24 * 60 * 60);

static SPEND: LazyLock<Script> =
    LazyLock::new(|| Script::new(include_str!("redis/scripts/spend.lua")));

static REMEMBER: LazyLock<Script> =
    LazyLock::new(|| Script::new("redis.call('SET', KEYS[1], 1, 'PX', ARGV[1])"));

static REMEMBERS: LazyLock<Script> =
    LazyLock::new(|| Script::new("return redis.call('EXISTS', KEYS[1])"));

/// Returns the key in Redis that marks a limit key as remembered. Redis expires it.
fn remembered(redis: &Redis, LimitKey { class, subject }: &LimitKey) -> String {
    redis.key(format_args!("k:{class}:{:032x}", u128::from_be_bytes(*subject)))
}

#[async_trait]
impl RateLimiter for ClusterStore {
    async fn take(
        &self,
        key: LimitKey,
        bucket: Bucket,
        cost: u32,
        now: UnixMillis,
    ) -> StoreResult<Verdict> {
        let Some(millis_per_token) = millis_per_token(bucket) else {
            return Ok(Verdict::RetryAfter(Duration::MAX));
        };
        let LimitKey { class, subject } = key;
        let key =
            self.inner.redis.key(format_args!("r:{class}:{:032x}", u128::from_be_bytes(subject)));
        let args = [
            text(bucket.burst),
            // A float that is printed by Rust is parsed as the same value.
            text(millis_per_token),
            text(cost),
            if self.inner.time_is_injected { text(now.0) } else { Bytes::new() },
            text(KEY_SLACK.as_millis()),
            text(MAX_LIFETIME.as_millis()),
        ];
        match self.inner.redis.script::<Option<f64>>("spend", &SPEND, &[key], &args).await {
            Ok(None) => Ok(Verdict::Allowed),
            Ok(Some(wait)) => Ok(Verdict::RetryAfter(Duration::from_millis(wait as u64))),
            Err(error) => {
                metrics::counter!(names::LIMIT_FAILURES).increment(1);
                Err(error)
            }
        }
    }

    async fn remember(&self, key: LimitKey, lifetime: Duration, _: UnixMillis) -> StoreResult<()> {
        let key = remembered(&self.inner.redis, &key);
        let lifetime = text(lifetime.as_millis());
        self.inner.redis.script::<()>("remember", &REMEMBER, &[key], &[lifetime]).await
    }

    async fn remembers(&self, key: LimitKey, _: UnixMillis) -> StoreResult<bool> {
        let key = remembered(&self.inner.redis, &key);
        self.inner.redis.script::<bool>("remembers", &REMEMBERS, &[key], &[]).await
    }
}

/// Returns the milliseconds in which a token returns; `None` if the bucket never has a token.
fn millis_per_token(bucket: Bucket) -> Option<f64> {
    (bucket.burst > 0 && bucket.per_second > 0.0).then(|| 1_000.0 / bucket.per_second)
}

fn text(n: impl ToString) -> Bytes {
    n.to_string().into()
}
