//! Rules of [`crate::Wakes`]: a call that subscribes, reads nothing and waits is woken by the next
//! message.

use std::{sync::Arc, time::Duration};

use futures_util::FutureExt as _;
use tokio::{sync::Barrier, time::timeout};

use super::{
    Factory,
    bench::{Bench, EVERYTHING, NOW, RegisteredAccount, all, first, message, only, seqs},
};
use crate::{Stores, Wake};

/// The time after which a wait counts as a lost wake. This limit only ends a test that would
/// hang, and measures no speed.
const NEVER: Duration = Duration::from_secs(60);

async fn woken(wake: &mut Box<dyn Wake>, by: &str) {
    timeout(NEVER, wake.woken()).await.unwrap_or_else(|_| panic!("{by} woke nobody"));
}

pub async fn every_change_that_shows_more_wakes(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    let (mut one, mut two) =
        (bench.stores.wakes.subscribe(&all(alice)), bench.stores.wakes.subscribe(&all(alice)));
    bench.deliver_all(alice, alice, &["a", "b", "c"]).await;
    woken(&mut one, "an enqueue").await;
    woken(&mut two, "an enqueue").await;

    let lease = bench.lease(all(alice), first(1)).await;
    let mut released = bench.stores.wakes.subscribe(&all(alice));
    drop(lease);
    woken(&mut released, "a release").await;

    let lease = bench.lease(all(alice), first(1)).await;
    let mut completed = bench.stores.wakes.subscribe(&all(alice));
    lease.complete(NOW).await.expect("complete");
    woken(&mut completed, "a completion").await;

    let lease = bench.lease(all(alice), first(1)).await;
    let mut acked = bench.stores.wakes.subscribe(&all(alice));
    assert_eq!(bench.ack(all(alice), Some(2), &[]).await, 1);
    woken(&mut acked, "an ack").await;
    drop(lease);
    assert_eq!(seqs(&bench.peek(all(alice)).await), [3]);
}

pub async fn a_message_wakes_the_readers_of_its_channel(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    let subscribe = |n| bench.stores.wakes.subscribe(&only(alice, n));
    let mut channels = [subscribe(0), subscribe(1), subscribe(2)];
    let mut every = bench.stores.wakes.subscribe(&all(alice));
    for round in 0..30 {
        let n = round % 3;
        // Reads before the wait and after each wake, as a waiting call does.
        let read = only(alice, n);
        assert!(bench.peek(read).await.envelopes.is_empty());
        let sent = bench.deliver(message(alice, alice, "hello").in_channel(n)).await;
        woken(&mut every, "a message in any channel").await;
        loop {
            woken(&mut channels[usize::from(n)], "a message in its channel").await;
            if !bench.peek(read).await.envelopes.is_empty() {
                break;
            }
        }
        assert_eq!(bench.ack(read, Some(sent.seq.0), &[]).await, 1);
    }
}

pub async fn a_wait_that_is_dropped_loses_nothing(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    let mut wake = bench.stores.wakes.subscribe(&all(alice));
    // Polled once and dropped, as the losing branch of a select is.
    let _ = wake.woken().now_or_never();
    bench.deliver(message(alice, alice, "hello")).await;
    {
        let mut waiting = wake.woken();
        tokio::select! {
            biased;
            () = std::future::ready(()) => {}
            () = &mut waiting => {}
        }
    }
    woken(&mut wake, "an enqueue").await;
}

/// Waits for a message as FetchWait does, and removes it.
async fn fetch(stores: &Stores, owner: RegisteredAccount) -> Vec<u64> {
    let mut wake = stores.wakes.subscribe(&all(owner));
    loop {
        let lease = stores.inboxes.lease(all(owner), EVERYTHING, NOW).await.expect("lease");
        if !lease.page().envelopes.is_empty() {
            let seqs = seqs(lease.page());
            lease.complete(NOW).await.expect("complete");
            return seqs;
        }
        drop(lease);
        woken(&mut wake, "an enqueue or a release").await;
    }
}

pub async fn no_wake_is_lost_in_a_race_with_enqueue(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    for round in 1..=300 {
        let barrier = Arc::new(Barrier::new(2));
        let (stores, start) = (bench.stores.clone(), Arc::clone(&barrier));
        let reader = tokio::spawn(async move {
            start.wait().await;
            fetch(&stores, alice).await
        });
        barrier.wait().await;
        bench.deliver(message(alice, alice, "hello")).await;
        assert_eq!(reader.await.expect("no panic"), [round]);
    }
}

pub async fn no_wake_is_lost_in_a_race_with_release(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    for round in 1..=200 {
        bench.deliver(message(alice, alice, "hello")).await;
        let lease = bench.lease(all(alice), EVERYTHING).await;
        let stores = bench.stores.clone();
        let barrier = Arc::new(Barrier::new(2));
        let start = Arc::clone(&barrier);
        let reader = tokio::spawn(async move {
            start.wait().await;
            fetch(&stores, alice).await
        });
        barrier.wait().await;
        drop(lease);
        assert_eq!(reader.await.expect("no panic"), [round]);
    }
}
