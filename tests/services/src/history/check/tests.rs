//! Tests of the checker: histories of a correct inbox have no violations, and each inserted
//! violation is reported, without others.

mod changes;
mod model;

use std::collections::BTreeMap;

use model::{AFTER_ALL, START, acts, logs_of, store_id};
use proptest::{prelude::*, sample::Index};

use super::*;
use crate::history::{AckRange, History, Send};

/// The party of inserted records.
const STRANGER: Party = Party(99);

/// An acknowledged message.
#[derive(Debug, Clone, Copy)]
struct Acked {
    inbox: Inbox,
    id: MessageId,
    tag: Tag,
    edge: Edge,
    seq: Seq,
}

fn acked(logs: &[Log]) -> Vec<Acked> {
    let mut acked = BTreeMap::new();
    for send in logs.iter().flat_map(|log| &log.sends) {
        if let Outcome::Acknowledged(seq) = send.outcome {
            let Send { inbox, id, tag, edge, .. } = *send;
            acked.insert((inbox, id), Acked { inbox, id, tag, edge, seq });
        }
    }
    acked.into_values().collect()
}

/// Returns the highest seq of an inbox in the logs.
fn highest(logs: &[Log], inbox: Inbox) -> Seq {
    let shown = logs.iter().flat_map(|log| {
        log.reads
            .iter()
            .filter(|r| r.inbox == inbox)
            .flat_map(|r| &log.shown[r.shown.clone()])
            .map(|(s, _)| *s)
    });
    let acked = acked(logs).into_iter().filter(|a| a.inbox == inbox).map(|a| a.seq);
    shown.chain(acked).max().unwrap_or(Seq::ZERO)
}

/// Rewrites the messages of every read of an inbox.
fn rewrite(logs: &mut [Log], inbox: Inbox, change: impl Fn(Vec<(Seq, Tag)>) -> Vec<(Seq, Tag)>) {
    for log in logs {
        let mut shown = Vec::new();
        for read in &mut log.reads {
            let mut own = log.shown[read.shown.clone()].to_vec();
            if read.inbox == inbox {
                own = change(own);
            }
            let from = shown.len();
            shown.append(&mut own);
            read.shown = from..shown.len();
        }
        log.shown = shown;
    }
}

/// Changes the seqs of an inbox in all logs.
fn renumber(logs: &mut [Log], inbox: Inbox, number: impl Fn(Seq) -> Seq) {
    rewrite(logs, inbox, |shown| shown.into_iter().map(|(seq, tag)| (number(seq), tag)).collect());
    for log in logs {
        for send in log.sends.iter_mut().filter(|send| send.inbox == inbox) {
            if let Outcome::Acknowledged(seq) = &mut send.outcome {
                *seq = number(*seq);
            }
        }
        for ack in log.acks.iter_mut().filter(|ack| ack.inbox == inbox) {
            match &mut ack.what {
                AckRange::Named(range) => {
                    log.named[range.clone()].iter_mut().for_each(|s| *s = number(*s))
                }
                AckRange::Through(seq) => *seq = number(*seq),
            }
        }
    }
}

/// Returns a log of the party STRANGER with one read.
fn one_read(inbox: Inbox, at: u64, shown: &[(Seq, Tag)]) -> Log {
    let mut log = Log::of(STRANGER);
    let read = log.read(inbox, Moment(at));
    log.show(read, Moment(at), Some(store_id(0)), shown.iter().copied());
    log
}

fn stranger_sends(inbox: Inbox, id: MessageId, tag: Tag, outcome: Outcome) -> Log {
    let mut log = Log::of(STRANGER);
    let (begun, ended) = (Moment(START), Some(Moment(START)));
    log.send(Send { inbox, id, tag, edge: Edge(1), begun, ended, outcome });
    log
}

fn violations(logs: &[Log]) -> Vec<Violation> {
    check(logs, &[]).violations
}

