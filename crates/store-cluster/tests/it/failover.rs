//! A Redis that changes while messages are sent and read: a primary is replaced by command, or
//! because it is killed or hangs; a Cluster moves a slot, loses its scripts, and restarts a node.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use qpq_domain::{ChannelId, IdentityKey, Seq, StoreLimits};
use qpq_ports::{
    Ack, Batch, Enqueued, NewMessage, PageLimit, ReadError, ReadQuery, Reader, StoreError, Stores,
    View,
};
use qpq_store_cluster::Config;
use qpq_test_services::{RedisCluster, RedisSentinel};
use tokio::time::{Instant, sleep};

use crate::{
    backend::{NEVER, Servers, edge, eventually},
    people::{HOUR, NOW, Person, person},
};

/// Messages between two changes.
const LAP: u64 = 60;
const LAPS: u64 = 4;
const ALL: u64 = LAP * LAPS;
/// The pause before a refused call is repeated.
const AGAIN: Duration = Duration::from_millis(20);

/// The progress of each side.
#[derive(Debug, Default)]
struct Progress {
    acked: AtomicU64,
    /// The number of the last message that the sender may send.
    open: AtomicU64,
}

/// Repeats a call until it succeeds. While Redis is away, a call may fail with Unavailable only.
async fn persist<T, E: Into<ReadError>, F: Future<Output = Result<T, E>>>(
    what: &str,
    mut attempt: impl FnMut() -> F,
) -> T {
    let deadline = Instant::now() + NEVER;
    loop {
        match attempt().await.map_err(Into::into) {
            Ok(done) => return done,
            Err(ReadError::Store(StoreError::Unavailable(_))) => {
                assert!(Instant::now() < deadline, "{what} has not recovered");
                sleep(AGAIN).await;
            }
            Err(error) => panic!("{what}: {error}"),
        }
    }
}

/// Creates the message with this number, from an account to itself.
fn message(to: Person, n: u64) -> NewMessage {
    NewMessage {
        sender: to.identity,
        recipient: to.identity,
        channel: ChannelId::DEFAULT,
        payload: n.to_string().into(),
        payload_sha256: [0; 32],
        message_id: None,
        now: NOW,
        ttl: HOUR,
    }
}

/// Sends numbered messages, one after the other. None is ever refused, because a message is
/// accepted without Redis.
async fn send(stores: Stores, to: Person, progress: Arc<Progress>) {
    for n in 1..=ALL {
        eventually("the next lap", || async { progress.open.load(Ordering::Acquire) >= n }).await;
        let outcome = stores
            .inboxes
            .enqueue(Batch::new(vec![message(to, n)]))
            .await
            .expect("Postgres is there");
        let [Enqueued::Accepted(receipt)] = outcome[..] else { panic!("{outcome:?}") };
        assert_eq!(receipt.seq, Seq(n));
    }
}

fn everything(inbox: IdentityKey) -> ReadQuery {
    ReadQuery { reader: Reader::single(inbox), view: View::All }
}

/// Reads the messages page by page, and checks that none is missing and no acknowledged one is
/// returned again. Completes half of the pages, and acknowledges the other half.
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
            lease.complete(NOW).await.expect("Postgres is there");
        } else {
            let ack = Ack { up_to: Some(Seq(last)), ..Ack::default() };
            let removed = stores.inboxes.ack(read, ack, NOW).await.expect("Postgres is there");
            assert_eq!(u64::from(removed), last - acked);
        }
        acked = last;
        progress.acked.store(acked, Ordering::Release);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_of_the_primary_loses_nothing_and_calls_recover_by_themselves() {
    let servers = Servers::with(RedisSentinel::start()).await;
    let config = servers.cluster(StoreLimits::default()).await;
    let config = Config { redis_timeout: Duration::from_secs(1), ..config };
    let (one, two) = (edge(&config).await, edge(&config).await);
    let alice = person(&one.stores(), 1).await;
    let progress = Arc::new(Progress { open: AtomicU64::new(LAP), ..Progress::default() });
    let sender = tokio::spawn(send(one.stores(), alice, Arc::clone(&progress)));
    let receiver = tokio::spawn(receive(two.stores(), alice, Arc::clone(&progress)));
    let comes_to = async |what: &AtomicU64, n: u64| {
        eventually("messages to pass", || async {
            assert!(
                !receiver.is_finished() || progress.acked.load(Ordering::Acquire) == ALL,
                "the receiver failed"
            );
            what.load(Ordering::Acquire) >= n
        })
        .await;
    };
    let redis = &servers.redis;

    // The primary is replaced by command, while messages are sent.
    comes_to(&progress.acked, LAP / 2).await;
    progress.open.store(2 * LAP, Ordering::Release);
    redis.fail_over().await.expect("the Sentinel");
    comes_to(&progress.acked, 2 * LAP).await;

    // The primary is killed.
    progress.open.store(3 * LAP, Ordering::Release);
    comes_to(&progress.acked, 2 * LAP + 1).await;
    redis.lose_primary().await.expect("the Sentinel");
    comes_to(&progress.acked, 3 * LAP).await;
    let (primary, killed) =
        (redis.primary().await.expect("one"), redis.replica().await.expect("the other"));
    killed.start_again().await.expect("Redis");
    // The Sentinel would send the same command, about ten seconds later.
    killed.command(["REPLICAOF", "127.0.0.1", &primary.port().to_string()]).await.expect("Redis");
    redis.wait_for_replica().await.expect("the replica");

    // The primary hangs: connections to it stay open.
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

    for store in [&one, &two] {
        serves_again(&store.stores(), alice).await;
    }
}

