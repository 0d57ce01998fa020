//! Rules of devices that are registered, read or are revoked concurrently.

use std::{collections::BTreeMap, sync::Arc};

use qpq_domain::{KeyPackageLimits, Seq};
use tokio::task::JoinSet;

use super::{small, with_devices};
use crate::{
    Ack, Batch, Enqueued,
    conformance::{
        Factory,
        bench::{Bench, EVERYTHING, NOW, first, message, of_device, seqs},
    },
};

/// At whatever time a device is registered, it receives all messages after some message, without a
/// gap.
pub async fn a_device_registered_during_sends_misses_nothing_afterwards(factory: &dyn Factory) {
    const MESSAGES: usize = 60;
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    let sending = {
        let inboxes = Arc::clone(&bench.stores.inboxes);
        tokio::spawn(async move {
            for n in 0..MESSAGES {
                let batch = Batch::new(vec![message(alice, alice, &n.to_string())]);
                let outcomes = inboxes.enqueue(batch).await.expect("enqueue");
                assert!(matches!(outcomes[..], [Enqueued::Accepted(_)]));
            }
        })
    };
    for n in 1..=5 {
        bench.device(alice, n).await;
        tokio::task::yield_now().await;
    }
    sending.await.expect("no panic");
    let expected: Vec<u64> = (1..=MESSAGES as u64).collect();
    for n in 1..=5 {
        let got = seqs(bench.lease(of_device(alice, n), EVERYTHING).await.page());
        assert!(expected.ends_with(&got), "device {n}: {got:?}");
        assert!(n > 1 || got == expected, "the first device inherits: {got:?}");
    }
}

pub async fn two_devices_that_ack_the_same_messages_concurrently_remove_them_once(
    factory: &dyn Factory,
) {
    for round in 0..10 {
        let bench = Bench::with(factory, small(4), KeyPackageLimits::default()).await;
        let alice = bench.account(1).await;
        for n in [1, 2] {
            bench.device(alice, n).await;
        }
        bench.deliver_all(alice, alice, &["a", "b", "c", "d"]).await;
        let mut tasks = JoinSet::new();
        for n in [1, 2] {
            let inboxes = Arc::clone(&bench.stores.inboxes);
            tasks.spawn(async move {
                let ack = Ack { up_to: Some(Seq(4)), ..Ack::default() };
                inboxes.ack(of_device(alice, n), ack, NOW).await.expect("ack")
            });
        }
        assert_eq!(tasks.join_all().await, [4, 4], "round {round}");
        bench.deliver_all(alice, alice, &["e", "f", "g", "h"]).await;
        assert_eq!(bench.send(message(alice, alice, "i")).await, Enqueued::QueueFull);
        for n in [1, 2] {
            assert_eq!(bench.drain(of_device(alice, n)).await, ["e", "f", "g", "h"]);
        }
    }
}

pub async fn a_revocation_of_the_last_device_during_sends_loses_nothing(factory: &dyn Factory) {
    const MESSAGES: usize = 40;
    let (bench, alice) = with_devices(factory, &[1]).await;
    let sending = {
        let inboxes = Arc::clone(&bench.stores.inboxes);
        tokio::spawn(async move {
            for n in 0..MESSAGES {
                let batch = Batch::new(vec![message(alice, alice, &n.to_string())]);
                inboxes.enqueue(batch).await.expect("enqueue");
            }
        })
    };
    let mut acked = Vec::new();
    let mut device = 1;
    for _ in 0..6 {
        let page = bench.lease(of_device(alice, device), first(3)).await;
        acked.extend(seqs(page.page()));
        page.complete(NOW).await.expect("complete");
        bench.revoke(alice, device).await;
        device += 1;
        bench.device(alice, device).await;
    }
    sending.await.expect("no panic");
    acked.extend(seqs(bench.lease(of_device(alice, device), EVERYTHING).await.page()));
    assert_eq!(acked, (1..=MESSAGES as u64).collect::<Vec<_>>(), "each once and in order");
}

/// Devices lease, complete, release, peek and ack concurrently. Each receives each message once, in
/// order.
pub async fn concurrent_devices_get_each_message_once_and_in_order(factory: &dyn Factory) {
    const MESSAGES: u64 = 60;
    let (bench, alice) = with_devices(factory, &[1, 2, 3]).await;
    let mut tasks = JoinSet::new();
    for n in [1, 2, 3] {
        let inboxes = Arc::clone(&bench.stores.inboxes);
        tasks.spawn(async move {
            let (read, mut got) = (of_device(alice, n), Vec::new());
            for turn in 0_u32.. {
                if got.len() as u64 == MESSAGES {
                    break;
                }
                match (turn + u32::from(n)) % 3 {
                    0 => drop(inboxes.lease(read, first(2), NOW).await.expect("lease")),
                    1 => {
                        let lease = inboxes.lease(read, first(5), NOW).await.expect("lease");
                        got.extend(seqs(lease.page()));
                        lease.complete(NOW).await.expect("complete");
                    }
                    _ => {
                        let page = inboxes.peek(read, Seq::ZERO, first(4), NOW).await;
                        let peeked = seqs(&page.expect("peek"));
                        let named = peeked.iter().copied().map(Seq).collect();
                        let ack = Ack { seqs: named, ..Ack::default() };
                        let acked = inboxes.ack(read, ack, NOW).await.expect("ack");
                        assert_eq!(acked as usize, peeked.len());
                        got.extend(peeked);
                    }
                }
            }
            (n, got)
        });
    }
    for n in 0..MESSAGES {
        bench.deliver(message(alice, alice, &n.to_string())).await;
    }
    let of_each: BTreeMap<_, _> = tasks.join_all().await.into_iter().collect();
    for (n, got) in of_each {
        assert_eq!(got, (1..=MESSAGES).collect::<Vec<_>>(), "device {n}");
    }
}
