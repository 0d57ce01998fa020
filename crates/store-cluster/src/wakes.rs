//! Who of this edge waits for which inbox, and how word of something new gets there.
//!
//! A read of an inbox that somebody here waits for registers this edge with the inbox in Redis, in
//! the same script that looks; whatever changes the inbox takes the registrations away, in the same
//! script that makes the change, and sends each of those edges one word through NATS. So either the
//! read sees the message, or the message sees the reader. Every part of that may fail: then a poll
//! of the heads, every few seconds for all that wait here together, finds what nobody told.

use std::{collections::HashMap, fmt, sync::Arc, time::Duration};

use futures_util::{StreamExt as _, future::BoxFuture, stream};
use parking_lot::Mutex;
use qpq_domain::{IdentityKey, Seq, StoreId};
use qpq_ports::{Wake, Wakes};
use tokio::{
    sync::{Notify, broadcast::error::RecvError},
    time::{Instant, sleep, sleep_until},
};

use crate::{
    history::History,
    inboxes::page,
    metrics as names,
    nats::{Bus, EdgeId, Heard},
    postgres::Database,
    redis::{
        Redis,
        queue::{LeaseId, Queued, REGISTERED},
    },
};

/// How long a subscription waits at most before it looks again by itself, which renews its
/// registration.
const LOOK_AGAIN: Duration = Duration::from_secs(60);
const _: () = assert!(LOOK_AGAIN.as_secs() < REGISTERED.as_secs());

/// Inboxes told to Redis at a time, of one batch.
const PUSHES: usize = 64;
/// Heads in one statement of a poll.
const POLLED: usize = 1_000;

/// All that has to do with waking. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Waking {
    redis: Redis,
    bus: Bus,
    edge: EdgeId,
    table: Arc<Table>,
}

/// The subscriptions of this edge.
#[derive(Default)]
struct Table {
    inboxes: Mutex<HashMap<IdentityKey, Entry>>,
}

struct Entry {
    subscribers: Vec<Arc<Subscriber>>,
    /// The newest seq of the state that somebody here has seen, if anybody has.
    seen: Option<Seen>,
}

/// How far somebody has looked, and in which history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    store_id: StoreId,
    head: u64,
}

impl Seen {
    /// Whether somebody who has looked so far has missed something.
    fn is_news_to(self, seen: Self) -> bool {
        self.store_id != seen.store_id || self.head > seen.head
    }
}

#[derive(Default)]
struct Subscriber {
    woken: Notify,
    /// When to look again, because a lease ends that was in the way.
    look_at: Mutex<Option<Instant>>,
}

impl fmt::Debug for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Table").field("inboxes", &self.inboxes.lock().len()).finish()
    }
}

impl Waking {
    pub(crate) fn new(redis: Redis, bus: Bus, edge: EdgeId) -> Self {
        Self { redis, bus, edge, table: Arc::default() }
    }

    pub(crate) fn redis(&self) -> &Redis {
        &self.redis
    }

    /// The inboxes that somebody here waits for.
    pub(crate) fn waiting(&self) -> Vec<IdentityKey> {
        self.table.inboxes.lock().keys().copied().collect()
    }

    /// This edge, if it is to be told of what happens in the inbox.
    pub(crate) fn waiting_edge(&self, inbox: &IdentityKey) -> Option<&str> {
        self.table.inboxes.lock().contains_key(inbox).then_some(&*self.edge.0)
    }

    /// Somebody here has looked at the inbox up to `head`, and was stopped by a lease that ends by
    /// itself in that time.
    pub(crate) fn looked(
        &self,
        inbox: &IdentityKey,
        store_id: StoreId,
        head: u64,
        stopped_for: Option<Duration>,
    ) {
        let mut inboxes = self.table.inboxes.lock();
        let Some(entry) = inboxes.get_mut(inbox) else { return };
        let now = Seen { store_id, head };
        let news = entry.seen.is_some_and(|seen| now.is_news_to(seen));
        if news || entry.seen.is_none() {
            entry.seen = Some(now);
        }
        if news {
            // The poll will not tell the others any more.
            entry.subscribers.iter().for_each(|subscriber| subscriber.woken.notify_one());
        }
        if let Some(wait) = stopped_for {
            // A moment later, so that it has ended by then.
            let at = Instant::now() + wait + Duration::from_millis(5);
            entry.subscribers.iter().for_each(|subscriber| *subscriber.look_at.lock() = Some(at));
        }
    }

    /// Tells Redis of messages that were committed in a history, and whoever waits for them.
    pub(crate) async fn push(&self, store_id: StoreId, inboxes: HashMap<IdentityKey, Vec<Queued>>) {
        stream::iter(inboxes)
            .for_each_concurrent(PUSHES, |(inbox, messages)| async move {
                match self.redis.push(&inbox, &store_id, &messages).await {
                    Ok(edges) => self.tell(&inbox, &edges),
                    Err(error) => self.untold(&inbox, &error),
                }
            })
            .await;
    }

    /// Tells Redis of messages that were removed in a history.
    pub(crate) async fn removed(
        &self,
        inbox: &IdentityKey,
        store_id: &StoreId,
        removal: u64,
        lease: Option<&LeaseId>,
        seqs: &[Seq],
    ) {
        match self.redis.removed(inbox, store_id, removal, lease, seqs).await {
            Ok(edges) => self.tell(inbox, &edges),
            Err(error) => self.untold(inbox, &error),
        }
    }

