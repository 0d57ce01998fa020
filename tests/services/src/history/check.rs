//! Checks a history: finds violations of the guarantees of an inbox over all logs together. Mostly
//! sorting, so a million messages take seconds.

use std::{
    collections::{HashMap, HashSet},
    fmt,
};

use qpq_domain::{MessageId, Seq};

use super::{AckRange, Edge, Inbox, Log, Moment, Outcome, Party, Read, Tag};

/// A violated guarantee. One violation fails a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Violation {
    /// An acknowledged message that no read delivered, not even the last.
    Lost { inbox: Inbox, seq: Seq, id: MessageId, edge: Edge },
    /// A message delivered by a read that began after the answer to its ack.
    DeliveredAfterAck { inbox: Inbox, seq: Seq, reader: Party, acked: Moment, read_begun: Moment },
    /// Seqs that no message has, below the seq of a message.
    Gap { inbox: Inbox, first: Seq, last: Seq },
    /// A message with seq 0; seqs begin with 1.
    SeqZero { inbox: Inbox },
    /// Two messages with the same seq.
    SeqUsedTwice { inbox: Inbox, seq: Seq, ids: [MessageId; 2] },
    /// One message with two seqs: it is stored twice, or two edges disagree.
    TwoSeqs { inbox: Inbox, id: MessageId, seqs: [Seq; 2] },
    /// Messages out of order in one answer, or a message that a reader receives for the first time
    /// after a later one.
    OutOfOrder { inbox: Inbox, reader: Party, before: Seq, after: Seq },
    /// A delivered message of which every attempt to send it was refused.
    DeliveredThoughRefused { inbox: Inbox, seq: Seq, id: MessageId },
    /// A delivered message that was not sent to this inbox.
    Invented { inbox: Inbox, seq: Seq, tag: Tag },
    /// A message whose delivery ended before its first Enqueue began.
    DeliveredBeforeSent { inbox: Inbox, seq: Seq, id: MessageId },
}

/// The result of a check.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Report {
    /// Different messages that were sent, with any outcome.
    pub messages: usize,
    pub acknowledged: usize,
    /// Messages without an answer to any attempt.
    pub unknown: usize,
    /// Deliveries, including repeated ones.
    pub deliveries: usize,
    /// Different messages that were delivered.
    pub delivered: usize,
    pub violations: Vec<Violation>,
}

impl Report {
    /// # Panics
    /// If there is a violation. The panic message contains the first ones.
    pub fn assert_clean(&self) {
        assert!(self.violations.is_empty(), "{self}");
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { messages, acknowledged, unknown, deliveries, delivered, violations } = self;
        writeln!(
            f,
            "{messages} messages, {acknowledged} acknowledged, {unknown} with unknown outcome; \
             {deliveries} deliveries of {delivered}; {} violations",
            violations.len()
        )?;
        violations.iter().take(30).try_for_each(|violation| writeln!(f, "  {violation:?}"))
    }
}

pub(super) fn check(logs: &[Log]) -> Report {
    let mut check = Check {
        messages: messages(logs),
        acks: acks(logs),
        sightings: Vec::new(),
        report: Report::default(),
    };
    for log in logs {
        check.deliveries(log);
        check.order(log);
    }
    check.seqs(logs);
    check.fates()
}

/// A message to one inbox, with all its attempts.
struct Message {
    inbox: Inbox,
    id: MessageId,
    first_begun: Moment,
    acknowledged: Option<(Seq, Edge)>,
    /// Whether an attempt may have taken effect.
    possible: bool,
    answered: bool,
    delivered: bool,
}

#[derive(Default)]
struct Messages {
    all: Vec<Message>,
    by_id: HashMap<(Inbox, MessageId), usize>,
    by_tag: HashMap<(Inbox, Tag), usize>,
}

