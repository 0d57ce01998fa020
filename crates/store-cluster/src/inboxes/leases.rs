//! What this edge has on its way to clients. A lease lives in Redis, where all edges see it, for a
//! few seconds; as long as its page is on its way it is renewed from here, and if this edge dies it
//! runs out.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::{StreamExt as _, stream};
use parking_lot::Mutex;
use qpq_domain::{IdentityKey, Seq};
use tokio::{
    runtime::Handle,
    sync::Notify,
    time::{MissedTickBehavior, interval},
};

use crate::{
    metrics as names,
    nats::EdgeId,
    redis::queue::{Hold, LeaseId},
    wakes::Waking,
};

/// Renewals at a time.
const RENEWALS: usize = 64;

/// The leases of this edge. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Leases {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    edge: EdgeId,
    next: AtomicU64,
    lasts: Duration,
    waking: Waking,
    live: Mutex<HashMap<LeaseId, IdentityKey>>,
    /// Inboxes with leases that are being released: whoever reads one of those here waits for that,
    /// so that a read after a release sees what was released.
    releasing: Mutex<HashMap<IdentityKey, Releasing>>,
}

#[derive(Debug, Default)]
struct Releasing {
    count: usize,
    done: Arc<Notify>,
}

/// Messages that are hidden from other reads. Dropped, they are released, soon.
#[derive(Debug)]
pub(super) struct Held {
    leases: Leases,
    pub(super) id: LeaseId,
    inbox: IdentityKey,
    /// What it holds; none while that is not known.
    pub(super) seqs: Vec<Seq>,
    ended: bool,
}

impl Leases {
    /// Needs a tokio runtime, on which leases are renewed as long as somebody has this.
    pub(super) fn start(edge: EdgeId, lasts: Duration, waking: Waking) -> Self {
        let shared = Arc::new(Shared {
            edge,
            next: AtomicU64::new(0),
            lasts,
            waking,
            live: Mutex::default(),
            releasing: Mutex::default(),
        });
        let weak = Arc::downgrade(&shared);
        tokio::spawn(async move {
            let mut ticks = interval(lasts / 3);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                ticks.tick().await;
                let Some(shared) = weak.upgrade() else { return };
                shared.renew().await;
            }
        });
        Self { shared }
    }

    /// For how long `id` is to hold.
    pub(super) fn hold<'a>(&self, id: &'a LeaseId) -> Hold<'a> {
        Hold { lease: id, lasts: self.shared.lasts }
    }

    /// Looks after a lease that is about to be taken, so that it is released even if who takes it
    /// goes away meanwhile.
    pub(super) fn taking(&self, inbox: IdentityKey) -> Held {
        let n = self.shared.next.fetch_add(1, Ordering::Relaxed);
        let id = LeaseId(format!("{}.{n}", self.shared.edge.0));
        self.shared.live.lock().insert(id.clone(), inbox);
        metrics::gauge!(names::LEASES).increment(1);
        Held { leases: self.clone(), id, inbox, seqs: Vec::new(), ended: false }
    }

    /// Completes when nothing of the inbox is being released here.
    pub(super) async fn completed(&self, inbox: &IdentityKey) {
        loop {
            let done = match self.shared.releasing.lock().get(inbox) {
                None => return,
                Some(releasing) => Arc::clone(&releasing.done).notified_owned(),
            };
            done.await;
        }
    }
}

impl Shared {
    async fn renew(&self) {
        let live: Vec<_> =
            self.live.lock().iter().map(|(id, inbox)| (id.clone(), *inbox)).collect();
        stream::iter(live)
            .for_each_concurrent(RENEWALS, |(id, inbox)| async move {
                // A failure may cost the lease, and then its messages are read again.
                let _ =
                    self.waking.redis().renew(&inbox, Hold { lease: &id, lasts: self.lasts }).await;
            })
            .await;
    }

    fn release_began(&self, inbox: IdentityKey) {
        self.releasing.lock().entry(inbox).or_default().count += 1;
    }

    fn release_ended(&self, inbox: &IdentityKey) {
        let mut releasing = self.releasing.lock();
        let entry = releasing.get_mut(inbox).expect("it began");
        entry.count -= 1;
        if entry.count == 0 {
            entry.done.notify_waiters();
            releasing.remove(inbox);
        }
    }
}

impl Held {
    /// The lease was ended otherwise, or holds nothing.
    pub(super) fn ended(mut self) {
        self.ended = true;
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let shared = Arc::clone(&self.leases.shared);
        shared.live.lock().remove(&self.id);
        metrics::gauge!(names::LEASES).decrement(1);
        // Without a runtime the process is ending, and the lease runs out.
        let (false, Ok(runtime)) = (self.ended, Handle::try_current()) else { return };
        let (id, inbox, seqs) = (self.id.clone(), self.inbox, std::mem::take(&mut self.seqs));
        shared.release_began(inbox);
        runtime.spawn(async move {
            shared.waking.release(&inbox, &id, &seqs).await;
            shared.release_ended(&inbox);
        });
    }
}
