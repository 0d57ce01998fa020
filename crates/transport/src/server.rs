//! The listening end: binds sockets, accepts connections, drains.
//!
//! One task for each endpoint accepts connections. Each connection has a task (`connection`), and
//! so has each of its streams (`stream`). The server's two task trackers count all of them, and
//! [`Server::abort`] waits for them.

use std::{
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use quinn::{Endpoint, EndpointConfig, Incoming, TokioRuntime, ValidationTokenConfig, VarInt};
use rustls::RootCertStore;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    admission::{Address, Admission, Decision, LimitReached},
    authorities,
    certificates::Certificates,
    client_certificate::ClientAuth,
    cluster::{
        ClusterEdge,
        connection_ids::{self, ConnectionIdKey},
    },
    config::{self, Config},
    connection,
    context::ServerContext,
    metric::Metrics,
    request_memory::RequestMemory,
    service::Service,
    socket, tls,
};

/// The time between two stateless resets.
///
/// A reset is smaller than the packet that it answers and is sent only for ids that this edge has
/// created, so the limit only keeps a flood of old packets cheap. A restarted edge has thousands of
/// clients to notify, so the limit is not lower.
const MIN_RESET_INTERVAL: Duration = Duration::from_millis(1);

/// Application code and reason of the close that ends a drain.
const CLOSE_CODE: VarInt = VarInt::from_u32(0);
const CLOSE_REASON: &[u8] = b"server shutting down";

/// The time limit for the close to reach the clients and for the last deliveries to be recorded.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(3);

/// The time that a drain leaves for replies written just before it began. Later replies are awaited
/// until they are acknowledged.
const LINGER: Duration = Duration::from_millis(250);

/// The shortest time between two warnings about refused connections, for each reason.
const WARNING_INTERVAL: Duration = Duration::from_secs(10);

/// The maximum number of connection attempts that wait for the accept loop.
const MAX_INCOMING: usize = 4096;
/// The maximum number of bytes that are buffered for one waiting attempt.
const INCOMING_BUFFER: u64 = 64 * 1024;
/// The maximum number of bytes that are buffered for all waiting attempts.
const INCOMING_BUFFER_TOTAL: u64 = 16 * 1024 * 1024;

/// A running server.
///
/// [`drain`](Self::drain) ends it gracefully. Dropping it closes all connections immediately, and
/// its tasks end soon after.
#[must_use = "a dropped server closes its connections"]
pub struct Server<S: Service> {
    endpoints: Vec<Endpoint>,
    local_addrs: Vec<SocketAddr>,
    context: Arc<ServerContext<S>>,
    /// Set by the first [`drain`](Self::drain).
    drain_started: AtomicBool,
    /// Cancelled when all connections are closed.
    closed: CancellationToken,
}

