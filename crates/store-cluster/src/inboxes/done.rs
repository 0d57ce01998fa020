//! Records which messages each device has completed: completed pages and acks of inboxes with
//! devices.
//!
//! A message waits for a device if its seq is above the device's `upto` and `device_done` has no
//! row for it. A device that reads in order only moves `upto`, by one heap-only update of its row
//! for any number of messages. Messages that it completes out of order are rows of `device_done`,
//! until `upto` passes them.
//!
//! The heads of the inboxes are locked first, in the order of their numbers and by a separate
//! statement. Later statements of the transaction see everything that was committed before the
//! locks, and until the commit no registration, revocation or other removal changes it. A message
//! that waits for no device is deleted, as in every removal.
//!
//! In the queries, `OFFSET 0` makes Postgres look up `device_done` by one probe of its index for
//! each message. Without it, Postgres plans a join with the whole table, because it only guesses
//! the lengths of arrays.

use std::time::Duration;

use qpq_domain::{DeviceId, Seq, StoreId, UnixMillis};
use qpq_ports::{Ack, ReadQuery, View};
use sqlx::{PgConnection, Row as _};

use super::remove::{numbers, reader_removal, removal, seqs_of};
use crate::{
    effects::Removal,
    history::store_id,
    postgres::{
        Repeat, Scope, Statement,
        row::{Columns as _, millis, millis_of, number},
    },
    redis::queue::{ReaderId, RegistrationId},
};

const LOCK: &str = concat!(
    "SELECT ",
    store_id!(),
    " AS store_id FROM inbox WHERE id = ANY ($1) ORDER BY id FOR NO KEY UPDATE"
);

const LOCK_INBOX: &str = concat!(
    "SELECT i.id, ",
    store_id!(),
    " AS store_id FROM account a JOIN inbox i ON i.id = a.id WHERE a.identity = $1
       FOR NO KEY UPDATE OF i"
);

/// The messages of an ack that wait for the device. $1 inbox, $2 device, $3 now, $4 the last seq of
/// a range, $5 single seqs, $6 the channel. Returns one row with the registration and the seqs, if
/// any.
macro_rules! acked {
    ($view:literal) => {
        concat!(
            "SELECT d.id, d.position_lost, ARRAY (
                SELECT m.seq FROM message m
                 WHERE m.inbox = $1 AND m.seq > d.upto AND (m.seq <= $4 OR m.seq = ANY ($5))
                   AND m.expires_at > $3",
            $view,
            "      AND NOT EXISTS (
                    SELECT 1 FROM device_done o
                     WHERE o.inbox = $1 AND o.seq = m.seq AND o.device = d.device
                    OFFSET 0)) AS seqs
               FROM device d WHERE d.account = $1 AND d.device = $2"
        )
    };
}
const ACKED: &str = acked!("");
const ACKED_IN_CHANNEL: &str = acked!(" AND m.channel = $6");

/// Records completed messages. $1 registrations, $2 inboxes and $3 seqs, of which only the waiting
/// ones count; $4 now. A page is in order if no other message up to the last one of the page waits
/// for the device. Expired messages do not wait. Returns the newly completed messages of each
/// device, and the number of its removal.
const MARK: &str = "
    WITH done AS MATERIALIZED (
        SELECT d.id, d.account, d.device, d.upto, m.seq,
               m.expires_at > least($4, store_now()) AS is_alive
          FROM unnest($1::int8[], $2::int8[], $3::int8[]) AS s (registration, inbox, seq)
          JOIN device d ON d.id = s.registration AND d.account = s.inbox
          JOIN message m ON m.inbox = s.inbox AND m.seq = s.seq
         WHERE s.seq > d.upto AND NOT EXISTS (
            SELECT 1 FROM device_done o
             WHERE o.inbox = m.inbox AND o.seq = m.seq AND o.device = d.device OFFSET 0)),
    page AS MATERIALIZED (
        SELECT id, account, device, upto, max(seq) AS last, array_agg(seq) AS seqs,
               count(*) FILTER (WHERE is_alive) AS alive
          FROM done GROUP BY id, account, device, upto),
    placed AS MATERIALIZED (
        SELECT p.*, p.alive >= (SELECT count(*) FROM (
            SELECT 1 FROM message m
             WHERE m.inbox = p.account AND m.seq > p.upto AND m.seq <= p.last
               AND m.expires_at > least($4, store_now()) AND NOT EXISTS (
                SELECT 1 FROM device_done o
                 WHERE o.inbox = m.inbox AND o.seq = m.seq AND o.device = p.device OFFSET 0)
             LIMIT p.alive + 1) w) AS in_order
          FROM page p),
    moved AS (
        UPDATE device d
           SET upto = CASE WHEN p.in_order THEN p.last ELSE d.upto END, removals = d.removals + 1
          FROM placed p WHERE d.id = p.id
        RETURNING d.id, d.removals),
    passed AS (
        DELETE FROM device_done o USING placed p
         WHERE p.in_order AND o.inbox = p.account AND o.seq > p.upto AND o.seq <= p.last
           AND o.device = p.device),
    kept AS (
        INSERT INTO device_done (inbox, seq, device)
        SELECT d.account, d.seq, d.device FROM done d JOIN placed p ON p.id = d.id
         WHERE NOT p.in_order)
    SELECT p.id, p.account, p.seqs, v.removals FROM placed p JOIN moved v ON v.id = p.id";

