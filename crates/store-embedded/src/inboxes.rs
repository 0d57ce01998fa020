//! Inboxes and wakes: enqueue, leases, peeks and acks.

use std::time::Duration;

use async_trait::async_trait;
use qpq_domain::{Seq, StoreId, UnixMillis};
use qpq_ports::{
    Ack, Batch, Enqueued, Inboxes, Lease, Page, PageLimit, ReadError, ReadQuery, StoreResult, View,
    Wake, Wakes,
};
use sqlx::{Row as _, SqliteConnection};

use crate::{
    absence::{SEEN_PRECISION, Seen},
    effects::Effects,
    error::read_failed,
    memory::{ChangeCount, History, LeaseGuard, ReadInProgress},
    messages::{
        position::Completion,
        read::{self, NoSnapshot, Snapshot, SnapshotReader},
        remove::{Named, Removal, Selection, Seqs},
    },
    reader::{InboxReader, RegistrationNumber},
    row::Columns as _,
    statement::{Done, SMALL, Scope, Statement},
    store::EmbeddedStore,
};

/// The maximum number of seqs in an ack that is queued without a comparison with the inbox.
const LONG_ACK: usize = 256;

#[async_trait]
impl Inboxes for EmbeddedStore {
    async fn enqueue(&self, Batch { messages }: Batch) -> StoreResult<Vec<Enqueued>> {
        self.writer.enqueue(messages).await
    }

    async fn lease(
        &self,
        read: ReadQuery,
        limit: PageLimit,
        now: UnixMillis,
    ) -> Result<Box<dyn Lease>, ReadError> {
        let query = Query { read, after: Seq::ZERO, limit, now };
        let lease = |in_progress: &ReadInProgress<'_>, noted, store_id, snapshot: &Snapshot| {
            let (page, guard) = in_progress.lease(noted, store_id, snapshot, read.view)?;
            let leased = leased(guard, snapshot, &page, &read, now);
            Some(InboxLease { store: self.clone(), page, leased })
        };
        Ok(Box::new(self.read(&query, lease).await?))
    }

    async fn peek(
        &self,
        read: ReadQuery,
        after: Seq,
        limit: PageLimit,
        now: UnixMillis,
    ) -> Result<Page, ReadError> {
        let query = Query { read, after, limit, now };
        self.read(&query, |in_progress, noted, store_id, snapshot| {
            in_progress.page(noted, store_id, snapshot)
        })
        .await
    }

    async fn ack(&self, read: ReadQuery, ack: Ack, now: UnixMillis) -> Result<u32, ReadError> {
        let mut ack = normalized(ack);
        if ack.seqs.len() > LONG_ACK {
            // A list can be much longer than the inbox, and the writer should search for queued
            // seqs only.
            let queued = read::seqs(&self.readers, &read.reader.inbox).await?;
            ack.seqs.retain(|seq| queued.contains(seq));
        }
        let bounds = self.memory.clock.bounds(now);
        let acknowledge = Acknowledge {
            read,
            ack,
            now,
            kept_at: bounds.earliest,
            // With a clock that went back, the ids would be forgotten too early.
            removed_at: bounds.latest,
            recent_ids: self.limits.delivery.recent_ids,
            history: self.memory.history.clone(),
        };
        match self.writer.run(acknowledge).await? {
            Acked::Messages(count) => Ok(count),
            Acked::DeviceRequired => Err(ReadError::DeviceRequired),
            Acked::PositionLost => Err(ReadError::PositionLost),
        }
    }
}

impl Wakes for EmbeddedStore {
    fn subscribe(&self, query: &ReadQuery) -> Box<dyn Wake> {
        self.memory.wakes.subscribe(query.reader.inbox, query.view)
    }
}

/// The parameters of a read.
struct Query {
    read: ReadQuery,
    after: Seq,
    limit: PageLimit,
    now: UnixMillis,
}

