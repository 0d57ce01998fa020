//! The audit trail in Postgres. The statements of actions add its entries.

use async_trait::async_trait;
use qpq_domain::{GroupId, IdentityKey, UnixMillis};
use qpq_ports::{Audit, AuditAction, AuditActor, AuditEntry, AuditPage, StoreResult};
use sqlx::{PgConnection, Row as _, postgres::PgRow};

use crate::{
    ClusterStore,
    error::NeverWritten,
    postgres::{
        Repeat, Scope, Statement,
        row::{Columns as _, millis, number},
    },
};

const RECORD: &str = "
    INSERT INTO audit (at, actor, action, subject, group_id, reason)
    VALUES ($1, $2, $3, $4, $5, $6)";

const PAGE: &str = "
    SELECT id, at, actor, action, subject, group_id, reason FROM audit
     WHERE id < $1 ORDER BY id DESC LIMIT $2";

#[async_trait]
impl Audit for ClusterStore {
    async fn list(&self, page: AuditPage) -> StoreResult<Vec<AuditEntry>> {
        Ok(self.inner.database.run(&ReadPage(page)).await?)
    }
}

/// An action to be recorded.
pub(crate) struct Action<'a> {
    pub(crate) at: UnixMillis,
    pub(crate) actor: AuditActor,
    pub(crate) action: AuditAction,
    pub(crate) subject: Option<&'a IdentityKey>,
    pub(crate) group: Option<&'a GroupId>,
    pub(crate) reason: &'a str,
}

/// Adds an entry to the audit trail.
pub(crate) async fn record(connection: &mut PgConnection, action: Action<'_>) -> sqlx::Result<()> {
    sqlx::query(RECORD)
        .bind(millis(action.at))
        .bind(action.actor.identity().map(|key| &key.as_bytes()[..]))
        .bind(action.action.name())
        .bind(action.subject.map(|key| &key.as_bytes()[..]))
        .bind(action.group.map(|group| &group.as_bytes()[..]))
        .bind(action.reason)
        .execute(connection)
        .await
        .map(drop)
}

struct ReadPage(AuditPage);

impl Statement for ReadPage {
    type Output = Vec<AuditEntry>;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "audit"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Vec<AuditEntry>> {
        let rows = sqlx::query(PAGE)
            .bind(self.0.before.map_or(i64::MAX, number))
            .bind(i64::from(self.0.limit))
            .fetch_all(connection)
            .await?;
        rows.iter().map(entry).collect()
    }
}

fn entry(row: &PgRow) -> sqlx::Result<AuditEntry> {
    let action = AuditAction::parse(row.try_get("action")?).ok_or(NeverWritten("action"))?;
    let group = row.try_get::<Option<&[u8]>, _>("group_id")?.map(GroupId::try_from);
    Ok(AuditEntry {
        id: row.unsigned("id")?,
        at: row.at("at")?,
        actor: identity(row, "actor")?.into(),
        action,
        subject: identity(row, "subject")?,
        group: group.transpose().map_err(|_| NeverWritten("group_id"))?,
        reason: row.try_get("reason")?,
    })
}

fn identity(row: &PgRow, column: &'static str) -> sqlx::Result<Option<IdentityKey>> {
    let bytes = row.try_get::<Option<&[u8]>, _>(column)?;
    Ok(bytes.map(IdentityKey::try_from).transpose().map_err(|_| NeverWritten(column))?)
}
