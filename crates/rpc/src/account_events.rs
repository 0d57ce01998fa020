//! Account events for calls in progress: the account's sessions have ended, a KeyPackage was handed
//! out, its devices have changed.
//!
//! A waiting FetchWait and a subscription listen by identity key; handlers such as Logout and
//! FetchKeyPackage publish. An event has no content: a listener reads the state from the store. So
//! equal events may be merged, duplicated, or sent without a reason. Events are exchanged with the
//! other edges in both directions.

use std::{
    array,
    collections::HashMap,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use futures_util::StreamExt as _;
use parking_lot::Mutex;
use qpq_domain::IdentityKey;
pub use qpq_ports::AccountEvent;
use tokio::sync::Notify;

const EVENTS: usize = AccountEvent::ALL.len();

/// The listeners of this process, by account.
pub struct AccountEvents {
    topics: Mutex<HashMap<IdentityKey, Arc<Topic>>>,
    other_edges: Arc<dyn qpq_ports::AccountEvents>,
}

/// The number of times that each event of an account was published, by `event as usize`.
#[derive(Default)]
struct Topic {
    counts: [AtomicU32; EVENTS],
    published: Notify,
}

/// A receiver of the events of one account that are published between its creation and its drop.
pub struct AccountEventListener {
    account_events: Arc<AccountEvents>,
    identity: IdentityKey,
    topic: Arc<Topic>,
    received: [u32; EVENTS],
}

impl AccountEvents {
    /// Creates the list of listeners, empty. `other_edges` exchanges events with the other edges.
    pub fn new(other_edges: Arc<dyn qpq_ports::AccountEvents>) -> Self {
        Self { topics: Mutex::default(), other_edges }
    }

    /// Creates a listener for the events of `identity`.
    pub fn listen(self: &Arc<Self>, identity: &IdentityKey) -> AccountEventListener {
        let topic = Arc::clone(self.topics.lock().entry(*identity).or_default());
        let received = array::from_fn(|event| topic.counts[event].load(Ordering::Acquire));
        AccountEventListener {
            account_events: Arc::clone(self),
            identity: *identity,
            topic,
            received,
        }
    }

    /// Sends an event to all listeners of `identity`, here and on the other edges.
    pub fn publish(&self, identity: &IdentityKey, event: AccountEvent) {
        self.other_edges.publish(identity, event);
        self.notify(identity, event);
    }

    /// Receives the events of other edges. Never completes.
    pub(crate) async fn receive(&self) {
        let mut events = self.other_edges.listen();
        while let Some((identity, event)) = events.next().await {
            self.notify(&identity, event);
        }
    }

    /// Sends an event to the listeners here. Costs one look-up if there are none.
    fn notify(&self, identity: &IdentityKey, event: AccountEvent) {
        // Locked to the end: a listener that is dropped concurrently must count no reference to the
        // topic but its own and the map's.
        let topics = self.topics.lock();
        let Some(topic) = topics.get(identity) else { return };
        topic.counts[event as usize].fetch_add(1, Ordering::Release);
        topic.published.notify_waiters();
    }
}

impl fmt::Debug for AccountEvents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AccountEvents").field("topics", &self.topics.lock().len()).finish()
    }
}

impl AccountEventListener {
    /// Returns the next event. Equal events since the last call are merged. Cancel-safe.
    pub async fn next(&mut self) -> AccountEvent {
        loop {
            // Created before the counts are read, so that no event is missed in between.
            let published = self.topic.published.notified();
            for event in AccountEvent::ALL {
                let count = self.topic.counts[event as usize].load(Ordering::Acquire);
                if std::mem::replace(&mut self.received[event as usize], count) != count {
                    return event;
                }
            }
            published.await;
        }
    }
}

impl Drop for AccountEventListener {
    fn drop(&mut self) {
        let mut topics = self.account_events.topics.lock();
        // The map's reference and this one: no other can be created while the map is locked.
        if Arc::strong_count(&self.topic) == 2 {
            topics.remove(&self.identity);
        }
    }
}

impl fmt::Debug for AccountEventListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AccountEventListener")
            .field("identity", &self.identity)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    const ALICE: IdentityKey = IdentityKey::new([1; 32]);
    const BOB: IdentityKey = IdentityKey::new([2; 32]);

    fn single_edge() -> Arc<AccountEvents> {
        Arc::new(AccountEvents::new(Arc::new(qpq_ports::SingleEdge)))
    }

    #[test]
    fn every_event_has_its_own_counter() {
        for (index, event) in AccountEvent::ALL.into_iter().enumerate() {
            assert_eq!(event as usize, index);
        }
    }

    #[tokio::test]
    async fn listeners_receive_later_events_of_their_account_and_equal_ones_once() {
        let account_events = single_edge();
        account_events.publish(&ALICE, AccountEvent::SessionsEnded);
        let mut first = account_events.listen(&ALICE);
        let mut second = account_events.listen(&ALICE);
        account_events.publish(&BOB, AccountEvent::SessionsEnded);
        assert_eq!(first.next().now_or_never(), None);
        for _ in 0..3 {
            account_events.publish(&ALICE, AccountEvent::KeyPackageTaken);
        }
        account_events.publish(&ALICE, AccountEvent::SessionsEnded);
        for listener in [&mut first, &mut second] {
            assert_eq!(listener.next().now_or_never(), Some(AccountEvent::SessionsEnded));
            assert_eq!(listener.next().now_or_never(), Some(AccountEvent::KeyPackageTaken));
            assert_eq!(listener.next().now_or_never(), None);
        }
    }

    #[tokio::test]
    async fn an_event_wakes_a_waiting_listener() {
        let account_events = single_edge();
        let mut listener = account_events.listen(&ALICE);
        let waiting = tokio::spawn(async move { listener.next().await });
        tokio::task::yield_now().await;
        account_events.publish(&ALICE, AccountEvent::SessionsEnded);
        assert_eq!(waiting.await.expect("no panic"), AccountEvent::SessionsEnded);
    }

    #[test]
    fn the_last_dropped_listener_frees_its_topic() {
        let account_events = single_edge();
        let first = account_events.listen(&ALICE);
        let second = account_events.listen(&ALICE);
        drop(first);
        assert_eq!(account_events.topics.lock().len(), 1);
        drop(second);
        assert_eq!(account_events.topics.lock().len(), 0);
    }
}
