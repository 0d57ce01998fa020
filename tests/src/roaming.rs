//! A client that moves between edges: when its connection ends, it continues in the same session at
//! another edge, from a new socket.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use qpq_proto::{
    methods::{Method, Subscribe},
    v1,
};
use quinn::ConnectionError;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use tokio::time::{Instant, sleep, timeout};

use crate::{
    client::{Client, Dial, Refused, Silence, endpoint_with},
    cluster::EntryPoints,
};

/// Short timeouts, so that a killed edge is noticed quickly.
const SILENCE: Silence =
    Silence { keep_alive: Duration::from_millis(500), idle: Duration::from_millis(2_500) };
/// The credit of each stream in bytes, so that all that is in flight fits the buffer of the socket.
/// Otherwise the close that ends a drain would be dropped while this process is stalled.
const CREDIT: u32 = 32 * 1024;
/// The time limit of a handshake.
const CONNECTING: Duration = Duration::from_secs(5);
/// The maximum pause before a retry.
const PAUSE: Duration = Duration::from_millis(100);
/// The time limit of [`Roamer::must`], far longer than any fault of a test.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// The reason with which an edge closes connections at the end of a drain.
const SHUTTING_DOWN: &str = "server shutting down";

/// The type of the event at the start of a drain.
const DRAINING: u16 = 4;

/// The statuses of temporary refusals.
const RATE_LIMITED: u8 = 5;
const DEADLINE_EXCEEDED: u8 = 8;
const UNAVAILABLE: u8 = 9;

/// A client that moves between edges.
#[derive(Debug)]
pub struct Roamer {
    entry_points: EntryPoints,
    silence: Silence,
    random: StdRng,
    edge: usize,
    client: Option<Client>,
    /// The session in which the client subscribes to events; `None` if it does not subscribe.
    listening: Option<Bytes>,
    /// Set when the edge has announced a drain.
    drains: Arc<AtomicBool>,
    /// The number of attempts to connect.
    pub connects: u64,
}

/// The outcome of a call.
#[derive(Debug)]
pub enum CallOutcome<T> {
    Ok(T),
    Refused(Refused),
    /// No answer: the call may have taken effect.
    Lost(Loss),
}

/// The reason for a missing answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Loss {
    /// The edge closed the connection at the end of a drain.
    Drained,
    /// The stream or the connection failed with this error.
    Failed(String),
}

impl Refused {
    /// Returns whether the same call may succeed later.
    pub const fn is_temporary(&self) -> bool {
        matches!(self.status, RATE_LIMITED | DEADLINE_EXCEEDED | UNAVAILABLE)
    }
}

impl Roamer {
    /// Creates a client that starts at a random edge.
    pub fn new(entry_points: &EntryPoints, seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let edge = random.gen_range(0..entry_points.addrs.len());
        Self {
            entry_points: entry_points.clone(),
            silence: SILENCE,
            random,
            edge,
            client: None,
            listening: None,
            drains: Arc::default(),
            connects: 0,
        }
    }

    /// Creates a client that starts at this edge.
    pub fn at(entry_points: &EntryPoints, edge: usize) -> Self {
        Self { edge, ..Self::new(entry_points, edge as u64) }
    }

    /// Uses the timeouts of production, so that the client does not leave a busy edge.
    pub fn patient(self) -> Self {
        Self { silence: Silence::default(), ..self }
    }

    /// Subscribes to events, and leaves an edge that announces a drain, as the SDK does.
    pub fn attentive(self, token: &Bytes) -> Self {
        Self { listening: Some(token.clone()), ..self }
    }

    /// Returns the client's current or last edge.
    pub const fn edge(&self) -> usize {
        self.edge
    }

