//! Rules of peeks and acks: views, pages, expiry, removal.

use qpq_domain::{DeviceId, IdentityKey, Seq};

use super::{
    Factory,
    bench::{
        Bench, EVERYTHING, MINUTE, NOW, RegisteredAccount, all, first, message, only, seqs, texts,
    },
};
use crate::{PageLimit, ReadQuery, Reader};

/// Registers an account with five messages, the odd ones in the default channel and the even ones
/// in channel 1.
async fn mixed(factory: &dyn Factory) -> (Bench, RegisteredAccount) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    for n in 1..=5_u8 {
        let text = format!("m{n}");
        bench.deliver(message(alice, alice, &text).in_channel((n + 1) % 2)).await;
    }
    (bench, alice)
}

pub async fn a_view_sees_one_channel_or_all(factory: &dyn Factory) {
    let (bench, alice) = mixed(factory).await;
    let bob = bench.account(2).await;
    bench.deliver(message(alice, bob, "for bob")).await;
    assert_eq!(seqs(&bench.peek(all(alice)).await), [1, 2, 3, 4, 5]);
    assert_eq!(texts(&bench.peek(only(alice, 0)).await), ["m1", "m3", "m5"]);
    assert_eq!(texts(&bench.peek(only(alice, 1)).await), ["m2", "m4"]);
    assert_eq!(bench.peek(only(alice, 2)).await, bench.nothing());
    assert_eq!(texts(&bench.peek(all(bob)).await), ["for bob"]);
    let page = bench.peek(only(alice, 1)).await;
    assert!(
        page.envelopes
            .iter()
            .all(|e| e.channel == super::bench::channel(1) && e.enqueued_at == NOW)
    );
    assert_eq!(bench.lease(only(alice, 1), EVERYTHING).await.page(), &page);
}

pub async fn an_expired_message_is_never_shown(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    for (text, minutes) in [("two", 2), ("one", 1), ("three", 3)] {
        bench.deliver(message(alice, alice, text).living(minutes * MINUTE)).await;
    }
    for (minutes, expected) in
        [(0, vec!["two", "one", "three"]), (1, vec!["two", "three"]), (2, vec!["three"])]
    {
        let now = NOW.plus(minutes * MINUTE);
        assert_eq!(texts(&bench.peek_at(all(alice), now).await), expected);
        assert_eq!(texts(&bench.peek_at(only(alice, 0), now).await), expected);
        let lease = bench.stores.inboxes.lease(all(alice), EVERYTHING, now).await.expect("lease");
        assert_eq!(texts(lease.page()), expected);
    }
    let now = NOW.plus(2 * MINUTE);
    let one = bench.stores.inboxes.peek(all(alice), Seq::ZERO, first(1), now).await.expect("peek");
    assert!(!one.more, "expired messages do not count as more");
    assert_eq!(
        bench.ack_at(all(alice), Some(3), &[], now).await,
        1,
        "expired messages are removed already"
    );
}

pub async fn a_page_ends_at_its_limits(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    for n in 0..6 {
        bench.deliver(message(alice, alice, &"x".repeat(100 + n))).await;
    }
    let peek = async |limit| {
        bench.stores.inboxes.peek(all(alice), Seq::ZERO, limit, NOW).await.expect("peek")
    };
    for (limit, count, more) in [
        (first(2), 2, true),
        (first(5), 5, true),
        (first(6), 6, false),
        (first(7), 6, false),
        // The messages cost 164, 165 and so on.
        (PageLimit { messages: 9, bytes: 164 + 165 }, 2, true),
        (PageLimit { messages: 9, bytes: 164 + 165 - 1 }, 1, true),
        (PageLimit { messages: 1, bytes: usize::MAX }, 1, true),
        (PageLimit { messages: 9, bytes: 164 + 165 + 166 + 167 + 168 + 169 }, 6, false),
    ] {
        let page = peek(limit).await;
        assert_eq!((page.envelopes.len(), page.more), (count, more), "{limit:?}");
        let lease = bench.lease(all(alice), limit).await;
        assert_eq!(lease.page(), &page);
    }
}

pub async fn the_first_message_is_returned_regardless_of_its_size(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    bench.deliver_all(alice, alice, &[&"x".repeat(300_000), "small"]).await;
    let limit = PageLimit { messages: 10, bytes: 100 };
    let lease = bench.lease(all(alice), limit).await;
    assert_eq!((seqs(lease.page()), lease.page().more), (vec![1], true));
    assert_eq!(lease.page().envelopes[0].payload.len(), 300_000);
}

pub async fn a_peek_leaves_everything(factory: &dyn Factory) {
    let (bench, alice) = mixed(factory).await;
    let page = bench.peek(all(alice)).await;
    assert_eq!(bench.peek(all(alice)).await, page);
    assert_eq!(bench.lease(all(alice), EVERYTHING).await.page(), &page);
    assert_eq!(bench.peek(all(alice)).await, page);
}

