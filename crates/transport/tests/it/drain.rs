//! The end of a server: drain, abort and drop.

use std::time::Duration;

use futures_util::future::join_all;
use qpq_transport::client::{CallError, ConnectError, Lost};

use crate::{
    relay::Relay,
    support::{Harness, Report, method, status, within},
};

const HOUR: Duration = Duration::from_secs(3600);

fn shut_down() -> Lost {
    Lost::Closed { code: 0, reason: "server shutting down".to_owned() }
}

#[tokio::test]
async fn a_drain_refuses_new_connections_and_finishes_calls_in_flight() {
    let mut harness = Harness::start();
    let connection = harness.connect().await;
    let call = connection.call(method::GATE, "old".into(), 1, HOUR);
    let story = async {
        harness.wait_for(Report::Started(1)).await;
        let (dialer, addr) = (harness.dialer(), harness.addr());
        let Harness { server, probe, reports, .. } = &mut harness;
        let meanwhile = async {
            // The service is notified after the drain token is cancelled.
            within(async { while reports.recv().await != Some(Report::Draining) {} }).await;
            let refused = within(dialer.connect(addr, "localhost")).await;
            assert!(matches!(refused, Err(ConnectError::Refused)), "{refused:?}");
            // An open connection is still served.
            let echo = connection.call(method::ECHO, "new".into(), 2, HOUR);
            assert_eq!(within(echo).await, Ok((status::OK, "new".into())));
            assert_eq!(connection.lost(), None);
            probe.gate.add_permits(1);
        };
        tokio::join!(within(server.drain(HOUR)), meanwhile);
        within(server.run()).await;
    };
    let (answer, ()) = tokio::join!(within(call), story);
    assert_eq!(answer, Ok((status::OK, "old".into())));
    assert_eq!(within(connection.closed()).await, shut_down());
}

#[tokio::test]
async fn calls_in_flight_after_the_deadline_are_dropped() {
    let mut harness = Harness::start();
    let connection = harness.connect().await;
    let call = connection.call(method::PARK, "".into(), 1, HOUR);
    let story = async {
        harness.wait_for(Report::Started(1)).await;
        within(harness.server.drain(Duration::from_millis(100))).await;
        harness.wait_for(Report::Cancelled(1)).await;
    };
    let (answer, ()) = tokio::join!(within(call), story);
    assert_eq!(answer, Err(CallError::Lost(shut_down())));
}

#[tokio::test]
async fn a_second_drain_closes_immediately() {
    let mut harness = Harness::start();
    let connection = harness.connect().await;
    let call = connection.call(method::PARK, "".into(), 1, HOUR);
    let story = async {
        harness.wait_for(Report::Started(1)).await;
        let server = &harness.server;
        tokio::join!(within(server.drain(HOUR)), within(server.drain(HOUR)));
    };
    let (answer, ()) = tokio::join!(within(call), story);
    assert_eq!(answer, Err(CallError::Lost(shut_down())));
}

#[tokio::test]
async fn answers_written_before_the_close_arrive_completely() {
    let mut harness = Harness::start();
    let connection = harness.connect().await;
    let payload = bytes::Bytes::from(vec![1; 20_000]);
    let calls =
        join_all((0..64).map(|id| connection.call(method::GATE, payload.clone(), id, HOUR)));
    let story = async {
        let mut started = 0;
        while started < 64 {
            started += usize::from(matches!(harness.next_report().await, Report::Started(_)));
        }
        // When the drain begins, half of the answers have been sent.
        harness.probe.gate.add_permits(32);
        tokio::task::yield_now().await;
        harness.probe.gate.add_permits(32);
        within(harness.server.drain(HOUR)).await;
    };
    let (answers, ()) = tokio::join!(within(calls), story);
    for answer in answers {
        assert_eq!(answer, Ok((status::OK, payload.clone())));
    }
}

#[tokio::test]
async fn a_drain_waits_until_answers_are_acknowledged() {
    let mut harness = Harness::start();
    let mut relay = Relay::to(harness.addr()).await;
    let connection = within(harness.dialer().connect(relay.addr, "localhost")).await.unwrap();
    let call = connection.call(method::GATE, "late".into(), 1, HOUR);
    let story = async {
        harness.wait_for(Report::Started(1)).await;
        let Harness { server, probe, reports, .. } = &mut harness;
        let meanwhile = async {
            within(async { while reports.recv().await != Some(Report::Draining) {} }).await;
            relay.set_down(false);
            relay.forget_down();
            probe.gate.add_permits(1);
            // The answer is lost 10 times. Each time the server waits twice as long.
            for _ in 0..10 {
                relay.next_down().await;
            }
            relay.set_down(true);
        };
        tokio::join!(within(server.drain(HOUR)), meanwhile);
    };
    let (answer, ()) = tokio::join!(within(call), story);
    assert_eq!(answer, Ok((status::OK, "late".into())));
}

#[tokio::test]
async fn observers_are_notified_before_the_drain_ends() {
    let mut harness = Harness::start();
    let raw = harness.raw().await;
    let frame = crate::support::frame(method::BULK, 1, &4_000_000u32.to_be_bytes());
    let (_send, mut recv) = raw.ask(&frame).await;
    within(recv.read_chunk(10, true)).await.unwrap();
    // The client stops reading, so the reply is never acknowledged.
    within(harness.server.drain(Duration::from_millis(100))).await;
    assert!(harness.reported().contains(&Report::Lost(1)));
}

#[tokio::test]
async fn a_dropped_server_notifies_its_clients() {
    let mut harness = Harness::start();
    let connection = harness.connect().await;
    // The server's side of the handshake ends later than the client's.
    let connected = harness.next_report().await;
    assert!(matches!(connected, Report::Connected(_)), "{connected:?}");
    drop(harness);
    assert_eq!(within(connection.closed()).await, shut_down());
}
