//! Removing messages and remembering their ids for a while, in one statement each. The inbox's head
//! is locked first, as by everybody who changes an inbox.

use std::{collections::HashMap, time::Duration};

use qpq_domain::{Seq, StoreId, UnixMillis};
use qpq_ports::{Ack, ReadQuery, View};
use sqlx::{PgConnection, Row as _};

use crate::{
    history::store_id,
    postgres::row::{Columns as _, millis, millis_of, number},
};

/// Maximum rows removed in one transaction.
pub(crate) const SWEEP: i64 = 256;

/// What was shown, of many inboxes. $1 and $2 inboxes and seqs, $3 now, $4 how long ids are
/// remembered, $5 the history in which it was shown: in another one the seqs are other messages'.
const SHOWN: &str = concat!(
    "WITH present AS MATERIALIZED (SELECT ",
    store_id!(),
    " AS store_id),
    shown AS MATERIALIZED (
        SELECT s.* FROM unnest($1::int8[], $2::int8[]) AS s (inbox, seq) CROSS JOIN present p WHERE p.store_id = $5),
    head AS MATERIALIZED (
        SELECT id FROM inbox WHERE id IN (SELECT inbox FROM shown) ORDER BY id FOR NO KEY UPDATE),
    gone AS (
        DELETE FROM message m USING shown s JOIN head h ON h.id = s.inbox
         WHERE m.inbox = s.inbox AND m.seq = s.seq
        RETURNING m.inbox, m.seq, m.sender, m.message_id, m.channel, m.payload_sha256, m.enqueued_at, m.expires_at,
                  octet_length(m.payload) AS size),
    remembered AS (
        INSERT INTO recent_id (inbox, sender, message_id, seq, channel, payload_sha256, enqueued_at, forget_at)
        SELECT inbox, sender, message_id, seq, channel, payload_sha256, enqueued_at, least(greatest($3, store_now()), expires_at) + $4
          FROM gone WHERE message_id IS NOT NULL
        ON CONFLICT (inbox, sender, message_id) DO UPDATE
           SET seq = excluded.seq, channel = excluded.channel, payload_sha256 = excluded.payload_sha256,
               enqueued_at = excluded.enqueued_at, forget_at = excluded.forget_at),
    counted AS (
        UPDATE inbox i
           SET removals = i.removals + 1, messages = i.messages - g.n, bytes = i.bytes - g.size,
               next_expiry = CASE i.messages - g.n WHEN 0 THEN 9223372036854775807 ELSE i.next_expiry END
          FROM (SELECT inbox, count(*) AS n, coalesce(sum(size), 0)::int8 AS size FROM gone GROUP BY inbox) g
         WHERE i.id = g.inbox
        RETURNING i.id, i.removals)
    SELECT p.store_id, c.id, c.removals FROM present p LEFT JOIN counted c ON true"
);

/// $1 identity, $2 now, $3 how long ids are remembered, $6 the history in which the seqs were read,
/// if the reader says so.
macro_rules! removal {
    ($condition:literal) => {
        concat!(
            "WITH head AS MATERIALIZED (
                SELECT i.id FROM account a JOIN inbox i ON i.id = a.id
                 WHERE a.identity = $1 AND ($6::bytea IS NULL OR $6 = ",
            store_id!(),
            ")
                   FOR NO KEY UPDATE OF i),
             gone AS (
                DELETE FROM message m USING head h WHERE m.inbox = h.id AND ",
            $condition,
            "RETURNING m.inbox, m.seq, m.sender, m.message_id, m.channel, m.payload_sha256, m.enqueued_at, m.expires_at,
                           octet_length(m.payload) AS size),
             remembered AS (
                INSERT INTO recent_id (inbox, sender, message_id, seq, channel, payload_sha256, enqueued_at, forget_at)
                SELECT inbox, sender, message_id, seq, channel, payload_sha256, enqueued_at, least(greatest($2, store_now()), expires_at) + $3
                  FROM gone WHERE message_id IS NOT NULL
                ON CONFLICT (inbox, sender, message_id) DO UPDATE
                   SET seq = excluded.seq, channel = excluded.channel, payload_sha256 = excluded.payload_sha256,
                       enqueued_at = excluded.enqueued_at, forget_at = excluded.forget_at),
             counted AS (
                UPDATE inbox i
                   SET removals = i.removals + 1, messages = i.messages - g.n, bytes = i.bytes - g.size,
                       next_expiry = CASE i.messages - g.n WHEN 0 THEN 9223372036854775807 ELSE i.next_expiry END
                  FROM head h, (SELECT count(*) AS n, coalesce(sum(size), 0)::int8 AS size FROM gone) g
                 WHERE i.id = h.id AND g.n > 0
                RETURNING i.removals)
             SELECT (SELECT removals FROM counted) AS removal, ARRAY (SELECT seq FROM gone) AS seqs, ",
            store_id!(),
            " AS store_id"
        )
    };
}

