//! Rules of message ids: the recognition of repeats, and its duration.

use std::{sync::Arc, time::Duration};

use qpq_domain::{DeliveryLimits, Seq, UnixMillis};
use tokio::task::JoinSet;

use super::{
    Factory,
    bench::{Bench, EVERYTHING, MINUTE, NOW, all, message, only, seqs, texts},
};
use crate::{Batch, Enqueued, NewMessage, Receipt};

/// Returns the time for which ids are remembered by default.
fn window() -> Duration {
    DeliveryLimits::default().recent_ids
}

pub async fn a_repeat_of_a_queued_message_gets_its_receipt(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let (alice, bob) = (bench.account(1).await, bench.account(2).await);
    bench.deliver(message(alice, bob, "before")).await;
    let receipt = bench.deliver(message(alice, bob, "hello").in_channel(1).with_id(1)).await;
    assert_eq!(receipt.enqueued_at, NOW);
    // A repeat with another text, channel or time is the same message.
    let much_later = NOW.plus(2 * window());
    for repeat in [
        message(alice, bob, "hello").in_channel(1).with_id(1),
        message(alice, bob, "other").with_id(1),
        message(alice, bob, "hello").with_id(1).at(much_later),
    ] {
        assert_eq!(bench.send(repeat).await, Enqueued::Duplicate(receipt));
    }
    assert_eq!(
        bench.deliver(message(alice, bob, "after")).await.seq,
        Seq(3),
        "a repeat uses no seq"
    );
    assert_eq!(texts(&bench.peek(all(bob)).await), ["before", "hello", "after"]);
}

pub async fn a_repeat_within_one_call_is_a_duplicate_too(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    let twice = vec![message(alice, alice, "hello").with_id(1); 2];
    let outcomes = bench.stores.inboxes.enqueue(Batch::new(twice)).await.expect("enqueue");
    let [Enqueued::Accepted(first), Enqueued::Duplicate(second)] = outcomes[..] else {
        panic!("{outcomes:?}");
    };
    assert_eq!(first, second);
    assert_eq!(seqs(&bench.peek(all(alice)).await), [1]);
}

pub async fn of_concurrent_repeats_one_is_accepted(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    for round in 1..=20_u8 {
        let mut tasks = JoinSet::new();
        for _ in 0..8 {
            let inboxes = Arc::clone(&bench.stores.inboxes);
            tasks.spawn(async move {
                inboxes
                    .enqueue(Batch::new(vec![message(alice, alice, "hello").with_id(round)]))
                    .await
                    .expect("enqueue")
            });
        }
        let outcomes: Vec<_> = tasks.join_all().await.into_iter().flatten().collect();
        let accepted =
            outcomes.iter().filter(|outcome| matches!(outcome, Enqueued::Accepted(_))).count();
        assert_eq!(accepted, 1);
        for outcome in outcomes {
            let (Enqueued::Accepted(Receipt { seq, .. })
            | Enqueued::Duplicate(Receipt { seq, .. })) = outcome
            else {
                panic!("{outcome:?}");
            };
            assert_eq!(seq, Seq(round.into()));
        }
    }
}

pub async fn an_id_counts_for_one_sender_and_recipient(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let (alice, bob, carol) =
        (bench.account(1).await, bench.account(2).await, bench.account(3).await);
    bench.deliver(message(alice, bob, "a to b").with_id(1)).await;
    bench.deliver(message(carol, bob, "c to b").with_id(1)).await;
    bench.deliver(message(alice, carol, "a to c").with_id(1)).await;
    bench.deliver(message(alice, bob, "a to b again").with_id(2)).await;
    assert_eq!(texts(&bench.peek(all(bob)).await), ["a to b", "c to b", "a to b again"]);
    assert_eq!(texts(&bench.peek(all(carol)).await), ["a to c"]);
}

