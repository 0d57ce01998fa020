//! The waiting calls of this edge, and their wakes.
//!
//! If a call here waits for an inbox, the script that reads the inbox in Redis also registers this
//! edge as waiting. The script that changes the inbox returns the registered edges, and each of
//! them receives one wake through NATS. So either the read sees the message, or the message finds
//! the waiting edge. A wake names the channel of the change, if the change has only one, and wakes
//! only the calls that read that channel. A registration lasts for a fixed time, whether or not it
//! was used. If any of these steps fails, a poll of the heads, every few seconds for all calls that
//! wait here, finds the message.

use std::{collections::HashMap, fmt, sync::Arc, time::Duration};

use futures_util::{StreamExt as _, future::BoxFuture, stream};
use parking_lot::Mutex;
use qpq_domain::{IdentityKey, Seq, StoreId};
use qpq_ports::{ReadQuery, Reader, StoreResult, View, Wake, Wakes};
use tokio::{
    sync::{Notify, broadcast::error::RecvError},
    time::{Instant, sleep, sleep_until},
};

use crate::{
    ClusterStore,
    effects::{Removal, ToInbox},
    history::History,
    inboxes::page,
    metrics as names,
    nats::{Bus, BusMessage, EdgeId},
    postgres::Database,
    redis::{
        Redis,
        queue::{LeaseId, MAX_BYTES, Push, Queued, REGISTERED, ReaderId, VisiblePage},
    },
};

/// Maximum time that a subscription waits before it wakes by itself, so that the read that follows
/// renews its registration.
const RENEW_AFTER: Duration = Duration::from_secs(60);
const _: () = assert!(RENEW_AFTER.as_secs() < REGISTERED.as_secs());

/// Maximum concurrent calls of Redis for the queues of one batch.
const PUSHES: usize = 64;
/// Maximum bytes of a batch that are added to queues. A message of 1 MiB to all members of a large
/// group would be gigabytes, most of them for queues that are not loaded.
const PUSHED: usize = 64 << 20;
/// Maximum heads in one statement of a poll.
const POLLED: usize = 1_000;

/// The waiting calls of this edge, and the ways to wake those of others. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct WakeRegistry {
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
}

/// The position up to which an inbox has been read, and its history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ReadPosition {
    store_id: StoreId,
    head: u64,
}

impl ReadPosition {
    /// Returns whether a read up to `seen` has missed messages of this state.
    fn is_after(self, seen: Self) -> bool {
        self.store_id != seen.store_id || self.head > seen.head
    }
}

struct Subscriber {
    /// The view that the call reads.
    query: ReadQuery,
    woken: Notify,
    /// The position up to which a call of this reader has read the view on this edge, if any has.
    seen: Mutex<Option<ReadPosition>>,
    /// The instant of a wake without a change: a lease that hid messages ends, or the registration
    /// must be renewed.
    wake_at: Mutex<Option<Instant>>,
    /// Notified when `wake_at` changes.
    rescheduled: Notify,
}

impl fmt::Debug for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Table").field("inboxes", &self.inboxes.lock().len()).finish()
    }
}

impl WakeRegistry {
    pub(crate) fn new(redis: Redis, bus: Bus, edge: EdgeId) -> Self {
        Self { redis, bus, edge, table: Arc::default() }
    }

    pub(crate) fn redis(&self) -> &Redis {
        &self.redis
    }

    /// Returns the inboxes that calls here wait for.
    pub(crate) fn waiting(&self) -> Vec<IdentityKey> {
        self.table.inboxes.lock().keys().copied().collect()
    }

    /// Returns the id of this edge, if a call here waits for the inbox.
    pub(crate) fn waiting_edge(&self, inbox: &IdentityKey) -> Option<&str> {
        self.table.inboxes.lock().contains_key(inbox).then_some(&*self.edge.0)
    }

    /// Records a read, and the lease of its page if it has one.
    pub(crate) fn record_read(
        &self,
        read: &ReadQuery,
        page: &VisiblePage,
        lease: Option<&LeaseId>,
    ) {
        self.table.record_read(read, page, lease);
    }

    /// Starts a subscription of this edge.
    pub(crate) fn subscribe(&self, query: &ReadQuery) -> Box<dyn Wake> {
        Box::new(self.table.subscribe(query))
    }

