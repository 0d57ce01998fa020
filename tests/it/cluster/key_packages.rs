//! A KeyPackage is issued once, also if it is claimed at several edges concurrently, and the
//! last-resort package is always available.

use std::{
    collections::{BTreeSet, HashSet},
    sync::Arc,
};

use bytes::Bytes;
use qpq_domain::Username;
use qpq_ports::{Clock as _, SystemClock};
use qpq_proto::{
    methods::{CountKeyPackages, FetchKeyPackage, UploadKeyPackage},
    v1,
};
use qpq_tests::{
    accounts::Account,
    cluster::{Cluster, Plan},
    roaming::Roamer,
};
use tokio::{sync::Barrier, task::JoinSet};

const CLAIMS: usize = 64;
const EDGES: usize = 3;

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_claims_issue_each_key_package_once() {
    let cluster = Cluster::start(Plan { edges: EDGES, ..Plan::default() }).await.unwrap();
    let entry_points = cluster.entry_points();
    let accounts = cluster.accounts(9).await.unwrap();
    let (owner, claimers) = accounts.split_first().unwrap();
    let mut roamer = Roamer::at(&entry_points, 0);
    let mut mls = client_of(owner);
    // Stocks with fewer packages than claims, as many as claims, more, and none.
    for stock in [40, CLAIMS, CLAIMS + 10, 0] {
        let now = SystemClock.now();
        let packages: Vec<Bytes> =
            mls.key_packages(stock, now).unwrap().into_iter().map(Bytes::from).collect();
        let last_resort = Bytes::from(mls.last_resort_key_package(now).unwrap());
        let request = v1::UploadKeyPackageRequest {
            package: last_resort.clone(),
            last_resort: true,
            more_packages: packages.clone(),
            ..Default::default()
        };
        let uploaded = roamer.must::<UploadKeyPackage>(&request, Some(&owner.token)).await;
        assert_eq!(uploaded.available as usize, stock);

        let barrier = Arc::new(Barrier::new(CLAIMS));
        let mut claims = JoinSet::new();
        for claim in 0..CLAIMS {
            let (mut roamer, barrier) =
                (Roamer::at(&entry_points, claim % EDGES), Arc::clone(&barrier));
            let (token, target) =
                (claimers[claim % claimers.len()].token.clone(), owner.identity.clone());
            claims.spawn(async move {
                roamer.connected().await;
                barrier.wait().await;
                let request =
                    v1::FetchKeyPackageRequest { identity_key: target, ..Default::default() };
                roamer.must::<FetchKeyPackage>(&request, Some(&token)).await
            });
        }
        let claimed = claims.join_all().await;
        let (last, own): (Vec<_>, Vec<_>) =
            claimed.into_iter().partition(|claim| claim.last_resort);
        assert!(
            last.iter().all(|claim| claim.package == last_resort),
            "of {stock}: another last resort"
        );
        let distinct: HashSet<&Bytes> = own.iter().map(|claim| &claim.package).collect();
        assert_eq!(distinct.len(), own.len(), "of {stock}: a package was issued twice");
        assert_eq!(own.len(), stock.min(CLAIMS), "of {stock}: the number of issued packages");
        // The oldest are issued first.
        let given: BTreeSet<usize> = own
            .iter()
            .map(|claim| packages.iter().position(|p| *p == claim.package).unwrap())
            .collect();
        assert!(given.into_iter().eq(0..stock.min(CLAIMS)), "of {stock}: not the oldest ones");

        let left = roamer.must::<CountKeyPackages>(&Default::default(), Some(&owner.token)).await;
        assert_eq!(
            (left.available as usize, left.has_last_resort),
            (stock.saturating_sub(CLAIMS), true)
        );
        for _ in 0..left.available {
            let request = v1::FetchKeyPackageRequest {
                identity_key: owner.identity.clone(),
                ..Default::default()
            };
            let claim = roamer.must::<FetchKeyPackage>(&request, Some(&claimers[0].token)).await;
            assert!(!claim.last_resort && !distinct.contains(&claim.package));
        }
    }
}

pub(super) fn client_of(account: &Account) -> qpq_mls::Client {
    let username = Username::parse(&account.username).expect("it is registered");
    qpq_mls::Client::in_memory(qpq_mls::Identity::from_seed(&account.seed), username)
}
