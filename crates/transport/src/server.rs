//! The listening end: binds, lets connections in, drains.
//!
//! One task accepts; each connection has its own ([`connection`]), each of its streams too.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use quinn::{Endpoint, EndpointConfig, Incoming, TokioRuntime, ValidationTokenConfig, VarInt};
use tokio::{
    sync::watch,
    time::{Instant, timeout, timeout_at},
};

use crate::{
    Certificates, Config, Member, Service, Timeouts, config,
    connection::{self, Admission},
    drain::{InFlight, Phase},
    fleet::{self, Recognised},
    gate::{Address, Gate, Refused, Verdict},
    metric::Metrics,
    socket, tls,
};

/// Resets answer only ids that this edge has made and are smaller than what they answer, so they
/// need no more of a limit than keeps a flood of old packets cheap; an edge that is back has
/// thousands of clients to tell.
const MIN_RESET_INTERVAL: Duration = Duration::from_millis(1);

/// Application code and reason of the close that ends a drain.
const CLOSE_CODE: VarInt = VarInt::from_u32(0);
const CLOSE_REASON: &[u8] = b"server shutting down";

/// How long the close may take to reach the clients, and the last deliveries to be noted.
const CLOSE_TIME: Duration = Duration::from_secs(3);

/// How long a drain lets the replies travel that were written just before it began; later ones are
/// waited for.
const LINGER: Duration = Duration::from_millis(250);

/// The shortest time between two warnings that connections are refused, for each reason.
const WARN_AT_MOST_EVERY: Duration = Duration::from_secs(10);

/// First packets that wait for the accept loop, and their bytes, each and together.
const MAX_INCOMING: usize = 4096;
const INCOMING_BUFFER: u64 = 64 * 1024;
const INCOMING_BUFFER_TOTAL: u64 = 16 * 1024 * 1024;

/// A server at work. Dropping it closes every connection at once; [`drain`](Self::drain) does it
/// gently.
#[must_use = "a dropped server closes its connections"]
pub struct Server<S: Service> {
    endpoints: Vec<Endpoint>,
    local_addrs: Vec<SocketAddr>,
    shared: Arc<Shared<S>>,
}

/// What the tasks of a server share.
pub(crate) struct Shared<S> {
    pub(crate) service: Arc<S>,
    pub(crate) timeouts: Timeouts,
    pub(crate) max_streams: usize,
    pub(crate) metrics: Metrics,
    pub(crate) in_flight: InFlight,
    pub(crate) phase: watch::Sender<Phase>,
    pub(crate) gate: Arc<Gate>,
}

