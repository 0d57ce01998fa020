//! The delivery of replies: delivered when acknowledged, else lost.

use std::time::Duration;

use quinn::VarInt;

use crate::{
    relay::Relay,
    support::{Harness, Raw, Report, answer, config, frame, method, within},
};

#[tokio::test]
async fn a_reply_counts_as_delivered_only_after_its_acknowledgement() {
    let mut harness = Harness::start();
    let mut relay = Relay::to(harness.addr()).await;
    let raw = Raw::connect(&harness, relay.addr, quinn::TransportConfig::default()).await;
    let (_send, recv) = raw.ask(&frame(method::OBSERVED, 1, b"kept")).await;
    harness.wait_for(Report::Started(1)).await;
    relay.set_up(false);
    relay.forget_down();
    harness.probe.gate.add_permits(1);
    // The client has the whole answer, but its acknowledgement is lost.
    assert_eq!(&answer(recv).await.payload[..], b"kept");
    // Without an acknowledgement the server sends the answer again.
    relay.forget_down();
    relay.next_down().await;
    assert_eq!(harness.reported(), []);
    relay.set_up(true);
    harness.wait_for(Report::Delivered(1)).await;
}

#[tokio::test]
async fn a_reply_to_a_silent_client_is_lost_long_before_its_connection() {
    let mut config = config();
    config.timeouts.silent_peer = Duration::from_millis(400);
    let mut harness = Harness::with(config);
    let relay = Relay::to(harness.addr()).await;
    let raw = Raw::connect(&harness, relay.addr, quinn::TransportConfig::default()).await;
    let (_send, mut recv) = raw.ask(&frame(method::OBSERVED, 1, b"lost")).await;
    harness.wait_for(Report::Started(1)).await;
    relay.set_up(false);
    relay.set_down(false);
    harness.probe.gate.add_permits(1);
    harness.wait_for(Report::Lost(1)).await;
    // A lost reply is not sent when the client is back.
    relay.set_up(true);
    relay.set_down(true);
    let ended = within(recv.read_to_end(100)).await;
    assert!(
        matches!(ended, Err(quinn::ReadToEndError::Read(quinn::ReadError::Reset(_)))),
        "{ended:?}"
    );
    assert_eq!(raw.exchange(&frame(method::ECHO, 2, b"")).await.request_id, 2);
}

#[tokio::test]
async fn a_slow_client_that_sends_datagrams_is_not_silent() {
    let mut config = config();
    config.timeouts.silent_peer = Duration::from_millis(400);
    let mut harness = Harness::with(config);
    let mut transport = quinn::TransportConfig::default();
    transport.keep_alive_interval(Some(Duration::from_millis(20)));
    transport.stream_receive_window(10_000u32.into());
    let raw = Raw::connect(&harness, harness.addr(), transport).await;
    let (_send, mut recv) = raw.ask(&frame(method::BULK, 1, &300_000u32.to_be_bytes())).await;
    harness.wait_for(Report::Started(1)).await;
    // The client reads nothing for several times the limit, until the deadline of another call.
    let connection = harness.connect().await;
    let parked = connection.call(method::PARK, "".into(), 2, Duration::from_secs(2));
    within(parked).await.unwrap_err();
    assert!(!harness.reported().contains(&Report::Lost(1)));
    within(recv.read_to_end(1 << 20)).await.unwrap();
    harness.wait_for(Report::Delivered(1)).await;
}

#[tokio::test]
async fn a_reply_that_the_client_stops_is_lost() {
    let mut harness = Harness::start();
    let raw = harness.raw().await;
    let (_send, mut recv) = raw.ask(&frame(method::BULK, 1, &4_000_000u32.to_be_bytes())).await;
    within(recv.read_chunk(10, true)).await.unwrap();
    recv.stop(VarInt::from_u32(0)).unwrap();
    harness.wait_for(Report::Lost(1)).await;
}

#[tokio::test]
async fn a_reply_is_lost_with_its_connection() {
    let mut harness = Harness::start();
    let raw = harness.raw().await;
    let (_send, mut recv) = raw.ask(&frame(method::BULK, 1, &4_000_000u32.to_be_bytes())).await;
    within(recv.read_chunk(10, true)).await.unwrap();
    raw.quic.close(VarInt::from_u32(0), b"");
    harness.wait_for(Report::Lost(1)).await;
}

#[tokio::test]
async fn a_cancelled_call_notifies_no_observer() {
    let mut harness = Harness::start();
    let raw = harness.raw().await;
    let (_send, mut recv) = raw.ask(&frame(method::OBSERVED, 1, b"")).await;
    harness.wait_for(Report::Started(1)).await;
    recv.stop(VarInt::from_u32(0)).unwrap();
    // The drop of the call releases its resources.
    harness.wait_for(Report::Cancelled(1)).await;
    harness.probe.gate.add_permits(1);
    raw.exchange(&frame(method::ECHO, 2, b"")).await;
    assert_eq!(harness.reported(), [Report::Started(2)]);
}

/// Each read is progress, so only the time limit of the whole reply applies.
#[tokio::test]
async fn a_client_that_reads_too_slowly_loses_only_that_answer() {
    let mut config = config();
    config.timeouts.stalled_reply = Duration::from_millis(400);
    config.limits.min_reply_rate = 16 << 20;
    let mut harness = Harness::with(config);
    let raw = harness.raw().await;
    let (_send, mut recv) = raw.ask(&frame(method::BULK, 1, &4_000_000u32.to_be_bytes())).await;
    let reset = loop {
        // An exchange between two reads: the client is slow, but not silent.
        raw.exchange(&frame(method::ECHO, 2, b"")).await;
        if let Err(error) = within(recv.read_chunk(64, true)).await {
            break error;
        }
    };
    assert!(matches!(reset, quinn::ReadError::Reset(_)), "{reset:?}");
    harness.wait_for(Report::Lost(1)).await;
    let (_send, recv) = raw.ask(&frame(method::BULK, 3, &100_000u32.to_be_bytes())).await;
    assert_eq!(answer(recv).await.payload.len(), 100_000);
    harness.wait_for(Report::Delivered(3)).await;
}

#[tokio::test]
async fn a_client_that_acknowledges_neither_an_answer_nor_its_reset_loses_its_connection() {
    let mut config = config();
    config.timeouts.silent_peer = Duration::from_millis(400);
    config.timeouts.idle = Duration::from_secs(3_600);
    let mut harness = Harness::with(config);
    let relay = Relay::to(harness.addr()).await;
    let raw = Raw::connect(&harness, relay.addr, quinn::TransportConfig::default()).await;
    let (_send, _recv) = raw.ask(&frame(method::GATE, 1, &[7; 100_000])).await;
    harness.wait_for(Report::Started(1)).await;
    relay.set_up(false);
    harness.probe.gate.add_permits(1);
    harness.wait_for(Report::Disconnected).await;
}
