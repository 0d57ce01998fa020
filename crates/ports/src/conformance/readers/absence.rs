//! Rules of devices that have not read for a long time.

use std::time::Duration;

use qpq_domain::{DeliveryLimits, KeyPackageLimits, UnixMillis};

use super::small;
use crate::{
    Enqueued, ReadError,
    conformance::{
        Factory,
        bench::{Bench, EVERYTHING, MINUTE, NOW, device_id, message, of_device, seqs, texts},
    },
};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// The lifetime of messages that do not expire before a device has been absent too long.
const LIFETIME: Duration = Duration::from_secs(80 * 24 * 60 * 60);

/// Returns an instant at which a device that was last seen at [`NOW`] has been absent too long.
fn long_after() -> UnixMillis {
    NOW.plus(DeliveryLimits::default().device_absence).plus(MINUTE)
}

pub async fn an_absent_device_that_holds_back_half_of_the_inbox_loses_its_position(
    factory: &dyn Factory,
) {
    let mut bench = Bench::with(factory, small(6), KeyPackageLimits::default()).await;
    let alice = bench.account(1).await;
    for n in [1, 2] {
        bench.device(alice, n).await;
    }
    for text in ["a", "b", "c", "d"] {
        bench
            .deliver(message(alice, alice, text).living(LIFETIME).with_id(text.as_bytes()[0]))
            .await;
    }
    let later = long_after();
    bench.backend.set_clock(later).await;
    // Device 1 reads at this time. Device 2 has never read.
    let lease = bench.stores.inboxes.lease(of_device(alice, 1), EVERYTHING, later).await;
    let lease = lease.expect("lease");
    assert_eq!(texts(lease.page()), ["a", "b", "c", "d"]);
    lease.complete(later).await.expect("complete");
    let mut moved = Vec::new();
    loop {
        let swept = bench.stores.maintenance.sweep(later).await.expect("sweep");
        moved.extend(swept.moved);
        if swept.rows == 0 {
            break;
        }
    }
    assert_eq!(moved, [alice.identity]);
    bench.crash().await;
    for n in 0..6 {
        let text = format!("new {n}");
        bench.deliver(message(alice, alice, &text).at(later)).await;
    }
    let again = message(alice, alice, "a").with_id(b'a').at(later);
    assert!(matches!(bench.send(again).await, Enqueued::Duplicate(_)), "its id is remembered");
    let two = of_device(alice, 2);
    for _ in 0..2 {
        for refused in bench.refused(two, later).await {
            assert!(matches!(refused, Some(ReadError::PositionLost)), "{refused:?}");
        }
    }
    let devices = &bench.stores.devices;
    for n in [2, 1, 3] {
        devices.confirm_position(alice.account, device_id(n)).await.expect("confirm");
    }
    let page = bench.peek_at(two, later).await;
    assert_eq!(seqs(&page), [5, 6, 7, 8, 9, 10], "everything since is there");
    assert_eq!(seqs(&bench.peek_at(of_device(alice, 1), later).await), [5, 6, 7, 8, 9, 10]);
}

pub async fn a_device_keeps_its_position_while_it_reads_or_holds_back_little(
    factory: &dyn Factory,
) {
    let bench = Bench::with(factory, small(6), KeyPackageLimits::default()).await;
    let (alice, bob) = (bench.account(1).await, bench.account(2).await);
    bench.device(alice, 1).await;
    bench.device(bob, 1).await;
    for n in 0..4 {
        bench.deliver(message(bob, alice, &format!("m{n}")).living(LIFETIME)).await;
    }
    for n in 0..3 {
        bench.deliver(message(alice, bob, &format!("m{n}")).living(LIFETIME)).await;
    }
    // The messages for alice's device fill more than half of her inbox, but the device read a day
    // ago. The messages for bob's device fill half of his inbox and no more.
    let seen = long_after().minus(DAY);
    bench.backend.set_clock(seen).await;
    assert_eq!(bench.peek_at(of_device(alice, 1), seen).await.envelopes.len(), 4);
    let later = long_after();
    bench.backend.set_clock(later).await;
    let swept = bench.stores.maintenance.sweep(later).await.expect("sweep");
    assert_eq!(swept.moved, []);
    assert_eq!(bench.peek_at(of_device(alice, 1), later).await.envelopes.len(), 4);
    assert_eq!(bench.peek_at(of_device(bob, 1), later).await.envelopes.len(), 3);
    let devices = bench.stores.devices.list(alice.account).await.expect("list");
    assert_eq!(devices[0].last_seen_at, later);
}

pub async fn a_clock_that_is_ahead_moves_no_device(factory: &dyn Factory) {
    let bench = Bench::with(factory, small(6), KeyPackageLimits::default()).await;
    bench.backend.set_clock(NOW).await;
    let alice = bench.account(1).await;
    for n in [1, 2] {
        bench.device(alice, n).await;
    }
    for n in 0..4 {
        bench.deliver(message(alice, alice, &format!("m{n}")).living(LIFETIME)).await;
    }
    let swept = bench.stores.maintenance.sweep(long_after()).await.expect("sweep");
    assert_eq!(swept.moved, []);
    assert_eq!(bench.peek(of_device(alice, 2)).await.envelopes.len(), 4);
}
