//! Subscribe (206): the conditions of each event. The absence of an event is shown by a later one
//! that the test triggers.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use qpq_domain::Username;
use qpq_mls::Identity;
use qpq_ports::Clock as _;
use qpq_proto::{
    ServerEvent, Status, methods,
    v1::{
        DevicesChangedEvent, EnqueueRequest, FetchKeyPackageRequest, FetchRequest, LogoutRequest,
        PeekRequest, RegisterDeviceRequest, SubscribeRequest, UploadKeyPackageRequest, WakeEvent,
    },
};
use qpq_rpc::Events;
use tokio::sync::Notify;

use crate::{
    harness::{Server, User},
    user::message,
    waiters::Waiters,
};

const CHANNEL: Bytes = Bytes::from_static(&[0xc1; 16]);
const OTHER_CHANNEL: Bytes = Bytes::from_static(&[0xc2; 16]);

/// The events that a client has accepted, and the last one that it refused.
struct Inbound {
    accepts: AtomicBool,
    accepted: Mutex<VecDeque<ServerEvent>>,
    /// The newest seq of each channel that `next_new` has returned.
    known: Mutex<HashMap<Bytes, u64>>,
    refused: Mutex<Option<ServerEvent>>,
    changed: Notify,
}

impl Default for Inbound {
    fn default() -> Self {
        Self {
            accepts: AtomicBool::new(true),
            accepted: Mutex::default(),
            known: Mutex::default(),
            refused: Mutex::default(),
            changed: Notify::new(),
        }
    }
}

impl Events for Inbound {
    fn send(&self, event_type: u16, payload: Bytes) -> bool {
        let event =
            ServerEvent::decode(event_type, payload).expect("well-formed").expect("a known type");
        let accepts = self.accepts.load(Ordering::SeqCst);
        if accepts {
            self.accepted.lock().push_back(event);
        } else {
            *self.refused.lock() = Some(event);
        }
        self.changed.notify_one();
        accepts
    }
}

impl Inbound {
    async fn next(&self) -> ServerEvent {
        loop {
            if let Some(event) = self.accepted.lock().pop_front() {
                return event;
            }
            self.changed.notified().await;
        }
    }

    /// Returns the next event, without repeated Wakes.
    async fn next_new(&self) -> ServerEvent {
        loop {
            let event = self.next().await;
            let ServerEvent::Wake(WakeEvent { channel_id, seq }) = &event else { return event };
            let known = self.known.lock().insert(channel_id.clone(), *seq);
            if known.is_none_or(|known| known < *seq) {
                return event;
            }
        }
    }

    async fn refused(&self, event: &ServerEvent) {
        while self.refused.lock().as_ref() != Some(event) {
            self.changed.notified().await;
        }
    }
}

/// Opens another connection of `user`, with its events.
fn listen(server: &Server, user: &User) -> (User, Arc<Inbound>) {
    let inbound = Arc::new(Inbound::default());
    let mut user = user.elsewhere(server);
    user.client = server.connect_with(Arc::clone(&inbound) as Arc<dyn Events>);
    (user, inbound)
}

async fn subscribe(user: &User) {
    assert!(user.ok::<methods::Subscribe>(SubscribeRequest::default()).await.success);
}

async fn subscribe_to_all(user: &User) {
    let request = SubscribeRequest { all_channels: true, ..Default::default() };
    assert!(user.ok::<methods::Subscribe>(request).await.success);
}

async fn send_in(user: &User, channel_id: Bytes) {
    user.ok::<methods::Enqueue>(EnqueueRequest { channel_id, ..message(user, b"hello") }).await;
}

fn wake(channel_id: Bytes, seq: u64) -> ServerEvent {
    ServerEvent::Wake(WakeEvent { channel_id, seq })
}

/// Advances the runtime's time and runs the tasks that wait for it.
async fn pass(time: Duration) {
    tokio::time::pause();
    tokio::time::advance(time).await;
    complete().await;
    tokio::time::resume();
}

/// Runs all tasks until they wait.
async fn complete() {
    for _ in 0..16 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn each_message_sends_a_wake_and_no_content() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let (bob, inbound) = listen(&server, &server.user("bob").await);
    subscribe(&bob).await;
    for seq in 1..=3 {
        alice.send(&bob, b"hello").await;
        assert_eq!(inbound.next_new().await, wake(Bytes::new(), seq));
    }
}

