//! Inboxes of the cluster: messages are accepted by Postgres (`committer`, `enqueue`), shown by
//! Redis where it can be relied on and by Postgres where not, and removed in Postgres first.
//!
//! A read begins with the inbox's head in Postgres, which says which state is the present one. A
//! queue in Redis that shows that state, or a later one, is shown; one that does not is loaded
//! anew. Inboxes that are too large for a queue are read page by page from Postgres, and only
//! leased in Redis.

mod committer;
mod completer;
mod enqueue;
mod leases;
pub(crate) mod page;
mod remove;

use std::fmt;

use async_trait::async_trait;
use qpq_domain::{Delivery, Seq, UnixMillis};
use qpq_ports::{
    Ack, Batch, Enqueued, Inboxes, Lease, Page, PageLimit, ReadQuery, StoreError, StoreResult,
};

pub use committer::COMMITTERS;
#[cfg(feature = "measure")]
pub(crate) use enqueue::all as commit;
pub(crate) use remove::{SWEEP, forget, sweep};

use self::{
    committer::Committers,
    completer::{Completers, Completion},
    leases::{Held, Leases},
    page::{Head, Heads, Present},
    remove::Removed,
};
use crate::{
    config::Timing,
    history::History,
    metrics as names,
    nats::EdgeId,
    postgres::{Database, Repeat},
    redis::queue::{Accept, Found, LeaseId, Look, MOST_BYTES, MOST_MESSAGES, Shown, State},
    time::Time,
    wakes::Waking,
};

/// How often a read begins anew, because what it had read was removed meanwhile.
const TRIES: usize = 16;

/// The number of an inbox that is not there.
const NOBODY: i64 = 0;

#[derive(Debug, thiserror::Error)]
#[error("the inbox changed {TRIES} times while it was read")]
struct Restless;

/// The queues.
#[derive(Clone, Debug)]
pub(crate) struct ClusterInboxes {
    database: Database,
    heads: Heads,
    committers: Committers,
    completers: Completers,
    leases: Leases,
    waking: Waking,
    limits: Delivery,
}

/// What is read, and how much of it.
#[derive(Clone, Copy)]
struct Request<'a> {
    read: &'a ReadQuery,
    after: Seq,
    limit: PageLimit,
    now: UnixMillis,
    /// Of a lease to be; none for a peek.
    lease: Option<&'a LeaseId>,
}

impl ClusterInboxes {
    pub(crate) fn start(
        database: Database,
        history: History,
        waking: Waking,
        edge: EdgeId,
        limits: Delivery,
        time: Time,
        timing: &Timing,
    ) -> Self {
        Self {
            heads: Heads::start(&database, &history),
            committers: Committers::start(&database, &history, limits, &time, &waking),
            completers: Completers::start(&database, limits.recent_ids),
            leases: Leases::start(edge, timing.lease, waking.clone()),
            database,
            waking,
            limits,
        }
    }

    /// What may be shown now, held if that is asked for, and the inbox's number.
    async fn look(&self, request: Request<'_>) -> StoreResult<(Page, i64)> {
        let inbox = &request.read.reader.inbox;
        self.leases.completed(inbox).await;
        let mut registered = false;
        for _ in 0..TRIES {
            let Present { store_id, head } = self.heads.get(inbox).await?;
            let Some(head) = head else { return Ok((Page::empty(store_id), NOBODY)) };
            let shown = if head.messages <= MOST_MESSAGES && head.bytes <= MOST_BYTES {
                self.read_queue(request, head).await?
            } else {
                if !registered {
                    self.register(request).await?;
                    registered = true;
                    // What was committed before the registration is in a head that is read after
                    // it.
                    continue;
                }
                self.read_postgres(request, head).await?
            };
            if let Some(shown) = shown {
                self.waking.looked(request.read, &shown, request.lease);
                return Ok((shown.page, head.inbox));
            }
        }
        Err(StoreError::conflict(Restless))
    }

    /// From the queue in Redis, which is loaded if it is not there. `None` when the inbox outgrew
    /// it meanwhile, or is no more.
    async fn read_queue(&self, request: Request<'_>, head: Head) -> StoreResult<Option<Shown>> {
        let Request { read, after, limit, now, lease } = request;
        let (hold, edge) =
            (lease.map(|id| self.leases.hold(id)), self.waking.waiting_edge(&read.reader.inbox));
        let (mut state, mut from, mut accept) = (head.state, "redis", Accept::Same);
        let redis = self.waking.redis();
        for _ in 0..TRIES {
            let look = Look { read, state, accept, after, limit, now, hold, edge };
            let permit = match redis.read(look).await? {
                Found::Page(shown) => {
                    metrics::counter!(names::HOT_READS, "from" => from).increment(1);
                    return Ok(Some(shown));
                }
                Found::Ahead(queue) => {
                    let Some(head) = self.heads.get(&read.reader.inbox).await?.head else {
                        return Ok(None);
                    };
                    if head.state.has_lost(&queue) {
                        metrics::counter!(names::LOST_QUEUES).increment(1);
                        tracing::warn!("a queue in Redis has what Postgres has lost, dropping it");
                        redis.drop_queue(&read.reader.inbox).await?;
                    }
                    (state, accept) = (head.state, Accept::AtLeast);
                    continue;
                }
                Found::NotLoaded(permit) => permit,
            };
            let Some(whole) = page::whole(&self.database, head.inbox).await? else {
                return Ok(None);
            };
            redis.load(&read.reader.inbox, permit, whole.state, &whole.messages).await?;
            // What is committed from now on may be there already.
            (state, from, accept) = (whole.state, "reloaded", Accept::AtLeast);
        }
        Err(StoreError::conflict(Restless))
    }

