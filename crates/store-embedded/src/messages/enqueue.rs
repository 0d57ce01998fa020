//! The acceptance of messages: many in one statement, and a few more statements for a message that
//! the first one does not accept, to find out why.
//!
//! The first statement accepts nothing into an inbox that is more than half full. Those messages
//! are handled one by one, because their senders are limited to a share of the inbox.
//!
//! A round trip to SQLite's thread costs more than an insert. So the writer passes the messages of
//! all calls that wait, and they are inserted up to [`MAX_ROWS`] at a time. Each row contains how
//! many messages to its inbox are before it in the same statement. If one of those is not accepted,
//! a trigger leaves out the ones after it, because their seqs would not be the next. Each message
//! that was left out for any reason is then handled by itself, in order.

use std::{collections::HashMap, slice, sync::LazyLock, time::Duration};

use qpq_domain::{DeliveryLimits, IdentityKey, Seq, UnixMillis};
use qpq_ports::{Enqueued, NewMessage, Reader, Receipt, View};
use sqlx::{Row as _, SqliteConnection, sqlite::SqliteRow};

use super::remove::{self, Removal, SWEEP_ROWS, Selection};
use crate::{
    clock::{Bounds, ClockGuard},
    effects::Effects,
    row::{Columns as _, millis, millis_of, number},
    statement::Done,
};

/// Maximum rows in one statement.
const MAX_ROWS: usize = 32;

/// Expired messages removed for one message, in a transaction that has removed many already.
const MIN_REMOVAL: i64 = 16;

/// The bytes that a statement of their own must save for messages with one payload. If it saves
/// less, they are inserted with others.
const MIN_BYTES_SHARED: usize = 16 << 10;

/// The statement for each number of rows, from zero.
static INSERTS: LazyLock<Vec<String>> =
    LazyLock::new(|| (0..=MAX_ROWS).map(|rows| insert_sql(rows, Payloads::Own)).collect());

/// The same, for rows that all have one payload. It is bound once, as the first parameter.
static INSERTS_SHARED: LazyLock<Vec<String>> =
    LazyLock::new(|| (0..=MAX_ROWS).map(|rows| insert_sql(rows, Payloads::Shared)).collect());

/// Whether each row of a statement has a payload of its own.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Payloads {
    Own,
    Shared,
}

/// How far an inbox is filled.
#[derive(Clone, Copy)]
enum Fill {
    /// Until it is half full, if senders are limited to a share above that.
    Half,
    /// Until it is full.
    Full,
}

/// Returns the statement that finds the inboxes, checks caps and recent ids, assigns the next seqs
/// and inserts. A trigger updates the heads.
///
/// A row is left out if the inbox does not exist or has no room, if the message id is known, or if
/// the seq would not be the next.
fn insert_sql(rows: usize, payloads: Payloads) -> String {
    // The number of a bare parameter is one more than the largest before it.
    let (payload, first) = match payloads {
        Payloads::Own => ("?", "?"),
        Payloads::Shared => ("?1", "?2"),
    };
    let values: Vec<_> = (0..rows)
        .map(|row| {
            let id = if row == 0 { first } else { "?" };
            format!("({id}, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, {payload})")
        })
        .collect();
    let values = values.join(", ");
    format!(
        "WITH new (id, recipient, ahead, bytes_ahead, expires_at, enqueued_at, known_at, size,
                   channel, sender, message_id, payload_sha256, payload) AS (VALUES {values})
         INSERT INTO message (id, inbox, seq, expires_at, enqueued_at, size, channel, sender,
                              message_id, payload_sha256, payload)
         SELECT n.id, i.id, i.last_seq + n.ahead + 1, n.expires_at, n.enqueued_at, n.size,
                n.channel, n.sender, n.message_id, n.payload_sha256, n.payload
           FROM new n CROSS JOIN account a ON a.identity = n.recipient
                CROSS JOIN inbox i ON i.id = a.id
          WHERE i.messages + n.ahead < ? AND i.bytes + n.bytes_ahead <= ?
            AND i.bytes + n.bytes_ahead + n.size <= ?
            AND NOT EXISTS (SELECT 1 FROM recent_id r
                             WHERE r.inbox = i.id AND r.sender = n.sender
                               AND r.message_id = n.message_id AND r.forget_at > n.known_at)
             ON CONFLICT DO NOTHING
      RETURNING id, seq"
    )
}

/// Returns the first free row number. The numbers identify the rows that an insert returns, and
/// have no other meaning.
const NEXT_ROW: &str = "SELECT coalesce(max(id), 0) + 1 FROM message";

