//! Traffic over inboxes, through whatever edges are up, all of it recorded for the judge of
//! [`qpq_test_services::history`].
//!
//! Writers send one message or many, to one inbox or to all, and repeat each until it is
//! acknowledged. Readers drain inboxes by FetchWait, alone or two at a time, or peek and ack.
//! Everybody goes on at another edge when theirs is gone. At the end what is left is read, until
//! Postgres itself says that nothing is.

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
use qpq_domain::{MessageId, Seq};
use qpq_proto::v1;
use qpq_test_services::history::{History, Report, Tag};
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
    cluster::Cluster,
    roaming::{PATIENCE, Roamer},
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
                    if count % 2 == 0 {
                        roamer.attentive(&shared.accounts[0].token)
                    } else {
                        roamer
                    }
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

    /// Waits for the writers, reads what is left, and has it all judged. A history with violations
    /// is written to a file.
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
        Outgoing {
            inbox,
            id: MessageId::new(random.r#gen()),
            tag,
            payload: payload(tag, length, random),
        }
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
    let path =
        std::env::temp_dir().join(format!("qpq-history-{:016x}.txt", rand::rngs::OsRng.next_u64()));
    let mut file = BufWriter::new(File::create(&path).with_context(|| path.display().to_string())?);
    writeln!(file, "{about:?}\n{report}\n{history:#?}")?;
    file.flush()?;
    writeln!(std::io::stderr(), "the history is in {} ({about:?})", path.display())?;
    Ok(())
}
