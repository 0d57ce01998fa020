//! A correct inbox with random users, on a store that may go back in time. The records of the users
//! are a history without violations.

use std::collections::{BTreeMap, BTreeSet};

use proptest::{collection::vec, prelude::*, sample::Index};
use qpq_domain::{MessageId, Seq, StoreId};

use crate::history::{Edge, Inbox, Kept, Log, Moment, Outcome, Party, Send, StoreChange, Tag};

const INBOXES: u32 = 3;
const READERS: u32 = 3;
/// The party that sends all messages.
const SENDER: u32 = READERS;
/// The party of the last read.
const LAST_READER: u32 = READERS + 1;
/// The approximate time of the first call. Earlier times are for records that are too early.
pub(super) const START: u64 = 1_000;
pub(super) const AFTER_ALL: u64 = 1_000_000;

/// The answer to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    Given,
    /// The call took effect, and the answer was lost.
    LostAfter,
    /// The call did not take effect.
    LostBefore,
    Refused,
}

#[derive(Debug, Clone)]
pub(super) enum Act {
    /// Sends a new message, or an earlier one again.
    Send { inbox: u32, again: Option<Index>, answer: Answer },
    /// Reads the first `limit` messages; a drain removes them when the answer arrives.
    Read { inbox: u32, reader: u32, limit: usize, drains: bool, answer: Answer },
    /// Acks delivered messages: all from the first, or every second one.
    Ack { inbox: u32, reader: u32, through: bool, answer: Answer },
    /// Acks all messages that were delivered before the store changed. This ack removes nothing.
    LateAck { inbox: u32, reader: u32 },
    /// Copies the store.
    Backup,
    /// Replaces the store by one that has everything, or by the last copy.
    Change { keeps_everything: bool },
}

/// An act, the time from the start of its call to its effect, and the time from the effect to the
/// end of the call.
pub(super) type Timed = (Act, u64, u64);

pub(super) fn acts() -> impl Strategy<Value = Vec<Timed>> {
    vec((call(), 0..45_u64, 0..45_u64), 1..120)
}

/// Generates acts with at least one change of the store that loses everything since the copy.
pub(super) fn acts_with_changes() -> impl Strategy<Value = Vec<Timed>> {
    let act = || {
        prop_oneof![
            24 => call(),
            2 => (0..INBOXES, 0..READERS)
                .prop_map(|(inbox, reader)| Act::LateAck { inbox, reader }),
            1 => Just(Act::Backup),
            1 => any::<bool>().prop_map(|keeps_everything| Act::Change { keeps_everything }),
        ]
    };
    let timed = |act| (act, 0..45_u64, 0..45_u64);
    let some = move || vec(timed(act().boxed()), 1..60);
    let lossy = Act::Change { keeps_everything: false };
    (some(), some(), some()).prop_map(move |(before, lost, after)| {
        let copy = std::iter::once((Act::Backup, 0, 0));
        let change = std::iter::once((lossy.clone(), 0, 0));
        before.into_iter().chain(copy).chain(lost).chain(change).chain(after).collect()
    })
}

fn call() -> impl Strategy<Value = Act> {
    let answer = prop_oneof![
        6 => Just(Answer::Given),
        1 => Just(Answer::LostAfter),
        1 => Just(Answer::LostBefore),
        1 => Just(Answer::Refused),
    ];
    let inbox = 0..INBOXES;
    let reader = 0..READERS;
    prop_oneof![
        5 => (inbox.clone(), proptest::option::weighted(0.3, any::<Index>()), answer.clone())
            .prop_map(|(inbox, again, answer)| Act::Send { inbox, again, answer }),
        3 => (inbox.clone(), reader.clone(), 1..6_usize, any::<bool>(), answer.clone())
            .prop_map(|(inbox, reader, limit, drains, answer)| {
                Act::Read { inbox, reader, limit, drains, answer }
            }),
        2 => (inbox, reader, any::<bool>(), answer)
            .prop_map(|(inbox, reader, through, answer)| {
                Act::Ack { inbox, reader, through, answer }
            }),
    ]
}

