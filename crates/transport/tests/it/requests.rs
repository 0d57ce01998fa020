//! The memory for requests: unfinished requests of one client are bounded, others are served.

use std::time::Duration;

use metrics::with_local_recorder;
use qpq_transport::Config;
use qpq_wire::{MAX_PAYLOAD, RequestHeader, Response};
use quinn::{RecvStream, SendStream};

use crate::{
    metrics::TestRecorder,
    support::{Harness, Raw, Report, answer, config, frame, method, status, within},
};

const MIB: usize = 1 << 20;

/// Returns a configuration with 8 MiB for an address, of which a connection may use 4 MiB.
fn limited() -> Config {
    let mut config = config();
    config.limits.max_request_bytes_per_ip = 8 * MIB;
    config.limits.max_request_bytes_per_connection = 4 * MIB;
    config
}

/// Sends half of a request of 2 MiB, which occupies 1 to 2 MiB. `None` if the server stops it.
async fn send_half(raw: &Raw, request_id: u32) -> (Option<SendStream>, RecvStream) {
    let (mut send, recv) = within(raw.quic.open_bi()).await.unwrap();
    let header = RequestHeader { method_id: method::ECHO, request_id, payload_len: 2 << 20 };
    let sent = async {
        send.write_all(&header.encode()).await?;
        send.write_all(&vec![7; MIB]).await
    };
    let sent = within(sent).await;
    (sent.is_ok().then_some(send), recv)
}

fn refused(request_id: u32) -> Response {
    let payload = format!("ClientMemory Some({})", method::ECHO).into();
    Response { status: status::REFUSED, request_id, payload }
}

#[tokio::test]
async fn unfinished_requests_of_a_connection_are_bounded_and_small_ones_answered() {
    let recorder = TestRecorder::default();
    let harness = with_local_recorder(&recorder, || Harness::with(limited()));
    let used = || recorder.gauge("qpq_transport_request_bytes");
    let greedy = harness.raw().await;
    let (mut unfinished, mut refusals) = (Vec::new(), 0);
    for id in 0..16 {
        let (send, recv) = send_half(&greedy, id).await;
        // The server may refuse after the last of these bytes was sent. So the test counts refusals
        // by the metric.
        let small = greedy.exchange(&frame(method::ECHO, 100, b"small")).await;
        assert_eq!(&small.payload[..], b"small");
        assert!(used() <= (4 * MIB) as f64, "{}", used());
        match send {
            Some(send) => unfinished.push((id, send, recv)),
            None => {
                assert_eq!(answer(recv).await, refused(id));
                refusals += 1;
            }
        }
    }
    assert!(refusals + unfinished.len() == 16 && unfinished.len() < 16);
    let refusals = recorder.count("qpq_transport_requests_refused_total why=client_memory");
    assert!(refusals >= 12, "{refusals}");

    // Another connection from the same address has its own memory.
    let other = harness.connect().await;
    let payload = vec![7; MAX_PAYLOAD as usize];
    let call = other.call(method::ECHO, payload.clone().into(), 1, Duration::from_secs(60));
    assert_eq!(within(call).await.unwrap().0, status::OK);

    // The memory is free once the requests are reset.
    for (_, send, _) in &mut unfinished {
        let _ = send.reset(0u32.into());
    }
    within(async {
        while used() > 0.0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    assert_eq!(greedy.exchange(&frame(method::ECHO, 2, &payload)).await.status, status::OK);
}

#[tokio::test]
async fn requests_of_many_connections_of_one_address_are_bounded() {
    let recorder = TestRecorder::default();
    let harness = with_local_recorder(&recorder, || Harness::with(limited()));
    let mut connections = Vec::new();
    for id in 0..12 {
        let raw = harness.raw().await;
        let streams = [send_half(&raw, id).await, send_half(&raw, 100 + id).await];
        connections.push((raw, streams));
        let used = recorder.gauge("qpq_transport_request_bytes");
        assert!(used <= (8 * MIB) as f64, "{used}");
    }
    let (raw, _) = connections.last().expect("twelve");
    assert_eq!(raw.exchange(&frame(method::ECHO, 1, b"small")).await.status, status::OK);
    let refusals = recorder.count("qpq_transport_requests_refused_total why=client_memory");
    assert!(refusals >= 12, "{refusals}");
}

#[tokio::test]
async fn a_request_occupies_its_memory_until_its_call_has_ended() {
    let recorder = TestRecorder::default();
    let mut harness = with_local_recorder(&recorder, || Harness::with(limited()));
    let raw = harness.raw().await;
    let (_send, running) = raw.ask(&frame(method::GATE, 1, &vec![7; 3 * MIB])).await;
    harness.wait_for(Report::Started(1)).await;
    assert_eq!(recorder.gauge("qpq_transport_request_bytes"), (3 * MIB) as f64);
    harness.probe.gate.add_permits(1);
    assert_eq!(answer(running).await.status, status::OK);
    assert_eq!(raw.exchange(&frame(method::ECHO, 2, &vec![7; 4 * MIB])).await.status, status::OK);
}
