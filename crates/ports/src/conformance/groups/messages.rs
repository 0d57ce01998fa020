//! Rules of [`crate::Groups::send`]: messages to groups, and commits.

use std::sync::Arc;

use bytes::Bytes;
use qpq_domain::{DeliveryLimits, KeyPackageLimits, Seq};
use tokio::task::JoinSet;

use super::{G, commit, to_others};
use crate::{
    Enqueued, GroupMessage, GroupRecipients, GroupRefusal, GroupSent, Stores,
    conformance::{
        Factory,
        bench::{Bench, EVERYTHING, MINUTE, NOW, all, device_id, of_device, only, seqs},
    },
};

pub async fn a_message_to_a_group_is_in_its_channel_of_every_other_member(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    let accounts = bench.group(3).await;
    let stranger = bench.account(9).await;
    assert_eq!(bench.announce(to_others(accounts[1], "hello")).await, 0);
    bench.crash().await;
    for account in [accounts[0], accounts[2]] {
        let page = bench.peek(all(account)).await;
        assert_eq!(seqs(&page), [1]);
        let envelope = &page.envelopes[0];
        assert_eq!((envelope.channel, &envelope.payload[..]), (G.into(), &b"hello"[..]));
        assert_eq!(bench.peek(only(account, 0)).await.envelopes, []);
    }
    for account in [accounts[1], stranger] {
        assert_eq!(bench.peek(all(account)).await.envelopes, []);
    }
    let to_all = GroupMessage { recipients: GroupRecipients::All, ..to_others(accounts[1], "all") };
    assert_eq!(bench.announce(to_all).await, 0);
    assert_eq!(bench.waiting(all(accounts[1])).await, ["all"]);
}

pub async fn the_senders_other_devices_get_its_message(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let accounts = bench.group(2).await;
    let from =
        |n| GroupMessage { sender_device: Some(device_id(n)), ..to_others(accounts[0], "hi") };
    bench.device(accounts[0], 1).await;
    bench.announce(from(1)).await;
    assert_eq!(bench.waiting(of_device(accounts[0], 1)).await, [""; 0]);
    bench.device(accounts[0], 2).await;
    bench.announce(from(1)).await;
    for n in [1, 2] {
        assert_eq!(bench.waiting(of_device(accounts[0], n)).await, ["hi"]);
    }
    assert_eq!(bench.waiting(all(accounts[1])).await, ["hi", "hi"]);
}

pub async fn full_inboxes_are_skipped_and_counted(factory: &dyn Factory) {
    let limits = DeliveryLimits { max_messages: 2, sender_share: 1, ..DeliveryLimits::default() };
    let bench = Bench::with(factory, limits, KeyPackageLimits::default()).await;
    let accounts = bench.group(3).await;
    bench.deliver_all(accounts[0], accounts[1], &["a", "b"]).await;
    let sent = bench.send_to_group(commit(accounts[0], "c", 0)).await.expect("accepted");
    assert_eq!((sent.epoch, sent.skipped, sent.is_repeat), (1, 1, false));
    assert_eq!(sent.recipients, 2);
    assert_eq!(bench.waiting(all(accounts[1])).await, ["a", "b"]);
    assert_eq!(bench.waiting(all(accounts[2])).await, ["c"]);
    let listed = commit(accounts[0], "d", 1).to(&[accounts[1], accounts[2]]);
    let sent = bench.send_to_group(listed).await.expect("accepted");
    assert_eq!(sent.epoch, 2);
    let [Enqueued::QueueFull, Enqueued::Accepted(receipt)] = sent.outcomes[..] else {
        panic!("{:?}", sent.outcomes)
    };
    assert_eq!(receipt.seq, Seq(2));
}

pub async fn a_repeated_message_to_a_group_is_stored_once(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let accounts = bench.group(3).await;
    let sent = to_others(accounts[0], "hello").with_id(5);
    bench.announce(sent.clone()).await;
    let again = bench.send_to_group(sent.clone()).await.expect("accepted");
    assert!(again.is_repeat);
    assert_eq!(bench.waiting(all(accounts[1])).await, ["hello"]);
    // A member that was added after the first call receives the repeat.
    let dave = bench.account(4).await;
    bench.add(accounts[0], &[dave]).await.expect("added");
    let again = bench.send_to_group(sent).await.expect("accepted");
    assert!(!again.is_repeat);
    assert_eq!(bench.waiting(all(dave)).await, ["hello"]);
    assert_eq!(bench.waiting(all(accounts[2])).await, ["hello"]);
}

