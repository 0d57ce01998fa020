//! Positions of devices: the messages that a device has completed, and the removal of messages that
//! wait for no device.
//!
//! A message waits for a device if its seq is above the position of the device (`device.upto`) and
//! `device_done` has no row for the message and the device. Messages that are read in order move
//! the position, which is one update for any number of them. Only messages that are read out of
//! order have rows.

use std::time::Duration;

use qpq_domain::{Seq, UnixMillis};
use sqlx::{Row as _, SqliteConnection};

use super::remove::{ForNamed, Named, Removal, Selection, Seqs, SqliteQuery, for_named};
use crate::{
    reader::RegistrationNumber,
    row::{Columns as _, millis, number},
};

/// The completion of messages by a device.
pub(crate) struct Completion<'a> {
    pub(crate) registration: RegistrationNumber,
    pub(crate) named: Named<'a>,
    /// The position does not pass other waiting messages that have not expired at this instant.
    pub(crate) kept_at: UnixMillis,
}

impl Completion<'_> {
    /// Completes the messages that wait for the device. Returns their number; 0 if the registration
    /// was revoked.
    pub(crate) async fn run(
        &self,
        connection: &mut SqliteConnection,
        at: UnixMillis,
        recent_ids: Duration,
    ) -> sqlx::Result<u64> {
        let Some(waiting) = self.waiting(connection).await? else { return Ok(0) };
        self.complete(connection, &waiting).await?;
        if !waiting.is_kept {
            let removal =
                Removal { selection: Selection::Unread(self.among(&waiting)), at, recent_ids };
            removal.run(connection).await?;
        }
        Ok(waiting.count)
    }

    async fn waiting(&self, connection: &mut SqliteConnection) -> sqlx::Result<Option<Waiting>> {
        let list = self.named.list();
        let query = self.bind(sqlx::query(*self.named.choose(&WAITING)), &self.named, &list);
        let row = query.bind(millis(self.kept_at)).fetch_one(connection).await?;
        let count = row.unsigned("waiting")?;
        if count == 0 {
            return Ok(None);
        }
        Ok(Some(Waiting {
            count,
            lowest: row.seq("lowest")?,
            highest: row.seq("highest")?,
            is_in_order: row.try_get("in_order")?,
            is_kept: row.try_get("kept")?,
        }))
    }

    async fn complete(
        &self,
        connection: &mut SqliteConnection,
        waiting: &Waiting,
    ) -> sqlx::Result<()> {
        if waiting.is_in_order {
            let query = sqlx::query(MOVE).bind(self.registration.0);
            return query.bind(number(waiting.highest.0)).execute(connection).await.map(drop);
        }
        let named = self.among(waiting);
        let list = named.list();
        let query = self.bind(sqlx::query(*named.choose(&DONE)), &named, &list);
        query.execute(connection).await.map(drop)
    }

    /// Returns the named messages between the lowest and the highest one that waits.
    fn among(&self, waiting: &Waiting) -> Named<'_> {
        let seqs = match self.named.seqs {
            Seqs::Range { .. } => Seqs::Range { from: waiting.lowest, to: waiting.highest },
            list @ Seqs::List(_) => list,
        };
        Named { seqs, ..self.named }
    }

    /// Binds ?1 to ?8, of which the first two are unused.
    fn bind<'q>(
        &self,
        query: SqliteQuery<'q>,
        named: &'q Named<'q>,
        list: &'q str,
    ) -> SqliteQuery<'q> {
        let unused = None::<i64>;
        named.bind(query.bind(unused).bind(unused), list).bind(self.registration.0)
    }
}

/// The messages of a completion that wait for the device.
struct Waiting {
    count: u64,
    lowest: Seq,
    highest: Seq,
    /// `true` if no other message up to the highest waits for the device.
    is_in_order: bool,
    /// `true` if all of the messages also wait for one other device.
    is_kept: bool,
}

/// The condition for a message of the inbox ?3 that waits for the registration ?8. False if there
/// is no such registration.
macro_rules! waits {
    () => {
        " AND seq > (SELECT upto FROM device WHERE id = ?8)
          AND NOT EXISTS (SELECT 1 FROM device_done d
                           WHERE d.inbox = ?3 AND d.seq = message.seq
                             AND d.device = (SELECT device FROM device WHERE id = ?8))"
    };
}

/// Selects the count, the bounds and the order of the messages that wait. ?9 is
/// [`Completion::kept_at`].
macro_rules! waiting {
    ($condition:literal) => {
        concat!(
            "SELECT waiting, lowest, highest,
                    NOT EXISTS (SELECT 1 FROM message
                                 WHERE inbox = ?3 AND seq < highest AND +expires_at > ?9
                                   AND NOT (",
            $condition,
            ")",
            waits!(),
            ") AS in_order,
                    EXISTS (SELECT 1 FROM device r
                             WHERE r.account = ?3 AND r.id <> ?8 AND r.upto < lowest
                               AND NOT EXISTS (SELECT 1 FROM device_done d
                                                WHERE d.inbox = ?3
                                                  AND d.seq BETWEEN lowest AND highest
                                                  AND d.device = r.device)) AS kept
               FROM (SELECT count(*) AS waiting, min(seq) AS lowest, max(seq) AS highest
                       FROM message WHERE ",
            $condition,
            waits!(),
            ")"
        )
    };
}
static WAITING: ForNamed<&str> = for_named!(waiting);

/// Records that the device has completed the messages.
macro_rules! done {
    ($condition:literal) => {
        concat!(
            "INSERT INTO device_done (inbox, seq, device)
             SELECT inbox, seq, (SELECT device FROM device WHERE id = ?8) FROM message WHERE ",
            $condition,
            waits!()
        )
    };
}
static DONE: ForNamed<&str> = for_named!(done);

/// Moves a device. A trigger deletes its rows in `device_done` up to the position.
pub(crate) const MOVE: &str = "UPDATE device SET upto = ?2 WHERE id = ?1";

#[cfg(test)]
pub(super) fn statements() -> impl Iterator<Item = &'static str> {
    WAITING.each().into_iter().chain(DONE.each()).copied().chain([MOVE])
}
