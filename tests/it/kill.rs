//! `kill -9` at any time under load loses no acknowledged message, uses no seq twice, skips none,
//! and returns no message after the answer to its Ack.
//!
//! Writers and readers run while the server is killed and started again on the same data, fifty
//! times, each time after a random number of answers. The answers are recorded and compared with
//! the messages that are left at the end.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use parking_lot::Mutex;
use qpq_proto::{
    methods::{Ack, BatchEnqueue, Enqueue, Fetch, Peek},
    v1,
};
use qpq_tests::{
    accounts::{self, Account},
    client::{Client, endpoint},
};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use tokio::{sync::Notify, task::JoinSet};

use crate::server::{self, Running};

const ROUNDS: usize = 50;
const WRITERS: usize = 12;
/// The number of inboxes. The last one has a reader that peeks and acks, the one before a reader
/// that drains, and all others have none.
const INBOXES: usize = 6;
const PEEKED: usize = INBOXES - 1;
const DRAINED: usize = INBOXES - 2;

/// The answers to calls, over all restarts of the server.
#[derive(Default)]
struct History {
    /// The acknowledged payloads of each inbox, by seq.
    acknowledged: Mutex<[BTreeMap<u64, Bytes>; INBOXES]>,
    /// The seqs of answered Acks.
    acked: Mutex<BTreeSet<u64>>,
    /// The seqs of all Acks. An Ack without an answer may have taken effect.
    ack_asked: Mutex<BTreeSet<u64>>,
    /// The payloads that the drained inbox delivered, by seq.
    drained: Mutex<BTreeMap<u64, Bytes>>,
    answers: AtomicU64,
    progress: Notify,
    /// Set when the server is about to be killed.
    stop: AtomicBool,
}

impl History {
    fn answered(&self) {
        self.answers.fetch_add(1, Ordering::SeqCst);
        self.progress.notify_one();
    }

