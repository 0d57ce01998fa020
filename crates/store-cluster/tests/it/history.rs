//! A Postgres that goes back in time while Redis does not: a promoted standby, a point-in-time
//! recovery, a restored copy.

use std::{fmt::Display, sync::Arc};

use qpq_domain::{ChannelId, MessageId, Seq, StoreId, StoreLimits};
use qpq_ports::{
    Ack, Batch, Enqueued, Lease, NewMessage, OldSessions, Page, PageLimit, ReadQuery, Reader,
    Stores, View,
};
use qpq_store_cluster::{ClusterStore, Config};
use qpq_test_services::{Backup, Restore, Standby};
use tokio::time::{Instant, sleep};

use crate::{
    backend::{NEVER, QUICK, Servers, edge, eventually},
    people::{HOUR, NOW, Person, open, person, token},
};

const EVERYTHING: PageLimit = PageLimit { messages: 100, bytes: 1 << 20 };

/// The way in which Postgres goes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    /// An asynchronous standby is promoted.
    Promotion,
    /// Postgres is recovered to a point in time.
    Recovery,
    /// A copy is started, and the operator marks it as restored.
    Copy,
}

/// The state to which Postgres goes back.
enum Past {
    Standby(Box<Standby>),
    Backup(Backup, Restore),
}

/// Two edges, and two people.
struct World {
    servers: Arc<Servers>,
    config: Config,
    edges: [ClusterStore; 2],
    alice: Person,
    bob: Person,
}

impl World {
    async fn new() -> Self {
        let servers = Servers::start().await;
        let config = servers.cluster(StoreLimits::default()).await;
        let edges = [edge(&config).await, edge(&config).await];
        let stores = edges[0].stores();
        let (alice, bob) = (person(&stores, 1).await, person(&stores, 2).await);
        Self { servers, config, edges, alice, bob }
    }

    fn stores(&self, edge: usize) -> Stores {
        self.edges[edge].stores()
    }

    /// Records the present state, to which Postgres will go back.
    async fn note(&self, how: How) -> Past {
        let postgres = &self.servers.postgres;
        match how {
            How::Promotion => {
                let standby = postgres.standby(QUICK).await.expect("a standby");
                standby.catches_up(postgres).await.expect("it follows");
                standby.cut_off().await.expect("it follows no longer");
                Past::Standby(Box::new(standby))
            }
            How::Recovery => {
                Past::Backup(postgres.backup().await.expect("a copy"), Restore::Recovered)
            }
            How::Copy => Past::Backup(postgres.backup().await.expect("a copy"), Restore::AsItIs),
        }
    }

    async fn go_back(&self, to: Past) {
        let postgres = &self.servers.postgres;
        match to {
            Past::Standby(standby) => {
                postgres.kill9().await.expect("killed");
                postgres.fail_over_to(*standby).await.expect("promoted");
            }
            Past::Backup(backup, how) => {
                postgres.restore(&backup, how).await.expect("restored");
                if how == Restore::AsItIs {
                    qpq_store_cluster::begin_history(&self.config, OldSessions::Keep)
                        .await
                        .expect("renewed");
                }
            }
        }
        for edge in 0..2 {
            let check = || async { self.stores(edge).maintenance.check().await.is_ok() };
            eventually("Postgres to be back", check).await;
        }
    }

    /// Sends messages from alice to bob through the first edge. Returns their seqs.
    async fn send(&self, texts: &[&str]) -> Vec<u64> {
        let message = |text: &&str| NewMessage {
            sender: self.alice.identity,
            recipient: self.bob.identity,
            channel: ChannelId::DEFAULT,
            payload: text.to_string().into(),
            payload_sha256: [0; 32],
            message_id: Some(MessageId::new(rand::random())),
            now: NOW,
            ttl: HOUR,
        };
        let messages: Vec<_> = texts.iter().map(message).collect();
        let enqueue =
            || async { self.stores(0).inboxes.enqueue(Batch::new(messages.clone())).await };
        let outcomes = available(enqueue).await;
        let seq = |outcome: &Enqueued| match outcome {
            Enqueued::Accepted(receipt) | Enqueued::Duplicate(receipt) => receipt.seq.0,
            other => panic!("{other:?}"),
        };
        outcomes.iter().map(seq).collect()
    }