    /// From Postgres, leased in Redis. `None` when something of it was removed meanwhile, perhaps
    /// by a reader that had it.
    async fn read_postgres(&self, request: Request<'_>, head: Head) -> StoreResult<Option<Shown>> {
        let Request { read, after, limit, now, lease } = request;
        let inbox = &read.reader.inbox;
        let snapshot = page::page(&self.database, &head, read, after, limit, now).await?;
        let mut envelopes: Vec<_> =
            snapshot.messages.into_iter().map(|queued| queued.envelope).collect();
        let mut seqs: Vec<_> =
            envelopes.iter().map(|envelope| envelope.seq).chain(snapshot.next).collect();
        let hold = lease.map(|id| self.leases.hold(id));
        let store_id = &snapshot.state.store_id;
        let free = self.waking.redis().claim(inbox, store_id, &seqs, envelopes.len(), hold).await?;
        let more = free.seqs > envelopes.len();
        envelopes.truncate(free.seqs);
        seqs.truncate(envelopes.len());
        // Whoever had leased and removed some of it in between has counted that by now.
        let present = self.heads.get(inbox).await?.head.map(|head| head.state);
        let is_present = |state: State| {
            (state.store_id, state.removals) == (snapshot.state.store_id, snapshot.state.removals)
        };
        if !present.is_some_and(is_present) {
            if let Some(id) = lease {
                self.waking.release(inbox, id, &seqs).await;
            }
            return Ok(None);
        }
        metrics::counter!(names::HOT_READS, "from" => "postgres").increment(1);
        Ok(Some(Shown {
            page: Page { store_id: snapshot.state.store_id, envelopes, more },
            head: snapshot.state.head,
            stopped_for: free.stopped_for,
        }))
    }

    async fn register(&self, request: Request<'_>) -> StoreResult<()> {
        match self.waking.waiting_edge(&request.read.reader.inbox) {
            Some(edge) => self.waking.redis().register(&request.read.reader.inbox, edge).await,
            None => Ok(()),
        }
    }
}

#[async_trait]
impl Inboxes for ClusterInboxes {
    async fn enqueue(&self, batch: Batch) -> StoreResult<Vec<Enqueued>> {
        self.committers.enqueue(batch).await
    }

    async fn lease(
        &self,
        read: ReadQuery,
        limit: PageLimit,
        now: UnixMillis,
    ) -> StoreResult<Box<dyn Lease>> {
        let mut held = self.leases.taking(read.reader.inbox);
        let request = Request { read: &read, after: Seq::ZERO, limit, now, lease: Some(&held.id) };
        let (page, inbox) = self.look(request).await?;
        held.seqs = page.envelopes.iter().map(|envelope| envelope.seq).collect();
        let held = if held.seqs.is_empty() {
            held.ended();
            None
        } else {
            Some(held)
        };
        Ok(Box::new(InboxLease { page, held, read, inbox, inboxes: self.clone() }))
    }

    async fn peek(
        &self,
        read: ReadQuery,
        after: Seq,
        limit: PageLimit,
        now: UnixMillis,
    ) -> StoreResult<Page> {
        let (page, _) = self.look(Request { read: &read, after, limit, now, lease: None }).await?;
        Ok(page)
    }

    async fn ack(&self, read: ReadQuery, ack: Ack, now: UnixMillis) -> StoreResult<u32> {
        let recent_ids = self.limits.recent_ids;
        let removed = self
            .database
            .once("ack", Repeat::Harmless, |connection| {
                let ack = ack.clone();
                Box::pin(
                    async move { remove::acked(connection, &read, &ack, now, recent_ids).await },
                )
            })
            .await?;
        let Some(removed) = removed else { return Ok(0) };
        let Removed { store_id, removal, seqs } = &removed;
        self.waking.removed(&read, store_id, *removal, None, seqs).await;
        Ok(u32::try_from(removed.seqs.len()).unwrap_or(u32::MAX))
    }
}

/// A page and, unless it is empty, the hold on its messages.
struct InboxLease {
    page: Page,
    held: Option<Held>,
    read: ReadQuery,
    /// The inbox's number.
    inbox: i64,
    inboxes: ClusterInboxes,
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
        let Self { page, held, read, inbox, inboxes } = *self;
        let Some(held) = held else { return Ok(()) };
        let (store_id, seqs) = (&page.store_id, &held.seqs);
        match inboxes.completers.complete(*store_id, inbox, seqs.clone(), now).await? {
            Completion::Removed(removal) => {
                inboxes.waking.removed(&read, store_id, removal, Some(&held.id), seqs).await;
                held.ended();
            }
            // Dropped, the lease is released.
            Completion::OtherHistory => drop(held),
        }
        Ok(())
    }
}
