//! A Redis that changes its primary while messages pass: by order, and because the primary is killed or hangs.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use qpq_domain::{ChannelId, IdentityKey, Seq};
use qpq_ports::{Ack, Enqueue, Enqueued, PageLimit, Read, StoreError, Stores, View};
use qpq_store_cluster::{Config, Limits};
use qpq_test_services::RedisSentinel;
use tokio::time::{Instant, sleep};

use crate::{
    backend::{NEVER, Servers, edge, eventually},
    people::{HOUR, NOW, Person, person},
};

/// Messages between two changes.
const LAP: u64 = 60;
const LAPS: u64 = 4;
const ALL: u64 = LAP * LAPS;
/// Before what was refused is asked for again.
const AGAIN: Duration = Duration::from_millis(20);

/// How far each side has come.
#[derive(Debug, Default)]
struct Progress {
    acked: AtomicU64,
    /// Up to which message the sender may go.
    open: AtomicU64,
}

/// Does it until it is done; what a Redis that is away may make of a call is Unavailable and nothing else.
async fn persist<T, F: Future<Output = Result<T, StoreError>>>(
    what: &str,
    mut attempt: impl FnMut() -> F,
) -> T {
    let deadline = Instant::now() + NEVER;
    loop {
        match attempt().await {
            Ok(done) => return done,
            Err(StoreError::Unavailable(_)) => {
                assert!(Instant::now() < deadline, "{what} has not recovered");
                sleep(AGAIN).await;
            }
            Err(error) => panic!("{what}: {error}"),
        }
    }
}

/// One message after the other, numbered. Redis is no part of accepting one, so none is ever refused.
async fn send(stores: Stores, to: Person, progress: Arc<Progress>) {
    for n in 1..=ALL {
        eventually("the next lap", || async { progress.open.load(Ordering::Acquire) >= n }).await;
        let message = Enqueue {
            sender: to.identity,
            recipient: to.identity,
            channel: ChannelId::DEFAULT,
            payload: n.to_string().into(),
            payload_sha256: [0; 32],
            message_id: None,
            now: NOW,
            ttl: HOUR,
        };
        let outcome = stores.inboxes.enqueue(vec![message]).await.expect("Postgres is there");
        let [Enqueued::Accepted(receipt)] = outcome[..] else { panic!("{outcome:?}") };
        assert_eq!(receipt.seq, Seq(n));
    }
}

fn everything(inbox: IdentityKey) -> Read {
    Read { inbox, device: None, view: View::All }
}

/// Takes what is there, page by page: every message comes in its turn, and what was acknowledged never again. Half of the
/// pages are settled, the other half acknowledged.
async fn receive(stores: Stores, who: Person, progress: Arc<Progress>) {
    let (read, limit) = (everything(who.identity), PageLimit { messages: 7, bytes: 1 << 20 });
    let mut acked = 0;
    let mut pages = 0;
    while acked < ALL {
        let lease = persist("a read", || stores.inboxes.lease(read, limit, NOW)).await;
        let seqs: Vec<u64> = lease.page().envelopes.iter().map(|envelope| envelope.seq.0).collect();
        let Some(&last) = seqs.last() else {
            sleep(AGAIN).await;
            continue;
        };
        assert_eq!(seqs, (acked + 1..=last).collect::<Vec<_>>(), "what comes after {acked}");
        for envelope in &lease.page().envelopes {
            assert_eq!(envelope.payload, envelope.seq.0.to_string());
        }
        pages += 1;
        if pages % 2 == 0 {
            lease.settle().await.expect("Postgres is there");
        } else {
            let ack = Ack { up_to: Some(Seq(last)), seqs: Vec::new() };
            let gone = stores.inboxes.ack(read, ack, NOW).await.expect("Postgres is there");
            assert_eq!(u64::from(gone), last - acked);
        }
        acked = last;
        progress.acked.store(acked, Ordering::Release);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_of_the_primary_loses_nothing_and_calls_recover_by_themselves() {
    let servers = Servers::with(RedisSentinel::start()).await;
    let config = servers.cluster(Limits::default()).await;
    let config = Config { redis_timeout: Duration::from_secs(1), ..config };
    let (one, two) = (edge(&config).await, edge(&config).await);
    let alice = person(&one.stores(), 1).await;
    let progress = Arc::new(Progress { open: AtomicU64::new(LAP), ..Progress::default() });
    let sender = tokio::spawn(send(one.stores(), alice, Arc::clone(&progress)));
    let receiver = tokio::spawn(receive(two.stores(), alice, Arc::clone(&progress)));
    let comes_to = async |what: &AtomicU64, n: u64| {
        eventually("messages to pass", || async {
            assert!(!receiver.is_finished() || progress.acked.load(Ordering::Acquire) == ALL, "it failed");
            what.load(Ordering::Acquire) >= n
        })
        .await;
    };
    let redis = &servers.redis;

    // By order, while they pass.
    comes_to(&progress.acked, LAP / 2).await;
    progress.open.store(2 * LAP, Ordering::Release);
    redis.fail_over().await.expect("the Sentinel");
    comes_to(&progress.acked, 2 * LAP).await;

    // It is killed.
    progress.open.store(3 * LAP, Ordering::Release);
    comes_to(&progress.acked, 2 * LAP + 1).await;
    redis.lose_primary().await.expect("the Sentinel");
    comes_to(&progress.acked, 3 * LAP).await;
    redis.replica().await.expect("the Sentinel").start_again().await.expect("Redis");
    redis.wait_for_replica().await.expect("the replica");

    // It hangs: connections to it stay open.
    progress.open.store(4 * LAP, Ordering::Release);
    comes_to(&progress.acked, 3 * LAP + 1).await;
    let old = redis.primary().await.expect("the Sentinel");
    old.freeze();
    eventually("another primary", || async {
        redis.primary().await.is_ok_and(|primary| primary.addr() != old.addr())
    })
    .await;
    comes_to(&progress.acked, ALL).await;
    old.thaw();
    sender.await.expect("every message was accepted");
    receiver.await.expect("every message came");

    // And Redis serves again, on both edges.
    for store in [&one, &two] {
        let stores = store.stores();
        persist("the check", || stores.upkeep.check()).await;
        let rest = persist("a read", || {
            stores.inboxes.peek(
                everything(alice.identity),
                Seq::ZERO,
                PageLimit { messages: 7, bytes: 1 << 20 },
                NOW,
            )
        });
        assert!(rest.await.envelopes.is_empty(), "all of it is acknowledged");
    }
}
