//! Rules of [`crate::Blocks`].

use std::sync::Arc;

use qpq_domain::IdentityKey;

use super::{
    Factory,
    bench::{Bench, NOW, RegisteredAccount, all, message, seqs},
    groups::{commit, to_others},
};
use crate::{Batch, Blocking, Enqueued, Stores, Unblocking};

impl Bench {
    async fn block(&self, owner: RegisteredAccount, blocked: RegisteredAccount) -> Blocking {
        let blocks = &self.stores.blocks;
        blocks.block(owner.account, blocked.identity, NOW).await.expect("block")
    }

    async fn unblock(&self, owner: RegisteredAccount, blocked: RegisteredAccount) -> Unblocking {
        self.stores.blocks.unblock(owner.account, blocked.identity).await.expect("unblock")
    }

    async fn blocked(&self, owner: RegisteredAccount) -> Vec<IdentityKey> {
        self.stores.blocks.list(owner.account).await.expect("list")
    }
}

pub async fn a_message_of_a_blocked_sender_is_refused_and_stores_nothing(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    let (alice, bob, mallory) =
        (bench.account(1).await, bench.account(2).await, bench.account(3).await);
    bench.deliver_all(mallory, bob, &["before"]).await;
    assert_eq!(bench.block(bob, mallory).await, Blocking::Blocked);
    bench.crash().await;
    for with_id in [false, true] {
        let spam = message(mallory, bob, "spam");
        let spam = if with_id { spam.with_id(1) } else { spam };
        assert_eq!(bench.send(spam.clone()).await, Enqueued::Refused);
        assert_eq!(bench.send(spam).await, Enqueued::Refused, "a refusal is not remembered");
    }
    assert_eq!(bench.waiting(all(bob)).await, ["before"], "queued messages stay");
    bench.deliver_all(alice, bob, &["hello"]).await;
    bench.deliver_all(bob, mallory, &["a block has one direction"]).await;
    assert_eq!(seqs(&bench.peek(all(bob)).await), [1, 2], "no seq is skipped");
    assert_eq!(bench.unblock(bob, mallory).await, Unblocking::Unblocked);
    let accepted = bench.send(message(mallory, bob, "sorry").with_id(1)).await;
    assert!(matches!(accepted, Enqueued::Accepted(_)), "{accepted:?}");
}

pub async fn a_block_is_listed_until_it_ends(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let (bob, one, other) =
        (bench.account(1).await, bench.account(2).await, bench.account(3).await);
    assert_eq!(bench.blocked(bob).await, []);
    for blocked in [other, one, other] {
        assert_eq!(bench.block(bob, blocked).await, Blocking::Blocked);
    }
    assert_eq!(bench.blocked(bob).await, [one.identity, other.identity]);
    assert_eq!(bench.blocked(one).await, []);
    for _ in 0..2 {
        assert_eq!(bench.unblock(bob, one).await, Unblocking::Unblocked);
    }
    assert_eq!(bench.blocked(bob).await, [other.identity]);
    assert_eq!(bench.send(message(other, bob, "spam")).await, Enqueued::Refused);
    bench.deliver_all(one, bob, &["hello"]).await;
    assert_eq!(bench.unblock(bob, other).await, Unblocking::Unblocked);
    bench.deliver_all(other, bob, &["hello"]).await;
}

pub async fn unknown_accounts_and_the_own_account_are_not_blocked(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let bob = bench.account(1).await;
    let nobody = RegisteredAccount { identity: IdentityKey::new([99; 32]), ..bob };
    assert_eq!(bench.block(bob, nobody).await, Blocking::NoSuchAccount);
    assert_eq!(bench.unblock(bob, nobody).await, Unblocking::NoSuchAccount);
    assert_eq!(bench.block(bob, bob).await, Blocking::OwnAccount);
    assert_eq!(bench.blocked(bob).await, []);
    bench.deliver_all(bob, bob, &["a note"]).await;
}

pub async fn a_repeat_of_an_accepted_message_is_answered_after_a_block(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let (bob, mallory) = (bench.account(1).await, bench.account(2).await);
    let (queued, acked) =
        (message(mallory, bob, "queued").with_id(1), message(mallory, bob, "acked").with_id(2));
    let first = bench.deliver(queued.clone()).await;
    let second = bench.deliver(acked.clone()).await;
    bench.ack(all(bob), None, &[2]).await;
    bench.block(bob, mallory).await;
    assert_eq!(bench.send(queued).await, Enqueued::Duplicate(first));
    assert_eq!(bench.send(acked).await, Enqueued::Duplicate(second));
    assert_eq!(bench.send(message(mallory, bob, "new").with_id(3)).await, Enqueued::Refused);
}

