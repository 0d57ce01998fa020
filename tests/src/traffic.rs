//! Traffic over inboxes, through whatever edges are up, all of it recorded for the judge of [`qpq_test_services::history`].
//!
//! Writers send one message or many, to one inbox or to all, and repeat each until it is acknowledged. Readers drain inboxes
//! by FetchWait, alone or two at a time, or peek and ack. Everybody goes on at another edge when theirs is gone. At the end
//! what is left is read, until Postgres itself says that nothing is.

use std::{
    fs::File,
    io::{BufWriter, Write as _},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use bytes::{BufMut as _, Bytes, BytesMut};
use parking_lot::Mutex;
use qpq_domain::{MessageId, Seq};
use qpq_proto::{
    methods::{Ack, BatchEnqueue, Enqueue, FetchWait, Peek},
    v1,
};
use qpq_test_services::history::{Edge, History, Inbox, Recorder, Report, Tag};
use rand::{Rng as _, RngCore as _, SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep},
};

use crate::{
    accounts::Account,
    client::Client,
    cluster::Cluster,
    roaming::{Loss, Outcome, PATIENCE, Roamer},
};

/// How much traffic, of which kind.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub inboxes: usize,
    pub writers: usize,
    /// When so many are acknowledged, the writers end.
    pub messages: u64,
    /// Bytes of a payload at most.
    pub payload: usize,
    /// Of ten calls of a writer, how many are a batch.
    pub batches: u32,
    pub temper: Temper,
    pub seed: u64,
}

/// When clients take their edge for dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Temper {
    /// When it was silent for a few seconds.
    Hasty,
    /// As in production. Every other one listens for events and leaves an edge that drains.
    Patient,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            inboxes: 12,
            writers: 24,
            messages: 5_000,
            payload: 512,
            batches: 3,
            temper: Temper::Hasty,
            seed: 1,
        }
    }
}

/// Messages in a batch of different ones.
const LIST: std::ops::Range<usize> = 8..40;
/// How long a reader waits in one call.
const WAIT: Duration = Duration::from_secs(2);
/// Before a reader reads again, at most.
const IDLE: Duration = Duration::from_millis(100);

/// Traffic that flows.
#[derive(Debug)]
pub struct Traffic {
    shared: Arc<Shared>,
    writers: JoinSet<()>,
    readers: JoinSet<()>,
}

#[derive(Debug)]
struct Shared {
    accounts: Vec<Account>,
    history: History,
    plan: Plan,
    acknowledged: watch::Sender<u64>,
    next_tag: AtomicU64,
    enough: AtomicBool,
    stop: watch::Sender<bool>,
    /// The connections of the readers, for whoever cuts them.
    connections: Mutex<Vec<Client>>,
    calls: AtomicU64,
    refused: AtomicU64,
    lost: AtomicU64,
    drained: AtomicU64,
}

/// How a run went, beside the judgement.
#[derive(Debug)]
pub struct Summary {
    pub report: Report,
    pub calls: u64,
    /// Calls that were answered "try again".
    pub refused: u64,
    /// Calls whose connection ended before they were answered.
    pub lost: u64,
    /// The same, because a drain was over.
    pub drained: u64,
}

/// A message on its way.
struct Outgoing {
    inbox: usize,
    id: MessageId,
    tag: Tag,
    payload: Bytes,
}

