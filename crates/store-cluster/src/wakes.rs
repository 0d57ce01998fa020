//! Who of this edge waits for which inbox, and how word of something new gets there.
//!
//! A read of an inbox that somebody here waits for registers this edge with the inbox in Redis, in
//! the same script that looks; whatever changes the inbox reads the registrations, in the same
//! script that makes the change, and sends each of those edges one word through NATS. So either the
//! read sees the message, or the message sees the reader. The word names the channel if there is
//! one, and wakes only those who wait for it; a registration lasts for a while, whoever was woken. Every part of that may fail: then a poll
//! of the heads, every few seconds for all that wait here together, finds what nobody told.

use std::{collections::HashMap, fmt, sync::Arc, time::Duration};

use futures_util::{StreamExt as _, future::BoxFuture, stream};
use parking_lot::Mutex;
use qpq_domain::{IdentityKey, Seq, StoreId};
use qpq_ports::{ReadQuery, Reader, View, Wake, Wakes};
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
        queue::{LeaseId, Queued, REGISTERED, Shown},
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

struct Subscriber {
    view: View,
    woken: Notify,
    /// How far somebody here has looked at the view, if anybody has.
    seen: Mutex<Option<Seen>>,
    /// When to look again: a lease ends that was in the way, or it is time to register again.
    look_at: Mutex<Option<Instant>>,
    /// That time was changed while somebody waits for it.
    rescheduled: Notify,
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

    /// Somebody here has looked at a view of the inbox, and has `lease` on what it showed, or leased
    /// nothing.
    pub(crate) fn looked(&self, read: &ReadQuery, shown: &Shown, lease: Option<&LeaseId>) {
        self.table.looked(read, shown, lease);
    }

    /// Tells Redis of messages that were committed in a history, and whoever waits for them.
    pub(crate) async fn push(&self, store_id: StoreId, inboxes: HashMap<IdentityKey, Vec<Queued>>) {
        stream::iter(inboxes)
            .for_each_concurrent(PUSHES, |(inbox, messages)| async move {
                let view = common_view(&messages);
                match self.redis.push(&inbox, &store_id, &messages).await {
                    Ok(edges) => self.tell(&inbox, view, &edges),
                    Err(error) => self.untold(&inbox, view, &error),
                }
            })
            .await;
    }

    /// Tells Redis of messages that were removed in a history, after this read of them.
    pub(crate) async fn removed(
        &self,
        read: &ReadQuery,
        store_id: &StoreId,
        removal: u64,
        lease: Option<&LeaseId>,
        seqs: &[Seq],
    ) {
        let ReadQuery { reader: Reader { inbox, .. }, view } = read;
        match self.redis.removed(inbox, store_id, removal, lease, seqs).await {
            Ok(edges) => self.tell(inbox, *view, &edges),
            Err(error) => self.untold(inbox, *view, &error),
        }
    }

    /// Ends a lease; what it held is to be seen again.
    pub(crate) async fn release(&self, inbox: &IdentityKey, lease: &LeaseId, seqs: &[Seq]) {
        match self.redis.released(inbox, lease, seqs).await {
            Ok(edges) => self.tell(inbox, View::All, &edges),
            Err(error) => self.untold(inbox, View::All, &error),
        }
    }

    fn tell(&self, inbox: &IdentityKey, view: View, edges: &[String]) {
        for edge in edges.iter().filter(|edge| **edge != *self.edge.0) {
            self.bus.wake(edge, *inbox, view);
        }
        self.wake_here(inbox, view, "local");
    }

    /// Redis does not know, so nobody elsewhere is told: they find it by looking.
    fn untold(&self, inbox: &IdentityKey, view: View, error: &(dyn std::error::Error + 'static)) {
        tracing::debug!(error, "Redis was not told of a change in an inbox");
        self.wake_here(inbox, view, "local");
    }

    /// Wakes those here who may see a change in this view.
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

    /// Passes on what other edges tell, as long as there is a bus.
    pub(crate) async fn listen(self) {
        let mut heard = self.bus.hear();
        loop {
            match heard.recv().await {
                Ok(Heard::Wake(inbox, view)) => self.wake_here(&inbox, view, "received"),
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
                self.table.found(&inbox, now);
            }
        }
    }
}

impl Table {
    /// Wakes those who may see a change in this view; how many they are.
    fn wake(&self, inbox: &IdentityKey, view: View) -> usize {
        let inboxes = self.inboxes.lock();
        let Some(entry) = inboxes.get(inbox) else { return 0 };
        let concerned = entry.subscribers.iter().filter(|other| view.overlaps(other.view));
        concerned.inspect(|subscriber| subscriber.woken.notify_one()).count()
    }

    fn subscribe(self: &Arc<Self>, inbox: &IdentityKey, view: View) -> Subscription {
        let subscriber = Arc::new(Subscriber {
            view,
            woken: Notify::new(),
            seen: Mutex::new(None),
            look_at: Mutex::new(None),
            rescheduled: Notify::new(),
        });
        let mut inboxes = self.inboxes.lock();
        let entry =
            inboxes.entry(*inbox).or_insert_with(|| Entry { subscribers: Vec::with_capacity(1) });
        entry.subscribers.push(Arc::clone(&subscriber));
        drop(inboxes);
        metrics::gauge!(names::WAITERS).increment(1);
        Subscription { table: Arc::clone(self), inbox: *inbox, subscriber }
    }

