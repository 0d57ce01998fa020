//! Authentication of the server, and the loss of the connection to it.

use std::time::Duration;

use futures_util::StreamExt as _;
use qpq_client::{
    CallError, Client, ConnectError, ConnectionEvent, Identity, Options, ServerEvent, Trust,
    methods, v1,
};

use crate::{
    harness::{Server, password, soon, username},
    network::Network,
};

#[tokio::test]
async fn the_first_use_shows_the_fingerprint_and_pins_it() {
    let mut server = Server::start().await;
    let client = Client::new(Options::new(server.addr.to_string(), Trust::FirstUse)).unwrap();
    assert_eq!(client.connect().await.unwrap(), server.fingerprint);
    assert_eq!(client.health().await.unwrap().status, "ok");

    // The server has the same address and another certificate. The client that trusted the first
    // does not trust this one.
    server.stop().await;
    std::fs::remove_file(server.certificate()).unwrap();
    std::fs::remove_file(server.certificate().with_file_name("server-key.der")).unwrap();
    server.start_again().await;
    let refused = soon(client.health()).await.unwrap_err();
    let CallError::Connect(ConnectError::PinMismatch { expected, seen }) = refused else {
        panic!("{refused:?}")
    };
    assert_eq!(expected, server.fingerprint);
    assert_ne!(seen, expected);
}

#[tokio::test]
async fn another_pin_is_refused_with_both_fingerprints() {
    let server = Server::start().await;
    let wrong = qpq_client::Fingerprint::from([7; 32]);
    let client = Client::new(Options::new(server.addr.to_string(), Trust::Pinned(wrong))).unwrap();
    let refused = client.health().await.unwrap_err();
    let CallError::Connect(error) = &refused else { panic!("{refused:?}") };
    assert_eq!(*error, ConnectError::PinMismatch { expected: wrong, seen: server.fingerprint });
    assert!(!refused.is_temporary());
}

#[tokio::test]
async fn an_authority_that_did_not_issue_the_certificate_is_refused() {
    let (server, other) = (Server::start().await, Server::start().await);
    let trust = Trust::Authority(other.certificate());
    let client = Client::new(Options::new(server.addr.to_string(), trust)).unwrap();
    let refused = client.health().await.unwrap_err();
    assert!(matches!(refused, CallError::Connect(ConnectError::Untrusted { .. })), "{refused:?}");
}

#[test]
fn unusable_options_are_reported_before_anything_is_sent() {
    for options in [
        Options::new("host:port", Trust::FirstUse),
        Options::new("localhost", Trust::Authority("/nowhere/ca.pem".into())),
    ] {
        let error = Client::new(options).unwrap_err();
        assert!(matches!(error, ConnectError::Misconfigured { .. }), "{error:?}");
    }
}

#[tokio::test]
async fn a_restarted_server_is_found_again_with_the_same_session() {
    let mut server = Server::start().await;
    let client = server.client();
    client.register(&username("alice"), &password(), &Identity::generate(), None).await.unwrap();
    client.login(&username("alice"), &password()).await.unwrap();
    let mut events = client.connection_events();
    assert!(matches!(*events.borrow_and_update(), ConnectionEvent::Connected { .. }));

    server.stop().await;
    let lost = |event: &ConnectionEvent| matches!(event, ConnectionEvent::Reconnecting { .. });
    soon(events.wait_for(lost)).await.unwrap();

    // A call that is made while the server is down waits until it is back.
    let waiting = tokio::spawn({
        let client = client.clone();
        async move {
            client.call::<methods::CountKeyPackages>(v1::CountKeyPackagesRequest::default()).await
        }
    });
    server.start_again().await;
    soon(waiting).await.unwrap().unwrap();
    assert!(matches!(*events.borrow_and_update(), ConnectionEvent::Connected { .. }));
}

#[tokio::test]
async fn a_call_to_a_stopped_server_fails_as_unreachable_after_patience() {
    let mut server = Server::start().await;
    let mut options = server.options();
    options.patience = Duration::from_millis(300);
    server.stop().await;
    let refused = Client::new(options).unwrap().health().await.unwrap_err();
    assert!(matches!(refused, CallError::Unreachable { .. }), "{refused:?}");
    assert!(refused.is_temporary());
}

#[tokio::test]
async fn a_name_that_does_not_resolve_is_unreachable_for_now() {
    let mut options = Options::new("no-such-host.invalid", Trust::FirstUse);
    options.patience = Duration::from_millis(300);
    let refused = Client::new(options).unwrap().health().await.unwrap_err();
    assert!(matches!(refused, CallError::Unreachable { .. }), "{refused:?}");
}

fn to_oneself(identity: &Identity, message_id: &[u8]) -> v1::EnqueueRequest {
    v1::EnqueueRequest {
        recipient_key: identity.public().as_bytes().to_vec().into(),
        payload: b"once".to_vec().into(),
        message_id: message_id.to_vec().into(),
        ..Default::default()
    }
}

async fn logged_in(client: &Client) -> Identity {
    let identity = Identity::generate();
    client.register(&username("alice"), &password(), &identity, None).await.unwrap();
    client.login(&username("alice"), &password()).await.unwrap();
    identity
}

#[tokio::test]
async fn a_lost_answer_is_retried_from_a_new_port_without_duplicating_the_message() {
    let server = Server::start().await;
    let network = Network::before(server.addr).await;
    let mut options = server.options();
    options.server = network.addr.to_string();
    options.patience = Duration::from_secs(4);
    let client = Client::new(options).unwrap();
    let identity = logged_in(&client).await;
    assert_eq!(network.ports(), 1);

    network.swallow_answers();
    let answer = client.call::<methods::Enqueue>(to_oneself(&identity, &[7; 16])).await.unwrap();
    assert_eq!((answer.seq, answer.duplicate), (1, true), "the first try had arrived");
    assert_eq!(network.ports(), 2);

    // A repeat without an id could store the message twice, so it is left to the caller.
    network.swallow_answers();
    let unknown = client.call::<methods::Enqueue>(to_oneself(&identity, &[])).await.unwrap_err();
    assert!(matches!(unknown, CallError::TimedOut { .. }), "{unknown:?}");
    assert!(unknown.is_temporary());

    // The next call does not go to the dead connection.
    let page = client.call::<methods::Peek>(v1::PeekRequest::default()).await.unwrap();
    assert_eq!(page.payloads.len(), 2);
    assert_eq!(network.ports(), 3);
}

#[tokio::test]
async fn events_reach_every_subscriber() {
    let server = Server::start().await;
    let client = server.client();
    let identity = logged_in(&client).await;
    let mut first = client.subscribe().await.unwrap().expect("the server has events");
    let mut second = client.subscribe().await.unwrap().expect("the server has events");
    client.call::<methods::Enqueue>(to_oneself(&identity, &[1; 16])).await.unwrap();
    for events in [&mut first, &mut second] {
        let wake = loop {
            if let ServerEvent::Wake(wake) = soon(events.next()).await.unwrap() {
                break wake;
            }
        };
        assert_eq!(wake.seq, 1);
    }
}
