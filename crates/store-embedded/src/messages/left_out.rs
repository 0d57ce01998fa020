//! The reasons why an insert left out messages, looked up for several messages in one statement.

use std::{sync::LazyLock, time::Duration};

use qpq_ports::Receipt;
use sqlx::{Row as _, SqliteConnection, sqlite::SqliteRow};

use super::enqueue::{MAX_ROWS, Timed};
use crate::row::{Columns as _, millis, millis_of};

/// The statements, indexed by the number of messages.
static STATEMENTS: LazyLock<Vec<String>> = LazyLock::new(|| (0..=MAX_ROWS).map(sql).collect());

/// The inbox of a message that was left out, and the reason: the message is known, the sender is
/// blocked, the inbox has no room, or an expired message has the same id.
#[derive(Clone, Copy, Debug)]
pub(super) struct LeftOut {
    pub(super) inbox: i64,
    /// The messages and bytes of the inbox, including expired ones.
    pub(super) head: (u64, u64),
    /// `true` if the inbox may have expired messages.
    pub(super) stale: bool,
    /// `true` if the owner of the inbox blocks the sender.
    pub(super) blocked: bool,
    /// The receipt of the message with the same id, queued or removed.
    pub(super) known: Option<Receipt>,
}

/// Returns the statement. A message whose recipient does not exist has no row in the result.
fn sql(rows: usize) -> String {
    let values = vec!["(?, ?, ?, ?, ?)"; rows].join(", ");
    format!(
        "WITH new (n, recipient, sender, message_id, known_at) AS (VALUES {values})
         SELECT n.n, i.id AS inbox, i.messages, i.bytes, i.next_expiry <= n.known_at AS stale,
                i.blocks > 0 AND EXISTS (SELECT 1 FROM block b WHERE b.account = i.id
                                            AND b.blocked = n.sender) AS blocked,
                coalesce(m.seq, r.seq) AS seq, coalesce(m.channel, r.channel) AS channel,
                coalesce(m.payload_sha256, r.payload_sha256) AS payload_sha256,
                coalesce(m.enqueued_at, r.enqueued_at) AS enqueued_at
           FROM new n CROSS JOIN account a ON a.identity = n.recipient
                CROSS JOIN inbox i ON i.id = a.id
                LEFT JOIN message m ON m.inbox = i.id AND m.sender = n.sender
                                   AND m.message_id = n.message_id
                                   AND m.expires_at > n.known_at - ?
                LEFT JOIN recent_id r ON r.inbox = i.id AND r.sender = n.sender
                                     AND r.message_id = n.message_id
                                     AND r.forget_at > n.known_at"
    )
}

#[cfg(test)]
pub(super) fn statements() -> impl Iterator<Item = &'static str> {
    [STATEMENTS[1].as_str(), STATEMENTS[MAX_ROWS].as_str()].into_iter()
}

/// Returns the reason why each message was left out, for at most [`MAX_ROWS`] messages; `None` if
/// its recipient does not exist.
pub(super) async fn reasons(
    connection: &mut SqliteConnection,
    messages: &[&Timed<'_>],
    recent_ids: Duration,
) -> sqlx::Result<Vec<Option<LeftOut>>> {
    let mut reasons = vec![None; messages.len()];
    if messages.is_empty() {
        return Ok(reasons);
    }
    let mut query = sqlx::query(STATEMENTS[messages.len()].as_str());
    for (n, Timed { message, bounds }) in (0_i64..).zip(messages) {
        query = query
            .bind(n)
            .bind(&message.recipient.as_bytes()[..])
            .bind(&message.sender.as_bytes()[..])
            .bind(message.message_id.as_ref().map(|id| &id.as_bytes()[..]))
            .bind(millis(bounds.earliest));
    }
    for row in query.bind(millis_of(recent_ids)).fetch_all(connection).await? {
        let n = usize::try_from(row.try_get::<i64, _>("n")?).expect("one of the messages");
        reasons[n] = Some(left_out(&row)?);
    }
    Ok(reasons)
}

fn left_out(row: &SqliteRow) -> sqlx::Result<LeftOut> {
    let known = match row.try_get::<Option<i64>, _>("seq")? {
        None => None,
        Some(_) => Some(Receipt {
            seq: row.seq("seq")?,
            channel: row.channel("channel")?,
            payload_sha256: row.hash("payload_sha256")?,
            enqueued_at: row.at("enqueued_at")?,
        }),
    };
    Ok(LeftOut {
        inbox: row.try_get("inbox")?,
        head: (row.unsigned("messages")?, row.unsigned("bytes")?),
        stale: row.try_get("stale")?,
        blocked: row.try_get("blocked")?,
        known,
    })
}