// $4 up to which seq, $5 single seqs.
const ACKED: &str = removal!("(m.seq <= $4 OR m.seq = ANY ($5)) AND m.expires_at > $2 ");
const ACKED_IN_CHANNEL: &str =
    removal!("m.channel = $7 AND (m.seq <= $4 OR m.seq = ANY ($5)) AND m.expires_at > $2 ");

/// What has expired in one inbox, whose head is locked: the first $4 of it, and what has one of the
/// ids $6 of the senders $5. $1 inbox, $2 now, $3 how long ids are remembered.
const EXPIRED: &str = "
    WITH due AS MATERIALIZED (
        (SELECT seq FROM message WHERE inbox = $1 AND expires_at <= $2 ORDER BY seq LIMIT $4)
        UNION
        SELECT m.seq FROM unnest($5::bytea[], $6::bytea[]) AS k (sender, id)
          JOIN message m ON m.inbox = $1 AND m.sender = k.sender AND m.message_id = k.id
         WHERE m.expires_at <= $2),
    gone AS (
        DELETE FROM message WHERE inbox = $1 AND seq IN (SELECT seq FROM due)
        RETURNING inbox, seq, sender, message_id, channel, payload_sha256, enqueued_at, expires_at,
                  octet_length(payload) AS size),
    remembered AS (
        INSERT INTO recent_id (inbox, sender, message_id, seq, channel, payload_sha256, enqueued_at, forget_at)
        SELECT inbox, sender, message_id, seq, channel, payload_sha256, enqueued_at, expires_at + $3
          FROM gone WHERE message_id IS NOT NULL AND expires_at + $3 > $2
        ON CONFLICT (inbox, sender, message_id) DO UPDATE
           SET seq = excluded.seq, channel = excluded.channel, payload_sha256 = excluded.payload_sha256,
               enqueued_at = excluded.enqueued_at, forget_at = excluded.forget_at)
    SELECT count(*) AS n, coalesce(sum(size), 0)::int8 AS size FROM gone";

/// $4: whether nothing that has expired is left, so that the next expiry is looked up.
const COUNT: &str = "
    UPDATE inbox
       SET messages = messages - $2, bytes = bytes - $3,
           next_expiry = CASE WHEN $4
               THEN coalesce((SELECT min(expires_at) FROM message WHERE inbox = $1), 9223372036854775807)
               ELSE next_expiry END
     WHERE id = $1 RETURNING messages, bytes, next_expiry";

/// What has expired in an inbox and is still there. Reads no payload.
const STALE: &str = "
    SELECT count(*) AS n, coalesce(sum(octet_length(payload)), 0)::int8 AS size
      FROM message WHERE inbox = $1 AND expires_at <= $2";