impl Traffic {
    /// Makes accounts and lets the traffic begin.
    pub async fn start(cluster: &Cluster, plan: Plan) -> anyhow::Result<Self> {
        let shared = Arc::new(Shared {
            accounts: cluster.accounts(plan.inboxes).await?,
            history: History::new(),
            plan,
            acknowledged: watch::Sender::new(0),
            next_tag: AtomicU64::new(1),
            enough: AtomicBool::new(false),
            stop: watch::Sender::new(false),
            connections: Mutex::default(),
            calls: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            lost: AtomicU64::new(0),
            drained: AtomicU64::new(0),
        });
        let fleet = cluster.fleet();
        let mut random = StdRng::seed_from_u64(plan.seed);
        let mut count = 0;
        let mut party = || Party {
            recorder: shared.history.recorder(),
            roamer: match plan.temper {
                Temper::Hasty => Roamer::new(&fleet, random.r#gen()),
                Temper::Patient => {
                    count += 1;
                    let roamer = Roamer::new(&fleet, random.r#gen()).patient();
                    if count % 2 == 0 { roamer.attentive(&shared.accounts[0].token) } else { roamer }
                }
            },
            random: StdRng::seed_from_u64(random.r#gen()),
            shared: Arc::clone(&shared),
        };
        let (mut writers, mut readers) = (JoinSet::new(), JoinSet::new());
        for inbox in 0..plan.inboxes {
            match inbox % 3 {
                0 => drop(readers.spawn(party().drain(inbox))),
                1 => (0..2).for_each(|_| drop(readers.spawn(party().drain(inbox)))),
                _ => drop(readers.spawn(party().peek_and_ack(inbox))),
            }
        }
        for _ in 0..plan.writers {
            writers.spawn(party().write());
        }
        Ok(Self { shared, writers, readers })
    }

    /// Returns when at least so many messages are acknowledged.
    ///
    /// # Panics
    /// If nothing at all is acknowledged for [`PATIENCE`].
    pub async fn acknowledged(&self, count: u64) {
        let mut acknowledged = self.shared.acknowledged.subscribe();
        loop {
            let now = *acknowledged.borrow_and_update();
            if now >= count.min(self.shared.plan.messages) {
                return;
            }
            tokio::time::timeout(PATIENCE, acknowledged.changed())
                .await
                .unwrap_or_else(|_| panic!("nothing is acknowledged any more; {now} were"))
                .expect("the sender is here");
        }
    }

    /// Lets the writers end, however many messages are acknowledged.
    pub fn enough(&self) {
        self.shared.enough.store(true, Ordering::Relaxed);
    }

    /// Ends the connections of all readers, whatever they wait for.
    pub fn cut_readers(&self) {
        self.shared.connections.lock().drain(..).for_each(|client| client.close());
    }

    /// Waits for the writers, reads what is left, and has it all judged. A history with violations is written to a file.
    pub async fn finish(mut self, cluster: &Cluster) -> anyhow::Result<Summary> {
        while let Some(done) = self.writers.join_next().await {
            done?;
        }
        self.shared.stop.send_replace(true);
        while let Some(done) = self.readers.join_next().await {
            done?;
        }
        let mut sweepers = JoinSet::new();
        let emptied = watch::Sender::new(false);
        for inbox in 0..self.shared.accounts.len() {
            let party = Party {
                recorder: self.shared.history.recorder(),
                roamer: Roamer::new(&cluster.fleet(), inbox as u64),
                random: StdRng::seed_from_u64(inbox as u64),
                shared: Arc::clone(&self.shared),
            };
            sweepers.spawn(party.sweep(inbox, emptied.subscribe()));
        }
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = cluster.messages_left().await?;
            if left == 0 {
                break;
            }
            anyhow::ensure!(
                Instant::now() < deadline,
                "{left} messages are in Postgres, and no read shows them"
            );
            sleep(IDLE).await;
        }
        emptied.send_replace(true);
        while let Some(done) = sweepers.join_next().await {
            done?;
        }
        let Shared { history, plan, calls, refused, lost, drained, .. } = &*self.shared;
        let report = history.check();
        if !report.violations.is_empty() {
            keep(history, &report, plan)?;
        }
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Ok(Summary {
            report,
            calls: read(calls),
            refused: read(refused),
            lost: read(lost),
            drained: read(drained),
        })
    }
}

impl Shared {
    fn stopped(&self) -> bool {
        *self.stop.borrow()
    }

    fn note_reader(&self, client: Client) {
        let mut connections = self.connections.lock();
        connections.retain(|client| client.ended().is_none());
        connections.push(client);
    }

    fn is_enough(&self) -> bool {
        *self.acknowledged.borrow() >= self.plan.messages || self.enough.load(Ordering::Relaxed)
    }

    fn outgoing(&self, inbox: usize, random: &mut StdRng) -> Outgoing {
        let tag = Tag(self.next_tag.fetch_add(1, Ordering::Relaxed));
        let length = random.gen_range(8..=self.plan.payload.max(8));
        Outgoing { inbox, id: MessageId::new(random.r#gen()), tag, payload: payload(tag, length, random) }
    }
}

/// A payload that says which message it is.
pub fn payload(tag: Tag, length: usize, random: &mut impl rand::RngCore) -> Bytes {
    let mut payload = BytesMut::zeroed(length.saturating_sub(8));
    random.fill_bytes(&mut payload);
    let mut whole = BytesMut::with_capacity(length);
    whole.put_u64(tag.0);
    whole.put(payload);
    whole.freeze()
}

/// What a read delivered, for a recorder.
pub fn seen(envelopes: &[v1::Envelope]) -> impl Iterator<Item = (Seq, Tag)> + '_ {
    envelopes.iter().map(|envelope| {
        let tag = envelope.data.first_chunk().map_or(0, |tag| u64::from_be_bytes(*tag));
        (Seq(envelope.seq), Tag(tag))
    })
}

/// Puts a history where it can be looked at after the test.
pub fn keep(history: &History, report: &Report, about: &dyn std::fmt::Debug) -> anyhow::Result<()> {
    let path = std::env::temp_dir().join(format!("qpq-history-{:016x}.txt", rand::rngs::OsRng.next_u64()));
    let mut file = BufWriter::new(File::create(&path).with_context(|| path.display().to_string())?);
    writeln!(file, "{about:?}\n{report}\n{history:#?}")?;
    file.flush()?;
    writeln!(std::io::stderr(), "the history is in {} ({about:?})", path.display())?;
    Ok(())
}

/// One that takes part.
struct Party {
    recorder: Recorder,
    roamer: Roamer,
    random: StdRng,
    shared: Arc<Shared>,
}

impl Party {
    async fn write(mut self) {
        while !self.shared.is_enough() {
            if self.random.gen_range(0..10) >= self.shared.plan.batches {
                let inbox = self.some_inbox();
                let message = self.shared.outgoing(inbox, &mut self.random);
                self.send_one(message).await;
            } else if self.random.r#gen() {
                let count = self.random.gen_range(LIST);
                let inboxes: Vec<usize> = (0..count).map(|_| self.some_inbox()).collect();
                let messages =
                    inboxes.into_iter().map(|inbox| self.shared.outgoing(inbox, &mut self.random)).collect();
                self.send_list(messages).await;
            } else {
                self.fan_out().await;
            }
            if self.random.gen_ratio(1, 300) {
                self.roamer.leave();
            }
        }
    }

    fn some_inbox(&mut self) -> usize {
        self.random.gen_range(0..self.shared.accounts.len())
    }

    fn token(&mut self) -> Bytes {
        let any = self.some_inbox();
        self.shared.accounts[any].token.clone()
    }

    fn edge(&self) -> Edge {
        Edge(u16::try_from(self.roamer.edge()).unwrap_or(u16::MAX))
    }

    /// A call of which nothing but an answer, a refusal for now, and a lost connection may come.
    async fn call<M: qpq_proto::Method>(
        &mut self,
        request: &M::Request,
        token: &Bytes,
    ) -> Option<M::Response> {
        self.shared.calls.fetch_add(1, Ordering::Relaxed);
        match self.roamer.call::<M>(request, Some(token)).await {
            Outcome::Ok(response) => return Some(response),
            Outcome::Refused(refused) if refused.is_temporary() => {
                self.shared.refused.fetch_add(1, Ordering::Relaxed);
                self.roamer.pause().await;
            }
            Outcome::Refused(refused) => panic!("{} is refused: {refused:?}", M::INFO.name),
            Outcome::Lost(Loss::Drained) => drop(self.shared.drained.fetch_add(1, Ordering::Relaxed)),
            Outcome::Lost(Loss::Otherwise) => drop(self.shared.lost.fetch_add(1, Ordering::Relaxed)),
        }
        None
    }

    async fn send_one(&mut self, message: Outgoing) {
        let token = self.token();
        let request = request(&message, &self.shared.accounts);
        loop {
            self.roamer.connected().await;
            let sending =
                self.recorder.sending(Inbox(message.inbox as u32), message.id, message.tag, self.edge());
            if let Some(response) = self.call::<Enqueue>(&request, &token).await {
                self.recorder.acknowledged(sending, Seq(response.seq));
                self.shared.acknowledged.send_modify(|count| *count += 1);
                return;
            }
        }
    }

    async fn send_list(&mut self, mut messages: Vec<Outgoing>) {
        let token = self.token();
        while !messages.is_empty() {
            let request = v1::BatchEnqueueRequest {
                messages: messages.iter().map(|message| request(message, &self.shared.accounts)).collect(),
                ..Default::default()
            };
            let inboxes: Vec<usize> = messages.iter().map(|message| message.inbox).collect();
            let ids: Vec<_> = messages.iter().map(|message| (message.id, message.tag)).collect();
            let accepted = self.send_batch(request, &token, inboxes.into_iter().zip(ids).collect()).await;
            let mut accepted = accepted.into_iter();
            messages.retain(|_| !accepted.next().unwrap_or(false));
        }
    }

    /// One payload to every inbox.
    async fn fan_out(&mut self) {
        let token = self.token();
        let Outgoing { id, tag, payload, .. } = self.shared.outgoing(0, &mut self.random);
        let mut inboxes: Vec<usize> = (0..self.shared.accounts.len()).collect();
        inboxes.shuffle(&mut self.random);
        while !inboxes.is_empty() {
            let request = v1::BatchEnqueueRequest {
                recipient_keys: inboxes.iter().map(|i| self.shared.accounts[*i].identity.clone()).collect(),
                payload: payload.clone(),
                message_id: Bytes::copy_from_slice(id.as_bytes()),
                ..Default::default()
            };
            let messages = inboxes.iter().map(|inbox| (*inbox, (id, tag))).collect();
            let mut accepted = self.send_batch(request, &token, messages).await.into_iter();
            inboxes.retain(|_| !accepted.next().unwrap_or(false));
        }
    }

    /// Which of the batch's messages were acknowledged.
    async fn send_batch(
        &mut self,
        request: v1::BatchEnqueueRequest,
        token: &Bytes,
        messages: Vec<(usize, (MessageId, Tag))>,
    ) -> Vec<bool> {
        self.roamer.connected().await;
        let edge = self.edge();
        let sendings: Vec<_> = messages
            .into_iter()
            .map(|(inbox, (id, tag))| self.recorder.sending(Inbox(inbox as u32), id, tag, edge))
            .collect();
        let Some(response) = self.call::<BatchEnqueue>(&request, token).await else {
            return vec![false; sendings.len()];
        };
        assert_eq!(response.results.len(), sendings.len(), "a result for each message");
        let mut accepted = Vec::new();
        for (sending, result) in sendings.into_iter().zip(&response.results) {
            accepted.push(result.status == 0);
            if result.status == 0 {
                self.recorder.acknowledged(sending, Seq(result.seq));
            } else {
                assert!(result.status == 9, "a message of a batch is refused: {result:?}");
            }
        }
        let count = accepted.iter().filter(|accepted| **accepted).count() as u64;
        self.shared.acknowledged.send_modify(|all| *all += count);
        accepted
    }

    async fn drain(mut self, inbox: usize) {
        let token = self.shared.accounts[inbox].token.clone();
        while !self.shared.stopped() {
            let request = v1::FetchWaitRequest {
                timeout_ms: WAIT.as_millis() as u64,
                limit: self.random.gen_range(0..150),
                all_channels: true,
                ..Default::default()
            };
            let client = self.roamer.connected().await;
            self.shared.note_reader(client);
            let reading = self.recorder.reading(Inbox(inbox as u32));
            if let Some(response) = self.call::<FetchWait>(&request, &token).await {
                self.recorder.delivered(reading, seen(&response.payloads));
            }
            // So that more than the first message is there next time.
            sleep(IDLE.mul_f64(self.random.r#gen())).await;
        }
    }

    async fn peek_and_ack(mut self, inbox: usize) {
        let token = self.shared.accounts[inbox].token.clone();
        while !self.shared.stopped() {
            let limit = self.random.gen_range(1..150);
            let page = self.peek(inbox, limit, &token).await;
            let Some(last) = page.last() else {
                sleep(IDLE.mul_f64(self.random.r#gen())).await;
                continue;
            };
            let request = if self.random.r#gen() {
                v1::AckRequest { seq_up_to: last.seq, all_channels: true, ..Default::default() }
            } else {
                let seqs = page.iter().map(|e| e.seq).filter(|_| self.random.r#gen()).collect();
                v1::AckRequest { seqs, all_channels: true, ..Default::default() }
            };
            self.ack(inbox, &request, &token).await;
            sleep(IDLE.mul_f64(self.random.r#gen())).await;
        }
    }

    async fn peek(&mut self, inbox: usize, limit: u32, token: &Bytes) -> Vec<v1::Envelope> {
        let request = v1::PeekRequest { limit, all_channels: true, ..Default::default() };
        let reading = self.recorder.reading(Inbox(inbox as u32));
        let Some(response) = self.call::<Peek>(&request, token).await else { return Vec::new() };
        self.recorder.delivered(reading, seen(&response.payloads));
        response.payloads
    }

    /// Acks until that is answered.
    async fn ack(&mut self, inbox: usize, request: &v1::AckRequest, token: &Bytes) {
        loop {
            let settling = match request.seq_up_to {
                0 => self.recorder.settling(Inbox(inbox as u32), request.seqs.iter().copied().map(Seq)),
                seq => self.recorder.settling_through(Inbox(inbox as u32), Seq(seq)),
            };
            if self.call::<Ack>(request, token).await.is_some() {
                return self.recorder.settled(settling);
            }
        }
    }

    /// Reads and acks everything until told that nothing is left.
    async fn sweep(mut self, inbox: usize, emptied: watch::Receiver<bool>) {
        let token = self.shared.accounts[inbox].token.clone();
        while !*emptied.borrow() {
            match self.peek(inbox, 0, &token).await.last() {
                Some(last) => {
                    let request =
                        v1::AckRequest { seq_up_to: last.seq, all_channels: true, ..Default::default() };
                    self.ack(inbox, &request, &token).await;
                }
                None => sleep(IDLE).await,
            }
        }
    }
}

fn request(message: &Outgoing, accounts: &[Account]) -> v1::EnqueueRequest {
    v1::EnqueueRequest {
        recipient_key: accounts[message.inbox].identity.clone(),
        payload: message.payload.clone(),
        message_id: Bytes::copy_from_slice(message.id.as_bytes()),
        ..Default::default()
    }
}
