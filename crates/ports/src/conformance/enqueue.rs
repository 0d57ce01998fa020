//! Rules of [`crate::Inboxes::enqueue`]: seqs, caps, durability.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use qpq_domain::{DeliveryLimits, IdentityKey, KeyPackageLimits, Seq};
use tokio::task::JoinSet;

use super::{
    Factory,
    bench::{Bench, MINUTE, NOW, RegisteredAccount, all, message, seqs, texts},
};
use crate::{Batch, Enqueued, NewMessage, Page, Receipt};

/// Returns limits with which one sender may fill an inbox.
fn unshared() -> DeliveryLimits {
    DeliveryLimits { sender_share: 1, ..DeliveryLimits::default() }
}

pub async fn seqs_are_contiguous_under_concurrency(factory: &dyn Factory) {
    const TASKS: u64 = 16;
    const EACH: u64 = 25;
    let bench = Bench::new(factory).await;
    let accounts = [bench.account(1).await, bench.account(2).await];
    let mut tasks = JoinSet::new();
    for task in 0..TASKS {
        let inboxes = Arc::clone(&bench.stores.inboxes);
        tasks.spawn(async move {
            let mut seen = [vec![], vec![]];
            for n in 0..EACH {
                for (to, seen) in accounts.iter().zip(&mut seen) {
                    let enqueued = inboxes
                        .enqueue(Batch::new(vec![message(
                            accounts[0],
                            *to,
                            &format!("{task}/{n}"),
                        )]))
                        .await
                        .expect("enqueue");
                    let Enqueued::Accepted(receipt) = enqueued[0] else { panic!("{enqueued:?}") };
                    seen.push(receipt.seq);
                }
            }
            seen
        });
    }
    let mut taken = [BTreeSet::new(), BTreeSet::new()];
    for seen in tasks.join_all().await {
        for (seen, taken) in seen.into_iter().zip(&mut taken) {
            assert!(seen.is_sorted(), "the messages of one task have rising seqs");
            taken.extend(seen);
        }
    }
    let expected: BTreeSet<_> = (1..=TASKS * EACH).map(Seq).collect();
    assert_eq!(taken, [expected.clone(), expected]);
    for account in accounts {
        assert_eq!(seqs(&bench.peek(all(account)).await), (1..=TASKS * EACH).collect::<Vec<_>>());
    }
}

pub async fn order_is_kept_within_a_call(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    let bodies: Vec<String> = (0..50).map(|n| format!("number {n}")).collect();
    let messages = bodies.iter().map(|body| message(alice, alice, body)).collect();
    let enqueued = bench.stores.inboxes.enqueue(Batch::new(messages)).await.expect("enqueue");
    for (n, outcome) in (1..).zip(enqueued) {
        assert!(
            matches!(outcome, Enqueued::Accepted(Receipt { seq: Seq(s), .. }) if s == n),
            "{outcome:?}"
        );
    }
    assert_eq!(texts(&bench.peek(all(alice)).await), bodies);
    assert_eq!(bench.stores.inboxes.enqueue(Batch::new(vec![])).await.expect("nothing to do"), []);
}

pub async fn an_unknown_recipient_is_reported(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    let nobody = RegisteredAccount { identity: IdentityKey::new([9; 32]), ..alice };
    assert_eq!(bench.send(message(alice, nobody, "hello")).await, Enqueued::NoSuchRecipient);
    assert_eq!(
        bench.send(message(alice, nobody, "hello").with_id(1)).await,
        Enqueued::NoSuchRecipient
    );
}

pub async fn each_message_of_a_batch_has_its_own_outcome(factory: &dyn Factory) {
    let bench = Bench::with(
        factory,
        DeliveryLimits { max_messages: 2, ..unshared() },
        KeyPackageLimits::default(),
    )
    .await;
    let (alice, bob) = (bench.account(1).await, bench.account(2).await);
    let nobody = RegisteredAccount { identity: IdentityKey::new([9; 32]), ..alice };
    let messages = vec![
        message(alice, bob, "one").with_id(1),
        message(alice, nobody, "lost"),
        message(alice, bob, "one").with_id(1),
        message(alice, bob, "two"),
        message(alice, bob, "too much"),
        message(alice, alice, "to myself"),
    ];
    let outcomes = bench.stores.inboxes.enqueue(Batch::new(messages)).await.expect("enqueue");
    let kinds: Vec<_> = outcomes
        .iter()
        .map(|outcome| match outcome {
            Enqueued::Accepted(receipt) => format!("accepted {}", receipt.seq.0),
            Enqueued::Duplicate(receipt) => format!("duplicate {}", receipt.seq.0),
            other => format!("{other:?}"),
        })
        .collect();
    assert_eq!(
        kinds,
        ["accepted 1", "NoSuchRecipient", "duplicate 1", "accepted 2", "QueueFull", "accepted 1"]
    );
    assert_eq!(texts(&bench.peek(all(bob)).await), ["one", "two"]);
    assert_eq!(texts(&bench.peek(all(alice)).await), ["to myself"]);
}

