//! Reading inboxes in Postgres: heads, many in one statement, and messages, each page one snapshot
//! with its head.

use std::{collections::HashMap, sync::Arc};

use qpq_domain::{IdentityKey, Seq, StoreId, UnixMillis};
use qpq_ports::{Envelope, PageLimit, ReadQuery, StoreError, StoreResult, View};
use sqlx::{Row as _, postgres::PgRow};
use tokio::sync::{mpsc, oneshot};

use crate::{
    error::Shared,
    history::{History, store_id},
    postgres::{
        Database, Repeat,
        row::{Columns as _, millis, number},
    },
    redis::queue::{MOST_MESSAGES, Queued, State},
};

/// Heads in one statement.
pub(super) const HEADS: usize = 512;
/// Statements for heads at a time.
const READERS: usize = 2;

/// The store id stands alone where there is no such inbox.
const HEAD: &str = concat!(
    "SELECT s.store_id, h.identity, h.id, h.last_seq, h.removals, h.messages, h.bytes
       FROM (SELECT ",
    store_id!(),
    " AS store_id) s LEFT JOIN (
        SELECT a.identity, i.id, i.last_seq, i.removals, i.messages, i.bytes
          FROM account a JOIN inbox i ON i.id = a.id WHERE a.identity = ANY ($1)) h ON true"
);

/// $1 inbox, $2 after which seq, $3 now, $4 rows, $5 the store id, $6 the channel. Of another
/// history there are no rows.
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

/// $1 inbox, $2 rows. The head stands alone where there is no message.
const WHOLE: &str = concat!(
    "SELECT ",
    store_id!(),
    " AS store_id, i.last_seq, i.removals, m.seq, m.channel, m.enqueued_at, m.expires_at, m.payload
      FROM inbox i LEFT JOIN LATERAL (
        SELECT seq, channel, enqueued_at, expires_at, payload FROM message WHERE inbox = $1 ORDER BY seq LIMIT $2) m
        ON true
     WHERE i.id = $1"
);

/// Rows in one statement.
const MOST_ROWS: u64 = 1_024;

/// An inbox's head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) inbox: i64,
    pub(crate) state: State,
    pub(crate) messages: u64,
    pub(crate) bytes: u64,
}

/// Looks heads up, those that are asked for at a time together.
#[derive(Clone, Debug)]
pub(crate) struct Heads {
    ask: mpsc::UnboundedSender<Asked>,
}

#[derive(Debug)]
struct Asked {
    inbox: IdentityKey,
    answer: oneshot::Sender<StoreResult<Present>>,
}

/// An inbox's head, and the history that it was read in.
#[derive(Clone, Copy, Debug)]
pub(super) struct Present {
    pub(super) store_id: StoreId,
    /// None if there is no such inbox.
    pub(super) head: Option<Head>,
}

#[derive(Debug, thiserror::Error)]
#[error("the store is closed")]
struct Closed;

impl Heads {
    /// Needs a tokio runtime, on which it works as long as somebody has it.
    pub(super) fn start(database: &Database, history: &History) -> Self {
        let (ask, asked) = mpsc::unbounded_channel();
        let asked = Arc::new(tokio::sync::Mutex::new(asked));
        for _ in 0..READERS {
            tokio::spawn(look_up(database.clone(), history.clone(), Arc::clone(&asked)));
        }
        Self { ask }
    }

    /// Returns the head of the inbox.
    pub(super) async fn get(&self, inbox: &IdentityKey) -> StoreResult<Present> {
        let (answer, head) = oneshot::channel();
        self.ask
            .send(Asked { inbox: *inbox, answer })
            .map_err(|_| StoreError::unavailable(Closed))?;
        head.await.unwrap_or_else(|_| Err(StoreError::unavailable(Closed)))
    }
}

async fn look_up(
    database: Database,
    history: History,
    asked: Arc<tokio::sync::Mutex<mpsc::UnboundedReceiver<Asked>>>,
) {
    let mut batch = Vec::with_capacity(HEADS);
    loop {
        // Held while it waits: the other reader is then at work, or has nothing to do either.
        if asked.lock().await.recv_many(&mut batch, HEADS).await == 0 {
            return;
        }
        let inboxes: Vec<_> = batch.iter().map(|asked| asked.inbox).collect();
        let found = heads(&database, &history, &inboxes).await;
        for Asked { inbox, answer } in batch.drain(..) {
            let head = match &found {
                Ok((store_id, heads)) => {
                    Ok(Present { store_id: *store_id, head: heads.get(&inbox).copied() })
                }
                Err(error) => Err(error.clone().into()),
            };
            // Whoever gave up changes nothing.
            let _ = answer.send(head);
        }
    }
}