#[tokio::test]
async fn messages_in_the_inbox_are_reported_by_the_newest_of_each_channel() {
    let server = Server::start().await;
    let bob = server.user("bob").await;
    for channel in [Bytes::new(), CHANNEL, OTHER_CHANNEL, Bytes::new(), CHANNEL] {
        send_in(&bob, channel).await;
    }
    let (all, inbound) = listen(&server, &bob);
    subscribe_to_all(&all).await;
    for expected in [wake(Bytes::new(), 4), wake(CHANNEL, 5), wake(OTHER_CHANNEL, 3)] {
        assert_eq!(inbound.next_new().await, expected);
    }
    let (one, inbound) = listen(&server, &bob);
    subscribe(&one).await;
    assert_eq!(inbound.next_new().await, wake(Bytes::new(), 4));
    send_in(&bob, CHANNEL).await;
    send_in(&bob, Bytes::new()).await;
    assert_eq!(inbound.next_new().await, wake(Bytes::new(), 7));
}

#[tokio::test]
async fn a_long_inbox_is_reported_to_its_end() {
    let server = Server::start().await;
    let bob = server.user("bob").await;
    let batch = qpq_proto::v1::BatchEnqueueRequest {
        messages: vec![message(&bob, b"hello"); 700],
        ..Default::default()
    };
    bob.ok::<methods::BatchEnqueue>(batch).await;
    let (bob, inbound) = listen(&server, &bob);
    subscribe(&bob).await;
    while inbound.next_new().await != wake(Bytes::new(), 700) {}
}

#[tokio::test]
async fn a_slow_client_receives_the_newest_wake_of_each_channel() {
    let server = Server::start().await;
    let (bob, inbound) = listen(&server, &server.user("bob").await);
    inbound.accepts.store(false, Ordering::SeqCst);
    subscribe_to_all(&bob).await;
    for channel in [CHANNEL, Bytes::new(), Bytes::new(), CHANNEL, OTHER_CHANNEL, Bytes::new()] {
        send_in(&bob, channel).await;
    }
    inbound.refused(&wake(Bytes::new(), 6)).await;
    inbound.accepts.store(true, Ordering::SeqCst);
    for expected in [wake(Bytes::new(), 6), wake(CHANNEL, 4), wake(OTHER_CHANNEL, 5)] {
        assert_eq!(inbound.next_new().await, expected);
    }
    send_in(&bob, CHANNEL).await;
    assert_eq!(inbound.next_new().await, wake(CHANNEL, 7));
}

#[tokio::test]
async fn a_slow_client_receives_a_wake_for_each_of_many_channels() {
    let server = Server::start().await;
    let (bob, inbound) = listen(&server, &server.user("bob").await);
    let channel = |n: u16| Bytes::from([&n.to_be_bytes()[..], &[0xc3; 14]].concat());
    let messages =
        (0..1_000).map(|n| EnqueueRequest { channel_id: channel(n), ..message(&bob, b"hello") });
    let batch =
        qpq_proto::v1::BatchEnqueueRequest { messages: messages.collect(), ..Default::default() };
    bob.ok::<methods::BatchEnqueue>(batch).await;
    inbound.accepts.store(false, Ordering::SeqCst);
    subscribe_to_all(&bob).await;
    inbound.refused(&wake(channel(0), 1)).await;
    inbound.accepts.store(true, Ordering::SeqCst);
    for n in 0..1_000 {
        assert_eq!(inbound.next_new().await, wake(channel(n), u64::from(n) + 1));
    }
}

#[tokio::test]
async fn messages_of_a_lost_answer_are_reported() {
    let server = Server::start().await;
    let (bob, inbound) = listen(&server, &server.user("bob").await);
    bob.send(&bob, b"hello").await;
    let leased = bob.ask::<methods::Fetch>(FetchRequest::default()).await.expect("one message");
    subscribe_to_all(&bob).await;
    // Messages after a leased one are not visible.
    send_in(&bob, CHANNEL).await;
    drop(leased);
    assert_eq!(inbound.next_new().await, wake(Bytes::new(), 1));
    assert_eq!(inbound.next_new().await, wake(CHANNEL, 2));
}

#[tokio::test]
async fn a_reported_message_that_was_leased_and_released_is_reported_again() {
    let server = Server::start().await;
    let (bob, inbound) = listen(&server, &server.user("bob").await);
    subscribe(&bob).await;
    bob.send(&bob, b"hello").await;
    assert_eq!(inbound.next().await, wake(Bytes::new(), 1));
    // Another connection leases the message and loses the answer.
    let leased = bob.elsewhere(&server).ask::<methods::Fetch>(FetchRequest::default()).await;
    assert!(bob.ok::<methods::Peek>(PeekRequest::default()).await.payloads.is_empty());
    drop(leased.expect("one message"));
    assert_eq!(inbound.next().await, wake(Bytes::new(), 1));
    assert_eq!(bob.ok::<methods::Peek>(PeekRequest::default()).await.payloads.len(), 1);
}

