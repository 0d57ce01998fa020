//! Devices that are absent while their messages fill much of their inbox. The position of such a
//! device is moved to the newest message, a bounded number of messages in each transaction.
//!
//! The first step marks the device, whose reads are refused until its client has confirmed the new
//! position. Later sweeps move the device further, until it reaches the newest message or its
//! client reads.

use qpq_domain::{DeliveryLimits, IdentityKey, UnixMillis};
use sqlx::{PgConnection, Row as _, postgres::PgRow};

use super::{done::remove_spent, payloads::size};
use crate::postgres::row::{Columns as _, millis, millis_of, number};

/// The latest instant at which an absent device may have read. $1 now, $2 the time without a read
/// after which a device is absent.
macro_rules! away {
    () => {
        "(SELECT least($1, store_now()) - $2)"
    };
}

/// Locks the head of an inbox with a device to move. Inboxes whose heads are locked are left to the
/// next sweep. $3 and $4: the messages and bytes that may wait for an absent device. Only inboxes
/// with more messages or bytes are searched.
const FIND: &str = concat!(
    "SELECT d.id, i.id AS inbox, a.identity
       FROM device d JOIN inbox i ON i.id = d.account JOIN account a ON a.id = i.id
      WHERE d.last_seen_at <= ",
    away!(),
    "   AND CASE
            WHEN d.position_lost THEN d.upto < i.last_seq
            WHEN i.messages > $3 OR i.bytes > $4 THEN (
                SELECT count(*) > $3 OR coalesce(sum(",
    size!(),
    "), 0) > $4
                  FROM message m
                 WHERE m.inbox = i.id AND m.seq > d.upto AND m.expires_at > $1 AND NOT EXISTS (
                    SELECT 1 FROM device_done o
                     WHERE o.inbox = i.id AND o.seq = m.seq AND o.device = d.device OFFSET 0))
            ELSE false END
      ORDER BY d.last_seen_at, d.id LIMIT 1 FOR NO KEY UPDATE OF i SKIP LOCKED"
);

/// Moves the device over the next $5 messages. $3 the registration, $4 the inbox, whose head is
/// locked. Returns nothing for a device that was revoked or has read meanwhile.
const MOVE: &str = concat!(
    "WITH before AS MATERIALIZED (SELECT id, upto, position_lost FROM device WHERE id = $3),
    step AS MATERIALIZED (
        SELECT coalesce(
            (SELECT seq FROM message WHERE inbox = $4 AND seq > (SELECT upto FROM before)
              ORDER BY seq OFFSET $5 - 1 LIMIT 1),
            (SELECT last_seq FROM inbox WHERE id = $4)) AS upto),
    moved AS (
        UPDATE device d SET upto = s.upto, removals = d.removals + 1, position_lost = true
          FROM step s WHERE d.id = $3 AND d.last_seen_at <= ",
    away!(),
    "   RETURNING d.account, d.device, d.upto),
    passed AS (
        DELETE FROM device_done o USING moved v
         WHERE o.inbox = v.account AND o.seq <= v.upto AND o.device = v.device)
    SELECT b.upto AS after, v.upto, b.position_lost FROM moved v CROSS JOIN before b"
);

/// The parameters of a move.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Absence<'a> {
    pub(crate) limits: &'a DeliveryLimits,
    pub(crate) now: UnixMillis,
    /// Maximum messages that a device is moved over in one transaction.
    pub(crate) rows: i64,
}

/// The changes of one step of a move.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Moved {
    /// Rows removed or changed.
    pub(crate) rows: u64,
    /// The account of the device, if this step marked it.
    pub(crate) marked: Option<IdentityKey>,
}

/// Moves one absent device by one step, if there is one.
pub(crate) async fn move_absent(
    connection: &mut PgConnection,
    absence: Absence<'_>,
) -> sqlx::Result<Moved> {
    let Absence { limits, now, rows } = absence;
    let DeliveryLimits { device_absence, recent_ids, .. } = *limits;
    let found = sqlx::query(FIND)
        .bind(millis(now))
        .bind(millis_of(device_absence))
        .bind(number(limits.half_messages()))
        .bind(number(limits.half_bytes()))
        .fetch_optional(&mut *connection)
        .await?;
    let Some(found) = found else { return Ok(Moved::default()) };
    let inbox: i64 = found.try_get("inbox")?;
    let moved = sqlx::query(MOVE)
        .bind(millis(now))
        .bind(millis_of(device_absence))
        .bind(found.try_get::<i64, _>("id")?)
        .bind(inbox)
        .bind(rows)
        .fetch_optional(&mut *connection)
        .await?;
    let Some(moved) = moved else { return Ok(Moved::default()) };
    let passed = (moved.try_get("after")?, moved.try_get("upto")?);
    let removed = remove_spent(connection, inbox, passed, now, recent_ids).await?;
    Ok(Moved { rows: removed + 1, marked: marked(&found, &moved)? })
}

fn marked(found: &PgRow, moved: &PgRow) -> sqlx::Result<Option<IdentityKey>> {
    let is_new = !moved.try_get::<bool, _>("position_lost")?;
    is_new.then(|| found.identity("identity")).transpose()
}