    /// Adds messages that were committed in a history to their queues, and wakes waiting edges.
    pub(crate) async fn push(&self, store_id: StoreId, inboxes: HashMap<IdentityKey, ToInbox>) {
        let bytes: usize = inboxes.values().map(ToInbox::bytes).sum();
        let push = |(inbox, mut accepted): (IdentityKey, ToInbox)| {
            let view = common_view(&accepted.messages);
            // A queue that misses a message is loaded again by the next read.
            if bytes > PUSHED || accepted.bytes() as u64 > MAX_BYTES {
                accepted.messages.clear();
            }
            Push { inbox, devices: accepted.devices, view, messages: accepted.messages }
        };
        let pushes = inboxes.into_iter().map(push).collect();
        stream::iter(self.redis.calls(pushes))
            .for_each_concurrent(PUSHES, |pushes| async move {
                let mut waiting = known(self.redis.push(&store_id, &pushes).await).into_iter();
                for push in &pushes {
                    self.notify(&push.inbox, push.view, &waiting.next().unwrap_or_default());
                }
            })
            .await;
    }

    /// Removes messages from their queue, ends their lease, and wakes waiting edges.
    pub(crate) async fn removed(&self, removal: &Removal) {
        let waiting = known(self.redis.removed(removal).await);
        self.notify(&removal.reader.inbox, removal.view, &waiting);
    }

    /// Ends a lease and wakes waiting edges, since its messages are visible again.
    pub(crate) async fn release(&self, reader: &ReaderId, lease: &LeaseId, seqs: &[Seq]) {
        let waiting = known(self.redis.released(reader, lease, seqs).await);
        self.notify(&reader.inbox, View::All, &waiting);
    }

    /// Wakes the edges that wait for a view of the inbox, and the calls here.
    fn notify(&self, inbox: &IdentityKey, view: View, waiting: &[String]) {
        for edge in waiting.iter().filter(|edge| **edge != *self.edge.0) {
            self.bus.wake(edge, *inbox, view);
        }
        self.wake_here(inbox, view, "local");
    }

    /// Wakes the calls of this edge that read a changed view.
    fn wake_here(&self, inbox: &IdentityKey, view: View, way: &'static str) {
        if self.table.wake(inbox, view) > 0 {
            metrics::counter!(names::WAKES, "way" => way).increment(1);
        }
    }

    fn wake_all(&self) {
        for entry in self.table.inboxes.lock().values() {
            entry.subscribers.iter().for_each(|subscriber| subscriber.woken.notify_one());
        }
    }

    /// Passes on the wakes from other edges, until the bus is closed.
    pub(crate) async fn listen(self) {
        let mut messages = self.bus.messages();
        loop {
            match messages.recv().await {
                Ok(BusMessage::Wake(inbox, view)) => self.wake_here(&inbox, view, "received"),
                Ok(_) => {}
                // Messages were lost, and any of them may have been a wake.
                Err(RecvError::Lagged(_)) => self.wake_all(),
                Err(RecvError::Closed) => return,
            }
        }
    }

    /// Reads the heads of all inboxes that calls here wait for, at intervals of about `every`, and
    /// whenever NATS is connected again.
    pub(crate) async fn poll(self, database: Database, history: History, every: Duration) {
        let mut back = self.bus.reconnects();
        loop {
            // Random intervals, so that edges that started together do not poll together.
            let pause = every.mul_f64(0.8 + 0.4 * rand::random::<f64>());
            tokio::select! {
                () = sleep(pause) => {}
                Ok(()) = back.changed() => {}
            }
            self.poll_once(&database, &history).await;
        }
    }

    async fn poll_once(&self, database: &Database, history: &History) {
        for inboxes in self.waiting().chunks(POLLED) {
            // A failure is logged where it happens; the next poll reads again.
            let readers: Vec<_> = inboxes.iter().copied().map(Reader::single).collect();
            let Ok((_, heads)) = page::heads(database, history, &readers).await else { return };
            for (reader, head) in heads {
                let now = ReadPosition { store_id: head.state.store_id, head: head.state.head };
                self.table.record_head(&reader.inbox, now);
            }
        }
    }
}

