//! The stop of the server: calls in progress end, and connections are closed with a reason.

use nix::sys::signal::Signal;
use qpq_transport::client::Lost;

use crate::harness::{Data, health};

#[tokio::test]
async fn a_sigterm_closes_connections_with_a_reason_and_ends_with_zero() {
    let data = Data::new();
    let server = data.start().await;
    let connection = server.connect().await;
    health(&connection).await;
    server.signal(Signal::SIGTERM);
    let lost = connection.closed().await;
    assert_eq!(lost, Lost::Closed { code: 0, reason: "server shutting down".into() });
    let (code, log) = server.ended().await;
    assert_eq!(code, Some(0), "{log}");
    let step = |text| log.find(text).unwrap_or_else(|| panic!("no {text:?} in {log}"));
    let steps =
        ["serving", "SIGTERM", "draining: ", "drained: ", "closing the store", "stopped"].map(step);
    assert!(steps.is_sorted(), "{log}");
}

#[tokio::test]
async fn a_sigint_drains_and_ends_with_zero() {
    let data = Data::new();
    let server = data.start().await;
    server.signal(Signal::SIGINT);
    let (code, log) = server.ended().await;
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("drained: ") && log.contains("stopped"), "{log}");
}

#[tokio::test]
async fn a_stopped_server_can_be_started_again() {
    let data = Data::new();
    let first = data.start().await;
    let fingerprint = first.fingerprint;
    first.signal(Signal::SIGTERM);
    assert_eq!(first.ended().await.0, Some(0));
    assert!(!data.file("qpq.db-wal").exists(), "the log was written back");
    assert_eq!(data.start().await.fingerprint, fingerprint);
}
