//! Tests with a store that goes back in time.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    model::{Run, acts_with_changes, run},
    *,
};
use crate::history::Kept;

const INBOX: Inbox = Inbox(0);
/// The time of the change in [`World`].
const CHANGE: u64 = 100;
const BEFORE: StoreId = StoreId::new([1; 16]);
const AFTER: StoreId = StoreId::new([2; 16]);

fn judge(run: &Run) -> Report {
    check(&run.logs, &run.changes)
}

/// Returns the report of a check without store ids, as if the store had only one history.
fn judge_without_stores(run: &Run) -> Report {
    let mut logs = run.logs.clone();
    for log in &mut logs {
        log.reads.iter_mut().for_each(|read| read.store = None);
        log.acks.iter_mut().for_each(|ack| ack.store = None);
    }
    check(&logs, &[])
}

/// Returns the acknowledged messages that were sent only after the last change of the store.
fn acked_at_last(run: &Run) -> Vec<Acked> {
    let last = run.changes.last().expect("a change").until;
    let sends = run.logs.iter().flat_map(|log| &log.sends);
    let before: BTreeSet<_> =
        sends.filter(|send| send.begun <= last).map(|send| (send.inbox, send.id)).collect();
    let mut acked = acked(&run.logs);
    acked.retain(|message| !before.contains(&(message.inbox, message.id)));
    acked
}

/// Returns the acknowledged messages that the last lossy change lost, that no later read delivered
/// and that were not sent again.
fn lost_at_last(run: &Run) -> Vec<Acked> {
    let mut lossy = run.changes.iter().rev().filter_map(|change| match &change.kept {
        Kept::Everything => None,
        Kept::UpTo(seqs) => Some((change.from, seqs)),
    });
    let (begun, kept) = lossy.next().expect("a lossy change");
    let reads = run.logs.iter().flat_map(|log| log.reads.iter().map(move |read| (log, read)));
    let seen: BTreeSet<_> = reads
        .filter(|(_, read)| read.ended > Some(begun))
        .flat_map(|(log, read)| {
            log.shown[read.shown.clone()].iter().map(|(_, tag)| (read.inbox, *tag))
        })
        .collect();
    let sends = run.logs.iter().flat_map(|log| &log.sends);
    let again: BTreeSet<_> = sends
        .filter(|send| send.ended.is_none_or(|ended| ended >= begun))
        .map(|send| (send.inbox, send.id))
        .collect();
    let mut lost = acked(&run.logs);
    lost.retain(|message| {
        kept.get(&message.inbox).is_none_or(|last| message.seq > *last)
            && !again.contains(&(message.inbox, message.id))
            && !seen.contains(&(message.inbox, message.tag))
    });
    lost
}

