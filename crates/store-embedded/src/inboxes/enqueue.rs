//! Accepting messages: many in one statement, and only for one that is not accepted a few more, to
//! find out why.
//!
//! The way to SQLite's thread and back costs more than an insert, so the writer hands over the
//! messages of all calls that it found waiting, and they are inserted up to [`ROWS`] at a time.
//! Each row says how many messages to its inbox are ahead of it in the same statement. If one of
//! those is not accepted after all, a trigger leaves out the ones behind it, as their seqs would
//! not be the next; what was left out for whatever reason is then looked at by itself, in order.

use std::{collections::HashMap, slice, sync::LazyLock, time::Duration};

use qpq_domain::{Delivery, IdentityKey, Seq, UnixMillis};
use qpq_ports::{Enqueue, Enqueued, Receipt};
use sqlx::{Row as _, SqliteConnection, sqlite::SqliteRow};

use super::remove::{self, Due};
use crate::{
    clock::{Bounds, Guard},
    row::{Columns as _, millis, millis_of, number},
    upkeep::SWEEP,
};

/// Rows in one statement at most.
const ROWS: usize = 32;
/// Expired messages removed at a time where a transaction has removed many already.
const NEEDED: i64 = 16;

/// The statement for each number of rows, from none.
static INSERTS: LazyLock<Vec<String>> = LazyLock::new(|| (0..=ROWS).map(insert_sql).collect());

/// Looks the inboxes up, checks caps and recent ids, gives the next seqs and inserts, all in one
/// go; a trigger moves the heads. A row is left out when there is no such inbox, no room, its
/// message id is known, or it is not its turn.
fn insert_sql(rows: usize) -> String {
    let values = vec!["(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"; rows].join(", ");
    format!(
        "WITH new (id, recipient, ahead, bytes_ahead, expires_at, enqueued_at, known_at, size, channel, sender,
                   message_id, payload_sha256, payload) AS (VALUES {values})
         INSERT INTO message (id, inbox, seq, expires_at, enqueued_at, size, channel, sender, message_id,
                              payload_sha256, payload)
         SELECT n.id, i.id, i.last_seq + n.ahead + 1, n.expires_at, n.enqueued_at, n.size, n.channel, n.sender,
                n.message_id, n.payload_sha256, n.payload
           FROM new n CROSS JOIN account a ON a.identity = n.recipient CROSS JOIN inbox i ON i.id = a.id
          WHERE i.messages + n.ahead < ? AND i.bytes + n.bytes_ahead + n.size <= ?
            AND NOT EXISTS (SELECT 1 FROM recent_id r
                             WHERE r.inbox = i.id AND r.sender = n.sender AND r.message_id = n.message_id
                               AND r.forget_at > n.known_at)
             ON CONFLICT DO NOTHING
      RETURNING id, seq"
    )
}

/// Where to go on numbering rows. The numbers tell apart what comes back from an insert, and mean
/// nothing else.
const NEXT_ROW: &str = "SELECT coalesce(max(id), 0) + 1 FROM message";

/// Why nothing was inserted: no row, no such recipient; `seq`, the receipt of a message that is
/// still known, queued or gone; else the inbox is full, or an expired message is in the way.
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
pub(super) fn statements() -> impl Iterator<Item = &'static str> {
    [INSERTS[1].as_str(), INSERTS[ROWS].as_str(), NEXT_ROW, WHY].into_iter()
}

/// Accepts each message or says why not, in order.
pub(crate) async fn all(
    connection: &mut SqliteConnection,
    messages: &[&Enqueue],
    limits: &Delivery,
    clock: &Guard,
) -> sqlx::Result<Vec<Enqueued>> {
    let next_row = sqlx::query_scalar(NEXT_ROW).fetch_one(&mut *connection).await?;
    let mut inserting = Inserting { connection, limits, next_row, rows: SWEEP };
    let messages: Vec<_> = messages
        .iter()
        .map(|message| Timed { message, bounds: clock.bounds(message.now) })
        .collect();
    let mut outcomes = Vec::with_capacity(messages.len());
    for chunk in messages.chunks(ROWS) {
        let seqs = inserting.insert(chunk).await?;
        for (message, seq) in chunk.iter().zip(seqs) {
            outcomes.push(match seq {
                Some(seq) => message.accepted(seq),
                None => inserting.one(message).await?,
            });
        }
    }
    Ok(outcomes)
}

