//! The guarantees of an inbox that several edges use concurrently: no read after an ack returns the
//! acked messages, the seqs are free of gaps and in order, and a repeated message is accepted once.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use qpq_domain::{MessageId, Seq};
use qpq_proto::{
    methods::{Ack, BatchEnqueue, Enqueue, Fetch, Peek},
    v1,
};
use qpq_test_services::history::{Edge, History, Inbox, Recorder, Tag};
use qpq_tests::{
    accounts::Account,
    cluster::{Cluster, EntryPoints, Plan},
    roaming::Roamer,
    traffic::{keep, payload, seen},
};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use tokio::{task::JoinSet, time::sleep};

const EDGES: usize = 3;
const SEED: u64 = 0x1b0c;

async fn cluster() -> Cluster {
    Cluster::start(Plan { edges: EDGES, seed: SEED, ..Plan::default() }).await.expect("a cluster")
}

#[track_caller]
fn judge(history: &History) -> qpq_test_services::history::Report {
    let report = history.check();
    if !report.violations.is_empty() {
        keep(history, &report, &format!("seed {SEED:#x}")).expect("the history is written");
    }
    report.assert_clean();
    report
}

/// A sender of messages to one inbox through one edge.
struct Sender {
    roamer: Roamer,
    recorder: Recorder,
    random: StdRng,
    account: Account,
    next_tag: u64,
}

impl Sender {
    fn new(
        entry_points: &EntryPoints,
        history: &History,
        account: &Account,
        number: usize,
    ) -> Self {
        Self {
            roamer: Roamer::at(entry_points, number % EDGES),
            recorder: history.recorder(),
            random: StdRng::seed_from_u64(SEED + number as u64),
            account: account.clone(),
            next_tag: (number as u64 + 1) << 32,
        }
    }

