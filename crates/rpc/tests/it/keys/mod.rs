//! KeyPackages and hybrid keys, rule by rule.

mod fetch;
mod hybrid;
mod upload;

use bytes::Bytes;
use qpq_domain::Username;
use qpq_mls::{Client as MlsClient, Identity};
use qpq_ports::Clock as _;
use qpq_proto::{
    methods,
    v1::{self, UploadKeyPackageRequest},
};

use crate::harness::{Server, User};

/// The user's MLS client.
fn mls(user: &User) -> MlsClient {
    let name = Username::parse(&user.name).expect("a username");
    MlsClient::in_memory(Identity::from_seed(&user.signing.to_bytes()), name)
}

/// New packages of the user, each in an MLSMessage.
fn packages(server: &Server, user: &User, count: usize) -> Vec<Bytes> {
    mls(user)
        .key_packages(count, server.clock.now())
        .expect("packages")
        .into_iter()
        .map(Bytes::from)
        .collect()
}

/// A package that says of itself that it may be used more than once.
fn last_resort(server: &Server, user: &User) -> Bytes {
    mls(user).last_resort_key_package(server.clock.now()).expect("a package").into()
}

/// The package without the MLSMessage around it.
fn bare(package: &Bytes) -> Bytes {
    assert_eq!(package[..4], [0, 1, 0, 5]);
    package.slice(4..)
}

/// An upload of nothing but once-only packages.
fn upload(packages: &[Bytes]) -> UploadKeyPackageRequest {
    UploadKeyPackageRequest { more_packages: packages.to_vec(), ..Default::default() }
}

fn fetch_of(target: &User) -> v1::FetchKeyPackageRequest {
    v1::FetchKeyPackageRequest { identity_key: target.key(), ..Default::default() }
}

/// What `user` gets of `target`: the package, and whether it is the last-resort one. `None` where
/// nothing is left.
async fn take(user: &User, target: &User) -> Option<(Bytes, bool)> {
    let v1::FetchKeyPackageResponse { package, last_resort, .. } =
        user.ok::<methods::FetchKeyPackage>(fetch_of(target)).await;
    assert!(!package.is_empty() || !last_resort);
    (!package.is_empty()).then_some((package, last_resort))
}

/// How many once-only packages the user has, and whether a last-resort one.
async fn stock(user: &User) -> (u32, bool) {
    let stock = user.ok::<methods::CountKeyPackages>(v1::CountKeyPackagesRequest::default()).await;
    (stock.available, stock.has_last_resort)
}
