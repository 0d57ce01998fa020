//! The client's side: deadlines, events, and servers that violate the protocol.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::StreamExt;
use qpq_transport::client::{CallError, ConnectError, Dialer, Lost, Trust};
use qpq_wire::{EventFrame, FrameError, MAX_PAYLOAD, Response, ResponseHeader};
use quinn::{VarInt, crypto::rustls::QuicServerConfig};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::support::{Harness, Report, config, method, status, within};

const MINUTE: Duration = Duration::from_secs(60);

#[tokio::test]
async fn a_deadline_cancels_the_call() {
    let mut harness = Harness::start();
    let connection = harness.connect().await;
    let call = connection.call(method::PARK, "".into(), 1, Duration::from_millis(200));
    assert_eq!(within(call).await, Err(CallError::TimedOut));
    harness.wait_for(Report::Cancelled(1)).await;
}

#[tokio::test]
async fn a_request_that_does_not_fit_a_frame_is_not_sent() {
    let harness = Harness::start();
    let connection = harness.connect().await;
    let payload = vec![0; MAX_PAYLOAD as usize + 1].into();
    let call = connection.call(method::ECHO, payload, 1, MINUTE);
    let too_large = FrameError::TooLarge { len: u64::from(MAX_PAYLOAD) + 1, max: MAX_PAYLOAD };
    assert_eq!(within(call).await, Err(CallError::TooLarge(too_large)));
}

#[tokio::test]
async fn events_arrive_in_order_on_one_stream() {
    let harness = Harness::start();
    let connection = harness.connect().await;
    let mut events = Box::pin(connection.events());
    for round in 0..3u8 {
        // Several events in a row, and again after the writer has become idle.
        for number in 0..10u8 {
            let call = connection.call(method::EVENT, vec![round, number].into(), 1, MINUTE);
            assert_eq!(within(call).await, Ok((status::OK, Bytes::new())));
        }
        for number in 0..10u8 {
            let event = within(events.next()).await.unwrap();
            assert_eq!(event, Ok((1, vec![round, number].into())));
        }
    }
    let large = Bytes::from(vec![1; 3 << 20]);
    within(connection.call(method::EVENT, large.clone(), 1, MINUTE)).await.unwrap();
    assert_eq!(within(events.next()).await, Some(Ok((1, large))));
}

#[tokio::test]
async fn events_beyond_the_queue_of_a_client_that_reads_none_are_refused() {
    let harness = Harness::start();
    let connection = harness.connect().await;
    let payload = Bytes::from(vec![0; 256 * 1024]);
    let refused = within(async {
        loop {
            let (status, reason) =
                connection.call(method::EVENT, payload.clone(), 1, MINUTE).await.unwrap();
            if status != status::OK {
                return reason;
            }
        }
    });
    assert_eq!(refused.await, "the client does not keep up with its events");
    let echo = connection.call(method::ECHO, "on".into(), 2, MINUTE);
    assert_eq!(within(echo).await, Ok((status::OK, "on".into())));
}

#[tokio::test]
async fn events_end_with_their_connection() {
    let harness = Harness::start();
    let connection = harness.connect().await;
    let mut events = Box::pin(connection.events());
    within(connection.call(method::EVENT, "1".into(), 1, MINUTE)).await.unwrap();
    assert_eq!(within(events.next()).await, Some(Ok((1, "1".into()))));
    within(harness.server.abort()).await;
    let lost = Lost::Closed { code: 0, reason: "server shutting down".to_owned() };
    assert_eq!(within(events.next()).await, Some(Err(CallError::Lost(lost))));
}

#[tokio::test]
async fn an_address_without_a_server_is_a_timeout() {
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let dialer =
        Dialer::new(Trust::FirstUse).unwrap().with_connect_timeout(Duration::from_millis(200));
    let outcome = within(dialer.connect(silent.local_addr().unwrap(), "localhost")).await;
    assert!(matches!(outcome, Err(ConnectError::TimedOut)), "{outcome:?}");
}

#[tokio::test]
async fn an_invalid_server_name_is_an_error() {
    let dialer = Dialer::new(Trust::FirstUse).unwrap();
    let outcome = within(dialer.connect("127.0.0.1:1".parse().unwrap(), "not a name")).await;
    assert!(matches!(outcome, Err(ConnectError::Invalid { .. })), "{outcome:?}");
}

#[tokio::test]
async fn a_call_to_a_silent_server_fails_after_the_idle_timeout() {
    let mut config = config();
    config.timeouts.idle = Duration::from_secs(1);
    let harness = Harness::with(config);
    let relay = crate::relay::Relay::to(harness.addr()).await;
    let connection = within(harness.dialer().connect(relay.addr, "localhost")).await.unwrap();
    relay.set_down(false);
    // Of the idle timeouts of client and server, the shorter one counts.
    let call = connection.call(method::PARK, "".into(), 1, MINUTE);
    assert_eq!(within(call).await, Err(CallError::Lost(Lost::TimedOut)));
}