#[tokio::test]
async fn a_slow_client_receives_draining_once() {
    let (server, waiters) = Waiters::server().await;
    let (bob, inbound) = listen(&server, &server.user("bob").await);
    inbound.accepts.store(false, Ordering::SeqCst);
    subscribe(&bob).await;
    waiters.waited(1).await;
    server.rpc.drain();
    complete().await;
    pass(Duration::from_secs(5)).await;
    assert!(matches!(*inbound.refused.lock(), Some(ServerEvent::Draining(_))));
    inbound.accepts.store(true, Ordering::SeqCst);
    pass(Duration::from_secs(10)).await;
    assert!(matches!(inbound.next_new().await, ServerEvent::Draining(_)));
    server.rpc.drained().await;
    pass(Duration::from_secs(10)).await;
    bob.send(&bob, b"hello").await;
    assert_eq!(inbound.next_new().await, wake(Bytes::new(), 1));
}

#[tokio::test]
async fn a_second_subscription_replaces_the_first() {
    let (server, waiters) = Waiters::server().await;
    let (bob, inbound) = listen(&server, &server.user("bob").await);
    subscribe_to_all(&bob).await;
    bob.send(&bob, b"hello").await;
    assert_eq!(inbound.next_new().await, wake(Bytes::new(), 1));
    subscribe(&bob).await;
    assert_eq!(inbound.next().await, wake(Bytes::new(), 1), "reported again");
    waiters.subscribed(1).await;
    send_in(&bob, CHANNEL).await;
    for seq in [3, 4] {
        send_in(&bob, Bytes::new()).await;
        assert_eq!(inbound.next_new().await, wake(Bytes::new(), seq));
    }
}

#[tokio::test]
async fn a_subscription_ends_with_its_connection() {
    let (server, waiters) = Waiters::server().await;
    let bob = server.user("bob").await;
    let (first, _) = listen(&server, &bob);
    let (second, inbound) = listen(&server, &bob);
    subscribe(&first).await;
    subscribe(&second).await;
    waiters.subscribed(2).await;
    server.rpc.disconnected(&first.client.conn);
    waiters.subscribed(1).await;
    // On a closed connection no subscription starts.
    subscribe(&first).await;
    waiters.subscribed(1).await;
    bob.send(&bob, b"hello").await;
    assert_eq!(inbound.next_new().await, wake(Bytes::new(), 1));
    server.rpc.disconnected(&second.client.conn);
    waiters.subscribed(0).await;
}

#[tokio::test]
async fn a_subscription_needs_a_session() {
    let server = Server::start().await;
    let refused = server.connect().call::<methods::Subscribe>(SubscribeRequest::default()).await;
    refused.expect_err("no session").assert(Status::Unauthorized, "auth.session_required");
}

#[tokio::test]
async fn an_ended_session_receives_session_revoked_and_no_later_event() {
    let (server, waiters) = Waiters::server().await;
    let bob = server.user("bob").await;
    let (first, first_inbound) = listen(&server, &bob);
    let (second, second_inbound) = listen(&server, &bob.elsewhere(&server).again().await);
    subscribe(&first).await;
    subscribe(&second).await;
    bob.ok::<methods::Logout>(LogoutRequest::default()).await;
    assert!(matches!(first_inbound.next_new().await, ServerEvent::SessionRevoked(_)));
    waiters.subscribed(1).await;
    // The other session's subscription continues.
    second.send(&second, b"hello").await;
    assert_eq!(second_inbound.next_new().await, wake(Bytes::new(), 1));
    assert!(first_inbound.accepted.lock().is_empty());

    // A slow client receives SessionRevoked later, and no event from the time in between.
    second_inbound.accepts.store(false, Ordering::SeqCst);
    second.ok::<methods::Logout>(LogoutRequest::default()).await;
    bob.again().await.send(&second, b"too late").await;
    complete().await;
    second_inbound.accepts.store(true, Ordering::SeqCst);
    assert!(matches!(second_inbound.next_new().await, ServerEvent::SessionRevoked(_)));
    waiters.subscribed(0).await;
    assert!(second_inbound.accepted.lock().is_empty());
}