pub async fn messages_of_others_in_the_same_call_are_accepted(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let (alice, bob, mallory, carol) = (
        bench.account(1).await,
        bench.account(2).await,
        bench.account(3).await,
        bench.account(4).await,
    );
    bench.block(bob, mallory).await;
    // Carol blocks another account, so her blocks are looked up, too.
    bench.block(carol, alice).await;
    let messages = vec![
        message(alice, bob, "one"),
        message(mallory, bob, "spam"),
        message(alice, bob, "two"),
        message(mallory, carol, "hello"),
        message(alice, carol, "spam"),
        message(mallory, bob, "spam"),
        message(alice, bob, "three"),
    ];
    let outcomes = bench.stores.inboxes.enqueue(Batch::new(messages)).await.expect("enqueue");
    let accepted: Vec<_> =
        outcomes.iter().map(|outcome| matches!(outcome, Enqueued::Accepted(_))).collect();
    assert_eq!(accepted, [true, false, true, true, false, false, true]);
    for place in [1, 4, 5] {
        assert_eq!(outcomes[place], Enqueued::Refused);
    }
    assert_eq!(bench.waiting(all(bob)).await, ["one", "two", "three"]);
    assert_eq!(seqs(&bench.peek(all(bob)).await), [1, 2, 3]);
    assert_eq!(bench.waiting(all(carol)).await, ["hello"]);
}

pub async fn a_message_to_a_group_skips_and_counts_a_blocking_member(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let accounts = bench.group(4).await;
    let [alice, bob, carol, _] = accounts[..] else { panic!("four") };
    bench.block(bob, alice).await;
    let sent = bench.send_to_group(to_others(alice, "hi")).await.expect("accepted");
    assert_eq!((sent.recipients, sent.skipped), (3, 1));
    assert_eq!(bench.waiting(all(bob)).await, [""; 0]);
    assert_eq!(bench.waiting(all(carol)).await, ["hi"]);
    let listed = commit(alice, "commit", 0).to(&[bob, carol]).with_id(1);
    for is_repeat in [false, true] {
        let sent = bench.send_to_group(listed.clone()).await.expect("accepted");
        assert_eq!((sent.epoch, sent.is_repeat), (1, is_repeat));
        assert_eq!(sent.outcomes[0], Enqueued::Refused);
    }
    assert_eq!(bench.waiting(all(carol)).await, ["hi", "commit"]);
    let sent = bench.send_to_group(to_others(carol, "hello")).await.expect("accepted");
    assert_eq!(sent.skipped, 0);
    assert_eq!(bench.waiting(all(bob)).await, ["hello"]);
}

pub async fn a_block_during_sends_lets_no_later_message_through(factory: &dyn Factory) {
    async fn send(stores: Stores, from: RegisteredAccount, to: RegisteredAccount) -> usize {
        let mut accepted = 0;
        for n in 0..200 {
            let one = message(from, to, &n.to_string());
            match stores.inboxes.enqueue(Batch::new(vec![one])).await.expect("enqueue")[0] {
                Enqueued::Accepted(_) => accepted += 1,
                Enqueued::Refused => return accepted,
                other => panic!("{other:?}"),
            }
        }
        accepted
    }
    let bench = Bench::new(factory).await;
    let (bob, mallory) = (bench.account(1).await, bench.account(2).await);
    for round in 0..10 {
        let sending = tokio::spawn(send(bench.stores.clone(), mallory, bob));
        for _ in 0..round * 3 {
            tokio::task::yield_now().await;
        }
        let blocks = Arc::clone(&bench.stores.blocks);
        blocks.block(bob.account, mallory.identity, NOW).await.expect("block");
        assert_eq!(bench.send(message(mallory, bob, "late")).await, Enqueued::Refused);
        let accepted = sending.await.expect("no panic");
        assert_eq!(bench.drain(all(bob)).await.len(), accepted);
        bench.unblock(bob, mallory).await;
    }
}