/// The reason why a server cannot start.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The address is in use, not of this machine, or not permitted.
    #[error("cannot listen on UDP {addr}: {source}")]
    Socket {
        /// The address.
        addr: SocketAddr,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The certificate authorities for clients cannot be read.
    #[error("cannot read certificate authorities from {path}: {reason}")]
    Authorities {
        /// The file.
        path: PathBuf,
        /// The problem.
        reason: String,
    },
    /// TLS cannot be set up.
    #[error("cannot set up TLS: {0}")]
    Tls(#[from] rustls::Error),
}

impl<S: Service> Server<S> {
    /// Listens and serves in the background until drained or dropped. Needs a tokio runtime.
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

    /// Listens and serves as [`bind`](Self::bind) does, as one edge of a cluster. The caller runs
    /// [`ClusterKeys::watch`](crate::ClusterKeys::watch) in addition.
    ///
    /// # Errors
    /// [`BindError`].
    pub fn bind_in_cluster(
        edge: ClusterEdge,
        config: Config,
        certificates: Arc<Certificates>,
        service: Arc<S>,
    ) -> Result<Self, BindError> {
        Self::bind_as(Some(edge), config, certificates, service)
    }

    fn bind_as(
        edge: Option<ClusterEdge>,
        config: Config,
        certificates: Arc<Certificates>,
        service: Arc<S>,
    ) -> Result<Self, BindError> {
        let edge = edge.as_ref();
        let crypto = tls::server(tls::Server {
            certificates,
            ticketer: edge.map(|edge| Arc::clone(&edge.keys.tickets) as _),
            alpn: &config.alpn,
            client_authorities: client_authorities(&config.client_auth)?,
        })?;
        let sockets = socket::bind_all(&config.listen)
            .map_err(|(addr, source)| BindError::Socket { addr, source })?;
        let server_config = server_config(crypto, &config, edge);
        let id_key = edge.map_or_else(ConnectionIdKey::random, ClusterEdge::connection_id_key);
        let (mut endpoints, mut local_addrs) = (Vec::new(), Vec::new());
        for (local_addr, socket) in sockets {
            let endpoint = Endpoint::new(
                endpoint_config(edge, id_key.clone()),
                Some(server_config.clone()),
                socket,
                Arc::new(TokioRuntime),
            )
            .map_err(|source| BindError::Socket { addr: local_addr, source })?;
            endpoints.push(endpoint);
            local_addrs.push(local_addr);
        }
        let metrics = Metrics::new();
        let context = Arc::new(ServerContext {
            service,
            timeouts: config.timeouts,
            max_streams: config.limits.max_streams as usize,
            request_memory: RequestMemory::new(&config.limits, metrics.request_bytes.clone()),
            metrics,
            admission: Admission::new(config.limits, config.draining.clone()),
            draining: config.draining,
            streams: TaskTracker::new(),
            connections: TaskTracker::new(),
        });
        for endpoint in &endpoints {
            context.connections.spawn(accept(endpoint.clone(), Arc::clone(&context)));
        }
        Ok(Self {
            endpoints,
            local_addrs,
            context,
            drain_started: AtomicBool::new(false),
            closed: CancellationToken::new(),
        })
    }

    /// Returns the first of the addresses that the server listens on.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addrs[0]
    }

    /// Returns the addresses that the server listens on, at least one.
    #[must_use]
    pub fn local_addrs(&self) -> &[SocketAddr] {
        &self.local_addrs
    }

    /// Waits until the server is drained or aborted.
    pub async fn run(&self) {
        self.closed.cancelled().await;
    }

    /// Stops gracefully.
    ///
    /// Refuses new connections, notifies the service, and waits up to `deadline` for the calls in
    /// flight, including calls that begin in the meantime. Then closes all connections with code 0
    /// and the reason `server shutting down`. A second drain closes immediately.
    pub async fn drain(&self, deadline: Duration) {
        if self.drain_started.swap(true, Ordering::Relaxed) {
            return self.abort().await;
        }
        self.context.draining.cancel();
        let until = Instant::now() + deadline;
        tokio::select! {
            () = self.closed.cancelled() => {}
            ended = timeout_at(until, self.calls_ended(deadline)) => {
                if ended.is_err() {
                    tracing::warn!("calls were still in flight at the end of the drain");
                }
            }
        }
        self.abort().await;
    }

    /// Closes all connections immediately. Waits up to 3 s until the clients have been notified and
    /// all tasks have ended.
    pub async fn abort(&self) {
        self.close();
        let ended = async {
            for endpoint in &self.endpoints {
                endpoint.wait_idle().await;
            }
            self.context.streams.wait().await;
            self.context.connections.wait().await;
        };
        if timeout(CLOSE_TIMEOUT, ended).await.is_err() {
            tracing::warn!("some clients did not acknowledge the close in time");
        }
    }

    async fn calls_ended(&self, deadline: Duration) {
        let ServerContext { service, streams, .. } = &*self.context;
        service.draining(deadline).await;
        streams.close();
        streams.wait().await;
        tokio::time::sleep(LINGER).await;
        streams.wait().await;
    }

    fn close(&self) {
        self.context.draining.cancel();
        self.context.streams.close();
        self.context.connections.close();
        for endpoint in &self.endpoints {
            endpoint.close(CLOSE_CODE, CLOSE_REASON);
        }
        self.closed.cancel();
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
            .field("draining", &self.context.draining.is_cancelled())
            .field("closed", &self.closed.is_cancelled())
            .finish_non_exhaustive()
    }
}