fn messages(logs: &[Log]) -> Messages {
    let mut messages = Messages::default();
    for send in logs.iter().flat_map(|log| &log.sends) {
        let index = *messages.by_id.entry((send.inbox, send.id)).or_insert_with(|| {
            messages.all.push(Message {
                inbox: send.inbox,
                id: send.id,
                first_begun: send.begun,
                acknowledged: None,
                possible: false,
                answered: false,
                delivered: false,
            });
            messages.all.len() - 1
        });
        let named = *messages.by_tag.entry((send.inbox, send.tag)).or_insert(index);
        assert_eq!(named, index, "{:?} is used for two messages to {:?}", send.tag, send.inbox);
        let message = &mut messages.all[index];
        message.first_begun = message.first_begun.min(send.begun);
        message.answered |= send.outcome != Outcome::Unknown;
        message.possible |= send.outcome != Outcome::Refused;
        if let Outcome::Acknowledged(seq) = send.outcome {
            message.acknowledged.get_or_insert((seq, send.edge));
        }
    }
    messages
}

/// The times of answers to acks.
#[derive(Default)]
struct Acks {
    named: HashMap<(Inbox, Seq), Moment>,
    /// In seq order, each with the earliest answer to an ack up to it or to a higher seq.
    through: HashMap<Inbox, Vec<(Seq, Moment)>>,
}

impl Acks {
    /// Returns the time from which a message must not be delivered.
    fn ended(&self, inbox: Inbox, seq: Seq) -> Option<Moment> {
        let named = self.named.get(&(inbox, seq)).copied();
        let through = self.through.get(&inbox).and_then(|acks| {
            let covering = acks.partition_point(|(through, _)| *through < seq);
            acks.get(covering).map(|(_, ended)| *ended)
        });
        named.into_iter().chain(through).min()
    }
}

fn acks(logs: &[Log]) -> Acks {
    let mut acks = Acks::default();
    for log in logs {
        for ack in &log.acks {
            let Some(ended) = ack.ended else { continue };
            match &ack.what {
                AckRange::Named(range) => {
                    for &seq in &log.named[range.clone()] {
                        let earliest = acks.named.entry((ack.inbox, seq)).or_insert(ended);
                        *earliest = ended.min(*earliest);
                    }
                }
                AckRange::Through(seq) => {
                    acks.through.entry(ack.inbox).or_default().push((*seq, ended))
                }
            }
        }
    }
    for through in acks.through.values_mut() {
        through.sort_unstable();
        let mut earliest = Moment(u64::MAX);
        for (_, ended) in through.iter_mut().rev() {
            earliest = earliest.min(*ended);
            *ended = earliest;
        }
    }
    acks
}

struct Check {
    messages: Messages,
    acks: Acks,
    /// Inbox, seq and message of each delivery or answer; `None` for a message that was not sent.
    sightings: Vec<(Inbox, Seq, Option<usize>)>,
    report: Report,
}

impl Check {
    fn violation(&mut self, violation: Violation) {
        self.report.violations.push(violation);
    }

    /// Checks each delivery: the message was sent, and is not yet acked.
    fn deliveries(&mut self, log: &Log) {
        let reader = log.party;
        for read in &log.reads {
            let inbox = read.inbox;
            for &(seq, tag) in &log.shown[read.shown.clone()] {
                self.report.deliveries += 1;
                let index = self.messages.by_tag.get(&(inbox, tag)).copied();
                self.sightings.push((inbox, seq, index));
                if let Some(acked) = self.acks.ended(inbox, seq)
                    && acked < read.begun
                {
                    let read_begun = read.begun;
                    self.violation(Violation::DeliveredAfterAck {
                        inbox,
                        seq,
                        reader,
                        acked,
                        read_begun,
                    });
                }
                let Some(index) = index else {
                    self.violation(Violation::Invented { inbox, seq, tag });
                    continue;
                };
                let message = &mut self.messages.all[index];
                message.delivered = true;
                let (id, possible) = (message.id, message.possible);
                if read.ended.is_some_and(|ended| ended < message.first_begun) {
                    self.violation(Violation::DeliveredBeforeSent { inbox, seq, id });
                }
                if !possible {
                    self.violation(Violation::DeliveredThoughRefused { inbox, seq, id });
                }
            }
        }
    }

