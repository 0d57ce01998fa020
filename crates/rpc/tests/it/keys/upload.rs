//! UploadKeyPackage (300).

use std::time::Duration;

use bytes::Bytes;
use proptest::prelude::*;
use qpq_proto::{Status, methods, v1::UploadKeyPackageRequest};
use sha2::{Digest as _, Sha256};

use super::{bare, last_resort, packages, stock, take, upload};
use crate::harness::{Server, User};

const DAY: Duration = Duration::from_secs(24 * 3600);

fn one(package: &Bytes) -> UploadKeyPackageRequest {
    UploadKeyPackageRequest { package: package.clone(), ..Default::default() }
}

/// Returns the number of available packages after an upload that must succeed.
async fn available(user: &User, request: UploadKeyPackageRequest) -> u32 {
    user.ok::<methods::UploadKeyPackage>(request).await.available
}

async fn assert_invalid(user: &User, request: UploadKeyPackageRequest, field: &str) {
    let refused = user.refused::<methods::UploadKeyPackage>(request).await;
    refused.assert(Status::BadRequest, "keys.invalid_package");
    assert_eq!(refused.field, field);
}

#[tokio::test]
async fn an_upload_returns_the_fingerprint_and_the_stock() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let packages = packages(&server, &alice, 5);
    let response = alice.ok::<methods::UploadKeyPackage>(one(&packages[0])).await;
    assert_eq!(response.fingerprint, Sha256::digest(&packages[0])[..]);
    assert_eq!(response.available, 1);

    let more = alice.ok::<methods::UploadKeyPackage>(upload(&packages[1..3])).await;
    assert_eq!((more.fingerprint, more.available), (Bytes::new(), 3));
    let both = UploadKeyPackageRequest {
        identity_key: alice.key(),
        package: packages[3].clone(),
        more_packages: packages[4..].to_vec(),
        ..Default::default()
    };
    assert_eq!(available(&alice, both).await, 5);
    assert_eq!(stock(&alice).await, (5, false));
}

#[tokio::test]
async fn last_resort_applies_only_to_the_first_package() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let packages = packages(&server, &alice, 3);
    let request = UploadKeyPackageRequest {
        more_packages: packages[1..].to_vec(),
        last_resort: true,
        ..one(&packages[0])
    };
    assert_eq!(available(&alice, request).await, 2);
    assert_eq!(stock(&alice).await, (2, true));
    let of_none = UploadKeyPackageRequest { last_resort: true, ..upload(&packages[1..]) };
    assert_invalid(&alice, of_none, "package").await;
}

#[tokio::test]
async fn only_the_owner_uploads() {
    let server = Server::start().await;
    let (alice, mallory) = (server.user("alice").await, server.user("mallory").await);
    let package = packages(&server, &mallory, 1).remove(0);
    let request = UploadKeyPackageRequest { identity_key: alice.key(), ..one(&package) };
    let refused = mallory.refused::<methods::UploadKeyPackage>(request).await;
    refused.assert(Status::Forbidden, "keys.not_owner");
    let request = UploadKeyPackageRequest { identity_key: "short".into(), ..one(&package) };
    mallory.refused::<methods::UploadKeyPackage>(request).await.assert_field("identity_key");
    // A package of another account is refused, too, when it is uploaded for the caller's own key.
    assert_invalid(&mallory, one(&packages(&server, &alice, 1)[0]), "package").await;
    assert_eq!((stock(&alice).await, stock(&mallory).await), ((0, false), (0, false)));
}

#[tokio::test]
async fn an_upload_of_a_stored_package_has_no_effect() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    let package = packages(&server, &alice, 1).remove(0);
    // Copies in one call, and a copy without its MLSMessage, are the same package.
    assert_eq!(available(&alice, upload(&[package.clone(), package.clone()])).await, 1);
    assert_eq!(available(&alice, one(&package)).await, 1);
    assert_eq!(available(&alice, one(&bare(&package))).await, 1);
    assert_eq!(take(&bob, &alice).await, Some((package, false)));
    assert_eq!(take(&bob, &alice).await, None);
}

#[tokio::test]
async fn a_package_that_was_taken_is_refused() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    let packages = packages(&server, &alice, 2);
    alice.ok::<methods::UploadKeyPackage>(one(&packages[0])).await;
    take(&bob, &alice).await.expect("the only one");
    assert_invalid(&alice, one(&packages[0]), "package").await;
    assert_invalid(&alice, one(&bare(&packages[0])), "package").await;
    let among_others =
        UploadKeyPackageRequest { package: packages[1].clone(), ..upload(&packages[..1]) };
    assert_invalid(&alice, among_others, "more_packages").await;
    assert_eq!(stock(&alice).await, (0, false), "all or none");
}