/// The records of a run.
#[derive(Debug, Clone)]
pub(super) struct Run {
    pub(super) logs: Vec<Log>,
    pub(super) changes: Vec<StoreChange>,
    /// The newest seqs of the last history.
    pub(super) newest: BTreeMap<Inbox, u64>,
}

/// A correct inbox with the logs of its users.
struct Model {
    logs: Vec<Log>,
    sent: Vec<(Inbox, MessageId, Tag)>,
    content: Content,
    store: StoreId,
    /// The messages that this history of the store has delivered.
    delivered: BTreeSet<(Inbox, Seq)>,
    /// The messages that the previous history of the store has delivered.
    delivered_before: BTreeSet<(Inbox, Seq)>,
    store_before: StoreId,
    backup: (StoreId, Content),
    changes: Vec<StoreChange>,
}

/// The content of the store.
#[derive(Clone, Default)]
struct Content {
    numbers: BTreeMap<(Inbox, MessageId), Seq>,
    given: BTreeMap<Inbox, u64>,
    queued: BTreeMap<Inbox, BTreeMap<Seq, Tag>>,
}

/// Returns the logs of acts without changes of the store.
pub(super) fn logs_of(acts: &[Timed]) -> Vec<Log> {
    run(acts).logs
}

pub(super) fn store_id(number: usize) -> StoreId {
    StoreId::new((number as u128).to_be_bytes())
}

/// Runs the acts one after the other. Each act takes effect within the time of its call, and calls
/// overlap.
pub(super) fn run(acts: &[Timed]) -> Run {
    let (store, content) = (store_id(0), Content::default());
    let mut model = Model {
        logs: (0..=LAST_READER).map(|party| Log::of(Party(party))).collect(),
        sent: Vec::new(),
        content: content.clone(),
        store,
        delivered: BTreeSet::new(),
        delivered_before: BTreeSet::new(),
        store_before: store,
        backup: (store, content),
        changes: Vec::new(),
    };
    let mut at = START;
    for (act, before, after) in acts {
        at += 10;
        match *act {
            Act::Backup => model.backup = (model.store, model.content.clone()),
            Act::Change { keeps_everything } => model.change(keeps_everything, Moment(at)),
            _ => model.happen(act, Moment(at - before), Moment(at + after)),
        }
    }
    for inbox in (0..INBOXES).map(Inbox) {
        let queued = model.content.queued.entry(inbox).or_default();
        let left: Vec<_> = queued.iter().map(|(s, t)| (*s, *t)).collect();
        let log = &mut model.logs[LAST_READER as usize];
        let read = log.read(inbox, Moment(at + 100));
        log.show(read, Moment(at + 101), Some(model.store), left);
    }
    Run { logs: model.logs, changes: model.changes, newest: model.content.given }
}

impl Model {
    fn happen(&mut self, act: &Act, begun: Moment, ended: Moment) {
        match *act {
            Act::Send { inbox, again, answer } => {
                self.send(Inbox(inbox), again, answer, (begun, ended));
            }
            Act::Read { inbox, reader, limit, drains, answer } => {
                self.read(
                    Inbox(inbox),
                    reader,
                    limit,
                    drains && answer == Answer::Given,
                    answer,
                    (begun, ended),
                );
            }
            Act::Ack { inbox, reader, through, answer } => {
                self.ack(Inbox(inbox), reader, through, answer, ended);
            }
            Act::LateAck { inbox, reader } => self.ack_late(Inbox(inbox), reader, ended),
            Act::Backup | Act::Change { .. } => unreachable!("they are not calls"),
        }
    }