/// Returns why nothing was inserted. No row: the recipient does not exist. A row with a `seq`: the
/// receipt of a known message, queued or removed. A row without: the inbox is full, or an expired
/// message has the id.
const WHY: &str = "
    SELECT i.id AS inbox, i.messages, i.bytes, i.next_expiry <= ?4 AS stale,
           coalesce(m.seq, r.seq) AS seq, coalesce(m.channel, r.channel) AS channel,
           coalesce(m.payload_sha256, r.payload_sha256) AS payload_sha256,
           coalesce(m.enqueued_at, r.enqueued_at) AS enqueued_at
      FROM account a CROSS JOIN inbox i ON i.id = a.id
      LEFT JOIN message m ON m.inbox = i.id AND m.sender = ?2 AND m.message_id = ?3
                         AND m.expires_at > ?4 - ?5
      LEFT JOIN recent_id r ON r.inbox = i.id AND r.sender = ?2 AND r.message_id = ?3
                           AND r.forget_at > ?4
     WHERE a.identity = ?1";

/// Counts the messages of a sender in an inbox, up to a limit: ?1 inbox, ?2 sender, ?3 limit for
/// each index, ?4 now. Each index has the messages that the other one lacks.
const OF_SENDER: &str = "
    SELECT count(*) AS messages, coalesce(sum(size), 0) AS bytes
      FROM (SELECT size FROM (SELECT size FROM message
                               WHERE inbox = ?1 AND sender = ?2 AND message_id IS NOT NULL
                                 AND +expires_at > ?4 LIMIT ?3)
            UNION ALL
            SELECT size FROM (SELECT size FROM message
                               WHERE inbox = ?1 AND sender = ?2 AND message_id IS NULL
                                 AND +expires_at > ?4 LIMIT ?3))";

/// Counts the messages of an inbox that have not expired: ?1 inbox, ?2 now.
const ALIVE: &str = "
    SELECT count(*) AS messages, coalesce(sum(size), 0) AS bytes
      FROM message WHERE inbox = ?1 AND +expires_at > ?2";

#[cfg(test)]
pub(super) fn statements() -> impl Iterator<Item = &'static str> {
    let shared = INSERTS_SHARED[MAX_ROWS].as_str();
    [INSERTS[1].as_str(), INSERTS[MAX_ROWS].as_str(), shared, NEXT_ROW, WHY, OF_SENDER, ALIVE]
        .into_iter()
}

/// Accepts messages. Answers their outcomes in order, and wakes the readers of those accepted.
pub(crate) async fn all(
    connection: &mut SqliteConnection,
    messages: &[&NewMessage],
    limits: &DeliveryLimits,
    clock: &ClockGuard,
) -> sqlx::Result<Done<Vec<Enqueued>>> {
    let next_row = sqlx::query_scalar(NEXT_ROW).fetch_one(&mut *connection).await?;
    let mut inserting = Inserting { connection, limits, next_row, removable: SWEEP_ROWS };
    let messages: Vec<_> = messages
        .iter()
        .map(|message| Timed { message, bounds: clock.bounds(message.now) })
        .collect();
    let mut outcomes = Vec::with_capacity(messages.len());
    let mut wakes = Vec::with_capacity(messages.len());
    let mut rest = &messages[..];
    while !rest.is_empty() {
        let (rows, payloads) = next_statement(rest);
        let (chunk, after) = rest.split_at(rows);
        rest = after;
        let seqs = inserting.insert(chunk, payloads, Fill::Half).await?;
        for (timed, seq) in chunk.iter().zip(seqs) {
            let outcome = match seq {
                Some(seq) => timed.accepted(seq),
                None => inserting.one(timed).await?,
            };
            if matches!(outcome, Enqueued::Accepted(_)) {
                let NewMessage { recipient, channel, .. } = timed.message;
                wakes.push((Reader::single(*recipient), View::Channel(*channel)));
            }
            outcomes.push(outcome);
        }
    }
    Ok(Done::with(outcomes, Effects { wakes, ..Effects::default() }))
}

/// A message, and the bounds of the present for it.
#[derive(Clone, Copy)]
struct Timed<'a> {
    message: &'a NewMessage,
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

