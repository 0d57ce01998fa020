//! *Lossless drain*: all edges are restarted one after the other, twice, by SIGTERM and under load.
//! A call is answered, refused temporarily, or ends with the close at the end of a drain. No
//! acknowledged message is lost.

use qpq_tests::{
    cluster::{Cluster, Place, Plan},
    traffic::{self, Temper, Traffic},
};

const EDGES: usize = 3;
const ROUNDS: u64 = 2;
/// The number of acknowledged messages between two restarts.
const BETWEEN: u64 = 600;

#[tokio::test(flavor = "multi_thread")]
async fn lossless_drain() {
    // Under constant load a drain takes all of its time. Neither end gives up on a peer that is
    // silent because the machine is busy.
    let plan = Plan { edges: EDGES, place: Place::Apart, ..Plan::default() }
        .with("QPQ_DRAIN__TIMEOUT", "8s")
        .with("QPQ_TRANSPORT__SILENT_PEER_TIMEOUT", "60s");
    let cluster = Cluster::start(plan).await.unwrap();
    let load = traffic::Plan {
        // The test ends the writers after the last restart.
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
        "{}{} calls, {} refused temporarily, {} closed by a drain",
        summary.report, summary.calls, summary.refused, summary.drained
    );
    summary.report.assert_clean();
    assert!(summary.lost.is_empty(), "calls that ended without a drain: {:#?}", summary.lost);
}
