//! Removing messages, and remembering their ids for a while: each removal is two statements with
//! the same condition, in one transaction.

use std::time::Duration;

use qpq_domain::{Seq, UnixMillis};
use qpq_ports::{Ack, NewMessage, ReadQuery, View};
use sqlx::{SqliteConnection, query::Query, sqlite::SqliteArguments};

use crate::{
    maintenance::SWEEP,
    row::{millis, millis_of, number},
};

/// The two statements for one condition. ?1 is the instant of removal and ?2 how long ids are
/// remembered; an id of a message that expired before is remembered from then on.
struct Removal {
    remember: &'static str,
    delete: &'static str,
}

macro_rules! removal {
    ($condition:literal) => {
        Removal {
            remember: concat!(
                "INSERT OR REPLACE INTO recent_id
                     (inbox, sender, message_id, seq, channel, payload_sha256, enqueued_at, forget_at)
                 SELECT inbox, sender, message_id, seq, channel, payload_sha256, enqueued_at,
                        min(?1, expires_at) + ?2
                   FROM message WHERE message_id IS NOT NULL AND +expires_at > ?1 - ?2 AND ",
                $condition
            ),
            delete: concat!("DELETE FROM message WHERE ", $condition),
        }
    };
}

// ?3 inbox, ?4 and ?5 first and last seq, ?6 alive at, ?7 channel.
const RANGE: Removal = removal!("inbox = ?3 AND seq BETWEEN ?4 AND ?5 AND +expires_at > ?6");
const CHANNEL_RANGE: Removal =
    removal!("inbox = ?3 AND channel = ?7 AND seq BETWEEN ?4 AND ?5 AND +expires_at > ?6");

// ?3 inbox, ?4 the seqs as a JSON array, ?5 alive at, ?6 channel.
const SINGLE: Removal =
    removal!("inbox = ?3 AND seq IN (SELECT value FROM json_each(?4)) AND +expires_at > ?5");
const CHANNEL_SINGLE: Removal = removal!(
    "inbox = ?3 AND channel = ?6 AND seq IN (SELECT value FROM json_each(?4)) AND +expires_at > ?5"
);

// ?3 inbox, ?4 how many, ?5 and ?6 a sender and an id whose message goes besides. The channel index
// has all that is asked for; the expiry index would walk over other inboxes.
const EXPIRED: Removal = removal!(
    "(id IN (SELECT id FROM message WHERE inbox = ?3 AND +expires_at <= ?1 LIMIT ?4)
      OR id = (SELECT id FROM message
                WHERE inbox = ?3 AND sender = ?5 AND message_id = ?6 AND +expires_at <= ?1))"
);

// ?3 how many.
const SWEPT: Removal =
    removal!("id IN (SELECT id FROM message WHERE expires_at <= ?1 ORDER BY expires_at LIMIT ?3)");

const NEXT_EXPIRY: &str = "
    UPDATE inbox SET next_expiry = coalesce(
        (SELECT min(+expires_at) FROM message WHERE inbox = ?1), 9223372036854775807) WHERE id = ?1";

const FORGET: &str = "
    DELETE FROM recent_id WHERE (inbox, sender, message_id) IN (
        SELECT inbox, sender, message_id FROM recent_id WHERE forget_at <= ?1 ORDER BY forget_at LIMIT ?2)";

#[cfg(test)]
pub(super) fn statements() -> impl Iterator<Item = &'static str> {
    [RANGE, CHANNEL_RANGE, SINGLE, CHANNEL_SINGLE, EXPIRED, SWEPT]
        .into_iter()
        .flat_map(|removal| [removal.remember, removal.delete])
        .chain([NEXT_EXPIRY, FORGET])
}

/// A stretch of one view.
#[derive(Clone, Copy, Debug)]
pub(super) struct Selection {
    pub(super) inbox: i64,
    pub(super) view: View,
    pub(super) from: Seq,
    pub(super) to: Seq,
    /// Only messages that have not expired at this instant.
    pub(super) alive_at: UnixMillis,
}

/// Removes the selection; how many went.
pub(super) async fn selected(
    connection: &mut SqliteConnection,
    selection: &Selection,
    now: UnixMillis,
    recent_ids: Duration,
) -> sqlx::Result<u64> {
    let Selection { inbox, view, from, to, alive_at } = *selection;
    let (removal, channel) = match &view {
        View::All => (RANGE, None),
        View::Channel(channel) => (CHANNEL_RANGE, Some(channel.as_bytes())),
    };
    removal
        .run(connection, now, recent_ids, |query| {
            query
                .bind(inbox)
                .bind(number(from.0))
                .bind(number(to.0))
                .bind(millis(alive_at))
                .bind(channel)
        })
        .await
}