proptest! {
    #[test]
    fn histories_of_a_correct_inbox_have_no_violations(acts in acts()) {
        let logs = logs_of(&acts);
        let report = check(&logs, &[]);
        prop_assert_eq!(&report.violations, &[], "{}", report);
        prop_assert_eq!(report.acknowledged, acked(&logs).len());
        prop_assert_eq!(report.deliveries, logs.iter().map(|log| log.shown.len()).sum::<usize>());
    }

    #[test]
    fn a_lost_message_is_reported(acts in acts(), pick: Index) {
        let mut logs = logs_of(&acts);
        let acked = acked(&logs);
        prop_assume!(!acked.is_empty());
        let Acked { inbox, id, tag, edge, seq } = *pick.get(&acked);
        rewrite(&mut logs, inbox, |shown| shown.into_iter().filter(|(_, t)| *t != tag).collect());
        prop_assert_eq!(violations(&logs), [Violation::Lost { inbox, seq, id, edge }]);
    }

    #[test]
    fn a_message_delivered_after_its_ack_is_reported(acts in acts(), pick: Index) {
        let mut logs = logs_of(&acts);
        let stores = Stores::new(Some(store_id(0)), &[]);
        let known = Acks::of(&logs, &stores);
        let branch = stores.branch(stores.get(Some(store_id(0))).expect("the only one"));
        let acked: Vec<_> =
            acked(&logs)
                .into_iter()
                .filter_map(|a| Some((a, known.ended(branch, a.inbox, a.seq)?)))
                .collect();
        prop_assume!(!acked.is_empty());
        let (Acked { inbox, tag, seq, .. }, ended) = *pick.get(&acked);
        // A read that begins at the time of the answer is allowed.
        logs.push(one_read(inbox, ended.0, &[(seq, tag)]));
        prop_assert_eq!(violations(&logs), []);
        logs.push(one_read(inbox, ended.0 + 1, &[(seq, tag)]));
        let read_begun = Moment(ended.0 + 1);
        let reader = STRANGER;
        let expected =
            Violation::DeliveredAfterAck { inbox, seq, reader, acked: ended, read_begun };
        prop_assert_eq!(violations(&logs), [expected]);
    }

    #[test]
    fn a_skipped_seq_is_reported(acts in acts(), pick: Index, skipped in 1..4_u64) {
        let mut logs = logs_of(&acts);
        let acked = acked(&logs);
        prop_assume!(!acked.is_empty());
        let Acked { inbox, seq, .. } = *pick.get(&acked);
        renumber(&mut logs, inbox, |s| if s >= seq { Seq(s.0 + skipped) } else { s });
        let last = Seq(seq.0 + skipped - 1);
        prop_assert_eq!(violations(&logs), [Violation::Gap { inbox, first: seq, last }]);
    }

    #[test]
    fn a_seq_used_for_two_messages_is_reported(acts in acts(), pick: Index) {
        let mut logs = logs_of(&acts);
        let later: Vec<_> = acked(&logs).into_iter().filter(|a| a.seq > Seq(1)).collect();
        prop_assume!(!later.is_empty());
        let Acked { inbox, id, seq, .. } = *pick.get(&later);
        renumber(&mut logs, inbox, |s| if s >= seq { Seq(s.0 - 1) } else { s });
        let twice = Seq(seq.0 - 1);
        let named = violations(&logs).into_iter().any(|v| {
            matches!(v, Violation::SeqUsedTwice { inbox: i, seq: s, ids }
                if (i, s) == (inbox, twice) && ids.contains(&id))
        });
        prop_assert!(named);
    }

    #[test]
    fn a_message_with_two_seqs_is_reported(acts in acts(), pick: Index) {
        let mut logs = logs_of(&acts);
        let acked = acked(&logs);
        prop_assume!(!acked.is_empty());
        let Acked { inbox, id, tag, seq, .. } = *pick.get(&acked);
        let second = highest(&logs, inbox).next();
        logs.push(stranger_sends(inbox, id, tag, Outcome::Acknowledged(second)));
        prop_assert_eq!(violations(&logs), [Violation::TwoSeqs { inbox, id, seqs: [seq, second] }]);
    }

    #[test]
    fn a_second_copy_is_reported(acts in acts(), pick: Index) {
        let mut logs = logs_of(&acts);
        let acked = acked(&logs);
        prop_assume!(!acked.is_empty());
        let Acked { inbox, id, tag, seq, .. } = *pick.get(&acked);
        let second = highest(&logs, inbox).next();
        logs.push(one_read(inbox, AFTER_ALL, &[(second, tag)]));
        prop_assert_eq!(violations(&logs), [Violation::TwoSeqs { inbox, id, seqs: [seq, second] }]);
    }

    #[test]
    fn two_swapped_messages_are_reported(acts in acts(), pick: Index) {
        let mut logs = logs_of(&acts);
        let reads: Vec<_> = logs
            .iter()
            .enumerate()
            .flat_map(|(log, l)| {
                let several = l.reads.iter().filter(|r| r.shown.len() > 1);
                several.map(move |r| (log, r.inbox, r.shown.start))
            })
            .collect();
        prop_assume!(!reads.is_empty());
        let (log, inbox, first) = *pick.get(&reads);
        logs[log].shown.swap(first, first + 1);
        let (before, after) = (logs[log].shown[first].0, logs[log].shown[first + 1].0);
        let reader = logs[log].party;
        let expected = Violation::OutOfOrder { inbox, reader, before, after };
        prop_assert_eq!(violations(&logs), [expected]);
    }

    #[test]
    fn delivery_of_a_message_that_was_not_sent_is_reported(acts in acts(), pick: Index) {
        let logs = logs_of(&acts);
        let inbox = Inbox(0);
        let seq = highest(&logs, inbox).next();
        let (id, tag) = (MessageId::new([0xff; 16]), Tag(u64::MAX));
        let read = one_read(inbox, AFTER_ALL, &[(seq, tag)]);

        let mut with = logs.clone();
        with.push(read.clone());
        prop_assert_eq!(violations(&with), [Violation::NotSent { inbox, seq, tag }]);
        with.push(stranger_sends(inbox, id, tag, Outcome::Refused));
        prop_assert_eq!(violations(&with), [Violation::DeliveredThoughRefused { inbox, seq, id }]);
        // One attempt that may have taken effect is enough.
        with.push(stranger_sends(inbox, id, tag, Outcome::Unknown));
        prop_assert_eq!(violations(&with), []);

        let acked = acked(&logs);
        prop_assume!(!acked.is_empty());
        let Acked { inbox, id, tag, seq, .. } = *pick.get(&acked);
        let mut with = logs;
        with.push(one_read(inbox, 1, &[(seq, tag)]));
        prop_assert_eq!(violations(&with), [Violation::DeliveredBeforeSent { inbox, seq, id }]);
    }
}

