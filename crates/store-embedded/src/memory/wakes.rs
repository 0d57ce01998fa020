//! The subscriptions to changes of an inbox. All of them are in this process, so a wake is one lock
//! and one flag.
//!
//! A subscription is to an inbox, so a message wakes all readers of the inbox. A completion by one
//! device wakes the other devices too. The next read of those devices then returns no
//! message.
//!
//! Each subscription stores a wake until it is awaited. The writer commits and then wakes; a read
//! subscribes and then reads. So either the read sees the message, or the wake reaches its
//! subscription.

use std::{fmt, sync::Arc};

use futures_util::future::BoxFuture;
use qpq_domain::IdentityKey;
use qpq_ports::{View, Wake};
use tokio::sync::Notify;

use super::shards::{Shards, shrink};

/// All subscriptions. An inbox without any takes no memory.
#[derive(Debug, Default)]
pub(crate) struct WakeTable {
    subscribers: Shards<IdentityKey, Vec<Arc<Subscriber>>>,
}

#[derive(Debug)]
struct Subscriber {
    view: View,
    woken: Notify,
}

impl WakeTable {
    /// Wakes every present subscription of `inbox` whose view overlaps `view`.
    pub(super) fn wake(&self, inbox: &IdentityKey, view: View) {
        if let Some(subscribers) = self.subscribers.lock(inbox).get(inbox) {
            let concerned = subscribers.iter().filter(|subscriber| view.overlaps(subscriber.view));
            concerned.for_each(|subscriber| subscriber.woken.notify_one());
        }
    }

    pub(crate) fn subscribe(self: &Arc<Self>, inbox: IdentityKey, view: View) -> Box<dyn Wake> {
        let subscriber = Arc::new(Subscriber { view, woken: Notify::new() });
        let mut shard = self.subscribers.lock(&inbox);
        // Most inboxes have one subscription, so no memory is reserved for others.
        let subscribers = shard.entry(inbox).or_insert_with(|| Vec::with_capacity(1));
        subscribers.push(Arc::clone(&subscriber));
        drop(shard);
        Box::new(Subscription { table: Arc::clone(self), inbox, subscriber })
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
        let mut shard = self.table.subscribers.lock(&self.inbox);
        if let Some(subscribers) = shard.get_mut(&self.inbox) {
            subscribers.retain(|other| !Arc::ptr_eq(other, &self.subscriber));
            if subscribers.is_empty() {
                shard.remove(&self.inbox);
                shrink(&mut shard);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;
    use qpq_domain::ChannelId;

    use super::*;

    const INBOX: IdentityKey = IdentityKey::new([1; 32]);

    #[tokio::test]
    async fn wakes_before_the_wait_complete_it_once() {
        let table = Arc::new(WakeTable::default());
        let mut wake = table.subscribe(INBOX, View::All);
        assert!(wake.woken().now_or_never().is_none());
        table.wake(&INBOX, View::All);
        table.wake(&INBOX, View::All);
        assert!(wake.woken().now_or_never().is_some());
        assert!(wake.woken().now_or_never().is_none());
    }

    #[tokio::test]
    async fn a_wake_reaches_only_its_inbox() {
        let table = Arc::new(WakeTable::default());
        let mut wake = table.subscribe(INBOX, View::All);
        table.wake(&IdentityKey::new([2; 32]), View::All);
        assert!(wake.woken().now_or_never().is_none());
    }

    #[tokio::test]
    async fn memory_is_freed_with_the_last_subscription_of_an_inbox() {
        let table = Arc::new(WakeTable::default());
        let (first, second) =
            (table.subscribe(INBOX, View::All), table.subscribe(INBOX, View::All));
        assert_eq!(table.subscribers.len(), 1);
        drop(first);
        assert_eq!(table.subscribers.len(), 1);
        drop(second);
        assert_eq!(table.subscribers.len(), 0);
    }

    #[tokio::test]
    async fn a_change_wakes_the_views_that_overlap_with_it() {
        let channel = |n| View::Channel(ChannelId::new([n; 16]));
        let table = Arc::new(WakeTable::default());
        let mut subscribed =
            [channel(1), channel(2), View::All].map(|view| table.subscribe(INBOX, view));
        let mut woken = || subscribed.each_mut().map(|wake| wake.woken().now_or_never().is_some());
        table.wake(&INBOX, channel(1));
        assert_eq!(woken(), [true, false, true]);
        table.wake(&INBOX, channel(3));
        assert_eq!(woken(), [false, false, true]);
        table.wake(&INBOX, View::All);
        assert_eq!(woken(), [true, true, true]);
    }
}
