//! Messages between edges, through NATS. Loss, duplication or delay costs latency, never
//! correctness.
//!
//! An edge subscribes to two subjects: its own, for wakes, and that of all edges, for ended
//! sessions, account events and heartbeats. Publishing adds to a bounded queue and never waits. A
//! message that NATS does not accept in time is dropped and counted.

use std::{borrow::Cow, collections::HashMap, fmt, io, sync::Arc, time::Duration};

use async_nats::{
    Client, ConnectErrorKind, ConnectOptions, Event, ServerAddr, Subscriber, connection::State,
};
use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::StreamExt as _;
use parking_lot::Mutex;
use qpq_domain::{ChannelId, IdentityKey, TokenHash};
use qpq_ports::{AccountEvent, View};
use secrecy::ExposeSecret as _;
use tokio::{
    sync::{broadcast, mpsc, watch},
    time::{Instant, MissedTickBehavior, interval, timeout},
};

use crate::{Config, ConnectError, error::Server, metrics as names};

/// Maximum messages that wait to be published.
const QUEUE_CAPACITY: usize = 64 << 10;
/// Maximum wakes in one message.
const MAX_WAKES: usize = 1_024;
/// Maximum time for NATS to accept one message.
const PUBLISH_TIMEOUT: Duration = Duration::from_millis(500);
/// Time between two heartbeats.
const HEARTBEAT: Duration = Duration::from_secs(2);
/// Time after the last heartbeat of an edge until the edge counts as dead.
const DEAD_AFTER: Duration = Duration::from_secs(7);
/// Maximum received messages that are kept for a slow receiver.
const RECEIVED_CAPACITY: usize = 4_096;

/// The prefix of the id of an edge that reads tagged wakes.
const TAGGED: &str = "2-";

/// The id of one edge. Each start creates a new one.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct EdgeId(pub(crate) Arc<str>);

impl EdgeId {
    pub(crate) fn random() -> Self {
        Self(format!("{TAGGED}{:016x}", rand::random::<u64>()).into())
    }
}

impl fmt::Debug for EdgeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EdgeId({})", self.0)
    }
}

/// A message from another edge.
#[derive(Clone, Debug)]
pub(crate) enum BusMessage {
    /// A message was accepted into this view of the inbox, or became visible in it.
    Wake(IdentityKey, View),
    SessionEnded(TokenHash),
    AccountEvent(IdentityKey, AccountEvent),
}

/// A message to another edge, or to all.
#[derive(Debug)]
enum Outgoing {
    Wake(Arc<str>, IdentityKey, View),
    SessionEnded(TokenHash),
    AccountEvent(IdentityKey, AccountEvent),
}

/// The connection to the other edges. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Bus {
    outgoing: mpsc::Sender<Outgoing>,
    received: broadcast::Sender<BusMessage>,
    reconnects: watch::Sender<()>,
    /// The instant at which the last heartbeat arrived, of any edge including this one.
    last_heartbeat: Arc<Mutex<Instant>>,
    client: Client,
}

impl Bus {
    /// Connects and subscribes as `edge`. Needs a tokio runtime. The tasks of the bus run until
    /// [`close`](Self::close).
    pub(crate) async fn connect(config: &Config, edge: &EdgeId) -> Result<Self, ConnectError> {
        config.nats.authorities(Server::Nats)?;
        let reconnects = watch::Sender::new(());
        let options = options(config, reconnects.clone())?;
        let client = options.connect(servers(config)?).await.map_err(|error| failed(&error))?;
        metrics::gauge!(names::BUS_CONNECTED).set(1.0);
        let subjects = Subjects { namespace: config.namespace.as_str().into() };
        let subscribe = async |subject| {
            client.subscribe(subject).await.map_err(|error| Server::Nats.unreachable(error))
        };
        let own = subscribe(subjects.of(&edge.0)).await?;
        let all = subscribe(subjects.all()).await?;
        let (outgoing, queue) = mpsc::channel(QUEUE_CAPACITY);
        let (received, _) = broadcast::channel(RECEIVED_CAPACITY);
        let last_heartbeat = Arc::new(Mutex::new(Instant::now()));
        tokio::spawn(listen(
            own,
            all,
            received.clone(),
            LiveEdges::new(edge, Arc::clone(&last_heartbeat)),
        ));
        tokio::spawn(publish(client.clone(), subjects, edge.clone(), queue));
        Ok(Self { outgoing, received, reconnects, last_heartbeat, client })
    }

    /// Wakes the calls of `edge` that wait for this view of the inbox.
    pub(crate) fn wake(&self, edge: &str, inbox: IdentityKey, view: View) {
        self.put(Outgoing::Wake(edge.into(), inbox, view));
    }

