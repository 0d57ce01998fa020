//! Traffic over inboxes through all running edges, recorded for the checker of
//! [`qpq_test_services::history`].
//!
//! Writers send one message or many, to one inbox or to all, and retry each until it is
//! acknowledged. Readers drain inboxes with FetchWait, one or two for each inbox, or peek and ack.
//! All of them move to another edge when theirs ends. Each read is recorded with the store id of
//! its answer. At the end the rest is read, until Postgres has no messages.
//!
//! Every fourth inbox has two devices, whose streams are recorded each as an inbox of its own:
//! every message is sent to both. A third device is registered and revoked again and again; it
//! checks that its stream has no gap.

mod device;
mod party;

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
use qpq_domain::{MessageId, Seq, StoreId};
use qpq_proto::v1;
use qpq_test_services::history::{History, Inbox, Report, Tag};
use rand::{Rng as _, RngCore as _, SeedableRng as _, rngs::StdRng};
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep},
};

use self::party::Party;
use crate::{
    accounts::Account,
    client::Client,
    cluster::{Cluster, EntryPoints},
    roaming::{PATIENCE, Roamer},
};

/// The amount and kind of traffic.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub inboxes: usize,
    pub writers: usize,
    /// The number of acknowledged messages after which the writers end.
    pub messages: u64,
    /// The maximum size of a payload in bytes.
    pub payload: usize,
    /// The number of batches among ten calls of a writer.
    pub batches: u32,
    pub temper: Temper,
    pub seed: u64,
}

/// The timeout after which clients leave a silent edge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Temper {
    /// A few seconds.
    Hasty,
    /// The timeout of production. Every second client also subscribes to events and leaves an edge
    /// that drains.
    Patient,
}

