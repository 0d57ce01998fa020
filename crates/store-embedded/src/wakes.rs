//! Who waits for what happens in which inbox. Everything is in this process, so a wake is one lock
//! and a flag.
//!
//! A subscription keeps a permit of its own: a wake that comes while nobody looks is there at the
//! next look. With the order *commit, then wake* on one side and *subscribe, then read* on the
//! other, no wake is ever lost.

use std::{fmt, sync::Arc};

use futures_util::future::BoxFuture;
use qpq_domain::IdentityKey;
use qpq_ports::{ReadQuery, View, Wake, Wakes};
use tokio::sync::Notify;

use crate::shards::{Shards, shrink};

/// All subscriptions. An inbox without any takes no memory.
#[derive(Debug, Default)]
pub(crate) struct WakeTable {
    waiting: Shards<IdentityKey, Vec<Arc<Subscriber>>>,
}

#[derive(Debug)]
struct Subscriber {
    view: View,
    woken: Notify,
}

impl WakeTable {
    /// Wakes every present subscription to `inbox` that may see a change in `view`.
    pub(crate) fn wake(&self, inbox: &IdentityKey, view: View) {
        if let Some(subscribers) = self.waiting.lock(inbox).get(inbox) {
            let concerned = subscribers.iter().filter(|subscriber| view.overlaps(subscriber.view));
            concerned.for_each(|subscriber| subscriber.woken.notify_one());
        }
    }
}

/// The port over the table.
#[derive(Debug)]
pub(crate) struct EmbeddedWakes(pub(crate) Arc<WakeTable>);

impl Wakes for EmbeddedWakes {
    fn subscribe(&self, query: &ReadQuery) -> Box<dyn Wake> {
        let (inbox, view) = (&query.reader.inbox, query.view);
        let subscriber = Arc::new(Subscriber { view, woken: Notify::new() });
        let mut waiting = self.0.waiting.lock(inbox);
        // Nearly always the only one: room for one.
        let subscribers = waiting.entry(*inbox).or_insert_with(|| Vec::with_capacity(1));
        subscribers.push(Arc::clone(&subscriber));
        drop(waiting);
        Box::new(Subscription { table: Arc::clone(&self.0), inbox: *inbox, subscriber })
    }
}

struct Subscription {
    table: Arc<WakeTable>,
    inbox: IdentityKey,
    subscriber: Arc<Subscriber>,
}

impl fmt::Debug for Subscription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscription").field("inbox", &self.inbox).finish_non_exhaustive()
    }
}

impl Wake for Subscription {
    fn woken(&mut self) -> BoxFuture<'_, ()> {
        Box::pin(self.subscriber.woken.notified())
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let mut waiting = self.table.waiting.lock(&self.inbox);
        if let Some(subscribers) = waiting.get_mut(&self.inbox) {
            subscribers.retain(|other| !Arc::ptr_eq(other, &self.subscriber));
            if subscribers.is_empty() {
                waiting.remove(&self.inbox);
                shrink(&mut waiting);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    const INBOX: IdentityKey = IdentityKey::new([1; 32]);

    fn read(view: View) -> ReadQuery {
        ReadQuery { reader: qpq_ports::Reader::single(INBOX), view }
    }

    #[tokio::test]
    async fn a_wake_before_the_look_is_there_once() {
        let table = Arc::new(WakeTable::default());
        let mut wake = EmbeddedWakes(Arc::clone(&table)).subscribe(&read(View::All));
        assert!(wake.woken().now_or_never().is_none());
        table.wake(&INBOX, View::All);
        table.wake(&INBOX, View::All);
        assert!(wake.woken().now_or_never().is_some());
        assert!(wake.woken().now_or_never().is_none());
        table.wake(&IdentityKey::new([2; 32]), View::All);
        assert!(wake.woken().now_or_never().is_none());
    }

    #[tokio::test]
    async fn the_last_subscriber_leaves_nothing_behind() {
        let table = Arc::new(WakeTable::default());
        let wakes = EmbeddedWakes(Arc::clone(&table));
        let (first, second) =
            (wakes.subscribe(&read(View::All)), wakes.subscribe(&read(View::All)));
        assert_eq!(table.waiting.len(), 1);
        drop(first);
        assert_eq!(table.waiting.len(), 1);
        drop(second);
        assert_eq!(table.waiting.len(), 0);
    }

    #[tokio::test]
    async fn a_change_wakes_those_who_may_see_it_and_nobody_else() {
        let channel = |n| View::Channel(qpq_domain::ChannelId::new([n; 16]));
        let table = Arc::new(WakeTable::default());
        let wakes = EmbeddedWakes(Arc::clone(&table));
        let mut subscribed =
            [channel(1), channel(2), View::All].map(|view| wakes.subscribe(&read(view)));
        let mut woken = || subscribed.each_mut().map(|wake| wake.woken().now_or_never().is_some());
        table.wake(&INBOX, channel(1));
        assert_eq!(woken(), [true, false, true]);
        table.wake(&INBOX, channel(3));
        assert_eq!(woken(), [false, false, true]);
        table.wake(&INBOX, View::All);
        assert_eq!(woken(), [true, true, true]);
    }
}
