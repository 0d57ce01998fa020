//! The leases of this edge. A lease is stored in Redis, visible to all edges, for a few seconds.
//! While its page is on the way to the client, this edge renews the lease. If the edge is killed,
//! the lease expires.

use std::{
    collections::HashMap,
    mem,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::{StreamExt as _, stream};
use parking_lot::Mutex;
use qpq_domain::Seq;
use qpq_ports::Page;
use tokio::{
    runtime::Handle,
    sync::Notify,
    task::JoinSet,
    time::{MissedTickBehavior, interval},
};

use crate::{
    metrics as names,
    nats::EdgeId,
    redis::queue::{LeaseId, LeaseTerm, ReaderId},
    wakes::WakeRegistry,
};

/// Maximum concurrent renewals.
const RENEWALS: usize = 64;

/// The leases of this edge. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Leases {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    edge: EdgeId,
    next: AtomicU64,
    lasts: Duration,
    wakes: WakeRegistry,
    live: Mutex<HashMap<LeaseId, ReaderId>>,
    /// Readers whose leases are being released. A read by one of them waits here for the end of the
    /// release, so that it sees the released messages.
    releasing: Mutex<HashMap<ReaderId, Releasing>>,
    /// The tasks that release leases.
    releases: Mutex<JoinSet<()>>,
}

#[derive(Debug, Default)]
struct Releasing {
    count: usize,
    done: Arc<Notify>,
}

/// A lease of this edge. Dropping the guard starts the release of the lease.
#[derive(Debug)]
pub(super) struct LeaseGuard {
    leases: Leases,
    pub(super) id: LeaseId,
    pub(super) reader: ReaderId,
    /// The leased messages. Empty until the read has returned them.
    pub(super) seqs: Vec<Seq>,
    ended: bool,
}

impl Leases {
    pub(crate) fn new(edge: EdgeId, lasts: Duration, wakes: WakeRegistry) -> Self {
        let (live, releasing) = (Mutex::default(), Mutex::default());
        let (next, releases) = (AtomicU64::new(0), Mutex::default());
        Self { inner: Arc::new(Inner { edge, next, lasts, wakes, live, releasing, releases }) }
    }

    /// Renews the leases of this edge periodically. Never completes.
    pub(crate) async fn renew(self) {
        let mut ticks = interval(self.inner.lasts / 3);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.inner.renew().await;
        }
    }

    /// Waits for the releases in progress.
    pub(crate) async fn close(&self) {
        let mut releases = mem::take(&mut *self.inner.releases.lock());
        while releases.join_next().await.is_some() {}
    }

    /// Creates the guard of a lease that is about to begin, so that it is released even if the call
    /// is dropped meanwhile.
    pub(super) fn begin(&self, reader: ReaderId) -> LeaseGuard {
        let n = self.inner.next.fetch_add(1, Ordering::Relaxed);
        let id = LeaseId(format!("{}.{n}", self.inner.edge.0));
        self.inner.live.lock().insert(id.clone(), reader);
        metrics::gauge!(names::LEASES).increment(1);
        LeaseGuard { leases: self.clone(), id, reader, seqs: Vec::new(), ended: false }
    }

    /// Waits until this edge is releasing no lease of the reader.
    pub(super) async fn releases_ended(&self, reader: &ReaderId) {
        loop {
            let done = match self.inner.releasing.lock().get(reader) {
                None => return,
                Some(releasing) => Arc::clone(&releasing.done).notified_owned(),
            };
            done.await;
        }
    }
}

impl Inner {
    async fn renew(&self) {
        let live: Vec<_> =
            self.live.lock().iter().map(|(id, reader)| (id.clone(), *reader)).collect();
        stream::iter(live)
            .for_each_concurrent(RENEWALS, |(id, reader)| async move {
                // If the renewal fails, the lease may expire, and its messages are then read again.
                let _ = self
                    .wakes
                    .redis()
                    .renew(&reader, LeaseTerm { lease: &id, lasts: self.lasts })
                    .await;
            })
            .await;
    }

    fn release_began(&self, reader: ReaderId) {
        self.releasing.lock().entry(reader).or_default().count += 1;
    }

    fn release_ended(&self, reader: &ReaderId) {
        let mut releasing = self.releasing.lock();
        let entry = releasing.get_mut(reader).expect("it began");
        entry.count -= 1;
        if entry.count == 0 {
            entry.done.notify_waiters();
            releasing.remove(reader);
        }
    }
}

impl LeaseGuard {
    /// Returns the lease with its duration.
    pub(super) fn term(&self) -> LeaseTerm<'_> {
        LeaseTerm { lease: &self.id, lasts: self.leases.inner.lasts }
    }

    /// Adds the messages of the leased page to the guard. Returns `None` if the page is empty.
    pub(super) fn with(mut self, page: &Page) -> Option<Self> {
        self.seqs = page.envelopes.iter().map(|envelope| envelope.seq).collect();
        if self.seqs.is_empty() {
            self.ended();
            None
        } else {
            Some(self)
        }
    }

    /// Ends the guard without a release: the lease has ended, or has no messages.
    pub(super) fn ended(mut self) {
        self.ended = true;
    }
}

impl Drop for LeaseGuard {
    fn drop(&mut self) {
        let inner = Arc::clone(&self.leases.inner);
        inner.live.lock().remove(&self.id);
        metrics::gauge!(names::LEASES).decrement(1);
        // Without a runtime the process is ending, and the lease expires.
        let (false, Ok(runtime)) = (self.ended, Handle::try_current()) else { return };
        let (id, reader, seqs) = (self.id.clone(), self.reader, mem::take(&mut self.seqs));
        inner.release_began(reader);
        let releasing = Arc::clone(&inner);
        let mut releases = inner.releases.lock();
        while releases.try_join_next().is_some() {}
        releases.spawn_on(
            async move {
                releasing.wakes.release(&reader, &id, &seqs).await;
                releasing.release_ended(&reader);
            },
            &runtime,
        );
    }
}
