//! Accepting messages: one statement for each that is accepted, and only for one that is not a second, to find out why.

use std::time::Duration;

use qpq_domain::Delivery;
use qpq_ports::{Enqueue, Enqueued, Receipt};
use sqlx::{Row as _, SqliteConnection, sqlite::SqliteRow};

use super::remove;
use crate::row::{Columns as _, millis, millis_of, number};

/// Looks the inbox up, checks caps and recent ids, gives the next seq and inserts, all in one go; the trigger moves the
/// head. Returns nothing when there is no such inbox, no room, or the message id is known.
const INSERT: &str = "
    INSERT INTO message (id, inbox, seq, expires_at, enqueued_at, size, channel, sender, message_id,
                         payload_sha256, payload)
    SELECT i.id << 38 | i.last_seq + 1, i.id, i.last_seq + 1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9
      FROM account a CROSS JOIN inbox i ON i.id = a.id
     WHERE a.identity = ?1 AND i.messages < ?10 AND i.bytes + ?4 <= ?11 AND i.last_seq < (1 << 38) - 1
       AND NOT EXISTS (SELECT 1 FROM recent_id r
                        WHERE r.inbox = i.id AND r.sender = ?6 AND r.message_id = ?7 AND r.forget_at > ?3)
        ON CONFLICT DO NOTHING
 RETURNING seq";

/// Why nothing was inserted: no row, no such recipient; `seq`, the receipt of a message that is still known, queued or
/// gone; else the inbox is full, or an expired message is in the way.
const WHY: &str = "
    SELECT i.id AS inbox, i.next_expiry <= ?4 AS stale,
           coalesce(m.seq, r.seq) AS seq, coalesce(m.channel, r.channel) AS channel,
           coalesce(m.payload_sha256, r.payload_sha256) AS payload_sha256,
           coalesce(m.enqueued_at, r.enqueued_at) AS enqueued_at
      FROM account a CROSS JOIN inbox i ON i.id = a.id
      LEFT JOIN message m ON m.inbox = i.id AND m.sender = ?2 AND m.message_id = ?3 AND m.expires_at > ?4 - ?5
      LEFT JOIN recent_id r ON r.inbox = i.id AND r.sender = ?2 AND r.message_id = ?3 AND r.forget_at > ?4
     WHERE a.identity = ?1";

#[cfg(test)]
pub(super) const STATEMENTS: [&str; 2] = [INSERT, WHY];

/// Accepts each message or says why not, in order.
pub(super) async fn all(
    connection: &mut SqliteConnection,
    messages: Vec<Enqueue>,
    limits: &Delivery,
) -> sqlx::Result<Vec<Enqueued>> {
    let mut outcomes = Vec::with_capacity(messages.len());
    for message in messages {
        outcomes.push(one(connection, &message, limits).await?);
    }
    Ok(outcomes)
}

async fn one(
    connection: &mut SqliteConnection,
    message: &Enqueue,
    limits: &Delivery,
) -> sqlx::Result<Enqueued> {
    if let Some(accepted) = insert(connection, message, limits).await? {
        return Ok(accepted);
    }
    let Some(row) = why(connection, message, limits.recent_ids).await? else {
        return Ok(Enqueued::NoSuchRecipient);
    };
    if row.try_get::<Option<i64>, _>("seq")?.is_some() {
        return Ok(Enqueued::Duplicate(Receipt {
            seq: row.seq("seq")?,
            channel: row.channel("channel")?,
            payload_sha256: row.hash("payload_sha256")?,
            enqueued_at: row.at("enqueued_at")?,
        }));
    }
    if row.try_get("stale")? {
        remove::expired(connection, row.try_get("inbox")?, message.now, limits.recent_ids).await?;
        if let Some(accepted) = insert(connection, message, limits).await? {
            return Ok(accepted);
        }
    }
    Ok(Enqueued::QueueFull)
}

async fn insert(
    connection: &mut SqliteConnection,
    message: &Enqueue,
    limits: &Delivery,
) -> sqlx::Result<Option<Enqueued>> {
    let Enqueue { sender, recipient, channel, payload, payload_sha256, message_id, now, ttl } = message;
    let inserted = sqlx::query(INSERT)
        .bind(&recipient.as_bytes()[..])
        .bind(millis(now.plus(*ttl)))
        .bind(millis(*now))
        .bind(number(payload.len() as u64))
        .bind(channel.as_bytes())
        .bind(&sender.as_bytes()[..])
        .bind(message_id.as_ref().map(|id| &id.as_bytes()[..]))
        .bind(&payload_sha256[..])
        .bind(&payload[..])
        .bind(number(limits.max_messages))
        .bind(number(limits.max_bytes))
        .fetch_optional(connection)
        .await?;
    let receipt = |row: SqliteRow| {
        Ok(Enqueued::Accepted(Receipt {
            seq: row.seq("seq")?,
            channel: *channel,
            payload_sha256: *payload_sha256,
            enqueued_at: *now,
        }))
    };
    inserted.map(receipt).transpose()
}

async fn why(
    connection: &mut SqliteConnection,
    message: &Enqueue,
    recent_ids: Duration,
) -> sqlx::Result<Option<SqliteRow>> {
    sqlx::query(WHY)
        .bind(&message.recipient.as_bytes()[..])
        .bind(&message.sender.as_bytes()[..])
        .bind(message.message_id.as_ref().map(|id| &id.as_bytes()[..]))
        .bind(millis(message.now))
        .bind(millis_of(recent_ids))
        .fetch_optional(connection)
        .await
}
