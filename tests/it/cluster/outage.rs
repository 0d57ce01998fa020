//! A store that is killed or hangs. Calls that need it are refused temporarily, with the time to
//! wait, and Health is `degraded`. Once the store runs again, the cluster serves again by itself.

use bytes::Bytes;
use qpq_proto::{
    methods::{Enqueue, FetchWait, Health, Peek},
    v1,
};
use qpq_tests::{
    accounts::Account,
    client::{Client, Refused},
    cluster::{Cluster, Plan},
};

use super::{client_at_each, until};

const EDGES: usize = 2;
const UNAVAILABLE: u8 = 9;

struct World {
    cluster: Cluster,
    clients: Vec<Client>,
    account: Account,
}

impl World {
    async fn new() -> Self {
        let plan = Plan { edges: EDGES, ..Plan::default() }
            .with("QPQ_POSTGRES__TIMEOUT", "1s")
            .with("QPQ_REDIS__TIMEOUT", "1s");
        let cluster = Cluster::start(plan).await.expect("a cluster");
        let clients = client_at_each(&cluster, EDGES).await;
        let account = cluster.accounts(1).await.expect("an account").remove(0);
        Self { cluster, clients, account }
    }

    async fn health(&self, edge: usize) -> String {
        self.clients[edge]
            .must::<Health>(&v1::HealthRequest {}, None)
            .await
            .expect("Health answers")
            .status
    }

    async fn peek(&self, edge: usize) -> Result<v1::PeekResponse, Refused> {
        let request = v1::PeekRequest::default();
        self.clients[edge]
            .call::<Peek>(&request, Some(&self.account.token))
            .await
            .expect("an answer")
    }

    async fn send(&self, edge: usize, text: &'static str) -> Result<v1::EnqueueResponse, Refused> {
        let request = v1::EnqueueRequest {
            recipient_key: self.account.identity.clone(),
            payload: Bytes::from_static(text.as_bytes()),
            message_id: Bytes::copy_from_slice(&rand::random::<[u8; 16]>()),
            ..Default::default()
        };
        self.clients[edge]
            .call::<Enqueue>(&request, Some(&self.account.token))
            .await
            .expect("an answer")
    }

    /// Waits until every edge reports this status.
    async fn becomes(&self, status: &'static str) {
        for edge in 0..EDGES {
            until(status, || async { self.health(edge).await == status }).await;
        }
    }

    /// Checks that a message sent at one edge arrives at the other.
    async fn serves(&self) {
        for edge in 0..EDGES {
            until("a message is accepted", || async { self.send(edge, "hello").await.is_ok() })
                .await;
            let other = (edge + 1) % EDGES;
            let request = v1::FetchWaitRequest { timeout_ms: 30_000, ..Default::default() };
            let mut arrived = false;
            while !arrived {
                let call = self.clients[other]
                    .call::<FetchWait>(&request, Some(&self.account.token))
                    .await;
                match call.expect("an answer") {
                    Ok(page) => {
                        arrived = page.payloads.iter().any(|envelope| envelope.data == "hello")
                    }
                    Err(refused) => assert!(refused.is_temporary(), "{refused:?}"),
                }
            }
        }
    }
}

#[track_caller]
fn is_refused_temporarily<T: std::fmt::Debug>(outcome: Result<T, Refused>, what: &str) {
    let refused = outcome.expect_err(what);
    assert_eq!(refused.status, UNAVAILABLE, "{what}: {refused:?}");
    assert!(refused.retry_after_ms > 0, "{what}: {refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_postgres_calls_are_refused_temporarily_until_it_runs_again() {
    let world = World::new().await;
    world.becomes("ok").await;
    world.cluster.postgres.kill9().await.unwrap();
    for edge in 0..EDGES {
        is_refused_temporarily(world.peek(edge).await, "a read");
        is_refused_temporarily(world.send(edge, "lost?").await, "a message");
    }
    world.becomes("degraded").await;
    world.cluster.postgres.start_again().await.unwrap();
    world.becomes("ok").await;
    world.serves().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_redis_messages_are_accepted_and_reads_are_refused_temporarily() {
    let world = World::new().await;
    world.cluster.redis.kill9().await.unwrap();
    for edge in 0..EDGES {
        world.send(edge, "kept").await.expect("accepting needs only Postgres");
        is_refused_temporarily(world.peek(edge).await, "a read");
    }
    world.becomes("degraded").await;
    world.cluster.redis.start_again().await.unwrap();
    world.becomes("ok").await;
    let kept = world.peek(0).await.expect("a read").payloads;
    assert_eq!(kept.len(), EDGES);
    world.serves().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_end_when_a_store_hangs() {
    let world = World::new().await;
    world.cluster.redis.freeze();
    is_refused_temporarily(world.peek(0).await, "a read, Redis hangs");
    world.becomes("degraded").await;
    world.cluster.redis.thaw();
    world.becomes("ok").await;
    world.cluster.nats.freeze();
    world.serves().await;
    world.cluster.nats.thaw();
    world.cluster.postgres.freeze();
    is_refused_temporarily(world.send(1, "hangs").await, "a message, Postgres hangs");
    is_refused_temporarily(world.peek(0).await, "a read, Postgres hangs");
    world.becomes("degraded").await;
    world.cluster.postgres.thaw();
    world.becomes("ok").await;
    world.serves().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_nats_all_calls_succeed() {
    let world = World::new().await;
    world.cluster.nats.kill9().await.unwrap();
    world.serves().await;
    for edge in 0..EDGES {
        world.peek(edge).await.expect("a read");
    }
    world.cluster.nats.start_again().await.unwrap();
    world.serves().await;
    world.becomes("ok").await;
}
