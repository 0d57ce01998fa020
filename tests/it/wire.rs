//! The wire format, frame by frame against the real server, as a client in any language uses it.

use bytes::Bytes;
use prost::Message as _;
use qpq_proto::{METHODS, Status, v1};

use crate::server;

fn code(payload: Bytes) -> String {
    v1::ErrorDetail::decode(payload).expect("a refusal has an ErrorDetail").code
}

#[tokio::test]
async fn health_needs_no_session_and_returns_the_servers_key() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let running = server::start(&dir.path().join("data")).await;
    let client = running.connect().await;
    let response = client.exchange(802, Bytes::new()).await.expect("an answer");
    assert_eq!(response.status, Status::Ok.code());
    let health = v1::HealthResponse::decode(response.payload).expect("a Health");
    assert_eq!(health.status, "ok");
    assert_eq!(health.server_key.len(), 32);
}

#[tokio::test]
async fn every_method_answers_as_the_method_table_declares() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let running = server::start(&dir.path().join("data")).await;
    let client = running.connect().await;
    for method in METHODS {
        let response = client.exchange(method.id, Bytes::new()).await.expect("an answer");
        let status = Status::from(response.status);
        let expected = match (method.served, method.auth) {
            (false, _) => Status::UnknownMethod,
            (true, qpq_proto::AuthKind::Anonymous) if method.id == 802 => Status::Ok,
            (true, qpq_proto::AuthKind::Anonymous) => Status::BadRequest,
            (true, _) => Status::Unauthorized,
        };
        assert_eq!(status, expected, "{} {}", method.id, method.name);
        if status != Status::Ok {
            assert!(!code(response.payload).is_empty(), "{} has a code", method.name);
        }
    }
    for unknown in [0, 1, 99, 106, 207, 65_535] {
        let response = client.exchange(unknown, Bytes::new()).await.expect("an answer");
        assert_eq!(Status::from(response.status), Status::UnknownMethod, "{unknown}");
    }
}

#[tokio::test]
async fn random_payloads_never_harm_the_server() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let running = server::start(&dir.path().join("data")).await;
    let client = running.connect().await;
    for method in METHODS.iter().filter(|m| m.served) {
        for length in [1, 7, 64, 1_000, 100_000] {
            let payload: Vec<u8> = (0..length).map(|_| rand::random()).collect();
            let response = client.exchange(method.id, payload.into()).await.expect("an answer");
            assert_ne!(
                Status::from(response.status),
                Status::Internal,
                "{} with {length} bytes",
                method.name
            );
        }
    }
    let response = client.exchange(802, Bytes::new()).await.expect("an answer afterwards");
    assert_eq!(response.status, 0);
}
