//! A client that asks for more than its share causes no more work in the stores than others.

use bytes::Bytes;
use qpq_proto::{
    Status,
    methods::{Enqueue, Fetch, FetchWait, Method as _},
    v1,
};
use qpq_tests::{
    client::{Client, Dial, Refused, encode, endpoint_with},
    cluster::{Cluster, Place, Plan},
};

use super::{client_at_each, until};

const EDGES: usize = 2;
const WAITS: usize = 960;
const ENQUEUES: usize = 27;

fn plan(edges: usize) -> Plan {
    Plan { edges, place: Place::Apart, ..Plan::default() }.with("QPQ_HTTP__LISTEN", "127.0.0.1:0")
}

/// Returns the sum of a metric over the edges.
async fn sum(cluster: &Cluster, edges: usize, name: &str, label: &str) -> f64 {
    let mut sum = 0.0;
    for edge in 0..edges {
        sum += cluster.metrics(edge).await.expect("a page of metrics").sum(name, label);
    }
    sum
}

#[tokio::test(flavor = "multi_thread")]
async fn many_waits_of_one_account_cause_few_reads_of_the_stores() {
    let cluster = Cluster::start(plan(EDGES)).await.unwrap();
    let accounts = cluster.accounts(2).await.unwrap();
    let [greedy, sender] = &accounts[..] else { panic!("two accounts") };
    let request = v1::FetchWaitRequest {
        channel_id: Bytes::from_static(&[9; 16]),
        timeout_ms: 30_000,
        ..Default::default()
    };
    let request = encode::<FetchWait>(&request, Some(&greedy.token));
    let mut waits = Vec::new();
    for _ in 0..WAITS / 60 / EDGES {
        for client in client_at_each(&cluster, EDGES).await {
            for _ in 0..60 {
                let asked = client.ask(FetchWait::INFO.id, request.clone()).await;
                waits.push((client.clone(), asked.expect("the request is sent").1));
            }
        }
    }
    // At most eight wait at each edge, and the others are answered.
    let ended = || sum(&cluster, EDGES, "qpq_rpc_calls_total", "method=\"FetchWait\"");
    until("the oldest are answered", || async { ended().await >= (WAITS - 8 * EDGES) as f64 })
        .await;
    let reads = || async {
        let hot = sum(&cluster, EDGES, "qpq_hot_reads_total", "").await;
        let postgres = sum(&cluster, EDGES, "qpq_pg_seconds_count", "").await;
        let redis = sum(&cluster, EDGES, "qpq_redis_seconds_count", "").await;
        (hot, postgres, redis)
    };
    let before = reads().await;
    let client = client_at_each(&cluster, 1).await.remove(0);
    for n in 0..ENQUEUES {
        let request = v1::EnqueueRequest {
            recipient_key: greedy.identity.clone(),
            payload: Bytes::from(format!("message {n}")),
            ..Default::default()
        };
        client.must::<Enqueue>(&request, Some(&sender.token)).await.expect("space in the inbox");
    }
    let after = reads().await;
    let (hot, postgres, redis) = (after.0 - before.0, after.1 - before.1, after.2 - before.2);
    println!(
        "{WAITS} waits, {ENQUEUES} messages: {hot} reads, {postgres} of Postgres, {redis} of Redis"
    );
    // Without the limits there were 42 257 reads.
    assert!(hot <= (2 * EDGES * ENQUEUES) as f64, "{hot} reads");
    drop(waits);
}

async fn fetch(client: &Client, token: &[u8]) -> Result<(), Refused> {
    client
        .call::<Fetch>(&v1::FetchRequest::default(), Some(token))
        .await
        .expect("an answer")
        .map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn made_up_tokens_are_refused_without_a_query_and_other_sessions_work() {
    let cluster = Cluster::start(plan(1).with("QPQ_LIMITS__ENABLED", "true")).await.unwrap();
    let accounts = cluster.accounts(1).await.unwrap();
    let greedy = client_at_each(&cluster, 1).await.remove(0);
    let lookups = || sum(&cluster, 1, "qpq_session_lookups_total", "from=\"postgres\"");
    let before = lookups().await;
    let (mut unknown, mut limited) = (0, 0);
    for n in 0..3_000_u32 {
        let mut token = [0xa5; 32];
        token[..4].copy_from_slice(&n.to_be_bytes());
        match fetch(&greedy, &token).await.expect_err("no such session") {
            refused if refused.status == Status::Unauthorized.code() => unknown += 1,
            refused => {
                assert_eq!(refused.code, "rpc.rate_limited");
                limited += 1;
            }
        }
    }
    let asked = lookups().await - before;
    println!("3000 tokens: {unknown} unknown, {limited} limited, {asked} queries");
    assert!(limited > 0);
    assert!(asked <= f64::from(unknown), "{asked} queries for {unknown} tokens");
    fetch(&greedy, &accounts[0].token).await.expect("a real session at this address");
    let entry_points = cluster.entry_points();
    let dial = Dial { from: [127, 0, 0, 2].into(), ..Dial::default() };
    let endpoint = endpoint_with(entry_points.pin, dial).unwrap();
    let elsewhere = Client::connect(&endpoint, entry_points.addrs[0]).await.unwrap();
    fetch(&elsewhere, &accounts[0].token).await.expect("a real session elsewhere");
    let refused = fetch(&elsewhere, &[1; 32]).await.expect_err("no such session");
    assert_eq!(refused.status, Status::Unauthorized.code(), "looked up");
}
