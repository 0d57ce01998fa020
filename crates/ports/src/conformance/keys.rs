//! Rules of [`crate::KeyPackages`] and [`crate::HybridKeys`].

mod devices;

use std::{collections::BTreeSet, sync::Arc};

use qpq_domain::{DeliveryLimits, IdentityKey, KeyPackageLimits, UnixMillis};
use tokio::task::JoinSet;

use super::{
    Factory,
    bench::{Bench, MINUTE, NOW, RegisteredAccount},
};
use crate::{HybridKey, NewKeyPackage, PackageOwner, Stock, TakenKeyPackage, Upload, UploadMode};

pub use self::devices::*;

/// Creates the package with this number, valid from an hour before [`NOW`] to an hour after.
fn package(n: u8) -> NewKeyPackage {
    NewKeyPackage {
        fingerprint: [n; 32],
        bytes: vec![n; 300],
        device: None,
        last_resort: false,
        not_before: NOW.minus(60 * MINUTE),
        not_after: NOW.plus(60 * MINUTE),
    }
}

fn last_resort(n: u8) -> NewKeyPackage {
    NewKeyPackage { last_resort: true, ..package(n) }
}

/// Returns the owner of the packages of the account itself.
fn own(owner: RegisteredAccount) -> PackageOwner {
    PackageOwner::account(owner.account)
}

fn hybrid(key: u8, signature: Option<u8>) -> HybridKey {
    HybridKey { key: vec![key; 1216], signature: signature.map(|n| [n; 64]) }
}

fn stock(available: u32, has_last_resort: bool) -> Upload {
    Upload::Stored(Stock { available, has_last_resort })
}

impl Bench {
    async fn replace(&self, owner: RegisteredAccount, packages: Vec<NewKeyPackage>) -> Upload {
        let keys = &self.stores.key_packages;
        keys.upload(own(owner), packages, UploadMode::Replace, NOW).await.expect("upload")
    }

    async fn upload(&self, owner: RegisteredAccount, packages: Vec<NewKeyPackage>) -> Upload {
        self.stores
            .key_packages
            .upload(own(owner), packages, UploadMode::Add, NOW)
            .await
            .expect("upload")
    }

    async fn take(&self, target: RegisteredAccount) -> Option<TakenKeyPackage> {
        self.take_at(target, NOW).await
    }

    async fn take_at(&self, target: RegisteredAccount, now: UnixMillis) -> Option<TakenKeyPackage> {
        self.stores.key_packages.take(&target.identity, now).await.expect("take")
    }

    async fn stock(&self, owner: RegisteredAccount) -> Upload {
        Upload::Stored(self.stores.key_packages.stock(own(owner), NOW).await.expect("stock"))
    }
}

fn taken(n: u8) -> Option<TakenKeyPackage> {
    Some(TakenKeyPackage { bytes: vec![n; 300], last_resort: false })
}

fn taken_last_resort(n: u8) -> Option<TakenKeyPackage> {
    Some(TakenKeyPackage { bytes: vec![n; 300], last_resort: true })
}

pub async fn packages_are_taken_oldest_first_and_once(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    assert_eq!(bench.stock(alice).await, stock(0, false));
    assert_eq!(bench.upload(alice, vec![package(3), package(1)]).await, stock(2, false));
    assert_eq!(bench.upload(alice, vec![package(2)]).await, stock(3, false));
    for n in [3, 1, 2] {
        assert_eq!(bench.take(alice).await, taken(n));
    }
    assert_eq!(bench.take(alice).await, None);
    assert_eq!(bench.stock(alice).await, stock(0, false));
    let nobody = RegisteredAccount { identity: IdentityKey::new([9; 32]), ..alice };
    assert_eq!(bench.take(nobody).await, None);
}

pub async fn concurrent_takes_never_share_a_package(factory: &dyn Factory) {
    const PACKAGES: u8 = 40;
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    let packages = (1..=PACKAGES).map(package).chain([last_resort(200)]).collect();
    assert_eq!(bench.upload(alice, packages).await, stock(PACKAGES.into(), true));
    let mut tasks = JoinSet::new();
    for _ in 0..64 {
        let keys = Arc::clone(&bench.stores.key_packages);
        tasks.spawn(async move {
            keys.take(&alice.identity, NOW).await.expect("take").expect("never dry")
        });
    }
    let (last, single): (Vec<_>, Vec<_>) =
        tasks.join_all().await.into_iter().partition(|taken| taken.last_resort);
    let distinct: BTreeSet<u8> = single.iter().map(|taken| taken.bytes[0]).collect();
    assert_eq!((single.len(), distinct), (PACKAGES.into(), (1..=PACKAGES).collect()));
    assert_eq!(last.len(), 64 - usize::from(PACKAGES));
    assert!(last.iter().all(|taken| taken.bytes == [200; 300]));
}