impl Table {
    /// Wakes the calls that read a changed view; returns their number.
    fn wake(&self, inbox: &IdentityKey, view: View) -> usize {
        let inboxes = self.inboxes.lock();
        let Some(entry) = inboxes.get(inbox) else { return 0 };
        let concerned = entry.subscribers.iter().filter(|other| view.overlaps(other.query.view));
        concerned.inspect(|subscriber| subscriber.woken.notify_one()).count()
    }

    fn subscribe(self: &Arc<Self>, query: &ReadQuery) -> Subscription {
        let inbox = query.reader.inbox;
        let subscriber = Arc::new(Subscriber {
            query: *query,
            woken: Notify::new(),
            seen: Mutex::new(None),
            wake_at: Mutex::new(None),
            rescheduled: Notify::new(),
        });
        let mut inboxes = self.inboxes.lock();
        let entry =
            inboxes.entry(inbox).or_insert_with(|| Entry { subscribers: Vec::with_capacity(1) });
        entry.subscribers.push(Arc::clone(&subscriber));
        drop(inboxes);
        metrics::gauge!(names::WAITERS).increment(1);
        Subscription { table: Arc::clone(self), inbox, subscriber }
    }

    /// Records a read of a view, and the lease of its page if it has one.
    fn record_read(&self, read: &ReadQuery, shown: &VisiblePage, lease: Option<&LeaseId>) {
        let inboxes = self.inboxes.lock();
        let Some(entry) = inboxes.get(&read.reader.inbox) else { return };
        // A lease of all messages leaves none for other reads of the view.
        let left = lease.is_none() || shown.page.more;
        let now = ReadPosition { store_id: shown.page.store_id, head: shown.head };
        for subscriber in entry.subscribers.iter().filter(|other| other.query == *read) {
            let mut seen = subscriber.seen.lock();
            let news = seen.is_some_and(|seen| now.is_after(seen));
            if left && news {
                // Woken now, because with the new `seen` the poll would not find these messages.
                subscriber.woken.notify_one();
            }
            if news || seen.is_none() {
                *seen = Some(now);
            }
            if let Some(wait) = shown.stopped_for {
                // 5 ms later, so that the lease has ended by then.
                let at = Instant::now() + wait + Duration::from_millis(5);
                *subscriber.wake_at.lock() = Some(at);
                subscriber.rescheduled.notify_one();
            }
        }
    }

    /// Wakes the calls that have not read as far as the head.
    fn record_head(&self, inbox: &IdentityKey, now: ReadPosition) {
        let inboxes = self.inboxes.lock();
        let Some(entry) = inboxes.get(inbox) else { return };
        for subscriber in &entry.subscribers {
            if subscriber.seen.lock().is_none_or(|seen| now.is_after(seen)) {
                metrics::counter!(names::WAKES, "way" => "found").increment(1);
                subscriber.woken.notify_one();
            }
        }
    }
}

/// Returns the edges that wait, or none if Redis failed. The edges then find the change with their
/// next poll.
fn known<T>(waiting: StoreResult<Vec<T>>) -> Vec<T> {
    waiting.unwrap_or_else(|error| {
        tracing::debug!(%error, "redis missed a change of an inbox");
        Vec::new()
    })
}

/// Returns the channel of the messages if all have the same one, otherwise all channels.
fn common_view(messages: &[Queued]) -> View {
    match messages {
        [first, rest @ ..] => {
            let channel = first.envelope.channel;
            let is_common = rest.iter().all(|queued| queued.envelope.channel == channel);
            if is_common { View::Channel(channel) } else { View::All }
        }
        [] => View::All,
    }
}

impl Wakes for ClusterStore {
    fn subscribe(&self, query: &ReadQuery) -> Box<dyn Wake> {
        self.inner.wakes.subscribe(query)
    }
}

struct Subscription {
    table: Arc<Table>,
    inbox: IdentityKey,
    subscriber: Arc<Subscriber>,
}

