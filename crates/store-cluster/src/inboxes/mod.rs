//! Inboxes of the cluster: messages are accepted by Postgres (`committer`, `enqueue`), read from
//! Redis where its copy is current and from Postgres otherwise, and removed from Postgres first.
//!
//! A read begins with the inbox's head in Postgres, which says which state is the present one. A
//! queue in Redis that shows that state, or a later one, is read; any other is loaded again.
//! Inboxes that are too large for a queue are read page by page from Postgres, and only leased in
//! Redis.

mod committer;
mod completer;
mod enqueue;
mod leases;
pub(crate) mod page;
mod remove;

use std::{fmt, mem};

use async_trait::async_trait;
use qpq_domain::{Seq, UnixMillis};
use qpq_ports::{
    Ack, Batch, Enqueued, Inboxes, Lease, Page, PageLimit, ReadQuery, Reader, StoreError,
    StoreResult,
};

pub use committer::COMMITTERS;
#[cfg(feature = "measure")]
pub(crate) use enqueue::Accept;
pub(crate) use {
    committer::Committers,
    completer::Completers,
    leases::Leases,
    page::Heads,
    remove::{SWEEP, forget, sweep},
};

use self::{
    completer::{CompletedPage, Completion},
    leases::LeaseGuard,
    page::{Head, Present},
    remove::RemoveAcked,
};
use crate::{
    ClusterStore,
    effects::{Effects, Removal},
    metrics as names,
    redis::queue::{
        Freshness, LeaseId, MAX_BYTES, MAX_MESSAGES, QueueAnswer, QueueRead, State, VisiblePage,
    },
    store::Inner,
};

/// Maximum attempts at a read whose messages are removed meanwhile.
const MAX_ATTEMPTS: usize = 16;

/// The number of an inbox that does not exist.
const NO_INBOX: i64 = 0;

#[derive(Debug, thiserror::Error)]
#[error("the inbox changed during each of {MAX_ATTEMPTS} attempts to read it")]
struct InboxChanged;

/// What is read, and how much of it.
#[derive(Clone, Copy)]
struct Request<'a> {
    read: &'a ReadQuery,
    after: Seq,
    limit: PageLimit,
    now: UnixMillis,
    /// The lease to begin; none for a peek.
    lease: Option<&'a LeaseId>,
}

/// Returns the query with the reader that the store knows. No inbox has registered devices yet, so
/// a device that is named reads as the single reader of the inbox.
pub(crate) fn resolved(query: ReadQuery) -> ReadQuery {
    ReadQuery { reader: Reader::single(query.reader.inbox), ..query }
}

impl Inner {
    /// Returns what the read shows now, leased if that is requested, and the inbox's number.
    async fn read(&self, request: Request<'_>) -> StoreResult<(Page, i64)> {
        let reader = &request.read.reader;
        self.leases.releases_ended(reader).await;
        let mut registered = false;
        for _ in 0..MAX_ATTEMPTS {
            let Present { store_id, head } = self.heads.get(reader).await?;
            let Some(head) = head else { return Ok((Page::empty(store_id), NO_INBOX)) };
            let visible = if head.messages <= MAX_MESSAGES && head.bytes <= MAX_BYTES {
                self.read_queue(request, head).await?
            } else {
                if !registered {
                    self.register(request).await?;
                    registered = true;
                    // A message that was committed before the registration is in a head that is
                    // read after it.
                    continue;
                }
                self.read_postgres(request, head).await?
            };
            if let Some(visible) = visible {
                self.wakes.record_read(request.read, &visible, request.lease);
                return Ok((visible.page, head.inbox));
            }
        }
        Err(StoreError::conflict(InboxChanged))
    }

    /// Reads from the queue in Redis, which is loaded if it is missing. Returns `None` when the
    /// inbox has outgrown it meanwhile, or no longer exists.
    async fn read_queue(
        &self,
        request: Request<'_>,
        head: Head,
    ) -> StoreResult<Option<VisiblePage>> {
        let Request { read, after, limit, now, lease } = request;
        let (term, edge) =
            (lease.map(|id| self.leases.term(id)), self.wakes.waiting_edge(&read.reader.inbox));
        let (mut state, mut from, mut accept) = (head.state, "redis", Freshness::Same);
        let redis = &self.redis;
        for _ in 0..MAX_ATTEMPTS {
            let queue_read = QueueRead { read, state, accept, after, limit, now, term, edge };
            let permit = match redis.read(queue_read).await? {
                QueueAnswer::Page(visible) => {
                    metrics::counter!(names::HOT_READS, "from" => from).increment(1);
                    return Ok(Some(visible));
                }
                QueueAnswer::Ahead(queue) => {
                    let Some(head) = self.heads.get(&read.reader).await?.head else {
                        return Ok(None);
                    };
                    if head.state.has_lost(&queue) {
                        metrics::counter!(names::LOST_QUEUES).increment(1);
                        tracing::warn!(
                            "a queue in redis has messages that postgres has lost, dropping the queue"
                        );
                        redis.drop_queue(&read.reader).await?;
                    }
                    (state, accept) = (head.state, Freshness::AtLeast);
                    continue;
                }
                QueueAnswer::NotLoaded(permit) => permit,
            };
            let Some(whole) = page::whole(&self.database, head.inbox).await? else {
                return Ok(None);
            };
            redis.load(&read.reader, permit, whole.state, &whole.messages).await?;
            // The queue may already have messages that are committed from now on.
            (state, from, accept) = (whole.state, "reloaded", Freshness::AtLeast);
        }
        Err(StoreError::conflict(InboxChanged))
    }

