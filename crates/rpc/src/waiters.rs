//! The calls that wait for messages, by reader: few for each, and one read for all that wait for the
//! same.
//!
//! What wakes a reader's calls wakes the first of them; it reads, and the next one does so only if
//! something was left. So a message costs one read however many calls wait for it, and a message in
//! a channel that nobody waits for costs none.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use parking_lot::Mutex;
use qpq_ports::{ReadQuery, Reader, View, Wake, Wakes};
use tokio::sync::{Notify, OwnedMutexGuard};

/// The calls of one reader that wait at a time. When there is another, the oldest ends.
pub(crate) const MAX_WAITERS: usize = 8;

/// All calls that wait here.
#[derive(Default)]
pub(crate) struct Waiters {
    readers: Mutex<HashMap<Reader, VecDeque<Arc<Call>>>>,
}

/// One call that waits.
struct Call {
    view: View,
    displaced: Notify,
    shared: Arc<tokio::sync::Mutex<Shared>>,
}

/// What the calls of a reader that wait for the same view have in common.
struct Shared {
    wake: Box<dyn Wake>,
    /// Something happened that no read has seen.
    unread: bool,
}

/// A call's place among those that wait. Dropped, it is given up.
pub(crate) struct Waiter<'a> {
    waiters: &'a Waiters,
    reader: Reader,
    call: Arc<Call>,
    /// Held from the first time that it is this call's turn.
    turn: Option<OwnedMutexGuard<Shared>>,
}

impl Waiters {
    /// Adds a call that waits for what `read` would show. Whatever happens from now on is its
    /// business, so it reads once by itself after this.
    pub(crate) fn join(&self, wakes: &dyn Wakes, read: &ReadQuery) -> Waiter<'_> {
        let reader = read.reader;
        let mut readers = self.readers.lock();
        let calls = readers.entry(reader).or_insert_with(|| VecDeque::with_capacity(1));
        let shared = match calls.iter().find(|call| call.view == read.view) {
            Some(call) => Arc::clone(&call.shared),
            None => {
                let wake = wakes.subscribe(read);
                Arc::new(tokio::sync::Mutex::new(Shared { wake, unread: false }))
            }
        };
        if calls.len() >= MAX_WAITERS
            && let Some(oldest) = calls.pop_front()
        {
            oldest.displaced.notify_one();
        }
        let call = Arc::new(Call { view: read.view, displaced: Notify::new(), shared });
        calls.push_back(Arc::clone(&call));
        drop(readers);
        Waiter { waiters: self, reader, call, turn: None }
    }
}

impl Waiter<'_> {
    /// Completes when it is this call's turn to read, or when it has to end.
    pub(crate) async fn next(&mut self) -> Turn {
        let call = &*self.call;
        tokio::select! {
            biased;
            () = call.displaced.notified() => Turn::Displaced,
            () = unread(&call.shared, &mut self.turn) => Turn::Read,
        }
    }

    /// This call has read, and `more` says whether anything was left to others.
    pub(crate) fn has_read(&mut self, left: Left) {
        if let Some(shared) = &mut self.turn {
            shared.unread = left == Left::More;
        }
    }
}

/// What [`Waiter::next`] waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// There may be something to read, and no other call of this reader reads it.
    Read,
    /// The reader has too many calls that wait.
    Displaced,
}

/// What a read left to others that wait for the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Left {
    Nothing,
    More,
}

/// Cancel-safe: what happened is unread until somebody says that it was read.
async fn unread(
    shared: &Arc<tokio::sync::Mutex<Shared>>,
    turn: &mut Option<OwnedMutexGuard<Shared>>,
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
                    let room = readers.len() * 2;
                    readers.shrink_to(room);
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

    /// Wakes by hand, counted.
    #[derive(Default)]
    struct ByHand {
        subscribed: Mutex<Vec<(View, Arc<Notify>)>>,
    }

    struct HandWake(Arc<Notify>);

    impl Wakes for ByHand {
        fn subscribe(&self, query: &ReadQuery) -> Box<dyn Wake> {
            let notify = Arc::new(Notify::new());
            self.subscribed.lock().push((query.view, Arc::clone(&notify)));
            Box::new(HandWake(notify))
        }
    }

    impl Wake for HandWake {
        fn woken(&mut self) -> BoxFuture<'_, ()> {
            Box::pin(self.0.notified())
        }
    }

    impl ByHand {
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
    async fn one_event_is_read_by_one_call_and_what_is_left_by_the_next() {
        let (wakes, waiters) = (ByHand::default(), Waiters::default());
        let join = || waiters.join(&wakes, &read(View::All));
        let (mut one, mut two, mut three) = (join(), join(), join());
        assert_eq!(wakes.subscribed.lock().len(), 1, "they share a subscription");
        wakes.wake();
        assert_eq!(one.next().now_or_never(), Some(Turn::Read));
        assert_eq!(two.next().now_or_never(), None);
        // As long as nobody has read it, whatever becomes of the call.
        drop(one);
        assert_eq!(two.next().now_or_never(), Some(Turn::Read));
        two.has_read(Left::More);
        assert_eq!(three.next().now_or_never(), None);
        drop(two);
        assert_eq!(three.next().now_or_never(), Some(Turn::Read));
        three.has_read(Left::Nothing);
        assert_eq!(three.next().now_or_never(), None);
        wakes.wake();
        assert_eq!(three.next().now_or_never(), Some(Turn::Read));
    }

    #[tokio::test]
    async fn the_oldest_of_too_many_calls_is_displaced_whatever_it_waits_for() {
        let (wakes, waiters) = (ByHand::default(), Waiters::default());
        let mut oldest = waiters.join(&wakes, &read(channel(1)));
        let mut rest: Vec<_> =
            (1..MAX_WAITERS).map(|_| waiters.join(&wakes, &read(channel(2)))).collect();
        assert_eq!(oldest.next().now_or_never(), None);
        let reader = Reader { device: Some(DeviceId::new([9; 16])), ..read(channel(1)).reader };
        let other = ReadQuery { reader, view: channel(1) };
        let mut of_another_device = waiters.join(&wakes, &other);
        assert_eq!(oldest.next().now_or_never(), None);
        let mut ninth = waiters.join(&wakes, &read(channel(1)));
        assert_eq!(oldest.next().now_or_never(), Some(Turn::Displaced));
        for waiter in rest.iter_mut().chain([&mut of_another_device, &mut ninth]) {
            assert_eq!(waiter.next().now_or_never(), None);
        }
        drop((oldest, rest, of_another_device, ninth));
        assert!(waiters.readers.lock().is_empty());
    }

    #[tokio::test]
    async fn calls_for_other_channels_have_subscriptions_of_their_own() {
        let (wakes, waiters) = (ByHand::default(), Waiters::default());
        let views = [channel(1), View::All, channel(1), channel(2)];
        let _joined = views.map(|view| waiters.join(&wakes, &read(view)));
        let subscribed: Vec<_> = wakes.subscribed.lock().iter().map(|(view, _)| *view).collect();
        assert_eq!(subscribed, [channel(1), View::All, channel(2)]);
    }
}
