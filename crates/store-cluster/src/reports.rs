//! Reports in Postgres.

use async_trait::async_trait;
use qpq_domain::UnixMillis;
use qpq_ports::{AuditAction, NewReport, ReadReports, Report, Reporting, Reports, StoreResult};
use sqlx::{PgConnection, Row as _, postgres::PgRow};

use crate::{
    ClusterStore,
    audit::{Action, record},
    postgres::{
        Repeat, Scope, Statement,
        row::{Columns as _, millis, now_of},
    },
    store::Inner,
    time::Time,
};

/// Locks the account, so that concurrent reports of one account are counted one after another.
const LOCK: &str = "
    SELECT store_now() AS postgres FROM account WHERE id = $1 FOR NO KEY UPDATE";

/// Returns whether the account $1 has made the report with the digest $2, and the number of its
/// reports.
const STATE: &str = "
    SELECT EXISTS (SELECT 1 FROM report WHERE reporter = $1 AND digest = $2) AS is_repeat,
           (SELECT count(*) FROM report WHERE reporter = $1) AS reports";

const STORE: &str = "
    INSERT INTO report (reporter, digest, conversation_id, encrypted_report, reported_at)
    VALUES ($1, $2, $3, $4, $5)";

/// $1 maximum reports, $2 reports to skip, $3 bytes of a report in addition to its ciphertext, $4
/// maximum bytes. The first report is returned in any case.
const PAGE: &str = "
    WITH page AS MATERIALIZED (
        SELECT id, octet_length(encrypted_report) + $3 AS cost FROM report
         ORDER BY id DESC LIMIT $1 OFFSET $2),
    summed AS (SELECT id, sum(cost) OVER (ORDER BY id DESC) - cost AS before, cost FROM page)
    SELECT r.id, a.identity, r.conversation_id, r.encrypted_report, r.reported_at
      FROM summed s JOIN report r ON r.id = s.id JOIN account a ON a.id = r.reporter
     WHERE s.before = 0 OR s.before + s.cost <= $4
     ORDER BY r.id DESC";

const NOW: &str = "SELECT store_now() AS postgres";

/// Removes reports that were made before $1. $2 rows, $3 maximum age.
pub(crate) const SWEEP: &str = "
    DELETE FROM report WHERE id = ANY (ARRAY (
        SELECT id FROM report WHERE reported_at <= (SELECT least($1, store_now())) - $3::int8
         ORDER BY reported_at LIMIT $2 FOR UPDATE SKIP LOCKED))";

#[async_trait]
impl Reports for ClusterStore {
    async fn report(&self, report: NewReport) -> StoreResult<Reporting> {
        let Inner { database, time, limits, .. } = &*self.inner;
        let max = limits.reports.max_per_account;
        Ok(database.run(&StoreReport { report: &report, max, time }).await?)
    }

    async fn read(&self, read: ReadReports) -> StoreResult<Vec<Report>> {
        let Inner { database, time, .. } = &*self.inner;
        Ok(database.run(&Read { read, time }).await?)
    }
}

struct StoreReport<'a> {
    report: &'a NewReport,
    max: u32,
    time: &'a Time,
}

impl Statement for StoreReport<'_> {
    type Output = Reporting;

    /// A repeat finds the report of the first attempt.
    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Transaction;

    fn name(&self) -> &'static str {
        "report"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Reporting> {
        let NewReport { reporter, conversation, encrypted_report, now } = self.report;
        let locked = sqlx::query(LOCK).bind(reporter.0).fetch_one(&mut *connection).await?;
        let reported_at: UnixMillis = self.time.bounds(*now, now_of(&locked)?).latest;
        let digest = self.report.digest();
        let query = sqlx::query(STATE).bind(reporter.0).bind(&digest[..]);
        let row = query.fetch_one(&mut *connection).await?;
        if row.try_get("is_repeat")? {
            return Ok(Reporting::Repeated);
        }
        if row.unsigned("reports")? >= self.max.into() {
            return Ok(Reporting::Full);
        }
        sqlx::query(STORE)
            .bind(reporter.0)
            .bind(&digest[..])
            .bind(&conversation[..])
            .bind(&encrypted_report[..])
            .bind(millis(reported_at))
            .execute(connection)
            .await?;
        Ok(Reporting::Stored)
    }
}

/// Reads a page of reports, and records that.
struct Read<'a> {
    read: ReadReports,
    time: &'a Time,
}

impl Statement for Read<'_> {
    type Output = Vec<Report>;

    /// A repeat adds another entry to the audit trail.
    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Transaction;

    fn name(&self) -> &'static str {
        "read_reports"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Vec<Report>> {
        let ReadReports { reader, offset, limit, bytes, now } = self.read;
        let rows = sqlx::query(PAGE)
            .bind(i64::from(limit))
            .bind(i64::from(offset))
            .bind(i64::from(Report::FRAMING))
            .bind(i64::from(bytes))
            .fetch_all(&mut *connection)
            .await?;
        let postgres = now_of(&sqlx::query(NOW).fetch_one(&mut *connection).await?)?;
        let action = Action {
            at: self.time.bounds(now, postgres).agreed,
            actor: Some(reader).into(),
            action: AuditAction::ReadReports,
            subject: None,
            group: None,
            reason: "",
        };
        record(connection, action).await?;
        rows.iter().map(report).collect()
    }
}

fn report(row: &PgRow) -> sqlx::Result<Report> {
    Ok(Report {
        id: row.unsigned("id")?,
        reporter: row.identity("identity")?,
        conversation: row.bytes("conversation_id")?.into(),
        encrypted_report: row.bytes("encrypted_report")?.into(),
        reported_at: row.at("reported_at")?,
    })
}
