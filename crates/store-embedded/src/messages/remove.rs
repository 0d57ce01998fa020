//! The removal of messages. Each removal remembers the ids of its selection for a while, deletes
//! the messages, and updates the counts of the inboxes, in one transaction. The first two are
//! statements with the same condition. The third is a trigger.
//!
//! A message in an inbox with devices is deleted once it waits for none of them (`position`).

use std::time::Duration;

use qpq_domain::{Seq, UnixMillis};
use qpq_ports::{NewMessage, View};
use sqlx::{SqliteConnection, query::Query, sqlite::SqliteArguments};

use crate::row::{millis, millis_of, number};

/// Maximum rows that one statement of a sweep removes. Small, because an enqueue may have to wait
/// for the statement.
pub(crate) const SWEEP_ROWS: i64 = 256;

/// A removal of messages, and the times of remembering their ids.
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
    /// Messages that the single reader names, if the inbox has no devices.
    Named(Named<'a>),
    /// Messages that wait for no device, of those that a device names.
    Unread(Named<'a>),
    /// Messages of an inbox with devices that wait for none of them, after one seq and up to
    /// another.
    AllUnread { inbox: i64, after: Seq, to: Seq },
    /// Expired messages of an inbox: up to `rows`, and one with the message id of `conflict`.
    Expired { inbox: i64, rows: i64, conflict: &'a NewMessage },
    /// Up to `rows` expired messages of any inbox.
    AnyExpired { rows: i64 },
}

/// Messages of a view that have not expired at an instant.
#[derive(Clone, Copy)]
pub(crate) struct Named<'a> {
    pub(crate) inbox: i64,
    pub(crate) view: View,
    pub(crate) seqs: Seqs<'a>,
    pub(crate) alive_at: UnixMillis,
}

#[derive(Clone, Copy)]
pub(crate) enum Seqs<'a> {
    Range { from: Seq, to: Seq },
    List(&'a [Seq]),
}

impl Removal<'_> {
    /// Removes the messages. Returns their number.
    pub(crate) async fn run(&self, connection: &mut SqliteConnection) -> sqlx::Result<u64> {
        let statements = self.selection.statements();
        let list = match &self.selection {
            Selection::Named(named) | Selection::Unread(named) => named.list(),
            _ => String::new(),
        };
        self.bind(sqlx::query(statements.remember), &list).execute(&mut *connection).await?;
        let deleted = self.bind(sqlx::query(statements.delete), &list).execute(connection).await?;
        Ok(deleted.rows_affected())
    }

    fn bind<'q>(&'q self, query: SqliteQuery<'q>, list: &'q str) -> SqliteQuery<'q> {
        let query = query.bind(millis(self.at)).bind(millis_of(self.recent_ids));
        match &self.selection {
            Selection::Named(named) | Selection::Unread(named) => named.bind(query, list),
            Selection::AllUnread { inbox, after, to } => {
                query.bind(inbox).bind(number(after.0)).bind(number(to.0))
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
            Self::Named(named) => named.choose(&NAMED),
            Self::Unread(named) => named.choose(&UNREAD),
            Self::AllUnread { .. } => &ALL_UNREAD,
            Self::Expired { .. } => &EXPIRED,
            Self::AnyExpired { .. } => &ANY_EXPIRED,
        }
    }
}

impl<'a> Named<'a> {
    /// Returns the statement for the kind of view and of seqs.
    pub(super) fn choose<T>(&self, statements: &'static ForNamed<T>) -> &'static T {
        match (&self.view, self.seqs) {
            (View::All, Seqs::Range { .. }) => &statements.range,
            (View::Channel(_), Seqs::Range { .. }) => &statements.channel_range,
            (View::All, Seqs::List(_)) => &statements.list,
            (View::Channel(_), Seqs::List(_)) => &statements.channel_list,
        }
    }

    /// Returns a list of seqs as a JSON array, because SQLite binds no lists.
    pub(super) fn list(&self) -> String {
        let Seqs::List(seqs) = self.seqs else { return String::new() };
        let seqs: Vec<_> = seqs.iter().map(|seq| seq.0.to_string()).collect();
        format!("[{}]", seqs.join(","))
    }

    /// Binds ?3 to ?7. `list` is the result of [`Named::list`].
    pub(super) fn bind<'q>(&'q self, query: SqliteQuery<'q>, list: &'q str) -> SqliteQuery<'q> {
        let channel = match &self.view {
            View::All => None,
            View::Channel(channel) => Some(channel.as_bytes()),
        };
        let query = query.bind(self.inbox).bind(millis(self.alive_at)).bind(channel);
        match self.seqs {
            Seqs::Range { from, to } => query.bind(number(from.0)).bind(number(to.0)),
            Seqs::List(_) => query.bind(list).bind(None::<i64>),
        }
    }
}

/// One statement for each kind of view and of seqs of [`Named`].
pub(super) struct ForNamed<T> {
    pub(super) range: T,
    pub(super) channel_range: T,
    pub(super) list: T,
    pub(super) channel_list: T,
}

#[cfg(test)]
impl<T> ForNamed<T> {
    pub(super) fn each(&self) -> [&T; 4] {
        [&self.range, &self.channel_range, &self.list, &self.channel_list]
    }
}

