//! The store's wakes, counted: so that a test knows when a call waits, and that nothing is left of
//! one that has gone.

use std::{
    mem,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use futures_util::future::BoxFuture;
use qpq_domain::IdentityKey;
use qpq_ports::{Stores, Wake, Wakes};
use tokio::sync::Notify;

use crate::harness::Server;

/// What is known of those who wait.
#[derive(Default)]
pub(crate) struct Waiters {
    subscribed: AtomicUsize,
    waits: AtomicUsize,
    changed: Notify,
}

impl Waiters {
    /// Begins to count the wakes of `stores`.
    pub(crate) fn count(stores: &mut Stores) -> Arc<Self> {
        let waiters = Arc::<Self>::default();
        let inner = Arc::clone(&stores.wakes);
        stores.wakes = Arc::new(Counted { inner, waiters: Arc::clone(&waiters) });
        waiters
    }

    /// A server whose wakes are counted.
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

    /// Completes once waiting has begun `count` times since the server's start.
    pub(crate) async fn waited(&self, count: usize) {
        self.until(|waiters| waiters.waits.load(Ordering::SeqCst) >= count).await;
    }

    /// Completes once `count` are subscribed.
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
    fn subscribe(&self, inbox: &IdentityKey) -> Box<dyn Wake> {
        let inner = self.inner.subscribe(inbox);
        self.waiters.subscribed.fetch_add(1, Ordering::SeqCst);
        self.waiters.changed.notify_waiters();
        Box::new(CountedWake { inner, waiters: Arc::clone(&self.waiters) })
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
        // The subscription first, then the word of it.
        drop(mem::replace(&mut self.inner, Box::new(Gone)));
        self.waiters.subscribed.fetch_sub(1, Ordering::SeqCst);
        self.waiters.changed.notify_waiters();
    }
}

struct Gone;

impl Wake for Gone {
    fn woken(&mut self) -> BoxFuture<'_, ()> {
        Box::pin(std::future::pending())
    }
}
