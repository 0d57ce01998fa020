//! What an edge tells of the cluster it sees.

use std::{
    collections::HashMap,
    sync::{Arc, atomic::AtomicU64, atomic::Ordering},
};

use metrics::{Counter, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit};
use parking_lot::Mutex;
use qpq_store_cluster::Limits;

use crate::backend::{Process, Servers, edge, eventually};

/// Keeps the gauges of whatever runs on one thread.
#[derive(Debug, Default)]
struct Gauges(Mutex<HashMap<String, Arc<AtomicU64>>>);

impl Gauges {
    fn read(&self, name: &str) -> Option<f64> {
        self.0.lock().get(name).map(|bits| f64::from_bits(bits.load(Ordering::Acquire)))
    }
}

impl Recorder for Gauges {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn register_counter(&self, _: &Key, _: &Metadata<'_>) -> Counter {
        Counter::noop()
    }

    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::from_arc(Arc::clone(self.0.lock().entry(key.name().to_owned()).or_default()))
    }

    fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::noop()
    }
}

/// On one thread, whose gauges are this edge's alone: the others are processes of their own.
#[tokio::test]
async fn an_edge_counts_the_edges_it_hears_and_itself() {
    let gauges = Gauges::default();
    let _here = metrics::set_default_local_recorder(&gauges);
    let servers = Servers::start().await;
    let config = servers.cluster(Limits::default()).await;
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
    // It hangs, and nobody is told that it is away.
    servers.nats.freeze();
    sees(1.0).await;
    servers.nats.thaw();
    sees(2.0).await;
    two.crash().await;
    one.close().await;
}
