//! FetchKeyPackage (301) and CountKeyPackages (305).

use std::{collections::HashSet, time::Duration};

use bytes::Bytes;
use qpq_proto::{
    Status, methods,
    v1::{FetchKeyPackageRequest, FetchKeyPackageResponse, UploadKeyPackageRequest},
};

use super::{fetch_of, last_resort, packages, stock, take, upload};
use crate::harness::{Server, new_identity};

const DAY: Duration = Duration::from_secs(24 * 3600);

#[tokio::test]
async fn packages_are_taken_once_unchanged_and_oldest_first() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    let packages = packages(&server, &alice, 3);
    for package in &packages {
        let request = UploadKeyPackageRequest { package: package.clone(), ..Default::default() };
        alice.ok::<methods::UploadKeyPackage>(request).await;
    }
    for (left, package) in [(2, &packages[0]), (1, &packages[1]), (0, &packages[2])] {
        assert_eq!(take(&bob, &alice).await, Some((package.clone(), false)));
        assert_eq!(stock(&alice).await, (left, false));
    }
    assert_eq!(take(&bob, &alice).await, None);
}

#[tokio::test]
async fn unknown_accounts_and_accounts_without_packages_have_the_same_answer() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    let nobody = Bytes::copy_from_slice(new_identity().as_bytes());
    for target in [nobody, alice.key(), bob.key()] {
        let request = FetchKeyPackageRequest { identity_key: target, ..Default::default() };
        let response = bob.ok::<methods::FetchKeyPackage>(request).await;
        assert_eq!(response, FetchKeyPackageResponse::default());
    }
    for len in [0, 31, 33] {
        let request =
            FetchKeyPackageRequest { identity_key: vec![1; len].into(), ..Default::default() };
        bob.refused::<methods::FetchKeyPackage>(request).await.assert_field("identity_key");
    }
}

#[tokio::test]
async fn the_last_resort_package_is_returned_when_no_other_is_left_and_stays() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    let once = packages(&server, &alice, 2);
    let by_extension = last_resort(&server, &alice);
    // The last-resort package is the oldest, and returned last.
    alice.ok::<methods::UploadKeyPackage>(upload(std::slice::from_ref(&by_extension))).await;
    assert_eq!(stock(&alice).await, (0, true));
    alice.ok::<methods::UploadKeyPackage>(upload(&once[..1])).await;
    assert_eq!(stock(&alice).await, (1, true));
    assert_eq!(take(&bob, &alice).await, Some((once[0].clone(), false)));
    for _ in 0..3 {
        assert_eq!(take(&bob, &alice).await, Some((by_extension.clone(), true)));
    }
    assert_eq!(stock(&alice).await, (0, true));

    // A new last-resort package replaces it. This one has the request's flag instead of the
    // extension.
    let by_flag = UploadKeyPackageRequest {
        package: once[1].clone(),
        last_resort: true,
        ..Default::default()
    };
    alice.ok::<methods::UploadKeyPackage>(by_flag).await;
    for _ in 0..3 {
        assert_eq!(take(&bob, &alice).await, Some((once[1].clone(), true)));
    }
}

#[tokio::test]
async fn an_expired_package_is_not_taken() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    alice.ok::<methods::UploadKeyPackage>(upload(&packages(&server, &alice, 1))).await;
    alice.ok::<methods::UploadKeyPackage>(upload(&[last_resort(&server, &alice)])).await;
    server.clock.advance(DAY * 83);
    let (alice, bob) = (alice.again().await, bob.again().await);
    assert_eq!(stock(&alice).await, (1, true));
    let young = packages(&server, &alice, 1);
    alice.ok::<methods::UploadKeyPackage>(upload(&young)).await;
    server.clock.advance(DAY + Duration::from_secs(1));
    assert_eq!(stock(&alice).await, (1, false));
    assert_eq!(take(&bob, &alice).await, Some((young[0].clone(), false)));
    assert_eq!(take(&bob, &alice).await, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn no_two_of_64_concurrent_fetches_receive_the_same_package() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    let once = packages(&server, &alice, 40);
    let spare = last_resort(&server, &alice);
    alice.ok::<methods::UploadKeyPackage>(upload(&once)).await;
    alice.ok::<methods::UploadKeyPackage>(upload(std::slice::from_ref(&spare))).await;

    let claims: Vec<_> = (0..64)
        .map(|_| {
            let (bob, request) = (bob.elsewhere(&server), fetch_of(&alice));
            tokio::spawn(async move { bob.ok::<methods::FetchKeyPackage>(request).await })
        })
        .collect();
    let mut taken = HashSet::new();
    let mut last_resorts = 0;
    for claim in claims {
        let FetchKeyPackageResponse { package, last_resort, .. } = claim.await.expect("an answer");
        if last_resort {
            assert_eq!(package, spare);
            last_resorts += 1;
        } else {
            assert!(taken.insert(package), "one package was given out twice");
        }
    }
    assert_eq!(taken, once.into_iter().collect());
    assert_eq!(last_resorts, 24);
}

#[tokio::test]
async fn fetching_another_accounts_packages_is_limited_by_fetcher_and_target() {
    let server = Server::with(|config| config.limits.enabled = true).await;
    let (alice, carol) = (server.user("alice").await, server.user("carol").await);
    let (bob, dave) = (server.user("bob").await, server.user("dave").await);
    alice.ok::<methods::UploadKeyPackage>(upload(&packages(&server, &alice, 30))).await;
    carol.ok::<methods::UploadKeyPackage>(upload(&packages(&server, &carol, 1))).await;

    for _ in 0..20 {
        assert!(take(&bob, &alice).await.is_some());
    }
    let refused = bob.refused::<methods::FetchKeyPackage>(fetch_of(&alice)).await;
    refused.assert(Status::RateLimited, "rpc.rate_limited");
    // The refused call took no package. Other fetchers and other targets are not affected.
    assert_eq!(stock(&alice).await, (10, false));
    assert!(take(&dave, &alice).await.is_some());
    assert!(take(&bob, &carol).await.is_some());
    server.clock.advance(refused.retry_after.expect("a time to wait"));
    assert!(take(&bob, &alice).await.is_some());
}
