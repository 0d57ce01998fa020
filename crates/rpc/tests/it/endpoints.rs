//! Direct endpoints (800 and 801).

use std::time::Duration;

use bytes::Bytes;
use qpq_ports::Clock as _;
use qpq_proto::{
    Status, methods,
    v1::{PublishEndpointRequest, ResolveEndpointRequest, ResolveEndpointResponse},
};

use crate::harness::{Server, User, new_identity};

const HOUR: Duration = Duration::from_secs(60 * 60);

impl User {
    /// Publishes an endpoint. Returns the time at which it expires.
    async fn publish(&self, address: &'static [u8], ttl_secs: u32) -> u64 {
        let node_addr = Bytes::from_static(address);
        let request = PublishEndpointRequest { node_addr, ttl_secs, ..Default::default() };
        let published = self.ok::<methods::PublishEndpoint>(request).await;
        assert!(published.success);
        published.expires_at
    }

    async fn resolve(&self, owner: &Self) -> ResolveEndpointResponse {
        self.ok::<methods::ResolveEndpoint>(of(owner.key())).await
    }
}

fn of(identity_key: Bytes) -> ResolveEndpointRequest {
    ResolveEndpointRequest { identity_key, ..Default::default() }
}

#[tokio::test]
async fn an_endpoint_is_resolved_by_others_until_it_expires() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    assert_eq!(bob.resolve(&alice).await, ResolveEndpointResponse::default());
    let expires_at = alice.publish(b"first", 60).await;
    assert_eq!(expires_at, server.clock.now().plus(Duration::from_secs(60)).0);
    let expected = ResolveEndpointResponse { node_addr: "first".into(), expires_at };
    assert_eq!(bob.resolve(&alice).await, expected);
    server.clock.advance(Duration::from_millis(59_999));
    assert_eq!(bob.resolve(&alice).await, expected);
    server.clock.advance(Duration::from_millis(1));
    assert_eq!(bob.resolve(&alice).await, ResolveEndpointResponse::default());
}

#[tokio::test]
async fn the_lifetime_is_an_hour_by_default_and_at_most_a_day() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let now = server.clock.now();
    for (ttl_secs, expected) in
        [(0, HOUR), (1, Duration::from_secs(1)), (86_400, 24 * HOUR), (u32::MAX, 24 * HOUR)]
    {
        assert_eq!(alice.publish(b"address", ttl_secs).await, now.plus(expected).0);
    }
}

#[tokio::test]
async fn an_endpoint_replaces_the_previous_one_and_an_empty_one_removes_it() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    bob.publish(b"of bob", 0).await;
    for address in [&b"first"[..], b"second"] {
        alice.publish(address, 0).await;
        assert_eq!(bob.resolve(&alice).await.node_addr, address);
    }
    // A repeat finds nothing, and succeeds.
    for _ in 0..2 {
        assert_eq!(alice.publish(b"", 7).await, 0);
        assert_eq!(bob.resolve(&alice).await, ResolveEndpointResponse::default());
    }
    assert_eq!(alice.resolve(&bob).await.node_addr, "of bob");
}

#[tokio::test]
async fn an_address_of_4_kib_is_accepted_and_a_longer_one_refused() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    alice.publish(&[7; 4_096], 0).await;
    let node_addr = Bytes::from_static(&[7; 4_097]);
    let request = PublishEndpointRequest { node_addr, ..Default::default() };
    alice.refused::<methods::PublishEndpoint>(request).await.assert_field("node_addr");
    assert_eq!(alice.resolve(&alice).await.node_addr, &[7; 4_096][..]);
}

#[tokio::test]
async fn the_endpoint_of_an_unknown_key_is_not_found() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let unknown = Bytes::copy_from_slice(new_identity().as_bytes());
    let refused = alice.refused::<methods::ResolveEndpoint>(of(unknown)).await;
    refused.assert(Status::NotFound, "users.not_found");
    let refused = alice.refused::<methods::ResolveEndpoint>(of(Bytes::from_static(&[7; 31]))).await;
    refused.assert_field("identity_key");
    let anonymous = server.connect();
    let refused = anonymous.call::<methods::ResolveEndpoint>(of(alice.key())).await;
    refused.expect_err("no session").assert(Status::Unauthorized, "auth.session_required");
}
