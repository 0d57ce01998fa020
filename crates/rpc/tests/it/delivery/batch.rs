//! 205 BatchEnqueue.

use bytes::Bytes;
use qpq_proto::{
    Status, methods,
    v1::{self, BatchEnqueueRequest, BatchEnqueueResponse, BatchResult, EnqueueRequest},
};

use super::{CHANNEL, OTHER_CHANNEL, bodies, fetch, message_id, peek_all, seqs};
use crate::{
    harness::{Server, User, new_identity},
    user::message,
};

fn fan_out(recipients: &[&User], payload: &'static [u8]) -> BatchEnqueueRequest {
    BatchEnqueueRequest {
        recipient_keys: recipients.iter().map(|user| user.key()).collect(),
        payload: Bytes::from_static(payload),
        ..Default::default()
    }
}

fn list(messages: Vec<EnqueueRequest>) -> BatchEnqueueRequest {
    BatchEnqueueRequest { messages, ..Default::default() }
}

async fn send(user: &User, request: BatchEnqueueRequest) -> BatchEnqueueResponse {
    let response = user.ok::<methods::BatchEnqueue>(request).await;
    assert_eq!(response.seqs, response.results.iter().map(|result| result.seq).collect::<Vec<_>>());
    assert_eq!(response.epoch, 0);
    for result in &response.results {
        let accepted = result.status == 0;
        assert_eq!(accepted, result.seq > 0, "{result:?}");
        assert_eq!(accepted, result.code.is_empty(), "{result:?}");
        assert_eq!(accepted, !result.delivery_proof.is_empty(), "{result:?}");
    }
    response
}

fn outcomes(response: &BatchEnqueueResponse) -> Vec<(u64, u32, &str)> {
    response.results.iter().map(|r: &BatchResult| (r.seq, r.status, r.code.as_str())).collect()
}

#[tokio::test]
async fn a_batch_is_a_fan_out_or_a_list_never_both_nor_neither() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let (fan, one) = (fan_out(&[&alice], b"hello"), message(&alice, b"hello"));
    for request in [
        BatchEnqueueRequest::default(),
        BatchEnqueueRequest { recipient_keys: vec![], ..fan.clone() },
        BatchEnqueueRequest { messages: vec![one.clone()], ..fan.clone() },
        BatchEnqueueRequest { payload: "x".into(), ..list(vec![one.clone()]) },
        BatchEnqueueRequest { channel_id: CHANNEL, ..list(vec![one.clone()]) },
        BatchEnqueueRequest { ttl_secs: 1, ..list(vec![one.clone()]) },
        BatchEnqueueRequest { message_id: message_id(1), ..list(vec![one.clone()]) },
        BatchEnqueueRequest { recipient_keys: vec![alice.key(); 1_001], ..fan.clone() },
        list(vec![one; 1_001]),
    ] {
        alice
            .refused::<methods::BatchEnqueue>(request)
            .await
            .assert(Status::BadRequest, "delivery.invalid_batch");
    }
    assert!(peek_all(&alice).await.payloads.is_empty());
}

#[tokio::test]
async fn commits_are_refused_until_the_server_orders_them() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    for request in [
        BatchEnqueueRequest { commit: true, ..fan_out(&[&alice], b"hello") },
        BatchEnqueueRequest { expected_epoch: 1, ..fan_out(&[&alice], b"hello") },
        BatchEnqueueRequest {
            commit: true,
            expected_epoch: 1,
            ..list(vec![message(&alice, b"hello")])
        },
    ] {
        let refused = alice.refused::<methods::BatchEnqueue>(request).await;
        refused.assert(Status::BadRequest, "delivery.commit_unsupported");
    }
    assert!(peek_all(&alice).await.payloads.is_empty());
}

#[tokio::test]
async fn in_a_fan_out_each_recipient_stands_for_itself() {
    let server = Server::with(|config| config.delivery.max_messages = 1).await;
    let (alice, bob, carol) =
        (server.user("alice").await, server.user("bob").await, server.user("carol").await);
    alice.send(&carol, b"fills it").await;
    let mut request = fan_out(&[&bob, &carol, &alice], b"hello");
    request.channel_id = CHANNEL;
    request.recipient_keys.insert(1, Bytes::copy_from_slice(new_identity().as_bytes()));
    request.recipient_keys.insert(2, Bytes::from_static(b"short"));
    let response = send(&alice, request).await;
    assert_eq!(
        outcomes(&response),
        [
            (1, 0, ""),
            (0, 4, "delivery.no_such_recipient"),
            (0, 1, "rpc.invalid_field"),
            (0, 5, "delivery.queue_full"),
            (1, 0, ""),
        ]
    );
    let all = peek_all(&bob).await;
    assert_eq!(bodies(&all.payloads), [b"hello"]);
    assert_eq!(all.payloads[0].channel_id, CHANNEL);
}