impl Wake for Subscription {
    fn woken(&mut self) -> BoxFuture<'_, ()> {
        let again = Instant::now() + RENEW_AFTER.mul_f64(0.75 + 0.25 * rand::random::<f64>());
        Box::pin(async move {
            let subscriber = &*self.subscriber;
            loop {
                // The instant outlives this future: a caller that drops the future often would
                // otherwise never reach it.
                let at = *subscriber.wake_at.lock().get_or_insert(again);
                tokio::select! {
                    biased;
                    () = subscriber.woken.notified() => break,
                    () = subscriber.rescheduled.notified() => {}
                    () = sleep_until(at) => break,
                }
            }
            *subscriber.wake_at.lock() = None;
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

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;
    use qpq_domain::{ChannelId, DeviceId, StoreId};
    use qpq_ports::Page;

    use super::*;

    const INBOX: IdentityKey = IdentityKey::new([1; 32]);

    fn channel(n: u8) -> View {
        View::Channel(ChannelId::new([n; 16]))
    }

    fn read(view: View) -> ReadQuery {
        ReadQuery { reader: Reader::single(INBOX), view }
    }

    fn woken(wake: &mut Subscription) -> bool {
        wake.woken().now_or_never().is_some()
    }

    fn seen(head: u64) -> ReadPosition {
        ReadPosition { store_id: StoreId::new([0; 16]), head }
    }

    fn shown(head: u64, stopped_for: Option<Duration>) -> VisiblePage {
        let page = Page { store_id: StoreId::new([0; 16]), envelopes: Vec::new(), more: false };
        VisiblePage { page, head, stopped_for }
    }

    #[tokio::test]
    async fn a_change_wakes_the_calls_that_see_it_and_no_others() {
        let table = Arc::new(Table::default());
        let mut subscribed =
            [channel(1), channel(2), View::All].map(|view| table.subscribe(&read(view)));
        let mut woken = || subscribed.each_mut().map(woken);
        assert_eq!(table.wake(&INBOX, channel(1)), 2);
        assert_eq!(woken(), [true, false, true]);
        table.wake(&INBOX, channel(3));
        assert_eq!(woken(), [false, false, true]);
        table.wake(&INBOX, View::All);
        assert_eq!(woken(), [true, true, true]);
    }

    #[tokio::test]
    async fn the_poll_wakes_the_calls_that_have_not_read_so_far() {
        let table = Arc::new(Table::default());
        let (mut one, mut two) =
            (table.subscribe(&read(channel(1))), table.subscribe(&read(channel(2))));
        let lease = LeaseId("lease".into());
        table.record_read(&read(channel(1)), &shown(5, None), Some(&lease));
        table.record_head(&INBOX, seen(5));
        assert_eq!((woken(&mut one), woken(&mut two)), (false, true));
        table.record_head(&INBOX, seen(6));
        assert!(woken(&mut one));
        // A peek leaves the message to the others.
        table.record_read(&read(channel(1)), &shown(7, None), None);
        table.record_head(&INBOX, seen(7));
        assert!(woken(&mut one) && !woken(&mut one));
        table.record_read(&read(channel(1)), &shown(8, None), Some(&lease));
        assert!(!woken(&mut one), "all there is has been leased");
    }

    #[tokio::test]
    async fn a_read_of_one_device_does_not_suppress_wakes_of_another() {
        let table = Arc::new(Table::default());
        let [own, other] = [1, 2].map(|device| ReadQuery {
            reader: Reader { inbox: INBOX, device: Some(DeviceId::new([device; 16])) },
            view: View::All,
        });
        let (mut reads, mut waits) = (table.subscribe(&own), table.subscribe(&other));
        table.record_read(&own, &shown(5, None), Some(&LeaseId("lease".into())));
        table.record_read(&other, &shown(4, None), Some(&LeaseId("other".into())));
        table.record_head(&INBOX, seen(5));
        assert_eq!((woken(&mut reads), woken(&mut waits)), (false, true));
    }

    #[tokio::test(start_paused = true)]
    async fn a_waiting_call_wakes_when_the_lease_that_blocked_a_read_expires() {
        let table = Arc::new(Table::default());
        let mut wake = table.subscribe(&read(View::All));
        let mut waiting = wake.woken();
        assert!(futures_util::poll!(&mut waiting).is_pending());
        let (stopped, begun) = (Duration::from_secs(3), Instant::now());
        table.record_read(&read(View::All), &shown(1, Some(stopped)), None);
        waiting.await;
        assert!((stopped..RENEW_AFTER / 2).contains(&begun.elapsed()));
    }
}
