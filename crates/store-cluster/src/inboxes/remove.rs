//! Removal of messages. Every removal is one statement of one shape: lock the heads of the inboxes,
//! delete messages, remember the ids of those that had one, and count down the heads.
//!
//! A removal for the single reader requires that the locked head has no devices. Postgres checks
//! this condition again after it has waited for the lock, so a registration that the statement
//! waited for counts.

use std::{collections::HashMap, time::Duration};

use qpq_domain::{Seq, StoreId, UnixMillis};
use qpq_ports::{Ack, ReadQuery, View};
use sqlx::{PgConnection, Row as _, postgres::PgRow};

use super::payloads::size;
use crate::{
    effects::Removal,
    history::store_id,
    postgres::{
        Repeat, Scope, Statement,
        row::{Columns as _, millis, millis_of, number},
    },
    redis::queue::ReaderId,
};

/// A removal. The parameters are: common table expressions that lock the heads; the messages to
/// delete; the time at which their ids are forgotten, and which ids are remembered; changes of the
/// heads in addition to the counts; the result of the statement.
macro_rules! removal {
    (
        with: $with:expr,
        delete: $delete:expr,
        forget_at: $forget_at:literal,
        remember: $remember:literal,
        head: $head:literal,
        also: $also:expr,
        select: $select:expr $(,)?
    ) => {
        concat!(
            "WITH ",
            $with,
            ", removed AS (
                DELETE FROM message m ",
            $delete,
            "   RETURNING m.inbox, m.seq, m.sender, m.message_id, m.channel, m.payload_sha256,
                          m.enqueued_at, m.expires_at, m.payload_id, ",
            $crate::inboxes::payloads::size!(),
            " AS size),
            remembered AS (
                INSERT INTO recent_id (inbox, sender, message_id, seq, channel, payload_sha256,
                                       enqueued_at, forget_at)
                SELECT inbox, sender, message_id, seq, channel, payload_sha256, enqueued_at, ",
            $forget_at,
            "     FROM removed WHERE message_id IS NOT NULL ",
            $remember,
            "   ON CONFLICT (inbox, sender, message_id) DO UPDATE
                   SET seq = excluded.seq, channel = excluded.channel,
                       payload_sha256 = excluded.payload_sha256,
                       enqueued_at = excluded.enqueued_at, forget_at = excluded.forget_at),
            counted AS (
                UPDATE inbox i
                   SET messages = i.messages - g.n, bytes = i.bytes - g.size, ",
            $head,
            "     FROM (SELECT inbox, count(*) AS n, coalesce(sum(size), 0)::int8 AS size
                          FROM removed GROUP BY inbox) g
                 WHERE i.id = g.inbox
                RETURNING i.id, i.removals)
            ",
            $also,
            $select
        )
    };
}
pub(super) use removal;

/// A removal for a reader: also increments the removals of the head, and counts down the payloads.
macro_rules! reader_removal {
    (
        with: $with:expr,
        delete: $delete:expr,
        forget_at: $forget_at:literal,
        also: $also:expr,
        select: $select:expr $(,)?
    ) => {
        removal! {
            with: $with,
            delete: $delete,
            forget_at: $forget_at,
            remember: "",
            head: "removals = i.removals + 1,
                   next_expiry = CASE i.messages - g.n WHEN 0 THEN 9223372036854775807
                                 ELSE i.next_expiry END",
            also: concat!($crate::inboxes::payloads::counted_down!(), $also),
            select: $select,
        }
    };
}
pub(super) use reader_removal;

/// Removes pages of many inboxes. $1 and $2 inboxes and seqs, $3 now, $4 the time for which ids are
/// remembered, $5 the history of the pages: in another one the seqs belong to other messages.
const PAGES: &str = reader_removal! {
    with: concat!(
        "present AS MATERIALIZED (SELECT ", store_id!(), " AS store_id),
        page AS MATERIALIZED (
            SELECT s.* FROM unnest($1::int8[], $2::int8[]) AS s (inbox, seq)
             CROSS JOIN present p WHERE p.store_id = $5),
        head AS MATERIALIZED (
            SELECT id FROM inbox WHERE id IN (SELECT inbox FROM page) AND devices = 0
             ORDER BY id FOR NO KEY UPDATE)"
    ),
    delete: "USING page s JOIN head h ON h.id = s.inbox
              WHERE m.inbox = s.inbox AND m.seq = s.seq",
    forget_at: "least(greatest($3, store_now()), expires_at) + $4",
    also: "",
    select: "SELECT p.store_id, c.id, c.removals FROM present p LEFT JOIN counted c ON true"
};