#[tokio::test]
async fn what_all_of_a_fan_out_share_fails_the_whole() {
    let server = Server::with(|config| config.delivery.max_payload = 5).await;
    let alice = server.user("alice").await;
    let good = fan_out(&[&alice], b"hello");
    let request = BatchEnqueueRequest { channel_id: "short".into(), ..good.clone() };
    alice.refused::<methods::BatchEnqueue>(request).await.assert_field("channel_id");
    let request = BatchEnqueueRequest { message_id: "short".into(), ..good.clone() };
    alice.refused::<methods::BatchEnqueue>(request).await.assert_field("message_id");
    let request = BatchEnqueueRequest { payload: "hello!".into(), ..good };
    let refused = alice.refused::<methods::BatchEnqueue>(request).await;
    refused.assert(Status::BadRequest, "delivery.payload_too_large");
}

#[tokio::test]
async fn in_a_list_each_message_stands_for_itself() {
    let server = Server::with(|config| config.delivery.max_payload = 5).await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    let response = send(
        &alice,
        list(vec![
            EnqueueRequest { channel_id: CHANNEL, ..message(&bob, b"one") },
            EnqueueRequest { recipient_key: Bytes::new(), ..message(&bob, b"none") },
            EnqueueRequest { channel_id: "short".into(), ..message(&bob, b"none") },
            EnqueueRequest { message_id: "short".into(), ..message(&bob, b"none") },
            message(&bob, b"large!"),
            EnqueueRequest { channel_id: OTHER_CHANNEL, ..message(&bob, b"two") },
            message(&alice, b"mine"),
            message(&bob, b""),
        ]),
    )
    .await;
    assert_eq!(
        outcomes(&response),
        [
            (1, 0, ""),
            (0, 1, "rpc.invalid_field"),
            (0, 1, "rpc.invalid_field"),
            (0, 1, "rpc.invalid_field"),
            (0, 1, "delivery.payload_too_large"),
            (2, 0, ""),
            (1, 0, ""),
            (3, 0, ""),
        ]
    );
    assert_eq!(bodies(&peek_all(&bob).await.payloads), [&b"one"[..], b"two", b""]);
    assert_eq!(bodies(&fetch(&alice).await.response.payloads), [b"mine"]);
}

#[tokio::test]
async fn nothing_but_refusals_is_an_answer_too() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let response = send(&alice, list(vec![EnqueueRequest::default(); 2])).await;
    assert_eq!(outcomes(&response), [(0, 1, "rpc.invalid_field"); 2]);
}

#[tokio::test]
async fn the_token_of_a_listed_message_means_nothing() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    let with_token = EnqueueRequest {
        session_token: bob.token.clone(),
        message_id: message_id(1),
        ..message(&alice, b"hello")
    };
    send(&alice, list(vec![with_token])).await;
    // It was alice's: the id is hers, not bob's.
    let hers = EnqueueRequest { message_id: message_id(1), ..message(&alice, b"hello") };
    assert!(alice.ok::<methods::Enqueue>(hers.clone()).await.duplicate);
    assert!(!bob.ok::<methods::Enqueue>(hers).await.duplicate);
}

#[tokio::test]
async fn a_recipient_named_twice_gets_one_message_for_each_time_or_one_for_each_message_id() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    let twice = send(&alice, fan_out(&[&bob, &alice, &bob], b"hello")).await;
    assert_eq!(twice.seqs, [1, 1, 2]);

    let request = BatchEnqueueRequest {
        message_id: message_id(1),
        ..fan_out(&[&bob, &alice, &bob], b"once")
    };
    let once = send(&alice, request.clone()).await;
    assert_eq!(once.seqs, [3, 2, 3]);
    assert_eq!(once.results.iter().map(|r| r.duplicate).collect::<Vec<_>>(), [false, false, true]);
    assert_eq!(once.results[0].delivery_proof, once.results[2].delivery_proof);

    let again = send(&alice, request).await;
    assert!(again.results.iter().all(|result| result.duplicate));
    for (first, second) in once.results.iter().zip(&again.results) {
        assert_eq!((first.seq, &first.delivery_proof), (second.seq, &second.delivery_proof));
    }
    assert_eq!(bodies(&peek_all(&bob).await.payloads), [&b"hello"[..], b"hello", b"once"]);
}

#[tokio::test]
async fn an_enqueue_and_a_batch_know_each_others_message_ids() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    let one = EnqueueRequest { message_id: message_id(1), ..message(&bob, b"hello") };
    let first = alice.ok::<methods::Enqueue>(one.clone()).await;
    let batch = send(&alice, list(vec![one])).await;
    let v1::BatchResult { seq, duplicate, delivery_proof, .. } = &batch.results[0];
    assert_eq!((*seq, *duplicate, delivery_proof), (first.seq, true, &first.delivery_proof));
}

#[tokio::test]
async fn a_thousand_messages_arrive_in_their_order() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    let numbered =
        |n: u32| EnqueueRequest { payload: n.to_be_bytes().to_vec().into(), ..message(&bob, b"") };
    let response = send(&alice, list((1..=1_000).map(numbered).collect())).await;
    assert_eq!(response.seqs, (1..=1_000).collect::<Vec<_>>());
    let fetched = fetch(&bob).await.arrived().await;
    assert_eq!(seqs(&fetched.payloads), response.seqs);
    for envelope in &fetched.payloads {
        assert_eq!(envelope.data, u32::try_from(envelope.seq).expect("small").to_be_bytes()[..]);
    }
    assert!(!fetched.more);
}