#[tokio::test]
async fn an_expired_session_is_detected_within_ten_minutes() {
    let (server, waiters) = Waiters::server().await;
    let (bob, inbound) = listen(&server, &server.user("bob").await);
    subscribe(&bob).await;
    waiters.waited(1).await;
    server.clock.advance(Duration::from_secs(31 * 24 * 3600));
    pass(Duration::from_secs(10 * 60)).await;
    assert!(matches!(inbound.next_new().await, ServerEvent::SessionRevoked(_)));
    waiters.subscribed(0).await;
}

#[tokio::test]
async fn draining_is_sent_to_all_subscribers_over_five_seconds() {
    let (server, waiters) = Waiters::server().await;
    let bob = server.user("bob").await;
    let listeners: Vec<_> = (0..40).map(|_| listen(&server, &bob)).collect();
    for (listener, _) in &listeners {
        subscribe(listener).await;
    }
    waiters.waited(40).await;
    server.rpc.drain();
    let drained = tokio::spawn({
        let rpc = Arc::clone(&server.rpc);
        async move { rpc.drained().await }
    });
    complete().await;
    let notified =
        || listeners.iter().filter(|(_, inbound)| !inbound.accepted.lock().is_empty()).count();
    pass(Duration::from_secs(1)).await;
    assert!(notified() < 40, "all were notified in the first second");
    assert!(!drained.is_finished());
    pass(Duration::from_secs(4)).await;
    drained.await.expect("no panic");
    for (_, inbound) in &listeners {
        let ServerEvent::Draining(event) = inbound.next_new().await else {
            panic!("another event")
        };
        assert!((20_000..=30_000).contains(&event.deadline_ms), "{event:?}");
    }
    // Until the connection is closed its subscription continues.
    bob.send(&bob, b"hello").await;
    for (_, inbound) in &listeners {
        assert_eq!(inbound.next_new().await, wake(Bytes::new(), 1));
    }
}

/// Uploads `count` packages for `user`.
async fn stock(server: &Server, user: &User, count: usize) {
    let name = Username::parse(&user.name).expect("a username");
    let mut mls = qpq_mls::Client::in_memory(Identity::from_seed(&user.signing.to_bytes()), name);
    let more_packages = mls
        .key_packages(count, server.clock.now())
        .expect("packages")
        .into_iter()
        .map(Bytes::from)
        .collect();
    let request = UploadKeyPackageRequest { more_packages, ..Default::default() };
    user.ok::<methods::UploadKeyPackage>(request).await;
}

async fn take(user: &User, target: &User) {
    let request = FetchKeyPackageRequest { identity_key: target.key(), ..Default::default() };
    assert!(!user.ok::<methods::FetchKeyPackage>(request).await.package.is_empty());
}

#[tokio::test]
async fn key_packages_low_is_sent_below_ten_packages_at_most_once_a_minute() {
    let server = Server::start().await;
    let (alice, other) = (server.user("alice").await, server.user("other").await);
    let (bob, inbound) = listen(&server, &server.user("bob").await);
    let (_, other_inbound) = listen(&server, &other);
    subscribe(&bob).await;
    stock(&server, &bob, 11).await;

    // Ten packages are enough.
    take(&alice, &bob).await;
    bob.send(&bob, b"hello").await;
    assert_eq!(inbound.next_new().await, wake(Bytes::new(), 1));
    // Nine packages are low.
    take(&alice, &bob).await;
    let ServerEvent::KeyPackagesLow(low) = inbound.next_new().await else {
        panic!("another event")
    };
    assert_eq!(low.available, 9);
    // KeyPackagesLow was sent less than a minute ago.
    take(&alice, &bob).await;
    take(&alice, &bob).await;
    bob.send(&bob, b"hello").await;
    assert_eq!(inbound.next_new().await, wake(Bytes::new(), 2));
    // A minute later, KeyPackagesLow is sent again with the current number.
    pass(Duration::from_secs(60)).await;
    let ServerEvent::KeyPackagesLow(low) = inbound.next_new().await else {
        panic!("another event")
    };
    assert_eq!(low.available, 7);
    assert!(other_inbound.accepted.lock().is_empty());
}

#[tokio::test]
async fn a_registered_and_a_renamed_device_are_reported_to_the_account() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let (subscribed, inbound) = listen(&server, &alice);
    subscribe(&subscribed).await;
    for name in ["phone", "old phone"] {
        let device = RegisterDeviceRequest {
            device_id: vec![1; 16].into(),
            device_name: name.into(),
            ..Default::default()
        };
        assert!(alice.ok::<methods::RegisterDevice>(device).await.success);
        // Registration of the first device changes the reader of the inbox, which also sends a
        // Wake.
        while inbound.next().await != ServerEvent::DevicesChanged(DevicesChangedEvent {}) {}
    }
}
