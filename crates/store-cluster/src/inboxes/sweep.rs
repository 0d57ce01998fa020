//! The removal of expired messages of all inboxes.

use std::time::Duration;

use qpq_domain::UnixMillis;
use sqlx::PgConnection;

use super::{payloads::counted_down, remove::removal};
use crate::postgres::row::{millis, millis_of};

/// Maximum rows removed in one transaction.
pub(crate) const SWEEP: i64 = 256;

/// Removes the oldest expired messages of all inboxes. Inboxes whose heads are locked are left to
/// the next sweep. `next_expiry` changes only if the inbox becomes empty: an instant that is too
/// early is harmless. $1 now, $2 the time for which ids are remembered, $3 rows.
const SWEPT: &str = removal! {
    with: "present AS MATERIALIZED (SELECT least($1, store_now()) AS now),
        due AS MATERIALIZED (
            SELECT inbox, seq FROM message
             WHERE expires_at <= (SELECT now FROM present) ORDER BY expires_at LIMIT $3),
        head AS MATERIALIZED (
            SELECT id, devices FROM inbox WHERE id IN (SELECT inbox FROM due)
             ORDER BY id FOR NO KEY UPDATE SKIP LOCKED)",
    delete: "USING due d JOIN head h ON h.id = d.inbox
              WHERE m.inbox = d.inbox AND m.seq = d.seq",
    forget_at: "expires_at + $2",
    remember: "AND expires_at + $2 > (SELECT now FROM present)",
    head: "next_expiry = CASE i.messages - g.n WHEN 0 THEN 9223372036854775807
                         ELSE i.next_expiry END",
    also: concat!(
        counted_down!(),
        ", undone AS (
            DELETE FROM device_done o USING removed g JOIN head h ON h.id = g.inbox
             WHERE h.devices > 0 AND o.inbox = g.inbox AND o.seq = g.seq)"
    ),
    select: "SELECT count(*) FROM removed",
};

const FORGET: &str = "
    DELETE FROM recent_id WHERE ctid = ANY (ARRAY (
        SELECT ctid FROM recent_id WHERE forget_at <= (SELECT least($1, store_now()))
         ORDER BY forget_at LIMIT $2 FOR UPDATE SKIP LOCKED))";

/// Removes at most `rows` expired messages; returns their number.
pub(crate) async fn sweep(
    connection: &mut PgConnection,
    now: UnixMillis,
    rows: i64,
    recent_ids: Duration,
) -> sqlx::Result<u64> {
    let removed: i64 = sqlx::query_scalar(SWEPT)
        .bind(millis(now))
        .bind(millis_of(recent_ids))
        .bind(rows)
        .fetch_one(connection)
        .await?;
    Ok(u64::try_from(removed).unwrap_or_default())
}

/// Forgets at most `rows` message ids that are due; returns their number.
pub(crate) async fn forget(
    connection: &mut PgConnection,
    now: UnixMillis,
    rows: i64,
) -> sqlx::Result<u64> {
    let done = sqlx::query(FORGET).bind(millis(now)).bind(rows).execute(connection).await?;
    Ok(done.rows_affected())
}
