//! Records the calls of a run, and checks whether a correct inbox can produce that history.
//!
//! Each task of a test has a [`Recorder`] and records every call: its start, and its answer if
//! there is one. A call without an answer may have taken effect. At the end, when all recorders are
//! dropped, [`History::check`] compares the history with the guarantees of an inbox and returns
//! each [`Violation`].
//!
//! Recording needs no lock: a recorder owns its log and passes it on when it is dropped, also when
//! its task is aborted.
//!
//! A store may go back in time: a standby is promoted, a backup is restored. The test records each
//! such [`StoreChange`] and the store id of each read. The next history of the store begins with a
//! state of an earlier one. A message that was acknowledged after that state is lost with its
//! history: the report counts it, and it is not a violation. All other guarantees hold in
//! each history.
//!
//! The result is valid only if the test follows four rules:
//! - **Record every read.** Messages that the server may count as delivered are recorded as
//!   delivered. An answer that reached the client's QUIC stack is read to its end, even when the
//!   test is stopping.
//! - **Read the rest.** At the end a last read of each inbox records all messages that are left.
//! - **Use a tag once for each inbox.** The payload contains the tag, which identifies the
//!   delivered message.
//! - **Ack where the messages were read.** An ack goes over the connection of the read that
//!   returned the messages. On another connection the server cannot know to which history of the
//!   store the seqs belong.

mod check;
mod stores;

use std::{
    collections::BTreeMap,
    mem,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicUsize, Ordering},
    },
};

use parking_lot::Mutex;
use qpq_domain::{MessageId, Seq, StoreId};
use tokio::time::Instant;

pub use check::{Report, Violation};

/// An inbox, identified by a number that the test chooses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Inbox(pub u32);

/// An edge, identified by a number that the test chooses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Edge(pub u16);

/// The part of a payload that identifies the message, unique in an inbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag(pub u64);

/// A sender or reader. Each recorder is one party.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Party(pub u32);

/// Nanoseconds since the start of the history.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Moment(u64);

/// A change of the store's history that the test caused.
#[derive(Debug, Clone)]
pub struct StoreChange {
    /// The history whose state the new one begins with.
    pub continues: StoreId,
    /// The new history.
    pub store: StoreId,
    pub kept: Kept,
    /// The time after which the previous history ended and the new one began.
    pub from: Moment,
    /// The time before which the previous history ended and the new one began. Equal to `from` if
    /// no store ran at that time.
    pub until: Moment,
}

/// The part of a history that the next one begins with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kept {
    /// All acknowledged messages and all answered removals.
    Everything,
    /// The messages of these inboxes up to these seqs, and no message of other inboxes. Removals of
    /// these messages may be missing.
    UpTo(BTreeMap<Inbox, Seq>),
}

/// The records of all parties of a run.
#[derive(Debug, Clone)]
pub struct History(Arc<State>);

#[derive(Debug)]
struct State {
    begun: Instant,
    parties: AtomicU32,
    recording: AtomicUsize,
    logs: Mutex<Vec<Log>>,
    changes: Mutex<Vec<StoreChange>>,
}

impl Default for History {
    fn default() -> Self {
        Self::new()
    }
}

impl History {
    pub fn new() -> Self {
        Self(Arc::new(State {
            begun: Instant::now(),
            parties: AtomicU32::new(0),
            recording: AtomicUsize::new(0),
            logs: Mutex::new(Vec::new()),
            changes: Mutex::new(Vec::new()),
        }))
    }

    /// Creates a recorder for a new party. A reader keeps its recorder over several connections, so
    /// that their order is checked together. A reader of several channels of an inbox uses one
    /// recorder for each, because only a channel is ordered.
    pub fn recorder(&self) -> Recorder {
        self.0.recording.fetch_add(1, Ordering::Relaxed);
        let party = Party(self.0.parties.fetch_add(1, Ordering::Relaxed));
        Recorder { history: self.clone(), log: Log::of(party) }
    }

