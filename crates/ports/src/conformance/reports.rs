//! Rules of [`crate::Reports`].

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use qpq_domain::{ReportLimits, UnixMillis};
use tokio::task::JoinSet;

use super::{
    Factory,
    bench::{Bench, MINUTE, NOW, RegisteredAccount},
    maintenance::sweep_all,
};
use crate::{AuditAction, AuditActor, AuditPage, NewReport, ReadReports, Report, Reporting};

fn report(reporter: RegisteredAccount, text: &str, now: UnixMillis) -> NewReport {
    NewReport {
        reporter: reporter.account,
        conversation: Bytes::from_static(b"conversation"),
        encrypted_report: Bytes::copy_from_slice(text.as_bytes()),
        now,
    }
}

/// A read of all reports.
fn read(reader: RegisteredAccount) -> ReadReports {
    ReadReports { reader: reader.identity, offset: 0, limit: 10_000, bytes: u32::MAX, now: NOW }
}

fn texts(reports: &[Report]) -> Vec<&str> {
    reports
        .iter()
        .map(|report| std::str::from_utf8(&report.encrypted_report).expect("text"))
        .collect()
}

impl Bench {
    async fn report(&self, report: NewReport) -> Reporting {
        self.stores.reports.report(report).await.expect("report")
    }

    async fn reports(&self, read: ReadReports) -> Vec<Report> {
        self.stores.reports.read(read).await.expect("read")
    }
}

pub async fn reports_are_read_newest_first_and_page_by_page(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    let (root, bob, carol) =
        (bench.account(1).await, bench.account(2).await, bench.account(3).await);
    assert_eq!(bench.reports(read(root)).await, []);
    for (minute, (from, text)) in
        (0..).zip([(bob, "one"), (carol, "two"), (bob, "three"), (bob, "four")])
    {
        let made = report(from, text, NOW.plus(minute * MINUTE));
        assert_eq!(bench.report(made).await, Reporting::Stored);
    }
    bench.crash().await;
    let all = bench.reports(read(root)).await;
    assert_eq!(texts(&all), ["four", "three", "two", "one"]);
    assert!(all.is_sorted_by(|newer, older| newer.id > older.id));
    assert_eq!((all[2].reporter, all[3].reporter), (carol.identity, bob.identity));
    assert_eq!(all[2].reported_at, NOW.plus(MINUTE));
    assert_eq!(&all[2].conversation[..], b"conversation");
    for (offset, limit, expected) in
        [(0, 2, &["four", "three"][..]), (2, 2, &["two", "one"]), (3, 2, &["one"]), (4, 2, &[])]
    {
        let page = bench.reports(ReadReports { offset, limit, ..read(root) }).await;
        assert_eq!(texts(&page), expected);
    }
}

pub async fn a_page_of_reports_ends_at_its_bytes(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let bob = bench.account(1).await;
    for text in ["1".repeat(100), "2".repeat(200), "3".repeat(300)] {
        bench.report(report(bob, &text, NOW)).await;
    }
    let cost = |text: u32| text + Report::FRAMING;
    for (bytes, expected) in [
        (0, 1),
        (cost(300), 1),
        (cost(300) + cost(200) - 1, 1),
        (cost(300) + cost(200), 2),
        (cost(300) + cost(200) + cost(100), 3),
    ] {
        let page = bench.reports(ReadReports { bytes, ..read(bob) }).await;
        assert_eq!(page.len(), expected, "{bytes}");
        assert_eq!(page[0].cost(), cost(300) as usize);
    }
}

pub async fn a_repeated_report_is_stored_once(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let (bob, carol) = (bench.account(1).await, bench.account(2).await);
    let first = report(bob, "spam", NOW);
    assert_eq!(bench.report(first.clone()).await, Reporting::Stored);
    let later = NewReport { now: NOW.plus(MINUTE), ..first.clone() };
    assert_eq!(bench.report(later).await, Reporting::Repeated);
    assert_eq!(bench.report(report(carol, "spam", NOW)).await, Reporting::Stored);
    // The same bytes, divided otherwise.
    let divided = NewReport {
        conversation: Bytes::from_static(b"conversations"),
        encrypted_report: Bytes::from_static(b"pam"),
        ..first.clone()
    };
    assert_eq!(bench.report(divided).await, Reporting::Stored);
    assert_eq!(bench.reports(read(bob)).await.len(), 3);
    for _ in 0..5 {
        let mut tasks = JoinSet::new();
        for _ in 0..6 {
            let (reports, again) = (Arc::clone(&bench.stores.reports), first.clone());
            tasks.spawn(async move { reports.report(again).await.expect("report") });
        }
        assert!(tasks.join_all().await.iter().all(|outcome| *outcome == Reporting::Repeated));
    }
}

pub async fn an_account_has_no_more_than_the_maximum_of_reports(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let (bob, carol) = (bench.account(1).await, bench.account(2).await);
    let max = ReportLimits::default().max_per_account as usize;
    let (mut stored, mut number) = (0, 0);
    while stored < max {
        let mut tasks = JoinSet::new();
        for _ in 0..64 {
            let made = report(bob, &number.to_string(), NOW);
            number += 1;
            let reports = Arc::clone(&bench.stores.reports);
            tasks.spawn(async move { reports.report(made).await.expect("report") });
        }
        let outcomes = tasks.join_all().await;
        stored += outcomes.iter().filter(|outcome| **outcome == Reporting::Stored).count();
    }
    assert_eq!(stored, max);
    assert_eq!(bench.report(report(bob, "one more", NOW)).await, Reporting::Full);
    assert_eq!(bench.report(report(carol, "one", NOW)).await, Reporting::Stored);
    assert_eq!(bench.reports(read(bob)).await.len(), max + 1);
}

pub async fn old_reports_are_swept(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let bob = bench.account(1).await;
    let age = ReportLimits::default().max_age;
    bench.report(report(bob, "old", NOW)).await;
    bench.report(report(bob, "new", NOW.plus(MINUTE))).await;
    assert_eq!(sweep_all(&bench, NOW.plus(age).minus(Duration::from_millis(1))).await, 0);
    assert_eq!(sweep_all(&bench, NOW.plus(age)).await, 1);
    assert_eq!(texts(&bench.reports(read(bob)).await), ["new"]);
    // The same report may be made again.
    assert_eq!(bench.report(report(bob, "old", NOW.plus(age))).await, Reporting::Stored);
}

pub async fn each_read_of_reports_is_in_the_audit_trail(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let root = bench.account(1).await;
    for minute in 0..2 {
        let at = NOW.plus(minute * MINUTE);
        bench.reports(ReadReports { now: at, ..read(root) }).await;
    }
    let page = AuditPage { before: None, limit: 10 };
    let entries = bench.stores.audit.list(page).await.expect("audit");
    let times: Vec<_> = entries.iter().map(|entry| entry.at).collect();
    assert_eq!(times, [NOW.plus(MINUTE), NOW]);
    for entry in entries {
        assert_eq!(entry.action, AuditAction::ReadReports);
        assert_eq!(entry.actor, AuditActor::Account(root.identity));
        assert_eq!((entry.subject, entry.group), (None, None));
    }
}
