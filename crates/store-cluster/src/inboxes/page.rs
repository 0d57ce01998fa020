//! Reads of inboxes in Postgres: heads, many in one statement; pages of messages; and all messages
//! of a small inbox, in one snapshot with its head.

use std::collections::{HashMap, HashSet};

use qpq_domain::{Seq, StoreId, UnixMillis};
use qpq_ports::{
    Envelope, PageLimit, Reader, StoreResult, View,
    batcher::{self, BatchSize, BatchWorker, Batcher},
};
use sqlx::{PgConnection, Row as _, postgres::PgRow};

use super::payloads::{payload, size};
use crate::{
    error::PostgresError,
    history::{History, store_id},
    postgres::{
        Database, Repeat, Scope, Statement,
        row::{Columns as _, millis, number},
    },
    redis::queue::{MAX_BYTES, MAX_MESSAGES, Queued, RegistrationId, State},
};

/// Concurrent statements for heads.
const READERS: usize = 2;

/// Returns one row for each device of an inbox, at most [`qpq_domain::MAX_DEVICES`], or one row for
/// an inbox without devices. `OFFSET 0` keeps the search for devices a separate subquery, which is
/// not executed for an inbox without devices. If no inbox is found, the result is one row with the
/// store id and NULLs.
const HEAD: &str = concat!(
    "SELECT s.store_id, h.identity, h.id, h.last_seq, h.removals, h.messages, h.bytes, h.devices,
            h.device, h.registration, h.upto, h.last_seen_at, h.position_lost
       FROM (SELECT ",
    store_id!(),
    " AS store_id) s LEFT JOIN (
        SELECT a.identity, i.id, i.last_seq, coalesce(d.removals, i.removals) AS removals,
               i.messages, i.bytes, i.devices, d.device, d.id AS registration, d.upto,
               d.last_seen_at, d.position_lost
          FROM account a JOIN inbox i ON i.id = a.id
          LEFT JOIN LATERAL (
            SELECT id, device, removals, upto, last_seen_at, position_lost FROM device
             WHERE i.devices > 0 AND account = i.id OFFSET 0) d ON true
         WHERE a.identity = ANY ($1)) h ON true"
);

/// $1 inbox, $2 the seq after which to read, $3 now, $4 rows, $5 the store id, then the
/// registration and the channel, where the condition has them. Returns no rows if the store is in
/// another history, or the registration no longer exists.
macro_rules! messages {
    ($after:literal, $condition:expr) => {
        concat!(
            "SELECT seq, channel, enqueued_at, expires_at, ",
            payload!(),
            " AS payload FROM message m WHERE inbox = $1 AND seq > ",
            $after,
            " AND expires_at > $3 AND $5 = ",
            store_id!(),
            $condition,
            " ORDER BY seq LIMIT $4"
        )
    };
}
/// Returns the SQL of a page of the messages that wait for a device. See [`messages`].
macro_rules! messages_of_device {
    ($condition:literal) => {
        messages!(
            "(SELECT greatest(upto, $2) FROM device WHERE id = $6)",
            concat!(
                " AND NOT EXISTS (
                    SELECT 1 FROM device_done o
                     WHERE o.inbox = $1 AND o.seq = m.seq
                       AND o.device = (SELECT device FROM device WHERE id = $6) OFFSET 0)",
                $condition
            )
        )
    };
}
const ALL: &str = messages!("$2", "");
const CHANNEL: &str = messages!("$2", " AND channel = $6");
const ALL_OF_DEVICE: &str = messages_of_device!("");
const CHANNEL_OF_DEVICE: &str = messages_of_device!(" AND channel = $7");

/// $1 inbox, $2 rows. Without messages, the result is one row with the head and NULLs. Returns no
/// row once the inbox has devices: the single reader's queue has no message that was accepted after
/// the first registration.
const WHOLE: &str = concat!(
    "SELECT ",
    store_id!(),
    " AS store_id, i.last_seq, i.removals, m.seq, m.channel, m.enqueued_at, m.expires_at, ",
    payload!(),
    " AS payload, 0::int8 AS total
      FROM inbox i LEFT JOIN LATERAL (
        SELECT seq, channel, enqueued_at, expires_at, payload, payload_id FROM message
         WHERE inbox = $1 ORDER BY seq LIMIT $2) m ON true
     WHERE i.id = $1 AND i.devices = 0"
);