    /// Invalidates the session's copy in every other edge.
    pub(crate) fn session_ended(&self, token: TokenHash) {
        self.put(Outgoing::SessionEnded(token));
    }

    /// Publishes an account event to every other edge.
    pub(crate) fn event(&self, identity: IdentityKey, event: AccountEvent) {
        self.put(Outgoing::AccountEvent(identity, event));
    }

    /// Returns the messages of other edges from now on.
    pub(crate) fn messages(&self) -> broadcast::Receiver<BusMessage> {
        self.received.subscribe()
    }

    /// Returns a receiver that is notified when NATS is connected again after a disconnection,
    /// during which messages were lost.
    pub(crate) fn reconnects(&self) -> watch::Receiver<()> {
        self.reconnects.subscribe()
    }

    /// Returns whether NATS delivers nothing now: it is disconnected, or heartbeats are overdue.
    pub(crate) fn is_silent(&self) -> bool {
        self.client.connection_state() != State::Connected
            || self.last_heartbeat.lock().elapsed() > DEAD_AFTER
    }

    /// Sends the outgoing messages that are left, and accepts no more.
    pub(crate) async fn close(&self) {
        // An error means that there is no connection to close.
        let _ = timeout(PUBLISH_TIMEOUT, self.client.drain()).await;
    }

    fn put(&self, message: Outgoing) {
        if self.outgoing.try_send(message).is_err() {
            metrics::counter!(names::BUS_DROPPED).increment(1);
        }
    }
}

fn failed(error: &async_nats::ConnectError) -> ConnectError {
    let server = Server::Nats;
    match error.kind() {
        ConnectErrorKind::AuthorizationViolation | ConnectErrorKind::Authentication => {
            server.refuses(error)
        }
        ConnectErrorKind::Tls => server.untrusted(error),
        _ => server.tls_failure(error).unwrap_or_else(|| server.unreachable(error)),
    }
}

fn options(config: &Config, reconnects: watch::Sender<()>) -> Result<ConnectOptions, ConnectError> {
    let mut options = ConnectOptions::new()
        .name("qpq-server")
        .connection_timeout(Duration::from_secs(5))
        .ping_interval(Duration::from_secs(10))
        .event_callback(move |event| {
            let reconnects = reconnects.clone();
            async move {
                match event {
                    Event::Connected => {
                        metrics::gauge!(names::BUS_CONNECTED).set(1.0);
                        reconnects.send_replace(());
                    }
                    Event::Disconnected | Event::Closed => {
                        metrics::gauge!(names::BUS_CONNECTED).set(0.0);
                        tracing::warn!(
                            "nats is disconnected, waiting calls poll until it is connected again"
                        );
                    }
                    // Messages were dropped, as during a disconnection.
                    Event::SlowConsumer(_) => reconnects.send_replace(()),
                    other => tracing::debug!(event = %other, "NATS"),
                }
            }
        });
    if let Some(ca) = &config.nats.ca {
        options = options.add_root_certificates(ca.clone()).require_tls(true);
    }
    let servers = servers(config)?;
    let first = servers.first().expect("at least one");
    let user = first.username().map(unescaped).transpose()?;
    let password = first.password().map(unescaped).transpose()?;
    let own = config.nats.password.as_ref().map(|own| own.expose_secret().to_owned());
    Ok(match (user, own.or(password)) {
        (Some(user), Some(password)) => options.user_and_password(user, password),
        // A user or a password alone is a token, as in all clients of NATS.
        (Some(token), None) | (None, Some(token)) => options.token(token),
        (None, None) => options,
    })
}

/// Decodes a user, password or token, which is percent-encoded in the URL (RFC 3986, section 2.1).
fn unescaped(part: &str) -> Result<String, ConnectError> {
    let text = percent_encoding::percent_decode_str(part).decode_utf8();
    text.map(Cow::into_owned).map_err(|error| bad_url(error.to_string()))
}

fn servers(config: &Config) -> Result<Vec<ServerAddr>, ConnectError> {
    let parse = |url: &str| {
        url.trim().parse().map_err(|error: io::Error| bad_url(error.kind().to_string()))
    };
    config.nats.url.split(',').map(parse).collect()
}

/// Checks the addresses, without a connection.
pub(crate) fn check_urls(config: &Config) -> Result<(), ConnectError> {
    servers(config).map(drop)
}

fn bad_url(cause: String) -> ConnectError {
    ConnectError::Url {
        setting: "nats.url",
        cause,
        expected: "it must be like nats://host:4222 or tls://host:4222, several separated by \
                   commas; special characters of a user or password are percent-encoded",
    }
}

struct Subjects {
    namespace: Arc<str>,
}

impl Subjects {
    fn of(&self, edge: &str) -> String {
        format!("{}.edge.{edge}", self.namespace)
    }

