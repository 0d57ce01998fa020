//! Each change of the store's history in the chaos run, alone and with a few thousand messages.
//! Messages that were acknowledged in a history that the store still has are delivered, while
//! traffic continues.

use qpq_test_services::history::Report;
use qpq_tests::{
    cluster::{Cluster, Plan},
    store_change::{Change, StoreHistory},
    traffic::{self, Traffic},
};

const MESSAGES: u64 = 3_000;
/// The number of messages before the change.
const BEFORE: u64 = 600;
/// The number of messages between the copy of the store and the end of its history.
const LAG: u64 = 300;

/// Changes the store's history during traffic. Returns the checked report.
async fn traffic_with(change: Change) -> Report {
    let cluster = Cluster::start(Plan { edges: 2, ..Plan::default() }).await.expect("a cluster");
    let load = traffic::Plan { messages: MESSAGES, seed: 0x7, ..traffic::Plan::default() };
    let traffic = Traffic::start(&cluster, load).await.expect("traffic");
    let mut store = StoreHistory::of(&cluster).await.expect("a store id");
    traffic.acknowledged(BEFORE).await;
    store.change(change, &cluster, &traffic, LAG).await.expect("a new history");
    let report = traffic.finish(&cluster).await.expect("an end of the traffic").report;
    report.assert_clean();
    assert!(report.acknowledged as u64 >= MESSAGES, "{report}");
    report
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failover_to_a_synchronous_standby_loses_nothing_under_traffic() {
    let report = traffic_with(Change::FailOver).await;
    assert_eq!((report.histories, report.rolled_back), (2, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failover_to_a_lagging_standby_loses_only_messages_from_before_it() {
    let report = traffic_with(Change::FailOverToLagging).await;
    assert_eq!(report.histories, 2);
    assert!(report.rolled_back > 0, "the standby did not lag: {report}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recovery_loses_only_messages_from_before_it() {
    let report = traffic_with(Change::Recover).await;
    assert_eq!(report.histories, 3);
    assert!(report.rolled_back > 0, "nothing was rolled back: {report}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_copy_from_before_a_failover_loses_only_messages_from_before_it() {
    let report = traffic_with(Change::RestoreCopy).await;
    assert_eq!(report.histories, 3);
    assert!(report.rolled_back > 0, "nothing was rolled back: {report}");
}
