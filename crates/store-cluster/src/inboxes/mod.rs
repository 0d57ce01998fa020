//! Inboxes of the cluster: messages are accepted by Postgres (`committer`, `enqueue`), read from
//! Redis where its copy is current and from Postgres otherwise, and removed from Postgres first.
//!
//! A read begins with the inbox's head in Postgres. The head determines the present state and the
//! reader: the single reader of an inbox without devices, or a device, named by the number of its
//! registration. A queue in Redis that shows that state or a later one is used. Any other queue is
//! loaded again. An inbox that is too large for a queue is read from Postgres page by page, and
//! Redis has only its leases.
//!
//! A completed page is removed under the lock of the head, by `remove` for the single reader and by
//! `done` for devices.

mod absent;
mod committer;
mod completer;
mod done;
mod enqueue;
mod leases;
pub(crate) mod page;
mod payloads;
mod pushes;
mod remove;
mod seen;
mod sweep;

use std::{fmt, mem};

use async_trait::async_trait;
use qpq_domain::{Seq, UnixMillis};
use qpq_ports::{
    Ack, Batch, Enqueued, Inboxes, Lease, Page, PageLimit, ReadError, ReadQuery, StoreError,
    StoreResult, View,
};

pub use committer::COMMITTERS;
pub(crate) use {
    absent::{Absence, move_absent},
    committer::Committers,
    completer::Completers,
    done::remove_spent,
    enqueue::{Accept, Outcomes, accept},
    leases::Leases,
    page::Heads,
    payloads::COUNTED_DOWN,
    pushes::Pushes,
    sweep::{SWEEP, forget, sweep},
};

use self::{
    completer::{CompletedPage, Completion},
    done::{AckAsDevice, DeviceAck},
    leases::LeaseGuard,
    page::{Access, Head, Present, Whole},
    remove::{RemoveAcked, SingleAck},
};
use crate::{
    ClusterStore,
    effects::{Effects, Removal},
    metrics as names,
    redis::queue::{Freshness, LeaseTerm, QueueAnswer, QueueRead, ReaderId, State, VisiblePage},
    store::Inner,
};

/// Maximum attempts at a read of an inbox that changes meanwhile.
const MAX_ATTEMPTS: usize = 16;

#[derive(Debug, thiserror::Error)]
#[error("the inbox changed during each of {MAX_ATTEMPTS} attempts to read it")]
struct InboxChanged;

/// The parameters of a read.
#[derive(Clone, Copy)]
struct Request<'a> {
    query: &'a ReadQuery,
    after: Seq,
    limit: PageLimit,
    now: UnixMillis,
    hides: Hides,
}

/// The effect of a read on other reads.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Hides {
    /// A lease hides its messages.
    Yes,
    /// A peek hides nothing.
    No,
}

/// A read of an inbox by one of its readers.
#[derive(Clone, Copy)]
struct InboxRead<'a> {
    request: Request<'a>,
    head: Head,
    reader: ReaderId,
    /// The lease to begin; `None` for a peek.
    guard: Option<&'a LeaseGuard>,
}

impl InboxRead<'_> {
    fn term(&self) -> Option<LeaseTerm<'_>> {
        self.guard.map(LeaseGuard::term)
    }

    /// Reads the head, and returns the state for the reader; `None` if it is no longer a reader
    /// of the inbox.
    async fn present(&self, inner: &Inner) -> StoreResult<Option<State>> {
        let head = inner.heads.get(&self.request.query.reader).await?.head;
        let is_same = |head: &Head| {
            head.access != Access::Refused && head.registration() == self.reader.registration
        };
        Ok(head.filter(is_same).map(|head| head.state))
    }
}

/// The result of a read.
struct Found {
    page: Page,
    /// The number of the inbox; `None` if it does not exist.
    inbox: Option<i64>,
    /// The lease of the page, if one was begun and it has messages.
    guard: Option<LeaseGuard>,
}

/// The result of an attempt at a read.
enum Attempt {
    Page(VisiblePage),
    /// The messages that wait for the reader do not fit a queue.
    TooLarge,
    /// The inbox has changed meanwhile.
    Changed,
}