/// The oldest expired messages, whosever they are. Inboxes whose heads are locked have their turn
/// next time. The time of the next expiry stays as it is: too early is no harm.
/// $1 now, $2 how long ids are remembered, $3 rows.
const SWEPT: &str = "
    WITH present AS MATERIALIZED (SELECT least($1, store_now()) AS now),
    due AS MATERIALIZED (
        SELECT inbox, seq FROM message
         WHERE expires_at <= (SELECT now FROM present) ORDER BY expires_at LIMIT $3),
    head AS MATERIALIZED (
        SELECT id FROM inbox WHERE id IN (SELECT inbox FROM due)
         ORDER BY id FOR NO KEY UPDATE SKIP LOCKED),
    gone AS (
        DELETE FROM message m USING due d JOIN head h ON h.id = d.inbox
         WHERE m.inbox = d.inbox AND m.seq = d.seq
        RETURNING m.inbox, m.seq, m.sender, m.message_id, m.channel, m.payload_sha256, m.enqueued_at, m.expires_at,
                  octet_length(m.payload) AS size),
    remembered AS (
        INSERT INTO recent_id (inbox, sender, message_id, seq, channel, payload_sha256, enqueued_at, forget_at)
        SELECT inbox, sender, message_id, seq, channel, payload_sha256, enqueued_at, expires_at + $2
          FROM gone WHERE message_id IS NOT NULL AND expires_at + $2 > (SELECT now FROM present)
        ON CONFLICT (inbox, sender, message_id) DO UPDATE
           SET seq = excluded.seq, channel = excluded.channel, payload_sha256 = excluded.payload_sha256,
               enqueued_at = excluded.enqueued_at, forget_at = excluded.forget_at),
    counted AS (
        UPDATE inbox i
           SET messages = i.messages - g.n, bytes = i.bytes - g.size,
               next_expiry = CASE i.messages - g.n WHEN 0 THEN 9223372036854775807 ELSE i.next_expiry END
          FROM (SELECT inbox, count(*) AS n, sum(size)::int8 AS size FROM gone GROUP BY inbox) g
         WHERE i.id = g.inbox)
    SELECT count(*) FROM gone";

const FORGET: &str = "
    DELETE FROM recent_id WHERE ctid = ANY (ARRAY (
        SELECT ctid FROM recent_id WHERE forget_at <= (SELECT least($1, store_now()))
         ORDER BY forget_at LIMIT $2 FOR UPDATE SKIP LOCKED))";

/// What a removal took, if anything: by the inbox's removal of that number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Removed {
    pub(super) store_id: StoreId,
    pub(super) removal: u64,
    pub(super) seqs: Vec<Seq>,
}

