//! Snapshots of an inbox: one statement each, with rows in seq order until the page is full.

use std::collections::HashSet;

use futures_util::TryStreamExt as _;
use qpq_domain::{IdentityKey, Seq, UnixMillis};
use qpq_ports::{Envelope, PageLimit, ReadQuery, StoreResult, View};
use sqlx::{Row as _, SqliteConnection, SqlitePool, sqlite::SqliteRow};

use crate::{
    error::read_failed,
    row::{Columns as _, millis, number},
};

// ?1 identity, ?2 the seq before the first, ?3 now, ?4 maximum rows, ?5 channel.
const ALL: &str = "
    SELECT m.inbox, m.seq, m.channel, m.enqueued_at, m.payload
      FROM account a CROSS JOIN message m INDEXED BY message_inbox
     WHERE a.identity = ?1 AND m.inbox = a.id AND m.seq > ?2 AND m.expires_at > ?3
     ORDER BY m.seq LIMIT ?4";
const CHANNEL: &str = "
    SELECT m.inbox, m.seq, m.channel, m.enqueued_at, m.payload
      FROM account a CROSS JOIN message m INDEXED BY message_channel
     WHERE a.identity = ?1 AND m.inbox = a.id AND m.channel = ?5 AND m.seq > ?2
       AND m.expires_at > ?3
     ORDER BY m.seq LIMIT ?4";

const SEQS: &str = "
    SELECT m.seq FROM account a CROSS JOIN message m INDEXED BY message_inbox
     WHERE a.identity = ?1 AND m.inbox = a.id";

#[cfg(test)]
pub(super) const STATEMENTS: [&str; 3] = [ALL, CHANNEL, SEQS];

/// The messages of a view at one instant, leased or not, up to the limit.
#[derive(Debug, Default)]
pub(crate) struct Snapshot {
    /// The number of the inbox, if it has messages.
    pub(crate) inbox: Option<i64>,
    pub(crate) envelopes: Vec<Envelope>,
    /// The first message beyond the limit.
    pub(crate) next: Option<Seq>,
}

/// Reads the messages of the view after `after` that have not expired at `now`.
pub(crate) async fn snapshot(
    connection: &mut SqliteConnection,
    read: &ReadQuery,
    after: Seq,
    limit: PageLimit,
    now: UnixMillis,
) -> StoreResult<Snapshot> {
    let (sql, channel) = match &read.view {
        View::All => (ALL, None),
        View::Channel(channel) => (CHANNEL, Some(channel.as_bytes())),
    };
    let mut rows = sqlx::query(sql)
        .bind(&read.reader.inbox.as_bytes()[..])
        .bind(number(after.0))
        .bind(millis(now))
        .bind(i64::from(limit.messages) + 1)
        .bind(channel)
        .fetch(connection);
    let mut snapshot = Snapshot::default();
    let mut bytes = 0_usize;
    while let Some(row) = rows.try_next().await.map_err(read_failed)? {
        let envelope = envelope(&row).map_err(read_failed)?;
        bytes = bytes.saturating_add(envelope.cost());
        let is_full = snapshot.envelopes.len()
            >= usize::try_from(limit.messages).unwrap_or(usize::MAX)
            || (bytes > limit.bytes && !snapshot.envelopes.is_empty());
        if is_full {
            snapshot.next = Some(envelope.seq);
            break;
        }
        snapshot.inbox = Some(row.try_get("inbox").map_err(read_failed)?);
        snapshot.envelopes.push(envelope);
    }
    Ok(snapshot)
}

/// Returns the seqs of all messages in the inbox. Reads a short index entry for each.
pub(crate) async fn seqs(readers: &SqlitePool, inbox: &IdentityKey) -> StoreResult<HashSet<Seq>> {
    let rows = sqlx::query(SEQS)
        .bind(&inbox.as_bytes()[..])
        .fetch_all(readers)
        .await
        .map_err(read_failed)?;
    rows.iter().map(|row| row.seq("seq")).collect::<sqlx::Result<_>>().map_err(read_failed)
}

fn envelope(row: &SqliteRow) -> sqlx::Result<Envelope> {
    Ok(Envelope {
        seq: row.seq("seq")?,
        channel: row.channel("channel")?,
        payload: row.bytes("payload")?.into(),
        enqueued_at: row.at("enqueued_at")?,
    })
}