proptest! {
    #[test]
    fn histories_of_a_store_that_goes_back_have_no_violations(acts in acts_with_changes()) {
        let run = run(&acts);
        let report = judge(&run);
        prop_assert_eq!(&report.violations, &[], "{}", report);
        prop_assert_eq!(report.histories, run.changes.len() + 1);
    }

    #[test]
    fn a_store_that_delivers_nothing_of_the_new_history_is_reported(acts in acts_with_changes()) {
        let mut run = run(&acts);
        let new = acked_at_last(&run);
        prop_assume!(!new.is_empty());
        let is_new: BTreeSet<_> = new.iter().map(|message| (message.inbox, message.tag)).collect();
        for inbox in new.iter().map(|message| message.inbox) {
            rewrite(&mut run.logs, inbox, |shown| {
                shown.into_iter().filter(|(_, tag)| !is_new.contains(&(inbox, *tag))).collect()
            });
        }
        let found = judge(&run).violations;
        for Acked { inbox, id, edge, seq, .. } in new {
            let lost = Violation::Lost { inbox, seq, id, edge };
            prop_assert!(found.contains(&lost), "{:?} is not in {:?}", lost, found);
        }
    }

    #[test]
    fn a_lost_message_that_is_delivered_later_is_reported(
        acts in acts_with_changes(),
        pick: Index,
    ) {
        let mut run = run(&acts);
        let lost = lost_at_last(&run);
        prop_assume!(!lost.is_empty());
        let Acked { inbox, id, tag, .. } = *pick.get(&lost);
        let newest = run.newest.get(&inbox).copied().unwrap_or_default();
        let (seq, store) = (Seq(newest + 1), run.changes.last().map(|change| change.store));
        let mut log = Log::of(STRANGER);
        let read = log.read(inbox, Moment(AFTER_ALL));
        log.show(read, Moment(AFTER_ALL), store, [(seq, tag)]);
        run.logs.push(log);
        let expected = Violation::DeliveredThoughLost { inbox, seq, id, store };
        prop_assert!(judge(&run).violations.contains(&expected), "{:?}", judge(&run));
    }

    #[test]
    fn a_read_in_a_history_that_has_ended_is_reported(acts in acts_with_changes(), pick: Index) {
        let mut run = run(&acts);
        let acked = acked(&run.logs);
        prop_assume!(!acked.is_empty());
        let Acked { inbox, tag, seq, .. } = *pick.get(&acked);
        for store in [run.changes[0].continues, StoreId::new([0xff; 16])] {
            let mut log = Log::of(STRANGER);
            let read = log.read(inbox, Moment(AFTER_ALL));
            log.show(read, Moment(AFTER_ALL), Some(store), [(seq, tag)]);
            run.logs.push(log);
            let (reader, read_begun) = (STRANGER, Moment(AFTER_ALL));
            let store = Some(store);
            let expected = Violation::OtherStore { inbox, reader, store, read_begun };
            prop_assert_eq!(judge(&run).violations, [expected]);
            run.logs.pop();
        }
    }
}

/// The records of one inbox, with a change of the store that keeps two of three messages.
struct World {
    sender: Log,
    reader: Log,
    kept: Kept,
}

impl World {
    /// Creates a world in which three messages are acknowledged and the state after two of them is
    /// restored.
    fn new() -> Self {
        let kept = Kept::UpTo(BTreeMap::from([(INBOX, Seq(2))]));
        let mut world = Self { sender: Log::of(Party(0)), reader: Log::of(Party(1)), kept };
        (1..=3).for_each(|n| world.send(n, n, (n, n + 1)));
        world
    }

    fn send(&mut self, tag: u64, seq: u64, (begun, ended): (u64, u64)) {
        self.sender.send(Send {
            inbox: INBOX,
            id: id(tag),
            tag: Tag(tag),
            edge: Edge(0),
            begun: Moment(begun),
            ended: Some(Moment(ended)),
            outcome: Outcome::Acknowledged(Seq(seq)),
        });
    }

    fn read(&mut self, store: StoreId, (begun, ended): (u64, u64), shown: &[(u64, u64)]) {
        let read = self.reader.read(INBOX, Moment(begun));
        let shown = shown.iter().map(|(seq, tag)| (Seq(*seq), Tag(*tag)));
        self.reader.show(read, Moment(ended), Some(store), shown);
    }

    fn ack(&mut self, store: StoreId, through: u64, ended: u64) {
        let ack = self.reader.ack_through(INBOX, Some(store), Seq(through));
        self.reader.acks[ack].ended = Some(Moment(ended));
    }

    fn run(self) -> Run {
        let at = Moment(CHANGE);
        let change =
            StoreChange { continues: BEFORE, store: AFTER, kept: self.kept, from: at, until: at };
        let logs = vec![self.sender, self.reader];
        Run { logs, changes: vec![change], newest: BTreeMap::new() }
    }

    fn judged(self) -> Report {
        judge(&self.run())
    }
}

fn id(tag: u64) -> MessageId {
    MessageId::new(u128::from(tag).to_be_bytes())
}