pub async fn the_last_resort_stays_and_is_replaced_by_a_newer_one(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    assert_eq!(bench.upload(alice, vec![last_resort(1), package(2)]).await, stock(1, true));
    assert_eq!(bench.take(alice).await, taken(2), "only when no other is left");
    for _ in 0..3 {
        assert_eq!(bench.take(alice).await, taken_last_resort(1));
    }
    assert_eq!(
        bench.upload(alice, vec![last_resort(1)]).await,
        stock(0, true),
        "it is there still"
    );
    assert_eq!(bench.upload(alice, vec![last_resort(3)]).await, stock(0, true));
    assert_eq!(bench.take(alice).await, taken_last_resort(3));
    assert_eq!(
        bench.upload(alice, vec![last_resort(1)]).await,
        Upload::Taken(0),
        "it was given out"
    );
    assert_eq!(bench.upload(alice, vec![last_resort(4), last_resort(5)]).await, stock(0, true));
    assert_eq!(bench.take(alice).await, taken_last_resort(5), "the newest counts");
}

pub async fn a_package_that_is_there_may_be_uploaded_again(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    bench.upload(alice, vec![package(1), package(2)]).await;
    let again = vec![package(2), package(1), package(3), package(3), last_resort(1)];
    assert_eq!(bench.upload(alice, again).await, stock(3, false));
    for n in [1, 2, 3] {
        assert_eq!(bench.take(alice).await, taken(n), "the order is that of the first upload");
    }
    assert_eq!(bench.take(alice).await, None);
}

pub async fn stored_packages_are_known_to_their_owner(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let (alice, bob) = (bench.account(1).await, bench.account(2).await);
    let known = async |owner: RegisteredAccount| {
        let known = bench.stores.key_packages.known(owner.account).await.expect("known");
        known.into_iter().map(|fingerprint| fingerprint[0]).collect::<BTreeSet<_>>()
    };
    assert_eq!(known(alice).await, BTreeSet::new());
    bench.upload(alice, vec![package(1), package(2), last_resort(3)]).await;
    assert_eq!(known(alice).await, [1, 2, 3].into());
    assert_eq!(bench.take(alice).await, taken(1));
    assert_eq!(known(alice).await, [2, 3].into(), "what was given out is not stored");
    assert_eq!(known(bob).await, BTreeSet::new());
}

pub async fn a_taken_package_cannot_be_uploaded_again(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    bench.upload(alice, vec![package(1)]).await;
    assert_eq!(bench.take(alice).await, taken(1));
    assert_eq!(bench.upload(alice, vec![package(1)]).await, Upload::Taken(0));
    assert_eq!(bench.upload(alice, vec![package(2), package(1)]).await, Upload::Taken(1));
    assert_eq!(bench.stock(alice).await, stock(0, false), "nothing was stored");
    let until = package(1).not_after;
    let keys = &bench.stores.key_packages;
    assert_eq!(
        keys.upload(own(alice), vec![package(1)], UploadMode::Add, until).await.expect("upload"),
        Upload::Taken(0)
    );
    let renewed = NewKeyPackage { not_after: until.plus(60 * MINUTE), ..package(1) };
    let after = until.plus(MINUTE);
    let upload =
        keys.upload(own(alice), vec![renewed], UploadMode::Add, after).await.expect("upload");
    assert_eq!(upload, stock(1, false), "its lifetime had ended, so it is forgotten");
}

pub async fn an_upload_is_stored_whole_or_not_at_all(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    bench.upload(alice, vec![package(1), last_resort(2)]).await;
    assert_eq!(bench.take(alice).await, taken(1));
    let upload = vec![package(3), last_resort(4), package(1), package(5)];
    assert_eq!(bench.upload(alice, upload).await, Upload::Taken(2));
    assert_eq!(bench.stock(alice).await, stock(0, true));
    assert_eq!(bench.take(alice).await, taken_last_resort(2), "the old one is still in its place");
}

