//! *Acked, never lost*: a hundred thousand acknowledged messages while edges, Redis, NATS and
//! Postgres are killed, Redis is flushed and rolled back, the readers' connections are cut, clocks
//! are wrong, standbys are promoted and backups restored. `make chaos` sends a million.

use qpq_tests::{faults::Campaign, traffic::Plan};

const MESSAGES: u64 = 100_000;

#[tokio::test(flavor = "multi_thread")]
async fn acked_never_lost() {
    let traffic = Plan {
        inboxes: 18,
        writers: 48,
        messages: MESSAGES,
        payload: 256,
        batches: 5,
        seed: 0xacced,
        ..Plan::default()
    };
    let outcome = Campaign { traffic, every: 2_500 }.run().await.unwrap();
    println!("{outcome}");
    let report = &outcome.summary.report;
    report.assert_clean();
    assert!(report.acknowledged as u64 >= MESSAGES, "{report}");
    assert!(outcome.faults.len() > 20, "too few faults: {outcome}");
    assert!(!outcome.summary.lost.is_empty(), "no call was interrupted: {outcome}");
}
