//! Rules of leases: the messages that a lease hides, shows again, and removes.

use std::{collections::BTreeSet, sync::Arc};

use parking_lot::Mutex;
use qpq_domain::Seq;
use tokio::task::JoinSet;

use super::{
    Factory,
    bench::{Bench, EVERYTHING, NOW, RegisteredAccount, all, first, message, only, seqs},
};
use crate::{Batch, Inboxes};

/// Registers an account with `n` messages in the default channel.
async fn filled(factory: &dyn Factory, n: usize) -> (Bench, RegisteredAccount) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    for n in 1..=n {
        bench.deliver(message(alice, alice, &format!("m{n}"))).await;
    }
    (bench, alice)
}

pub async fn a_lease_hides_until_it_is_released(factory: &dyn Factory) {
    let (bench, alice) = filled(factory, 3).await;
    let lease = bench.lease(all(alice), EVERYTHING).await;
    let page = lease.page().clone();
    assert_eq!(seqs(&page), [1, 2, 3]);
    assert_eq!(bench.lease(all(alice), EVERYTHING).await.page(), &bench.nothing());
    drop(lease);
    assert_eq!(
        bench.lease(all(alice), EVERYTHING).await.page(),
        &page,
        "the same, in the same order"
    );
}

pub async fn a_completed_lease_is_removed_permanently(factory: &dyn Factory) {
    let (mut bench, alice) = filled(factory, 3).await;
    bench.lease(all(alice), first(2)).await.complete(NOW).await.expect("complete");
    assert_eq!(seqs(bench.lease(all(alice), EVERYTHING).await.page()), [3]);
    bench.crash().await;
    assert_eq!(seqs(&bench.peek(all(alice)).await), [3]);
    assert_eq!(bench.deliver(message(alice, alice, "next")).await.seq, Seq(4));
}

pub async fn a_completion_removes_only_the_messages_of_its_page(factory: &dyn Factory) {
    let (bench, alice) = filled(factory, 2).await;
    bench.deliver(message(alice, alice, "other").in_channel(1)).await;
    bench.deliver(message(alice, alice, "m4")).await;
    let lease = bench.lease(only(alice, 0), EVERYTHING).await;
    assert_eq!(seqs(lease.page()), [1, 2, 4]);
    bench.deliver(message(alice, alice, "m5")).await;
    lease.complete(NOW).await.expect("complete");
    assert_eq!(seqs(&bench.peek(all(alice)).await), [3, 5]);
}

pub async fn a_view_stops_before_a_leased_message(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    for (text, n) in [("1", 1), ("2", 2), ("3", 1), ("4", 2)] {
        bench.deliver(message(alice, alice, text).in_channel(n)).await;
    }
    let second = bench.lease(only(alice, 2), first(1)).await;
    assert_eq!(seqs(second.page()), [2]);
    let stopped = bench.lease(all(alice), EVERYTHING).await;
    assert_eq!(
        (seqs(stopped.page()), stopped.page().more),
        (vec![1], false),
        "the view of all channels stops before 2"
    );
    assert_eq!(bench.lease(only(alice, 2), EVERYTHING).await.page(), &bench.nothing());
    assert_eq!(bench.lease(only(alice, 1), EVERYTHING).await.page(), &bench.nothing());
    drop(stopped);
    let first_channel = bench.lease(only(alice, 1), EVERYTHING).await;
    assert_eq!(seqs(first_channel.page()), [1, 3], "the leased message is in another channel");
    second.complete(NOW).await.expect("complete");
    assert_eq!(seqs(bench.lease(only(alice, 2), EVERYTHING).await.page()), [4]);
    assert_eq!(bench.lease(all(alice), EVERYTHING).await.page(), &bench.nothing());
    drop(first_channel);
    assert_eq!(seqs(bench.lease(all(alice), EVERYTHING).await.page()), [1, 3, 4]);
}

pub async fn a_peek_stops_before_a_leased_message(factory: &dyn Factory) {
    let (bench, alice) = filled(factory, 4).await;
    bench.deliver(message(alice, alice, "other").in_channel(1)).await;
    let lease = bench.lease(all(alice), first(2)).await;
    assert_eq!(bench.peek(all(alice)).await, bench.nothing());
    let behind =
        bench.stores.inboxes.peek(all(alice), Seq(2), EVERYTHING, NOW).await.expect("peek");
    assert_eq!(seqs(&behind), [3, 4, 5], "a peek that begins after the leased messages");
    assert_eq!(seqs(&bench.peek(only(alice, 1)).await), [5]);
    drop(lease);
    assert_eq!(seqs(&bench.peek(all(alice)).await), [1, 2, 3, 4, 5]);
}

