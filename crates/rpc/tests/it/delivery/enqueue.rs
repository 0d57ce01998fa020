//! Enqueue (200).

use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;
use qpq_domain::IdentityKey;
use qpq_proto::{
    Status, delivery_proof, methods,
    v1::{self, DeliveryProof, EnqueueRequest},
};
use sha2::{Digest as _, Sha256};

use super::{CHANNEL, bodies, fetch, message_id, peek_all, seqs};
use crate::{
    harness::{START, Server, User, new_identity},
    user::message,
};

const DAY: Duration = Duration::from_secs(24 * 3600);

async fn enqueue(user: &User, request: EnqueueRequest) -> v1::EnqueueResponse {
    user.ok::<methods::Enqueue>(request).await
}

/// Returns whether the proof is signed by `server_key`.
fn verifies(server_key: &IdentityKey, proof: &DeliveryProof) -> bool {
    let signature: [u8; 64] = proof.signature.as_ref().try_into().expect("64 bytes");
    server_key.verify(&delivery_proof::signed_bytes(proof), &signature).is_ok()
}

async fn server_key(user: &User) -> IdentityKey {
    let health = user.ok::<methods::Health>(v1::HealthRequest {}).await;
    IdentityKey::try_from(health.server_key.as_ref()).expect("32 bytes")
}

#[tokio::test]
async fn seqs_rise_by_one_across_channels_and_senders() {
    let server = Server::start().await;
    let (alice, bob, carol) =
        (server.user("alice").await, server.user("bob").await, server.user("carol").await);
    assert_eq!(alice.send(&bob, b"one").await.seq, 1);
    let in_channel = EnqueueRequest { channel_id: CHANNEL, ..message(&bob, b"two") };
    assert_eq!(enqueue(&carol, in_channel).await.seq, 2);
    assert_eq!(bob.send(&bob, b"three, to himself").await.seq, 3);
    assert_eq!(alice.send(&carol, b"another inbox").await.seq, 1);

    let all = peek_all(&bob).await;
    assert_eq!(seqs(&all.payloads), [1, 2, 3]);
    assert_eq!(all.payloads[1].data, "two");
    assert_eq!(all.payloads[1].channel_id, CHANNEL);
    assert_eq!(all.payloads[1].enqueued_at, START.0);
    assert_eq!(all.payloads[1].origin, "");
    assert!(all.payloads[0].channel_id.is_empty());
}

#[tokio::test]
async fn fields_of_a_wrong_length_are_refused_by_name() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let good = message(&alice, b"hello");
    for len in [0, 1, 31, 33] {
        let request = EnqueueRequest { recipient_key: vec![1; len].into(), ..good.clone() };
        alice.refused::<methods::Enqueue>(request).await.assert_field("recipient_key");
    }
    for len in [1, 15, 17, 32] {
        let request = EnqueueRequest { channel_id: vec![1; len].into(), ..good.clone() };
        alice.refused::<methods::Enqueue>(request).await.assert_field("channel_id");
        let request = EnqueueRequest { message_id: vec![1; len].into(), ..good.clone() };
        alice.refused::<methods::Enqueue>(request).await.assert_field("message_id");
    }
    let nothing = v1::PeekResponse { store_id: server.store_id(), ..Default::default() };
    assert_eq!(peek_all(&alice).await, nothing);
}

#[tokio::test]
async fn payloads_from_empty_to_the_configured_maximum_are_accepted() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    enqueue(&alice, message(&alice, b"")).await;
    let of = |user: &User, len: usize| EnqueueRequest {
        payload: vec![7; len].into(),
        ..message(user, b"")
    };
    enqueue(&alice, of(&alice, 1 << 20)).await;
    let refused = alice.refused::<methods::Enqueue>(of(&alice, (1 << 20) + 1)).await;
    refused.assert(Status::BadRequest, "delivery.payload_too_large");
    let fetched = fetch(&alice).await.arrived().await;
    assert_eq!(fetched.payloads.iter().map(|e| e.data.len()).collect::<Vec<_>>(), [0, 1 << 20]);

    let server = Server::with(|config| config.delivery.max_payload = 3).await;
    let alice = server.user("alice").await;
    enqueue(&alice, of(&alice, 3)).await;
    alice
        .refused::<methods::Enqueue>(of(&alice, 4))
        .await
        .assert(Status::BadRequest, "delivery.payload_too_large");
}