    fn read(&self) -> ReadQuery {
        ReadQuery { reader: Reader::single(self.bob.identity), view: View::All }
    }

    async fn peek(&self, edge: usize) -> Page {
        let peek = || async {
            self.stores(edge).inboxes.peek(self.read(), Seq::ZERO, EVERYTHING, NOW).await
        };
        available(peek).await
    }

    async fn fetch(&self, edge: usize) -> Box<dyn Lease> {
        available(|| async { self.stores(edge).inboxes.lease(self.read(), EVERYTHING, NOW).await })
            .await
    }

    async fn messages_left(&self) -> u64 {
        let seen = self.peek(0).await;
        assert!(!seen.more);
        seen.envelopes.len() as u64
    }
}

/// Repeats an attempt while it fails, as on a connection to the earlier Postgres.
async fn available<T, E: Display, F: Future<Output = Result<T, E>>>(attempt: impl Fn() -> F) -> T {
    let deadline = Instant::now() + NEVER;
    loop {
        match attempt().await {
            Ok(done) => return done,
            Err(error) => {
                assert!(Instant::now() < deadline, "still {error}");
                sleep(std::time::Duration::from_millis(20)).await;
            }
        }
    }
}

fn texts(page: &Page) -> Vec<&str> {
    let payloads = page.envelopes.iter().map(|envelope| &envelope.payload[..]);
    payloads.map(|payload| std::str::from_utf8(payload).expect("text")).collect()
}

