//! Reports in SQLite.

use std::time::Duration;

use async_trait::async_trait;
use qpq_domain::UnixMillis;
use qpq_ports::{AuditAction, NewReport, ReadReports, Report, Reporting, Reports, StoreResult};
use sqlx::{Row as _, SqliteConnection, sqlite::SqliteRow};

use crate::{
    audit::{Action, record},
    messages::remove::SWEEP_ROWS,
    row::{Columns as _, millis},
    statement::{Done, SMALL, Statement},
    store::EmbeddedStore,
};

/// Selects whether the account ?1 has made the report with the digest ?2, and the number of its
/// reports.
const STATE: &str = "
    SELECT EXISTS (SELECT 1 FROM report WHERE reporter = ?1 AND digest = ?2) AS is_repeat,
           (SELECT count(*) FROM report WHERE reporter = ?1) AS reports";

const STORE: &str = "
    INSERT INTO report (reporter, digest, conversation_id, reported_at, encrypted_report)
    VALUES (?1, ?2, ?3, ?4, ?5)";

/// ?1 maximum reports, ?2 reports to skip, ?3 bytes of a report in addition to its ciphertext, ?4
/// maximum bytes. The first report is returned in any case.
const PAGE: &str = "
    WITH page AS (
        SELECT id, length(encrypted_report) + ?3 AS cost FROM report
         ORDER BY id DESC LIMIT +?1 OFFSET +?2),
    summed AS (SELECT id, sum(cost) OVER (ORDER BY id DESC) - cost AS before, cost FROM page)
    SELECT r.id, a.identity, r.conversation_id, r.encrypted_report, r.reported_at
      FROM summed s JOIN report r ON r.id = s.id JOIN account a ON a.id = r.reporter
     WHERE s.before = 0 OR s.before + s.cost <= ?4
     ORDER BY r.id DESC";

const SWEEP: &str = "
    DELETE FROM report WHERE id IN (
        SELECT id FROM report WHERE reported_at <= ?1 ORDER BY reported_at LIMIT +?2)";

#[cfg(test)]
pub(crate) const STATEMENTS: [&str; 3] = [STATE, STORE, SWEEP];

#[async_trait]
impl Reports for EmbeddedStore {
    async fn report(&self, report: NewReport) -> StoreResult<Reporting> {
        let reported_at = self.memory.clock.bounds(report.now).latest;
        let max = self.limits.reports.max_per_account;
        self.writer.run(StoreReport { report, reported_at, max }).await
    }

    async fn read(&self, read: ReadReports) -> StoreResult<Vec<Report>> {
        let at = self.memory.clock.bounds(read.now).latest;
        self.writer.run(Read { read, at }).await
    }
}

struct StoreReport {
    report: NewReport,
    reported_at: UnixMillis,
    max: u32,
}

impl Statement for StoreReport {
    type Answer = Reporting;
    const NAME: &'static str = "report";

    fn bytes(&self) -> usize {
        SMALL + self.report.conversation.len() + self.report.encrypted_report.len()
    }

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<Reporting>> {
        let NewReport { reporter, conversation, encrypted_report, .. } = &self.report;
        let digest = self.report.digest();
        let query = sqlx::query(STATE).bind(reporter.0).bind(&digest[..]);
        let row = query.fetch_one(&mut *tx).await?;
        if row.try_get("is_repeat")? {
            return Ok(Done::keep(Reporting::Repeated));
        }
        if row.unsigned("reports")? >= self.max.into() {
            return Ok(Done::keep(Reporting::Full));
        }
        sqlx::query(STORE)
            .bind(reporter.0)
            .bind(&digest[..])
            .bind(&conversation[..])
            .bind(millis(self.reported_at))
            .bind(&encrypted_report[..])
            .execute(tx)
            .await?;
        Ok(Done::keep(Reporting::Stored))
    }
}

/// Reads a page of reports, and records that.
struct Read {
    read: ReadReports,
    at: UnixMillis,
}

impl Statement for Read {
    type Answer = Vec<Report>;
    const NAME: &'static str = "read reports";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<Vec<Report>>> {
        let ReadReports { reader, offset, limit, bytes, .. } = self.read;
        let rows = sqlx::query(PAGE)
            .bind(i64::from(limit))
            .bind(i64::from(offset))
            .bind(i64::from(Report::FRAMING))
            .bind(i64::from(bytes))
            .fetch_all(&mut *tx)
            .await?;
        let reports = rows.iter().map(report).collect::<sqlx::Result<_>>()?;
        let action = Action {
            at: self.at,
            actor: Some(reader).into(),
            action: AuditAction::ReadReports,
            subject: None,
            group: None,
            reason: "",
        };
        record(tx, action).await?;
        Ok(Done::keep(reports))
    }
}

fn report(row: &SqliteRow) -> sqlx::Result<Report> {
    Ok(Report {
        id: row.unsigned("id")?,
        reporter: row.identity("identity")?,
        conversation: row.bytes("conversation_id")?.into(),
        encrypted_report: row.bytes("encrypted_report")?.into(),
        reported_at: row.at("reported_at")?,
    })
}

/// Removes up to [`SWEEP_ROWS`] reports that are older than `max_age`. Returns their number.
pub(crate) struct SweepReports {
    pub(crate) now: UnixMillis,
    pub(crate) max_age: Duration,
}

impl Statement for SweepReports {
    type Answer = u64;
    const NAME: &'static str = "sweep reports";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<u64>> {
        let query = sqlx::query(SWEEP).bind(millis(self.now.minus(self.max_age))).bind(SWEEP_ROWS);
        Ok(Done::keep(query.execute(tx).await?.rows_affected()))
    }
}
