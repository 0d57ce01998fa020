//! Rules of inboxes with devices: each device reads every message once, on a position of its own.

mod absence;
mod races;

use std::time::Duration;

use qpq_domain::{DeliveryLimits, KeyPackageLimits, Seq};

use super::{
    Factory,
    bench::{
        Bench, EVERYTHING, MINUTE, NOW, RegisteredAccount, all, first, message, of_device,
        of_device_in, only, texts,
    },
    maintenance::sweep_all,
};
use crate::{DeviceRegistration, Enqueued, ReadError, ReadQuery, Reader};

pub use self::{absence::*, races::*};

const NONE: [&str; 0] = [];

/// Registers an account with devices, each of which reads the messages that are sent from now on.
async fn with_devices(factory: &dyn Factory, devices: &[u8]) -> (Bench, RegisteredAccount) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    for n in devices {
        assert_eq!(bench.device(alice, *n).await, DeviceRegistration::Registered);
    }
    (bench, alice)
}

/// Returns limits of this number of messages in an inbox, without shares of senders.
fn small(max_messages: u64) -> DeliveryLimits {
    DeliveryLimits { max_messages, sender_share: 1, ..DeliveryLimits::default() }
}

pub async fn the_first_device_inherits_and_a_later_one_starts_at_the_end(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    bench.deliver_all(alice, alice, &["a", "b"]).await;
    bench.ack(all(alice), Some(1), &[]).await;
    bench.device(alice, 1).await;
    bench.device(alice, 2).await;
    assert_eq!(bench.waiting(of_device(alice, 1)).await, ["b"]);
    assert_eq!(bench.waiting(of_device(alice, 2)).await, NONE);
    bench.deliver_all(alice, alice, &["c"]).await;
    bench.crash().await;
    assert_eq!(bench.drain(of_device(alice, 1)).await, ["b", "c"]);
    assert_eq!(bench.drain(of_device(alice, 2)).await, ["c"]);
    for n in [1, 2] {
        assert_eq!(bench.waiting(of_device(alice, n)).await, NONE);
    }
    assert_eq!(bench.deliver(message(alice, alice, "d")).await.seq, Seq(4));
}

pub async fn only_registered_devices_read_an_inbox_with_devices(factory: &dyn Factory) {
    let (bench, alice) = with_devices(factory, &[1]).await;
    let bob = bench.account(2).await;
    bench.deliver_all(bob, alice, &["a"]).await;
    let by_bob = ReadQuery {
        reader: Reader { inbox: bob.identity, ..of_device(alice, 1).reader },
        ..all(bob)
    };
    assert_eq!(bench.waiting(by_bob).await, NONE, "an inbox without devices");
    for read in [all(alice), of_device(alice, 2)] {
        for refused in bench.refused(read, NOW).await {
            assert!(matches!(refused, Some(ReadError::DeviceRequired)), "{refused:?}");
        }
    }
    assert_eq!(bench.waiting(of_device(alice, 1)).await, ["a"]);
    bench.revoke(alice, 1).await;
    assert_eq!(bench.waiting(all(alice)).await, ["a"]);
    assert_eq!(bench.waiting(of_device(alice, 1)).await, ["a"], "the single reader again");
}

pub async fn leases_and_acks_of_one_device_do_not_affect_another(factory: &dyn Factory) {
    let (bench, alice) = with_devices(factory, &[1, 2]).await;
    bench.deliver_all(alice, alice, &["a", "b", "c"]).await;
    let lease = bench.lease(of_device(alice, 1), first(2)).await;
    assert_eq!(texts(lease.page()), ["a", "b"]);
    assert_eq!(bench.waiting(of_device(alice, 1)).await, NONE, "it stops before its own lease");
    assert_eq!(bench.waiting(of_device(alice, 2)).await, ["a", "b", "c"]);
    assert_eq!(bench.ack(of_device(alice, 2), Some(3), &[]).await, 3);
    assert_eq!(bench.ack(of_device(alice, 2), Some(3), &[1, 2, 3]).await, 0);
    lease.complete(NOW).await.expect("complete");
    assert_eq!(bench.waiting(of_device(alice, 1)).await, ["c"]);
    assert_eq!(bench.waiting(of_device(alice, 2)).await, NONE);
    drop(bench.lease(of_device(alice, 1), EVERYTHING).await);
    assert_eq!(bench.waiting(of_device(alice, 1)).await, ["c"], "a release shows it again");
}

pub async fn a_message_counts_once_until_its_last_device_removes_it(factory: &dyn Factory) {
    let bench = Bench::with(factory, small(3), KeyPackageLimits::default()).await;
    let alice = bench.account(1).await;
    for n in [1, 2] {
        bench.device(alice, n).await;
    }
    bench.deliver_all(alice, alice, &["a", "b", "c"]).await;
    let more = || bench.send(message(alice, alice, "d"));
    assert_eq!(bench.drain(of_device(alice, 1)).await, ["a", "b", "c"]);
    assert_eq!(more().await, Enqueued::QueueFull);
    assert_eq!(bench.ack(of_device(alice, 2), None, &[2]).await, 1);
    assert!(matches!(more().await, Enqueued::Accepted(receipt) if receipt.seq == Seq(4)));
    assert_eq!(more().await, Enqueued::QueueFull);
    assert_eq!(bench.waiting(of_device(alice, 1)).await, ["d"]);
    assert_eq!(bench.waiting(of_device(alice, 2)).await, ["a", "c", "d"]);
    bench.revoke(alice, 2).await;
    assert_eq!(bench.waiting(of_device(alice, 1)).await, ["d"]);
    for _ in 0..2 {
        assert!(matches!(more().await, Enqueued::Accepted(_)), "the revocation made room");
    }
    assert_eq!(more().await, Enqueued::QueueFull);
}