#[test]
fn a_message_after_the_restored_state_is_lost_with_its_history() {
    let mut world = World::new();
    world.send(4, 3, (CHANGE + 1, CHANGE + 2));
    world.read(AFTER, (CHANGE + 3, CHANGE + 4), &[(1, 1), (2, 2), (3, 4)]);
    let run = world.run();
    let report = judge(&run);
    report.assert_clean();
    assert_eq!((report.acknowledged, report.delivered), (4, 3));
    assert_eq!((report.histories, report.rolled_back, report.lost_with_history), (2, 1, 1));
    assert!(report.to_string().contains("2 histories of the store: 1 acknowledged"), "{report}");

    // The control: without the store ids this is two messages with one seq, and a lost one.
    let without = judge_without_stores(&run).violations;
    let twice = Violation::SeqUsedTwice { inbox: INBOX, seq: Seq(3), ids: [id(3), id(4)] };
    let lost = Violation::Lost { inbox: INBOX, seq: Seq(3), id: id(3), edge: Edge(0) };
    assert_eq!(without, [twice, lost]);
}

#[test]
fn a_message_that_was_delivered_before_it_was_rolled_back_is_not_lost() {
    let mut world = World::new();
    world.read(BEFORE, (10, 11), &[(1, 1), (2, 2), (3, 3)]);
    world.read(AFTER, (CHANGE + 3, CHANGE + 4), &[(1, 1), (2, 2)]);
    let report = world.judged();
    report.assert_clean();
    assert_eq!((report.rolled_back, report.lost_with_history), (1, 0));
}

#[test]
fn a_message_of_the_restored_state_must_be_delivered() {
    let mut world = World::new();
    world.read(AFTER, (CHANGE + 3, CHANGE + 4), &[(1, 1)]);
    let lost = Violation::Lost { inbox: INBOX, seq: Seq(2), id: id(2), edge: Edge(0) };
    assert_eq!(world.judged().violations, [lost]);
}

#[test]
fn a_change_that_keeps_everything_loses_nothing() {
    let mut world = World::new();
    world.kept = Kept::Everything;
    world.read(AFTER, (CHANGE + 3, CHANGE + 4), &[(1, 1), (2, 2)]);
    let lost = Violation::Lost { inbox: INBOX, seq: Seq(3), id: id(3), edge: Edge(0) };
    assert_eq!(world.judged().violations, [lost]);
}

#[test]
fn a_message_accepted_after_the_change_is_delivered_in_the_new_history() {
    // The message is accepted and delivered before the change, lost by it, and accepted again.
    let mut world = World::new();
    world.read(BEFORE, (10, 11), &[(1, 1), (2, 2), (3, 3)]);
    world.send(3, 3, (CHANGE + 1, CHANGE + 2));
    let lost = Violation::Lost { inbox: INBOX, seq: Seq(3), id: id(3), edge: Edge(0) };
    assert_eq!(world.judged().violations, [lost]);
}

#[test]
fn a_message_may_have_another_seq_in_another_history() {
    let mut world = World::new();
    world.send(4, 3, (CHANGE + 1, CHANGE + 2));
    world.send(3, 4, (CHANGE + 3, CHANGE + 4));
    let shown = [(1, 1), (2, 2), (3, 4), (4, 3)];
    world.read(AFTER, (CHANGE + 5, CHANGE + 6), &shown);
    let run = world.run();
    judge(&run).assert_clean();
    let two = Violation::TwoSeqs { inbox: INBOX, id: id(3), seqs: [Seq(3), Seq(4)] };
    assert!(judge_without_stores(&run).violations.contains(&two), "the control");

    // A message of the restored state keeps its seq.
    let mut world = World::new();
    world.send(2, 3, (CHANGE + 1, CHANGE + 2));
    world.read(AFTER, (CHANGE + 5, CHANGE + 6), &[(1, 1), (2, 2), (3, 2)]);
    let two = Violation::TwoSeqs { inbox: INBOX, id: id(2), seqs: [Seq(2), Seq(3)] };
    assert_eq!(world.judged().violations, [two]);
}