pub async fn messages_that_share_a_payload_are_stored_like_any_other(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let accounts = [bench.account(1).await, bench.account(2).await, bench.account(3).await];
    let [alice, bob, carol] = accounts;
    let nobody = RegisteredAccount { identity: IdentityKey::new([9; 32]), ..alice };
    // A backend may store the large payload once for all its messages. The small one is too small
    // for that.
    let (large, small) = (message(alice, alice, &"x".repeat(40_000)), message(alice, alice, "s"));
    let to = |message: &NewMessage, to: RegisteredAccount| NewMessage {
        recipient: to.identity,
        ..message.clone()
    };
    let mut messages = vec![message(alice, bob, "before")];
    messages.extend([bob, nobody, carol, alice].map(|account| to(&large, account)));
    messages.extend([carol, bob].map(|account| to(&small, account)));
    messages.extend([carol, bob].map(|account| to(&large, account).with_id(1)));
    messages.push(to(&large, bob).with_id(1));
    messages.push(message(alice, bob, "after"));
    let outcomes = bench.stores.inboxes.enqueue(Batch::new(messages)).await.expect("enqueue");
    let seqs: Vec<_> = outcomes
        .iter()
        .map(|outcome| match outcome {
            Enqueued::Accepted(receipt) => receipt.seq.0,
            Enqueued::Duplicate(receipt) => 100 + receipt.seq.0,
            _ => 0,
        })
        .collect();
    assert_eq!(seqs, [1, 2, 0, 1, 1, 2, 3, 3, 4, 104, 5]);
    let lengths = |page: &Page| -> Vec<usize> {
        page.envelopes.iter().map(|envelope| envelope.payload.len()).collect()
    };
    assert_eq!(lengths(&bench.peek(all(bob)).await), [6, 40_000, 1, 40_000, 5]);
    assert_eq!(lengths(&bench.peek(all(carol)).await), [40_000, 1, 40_000]);
    let page = bench.peek(all(alice)).await;
    assert_eq!(page.envelopes[0].payload, large.payload);
}

pub async fn a_refusal_in_the_middle_leaves_no_gap(factory: &dyn Factory) {
    let limits = DeliveryLimits { max_bytes: 100, ..unshared() };
    let bench = Bench::with(factory, limits, KeyPackageLimits::default()).await;
    let (alice, bob) = (bench.account(1).await, bench.account(2).await);
    let known = bench.deliver(message(alice, bob, "one").with_id(1)).await;
    let messages = vec![
        message(alice, bob, "two"),
        message(alice, bob, "one").with_id(1),
        message(alice, bob, "three"),
        message(alice, bob, &"x".repeat(101)),
        message(alice, alice, "to myself"),
        message(alice, bob, "four"),
    ];
    let outcomes = bench.stores.inboxes.enqueue(Batch::new(messages)).await.expect("enqueue");
    let seqs: Vec<_> = outcomes
        .iter()
        .map(|outcome| match outcome {
            Enqueued::Accepted(receipt) => Some(receipt.seq.0),
            _ => None,
        })
        .collect();
    assert_eq!(seqs, [Some(2), None, Some(3), None, Some(1), Some(4)]);
    assert_eq!((outcomes[1], outcomes[3]), (Enqueued::Duplicate(known), Enqueued::QueueFull));
    assert_eq!(texts(&bench.peek(all(bob)).await), ["one", "two", "three", "four"]);
}

pub async fn an_inbox_is_full_by_count_and_drops_nothing(factory: &dyn Factory) {
    let limits = DeliveryLimits { max_messages: 3, ..unshared() };
    let bench = Bench::with(factory, limits, KeyPackageLimits::default()).await;
    let alice = bench.account(1).await;
    bench.deliver_all(alice, alice, &["a", "b", "c"]).await;
    for _ in 0..3 {
        assert_eq!(bench.send(message(alice, alice, "d")).await, Enqueued::QueueFull);
    }
    assert_eq!(texts(&bench.peek(all(alice)).await), ["a", "b", "c"]);
    assert_eq!(bench.ack(all(alice), None, &[2]).await, 1);
    assert_eq!(
        bench.deliver(message(alice, alice, "d")).await.seq,
        Seq(4),
        "a refusal uses no seq"
    );
    assert_eq!(bench.send(message(alice, alice, "e")).await, Enqueued::QueueFull);
    assert_eq!(texts(&bench.peek(all(alice)).await), ["a", "c", "d"]);
}

pub async fn an_inbox_is_full_by_bytes_and_drops_nothing(factory: &dyn Factory) {
    let limits = DeliveryLimits { max_bytes: 100, ..unshared() };
    let bench = Bench::with(factory, limits, KeyPackageLimits::default()).await;
    let alice = bench.account(1).await;
    let sized = |n: usize| message(alice, alice, &"x".repeat(n));
    assert_eq!(bench.send(sized(101)).await, Enqueued::QueueFull, "larger than the inbox");
    bench.deliver(sized(60)).await;
    assert_eq!(bench.send(sized(41)).await, Enqueued::QueueFull);
    bench.deliver(sized(40)).await;
    bench.deliver(sized(0)).await;
    assert_eq!(bench.send(sized(1)).await, Enqueued::QueueFull);
    assert_eq!(seqs(&bench.peek(all(alice)).await), [1, 2, 3]);
    bench.lease(all(alice), super::bench::first(1)).await.complete(NOW).await.expect("complete");
    bench.deliver(sized(60)).await;
    assert_eq!(bench.send(sized(1)).await, Enqueued::QueueFull);
}