/// Reads the messages that wait for the registration $3. The head does not show their size, since
/// most messages of the inbox may wait for other devices only. If they have more than $4 bytes in
/// total, their payloads are not read. See [`WHOLE`].
const WHOLE_OF_DEVICE: &str = concat!(
    "SELECT ",
    store_id!(),
    " AS store_id, i.last_seq, d.removals, m.seq, m.channel, m.enqueued_at, m.expires_at, m.total,
            CASE WHEN m.total <= $4 THEN ",
    payload!(),
    " END AS payload
      FROM device d JOIN inbox i ON i.id = d.account LEFT JOIN LATERAL (
        SELECT w.*, sum(w.bytes) OVER () AS total FROM (
            SELECT seq, channel, enqueued_at, expires_at, payload, payload_id, ",
    size!(),
    " AS bytes FROM message m
             WHERE m.inbox = $1 AND m.seq > d.upto AND NOT EXISTS (
                SELECT 1 FROM device_done o
                 WHERE o.inbox = $1 AND o.seq = m.seq AND o.device = d.device OFFSET 0)
             ORDER BY seq LIMIT $2) w) m ON true
     WHERE d.id = $3 AND d.account = $1"
);

/// Maximum rows in one statement.
const MAX_ROWS: u64 = 1_024;

/// An inbox's head, as one reader sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) inbox: i64,
    /// The state for the reader. Without access, the removals belong to no reader.
    pub(crate) state: State,
    pub(crate) messages: u64,
    pub(crate) bytes: u64,
    pub(crate) access: Access,
}

/// The access of a reader to an inbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// The inbox has no devices and is read by its single reader.
    Single,
    /// The inbox is read by one of its devices.
    Device(Position),
    /// The inbox has devices, and the reader is none of them.
    Refused,
}

/// The position of a device in an inbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Position {
    pub(crate) registration: RegistrationId,
    pub(crate) upto: u64,
    pub(crate) last_seen_at: UnixMillis,
    /// True if the position was moved and the device has not confirmed the new one.
    pub(crate) is_lost: bool,
}

impl Head {
    /// Returns the registration that reads; `None` for the single reader.
    pub(super) fn registration(&self) -> Option<RegistrationId> {
        match self.access {
            Access::Device(position) => Some(position.registration),
            Access::Single | Access::Refused => None,
        }
    }

    /// Returns whether, by the counts of the head, all messages that wait for the reader may fit a
    /// queue.
    pub(super) fn may_be_queue(&self) -> bool {
        let is_small = self.messages <= MAX_MESSAGES && self.bytes <= MAX_BYTES;
        match self.access {
            // Messages up to `upto` do not wait for this device.
            Access::Device(Position { upto, .. }) => {
                is_small || self.state.head.saturating_sub(upto) <= MAX_MESSAGES
            }
            Access::Single | Access::Refused => is_small,
        }
    }
}

/// The readers of heads, which read those of concurrent calls by one statement. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Heads(Batcher<Call>);

type Call = batcher::Call<Reader, StoreResult<Present>>;

/// An inbox's head, and the history in which it was read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Present {
    pub(super) store_id: StoreId,
    /// The head; `None` if the inbox does not exist.
    pub(super) head: Option<Head>,
}

impl Heads {
    /// Starts the readers. Needs a tokio runtime.
    pub(crate) fn start(database: &Database, history: &History) -> Self {
        let start = |_| HeadReader { database: database.clone(), history: history.clone() };
        Self(Batcher::start((0..READERS).map(start)))
    }

    /// Returns the head of the reader's inbox.
    pub(super) async fn get(&self, reader: &Reader) -> StoreResult<Present> {
        self.0.call(*reader).await
    }

    /// Answers the calls that wait, and ends.
    pub(crate) async fn close(&self) {
        self.0.close().await;
    }
}

struct HeadReader {
    database: Database,
    history: History,
}

impl BatchWorker for HeadReader {
    type Item = Call;

    const LIMIT: BatchSize = BatchSize { count: 512, bytes: usize::MAX };

    async fn run(&mut self, calls: Vec<Call>) {
        let readers: HashSet<_> = calls.iter().map(|call| call.item).collect();
        let readers: Vec<_> = readers.into_iter().collect();
        let found = heads(&self.database, &self.history, &readers).await;
        for Call { item: reader, answer } in calls {
            answer.send(match &found {
                Ok((store_id, heads)) => {
                    Ok(Present { store_id: *store_id, head: heads.get(&reader).copied() })
                }
                Err(error) => Err(error.clone().into()),
            });
        }
    }
}

