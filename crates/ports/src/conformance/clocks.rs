//! Rules of wrong clocks: no acknowledged message is lost because the clock of a caller is wrong.

use std::time::Duration;

use qpq_domain::UnixMillis;

use super::{
    Factory,
    bench::{Bench, MINUTE, NOW, all, message, seqs, texts},
    maintenance::{open, package, sweep_all},
};
use crate::{Enqueued, PackageOwner, Upload, UploadMode};

const DAY: Duration = Duration::from_secs(86_400);

impl Bench {
    /// Creates a bench whose backend has the time [`NOW`].
    async fn with_clock_at_now(factory: &dyn Factory) -> Self {
        let bench = Self::new(factory).await;
        bench.backend.set_clock(NOW).await;
        bench
    }
}

/// Returns an instant 100 days ahead, which is beyond the lifetime of every message.
fn ahead() -> UnixMillis {
    NOW.plus(100 * DAY)
}

fn behind() -> UnixMillis {
    NOW.minus(100 * DAY)
}

pub async fn a_clock_that_is_ahead_destroys_nothing(factory: &dyn Factory) {
    let bench = Bench::with_clock_at_now(factory).await;
    let (alice, bob) = (bench.account(1).await, bench.account(2).await);
    bench.deliver_all(alice, bob, &["one", "two"]).await;
    let acked = bench.deliver(message(alice, bob, "acked").with_id(1)).await;
    bench.ack(all(bob), None, &[3]).await;
    let session = open(&bench, 1, alice, NOW.plus(30 * DAY)).await;
    let packages = vec![package(1, NOW.plus(DAY)), package(2, NOW.plus(DAY))];
    let keys = &bench.stores.key_packages;
    keys.upload(PackageOwner::account(bob.account), packages, UploadMode::Add, NOW)
        .await
        .expect("upload");
    keys.take(&bob.identity, NOW).await.expect("take").expect("a package");

    assert_eq!(sweep_all(&bench, ahead()).await, 0);
    // These calls also remove expired messages.
    bench.deliver(message(alice, bob, "three").at(ahead())).await;
    let more = vec![package(3, ahead().plus(DAY))];
    keys.upload(PackageOwner::account(bob.account), more, UploadMode::Add, ahead())
        .await
        .expect("upload");

    assert_eq!(texts(&bench.peek(all(bob)).await), ["one", "two", "three"]);
    let repeat = message(alice, bob, "acked").with_id(1);
    assert_eq!(bench.send(repeat).await, Enqueued::Duplicate(acked));
    assert!(bench.stores.sessions.find(&session).await.expect("find").is_some());
    let again = vec![package(1, NOW.plus(DAY))];
    let again = keys.upload(PackageOwner::account(bob.account), again, UploadMode::Add, NOW).await;
    assert_eq!(again.expect("upload"), Upload::Taken(0), "taken stays taken");
    assert_eq!(
        keys.stock(PackageOwner::account(bob.account), NOW).await.expect("stock").available,
        2
    );
}

pub async fn a_message_accepted_by_a_clock_that_is_behind_is_delivered(factory: &dyn Factory) {
    let bench = Bench::with_clock_at_now(factory).await;
    let alice = bench.account(1).await;
    bench.deliver(message(alice, alice, "before").at(NOW)).await;
    for text in ["one", "two"] {
        bench.deliver(message(alice, alice, text).living(DAY).at(behind())).await;
    }
    assert_eq!(sweep_all(&bench, NOW).await, 0);
    let page = bench.peek(all(alice)).await;
    assert_eq!(texts(&page), ["before", "one", "two"]);
    assert_eq!(seqs(&page), [1, 2, 3], "no seq is used twice");
}

pub async fn an_id_removed_by_a_clock_that_is_behind_is_remembered(factory: &dyn Factory) {
    let bench = Bench::with_clock_at_now(factory).await;
    let alice = bench.account(1).await;
    let hello = message(alice, alice, "hello").with_id(1);
    let receipt = bench.deliver(hello.clone()).await;
    assert_eq!(bench.ack_at(all(alice), Some(1), &[], behind()).await, 1);
    sweep_all(&bench, NOW.plus(MINUTE)).await;
    assert_eq!(bench.send(hello.at(NOW.plus(MINUTE))).await, Enqueued::Duplicate(receipt));
}