impl EmbeddedStore {
    /// Reads a snapshot, and returns the result of `show` for it. Reads another snapshot if `show`
    /// returns `None`.
    async fn read<T>(
        &self,
        query: &Query,
        show: impl Fn(&ReadInProgress<'_>, ChangeCount, StoreId, &Snapshot) -> Option<T> + Sync,
    ) -> Result<T, ReadError> {
        let Query { read, after, limit, now } = query;
        let in_progress = ReadInProgress::begin(&self.memory.leases, read.reader.inbox);
        // Acquired before the count is noted, so that a change during the wait for a connection
        // does not cost a second read.
        let mut connection = self.readers.acquire().await.map_err(read_failed)?;
        loop {
            let (noted, store_id) = (in_progress.changes(), self.memory.history.id());
            match read::snapshot(&mut connection, read, *after, *limit, *now).await {
                Ok(snapshot) => {
                    if let Some(shown) = show(&in_progress, noted, store_id, &snapshot) {
                        drop(connection);
                        self.record_seen(snapshot.reader, *now).await;
                        return Ok(shown);
                    }
                }
                Err(NoSnapshot::PositionLost(reader)) => {
                    drop(connection);
                    self.record_seen(reader, *now).await;
                    return Err(ReadError::PositionLost);
                }
                Err(NoSnapshot::DeviceRequired) => return Err(ReadError::DeviceRequired),
                Err(NoSnapshot::Store(error)) => return Err(error.into()),
            }
        }
    }

    /// Records that a device has read, unless a recent read of it is recorded already.
    async fn record_seen(&self, reader: SnapshotReader, now: UnixMillis) {
        let SnapshotReader::Device { registration, last_seen_at } = reader else { return };
        // With a clock that went back, the device would look absent.
        let at = self.memory.clock.bounds(now).latest;
        if at > last_seen_at.plus(SEEN_PRECISION) {
            // The read has succeeded in any case, and the next read records it instead.
            let _ = self.writer.run(Seen { registration, at }).await;
        }
    }
}

/// Removes duplicates and impossible seqs from an ack.
fn normalized(ack: Ack) -> Ack {
    let Ack { up_to, mut seqs, store_id } = ack;
    seqs.retain(|seq| Some(*seq) > up_to && i64::try_from(seq.0).is_ok());
    seqs.sort_unstable();
    seqs.dedup();
    Ack { up_to, seqs, store_id }
}

/// A page, and its leased messages unless it is empty.
struct InboxLease {
    store: EmbeddedStore,
    page: Page,
    leased: Option<Leased>,
}

/// The leased messages of a page.
struct Leased {
    guard: LeaseGuard,
    /// The number of the inbox.
    inbox: i64,
    view: View,
    first: Seq,
    last: Seq,
    read_at: UnixMillis,
}

fn leased(
    guard: Option<LeaseGuard>,
    snapshot: &Snapshot,
    page: &Page,
    read: &ReadQuery,
    read_at: UnixMillis,
) -> Option<Leased> {
    let (guard, inbox) = guard.zip(snapshot.inbox)?;
    let (first, last) = (page.envelopes.first()?.seq, page.envelopes.last()?.seq);
    Some(Leased { guard, inbox, view: read.view, first, last, read_at })
}

#[async_trait]
impl Lease for InboxLease {
    fn page(&self) -> &Page {
        &self.page
    }

    fn free_payloads(&mut self) {
        self.page.free_payloads();
    }