/// Returns the heads of those inboxes that exist, and the history that they were read in.
pub(crate) async fn heads(
    database: &Database,
    history: &History,
    inboxes: &[IdentityKey],
) -> Result<(StoreId, HashMap<IdentityKey, Head>), Shared> {
    let keys: Vec<Vec<u8>> = inboxes.iter().map(|key| key.as_bytes().to_vec()).collect();
    let keys = Arc::new(keys);
    let rows = database
        .once_shared("heads", Repeat::Harmless, move |connection| {
            let keys = Arc::clone(&keys);
            Box::pin(async move { sqlx::query(HEAD).bind(&keys[..]).fetch_all(connection).await })
        })
        .await?;
    let first = rows.first().ok_or(sqlx::Error::RowNotFound)?;
    let store_id = first.store_id("store_id")?;
    history.note(store_id);
    let heads = rows.iter().filter_map(|row| head(row).transpose()).collect::<sqlx::Result<_>>()?;
    Ok((store_id, heads))
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

/// What a view held in one state of its inbox, leased or not, as far as the limit goes.
#[derive(Clone, Debug)]
pub(super) struct Snapshot {
    pub(super) state: State,
    pub(super) messages: Vec<Queued>,
    /// The first message behind the limit.
    pub(super) next: Option<Seq>,
}

/// The messages of the view behind `after` that are alive at `now`. The state is the one before all
/// of them: what was removed since may be among them.
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
        let messages = messages(database, head, read.view, after, now, rows).await?;
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

/// About as many rows as the page will have: an inbox holds ten thousand messages, and a page ends
/// after four of a MiB.
fn chunk(head: &Head, limit: PageLimit) -> u64 {
    let size = head.bytes / head.messages.max(1) + 64;
    let fit = limit.bytes as u64 / size + 2;
    fit.min(u64::from(limit.messages) + 1).clamp(2, MOST_ROWS)
}

async fn messages(
    database: &Database,
    head: &Head,
    view: View,
    after: Seq,
    now: UnixMillis,
    rows: u64,
) -> StoreResult<Vec<Queued>> {
    let (inbox, store_id) = (head.inbox, head.state.store_id);
    database
        .once("page", Repeat::Harmless, move |connection| {
            Box::pin(async move {
                let (sql, channel) = match &view {
                    View::All => (ALL, None),
                    View::Channel(channel) => (CHANNEL, Some(channel.as_bytes())),
                };
                let mut query = sqlx::query(sql)
                    .bind(inbox)
                    .bind(number(after.0))
                    .bind(millis(now))
                    .bind(number(rows))
                    .bind(&store_id.as_bytes()[..]);
                if let Some(channel) = channel {
                    query = query.bind(channel);
                }
                query.fetch_all(connection).await?.iter().map(queued).collect()
            })
        })
        .await
}

/// Returns a whole inbox, expired messages and all, if it is there and small enough to be a queue.
pub(super) async fn whole(database: &Database, inbox: i64) -> StoreResult<Option<Snapshot>> {
    let snapshot: Option<Snapshot> = database
        .once("load", Repeat::Harmless, move |connection| {
            Box::pin(async move {
                let rows = sqlx::query(WHOLE)
                    .bind(inbox)
                    .bind(number(MOST_MESSAGES) + 1)
                    .fetch_all(connection)
                    .await?;
                let Some(first) = rows.first() else { return Ok(None) };
                let mut snapshot =
                    Snapshot { state: state(first)?, messages: Vec::new(), next: None };
                for row in &rows {
                    if row.try_get::<Option<i64>, _>("seq")?.is_some() {
                        snapshot.messages.push(queued(row)?);
                    }
                }
                Ok(Some(snapshot))
            })
        })
        .await?;
    Ok(snapshot.filter(|snapshot| snapshot.messages.len() as u64 <= MOST_MESSAGES))
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
