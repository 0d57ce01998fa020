//! NATS: word from edge to edge. Every message may be lost, doubled or late, and nothing is wrong
//! then but a delay.
//!
//! An edge listens to two subjects: its own, where it is told which inboxes to look at, and the one
//! of all edges, for sessions that have ended, notices and signs of life. Publishing is putting
//! something into a bounded queue, which never waits: what NATS does not take in time is dropped
//! and counted.

use std::{borrow::Cow, collections::HashMap, fmt, io, sync::Arc, time::Duration};

use async_nats::{
    Client, ConnectErrorKind, ConnectOptions, Event, ServerAddr, Subscriber, connection::State,
};
use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::StreamExt as _;
use parking_lot::Mutex;
use qpq_domain::{ChannelId, IdentityKey, TokenHash};
use qpq_ports::{AccountEvent, View};
use tokio::{
    sync::{broadcast, mpsc, watch},
    time::{Instant, MissedTickBehavior, interval, timeout},
};

use crate::{Config, ConnectError, error::Server, metrics as names};

/// Words that wait to be published.
const QUEUE: usize = 64 << 10;
/// What one message carries at most, in wakes.
const INBOXES: usize = 1_024;
/// How long NATS may take one message.
const PATIENCE: Duration = Duration::from_millis(500);
/// Between two signs of life, and how long after the last one an edge counts as gone.
const SIGN: Duration = Duration::from_secs(2);
const GONE: Duration = Duration::from_secs(7);
/// What a slow listener may be behind.
const HEARD: usize = 4_096;

/// What the id of an edge begins with that understands tagged wakes.
const TAGGED: &str = "2-";

/// One edge, from its start to its end.
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

/// What other edges say.
#[derive(Clone, Debug)]
pub(crate) enum Heard {
    /// Something came into this view of the inbox, or became visible in it.
    Wake(IdentityKey, View),
    SessionEnded(TokenHash),
    AccountEvent(IdentityKey, AccountEvent),
}

#[derive(Debug)]
enum Say {
    Wake(Arc<str>, IdentityKey, View),
    SessionEnded(TokenHash),
    AccountEvent(IdentityKey, AccountEvent),
}

/// The way to the other edges. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Bus {
    say: mpsc::Sender<Say>,
    heard: broadcast::Sender<Heard>,
    back: watch::Sender<()>,
    /// When the last sign of life came through, of whatever edge: this one's own if there is no
    /// other.
    signed_at: Arc<Mutex<Instant>>,
    client: Client,
}

impl Bus {
    /// Connects and listens as `edge`. Needs a tokio runtime, on which it goes on until
    /// [`close`](Self::close).
    pub(crate) async fn connect(config: &Config, edge: &EdgeId) -> Result<Self, ConnectError> {
        config.nats.authorities(Server::Nats)?;
        let back = watch::Sender::new(());
        let options = options(config, back.clone())?;
        let client = options.connect(servers(config)?).await.map_err(|error| failed(&error))?;
        metrics::gauge!(names::BUS_CONNECTED).set(1.0);
        let subjects = Subjects { namespace: config.namespace.as_str().into() };
        let subscribe = async |subject| {
            client.subscribe(subject).await.map_err(|error| Server::Nats.unreachable(error))
        };
        let own = subscribe(subjects.of(&edge.0)).await?;
        let all = subscribe(subjects.all()).await?;
        let (say, said) = mpsc::channel(QUEUE);
        let (heard, _) = broadcast::channel(HEARD);
        let signed_at = Arc::new(Mutex::new(Instant::now()));
        tokio::spawn(listen(
            own,
            all,
            heard.clone(),
            Neighbours::new(edge, Arc::clone(&signed_at)),
        ));
        tokio::spawn(publish(client.clone(), subjects, edge.clone(), said));
        Ok(Self { say, heard, back, signed_at, client })
    }

    /// Has `edge` look at the inbox, if somebody there waits for what is in this view.
    pub(crate) fn wake(&self, edge: &str, inbox: IdentityKey, view: View) {
        self.put(Say::Wake(edge.into(), inbox, view));
    }

    /// Has every other edge forget the session.
    pub(crate) fn session_ended(&self, token: TokenHash) {
        self.put(Say::SessionEnded(token));
    }

    pub(crate) fn event(&self, identity: IdentityKey, event: AccountEvent) {
        self.put(Say::AccountEvent(identity, event));
    }

    /// What is heard from now on.
    pub(crate) fn hear(&self) -> broadcast::Receiver<Heard> {
        self.heard.subscribe()
    }

    /// Changes whenever NATS was away and is back: what was said meanwhile is lost.
    pub(crate) fn back(&self) -> watch::Receiver<()> {
        self.back.subscribe()
    }

    /// Whether nothing comes through now, as far as can be told.
    pub(crate) fn is_deaf(&self) -> bool {
        self.client.connection_state() != State::Connected || self.signed_at.lock().elapsed() > GONE
    }