/// Removes the messages that a reader acks. $1 identity, $2 now, $3 the time for which ids are
/// remembered, $4 the last seq of a range, $5 single seqs, $6 the history in which the seqs were
/// read, if the reader names it.
macro_rules! ack {
    ($view:literal) => {
        reader_removal! {
            with: concat!(
                "head AS MATERIALIZED (
                    SELECT i.id, i.devices FROM account a JOIN inbox i ON i.id = a.id
                     WHERE a.identity = $1 AND ($6::bytea IS NULL OR $6 = ", store_id!(), ")
                       FOR NO KEY UPDATE OF i)"
            ),
            delete: concat!(
                "USING head h
WHERE h.devices = 0 AND m.inbox = h.id AND (m.seq <= $4 OR m.seq = ANY ($5)) AND m.expires_at > $2",
                $view
            ),
            forget_at: "least(greatest($2, store_now()), expires_at) + $3",
            also: "",
            select: concat!(
                "SELECT (SELECT devices > 0 FROM head) AS has_devices,
(SELECT removals FROM counted) AS removal,
ARRAY (SELECT seq FROM removed) AS seqs, ", store_id!(), " AS store_id"
            )
        }
    };
}
const ACK: &str = ack!("");
/// $7 the channel.
const ACK_IN_CHANNEL: &str = ack!(" AND m.channel = $7");

/// Removes expired messages of one inbox, whose head is locked: the first $4 of them, and those
/// that have one of the ids $6 of the senders $5. $1 inbox, $2 now, $3 the time for which ids are
/// remembered. Expired messages are invisible to readers, so this is not counted as a removal.
macro_rules! expired {
    ($also:literal) => {
        removal! {
            with: "due AS MATERIALIZED (
                (SELECT seq FROM message WHERE inbox = $1 AND expires_at <= $2
                  ORDER BY seq LIMIT $4)
                UNION
                SELECT m.seq FROM unnest($5::bytea[], $6::bytea[]) AS k (sender, id)
                  JOIN message m ON m.inbox = $1 AND m.sender = k.sender AND m.message_id = k.id
                 WHERE m.expires_at <= $2)",
            delete: "WHERE m.inbox = $1 AND m.seq IN (SELECT seq FROM due)",
            forget_at: "expires_at + $3",
            remember: "AND expires_at + $3 > $2",
            head: "next_expiry = i.next_expiry",
            also: $also,
            select: "SELECT count(*) AS removed,
                            coalesce(array_agg(payload_id) FILTER (WHERE payload_id IS NOT NULL),
                                     '{}') AS payloads FROM removed",
        }
    };
}
const EXPIRED: &str = expired!("");
const EXPIRED_OF_DEVICES: &str = expired!(
    ", undone AS (
        DELETE FROM device_done o USING removed g WHERE o.inbox = g.inbox AND o.seq = g.seq)"
);

/// Removes expired messages that have certain ids, of inboxes whose heads are locked. $1 inboxes,
/// $2 senders, $3 ids, $4 now, $5 the time for which ids are remembered, $6 the earliest bound of
/// now.
const EXPIRED_IDS: &str = removal! {
    with: "due AS MATERIALIZED (
        SELECT m.inbox, m.seq
          FROM unnest($1::int8[], $2::bytea[], $3::bytea[], $4::int8[])
               AS k (inbox, sender, id, now)
         CROSS JOIN LATERAL (
            SELECT inbox, seq FROM message
             WHERE inbox = k.inbox AND sender = k.sender AND message_id = k.id
               AND expires_at <= k.now LIMIT 1) m)",
    delete: "USING due d WHERE m.inbox = d.inbox AND m.seq = d.seq",
    forget_at: "expires_at + $5",
    remember: "AND expires_at + $5 > $6",
    head: "next_expiry = i.next_expiry",
    also: ", undone AS (
        DELETE FROM device_done o USING removed g WHERE o.inbox = g.inbox AND o.seq = g.seq)",
    select: "SELECT inbox, count(*) AS messages, coalesce(sum(size), 0)::int8 AS bytes,
                    coalesce(array_agg(payload_id) FILTER (WHERE payload_id IS NOT NULL),
                             '{}') AS payloads
               FROM removed GROUP BY inbox",
};

/// Returns the head after [`EXPIRED`]. $2: true if no expired message is left, so that the next
/// expiry is looked up.
const COUNT: &str = "
    UPDATE inbox
       SET next_expiry = CASE WHEN $2
               THEN coalesce((SELECT min(expires_at) FROM message WHERE inbox = $1),
                             9223372036854775807)
               ELSE next_expiry END
     WHERE id = $1 RETURNING messages, bytes, next_expiry";

