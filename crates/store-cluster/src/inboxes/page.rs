//! Reads of inboxes in Postgres: heads, many in one statement, and messages, of which each page is
//! one snapshot together with its head.

use std::collections::HashMap;

use qpq_domain::{IdentityKey, Seq, StoreId, UnixMillis};
use qpq_ports::{
    Envelope, PageLimit, ReadQuery, Reader, StoreResult, View,
    batcher::{self, BatchSize, BatchWorker, Batcher},
};
use sqlx::{PgConnection, Row as _, postgres::PgRow};

use crate::{
    error::PostgresError,
    history::{History, store_id},
    postgres::{
        Database, Repeat, Scope, Statement,
        row::{Columns as _, millis, number},
    },
    redis::queue::{MAX_MESSAGES, Queued, State},
};

/// Concurrent statements for heads.
const READERS: usize = 2;

/// The store id is alone in its row where there is no such inbox.
const HEAD: &str = concat!(
    "SELECT s.store_id, h.identity, h.id, h.last_seq, h.removals, h.messages, h.bytes
       FROM (SELECT ",
    store_id!(),
    " AS store_id) s LEFT JOIN (
        SELECT a.identity, i.id, i.last_seq, i.removals, i.messages, i.bytes
          FROM account a JOIN inbox i ON i.id = a.id WHERE a.identity = ANY ($1)) h ON true"
);

/// $1 inbox, $2 after which seq, $3 now, $4 rows, $5 the store id, $6 the channel. Returns no rows
/// of another history.
macro_rules! messages {
    ($condition:literal) => {
        concat!(
            "SELECT seq, channel, enqueued_at, expires_at, payload FROM message
              WHERE inbox = $1 AND seq > $2 AND expires_at > $3 AND $5 = ",
            store_id!(),
            $condition,
            " ORDER BY seq LIMIT $4"
        )
    };
}
const ALL: &str = messages!("");
const CHANNEL: &str = messages!(" AND channel = $6");

/// $1 inbox, $2 rows. The head is alone in its row where there is no message.
const WHOLE: &str = concat!(
    "SELECT ",
    store_id!(),
    " AS store_id, i.last_seq, i.removals, m.seq, m.channel, m.enqueued_at, m.expires_at, m.payload
      FROM inbox i LEFT JOIN LATERAL (
        SELECT seq, channel, enqueued_at, expires_at, payload FROM message
         WHERE inbox = $1 ORDER BY seq LIMIT $2) m ON true
     WHERE i.id = $1"
);

/// Rows in one statement.
const MAX_ROWS: u64 = 1_024;

/// An inbox's head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) inbox: i64,
    pub(crate) state: State,
    pub(crate) messages: u64,
    pub(crate) bytes: u64,
}

/// Reads heads, those of concurrent calls together. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Heads(Batcher<Call>);

type Call = batcher::Call<IdentityKey, StoreResult<Present>>;

/// An inbox's head, and the history that it was read in.
#[derive(Clone, Copy, Debug)]
pub(super) struct Present {
    pub(super) store_id: StoreId,
    /// None if there is no such inbox.
    pub(super) head: Option<Head>,
}

impl Heads {
    /// Starts the readers. Needs a tokio runtime.
    pub(crate) fn start(database: &Database, history: &History) -> Self {
        let start = |_| HeadReader { database: database.clone(), history: history.clone() };
        Self(Batcher::start((0..READERS).map(start)))
    }

    /// Returns the head of the reader's inbox.
    ///
    /// While no inbox has registered devices, every reader of an inbox has its head.
    pub(super) async fn get(&self, reader: &Reader) -> StoreResult<Present> {
        self.0.call(reader.inbox).await
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
        let inboxes: Vec<_> = calls.iter().map(|call| call.item).collect();
        let found = heads(&self.database, &self.history, &inboxes).await;
        for Call { item: inbox, answer } in calls {
            answer.send(match &found {
                Ok((store_id, heads)) => {
                    Ok(Present { store_id: *store_id, head: heads.get(&inbox).copied() })
                }
                Err(error) => Err(error.clone().into()),
            });
        }
    }
}

/// Returns the heads of those inboxes that exist, and the history that they were read in.
pub(crate) async fn heads(
    database: &Database,
    history: &History,
    inboxes: &[IdentityKey],
) -> Result<(StoreId, HashMap<IdentityKey, Head>), PostgresError> {
    let (store_id, heads) = database.run(&ReadHeads(inboxes)).await?;
    history.note(store_id);
    Ok((store_id, heads))
}

