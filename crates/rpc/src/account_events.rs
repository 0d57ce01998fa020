//! What happens to an account that a call in progress must hear of at once: its sessions end, its
//! KeyPackages go.
//!
//! A parked FetchWait and a Subscribe listen by identity key; Logout and FetchKeyPackage publish. A
//! notice carries no state: who hears one looks the state up. So notices may be coalesced, doubled
//! or come without cause. What is published here goes to the deployment's other edges too, and what
//! they publish is heard here.

use std::{
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

/// Who listens to which account, in this process.
pub struct AccountEvents {
    topics: Mutex<HashMap<IdentityKey, Arc<Topic>>>,
    others: Arc<dyn qpq_ports::AccountEvents>,
}

/// How often each notice was published, and who is to be told.
#[derive(Default)]
struct Topic {
    sessions_ended: AtomicU32,
    packages_taken: AtomicU32,
    published: Notify,
}

/// Hears the notices of one account that are published after it was made. Dropping it ends that.
pub struct Listener {
    account_events: Arc<AccountEvents>,
    identity: IdentityKey,
    topic: Arc<Topic>,
    sessions_ended: u32,
    packages_taken: u32,
}

impl AccountEvents {
    pub(crate) fn new(others: Arc<dyn qpq_ports::AccountEvents>) -> Self {
        Self { topics: Mutex::default(), others }
    }

    /// Listens from now on.
    pub fn listen(self: &Arc<Self>, identity: &IdentityKey) -> Listener {
        let topic = Arc::clone(self.topics.lock().entry(*identity).or_default());
        Listener {
            account_events: Arc::clone(self),
            identity: *identity,
            sessions_ended: topic.sessions_ended.load(Ordering::Acquire),
            packages_taken: topic.packages_taken.load(Ordering::Acquire),
            topic,
        }
    }

    /// Tells everybody who listens to `identity`, here and on every other edge.
    pub fn publish(&self, identity: &IdentityKey, event: AccountEvent) {
        self.others.publish(identity, event);
        self.tell(identity, event);
    }

    /// Passes on what other edges publish, for as long as there is somebody to pass it on to.
    pub(crate) async fn pass_on(&self) {
        let mut heard = self.others.listen();
        while let Some((identity, event)) = heard.next().await {
            self.tell(&identity, event);
        }
    }

    /// Tells everybody here who listens to `identity`; costs next to nothing if nobody does.
    fn tell(&self, identity: &IdentityKey, event: AccountEvent) {
        // Held to the end: a listener that goes meanwhile must not find the topic in use.
        let topics = self.topics.lock();
        let Some(topic) = topics.get(identity) else { return };
        let count = match event {
            AccountEvent::SessionsEnded => &topic.sessions_ended,
            AccountEvent::KeyPackageTaken => &topic.packages_taken,
        };
        count.fetch_add(1, Ordering::Release);
        topic.published.notify_waiters();
    }
}

impl fmt::Debug for AccountEvents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AccountEvents").field("topics", &self.topics.lock().len()).finish()
    }
}

impl Listener {
    /// The next notice; equal ones that were published since the last are one. Cancel-safe.
    pub async fn next(&mut self) -> AccountEvent {
        let Self { topic, sessions_ended, packages_taken, .. } = self;
        loop {
            // Notified by whatever is published from here on, so nothing falls between the look and
            // the wait.
            let published = topic.published.notified();
            if advance(sessions_ended, &topic.sessions_ended) {
                return AccountEvent::SessionsEnded;
            }
            if advance(packages_taken, &topic.packages_taken) {
                return AccountEvent::KeyPackageTaken;
            }
            published.await;
        }
    }
}

/// Takes over the count; whether it had moved.
fn advance(seen: &mut u32, count: &AtomicU32) -> bool {
    let now = count.load(Ordering::Acquire);
    std::mem::replace(seen, now) != now
}

impl Drop for Listener {
    fn drop(&mut self) {
        let mut topics = self.account_events.topics.lock();
        // The map's and this one: nobody else can get at it while the map is locked.
        if Arc::strong_count(&self.topic) == 2 {
            topics.remove(&self.identity);
        }
    }
}

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Listener").field("identity", &self.identity).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    const ALICE: IdentityKey = IdentityKey::new([1; 32]);
    const BOB: IdentityKey = IdentityKey::new([2; 32]);

    #[tokio::test]
    async fn a_listener_hears_its_own_account_from_then_on_and_equal_notices_once() {
        let account_events = Arc::new(AccountEvents::new(Arc::new(qpq_ports::SingleEdge)));
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
    async fn a_waiting_listener_is_woken() {
        let account_events = Arc::new(AccountEvents::new(Arc::new(qpq_ports::SingleEdge)));
        let mut listener = account_events.listen(&ALICE);
        let waiting = tokio::spawn(async move { listener.next().await });
        tokio::task::yield_now().await;
        account_events.publish(&ALICE, AccountEvent::SessionsEnded);
        assert_eq!(waiting.await.expect("no panic"), AccountEvent::SessionsEnded);
    }

    #[test]
    fn nothing_is_kept_of_listeners_that_are_gone() {
        let account_events = Arc::new(AccountEvents::new(Arc::new(qpq_ports::SingleEdge)));
        let first = account_events.listen(&ALICE);
        let second = account_events.listen(&ALICE);
        drop(first);
        assert_eq!(account_events.topics.lock().len(), 1);
        drop(second);
        assert_eq!(account_events.topics.lock().len(), 0);
    }
}
