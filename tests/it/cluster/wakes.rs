//! All wakes between edges are lost, and every message arrives all the same, because each edge
//! polls the inboxes that its calls wait for.

use std::time::Duration;

use bytes::Bytes;
use qpq_proto::{
    methods::{Enqueue, FetchWait},
    v1,
};
use qpq_test_services::proxy::{Link, Way};
use qpq_tests::{
    accounts::Account,
    client::Client,
    cluster::{Cluster, Plan, Wiring},
    roaming::Roamer,
};
use tokio::{task::JoinSet, time::timeout};

use super::until;

const EDGES: usize = 3;
const WAITERS: usize = 12;
/// The time limit of an arrival: far longer than the interval of polls, and far shorter than the
/// timeout of the call, which is the next reason for a read.
const SOON: Duration = Duration::from_secs(25);

#[tokio::test(flavor = "multi_thread")]
async fn messages_arrive_while_all_wakes_are_dropped() {
    let plan = Plan { edges: EDGES, wiring: Wiring::Proxied, seed: 6, ..Plan::default() };
    let cluster = Cluster::start(plan).await.unwrap();
    let accounts = cluster.accounts(WAITERS).await.unwrap();
    for edge in 0..EDGES {
        cluster.links(edge).nats.switch().change(|faults| faults.link = Link::Blackhole(Way::Both));
    }
    for round in ["all wakes are dropped", "again"] {
        all_arrive(&cluster, &accounts, round).await;
    }
    for edge in 0..EDGES {
        cluster.links(edge).nats.switch().heal();
    }
    cluster.nats.kill9().await.unwrap();
    all_arrive(&cluster, &accounts, "NATS has stopped").await;
    cluster.nats.start_again().await.unwrap();
    all_arrive(&cluster, &accounts, "NATS is back").await;
}

/// Starts a FetchWait of each account at an edge, then sends the account a message through another
/// edge.
async fn all_arrive(cluster: &Cluster, accounts: &[Account], when: &'static str) {
    let entry_points = cluster.entry_points();
    let mut waits = JoinSet::new();
    for (n, account) in accounts.iter().enumerate() {
        let client: Client =
            Roamer::at(&entry_points, 1 + n % (EDGES - 1)).patient().connected().await;
        let token = account.token.clone();
        waits.spawn(async move {
            let request = v1::FetchWaitRequest { timeout_ms: 60_000, ..Default::default() };
            let wait = client.must::<FetchWait>(&request, Some(&token));
            let page = timeout(2 * SOON, wait).await.expect("the call ends").expect("an answer");
            (n, page.payloads.into_iter().map(|envelope| envelope.data).collect::<Vec<_>>())
        });
    }
    until("all wait", || async { waiting(cluster).await == WAITERS }).await;
    let mut sender = Roamer::at(&entry_points, 0);
    for (n, account) in accounts.iter().enumerate() {
        let request = v1::EnqueueRequest {
            recipient_key: account.identity.clone(),
            payload: Bytes::from(format!("{when} {n}")),
            ..Default::default()
        };
        sender.must::<Enqueue>(&request, Some(&account.token)).await;
    }
    let arrived =
        timeout(SOON, waits.join_all()).await.unwrap_or_else(|_| panic!("{when}: not all arrive"));
    for (n, page) in arrived {
        assert_eq!(page, [Bytes::from(format!("{when} {n}"))], "{when}");
    }
}

/// Returns the number of inboxes for which an edge is registered in Redis as waiting.
async fn waiting(cluster: &Cluster) -> usize {
    let count = cluster.redis.command(["EVAL", "return #redis.call('KEYS', '*}w')", "0"]).await;
    match count.expect("Redis counts") {
        qpq_test_services::resp::Reply::Integer(count) => usize::try_from(count).expect("a count"),
        other => panic!("no count: {other:?}"),
    }
}
