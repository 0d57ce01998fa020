//! Calls: concurrency, cancellation and panics.

use std::time::Duration;

use futures_util::{StreamExt, stream::FuturesUnordered};
use qpq_wire::Response;
use quinn::VarInt;

use crate::support::{Harness, Raw, Report, answer, config, frame, method, status, within};

#[tokio::test]
async fn calls_on_a_connection_do_not_wait_for_each_other() {
    let mut harness = Harness::start();
    let raw = harness.raw().await;
    let mut parked = Vec::new();
    for id in 0..63 {
        parked.push(raw.ask(&frame(method::GATE, id, b"parked")).await);
        harness.wait_for(Report::Started(id)).await;
    }
    assert_eq!(raw.exchange(&frame(method::ECHO, 100, b"fast")).await.request_id, 100);
    harness.probe.gate.add_permits(63);
    for (id, (_, recv)) in (0..).zip(parked).collect::<Vec<_>>().into_iter().rev() {
        assert_eq!(answer(recv).await.request_id, id);
    }
}

#[tokio::test]
async fn calls_above_the_limit_wait_and_are_then_served() {
    let mut config = config();
    config.limits.max_streams = 4;
    let mut harness = Harness::with(config);
    let connection = harness.connect().await;
    let minute = Duration::from_secs(60);
    let mut calls: FuturesUnordered<_> =
        (0..40).map(|id| connection.call(method::GATE, "x".into(), id, minute)).collect();
    for round in 0..40 {
        // Exactly the permitted number of calls runs.
        while harness.probe.gate.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        harness.probe.gate.add_permits(1);
        let answered = within(calls.next()).await.unwrap();
        assert_eq!(answered, Ok((status::OK, "x".into())), "round {round}");
        let started = harness.reported().iter().filter(|r| matches!(r, Report::Started(_))).count();
        assert!(started <= 5, "{started}");
    }
}

#[tokio::test]
async fn stopping_the_answer_drops_the_call() {
    let mut harness = Harness::start();
    let raw = harness.raw().await;
    let (_send, mut recv) = raw.ask(&frame(method::PARK, 1, b"")).await;
    harness.wait_for(Report::Started(1)).await;
    recv.stop(VarInt::from_u32(0)).unwrap();
    harness.wait_for(Report::Cancelled(1)).await;
    assert_eq!(raw.exchange(&frame(method::ECHO, 2, b"")).await.request_id, 2);
}

#[tokio::test]
async fn the_end_of_a_connection_drops_its_calls() {
    let mut harness = Harness::start();
    let raw = harness.raw().await;
    let _streams =
        [raw.ask(&frame(method::PARK, 1, b"")).await, raw.ask(&frame(method::PARK, 2, b"")).await];
    let (mut one, mut two) = (false, false);
    harness.wait_for(Report::Started(2)).await;
    raw.quic.close(VarInt::from_u32(7), b"enough");
    let mut disconnected = false;
    while !(one && two && disconnected) {
        match harness.next_report().await {
            Report::Cancelled(1) => one = true,
            Report::Cancelled(2) => two = true,
            Report::Disconnected => disconnected = true,
            other => assert_eq!(other, Report::Started(1)),
        }
    }
}

#[tokio::test]
async fn dropping_a_call_of_the_client_drops_it_on_the_server() {
    let mut harness = Harness::start();
    let connection = harness.connect().await;
    let minute = Duration::from_secs(60);
    {
        let call = connection.call(method::PARK, "".into(), 1, minute);
        tokio::pin!(call);
        tokio::select! {
            outcome = &mut call => panic!("{outcome:?}"),
            () = harness.wait_for(Report::Started(1)) => {}
        }
    }
    harness.wait_for(Report::Cancelled(1)).await;
    let echo = connection.call(method::ECHO, "on".into(), 2, minute);
    assert_eq!(within(echo).await, Ok((status::OK, "on".into())));
}

#[tokio::test]
async fn a_panic_is_answered_and_other_calls_continue() {
    let mut harness = Harness::start();
    let raw = harness.raw().await;
    let parked = raw.ask(&frame(method::GATE, 1, b"still here")).await;
    harness.wait_for(Report::Started(1)).await;
    // More panics than streams, so that a leaked stream would stop the test.
    for id in 100..200 {
        let expected = Response {
            status: status::REFUSED,
            request_id: id,
            payload: "Internal Some(6)".into(),
        };
        assert_eq!(raw.exchange(&frame(method::PANIC, id, b"")).await, expected);
    }
    harness.probe.gate.add_permits(1);
    assert_eq!(&answer(parked.1).await.payload[..], b"still here");
}

#[tokio::test]
async fn a_reply_that_does_not_fit_a_frame_is_an_internal_error() {
    let mut harness = Harness::start();
    let raw = harness.raw().await;
    let len = qpq_wire::MAX_PAYLOAD + 1;
    let response = raw.exchange(&frame(method::BULK, 3, &len.to_be_bytes())).await;
    assert_eq!(&response.payload[..], b"Internal Some(5)");
    harness.wait_for(Report::Dropped(3)).await;
}

#[tokio::test]
async fn an_incomplete_answer_is_reset() {
    let mut config = config();
    config.timeouts.stalled_reply = Duration::from_millis(200);
    let mut harness = Harness::with(config);
    let mut transport = quinn::TransportConfig::default();
    transport.stream_receive_window(10_000u32.into());
    let raw = Raw::connect(&harness, harness.addr(), transport).await;
    let bulk = frame(method::BULK, 1, &4_000_000u32.to_be_bytes());
    // One reply with an observer and one without.
    for request in [bulk, frame(method::ECHO, 2, &[7; 2_000_000])] {
        let (_send, mut recv) = raw.ask(&request).await;
        // The client reads nothing until the server resets the stream.
        assert!(matches!(within(recv.received_reset()).await, Ok(Some(_))));
    }
    harness.wait_for(Report::Lost(1)).await;
    assert_eq!(raw.exchange(&frame(method::ECHO, 3, b"")).await.request_id, 3);
}
