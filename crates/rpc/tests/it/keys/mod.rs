//! KeyPackages and hybrid keys.

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

/// Returns the account's MLS client.
fn mls(user: &User) -> MlsClient {
    let name = Username::parse(&user.name).expect("a username");
    MlsClient::in_memory(Identity::from_seed(&user.signing.to_bytes()), name)
}

/// Returns new packages of the account, each in an MLSMessage.
fn packages(server: &Server, user: &User, count: usize) -> Vec<Bytes> {
    mls(user)
        .key_packages(count, server.clock.now())
        .expect("packages")
        .into_iter()
        .map(Bytes::from)
        .collect()
}

/// Returns a package with the last-resort extension.
fn last_resort(server: &Server, user: &User) -> Bytes {
    mls(user).last_resort_key_package(server.clock.now()).expect("a package").into()
}

/// Returns the package without its MLSMessage.
fn bare(package: &Bytes) -> Bytes {
    assert_eq!(package[..4], [0, 1, 0, 5]);
    package.slice(4..)
}

/// Returns an upload of single-use packages.
fn upload(packages: &[Bytes]) -> UploadKeyPackageRequest {
    UploadKeyPackageRequest { more_packages: packages.to_vec(), ..Default::default() }
}

fn fetch_of(target: &User) -> v1::FetchKeyPackageRequest {
    v1::FetchKeyPackageRequest { identity_key: target.key(), ..Default::default() }
}

/// Fetches a package of `target`. Returns the package and whether it is the last-resort one, or
/// `None` if there is none.
async fn take(user: &User, target: &User) -> Option<(Bytes, bool)> {
    let v1::FetchKeyPackageResponse { package, last_resort, .. } =
        user.ok::<methods::FetchKeyPackage>(fetch_of(target)).await;
    assert!(!package.is_empty() || !last_resort);
    (!package.is_empty()).then_some((package, last_resort))
}

/// Returns the number of single-use packages, and whether there is a last-resort one.
async fn stock(user: &User) -> (u32, bool) {
    let stock = user.ok::<methods::CountKeyPackages>(v1::CountKeyPackagesRequest::default()).await;
    (stock.available, stock.has_last_resort)
}