    /// Says what is still to be said, and no more.
    pub(crate) async fn close(&self) {
        // An error says that there is no connection to end.
        let _ = timeout(PATIENCE, self.client.drain()).await;
    }

    fn put(&self, say: Say) {
        if self.say.try_send(say).is_err() {
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

fn options(config: &Config, back: watch::Sender<()>) -> Result<ConnectOptions, ConnectError> {
    let mut options = ConnectOptions::new()
        .name("qpq-server")
        .connection_timeout(Duration::from_secs(5))
        .ping_interval(Duration::from_secs(10))
        .event_callback(move |event| {
            let back = back.clone();
            async move {
                match event {
                    Event::Connected => {
                        metrics::gauge!(names::BUS_CONNECTED).set(1.0);
                        back.send_replace(());
                    }
                    Event::Disconnected | Event::Closed => {
                        metrics::gauge!(names::BUS_CONNECTED).set(0.0);
                        tracing::warn!(
                            "NATS is away: messages arrive a little later until it is back"
                        );
                    }
                    // Something was dropped: as if it had been away.
                    Event::SlowConsumer(_) => back.send_replace(()),
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
    Ok(match (user, config.nats.password.clone().or(password)) {
        (Some(user), Some(password)) => options.user_and_password(user, password),
        // One word alone is a token, as everywhere with NATS.
        (Some(token), None) | (None, Some(token)) => options.token(token),
        (None, None) => options,
    })
}

/// A user, password or token as it is meant; the URL has it percent-encoded (RFC 3986, section
/// 2.1).
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
        expected: "it must be like nats://host:4222 or tls://host:4222, several separated by commas; what is special in a \
                   user or password is percent-encoded",
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

/// First byte of a message: its version and its kind, in one. An edge that does not know it ignores
/// the message.
mod tag {
    /// Inboxes to look at, to one edge.
    pub(super) const WAKES: u8 = b'W';
    pub(super) const ALIVE: u8 = b'A';
    pub(super) const SESSION_ENDED: u8 = b'S';
    pub(super) const SESSIONS_ENDED: u8 = b'E';
    pub(super) const KEY_PACKAGE_TAKEN: u8 = b'K';
}

/// Begins the 32 bytes that name the channel of the inbox before them. An edge of the release that
/// has no such bytes takes them for an inbox that nobody waits for, and looks at the one before
/// whatever the channel.
const IN_CHANNEL: &[u8; 12] = b"in channel 1";

/// Appends a wake: the inbox, and then its channel if there is one.
fn put_wake(words: &mut BytesMut, inbox: &IdentityKey, view: View) {
    words.put_slice(inbox.as_bytes());
    if let View::Channel(channel) = view {
        let channel = channel.as_bytes();
        words.put_slice(IN_CHANNEL);
        words.put_u8(u8::try_from(channel.len()).expect("0 or 16"));
        words.put_slice(channel);
        words.put_bytes(0, IdentityKey::LEN - IN_CHANNEL.len() - 1 - channel.len());
    }
}

/// The wakes of a message to this edge: what [`put_wake`] wrote, after the tag unless the message is
/// of the release before.
fn wakes(message: &[u8]) -> impl Iterator<Item = (IdentityKey, View)> + '_ {
    let words = match message.split_first() {
        Some((&tag::WAKES, words)) if words.len().is_multiple_of(IdentityKey::LEN) => words,
        _ if message.len().is_multiple_of(IdentityKey::LEN) => message,
        // Of a newer release.
        _ => &[],
    };
    let mut words = words.chunks_exact(IdentityKey::LEN).peekable();
    std::iter::from_fn(move || {
        let inbox = IdentityKey::try_from(words.next()?).ok()?;
        let channel = words.next_if(|word| word.starts_with(IN_CHANNEL));
        let view = channel.and_then(channel_of).map_or(View::All, View::Channel);
        Some((inbox, view))
    })
}

fn channel_of(word: &[u8]) -> Option<ChannelId> {
    let (&length, rest) = word.strip_prefix(IN_CHANNEL)?.split_first()?;
    ChannelId::try_from(rest.get(..length.into())?).ok()
}

async fn publish(client: Client, subjects: Subjects, edge: EdgeId, mut said: mpsc::Receiver<Say>) {
    let mut signs = interval(SIGN);
    signs.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut words = Vec::with_capacity(INBOXES);
    loop {
        tokio::select! {
            count = said.recv_many(&mut words, INBOXES) => if count == 0 { return },
            _ = signs.tick() => {
                let sign = [&[tag::ALIVE][..], edge.0.as_bytes()].concat();
                send(&client, subjects.all(), sign.into(), 1).await;
                continue;
            }
        }
        let mut wakes: HashMap<Arc<str>, (usize, BytesMut)> = HashMap::new();
        for word in words.drain(..) {
            match word {
                Say::Wake(edge, inbox, view) => {
                    let (count, words) =
                        wakes.entry(edge).or_insert_with_key(|edge| (0, untold(edge)));
                    *count += 1;
                    put_wake(words, &inbox, view);
                }
                Say::SessionEnded(token) => {
                    let word = [&[tag::SESSION_ENDED][..], token.as_bytes()].concat();
                    send(&client, subjects.all(), word.into(), 1).await;
                }
                Say::AccountEvent(identity, event) => {
                    let tag = match event {
                        AccountEvent::SessionsEnded => tag::SESSIONS_ENDED,
                        AccountEvent::KeyPackageTaken => tag::KEY_PACKAGE_TAKEN,
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
        for (edge, (count, words)) in wakes {
            metrics::counter!(names::WAKES, "way" => "sent").increment(count as u64);
            send(&client, subjects.of(&edge), words.freeze(), count).await;
        }
    }
}

/// A message to an edge that names no inbox yet. One of the release before wants no tag.
fn untold(edge: &str) -> BytesMut {
    let tag: &[u8] = if edge.starts_with(TAGGED) { &[tag::WAKES] } else { &[] };
    BytesMut::from(tag)
}

/// While NATS is away its client takes a few thousand messages and then none, for ever: hence the
/// patience.
async fn send(client: &Client, subject: String, payload: Bytes, count: usize) {
    if !matches!(timeout(PATIENCE, client.publish(subject, payload)).await, Ok(Ok(()))) {
        metrics::counter!(names::BUS_DROPPED).increment(count as u64);
    }
}

/// The edges whose signs of life come through. Without NATS none do, and what is left is this one.
struct Neighbours {
    own: Bytes,
    others: HashMap<Bytes, Instant>,
    signed_at: Arc<Mutex<Instant>>,
}

impl Neighbours {
    fn new(own: &EdgeId, signed_at: Arc<Mutex<Instant>>) -> Self {
        Self { own: Bytes::copy_from_slice(own.0.as_bytes()), others: HashMap::new(), signed_at }
    }

    fn signed(&mut self, edge: Bytes) {
        let now = Instant::now();
        *self.signed_at.lock() = now;
        if edge != self.own {
            self.others.insert(edge, now);
        }
    }

    /// Forgets those that are silent, and says how many there are.
    fn count(&mut self) {
        self.others.retain(|_, seen| seen.elapsed() < GONE);
        metrics::gauge!(names::EDGES).set((1 + self.others.len()) as f64);
    }
}

async fn listen(
    mut own: Subscriber,
    mut all: Subscriber,
    heard: broadcast::Sender<Heard>,
    mut neighbours: Neighbours,
) {
    let mut counts = interval(SIGN);
    counts.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let (message, to_all) = tokio::select! {
            message = own.next() => (message, false),
            message = all.next() => (message, true),
            _ = counts.tick() => {
                neighbours.count();
                continue;
            }
        };
        let Some(message) = message else { return };
        let payload = message.payload;
        if !to_all {
            for (inbox, view) in wakes(&payload) {
                // Nobody to tell is no error.
                let _ = heard.send(Heard::Wake(inbox, view));
            }
            continue;
        }
        let Some((&tag, rest)) = payload.split_first() else { continue };
        if tag == tag::ALIVE {
            neighbours.signed(payload.slice(1..));
            neighbours.count();
            continue;
        }
        let word = match (tag, rest.try_into()) {
            (tag::SESSION_ENDED, Ok(token)) => Heard::SessionEnded(TokenHash::new(token)),
            (tag::SESSIONS_ENDED, Ok(key)) => {
                Heard::AccountEvent(IdentityKey::new(key), AccountEvent::SessionsEnded)
            }
            (tag::KEY_PACKAGE_TAKEN, Ok(key)) => {
                Heard::AccountEvent(IdentityKey::new(key), AccountEvent::KeyPackageTaken)
            }
            // Of a newer release.
            _ => continue,
        };
        let _ = heard.send(word);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wakes_are_read_from_edges_of_either_release_and_from_no_other() {
        let keys = [IdentityKey::new([b'W'; 32]), IdentityKey::new([2; 32])];
        for to in [&*EdgeId::random().0, "0123456789abcdef"] {
            let mut message = untold(to);
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
    fn wakes_are_read_as_they_were_written() {
        let inbox = |n| IdentityKey::new([n; 32]);
        let sent = [
            (inbox(1), View::All),
            (inbox(2), View::Channel(ChannelId::new([7; 16]))),
            (inbox(2), View::Channel(ChannelId::DEFAULT)),
            (inbox(3), View::All),
        ];
        let mut words = untold(&EdgeId::random().0);
        for (inbox, view) in &sent {
            put_wake(&mut words, inbox, *view);
        }
        assert_eq!(wakes(&words).collect::<Vec<_>>(), sent);
    }
}