/// Counts the expired messages that an inbox still has. Reads no payload.
const COUNT_EXPIRED: &str = concat!(
    "SELECT count(*) AS n, coalesce(sum(",
    size!(),
    "), 0)::int8 AS size FROM message m WHERE inbox = $1 AND expires_at <= $2"
);

/// Removes pages that were read in one history.
///
/// Returns the number of the removal for each inbox that lost a message; `None` if the store is in
/// another history.
pub(super) struct RemovePages {
    pub(super) store_id: StoreId,
    /// The inbox of each message.
    pub(super) inboxes: Vec<i64>,
    pub(super) seqs: Vec<Seq>,
    pub(super) now: UnixMillis,
    pub(super) recent_ids: Duration,
}

impl Statement for RemovePages {
    type Output = Option<HashMap<i64, u64>>;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "complete"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Self::Output> {
        let rows = sqlx::query(PAGES)
            .bind(&self.inboxes)
            .bind(self.seqs.iter().map(|seq| number(seq.0)).collect::<Vec<_>>())
            .bind(millis(self.now))
            .bind(millis_of(self.recent_ids))
            .bind(&self.store_id.as_bytes()[..])
            .fetch_all(connection)
            .await?;
        let present = rows.first().ok_or(sqlx::Error::RowNotFound)?.store_id("store_id")?;
        if present != self.store_id {
            return Ok(None);
        }
        let mut removals = HashMap::with_capacity(rows.len());
        for row in &rows {
            if let Some(inbox) = row.try_get("id")? {
                removals.insert(inbox, row.unsigned("removals")?);
            }
        }
        Ok(Some(removals))
    }
}

/// Removes the messages that a single reader acks.
pub(super) struct RemoveAcked<'a> {
    pub(super) query: &'a ReadQuery,
    pub(super) ack: &'a Ack,
    pub(super) now: UnixMillis,
    pub(super) recent_ids: Duration,
}

/// The outcome of an ack by a reader who may be the single reader of the inbox.
pub(super) enum SingleAck {
    /// The reader is the single reader. `None` if no message was removed.
    Removed(Option<Removal>),
    /// The inbox has devices, and nothing was removed.
    HasDevices,
}

impl Statement for RemoveAcked<'_> {
    type Output = SingleAck;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "ack"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Self::Output> {
        let Self { query: read, ack, now, recent_ids } = *self;
        let (sql, channel) = match &read.view {
            View::All => (ACK, None),
            View::Channel(channel) => (ACK_IN_CHANNEL, Some(channel.as_bytes())),
        };
        let mut query = sqlx::query(sql)
            .bind(&read.reader.inbox.as_bytes()[..])
            .bind(millis(now))
            .bind(millis_of(recent_ids))
            .bind(number(ack.up_to.unwrap_or(Seq::ZERO).0))
            .bind(numbers(&ack.seqs))
            .bind(ack.store_id.as_ref().map(|id| &id.as_bytes()[..]));
        if let Some(channel) = channel {
            query = query.bind(channel);
        }
        let row = query.fetch_one(connection).await?;
        Ok(match row.try_get("has_devices")? {
            Some(true) => SingleAck::HasDevices,
            Some(false) | None => SingleAck::Removed(removal_of(read, &row)?),
        })
    }
}

/// The head of an inbox after expired messages were removed from it.
pub(super) struct RemainingHead {
    pub(super) messages: u64,
    pub(super) bytes: u64,
    pub(super) next_expiry: i64,
    /// Rows removed.
    pub(super) removed: i64,
    /// Expired messages that are left.
    pub(super) expired: ExpiredCounts,
    /// The payloads to count down: one entry for each removed message with a shared payload.
    pub(super) payloads: Vec<i64>,
}

/// Expired messages that are still stored, and do not count against limits.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ExpiredCounts {
    pub(super) messages: u64,
    pub(super) bytes: u64,
}

/// Expired messages of an inbox that are to be removed.
pub(super) struct Due<'a> {
    pub(super) inbox: i64,
    pub(super) has_devices: bool,
    pub(super) now: UnixMillis,
    /// Maximum rows to remove.
    pub(super) rows: i64,
    /// Senders and ids whose expired messages are removed in addition, because the ids are used
    /// again.
    pub(super) ids: Vec<(&'a [u8], &'a [u8])>,
}