struct ReadHeads<'a>(&'a [IdentityKey]);

impl Statement for ReadHeads<'_> {
    type Output = (StoreId, HashMap<IdentityKey, Head>);

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "heads"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Self::Output> {
        let keys: Vec<&[u8]> = self.0.iter().map(|key| &key.as_bytes()[..]).collect();
        let rows = sqlx::query(HEAD).bind(keys).fetch_all(connection).await?;
        let store_id = rows.first().ok_or(sqlx::Error::RowNotFound)?.store_id("store_id")?;
        let heads = rows.iter().filter_map(|row| head(row).transpose());
        Ok((store_id, heads.collect::<sqlx::Result<_>>()?))
    }
}

fn head(row: &PgRow) -> sqlx::Result<Option<(IdentityKey, Head)>> {
    let Some(inbox) = row.try_get("id")? else { return Ok(None) };
    let head = Head {
        inbox,
        state: state(row)?,
        messages: row.unsigned("messages")?,
        bytes: row.unsigned("bytes")?,
    };
    Ok(Some((row.identity("identity")?, head)))
}

/// The messages of a view in one state of its inbox, leased or not, up to the limit.
#[derive(Clone, Debug)]
pub(super) struct Snapshot {
    pub(super) state: State,
    pub(super) messages: Vec<Queued>,
    /// The first message after the limit.
    pub(super) next: Option<Seq>,
}

/// Returns the messages of the view after `after` that have not expired at `now`. The state is that
/// before all of them: messages that were removed since may be among them.
pub(super) async fn page(
    database: &Database,
    head: &Head,
    read: &ReadQuery,
    after: Seq,
    limit: PageLimit,
    now: UnixMillis,
) -> StoreResult<Snapshot> {
    let rows = chunk(head, limit);
    let mut page = Snapshot { state: head.state, messages: Vec::new(), next: None };
    let (mut bytes, mut after) = (0_usize, after);
    loop {
        let (inbox, store_id, view) = (head.inbox, head.state.store_id, read.view);
        let read = ReadMessages { inbox, store_id, view, after, now, rows };
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

/// Returns about the number of rows that the page will have: an inbox has up to ten thousand
/// messages, and a page ends after four of a MiB.
fn chunk(head: &Head, limit: PageLimit) -> u64 {
    let size = head.bytes / head.messages.max(1) + 64;
    let fit = limit.bytes as u64 / size + 2;
    fit.min(u64::from(limit.messages) + 1).clamp(2, MAX_ROWS)
}

/// Reads messages of a view in the history of its head.
struct ReadMessages {
    inbox: i64,
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
        let (sql, channel) = match &self.view {
            View::All => (ALL, None),
            View::Channel(channel) => (CHANNEL, Some(channel.as_bytes())),
        };
        let mut query = sqlx::query(sql)
            .bind(self.inbox)
            .bind(number(self.after.0))
            .bind(millis(self.now))
            .bind(number(self.rows))
            .bind(&self.store_id.as_bytes()[..]);
        if let Some(channel) = channel {
            query = query.bind(channel);
        }
        query.fetch_all(connection).await?.iter().map(queued).collect()
    }
}

/// Returns a whole inbox, expired messages included, if it exists and is small enough to be a
/// queue.
pub(super) async fn whole(database: &Database, inbox: i64) -> StoreResult<Option<Snapshot>> {
    let snapshot = database.run(&ReadInbox(inbox)).await?;
    Ok(snapshot.filter(|snapshot| snapshot.messages.len() as u64 <= MAX_MESSAGES))
}

struct ReadInbox(i64);

impl Statement for ReadInbox {
    type Output = Option<Snapshot>;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "load"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Option<Snapshot>> {
        let rows = sqlx::query(WHOLE)
            .bind(self.0)
            .bind(number(MAX_MESSAGES) + 1)
            .fetch_all(connection)
            .await?;
        let Some(first) = rows.first() else { return Ok(None) };
        let mut snapshot = Snapshot { state: state(first)?, messages: Vec::new(), next: None };
        for row in &rows {
            if row.try_get::<Option<i64>, _>("seq")?.is_some() {
                snapshot.messages.push(queued(row)?);
            }
        }
        Ok(Some(snapshot))
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
