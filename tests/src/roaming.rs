//! A client that does not mind which edge it has: when its connection ends, it goes on from a new
//! socket at another edge, in the same session.

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
    client::{Client, Refused, Silence, endpoint_with},
    cluster::Fleet,
};

/// A dead edge is noticed soon.
const SILENCE: Silence =
    Silence { keep_alive: Duration::from_millis(500), idle: Duration::from_millis(2_500) };
/// For one handshake.
const CONNECTING: Duration = Duration::from_secs(5);
/// The longest pause before another try.
const PAUSE: Duration = Duration::from_millis(100);
/// For [`Roamer::must`]: far more than any fault that a test makes lasts.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// How an edge closes at the end of a drain.
const SHUTTING_DOWN: &str = "server shutting down";

/// The event that an edge sends when it begins to drain.
const DRAINING: u16 = 4;

/// Statuses that say: try again.
const RATE_LIMITED: u8 = 5;
const DEADLINE_EXCEEDED: u8 = 8;
const UNAVAILABLE: u8 = 9;

/// One client, wherever it is.
#[derive(Debug)]
pub struct Roamer {
    fleet: Fleet,
    silence: Silence,
    random: StdRng,
    edge: usize,
    client: Option<Client>,
    /// The session in which it listens for events, if it does.
    listening: Option<Bytes>,
    /// Set when the edge has said that it drains.
    told: Arc<AtomicBool>,
    /// How often it had to connect.
    pub connects: u64,
}

/// How a call ended.
#[derive(Debug)]
pub enum Outcome<T> {
    Ok(T),
    Refused(Refused),
    /// No answer: it may or may not have happened.
    Lost(Loss),
}

/// Why there is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// The edge said that it shuts down, which is the end of a drain.
    Drained,
    Otherwise,
}

impl Refused {
    /// Whether the same call may succeed later.
    pub const fn is_temporary(&self) -> bool {
        matches!(self.status, RATE_LIMITED | DEADLINE_EXCEEDED | UNAVAILABLE)
    }
}

impl Roamer {
    /// One that begins at a random edge.
    pub fn new(fleet: &Fleet, seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let edge = random.gen_range(0..fleet.addrs.len());
        Self {
            fleet: fleet.clone(),
            silence: SILENCE,
            random,
            edge,
            client: None,
            listening: None,
            told: Arc::default(),
            connects: 0,
        }
    }

    /// One that begins at this edge.
    pub fn at(fleet: &Fleet, edge: usize) -> Self {
        Self { edge, ..Self::new(fleet, edge as u64) }
    }

    /// The same, but for what it takes for a dead connection: a busy edge is not to be left for its
    /// silence.
    pub fn patient(self) -> Self {
        Self { silence: Silence::default(), ..self }
    }

    /// The same, but it listens for events and leaves an edge when that says it drains, as the SDK
    /// does.
    pub fn attentive(self, token: &Bytes) -> Self {
        Self { listening: Some(token.clone()), ..self }
    }

    /// At which edge it is, or was last.
    pub const fn edge(&self) -> usize {
        self.edge
    }

    /// Its connection, made if there is none. Goes on for as long as no edge takes it.
    pub async fn connected(&mut self) -> Client {
        loop {
            match &self.client {
                Some(client) if client.ended().is_none() && !self.told.load(Ordering::Relaxed) => {
                    return client.clone();
                }
                Some(_) => self.move_on(),
                None => {}
            }
            match self.connect(self.fleet.addrs[self.edge]).await {
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

    /// Leaves the connection, as a person does who changes networks.
    pub fn leave(&mut self) {
        if let Some(client) = self.client.take() {
            client.close();
        }
        self.move_on();
    }

    /// One call, once. There is no time limit but the connection's: an answer that is on its way is
    /// never given up.
    pub async fn call<M: Method>(
        &mut self,
        request: &M::Request,
        token: Option<&Bytes>,
    ) -> Outcome<M::Response> {
        let client = self.connected().await;
        match client.call::<M>(request, token.map(|token| &token[..])).await {
            Ok(Ok(response)) => Outcome::Ok(response),
            Ok(Err(refused)) => Outcome::Refused(refused),
            Err(_) => Outcome::Lost(loss(&client)),
        }
    }

    /// A call that is repeated until it is answered Ok.
    ///
    /// # Panics
    /// If it is refused for good, or not answered in [`PATIENCE`].
    pub async fn must<M: Method>(
        &mut self,
        request: &M::Request,
        token: Option<&Bytes>,
    ) -> M::Response {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.call::<M>(request, token).await {
                Outcome::Ok(response) => return response,
                Outcome::Refused(refused) if refused.is_temporary() => self.pause().await,
                Outcome::Refused(refused) => panic!("{} is refused: {refused:?}", M::INFO.name),
                Outcome::Lost(_) => {}
            }
            assert!(Instant::now() < deadline, "{} was not answered in {PATIENCE:?}", M::INFO.name);
        }
    }

    /// A moment, before another try.
    pub async fn pause(&mut self) {
        sleep(PAUSE.mul_f64(self.random.r#gen())).await;
    }

    async fn connect(&mut self, addr: SocketAddr) -> Option<Client> {
        self.connects += 1;
        let endpoint = endpoint_with(self.fleet.pin, self.silence).expect("a socket");
        timeout(CONNECTING, Client::connect(&endpoint, addr)).await.ok()?.ok()
    }

    /// Listens on the new connection for the word that its edge drains.
    fn listen(&mut self, client: &Client) {
        self.told = Arc::default();
        let Some(token) = self.listening.clone() else { return };
        let (client, told) = (client.clone(), Arc::clone(&self.told));
        tokio::spawn(async move {
            // Any failure is the connection's, which is noticed otherwise.
            let _ended = until_told(&client, &token, &told).await;
        });
    }

    fn move_on(&mut self) {
        self.client = None;
        self.told = Arc::default();
        let others = self.fleet.addrs.len();
        if others > 1 {
            self.edge = (self.edge + self.random.gen_range(1..others)) % others;
        }
    }
}

async fn until_told(client: &Client, token: &Bytes, told: &AtomicBool) -> anyhow::Result<()> {
    client.must::<Subscribe>(&v1::SubscribeRequest::default(), Some(token)).await?;
    let mut events = client.events().await?;
    while let Some(event) = events.next().await? {
        if event.event_type == DRAINING {
            told.store(true, Ordering::Relaxed);
        }
    }
    Ok(())
}

fn loss(client: &Client) -> Loss {
    match client.ended() {
        Some(ConnectionError::ApplicationClosed(close)) if close.reason == SHUTTING_DOWN => {
            Loss::Drained
        }
        _ => Loss::Otherwise,
    }
}