    fn message(&mut self) -> (MessageId, Tag, v1::EnqueueRequest) {
        self.next_tag += 1;
        let (id, tag) = (MessageId::new(self.random.r#gen()), Tag(self.next_tag));
        let length = self.random.gen_range(8..300);
        let request = v1::EnqueueRequest {
            recipient_key: self.account.identity.clone(),
            payload: payload(tag, length, &mut self.random),
            message_id: Bytes::copy_from_slice(id.as_bytes()),
            ..Default::default()
        };
        (id, tag, request)
    }

    async fn send(&mut self) {
        let (id, tag, request) = self.message();
        let sending = self.recorder.sending(Inbox(0), id, tag, Edge(self.roamer.edge() as u16));
        let response = self.roamer.must::<Enqueue>(&request, Some(&self.account.token)).await;
        self.recorder.acknowledged(sending, Seq(response.seq));
    }

    /// Sends a batch with an unknown recipient in the middle.
    async fn send_batch(&mut self, count: usize) {
        let mut sendings = Vec::new();
        let mut request = v1::BatchEnqueueRequest::default();
        for _ in 0..count {
            let (id, tag, message) = self.message();
            sendings.push(self.recorder.sending(
                Inbox(0),
                id,
                tag,
                Edge(self.roamer.edge() as u16),
            ));
            request.messages.push(message);
        }
        let stranger =
            v1::EnqueueRequest { recipient_key: vec![2; 32].into(), ..Default::default() };
        request.messages.insert(count / 2, stranger);
        let response = self.roamer.must::<BatchEnqueue>(&request, Some(&self.account.token)).await;
        let mut results = response.results;
        let refused = results.remove(count / 2);
        assert_ne!(refused.status, 0, "the recipient is unknown");
        for (sending, result) in sendings.into_iter().zip(results) {
            assert_eq!(result.status, 0, "{result:?}");
            self.recorder.acknowledged(sending, Seq(result.seq));
        }
    }
}

/// Readers at all edges peek and ack random parts while Redis is flushed, rolled back and evicts.
/// No read that begins after the answer to an ack returns the acked messages, at any edge.
#[tokio::test(flavor = "multi_thread")]
async fn no_read_after_an_ack_returns_the_acked_messages() {
    const SENT: u64 = 3_000;
    const SENDERS: usize = 15;
    let cluster = cluster().await;
    let entry_points = cluster.entry_points();
    let history = History::new();
    let account = cluster.accounts(1).await.expect("an account").remove(0);
    let done = Arc::new(AtomicBool::new(false));
    let mut readers = JoinSet::new();
    for number in 0..2 * EDGES {
        readers.spawn(peek_and_ack(
            Roamer::at(&entry_points, number % EDGES),
            history.recorder(),
            StdRng::seed_from_u64(number as u64),
            account.token.clone(),
            Arc::clone(&done),
        ));
    }
    let mut senders = JoinSet::new();
    for number in 0..SENDERS {
        let mut sender = Sender::new(&entry_points, &history, &account, number);
        senders.spawn(async move {
            for _ in 0..SENT / SENDERS as u64 {
                sender.send().await;
            }
        });
    }
    let mut random = StdRng::seed_from_u64(SEED);
    let mut snapshot = cluster.redis.snapshot().await.expect("a snapshot");
    while !senders.is_empty() {
        match random.gen_range(0..4) {
            0 => cluster.redis.flush_all().await.expect("FLUSHALL"),
            1 => cluster.redis.roll_back_to(&snapshot).await.expect("an old dump"),
            2 => snapshot = cluster.redis.snapshot().await.expect("a snapshot"),
            // Deletes one random key, like an eviction.
            _ => drop(cluster.redis.command(["EVAL", EVICT, "0"]).await.expect("a key is deleted")),
        }
        // Faults continue until all senders have ended.
        let later = sleep(Duration::from_millis(random.gen_range(10..400)));
        tokio::select! {
            sender = senders.join_next() => sender.into_iter().for_each(|sender| sender.expect("a sender")),
            () = later => {}
        }
    }
    while cluster.messages_left().await.expect("a count") > 0 {
        sleep(Duration::from_millis(50)).await;
    }
    done.store(true, Ordering::SeqCst);
    while let Some(reader) = readers.join_next().await {
        reader.expect("a reader");
    }
    let report = judge(&history);
    assert_eq!((report.acknowledged as u64, report.delivered as u64), (SENT, SENT));
    assert!(
        report.deliveries > report.delivered,
        "no message was delivered twice, so acks were not tested"
    );
}

const EVICT: &str =
    "local key = redis.call('RANDOMKEY'); if key then redis.call('DEL', key) end; return 1";

async fn peek_and_ack(
    mut roamer: Roamer,
    mut recorder: Recorder,
    mut random: StdRng,
    token: Bytes,
    done: Arc<AtomicBool>,
) {
    while !done.load(Ordering::SeqCst) {
        let request = v1::PeekRequest { limit: random.gen_range(1..60), ..Default::default() };
        let reading = recorder.reading(Inbox(0));
        let page = roamer.must::<Peek>(&request, Some(&token)).await.payloads;
        recorder.delivered(reading, seen(&page));
        let few: Vec<u64> =
            page.iter().map(|envelope| envelope.seq).filter(|_| random.gen_ratio(1, 3)).collect();
        let (request, acking) = match (few.last(), random.r#gen()) {
            (None, _) => {
                roamer.pause().await;
                continue;
            }
            (Some(last), true) => (
                v1::AckRequest { seq_up_to: *last, ..Default::default() },
                recorder.acking_through(Inbox(0), Seq(*last)),
            ),
            (Some(_), false) => (
                v1::AckRequest { seqs: few.clone(), ..Default::default() },
                recorder.acking(Inbox(0), few.iter().copied().map(Seq)),
            ),
        };
        roamer.must::<Ack>(&request, Some(&token)).await;
        recorder.acked(acking);
    }
}

/// Senders at every edge fill one inbox, with single messages and with batches that contain a
/// refused one. A reader at every edge receives the seqs 1, 2, 3 and so on.
#[tokio::test(flavor = "multi_thread")]
async fn seqs_of_an_inbox_are_free_of_gaps_and_in_order() {
    const SENDERS: usize = 9;
    const ROUNDS: usize = 60;
    let cluster = cluster().await;
    let entry_points = cluster.entry_points();
    let history = History::new();
    let account = cluster.accounts(1).await.expect("an account").remove(0);
    let mut senders = JoinSet::new();
    for number in 0..SENDERS {
        let mut sender = Sender::new(&entry_points, &history, &account, number);
        senders.spawn(async move {
            for _ in 0..ROUNDS {
                match sender.random.gen_range(0..4) {
                    0 => sender.send_batch(7).await,
                    _ => sender.send().await,
                }
            }
        });
    }
    let sent = Arc::new(AtomicBool::new(false));
    let mut readers = JoinSet::new();
    for edge in 0..EDGES {
        let (mut roamer, mut recorder) = (Roamer::at(&entry_points, edge), history.recorder());
        let (token, sent) = (account.token.clone(), Arc::clone(&sent));
        readers.spawn(async move {
            let mut after_seq = 0;
            loop {
                let was_all = sent.load(Ordering::SeqCst);
                let request = v1::PeekRequest { after_seq, limit: 50, ..Default::default() };
                let reading = recorder.reading(Inbox(0));
                let page = roamer.must::<Peek>(&request, Some(&token)).await.payloads;
                recorder.delivered(reading, seen(&page));
                for envelope in &page {
                    assert_eq!(envelope.seq, after_seq + 1, "edge {edge} skips a message");
                    after_seq = envelope.seq;
                }
                if was_all && page.is_empty() {
                    return after_seq;
                }
            }
        });
    }
    while let Some(sender) = senders.join_next().await {
        sender.expect("a sender");
    }
    sent.store(true, Ordering::SeqCst);
    let mut lasts = Vec::new();
    while let Some(last) = readers.join_next().await {
        lasts.push(last.expect("a reader"));
    }
    let report = judge(&history);
    assert!(report.acknowledged > SENDERS * ROUNDS, "{report}");
    assert_eq!(
        lasts,
        vec![report.acknowledged as u64; EDGES],
        "every reader received all messages"
    );
}

/// The same message is sent to every edge concurrently, and again while it is queued, after it was
/// drained, after it was acked, and after Redis was flushed. The message is accepted once, with one
/// seq.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_repeated_at_any_edge_is_accepted_once() {
    const MESSAGES: usize = 40;
    let cluster = cluster().await;
    let entry_points = cluster.entry_points();
    let history = History::new();
    let account = cluster.accounts(1).await.expect("an account").remove(0);
    let mut author = Sender::new(&entry_points, &history, &account, 0);
    let mut reader = Roamer::at(&entry_points, 1);
    let mut reads = history.recorder();
    for round in 0..MESSAGES {
        let (id, tag, request) = author.message();
        let answers = everywhere(&entry_points, &history, &account, (id, tag, &request)).await;
        let seq = round as u64 + 1;
        assert!(answers.iter().all(|(answered, _)| *answered == seq), "{answers:?}");
        let first = answers.iter().filter(|(_, duplicate)| !duplicate).count();
        assert_eq!(first, 1, "accepted as new more or less than once: {answers:?}");
        match round % 4 {
            0 => {
                let reading = reads.reading(Inbox(0));
                let page = reader
                    .must::<Fetch>(&v1::FetchRequest::default(), Some(&account.token))
                    .await
                    .payloads;
                reads.delivered(reading, seen(&page));
            }
            1 => {
                let acking = reads.acking(Inbox(0), [Seq(seq)]);
                let reading = reads.reading(Inbox(0));
                let peek = v1::PeekRequest { after_seq: seq - 1, ..Default::default() };
                let page = reader.must::<Peek>(&peek, Some(&account.token)).await.payloads;
                reads.delivered(reading, seen(&page));
                let ack = v1::AckRequest { seqs: vec![seq], ..Default::default() };
                reader.must::<Ack>(&ack, Some(&account.token)).await;
                reads.acked(acking);
            }
            2 => cluster.redis.flush_all().await.expect("FLUSHALL"),
            _ => {}
        }
        let again = everywhere(&entry_points, &history, &account, (id, tag, &request)).await;
        assert!(again.iter().all(|answer| *answer == (seq, true)), "{again:?}");
    }
    let reading = reads.reading(Inbox(0));
    let page =
        reader.must::<Peek>(&v1::PeekRequest::default(), Some(&account.token)).await.payloads;
    reads.delivered(reading, seen(&page));
    drop((reads, author));
    let report = judge(&history);
    assert_eq!(
        (report.messages, report.acknowledged, report.delivered),
        (MESSAGES, MESSAGES, MESSAGES)
    );
}

/// Sends the message twice through each edge, concurrently. Returns the seq in each answer, and
/// `true` if the answer reports a duplicate.
async fn everywhere(
    entry_points: &EntryPoints,
    history: &History,
    account: &Account,
    (id, tag, request): (MessageId, Tag, &v1::EnqueueRequest),
) -> Vec<(u64, bool)> {
    let mut sends = JoinSet::new();
    for edge in (0..EDGES).chain(0..EDGES) {
        let (mut roamer, mut recorder) = (Roamer::at(entry_points, edge), history.recorder());
        let (request, token) = (request.clone(), account.token.clone());
        sends.spawn(async move {
            let sending = recorder.sending(Inbox(0), id, tag, Edge(edge as u16));
            let response = roamer.must::<Enqueue>(&request, Some(&token)).await;
            recorder.acknowledged(sending, Seq(response.seq));
            (response.seq, response.duplicate)
        });
    }
    sends.join_all().await
}