/// An ack without what it says twice and what cannot be.
pub(super) fn sensible(ack: Ack) -> Ack {
    let Ack { up_to, mut seqs, store_id } = ack;
    seqs.retain(|seq| Some(*seq) > up_to && i64::try_from(seq.0).is_ok());
    seqs.sort_unstable();
    seqs.dedup();
    Ack { up_to, seqs, store_id }
}

/// Removes what the ack names; how many went.
pub(super) async fn acked(
    connection: &mut SqliteConnection,
    read: &ReadQuery,
    ack: &Ack,
    (now, removed_at): (UnixMillis, UnixMillis),
    recent_ids: Duration,
) -> sqlx::Result<u32> {
    let inbox: Option<i64> = sqlx::query_scalar("SELECT id FROM account WHERE identity = ?1")
        .bind(&read.reader.inbox.as_bytes()[..])
        .fetch_optional(&mut *connection)
        .await?;
    let Some(inbox) = inbox else { return Ok(0) };
    let mut removed = 0;
    if let Some(to) = ack.up_to {
        let selection = Selection { inbox, view: read.view, from: Seq::ZERO, to, alive_at: now };
        removed += selected(connection, &selection, removed_at, recent_ids).await?;
    }
    if !ack.seqs.is_empty() {
        let list = ack.seqs.iter().map(|seq| seq.0.to_string()).collect::<Vec<_>>().join(",");
        let (removal, channel) = match &read.view {
            View::All => (SINGLE, None),
            View::Channel(channel) => (CHANNEL_SINGLE, Some(channel.as_bytes())),
        };
        removed += removal
            .run(connection, removed_at, recent_ids, |query| {
                query.bind(inbox).bind(format!("[{list}]")).bind(millis(now)).bind(channel)
            })
            .await?;
    }
    Ok(u32::try_from(removed).unwrap_or(u32::MAX))
}

/// Expired messages of an inbox that are to be removed.
pub(super) struct Due<'a> {
    pub(super) inbox: i64,
    pub(super) now: UnixMillis,
    /// Maximum rows.
    pub(super) rows: i64,
    /// A message to the inbox, whose id may be held by one that has expired.
    pub(super) message: &'a NewMessage,
}

/// Removes messages that have expired in one inbox; returns how many. Looks up when the next will
/// expire, if none is left that has.
pub(super) async fn expired(
    connection: &mut SqliteConnection,
    due: Due<'_>,
    recent_ids: Duration,
) -> sqlx::Result<i64> {
    let Due { inbox, now, rows, message } = due;
    let removed = EXPIRED
        .run(connection, now, recent_ids, |query| {
            query
                .bind(inbox)
                .bind(rows)
                .bind(message.sender.as_bytes().to_vec())
                .bind(message.message_id.as_ref().map(|id| id.as_bytes().to_vec()))
        })
        .await?;
    let removed = i64::try_from(removed).unwrap_or(i64::MAX);
    if removed < rows {
        sqlx::query(NEXT_EXPIRY).bind(inbox).execute(connection).await?;
    }
    Ok(removed)
}

/// Removes a bounded number of expired messages, whosever they are.
pub(crate) async fn sweep(
    connection: &mut SqliteConnection,
    now: UnixMillis,
    recent_ids: Duration,
) -> sqlx::Result<u64> {
    SWEPT.run(connection, now, recent_ids, |query| query.bind(SWEEP)).await
}

/// Forgets a bounded number of ids whose time is over.
pub(crate) async fn forget(
    connection: &mut SqliteConnection,
    now: UnixMillis,
) -> sqlx::Result<u64> {
    let done = sqlx::query(FORGET).bind(millis(now)).bind(SWEEP).execute(connection).await?;
    Ok(done.rows_affected())
}

type SqliteQuery = Query<'static, sqlx::Sqlite, SqliteArguments>;

impl Removal {
    async fn run(
        &self,
        connection: &mut SqliteConnection,
        now: UnixMillis,
        recent_ids: Duration,
        condition: impl Fn(SqliteQuery) -> SqliteQuery,
    ) -> sqlx::Result<u64> {
        for sql in [self.remember, self.delete] {
            let query = sqlx::query(sql).bind(millis(now)).bind(millis_of(recent_ids));
            let done = condition(query).execute(&mut *connection).await?;
            if sql == self.delete {
                return Ok(done.rows_affected());
            }
        }
        unreachable!("the second statement returns")
    }
}
