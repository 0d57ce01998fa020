//! Inboxes and wakes: enqueue, leases, peeks and acks.

use std::time::Duration;

use async_trait::async_trait;
use qpq_domain::{IdentityKey, Seq, StoreId, UnixMillis};
use qpq_ports::{
    Ack, Batch, Enqueued, Inboxes, Lease, Page, PageLimit, ReadQuery, Reader, StoreResult, View,
    Wake, Wakes,
};
use sqlx::SqliteConnection;

use crate::{
    effects::Effects,
    error::read_failed,
    memory::{History, LeaseGuard, ReadInProgress},
    messages::{
        read::{self, Snapshot},
        remove::{Removal, Selection},
    },
    statement::{Done, SMALL, Scope, Statement},
    store::EmbeddedStore,
};

/// The seqs of an ack from which on it is compared with the inbox before it is queued.
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
    ) -> StoreResult<Box<dyn Lease>> {
        let read = position(read);
        let in_progress = ReadInProgress::begin(&self.memory.leases, read.reader);
        // Before the count is noted, so that the wait for a connection does not cost a second read.
        let mut connection = self.readers.acquire().await.map_err(read_failed)?;
        loop {
            let (noted, store_id) = (in_progress.removals(), self.memory.history.id());
            let snapshot = read::snapshot(&mut connection, &read, Seq::ZERO, limit, now).await?;
            if let Some((page, guard)) = in_progress.lease(noted, store_id, &snapshot, read.view) {
                let leased = leased(guard, &snapshot, &page, &read, now);
                return Ok(Box::new(InboxLease { store: self.clone(), page, leased }));
            }
        }
    }

    async fn peek(
        &self,
        read: ReadQuery,
        after: Seq,
        limit: PageLimit,
        now: UnixMillis,
    ) -> StoreResult<Page> {
        let read = position(read);
        let in_progress = ReadInProgress::begin(&self.memory.leases, read.reader);
        let mut connection = self.readers.acquire().await.map_err(read_failed)?;
        loop {
            let (noted, store_id) = (in_progress.removals(), self.memory.history.id());
            let snapshot = read::snapshot(&mut connection, &read, after, limit, now).await?;
            if let Some(page) = in_progress.page(noted, store_id, &snapshot) {
                return Ok(page);
            }
        }
    }

    async fn ack(&self, read: ReadQuery, ack: Ack, now: UnixMillis) -> StoreResult<u32> {
        let read = position(read);
        let mut ack = normalized(ack);
        if ack.seqs.len() > LONG_ACK {
            // A list can be much longer than the inbox. The writer does not search for all of it.
            let queued = read::seqs(&self.readers, &read.reader.inbox).await?;
            ack.seqs.retain(|seq| queued.contains(seq));
        }
        if ack.is_empty() {
            return Ok(0);
        }
        let acknowledge = Acknowledge {
            read,
            ack,
            now,
            // With a clock that went back, the ids would be forgotten too early.
            removed_at: self.memory.clock.bounds(now).latest,
            recent_ids: self.limits.delivery.recent_ids,
            history: self.memory.history.clone(),
        };
        self.writer.run(acknowledge).await
    }
}

impl Wakes for EmbeddedStore {
    fn subscribe(&self, query: &ReadQuery) -> Box<dyn Wake> {
        let ReadQuery { reader, view } = position(*query);
        self.memory.wakes.subscribe(reader, view)
    }
}

/// Returns the query of the reader whose position a query uses. No inbox has registered devices, so
/// that is the single reader of the inbox, whatever device is named.
fn position(query: ReadQuery) -> ReadQuery {
    ReadQuery { reader: Reader::single(query.reader.inbox), ..query }
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
        let complete = Complete {
            leased,
            store_id: page.store_id,
            removed_at: store.memory.clock.bounds(now).latest,
            recent_ids: store.limits.delivery.recent_ids,
            history: store.memory.history.clone(),
        };
        store.writer.run(complete).await
    }
}

/// Removes the messages of a lease, unless another history has begun. The lease ends with the
/// statement.
struct Complete {
    leased: Leased,
    store_id: StoreId,
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
        // The messages of the view between the first and the last one that had not expired when
        // they were read: exactly those of the page.
        let removal = Removal {
            selection: Selection::Range {
                inbox: *inbox,
                view: *view,
                from: *first,
                to: *last,
                alive_at: *read_at,
            },
            at: self.removed_at,
            recent_ids: self.recent_ids,
        };
        removal.run(tx).await?;
        // The end of the lease wakes the reader.
        let effects = Effects { removed_from: Some(guard.reader()), ..Effects::default() };
        Ok(Done::with((), effects))
    }
}

/// Removes the messages that an ack names, leased or not. Answers how many.
struct Acknowledge {
    read: ReadQuery,
    ack: Ack,
    now: UnixMillis,
    removed_at: UnixMillis,
    recent_ids: Duration,
    history: History,
}

impl Statement for Acknowledge {
    type Answer = u32;
    const NAME: &'static str = "acknowledge messages";
    const SCOPE: Scope = Scope::Batch;

    fn bytes(&self) -> usize {
        SMALL + self.ack.seqs.len() * size_of::<Seq>()
    }

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<u32>> {
        if self.ack.store_id.is_some_and(|store_id| store_id != self.history.id()) {
            return Ok(Done::keep(0));
        }
        let ReadQuery { reader, view } = self.read;
        let Some(inbox) = number_of(tx, &reader.inbox).await? else { return Ok(Done::keep(0)) };
        let mut removed = 0;
        if let Some(to) = self.ack.up_to {
            let from = Seq::ZERO;
            let selection = Selection::Range { inbox, view, from, to, alive_at: self.now };
            removed += self.remove(tx, selection).await?;
        }
        if !self.ack.seqs.is_empty() {
            let seqs = &self.ack.seqs;
            let selection = Selection::Seqs { inbox, view, seqs, alive_at: self.now };
            removed += self.remove(tx, selection).await?;
        }
        if removed == 0 {
            return Ok(Done::keep(0));
        }
        let effects = Effects {
            removed_from: Some(reader),
            wakes: vec![(reader, view)],
            ..Effects::default()
        };
        Ok(Done::with(u32::try_from(removed).unwrap_or(u32::MAX), effects))
    }
}

impl Acknowledge {
    async fn remove(
        &self,
        tx: &mut SqliteConnection,
        selection: Selection<'_>,
    ) -> sqlx::Result<u64> {
        Removal { selection, at: self.removed_at, recent_ids: self.recent_ids }.run(tx).await
    }
}

/// Returns the number of an inbox, if the account exists.
async fn number_of(tx: &mut SqliteConnection, inbox: &IdentityKey) -> sqlx::Result<Option<i64>> {
    sqlx::query_scalar("SELECT id FROM account WHERE identity = ?1")
        .bind(&inbox.as_bytes()[..])
        .fetch_optional(tx)
        .await
}