/// Why a server could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The address is taken, or not this machine's, or not allowed.
    #[error("cannot listen on UDP {addr}: {source}")]
    Socket {
        /// Where it should have listened.
        addr: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// TLS cannot be set up.
    #[error("cannot set up TLS: {0}")]
    Tls(#[from] rustls::Error),
}

impl<S: Service> Server<S> {
    /// Listens and serves, in the background, until drained or dropped. Call it inside a tokio
    /// runtime.
    ///
    /// # Errors
    /// [`BindError`].
    pub fn bind(
        config: Config,
        certificates: Arc<Certificates>,
        service: Arc<S>,
    ) -> Result<Self, BindError> {
        Self::bind_as(None, config, certificates, service)
    }

    /// As [`bind`](Self::bind), as one of several that a client may be taken to in turn. The caller
    /// has [`FleetKeys::watch`](crate::FleetKeys::watch) run beside it.
    ///
    /// # Errors
    /// [`BindError`].
    pub fn bind_in_fleet(
        member: Member,
        config: Config,
        certificates: Arc<Certificates>,
        service: Arc<S>,
    ) -> Result<Self, BindError> {
        Self::bind_as(Some(member), config, certificates, service)
    }

    fn bind_as(
        member: Option<Member>,
        config: Config,
        certificates: Arc<Certificates>,
        service: Arc<S>,
    ) -> Result<Self, BindError> {
        let member = member.as_ref();
        let crypto =
            tls::server(certificates, member.map(|member| Arc::clone(&member.keys.tickets) as _))?;
        let sockets = socket::bind_all(&config.listen)
            .map_err(|(addr, source)| BindError::Socket { addr, source })?;
        let server_config = server_config(crypto, &config, member);
        let recognised = member.map_or_else(Recognised::while_running, Member::recognised);
        let (mut endpoints, mut local_addrs) = (Vec::new(), Vec::new());
        for (local_addr, socket) in sockets {
            let endpoint = Endpoint::new(
                endpoint_config(member, recognised.clone()),
                Some(server_config.clone()),
                socket,
                Arc::new(TokioRuntime),
            )
            .map_err(|source| BindError::Socket { addr: local_addr, source })?;
            endpoints.push(endpoint);
            local_addrs.push(local_addr);
        }
        let shared = Arc::new(Shared {
            service,
            timeouts: config.timeouts,
            max_streams: config.limits.max_streams as usize,
            metrics: Metrics::new(),
            in_flight: InFlight::default(),
            phase: watch::Sender::new(Phase::Serving),
            gate: Gate::new(config.limits),
        });
        for endpoint in &endpoints {
            tokio::spawn(accept(endpoint.clone(), Arc::clone(&shared)));
        }
        Ok(Self { endpoints, local_addrs, shared })
    }

    /// The first of the addresses that it listens on.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addrs[0]
    }

    /// The addresses that it listens on, at least one.
    #[must_use]
    pub fn local_addrs(&self) -> &[SocketAddr] {
        &self.local_addrs
    }

    /// Serves until the server is drained or aborted, whoever does it.
    pub async fn run(&self) {
        let mut phase = self.shared.phase.subscribe();
        // The sender lives in `self`.
        let _ = phase.wait_for(|phase| *phase == Phase::Closed).await;
    }

    /// Stops gently: refuses new connections at once, tells the service, lets calls in flight end
    /// for up to `deadline`, then closes all connections with code 0 and the reason `server
    /// shutting down`.
    ///
    /// Calls that begin meanwhile are served. A second drain closes at once.
    pub async fn drain(&self, deadline: Duration) {
        if self.shared.phase.send_replace(Phase::Draining) != Phase::Serving {
            return self.abort().await;
        }
        self.shared.gate.shut();
        let until = Instant::now() + deadline;
        let mut phase = self.shared.phase.subscribe();
        tokio::select! {
            _ = phase.wait_for(|phase| *phase == Phase::Closed) => {}
            ended = timeout_at(until, self.calls_ended(deadline)) => {
                if ended.is_err() {
                    tracing::warn!("calls were still in flight at the end of the drain");
                }
            }
        }
        self.abort().await;
    }

    /// Closes all connections now, and waits, 3 s at most, until the clients were told.
    pub async fn abort(&self) {
        self.close();
        let told = async {
            for endpoint in &self.endpoints {
                endpoint.wait_idle().await;
            }
            self.shared.in_flight.none().await;
        };
        if timeout(CLOSE_TIME, told).await.is_err() {
            tracing::warn!("some clients could not be told that the server closed");
        }
    }

    async fn calls_ended(&self, deadline: Duration) {
        self.shared.service.draining(deadline).await;
        self.shared.in_flight.none().await;
        tokio::time::sleep(LINGER).await;
        self.shared.in_flight.none().await;
    }

    fn close(&self) {
        self.shared.gate.shut();
        self.shared.phase.send_replace(Phase::Closed);
        for endpoint in &self.endpoints {
            endpoint.close(CLOSE_CODE, CLOSE_REASON);
        }
    }
}

impl<S: Service> Drop for Server<S> {
    fn drop(&mut self) {
        self.close();
    }
}

impl<S: Service> std::fmt::Debug for Server<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server")
            .field("local_addrs", &self.local_addrs)
            .field("phase", &*self.shared.phase.borrow())
            .finish_non_exhaustive()
    }
}

