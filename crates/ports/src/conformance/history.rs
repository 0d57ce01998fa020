//! Rules of the store id: [`crate::Maintenance::begin_history`], and the leases, acks and
//! KeyPackages of earlier histories.

use qpq_domain::{AccountId, Seq, UnixMillis};

use super::{
    Factory,
    bench::{Bench, EVERYTHING, MINUTE, NOW, all, message, seqs},
};
use crate::{Ack, NewKeyPackage, OldSessions, PackageOwner, Stock, Stores, Upload, UploadMode};

pub async fn every_page_has_the_id_and_a_crash_keeps_it(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    let id = bench.stores.maintenance.store_id();
    assert_eq!(bench.peek(all(alice)).await.store_id, id, "empty as it is");
    bench.deliver(message(alice, alice, "one")).await;
    assert_eq!(bench.peek(all(alice)).await.store_id, id);
    assert_eq!(bench.lease(all(alice), EVERYTHING).await.page().store_id, id);
    bench.crash().await;
    assert_eq!(bench.stores.maintenance.store_id(), id);
    assert_eq!(bench.peek(all(alice)).await.store_id, id);
}

pub async fn another_history_has_another_id_permanently(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    bench.deliver(message(alice, alice, "one")).await;
    let first = bench.peek(all(alice)).await.store_id;
    let second =
        bench.stores.maintenance.begin_history(OldSessions::Keep).await.expect("begun").store_id;
    let third = bench
        .stores
        .maintenance
        .begin_history(OldSessions::Keep)
        .await
        .expect("and again")
        .store_id;
    assert!(first != second && second != third && third != first);
    let page = bench.peek(all(alice)).await;
    assert_eq!((page.store_id, seqs(&page)), (third, vec![1]), "messages stay as they are");
    assert_eq!(bench.stores.maintenance.store_id(), third);
    bench.crash().await;
    assert_eq!(bench.peek(all(alice)).await.store_id, third);
}

pub async fn a_lease_of_another_history_removes_nothing(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    bench.deliver_all(alice, alice, &["one", "two"]).await;
    let lease = bench.lease(all(alice), EVERYTHING).await;
    bench.stores.maintenance.begin_history(OldSessions::Keep).await.expect("begun");
    lease.complete(NOW).await.expect("it is not a failure");
    let lease = bench.lease(all(alice), EVERYTHING).await;
    assert_eq!(seqs(lease.page()), [1, 2]);
    lease.complete(NOW).await.expect("completed");
    assert_eq!(bench.peek(all(alice)).await, bench.nothing());
}

pub async fn an_ack_that_names_another_history_removes_nothing(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    bench.deliver_all(alice, alice, &["one", "two", "three"]).await;
    let first = bench.peek(all(alice)).await.store_id;
    let ack = |store_id| Ack { up_to: Some(Seq(1)), seqs: vec![Seq(3)], store_id: Some(store_id) };
    let inboxes = &bench.stores.inboxes;
    let second =
        bench.stores.maintenance.begin_history(OldSessions::Keep).await.expect("begun").store_id;
    assert_eq!(inboxes.ack(all(alice), ack(first), NOW).await.expect("ack"), 0);
    assert_eq!(seqs(&bench.peek(all(alice)).await), [1, 2, 3]);
    assert_eq!(inboxes.ack(all(alice), ack(second), NOW).await.expect("ack"), 2);
    assert_eq!(seqs(&bench.peek(all(alice)).await), [2]);
}

fn package(n: u8, last_resort: bool) -> NewKeyPackage {
    NewKeyPackage {
        fingerprint: [n; 32],
        bytes: vec![n; 300],
        device: None,
        last_resort,
        not_before: NOW,
        not_after: NOW.plus(60 * MINUTE),
    }
}

async fn upload(stores: &Stores, owner: AccountId, n: u8, now: UnixMillis) -> Upload {
    let packages = vec![package(n, false)];
    stores
        .key_packages
        .upload(PackageOwner::account(owner), packages, UploadMode::Add, now)
        .await
        .expect("upload")
}

/// Any one-time package may have been taken between the copy and its restoration.
pub async fn another_history_has_no_earlier_one_time_packages(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let (alice, bob) = (bench.account(1).await, bench.account(2).await);
    let keys = &bench.stores.key_packages;
    for (owner, n) in [(alice, 1), (bob, 11)] {
        let packages = vec![package(n, false), package(n + 1, false), package(n + 2, true)];
        keys.upload(PackageOwner::account(owner.account), packages, UploadMode::Add, NOW)
            .await
            .expect("upload");
    }
    let new = bench.stores.maintenance.begin_history(OldSessions::Keep).await.expect("begun");
    assert_eq!(new.removed_packages, 4);
    for (owner, n) in [(alice, 1), (bob, 11)] {
        let left = keys.stock(PackageOwner::account(owner.account), NOW).await.expect("stock");
        assert_eq!(left, Stock { available: 0, has_last_resort: true });
        let taken = keys.take(&owner.identity, NOW).await.expect("take").expect("the last resort");
        assert_eq!((taken.bytes[0], taken.last_resort), (n + 2, true));
        assert_eq!(upload(&bench.stores, owner.account, n, NOW).await, Upload::Taken(0));
        let fresh = upload(&bench.stores, owner.account, n + 3, NOW).await;
        assert_eq!(fresh, Upload::Stored(Stock { available: 1, has_last_resort: true }));
    }
    let new = bench.stores.maintenance.begin_history(OldSessions::Keep).await.expect("and again");
    assert_eq!(new.removed_packages, 2);
}
