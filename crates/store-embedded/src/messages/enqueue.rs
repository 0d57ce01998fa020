//! The acceptance of messages: one statement for many messages, and a few more for each message
//! that the first statement leaves out, to find the reason.
//!
//! The first statement accepts nothing into an inbox that is more than half full. Messages to such
//! an inbox are handled one by one, because their senders are limited to a share of the inbox.
//!
//! A round trip to SQLite's thread costs more than an insert. So the writer passes the messages of
//! all calls that wait, and they are inserted up to [`MAX_ROWS`] at a time. Each row contains the
//! number of earlier messages to the same inbox in the statement, from which its seq follows. If
//! one of these is not accepted, the seqs of the later ones are wrong, and a trigger leaves those
//! messages out too. All messages that were left out are then handled one by one, in order. The
//! reasons why they were left out are looked up together (`left_out`).
//!
//! A payload that several consecutive messages share is stored once, in a row of its own, and the
//! messages refer to that row.

mod runs;

use std::{collections::HashMap, slice, sync::LazyLock};

use qpq_domain::{DeliveryLimits, IdentityKey, Seq};
use qpq_ports::{Enqueued, NewMessage, Receipt, View};
use sqlx::{Row as _, SqliteConnection, query::Query, sqlite::SqliteArguments};

use self::runs::{Payloads, next_run};
use super::{
    left_out::{self, LeftOut},
    remove::{self, Removal, SWEEP_ROWS, Selection},
};
use crate::{
    clock::{Bounds, ClockGuard},
    effects::Effects,
    row::{Columns as _, millis, number},
    statement::Done,
};

/// Maximum rows in one statement.
pub(super) const MAX_ROWS: usize = 32;

/// The number of expired messages that are removed for one message in a transaction that has
/// already removed many.
const MIN_REMOVAL: i64 = 16;

/// The insert statements, indexed by the number of rows.
static INSERTS: LazyLock<Vec<String>> =
    LazyLock::new(|| (0..=MAX_ROWS).map(|rows| insert_sql(rows, Payloads::Own)).collect());

/// The insert statements for rows that refer to one payload. The number of the payload is the
/// parameter after the rows. See [`INSERTS`].
static INSERTS_SHARED: LazyLock<Vec<String>> =
    LazyLock::new(|| (0..=MAX_ROWS).map(|rows| insert_sql(rows, Payloads::Shared)).collect());

/// The level up to which an inbox is filled.
#[derive(Clone, Copy)]
enum Fill {
    /// Fills the inbox halfway, if senders are limited to a share above that.
    Half,
    /// Fills the inbox completely.
    Full,
}

/// Returns the statement that finds the inboxes, checks caps and recent ids, assigns the next seqs
/// and inserts. A trigger updates the heads.
///
/// A row is left out if the inbox does not exist or has no room, if its owner blocks the sender, if
/// the message id is known, or if the seq would not be the next.
fn insert_sql(rows: usize, payloads: Payloads) -> String {
    // Only bare parameters, because sqlx does not count numbered parameters that precede bare ones.
    let (payload, payload_id) = match payloads {
        Payloads::Own => ("?", "NULL"),
        Payloads::Shared => ("x''", "?"),
    };
    let values = format!("(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, {payload})");
    let values = vec![values; rows].join(", ");
    format!(
        "WITH new (id, recipient, ahead, bytes_ahead, expires_at, enqueued_at, known_at, size,
                   channel, sender, message_id, payload_sha256, payload) AS (VALUES {values})
         INSERT INTO message (id, inbox, seq, expires_at, enqueued_at, size, channel, sender,
                              message_id, payload_sha256, payload, payload_id)
         SELECT n.id, i.id, i.last_seq + n.ahead + 1, n.expires_at, n.enqueued_at, n.size,
                n.channel, n.sender, n.message_id, n.payload_sha256, n.payload, {payload_id}
           FROM new n CROSS JOIN account a ON a.identity = n.recipient
                CROSS JOIN inbox i ON i.id = a.id
          WHERE i.messages + n.ahead < ? AND i.bytes + n.bytes_ahead <= ?
            AND i.bytes + n.bytes_ahead + n.size <= ?
            AND (i.blocks = 0 OR NOT EXISTS (SELECT 1 FROM block b
                                              WHERE b.account = i.id AND b.blocked = n.sender))
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

/// Returns the first free number of a payload.
const NEXT_PAYLOAD: &str = "SELECT coalesce(max(id), 0) + 1 FROM payload";

/// Stores the payload ?2 with the number ?1, if a message refers to it.
const STORE_PAYLOAD: &str = "
    INSERT INTO payload (id, bytes)
    SELECT ?1, ?2 WHERE EXISTS (SELECT 1 FROM message WHERE payload_id = ?1)";

/// Counts the messages of a sender in an inbox, up to a limit: ?1 inbox, ?2 sender, ?3 limit for
/// each index, ?4 now. One index has the messages with a message id, the other one those without.
const OF_SENDER: &str = "
    SELECT count(*) AS messages, coalesce(sum(size), 0) AS bytes
      FROM (SELECT size FROM (SELECT size FROM message
                               WHERE inbox = ?1 AND sender = ?2 AND message_id IS NOT NULL
                                 AND +expires_at > ?4 LIMIT +?3)
            UNION ALL
            SELECT size FROM (SELECT size FROM message
                               WHERE inbox = ?1 AND sender = ?2 AND message_id IS NULL
                                 AND +expires_at > ?4 LIMIT +?3))";

/// Counts the messages of an inbox that have not expired: ?1 inbox, ?2 now.
const ALIVE: &str = "
    SELECT count(*) AS messages, coalesce(sum(size), 0) AS bytes
      FROM message WHERE inbox = ?1 AND +expires_at > ?2";

#[cfg(test)]
pub(super) fn statements() -> impl Iterator<Item = &'static str> {
    [&INSERTS, &INSERTS_SHARED]
        .into_iter()
        .flat_map(|inserts| [inserts[1].as_str(), inserts[MAX_ROWS].as_str()])
        .chain([NEXT_ROW, NEXT_PAYLOAD, STORE_PAYLOAD, OF_SENDER, ALIVE])
}

