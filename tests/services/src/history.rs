//! What happened in a run, as its clients saw it, and a judge of whether an inbox may have behaved
//! so.
//!
//! Each task of a test has a [`Recorder`] and writes down every call: when it began, and what it
//! was answered, if it was. A call that was never answered may or may not have happened. At the
//! end, when all recorders are gone, [`History::check`] holds the whole against the promises of an
//! inbox and names each breach (see [`Violation`]).
//!
//! Recording takes no lock: a recorder owns its log, and hands it over when it is dropped, also
//! when its task was aborted.
//!
//! Three duties of who records, without which the judgement is worth nothing:
//! - **Every read counts.** What the server may take for delivered must be recorded as delivered;
//!   an answer that reached the client's QUIC stack is read to its end, even when the test is
//!   stopping.
//! - **What is left is read.** At the end one last read per inbox records everything that is still
//!   queued.
//! - **A tag names one message of an inbox.** It is what the payload carries, so that a delivery
//!   says which message it is.

mod check;

use std::{
    mem,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicUsize, Ordering},
    },
};

use parking_lot::Mutex;
use qpq_domain::{MessageId, Seq};
use tokio::time::Instant;

pub use check::{Report, Violation};

/// An inbox, by a number of the test's choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Inbox(pub u32);

/// Which server was asked, by a number of the test's choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Edge(pub u16);

/// What a payload carries to say which message it is: never the same for two messages to one inbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag(pub u64);

/// Who sends or reads: one recorder, one party.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Party(pub u32);

/// Nanoseconds since the history began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Moment(u64);

/// Everything that the parties of a run recorded.
#[derive(Debug, Clone)]
pub struct History(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    begun: Instant,
    parties: AtomicU32,
    recording: AtomicUsize,
    logs: Mutex<Vec<Log>>,
}

impl Default for History {
    fn default() -> Self {
        Self::new()
    }
}

impl History {
    pub fn new() -> Self {
        Self(Arc::new(Shared {
            begun: Instant::now(),
            parties: AtomicU32::new(0),
            recording: AtomicUsize::new(0),
            logs: Mutex::new(Vec::new()),
        }))
    }

    /// For one more party. A reader whose order is to be judged over several connections keeps its
    /// recorder; one that reads several channels of an inbox takes one for each, since order holds
    /// within a channel only.
    pub fn recorder(&self) -> Recorder {
        self.0.recording.fetch_add(1, Ordering::Relaxed);
        let party = Party(self.0.parties.fetch_add(1, Ordering::Relaxed));
        Recorder { history: self.clone(), log: Log::of(party) }
    }

    /// Judges what was recorded.
    ///
    /// # Panics
    /// If somebody records still: what it has would be missing. If a tag names two messages of an
    /// inbox.
    pub fn check(&self) -> Report {
        let recording = self.0.recording.load(Ordering::Acquire);
        assert_eq!(
            recording, 0,
            "recorders that record still: join their tasks and drop them first"
        );
        check::check(&self.0.logs.lock())
    }

