//! An edge with a clock that is a hundred days off, in a cluster with an edge whose clock is right.
//! The edge with the wrong clock is not ready and removes nothing, and messages that it accepts are
//! delivered.

use bytes::Bytes;
use qpq_proto::{
    methods::{Enqueue, FetchWait, Health},
    v1,
};
use qpq_tests::{
    accounts::Account,
    client::Client,
    cluster::{Cluster, Place, Plan},
};

use super::{client_at_each, until};

const EDGES: usize = 2;
const WRONG: usize = 1;

async fn send(client: &Client, account: &Account, text: &'static str) {
    let request = v1::EnqueueRequest {
        recipient_key: account.identity.clone(),
        payload: Bytes::from_static(text.as_bytes()),
        message_id: Bytes::copy_from_slice(&rand::random::<[u8; 16]>()),
        ..Default::default()
    };
    client.must::<Enqueue>(&request, Some(&account.token)).await.expect("accepted");
}

/// Fetches with a wait, because messages of an earlier read may still be leased.
async fn fetched(client: &Client, account: &Account) -> Vec<Bytes> {
    let request = v1::FetchWaitRequest { timeout_ms: 30_000, ..Default::default() };
    let page = client.must::<FetchWait>(&request, Some(&account.token)).await.expect("a page");
    page.payloads.into_iter().map(|envelope| envelope.data).collect()
}

async fn a_wrong_clock_loses_nothing(offset: &'static str, says: &str) {
    let plan = Plan { edges: EDGES, place: Place::Apart, ..Plan::default() };
    let cluster = Cluster::start(plan).await.expect("a cluster");
    let account = cluster.accounts(1).await.expect("an account").remove(0);
    cluster.kill_edge(WRONG).await.expect("killed");
    send(&client_at_each(&cluster, 1).await[0], &account, "one").await;
    cluster.set_clock(WRONG, Some(offset));
    cluster.start_edge(WRONG).await.expect("it starts without being ready");

    let clients = client_at_each(&cluster, EDGES).await;
    let health = async |edge: usize| {
        let health = clients[edge].must::<Health>(&v1::HealthRequest {}, None).await;
        health.expect("Health answers").status
    };
    assert_eq!(health(WRONG).await, "degraded", "at its first call");
    until("the right one is ready", || async { health(0).await == "ok" }).await;
    send(&clients[WRONG], &account, "two").await;
    send(&clients[0], &account, "three").await;
    until("the log names the difference", || async {
        let log = cluster.log(WRONG);
        log.contains("clock of this edge") && log.contains(says)
    })
    .await;
    // A sweep by a clock that is ahead would have removed the messages as expired.
    assert_eq!(cluster.messages_left().await.expect("a count"), 3);
    assert_eq!(fetched(&clients[0], &account).await, ["one", "two", "three"]);
    send(&clients[WRONG], &account, "four").await;
    assert_eq!(fetched(&clients[WRONG], &account).await, ["four"]);
    assert_eq!(health(WRONG).await, "degraded");

    cluster.drain_edge(WRONG).await.expect("drained");
    cluster.set_clock(WRONG, None);
    cluster.start_edge(WRONG).await.expect("started");
    let clients = client_at_each(&cluster, EDGES).await;
    send(&clients[0], &account, "five").await;
    assert_eq!(
        fetched(&clients[WRONG], &account).await,
        ["five"],
        "after its clock is right again"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_edge_that_is_a_hundred_days_ahead_is_not_ready_and_loses_nothing() {
    a_wrong_clock_loses_nothing("+100d", "ahead of").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_edge_that_is_a_hundred_days_behind_is_not_ready_and_loses_nothing() {
    a_wrong_clock_loses_nothing("-100d", "behind").await;
}