impl Temper {
    fn roamer(self, entry_points: &EntryPoints, seed: u64) -> Roamer {
        let roamer = Roamer::new(entry_points, seed);
        match self {
            Self::Hasty => roamer,
            Self::Patient => roamer.patient(),
        }
    }
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

/// The number of messages in a batch of different messages.
const LIST: std::ops::Range<usize> = 8..40;
/// The wait of one FetchWait call.
const WAIT: Duration = Duration::from_secs(2);
/// The maximum pause of a reader between two reads.
const IDLE: Duration = Duration::from_millis(100);

/// Running traffic.
#[derive(Debug)]
pub struct Traffic {
    state: Arc<State>,
    writers: JoinSet<()>,
    readers: JoinSet<()>,
}

#[derive(Debug)]
struct State {
    accounts: Vec<Account>,
    readers: Vec<Reader>,
    history: History,
    plan: Plan,
    acknowledged: watch::Sender<u64>,
    next_tag: AtomicU64,
    enough: AtomicBool,
    stop: watch::Sender<bool>,
    /// The connections of the readers, for [`Traffic::cut_readers`].
    connections: Mutex<Vec<Client>>,
    calls: AtomicU64,
    refused: AtomicU64,
    lost: Mutex<Vec<String>>,
    drained: AtomicU64,
}

/// The result of a run.
#[derive(Debug)]
pub struct Summary {
    pub report: Report,
    pub calls: u64,
    /// Calls that were refused temporarily.
    pub refused: u64,
    /// The errors of calls whose connection or stream ended before the answer.
    pub lost: Vec<String>,
    /// Calls whose connection ended at the end of a drain.
    pub drained: u64,
}

/// A reader of an inbox: the single one, or a device.
#[derive(Clone, Debug)]
struct Reader {
    inbox: usize,
    /// The reader's stream in the records.
    stream: Inbox,
    token: Bytes,
}

/// The distance between the numbers of an inbox's two streams.
const SECOND_STREAM: u32 = 1 << 16;

/// Whether an inbox has devices.
const fn has_devices(inbox: usize) -> bool {
    inbox % 4 == 3
}

/// Returns the streams of an inbox in the records.
fn streams(inbox: usize) -> impl Iterator<Item = Inbox> {
    let first = inbox as u32;
    let second = has_devices(inbox).then_some(Inbox(first + SECOND_STREAM));
    std::iter::once(Inbox(first)).chain(second)
}

/// A message to send.
struct Outgoing {
    inbox: usize,
    id: MessageId,
    tag: Tag,
    payload: Bytes,
}

impl Traffic {
    /// Creates accounts and starts the traffic.
    pub async fn start(cluster: &Cluster, plan: Plan) -> anyhow::Result<Self> {
        let accounts = cluster.accounts(plan.inboxes).await?;
        let state = Arc::new(State {
            readers: device::readers(cluster, &accounts).await?,
            accounts,
            history: History::new(),
            plan,
            acknowledged: watch::Sender::new(0),
            next_tag: AtomicU64::new(1),
            enough: AtomicBool::new(false),
            stop: watch::Sender::new(false),
            connections: Mutex::default(),
            calls: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            lost: Mutex::default(),
            drained: AtomicU64::new(0),
        });
        let entry_points = cluster.entry_points();
        let mut random = StdRng::seed_from_u64(plan.seed);
        let mut count = 0;
        let mut party = || Party {
            recorder: state.history.recorder(),
            roamer: {
                count += 1;
                let roamer = plan.temper.roamer(&entry_points, random.r#gen());
                if plan.temper == Temper::Patient && count % 2 == 0 {
                    roamer.attentive(&state.accounts[0].token)
                } else {
                    roamer
                }
            },
            random: StdRng::seed_from_u64(random.r#gen()),
            state: Arc::clone(&state),
        };
        let (mut writers, mut readers) = (JoinSet::new(), JoinSet::new());
        for (n, reader) in state.readers.iter().enumerate() {
            match n % 3 {
                0 => drop(readers.spawn(party().drain(reader.clone()))),
                1 => (0..2).for_each(|_| drop(readers.spawn(party().drain(reader.clone())))),
                _ => drop(readers.spawn(party().peek_and_ack(reader.clone()))),
            }
        }
        for inbox in (0..plan.inboxes).filter(|inbox| has_devices(*inbox)) {
            readers.spawn(party().visit(inbox));
        }
        for _ in 0..plan.writers {
            writers.spawn(party().write());
        }
        Ok(Self { state, writers, readers })
    }

    /// Waits until at least `count` messages are acknowledged.
    ///
    /// # Panics
    /// If no message is acknowledged for [`PATIENCE`].
    pub async fn acknowledged(&self, count: u64) {
        let mut acknowledged = self.state.acknowledged.subscribe();
        loop {
            let now = *acknowledged.borrow_and_update();
            if now >= count.min(self.state.plan.messages) {
                return;
            }
            tokio::time::timeout(PATIENCE, acknowledged.changed())
                .await
                .unwrap_or_else(|_| panic!("no further message is acknowledged after {now}"))
                .expect("self has the sender");
        }
    }

    /// Waits until `count` more messages are acknowledged, or all.
    pub async fn acknowledged_more(&self, count: u64) {
        let now = *self.state.acknowledged.borrow();
        self.acknowledged(now + count).await;
    }

    /// Returns the records of the traffic.
    pub fn history(&self) -> &History {
        &self.state.history
    }

    pub fn inboxes(&self) -> usize {
        self.state.accounts.len()
    }

    /// Returns the streams of an account's inbox in the records.
    pub fn streams_of(&self, identity: &[u8]) -> Vec<Inbox> {
        let position = self.state.accounts.iter().position(|account| account.identity == identity);
        position.into_iter().flat_map(streams).collect()
    }

    /// Ends the writers before all messages are acknowledged.
    pub fn enough(&self) {
        self.state.enough.store(true, Ordering::Relaxed);
    }

    /// Closes the connections of all readers.
    pub fn cut_readers(&self) {
        self.state.connections.lock().drain(..).for_each(|client| client.close());
    }

    /// Waits for the writers, reads the rest, and checks the history. Writes a history with
    /// violations to a file.
    pub async fn finish(mut self, cluster: &Cluster) -> anyhow::Result<Summary> {
        while let Some(done) = self.writers.join_next().await {
            done?;
        }
        self.state.stop.send_replace(true);
        while let Some(done) = self.readers.join_next().await {
            done?;
        }
        let mut sweepers = JoinSet::new();
        let emptied = watch::Sender::new(false);
        for (n, reader) in self.state.readers.iter().enumerate() {
            let party = || Party {
                recorder: self.state.history.recorder(),
                roamer: self.state.plan.temper.roamer(&cluster.entry_points(), n as u64),
                random: StdRng::seed_from_u64(n as u64),
                state: Arc::clone(&self.state),
            };
            if has_devices(reader.inbox) {
                party().revoke_visitors(&reader.token).await;
            }
            sweepers.spawn(party().sweep(reader.clone(), emptied.subscribe()));
        }
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = cluster.messages_left().await?;
            if left == 0 {
                break;
            }
            anyhow::ensure!(
                Instant::now() < deadline,
                "{left} messages are in Postgres, and no read returns them"
            );
            sleep(IDLE).await;
        }
        emptied.send_replace(true);
        while let Some(done) = sweepers.join_next().await {
            done?;
        }
        let State { history, plan, calls, refused, lost, drained, .. } = &*self.state;
        let report = history.check();
        if !report.violations.is_empty() {
            keep(history, &report, plan)?;
        }
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Ok(Summary {
            report,
            calls: read(calls),
            refused: read(refused),
            lost: std::mem::take(&mut *lost.lock()),
            drained: read(drained),
        })
    }
}

impl State {
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
        Outgoing {
            inbox,
            id: MessageId::new(random.r#gen()),
            tag,
            payload: payload(tag, length, random),
        }
    }
}

/// Returns a payload that begins with the tag.
pub fn payload(tag: Tag, length: usize, random: &mut impl rand::RngCore) -> Bytes {
    let mut payload = BytesMut::zeroed(length.saturating_sub(8));
    random.fill_bytes(&mut payload);
    let mut whole = BytesMut::with_capacity(length);
    whole.put_u64(tag.0);
    whole.put(payload);
    whole.freeze()
}

/// Returns the messages of a read, for a recorder.
pub fn seen(envelopes: &[v1::Envelope]) -> impl Iterator<Item = (Seq, Tag)> + '_ {
    envelopes.iter().map(|envelope| {
        let tag = envelope.data.first_chunk().map_or(0, |tag| u64::from_be_bytes(*tag));
        (Seq(envelope.seq), Tag(tag))
    })
}

/// Returns the store id of an answer.
///
/// # Panics
/// If it does not have 16 bytes.
pub fn store_id(bytes: &[u8]) -> StoreId {
    StoreId::try_from(bytes).expect("a store id of 16 bytes")
}

/// Writes a history to a file that is kept after the test.
pub fn keep(history: &History, report: &Report, about: &dyn std::fmt::Debug) -> anyhow::Result<()> {
    let path =
        std::env::temp_dir().join(format!("qpq-history-{:016x}.txt", rand::rngs::OsRng.next_u64()));
    let mut file = BufWriter::new(File::create(&path).with_context(|| path.display().to_string())?);
    writeln!(file, "{about:?}\n{report}\n{history:#?}")?;
    file.flush()?;
    writeln!(std::io::stderr(), "the history is in {} ({about:?})", path.display())?;
    Ok(())
}