/// The answer of a server that violates the protocol.
#[derive(Clone)]
enum Violation {
    Answer(Vec<u8>),
    Reset(Vec<u8>),
    Close,
    Events(Vec<u8>),
}

/// Starts a bare QUIC server. Returns the outcome of a call to it and the error of its events.
async fn call_to(violation: Violation) -> (Result<(u8, Bytes), CallError>, Option<CallError>) {
    let pair = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let key = PrivateKeyDer::try_from(pair.signing_key.serialize_der()).unwrap();
    let chain = vec![CertificateDer::from(pair.cert.der().to_vec())];
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    tls.alpn_protocols = vec![b"qpq".to_vec()];
    let crypto = QuicServerConfig::try_from(tls).unwrap();
    let server = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    let endpoint = quinn::Endpoint::server(server, "127.0.0.1:0".parse().unwrap()).unwrap();
    let addr = endpoint.local_addr().unwrap();
    let serving = tokio::spawn(async move {
        let connection = endpoint.accept().await.unwrap().await.unwrap();
        let (mut send, mut recv) = connection.accept_bi().await.unwrap();
        recv.read_to_end(1000).await.unwrap();
        match violation {
            Violation::Answer(bytes) => {
                send.write_all(&bytes).await.unwrap();
                send.finish().unwrap();
            }
            Violation::Reset(bytes) => {
                send.write_all(&bytes).await.unwrap();
                send.reset(VarInt::from_u32(9)).unwrap();
            }
            Violation::Close => connection.close(VarInt::from_u32(17), b"busy"),
            Violation::Events(bytes) => {
                let mut events = connection.open_uni().await.unwrap();
                events.write_all(&bytes).await.unwrap();
                events.finish().unwrap();
                send.write_all(&ok(1, "")).await.unwrap();
                send.finish().unwrap();
            }
        }
        connection.closed().await;
    });
    let dialer = Dialer::new(Trust::FirstUse).unwrap();
    let connection = within(dialer.connect(addr, "localhost")).await.unwrap();
    let outcome = within(connection.call(1, "hi".into(), 1, MINUTE)).await;
    let events = match outcome {
        Ok(_) => {
            within(connection.events().filter_map(|event| async { event.err() }).boxed().next())
                .await
        }
        Err(_) => None,
    };
    within(connection.close()).await;
    within(serving).await.unwrap();
    (outcome, events)
}

fn ok(request_id: u32, payload: &'static str) -> Vec<u8> {
    Response { status: 0, request_id, payload: payload.into() }.encode().unwrap().to_vec()
}

#[tokio::test]
async fn each_malformed_answer_has_its_own_error() {
    let mut trailing = ok(1, "yes");
    trailing.push(0);
    let too_long =
        ResponseHeader { status: 0, request_id: 1, payload_len: u32::MAX }.encode().to_vec();
    let too_large = FrameError::TooLarge { len: u64::from(u32::MAX), max: MAX_PAYLOAD };
    for (violation, expected) in [
        (Violation::Answer(ok(2, "yes")), CallError::Malformed("it belongs to another request")),
        (
            Violation::Answer(ok(1, "yes")[..11].to_vec()),
            CallError::Malformed("it ends inside the frame"),
        ),
        (
            Violation::Answer(ok(1, "yes")[..5].to_vec()),
            CallError::Malformed("it ends inside the header"),
        ),
        (Violation::Answer(Vec::new()), CallError::Malformed("it ends inside the header")),
        (Violation::Answer(trailing), CallError::Malformed("bytes follow the frame")),
        (Violation::Answer(too_long), CallError::TooLarge(too_large)),
        (Violation::Reset(ok(1, "yes")[..11].to_vec()), CallError::Reset(9)),
        (Violation::Close, CallError::Lost(Lost::Closed { code: 17, reason: "busy".to_owned() })),
    ] {
        assert_eq!(call_to(violation).await, (Err(expected), None));
    }
}

#[tokio::test]
async fn malformed_events_are_errors() {
    let event = EventFrame { event_type: 1, payload: "wake".into() }.encode().unwrap();
    let (outcome, error) = call_to(Violation::Events(event[..8].to_vec())).await;
    assert_eq!(outcome, Ok((0, Bytes::new())));
    assert_eq!(error, Some(CallError::Malformed("the events end inside a frame")));
    let (_, error) = call_to(Violation::Events(vec![0xff; 6])).await;
    assert!(matches!(error, Some(CallError::TooLarge(_))), "{error:?}");
}
