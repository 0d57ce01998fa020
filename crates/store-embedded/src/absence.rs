//! The last reads of devices, and the positions of devices that are absent too long.
//!
//! The messages of a device that does not read stay queued until the inbox is full. So a sweep
//! moves a device to the newest message if it has not read for a long time and its messages fill
//! more than half of the inbox. The device may not read until its client has confirmed the new
//! position.

use std::time::Duration;

use qpq_domain::{AccountId, DeliveryLimits, DeviceId, IdentityKey, Seq, UnixMillis};
use sqlx::{Row as _, SqliteConnection, SqlitePool, sqlite::SqliteRow};

use crate::{
    clock::Bounds,
    effects::Effects,
    messages::{
        position::MOVE,
        remove::{Removal, SWEEP_ROWS, Selection},
    },
    reader::{InboxReader, RegistrationNumber},
    row::{Columns as _, millis, number},
    statement::{Done, Scope, Statement},
};

/// The precision of the recorded time of a device's last read.
pub(crate) const SEEN_PRECISION: Duration = Duration::from_secs(10 * 60);

/// Records that a device has read.
pub(crate) struct Seen {
    pub(crate) registration: RegistrationNumber,
    pub(crate) at: UnixMillis,
}

const SEEN: &str = "UPDATE device SET last_seen_at = max(last_seen_at, ?2) WHERE id = ?1";

impl Statement for Seen {
    type Answer = ();
    const NAME: &'static str = "note that a device was seen";
    const SCOPE: Scope = Scope::Batch;

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<()>> {
        let query = sqlx::query(SEEN).bind(self.registration.0).bind(millis(self.at));
        query.execute(tx).await?;
        Ok(Done::keep(()))
    }
}

/// Lets a device that was moved read again.
pub(crate) struct ConfirmPosition {
    pub(crate) account: AccountId,
    pub(crate) device: DeviceId,
}

const CONFIRM: &str = "
    UPDATE device SET position_lost = 0
     WHERE account = ?1 AND device = ?2 AND position_lost = 1";

impl Statement for ConfirmPosition {
    type Answer = ();
    const NAME: &'static str = "confirm position";
    const SCOPE: Scope = Scope::Batch;

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<()>> {
        let query = sqlx::query(CONFIRM).bind(self.account.0);
        query.bind(&self.device.as_bytes()[..]).execute(tx).await?;
        Ok(Done::keep(()))
    }
}

/// The condition for moving a device. The device was last seen at ?1 or earlier. In addition, a
/// sweep has begun to move it, or more than ?3 messages or ?4 bytes that have not expired at ?2
/// wait for it. Messages are counted only in an inbox that has more than ?3 messages or ?4 bytes in
/// total.
macro_rules! held_back {
    () => {
        "r.last_seen_at <= ?1 AND r.upto < i.last_seq
         AND (r.position_lost = 1
              OR (i.messages > ?3 OR i.bytes > ?4)
                 AND (SELECT count(*) > ?3 OR sum(m.size) > ?4
                        FROM message m INDEXED BY message_inbox
                       WHERE m.inbox = r.account AND m.seq > r.upto AND +m.expires_at > ?2
                         AND NOT EXISTS (SELECT 1 FROM device_done d
                                          WHERE d.inbox = m.inbox AND d.seq = m.seq
                                            AND d.device = r.device)))"
    };
}

const FIND: &str = concat!(
    "SELECT r.id FROM device r INDEXED BY device_absent CROSS JOIN inbox i ON i.id = r.account
      WHERE ",
    held_back!(),
    " LIMIT 1"
);

/// Reads the registration ?5 if it must be moved. `step` is the last seq of one step. See [`FIND`].
const CHECK: &str = concat!(
    "SELECT r.account, a.identity, r.position_lost, r.upto,
            coalesce((SELECT m.seq FROM message m INDEXED BY message_inbox
                       WHERE m.inbox = r.account AND m.seq > r.upto
                       ORDER BY m.seq LIMIT 1 OFFSET ?6 - 1), i.last_seq) AS step
       FROM device r CROSS JOIN inbox i ON i.id = r.account CROSS JOIN account a ON a.id = r.account
      WHERE r.id = ?5 AND ",
    held_back!()
);

const LOSE: &str = "UPDATE device SET position_lost = 1 WHERE id = ?1 AND position_lost = 0";

#[cfg(test)]
pub(crate) const STATEMENTS: [&str; 5] = [SEEN, CONFIRM, FIND, CHECK, LOSE];

/// The limits of the absence of devices.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Absence {
    pub(crate) bounds: Bounds,
    pub(crate) limits: DeliveryLimits,
}

impl Absence {
    /// Returns a device that must be moved, if there is one.
    pub(crate) async fn find(
        &self,
        readers: &SqlitePool,
    ) -> sqlx::Result<Option<RegistrationNumber>> {
        let found = self.bind(sqlx::query(FIND)).fetch_optional(readers).await?;
        found.map(|row| row.try_get("id").map(RegistrationNumber)).transpose()
    }

    fn bind<'q>(&self, query: Query<'q>) -> Query<'q> {
        let now = self.bounds.earliest;
        query
            .bind(millis(now.minus(self.limits.device_absence)))
            .bind(millis(now))
            .bind(number(self.limits.half_messages()))
            .bind(number(self.limits.half_bytes()))
    }
}

type Query<'q> = sqlx::query::Query<'q, sqlx::Sqlite, sqlx::sqlite::SqliteArguments>;

/// Moves a device by up to [`SWEEP_ROWS`] messages towards the newest one, if the condition for a
/// move still holds.
pub(crate) struct MoveAbsent {
    pub(crate) registration: RegistrationNumber,
    pub(crate) absence: Absence,
}

/// The result of a step of [`MoveAbsent`].
#[derive(Debug, Default)]
pub(crate) struct Moved {
    pub(crate) rows: u64,
    /// The account, if this was the first step.
    pub(crate) account: Option<IdentityKey>,
}

impl Statement for MoveAbsent {
    type Answer = Moved;
    const NAME: &'static str = "move absent device";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<Moved>> {
        let query = self.absence.bind(sqlx::query(CHECK)).bind(self.registration.0);
        let row = query.bind(SWEEP_ROWS).fetch_optional(&mut *tx).await?;
        match row {
            Some(row) => self.step(tx, &row).await,
            None => Ok(Done::keep(Moved::default())),
        }
    }
}

impl MoveAbsent {
    async fn step(&self, tx: &mut SqliteConnection, row: &SqliteRow) -> sqlx::Result<Done<Moved>> {
        let inbox = row.try_get("account")?;
        let identity = row.identity("identity")?;
        let (after, to): (Seq, Seq) = (row.seq("upto")?, row.seq("step")?);
        let lose = sqlx::query(LOSE).bind(self.registration.0);
        let is_first = lose.execute(&mut *tx).await?.rows_affected() > 0;
        let advance = sqlx::query(MOVE).bind(self.registration.0).bind(number(to.0));
        advance.execute(&mut *tx).await?;
        let removal = Removal {
            selection: Selection::AllUnread { inbox, after, to },
            at: self.absence.bounds.latest,
            recent_ids: self.absence.limits.recent_ids,
        };
        let rows = 1 + removal.run(tx).await?;
        let reader = InboxReader { inbox: identity, registration: Some(self.registration) };
        let effects = Effects { completed_by: Some(reader), ..Effects::default() };
        Ok(Done::with(Moved { rows, account: is_first.then_some(identity) }, effects))
    }
}