pub async fn a_commit_raises_the_epoch_and_replaces_the_group_info(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    let accounts = bench.group(2).await;
    assert_eq!(bench.announce(commit(accounts[1], "one", 0).with_info("info 1")).await, 1);
    bench.crash().await;
    assert_eq!(bench.info(accounts[0]).await, Ok((Some(Bytes::from_static(b"info 1")), 1)));
    assert_eq!(bench.announce(commit(accounts[0], "two", 1)).await, 2);
    let info = bench.info(accounts[0]).await.expect("a member");
    assert_eq!(info, (Some(Bytes::from_static(b"info 1")), 2), "the last one that there was");
    assert_eq!(bench.view(accounts[0]).await.expect("a member").epoch, 2);
    assert_eq!(bench.waiting(all(accounts[0])).await, ["one"]);
    assert_eq!(bench.waiting(all(accounts[1])).await, ["two"]);
}

pub async fn a_commit_for_another_epoch_stores_nothing(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let accounts = bench.group(2).await;
    bench.announce(commit(accounts[0], "one", 0).with_info("info 1")).await;
    for epoch in [0, 2, u64::MAX] {
        for stale in [
            commit(accounts[1], "late", epoch).with_info("bad").with_id(1),
            commit(accounts[1], "late", epoch).to(&accounts),
        ] {
            assert_eq!(bench.send_to_group(stale).await, Err(GroupRefusal::StaleEpoch(1)));
        }
    }
    assert_eq!(bench.waiting(all(accounts[0])).await, [""; 0]);
    assert_eq!(bench.waiting(all(accounts[1])).await, ["one"]);
    assert_eq!(bench.info(accounts[0]).await, Ok((Some(Bytes::from_static(b"info 1")), 1)));
}

pub async fn of_concurrent_commits_for_one_epoch_one_wins(factory: &dyn Factory) {
    const ROUNDS: u64 = 5;
    let bench = Bench::new(factory).await;
    let accounts = bench.group(6).await;
    for epoch in 0..ROUNDS {
        let mut tasks = JoinSet::new();
        for (n, sender) in accounts.iter().copied().enumerate() {
            let groups = Arc::clone(&bench.stores.groups);
            let message = commit(sender, &format!("{epoch} of {}", n + 1), epoch);
            tasks.spawn(async move { (n + 1, groups.send(message).await.expect("send")) });
        }
        let outcomes = tasks.join_all().await;
        let won: Vec<_> =
            outcomes.iter().filter(|(_, outcome)| outcome.is_ok()).map(|(n, _)| *n).collect();
        let [winner] = won[..] else { panic!("{outcomes:?}") };
        for (_, outcome) in outcomes.iter().filter(|(n, _)| *n != winner) {
            assert_eq!(*outcome, Err(GroupRefusal::StaleEpoch(epoch + 1)));
        }
        for (n, account) in accounts.iter().enumerate() {
            let expected: &[String] =
                if n + 1 == winner { &[] } else { &[format!("{epoch} of {winner}")] };
            assert_eq!(bench.drain(all(*account)).await, expected);
        }
    }
}

pub async fn a_repeat_of_a_commit_that_won_has_its_result(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    let accounts = bench.group(3).await;
    let sent = commit(accounts[0], "one", 0).to(&[accounts[1], accounts[2]]).with_id(1);
    let first = bench.send_to_group(sent.clone()).await.expect("accepted");
    let all_members = commit(accounts[1], "two", 1).with_id(2);
    let second = bench.send_to_group(all_members.clone()).await.expect("accepted");
    // The result stays available after the messages of the commits are read and removed.
    for account in &accounts {
        bench.drain(all(*account)).await;
    }
    bench.crash().await;
    let again = bench.send_to_group(sent.clone().at(NOW.plus(MINUTE))).await.expect("accepted");
    assert!(again.is_repeat);
    assert_eq!(again.epoch, first.epoch);
    let receipts = |sent: &GroupSent| -> Vec<_> {
        sent.outcomes
            .iter()
            .map(|outcome| match outcome {
                Enqueued::Accepted(receipt) | Enqueued::Duplicate(receipt) => *receipt,
                other => panic!("{other:?}"),
            })
            .collect()
    };
    assert_eq!(receipts(&again), receipts(&first));
    let again = bench.send_to_group(all_members).await.expect("accepted");
    assert_eq!((again.epoch, again.is_repeat), (second.epoch, true));
    for account in &accounts {
        assert_eq!(bench.waiting(all(*account)).await, [""; 0], "nothing was stored again");
    }
    let by_another =
        GroupMessage { sender: accounts[1].account, sender_key: accounts[1].identity, ..sent };
    assert_eq!(bench.send_to_group(by_another).await, Err(GroupRefusal::StaleEpoch(2)));
}