    fn now(&self) -> Moment {
        Moment(u64::try_from(self.0.begun.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }
}

/// What one party does, written down as it happens.
#[derive(Debug)]
pub struct Recorder {
    history: History,
    log: Log,
}

/// An enqueue that has begun.
#[derive(Debug)]
#[must_use = "say how it ended, if it did"]
pub struct Sending(usize);

/// A read that has begun.
#[derive(Debug)]
#[must_use = "say what it delivered, if it did"]
pub struct Reading(usize);

/// An ack that has begun.
#[derive(Debug)]
#[must_use = "say that it was answered, if it was"]
pub struct Settling(usize);

impl Recorder {
    pub const fn party(&self) -> Party {
        self.log.party
    }

    /// Before a message is sent, each time that it is, again with the same id too.
    pub fn sending(&mut self, inbox: Inbox, id: MessageId, tag: Tag, edge: Edge) -> Sending {
        let begun = self.history.now();
        Sending(self.log.send(Send { inbox, id, tag, edge, begun, outcome: Outcome::Unknown }))
    }

    /// The server has it, under this number.
    pub fn acknowledged(&mut self, sending: Sending, seq: Seq) {
        self.log.sends[sending.0].outcome = Outcome::Acknowledged(seq);
    }

    /// The server said that it did not take it. (No answer at all is no refusal.)
    pub fn refused(&mut self, sending: Sending) {
        self.log.sends[sending.0].outcome = Outcome::Refused;
    }

    /// Before a call that reads.
    pub fn reading(&mut self, inbox: Inbox) -> Reading {
        let begun = self.history.now();
        Reading(self.log.read(inbox, begun))
    }

    /// What a read delivered, in the order of its answer.
    pub fn delivered(&mut self, reading: Reading, messages: impl IntoIterator<Item = (Seq, Tag)>) {
        let ended = self.history.now();
        self.log.show(reading.0, ended, messages);
    }

    /// Before an ack of these messages.
    pub fn settling(&mut self, inbox: Inbox, seqs: impl IntoIterator<Item = Seq>) -> Settling {
        Settling(self.log.settle(inbox, seqs))
    }

    /// Before an ack of everything in the inbox up to this number, in all its channels.
    pub fn settling_through(&mut self, inbox: Inbox, seq: Seq) -> Settling {
        Settling(self.log.settle_through(inbox, seq))
    }

    /// The ack was answered: no read that begins from here on may deliver those messages.
    pub fn settled(&mut self, settling: Settling) {
        self.log.settles[settling.0].ended = Some(self.history.now());
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

/// What one party recorded, each kind in the order of its beginnings.
#[derive(Debug, Clone)]
struct Log {
    party: Party,
    sends: Vec<Send>,
    reads: Vec<Read>,
    settles: Vec<Settle>,
    /// What the reads delivered, one after the other.
    shown: Vec<(Seq, Tag)>,
    /// What the settles named.
    named: Vec<Seq>,
}

#[derive(Debug, Clone, Copy)]
struct Send {
    inbox: Inbox,
    id: MessageId,
    tag: Tag,
    edge: Edge,
    begun: Moment,
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
    /// None: not answered.
    ended: Option<Moment>,
    shown: Range<usize>,
}

#[derive(Debug, Clone)]
struct Settle {
    inbox: Inbox,
    what: Settled,
    ended: Option<Moment>,
}

#[derive(Debug, Clone)]
enum Settled {
    Named(Range<usize>),
    Through(Seq),
}

impl Log {
    const fn of(party: Party) -> Self {
        Self {
            party,
            sends: Vec::new(),
            reads: Vec::new(),
            settles: Vec::new(),
            shown: Vec::new(),
            named: Vec::new(),
        }
    }

    fn send(&mut self, send: Send) -> usize {
        self.sends.push(send);
        self.sends.len() - 1
    }

    fn read(&mut self, inbox: Inbox, begun: Moment) -> usize {
        self.reads.push(Read { inbox, begun, ended: None, shown: 0..0 });
        self.reads.len() - 1
    }

    fn show(&mut self, read: usize, ended: Moment, messages: impl IntoIterator<Item = (Seq, Tag)>) {
        let from = self.shown.len();
        self.shown.extend(messages);
        let read = &mut self.reads[read];
        read.ended = Some(ended);
        read.shown = from..self.shown.len();
    }

    fn settle(&mut self, inbox: Inbox, seqs: impl IntoIterator<Item = Seq>) -> usize {
        let from = self.named.len();
        self.named.extend(seqs);
        let what = Settled::Named(from..self.named.len());
        self.settles.push(Settle { inbox, what, ended: None });
        self.settles.len() - 1
    }

    fn settle_through(&mut self, inbox: Inbox, seq: Seq) -> usize {
        self.settles.push(Settle { inbox, what: Settled::Through(seq), ended: None });
        self.settles.len() - 1
    }
}
