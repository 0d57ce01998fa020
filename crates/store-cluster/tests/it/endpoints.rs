//! Endpoints over several edges, and after a loss of Redis.

use std::time::Duration;

use bytes::Bytes;
use qpq_domain::{IdentityKey, StoreLimits};
use qpq_ports::Endpoint;

use crate::{
    backend::{AnyRedis as _, Servers, edge, eventually},
    people::NOW,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_published_at_one_edge_is_resolved_at_another_until_redis_loses_it() {
    let servers = Servers::start().await;
    let config = servers.cluster(StoreLimits::default()).await;
    let edges = [edge(&config).await, edge(&config).await];
    let [a, b] = edges.each_ref().map(|edge| edge.stores().endpoints);
    let owner = IdentityKey::new([1; 32]);
    let endpoint = |address: &'static [u8], lifetime| Endpoint {
        node_addr: Bytes::from_static(address),
        expires_at: NOW.plus(lifetime),
    };
    let hour = Duration::from_secs(60 * 60);
    let first = endpoint(b"first", hour);
    a.publish(&owner, first.clone(), NOW).await.expect("publish");
    assert_eq!(b.resolve(&owner, NOW).await.expect("resolve"), Some(first));
    let second = endpoint(b"second", hour);
    b.publish(&owner, second.clone(), NOW).await.expect("publish");
    assert_eq!(a.resolve(&owner, NOW).await.expect("resolve"), Some(second.clone()));

    for node in servers.redis.nodes() {
        node.flush_all().await.expect("FLUSHALL");
    }
    assert_eq!(a.resolve(&owner, NOW).await.expect("resolve"), None);
    a.publish(&owner, second.clone(), NOW).await.expect("publish");
    assert_eq!(b.resolve(&owner, NOW).await.expect("resolve"), Some(second));
    b.remove(&owner).await.expect("remove");
    assert_eq!(a.resolve(&owner, NOW).await.expect("resolve"), None);

    // Redis removes the value itself.
    a.publish(&owner, endpoint(b"short", Duration::from_millis(50)), NOW).await.expect("publish");
    eventually("Redis to remove an expired endpoint", || async {
        b.resolve(&owner, NOW).await.expect("resolve").is_none()
    })
    .await;
}