    /// Returns the connection. Connects if there is none, and retries until an edge accepts it.
    pub async fn connected(&mut self) -> Client {
        loop {
            match &self.client {
                Some(client)
                    if client.ended().is_none() && !self.drains.load(Ordering::Relaxed) =>
                {
                    return client.clone();
                }
                Some(_) => self.move_on(),
                None => {}
            }
            match self.connect(self.entry_points.addrs[self.edge]).await {
                Some(client) => {
                    self.listen(&client);
                    self.client = Some(client);
                }
                None => {
                    self.move_on();
                    sleep(PAUSE.mul_f64(self.random.r#gen())).await;
                }
            }
        }
    }

    /// Closes the connection and moves to another edge, as after a change of networks.
    pub fn leave(&mut self) {
        if let Some(client) = self.client.take() {
            client.close();
        }
        self.move_on();
    }

    /// Calls a method once. The only time limit is that of the connection, so an answer in transit
    /// is always received.
    pub async fn call<M: Method>(
        &mut self,
        request: &M::Request,
        token: Option<&Bytes>,
    ) -> CallOutcome<M::Response> {
        let client = self.connected().await;
        call_on::<M>(&client, request, token).await
    }

    /// Calls a method and retries until the answer is Ok.
    ///
    /// # Panics
    /// If it is refused permanently, or not answered within [`PATIENCE`].
    pub async fn must<M: Method>(
        &mut self,
        request: &M::Request,
        token: Option<&Bytes>,
    ) -> M::Response {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.call::<M>(request, token).await {
                CallOutcome::Ok(response) => return response,
                CallOutcome::Refused(refused) if refused.is_temporary() => self.pause().await,
                CallOutcome::Refused(refused) => panic!("{} is refused: {refused:?}", M::INFO.name),
                CallOutcome::Lost(_) => {}
            }
            assert!(Instant::now() < deadline, "{} was not answered in {PATIENCE:?}", M::INFO.name);
        }
    }

    /// Waits for a random short time before a retry.
    pub async fn pause(&mut self) {
        sleep(PAUSE.mul_f64(self.random.r#gen())).await;
    }

    async fn connect(&mut self, addr: SocketAddr) -> Option<Client> {
        self.connects += 1;
        let dial = Dial { silence: self.silence, stream_credit: Some(CREDIT), ..Dial::default() };
        let endpoint = endpoint_with(self.entry_points.pin, dial).expect("a socket");
        timeout(CONNECTING, Client::connect(&endpoint, addr)).await.ok()?.ok()
    }

    /// Subscribes on the new connection, to notice a drain of its edge.
    fn listen(&mut self, client: &Client) {
        self.drains = Arc::default();
        let Some(token) = self.listening.clone() else { return };
        let (client, drains) = (client.clone(), Arc::clone(&self.drains));
        tokio::spawn(async move {
            // A failure is that of the connection, which the next call notices. The task ends with
            // it.
            let _ended = watch_for_drain(&client, &token, &drains).await;
        });
    }

    fn move_on(&mut self) {
        self.client = None;
        self.drains = Arc::default();
        let others = self.entry_points.addrs.len();
        if others > 1 {
            self.edge = (self.edge + self.random.gen_range(1..others)) % others;
        }
    }
}

/// Calls a method once, on this connection.
pub async fn call_on<M: Method>(
    client: &Client,
    request: &M::Request,
    token: Option<&Bytes>,
) -> CallOutcome<M::Response> {
    match client.call::<M>(request, token.map(|token| &token[..])).await {
        Ok(Ok(response)) => CallOutcome::Ok(response),
        Ok(Err(refused)) => CallOutcome::Refused(refused),
        Err(error) => CallOutcome::Lost(loss(client, &error)),
    }
}

async fn watch_for_drain(
    client: &Client,
    token: &Bytes,
    drains: &AtomicBool,
) -> anyhow::Result<()> {
    client.must::<Subscribe>(&v1::SubscribeRequest::default(), Some(token)).await?;
    let mut events = client.events().await?;
    while let Some(event) = events.next().await? {
        if event.event_type == DRAINING {
            drains.store(true, Ordering::Relaxed);
        }
    }
    Ok(())
}

fn loss(client: &Client, error: &anyhow::Error) -> Loss {
    match client.ended() {
        Some(ConnectionError::ApplicationClosed(close)) if close.reason == SHUTTING_DOWN => {
            Loss::Drained
        }
        ended => Loss::Failed(format!("{error:#}; connection: {ended:?}")),
    }
}
