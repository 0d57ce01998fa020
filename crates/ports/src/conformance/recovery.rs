//! Rules of [`crate::RecoveryBundles`].

use std::time::Duration;

use super::{
    Factory,
    bench::{Bench, MINUTE, NOW, RegisteredAccount},
};
use crate::{
    AtRestKeyId, BundleFetch, BundlePut, BundleState, FETCH_DAY, NewBundle, StoredBundle, Stores,
};

const PER_DAY: u32 = 10;

fn bundle(of: RegisteredAccount, replaces: u64, n: u8) -> NewBundle {
    let key = AtRestKeyId([n % 3; 8]);
    let now = NOW.plus(MINUTE * n.into());
    NewBundle { account: of.account, replaces, sealed: vec![n; 500], key, now }
}

async fn put(stores: &Stores, bundle: NewBundle) -> BundlePut {
    stores.recovery_bundles.put(bundle).await.expect("put")
}

async fn find(stores: &Stores, of: RegisteredAccount) -> BundleState {
    stores.recovery_bundles.find(of.account).await.expect("find")
}

async fn fetch(stores: &Stores, of: RegisteredAccount, after: Duration) -> BundleFetch {
    let now = NOW.plus(after);
    stores.recovery_bundles.fetch(of.account, now, PER_DAY).await.expect("fetch")
}

/// Returns the state in which the bundle with this number has this version.
fn stored(version: u64, n: u8) -> StoredBundle {
    StoredBundle { version, sealed: vec![n; 500], stored_at: NOW.plus(MINUTE * n.into()) }
}

pub async fn a_bundle_is_returned_as_it_was_stored_and_its_version_rises(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    let (alice, bob) = (bench.account(1).await, bench.account(2).await);
    assert_eq!(find(&bench.stores, alice).await, BundleState::default());
    assert_eq!(fetch(&bench.stores, alice, MINUTE).await, BundleFetch::Absent(0));
    for n in 1..=3 {
        let replaces = u64::from(n) - 1;
        assert_eq!(put(&bench.stores, bundle(alice, replaces, n)).await, BundlePut::Stored);
        let expected = stored(n.into(), n);
        let state = BundleState { version: n.into(), bundle: Some(expected.clone()) };
        assert_eq!(find(&bench.stores, alice).await, state);
        assert_eq!(fetch(&bench.stores, alice, MINUTE).await, BundleFetch::Found(expected));
    }
    bench.crash().await;
    assert_eq!(fetch(&bench.stores, alice, MINUTE).await, BundleFetch::Found(stored(3, 3)));
    assert_eq!(find(&bench.stores, bob).await, BundleState::default());
}

pub async fn a_bundle_is_stored_only_over_the_version_that_it_replaces(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    assert_eq!(put(&bench.stores, bundle(alice, 1, 1)).await, BundlePut::OtherVersion);
    assert_eq!(put(&bench.stores, bundle(alice, 0, 1)).await, BundlePut::Stored);
    assert_eq!(put(&bench.stores, bundle(alice, 0, 1)).await, BundlePut::Stored, "a repeat");
    assert_eq!(put(&bench.stores, bundle(alice, 1, 2)).await, BundlePut::Stored);
    assert_eq!(put(&bench.stores, bundle(alice, 1, 2)).await, BundlePut::Stored, "a repeat");
    for (replaces, n) in [(0, 1), (0, 3), (1, 3), (3, 3)] {
        let stale = put(&bench.stores, bundle(alice, replaces, n)).await;
        assert_eq!(stale, BundlePut::OtherVersion, "{replaces}");
    }
    let state = BundleState { version: 2, bundle: Some(stored(2, 2)) };
    assert_eq!(find(&bench.stores, alice).await, state);
}

pub async fn of_concurrent_bundles_for_one_version_one_wins(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    for version in 0..5_u64 {
        let puts: Vec<_> = (0..8_u8)
            .map(|n| {
                let stores = bench.stores.clone();
                let bundle = bundle(alice, version, n);
                tokio::spawn(async move { (n, put(&stores, bundle).await) })
            })
            .collect();
        let mut winners = Vec::new();
        for put in puts {
            let (n, outcome) = put.await.expect("no panic");
            if outcome == BundlePut::Stored {
                winners.push(n);
            }
        }
        let [winner] = winners[..] else { panic!("one wins: {winners:?}") };
        let found = find(&bench.stores, alice).await;
        assert_eq!(found.bundle, Some(stored(version + 1, winner)));
    }
}