    async fn complete(self: Box<Self>, now: UnixMillis) -> StoreResult<()> {
        let Self { store, page, leased } = *self;
        let Some(leased) = leased else { return Ok(()) };
        let bounds = store.memory.clock.bounds(now);
        let complete = Complete {
            leased,
            store_id: page.store_id,
            kept_at: bounds.earliest,
            removed_at: bounds.latest,
            recent_ids: store.limits.delivery.recent_ids,
            history: store.memory.history.clone(),
        };
        store.writer.run(complete).await
    }
}

/// Removes the messages of a lease for its reader, unless another history has begun. The lease ends
/// when the statement is dropped.
struct Complete {
    leased: Leased,
    store_id: StoreId,
    /// The instant for which expiry is checked. See [`Completion::kept_at`].
    kept_at: UnixMillis,
    removed_at: UnixMillis,
    recent_ids: Duration,
    history: History,
}

impl Statement for Complete {
    type Answer = ();
    const NAME: &'static str = "complete lease";
    const SCOPE: Scope = Scope::Batch;

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<()>> {
        if self.store_id != self.history.id() {
            return Ok(Done::keep(()));
        }
        let Leased { guard, inbox, view, first, last, read_at } = &self.leased;
        // Exactly the messages of the page: those of the view between the first and the last one
        // that had not expired when the page was read.
        let named = Named {
            inbox: *inbox,
            view: *view,
            seqs: Seqs::Range { from: *first, to: *last },
            alive_at: *read_at,
        };
        let (at, recent_ids) = (self.removed_at, self.recent_ids);
        match guard.reader().registration {
            None => {
                Removal { selection: Selection::Named(named), at, recent_ids }.run(tx).await?;
            }
            Some(registration) => {
                let completion = Completion { registration, named, kept_at: self.kept_at };
                completion.run(tx, at, recent_ids).await?;
            }
        }
        // The end of the lease wakes the reader.
        let effects = Effects { completed_by: Some(guard.reader()), ..Effects::default() };
        Ok(Done::with((), effects))
    }
}

/// Removes the messages that an ack names, leased or not, for the reader.
struct Acknowledge {
    read: ReadQuery,
    ack: Ack,
    now: UnixMillis,
    /// The instant for which expiry is checked. See [`Completion::kept_at`].
    kept_at: UnixMillis,
    removed_at: UnixMillis,
    recent_ids: Duration,
    history: History,
}

/// The answer to an ack.
enum Acked {
    /// The number of messages that were newly removed for the reader.
    Messages(u32),
    DeviceRequired,
    PositionLost,
}

/// Finds the inbox and the reader: ?1 identity, ?2 device.
pub(crate) const READER: &str = "
    SELECT i.id AS inbox, i.devices, r.id AS registration, r.position_lost, r.upto
      FROM account a CROSS JOIN inbox i ON i.id = a.id
      LEFT JOIN device r ON i.devices > 0 AND r.account = i.id AND r.device = ?2
     WHERE a.identity = ?1";

impl Statement for Acknowledge {
    type Answer = Acked;
    const NAME: &'static str = "acknowledge messages";
    const SCOPE: Scope = Scope::Batch;

    fn bytes(&self) -> usize {
        SMALL + self.ack.seqs.len() * size_of::<Seq>()
    }

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<Acked>> {
        let reader = &self.read.reader;
        let row = sqlx::query(READER)
            .bind(&reader.inbox.as_bytes()[..])
            .bind(reader.device.as_ref().map(|device| &device.as_bytes()[..]))
            .fetch_optional(&mut *tx)
            .await?;
        let Some(row) = row else { return Ok(Done::keep(Acked::Messages(0))) };
        let inbox = row.try_get("inbox")?;
        let (mut registration, mut position) = (None, Seq::ZERO);
        if row.try_get::<i64, _>("devices")? > 0 {
            let Some(found) = row.try_get("registration")? else {
                return Ok(Done::keep(Acked::DeviceRequired));
            };
            if row.try_get("position_lost")? {
                return Ok(Done::keep(Acked::PositionLost));
            }
            (registration, position) = (Some(RegistrationNumber(found)), row.seq("upto")?);
        }
        let is_of_history = self.ack.store_id.is_none_or(|id| id == self.history.id());
        let done =
            if is_of_history { self.remove(tx, inbox, registration, position).await? } else { 0 };
        let answer = Acked::Messages(u32::try_from(done).unwrap_or(u32::MAX));
        if done == 0 {
            return Ok(Done::keep(answer));
        }
        let effects = Effects {
            completed_by: Some(InboxReader { inbox: reader.inbox, registration }),
            wakes: vec![(reader.inbox, self.read.view)],
            ..Effects::default()
        };
        Ok(Done::with(answer, effects))
    }
}

impl Acknowledge {
    /// Removes the messages after `position` that the ack names. Returns the number of messages
    /// that were newly removed for the reader.
    async fn remove(
        &self,
        tx: &mut SqliteConnection,
        inbox: i64,
        registration: Option<RegistrationNumber>,
        position: Seq,
    ) -> sqlx::Result<u64> {
        let range = self.ack.up_to.map(|to| Seqs::Range { from: Seq(position.0 + 1), to });
        let list = (!self.ack.seqs.is_empty()).then_some(Seqs::List(&self.ack.seqs));
        let (at, recent_ids) = (self.removed_at, self.recent_ids);
        let mut done = 0;
        for seqs in range.into_iter().chain(list) {
            let named = Named { inbox, view: self.read.view, seqs, alive_at: self.now };
            done += match registration {
                None => {
                    Removal { selection: Selection::Named(named), at, recent_ids }.run(tx).await?
                }
                Some(registration) => {
                    let completion = Completion { registration, named, kept_at: self.kept_at };
                    completion.run(tx, at, recent_ids).await?
                }
            };
        }
        Ok(done)
    }
}