/// The condition that a message `m` waits for no device.
macro_rules! is_spent {
    () => {
        "NOT EXISTS (
            SELECT 1 FROM device d
             WHERE d.account = m.inbox AND d.upto < m.seq AND NOT EXISTS (
                SELECT 1 FROM device_done o
                 WHERE o.inbox = m.inbox AND o.seq = m.seq AND o.device = d.device OFFSET 0)
            OFFSET 0)"
    };
}

/// Removes the messages that wait for no device. $2 now, $3 the time for which ids are remembered.
macro_rules! spent {
    ($candidates:literal) => {
        reader_removal! {
            with: concat!(
                "spent AS MATERIALIZED (SELECT m.inbox, m.seq ",
                $candidates,
                " AND ",
                is_spent!(),
                ")"
            ),
            delete: "USING spent s WHERE m.inbox = s.inbox AND m.seq = s.seq",
            forget_at: "least(greatest($2, store_now()), expires_at) + $3",
            also: ", undone AS (
DELETE FROM device_done o USING removed g WHERE o.inbox = g.inbox AND o.seq = g.seq)",
            select: "SELECT count(*) FROM removed"
        }
    };
}
/// $1 and $4 inboxes and seqs.
const SPENT: &str = spent!("FROM unnest($1::int8[], $4::int8[]) AS m (inbox, seq) WHERE true");
/// $1 inbox, $4 the seq before the first message, $5 the last seq.
const SPENT_BETWEEN: &str =
    spent!("FROM message m WHERE m.inbox = $1 AND m.seq > $4 AND m.seq <= $5");

/// A page that a device has completed.
#[derive(Clone, Debug)]
pub(super) struct DevicePage {
    pub(super) inbox: i64,
    pub(super) registration: RegistrationId,
    pub(super) seqs: Vec<Seq>,
}

/// The messages that a device has newly completed.
#[derive(Clone, Debug)]
pub(super) struct DeviceCompletion {
    pub(super) inbox: i64,
    pub(super) registration: RegistrationId,
    pub(super) seqs: Vec<Seq>,
    /// The number of this removal among the device's removals.
    pub(super) number: u64,
}

/// Completes pages of several devices, at most one page per registration. All pages were read from
/// the store with the id `store_id`.
///
/// Returns the newly completed messages; `None` if the store has another id now. Pages of
/// registrations that no longer exist are ignored.
pub(super) struct CompletePages {
    pub(super) store_id: StoreId,
    pub(super) pages: Vec<DevicePage>,
    pub(super) now: UnixMillis,
    pub(super) recent_ids: Duration,
}

impl Statement for CompletePages {
    type Output = Option<Vec<DeviceCompletion>>;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Transaction;

    fn name(&self) -> &'static str {
        "complete_as_device"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Self::Output> {
        let inboxes: Vec<_> = self.pages.iter().map(|page| page.inbox).collect();
        let rows = sqlx::query(LOCK).bind(inboxes).fetch_all(&mut *connection).await?;
        let Some(row) = rows.first() else { return Ok(Some(Vec::new())) };
        if row.store_id("store_id")? != self.store_id {
            return Ok(None);
        }
        complete(connection, &self.pages, self.now, self.recent_ids).await.map(Some)
    }
}

/// Removes the messages that a device acks.
pub(super) struct AckAsDevice<'a> {
    pub(super) query: &'a ReadQuery,
    pub(super) device: DeviceId,
    pub(super) ack: &'a Ack,
    pub(super) now: UnixMillis,
    pub(super) recent_ids: Duration,
}

/// The outcome of an ack by a device.
pub(super) enum DeviceAck {
    /// The removal; `None` if no message was newly completed.
    Completed(Option<Removal>),
    /// The inbox has no such device.
    NoDevice,
    /// The device's position was moved, and its client has not confirmed the new one.
    PositionLost,
}

