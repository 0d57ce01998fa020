//! Look-ups of a key by its username (500) and of a username by its key (501).

use bytes::Bytes;
use qpq_proto::{
    Status,
    methods::{ResolveIdentity, ResolveUser},
    v1::{
        ResolveIdentityRequest, ResolveIdentityResponse, ResolveUserRequest, ResolveUserResponse,
    },
};

use crate::harness::{Client, Refused, START, Server, code, new_identity};

async fn user(client: &Client, username: &str) -> Result<ResolveUserResponse, Refused> {
    let request = ResolveUserRequest { username: username.into(), ..Default::default() };
    client.call::<ResolveUser>(request).await
}

async fn identity(client: &Client, key: &[u8]) -> Result<ResolveIdentityResponse, Refused> {
    let request =
        ResolveIdentityRequest { identity_key: Bytes::copy_from_slice(key), ..Default::default() };
    client.call::<ResolveIdentity>(request).await
}

#[tokio::test]
async fn a_username_resolves_to_its_key_and_the_key_to_the_canonical_username() {
    let server = Server::start().await;
    let alice = server.user("Alice").await;
    let bob = server.user("bob").await;
    for name in ["alice", "ALICE", "alice@example.org", "Alice@Example.ORG"] {
        let found = user(&bob.client, name).await.expect("Alice");
        assert_eq!(found.identity_key, &alice.identity.as_bytes()[..]);
        assert!(found.inclusion_proof.is_empty(), "no log is kept yet");
    }
    let found = identity(&bob.client, alice.identity.as_bytes()).await.expect("Alice");
    assert_eq!(
        found,
        ResolveIdentityResponse {
            username: "alice".into(),
            created_at: START.0,
            device_count: 0,
            revoked: false,
            devices: vec![],
        }
    );
}

#[tokio::test]
async fn unknown_usernames_and_keys_are_not_found() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let client = &alice.client;
    let not_found = || (Status::NotFound, "users.not_found".to_owned());
    assert_eq!(code(user(client, "nobody").await), not_found());
    assert_eq!(code(user(client, "nobody@example.org").await), not_found());
    assert_eq!(code(identity(client, new_identity().as_bytes()).await), not_found());
    let elsewhere = || (Status::NotFound, "federation.unknown_domain".to_owned());
    for name in ["alice@example.net", "alice@", "alice@example.org@evil.example"] {
        assert_eq!(code(user(client, name).await), elsewhere(), "{name}");
    }
}

#[tokio::test]
async fn malformed_usernames_and_keys_are_bad_requests() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    for name in ["", "a b", "@example.org", "a/b"] {
        let refused = user(&alice.client, name).await.expect_err("no name");
        assert_eq!(
            (refused.status, refused.code.as_str()),
            (Status::BadRequest, "auth.invalid_username")
        );
        assert_eq!(refused.field, "username");
    }
    for key in [&[][..], &[1; 31], &[1; 33]] {
        let refused = identity(&alice.client, key).await.expect_err("no key");
        assert_eq!(
            (refused.code.as_str(), refused.field.as_str()),
            ("rpc.invalid_field", "identity_key")
        );
    }
}

#[tokio::test]
async fn resolving_a_username_or_key_requires_a_session() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let anyone = server.connect();
    let required = || (Status::Unauthorized, "auth.session_required".to_owned());
    assert_eq!(code(user(&anyone, "alice").await), required());
    assert_eq!(code(identity(&anyone, alice.identity.as_bytes()).await), required());
}

#[tokio::test]
async fn a_server_without_a_domain_knows_no_domain() {
    let server = Server::with(|config| config.domain = String::new()).await;
    let alice = server.user("alice").await;
    user(&alice.client, "alice").await.expect("Alice");
    assert_eq!(code(user(&alice.client, "alice@").await).1, "federation.unknown_domain");
}
