//! A client that asks for more than its share, against the real server over QUIC: memory stays
//! within a bound, and others are served.

use std::time::Duration;

use bytes::Bytes;
use qpq_proto::{
    Status,
    methods::{BatchEnqueue, Enqueue, Health, Method, Peek},
    v1,
};
use qpq_tests::{
    accounts::{self, Account, login_with},
    client::{Client, Dial, encode, endpoint_with},
    metrics::Metrics,
    process::resident,
};
use qpq_wire::RequestHeader;
use quinn::{RecvStream, SendStream};
use tokio::time::{Instant, sleep};

use crate::server::{self, Running};

const MIB: u64 = 1 << 20;

/// The time after which a waiting test fails.
const HANGS: Duration = Duration::from_secs(120);

/// The memory that the server may use in addition to its budgets: pages that are being encoded, the
/// state of connections and streams, and freed memory that the allocator keeps.
const OVERHEAD: u64 = 64 * MIB;

const NO_RATE_LIMITS: (&str, &str) = ("QPQ_LIMITS__ENABLED", "false");
const HTTP: (&str, &str) = ("QPQ_HTTP__LISTEN", "127.0.0.1:0");

async fn accounts_at(running: &Running, count: usize) -> Vec<Account> {
    let endpoint = qpq_tests::client::endpoint(running.pin).expect("a socket");
    accounts::make(&endpoint, running.addr, count).await.expect("accounts")
}

async fn client_with(running: &Running, dial: Dial) -> Client {
    let endpoint = endpoint_with(running.pin, dial).expect("a socket");
    Client::connect(&endpoint, running.addr).await.expect("the server accepts")
}

async fn enqueue(client: &Client, account: &Account, payload: Bytes) {
    let request = v1::EnqueueRequest {
        recipient_key: account.identity.clone(),
        payload,
        ..Default::default()
    };
    client.must::<Enqueue>(&request, Some(&account.token)).await.expect("space in the inbox");
}

/// Puts four messages of almost 1 MiB into the account's own inbox.
async fn fill(client: &Client, account: &Account) {
    for n in 0..4_u8 {
        enqueue(client, account, vec![n; (MIB - 1_024) as usize].into()).await;
    }
}

/// Sends a Peek of the account's inbox. Returns the stream of the answer.
async fn peek(client: &Client, account: &Account) -> RecvStream {
    let request = encode::<Peek>(&v1::PeekRequest::default(), Some(&account.token));
    client.ask(Peek::INFO.id, request).await.expect("the request is sent").1
}

async fn metrics(running: &Running) -> Metrics {
    Metrics::of(&running.process).await.expect("a page of metrics")
}

/// Waits until `holds` returns true for the page of metrics.
async fn until(running: &Running, what: &str, holds: impl Fn(&Metrics) -> bool) {
    let begun = Instant::now();
    while !holds(&metrics(running).await) {
        assert!(begun.elapsed() < HANGS, "not within {HANGS:?}: {what}");
        sleep(Duration::from_millis(20)).await;
    }
}

fn answers_are_freed(metrics: &Metrics) -> bool {
    metrics.sum("qpq_rpc_answer_bytes", "") == 0.0
}

#[tokio::test(flavor = "multi_thread")]
async fn unread_answers_of_eight_connections_stay_within_a_bound_and_others_are_served() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let running = server::start_with(&dir.path().join("data"), &[NO_RATE_LIMITS, HTTP]).await;
    let accounts = accounts_at(&running, 2).await;
    let [greedy, other] = &accounts[..] else { panic!("two accounts") };
    let usual = running.connect().await;
    fill(&usual, greedy).await;
    let resident = || resident(running.process.pid()).expect("the server runs");
    let before = resident();

    let mut unread = Vec::new();
    for _ in 0..8 {
        let client =
            client_with(&running, Dial { stream_credit: Some(0), ..Dial::default() }).await;
        for _ in 0..64 {
            unread.push(peek(&client, greedy).await);
        }
    }
    let peeks = |metrics: &Metrics| metrics.sum("qpq_rpc_calls_total", "method=\"Peek\"");
    let (mut peak, begun, mut sent) = (0, Instant::now(), 0_u32);
    while peeks(&metrics(&running).await) < f64::from(8 * 64 + sent) {
        assert!(begun.elapsed() < HANGS, "the calls do not end");
        enqueue(&usual, other, Bytes::from_static(b"meanwhile")).await;
        let page = usual.must::<Peek>(&v1::PeekRequest::default(), Some(&other.token)).await;
        sent += 1;
        assert_eq!(page.expect("the other account is served").payloads.len(), sent as usize);
        peak = peak.max(resident());
        sleep(Duration::from_millis(20)).await;
    }
    let used = peak.saturating_sub(before);
    println!("512 unread answers: {} MiB", used / MIB);
    assert!(used <= 16 * MIB + OVERHEAD, "{} MiB", used / MIB);

    drop(unread);
    until(&running, "answers are freed", answers_are_freed).await;
    let page = usual.must::<Peek>(&v1::PeekRequest::default(), Some(&greedy.token)).await;
    assert_eq!(page.expect("nothing is lost").payloads.len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_reads_a_little_does_not_occupy_memory_permanently() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    // Without the minimum rate, this client could keep its answers for hours.
    let pace = [
        ("QPQ_TRANSPORT__STALLED_REPLY_TIMEOUT", "3s"),
        ("QPQ_TRANSPORT__MIN_REPLY_RATE", "1MiB"),
        NO_RATE_LIMITS,
        HTTP,
    ];
    let running = server::start_with(&dir.path().join("data"), &pace).await;
    let accounts = accounts_at(&running, 1).await;
    let usual = running.connect().await;
    fill(&usual, &accounts[0]).await;
    let slow = client_with(&running, Dial { stream_credit: Some(64), ..Dial::default() }).await;
    let mut answers = Vec::new();
    for _ in 0..2 {
        answers.push(peek(&slow, &accounts[0]).await);
    }
    until(&running, "answers are built", |metrics| !answers_are_freed(metrics)).await;
    let trickle = tokio::spawn(async move {
        loop {
            for answer in &mut answers {
                let _ = answer.read_chunk(64, true).await;
            }
            sleep(Duration::from_millis(300)).await;
        }
    });
    until(&running, "answers are freed", answers_are_freed).await;
    assert!(!trickle.is_finished(), "the client still reads");
    trickle.abort();
    assert!(metrics(&running).await.sum("qpq_transport_replies_too_slow_total", "") >= 1.0);
    let page = usual.must::<Peek>(&v1::PeekRequest::default(), Some(&accounts[0].token)).await;
    assert_eq!(page.expect("nothing is lost").payloads.len(), 4);
}