impl Inner {
    /// Returns the present page, and leases its messages unless the read is a peek.
    async fn read(&self, request: Request<'_>) -> Result<Found, ReadError> {
        let (mut registered, mut too_large) = (false, false);
        let mut guard: Option<LeaseGuard> = None;
        for _ in 0..MAX_ATTEMPTS {
            let Present { store_id, head } = self.heads.get(&request.query.reader).await?;
            let Some(head) = head else {
                return Ok(Found { page: Page::empty(store_id), inbox: None, guard: None });
            };
            self.admit(&head, request.now).await?;
            let inbox = request.query.reader.inbox;
            let reader = ReaderId { inbox, registration: head.registration() };
            self.leases.releases_ended(&reader).await;
            if request.hides == Hides::Yes
                && guard.as_ref().map(|guard| guard.reader) != Some(reader)
            {
                guard = Some(self.leases.begin(reader));
            }
            let read = InboxRead { request, head, reader, guard: guard.as_ref() };
            let attempt = if head.may_be_queue() && !too_large {
                self.read_queue(read).await?
            } else {
                if !registered {
                    self.register(&reader).await?;
                    registered = true;
                    // Reads the head again: a message that was committed before the registration is
                    // in it, and a later one wakes this edge.
                    continue;
                }
                self.read_postgres(read).await?
            };
            match attempt {
                Attempt::Page(visible) => {
                    let lease = guard.as_ref().map(|guard| &guard.id);
                    self.wakes.record_read(request.query, &visible, lease);
                    let guard = guard.and_then(|guard| guard.with(&visible.page));
                    return Ok(Found { page: visible.page, inbox: Some(head.inbox), guard });
                }
                Attempt::TooLarge => too_large = true,
                Attempt::Changed => {}
            }
        }
        Err(StoreError::conflict(InboxChanged).into())
    }

    /// Checks that the reader may read the inbox, and records the read of a device.
    async fn admit(&self, head: &Head, now: UnixMillis) -> Result<(), ReadError> {
        let position = match head.access {
            Access::Single => return Ok(()),
            Access::Refused => return Err(ReadError::DeviceRequired),
            Access::Device(position) => position,
        };
        seen::record(&self.database, &position, now).await?;
        if position.is_lost { Err(ReadError::PositionLost) } else { Ok(()) }
    }

    /// Reads from the queue in Redis. Loads the queue if it is missing.
    async fn read_queue(&self, read: InboxRead<'_>) -> StoreResult<Attempt> {
        let InboxRead { request, head, reader, .. } = read;
        let Request { query, after, limit, now, .. } = request;
        let edge = self.wakes.waiting_edge(&reader.inbox);
        let (mut state, mut from, mut accept) = (head.state, "redis", Freshness::Same);
        let redis = &self.redis;
        for _ in 0..MAX_ATTEMPTS {
            let (view, term) = (query.view, read.term());
            let queue_read =
                QueueRead { reader: &reader, view, state, accept, after, limit, now, term, edge };
            let permit = match redis.read(queue_read).await? {
                QueueAnswer::Page(visible) => {
                    metrics::counter!(names::HOT_READS, "from" => from).increment(1);
                    return Ok(Attempt::Page(visible));
                }
                QueueAnswer::Ahead(queue) => {
                    let Some(present) = read.present(self).await? else {
                        return Ok(Attempt::Changed);
                    };
                    if present.has_lost(&queue) {
                        metrics::counter!(names::LOST_QUEUES).increment(1);
                        tracing::warn!(
                            "a queue in redis has messages that postgres has lost, dropping the queue"
                        );
                        redis.drop_queue(&reader).await?;
                    }
                    (state, accept) = (present, Freshness::AtLeast);
                    continue;
                }
                QueueAnswer::NotLoaded(permit) => permit,
            };
            let whole = match page::whole(&self.database, &head).await? {
                Whole::Small(whole) => whole,
                Whole::Large => return Ok(Attempt::TooLarge),
                Whole::NoReader => return Ok(Attempt::Changed),
            };
            redis.load(&reader, permit, whole.state, &whole.messages).await?;
            // The next read accepts a later state: the queue may already have messages that were
            // committed since.
            (state, from, accept) = (whole.state, "reloaded", Freshness::AtLeast);
        }
        Err(StoreError::conflict(InboxChanged))
    }

    /// Reads a page from Postgres, and leases its messages in Redis. Returns `Changed` if a message
    /// was removed meanwhile, perhaps by another read that had leased it.
    async fn read_postgres(&self, read: InboxRead<'_>) -> StoreResult<Attempt> {
        let InboxRead { request, head, reader, guard } = read;
        let Request { query, after, limit, now, .. } = request;
        let snapshot = page::page(&self.database, &head, query.view, after, limit, now).await?;
        let mut envelopes: Vec<_> =
            snapshot.messages.into_iter().map(|queued| queued.envelope).collect();
        let mut seqs: Vec<_> =
            envelopes.iter().map(|envelope| envelope.seq).chain(snapshot.next).collect();
        let (store_id, term) = (&snapshot.state.store_id, read.term());
        let claimed = self.redis.claim(&reader, store_id, &seqs, envelopes.len(), term).await?;
        let more = claimed.seqs > envelopes.len();
        envelopes.truncate(claimed.seqs);
        seqs.truncate(envelopes.len());
        // If another read has leased and removed some of these messages in between, the head now
        // counts its removal.
        let is_present = |state: State| {
            (state.store_id, state.removals) == (snapshot.state.store_id, snapshot.state.removals)
        };
        if !read.present(self).await?.is_some_and(is_present) {
            if let Some(guard) = guard {
                self.wakes.release(&reader, &guard.id, &seqs).await;
            }
            return Ok(Attempt::Changed);
        }
        metrics::counter!(names::HOT_READS, "from" => "postgres").increment(1);
        Ok(Attempt::Page(VisiblePage {
            page: Page { store_id: snapshot.state.store_id, envelopes, more },
            head: snapshot.state.head,
            stopped_for: claimed.stopped_for,
        }))
    }