/// Checks that repeats of `hello`, which was removed at `removed_at`, are recognised from `now` to
/// the last millisecond of the window, and that a later repeat is another message.
async fn is_remembered(
    bench: &Bench,
    hello: NewMessage,
    receipt: Receipt,
    removed_at: UnixMillis,
    now: UnixMillis,
) {
    let just_before = removed_at.plus(window() - Duration::from_millis(1));
    for now in [now, just_before] {
        assert_eq!(bench.send(hello.clone().at(now)).await, Enqueued::Duplicate(receipt));
    }
    assert_eq!(bench.deliver(hello.at(removed_at.plus(window()))).await.seq, Seq(2));
}

pub async fn an_id_is_remembered_after_an_ack(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    let hello = message(alice, alice, "hello").in_channel(3).with_id(1);
    let receipt = bench.deliver(hello.clone()).await;
    let acked = NOW.plus(60 * MINUTE);
    assert_eq!(bench.ack_at(only(alice, 3), Some(1), &[], acked).await, 1);
    is_remembered(&bench, hello, receipt, acked, acked).await;
}

pub async fn an_id_is_remembered_after_a_completion(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    let hello = message(alice, alice, "hello").with_id(1);
    let receipt = bench.deliver(hello.clone()).await;
    let lease = bench.lease(all(alice), EVERYTHING).await;
    let completed = NOW.plus(60 * MINUTE);
    lease.complete(completed).await.expect("complete");
    is_remembered(&bench, hello, receipt, completed, completed).await;
}

/// The order of the completion and a sweep makes no difference.
pub async fn an_id_that_expires_under_a_lease_is_remembered_after_expiry(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let (alice, bob) = (bench.account(1).await, bench.account(2).await);
    let expired = NOW.plus(4 * MINUTE);
    let completed = expired.plus(5 * MINUTE);
    for (account, swept) in [(alice, false), (bob, true)] {
        let hello = message(account, account, "hello").with_id(1).living(4 * MINUTE);
        let receipt = bench.deliver(hello.clone()).await;
        let lease = bench.lease(all(account), EVERYTHING).await;
        if swept {
            while bench.stores.maintenance.sweep(completed).await.expect("sweep").rows > 0 {}
        }
        lease.complete(completed).await.expect("complete");
        is_remembered(&bench, hello, receipt, expired, completed).await;
    }
}

pub async fn an_id_is_remembered_after_expiry(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    let hello = message(alice, alice, "hello").with_id(1).living(MINUTE);
    let receipt = bench.deliver(hello.clone()).await;
    let expired = NOW.plus(MINUTE);
    for now in [expired, expired.plus(window() - Duration::from_millis(1))] {
        assert_eq!(bench.send(hello.clone().at(now)).await, Enqueued::Duplicate(receipt));
        assert_eq!(bench.peek_at(all(alice), now).await.envelopes, []);
    }
    let now = expired.plus(window());
    assert_eq!(bench.deliver(hello.at(now)).await.seq, Seq(2));
    assert_eq!(seqs(&bench.peek_at(all(alice), now).await), [2]);
}

pub async fn a_forgotten_id_may_be_used_again(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    let mut now = NOW;
    for round in 1..=4 {
        let receipt = bench.deliver(message(alice, alice, "hello").with_id(1).at(now)).await;
        assert_eq!(receipt.seq, Seq(round));
        assert_eq!(bench.ack_at(all(alice), Some(round), &[], now).await, 1);
        let repeat = message(alice, alice, "hello").with_id(1).at(now.plus(MINUTE));
        assert_eq!(bench.send(repeat).await, Enqueued::Duplicate(receipt), "the latest one counts");
        now = now.plus(window());
    }
}

pub async fn ids_survive_a_crash(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    let removed = bench.deliver(message(alice, alice, "removed").with_id(1)).await;
    bench.ack(all(alice), Some(1), &[]).await;
    let queued = bench.deliver(message(alice, alice, "queued").with_id(2)).await;
    bench.crash().await;
    assert_eq!(
        bench.send(message(alice, alice, "removed").with_id(1)).await,
        Enqueued::Duplicate(removed)
    );
    assert_eq!(
        bench.send(message(alice, alice, "queued").with_id(2)).await,
        Enqueued::Duplicate(queued)
    );
    assert_eq!(bench.deliver(message(alice, alice, "new").with_id(3)).await.seq, Seq(3));
}
