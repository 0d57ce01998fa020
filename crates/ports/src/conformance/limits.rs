//! Rules of [`crate::RateLimiter`]: the arithmetic of token buckets.

use std::{sync::Arc, time::Duration};

use qpq_domain::UnixMillis;
use tokio::task::JoinSet;

use super::{
    Factory,
    bench::{Bench, MINUTE, NOW},
};
use crate::{Bucket, LimitKey, Verdict};

/// Allows ten calls immediately, and two more each second.
const BUCKET: Bucket = Bucket { burst: 10, per_second: 2.0 };

fn key(n: u8) -> LimitKey {
    LimitKey { class: "conformance", subject: [n; 16] }
}

fn after(millis: u64) -> UnixMillis {
    NOW.plus(Duration::from_millis(millis))
}

fn retry(millis: u64) -> Verdict {
    Verdict::RetryAfter(Duration::from_millis(millis))
}

impl Bench {
    async fn spend(&self, n: u8, cost: u32, now: UnixMillis) -> Verdict {
        self.stores.limiter.take(key(n), BUCKET, cost, now).await.expect("take")
    }
}

pub async fn a_bucket_is_full_when_first_seen(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    for _ in 0..10 {
        assert_eq!(bench.spend(1, 1, NOW).await, Verdict::Allowed);
    }
    assert_eq!(bench.spend(1, 1, NOW).await, retry(500));
    assert_eq!(bench.spend(2, 10, NOW).await, Verdict::Allowed);
    assert_eq!(bench.spend(2, 1, NOW).await, retry(500));
}

pub async fn tokens_return_with_time(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    assert_eq!(bench.spend(1, 10, NOW).await, Verdict::Allowed);
    assert_eq!(bench.spend(1, 1, after(499)).await, retry(1));
    assert_eq!(bench.spend(1, 1, after(500)).await, Verdict::Allowed);
    assert_eq!(bench.spend(1, 2, after(1_000)).await, retry(500));
    assert_eq!(bench.spend(1, 2, after(1_500)).await, Verdict::Allowed);
    let much_later = NOW.plus(60 * MINUTE);
    assert_eq!(bench.spend(1, 10, much_later).await, Verdict::Allowed);
    assert_eq!(bench.spend(1, 1, much_later).await, retry(500), "never more than a full bucket");
}

pub async fn a_refusal_costs_nothing_and_names_the_wait(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    assert_eq!(bench.spend(1, 8, NOW).await, Verdict::Allowed);
    for _ in 0..5 {
        assert_eq!(bench.spend(1, 5, NOW).await, retry(1_500));
    }
    assert_eq!(bench.spend(1, 2, NOW).await, Verdict::Allowed);
    assert_eq!(bench.spend(1, 5, NOW).await, retry(2_500));
    assert_eq!(
        bench.spend(1, 5, after(2_500)).await,
        Verdict::Allowed,
        "after the wait there is enough"
    );
}

pub async fn a_cost_above_the_burst_leaves_a_debt(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    assert_eq!(bench.spend(1, 1, NOW).await, Verdict::Allowed);
    assert_eq!(bench.spend(1, 30, NOW).await, retry(500), "it needs a full bucket");
    assert_eq!(bench.spend(1, 30, after(500)).await, Verdict::Allowed);
    assert_eq!(bench.spend(1, 1, after(500)).await, retry(10_500), "with a debt of 20 tokens");
    assert_eq!(bench.spend(1, 1, after(11_000)).await, Verdict::Allowed);
}

pub async fn buckets_are_independent(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    assert_eq!(bench.spend(1, 10, NOW).await, Verdict::Allowed);
    assert_eq!(bench.spend(2, 10, NOW).await, Verdict::Allowed);
    let other = LimitKey { class: "another", ..key(1) };
    assert_eq!(
        bench.stores.limiter.take(other, BUCKET, 10, NOW).await.expect("take"),
        Verdict::Allowed
    );
    assert_eq!(bench.spend(1, 1, NOW).await, retry(500));
}

pub async fn concurrent_takes_spend_no_token_twice(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let bucket = Bucket { burst: 100, per_second: 0.001 };
    let mut tasks = JoinSet::new();
    for _ in 0..8 {
        let limiter = Arc::clone(&bench.stores.limiter);
        tasks.spawn(async move {
            let mut allowed = 0;
            for _ in 0..25 {
                if limiter.take(key(1), bucket, 1, NOW).await.expect("take") == Verdict::Allowed {
                    allowed += 1;
                }
            }
            allowed
        });
    }
    assert_eq!(tasks.join_all().await.iter().sum::<u32>(), 100);
}

pub async fn a_clock_set_far_back_blocks_no_caller(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let ahead = NOW.plus(100 * 24 * 60 * MINUTE);
    assert_eq!(bench.spend(1, 10, ahead).await, Verdict::Allowed);
    assert_eq!(bench.spend(1, 10, NOW).await, Verdict::Allowed, "a full bucket");
    assert_eq!(bench.spend(1, 1, NOW).await, retry(500));
}

pub async fn a_remembered_key_is_known_under_its_own_name(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let limiter = &bench.stores.limiter;
    assert!(!limiter.remembers(key(1), NOW).await.expect("remembers"));
    limiter.remember(key(1), MINUTE, NOW).await.expect("remember");
    assert!(limiter.remembers(key(1), NOW).await.expect("remembers"));
    assert!(!limiter.remembers(key(2), NOW).await.expect("remembers"));
    assert_eq!(bench.spend(1, 1, NOW).await, Verdict::Allowed, "not a bucket");
}