#[tokio::test]
async fn messages_that_could_not_be_read_are_refused() {
    let server = Server::with(|config| config.delivery.max_payload = usize::MAX).await;
    let alice = server.user("alice").await;
    let of = |len: usize| EnqueueRequest {
        payload: vec![7; len].into(),
        channel_id: CHANNEL,
        ..message(&alice, b"")
    };
    let largest = (4 << 20) - 96;
    alice
        .refused::<methods::Enqueue>(of(largest + 1))
        .await
        .assert(Status::BadRequest, "delivery.payload_too_large");
    enqueue(&alice, of(largest)).await;
    assert_eq!(peek_all(&alice).await.payloads[0].data.len(), largest);
}

#[tokio::test]
async fn a_recipient_without_account_is_not_found() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let nobody = Bytes::copy_from_slice(new_identity().as_bytes());
    let request = EnqueueRequest { recipient_key: nobody, ..message(&alice, b"hello") };
    alice
        .refused::<methods::Enqueue>(request)
        .await
        .assert(Status::NotFound, "delivery.no_such_recipient");
}

#[tokio::test]
async fn a_full_inbox_refuses_the_sender_and_drops_nothing() {
    let server = Server::with(|config| config.delivery.max_messages = 2).await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    alice.send(&bob, b"one").await;
    alice.send(&bob, b"two").await;
    let refused = alice.refused::<methods::Enqueue>(message(&bob, b"three")).await;
    refused.assert(Status::RateLimited, "delivery.queue_full");
    assert_eq!(bodies(&fetch(&bob).await.arrived().await.payloads), [b"one", b"two"]);
    assert_eq!(alice.send(&bob, b"three").await.seq, 3, "a refused message takes no seq");

    let server = Server::with(|config| {
        config.delivery.max_bytes = 10;
        config.delivery.sender_share = 1;
    })
    .await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    alice.send(&bob, b"123456").await;
    let refused = alice.refused::<methods::Enqueue>(message(&bob, b"12345")).await;
    refused.assert(Status::RateLimited, "delivery.queue_full");
    alice.send(&bob, b"1234").await;
}

#[tokio::test]
async fn the_proof_describes_the_message_and_verifies_with_the_key_in_health() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    alice.send(&bob, b"one").await;
    server.clock.advance(Duration::from_secs(5));
    let request = EnqueueRequest { channel_id: CHANNEL, ..message(&bob, b"two") };
    let response = enqueue(&alice, request).await;
    assert!(!response.duplicate);

    let server_key = server_key(&alice).await;
    let proof = DeliveryProof::decode(response.delivery_proof).expect("a proof");
    assert_eq!(proof.version, 1);
    assert_eq!(proof.server_key_id, Sha256::digest(server_key.as_bytes())[..8]);
    assert_eq!(proof.recipient_key, bob.key());
    assert_eq!(proof.channel_id, CHANNEL);
    assert_eq!(proof.seq, 2);
    assert_eq!(proof.payload_sha256, Sha256::digest(b"two")[..]);
    assert_eq!(proof.enqueued_at, START.0 + 5_000);
    assert!(verifies(&server_key, &proof));

    let other = Bytes::from_static(&[9; 32]);
    let mut signature = proof.signature.to_vec();
    signature[0] ^= 1;
    for forged in [
        DeliveryProof { version: 2, ..proof.clone() },
        DeliveryProof { server_key_id: other.slice(..8), ..proof.clone() },
        DeliveryProof { recipient_key: alice.key(), ..proof.clone() },
        DeliveryProof { channel_id: Bytes::new(), ..proof.clone() },
        DeliveryProof { seq: 1, ..proof.clone() },
        DeliveryProof { payload_sha256: other, ..proof.clone() },
        DeliveryProof { enqueued_at: START.0, ..proof.clone() },
        DeliveryProof { signature: signature.into(), ..proof.clone() },
    ] {
        assert!(!verifies(&server_key, &forged), "{forged:?}");
    }
    assert!(!verifies(&alice.identity, &proof));
}

#[tokio::test]
async fn without_a_commit_there_is_no_proof() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    alice.send(&alice, b"before").await;
    let rpc_outlives_the_store = alice.elsewhere(&server);
    server.store.close().await;
    let refused =
        rpc_outlives_the_store.refused::<methods::Enqueue>(message(&alice, b"after")).await;
    refused.assert(Status::Unavailable, "rpc.unavailable");
}

