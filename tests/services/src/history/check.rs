//! Checks a history: finds violations of the guarantees of an inbox over all logs together. Most of
//! the work is sorting, so the check of a million messages takes seconds.
//!
//! One seq may belong to different messages in different histories of the store. Therefore
//! deliveries and acknowledgements are compared by their [`Place`]: a seq together with the branch
//! of the store's history that assigned it. The answer to a read contains the store id. The answer
//! to an Enqueue does not: an acknowledgement during a change may belong to any history that
//! existed during the call. The checker chooses the history that agrees with the other records.

mod acks;

use std::{
    collections::{HashMap, HashSet},
    fmt,
};

use qpq_domain::{MessageId, Seq, StoreId};

use self::acks::Acks;
use super::{
    Edge, Inbox, Log, Moment, Outcome, Party, Read, StoreChange, Tag,
    stores::{Branch, Place, Stores},
};

/// A violated guarantee. One violation fails a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Violation {
    /// An acknowledged message of the last history of the store that no read delivered, neither in
    /// this history nor in an earlier history with the same message.
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
    /// after a message with a higher seq.
    OutOfOrder { inbox: Inbox, reader: Party, before: Seq, after: Seq },
    /// A delivered message although the server refused every attempt to send it.
    DeliveredThoughRefused { inbox: Inbox, seq: Seq, id: MessageId },
    /// A delivered message that was not sent to this inbox.
    NotSent { inbox: Inbox, seq: Seq, tag: Tag },
    /// A message whose delivery ended before its first Enqueue began.
    DeliveredBeforeSent { inbox: Inbox, seq: Seq, id: MessageId },
    /// A message that was lost with a history of the store, and was delivered in another one
    /// although it was not sent again.
    DeliveredThoughLost { inbox: Inbox, seq: Seq, id: MessageId, store: Option<StoreId> },
    /// A read that returned messages and the store id of a history that did not exist during the
    /// read.
    OtherStore { inbox: Inbox, reader: Party, store: Option<StoreId>, read_begun: Moment },
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
    /// The number of histories of the store.
    pub histories: usize,
    /// Acknowledgements beyond the state that the next history of the store began with.
    pub rolled_back: usize,
    /// The acknowledgements in `rolled_back` whose message no read delivered.
    pub lost_with_history: usize,
    pub violations: Vec<Violation>,
}

impl Report {
    /// Asserts that there is no violation.
    ///
    /// # Panics
    /// If there is a violation. The panic message contains the first ones.
    pub fn assert_clean(&self) {
        assert!(self.violations.is_empty(), "{self}");
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { messages, acknowledged, unknown, deliveries, delivered, violations, .. } = self;
        writeln!(
            f,
            "{messages} messages, {acknowledged} acknowledged, {unknown} with unknown outcome; \
             {deliveries} deliveries of {delivered}; {} violations",
            violations.len()
        )?;
        let Self { histories, rolled_back, lost_with_history, .. } = self;
        if *histories > 1 {
            writeln!(
                f,
                "{histories} histories of the store: {rolled_back} acknowledged messages were \
                 accepted after the state that was restored, {lost_with_history} of them were lost \
                 before a read delivered them"
            )?;
        }
        violations.iter().take(30).try_for_each(|violation| writeln!(f, "  {violation:?}"))
    }
}

pub(super) fn check(logs: &[Log], changes: &[StoreChange]) -> Report {
    let first = logs.iter().flat_map(|log| &log.reads).find_map(|read| read.store);
    let stores = Stores::new(first, changes);
    let mut check = Check {
        messages: messages(logs),
        acks: Acks::of(logs, &stores),
        report: Report { histories: stores.count(), ..Report::default() },
        stores,
        deliveries: Vec::new(),
    };
    for log in logs {
        check.deliveries(log);
        check.order(log);
    }
    check.deliveries.sort_unstable();
    check.deliveries.dedup();
    let acknowledged = check.acknowledgements();
    check.seqs(&acknowledged);
    check.losses(&acknowledged)
}

/// A message to one inbox, with all its attempts.
struct Message {
    inbox: Inbox,
    id: MessageId,
    first_begun: Moment,
    /// `true` if an attempt may have taken effect.
    possible: bool,
    answered: bool,
    delivered: bool,
    /// `true` if the message was delivered at a place that the last history of the store has.
    delivered_at_last: bool,
}

/// A call that sends a message.
#[derive(Clone, Copy)]
struct Attempt {
    message: usize,
    begun: Moment,
    ended: Option<Moment>,
    outcome: Outcome,
    edge: Edge,
}

/// An acknowledged message.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Acknowledged {
    message: usize,
    place: Place,
    edge: Edge,
}

