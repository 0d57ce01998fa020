//! Counts the wakes and reads of a store, so that a test can await a waiting call and check its
//! cost and its end.

use std::{
    mem,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use async_trait::async_trait;
use futures_util::future::BoxFuture;
use qpq_domain::{Seq, UnixMillis};
use qpq_ports::{
    Ack, Batch, Enqueued, Inboxes, Lease, Page, PageLimit, ReadError, ReadQuery, StoreResult,
    Stores, Wake, Wakes,
};
use tokio::sync::Notify;

use crate::harness::Server;

/// The counts of waiting calls.
#[derive(Default)]
pub(crate) struct Waiters {
    subscribed: AtomicUsize,
    waits: AtomicUsize,
    leases: AtomicUsize,
    changed: Notify,
}

impl Waiters {
    /// Begins to count the wakes of `stores`.
    pub(crate) fn count(stores: &mut Stores) -> Arc<Self> {
        let waiters = Arc::<Self>::default();
        let inner = Arc::clone(&stores.wakes);
        stores.wakes = Arc::new(Counted { inner, waiters: Arc::clone(&waiters) });
        let inner = Arc::clone(&stores.inboxes);
        stores.inboxes = Arc::new(CountedInboxes { inner, waiters: Arc::clone(&waiters) });
        waiters
    }

    /// Starts a server whose wakes are counted.
    pub(crate) async fn server() -> (Server, Arc<Self>) {
        let mut counted = None;
        let server = Server::with_stores(
            |_| {},
            |mut stores| {
                counted = Some(Self::count(&mut stores));
                stores
            },
        )
        .await;
        (server, counted.expect("the stores were wrapped"))
    }

    /// Completes after `count` leases since the server's start. A waiting call begins with one.
    pub(crate) async fn leased(&self, count: usize) {
        self.until(|waiters| waiters.leases() >= count).await;
    }

    /// Returns the number of leases since the server's start.
    pub(crate) fn leases(&self) -> usize {
        self.leases.load(Ordering::SeqCst)
    }

    /// Completes after a wait for a wake has begun `count` times since the server's start. Of the
    /// calls that wait for one view, one waits for its wake.
    pub(crate) async fn waited(&self, count: usize) {
        self.until(|waiters| waiters.waits.load(Ordering::SeqCst) >= count).await;
    }

    /// Completes once there are `count` subscriptions.
    pub(crate) async fn subscribed(&self, count: usize) {
        self.until(|waiters| waiters.subscribed.load(Ordering::SeqCst) == count).await;
    }

    async fn until(&self, holds: impl Fn(&Self) -> bool) {
        loop {
            let changed = self.changed.notified();
            if holds(self) {
                return;
            }
            changed.await;
        }
    }
}

struct Counted {
    inner: Arc<dyn Wakes>,
    waiters: Arc<Waiters>,
}

impl Wakes for Counted {
    fn subscribe(&self, query: &ReadQuery) -> Box<dyn Wake> {
        let inner = self.inner.subscribe(query);
        self.waiters.subscribed.fetch_add(1, Ordering::SeqCst);
        self.waiters.changed.notify_waiters();
        Box::new(CountedWake { inner, waiters: Arc::clone(&self.waiters) })
    }
}

struct CountedInboxes {
    inner: Arc<dyn Inboxes>,
    waiters: Arc<Waiters>,
}

#[async_trait]
impl Inboxes for CountedInboxes {
    async fn enqueue(&self, batch: Batch) -> StoreResult<Vec<Enqueued>> {
        self.inner.enqueue(batch).await
    }

    async fn lease(
        &self,
        read: ReadQuery,
        limit: PageLimit,
        now: UnixMillis,
    ) -> Result<Box<dyn Lease>, ReadError> {
        let lease = self.inner.lease(read, limit, now).await;
        self.waiters.leases.fetch_add(1, Ordering::SeqCst);
        self.waiters.changed.notify_waiters();
        lease
    }

    async fn peek(
        &self,
        read: ReadQuery,
        after: Seq,
        limit: PageLimit,
        now: UnixMillis,
    ) -> Result<Page, ReadError> {
        self.inner.peek(read, after, limit, now).await
    }

    async fn ack(&self, read: ReadQuery, ack: Ack, now: UnixMillis) -> Result<u32, ReadError> {
        self.inner.ack(read, ack, now).await
    }
}

struct CountedWake {
    inner: Box<dyn Wake>,
    waiters: Arc<Waiters>,
}

impl Wake for CountedWake {
    fn woken(&mut self) -> BoxFuture<'_, ()> {
        self.waiters.waits.fetch_add(1, Ordering::SeqCst);
        self.waiters.changed.notify_waiters();
        self.inner.woken()
    }
}

impl Drop for CountedWake {
    fn drop(&mut self) {
        // The subscription ends before its end is counted.
        drop(mem::replace(&mut self.inner, Box::new(Ended)));
        self.waiters.subscribed.fetch_sub(1, Ordering::SeqCst);
        self.waiters.changed.notify_waiters();
    }
}

struct Ended;

impl Wake for Ended {
    fn woken(&mut self) -> BoxFuture<'_, ()> {
        Box::pin(std::future::pending())
    }
}
