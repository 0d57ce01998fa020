//! The metrics of an edge about its cluster.

use std::{
    collections::HashMap,
    sync::{Arc, atomic::AtomicU64, atomic::Ordering},
    time::Duration,
};

use metrics::{Counter, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit};
use parking_lot::Mutex;
use qpq_domain::{ChannelId, Seq, StoreLimits};
use qpq_ports::{Batch, Enqueued, NewMessage, PageLimit, ReadQuery, Reader, View};
use qpq_store_cluster::Config;

use crate::{
    backend::{Process, Servers, edge, eventually},
    people::{HOUR, NOW, person},
};

/// Records the gauges and counters of all code on one thread. A counter is the sum over its labels.
#[derive(Debug, Default)]
struct Gauges(Mutex<HashMap<String, Arc<AtomicU64>>>);

impl Gauges {
    fn read(&self, name: &str) -> Option<f64> {
        self.0.lock().get(name).map(|bits| f64::from_bits(bits.load(Ordering::Acquire)))
    }

    fn counted(&self, name: &str) -> u64 {
        self.0.lock().get(name).map_or(0, |count| count.load(Ordering::Acquire))
    }
}

impl Recorder for Gauges {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        Counter::from_arc(Arc::clone(self.0.lock().entry(key.name().to_owned()).or_default()))
    }

    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::from_arc(Arc::clone(self.0.lock().entry(key.name().to_owned()).or_default()))
    }

    fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::noop()
    }
}

/// Runs on one thread, so that the gauges are those of this edge alone.
#[tokio::test]
async fn an_edge_counts_itself_and_the_edges_whose_heartbeats_arrive() {
    let gauges = Gauges::default();
    let _here = metrics::set_default_local_recorder(&gauges);
    let servers = Servers::start().await;
    let config = servers.cluster(StoreLimits::default()).await;
    let one = edge(&config).await;
    let sees = async |count: f64| {
        let what = format!("{count} edges to be seen");
        eventually(&what, || async { gauges.read("qpq_cluster_edges") == Some(count) }).await;
    };
    sees(1.0).await;
    let two = Process::start(&config).await;
    let three = Process::start(&config).await;
    sees(3.0).await;
    servers.nats.kill9().await.expect("NATS");
    sees(1.0).await;
    servers.nats.start_again().await.expect("NATS");
    sees(3.0).await;
    three.crash().await;
    sees(2.0).await;
    // NATS hangs, without a closed connection.
    servers.nats.freeze();
    sees(1.0).await;
    servers.nats.thaw();
    sees(2.0).await;
    two.crash().await;
    one.close().await;
}

/// Runs on one thread, as above. Counts the attempted calls, and does not measure their duration.
#[tokio::test]
async fn a_redis_that_hangs_receives_no_calls_until_it_answers() {
    let gauges = Gauges::default();
    let _here = metrics::set_default_local_recorder(&gauges);
    let servers = Servers::start().await;
    let config = servers.cluster(StoreLimits::default()).await;
    let config = Config { redis_timeout: Duration::from_millis(300), ..config };
    let store = edge(&config).await;
    let stores = store.stores();
    let alice = person(&stores, 1).await;
    let read = ReadQuery { reader: Reader::single(alice.identity), view: View::All };
    let limit = PageLimit { messages: 100, bytes: 1 << 20 };
    let peek = || stores.inboxes.peek(read, Seq::ZERO, limit, NOW);
    let send = async |n: u64| {
        let message = NewMessage {
            sender: alice.identity,
            recipient: alice.identity,
            channel: ChannelId::DEFAULT,
            payload: "hello".into(),
            payload_sha256: [7; 32],
            message_id: None,
            now: NOW,
            ttl: HOUR,
        };
        let outcomes = stores.inboxes.enqueue(Batch::new(vec![message])).await.expect("enqueue");
        assert!(matches!(outcomes[..], [Enqueued::Accepted(r)] if r.seq.0 == n), "{outcomes:?}");
    };
    send(1).await;
    assert_eq!(peek().await.expect("peek").envelopes.len(), 1);

    servers.redis.freeze();
    while gauges.read("qpq_redis_breaker_open") != Some(1.0) {
        peek().await.expect_err("Redis hangs");
    }
    let tried = gauges.counted("qpq_redis_errors_total");
    for n in 2..=50 {
        send(n).await;
        peek().await.expect_err("Redis hangs");
    }
    assert_eq!(gauges.counted("qpq_redis_errors_total"), tried, "no call was tried");
    assert!(gauges.counted("qpq_redis_skipped_total") >= 49);

    servers.redis.thaw();
    eventually("Redis to be asked again", || async { peek().await.is_ok() }).await;
    assert_eq!(gauges.read("qpq_redis_breaker_open"), Some(0.0));
    assert_eq!(peek().await.expect("peek").envelopes.len(), 50);
}
