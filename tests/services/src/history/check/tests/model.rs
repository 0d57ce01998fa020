//! A correct inbox with random users. Their records are a history without violations.

use std::collections::{BTreeMap, BTreeSet};

use proptest::{collection::vec, prelude::*, sample::Index};
use qpq_domain::{MessageId, Seq};

use crate::history::{Edge, Inbox, Log, Moment, Outcome, Party, Send, Tag};

const INBOXES: u32 = 3;
const READERS: u32 = 3;
/// The party that sends all messages, and the party of the last read.
const SENDER: u32 = READERS;
const LAST_READER: u32 = READERS + 1;
/// A time before the first call, for records that are too early.
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
}

/// An act, with the times from the begin of its call to its effect, and to its end.
pub(super) type Timed = (Act, u64, u64);

pub(super) fn acts() -> impl Strategy<Value = Vec<Timed>> {
    let answer = prop_oneof![
        6 => Just(Answer::Given),
        1 => Just(Answer::LostAfter),
        1 => Just(Answer::LostBefore),
        1 => Just(Answer::Refused),
    ];
    let inbox = 0..INBOXES;
    let reader = 0..READERS;
    let act = prop_oneof![
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
    ];
    vec((act, 0..45_u64, 0..45_u64), 1..120)
}

/// A correct inbox with the logs of its users.
struct Model {
    logs: Vec<Log>,
    sent: Vec<(Inbox, MessageId, Tag)>,
    numbers: BTreeMap<(Inbox, MessageId), Seq>,
    given: BTreeMap<Inbox, u64>,
    queued: BTreeMap<Inbox, BTreeMap<Seq, Tag>>,
    delivered: BTreeSet<(Inbox, Seq)>,
}

/// Runs the acts one after the other, each within the time of its call. Calls overlap.
pub(super) fn logs_of(acts: &[Timed]) -> Vec<Log> {
    let mut model = Model {
        logs: (0..=LAST_READER).map(|party| Log::of(Party(party))).collect(),
        sent: Vec::new(),
        numbers: BTreeMap::new(),
        given: BTreeMap::new(),
        queued: BTreeMap::new(),
        delivered: BTreeSet::new(),
    };
    let mut at = START;
    for (act, before, after) in acts {
        at += 10;
        model.happen(act, Moment(at - before), Moment(at + after));
    }
    for inbox in (0..INBOXES).map(Inbox) {
        let left: Vec<_> =
            model.queued.entry(inbox).or_default().iter().map(|(s, t)| (*s, *t)).collect();
        let log = &mut model.logs[LAST_READER as usize];
        let read = log.read(inbox, Moment(at + 100));
        log.show(read, Moment(at + 101), left);
    }
    model.logs
}

impl Model {
    fn happen(&mut self, act: &Act, begun: Moment, ended: Moment) {
        match *act {
            Act::Send { inbox, again, answer } => self.send(Inbox(inbox), again, answer, begun),
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
        }
    }

    fn send(&mut self, inbox: Inbox, again: Option<Index>, answer: Answer, begun: Moment) {
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
        self.logs[SENDER as usize].send(Send { inbox, id, tag, edge: Edge(0), begun, outcome });
    }

    fn store(&mut self, inbox: Inbox, id: MessageId, tag: Tag) -> Seq {
        *self.numbers.entry((inbox, id)).or_insert_with(|| {
            let last = self.given.entry(inbox).or_default();
            *last += 1;
            self.queued.entry(inbox).or_default().insert(Seq(*last), tag);
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
        let queued = self.queued.entry(inbox).or_default();
        let shown: Vec<_> = queued.iter().take(limit).map(|(seq, tag)| (*seq, *tag)).collect();
        self.delivered.extend(shown.iter().map(|(seq, _)| (inbox, *seq)));
        if drains {
            queued.retain(|seq, _| !shown.iter().any(|(s, _)| s == seq));
        }
        log.show(read, ended, shown);
    }

    fn ack(&mut self, inbox: Inbox, reader: u32, through: bool, answer: Answer, ended: Moment) {
        let queued = self.queued.entry(inbox).or_default();
        let known = |seq: &Seq| self.delivered.contains(&(inbox, *seq));
        let log = &mut self.logs[reader as usize];
        let gone: Vec<_> = if through {
            queued.keys().copied().take_while(known).collect()
        } else {
            queued.keys().copied().filter(known).step_by(2).collect()
        };
        let Some(&last) = gone.last() else { return };
        let ack = if through {
            log.ack_through(inbox, last)
        } else {
            log.ack(inbox, gone.iter().copied())
        };
        if matches!(answer, Answer::Given | Answer::LostAfter) {
            queued.retain(|seq, _| !gone.contains(seq));
        }
        if answer == Answer::Given {
            log.acks[ack].ended = Some(ended);
        }
    }
}