    /// Ends a lease; what it held is to be seen again.
    pub(crate) async fn release(&self, inbox: &IdentityKey, lease: &LeaseId, seqs: &[Seq]) {
        match self.redis.released(inbox, lease, seqs).await {
            Ok(edges) => self.tell(inbox, &edges),
            Err(error) => self.untold(inbox, &error),
        }
    }

    fn tell(&self, inbox: &IdentityKey, edges: &[String]) {
        for edge in edges.iter().filter(|edge| **edge != *self.edge.0) {
            self.bus.wake(edge, *inbox);
        }
        self.wake_here(inbox, "local");
    }

    /// Redis does not know, so nobody elsewhere is told: they find it by looking.
    fn untold(&self, inbox: &IdentityKey, error: &(dyn std::error::Error + 'static)) {
        tracing::debug!(error, "Redis was not told of a change in an inbox");
        self.wake_here(inbox, "local");
    }

    fn wake_here(&self, inbox: &IdentityKey, way: &'static str) {
        let inboxes = self.table.inboxes.lock();
        let Some(entry) = inboxes.get(inbox) else { return };
        entry.subscribers.iter().for_each(|subscriber| subscriber.woken.notify_one());
        metrics::counter!(names::WAKES, "way" => way).increment(1);
    }

    fn wake_all(&self) {
        for entry in self.table.inboxes.lock().values() {
            entry.subscribers.iter().for_each(|subscriber| subscriber.woken.notify_one());
        }
    }

    /// Passes on what other edges tell, as long as there is a bus.
    pub(crate) async fn listen(self) {
        let mut heard = self.bus.hear();
        loop {
            match heard.recv().await {
                Ok(Heard::Wake(inbox)) => self.wake_here(&inbox, "received"),
                Ok(_) => {}
                // Something was missed, and nobody knows what.
                Err(RecvError::Lagged(_)) => self.wake_all(),
                Err(RecvError::Closed) => return,
            }
        }
    }

    /// Looks every `every`, and after each time that NATS was away, whether an inbox has something
    /// that nobody told.
    pub(crate) async fn poll(self, database: Database, history: History, every: Duration) {
        let mut back = self.bus.back();
        loop {
            // Edges that started together do not look together for ever.
            let pause = every.mul_f64(0.8 + 0.4 * rand::random::<f64>());
            tokio::select! {
                () = sleep(pause) => {}
                Ok(()) = back.changed() => {}
            }
            self.look(&database, &history).await;
        }
    }

    async fn look(&self, database: &Database, history: &History) {
        for inboxes in self.waiting().chunks(POLLED) {
            // A failure is noted where it happens; the next poll looks again.
            let Ok((_, heads)) = page::heads(database, history, inboxes).await else { return };
            for (inbox, head) in heads {
                let now = Seen { store_id: head.state.store_id, head: head.state.head };
                let news = {
                    let inboxes = self.table.inboxes.lock();
                    inboxes
                        .get(&inbox)
                        .is_some_and(|entry| entry.seen.is_none_or(|seen| now.is_news_to(seen)))
                };
                if news {
                    self.wake_here(&inbox, "found");
                }
            }
        }
    }
}

/// The port over it.
#[derive(Debug)]
pub(crate) struct ClusterWakes(pub(crate) Waking);

impl Wakes for ClusterWakes {
    fn subscribe(&self, inbox: &IdentityKey) -> Box<dyn Wake> {
        let subscriber = Arc::<Subscriber>::default();
        let table = Arc::clone(&self.0.table);
        let mut inboxes = table.inboxes.lock();
        let entry = inboxes
            .entry(*inbox)
            .or_insert_with(|| Entry { subscribers: Vec::with_capacity(1), seen: None });
        entry.subscribers.push(Arc::clone(&subscriber));
        drop(inboxes);
        metrics::gauge!(names::WAITERS).increment(1);
        Box::new(Subscription { table, inbox: *inbox, subscriber })
    }
}

struct Subscription {
    table: Arc<Table>,
    inbox: IdentityKey,
    subscriber: Arc<Subscriber>,
}

impl Wake for Subscription {
    fn woken(&mut self) -> BoxFuture<'_, ()> {
        let again = Instant::now() + LOOK_AGAIN.mul_f64(0.75 + 0.25 * rand::random::<f64>());
        Box::pin(async move {
            let at = self.subscriber.look_at.lock().map_or(again, |at| at.min(again));
            tokio::select! {
                biased;
                () = self.subscriber.woken.notified() => {}
                () = sleep_until(at) => *self.subscriber.look_at.lock() = None,
            }
        })
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let mut inboxes = self.table.inboxes.lock();
        if let Some(entry) = inboxes.get_mut(&self.inbox) {
            entry.subscribers.retain(|subscriber| !Arc::ptr_eq(subscriber, &self.subscriber));
            if entry.subscribers.is_empty() {
                inboxes.remove(&self.inbox);
            }
        }
        drop(inboxes);
        metrics::gauge!(names::WAITERS).decrement(1);
    }
}