fn endpoint_config(member: Option<&Member>, recognised: Recognised) -> EndpointConfig {
    // Its own reset key is random.
    let mut config = EndpointConfig::default();
    if let Some(member) = member {
        config.reset_key(Arc::new(member.keys.reset.clone()));
    }
    config.cid_generator(move || fleet::generator(&recognised));
    config.min_reset_interval(MIN_RESET_INTERVAL);
    // Load balancers and firewalls tell QUIC by the bit that greasing would clear.
    config.grease_quic_bit(false);
    config
}

fn server_config(
    crypto: quinn::crypto::rustls::QuicServerConfig,
    config: &Config,
    member: Option<&Member>,
) -> quinn::ServerConfig {
    let mut server = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    if let Some(member) = member {
        server.token_key(Arc::clone(&member.keys.tokens) as _);
    }
    // Tokens for later connections are bound to an IP address, and behind a proxy all clients have
    // the same.
    let mut tokens = ValidationTokenConfig::default();
    tokens.sent(0);
    server
        .transport_config(config::transport(&config.limits, &config.timeouts))
        .validation_token_config(tokens)
        .max_incoming(MAX_INCOMING)
        .incoming_buffer_size(INCOMING_BUFFER)
        .incoming_buffer_size_total(INCOMING_BUFFER_TOTAL);
    server
}

/// Judges every attempt; it never waits for a peer.
async fn accept<S: Service>(endpoint: Endpoint, shared: Arc<Shared<S>>) {
    let mut full = Full::default();
    while let Some(incoming) = endpoint.accept().await {
        let address =
            if incoming.remote_address_validated() { Address::Validated } else { Address::Claimed };
        match shared.gate.judge(incoming.remote_address().ip(), address) {
            Verdict::Accept(place, handshaking) => {
                let admission = Admission { place, handshaking };
                tokio::spawn(connection::serve(Arc::clone(&shared), incoming, admission));
            }
            Verdict::Retry => retry(incoming, &shared.metrics),
            Verdict::Refuse(reason) => {
                shared.metrics.connections_refused(reason).increment(1);
                full.warn(reason, &shared.gate, Instant::now());
                incoming.refuse();
            }
        }
    }
}

/// Warns that connections are refused because the server is full, at a bounded rate.
#[derive(Default)]
struct Full {
    by_reason: [Warned; Refused::ALL.len()],
}

#[derive(Default)]
struct Warned {
    last: Option<Instant>,
    /// Refusals since the last warning.
    suppressed: u64,
}

impl Full {
    /// Returns whether it logged.
    fn warn(&mut self, reason: Refused, gate: &Gate, now: Instant) -> bool {
        let Some((setting, value)) = reason.setting(gate.limits()) else { return false };
        let warned = &mut self.by_reason[reason as usize];
        if warned.last.is_some_and(|last| now - last < WARN_AT_MOST_EVERY) {
            warned.suppressed += 1;
            return false;
        }
        let more = std::mem::take(&mut warned.suppressed);
        warned.last = Some(now);
        tracing::warn!(
            setting,
            value,
            connections = gate.connections(),
            suppressed = more,
            "the server is full: new connections are refused"
        );
        true
    }
}

fn retry(incoming: Incoming, metrics: &Metrics) {
    metrics.retries_sent.increment(1);
    // Possible for every address that is not validated; where it is not, the drop of the error
    // refuses.
    if incoming.retry().is_err() {
        tracing::debug!("a client with a token was asked for its address again");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Limits;

    #[test]
    fn a_full_server_says_so_once_in_ten_seconds_and_reason() {
        let gate = Gate::new(Limits::default());
        let (mut full, start) = (Full::default(), Instant::now());
        let mut warn = |reason, after| full.warn(reason, &gate, start + Duration::from_secs(after));
        assert!(warn(Refused::Connections, 0));
        assert!(!warn(Refused::Connections, 9));
        assert!(warn(Refused::Handshakes, 9), "another reason");
        assert!(warn(Refused::Connections, 10));
        assert!(!warn(Refused::Draining, 10), "a server that stops is not full");
    }
}