pub async fn expired_messages_make_room(factory: &dyn Factory) {
    let limits = DeliveryLimits { max_messages: 3, max_bytes: 30, ..unshared() };
    let bench = Bench::with(factory, limits, KeyPackageLimits::default()).await;
    let alice = bench.account(1).await;
    bench.deliver(message(alice, alice, "stays")).await;
    bench.deliver(message(alice, alice, "goes").living(MINUTE)).await;
    bench.deliver(message(alice, alice, "goes too").living(2 * MINUTE)).await;
    let send = |text: &str, now| message(alice, alice, text).at(now);
    assert_eq!(bench.send(send("early", NOW)).await, Enqueued::QueueFull);
    let later = NOW.plus(MINUTE);
    bench.deliver(send("first", later)).await;
    assert_eq!(bench.send(send("early", later)).await, Enqueued::QueueFull);
    let latest = NOW.plus(2 * MINUTE);
    assert_eq!(
        bench.send(send(&"x".repeat(26), latest)).await,
        Enqueued::QueueFull,
        "bytes count too"
    );
    bench.deliver(send("second", latest)).await;
    assert_eq!(texts(&bench.peek_at(all(alice), latest).await), ["stays", "first", "second"]);
}

/// The wait of a message is counted in stored calls, not in time. Calls are stored in their order,
/// but one sender never has more than about one transaction in the queue.
pub async fn large_batches_of_one_sender_do_not_block_others(factory: &dyn Factory) {
    const GREEDY: usize = 24;
    const BETWEEN: usize = 8;
    let limits = DeliveryLimits { max_messages: u64::MAX, max_bytes: u64::MAX, ..unshared() };
    let bench = Bench::with(factory, limits, KeyPackageLimits::default()).await;
    let (greedy, friend) = (bench.account(1).await, bench.account(2).await);
    let batch = vec![message(greedy, greedy, &"x".repeat(4 << 10)); crate::CALL_MESSAGES];
    let stored = Arc::new(AtomicUsize::new(0));
    let mut tasks = JoinSet::new();
    for _ in 0..GREEDY {
        let (inboxes, batch) = (Arc::clone(&bench.stores.inboxes), batch.clone());
        let stored = Arc::clone(&stored);
        tasks.spawn(async move {
            loop {
                // Some callers are dropped before their messages are committed.
                if inboxes.enqueue(Batch::new(batch.clone())).await.is_ok() {
                    stored.fetch_add(1, Ordering::SeqCst);
                }
            }
        });
    }
    while stored.load(Ordering::SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
    for n in 0..5 {
        let before = stored.load(Ordering::SeqCst);
        bench.deliver(message(friend, greedy, &format!("between {n}"))).await;
        let between = stored.load(Ordering::SeqCst) - before;
        assert!(between <= BETWEEN, "{between} batches were stored before one message");
    }
    tasks.shutdown().await;
}

pub async fn a_caller_that_goes_away_disturbs_no_other(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    let mut accepted = 0;
    for n in 0..50 {
        let inboxes = Arc::clone(&bench.stores.inboxes);
        let given_up: NewMessage = message(alice, alice, &format!("given up {n}"));
        let task =
            tokio::spawn(
                async move { inboxes.enqueue(Batch::new(vec![given_up])).await.map(drop) },
            );
        if n % 2 == 0 {
            tokio::task::yield_now().await;
        }
        task.abort();
        let kept = bench.deliver(message(alice, alice, &format!("kept {n}"))).await;
        assert!(kept.seq > Seq(accepted), "{kept:?}");
        accepted = kept.seq.0;
    }
    // A message of an aborted call may have been accepted or not. The accepted ones are in order
    // and without a gap.
    let page = bench.peek(all(alice)).await;
    assert_eq!(seqs(&page), (1..=page.envelopes.len() as u64).collect::<Vec<_>>());
    assert_eq!(texts(&page).iter().filter(|text| text.starts_with("kept")).count(), 50);
}

pub async fn accepted_messages_survive_a_crash(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    let (alice, bob) = (bench.account(1).await, bench.account(2).await);
    for round in 0..3_u64 {
        let mut tasks = JoinSet::new();
        for n in 0..8 {
            let inboxes = Arc::clone(&bench.stores.inboxes);
            tasks.spawn(async move {
                inboxes
                    .enqueue(Batch::new(vec![message(alice, bob, &format!("{round}/{n}"))]))
                    .await
                    .expect("enqueue")
            });
        }
        tasks.join_all().await;
        let before = bench.peek(all(bob)).await;
        bench.crash().await;
        assert_eq!(bench.peek(all(bob)).await, before);
        assert_eq!(seqs(&before), (1..=8 * (round + 1)).collect::<Vec<_>>());
    }
}