#[derive(Default)]
struct Messages {
    all: Vec<Message>,
    /// The attempts of all messages, sorted by message.
    attempts: Vec<Attempt>,
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
                possible: false,
                answered: false,
                delivered: false,
                delivered_at_last: false,
            });
            messages.all.len() - 1
        });
        let named = *messages.by_tag.entry((send.inbox, send.tag)).or_insert(index);
        assert_eq!(named, index, "{:?} is used for two messages to {:?}", send.tag, send.inbox);
        let message = &mut messages.all[index];
        message.first_begun = message.first_begun.min(send.begun);
        message.answered |= send.outcome != Outcome::Unknown;
        message.possible |= send.outcome != Outcome::Refused;
        messages.attempts.push(Attempt {
            message: index,
            begun: send.begun,
            ended: send.ended,
            outcome: send.outcome,
            edge: send.edge,
        });
    }
    messages.attempts.sort_by_key(|attempt| attempt.message);
    messages
}

impl Messages {
    fn attempts(&self, message: usize) -> &[Attempt] {
        let first = self.attempts.partition_point(|attempt| attempt.message < message);
        let rest = &self.attempts[first..];
        &rest[..rest.partition_point(|attempt| attempt.message == message)]
    }
}

struct Check {
    messages: Messages,
    acks: Acks,
    stores: Stores,
    /// The place and message of each delivery; `None` for a message that was not sent.
    deliveries: Vec<(Place, Option<usize>)>,
    report: Report,
}

impl Check {
    fn violation(&mut self, violation: Violation) {
        self.report.violations.push(violation);
    }

    /// Checks each delivery: the message was sent, is not yet acked, and is in the history.
    fn deliveries(&mut self, log: &Log) {
        let reader = log.party;
        for read in log.reads.iter().filter(|read| !read.shown.is_empty()) {
            let (inbox, read_begun) = (read.inbox, read.begun);
            let store = self.stores.get(read.store);
            let Some(store) = store.filter(|s| self.stores.existed(*s, read.begun, read.ended))
            else {
                let store = read.store;
                self.violation(Violation::OtherStore { inbox, reader, store, read_begun });
                continue;
            };
            let branch = self.stores.branch(store);
            for &(seq, tag) in &log.shown[read.shown.clone()] {
                self.report.deliveries += 1;
                let index = self.messages.by_tag.get(&(inbox, tag)).copied();
                let place = self.stores.place(store, inbox, seq);
                self.deliveries.push((place, index));
                if let Some(acked) = self.acks.ended(branch, inbox, seq)
                    && acked < read_begun
                {
                    self.violation(Violation::DeliveredAfterAck {
                        inbox,
                        seq,
                        reader,
                        acked,
                        read_begun,
                    });
                }
                match index {
                    Some(index) => self.delivery(index, place, read),
                    None => self.violation(Violation::NotSent { inbox, seq, tag }),
                }
            }
        }
    }

    /// Checks one delivery of a message that was sent.
    fn delivery(&mut self, index: usize, place: Place, read: &Read) {
        let Place { inbox, seq, branch } = place;
        let message = &mut self.messages.all[index];
        message.delivered = true;
        message.delivered_at_last = message.delivered_at_last || self.stores.survives(place);
        let (id, possible, first_begun) = (message.id, message.possible, message.first_begun);
        if read.ended.is_some_and(|ended| ended < first_begun) {
            return self.violation(Violation::DeliveredBeforeSent { inbox, seq, id });
        }
        if !possible {
            return self.violation(Violation::DeliveredThoughRefused { inbox, seq, id });
        }
        let may_be_there = self.messages.attempts(index).iter().any(|attempt| {
            attempt.outcome != Outcome::Refused
                && self.stores.may_reach(branch, attempt.begun, attempt.ended)
        });
        if !may_be_there {
            let store = read.store;
            self.violation(Violation::DeliveredThoughLost { inbox, seq, id, store });
        }
    }