impl Statement for AckAsDevice<'_> {
    type Output = DeviceAck;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Transaction;

    fn name(&self) -> &'static str {
        "ack_as_device"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<DeviceAck> {
        let Self { query: ReadQuery { reader, view }, device, ack, now, recent_ids } = self;
        let query = sqlx::query(LOCK_INBOX).bind(&reader.inbox.as_bytes()[..]);
        let Some(head) = query.fetch_optional(&mut *connection).await? else {
            return Ok(DeviceAck::NoDevice);
        };
        let (inbox, store_id) = (head.try_get("id")?, head.store_id("store_id")?);
        let (sql, channel) = match view {
            View::All => (ACKED, None),
            View::Channel(channel) => (ACKED_IN_CHANNEL, Some(channel.as_bytes())),
        };
        let mut query = sqlx::query(sql)
            .bind(inbox)
            .bind(&device.as_bytes()[..])
            .bind(millis(*now))
            .bind(number(ack.up_to.unwrap_or(Seq::ZERO).0))
            .bind(numbers(&ack.seqs));
        if let Some(channel) = channel {
            query = query.bind(channel);
        }
        let Some(row) = query.fetch_optional(&mut *connection).await? else {
            return Ok(DeviceAck::NoDevice);
        };
        if row.try_get("position_lost")? {
            return Ok(DeviceAck::PositionLost);
        }
        let (registration, seqs) = (RegistrationId(row.try_get("id")?), seqs_of(&row)?);
        if seqs.is_empty() || ack.store_id.is_some_and(|named| named != store_id) {
            return Ok(DeviceAck::Completed(None));
        }
        let page = DevicePage { inbox, registration, seqs };
        let done = complete(connection, &[page], *now, *recent_ids).await?;
        Ok(DeviceAck::Completed(done.into_iter().next().map(
            |DeviceCompletion { seqs, number, .. }| Removal {
                reader: ReaderId { inbox: reader.inbox, registration: Some(registration) },
                view: *view,
                store_id,
                number,
                lease: None,
                seqs,
            },
        )))
    }
}

/// Records completed messages, and removes those that wait for no other device. The caller has
/// locked the heads.
async fn complete(
    connection: &mut PgConnection,
    pages: &[DevicePage],
    now: UnixMillis,
    recent_ids: Duration,
) -> sqlx::Result<Vec<DeviceCompletion>> {
    let rows = || pages.iter().flat_map(|page| page.seqs.iter().map(move |seq| (page, seq)));
    let done = sqlx::query(MARK)
        .bind(rows().map(|(page, _)| page.registration.0).collect::<Vec<_>>())
        .bind(rows().map(|(page, _)| page.inbox).collect::<Vec<_>>())
        .bind(rows().map(|(_, seq)| number(seq.0)).collect::<Vec<_>>())
        .bind(millis(now))
        .fetch_all(&mut *connection)
        .await?;
    let done: Vec<_> = done
        .iter()
        .map(|row| {
            Ok(DeviceCompletion {
                inbox: row.try_get("account")?,
                registration: RegistrationId(row.try_get("id")?),
                seqs: seqs_of(row)?,
                number: row.unsigned("removals")?,
            })
        })
        .collect::<sqlx::Result<_>>()?;
    let mut rows: Vec<_> =
        done.iter().flat_map(|done| done.seqs.iter().map(|seq| (done.inbox, *seq))).collect();
    // Two devices may complete a message at the same time.
    rows.sort_unstable();
    rows.dedup();
    if !rows.is_empty() {
        sqlx::query(SPENT)
            .bind(rows.iter().map(|(inbox, _)| *inbox).collect::<Vec<_>>())
            .bind(millis(now))
            .bind(millis_of(recent_ids))
            .bind(rows.iter().map(|(_, seq)| number(seq.0)).collect::<Vec<_>>())
            .execute(connection)
            .await?;
    }
    Ok(done)
}

/// Removes the messages of an inbox that wait for no device, with seqs above `after` and up to
/// `up_to`. Returns their number. The caller has locked the head, and the inbox has devices.
pub(crate) async fn remove_spent(
    connection: &mut PgConnection,
    inbox: i64,
    (after, up_to): (i64, i64),
    now: UnixMillis,
    recent_ids: Duration,
) -> sqlx::Result<u64> {
    let removed: i64 = sqlx::query_scalar(SPENT_BETWEEN)
        .bind(inbox)
        .bind(millis(now))
        .bind(millis_of(recent_ids))
        .bind(after)
        .bind(up_to)
        .fetch_one(connection)
        .await?;
    Ok(u64::try_from(removed).unwrap_or_default())
}
