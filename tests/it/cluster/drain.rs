//! *Lossless drain*: all edges are restarted one after the other, twice, by SIGTERM and under load.
//! No call fails but by the words "try again" or by the close that ends a drain, and nothing that
//! was acknowledged is lost.

use qpq_tests::{
    cluster::{Cluster, Place, Plan},
    traffic::{self, Temper, Traffic},
};

const EDGES: usize = 3;
const ROUNDS: u64 = 2;
/// Messages acknowledged between two restarts.
const BETWEEN: u64 = 600;

#[tokio::test(flavor = "multi_thread")]
async fn lossless_drain() {
    // Under load that never pauses a drain lasts as long as it may.
    let plan = Plan { edges: EDGES, place: Place::Apart, ..Plan::default() }
        .with("QPQ_DRAIN__TIMEOUT", "8s");
    let cluster = Cluster::start(plan).await.unwrap();
    let load = traffic::Plan {
        // They end after the last restart.
        messages: u64::MAX,
        batches: 1,
        temper: Temper::Patient,
        seed: 0xd7a1,
        ..traffic::Plan::default()
    };
    let traffic = Traffic::start(&cluster, load).await.unwrap();
    let mut next = 0;
    for _ in 0..ROUNDS {
        for edge in 0..EDGES {
            next += BETWEEN;
            traffic.acknowledged(next).await;
            cluster.drain_edge(edge).await.unwrap();
            cluster.start_edge(edge).await.unwrap();
        }
    }
    traffic.acknowledged(next + BETWEEN).await;
    traffic.enough();
    let summary = traffic.finish(&cluster).await.unwrap();
    println!(
        "{}{} calls, {} told to try again, {} closed by a drain",
        summary.report, summary.calls, summary.refused, summary.drained
    );
    summary.report.assert_clean();
    assert_eq!(summary.lost, 0, "calls that no drain accounts for");
}