    /// Checks the order of one reader, in each of its inboxes and each branch.
    fn order(&mut self, log: &Log) {
        let mut inboxes: HashMap<(Inbox, Branch), Vec<&Read>> = HashMap::new();
        for read in log.reads.iter().filter(|read| read.ended.is_some()) {
            let Some(store) = self.stores.get(read.store) else { continue };
            let branch = self.stores.branch(store);
            inboxes.entry((read.inbox, branch)).or_default().push(read);
        }
        for ((inbox, _), mut reads) in inboxes {
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

    /// Returns the place of each acknowledgement.
    fn acknowledgements(&self) -> Vec<Acknowledged> {
        let mut sightings = self.deliveries.clone();
        let (mut known, mut doubtful) = (Vec::new(), Vec::new());
        for attempt in &self.messages.attempts {
            let Outcome::Acknowledged(seq) = attempt.outcome else { continue };
            let (message, edge) = (attempt.message, attempt.edge);
            let inbox = self.messages.all[message].inbox;
            match self.stores.places((inbox, seq), attempt.begun, attempt.ended)[..] {
                [place] => {
                    sightings.push((place, Some(message)));
                    known.push(Acknowledged { message, place, edge });
                }
                ref places => doubtful.push((attempt.ended, message, places.to_vec(), edge)),
            }
        }
        sightings.sort_unstable();
        // The attempt that ended first has the fewest possible places, so its place is chosen
        // first.
        doubtful.sort_by_key(|(ended, ..)| *ended);
        let in_doubt: HashSet<_> = doubtful.iter().map(|(_, message, ..)| *message).collect();
        let mut of_message: HashMap<usize, Vec<Place>> = HashMap::new();
        for (place, message) in &sightings {
            if let Some(message) = message.filter(|message| in_doubt.contains(message)) {
                of_message.entry(message).or_default().push(*place);
            }
        }
        let mut taken = HashMap::new();
        for (_, message, places, edge) in doubtful {
            let own = of_message.entry(message).or_default();
            let place = self.most_likely(&sightings, &taken, own, &places);
            taken.insert(place, message);
            own.push(place);
            known.push(Acknowledged { message, place, edge });
        }
        known.sort_unstable();
        known.dedup_by_key(|known| (known.message, known.place));
        known
    }

    /// Returns the most likely place of an acknowledgement during a change of the store.
    ///
    /// The candidates are, in this order: a place at which the message was seen, a free place that
    /// the last history does not have, and any other free place. A place is free if no other
    /// message was seen there and its history has no other seq of the message. If the second choice
    /// is wrong, the seq of the message is a gap in the last history, which is reported.
    fn most_likely(
        &self,
        sightings: &[(Place, Option<usize>)],
        taken: &HashMap<Place, usize>,
        own: &[Place],
        places: &[Place],
    ) -> Place {
        let seen = |place: &Place| own.contains(place);
        let is_free = |place: &Place| {
            let first = sightings.partition_point(|(other, _)| other < place);
            sightings.get(first).is_none_or(|(other, _)| other != place)
                && !taken.contains_key(place)
                && own.iter().all(|other| !self.in_one_history(place, other))
        };
        let lost = |place: &Place| is_free(place) && !self.stores.survives(*place);
        let find = |wanted: &dyn Fn(&Place) -> bool| places.iter().copied().find(wanted);
        let place = find(&seen).or_else(|| find(&lost)).or_else(|| find(&is_free));
        place.or(places.last().copied()).expect("the store had a history at any time")
    }

    /// Returns whether one history has the messages at both places.
    fn in_one_history(&self, one: &Place, other: &Place) -> bool {
        self.stores.has(one.branch, *other) || self.stores.has(other.branch, *one)
    }

    /// Checks that the seqs of each inbox begin with 1 and have no gap, that each seq has one
    /// message, and that each message has one seq.
    fn seqs(&mut self, acknowledged: &[Acknowledged]) {
        let mut sightings = self.deliveries.clone();
        sightings.extend(acknowledged.iter().map(|known| (known.place, Some(known.message))));
        sightings.sort_unstable();
        sightings.dedup();
        // Gaps are checked only in the last history. An ended history may have lost messages
        // without an answer before a read saw them.
        let there: Vec<_> = sightings
            .iter()
            .filter(|(place, _)| self.stores.survives(*place))
            .map(|(place, _)| (place.inbox, place.seq))
            .collect();
        for inbox in there.chunk_by(|a, b| a.0 == b.0) {
            self.contiguous(inbox);
        }
        for pair in sightings.windows(2) {
            let [(place, Some(one)), (other_place, Some(other))] = *pair else { continue };
            if place == other_place {
                let Place { inbox, seq, .. } = place;
                let ids = [one, other].map(|index| self.messages.all[index].id);
                self.violation(Violation::SeqUsedTwice { inbox, seq, ids });
            }
        }
        sightings.sort_unstable_by_key(|&(place, message)| (message, place));
        for places in sightings.chunk_by(|a, b| a.1 == b.1) {
            let Some(message) = places[0].1 else { continue };
            for (n, (one, _)) in places.iter().enumerate() {
                for (other, _) in &places[n + 1..] {
                    if self.in_one_history(one, other) {
                        let Message { inbox, id, .. } = self.messages.all[message];
                        let seqs = [one.seq, other.seq];
                        self.violation(Violation::TwoSeqs { inbox, id, seqs });
                    }
                }
            }
        }
    }

    fn contiguous(&mut self, sightings: &[(Inbox, Seq)]) {
        let mut expected = Seq(1);
        for &(inbox, seq) in sightings {
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

    /// Checks that each acknowledged message was delivered, unless it was lost with its history.
    fn losses(mut self, acknowledged: &[Acknowledged]) -> Report {
        for message in &self.messages.all {
            self.report.messages += 1;
            self.report.unknown += usize::from(!message.answered);
            self.report.delivered += usize::from(message.delivered);
        }
        for places in acknowledged.chunk_by(|a, b| a.message == b.message) {
            self.report.acknowledged += 1;
            let Message { inbox, id, delivered_at_last, .. } = self.messages.all[places[0].message];
            let mut there = None;
            for known in places {
                if self.stores.survives(known.place) {
                    there.get_or_insert((known.place.seq, known.edge));
                    continue;
                }
                let delivery = (known.place, Some(known.message));
                self.report.rolled_back += 1;
                self.report.lost_with_history +=
                    usize::from(self.deliveries.binary_search(&delivery).is_err());
            }
            if let Some((seq, edge)) = there
                && !delivered_at_last
            {
                self.report.violations.push(Violation::Lost { inbox, seq, id, edge });
            }
        }
        self.report
    }
}

#[cfg(test)]
mod tests;