/// Removes the messages that were shown in a history, as far as they are there: pairs of an inbox
/// and a seq. Returns which removal it was of each inbox that lost any; `None` if the history is
/// another one by now.
pub(super) async fn shown(
    connection: &mut PgConnection,
    store_id: &StoreId,
    shown: &[(i64, Seq)],
    now: UnixMillis,
    recent_ids: Duration,
) -> sqlx::Result<Option<HashMap<i64, u64>>> {
    let rows = sqlx::query(SHOWN)
        .bind(shown.iter().map(|(inbox, _)| *inbox).collect::<Vec<_>>())
        .bind(shown.iter().map(|(_, seq)| number(seq.0)).collect::<Vec<_>>())
        .bind(millis(now))
        .bind(millis_of(recent_ids))
        .bind(&store_id.as_bytes()[..])
        .fetch_all(connection)
        .await?;
    let present = rows.first().ok_or(sqlx::Error::RowNotFound)?.store_id("store_id")?;
    if present != *store_id {
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

/// Removes what the reader says it has.
pub(super) async fn acked(
    connection: &mut PgConnection,
    read: &ReadQuery,
    ack: &Ack,
    now: UnixMillis,
    recent_ids: Duration,
) -> sqlx::Result<Option<Removed>> {
    let (sql, channel) = match &read.view {
        View::All => (ACKED, None),
        View::Channel(channel) => (ACKED_IN_CHANNEL, Some(channel.as_bytes())),
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
    removed(&query.fetch_one(connection).await?)
}

/// What an inbox has left.
pub(super) struct Left {
    pub(super) messages: u64,
    pub(super) bytes: u64,
    pub(super) next_expiry: i64,
    /// Rows removed.
    pub(super) removed: i64,
    /// What has expired and is still there.
    pub(super) stale: Stale,
}

/// Messages that have expired and count for nothing.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Stale {
    pub(super) messages: u64,
    pub(super) bytes: u64,
}

/// Expired messages of an inbox that are to be removed.
pub(super) struct Due<'a> {
    pub(super) inbox: i64,
    pub(super) now: UnixMillis,
    /// Maximum rows.
    pub(super) rows: i64,
    /// Senders and ids whose expired messages are removed beyond that, since they are used anew.
    pub(super) ids: Vec<(&'a [u8], &'a [u8])>,
}

/// Removes messages that have expired in an inbox whose head the transaction holds. To a reader that
/// changes nothing, so it is no removal that a queue would have to show.
pub(super) async fn expired(
    connection: &mut PgConnection,
    due: Due<'_>,
    recent_ids: Duration,
) -> sqlx::Result<Left> {
    let Due { inbox, now, rows, ids } = due;
    let (senders, ids): (Vec<_>, Vec<_>) = ids.into_iter().unzip();
    let (removed, size): (i64, i64) = sqlx::query_as(EXPIRED)
        .bind(inbox)
        .bind(millis(now))
        .bind(millis_of(recent_ids))
        .bind(rows)
        .bind(senders)
        .bind(ids)
        .fetch_one(&mut *connection)
        .await?;
    let all = removed < rows;
    let row = sqlx::query(COUNT)
        .bind(inbox)
        .bind(removed)
        .bind(size)
        .bind(all)
        .fetch_one(&mut *connection)
        .await?;
    let stale = if all { Stale::default() } else { stale(connection, inbox, now).await? };
    Ok(Left {
        messages: row.unsigned("messages")?,
        bytes: row.unsigned("bytes")?,
        next_expiry: row.try_get("next_expiry")?,
        removed,
        stale,
    })
}

async fn stale(connection: &mut PgConnection, inbox: i64, now: UnixMillis) -> sqlx::Result<Stale> {
    let row = sqlx::query(STALE).bind(inbox).bind(millis(now)).fetch_one(connection).await?;
    Ok(Stale { messages: row.unsigned("n")?, bytes: row.unsigned("size")? })
}

/// Removes at most `rows` expired messages; returns how many.
pub(crate) async fn sweep(
    connection: &mut PgConnection,
    now: UnixMillis,
    rows: i64,
    recent_ids: Duration,
) -> sqlx::Result<u64> {
    let gone: i64 = sqlx::query_scalar(SWEPT)
        .bind(millis(now))
        .bind(millis_of(recent_ids))
        .bind(rows)
        .fetch_one(connection)
        .await?;
    Ok(u64::try_from(gone).unwrap_or_default())
}

/// Forgets at most `rows` message ids whose time is over; returns how many.
pub(crate) async fn forget(
    connection: &mut PgConnection,
    now: UnixMillis,
    rows: i64,
) -> sqlx::Result<u64> {
    let done = sqlx::query(FORGET).bind(millis(now)).bind(rows).execute(connection).await?;
    Ok(done.rows_affected())
}

fn removed(row: &sqlx::postgres::PgRow) -> sqlx::Result<Option<Removed>> {
    let seqs: Vec<i64> = row.try_get("seqs")?;
    if seqs.is_empty() {
        return Ok(None);
    }
    let seqs = seqs.into_iter().map(|seq| Seq(u64::try_from(seq).unwrap_or_default())).collect();
    let (store_id, removal) = (row.store_id("store_id")?, row.unsigned("removal")?);
    Ok(Some(Removed { store_id, removal, seqs }))
}

fn numbers(seqs: &[Seq]) -> Vec<i64> {
    // A seq that no column can hold is nobody's.
    seqs.iter().filter_map(|seq| i64::try_from(seq.0).ok()).collect()
}
