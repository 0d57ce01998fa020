//! The removal of messages. Every removal deletes its selection, remembers the ids for a while, and
//! counts the inboxes down, in one transaction: two statements with one condition, and a trigger.

use std::time::Duration;

use qpq_domain::{Seq, UnixMillis};
use qpq_ports::{NewMessage, View};
use sqlx::{SqliteConnection, query::Query, sqlite::SqliteArguments};

use crate::row::{millis, millis_of, number};

/// Maximum rows that one statement of a sweep removes: an enqueue may have to wait for it.
pub(crate) const SWEEP_ROWS: i64 = 256;

/// A removal of messages, and when it counts as done.
pub(crate) struct Removal<'a> {
    pub(crate) selection: Selection<'a>,
    /// The ids are remembered from this instant, or from the expiry of the message if that is
    /// earlier.
    pub(crate) at: UnixMillis,
    /// The time for which ids are remembered.
    pub(crate) recent_ids: Duration,
}

/// The messages that a removal deletes.
#[derive(Clone, Copy)]
pub(crate) enum Selection<'a> {
    /// Messages of a view that have not expired at an instant.
    Range { inbox: i64, view: View, from: Seq, to: Seq, alive_at: UnixMillis },
    /// Single messages of a view that have not expired at an instant.
    Seqs { inbox: i64, view: View, seqs: &'a [Seq], alive_at: UnixMillis },
    /// Expired messages of an inbox: up to `rows`, and the one with the message id of `conflict`.
    Expired { inbox: i64, rows: i64, conflict: &'a NewMessage },
    /// Up to `rows` expired messages of any inbox.
    AnyExpired { rows: i64 },
}

impl Removal<'_> {
    /// Removes the messages. Returns how many.
    pub(crate) async fn run(&self, connection: &mut SqliteConnection) -> sqlx::Result<u64> {
        let statements = self.selection.statements();
        // A JSON array, because SQLite binds no lists.
        let seqs = match self.selection {
            Selection::Seqs { seqs, .. } => json_array(seqs),
            _ => String::new(),
        };
        self.bind(sqlx::query(statements.remember), &seqs).execute(&mut *connection).await?;
        let deleted = self.bind(sqlx::query(statements.delete), &seqs).execute(connection).await?;
        Ok(deleted.rows_affected())
    }

    fn bind<'q>(&'q self, query: SqliteQuery<'q>, seqs: &'q str) -> SqliteQuery<'q> {
        let query = query.bind(millis(self.at)).bind(millis_of(self.recent_ids));
        match &self.selection {
            Selection::Range { inbox, view, from, to, alive_at } => query
                .bind(inbox)
                .bind(millis(*alive_at))
                .bind(number(from.0))
                .bind(number(to.0))
                .bind(channel(view)),
            Selection::Seqs { inbox, view, alive_at, .. } => {
                query.bind(inbox).bind(millis(*alive_at)).bind(seqs).bind(channel(view))
            }
            Selection::Expired { inbox, rows, conflict } => query
                .bind(inbox)
                .bind(rows)
                .bind(&conflict.sender.as_bytes()[..])
                .bind(conflict.message_id.as_ref().map(|id| &id.as_bytes()[..])),
            Selection::AnyExpired { rows } => query.bind(rows),
        }
    }
}

impl Selection<'_> {
    fn statements(&self) -> &'static Statements {
        match self {
            Self::Range { view: View::All, .. } => &RANGE,
            Self::Range { view: View::Channel(_), .. } => &CHANNEL_RANGE,
            Self::Seqs { view: View::All, .. } => &SEQS,
            Self::Seqs { view: View::Channel(_), .. } => &CHANNEL_SEQS,
            Self::Expired { .. } => &EXPIRED,
            Self::AnyExpired { .. } => &ANY_EXPIRED,
        }
    }
}

/// The two statements of a removal. A trigger on the second one counts the inbox down.
///
/// ?1 is the instant of the removal and ?2 the time for which ids are remembered.
struct Statements {
    remember: &'static str,
    delete: &'static str,
}