    fn all(&self) -> String {
        format!("{}.edges", self.namespace)
    }
}

/// The first byte of a message: its version and its kind in one. An edge ignores a message with an
/// unknown first byte.
mod tag {
    /// Wakes, to one edge.
    pub(super) const WAKES: u8 = b'W';
    pub(super) const ALIVE: u8 = b'A';
    pub(super) const SESSION_ENDED: u8 = b'S';
    pub(super) const SESSIONS_ENDED: u8 = b'E';
    pub(super) const KEY_PACKAGE_TAKEN: u8 = b'K';
    pub(super) const DEVICES_CHANGED: u8 = b'D';
}

/// The prefix of the 32 bytes that name the channel of the preceding inbox. An edge of the previous
/// release reads these bytes as an inbox that no call waits for, and wakes the preceding inbox for
/// all channels.
const IN_CHANNEL: &[u8; 12] = b"in channel 1";

/// Appends a wake: the inbox, and then its channel if there is one.
fn put_wake(bytes: &mut BytesMut, inbox: &IdentityKey, view: View) {
    bytes.put_slice(inbox.as_bytes());
    if let View::Channel(channel) = view {
        let channel = channel.as_bytes();
        bytes.put_slice(IN_CHANNEL);
        bytes.put_u8(u8::try_from(channel.len()).expect("0 or 16"));
        bytes.put_slice(channel);
        bytes.put_bytes(0, IdentityKey::LEN - IN_CHANNEL.len() - 1 - channel.len());
    }
}

/// Returns the wakes of a message to this edge: after a tag, each as [`put_wake`] encodes it. A
/// message of the previous release has no tag.
fn wakes(message: &[u8]) -> impl Iterator<Item = (IdentityKey, View)> + '_ {
    let blocks = match message.split_first() {
        Some((&tag::WAKES, blocks)) if blocks.len().is_multiple_of(IdentityKey::LEN) => blocks,
        _ if message.len().is_multiple_of(IdentityKey::LEN) => message,
        // A message of a newer release.
        _ => &[],
    };
    let mut blocks = blocks.chunks_exact(IdentityKey::LEN).peekable();
    std::iter::from_fn(move || {
        let inbox = IdentityKey::try_from(blocks.next()?).ok()?;
        let channel = blocks.next_if(|block| block.starts_with(IN_CHANNEL));
        let view = channel.and_then(channel_of).map_or(View::All, View::Channel);
        Some((inbox, view))
    })
}

fn channel_of(block: &[u8]) -> Option<ChannelId> {
    let (&length, rest) = block.strip_prefix(IN_CHANNEL)?.split_first()?;
    ChannelId::try_from(rest.get(..length.into())?).ok()
}

async fn publish(
    client: Client,
    subjects: Subjects,
    edge: EdgeId,
    mut queue: mpsc::Receiver<Outgoing>,
) {
    let mut heartbeats = interval(HEARTBEAT);
    heartbeats.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut messages = Vec::with_capacity(MAX_WAKES);
    loop {
        tokio::select! {
            count = queue.recv_many(&mut messages, MAX_WAKES) => if count == 0 { return },
            _ = heartbeats.tick() => {
                let heartbeat = [&[tag::ALIVE][..], edge.0.as_bytes()].concat();
                send(&client, subjects.all(), heartbeat.into(), 1).await;
                continue;
            }
        }
        let mut wakes: HashMap<Arc<str>, (usize, BytesMut)> = HashMap::new();
        for message in messages.drain(..) {
            match message {
                Outgoing::Wake(edge, inbox, view) => {
                    let (count, bytes) =
                        wakes.entry(edge).or_insert_with_key(|edge| (0, no_wakes(edge)));
                    *count += 1;
                    put_wake(bytes, &inbox, view);
                }
                Outgoing::SessionEnded(token) => {
                    let message = [&[tag::SESSION_ENDED][..], token.as_bytes()].concat();
                    send(&client, subjects.all(), message.into(), 1).await;
                }
                Outgoing::AccountEvent(identity, event) => {
                    let tag = match event {
                        AccountEvent::SessionsEnded => tag::SESSIONS_ENDED,
                        AccountEvent::KeyPackageTaken => tag::KEY_PACKAGE_TAKEN,
                        AccountEvent::DevicesChanged => tag::DEVICES_CHANGED,
                    };
                    send(
                        &client,
                        subjects.all(),
                        [&[tag][..], identity.as_bytes()].concat().into(),
                        1,
                    )
                    .await;
                }
            }
        }
        for (edge, (count, bytes)) in wakes {
            metrics::counter!(names::WAKES, "way" => "sent").increment(count as u64);
            send(&client, subjects.of(&edge), bytes.freeze(), count).await;
        }
    }
}