    /// Somebody here has looked at a view of the inbox, and has `lease` on what it showed, or leased
    /// nothing.
    fn looked(&self, read: &ReadQuery, shown: &Shown, lease: Option<&LeaseId>) {
        let inboxes = self.inboxes.lock();
        let Some(entry) = inboxes.get(&read.reader.inbox) else { return };
        // A lease that showed all there is has left nothing for others that look at the same.
        let left = lease.is_none() || shown.page.more;
        let now = Seen { store_id: shown.page.store_id, head: shown.head };
        for subscriber in entry.subscribers.iter().filter(|other| other.view == read.view) {
            let mut seen = subscriber.seen.lock();
            let news = seen.is_some_and(|seen| now.is_news_to(seen));
            if left && news {
                // The poll does not find this any more.
                subscriber.woken.notify_one();
            }
            if news || seen.is_none() {
                *seen = Some(now);
            }
            if let Some(wait) = shown.stopped_for {
                // A moment later, so that it has ended by then.
                let at = Instant::now() + wait + Duration::from_millis(5);
                *subscriber.look_at.lock() = Some(at);
                subscriber.rescheduled.notify_one();
            }
        }
    }

    /// Wakes those who have not looked so far.
    fn found(&self, inbox: &IdentityKey, now: Seen) {
        let inboxes = self.inboxes.lock();
        let Some(entry) = inboxes.get(inbox) else { return };
        for subscriber in &entry.subscribers {
            if subscriber.seen.lock().is_none_or(|seen| now.is_news_to(seen)) {
                metrics::counter!(names::WAKES, "way" => "found").increment(1);
                subscriber.woken.notify_one();
            }
        }
    }
}

/// The channel that the messages are all in, or all channels.
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

/// The port over it.
#[derive(Debug)]
pub(crate) struct ClusterWakes(pub(crate) Waking);

impl Wakes for ClusterWakes {
    fn subscribe(&self, query: &ReadQuery) -> Box<dyn Wake> {
        Box::new(self.0.table.subscribe(&query.reader.inbox, query.view))
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
            let subscriber = &*self.subscriber;
            loop {
                // Kept beyond this wait, or one that is dropped often would never end.
                let at = *subscriber.look_at.lock().get_or_insert(again);
                tokio::select! {
                    biased;
                    () = subscriber.woken.notified() => break,
                    () = subscriber.rescheduled.notified() => {}
                    () = sleep_until(at) => break,
                }
            }
            *subscriber.look_at.lock() = None;
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
    use qpq_domain::{ChannelId, StoreId};
    use qpq_ports::Page;

    use super::*;

    const INBOX: IdentityKey = IdentityKey::new([1; 32]);

    fn channel(n: u8) -> View {
        View::Channel(ChannelId::new([n; 16]))
    }

    fn woken(wake: &mut Subscription) -> bool {
        wake.woken().now_or_never().is_some()
    }

    fn seen(head: u64) -> Seen {
        Seen { store_id: StoreId::new([0; 16]), head }
    }

    fn shown(head: u64, stopped_for: Option<Duration>) -> Shown {
        let page = Page { store_id: StoreId::new([0; 16]), envelopes: Vec::new(), more: false };
        Shown { page, head, stopped_for }
    }

    #[tokio::test]
    async fn a_change_wakes_those_who_may_see_it_and_nobody_else() {
        let table = Arc::new(Table::default());
        let mut subscribed =
            [channel(1), channel(2), View::All].map(|view| table.subscribe(&INBOX, view));
        let mut woken = || subscribed.each_mut().map(woken);
        assert_eq!(table.wake(&INBOX, channel(1)), 2);
        assert_eq!(woken(), [true, false, true]);
        table.wake(&INBOX, channel(3));
        assert_eq!(woken(), [false, false, true]);
        table.wake(&INBOX, View::All);
        assert_eq!(woken(), [true, true, true]);
    }

    #[tokio::test]
    async fn the_poll_wakes_those_who_have_not_looked_so_far() {
        let table = Arc::new(Table::default());
        let (mut one, mut two) =
            (table.subscribe(&INBOX, channel(1)), table.subscribe(&INBOX, channel(2)));
        let lease = LeaseId("lease".into());
        let read = |view| ReadQuery { reader: Reader::single(INBOX), view };
        table.looked(&read(channel(1)), &shown(5, None), Some(&lease));
        table.found(&INBOX, seen(5));
        assert_eq!((woken(&mut one), woken(&mut two)), (false, true));
        table.found(&INBOX, seen(6));
        assert!(woken(&mut one));
        // What was looked at and left there is found by nobody else.
        table.looked(&read(channel(1)), &shown(7, None), None);
        table.found(&INBOX, seen(7));
        assert!(woken(&mut one) && !woken(&mut one));
        table.looked(&read(channel(1)), &shown(8, None), Some(&lease));
        assert!(!woken(&mut one), "all there is has been leased");
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_ends_when_a_lease_does_that_another_read_stopped_at() {
        let table = Arc::new(Table::default());
        let mut wake = table.subscribe(&INBOX, View::All);
        let mut waiting = wake.woken();
        assert!(futures_util::poll!(&mut waiting).is_pending());
        let read = ReadQuery { reader: Reader::single(INBOX), view: View::All };
        let (stopped, begun) = (Duration::from_secs(3), Instant::now());
        table.looked(&read, &shown(1, Some(stopped)), None);
        waiting.await;
        assert!((stopped..LOOK_AGAIN / 2).contains(&begun.elapsed()));
    }
}