    /// Reads from Postgres, and leases in Redis. Returns `None` when a message was removed
    /// meanwhile, perhaps by a reader that had leased it.
    async fn read_postgres(
        &self,
        request: Request<'_>,
        head: Head,
    ) -> StoreResult<Option<VisiblePage>> {
        let Request { read, after, limit, now, lease } = request;
        let reader = &read.reader;
        let snapshot = page::page(&self.database, &head, read, after, limit, now).await?;
        let mut envelopes: Vec<_> =
            snapshot.messages.into_iter().map(|queued| queued.envelope).collect();
        let mut seqs: Vec<_> =
            envelopes.iter().map(|envelope| envelope.seq).chain(snapshot.next).collect();
        let term = lease.map(|id| self.leases.term(id));
        let store_id = &snapshot.state.store_id;
        let claimed = self.redis.claim(reader, store_id, &seqs, envelopes.len(), term).await?;
        let more = claimed.seqs > envelopes.len();
        envelopes.truncate(claimed.seqs);
        seqs.truncate(envelopes.len());
        // A reader that leased and removed some of them in between has counted that by now.
        let present = self.heads.get(reader).await?.head.map(|head| head.state);
        let is_present = |state: State| {
            (state.store_id, state.removals) == (snapshot.state.store_id, snapshot.state.removals)
        };
        if !present.is_some_and(is_present) {
            if let Some(id) = lease {
                self.wakes.release(reader, id, &seqs).await;
            }
            return Ok(None);
        }
        metrics::counter!(names::HOT_READS, "from" => "postgres").increment(1);
        Ok(Some(VisiblePage {
            page: Page { store_id: snapshot.state.store_id, envelopes, more },
            head: snapshot.state.head,
            stopped_for: claimed.stopped_for,
        }))
    }

    async fn register(&self, request: Request<'_>) -> StoreResult<()> {
        let reader = &request.read.reader;
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
    ) -> StoreResult<Box<dyn Lease>> {
        let query = resolved(query);
        let mut guard = self.inner.leases.begin(query.reader);
        let request =
            Request { read: &query, after: Seq::ZERO, limit, now, lease: Some(&guard.id) };
        let (page, inbox) = self.inner.read(request).await?;
        guard.seqs = page.envelopes.iter().map(|envelope| envelope.seq).collect();
        let guard = if guard.seqs.is_empty() {
            guard.ended();
            None
        } else {
            Some(guard)
        };
        Ok(Box::new(InboxLease { page, guard, query, inbox, store: self.clone() }))
    }

    async fn peek(
        &self,
        query: ReadQuery,
        after: Seq,
        limit: PageLimit,
        now: UnixMillis,
    ) -> StoreResult<Page> {
        let query = resolved(query);
        let request = Request { read: &query, after, limit, now, lease: None };
        let (page, _) = self.inner.read(request).await?;
        Ok(page)
    }

    async fn ack(&self, query: ReadQuery, ack: Ack, now: UnixMillis) -> StoreResult<u32> {
        let query = resolved(query);
        let recent_ids = self.inner.limits.delivery.recent_ids;
        let remove = RemoveAcked { query: &query, ack: &ack, now, recent_ids };
        let Some(removal) = self.inner.database.run(&remove).await? else { return Ok(0) };
        let removed = u32::try_from(removal.seqs.len()).unwrap_or(u32::MAX);
        self.inner.applier.apply(Effects { removed: Some(removal), ..Effects::default() }).await;
        Ok(removed)
    }
}

/// A page and, unless it is empty, the guard of its lease.
struct InboxLease {
    page: Page,
    guard: Option<LeaseGuard>,
    query: ReadQuery,
    /// The inbox's number.
    inbox: i64,
    store: ClusterStore,
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
        let Self { page: Page { store_id, .. }, guard, query, inbox, store } = *self;
        let Some(mut guard) = guard else { return Ok(()) };
        let completed = CompletedPage { store_id, inbox, seqs: guard.seqs.clone(), now };
        match store.inner.completers.complete(completed).await? {
            Completion::Removed(number) => {
                let (lease, seqs) = (Some(guard.id.clone()), mem::take(&mut guard.seqs));
                let removal = Removal { query, store_id, number, lease, seqs };
                let effects = Effects { removed: Some(removal), ..Effects::default() };
                store.inner.applier.apply(effects).await;
                guard.ended();
            }
            // The lease is released.
            Completion::OtherHistory => drop(guard),
        }
        Ok(())
    }
}