pub async fn an_owner_has_no_more_than_the_cap(factory: &dyn Factory) {
    let caps = KeyPackageLimits { max_count: 3, ..KeyPackageLimits::default() };
    let bench = Bench::with(factory, DeliveryLimits::default(), caps).await;
    let alice = bench.account(1).await;
    assert_eq!(bench.upload(alice, (1..=4).map(package).collect()).await, Upload::Full);
    assert_eq!(bench.stock(alice).await, stock(0, false), "nothing was stored");
    assert_eq!(
        bench.upload(alice, vec![package(1), package(2), last_resort(3)]).await,
        stock(2, true)
    );
    assert_eq!(bench.upload(alice, vec![package(4)]).await, Upload::Full, "the last resort counts");
    assert_eq!(
        bench.upload(alice, vec![last_resort(5), package(1)]).await,
        stock(2, true),
        "it is replaced"
    );
    assert_eq!(bench.take(alice).await, taken(1));
    assert_eq!(bench.upload(alice, vec![package(4)]).await, stock(2, true));
    let later = package(1).not_after.plus(MINUTE);
    let fresh = |n| NewKeyPackage { not_after: later.plus(MINUTE), ..package(n) };
    let upload = bench
        .stores
        .key_packages
        .upload(own(alice), vec![fresh(6), fresh(7), fresh(8)], UploadMode::Add, later)
        .await;
    assert_eq!(upload.expect("upload"), stock(3, false), "what has expired does not count");
}

pub async fn an_expired_package_is_not_taken(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    let brief = |n| NewKeyPackage { not_after: NOW.plus(MINUTE), ..package(n) };
    let brief_last = NewKeyPackage { last_resort: true, ..brief(3) };
    bench.upload(alice, vec![brief(1), package(2), brief_last]).await;
    let after = NOW.plus(2 * MINUTE);
    let left = bench.stores.key_packages.stock(own(alice), after).await.expect("stock");
    assert_eq!(left, Stock { available: 1, has_last_resort: false });
    assert_eq!(bench.take_at(alice, after).await, taken(2));
    assert_eq!(bench.take_at(alice, after).await, None);
    assert_eq!(bench.take_at(alice, NOW.plus(MINUTE)).await, taken(1), "its last instant counts");
}

pub async fn a_package_that_has_not_begun_is_neither_counted_nor_taken(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    let later = |package: NewKeyPackage| NewKeyPackage { not_before: NOW.plus(MINUTE), ..package };
    let packages = vec![later(package(1)), package(2), later(last_resort(3))];
    assert_eq!(bench.upload(alice, packages).await, stock(1, false));
    assert_eq!(bench.stock(alice).await, stock(1, false));
    assert_eq!(bench.take(alice).await, taken(2), "it is the oldest that has begun");
    assert_eq!(bench.take(alice).await, None);
    let begun = NOW.plus(MINUTE);
    let left = bench.stores.key_packages.stock(own(alice), begun).await.expect("stock");
    assert_eq!(left, Stock { available: 1, has_last_resort: true });
    assert_eq!(bench.take_at(alice, begun).await, taken(1), "its first instant counts");
    assert_eq!(bench.take_at(alice, begun).await, taken_last_resort(3));
}

pub async fn a_replacement_removes_what_is_stored(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    let (alice, bob) = (bench.account(1).await, bench.account(2).await);
    bench.upload(bob, vec![package(1)]).await;
    bench.upload(alice, vec![package(1), package(2), last_resort(3)]).await;
    assert_eq!(bench.replace(alice, vec![package(5), package(2)]).await, stock(2, false));
    bench.crash().await;
    assert_eq!(bench.stock(alice).await, stock(2, false), "the last resort is removed, too");
    assert_eq!(
        bench.upload(alice, vec![package(1)]).await,
        stock(3, false),
        "it was not given out"
    );
    for n in [5, 2, 1] {
        assert_eq!(bench.take(alice).await, taken(n), "the order is that of the new upload");
    }
    assert_eq!(bench.replace(alice, vec![last_resort(6)]).await, stock(0, true));
    assert_eq!(bench.replace(alice, vec![package(7), last_resort(8)]).await, stock(1, true));
    assert_eq!(bench.take(alice).await, taken(7));
    assert_eq!(bench.take(alice).await, taken_last_resort(8));
    assert_eq!(bench.replace(alice, vec![]).await, stock(0, false), "nothing takes their place");
    assert_eq!(bench.take(alice).await, None);
    assert_eq!(bench.take(bob).await, taken(1), "others keep theirs");
}

