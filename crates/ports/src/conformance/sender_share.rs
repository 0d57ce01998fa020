//! Rules of [`DeliveryLimits::sender_share`]: in an inbox that is more than half full, no sender
//! has more than its share.

use std::sync::Arc;

use qpq_domain::{DeliveryLimits, KeyPackageLimits};
use tokio::task::JoinSet;

use super::{
    Factory,
    bench::{Bench, MINUTE, NOW, RegisteredAccount, all, message, texts},
};
use crate::{Batch, Enqueued, NewMessage};

/// Creates a backend whose inboxes have room for 16 messages: half is 8, a share is 2.
async fn of_sixteen(factory: &dyn Factory) -> Bench {
    let limits = DeliveryLimits { max_messages: 16, ..DeliveryLimits::default() };
    Bench::with(factory, limits, KeyPackageLimits::default()).await
}

/// Sends messages with these numbers as ids and texts; returns the outcomes.
async fn send_numbered(
    bench: &Bench,
    from: RegisteredAccount,
    to: RegisteredAccount,
    numbers: impl IntoIterator<Item = u8>,
) -> Vec<Enqueued> {
    let mut outcomes = Vec::new();
    for n in numbers {
        outcomes.push(bench.send(message(from, to, &n.to_string()).with_id(n)).await);
    }
    outcomes
}

fn accepted(outcomes: &[Enqueued]) -> usize {
    outcomes.iter().filter(|outcome| matches!(outcome, Enqueued::Accepted(_))).count()
}

pub async fn beyond_the_half_a_sender_holds_no_more_than_its_share_of_messages(
    factory: &dyn Factory,
) {
    for with_ids in [true, false] {
        let bench = of_sixteen(factory).await;
        let [bob, stranger, friend, other] = [
            bench.account(1).await,
            bench.account(2).await,
            bench.account(3).await,
            bench.account(4).await,
        ];
        let send = |from: RegisteredAccount, n: u8| {
            let plain: NewMessage = message(from, bob, &format!("{n}"));
            if with_ids { plain.with_id(n) } else { plain }
        };
        let mut outcomes = Vec::new();
        for n in 0..16 {
            outcomes.push(bench.send(send(stranger, n)).await);
        }
        assert_eq!(accepted(&outcomes), 9, "up to the half, and the one that goes beyond it");
        assert!(outcomes[9..].iter().all(|outcome| *outcome == Enqueued::SenderShare));
        for (from, share) in [(friend, 2), (other, 2)] {
            let mut outcomes = Vec::new();
            for n in 0..4 {
                outcomes.push(bench.send(send(from, n)).await);
            }
            assert_eq!(accepted(&outcomes), share);
            assert!(outcomes[share..].iter().all(|outcome| *outcome == Enqueued::SenderShare));
        }
        assert_eq!(bench.peek(all(bob)).await.envelopes.len(), 13, "nothing queued is dropped");
    }
}

pub async fn beyond_the_half_a_sender_holds_no_more_than_its_share_of_bytes(factory: &dyn Factory) {
    // Half is 400 bytes, a share is 100.
    let limits = DeliveryLimits { max_bytes: 800, ..DeliveryLimits::default() };
    let bench = Bench::with(factory, limits, KeyPackageLimits::default()).await;
    let (bob, stranger, friend) =
        (bench.account(1).await, bench.account(2).await, bench.account(3).await);
    let sized = |from, n: usize| message(from, bob, &"x".repeat(n));
    bench.deliver(sized(stranger, 400)).await;
    bench.deliver(sized(stranger, 1)).await;
    assert_eq!(bench.send(sized(stranger, 0)).await, Enqueued::SenderShare);
    assert_eq!(bench.send(sized(friend, 101)).await, Enqueued::SenderShare);
    bench.deliver(sized(friend, 60)).await;
    assert_eq!(bench.send(sized(friend, 41)).await, Enqueued::SenderShare);
    bench.deliver(sized(friend, 40)).await;
    bench.deliver(sized(friend, 0)).await;
    assert_eq!(bench.send(sized(friend, 1)).await, Enqueued::SenderShare);
    assert_eq!(bench.send(sized(friend, 300)).await, Enqueued::QueueFull);
}