/// Creates a [`ForNamed`] by a macro whose argument is the condition for the messages.
///
/// ?3 inbox, ?4 not expired at, ?5 channel; ?6 the first and ?7 the last seq, or ?6 the seqs as a
/// JSON array.
macro_rules! for_named {
    ($statement:ident) => {
        ForNamed {
            range: $statement!("inbox = ?3 AND seq BETWEEN ?6 AND ?7 AND +expires_at > ?4"),
            channel_range: $statement!(
                "inbox = ?3 AND channel = ?5 AND seq BETWEEN ?6 AND ?7 AND +expires_at > ?4"
            ),
            list: $statement!(
                "inbox = ?3 AND seq IN (SELECT value FROM json_each(?6)) AND +expires_at > ?4"
            ),
            channel_list: $statement!(
                "inbox = ?3 AND channel = ?5 AND seq IN (SELECT value FROM json_each(?6))
                 AND +expires_at > ?4"
            ),
        }
    };
}
pub(super) use for_named;

/// The condition for a message of the inbox ?3 that waits for no device.
macro_rules! unread {
    () => {
        " AND NOT EXISTS (
              SELECT 1 FROM device r
               WHERE r.account = ?3 AND r.upto < message.seq
                 AND NOT EXISTS (SELECT 1 FROM device_done d
                                  WHERE d.inbox = ?3 AND d.seq = message.seq
                                    AND d.device = r.device))"
    };
}

/// The two statements of a removal. A trigger on the second one updates the counts of the inbox.
///
/// ?1 is the instant of the removal and ?2 the time for which ids are remembered.
struct Statements {
    remember: &'static str,
    delete: &'static str,
}

macro_rules! statements {
    ($($condition:expr),+) => {
        Statements {
            remember: concat!(
                "INSERT OR REPLACE INTO recent_id
                     (inbox, sender, message_id, seq, channel, payload_sha256, enqueued_at,
                      forget_at)
                 SELECT inbox, sender, message_id, seq, channel, payload_sha256, enqueued_at,
                        min(?1, expires_at) + ?2
                   FROM message WHERE message_id IS NOT NULL AND +expires_at > ?1 - ?2 AND ",
                $($condition),+
            ),
            delete: concat!("DELETE FROM message WHERE ", $($condition),+),
        }
    };
}

macro_rules! without_devices {
    ($condition:literal) => {
        statements!($condition, " AND (SELECT devices FROM inbox WHERE id = ?3) = 0")
    };
}
static NAMED: ForNamed<Statements> = for_named!(without_devices);

macro_rules! of_no_device {
    ($condition:literal) => {
        statements!($condition, unread!())
    };
}
static UNREAD: ForNamed<Statements> = for_named!(of_no_device);

// ?3 inbox, ?4 the seq after which the messages begin, ?5 the last seq.
static ALL_UNREAD: Statements = statements!("inbox = ?3 AND seq > ?4 AND seq <= ?5", unread!());

// ?3 inbox, ?4 rows, ?5 sender and ?6 message id of one more message. The index by channel has all
// columns of the condition; the index by expiry would visit other inboxes.
static EXPIRED: Statements = statements!(
    "(id IN (SELECT id FROM message WHERE inbox = ?3 AND +expires_at <= ?1 LIMIT +?4)
      OR id = (SELECT id FROM message
                WHERE inbox = ?3 AND sender = ?5 AND message_id = ?6 AND +expires_at <= ?1))"
);

// ?3 rows.
static ANY_EXPIRED: Statements = statements!(
    "id IN (SELECT id FROM message WHERE expires_at <= ?1 ORDER BY expires_at LIMIT +?3)"
);

const NEXT_EXPIRY: &str = "
    UPDATE inbox SET next_expiry = coalesce(
        (SELECT min(+expires_at) FROM message WHERE inbox = ?1), 9223372036854775807) WHERE id = ?1";

const FORGET: &str = "
    DELETE FROM recent_id WHERE (inbox, sender, message_id) IN (
        SELECT inbox, sender, message_id FROM recent_id
         WHERE forget_at <= ?1 ORDER BY forget_at LIMIT +?2)";

#[cfg(test)]
pub(super) fn statements() -> impl Iterator<Item = &'static str> {
    let named = NAMED.each().into_iter().chain(UNREAD.each());
    named
        .chain([&ALL_UNREAD, &EXPIRED, &ANY_EXPIRED])
        .flat_map(|statements| [statements.remember, statements.delete])
        .chain([NEXT_EXPIRY, FORGET])
}

/// Stores the earliest expiry of a message in the inbox.
pub(super) async fn find_next_expiry(
    connection: &mut SqliteConnection,
    inbox: i64,
) -> sqlx::Result<()> {
    sqlx::query(NEXT_EXPIRY).bind(inbox).execute(connection).await.map(drop)
}

/// Removes up to [`SWEEP_ROWS`] message ids that no longer need to be remembered. Returns their
/// number.
pub(crate) async fn forget_ids(
    connection: &mut SqliteConnection,
    now: UnixMillis,
) -> sqlx::Result<u64> {
    let done = sqlx::query(FORGET).bind(millis(now)).bind(SWEEP_ROWS).execute(connection).await?;
    Ok(done.rows_affected())
}

pub(super) type SqliteQuery<'q> = Query<'q, sqlx::Sqlite, SqliteArguments>;
