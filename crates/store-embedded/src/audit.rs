//! The audit trail in SQLite. The statements of actions add its entries.

use async_trait::async_trait;
use qpq_domain::{GroupId, IdentityKey, UnixMillis};
use qpq_ports::{Audit, AuditAction, AuditActor, AuditEntry, AuditPage, StoreResult};
use sqlx::{Row as _, SqliteConnection, sqlite::SqliteRow};

use crate::{
    error::{NeverWritten, read_failed},
    row::{Columns as _, millis, number},
    store::EmbeddedStore,
};

const RECORD: &str = "
    INSERT INTO audit (at, actor, action, subject, group_id, reason)
    VALUES (?1, ?2, ?3, ?4, ?5, ?6)";

const PAGE: &str = "
    SELECT id, at, actor, action, subject, group_id, reason FROM audit
     WHERE id < ?1 ORDER BY id DESC LIMIT +?2";

#[cfg(test)]
pub(crate) const STATEMENTS: [&str; 2] = [RECORD, PAGE];

#[async_trait]
impl Audit for EmbeddedStore {
    async fn list(&self, page: AuditPage) -> StoreResult<Vec<AuditEntry>> {
        let rows = sqlx::query(PAGE)
            .bind(page.before.map_or(i64::MAX, number))
            .bind(i64::from(page.limit))
            .fetch_all(&self.readers)
            .await;
        rows.and_then(|rows| rows.iter().map(entry).collect()).map_err(read_failed)
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
pub(crate) async fn record(tx: &mut SqliteConnection, action: Action<'_>) -> sqlx::Result<()> {
    sqlx::query(RECORD)
        .bind(millis(action.at))
        .bind(action.actor.identity().map(|key| key.as_bytes().to_vec()))
        .bind(action.action.name())
        .bind(action.subject.map(|key| key.as_bytes().to_vec()))
        .bind(action.group.map(|group| group.as_bytes().to_vec()))
        .bind(action.reason.to_owned())
        .execute(tx)
        .await
        .map(drop)
}

fn entry(row: &SqliteRow) -> sqlx::Result<AuditEntry> {
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

fn identity(row: &SqliteRow, column: &'static str) -> sqlx::Result<Option<IdentityKey>> {
    let bytes = row.try_get::<Option<&[u8]>, _>(column)?;
    Ok(bytes.map(IdentityKey::try_from).transpose().map_err(|_| NeverWritten(column))?)
}
