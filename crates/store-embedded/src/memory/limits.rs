//! Token buckets in memory.
//!
//! A bucket is one number: the instant at which it is full again (the generic cell rate algorithm).
//! A full bucket is equal to a missing one and is removed, so memory is bounded by recent requests.

use std::{collections::HashMap, time::Duration};

use qpq_domain::UnixMillis;
use qpq_ports::{Bucket, LimitKey, Verdict};

use super::shards::Shards;

/// Maximum entries in one shard, about 100 bytes each with the key.
const SHARD_CAPACITY: usize = 8_192;

/// The longest debt, in milliseconds. A bucket with a longer one was filled before the clock was
/// set back, and counts as full.
const MAX_DEBT: f64 = 7.0 * 24.0 * 3_600_000.0;

/// The instant at which a bucket is full or a remembered key expires, in milliseconds since the
/// epoch.
#[derive(Clone, Copy, Debug)]
struct ExpiresAt(f64);

/// The buckets, and the remembered keys.
#[derive(Debug, Default)]
pub(crate) struct Limiter {
    buckets: Shards<LimitKey, ExpiresAt>,
    remembered: Shards<LimitKey, ExpiresAt>,
}

impl Limiter {
    pub(crate) fn take(
        &self,
        key: LimitKey,
        bucket: Bucket,
        cost: u32,
        now: UnixMillis,
    ) -> Verdict {
        let now = now.0 as f64;
        let mut buckets = self.buckets.lock(&key);
        if buckets.len() >= SHARD_CAPACITY && !buckets.contains_key(&key) {
            evict(&mut buckets, now);
        }
        let full_at = match buckets.get(&key) {
            Some(full_at) if full_at.0 - now <= MAX_DEBT => full_at.0.max(now),
            _ => now,
        };
        match spend(bucket, cost, full_at, now) {
            Ok(full_at) => {
                if full_at > now {
                    buckets.insert(key, ExpiresAt(full_at.min(now + MAX_DEBT)));
                }
                Verdict::Allowed
            }
            Err(wait) => Verdict::RetryAfter(wait),
        }
    }

    pub(crate) fn remember(&self, key: LimitKey, lifetime: Duration, now: UnixMillis) {
        let mut remembered = self.remembered.lock(&key);
        if remembered.len() >= SHARD_CAPACITY && !remembered.contains_key(&key) {
            evict(&mut remembered, now.0 as f64);
        }
        remembered.insert(key, ExpiresAt(now.plus(lifetime).0 as f64));
    }

    pub(crate) fn remembers(&self, key: &LimitKey, now: UnixMillis) -> bool {
        let remembered = self.remembered.lock(key);
        remembered.get(key).is_some_and(|until| until.0 > now.0 as f64)
    }
}

/// Returns the instant at which the bucket is full again after `cost` is taken. Fails with the time
/// until there are enough tokens.
fn spend(bucket: Bucket, cost: u32, full_at: f64, now: f64) -> Result<f64, Duration> {
    if bucket.burst == 0 || bucket.per_second.is_nan() || bucket.per_second <= 0.0 {
        return Err(Duration::MAX);
    }
    let millis_per_token = 1_000.0 / bucket.per_second;
    // A cost above the burst needs a full bucket and leaves a debt.
    let needed = f64::from(cost.min(bucket.burst));
    let missing = (full_at - now) / millis_per_token;
    let lacking = missing + needed - f64::from(bucket.burst);
    // Instants are whole milliseconds, so a lack of a fraction of a millisecond is a rounding
    // error.
    if lacking * millis_per_token < 1e-3 {
        Ok(full_at + f64::from(cost) * millis_per_token)
    } else {
        Err(Duration::from_millis((lacking * millis_per_token - 1e-3).ceil() as u64))
    }
}

/// Removes expired entries. If more than half of the capacity is still used, removes the half that
/// expires first.
fn evict(entries: &mut HashMap<LimitKey, ExpiresAt>, now: f64) {
    entries.retain(|_, expires_at| expires_at.0 > now);
    if entries.len() > SHARD_CAPACITY / 2 {
        let mut instants: Vec<f64> = entries.values().map(|expires_at| expires_at.0).collect();
        let middle = instants.len() / 2;
        let (_, median, _) = instants.select_nth_unstable_by(middle, f64::total_cmp);
        let median = *median;
        entries.retain(|_, expires_at| expires_at.0 > median);
    }
}

#[cfg(test)]
mod tests {
    use super::{super::shards::SHARDS, *};

    const CAPACITY: usize = SHARDS * SHARD_CAPACITY;

    fn key(n: u64) -> LimitKey {
        let mut subject = [0; 16];
        subject[..8].copy_from_slice(&n.to_be_bytes());
        LimitKey { class: "test", subject }
    }

    #[test]
    fn remembered_keys_expire_and_are_bounded() {
        let limiter = Limiter::default();
        let second = Duration::from_secs(1);
        limiter.remember(key(1), second, UnixMillis(0));
        for (now, expected) in [(0, true), (999, true), (1_000, false)] {
            assert_eq!(limiter.remembers(&key(1), UnixMillis(now)), expected, "{now}");
        }
        for n in 0..2 * CAPACITY as u64 {
            limiter.remember(key(n), second, UnixMillis(n));
        }
        assert!(limiter.remembered.len() <= CAPACITY);
    }

    #[test]
    fn buckets_are_bounded_and_full_ones_are_removed_first() {
        let limiter = Limiter::default();
        let slow = Bucket { burst: 1, per_second: 0.001 };
        let quick = Bucket { burst: 1, per_second: 1_000.0 };
        let spent = limiter.take(key(u64::MAX), slow, 1, UnixMillis(0));
        assert_eq!(spent, Verdict::Allowed);
        for n in 0..2 * CAPACITY as u64 {
            limiter.take(key(n), quick, 1, UnixMillis(10 + 2 * n / SHARD_CAPACITY as u64));
        }
        assert!(limiter.buckets.len() <= CAPACITY);
        let again = limiter.take(key(u64::MAX), slow, 1, UnixMillis(10));
        assert!(matches!(again, Verdict::RetryAfter(_)), "the emptiest bucket is kept");
    }
}