#[test]
fn seq_zero_is_reported() {
    let (inbox, id, tag) = (Inbox(1), MessageId::new([1; 16]), Tag(1));
    let sent = stranger_sends(inbox, id, tag, Outcome::Acknowledged(Seq::ZERO));
    let logs = [sent, one_read(inbox, AFTER_ALL, &[(Seq::ZERO, tag)])];
    assert_eq!(violations(&logs), [Violation::SeqZero { inbox }]);
}

/// Checks one reader of three messages. Each call has a start, an end and the delivered seqs.
fn order_of(calls: &[(u64, u64, &[u64])]) -> Vec<Violation> {
    let inbox = Inbox(0);
    let mut sender = Log::of(Party(0));
    for i in 1..=3 {
        let id = MessageId::new(u128::from(i).to_be_bytes());
        let outcome = Outcome::Acknowledged(Seq(i));
        let (begun, ended, edge) = (Moment(0), Some(Moment(0)), Edge(0));
        sender.send(Send { inbox, id, tag: Tag(i), edge, begun, ended, outcome });
    }
    let mut reader = Log::of(Party(1));
    for &(begun, ended, seqs) in calls {
        let read = reader.read(inbox, Moment(begun));
        let shown = seqs.iter().map(|&seq| (Seq(seq), Tag(seq)));
        reader.show(read, Moment(ended), Some(store_id(0)), shown);
    }
    violations(&[sender, reader])
}

#[test]
fn order_is_checked_over_consecutive_calls() {
    let late =
        Violation::OutOfOrder { inbox: Inbox(0), reader: Party(1), before: Seq(3), after: Seq(2) };
    assert_eq!(order_of(&[(1, 2, &[1, 3]), (3, 4, &[2])]), [late]);
    assert_eq!(
        order_of(&[(1, 2, &[1, 2, 3]), (3, 4, &[2, 3])]),
        [],
        "a delivered message may be delivered again"
    );
    let twice =
        Violation::OutOfOrder { inbox: Inbox(0), reader: Party(1), before: Seq(1), after: Seq(1) };
    assert_eq!(order_of(&[(1, 2, &[1, 1, 2, 3])]), [twice], "but not in one answer");
    assert_eq!(
        order_of(&[(1, 4, &[1, 3]), (3, 6, &[2])]),
        [],
        "of concurrent reads, either may have been first"
    );
}