pub async fn a_peek_continues_after_a_seq(factory: &dyn Factory) {
    let (bench, alice) = mixed(factory).await;
    let peek = async |read, after, limit| {
        bench.stores.inboxes.peek(read, Seq(after), limit, NOW).await.expect("peek")
    };
    assert_eq!(seqs(&peek(all(alice), 2, EVERYTHING).await), [3, 4, 5]);
    assert_eq!(seqs(&peek(only(alice, 0), 1, EVERYTHING).await), [3, 5]);
    let page = peek(only(alice, 0), 2, first(1)).await;
    assert_eq!((seqs(&page), page.more), (vec![3], true));
    for after in [5, 6, 1 << 38, (1 << 38) + 1, u64::MAX] {
        assert_eq!(peek(all(alice), after, EVERYTHING).await, bench.nothing(), "{after}");
        assert_eq!(peek(only(alice, 0), after, EVERYTHING).await, bench.nothing(), "{after}");
    }
}

pub async fn an_ack_removes_up_to_a_seq_of_its_view(factory: &dyn Factory) {
    let (bench, alice) = mixed(factory).await;
    assert_eq!(bench.ack(only(alice, 0), Some(4), &[]).await, 2);
    assert_eq!(bench.ack(only(alice, 0), Some(4), &[]).await, 0, "a repeat removes nothing");
    assert_eq!(seqs(&bench.peek(all(alice)).await), [2, 4, 5]);
    assert_eq!(bench.ack(all(alice), Some(2), &[]).await, 1);
    assert_eq!(seqs(&bench.peek(all(alice)).await), [4, 5]);
    assert_eq!(bench.ack(all(alice), Some(u64::MAX), &[]).await, 2);
    assert_eq!(bench.deliver(message(alice, alice, "next")).await.seq, Seq(6));
}

pub async fn an_ack_removes_single_seqs_of_its_view(factory: &dyn Factory) {
    let (bench, alice) = mixed(factory).await;
    let bob = bench.account(2).await;
    bench.deliver(message(alice, bob, "for bob")).await;
    assert_eq!(
        bench.ack(only(alice, 1), None, &[1, 2, 3]).await,
        1,
        "the others are of another channel"
    );
    assert_eq!(seqs(&bench.peek(all(alice)).await), [1, 3, 4, 5]);
    assert_eq!(bench.ack(all(alice), None, &[5, 3, 3, 77, u64::MAX, 0]).await, 2);
    assert_eq!(bench.ack(all(alice), Some(1), &[1, 4]).await, 2, "both kinds together");
    assert_eq!(bench.peek(all(alice)).await, bench.nothing());
    assert_eq!(seqs(&bench.peek(all(bob)).await), [1]);
    let many: Vec<u64> = (1..5_000).collect();
    assert_eq!(bench.ack(all(bob), None, &many).await, 1);
}

pub async fn an_ack_of_nothing_removes_nothing(factory: &dyn Factory) {
    let (bench, alice) = mixed(factory).await;
    assert_eq!(bench.ack(all(alice), None, &[]).await, 0);
    assert_eq!(bench.ack(all(alice), Some(0), &[0]).await, 0);
    assert_eq!(seqs(&bench.peek(all(alice)).await), [1, 2, 3, 4, 5]);
}

pub async fn a_missing_inbox_is_empty(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    let nobody = RegisteredAccount { identity: IdentityKey::new([9; 32]), ..alice };
    assert_eq!(bench.peek(all(nobody)).await, bench.nothing());
    let lease = bench.lease(all(nobody), EVERYTHING).await;
    assert_eq!(lease.page(), &bench.nothing());
    lease.complete(NOW).await.expect("nothing to complete");
    assert_eq!(bench.ack(all(nobody), Some(9), &[1]).await, 0);
}

/// Every operation of an inbox belongs to a reader. While no device is registered, a device that an
/// operation names shares the position, the leases and the wakes of the single reader.
pub async fn without_registered_devices_a_named_device_is_the_single_reader(factory: &dyn Factory) {
    let (bench, alice) = mixed(factory).await;
    let device = Some(DeviceId::new([7; 16]));
    let reader = Reader { inbox: alice.identity, device };
    let named = ReadQuery { reader, ..all(alice) };
    assert_eq!(bench.peek(named).await, bench.peek(all(alice)).await);
    let lease = bench.lease(named, first(2)).await;
    assert_eq!(seqs(lease.page()), [1, 2]);
    for query in [named, all(alice)] {
        assert_eq!(bench.lease(query, EVERYTHING).await.page(), &bench.nothing(), "{query:?}");
    }
    lease.complete(NOW).await.expect("complete");
    assert_eq!(bench.ack(named, Some(3), &[]).await, 1);
    assert_eq!(seqs(&bench.peek(all(alice)).await), [4, 5]);
    assert_eq!(bench.ack(all(alice), Some(4), &[]).await, 1);
    assert_eq!(seqs(&bench.peek(named).await), [5]);
    let mut wakes = [named, all(alice)].map(|query| bench.stores.wakes.subscribe(&query));
    bench.deliver(message(alice, alice, "next")).await;
    for wake in &mut wakes {
        wake.woken().await;
    }
}