/// Accepts messages. Returns their outcomes in order, and wakes the readers of accepted ones.
pub(crate) async fn all(
    connection: &mut SqliteConnection,
    messages: &[&NewMessage],
    limits: &DeliveryLimits,
    clock: &ClockGuard,
) -> sqlx::Result<Done<Vec<Enqueued>>> {
    let next_row = sqlx::query_scalar(NEXT_ROW).fetch_one(&mut *connection).await?;
    let (shared, removable) = (None, SWEEP_ROWS);
    let mut inserting = Inserting { connection, limits, next_row, shared, removable };
    let messages: Vec<_> = messages
        .iter()
        .map(|message| Timed { message, bounds: clock.bounds(message.now) })
        .collect();
    let mut outcomes = Vec::with_capacity(messages.len());
    let mut wakes = Vec::with_capacity(messages.len());
    let mut rest = &messages[..];
    while !rest.is_empty() {
        let (number, payloads) = next_run(rest);
        let (run, after) = rest.split_at(number);
        rest = after;
        inserting.begin_run(payloads).await?;
        for chunk in run.chunks(MAX_ROWS) {
            for (timed, outcome) in chunk.iter().zip(inserting.chunk(chunk).await?) {
                if matches!(outcome, Enqueued::Accepted(_)) {
                    let NewMessage { recipient, channel, .. } = timed.message;
                    wakes.push((*recipient, View::Channel(*channel)));
                }
                outcomes.push(outcome);
            }
        }
        inserting.end_run(run).await?;
    }
    Ok(Done::with(outcomes, Effects { wakes, ..Effects::default() }))
}

type SqliteQuery<'q> = Query<'q, sqlx::Sqlite, SqliteArguments>;

/// A message, and the bounds of the present at its instant.
#[derive(Clone, Copy)]
pub(super) struct Timed<'a> {
    pub(super) message: &'a NewMessage,
    pub(super) bounds: Bounds,
}

/// The messages to the same inbox that precede a message in its statement.
#[derive(Default)]
struct Ahead {
    messages: i64,
    bytes: i64,
}

impl<'a> Timed<'a> {
    fn size(&self) -> i64 {
        number(self.message.payload.len() as u64)
    }

    /// Binds the values of a row, except the payload.
    fn bind(&self, query: SqliteQuery<'a>, row: i64, ahead: &Ahead) -> SqliteQuery<'a> {
        let Bounds { earliest, latest } = self.bounds;
        let message = self.message;
        query
            .bind(row)
            .bind(&message.recipient.as_bytes()[..])
            .bind(ahead.messages)
            .bind(ahead.bytes)
            .bind(millis(latest.plus(message.ttl)))
            .bind(millis(latest))
            .bind(millis(earliest))
            .bind(self.size())
            .bind(message.channel.as_bytes())
            .bind(&message.sender.as_bytes()[..])
            .bind(message.message_id.as_ref().map(|id| &id.as_bytes()[..]))
            .bind(&message.payload_sha256[..])
    }

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
    limits: &'a DeliveryLimits,
    next_row: i64,
    /// The number of the payload that the messages refer to, if they share one.
    shared: Option<i64>,
    /// The number of expired messages that this transaction may still remove beyond the necessary
    /// ones.
    removable: i64,
}

impl Inserting<'_> {
    /// Begins a run of messages, and reserves a number if they share a payload.
    async fn begin_run(&mut self, payloads: Payloads) -> sqlx::Result<()> {
        self.shared = match payloads {
            Payloads::Own => None,
            Payloads::Shared => {
                Some(sqlx::query_scalar(NEXT_PAYLOAD).fetch_one(&mut *self.connection).await?)
            }
        };
        Ok(())
    }