/// Returns the beginning of a message of wakes: the tag, or nothing for an edge of the previous
/// release, which expects no tag.
fn no_wakes(edge: &str) -> BytesMut {
    let tag: &[u8] = if edge.starts_with(TAGGED) { &[tag::WAKES] } else { &[] };
    BytesMut::from(tag)
}

/// Publishes a message. While NATS is disconnected, its client accepts a few thousand messages and
/// then blocks. So the call has a timeout.
async fn send(client: &Client, subject: String, payload: Bytes, count: usize) {
    if !matches!(timeout(PUBLISH_TIMEOUT, client.publish(subject, payload)).await, Ok(Ok(()))) {
        metrics::counter!(names::BUS_DROPPED).increment(count as u64);
    }
}

/// The edges whose heartbeats arrive. Without NATS none arrive, and this edge counts as the only
/// one.
struct LiveEdges {
    own: Bytes,
    others: HashMap<Bytes, Instant>,
    last_heartbeat: Arc<Mutex<Instant>>,
}

impl LiveEdges {
    fn new(own: &EdgeId, last_heartbeat: Arc<Mutex<Instant>>) -> Self {
        Self {
            own: Bytes::copy_from_slice(own.0.as_bytes()),
            others: HashMap::new(),
            last_heartbeat,
        }
    }

    fn record(&mut self, edge: Bytes) {
        let now = Instant::now();
        *self.last_heartbeat.lock() = now;
        if edge != self.own {
            self.others.insert(edge, now);
        }
    }

    /// Removes the dead edges, and updates the gauge.
    fn count(&mut self) {
        self.others.retain(|_, seen| seen.elapsed() < DEAD_AFTER);
        metrics::gauge!(names::EDGES).set((1 + self.others.len()) as f64);
    }
}

async fn listen(
    mut own: Subscriber,
    mut all: Subscriber,
    received: broadcast::Sender<BusMessage>,
    mut edges: LiveEdges,
) {
    let mut counts = interval(HEARTBEAT);
    counts.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let (message, to_all) = tokio::select! {
            message = own.next() => (message, false),
            message = all.next() => (message, true),
            _ = counts.tick() => {
                edges.count();
                continue;
            }
        };
        let Some(message) = message else { return };
        let payload = message.payload;
        if !to_all {
            for (inbox, view) in wakes(&payload) {
                // Without a receiver, the message is dropped.
                let _ = received.send(BusMessage::Wake(inbox, view));
            }
            continue;
        }
        let Some((&tag, rest)) = payload.split_first() else { continue };
        if tag == tag::ALIVE {
            edges.record(payload.slice(1..));
            edges.count();
            continue;
        }
        let message = match (tag, rest.try_into()) {
            (tag::SESSION_ENDED, Ok(token)) => BusMessage::SessionEnded(TokenHash::new(token)),
            (tag::SESSIONS_ENDED, Ok(key)) => {
                BusMessage::AccountEvent(IdentityKey::new(key), AccountEvent::SessionsEnded)
            }
            (tag::KEY_PACKAGE_TAKEN, Ok(key)) => {
                BusMessage::AccountEvent(IdentityKey::new(key), AccountEvent::KeyPackageTaken)
            }
            (tag::DEVICES_CHANGED, Ok(key)) => {
                BusMessage::AccountEvent(IdentityKey::new(key), AccountEvent::DevicesChanged)
            }
            // From an edge of a newer release.
            _ => continue,
        };
        let _ = received.send(message);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wakes_of_both_releases_are_read_and_no_others() {
        let keys = [IdentityKey::new([b'W'; 32]), IdentityKey::new([2; 32])];
        for to in [&*EdgeId::random().0, "0123456789abcdef"] {
            let mut message = no_wakes(to);
            keys.iter().for_each(|key| message.put_slice(key.as_bytes()));
            assert_eq!(
                wakes(&message).collect::<Vec<_>>(),
                keys.map(|key| (key, View::All)),
                "to {to}"
            );
        }
        for unknown in [&[b'X'; 33][..], &[b'W'; 34], b"W"] {
            assert_eq!(wakes(unknown).count(), 0);
        }
    }

    #[test]
    fn wakes_are_decoded_as_they_were_encoded() {
        let inbox = |n| IdentityKey::new([n; 32]);
        let sent = [
            (inbox(1), View::All),
            (inbox(2), View::Channel(ChannelId::new([7; 16]))),
            (inbox(2), View::Channel(ChannelId::DEFAULT)),
            (inbox(3), View::All),
        ];
        let mut bytes = no_wakes(&EdgeId::random().0);
        for (inbox, view) in &sent {
            put_wake(&mut bytes, inbox, *view);
        }
        assert_eq!(wakes(&bytes).collect::<Vec<_>>(), sent);
    }
}
