//! UploadHybridKey (302), FetchHybridKey (303) and FetchHybridKeys (304).

use bytes::Bytes;
use ed25519_dalek::Signer as _;
use libcrux_ml_kem::mlkem768;
use qpq_proto::{
    Status, methods,
    v1::{FetchHybridKeyRequest, FetchHybridKeysRequest, UploadHybridKeyRequest},
};
use x25519_dalek::{PublicKey, StaticSecret};

use crate::harness::{Server, User, new_identity};

fn hybrid_key(seed: u8) -> Bytes {
    let x25519 = PublicKey::from(&StaticSecret::from([seed; 32]));
    let ml_kem = mlkem768::generate_key_pair([seed; 64]);
    [x25519.as_bytes().as_slice(), ml_kem.pk()].concat().into()
}

async fn upload(user: &User, hybrid_public_key: Bytes) {
    let request = UploadHybridKeyRequest { hybrid_public_key, ..Default::default() };
    user.ok::<methods::UploadHybridKey>(request).await;
}

async fn fetch(user: &User, identity_key: Bytes) -> Bytes {
    let request = FetchHybridKeyRequest { identity_key, ..Default::default() };
    user.ok::<methods::FetchHybridKey>(request).await.hybrid_public_key
}

async fn fetch_many(user: &User, identity_keys: Vec<Bytes>) -> Vec<Bytes> {
    let request = FetchHybridKeysRequest { identity_keys, ..Default::default() };
    user.ok::<methods::FetchHybridKeys>(request).await.keys
}

#[tokio::test]
async fn every_session_can_fetch_a_key_until_its_owner_replaces_it() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    assert!(fetch(&bob, alice.key()).await.is_empty());
    for seed in [1, 2] {
        upload(&alice, hybrid_key(seed)).await;
        for _ in 0..2 {
            assert_eq!(fetch(&bob, alice.key()).await, hybrid_key(seed));
        }
    }
    assert!(fetch(&alice, bob.key()).await.is_empty());
    assert!(fetch(&alice, Bytes::copy_from_slice(new_identity().as_bytes())).await.is_empty());
}

#[tokio::test]
async fn a_signature_is_verified_and_returned_with_its_key() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    let key = hybrid_key(1);
    let signed = |user: &User| -> Bytes {
        let message = [&b"qpq/hybrid/1"[..], &key].concat();
        user.signing.sign(&message).to_bytes().to_vec().into()
    };
    let upload_with = |signature| UploadHybridKeyRequest {
        hybrid_public_key: key.clone(),
        signature,
        ..Default::default()
    };
    for signature in [signed(&bob), vec![7; 64].into(), vec![7; 63].into()] {
        let refused = alice.refused::<methods::UploadHybridKey>(upload_with(signature)).await;
        refused.assert(Status::BadRequest, "keys.invalid_signature");
        assert_eq!(refused.field, "signature");
    }
    assert!(fetch(&bob, alice.key()).await.is_empty());
    alice.ok::<methods::UploadHybridKey>(upload_with(signed(&alice))).await;
    let one = FetchHybridKeyRequest { identity_key: alice.key(), ..Default::default() };
    let fetched = bob.ok::<methods::FetchHybridKey>(one).await;
    assert_eq!((fetched.hybrid_public_key, fetched.signature), (key.clone(), signed(&alice)));
    upload(&bob, hybrid_key(2)).await;
    let many = FetchHybridKeysRequest {
        identity_keys: vec![bob.key(), alice.key()],
        ..Default::default()
    };
    let fetched = alice.ok::<methods::FetchHybridKeys>(many).await;
    assert_eq!(fetched.signatures, [Bytes::new(), signed(&alice)]);
    // A new key without a signature also removes the old signature.
    upload(&alice, hybrid_key(3)).await;
    let one = FetchHybridKeyRequest { identity_key: alice.key(), ..Default::default() };
    assert!(bob.ok::<methods::FetchHybridKey>(one).await.signature.is_empty());
}

#[tokio::test]
async fn only_the_owner_uploads() {
    let server = Server::start().await;
    let (alice, mallory) = (server.user("alice").await, server.user("mallory").await);
    let named = |identity_key| UploadHybridKeyRequest {
        identity_key,
        hybrid_public_key: hybrid_key(6),
        ..Default::default()
    };
    let refused = mallory.refused::<methods::UploadHybridKey>(named(alice.key())).await;
    refused.assert(Status::Forbidden, "keys.not_owner");
    assert!(fetch(&alice, alice.key()).await.is_empty());
    mallory
        .refused::<methods::UploadHybridKey>(named("short".into()))
        .await
        .assert_field("identity_key");
    mallory.ok::<methods::UploadHybridKey>(named(mallory.key())).await;
}

#[tokio::test]
async fn an_unsafe_key_is_refused() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let good = hybrid_key(1).to_vec();
    let small_order = [&[0; 32], &good[32..]].concat();
    let mut not_reduced = good.clone();
    (not_reduced[32], not_reduced[33]) = (0xff, 0xff);
    let swapped = [&good[32..], &good[..32]].concat();
    let longer = [&good[..], &[0]].concat();
    for key in [Vec::new(), good[..1215].to_vec(), longer, small_order, not_reduced, swapped] {
        let request =
            UploadHybridKeyRequest { hybrid_public_key: key.into(), ..Default::default() };
        let refused = alice.refused::<methods::UploadHybridKey>(request).await;
        refused.assert(Status::BadRequest, "keys.invalid_hybrid_key");
        assert_eq!(refused.field, "hybrid_public_key");
    }
    assert!(fetch(&alice, alice.key()).await.is_empty());
}

#[tokio::test]
async fn many_keys_are_returned_in_the_requested_order_with_gaps() {
    let server = Server::start().await;
    let (alice, bob, carol) =
        (server.user("alice").await, server.user("bob").await, server.user("carol").await);
    upload(&alice, hybrid_key(1)).await;
    upload(&carol, hybrid_key(3)).await;
    let nobody = Bytes::copy_from_slice(new_identity().as_bytes());
    let asked = vec![carol.key(), nobody, alice.key(), bob.key(), carol.key()];
    let keys = fetch_many(&bob, asked).await;
    assert_eq!(keys, [hybrid_key(3), Bytes::new(), hybrid_key(1), Bytes::new(), hybrid_key(3)]);
    assert!(fetch_many(&bob, Vec::new()).await.is_empty());
}

#[tokio::test]
async fn a_thousand_keys_fit_one_answer_and_more_are_refused() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    upload(&alice, hybrid_key(1)).await;
    let keys = fetch_many(&alice, vec![alice.key(); 1_000]).await;
    assert_eq!(keys, vec![hybrid_key(1); 1_000]);
    let request =
        FetchHybridKeysRequest { identity_keys: vec![alice.key(); 1_001], ..Default::default() };
    alice.refused::<methods::FetchHybridKeys>(request).await.assert_field("identity_keys");
    let request = FetchHybridKeysRequest {
        identity_keys: vec![alice.key(), "short".into()],
        ..Default::default()
    };
    alice.refused::<methods::FetchHybridKeys>(request).await.assert_field("identity_keys");
    let request = FetchHybridKeyRequest { identity_key: "short".into(), ..Default::default() };
    alice.refused::<methods::FetchHybridKey>(request).await.assert_field("identity_key");
}
