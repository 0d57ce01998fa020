//! Rules of [`crate::KeyPackages`] for accounts with devices.

use std::{collections::BTreeSet, sync::Arc};

use qpq_domain::{DeliveryLimits, KeyPackageLimits};
use tokio::task::JoinSet;

use super::{own, package, stock, taken, taken_last_resort};
use crate::{
    DevicePackage, DeviceRegistration, NewKeyPackage, PackageOwner, Upload, UploadMode,
    conformance::{
        Factory,
        bench::{Bench, NOW, RegisteredAccount, device_id},
    },
};

/// Creates the package with this number, signed by a device.
fn package_of(n: u8, device: u8) -> NewKeyPackage {
    NewKeyPackage { device: Some(device_id(device)), ..package(n) }
}

fn owned_by(owner: RegisteredAccount, device: u8) -> PackageOwner {
    PackageOwner { device: Some(device_id(device)), ..own(owner) }
}

impl Bench {
    async fn upload_as(
        &self,
        owner: PackageOwner,
        packages: Vec<NewKeyPackage>,
        mode: UploadMode,
    ) -> Upload {
        self.stores.key_packages.upload(owner, packages, mode, NOW).await.expect("upload")
    }

    /// Takes a package of each device. Returns the devices, and of each package the first byte and
    /// whether it is the last-resort one.
    async fn take_of_devices(&self, target: RegisteredAccount) -> Vec<(u8, Option<(u8, bool)>)> {
        let taken = self.stores.key_packages.take_of_devices(&target.identity, NOW).await;
        let entry = |entry: DevicePackage| {
            let package = entry.package.map(|taken| (taken.bytes[0], taken.last_resort));
            (entry.device.as_bytes()[0], package)
        };
        taken.expect("take").into_iter().map(entry).collect()
    }
}

pub async fn each_device_has_packages_of_its_own(factory: &dyn Factory) {
    let caps = KeyPackageLimits { max_count: 2, ..KeyPackageLimits::default() };
    let bench = Bench::with(factory, DeliveryLimits::default(), caps).await;
    let alice = bench.account(1).await;
    for n in [1, 2] {
        assert_eq!(bench.device(alice, n).await, DeviceRegistration::Registered);
    }
    let add = |owner, packages| bench.upload_as(owner, packages, UploadMode::Add);
    let both = vec![package_of(1, 1), package_of(2, 1)];
    assert_eq!(add(owned_by(alice, 1), both).await, stock(2, false));
    assert_eq!(add(owned_by(alice, 1), vec![package_of(3, 1)]).await, Upload::Full);
    let resort = NewKeyPackage { last_resort: true, ..package_of(4, 2) };
    assert_eq!(add(owned_by(alice, 2), vec![resort, package_of(5, 2)]).await, stock(1, true));
    // An upload returns the stock of its owner, here of the account itself.
    assert_eq!(add(own(alice), vec![]).await, stock(0, false));
    assert_eq!(bench.take(alice).await, taken(1), "the oldest of all devices");
    let keys = &bench.stores.key_packages;
    let left = keys.stock(owned_by(alice, 1), NOW).await.expect("stock");
    assert_eq!(Upload::Stored(left), stock(1, false));
    assert_eq!(bench.take(alice).await, taken(2));
    assert_eq!(bench.take(alice).await, taken(5));
    assert_eq!(bench.take(alice).await, taken_last_resort(4));
}

pub async fn one_call_takes_a_package_of_each_device(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let (alice, bob) = (bench.account(1).await, bench.account(2).await);
    assert_eq!(bench.take_of_devices(bob).await, [], "no devices");
    for n in [3, 1, 2] {
        bench.device(alice, n).await;
    }
    let add = |n, packages| bench.upload_as(owned_by(alice, n), packages, UploadMode::Add);
    add(1, vec![package_of(10, 1), package_of(11, 1)]).await;
    let resort = NewKeyPackage { last_resort: true, ..package_of(30, 3) };
    add(3, vec![resort, package_of(31, 3)]).await;
    let first = [(3, Some((31, false))), (1, Some((10, false))), (2, None)];
    assert_eq!(bench.take_of_devices(alice).await, first);
    let second = [(3, Some((30, true))), (1, Some((11, false))), (2, None)];
    assert_eq!(bench.take_of_devices(alice).await, second);
    let third = [(3, Some((30, true))), (1, None), (2, None)];
    assert_eq!(bench.take_of_devices(alice).await, third);
}

pub async fn concurrent_takes_of_devices_never_share_a_package(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    for n in [1, 2] {
        bench.device(alice, n).await;
        let packages = (0..20).map(|i| package_of(20 * n + i, n)).collect();
        bench.upload_as(owned_by(alice, n), packages, UploadMode::Add).await;
    }
    let mut tasks = JoinSet::new();
    for round in 0..20 {
        let keys = Arc::clone(&bench.stores.key_packages);
        tasks.spawn(async move {
            if round % 2 == 0 {
                let taken = keys.take(&alice.identity, NOW).await.expect("take");
                return vec![taken.expect("there are 40").bytes[0]];
            }
            let taken = keys.take_of_devices(&alice.identity, NOW).await.expect("take");
            taken.into_iter().map(|entry| entry.package.expect("20 each").bytes[0]).collect()
        });
    }
    let all: Vec<u8> = tasks.join_all().await.concat();
    assert_eq!(all.len(), 30);
    assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), 30, "{all:?}");
}

pub async fn a_replacement_removes_only_the_packages_of_its_device(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    for n in [1, 2] {
        bench.device(alice, n).await;
        let packages = vec![package_of(10 * n, n), package_of(10 * n + 1, n)];
        bench.upload_as(owned_by(alice, n), packages, UploadMode::Add).await;
    }
    let replaced =
        bench.upload_as(owned_by(alice, 1), vec![package_of(15, 1)], UploadMode::Replace).await;
    assert_eq!(replaced, stock(1, false));
    assert_eq!(
        bench.take_of_devices(alice).await,
        [(1, Some((15, false))), (2, Some((20, false)))]
    );
}

pub async fn a_device_without_a_key_has_the_packages_of_the_account(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    bench.upload(alice, vec![package(1), package(2)]).await;
    bench.device_without_key(alice, 7).await;
    bench.device(alice, 8).await;
    bench.upload_as(owned_by(alice, 7), vec![package(3)], UploadMode::Add).await;
    let taken = [(7, Some((1, false))), (8, None)];
    assert_eq!(bench.take_of_devices(alice).await, taken);
    bench.revoke(alice, 8).await;
    assert_eq!(bench.take_of_devices(alice).await, [(7, Some((2, false)))]);
    bench.revoke(alice, 7).await;
    assert_eq!(bench.take(alice).await, None, "its private keys are lost");
}

pub async fn a_revocation_removes_only_the_packages_of_its_device(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    bench.upload(alice, vec![package(1)]).await;
    for n in [1, 2] {
        bench.device(alice, n).await;
        bench.upload_as(owned_by(alice, n), vec![package_of(10 + n, n)], UploadMode::Add).await;
    }
    bench.revoke(alice, 1).await;
    assert_eq!(bench.take(alice).await, taken(1), "the account's own");
    assert_eq!(bench.take(alice).await, taken(12));
    assert_eq!(bench.take(alice).await, None);
}