pub async fn a_removed_bundle_is_absent_and_its_version_rises(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    let (alice, bob) = (bench.account(1).await, bench.account(2).await);
    for owner in [alice, bob] {
        assert_eq!(put(&bench.stores, bundle(owner, 0, 1)).await, BundlePut::Stored);
    }
    let remove = async |stores: &Stores| {
        stores.recovery_bundles.remove(alice.account).await.expect("remove")
    };
    assert!(remove(&bench.stores).await);
    assert!(!remove(&bench.stores).await, "a repeat");
    for crashed in [false, true] {
        if crashed {
            bench.crash().await;
        }
        let state = BundleState { version: 2, bundle: None };
        assert_eq!(find(&bench.stores, alice).await, state);
        assert_eq!(fetch(&bench.stores, alice, MINUTE).await, BundleFetch::Absent(2));
    }
    assert_eq!(put(&bench.stores, bundle(alice, 1, 2)).await, BundlePut::OtherVersion);
    assert_eq!(put(&bench.stores, bundle(alice, 2, 2)).await, BundlePut::Stored);
    assert_eq!(find(&bench.stores, alice).await.bundle, Some(stored(3, 2)));
    assert_eq!(find(&bench.stores, bob).await.bundle, Some(stored(1, 1)));
}

pub async fn fetches_are_limited_for_a_day_also_after_a_crash_and_a_new_bundle(
    factory: &dyn Factory,
) {
    let mut bench = Bench::new(factory).await;
    let (alice, bob) = (bench.account(1).await, bench.account(2).await);
    for owner in [alice, bob] {
        put(&bench.stores, bundle(owner, 0, 1)).await;
    }
    for n in 0..PER_DAY {
        let fetched = fetch(&bench.stores, alice, MINUTE * n).await;
        assert_eq!(fetched, BundleFetch::Found(stored(1, 1)), "fetch {n}");
    }
    let limited = BundleFetch::Limited(FETCH_DAY - 10 * MINUTE);
    assert_eq!(fetch(&bench.stores, alice, 10 * MINUTE).await, limited);
    bench.crash().await;
    bench.stores.recovery_bundles.remove(alice.account).await.expect("remove");
    put(&bench.stores, bundle(alice, 2, 2)).await;
    assert_eq!(fetch(&bench.stores, alice, 10 * MINUTE).await, limited);
    assert_eq!(fetch(&bench.stores, bob, 10 * MINUTE).await, BundleFetch::Found(stored(1, 1)));
    let last = FETCH_DAY - Duration::from_millis(1);
    let wait = BundleFetch::Limited(Duration::from_millis(1));
    assert_eq!(fetch(&bench.stores, alice, last).await, wait);
    let found = BundleFetch::Found(stored(3, 2));
    for _ in 0..PER_DAY {
        assert_eq!(fetch(&bench.stores, alice, FETCH_DAY).await, found);
    }
    assert_eq!(fetch(&bench.stores, alice, FETCH_DAY).await, BundleFetch::Limited(FETCH_DAY));
}

pub async fn concurrent_fetches_exceed_no_limit(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    put(&bench.stores, bundle(alice, 0, 1)).await;
    let fetches: Vec<_> = (0..30)
        .map(|_| {
            let stores = bench.stores.clone();
            tokio::spawn(async move { fetch(&stores, alice, MINUTE).await })
        })
        .collect();
    let mut found = 0;
    for fetched in fetches {
        found += u32::from(matches!(fetched.await.expect("no panic"), BundleFetch::Found(_)));
    }
    assert_eq!(found, PER_DAY);
}

pub async fn a_count_that_begins_far_in_the_future_is_discarded(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    put(&bench.stores, bundle(alice, 0, 1)).await;
    for _ in 0..PER_DAY {
        fetch(&bench.stores, alice, FETCH_DAY * 400).await;
    }
    let found = BundleFetch::Found(stored(1, 1));
    assert_eq!(fetch(&bench.stores, alice, MINUTE).await, found);
}

pub async fn the_keys_of_bundles_are_listed_once_in_order(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let bundles = &bench.stores.recovery_bundles;
    assert_eq!(bundles.next_key(None).await.expect("read"), None);
    let mut owners = Vec::new();
    for n in 1..=6 {
        owners.push(bench.account(n).await);
        put(&bench.stores, bundle(owners[usize::from(n) - 1], 0, n)).await;
    }
    let mut keys = Vec::new();
    while let Some(key) = bundles.next_key(keys.last().copied()).await.expect("read") {
        keys.push(key);
    }
    assert_eq!(keys, [0, 1, 2].map(|n| AtRestKeyId([n; 8])));
    // Numbers 3 and 6 have key 0.
    for owner in [owners[2], owners[5]] {
        bundles.remove(owner.account).await.expect("remove");
    }
    assert_eq!(bundles.next_key(None).await.expect("read"), Some(AtRestKeyId([1; 8])));
}
