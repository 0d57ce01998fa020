//! An edge whose clock differs from Postgres'.

use std::{
    error::Error as _,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use qpq_domain::{StoreLimits, UnixMillis};
use qpq_ports::{Bucket, Clock, LimitKey, StoreError, SystemClock, Verdict};
use qpq_store_cluster::{Clocks, Config};

use crate::{
    backend::{Servers, edge},
    people::person,
};

const DAY: u64 = 86_400_000;

/// A clock that is `ahead` milliseconds ahead of the time of this machine. The number is in two's
/// complement, so it may be negative.
#[derive(Clone, Debug, Default)]
struct Wrong {
    ahead: Arc<AtomicU64>,
}

impl Wrong {
    fn set(&self, ahead: i64) {
        self.ahead.store(ahead.cast_unsigned(), Ordering::Relaxed);
    }
}

impl Clock for Wrong {
    fn now(&self) -> UnixMillis {
        UnixMillis(SystemClock.now().0.wrapping_add(self.ahead.load(Ordering::Relaxed)))
    }
}

/// Creates a cluster in which Postgres has the real time, and its edges have the returned clock.
async fn cluster(servers: &Servers) -> (Config, Wrong) {
    let config = servers.cluster(StoreLimits::default()).await;
    let real = "extract(epoch FROM clock_timestamp()) * 1000";
    servers.set_postgres_clock(&config.namespace, real).await;
    let wrong = Wrong::default();
    let clocks = Clocks { edge: Some(Arc::new(wrong.clone())), ..Clocks::default() };
    (Config { clocks, ..config }, wrong)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_edge_with_a_wrong_clock_fails_its_check_until_the_clock_is_right() {
    let servers = Servers::start().await;
    let (config, wrong) = cluster(&servers).await;
    for (ahead, says) in [(100 * DAY as i64, "ahead of"), (-100 * (DAY as i64), "behind")] {
        wrong.set(ahead);
        let store = edge(&config).await;
        let maintenance = store.stores().maintenance;
        let error = maintenance.check().await.expect_err("a wrong clock");
        assert!(matches!(error, StoreError::Unavailable(_)), "{error:?}");
        let cause = error.source().expect("a cause").to_string();
        assert!(cause.contains(says) && cause.contains("set both clocks"), "{cause}");
        let off = store.clock().now().0.abs_diff(SystemClock.now().0);
        assert!(off < DAY || ahead < 0, "Postgres' time is the earlier one: {off} ms off");

        wrong.set(0);
        maintenance.check().await.expect("a clock that is right again");
        assert!(store.clock().now().0.abs_diff(SystemClock.now().0) < DAY);
        store.close().await;
    }
}

/// The clock of an edge has no effect on rate limits.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_edge_whose_clock_is_ahead_refills_no_bucket() {
    let servers = Servers::start().await;
    let (config, _) = cluster(&servers).await;
    let store = edge(&config).await;
    let limiter = store.stores().limiter;
    let key = || LimitKey { class: "clocks", subject: [1; 16] };
    let bucket = Bucket { burst: 1, per_second: 1e-4 };
    let now = SystemClock.now();
    let take = async |now| limiter.take(key(), bucket, 1, now).await.expect("take");
    assert_eq!(take(now).await, Verdict::Allowed);
    let later = take(now.plus(Duration::from_secs(100 * 86_400))).await;
    assert!(matches!(later, Verdict::RetryAfter(_)), "{later:?}");
    let earlier = take(now.minus(Duration::from_secs(100 * 86_400))).await;
    assert!(matches!(earlier, Verdict::RetryAfter(wait) if wait < Duration::from_secs(86_400)));
}

/// The statement of the sweep reads Postgres' clock, so even the first sweep of an edge compares
/// the clocks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sweep_of_an_edge_whose_clock_is_ahead_ends_no_session() {
    let servers = Servers::start().await;
    let (config, wrong) = cluster(&servers).await;
    wrong.set(100 * DAY as i64);
    let store = edge(&config).await;
    let stores = store.stores();
    let alice = person(&stores, 1).await;
    crate::people::open(&stores, 1, alice).await;
    let ahead = UnixMillis(u64::MAX >> 2);
    assert_eq!(stores.maintenance.sweep(ahead).await.expect("a sweep").rows, 0);
    assert!(stores.sessions.find(&crate::people::token(1)).await.expect("find").is_some());
}