async fn lost_messages_are_never_shown_and_new_ones_once(how: How) {
    let world = World::new().await;
    assert_eq!(world.send(&["m1", "m2", "m3"]).await, [1, 2, 3]);
    assert_eq!(texts(&world.peek(1).await), ["m1", "m2", "m3"], "the queue is loaded");
    let past = world.note(how).await;
    assert_eq!(world.send(&["m4", "m5", "m6"]).await, [4, 5, 6]);
    // The page is on its way to a client while Postgres goes back.
    let stale = world.fetch(1).await;
    assert_eq!(texts(stale.page()), ["m1", "m2", "m3", "m4", "m5", "m6"]);

    world.go_back(past).await;
    assert_eq!(world.send(&["NEW4", "NEW5", "NEW6"]).await, [4, 5, 6], "the same seqs again");
    let now = ["m1", "m2", "m3", "NEW4", "NEW5", "NEW6"];
    for edge in 0..2 {
        let page = world.peek(edge).await;
        assert_eq!(texts(&page), now, "{how:?}, edge {edge}: a lease of before hides nothing");
        assert_ne!(page.store_id, stale.page().store_id);
        assert_eq!(world.stores(edge).maintenance.store_id(), page.store_id);
    }

    // The client has read everything, but in the earlier history.
    let old = stale.page().store_id;
    stale.complete(NOW).await.expect("nothing is wrong with that");
    let ack = Ack { up_to: Some(Seq(6)), store_id: Some(old), ..Ack::default() };
    let acked = world.stores(1).inboxes.ack(world.read(), ack, NOW).await.expect("nor with that");
    assert_eq!(acked, 0);
    for edge in 0..2 {
        assert_eq!(texts(&world.peek(edge).await), now, "{how:?}, edge {edge}: nothing is removed");
    }

    let lease = world.fetch(0).await;
    assert_eq!(texts(lease.page()), now);
    lease.complete(NOW).await.expect("completed");
    assert_eq!(world.messages_left().await, 0);
    assert_eq!(world.peek(1).await.envelopes.len(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promoted_standby_s_messages_are_shown_once_and_lost_ones_never() {
    lost_messages_are_never_shown_and_new_ones_once(How::Promotion).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_recovered_postgres_s_messages_are_shown_once_and_lost_ones_never() {
    lost_messages_are_never_shown_and_new_ones_once(How::Recovery).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restored_copy_s_messages_are_shown_once_and_lost_ones_never() {
    lost_messages_are_never_shown_and_new_ones_once(How::Copy).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removal_that_postgres_lost_shows_the_messages_again_in_another_history() {
    for how in [How::Promotion, How::Recovery, How::Copy] {
        let world = World::new().await;
        world.send(&["m1", "m2", "m3"]).await;
        let before = world.peek(1).await;
        let past = world.note(how).await;
        world.fetch(1).await.complete(NOW).await.expect("completed");
        assert_eq!(world.peek(1).await.envelopes.len(), 0);
        world.go_back(past).await;
        for edge in 0..2 {
            let page = world.peek(edge).await;
            assert_eq!(texts(&page), ["m1", "m2", "m3"], "{how:?}: they are there again");
            assert_ne!(page.store_id, before.store_id);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unannounced_copy_is_detected_by_its_lost_messages() {
    let world = World::new().await;
    world.send(&["m1"]).await;
    let store_id = world.peek(1).await.store_id;
    let backup = world.servers.postgres.backup().await.expect("a copy");
    world.send(&["m2", "m3"]).await;
    assert_eq!(texts(&world.peek(1).await), ["m1", "m2", "m3"]);
    world.servers.postgres.restore(&backup, Restore::AsItIs).await.expect("restored");
    let page = world.peek(1).await;
    assert_eq!(
        (texts(&page), page.store_id),
        (vec!["m1"], store_id),
        "the queue in Redis is not used"
    );
    assert_eq!(world.send(&["NEW2"]).await, [2]);
    assert_eq!(texts(&world.peek(0).await), ["m1", "NEW2"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_synchronous_standby_loses_nothing_and_its_promotion_is_another_history() {
    let world = World::new().await;
    let postgres = &world.servers.postgres;
    let standby = postgres.standby(QUICK).await.expect("a standby");
    standby.catches_up(postgres).await.expect("it follows");
    postgres.sql("ALTER SYSTEM SET synchronous_standby_names = '*'").await.expect("set");
    postgres.sql("SELECT pg_reload_conf()").await.expect("reloaded");
    world.send(&["m1", "m2"]).await;
    world.fetch(1).await.complete(NOW).await.expect("completed");
    assert_eq!(world.send(&["m3", "m4"]).await, [3, 4]);
    let before = world.peek(1).await;
    world.go_back(Past::Standby(Box::new(standby))).await;
    let after = world.peek(1).await;
    assert_eq!(texts(&after), ["m3", "m4"]);
    assert_ne!(after.store_id, before.store_id);
    assert_eq!(world.send(&["m5"]).await, [5], "no seq is assigned twice");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_session_ends_and_a_revoked_one_stays_revoked() {
    let world = World::new().await;
    let revoked = open(&world.stores(0), 2, world.bob).await;
    let past = world.note(How::Promotion).await;
    open(&world.stores(0), 1, world.bob).await;
    for edge in 0..2 {
        let sessions = world.stores(edge).sessions;
        assert!(sessions.find(&token(1)).await.expect("find").is_some());
        assert_eq!(sessions.find(&token(2)).await.expect("find"), Some(revoked.clone()));
    }
    world.stores(1).sessions.revoke(&token(2)).await.expect("revoked");
    world.go_back(past).await;
    for edge in 0..2 {
        let sessions = &world.stores(edge).sessions;
        // The copies of the session are of another history, whatever their age.
        eventually("the session to end", || async {
            sessions.find(&token(1)).await.expect("find").is_none()
        })
        .await;
        assert_eq!(sessions.find(&token(2)).await.expect("find"), None, "Redis remembers the end");
    }
}

/// The id of the history is the same for all edges, also for an edge that starts later.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_of_postgres_begins_no_history() {
    let world = World::new().await;
    let id: StoreId = world.peek(0).await.store_id;
    world.servers.postgres.restart().await.expect("Postgres");
    assert_eq!(world.peek(1).await.store_id, id);
    let another = edge(&world.config).await;
    assert_eq!(another.stores().maintenance.store_id(), id);
}