    fn change(&mut self, keeps_everything: bool, at: Moment) {
        let (continues, kept) = if keeps_everything {
            (self.store, Kept::Everything)
        } else {
            let (store, content) = self.backup.clone();
            self.content = content;
            let seqs = self.content.given.iter();
            (store, Kept::UpTo(seqs.map(|(inbox, last)| (*inbox, Seq(*last))).collect()))
        };
        self.store_before = self.store;
        self.store = store_id(self.changes.len() + 1);
        self.delivered_before = std::mem::take(&mut self.delivered);
        let store = self.store;
        self.changes.push(StoreChange { continues, store, kept, from: at, until: at });
    }

    fn send(
        &mut self,
        inbox: Inbox,
        again: Option<Index>,
        answer: Answer,
        (begun, ended): (Moment, Moment),
    ) {
        let new = u128::try_from(self.sent.len()).expect("few");
        let new = (inbox, MessageId::new(new.to_be_bytes()), Tag(self.sent.len() as u64));
        let (inbox, id, tag) = match again {
            Some(index) if !self.sent.is_empty() => *index.get(&self.sent),
            _ => {
                self.sent.push(new);
                new
            }
        };
        let outcome = match answer {
            Answer::Refused => Outcome::Refused,
            Answer::LostBefore => Outcome::Unknown,
            Answer::Given => Outcome::Acknowledged(self.store(inbox, id, tag)),
            Answer::LostAfter => {
                self.store(inbox, id, tag);
                Outcome::Unknown
            }
        };
        let ended = (outcome != Outcome::Unknown).then_some(ended);
        let edge = Edge(0);
        self.logs[SENDER as usize].send(Send { inbox, id, tag, edge, begun, ended, outcome });
    }

    fn store(&mut self, inbox: Inbox, id: MessageId, tag: Tag) -> Seq {
        let Content { numbers, given, queued } = &mut self.content;
        *numbers.entry((inbox, id)).or_insert_with(|| {
            let last = given.entry(inbox).or_default();
            *last += 1;
            queued.entry(inbox).or_default().insert(Seq(*last), tag);
            Seq(*last)
        })
    }

    fn read(
        &mut self,
        inbox: Inbox,
        reader: u32,
        limit: usize,
        drains: bool,
        answer: Answer,
        (begun, ended): (Moment, Moment),
    ) {
        let log = &mut self.logs[reader as usize];
        let read = log.read(inbox, begun);
        if answer != Answer::Given {
            return;
        }
        let queued = self.content.queued.entry(inbox).or_default();
        let shown: Vec<_> = queued.iter().take(limit).map(|(seq, tag)| (*seq, *tag)).collect();
        self.delivered.extend(shown.iter().map(|(seq, _)| (inbox, *seq)));
        if drains {
            queued.retain(|seq, _| !shown.iter().any(|(s, _)| s == seq));
        }
        log.show(read, ended, Some(self.store), shown);
    }

    fn ack(&mut self, inbox: Inbox, reader: u32, through: bool, answer: Answer, ended: Moment) {
        let queued = self.content.queued.entry(inbox).or_default();
        let known = |seq: &Seq| self.delivered.contains(&(inbox, *seq));
        let log = &mut self.logs[reader as usize];
        let acked: Vec<_> = if through {
            queued.keys().copied().take_while(known).collect()
        } else {
            queued.keys().copied().filter(known).step_by(2).collect()
        };
        let Some(&last) = acked.last() else { return };
        let ack = if through {
            log.ack_through(inbox, Some(self.store), last)
        } else {
            log.ack(inbox, Some(self.store), acked.iter().copied())
        };
        if matches!(answer, Answer::Given | Answer::LostAfter) {
            queued.retain(|seq, _| !acked.contains(seq));
        }
        if answer == Answer::Given {
            log.acks[ack].ended = Some(ended);
        }
    }

    fn ack_late(&mut self, inbox: Inbox, reader: u32, ended: Moment) {
        let last = self.delivered_before.iter().rfind(|(of, _)| *of == inbox);
        let Some(&(_, seq)) = last else { return };
        let log = &mut self.logs[reader as usize];
        let ack = log.ack_through(inbox, Some(self.store_before), seq);
        log.acks[ack].ended = Some(ended);
    }
}