    /// Stores the payload that the messages share. Runs after the inserts, so that the payload is
    /// not written if no message was accepted.
    async fn end_run(&mut self, messages: &[Timed<'_>]) -> sqlx::Result<()> {
        let Some(id) = self.shared.take() else { return Ok(()) };
        sqlx::query(STORE_PAYLOAD)
            .bind(id)
            .bind(&messages[0].message.payload[..])
            .execute(&mut *self.connection)
            .await
            .map(drop)
    }

    /// Handles at most [`MAX_ROWS`] messages of a run.
    async fn chunk(&mut self, messages: &[Timed<'_>]) -> sqlx::Result<Vec<Enqueued>> {
        let seqs = self.insert(messages, Fill::Half).await?;
        // The reason for the first message to an inbox does not depend on other messages of the
        // chunk.
        let is_first = |index: usize| {
            let recipient = &messages[index].message.recipient;
            !messages[..index].iter().any(|timed| timed.message.recipient == *recipient)
        };
        let first: Vec<_> =
            (0..messages.len()).filter(|n| seqs[*n].is_none() && is_first(*n)).collect();
        let asked: Vec<_> = first.iter().map(|index| &messages[*index]).collect();
        let reasons = left_out::reasons(self.connection, &asked, self.limits.recent_ids).await?;
        let mut reasons = first.into_iter().zip(reasons).peekable();
        let mut outcomes = Vec::with_capacity(messages.len());
        for (index, (timed, seq)) in messages.iter().zip(seqs).enumerate() {
            outcomes.push(match (seq, reasons.next_if(|(first, _)| *first == index)) {
                (Some(seq), _) => timed.accepted(seq),
                (None, Some((_, reason))) => self.explained(timed, reason).await?,
                (None, None) => self.one(timed).await?,
            });
        }
        Ok(outcomes)
    }

    /// Inserts messages and returns the seqs of the accepted ones. Of the messages to one inbox,
    /// the accepted ones are the first.
    async fn insert(
        &mut self,
        messages: &[Timed<'_>],
        fill: Fill,
    ) -> sqlx::Result<Vec<Option<Seq>>> {
        let first_row = self.next_row;
        let mut before: HashMap<IdentityKey, Ahead> = HashMap::with_capacity(messages.len());
        let inserts = if self.shared.is_some() { &INSERTS_SHARED } else { &INSERTS };
        let mut query = sqlx::query(inserts[messages.len()].as_str());
        for timed in messages {
            let ahead = before.entry(timed.message.recipient).or_default();
            query = timed.bind(query, self.next_row, ahead);
            if self.shared.is_none() {
                query = query.bind(&timed.message.payload[..]);
            }
            ahead.messages += 1;
            ahead.bytes += timed.size();
            self.next_row += 1;
        }
        if let Some(payload) = self.shared {
            query = query.bind(payload);
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

    /// Returns the limits of an inbox that accepts a message: before the message, it has fewer
    /// messages than the first number, and at most the second number of bytes.
    fn room(&self, fill: Fill) -> (u64, u64) {
        let limits = self.limits;
        match fill {
            Fill::Half if limits.sender_share > 1 => {
                (limits.half_messages() + 1, limits.half_bytes())
            }
            Fill::Half | Fill::Full => (limits.max_messages, limits.max_bytes),
        }
    }

    /// Handles a message that was left out after another one to its inbox: inserts it by itself, or
    /// finds the reason.
    async fn one(&mut self, timed: &Timed<'_>) -> sqlx::Result<Enqueued> {
        if let Some(seq) = self.try_one(timed, Fill::Half).await? {
            return Ok(timed.accepted(seq));
        }
        let reasons = left_out::reasons(self.connection, &[timed], self.limits.recent_ids).await?;
        self.explained(timed, reasons[0]).await
    }

    /// Handles a message that was left out, according to the reason.
    async fn explained(
        &mut self,
        timed: &Timed<'_>,
        reason: Option<LeftOut>,
    ) -> sqlx::Result<Enqueued> {
        let message = timed.message;
        let Some(LeftOut { inbox, mut head, stale, blocked, known }) = reason else {
            return Ok(Enqueued::NoSuchRecipient);
        };
        if let Some(receipt) = known {
            return Ok(Enqueued::Duplicate(receipt));
        }
        if blocked {
            return Ok(Enqueued::Refused);
        }
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
    /// `stale` is true if the inbox has expired messages.
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
        Ok(self.insert(slice::from_ref(timed), fill).await?[0])
    }

    /// Removes expired messages until the message fits, and further ones while the transaction has
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