#[test]
fn the_earliest_answered_ack_of_a_message_counts() {
    let inbox = Inbox(0);
    let mut log = Log::of(Party(0));
    for i in 1..=6 {
        let id = MessageId::new(u128::from(i).to_be_bytes());
        let outcome = Outcome::Acknowledged(Seq(i));
        let (begun, ended, edge) = (Moment(0), Some(Moment(0)), Edge(0));
        log.send(Send { inbox, id, tag: Tag(i), edge, begun, ended, outcome });
    }
    let read = log.read(inbox, Moment(1));
    log.show(read, Moment(1), Some(store_id(0)), (1..=6).map(|i| (Seq(i), Tag(i))));
    for (through, ended) in [(2, Some(30)), (3, Some(10)), (5, Some(20)), (6, None)] {
        let ack = log.ack_through(inbox, Some(store_id(0)), Seq(through));
        log.acks[ack].ended = ended.map(Moment);
    }
    for (named, ended) in [(4, 12), (4, 8), (5, 25)] {
        let ack = log.ack(inbox, Some(store_id(0)), [Seq(named)]);
        log.acks[ack].ended = Some(Moment(ended));
    }
    for (seq, last_allowed) in [(1, 10), (2, 10), (3, 10), (4, 8), (5, 20), (6, AFTER_ALL)] {
        let at =
            |moment| violations(&[log.clone(), one_read(inbox, moment, &[(Seq(seq), Tag(seq))])]);
        assert_eq!(at(last_allowed), [], "{seq}");
        let too_late = at(last_allowed + 1);
        assert_eq!(too_late.len(), usize::from(seq != 6), "{seq}: {too_late:?}");
    }
}

#[tokio::test]
async fn recorders_keep_the_calls_of_an_aborted_task() {
    let history = History::new();
    let (inbox, id) = (Inbox(0), MessageId::new([7; 16]));
    let mut recorder = history.recorder();
    let (began, has_begun) = tokio::sync::oneshot::channel();
    let task = tokio::spawn(async move {
        let sending = recorder.sending(inbox, id, Tag(7), Edge(1));
        began.send(()).unwrap();
        std::future::pending::<()>().await;
        recorder.refused(sending);
    });
    has_begun.await.unwrap();
    task.abort();
    assert!(task.await.unwrap_err().is_cancelled());

    let mut reader = history.recorder();
    let reading = reader.reading(inbox);
    reader.delivered(reading, [(Seq(1), Tag(7))]);
    let acking = reader.acking(inbox, [Seq(1)]);
    reader.acked(acking);
    let reading = reader.reading(inbox);
    reader.delivered(reading, []);
    drop(reader);
    let report = history.check();
    report.assert_clean();
    assert_eq!(
        (report.messages, report.unknown, report.acknowledged, report.delivered),
        (1, 1, 0, 1)
    );

    // A later time, so that the next read begins after the answer with any clock resolution.
    let mut reader = history.recorder();
    let mut reading = reader.reading(inbox);
    while reader.log.reads[reading.0].begun <= history.0.logs.lock()[1].acks[0].ended.unwrap() {
        reading = reader.reading(inbox);
    }
    reader.delivered(reading, [(Seq(1), Tag(7))]);
    drop(reader);
    let violations = history.check().violations;
    assert!(
        matches!(violations[..], [Violation::DeliveredAfterAck { seq: Seq(1), .. }]),
        "{violations:?}"
    );
}

#[test]
#[should_panic(expected = "recorders are still in use")]
fn a_history_with_active_recorders_is_not_checked() {
    let history = History::new();
    let _recorder = history.recorder();
    history.check();
}

#[test]
#[should_panic(expected = "is used for two messages")]
fn a_tag_used_for_two_messages_is_refused() {
    let history = History::new();
    let mut recorder = history.recorder();
    for id in [1, 2] {
        let _unknown = recorder.sending(Inbox(0), MessageId::new([id; 16]), Tag(1), Edge(0));
    }
    drop(recorder);
    history.check();
}

#[test]
fn a_million_messages_are_checked() {
    const EACH: u64 = 10_000;
    let history = History::new();
    for inbox in 0..100 {
        let (mut sender, mut reader) = (history.recorder(), history.recorder());
        for seq in 1..=EACH {
            let tag = Tag(u64::from(inbox) * EACH + seq);
            let id = MessageId::new(u128::from(tag.0).to_be_bytes());
            let sending = sender.sending(Inbox(inbox), id, tag, Edge(0));
            sender.acknowledged(sending, Seq(seq));
            if seq % 100 == 0 {
                let reading = reader.reading(Inbox(inbox));
                // One message of all inboxes is never delivered.
                let shown = (seq - 99..=seq).filter(|s| (inbox, *s) != (42, 4_242));
                let tag = |s| Tag(u64::from(inbox) * EACH + s);
                reader.delivered(reading, shown.map(|s| (Seq(s), tag(s))));
                let acking = reader.acking_through(Inbox(inbox), Seq(seq));
                reader.acked(acking);
            }
        }
    }
    let report = history.check();
    assert_eq!((report.acknowledged, report.delivered), (1_000_000, 999_999));
    let lost = Violation::Lost {
        inbox: Inbox(42),
        seq: Seq(4_242),
        id: MessageId::new(u128::from(42 * EACH + 4_242).to_be_bytes()),
        edge: Edge(0),
    };
    assert_eq!(report.violations, [lost]);
}
