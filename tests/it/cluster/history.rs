//! A Postgres that goes back in time while edges run and Redis keeps its data. A lost message is
//! never delivered, a message accepted afterwards is delivered exactly once, and every answer has
//! the id of the new history.

use std::time::Duration;

use bytes::Bytes;
use qpq_proto::{
    methods::{Enqueue, Fetch, Health, Peek},
    v1,
};
use qpq_test_services::{Restore, Standby};
use qpq_tests::{
    accounts::Account,
    client::Client,
    cluster::{Cluster, Plan},
};
use tokio::time::sleep;

use super::{client_at_each, until};

const EDGES: usize = 2;
/// The pause before a refused call is repeated.
const PAUSE: Duration = Duration::from_millis(20);

struct World {
    cluster: Cluster,
    clients: Vec<Client>,
    alice: Account,
    bob: Account,
}

impl World {
    async fn new() -> Self {
        let plan = Plan { edges: EDGES, ..Plan::default() }.with("QPQ_POSTGRES__TIMEOUT", "5s");
        let cluster = Cluster::start(plan).await.expect("a cluster");
        let clients = client_at_each(&cluster, EDGES).await;
        let mut accounts = cluster.accounts(2).await.expect("two accounts");
        let (bob, alice) = (accounts.remove(1), accounts.remove(0));
        Self { cluster, clients, alice, bob }
    }

    /// Sends to bob through the first edge, until the message is accepted. Returns its seq.
    async fn send(&self, text: &'static str) -> u64 {
        let request = v1::EnqueueRequest {
            recipient_key: self.bob.identity.clone(),
            payload: Bytes::from_static(text.as_bytes()),
            message_id: Bytes::copy_from_slice(&rand::random::<[u8; 16]>()),
            ..Default::default()
        };
        let token = Some(&self.alice.token[..]);
        loop {
            let answer = self.clients[0].call::<Enqueue>(&request, token).await;
            if let Ok(accepted) = answer.expect("an answer") {
                assert!(!accepted.delivery_proof.is_empty());
                return accepted.seq;
            }
            sleep(PAUSE).await;
        }
    }

    /// Returns the messages of bob at the second edge, and the id of the history.
    async fn peek(&self) -> (Vec<String>, Bytes) {
        let request = v1::PeekRequest::default();
        loop {
            let answer = self.clients[1].call::<Peek>(&request, Some(&self.bob.token)).await;
            if let Ok(page) = answer.expect("an answer") {
                return (texts(&page.payloads), page.store_id);
            }
            sleep(PAUSE).await;
        }
    }

    async fn fetch(&self) -> Vec<String> {
        let request = v1::FetchRequest::default();
        let page = self.clients[1].must::<Fetch>(&request, Some(&self.bob.token)).await;
        texts(&page.expect("a page").payloads)
    }

    async fn store_id(&self, edge: usize) -> Bytes {
        let health = self.clients[edge].must::<Health>(&v1::HealthRequest {}, None).await;
        health.expect("Health answers").store_id
    }

    /// Starts a standby with the current state and ends its replication from the primary.
    async fn detached_standby(&self) -> Standby {
        let postgres = &self.cluster.postgres;
        let standby = postgres.standby(&[]).await.expect("a standby");
        standby.catches_up(postgres).await.expect("it follows");
        standby.cut_off().await.expect("it follows no longer");
        standby
    }

    async fn fail_over_to(&self, standby: Standby) {
        self.cluster.postgres.kill9().await.expect("killed");
        self.cluster.postgres.fail_over_to(standby).await.expect("promoted");
    }

    /// Checks that only new messages follow m3, that they are delivered once, and that the store id
    /// is not `before`.
    async fn delivers_new_messages_once(&self, before: Bytes) {
        for (text, seq) in [("NEW4", 4), ("NEW5", 5), ("NEW6", 6)] {
            assert_eq!(self.send(text).await, seq, "the seqs of lost messages again");
        }
        let now = ["m1", "m2", "m3", "NEW4", "NEW5", "NEW6"];
        let (seen, store_id) = self.peek().await;
        assert_eq!(seen, now);
        assert_ne!(store_id, before);
        for edge in 0..EDGES {
            until("Health reports the new history", || async {
                self.store_id(edge).await == store_id
            })
            .await;
        }
        assert_eq!(self.fetch().await, now);
        until("the inbox is empty", || async { self.fetch().await.is_empty() }).await;
        until("Postgres has no messages", || async {
            self.cluster.messages_left().await.expect("Postgres") == 0
        })
        .await;
    }
}

fn texts(payloads: &[v1::Envelope]) -> Vec<String> {
    payloads.iter().map(|envelope| String::from_utf8_lossy(&envelope.data).into_owned()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_promotion_new_messages_are_delivered_once_and_lost_ones_never() {
    let world = World::new().await;
    for text in ["m1", "m2", "m3"] {
        world.send(text).await;
    }
    let (seen, before) = world.peek().await;
    assert_eq!(seen, ["m1", "m2", "m3"]);
    for edge in 0..EDGES {
        assert_eq!(world.store_id(edge).await, before);
    }
    let standby = world.detached_standby().await;
    for (text, seq) in [("m4", 4), ("m5", 5), ("m6", 6)] {
        assert_eq!(world.send(text).await, seq);
    }
    assert_eq!(world.peek().await.0.len(), 6);
    world.fail_over_to(standby).await;
    world.delivers_new_messages_once(before).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_recovery_new_messages_are_delivered_once_and_lost_ones_never() {
    let world = World::new().await;
    for text in ["m1", "m2", "m3"] {
        world.send(text).await;
    }
    let (_, before) = world.peek().await;
    let backup = world.cluster.postgres.backup().await.expect("a copy");
    for text in ["m4", "m5", "m6"] {
        world.send(text).await;
    }
    assert_eq!(world.peek().await.0.len(), 6);
    world.cluster.postgres.restore(&backup, Restore::Recovered).await.expect("recovered");
    world.delivers_new_messages_once(before).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_whose_removal_was_lost_are_delivered_again() {
    let world = World::new().await;
    for text in ["m1", "m2", "m3"] {
        world.send(text).await;
    }
    let (_, before) = world.peek().await;
    let standby = world.detached_standby().await;
    assert_eq!(world.fetch().await, ["m1", "m2", "m3"]);
    until("they are removed", || async { world.peek().await.0.is_empty() }).await;
    world.fail_over_to(standby).await;
    let (seen, store_id) = world.peek().await;
    assert_eq!(seen, ["m1", "m2", "m3"]);
    assert_ne!(store_id, before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_synchronous_standby_loses_nothing() {
    let world = World::new().await;
    let postgres = &world.cluster.postgres;
    let standby = postgres.standby(&[]).await.expect("a standby");
    standby.catches_up(postgres).await.expect("it follows");
    standby.becomes_synchronous(postgres).await.expect("commits wait for it");
    for text in ["m1", "m2", "m3"] {
        world.send(text).await;
    }
    let (_, before) = world.peek().await;
    world.fail_over_to(standby).await;
    assert_eq!(world.send("m4").await, 4);
    let (seen, store_id) = world.peek().await;
    assert_eq!(seen, ["m1", "m2", "m3", "m4"]);
    assert_ne!(store_id, before);
}