    async fn register(&self, reader: &ReaderId) -> StoreResult<()> {
        match self.wakes.waiting_edge(&reader.inbox) {
            Some(edge) => self.redis.register(reader, edge).await,
            None => Ok(()),
        }
    }
}

#[async_trait]
impl Inboxes for ClusterStore {
    async fn enqueue(&self, batch: Batch) -> StoreResult<Vec<Enqueued>> {
        self.inner.committers.enqueue(batch).await
    }

    async fn lease(
        &self,
        query: ReadQuery,
        limit: PageLimit,
        now: UnixMillis,
    ) -> Result<Box<dyn Lease>, ReadError> {
        let request = Request { query: &query, after: Seq::ZERO, limit, now, hides: Hides::Yes };
        let Found { page, inbox, guard } = self.inner.read(request).await?;
        let leased = guard.zip(inbox).map(|(guard, inbox)| Leased { guard, inbox });
        Ok(Box::new(InboxLease { page, leased, view: query.view, store: self.clone() }))
    }

    async fn peek(
        &self,
        query: ReadQuery,
        after: Seq,
        limit: PageLimit,
        now: UnixMillis,
    ) -> Result<Page, ReadError> {
        let request = Request { query: &query, after, limit, now, hides: Hides::No };
        Ok(self.inner.read(request).await?.page)
    }

    async fn ack(&self, query: ReadQuery, ack: Ack, now: UnixMillis) -> Result<u32, ReadError> {
        let database = &self.inner.database;
        let recent_ids = self.inner.limits.delivery.recent_ids;
        let remove = RemoveAcked { query: &query, ack: &ack, now, recent_ids };
        let removal = match database.run(&remove).await.map_err(StoreError::from)? {
            SingleAck::Removed(removal) => removal,
            SingleAck::HasDevices => {
                let Some(device) = query.reader.device else {
                    return Err(ReadError::DeviceRequired);
                };
                let remove = AckAsDevice { query: &query, device, ack: &ack, now, recent_ids };
                match database.run(&remove).await.map_err(StoreError::from)? {
                    DeviceAck::Completed(removal) => removal,
                    DeviceAck::NoDevice => return Err(ReadError::DeviceRequired),
                    DeviceAck::PositionLost => return Err(ReadError::PositionLost),
                }
            }
        };
        let Some(removal) = removal else { return Ok(0) };
        let removed = u32::try_from(removal.seqs.len()).unwrap_or(u32::MAX);
        self.inner.applier.apply(Effects { removed: Some(removal), ..Effects::default() }).await;
        Ok(removed)
    }
}

/// A page and, unless it is empty, its lease.
struct InboxLease {
    page: Page,
    leased: Option<Leased>,
    view: View,
    store: ClusterStore,
}

struct Leased {
    guard: LeaseGuard,
    /// The number of the inbox.
    inbox: i64,
}

impl fmt::Debug for InboxLease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InboxLease").field("page", &self.page).finish_non_exhaustive()
    }
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
        let Self { page: Page { store_id, .. }, leased, view, store } = *self;
        let Some(Leased { mut guard, inbox }) = leased else { return Ok(()) };
        let reader = guard.reader;
        let (registration, seqs) = (reader.registration, guard.seqs.clone());
        let completed = CompletedPage { store_id, inbox, registration, seqs, now };
        match store.inner.completers.complete(completed).await? {
            Completion::Removed(number) => {
                let (lease, seqs) = (Some(guard.id.clone()), mem::take(&mut guard.seqs));
                let removal = Removal { reader, view, store_id, number, lease, seqs };
                let effects = Effects { removed: Some(removal), ..Effects::default() };
                store.inner.applier.apply(effects).await;
                guard.ended();
            }
            // The drop releases the lease.
            Completion::OtherHistory => drop(guard),
        }
        Ok(())
    }
}
