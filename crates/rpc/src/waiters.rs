//! The calls that wait for messages, by reader: a bounded number for each reader, and one read for
//! all calls that wait for the same view.
//!
//! A wake reaches the first waiting call, which reads. The next call reads only if messages were
//! left. So a message costs one read for any number of waiting calls, and none if no call waits for
//! its channel.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use parking_lot::Mutex;
use qpq_ports::{ReadQuery, Reader, View, Wake, Wakes};
use tokio::sync::{Notify, OwnedMutexGuard};

/// The maximum number of waiting calls of one reader. A further call ends the oldest one.
pub(crate) const MAX_WAITERS: usize = 8;

/// All waiting calls of this process.
#[derive(Default)]
pub(crate) struct Waiters {
    readers: Mutex<HashMap<Reader, VecDeque<Arc<Call>>>>,
}

/// One waiting call.
struct Call {
    view: View,
    displaced: Notify,
    shared: Arc<tokio::sync::Mutex<SharedWake>>,
}

/// The wake of all calls of a reader that wait for one view.
struct SharedWake {
    wake: Box<dyn Wake>,
    /// Whether the view may have messages that no call has read.
    unread: bool,
}

/// The membership of a call in [`Waiters`], until it is dropped.
pub(crate) struct Waiter<'a> {
    waiters: &'a Waiters,
    reader: Reader,
    call: Arc<Call>,
    /// The lock of the shared wake, kept from this call's first turn on.
    turn: Option<OwnedMutexGuard<SharedWake>>,
}

impl Waiters {
    /// Adds a call that waits for messages of `query`. The call receives only later wakes, so the
    /// caller must read once after this.
    pub(crate) fn join(&self, wakes: &dyn Wakes, query: &ReadQuery) -> Waiter<'_> {
        let reader = query.reader;
        let mut readers = self.readers.lock();
        let calls = readers.entry(reader).or_insert_with(|| VecDeque::with_capacity(1));
        let shared = match calls.iter().find(|call| call.view == query.view) {
            Some(call) => Arc::clone(&call.shared),
            None => {
                let wake = wakes.subscribe(query);
                Arc::new(tokio::sync::Mutex::new(SharedWake { wake, unread: false }))
            }
        };
        if calls.len() >= MAX_WAITERS
            && let Some(oldest) = calls.pop_front()
        {
            oldest.displaced.notify_one();
        }
        let call = Arc::new(Call { view: query.view, displaced: Notify::new(), shared });
        calls.push_back(Arc::clone(&call));
        drop(readers);
        Waiter { waiters: self, reader, call, turn: None }
    }
}

impl Waiter<'_> {
    /// Completes when the call must read or end.
    pub(crate) async fn next(&mut self) -> Turn {
        let call = &*self.call;
        tokio::select! {
            biased;
            () = call.displaced.notified() => Turn::Displaced,
            () = unread(&call.shared, &mut self.turn) => Turn::Read,
        }
    }

    /// Records that the call has read, and whether it left messages to the next one.
    pub(crate) fn has_read(&mut self, left: Unread) {
        if let Some(shared) = &mut self.turn {
            shared.unread = left == Unread::More;
        }
    }
}

/// The result of [`Waiter::next`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// There may be messages, and no other call of this reader reads them.
    Read,
    /// The reader has too many waiting calls.
    Displaced,
}

/// The messages that a read left to other calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unread {
    Nothing,
    More,
}

