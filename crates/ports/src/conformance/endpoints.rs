//! Rules of [`crate::Endpoints`].

use bytes::Bytes;
use qpq_domain::IdentityKey;

use super::{
    Factory,
    bench::{Bench, MINUTE, NOW},
};
use crate::Endpoint;

fn owner(n: u8) -> IdentityKey {
    IdentityKey::new([n; 32])
}

fn endpoint(address: &'static [u8]) -> Endpoint {
    Endpoint { node_addr: Bytes::from_static(address), expires_at: NOW.plus(MINUTE) }
}

pub async fn an_endpoint_is_resolved_until_it_expires(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let endpoints = &bench.stores.endpoints;
    assert_eq!(endpoints.resolve(&owner(1), NOW).await.expect("resolve"), None);
    let published = endpoint(&[0xff; 4_096]);
    endpoints.publish(&owner(1), published.clone(), NOW).await.expect("publish");
    for (now, expected) in [
        (NOW, Some(published.clone())),
        (NOW.plus(MINUTE / 2), Some(published)),
        (NOW.plus(MINUTE), None),
        (NOW.plus(2 * MINUTE), None),
    ] {
        assert_eq!(endpoints.resolve(&owner(1), now).await.expect("resolve"), expected);
    }
}

pub async fn an_endpoint_replaces_the_previous_one_of_its_owner_alone(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let endpoints = &bench.stores.endpoints;
    for (n, address) in [(1, &b"first"[..]), (2, b"other"), (1, b"second")] {
        endpoints.publish(&owner(n), endpoint(address), NOW).await.expect("publish");
    }
    for (n, expected) in [(1, Some(endpoint(b"second"))), (2, Some(endpoint(b"other"))), (3, None)]
    {
        assert_eq!(endpoints.resolve(&owner(n), NOW).await.expect("resolve"), expected);
    }
}

pub async fn a_removed_endpoint_is_not_resolved(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let endpoints = &bench.stores.endpoints;
    for n in [1, 2] {
        endpoints.publish(&owner(n), endpoint(b"address"), NOW).await.expect("publish");
    }
    // A repeat finds nothing.
    for _ in 0..2 {
        endpoints.remove(&owner(1)).await.expect("remove");
    }
    assert_eq!(endpoints.resolve(&owner(1), NOW).await.expect("resolve"), None);
    assert!(endpoints.resolve(&owner(2), NOW).await.expect("resolve").is_some());
}

pub async fn an_endpoint_is_published_again_after_a_crash(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    bench.stores.endpoints.publish(&owner(1), endpoint(b"before"), NOW).await.expect("publish");
    bench.crash().await;
    let endpoints = &bench.stores.endpoints;
    let found = endpoints.resolve(&owner(1), NOW).await.expect("resolve");
    assert!(found.is_none_or(|found| found == endpoint(b"before")), "it may be lost");
    endpoints.publish(&owner(1), endpoint(b"after"), NOW).await.expect("publish");
    let found = endpoints.resolve(&owner(1), NOW).await.expect("resolve");
    assert_eq!(found, Some(endpoint(b"after")));
}