/// Returns the heads of the inboxes that exist, and the history in which they were read.
pub(crate) async fn heads(
    database: &Database,
    history: &History,
    readers: &[Reader],
) -> Result<(StoreId, HashMap<Reader, Head>), PostgresError> {
    let (store_id, heads) = database.run(&ReadHeads(readers)).await?;
    history.note(store_id);
    Ok((store_id, heads))
}

struct ReadHeads<'a>(&'a [Reader]);

impl Statement for ReadHeads<'_> {
    type Output = (StoreId, HashMap<Reader, Head>);

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "heads"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Self::Output> {
        let inboxes: HashSet<_> = self.0.iter().map(|reader| reader.inbox).collect();
        let keys: Vec<&[u8]> = inboxes.iter().map(|key| &key.as_bytes()[..]).collect();
        let rows = sqlx::query(HEAD).bind(keys).fetch_all(connection).await?;
        let store_id = rows.first().ok_or(sqlx::Error::RowNotFound)?.store_id("store_id")?;
        let mut heads = HashMap::with_capacity(rows.len());
        for row in &rows {
            if let Some((reader, head)) = head(row)? {
                heads.insert(reader, head);
                if reader.device.is_some() {
                    let refused = Head { access: Access::Refused, ..head };
                    heads.entry(Reader::single(reader.inbox)).or_insert(refused);
                }
            }
        }
        let of_reader = |reader: &Reader| {
            // A device that is not registered gets the head of a reader without a device.
            let head = heads.get(reader).or_else(|| heads.get(&Reader::single(reader.inbox)))?;
            Some((*reader, *head))
        };
        let heads = self.0.iter().filter_map(of_reader).collect();
        Ok((store_id, heads))
    }
}

/// Returns the reader and the head of a row. Without a device in the row, the reader has none.
fn head(row: &PgRow) -> sqlx::Result<Option<(Reader, Head)>> {
    let Some(inbox) = row.try_get("id")? else { return Ok(None) };
    let head = Head {
        inbox,
        state: state(row)?,
        messages: row.unsigned("messages")?,
        bytes: row.unsigned("bytes")?,
        access: access(row)?,
    };
    Ok(Some((Reader { inbox: row.identity("identity")?, device: row.device("device")? }, head)))
}

fn access(row: &PgRow) -> sqlx::Result<Access> {
    let (devices, registration): (i16, Option<i64>) =
        (row.try_get("devices")?, row.try_get("registration")?);
    Ok(match registration {
        Some(registration) => Access::Device(Position {
            registration: RegistrationId(registration),
            upto: row.unsigned("upto")?,
            last_seen_at: row.at("last_seen_at")?,
            is_lost: row.try_get("position_lost")?,
        }),
        None if devices == 0 => Access::Single,
        None => Access::Refused,
    })
}

/// The messages of a view in one state of its inbox, leased or not, up to the limit.
#[derive(Clone, Debug)]
pub(super) struct Snapshot {
    pub(super) state: State,
    pub(super) messages: Vec<Queued>,
    /// The seq of the first message after the limit.
    pub(super) next: Option<Seq>,
}

/// Returns the messages of the view after `after` that have not expired at `now`. The state is that
/// of `head`, which was read before. Messages that were removed since then may be among the result.
pub(super) async fn page(
    database: &Database,
    head: &Head,
    view: View,
    after: Seq,
    limit: PageLimit,
    now: UnixMillis,
) -> StoreResult<Snapshot> {
    let rows = chunk(head, limit);
    let mut page = Snapshot { state: head.state, messages: Vec::new(), next: None };
    let (mut bytes, mut after) = (0_usize, after);
    loop {
        let (inbox, registration, store_id) =
            (head.inbox, head.registration(), head.state.store_id);
        let read = ReadMessages { inbox, registration, store_id, view, after, now, rows };
        let messages = database.run(&read).await?;
        let last = (messages.len() as u64) < rows;
        for queued in messages {
            bytes = bytes.saturating_add(queued.envelope.cost());
            let shown = page.messages.len();
            if shown >= usize::try_from(limit.messages).unwrap_or(usize::MAX)
                || (bytes > limit.bytes && shown > 0)
            {
                page.next = Some(queued.envelope.seq);
                return Ok(page);
            }
            after = queued.envelope.seq;
            page.messages.push(queued);
        }
        if last {
            return Ok(page);
        }
    }
}