/// Waits until Redis answers, and checks that the inbox is empty.
async fn serves_again(stores: &Stores, who: Person) {
    persist("the check", || stores.maintenance.check()).await;
    let limit = PageLimit { messages: 7, bytes: 1 << 20 };
    let rest =
        persist("a read", || stores.inboxes.peek(everything(who.identity), Seq::ZERO, limit, NOW))
            .await;
    assert!(rest.envelopes.is_empty(), "all of it is acknowledged");
}

/// Sends the message with this number, and reads and completes it. The inbox has no other message.
async fn pass(stores: &Stores, who: Person, n: u64) -> Result<(), ReadError> {
    stores.inboxes.enqueue(Batch::new(vec![message(who, n)])).await.expect("Postgres is there");
    take(stores, who, n).await
}

async fn take(stores: &Stores, who: Person, n: u64) -> Result<(), ReadError> {
    let limit = PageLimit { messages: 7, bytes: 1 << 20 };
    let lease = stores.inboxes.lease(everything(who.identity), limit, NOW).await?;
    let texts: Vec<_> =
        lease.page().envelopes.iter().map(|envelope| envelope.payload.clone()).collect();
    assert_eq!(texts, [n.to_string()]);
    lease.complete(NOW).await.expect("Postgres is there");
    Ok(())
}

/// Moves an empty slot to another node, so that clients have the wrong node for it.
async fn move_slot(cluster: &RedisCluster, key: &str) {
    let nodes = cluster.nodes();
    let slot = nodes[0]
        .command(["CLUSTER", "KEYSLOT", key])
        .await
        .expect("Redis")
        .integer()
        .expect("a slot");
    let mut owner = None;
    for (n, node) in nodes.iter().enumerate() {
        // The other nodes redirect clients.
        if node.command(["EXISTS", key]).await.is_ok() {
            owner = Some(n);
        }
    }
    let next = &nodes[(owner.expect("a node has it") + 1) % nodes.len()];
    cluster.flush_all().await.expect("Redis");
    let id = next.command(["CLUSTER", "MYID"]).await.expect("Redis");
    let set = ["CLUSTER", "SETSLOT", &slot.to_string(), "NODE", id.text().expect("text")];
    next.command(set).await.expect("the new owner");
    for node in nodes.iter().filter(|node| node.port() != next.port()) {
        node.command(set).await.expect("the others");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn moved_slots_and_lost_scripts_of_a_redis_cluster_fail_no_call() {
    let servers = Servers::with(RedisCluster::start(3)).await;
    let config = servers.cluster(StoreLimits::default()).await;
    let store = edge(&config).await;
    let stores = store.stores();
    let mut people = Vec::new();
    for n in 1..=9 {
        people.push(person(&stores, n).await);
    }
    for who in &people {
        pass(&stores, *who, 1).await.expect("it is there");
    }
    for node in servers.redis.nodes() {
        node.command(["SCRIPT", "FLUSH", "SYNC"]).await.expect("Redis");
    }
    for who in &people {
        pass(&stores, *who, 2).await.expect("a script is loaded again");
    }
    let alice = people[0];
    move_slot(&servers.redis, &format!("{}:{{{}}}m", config.namespace, alice.identity)).await;
    for who in &people {
        pass(&stores, *who, 3).await.expect("the new owner is found");
    }
    let lost = &servers.redis.nodes()[0];
    lost.kill9().await.expect("Redis");
    for who in &people {
        stores
            .inboxes
            .enqueue(Batch::new(vec![message(*who, 4)]))
            .await
            .expect("Postgres is there");
    }
    lost.start_again().await.expect("Redis");
    servers.redis.wait_until_complete().await.expect("the cluster");
    for who in &people {
        persist("a read", || take(&stores, *who, 4)).await;
    }
}