/// Returns how many of the messages the next statement inserts, and whether they share a payload.
fn next_statement(messages: &[Timed<'_>]) -> (usize, Payloads) {
    let messages = &messages[..messages.len().min(MAX_ROWS)];
    let shares = |pair: &[Timed<'_>]| {
        let [one, next] = [&pair[0].message.payload, &pair[1].message.payload];
        (one.as_ptr(), one.len()) == (next.as_ptr(), next.len())
    };
    let saved = |pairs: usize| pairs * messages[0].message.payload.len();
    let sharing = messages.windows(2).take_while(|pair| shares(pair)).count();
    if saved(sharing) >= MIN_BYTES_SHARED {
        return (sharing + 1, Payloads::Shared);
    }
    // Two messages that share a large payload begin a statement of their own.
    let is_large =
        |pair: &[Timed<'_>]| shares(pair) && pair[0].message.payload.len() >= MIN_BYTES_SHARED;
    let own = messages.windows(2).position(is_large).unwrap_or(messages.len());
    (own.max(1), Payloads::Own)
}

struct Inserting<'a> {
    connection: &'a mut SqliteConnection,
    limits: &'a DeliveryLimits,
    next_row: i64,
    /// Expired messages that this transaction may still remove beyond the necessary ones.
    removable: i64,
}

impl Inserting<'_> {
    /// Inserts messages and returns the seqs of those accepted. Of the messages to one inbox, these
    /// are the first ones.
    async fn insert(
        &mut self,
        messages: &[Timed<'_>],
        payloads: Payloads,
        fill: Fill,
    ) -> sqlx::Result<Vec<Option<Seq>>> {
        let first_row = self.next_row;
        let mut before: HashMap<IdentityKey, (i64, i64)> = HashMap::with_capacity(messages.len());
        let mut query = match payloads {
            Payloads::Own => sqlx::query(INSERTS[messages.len()].as_str()),
            Payloads::Shared => sqlx::query(INSERTS_SHARED[messages.len()].as_str())
                .bind(&messages[0].message.payload[..]),
        };
        for Timed { message, bounds } in messages {
            let NewMessage {
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
            let (count, bytes) = before.entry(*recipient).or_default();
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
                .bind(&payload_sha256[..]);
            if payloads == Payloads::Own {
                query = query.bind(&payload[..]);
            }
            *count += 1;
            *bytes += size;
            self.next_row += 1;
        }
        let (below, up_to) = self.room(fill);
        let inserted = query
            .bind(number(below))
            .bind(number(up_to))
            .bind(number(self.limits.max_bytes))
            .fetch_all(&mut *self.connection)
            .await?;
        let mut seqs = vec![None; messages.len()];
        for row in inserted {
            let index = usize::try_from(row.try_get::<i64, _>("id")? - first_row)
                .expect("one of the inserted rows");
            seqs[index] = Some(row.seq("seq")?);
        }
        Ok(seqs)
    }

    /// Returns the messages below which an inbox accepts one more, and the bytes up to which.
    fn room(&self, fill: Fill) -> (u64, u64) {
        let limits = self.limits;
        match fill {
            Fill::Half if limits.sender_share > 1 => {
                (limits.half_messages() + 1, limits.half_bytes())
            }
            Fill::Half | Fill::Full => (limits.max_messages, limits.max_bytes),
        }
    }

    /// Handles a message that was left out: inserts it by itself, or finds the reason.
    async fn one(&mut self, timed: &Timed<'_>) -> sqlx::Result<Enqueued> {
        let Timed { message, bounds } = *timed;
        if let Some(seq) = self.try_one(timed, Fill::Half).await? {
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
        let inbox = row.try_get("inbox")?;
        let mut head = (row.unsigned("messages")?, row.unsigned("bytes")?);
        let stale = row.try_get("stale")?;
        if stale {
            match self.after_removal(timed, inbox).await? {
                Removed::Accepted(seq) => return Ok(timed.accepted(seq)),
                Removed::Head(messages, bytes) => head = (messages, bytes),
            }
        }
        if !self.limits.has_room(head.0, head.1, message.payload.len() as u64) {
            return Ok(Enqueued::QueueFull);
        }
        if !self.may_share(timed, inbox, stale).await? {
            return Ok(Enqueued::SenderShare);
        }
        let seq = self.try_one(timed, Fill::Full).await?;
        // There is no other writer, so the insert succeeds.
        Ok(timed.accepted(seq.ok_or(sqlx::Error::RowNotFound)?))
    }

    /// Returns whether the sender may add this message to an inbox that is more than half full.
    /// `stale` says that it has expired messages.
    async fn may_share(
        &mut self,
        timed: &Timed<'_>,
        inbox: i64,
        stale: bool,
    ) -> sqlx::Result<bool> {
        let (limits, message, now) = (self.limits, timed.message, timed.bounds.earliest);
        let size = message.payload.len() as u64;
        let of_sender = sqlx::query(OF_SENDER)
            .bind(inbox)
            .bind(&message.sender.as_bytes()[..])
            .bind(number(limits.sender_messages()))
            .bind(millis(now))
            .fetch_one(&mut *self.connection)
            .await?;
        let (messages, bytes) = (of_sender.unsigned("messages")?, of_sender.unsigned("bytes")?);
        if messages < limits.sender_messages() && bytes + size <= limits.sender_bytes() {
            return Ok(true);
        }
        if !stale {
            return Ok(false);
        }
        let alive = sqlx::query(ALIVE)
            .bind(inbox)
            .bind(millis(now))
            .fetch_one(&mut *self.connection)
            .await?;
        Ok(!limits.limits_senders(alive.unsigned("messages")?, alive.unsigned("bytes")?))
    }

    async fn try_one(&mut self, timed: &Timed<'_>, fill: Fill) -> sqlx::Result<Option<Seq>> {
        Ok(self.insert(slice::from_ref(timed), Payloads::Own, fill).await?[0])
    }

    /// Removes expired messages until the message fits, and some more while the transaction has
    /// removed few.
    async fn after_removal(&mut self, timed: &Timed<'_>, inbox: i64) -> sqlx::Result<Removed> {
        let Timed { message, bounds } = *timed;
        loop {
            let rows = self.removable.max(MIN_REMOVAL);
            let expired = Removal {
                selection: Selection::Expired { inbox, rows, conflict: message },
                at: bounds.earliest,
                recent_ids: self.limits.recent_ids,
            };
            let removed = number(expired.run(self.connection).await?);
            if removed < rows {
                remove::find_next_expiry(self.connection, inbox).await?;
            }
            self.removable = (self.removable - removed).max(0);
            if let Some(seq) = self.try_one(timed, Fill::Half).await? {
                return Ok(Removed::Accepted(seq));
            }
            let row = sqlx::query("SELECT messages, bytes FROM inbox WHERE id = ?1")
                .bind(inbox)
                .fetch_one(&mut *self.connection)
                .await?;
            let (messages, bytes) = (row.unsigned("messages")?, row.unsigned("bytes")?);
            let size = message.payload.len() as u64;
            if removed == 0 || self.limits.has_room(messages, bytes, size) {
                return Ok(Removed::Head(messages, bytes));
            }
        }
    }
}

/// The result of a removal of expired messages.
enum Removed {
    /// The message was accepted.
    Accepted(Seq),
    /// The messages and bytes of the inbox, including expired ones that are left.
    Head(u64, u64),
}

async fn why(
    connection: &mut SqliteConnection,
    message: &NewMessage,
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

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use qpq_domain::{ChannelId, UnixMillis};

    use super::*;

    fn message(payload: &Bytes) -> NewMessage {
        NewMessage {
            sender: IdentityKey::new([1; 32]),
            recipient: IdentityKey::new([2; 32]),
            channel: ChannelId::DEFAULT,
            payload: payload.clone(),
            payload_sha256: [0; 32],
            message_id: None,
            now: UnixMillis(0),
            ttl: Duration::ZERO,
        }
    }

    const BOUNDS: Bounds = Bounds { earliest: UnixMillis(0), latest: UnixMillis(0) };

    /// Returns the rows of each statement, and whether they share a payload.
    fn statements(payloads: &[&Bytes]) -> Vec<(usize, bool)> {
        let messages: Vec<_> = payloads.iter().map(|payload| message(payload)).collect();
        let messages: Vec<_> =
            messages.iter().map(|message| Timed { message, bounds: BOUNDS }).collect();
        let (mut rest, mut statements) = (&messages[..], Vec::new());
        while !rest.is_empty() {
            let (rows, payloads) = next_statement(rest);
            statements.push((rows, payloads == Payloads::Shared));
            rest = &rest[rows..];
        }
        statements
    }

    #[test]
    fn a_large_shared_payload_is_bound_once_and_small_ones_share_a_statement() {
        let large = Bytes::from(vec![0; MIN_BYTES_SHARED]);
        let small = Bytes::from(vec![0; 100]);
        let others: Vec<_> = (0..40).map(|_| Bytes::from(vec![0; MIN_BYTES_SHARED])).collect();
        let own: Vec<_> = others.iter().collect();
        assert_eq!(statements(&[&small; 40]), [(MAX_ROWS, false), (8, false)]);
        assert_eq!(statements(&own), [(MAX_ROWS, false), (8, false)]);
        assert_eq!(statements(&[&large; 40]), [(MAX_ROWS, true), (8, true)]);
        let mixed = [&small, own[0], &large, &large, &large, &small, &small, own[1]];
        assert_eq!(statements(&mixed), [(2, false), (3, true), (3, false)]);
        assert_eq!(statements(&[&large]), [(1, false)]);
    }
}