pub async fn acks_out_of_order_are_remembered_for_each_device(factory: &dyn Factory) {
    let mut bench = Bench::with(factory, small(6), KeyPackageLimits::default()).await;
    let alice = bench.account(1).await;
    for n in [1, 2] {
        bench.device(alice, n).await;
    }
    for (n, text) in ["a", "b", "c", "d", "e", "f"].into_iter().enumerate() {
        let channel = u8::try_from(n % 2).expect("0 or 1");
        bench.deliver(message(alice, alice, text).in_channel(channel)).await;
    }
    let (one, two) = (of_device(alice, 1), of_device(alice, 2));
    let odd = of_device_in(alice, 1, 1);
    assert_eq!(bench.ack(odd, Some(6), &[]).await, 3, "b, d and f");
    assert_eq!(bench.ack(odd, Some(6), &[2, 4, 6]).await, 0);
    assert_eq!(bench.waiting(odd).await, NONE);
    assert_eq!(bench.waiting(one).await, ["a", "c", "e"]);
    assert_eq!(bench.ack(two, Some(6), &[]).await, 6);
    bench.crash().await;
    assert_eq!(bench.waiting(one).await, ["a", "c", "e"]);
    assert_eq!(bench.ack(one, None, &[5]).await, 1);
    assert_eq!(bench.waiting(one).await, ["a", "c"]);
    // Only these two messages are left in the inbox: it has room for four more.
    for n in 0..4 {
        bench.deliver(message(alice, alice, &format!("g{n}"))).await;
    }
    assert_eq!(bench.send(message(alice, alice, "h")).await, Enqueued::QueueFull);
    assert_eq!(bench.ack(one, Some(3), &[]).await, 2);
    assert_eq!(bench.drain(one).await, ["g0", "g1", "g2", "g3"]);
    assert_eq!(bench.drain(two).await, ["g0", "g1", "g2", "g3"]);
    for _ in 0..6 {
        bench.deliver(message(alice, alice, "i")).await;
    }
}

pub async fn an_ack_of_what_does_not_wait_for_its_device_changes_nothing(factory: &dyn Factory) {
    let (bench, alice) = with_devices(factory, &[1]).await;
    bench.deliver_all(alice, alice, &["a", "b"]).await;
    bench.device(alice, 2).await;
    bench.deliver_all(alice, alice, &["c"]).await;
    let (one, two) = (of_device(alice, 1), of_device(alice, 2));
    let nowhere = [0, 5, 1 << 40, i64::MAX as u64, 1 << 63, u64::MAX];
    assert_eq!(bench.ack(one, None, &nowhere).await, 0);
    assert_eq!(bench.ack(two, Some(2), &[1, 2]).await, 0, "from before its registration");
    assert_eq!(bench.ack(two, Some(0), &[]).await, 0);
    assert_eq!(bench.waiting(one).await, ["a", "b", "c"]);
    assert_eq!(bench.waiting(two).await, ["c"]);
    assert_eq!(bench.ack(two, Some(u64::MAX), &[]).await, 1, "everything up to any seq");
    bench.deliver_all(alice, alice, &["d"]).await;
    assert_eq!(bench.waiting(two).await, ["d"], "but nothing that comes later");
    assert_eq!(bench.ack(one, Some(3), &nowhere).await, 3);
    assert_eq!(bench.waiting(one).await, ["d"]);
}

pub async fn a_page_of_the_single_reader_is_void_after_a_registration(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    bench.deliver_all(alice, alice, &["a", "b"]).await;
    let lease = bench.lease(all(alice), EVERYTHING).await;
    bench.device(alice, 1).await;
    lease.complete(NOW).await.expect("complete");
    assert_eq!(bench.drain(of_device(alice, 1)).await, ["a", "b"]);
}

pub async fn a_page_of_a_revoked_registration_completes_nothing(factory: &dyn Factory) {
    let (bench, alice) = with_devices(factory, &[1, 2]).await;
    bench.deliver_all(alice, alice, &["a", "b"]).await;
    let lease = bench.lease(of_device(alice, 2), EVERYTHING).await;
    assert_eq!(texts(lease.page()), ["a", "b"]);
    bench.revoke(alice, 2).await;
    bench.revoke(alice, 1).await;
    // The new device with the same id is the first device, so it inherits the messages.
    bench.device(alice, 2).await;
    lease.complete(NOW).await.expect("complete");
    assert_eq!(bench.drain(of_device(alice, 2)).await, ["a", "b"]);
}