#[tokio::test]
async fn an_upload_stores_all_its_packages_or_none() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let mut packages = packages(&server, &alice, 20);
    packages[13] = Bytes::from_static(b"no package");
    assert_invalid(&alice, upload(&packages), "more_packages").await;
    assert_eq!(stock(&alice).await, (0, false));
    assert_invalid(&alice, UploadKeyPackageRequest::default(), "package").await;
}

#[tokio::test]
async fn packages_beyond_the_configured_maximum_are_refused() {
    let server = Server::with(|config| config.key_packages.max_count = 3).await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    let packages = packages(&server, &alice, 5);
    alice
        .refused::<methods::UploadKeyPackage>(upload(&packages[..4]))
        .await
        .assert_field("more_packages");
    assert_eq!(available(&alice, upload(&packages[..2])).await, 2);
    let refused = alice.refused::<methods::UploadKeyPackage>(upload(&packages[2..4])).await;
    refused.assert(Status::RateLimited, "keys.too_many");
    assert_eq!(stock(&alice).await, (2, false), "all or none");
    // The last-resort package counts too.
    assert_eq!(available(&alice, one(&last_resort(&server, &alice))).await, 2);
    let refused = alice.refused::<methods::UploadKeyPackage>(one(&packages[4])).await;
    refused.assert(Status::RateLimited, "keys.too_many");
    take(&bob, &alice).await.expect("one of two");
    assert_eq!(available(&alice, one(&packages[4])).await, 2);
}

#[tokio::test]
async fn one_call_can_upload_a_thousand_packages() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let packages = packages(&server, &alice, 1_001);
    assert_eq!(available(&alice, upload(&packages[..1_000])).await, 1_000);
    alice
        .refused::<methods::UploadKeyPackage>(upload(&packages))
        .await
        .assert_field("more_packages");
    let refused = alice.refused::<methods::UploadKeyPackage>(one(&packages[1_000])).await;
    refused.assert(Status::RateLimited, "keys.too_many");
}

#[tokio::test]
async fn an_expired_or_oversized_package_is_refused() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let package = packages(&server, &alice, 1).remove(0);
    let padded = [&package[..], &vec![0; 64 << 10]].concat();
    assert_invalid(&alice, one(&padded.into()), "package").await;
    server.clock.advance(DAY * 85);
    let alice = alice.again().await;
    assert_invalid(&alice, one(&package), "package").await;
}

#[tokio::test]
async fn a_package_with_any_flipped_bit_is_refused() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let package = packages(&server, &alice, 1).remove(0);
    for byte in 0..package.len() {
        let mut bytes = package.to_vec();
        bytes[byte] ^= 1 << (byte % 8);
        assert_invalid(&alice, one(&bytes.into()), "package").await;
    }
    for end in [0, 4, package.len() / 2, package.len() - 1] {
        assert_invalid(&alice, one(&package.slice(..end)), "package").await;
    }
    assert_eq!(stock(&alice).await, (0, false));
}

#[test]
fn bytes_that_are_not_a_package_are_refused() {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let (_server, alice, package) = runtime.block_on(async {
        let server = Server::start().await;
        let alice = server.user("alice").await;
        let package = packages(&server, &alice, 1).remove(0);
        (server, alice, package)
    });
    let spliced = (any::<prop::sample::Index>(), prop::collection::vec(any::<u8>(), 1..64));
    proptest!(|(bytes in prop::collection::vec(any::<u8>(), 0..600), (at, noise) in spliced)| {
        runtime.block_on(async {
            assert_invalid(&alice, one(&bytes.into()), "package").await;
            let at = at.index(package.len());
            let edited = [&package[..at], &noise, &package[at..]].concat();
            assert_invalid(&alice, one(&edited.into()), "package").await;
            assert_eq!(stock(&alice).await, (0, false));
        });
    });
}

#[tokio::test]
async fn a_replacement_removes_the_earlier_packages_or_changes_nothing() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    let packages = packages(&server, &alice, 4);
    let replace =
        |packages: &[Bytes]| UploadKeyPackageRequest { replace: true, ..upload(packages) };
    assert_eq!(available(&alice, upload(&packages[..2])).await, 2);
    assert_eq!(available(&alice, replace(&packages[2..])).await, 2);
    assert_eq!(stock(&alice).await, (2, false));
    assert_eq!(take(&bob, &alice).await, Some((packages[2].clone(), false)));
    assert_invalid(&alice, replace(&packages[1..3]), "more_packages").await;
    let of_none = UploadKeyPackageRequest { replace: true, ..Default::default() };
    assert_invalid(&alice, of_none, "package").await;
    assert_eq!(take(&bob, &alice).await, Some((packages[3].clone(), false)));
}