/// Completes when there may be unread messages and it is the call's turn. Cancel-safe: messages
/// stay unread until [`Waiter::has_read`].
async fn unread(
    shared: &Arc<tokio::sync::Mutex<SharedWake>>,
    turn: &mut Option<OwnedMutexGuard<SharedWake>>,
) {
    let shared = match turn {
        Some(shared) => shared,
        none => none.insert(Arc::clone(shared).lock_owned().await),
    };
    if !shared.unread {
        shared.wake.woken().await;
        shared.unread = true;
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        let mut readers = self.waiters.readers.lock();
        if let Some(calls) = readers.get_mut(&self.reader) {
            calls.retain(|call| !Arc::ptr_eq(call, &self.call));
            if calls.is_empty() {
                readers.remove(&self.reader);
                if readers.len() < readers.capacity() / 4 {
                    let capacity = readers.len() * 2;
                    readers.shrink_to(capacity);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{FutureExt as _, future::BoxFuture};
    use qpq_domain::ChannelId;
    use qpq_domain::{DeviceId, IdentityKey};

    use super::*;

    /// Wakes that the test triggers.
    #[derive(Default)]
    struct TestWakes {
        subscribed: Mutex<Vec<(View, Arc<Notify>)>>,
    }

    struct TestWake(Arc<Notify>);

    impl Wakes for TestWakes {
        fn subscribe(&self, query: &ReadQuery) -> Box<dyn Wake> {
            let notify = Arc::new(Notify::new());
            self.subscribed.lock().push((query.view, Arc::clone(&notify)));
            Box::new(TestWake(notify))
        }
    }

    impl Wake for TestWake {
        fn woken(&mut self) -> BoxFuture<'_, ()> {
            Box::pin(self.0.notified())
        }
    }

    impl TestWakes {
        fn wake(&self) {
            self.subscribed.lock().iter().for_each(|(_, notify)| notify.notify_one());
        }
    }

    fn read(view: View) -> ReadQuery {
        ReadQuery { reader: Reader::single(IdentityKey::new([1; 32])), view }
    }

    fn channel(n: u8) -> View {
        View::Channel(ChannelId::new([n; 16]))
    }

    #[tokio::test]
    async fn a_wake_is_read_by_one_call_and_remaining_messages_by_the_next() {
        let (wakes, waiters) = (TestWakes::default(), Waiters::default());
        let join = || waiters.join(&wakes, &read(View::All));
        let (mut one, mut two, mut three) = (join(), join(), join());
        assert_eq!(wakes.subscribed.lock().len(), 1, "they share a subscription");
        wakes.wake();
        assert_eq!(one.next().now_or_never(), Some(Turn::Read));
        assert_eq!(two.next().now_or_never(), None);
        // The first call ends without a read.
        drop(one);
        assert_eq!(two.next().now_or_never(), Some(Turn::Read));
        two.has_read(Unread::More);
        assert_eq!(three.next().now_or_never(), None);
        drop(two);
        assert_eq!(three.next().now_or_never(), Some(Turn::Read));
        three.has_read(Unread::Nothing);
        assert_eq!(three.next().now_or_never(), None);
        wakes.wake();
        assert_eq!(three.next().now_or_never(), Some(Turn::Read));
    }

    #[tokio::test]
    async fn a_call_beyond_the_maximum_displaces_the_oldest_of_any_view() {
        let (wakes, waiters) = (TestWakes::default(), Waiters::default());
        let mut oldest = waiters.join(&wakes, &read(channel(1)));
        let mut rest: Vec<_> =
            (1..MAX_WAITERS).map(|_| waiters.join(&wakes, &read(channel(2)))).collect();
        assert_eq!(oldest.next().now_or_never(), None);
        let reader = Reader { device: Some(DeviceId::new([9; 16])), ..read(channel(1)).reader };
        let other = ReadQuery { reader, view: channel(1) };
        let mut of_another_device = waiters.join(&wakes, &other);
        assert_eq!(oldest.next().now_or_never(), None);
        let mut newest = waiters.join(&wakes, &read(channel(1)));
        assert_eq!(oldest.next().now_or_never(), Some(Turn::Displaced));
        for waiter in rest.iter_mut().chain([&mut of_another_device, &mut newest]) {
            assert_eq!(waiter.next().now_or_never(), None);
        }
        drop((oldest, rest, of_another_device, newest));
        assert!(waiters.readers.lock().is_empty());
    }

    #[tokio::test]
    async fn calls_for_different_channels_have_separate_subscriptions() {
        let (wakes, waiters) = (TestWakes::default(), Waiters::default());
        let views = [channel(1), View::All, channel(1), channel(2)];
        let _joined = views.map(|view| waiters.join(&wakes, &read(view)));
        let subscribed: Vec<_> = wakes.subscribed.lock().iter().map(|(view, _)| *view).collect();
        assert_eq!(subscribed, [channel(1), View::All, channel(2)]);
    }
}