pub async fn one_call_is_held_to_the_share_as_many_are(factory: &dyn Factory) {
    let bench = of_sixteen(factory).await;
    let (bob, stranger, friend) =
        (bench.account(1).await, bench.account(2).await, bench.account(3).await);
    let mut messages: Vec<_> =
        (0..12).map(|n| message(stranger, bob, &format!("stranger {n}"))).collect();
    messages.extend((0..2).map(|n| message(friend, bob, &format!("friend {n}")).with_id(n)));
    messages.push(message(friend, bob, "friend 0").with_id(0));
    messages.push(message(friend, bob, "too much").with_id(9));
    messages.push(message(stranger, stranger, "to myself"));
    let outcomes = bench.stores.inboxes.enqueue(Batch::new(messages)).await.expect("enqueue");
    assert_eq!(accepted(&outcomes[..9]), 9);
    assert!(outcomes[9..12].iter().all(|outcome| *outcome == Enqueued::SenderShare));
    assert_eq!(accepted(&outcomes[12..14]), 2);
    assert!(matches!(outcomes[14], Enqueued::Duplicate(_)), "{outcomes:?}");
    assert_eq!(outcomes[15], Enqueued::SenderShare);
    assert_eq!(accepted(&outcomes[16..]), 1);
    let seqs: Vec<_> = super::bench::seqs(&bench.peek(all(bob)).await);
    assert_eq!(seqs, (1..=11).collect::<Vec<_>>(), "a refusal uses no seq");
}

pub async fn a_share_is_exact_under_concurrency(factory: &dyn Factory) {
    const TASKS: u8 = 8;
    for round in 0..4_u8 {
        let bench = of_sixteen(factory).await;
        let (bob, stranger, friend) =
            (bench.account(1).await, bench.account(2).await, bench.account(3).await);
        for (from, expected) in [(stranger, 9), (friend, 2)] {
            let mut tasks = JoinSet::new();
            for task in 0..TASKS {
                let inboxes = Arc::clone(&bench.stores.inboxes);
                tasks.spawn(async move {
                    let numbered = |n: u8| {
                        let text = format!("{round}/{task}/{n}");
                        let plain = message(from, bob, &text);
                        if task % 2 == 0 { plain } else { plain.with_id(task * 4 + n) }
                    };
                    let first =
                        inboxes.enqueue(Batch::new(vec![numbered(0)])).await.expect("enqueue");
                    let more = inboxes.enqueue(Batch::new(vec![numbered(1), numbered(2)])).await;
                    accepted(&first) + accepted(&more.expect("enqueue"))
                });
            }
            let total: usize = tasks.join_all().await.into_iter().sum();
            assert_eq!(total, expected);
        }
    }
}

pub async fn a_repeat_is_answered_whatever_the_sender_holds(factory: &dyn Factory) {
    let bench = of_sixteen(factory).await;
    let (bob, stranger) = (bench.account(1).await, bench.account(2).await);
    let first = send_numbered(&bench, stranger, bob, 0..12).await;
    assert_eq!(accepted(&first), 9);
    let again = send_numbered(&bench, stranger, bob, 0..12).await;
    for (first, again) in first.iter().zip(&again) {
        match first {
            Enqueued::Accepted(receipt) => assert_eq!(*again, Enqueued::Duplicate(*receipt)),
            other => assert_eq!(again, other),
        }
    }
}

pub async fn expired_messages_count_in_no_share(factory: &dyn Factory) {
    let bench = of_sixteen(factory).await;
    let (bob, stranger, friend) =
        (bench.account(1).await, bench.account(2).await, bench.account(3).await);
    for n in 0..7 {
        bench.deliver(message(stranger, bob, &format!("stays {n}"))).await;
    }
    for n in 0..2 {
        bench.deliver(message(friend, bob, &format!("goes {n}")).living(MINUTE)).await;
    }
    let send = |from, text: &str, now| message(from, bob, text).at(now);
    assert_eq!(bench.send(send(friend, "early", NOW)).await, Enqueued::SenderShare);
    let later = NOW.plus(MINUTE);
    for n in 0..2 {
        bench.deliver(send(stranger, &format!("up to the half and beyond {n}"), later)).await;
    }
    assert_eq!(bench.send(send(stranger, "too much", later)).await, Enqueued::SenderShare);
    for n in 0..2 {
        bench.deliver(send(friend, &format!("again {n}"), later)).await;
    }
    assert_eq!(bench.send(send(friend, "too much", later)).await, Enqueued::SenderShare);
}

pub async fn removed_messages_return_their_share(factory: &dyn Factory) {
    let mut bench = of_sixteen(factory).await;
    let (bob, stranger, friend) =
        (bench.account(1).await, bench.account(2).await, bench.account(3).await);
    send_numbered(&bench, stranger, bob, 0..9).await;
    assert_eq!(accepted(&send_numbered(&bench, friend, bob, 20..23).await), 2);
    // The messages 10 and 11 are from the friend.
    assert_eq!(bench.ack(all(bob), None, &[10]).await, 1);
    bench.crash().await;
    assert_eq!(accepted(&send_numbered(&bench, friend, bob, 30..33).await), 1);
    assert_eq!(bench.send(message(stranger, bob, "too much")).await, Enqueued::SenderShare);
    assert_eq!(bench.ack(all(bob), Some(3), &[]).await, 3);
    bench.deliver(message(stranger, bob, "the inbox is half full")).await;
    assert_eq!(bench.send(message(stranger, bob, "too much")).await, Enqueued::SenderShare);
    let page = bench.peek(all(bob)).await;
    assert_eq!(texts(&page).last(), Some(&"the inbox is half full"));
}
