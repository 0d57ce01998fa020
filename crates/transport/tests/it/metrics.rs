//! The values of the metrics, and the documentation of their names.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use metrics::{
    Counter, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit,
    with_local_recorder,
};
use parking_lot::Mutex;
use qpq_transport::client::ConnectError;

use crate::support::{Harness, Report, config, frame, method, within};

/// Stores every counter and gauge by name and label.
#[derive(Default)]
pub(crate) struct TestRecorder {
    values: Mutex<BTreeMap<String, Arc<AtomicU64>>>,
}

impl TestRecorder {
    fn value(&self, key: &Key) -> Arc<AtomicU64> {
        let labels: Vec<_> =
            key.labels().map(|label| format!("{}={}", label.key(), label.value())).collect();
        let name = [key.name().to_owned(), labels.join(",")].join(" ").trim().to_owned();
        Arc::clone(self.values.lock().entry(name).or_default())
    }

    pub(crate) fn count(&self, name: &str) -> u64 {
        self.values.lock()[name].load(Ordering::SeqCst)
    }

    pub(crate) fn gauge(&self, name: &str) -> f64 {
        f64::from_bits(self.count(name))
    }
}

impl Recorder for TestRecorder {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        Counter::from_arc(self.value(key))
    }

    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::from_arc(self.value(key))
    }

    fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
        panic!("{key} is not expected")
    }
}

#[tokio::test]
async fn connections_and_calls_are_counted_by_outcome() {
    let recorder = TestRecorder::default();
    let mut config = config();
    config.limits.max_connections = 1;
    let mut harness = with_local_recorder(&recorder, || Harness::with(config));
    let raw = harness.raw().await;
    let refused = within(harness.dialer().connect(harness.addr(), "localhost")).await;
    assert!(matches!(refused, Err(ConnectError::Refused)));
    assert_eq!(recorder.count("qpq_transport_connections_accepted_total"), 1);
    assert_eq!(recorder.count("qpq_transport_connections_refused_total reason=connections"), 1);
    assert_eq!(recorder.gauge("qpq_transport_connections_open"), 1.0);
    assert_eq!(recorder.gauge("qpq_transport_handshakes"), 0.0);

    raw.exchange(&frame(method::PANIC, 1, b"")).await;
    raw.exchange(&frame(method::ECHO, 2, b"")[..3]).await;
    let (_send, mut recv) = raw.ask(&frame(method::PARK, 3, b"")).await;
    harness.wait_for(Report::Started(3)).await;
    recv.stop(0u32.into()).unwrap();
    harness.wait_for(Report::Cancelled(3)).await;
    raw.exchange(&frame(method::BULK, 4, &10u32.to_be_bytes())).await;
    harness.wait_for(Report::Delivered(4)).await;
    let (_send, mut recv) = raw.ask(&frame(method::BULK, 5, &4_000_000u32.to_be_bytes())).await;
    within(recv.read_chunk(10, true)).await.unwrap();
    raw.quic.close(0u32.into(), b"");
    harness.wait_for(Report::Lost(5)).await;
    within(harness.server.drain(Duration::from_secs(60))).await;
    for (name, count) in [
        ("qpq_transport_calls_panicked_total", 1),
        ("qpq_transport_requests_refused_total why=internal", 1),
        ("qpq_transport_requests_refused_total why=malformed", 1),
        ("qpq_transport_requests_refused_total why=timeout", 0),
        ("qpq_transport_calls_cancelled_total", 1),
        ("qpq_transport_replies_delivered_total", 1),
        ("qpq_transport_replies_lost_total", 1),
    ] {
        assert_eq!(recorder.count(name), count, "{name}");
    }
    assert_eq!(recorder.gauge("qpq_transport_streams_open"), 0.0);
    assert!(recorder.gauge("qpq_tls_cert_not_after_seconds") > 60e9);
}

#[tokio::test]
async fn the_documented_names_are_the_registered_ones() {
    let recorder = TestRecorder::default();
    let _harness = with_local_recorder(&recorder, Harness::start);
    let documented: BTreeMap<_, _> = include_str!("../../src/metric.rs")
        .lines()
        .filter_map(|line| line.strip_prefix("//! | `")?.split_once('`'))
        .map(|(name, rest)| (name.split('{').next().unwrap().to_owned(), rest))
        .collect();
    let registered = recorder.values.lock().clone();
    for name in registered.keys() {
        let (name, label) = name.split_once(' ').unwrap_or((name, ""));
        let row = documented.get(name).unwrap_or_else(|| panic!("{name} is not documented"));
        if let Some((_, value)) = label.split_once('=') {
            assert!(row.contains(&format!("`{value}`")), "{name}: {value} is not documented");
        }
    }
    let missing: Vec<_> = documented
        .keys()
        .filter(|name| !registered.keys().any(|key| key.starts_with(*name)))
        .collect();
    assert!(missing.is_empty(), "{missing:?}");
}