macro_rules! statements {
    ($condition:literal) => {
        Statements {
            remember: concat!(
                "INSERT OR REPLACE INTO recent_id
                     (inbox, sender, message_id, seq, channel, payload_sha256, enqueued_at,
                      forget_at)
                 SELECT inbox, sender, message_id, seq, channel, payload_sha256, enqueued_at,
                        min(?1, expires_at) + ?2
                   FROM message WHERE message_id IS NOT NULL AND +expires_at > ?1 - ?2 AND ",
                $condition
            ),
            delete: concat!("DELETE FROM message WHERE ", $condition),
        }
    };
}

// ?3 inbox, ?4 not expired at, ?5 first and ?6 last seq, ?7 channel.
static RANGE: Statements = statements!("inbox = ?3 AND seq BETWEEN ?5 AND ?6 AND +expires_at > ?4");
static CHANNEL_RANGE: Statements =
    statements!("inbox = ?3 AND channel = ?7 AND seq BETWEEN ?5 AND ?6 AND +expires_at > ?4");

// ?3 inbox, ?4 not expired at, ?5 the seqs as a JSON array, ?6 channel.
static SEQS: Statements =
    statements!("inbox = ?3 AND seq IN (SELECT value FROM json_each(?5)) AND +expires_at > ?4");
static CHANNEL_SEQS: Statements = statements!(
    "inbox = ?3 AND channel = ?6 AND seq IN (SELECT value FROM json_each(?5)) AND +expires_at > ?4"
);

// ?3 inbox, ?4 rows, ?5 sender and ?6 message id of one more message. The index by channel has all
// columns of the condition; the index by expiry would visit other inboxes.
static EXPIRED: Statements = statements!(
    "(id IN (SELECT id FROM message WHERE inbox = ?3 AND +expires_at <= ?1 LIMIT ?4)
      OR id = (SELECT id FROM message
                WHERE inbox = ?3 AND sender = ?5 AND message_id = ?6 AND +expires_at <= ?1))"
);

// ?3 rows.
static ANY_EXPIRED: Statements = statements!(
    "id IN (SELECT id FROM message WHERE expires_at <= ?1 ORDER BY expires_at LIMIT ?3)"
);

const NEXT_EXPIRY: &str = "
    UPDATE inbox SET next_expiry = coalesce(
        (SELECT min(+expires_at) FROM message WHERE inbox = ?1), 9223372036854775807) WHERE id = ?1";

const FORGET: &str = "
    DELETE FROM recent_id WHERE (inbox, sender, message_id) IN (
        SELECT inbox, sender, message_id FROM recent_id
         WHERE forget_at <= ?1 ORDER BY forget_at LIMIT ?2)";

#[cfg(test)]
pub(super) fn statements() -> impl Iterator<Item = &'static str> {
    [&RANGE, &CHANNEL_RANGE, &SEQS, &CHANNEL_SEQS, &EXPIRED, &ANY_EXPIRED]
        .into_iter()
        .flat_map(|statements| [statements.remember, statements.delete])
        .chain([NEXT_EXPIRY, FORGET])
}

/// Stores when the next message of the inbox expires.
pub(super) async fn find_next_expiry(
    connection: &mut SqliteConnection,
    inbox: i64,
) -> sqlx::Result<()> {
    sqlx::query(NEXT_EXPIRY).bind(inbox).execute(connection).await.map(drop)
}

/// Forgets up to [`SWEEP_ROWS`] message ids whose time is over. Returns how many.
pub(crate) async fn forget_ids(
    connection: &mut SqliteConnection,
    now: UnixMillis,
) -> sqlx::Result<u64> {
    let done = sqlx::query(FORGET).bind(millis(now)).bind(SWEEP_ROWS).execute(connection).await?;
    Ok(done.rows_affected())
}

type SqliteQuery<'q> = Query<'q, sqlx::Sqlite, SqliteArguments>;

fn channel(view: &View) -> Option<&[u8]> {
    match view {
        View::All => None,
        View::Channel(channel) => Some(channel.as_bytes()),
    }
}

fn json_array(seqs: &[Seq]) -> String {
    let seqs: Vec<_> = seqs.iter().map(|seq| seq.0.to_string()).collect();
    format!("[{}]", seqs.join(","))
}
