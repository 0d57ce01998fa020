//! A process that is killed while it accepts messages as fast as it can. Every acknowledged message
//! is in the inbox afterwards, with its seq, and no seq is missing or used twice.

use std::collections::HashMap;

use qpq_domain::{DeliveryLimits, StoreLimits};

use crate::{
    child::Child,
    ops::{Op, START},
};

#[test]
fn acknowledged_messages_survive_a_kill() {
    const ROUNDS: u64 = 15;
    const COUNT: u64 = 4_000;
    let directory = tempfile::tempdir().expect("a directory");
    let delivery =
        DeliveryLimits { max_messages: u64::MAX, max_bytes: u64::MAX, ..DeliveryLimits::default() };
    let limits = StoreLimits { delivery, ..StoreLimits::default() };
    let mut acknowledged: HashMap<u64, u64> = HashMap::new();
    for round in 0..ROUNDS {
        let mut child = Child::spawn();
        child.open(directory.path(), limits).expect("what the last process left");
        child.apply(&Op::Register { name: 1, key: 1, record: 1 }, START);
        // Killed at a different point in each round, always while most of the burst is in progress.
        let most = usize::try_from(1 + round * 37).expect("small");
        let burst = child.burst(round * COUNT, COUNT, 300, most);
        child.kill();
        assert_eq!(burst.errors, Vec::<String>::new());
        assert_eq!(burst.accepted.len(), most);
        acknowledged.extend(burst.accepted);

        let mut child = Child::spawn();
        child.open(directory.path(), limits).expect("what a killed process left");
        let inbox = child.inbox();
        let seqs: Vec<u64> = inbox.iter().map(|(_, seq)| *seq).collect();
        assert_eq!(seqs, (1..=inbox.len() as u64).collect::<Vec<_>>(), "no gap, no seq twice");
        let queued: HashMap<u64, u64> = inbox.into_iter().collect();
        assert_eq!(queued.len(), seqs.len(), "no message with two seqs");
        for (number, seq) in &acknowledged {
            assert_eq!(queued.get(number), Some(seq), "message {number}, round {round}");
        }
    }
}