/// In each inbox a commit precedes every message of its new epoch.
pub async fn no_message_of_an_epoch_precedes_its_commit(factory: &dyn Factory) {
    const EPOCHS: u64 = 12;
    let bench = Bench::new(factory).await;
    let accounts = bench.group(3).await;
    let mut tasks = JoinSet::new();
    for sender in accounts.iter().copied() {
        let stores: Stores = bench.stores.clone();
        tasks.spawn(async move {
            loop {
                // A member sends for its last known epoch, and tries to begin the next one.
                let info = stores.groups.info(G, sender.account).await.expect("info");
                let epoch = info.expect("a member").epoch;
                if epoch >= EPOCHS {
                    return;
                }
                let text = GroupMessage {
                    recipients: GroupRecipients::All,
                    ..to_others(sender, &format!("m{epoch}"))
                };
                stores.groups.send(text).await.expect("send").expect("accepted");
                let next = GroupMessage {
                    recipients: GroupRecipients::All,
                    ..commit(sender, &format!("c{}", epoch + 1), epoch)
                };
                match stores.groups.send(next).await.expect("send") {
                    Ok(_) | Err(GroupRefusal::StaleEpoch(_)) => {}
                    Err(refusal) => panic!("{refusal:?}"),
                }
            }
        });
    }
    tasks.join_all().await;
    for account in &accounts {
        let mut epoch = 0;
        for text in bench.waiting(all(*account)).await {
            let n: u64 = text[1..].parse().expect("a number");
            if text.starts_with('c') {
                assert_eq!(n, epoch + 1, "each commit once and in order");
                epoch = n;
            } else {
                assert!(n <= epoch, "a message of epoch {n} before its commit");
            }
        }
        assert_eq!(epoch, EPOCHS);
    }
}

pub async fn a_payload_of_any_size_reaches_all_members_unchanged(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    let accounts = bench.group(6).await;
    for (n, size) in [0, 1, 511, 512, 513, 4_096, 100_000].into_iter().enumerate() {
        let payload: Bytes = (0..size).map(|i: u32| (i % 251) as u8).collect::<Vec<_>>().into();
        let sent = GroupMessage { payload: payload.clone(), ..to_others(accounts[0], "") };
        bench.announce(sent).await;
        if n == 3 {
            bench.crash().await;
        }
        for account in &accounts[1..] {
            let lease = bench.lease(all(*account), EVERYTHING).await;
            let got: Vec<_> = lease.page().envelopes.iter().map(|e| e.payload.clone()).collect();
            assert!(got == [payload.clone()], "{size} bytes");
            lease.complete(NOW).await.expect("complete");
        }
    }
    // Each inbox counts the whole payload, and subtracts as much when the message is removed.
    let limits = DeliveryLimits { max_bytes: 5_000, sender_share: 1, ..DeliveryLimits::default() };
    let bench = Bench::with(factory, limits, KeyPackageLimits::default()).await;
    let accounts = bench.group(6).await;
    let large = || GroupMessage { payload: vec![7; 3_000].into(), ..to_others(accounts[0], "") };
    for _ in 0..3 {
        bench.announce(large()).await;
        let sent = bench.send_to_group(large()).await.expect("accepted");
        assert_eq!(sent.skipped, 5);
        for account in &accounts[1..] {
            assert_eq!(bench.ack(all(*account), Some(u64::MAX), &[]).await, 1);
        }
    }
}
