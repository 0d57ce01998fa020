//! Snapshots of an inbox: one statement each, with rows in seq order until the page is full.
//!
//! The first row also has the reader's position, so the check of the reader and the messages come
//! from the same state of the inbox.

use std::collections::HashSet;

use futures_util::TryStreamExt as _;
use qpq_domain::{IdentityKey, Seq, UnixMillis};
use qpq_ports::{Envelope, PageLimit, ReadQuery, StoreError, StoreResult, View};
use sqlx::{Row as _, SqliteConnection, SqlitePool, sqlite::SqliteRow};

use crate::{
    error::read_failed,
    reader::RegistrationNumber,
    row::{Columns as _, millis, number},
};

/// The statement for a view. If no message waits for the reader, the result is one row without a
/// seq.
///
/// ?1 identity, ?2 the seq after which the page begins, ?3 now, ?4 maximum rows, ?5 channel, ?6
/// device.
macro_rules! snapshot {
    ($index:literal, $channel:literal) => {
        concat!(
            "SELECT i.id AS inbox, i.devices, r.id AS registration, r.position_lost,
                    r.last_seen_at, m.seq, m.channel, m.enqueued_at,
                    CASE WHEN m.payload_id IS NULL THEN m.payload
                         ELSE (SELECT p.bytes FROM payload p WHERE p.id = m.payload_id)
                         END AS payload
               FROM account a CROSS JOIN inbox i ON i.id = a.id
               LEFT JOIN device r ON i.devices > 0 AND r.account = i.id AND r.device = ?6
               LEFT JOIN message m INDEXED BY ",
            $index,
            " ON m.inbox = i.id AND m.seq > max(?2, coalesce(r.upto, 0)) AND m.expires_at > ?3 ",
            $channel,
            "    AND (i.devices = 0
                      OR NOT EXISTS (SELECT 1 FROM device_done d
                                      WHERE d.inbox = m.inbox AND d.seq = m.seq
                                        AND d.device = r.device))
              WHERE a.identity = ?1 ORDER BY m.seq LIMIT +?4"
        )
    };
}
const ALL: &str = snapshot!("message_inbox", "");
const CHANNEL: &str = snapshot!("message_channel", "AND m.channel = ?5");

const SEQS: &str = "
    SELECT m.seq FROM account a CROSS JOIN message m INDEXED BY message_inbox
     WHERE a.identity = ?1 AND m.inbox = a.id";

#[cfg(test)]
pub(super) const STATEMENTS: [&str; 3] = [ALL, CHANNEL, SEQS];

/// The messages of a view that wait for the reader at one instant, leased or not, up to the limit.
#[derive(Debug)]
pub(crate) struct Snapshot {
    /// The number of the inbox, if it exists.
    pub(crate) inbox: Option<i64>,
    pub(crate) reader: SnapshotReader,
    pub(crate) envelopes: Vec<Envelope>,
    /// The first message beyond the limit.
    pub(crate) next: Option<Seq>,
}

/// The reader that a snapshot is for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum SnapshotReader {
    /// The single reader of an inbox without devices.
    Single,
    Device {
        registration: RegistrationNumber,
        last_seen_at: UnixMillis,
    },
}

/// The reason why there is no snapshot.
#[derive(Debug)]
pub(crate) enum NoSnapshot {
    /// The inbox has devices, and the reader is none of them.
    DeviceRequired,
    /// A sweep has moved the device, and its client has not confirmed the new position.
    PositionLost(SnapshotReader),
    Store(StoreError),
}

impl From<sqlx::Error> for NoSnapshot {
    fn from(error: sqlx::Error) -> Self {
        Self::Store(read_failed(error))
    }
}

impl Snapshot {
    pub(crate) fn registration(&self) -> Option<RegistrationNumber> {
        match self.reader {
            SnapshotReader::Single => None,
            SnapshotReader::Device { registration, .. } => Some(registration),
        }
    }
}

/// Reads the messages of the view after `after` that have not expired at `now`.
pub(crate) async fn snapshot(
    connection: &mut SqliteConnection,
    read: &ReadQuery,
    after: Seq,
    limit: PageLimit,
    now: UnixMillis,
) -> Result<Snapshot, NoSnapshot> {
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
        .bind(read.reader.device.as_ref().map(|device| &device.as_bytes()[..]))
        .fetch(connection);
    let (reader, envelopes) = (SnapshotReader::Single, Vec::new());
    let mut snapshot = Snapshot { inbox: None, reader, envelopes, next: None };
    let mut bytes = 0_usize;
    while let Some(row) = rows.try_next().await? {
        if snapshot.inbox.is_none() {
            snapshot.reader = reader_of(&row)?;
            snapshot.inbox = Some(row.try_get("inbox")?);
        }
        let Some(envelope) = envelope(&row)? else { break };
        bytes = bytes.saturating_add(envelope.cost());
        let is_full = snapshot.envelopes.len()
            >= usize::try_from(limit.messages).unwrap_or(usize::MAX)
            || (bytes > limit.bytes && !snapshot.envelopes.is_empty());
        if is_full {
            snapshot.next = Some(envelope.seq);
            break;
        }
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

/// Returns the reader of a row. Fails if that reader may not read.
fn reader_of(row: &SqliteRow) -> Result<SnapshotReader, NoSnapshot> {
    if row.try_get::<i64, _>("devices")? == 0 {
        return Ok(SnapshotReader::Single);
    }
    let registration = row.try_get::<Option<i64>, _>("registration")?.map(RegistrationNumber);
    let registration = registration.ok_or(NoSnapshot::DeviceRequired)?;
    let reader = SnapshotReader::Device { registration, last_seen_at: row.at("last_seen_at")? };
    if row.try_get("position_lost")? { Err(NoSnapshot::PositionLost(reader)) } else { Ok(reader) }
}

fn envelope(row: &SqliteRow) -> sqlx::Result<Option<Envelope>> {
    if row.try_get::<Option<i64>, _>("seq")?.is_none() {
        return Ok(None);
    }
    Ok(Some(Envelope {
        seq: row.seq("seq")?,
        channel: row.channel("channel")?,
        payload: row.bytes("payload")?.into(),
        enqueued_at: row.at("enqueued_at")?,
    }))
}