/// Estimates the rows of the page from the average size of the inbox's messages. An inbox may have
/// ten thousand messages, and a page of 1 MiB messages ends after four.
fn chunk(head: &Head, limit: PageLimit) -> u64 {
    let size = head.bytes / head.messages.max(1) + 64;
    let fit = limit.bytes as u64 / size + 2;
    fit.min(u64::from(limit.messages) + 1).clamp(2, MAX_ROWS)
}

/// Reads messages of a view in the history of its head.
struct ReadMessages {
    inbox: i64,
    registration: Option<RegistrationId>,
    store_id: StoreId,
    view: View,
    after: Seq,
    now: UnixMillis,
    rows: u64,
}

impl Statement for ReadMessages {
    type Output = Vec<Queued>;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "page"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Vec<Queued>> {
        let channel = match &self.view {
            View::All => None,
            View::Channel(channel) => Some(channel.as_bytes()),
        };
        let sql = match (self.registration, channel) {
            (None, None) => ALL,
            (None, Some(_)) => CHANNEL,
            (Some(_), None) => ALL_OF_DEVICE,
            (Some(_), Some(_)) => CHANNEL_OF_DEVICE,
        };
        let mut query = sqlx::query(sql)
            .bind(self.inbox)
            .bind(number(self.after.0))
            .bind(millis(self.now))
            .bind(number(self.rows))
            .bind(&self.store_id.as_bytes()[..]);
        if let Some(RegistrationId(registration)) = self.registration {
            query = query.bind(registration);
        }
        if let Some(channel) = channel {
            query = query.bind(channel);
        }
        query.fetch_all(connection).await?.iter().map(queued).collect()
    }
}

/// All messages that wait for a reader.
#[derive(Debug)]
pub(super) enum Whole {
    /// The messages fit in one queue, expired ones included.
    Small(Snapshot),
    /// The messages do not fit in one queue.
    Large,
    /// The reader no longer exists.
    NoReader,
}

/// Returns all messages that wait for the reader of the head, if they fit in one queue.
pub(super) async fn whole(database: &Database, head: &Head) -> StoreResult<Whole> {
    let read = ReadInbox { inbox: head.inbox, registration: head.registration() };
    Ok(database.run(&read).await?)
}

struct ReadInbox {
    inbox: i64,
    registration: Option<RegistrationId>,
}

impl Statement for ReadInbox {
    type Output = Whole;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "load"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Whole> {
        let sql = if self.registration.is_some() { WHOLE_OF_DEVICE } else { WHOLE };
        let mut query = sqlx::query(sql).bind(self.inbox).bind(number(MAX_MESSAGES) + 1);
        if let Some(RegistrationId(registration)) = self.registration {
            query = query.bind(registration).bind(number(MAX_BYTES));
        }
        let rows = query.fetch_all(connection).await?;
        let Some(first) = rows.first() else { return Ok(Whole::NoReader) };
        let size = first.try_get::<Option<i64>, _>("total")?.unwrap_or_default();
        if rows.len() as u64 > MAX_MESSAGES || size > number(MAX_BYTES) {
            return Ok(Whole::Large);
        }
        let mut snapshot = Snapshot { state: state(first)?, messages: Vec::new(), next: None };
        for row in &rows {
            if row.try_get::<Option<i64>, _>("seq")?.is_some() {
                snapshot.messages.push(queued(row)?);
            }
        }
        Ok(Whole::Small(snapshot))
    }
}

fn state(row: &PgRow) -> sqlx::Result<State> {
    Ok(State {
        store_id: row.store_id("store_id")?,
        head: row.unsigned("last_seq")?,
        removals: row.unsigned("removals")?,
    })
}

fn queued(row: &PgRow) -> sqlx::Result<Queued> {
    Ok(Queued {
        envelope: Envelope {
            seq: row.seq("seq")?,
            channel: row.channel("channel")?,
            payload: row.bytes("payload")?.into(),
            enqueued_at: row.at("enqueued_at")?,
        },
        expires_at: row.at("expires_at")?,
    })
}