/// Sends 3 MiB of a request of 4 MiB, without a session. Returns the stream of the request, or
/// `None` if the server answers before.
async fn unfinished_request(client: &Client) -> Option<SendStream> {
    let (mut send, mut recv) = client.open().await.expect("a stream");
    let header = RequestHeader {
        method_id: BatchEnqueue::INFO.id,
        request_id: 1,
        payload_len: (4 * MIB) as u32,
    };
    let write = async {
        send.write_all(&header.encode()).await?;
        send.write_all(&vec![0; 3 * MIB as usize]).await
    };
    // A server that refuses answers before it has the whole request.
    tokio::select! {
        _ = write => Some(send),
        _ = recv.read_chunk(usize::MAX, true) => None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn unfinished_requests_without_a_session_stay_within_a_bound_and_others_are_served() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let running = server::start_with(&dir.path().join("data"), &[NO_RATE_LIMITS, HTTP]).await;
    let accounts = accounts_at(&running, 1).await;
    let usual = client_with(&running, from([127, 0, 0, 2])).await;
    let resident = || resident(running.process.pid()).expect("the server runs");
    let (before, mut peak) = (resident(), 0);
    let mut unfinished = Vec::new();
    for _ in 0..8 {
        let client = client_with(&running, Dial::default()).await;
        let requests = (0..64).map(|_| unfinished_request(&client));
        unfinished.push((futures_util::future::join_all(requests).await, client.clone()));
        client.must::<Health>(&v1::HealthRequest {}, None).await.expect("a small request");
        let used = metrics(&running).await.sum("qpq_transport_request_bytes", "");
        assert!((1.0..=(64 * MIB) as f64).contains(&used), "{used}");
        enqueue(&usual, &accounts[0], vec![7; (MIB - 1_024) as usize].into()).await;
        peak = peak.max(resident());
    }
    let refused =
        metrics(&running).await.sum("qpq_transport_requests_refused_total", "client_memory");
    assert!(refused >= 8.0 * 48.0, "{refused}");
    let used = peak.saturating_sub(before);
    println!("512 unfinished requests: {} MiB", used / MIB);
    assert!(used <= 64 * MIB + OVERHEAD, "{} MiB", used / MIB);
}

fn from(address: [u8; 4]) -> Dial {
    Dial { from: address.into(), ..Dial::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn guesses_from_one_address_do_not_lock_the_account_at_another() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let running = server::start_with(&dir.path().join("data"), &[HTTP]).await;
    let alice = accounts_at(&running, 1).await.remove(0);
    let (guesser, owner) = (
        client_with(&running, from([127, 0, 0, 3])).await,
        client_with(&running, from([127, 0, 0, 2])).await,
    );
    let mut refused = 0;
    for round in 0..6 {
        for _ in 0..10 {
            let outcome =
                login_with(&guesser, &alice.username, b"a guess").await.expect("an answer");
            let refusal = outcome.expect_err("a wrong password");
            refused += u32::from(Status::from(refusal.status) == Status::RateLimited);
        }
        accounts::login(&owner, &alice.username).await.unwrap_or_else(|e| panic!("{round}: {e}"));
    }
    assert!(refused >= 10, "{refused} of 60 guesses were limited");
}