/// A message, and what the time is.
#[derive(Clone, Copy)]
struct Timed<'a> {
    message: &'a Enqueue,
    bounds: Bounds,
}

impl Timed<'_> {
    fn accepted(&self, seq: Seq) -> Enqueued {
        Enqueued::Accepted(Receipt {
            seq,
            channel: self.message.channel,
            payload_sha256: self.message.payload_sha256,
            enqueued_at: self.bounds.latest,
        })
    }
}

struct Inserting<'a> {
    connection: &'a mut SqliteConnection,
    limits: &'a Delivery,
    next_row: i64,
    /// Expired messages that may still be removed without need.
    rows: i64,
}

impl Inserting<'_> {
    /// The seq of each message that was accepted. Of those to one inbox, these are the first ones.
    async fn insert(&mut self, messages: &[Timed<'_>]) -> sqlx::Result<Vec<Option<Seq>>> {
        let first_row = self.next_row;
        let mut ahead: HashMap<IdentityKey, (i64, i64)> = HashMap::with_capacity(messages.len());
        let mut query = sqlx::query(INSERTS[messages.len()].as_str());
        for Timed { message, bounds } in messages {
            let Enqueue {
                sender,
                recipient,
                channel,
                payload,
                payload_sha256,
                message_id,
                now: _,
                ttl,
            } = message;
            let Bounds { earliest, latest } = *bounds;
            let size = number(payload.len() as u64);
            let (count, bytes) = ahead.entry(*recipient).or_default();
            query = query
                .bind(self.next_row)
                .bind(&recipient.as_bytes()[..])
                .bind(*count)
                .bind(*bytes)
                .bind(millis(latest.plus(*ttl)))
                .bind(millis(latest))
                .bind(millis(earliest))
                .bind(size)
                .bind(channel.as_bytes())
                .bind(&sender.as_bytes()[..])
                .bind(message_id.as_ref().map(|id| &id.as_bytes()[..]))
                .bind(&payload_sha256[..])
                .bind(&payload[..]);
            *count += 1;
            *bytes += size;
            self.next_row += 1;
        }
        let inserted = query
            .bind(number(self.limits.max_messages))
            .bind(number(self.limits.max_bytes))
            .fetch_all(&mut *self.connection)
            .await?;
        let mut seqs = vec![None; messages.len()];
        for row in inserted {
            let index = usize::try_from(row.try_get::<i64, _>("id")? - first_row)
                .expect("one of the above");
            seqs[index] = Some(row.seq("seq")?);
        }
        Ok(seqs)
    }

    /// A message that was left out: tried by itself, and if it is left out again, that has a
    /// reason.
    async fn one(&mut self, timed: &Timed<'_>) -> sqlx::Result<Enqueued> {
        let Timed { message, bounds } = *timed;
        if let [Some(seq)] = self.insert(slice::from_ref(timed)).await?[..] {
            return Ok(timed.accepted(seq));
        }
        let (recent_ids, now) = (self.limits.recent_ids, bounds.earliest);
        let Some(row) = why(self.connection, message, now, recent_ids).await? else {
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
            return self.after_removal(timed, row.try_get("inbox")?).await;
        }
        Ok(Enqueued::QueueFull)
    }

    /// A message in whose way expired ones are: they are removed until it fits, some more while that
    /// is not much for one transaction.
    async fn after_removal(&mut self, timed: &Timed<'_>, inbox: i64) -> sqlx::Result<Enqueued> {
        let Timed { message, bounds } = *timed;
        loop {
            let rows = self.rows.max(NEEDED);
            let due = Due { inbox, now: bounds.earliest, rows, message };
            let removed = remove::expired(self.connection, due, self.limits.recent_ids).await?;
            self.rows = (self.rows - removed).max(0);
            if let [Some(seq)] = self.insert(slice::from_ref(timed)).await?[..] {
                return Ok(timed.accepted(seq));
            }
            if removed == 0 {
                return Ok(Enqueued::QueueFull);
            }
        }
    }
}

async fn why(
    connection: &mut SqliteConnection,
    message: &Enqueue,
    now: UnixMillis,
    recent_ids: Duration,
) -> sqlx::Result<Option<SqliteRow>> {
    sqlx::query(WHY)
        .bind(&message.recipient.as_bytes()[..])
        .bind(&message.sender.as_bytes()[..])
        .bind(message.message_id.as_ref().map(|id| &id.as_bytes()[..]))
        .bind(millis(now))
        .bind(millis_of(recent_ids))
        .fetch_optional(connection)
        .await
}