    /// Checks the order of one reader, in each of its inboxes.
    fn order(&mut self, log: &Log) {
        let mut inboxes: HashMap<Inbox, Vec<&Read>> = HashMap::new();
        for read in log.reads.iter().filter(|read| read.ended.is_some()) {
            inboxes.entry(read.inbox).or_default().push(read);
        }
        for (inbox, mut reads) in inboxes {
            reads.sort_unstable_by_key(|read| read.begun);
            let mut by_end = reads.clone();
            by_end.sort_unstable_by_key(|read| read.ended);
            let mut by_end = by_end.into_iter().peekable();
            // The messages of reads that ended before the current one began; concurrent calls have
            // no order.
            let mut shown = HashSet::new();
            let mut highest = Seq::ZERO;
            for read in reads {
                while let Some(earlier) = by_end.next_if(|earlier| earlier.ended < Some(read.begun))
                {
                    for &(seq, _) in &log.shown[earlier.shown.clone()] {
                        shown.insert(seq);
                        highest = highest.max(seq);
                    }
                }
                let mut last = None;
                for &(seq, _) in &log.shown[read.shown.clone()] {
                    let before = match last {
                        Some(last) if last >= seq => Some(last),
                        _ => (seq < highest && !shown.contains(&seq)).then_some(highest),
                    };
                    if let Some(before) = before {
                        self.violation(Violation::OutOfOrder {
                            inbox,
                            reader: log.party,
                            before,
                            after: seq,
                        });
                    }
                    last = Some(seq);
                }
            }
        }
    }

    /// Checks the seqs of each inbox: from 1, without gaps, one for each message and one message
    /// for each.
    fn seqs(&mut self, logs: &[Log]) {
        for send in logs.iter().flat_map(|log| &log.sends) {
            if let Outcome::Acknowledged(seq) = send.outcome {
                let index = self.messages.by_id[&(send.inbox, send.id)];
                self.sightings.push((send.inbox, seq, Some(index)));
            }
        }
        let mut sightings = std::mem::take(&mut self.sightings);
        sightings.sort_unstable();
        sightings.dedup();
        for inbox in sightings.chunk_by(|a, b| a.0 == b.0) {
            self.contiguous(inbox);
        }
        for pair in sightings.windows(2) {
            let [(inbox, seq, Some(one)), (other_inbox, other_seq, Some(other))] = *pair else {
                continue;
            };
            if (inbox, seq) == (other_inbox, other_seq) {
                let ids = [one, other].map(|index| self.messages.all[index].id);
                self.violation(Violation::SeqUsedTwice { inbox, seq, ids });
            }
        }
        sightings.sort_unstable_by_key(|&(_, seq, message)| (message, seq));
        for pair in sightings.windows(2) {
            let [(inbox, one, Some(message)), (_, other, Some(same))] = *pair else { continue };
            if message == same {
                let id = self.messages.all[message].id;
                self.violation(Violation::TwoSeqs { inbox, id, seqs: [one, other] });
            }
        }
    }

    fn contiguous(&mut self, sightings: &[(Inbox, Seq, Option<usize>)]) {
        let mut expected = Seq(1);
        for &(inbox, seq, _) in sightings {
            if seq == Seq::ZERO {
                self.violation(Violation::SeqZero { inbox });
                continue;
            }
            if seq > expected {
                self.violation(Violation::Gap { inbox, first: expected, last: Seq(seq.0 - 1) });
            }
            expected = Seq(seq.0.saturating_add(1));
        }
    }

    /// Checks that each acknowledged message was delivered.
    fn fates(mut self) -> Report {
        for message in &self.messages.all {
            self.report.messages += 1;
            self.report.unknown += usize::from(!message.answered);
            self.report.delivered += usize::from(message.delivered);
            let Some((seq, edge)) = message.acknowledged else { continue };
            self.report.acknowledged += 1;
            if !message.delivered {
                let (inbox, id) = (message.inbox, message.id);
                self.report.violations.push(Violation::Lost { inbox, seq, id, edge });
            }
        }
        self.report
    }
}

#[cfg(test)]
mod tests;