    fn note_acknowledged(&self, inbox: usize, seq: u64, payload: &Bytes) {
        let before = self.acknowledged.lock()[inbox].insert(seq, payload.clone());
        assert!(
            before.is_none_or(|b| b == *payload),
            "inbox {inbox}: seq {seq} is used for two messages"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_kills_under_load_lose_nothing() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let data = dir.path().join("data");
    let history = Arc::new(History::default());
    let mut random = StdRng::seed_from_u64(0x9e37_79b9);

    let mut running = server::start(&data).await;
    let accounts = Arc::new(
        accounts::make(&endpoint(running.pin).expect("a socket"), running.addr, INBOXES)
            .await
            .expect("accounts"),
    );
    for _ in 0..ROUNDS {
        let (tasks, clients) = load(&running, &history, &accounts).await;
        let until = history.answers.load(Ordering::SeqCst) + random.gen_range(1..120);
        while history.answers.load(Ordering::SeqCst) < until {
            history.progress.notified().await;
        }
        history.stop.store(true, Ordering::SeqCst);
        running.process.stop().await.expect("kill -9");
        // Answers that the client's QUIC stack has already received are still read. Other calls
        // fail and do not count.
        clients.iter().for_each(Client::close);
        tasks.join_all().await;
        history.stop.store(false, Ordering::SeqCst);
        running = server::start(&data).await;
    }
    verify(&running, &history, &accounts).await;
}

async fn load(
    running: &Running,
    history: &Arc<History>,
    accounts: &Arc<Vec<Account>>,
) -> (JoinSet<()>, Vec<Client>) {
    let mut tasks = JoinSet::new();
    let mut clients = Vec::new();
    for worker in 0..WRITERS + 2 {
        let client = running.connect().await;
        clients.push(client.clone());
        let (history, accounts) = (Arc::clone(history), Arc::clone(accounts));
        tasks.spawn(async move {
            // Each worker ends with an error when its connection is lost.
            let _lost = match worker {
                WRITERS => peek_and_ack(&client, &history, &accounts[PEEKED]).await,
                writer if writer < WRITERS => write(writer, &client, &history, &accounts).await,
                _ => drain(&client, &history, &accounts[DRAINED]).await,
            };
        });
    }
    (tasks, clients)
}

/// Enqueues to the inboxes in turn, one by one and in batches, until the connection is lost.
async fn write(
    writer: usize,
    client: &Client,
    history: &History,
    accounts: &[Account],
) -> anyhow::Result<()> {
    let token = &accounts[writer % INBOXES].token;
    for i in 0_usize.. {
        if history.stop.load(Ordering::SeqCst) {
            break;
        }
        let inbox = (writer + i) % INBOXES;
        let payload = Bytes::copy_from_slice(&rand::random::<[u8; 32]>());
        if i % 4 == 3 {
            let recipient_keys = accounts.iter().map(|a| a.identity.clone()).collect();
            let request = v1::BatchEnqueueRequest {
                recipient_keys,
                payload: payload.clone(),
                ..Default::default()
            };
            let response = client.must::<BatchEnqueue>(&request, Some(token)).await?;
            for (inbox, result) in response.results.iter().enumerate() {
                assert_eq!(result.status, 0, "a batch's message is refused: {result:?}");
                history.note_acknowledged(inbox, result.seq, &payload);
            }
        } else {
            let request = v1::EnqueueRequest {
                recipient_key: accounts[inbox].identity.clone(),
                payload: payload.clone(),
                message_id: payload.slice(..16),
                ..Default::default()
            };
            let response = client.must::<Enqueue>(&request, Some(token)).await?;
            history.note_acknowledged(inbox, response.seq, &payload);
        }
        history.answered();
    }
    Ok(())
}

/// Peeks from the start, checks that no acked message is returned, and acks half of the page.
async fn peek_and_ack(client: &Client, history: &History, account: &Account) -> anyhow::Result<()> {
    while !history.stop.load(Ordering::SeqCst) {
        let acked = history.acked.lock().clone();
        let request = v1::PeekRequest { limit: 20, ..Default::default() };
        let page = client.must::<Peek>(&request, Some(&account.token)).await?.payloads;
        for envelope in &page {
            assert!(
                !acked.contains(&envelope.seq),
                "seq {} is returned after the answer to its Ack",
                envelope.seq
            );
        }
        if let Some(middle) = page.get(page.len() / 2) {
            let covered: Vec<u64> =
                page.iter().map(|e| e.seq).filter(|seq| *seq <= middle.seq).collect();
            history.ack_asked.lock().extend(&covered);
            let request = v1::AckRequest { seq_up_to: middle.seq, ..Default::default() };
            client.must::<Ack>(&request, Some(&account.token)).await?;
            history.acked.lock().extend(covered);
            history.answered();
        }
    }
    Ok(())
}

/// Drains and records all messages.
async fn drain(client: &Client, history: &History, account: &Account) -> anyhow::Result<()> {
    while !history.stop.load(Ordering::SeqCst) {
        let request = v1::FetchRequest { limit: 10, ..Default::default() };
        let page = client.must::<Fetch>(&request, Some(&account.token)).await?.payloads;
        let mut drained = history.drained.lock();
        for envelope in page {
            let before = drained.insert(envelope.seq, envelope.data.clone());
            assert!(
                before.is_none_or(|b| b == envelope.data),
                "seq {} is used for two messages",
                envelope.seq
            );
        }
        drop(drained);
        history.answered();
    }
    Ok(())
}

async fn verify(running: &Running, history: &History, accounts: &[Account]) {
    let acknowledged = history.acknowledged.lock().clone();
    let client = running.connect().await;
    let mut checked = 0;
    for (inbox, account) in accounts.iter().enumerate() {
        let left = everything(&client, account).await;
        let drained =
            if inbox == DRAINED { history.drained.lock().clone() } else { BTreeMap::new() };
        let ack_asked =
            if inbox == PEEKED { history.ack_asked.lock().clone() } else { BTreeSet::new() };
        for (seq, payload) in &acknowledged[inbox] {
            let there = left.get(seq).or_else(|| drained.get(seq));
            assert!(
                there.is_some() || ack_asked.contains(seq),
                "inbox {inbox}: acknowledged seq {seq} is lost"
            );
            assert!(
                there.is_none_or(|p| p == payload),
                "inbox {inbox}: seq {seq} is another message"
            );
            checked += 1;
        }
        if inbox == PEEKED {
            let back: Vec<_> =
                history.acked.lock().iter().filter(|seq| left.contains_key(seq)).copied().collect();
            assert!(back.is_empty(), "returned after the answer to their Ack: {back:?}");
        }
        // Messages that are left and messages that were removed together have all seqs from 1. Some
        // of them may not be acknowledged, because an Enqueue without an answer may have taken
        // effect.
        let known: BTreeSet<u64> =
            left.keys().chain(drained.keys()).chain(&ack_asked).copied().collect();
        let last = known.last().copied().unwrap_or(0);
        let missing: Vec<u64> = (1..=last).filter(|seq| !known.contains(seq)).collect();
        assert!(missing.is_empty(), "inbox {inbox}: seqs {missing:?} of {last} are skipped");
    }
    assert!(
        checked > ROUNDS * 10,
        "only {checked} messages were acknowledged, too few for this test"
    );
}

/// Returns all messages of the account's inbox, by seq.
async fn everything(client: &Client, account: &Account) -> BTreeMap<u64, Bytes> {
    let mut all = BTreeMap::new();
    let mut after_seq = 0;
    loop {
        let request = v1::PeekRequest { after_seq, all_channels: true, ..Default::default() };
        let page =
            client.must::<Peek>(&request, Some(&account.token)).await.expect("a peek").payloads;
        let Some(last) = page.last() else { return all };
        after_seq = last.seq;
        all.extend(page.into_iter().map(|e| (e.seq, e.data)));
    }
}