    /// Records a change of the store's history. Must be called in the order of the changes.
    pub fn store_changed(&self, change: StoreChange) {
        self.0.changes.lock().push(change);
    }

    /// Returns the current time of the records.
    pub fn now(&self) -> Moment {
        Moment(u64::try_from(self.0.begun.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    /// Checks the history.
    ///
    /// # Panics
    /// If a recorder is not dropped, because its records would be missing. If a tag is used for two
    /// messages of an inbox. If the store changed and a read was recorded without store id.
    pub fn check(&self) -> Report {
        let recording = self.0.recording.load(Ordering::Acquire);
        assert_eq!(
            recording, 0,
            "recorders are still in use: join their tasks and drop them first"
        );
        check::check(&self.0.logs.lock(), &self.0.changes.lock())
    }
}

/// Records the calls of one party.
#[derive(Debug)]
pub struct Recorder {
    history: History,
    log: Log,
}

/// An Enqueue that has begun.
#[derive(Debug)]
#[must_use = "record its answer, if there is one"]
pub struct Sending(usize);

/// A read that has begun.
#[derive(Debug)]
#[must_use = "record the delivered messages, if there is an answer"]
pub struct Reading(usize);

/// An ack that has begun.
#[derive(Debug)]
#[must_use = "record its answer, if there is one"]
pub struct Acking(usize);

impl Recorder {
    pub const fn party(&self) -> Party {
        self.log.party
    }

    /// Records the start of an Enqueue, also of each retry with the same id.
    pub fn sending(&mut self, inbox: Inbox, id: MessageId, tag: Tag, edge: Edge) -> Sending {
        let (begun, outcome) = (self.history.now(), Outcome::Unknown);
        Sending(self.log.send(Send { inbox, id, tag, edge, begun, ended: None, outcome }))
    }

    /// Records that the server accepted the message with this seq.
    pub fn acknowledged(&mut self, sending: Sending, seq: Seq) {
        self.answered(&sending, Outcome::Acknowledged(seq));
    }

    /// Records that the server refused the message. A missing answer is not a refusal.
    pub fn refused(&mut self, sending: Sending) {
        self.answered(&sending, Outcome::Refused);
    }

    fn answered(&mut self, sending: &Sending, outcome: Outcome) {
        let send = &mut self.log.sends[sending.0];
        (send.ended, send.outcome) = (Some(self.history.now()), outcome);
    }

    /// Records the start of a read.
    pub fn reading(&mut self, inbox: Inbox) -> Reading {
        let begun = self.history.now();
        Reading(self.log.read(inbox, begun))
    }

    /// Records the messages that a read delivered, in the order of the answer. For tests in which
    /// the store does not change.
    pub fn delivered(&mut self, reading: Reading, messages: impl IntoIterator<Item = (Seq, Tag)>) {
        let ended = self.history.now();
        self.log.show(reading.0, ended, None, messages);
    }

    /// Records the messages that a read delivered, with the store id of the answer.
    pub fn delivered_in(
        &mut self,
        store: StoreId,
        reading: Reading,
        messages: impl IntoIterator<Item = (Seq, Tag)>,
    ) {
        let ended = self.history.now();
        self.log.show(reading.0, ended, Some(store), messages);
    }

    /// Records the start of an ack of these messages. For tests in which the store does not change.
    pub fn acking(&mut self, inbox: Inbox, seqs: impl IntoIterator<Item = Seq>) -> Acking {
        Acking(self.log.ack(inbox, None, seqs))
    }

    /// Records the start of an ack of messages that were delivered with this store id.
    pub fn acking_in(
        &mut self,
        store: StoreId,
        inbox: Inbox,
        seqs: impl IntoIterator<Item = Seq>,
    ) -> Acking {
        Acking(self.log.ack(inbox, Some(store), seqs))
    }

    /// Records the start of an ack of all messages up to this seq, in all channels. For tests in
    /// which the store does not change.
    pub fn acking_through(&mut self, inbox: Inbox, seq: Seq) -> Acking {
        Acking(self.log.ack_through(inbox, None, seq))
    }

    /// Records the start of an ack of all messages up to `seq`, which was delivered with this store
    /// id.
    pub fn acking_through_in(&mut self, store: StoreId, inbox: Inbox, seq: Seq) -> Acking {
        Acking(self.log.ack_through(inbox, Some(store), seq))
    }

    /// Records the answer to an ack. No read that begins later may deliver these messages.
    pub fn acked(&mut self, acking: Acking) {
        self.log.acks[acking.0].ended = Some(self.history.now());
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        let empty = Log::of(self.log.party);
        let log = mem::replace(&mut self.log, empty);
        self.history.0.logs.lock().push(log);
        self.history.0.recording.fetch_sub(1, Ordering::Release);
    }
}

/// The records of one party, each kind in the order in which the calls started.
#[derive(Debug, Clone)]
struct Log {
    party: Party,
    sends: Vec<Send>,
    reads: Vec<Read>,
    acks: Vec<Ack>,
    /// The messages of all reads, one after the other.
    shown: Vec<(Seq, Tag)>,
    /// The seqs of all acks.
    named: Vec<Seq>,
}

#[derive(Debug, Clone, Copy)]
struct Send {
    inbox: Inbox,
    id: MessageId,
    tag: Tag,
    edge: Edge,
    begun: Moment,
    /// `None` if there was no answer.
    ended: Option<Moment>,
    outcome: Outcome,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Acknowledged(Seq),
    Refused,
    Unknown,
}

#[derive(Debug, Clone)]
struct Read {
    inbox: Inbox,
    begun: Moment,
    /// `None` if there was no answer.
    ended: Option<Moment>,
    /// `None` if there was no answer, or in a test in which the store does not change.
    store: Option<StoreId>,
    shown: Range<usize>,
}

#[derive(Debug, Clone)]
struct Ack {
    inbox: Inbox,
    /// The store id of the read that delivered the messages. `None` in a test in which the store
    /// does not change.
    store: Option<StoreId>,
    what: AckRange,
    ended: Option<Moment>,
}

#[derive(Debug, Clone)]
enum AckRange {
    Named(Range<usize>),
    Through(Seq),
}

impl Log {
    const fn of(party: Party) -> Self {
        Self {
            party,
            sends: Vec::new(),
            reads: Vec::new(),
            acks: Vec::new(),
            shown: Vec::new(),
            named: Vec::new(),
        }
    }

    fn send(&mut self, send: Send) -> usize {
        self.sends.push(send);
        self.sends.len() - 1
    }

    fn read(&mut self, inbox: Inbox, begun: Moment) -> usize {
        self.reads.push(Read { inbox, begun, ended: None, store: None, shown: 0..0 });
        self.reads.len() - 1
    }

    fn show(
        &mut self,
        read: usize,
        ended: Moment,
        store: Option<StoreId>,
        messages: impl IntoIterator<Item = (Seq, Tag)>,
    ) {
        let from = self.shown.len();
        self.shown.extend(messages);
        let read = &mut self.reads[read];
        (read.ended, read.store) = (Some(ended), store);
        read.shown = from..self.shown.len();
    }

    fn ack(
        &mut self,
        inbox: Inbox,
        store: Option<StoreId>,
        seqs: impl IntoIterator<Item = Seq>,
    ) -> usize {
        let from = self.named.len();
        self.named.extend(seqs);
        let what = AckRange::Named(from..self.named.len());
        self.acks.push(Ack { inbox, store, what, ended: None });
        self.acks.len() - 1
    }

    fn ack_through(&mut self, inbox: Inbox, store: Option<StoreId>, seq: Seq) -> usize {
        self.acks.push(Ack { inbox, store, what: AckRange::Through(seq), ended: None });
        self.acks.len() - 1
    }
}