pub async fn messages_of_the_last_revoked_device_stay(factory: &dyn Factory) {
    let (mut bench, alice) = with_devices(factory, &[1, 2]).await;
    bench.deliver_all(alice, alice, &["a", "b", "c"]).await;
    assert_eq!(bench.ack(of_device(alice, 1), None, &[2]).await, 1);
    assert_eq!(bench.ack(of_device(alice, 2), Some(2), &[]).await, 2);
    bench.revoke(alice, 2).await;
    bench.revoke(alice, 1).await;
    assert_eq!(bench.waiting(all(alice)).await, ["a", "c"]);
    bench.deliver_all(alice, alice, &["d"]).await;
    bench.crash().await;
    assert_eq!(bench.waiting(all(alice)).await, ["a", "c", "d"]);
    bench.device(alice, 3).await;
    assert_eq!(bench.drain(of_device(alice, 3)).await, ["a", "c", "d"], "once");
    assert_eq!(bench.waiting(of_device(alice, 3)).await, NONE);
    bench.revoke(alice, 3).await;
    assert_eq!(bench.waiting(all(alice)).await, NONE);
    bench.deliver_all(alice, alice, &["e"]).await;
    assert_eq!(bench.drain(all(alice)).await, ["e"]);
}

pub async fn an_expired_message_holds_up_no_device(factory: &dyn Factory) {
    let (bench, alice) = with_devices(factory, &[1, 2]).await;
    bench.deliver(message(alice, alice, "short").living(MINUTE)).await;
    bench.deliver_all(alice, alice, &["a"]).await;
    let lease = bench.lease(of_device(alice, 1), EVERYTHING).await;
    assert_eq!(texts(lease.page()), ["short", "a"]);
    let later = NOW.plus(2 * MINUTE);
    sweep_all(&bench, later).await;
    lease.complete(later).await.expect("complete");
    let page = bench.peek_at(of_device(alice, 2), later).await;
    assert_eq!(texts(&page), ["a"]);
    assert_eq!(bench.ack_at(of_device(alice, 2), None, &[2], later).await, 1);
    bench.deliver(message(alice, alice, "b").at(later)).await;
    for n in [1, 2] {
        assert_eq!(texts(&bench.peek_at(of_device(alice, n), later).await), ["b"]);
    }
}

pub async fn an_id_is_known_while_a_device_waits_and_for_a_while_after(factory: &dyn Factory) {
    let (bench, alice) = with_devices(factory, &[1, 2]).await;
    let sent = message(alice, alice, "a").with_id(7);
    let receipt = bench.deliver(sent.clone()).await;
    bench.drain(of_device(alice, 1)).await;
    assert_eq!(bench.send(sent.clone()).await, Enqueued::Duplicate(receipt));
    bench.drain(of_device(alice, 2)).await;
    assert_eq!(bench.send(sent.clone().at(NOW.plus(MINUTE))).await, Enqueued::Duplicate(receipt));
    let later = NOW.plus(16 * MINUTE);
    sweep_all(&bench, later).await;
    assert!(matches!(bench.send(sent.at(later)).await, Enqueued::Accepted(_)));
}

pub async fn a_message_wakes_every_device(factory: &dyn Factory) {
    let (bench, alice) = with_devices(factory, &[1, 2]).await;
    let mut wakes = [1, 2].map(|n| bench.stores.wakes.subscribe(&of_device(alice, n)));
    for n in [1, 2] {
        assert_eq!(bench.waiting(of_device(alice, n)).await, NONE);
    }
    bench.deliver_all(alice, alice, &["a"]).await;
    for wake in &mut wakes {
        tokio::time::timeout(Duration::from_secs(60), wake.woken()).await.expect("a wake");
    }
    for n in [1, 2] {
        assert_eq!(bench.drain(of_device(alice, n)).await, ["a"]);
    }
}

pub async fn one_channel_of_a_device_is_read_like_that_of_the_single_reader(factory: &dyn Factory) {
    let (bench, alice) = with_devices(factory, &[1, 2]).await;
    for (text, channel) in [("a", 0), ("b", 1), ("c", 0), ("d", 1)] {
        bench.deliver(message(alice, alice, text).in_channel(channel)).await;
    }
    let in_channel = |n, channel| of_device_in(alice, n, channel);
    assert_eq!(bench.drain(in_channel(1, 1)).await, ["b", "d"]);
    assert_eq!(bench.drain(in_channel(2, 0)).await, ["a", "c"]);
    assert_eq!(bench.waiting(of_device(alice, 1)).await, ["a", "c"]);
    assert_eq!(bench.waiting(of_device(alice, 2)).await, ["b", "d"]);
    let one = bench.lease(in_channel(1, 0), first(1)).await;
    assert!(one.page().more);
    one.complete(NOW).await.expect("complete");
    assert_eq!(bench.drain(of_device(alice, 1)).await, ["c"]);
    assert_eq!(bench.drain(of_device(alice, 2)).await, ["b", "d"]);
    for refused in bench.refused(only(alice, 1), NOW).await {
        assert!(matches!(refused, Some(ReadError::DeviceRequired)), "{refused:?}");
    }
}