pub async fn an_ack_removes_leased_messages(factory: &dyn Factory) {
    let (bench, alice) = filled(factory, 3).await;
    let lease = bench.lease(all(alice), first(2)).await;
    assert_eq!(bench.ack(all(alice), Some(1), &[]).await, 1);
    drop(lease);
    let lease = bench.lease(all(alice), EVERYTHING).await;
    assert_eq!(seqs(lease.page()), [2, 3]);
    assert_eq!(bench.ack(all(alice), None, &[2, 3]).await, 2);
    lease.complete(NOW).await.expect("nothing is left to remove, which is not an error");
    assert_eq!(bench.peek(all(alice)).await, bench.nothing());
}

pub async fn a_crash_releases_leases(factory: &dyn Factory) {
    let (mut bench, alice) = filled(factory, 2).await;
    let lease = bench.lease(all(alice), EVERYTHING).await;
    let page = lease.page().clone();
    drop(lease);
    let forgotten = bench.lease(all(alice), EVERYTHING).await;
    std::mem::forget(forgotten);
    bench.crash().await;
    assert_eq!(bench.lease(all(alice), EVERYTHING).await.page(), &page);
}

/// Readers complete or release at random while messages arrive. Each message is completed once, and
/// pages are in order: no later message while an earlier one may become visible again.
pub async fn concurrent_readers_get_each_message_once_and_in_order(factory: &dyn Factory) {
    const MESSAGES: u64 = 300;
    let (bench, alice) = filled(factory, 0).await;
    let completed: Arc<Mutex<BTreeSet<u64>>> = Arc::default();
    let mut tasks = JoinSet::new();
    for reader in 0..4_u64 {
        let (stores, completed) = (bench.stores.clone(), Arc::clone(&completed));
        tasks.spawn(async move {
            let mut round = reader;
            let mut wake = stores.wakes.subscribe(&all(alice));
            while (completed.lock().len() as u64) < MESSAGES {
                round += 1;
                let limit = first(u32::try_from(round % 5 + 1).expect("small"));
                let lease = stores.inboxes.lease(all(alice), limit, NOW).await.expect("lease");
                let seqs = seqs(lease.page());
                if let [lowest, ..] = seqs[..] {
                    let before: Vec<u64> = (1..lowest).collect();
                    assert!(
                        completed.lock().iter().copied().take(before.len()).eq(before),
                        "{lowest} shown while an earlier one was not completed"
                    );
                    if round % 3 == 0 {
                        drop(lease);
                    } else {
                        // Recorded before the completion. After the completion, another reader
                        // might record later messages first.
                        let new = seqs.iter().filter(|seq| completed.lock().insert(**seq)).count();
                        assert_eq!(new, seqs.len(), "{seqs:?} shown again after it was completed");
                        lease.complete(NOW).await.expect("complete");
                    }
                } else {
                    drop(lease);
                    if (completed.lock().len() as u64) < MESSAGES {
                        wake.woken().await;
                    }
                }
            }
        });
    }
    let inboxes: Arc<dyn Inboxes> = Arc::clone(&bench.stores.inboxes);
    for n in 0..MESSAGES {
        inboxes
            .enqueue(Batch::new(vec![message(alice, alice, &format!("{n}"))]))
            .await
            .expect("enqueue");
    }
    // The last completion, by any reader, wakes the readers that wait.
    tasks.join_all().await;
    assert_eq!(*completed.lock(), (1..=MESSAGES).collect());
    assert_eq!(bench.peek(all(alice)).await, bench.nothing());
}

/// Each read begins after an ack has returned, while another reader reads continuously.
pub async fn acked_messages_are_not_returned_by_later_reads(factory: &dyn Factory) {
    const MESSAGES: usize = 150;
    let (bench, alice) = filled(factory, MESSAGES).await;
    let inboxes = Arc::clone(&bench.stores.inboxes);
    let reader = tokio::spawn(async move {
        loop {
            let lease = inboxes.lease(all(alice), first(10), NOW).await.expect("lease");
            if lease.page().envelopes.is_empty() {
                return;
            }
        }
    });
    for seq in 1..=MESSAGES as u64 {
        assert_eq!(bench.ack(all(alice), None, &[seq]).await, 1);
        let page = bench.peek(all(alice)).await;
        assert!(page.envelopes.iter().all(|envelope| envelope.seq > Seq(seq)), "{seq} is removed");
        let lease = bench.lease(all(alice), first(3)).await;
        assert!(
            lease.page().envelopes.iter().all(|envelope| envelope.seq > Seq(seq)),
            "{seq} is removed"
        );
    }
    reader.await.expect("no panic");
}