/// Reads the authorities for the certificates of clients, if these are required.
fn client_authorities(auth: &ClientAuth) -> Result<Option<Arc<RootCertStore>>, BindError> {
    match auth {
        ClientAuth::None => Ok(None),
        ClientAuth::Required { authorities: path } => authorities::from_file(path)
            .map(|roots| Some(Arc::new(roots)))
            .map_err(|reason| BindError::Authorities { path: path.clone(), reason }),
    }
}

fn endpoint_config(edge: Option<&ClusterEdge>, id_key: ConnectionIdKey) -> EndpointConfig {
    // The reset key of the default is random.
    let mut config = EndpointConfig::default();
    if let Some(edge) = edge {
        config.reset_key(Arc::new(edge.keys.reset.clone()));
    }
    config.cid_generator(move || connection_ids::generator(&id_key));
    config.min_reset_interval(MIN_RESET_INTERVAL);
    // Load balancers and firewalls recognise QUIC by the bit that greasing would clear.
    config.grease_quic_bit(false);
    config
}

fn server_config(
    crypto: quinn::crypto::rustls::QuicServerConfig,
    config: &Config,
    edge: Option<&ClusterEdge>,
) -> quinn::ServerConfig {
    let mut server = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    if let Some(edge) = edge {
        server.token_key(Arc::clone(&edge.keys.tokens) as _);
    }
    // Tokens for later connections are bound to an IP address, and all clients behind a proxy have
    // the same one.
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

/// Decides on every connection attempt. Never waits for a client.
async fn accept<S: Service>(endpoint: Endpoint, context: Arc<ServerContext<S>>) {
    let mut warnings = LimitWarnings::default();
    while let Some(incoming) = endpoint.accept().await {
        let address =
            if incoming.remote_address_validated() { Address::Validated } else { Address::Claimed };
        match context.admission.decide(incoming.remote_address().ip(), address) {
            Decision::Accept(connection, handshake) => {
                let served =
                    connection::serve(Arc::clone(&context), incoming, connection, handshake);
                context.connections.spawn(served);
            }
            Decision::Retry => retry(incoming, &context.metrics),
            Decision::Refuse(reason) => {
                context.metrics.connections_refused(reason).increment(1);
                warnings.warn(reason, &context.admission, Instant::now());
                incoming.refuse();
            }
        }
    }
}

fn retry(incoming: Incoming, metrics: &Metrics) {
    metrics.retries_sent.increment(1);
    // Fails only for a validated address. Then the drop of the error refuses the attempt.
    if incoming.retry().is_err() {
        tracing::debug!("retry for a validated address, refusing the connection");
    }
}

/// The warnings about refused connections, at a limited rate.
#[derive(Default)]
struct LimitWarnings {
    by_reason: [LimitWarning; LimitReached::ALL.len()],
}

#[derive(Default)]
struct LimitWarning {
    last: Option<Instant>,
    /// Refusals since the last warning.
    suppressed: u64,
}

impl LimitWarnings {
    /// Logs a warning, unless one for this reason was logged within [`WARNING_INTERVAL`]. Returns
    /// whether it was logged.
    fn warn(&mut self, reason: LimitReached, admission: &Admission, now: Instant) -> bool {
        let Some((setting, value)) = reason.setting(admission.limits()) else { return false };
        let warning = &mut self.by_reason[reason as usize];
        if warning.last.is_some_and(|last| now - last < WARNING_INTERVAL) {
            warning.suppressed += 1;
            return false;
        }
        let suppressed = std::mem::take(&mut warning.suppressed);
        warning.last = Some(now);
        tracing::warn!(
            setting,
            value,
            connections = admission.connections(),
            suppressed,
            "connection refused: the server is full"
        );
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::TransportLimits;

    #[test]
    fn a_full_server_warns_once_in_ten_seconds_for_each_reason() {
        let admission = Admission::new(TransportLimits::default(), CancellationToken::new());
        let (mut warnings, start) = (LimitWarnings::default(), Instant::now());
        let mut warn =
            |reason, after| warnings.warn(reason, &admission, start + Duration::from_secs(after));
        assert!(warn(LimitReached::Connections, 0));
        assert!(!warn(LimitReached::Connections, 9));
        assert!(warn(LimitReached::Handshakes, 9), "another reason");
        assert!(warn(LimitReached::Connections, 10));
        assert!(!warn(LimitReached::Draining, 10), "a draining server is not full");
    }
}