pub async fn a_replacement_that_is_refused_removes_nothing(factory: &dyn Factory) {
    let caps = KeyPackageLimits { max_count: 3, ..KeyPackageLimits::default() };
    let bench = Bench::with(factory, DeliveryLimits::default(), caps).await;
    let alice = bench.account(1).await;
    bench.upload(alice, vec![package(1), package(2), last_resort(3)]).await;
    assert_eq!(bench.take(alice).await, taken(1));
    assert_eq!(bench.replace(alice, vec![package(4), package(1)]).await, Upload::Taken(1));
    assert_eq!(bench.replace(alice, (5..=8).map(package).collect()).await, Upload::Full);
    assert_eq!(bench.stock(alice).await, stock(1, true));
    assert_eq!(bench.take(alice).await, taken(2));
    assert_eq!(bench.take(alice).await, taken_last_resort(3));
    // A package that was taken is refused, although the replacement would remove it first.
    assert_eq!(bench.replace(alice, vec![last_resort(3)]).await, Upload::Taken(0));
    assert_eq!(bench.take(alice).await, taken_last_resort(3));
}

pub async fn a_replacement_makes_room_for_itself(factory: &dyn Factory) {
    let caps = KeyPackageLimits { max_count: 2, ..KeyPackageLimits::default() };
    let bench = Bench::with(factory, DeliveryLimits::default(), caps).await;
    let alice = bench.account(1).await;
    assert_eq!(bench.upload(alice, vec![package(1), last_resort(2)]).await, stock(1, true));
    assert_eq!(bench.replace(alice, vec![package(3), package(4)]).await, stock(2, false));
    assert_eq!(bench.upload(alice, vec![package(5)]).await, Upload::Full);
}

/// At any time a take returns a package from before or after the replacement.
pub async fn a_replaced_stock_never_runs_dry(factory: &dyn Factory) {
    const ROUNDS: u8 = 20;
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    let batch = |n: u8| (0..8).map(|i| package(1 + 8 * n + i)).collect::<Vec<_>>();
    bench.upload(alice, batch(0)).await;
    for n in 1..=ROUNDS {
        let keys = Arc::clone(&bench.stores.key_packages);
        let taking = tokio::spawn(async move {
            let mut taken = Vec::new();
            for _ in 0..4 {
                let package = keys.take(&alice.identity, NOW).await.expect("take");
                taken.push(package.expect("there are some at any moment").bytes[0]);
            }
            taken
        });
        assert!(matches!(bench.replace(alice, batch(n)).await, Upload::Stored(_)));
        let taken = taking.await.expect("no panic");
        let distinct: BTreeSet<u8> = taken.iter().copied().collect();
        assert_eq!(distinct.len(), 4, "{taken:?}");
    }
}

pub async fn owners_do_not_share_anything(factory: &dyn Factory) {
    let caps = KeyPackageLimits { max_count: 2, ..KeyPackageLimits::default() };
    let bench = Bench::with(factory, DeliveryLimits::default(), caps).await;
    let (alice, bob) = (bench.account(1).await, bench.account(2).await);
    assert_eq!(bench.upload(alice, vec![package(1), last_resort(2)]).await, stock(1, true));
    assert_eq!(bench.take(alice).await, taken(1));
    assert_eq!(bench.upload(bob, vec![package(1), last_resort(2)]).await, stock(1, true));
    assert_eq!(bench.take(alice).await, taken_last_resort(2));
    assert_eq!(bench.take(bob).await, taken(1));
}

pub async fn taken_packages_stay_taken_after_a_crash(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    bench.upload(alice, vec![package(1), package(2), last_resort(3)]).await;
    assert_eq!(bench.take(alice).await, taken(1));
    bench.crash().await;
    assert_eq!(bench.upload(alice, vec![package(1)]).await, Upload::Taken(0));
    assert_eq!(bench.take(alice).await, taken(2));
    assert_eq!(bench.take(alice).await, taken_last_resort(3));
}

pub async fn hybrid_keys_are_returned_in_the_requested_order(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    let (alice, bob, carol) =
        (bench.account(1).await, bench.account(2).await, bench.account(3).await);
    let nobody = IdentityKey::new([9; 32]);
    let keys = Arc::clone(&bench.stores.hybrid_keys);
    keys.put(alice.account, hybrid(1, None)).await.expect("put");
    keys.put(carol.account, hybrid(3, Some(5))).await.expect("put");
    keys.put(carol.account, hybrid(4, Some(6))).await.expect("it replaces the old one");
    drop(keys);
    bench.crash().await;
    let asked = [carol.identity, nobody, bob.identity, alice.identity, carol.identity];
    let found = bench.stores.hybrid_keys.get(&asked).await.expect("get");
    let carols = Some(hybrid(4, Some(6)));
    assert_eq!(found, [carols.clone(), None, None, Some(hybrid(1, None)), carols]);
    assert_eq!(
        bench.stores.hybrid_keys.get(&[]).await.expect("get"),
        Vec::<Option<HybridKey>>::new()
    );
}