#[test]
fn an_answer_during_the_change_counts_for_the_history_that_has_the_message() {
    let during = (CHANGE - 1, CHANGE + 1);
    // The answer is from before the change, because another message has the seq afterwards.
    let mut world = World::new();
    world.send(4, 4, during);
    for (tag, seq) in [(5, 3), (6, 4)] {
        world.send(tag, seq, (CHANGE + 1, CHANGE + 2));
    }
    world.read(AFTER, (CHANGE + 5, CHANGE + 6), &[(1, 1), (2, 2), (3, 5), (4, 6)]);
    let report = world.judged();
    report.assert_clean();
    assert_eq!((report.rolled_back, report.lost_with_history), (2, 2));

    // The answer is from after the change, because the message is delivered in the new history.
    let mut world = World::new();
    world.send(4, 3, during);
    world.read(AFTER, (CHANGE + 5, CHANGE + 6), &[(1, 1), (2, 2), (3, 4)]);
    let report = world.judged();
    report.assert_clean();
    assert_eq!((report.rolled_back, report.lost_with_history), (1, 1));

    // The message was accepted after the change and lost, because the new history has a later seq.
    let mut world = World::new();
    world.send(4, 3, during);
    world.send(5, 4, (CHANGE + 1, CHANGE + 2));
    world.reader = Log::of(Party(1));
    world.sender.sends.remove(2);
    world.read(AFTER, (CHANGE + 5, CHANGE + 6), &[(1, 1), (2, 2), (4, 5)]);
    let gap = Violation::Gap { inbox: INBOX, first: Seq(3), last: Seq(3) };
    assert_eq!(world.judged().violations, [gap]);
}

#[test]
fn a_message_whose_removal_was_lost_may_be_delivered_again() {
    let mut world = World::new();
    world.read(BEFORE, (10, 11), &[(1, 1), (2, 2), (3, 3)]);
    world.ack(BEFORE, 3, 20);
    world.read(AFTER, (CHANGE + 3, CHANGE + 4), &[(1, 1), (2, 2)]);
    let run = world.run();
    judge(&run).assert_clean();
    let without = judge_without_stores(&run).violations;
    assert!(
        matches!(without[..], [Violation::DeliveredAfterAck { .. }, _]),
        "the control: {without:?}"
    );

    // A removal cannot be lost if the ack was in the same history or the change kept everything.
    let mut world = World::new();
    world.read(AFTER, (CHANGE + 3, CHANGE + 4), &[(1, 1), (2, 2)]);
    world.ack(AFTER, 1, CHANGE + 5);
    world.read(AFTER, (CHANGE + 6, CHANGE + 7), &[(1, 1), (2, 2)]);
    assert!(is_delivered_after_ack(&world.judged(), 1));
    let mut world = World::new();
    world.kept = Kept::Everything;
    world.read(BEFORE, (10, 11), &[(1, 1), (2, 2), (3, 3)]);
    world.ack(BEFORE, 1, 20);
    world.read(AFTER, (CHANGE + 6, CHANGE + 7), &[(1, 1), (2, 2), (3, 3)]);
    assert!(is_delivered_after_ack(&world.judged(), 1));
}

fn is_delivered_after_ack(report: &Report, expected: u64) -> bool {
    matches!(
        report.violations[..],
        [Violation::DeliveredAfterAck { seq, .. }] if seq == Seq(expected)
    )
}

#[test]
fn an_ack_answered_after_the_change_may_have_removed_nothing() {
    let mut world = World::new();
    world.kept = Kept::Everything;
    world.read(BEFORE, (10, 11), &[(1, 1), (2, 2), (3, 3)]);
    world.ack(BEFORE, 3, CHANGE + 1);
    world.read(AFTER, (CHANGE + 6, CHANGE + 7), &[(1, 1), (2, 2), (3, 3)]);
    world.judged().assert_clean();
}

#[test]
#[should_panic(expected = "record the store id of each read")]
fn reads_without_store_id_are_refused_if_the_store_changed() {
    let mut world = World::new();
    let read = world.reader.read(INBOX, Moment(CHANGE + 1));
    world.reader.show(read, Moment(CHANGE + 2), None, [(Seq(1), Tag(1))]);
    world.judged();
}