/// Removes expired messages of an inbox whose head the transaction has locked. The caller must
/// count down their payloads.
pub(super) async fn expired(
    connection: &mut PgConnection,
    due: Due<'_>,
    recent_ids: Duration,
) -> sqlx::Result<RemainingHead> {
    let Due { inbox, has_devices, now, rows, ids } = due;
    let (senders, ids): (Vec<_>, Vec<_>) = ids.into_iter().unzip();
    let row = sqlx::query(if has_devices { EXPIRED_OF_DEVICES } else { EXPIRED })
        .bind(inbox)
        .bind(millis(now))
        .bind(millis_of(recent_ids))
        .bind(rows)
        .bind(senders)
        .bind(ids)
        .fetch_one(&mut *connection)
        .await?;
    let removed: i64 = row.try_get("removed")?;
    let all = removed < rows;
    let head = sqlx::query(COUNT).bind(inbox).bind(all).fetch_one(&mut *connection).await?;
    let expired =
        if all { ExpiredCounts::default() } else { count_expired(connection, inbox, now).await? };
    Ok(RemainingHead {
        messages: head.unsigned("messages")?,
        bytes: head.unsigned("bytes")?,
        next_expiry: head.try_get("next_expiry")?,
        removed,
        expired,
        payloads: row.try_get("payloads")?,
    })
}

/// A message id that is used again in an inbox, where an expired message may have it.
pub(super) struct DueId<'a> {
    pub(super) inbox: i64,
    pub(super) sender: &'a [u8; 32],
    pub(super) id: &'a [u8; 16],
    pub(super) now: UnixMillis,
}

/// The expired messages of an inbox that were removed because their ids are used again.
pub(super) struct FreedIds {
    pub(super) messages: u64,
    pub(super) bytes: u64,
    /// The payloads to count down. See [`RemainingHead::payloads`].
    pub(super) payloads: Vec<i64>,
}

/// Removes the expired messages that have these ids, of inboxes whose heads the transaction has
/// locked. Returns the removed messages of each inbox. The caller must count down the payloads.
pub(super) async fn expired_ids(
    connection: &mut PgConnection,
    ids: &[DueId<'_>],
    recent_ids: Duration,
) -> sqlx::Result<HashMap<i64, FreedIds>> {
    let earliest = ids.iter().map(|id| id.now).min().unwrap_or_default();
    let rows = sqlx::query(EXPIRED_IDS)
        .bind(ids.iter().map(|id| id.inbox).collect::<Vec<_>>())
        .bind(ids.iter().map(|id| &id.sender[..]).collect::<Vec<_>>())
        .bind(ids.iter().map(|id| &id.id[..]).collect::<Vec<_>>())
        .bind(ids.iter().map(|id| millis(id.now)).collect::<Vec<_>>())
        .bind(millis_of(recent_ids))
        .bind(millis(earliest))
        .fetch_all(connection)
        .await?;
    let removed = rows.iter().map(|row| {
        let (messages, bytes) = (row.unsigned("messages")?, row.unsigned("bytes")?);
        let freed = FreedIds { messages, bytes, payloads: row.try_get("payloads")? };
        Ok((row.try_get("inbox")?, freed))
    });
    removed.collect()
}

async fn count_expired(
    connection: &mut PgConnection,
    inbox: i64,
    now: UnixMillis,
) -> sqlx::Result<ExpiredCounts> {
    let row =
        sqlx::query(COUNT_EXPIRED).bind(inbox).bind(millis(now)).fetch_one(connection).await?;
    Ok(ExpiredCounts { messages: row.unsigned("n")?, bytes: row.unsigned("size")? })
}

fn removal_of(query: &ReadQuery, row: &PgRow) -> sqlx::Result<Option<Removal>> {
    let seqs = seqs_of(row)?;
    if seqs.is_empty() {
        return Ok(None);
    }
    let (reader, view) = (ReaderId::single(query.reader.inbox), query.view);
    let (store_id, number) = (row.store_id("store_id")?, row.unsigned("removal")?);
    Ok(Some(Removal { reader, view, store_id, number, lease: None, seqs }))
}

/// Returns the column `seqs`.
pub(super) fn seqs_of(row: &PgRow) -> sqlx::Result<Vec<Seq>> {
    let seqs: Vec<i64> = row.try_get("seqs")?;
    Ok(seqs.into_iter().map(|seq| Seq(u64::try_from(seq).unwrap_or_default())).collect())
}

/// Returns the seqs that fit the column.
pub(super) fn numbers(seqs: &[Seq]) -> Vec<i64> {
    // A seq that does not fit the column belongs to no message.
    seqs.iter().filter_map(|seq| i64::try_from(seq.0).ok()).collect()
}
