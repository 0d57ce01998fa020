//! Rate limits, counted in this process.
//!
//! A bucket is one number: when it will be full again (the generic cell rate algorithm). One that
//! is full says nothing that an absent one does not, so it is forgotten, and memory is bounded by
//! what was spent lately.

use std::{collections::HashMap, time::Duration};

use async_trait::async_trait;
use qpq_domain::UnixMillis;
use qpq_ports::{Bucket, LimitKey, RateLimiter, StoreResult, Verdict};

use crate::shards::Shards;

/// Buckets in one shard at most; with the key about 100 bytes each.
const MOST: usize = 8_192;
/// The longest debt, in milliseconds. A bucket that owes more was filled before the clock was put
/// back, and counts as full.
const LONGEST: f64 = 7.0 * 24.0 * 3_600_000.0;

/// When the bucket is full again, in milliseconds since the epoch.
#[derive(Clone, Copy, Debug)]
struct FullAt(f64);

#[derive(Debug, Default)]
pub(crate) struct EmbeddedLimiter {
    buckets: Shards<LimitKey, FullAt>,
    /// What is remembered, and until when.
    remembered: Shards<LimitKey, FullAt>,
}

#[async_trait]
impl RateLimiter for EmbeddedLimiter {
    async fn take(
        &self,
        key: LimitKey,
        bucket: Bucket,
        cost: u32,
        now: UnixMillis,
    ) -> StoreResult<Verdict> {
        let now = now.0 as f64;
        let mut buckets = self.buckets.lock(&key);
        if buckets.len() >= MOST && !buckets.contains_key(&key) {
            make_room(&mut buckets, now);
        }
        let full_at = match buckets.get(&key) {
            Some(full_at) if full_at.0 - now <= LONGEST => full_at.0.max(now),
            _ => now,
        };
        Ok(match spend(bucket, cost, full_at, now) {
            Ok(full_at) => {
                if full_at > now {
                    buckets.insert(key, FullAt(full_at.min(now + LONGEST)));
                }
                Verdict::Allowed
            }
            Err(wait) => Verdict::RetryAfter(wait),
        })
    }

    async fn remember(
        &self,
        key: LimitKey,
        lifetime: Duration,
        now: UnixMillis,
    ) -> StoreResult<()> {
        let mut remembered = self.remembered.lock(&key);
        if remembered.len() >= MOST && !remembered.contains_key(&key) {
            make_room(&mut remembered, now.0 as f64);
        }
        remembered.insert(key, FullAt(now.plus(lifetime).0 as f64));
        Ok(())
    }

    async fn remembers(&self, key: LimitKey, now: UnixMillis) -> StoreResult<bool> {
        let remembered = self.remembered.lock(&key);
        Ok(remembered.get(&key).is_some_and(|until| until.0 > now.0 as f64))
    }
}

/// When the bucket will be full after `cost` is taken, or how long until it can be.
fn spend(bucket: Bucket, cost: u32, full_at: f64, now: f64) -> Result<f64, Duration> {
    if bucket.burst == 0 || bucket.per_second.is_nan() || bucket.per_second <= 0.0 {
        return Err(Duration::MAX);
    }
    let millis_per_token = 1_000.0 / bucket.per_second;
    // More than a whole bucket needs the whole bucket, and leaves a debt.
    let needed = f64::from(cost.min(bucket.burst));
    let missing = (full_at - now) / millis_per_token;
    let lacking = missing + needed - f64::from(bucket.burst);
    // An instant is a whole millisecond, so less than what comes back in one is no reason to
    // refuse.
    if lacking * millis_per_token < 1e-3 {
        Ok(full_at + f64::from(cost) * millis_per_token)
    } else {
        Err(Duration::from_millis((lacking * millis_per_token - 1e-3).ceil() as u64))
    }
}

/// Forgets the buckets that are full; if all are in use, the half that has the least to say.
fn make_room(buckets: &mut HashMap<LimitKey, FullAt>, now: f64) {
    buckets.retain(|_, full_at| full_at.0 > now);
    if buckets.len() > MOST / 2 {
        let mut instants: Vec<f64> = buckets.values().map(|full_at| full_at.0).collect();
        let middle = instants.len() / 2;
        let (_, median, _) = instants.select_nth_unstable_by(middle, f64::total_cmp);
        let median = *median;
        buckets.retain(|_, full_at| full_at.0 > median);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u64) -> LimitKey {
        let mut subject = [0; 16];
        subject[..8].copy_from_slice(&n.to_be_bytes());
        LimitKey { class: "test", subject }
    }

    #[tokio::test]
    async fn what_is_remembered_expires_and_is_bounded() {
        let limiter = EmbeddedLimiter::default();
        let second = Duration::from_secs(1);
        limiter.remember(key(1), second, UnixMillis(0)).await.expect("in memory");
        for (now, expected) in [(0, true), (999, true), (1_000, false)] {
            let known = limiter.remembers(key(1), UnixMillis(now)).await.expect("in memory");
            assert_eq!(known, expected, "{now}");
        }
        for n in 0..2 * 64 * MOST as u64 {
            limiter.remember(key(n), second, UnixMillis(n)).await.expect("in memory");
        }
        assert!(limiter.remembered.len() <= 64 * MOST);
    }

    #[tokio::test]
    async fn memory_is_bounded_and_full_buckets_go_first() {
        let limiter = EmbeddedLimiter::default();
        let slow = Bucket { burst: 1, per_second: 0.001 };
        let quick = Bucket { burst: 1, per_second: 1_000.0 };
        let spent = limiter.take(key(u64::MAX), slow, 1, UnixMillis(0)).await.expect("in memory");
        assert_eq!(spent, Verdict::Allowed);
        for n in 0..2 * 64 * MOST as u64 {
            limiter
                .take(key(n), quick, 1, UnixMillis(10 + 2 * n / MOST as u64))
                .await
                .expect("in memory");
        }
        assert!(limiter.buckets.len() <= 64 * MOST);
        let again = limiter.take(key(u64::MAX), slow, 1, UnixMillis(10)).await.expect("in memory");
        assert!(matches!(again, Verdict::RetryAfter(_)), "the one with the most to say was kept");
    }
}
