//! Frames: the layout of requests, and the answers to malformed, incomplete and late ones.

use std::time::Duration;

use qpq_transport::Config;
use qpq_wire::{MAX_PAYLOAD, RequestHeader, Response};

use crate::support::{Harness, Report, answer, config, frame, method, status, within};

fn refused(request_id: u32, why: &str) -> Response {
    Response { status: status::REFUSED, request_id, payload: why.to_owned().into() }
}

fn short_timeout() -> Config {
    let mut config = config();
    config.timeouts.request = Duration::from_millis(300);
    config
}

#[tokio::test]
async fn a_request_and_its_answer_have_the_documented_layout() {
    let harness = Harness::start();
    let raw = harness.raw().await;
    let (_, mut recv) = raw.ask(&[0, 1, 0, 0, 0, 42, 0, 0, 0, 2, b'h', b'i']).await;
    let bytes = within(recv.read_to_end(100)).await.unwrap();
    assert_eq!(bytes, [0, 0, 0, 0, 42, 0, 0, 0, 2, b'h', b'i']);
    let empty = raw.exchange(&frame(method::ECHO, 43, b"")).await;
    assert_eq!(empty, Response { status: status::OK, request_id: 43, payload: "".into() });
}

#[tokio::test]
async fn a_request_may_arrive_in_parts_of_any_size() {
    let harness = Harness::start();
    let raw = harness.raw().await;
    let (mut send, recv) = raw.open(b"").await;
    for byte in frame(method::ECHO, 1, b"piecemeal") {
        within(send.write_all(&[byte])).await.unwrap();
        // The answer on another stream arrives after this byte was sent in a separate packet.
        raw.exchange(&frame(method::ECHO, 2, b"")).await;
    }
    send.finish().unwrap();
    assert_eq!(&answer(recv).await.payload[..], b"piecemeal");
}

#[tokio::test]
async fn the_largest_payload_is_accepted_in_both_directions() {
    let harness = Harness::start();
    let connection = harness.connect().await;
    let payload: Vec<u8> = (0..MAX_PAYLOAD).map(|i| (i % 251) as u8).collect();
    let call = connection.call(method::ECHO, payload.clone().into(), 1, Duration::from_secs(60));
    let (status, echoed) = within(call).await.unwrap();
    assert_eq!(status, status::OK);
    assert!(echoed == payload);
}

#[tokio::test]
async fn a_payload_above_the_maximum_is_refused_before_any_of_it_is_sent() {
    let harness = Harness::start();
    let raw = harness.raw().await;
    let header =
        RequestHeader { method_id: method::ECHO, request_id: 5, payload_len: MAX_PAYLOAD + 1 };
    let (send, recv) = raw.open(&header.encode()).await;
    assert_eq!(answer(recv).await, refused(5, "TooLarge Some(1)"));
    assert_eq!(within(send.stopped()).await, Ok(Some(0u32.into())));
}

#[tokio::test]
async fn an_unknown_method_is_answered_before_its_payload_is_sent() {
    let harness = Harness::start();
    let raw = harness.raw().await;
    let header = RequestHeader { method_id: method::UNKNOWN, request_id: 6, payload_len: 1000 };
    let (send, recv) = raw.open(&header.encode()).await;
    let expected = Response { status: status::UNKNOWN_METHOD, request_id: 6, payload: "".into() };
    assert_eq!(answer(recv).await, expected);
    assert_eq!(within(send.stopped()).await, Ok(Some(0u32.into())));
}

#[tokio::test]
async fn an_unread_payload_does_not_block_the_answer() {
    let harness = Harness::start();
    let connection = harness.connect().await;
    for id in 0..20 {
        let payload = vec![0; MAX_PAYLOAD as usize].into();
        let call = connection.call(method::UNKNOWN, payload, id, Duration::from_secs(60));
        assert_eq!(within(call).await, Ok((status::UNKNOWN_METHOD, "".into())));
    }
}

#[tokio::test]
async fn a_stream_that_ends_inside_the_frame_is_malformed() {
    let mut harness = Harness::start();
    let raw = harness.raw().await;
    let whole = frame(method::ECHO, 7, b"payload");
    for len in 0..whole.len() {
        let expected = if len < RequestHeader::LEN {
            refused(0, "Malformed None")
        } else {
            refused(7, "Malformed Some(1)")
        };
        assert_eq!(raw.exchange(&whole[..len]).await, expected, "{len} bytes");
    }
    let reports = harness.reported();
    assert!(!reports.contains(&Report::Started(7)), "{reports:?}");
}

#[tokio::test]
async fn bytes_after_the_frame_are_malformed() {
    let mut harness = Harness::start();
    let raw = harness.raw().await;
    let mut bytes = frame(method::ECHO, 8, b"payload");
    bytes.push(0);
    assert_eq!(raw.exchange(&bytes).await, refused(8, "Malformed Some(1)"));
    // The refusal does not wait for the end of the stream.
    let (send, recv) = raw.open(&bytes).await;
    assert_eq!(answer(recv).await, refused(8, "Malformed Some(1)"));
    assert_eq!(within(send.stopped()).await, Ok(Some(0u32.into())));
    let reports = harness.reported();
    assert!(!reports.contains(&Report::Started(8)), "{reports:?}");
}

#[tokio::test]
async fn a_request_that_does_not_end_in_time_is_stopped() {
    let harness = Harness::with(short_timeout());
    let raw = harness.raw().await;
    let whole = frame(method::ECHO, 9, b"payload");
    for (len, expected) in [
        (1, refused(0, "Timeout None")),
        (RequestHeader::LEN + 3, refused(9, "Timeout Some(1)")),
        // The complete frame without the end of the stream.
        (whole.len(), refused(9, "Timeout Some(1)")),
    ] {
        let (send, recv) = raw.open(&whole[..len]).await;
        assert_eq!(answer(recv).await, expected, "{len} bytes");
        assert_eq!(within(send.stopped()).await, Ok(Some(0u32.into())));
    }
}

#[tokio::test]
async fn the_time_limit_of_a_request_starts_with_its_first_byte() {
    let harness = Harness::with(short_timeout());
    let raw = harness.raw().await;
    let (mut early, early_answer) = within(raw.quic.open_bi()).await.unwrap();
    // A byte on the later stream opens the earlier one too. The time limit passes on the later one.
    let (_late, late_answer) = raw.open(&[0]).await;
    assert_eq!(answer(late_answer).await, refused(0, "Timeout None"));
    early.write_all(&frame(method::ECHO, 10, b"in time")).await.unwrap();
    early.finish().unwrap();
    assert_eq!(&answer(early_answer).await.payload[..], b"in time");
}

#[tokio::test]
async fn a_reset_request_never_runs() {
    let mut harness = Harness::start();
    let raw = harness.raw().await;
    let (mut send, mut recv) = raw.open(&frame(method::ECHO, 11, b"")).await;
    // When this call is answered, the bytes above have arrived, because packets are processed in
    // order.
    raw.exchange(&frame(method::ECHO, 12, b"")).await;
    send.reset(0u32.into()).unwrap();
    let ended = within(recv.read_to_end(100)).await;
    assert!(
        matches!(ended, Err(quinn::ReadToEndError::Read(quinn::ReadError::Reset(_)))),
        "the stream is reset: {ended:?}"
    );
    assert!(!harness.reported().contains(&Report::Started(11)));
}