#[tokio::test]
async fn a_repeated_message_id_returns_the_first_seq_and_proof() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    let request = EnqueueRequest { message_id: message_id(1), ..message(&bob, b"hello") };
    let first = enqueue(&alice, request.clone()).await;
    alice.send(&bob, b"in between").await;
    server.clock.advance(Duration::from_secs(3));

    // The other fields and the connection may differ.
    let other = EnqueueRequest {
        payload: "changed".into(),
        channel_id: CHANNEL,
        ttl_secs: 9,
        ..request.clone()
    };
    for (repeat, sender) in
        [(request.clone(), alice.elsewhere(&server)), (other, alice.elsewhere(&server))]
    {
        let again = enqueue(&sender, repeat).await;
        assert!(again.duplicate);
        assert_eq!((again.seq, &again.delivery_proof), (first.seq, &first.delivery_proof));
    }
    assert_eq!(bodies(&peek_all(&bob).await.payloads), [&b"hello"[..], b"in between"]);
}

#[tokio::test]
async fn a_message_id_is_scoped_to_its_sender_and_recipient() {
    let server = Server::start().await;
    let (alice, bob, carol) =
        (server.user("alice").await, server.user("bob").await, server.user("carol").await);
    let with_id = |to: &User| EnqueueRequest { message_id: message_id(1), ..message(to, b"hello") };
    assert!(!enqueue(&alice, with_id(&bob)).await.duplicate);
    assert!(!enqueue(&carol, with_id(&bob)).await.duplicate);
    assert!(!enqueue(&alice, with_id(&carol)).await.duplicate);
    assert!(
        !enqueue(&alice, EnqueueRequest { message_id: message_id(2), ..with_id(&bob) })
            .await
            .duplicate
    );
    for _ in 0..2 {
        assert!(!alice.send(&bob, b"no id").await.duplicate);
    }
    assert_eq!(seqs(&peek_all(&bob).await.payloads), [1, 2, 3, 4, 5]);
}

#[tokio::test]
async fn a_message_id_is_remembered_for_15_minutes_after_the_messages_removal() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    let request = EnqueueRequest { message_id: message_id(1), ..message(&bob, b"hello") };
    let first = enqueue(&alice, request.clone()).await;
    // The first repeat is sent while the message is in the inbox.
    server.clock.advance(DAY);
    server
        .store
        .stores()
        .maintenance
        .sweep(server.rpc.app().clock.now())
        .await
        .expect("a store that works");
    assert!(enqueue(&alice, request.clone()).await.duplicate);
    fetch(&bob).await.arrived().await;

    server.clock.advance(Duration::from_secs(14 * 60));
    server
        .store
        .stores()
        .maintenance
        .sweep(server.rpc.app().clock.now())
        .await
        .expect("a store that works");
    let again = enqueue(&alice, request.clone()).await;
    assert_eq!((again.seq, again.delivery_proof, again.duplicate), (1, first.delivery_proof, true));
    assert!(peek_all(&bob).await.payloads.is_empty(), "a repeat brings nothing back");

    server.clock.advance(Duration::from_secs(2 * 60));
    server
        .store
        .stores()
        .maintenance
        .sweep(server.rpc.app().clock.now())
        .await
        .expect("a store that works");
    let later = enqueue(&alice, request).await;
    assert_eq!((later.seq, later.duplicate), (2, false));
}

#[tokio::test]
async fn an_expired_message_is_never_delivered() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    let living = |ttl_secs| EnqueueRequest { ttl_secs, ..message(&bob, b"hello") };
    for ttl_secs in [1, 10, 0, u32::MAX] {
        enqueue(&alice, living(ttl_secs)).await;
    }
    server.clock.advance(Duration::from_millis(999));
    assert_eq!(seqs(&peek_all(&bob).await.payloads), [1, 2, 3, 4]);
    server.clock.advance(Duration::from_millis(1));
    assert_eq!(seqs(&peek_all(&bob).await.payloads), [2, 3, 4]);
    server.clock.advance(Duration::from_secs(9));
    assert_eq!(seqs(&fetch(&bob).await.response.payloads), [3, 4]);

    // No ttl means 30 days, and the maximum is 90. Sessions last 30 days, so bob logs in again.
    server.clock.advance(DAY * 30);
    let bob = bob.again().await;
    assert_eq!(seqs(&peek_all(&bob).await.payloads), [4]);
    server.clock.advance(DAY * 60);
    let bob = bob.again().await;
    let waited = v1::FetchWaitRequest { timeout_ms: 1, ..Default::default() };
    assert!(bob.ok::<methods::FetchWait>(waited).await.payloads.is_empty());
    assert!(fetch(&bob).await.response.payloads.is_empty());
}
