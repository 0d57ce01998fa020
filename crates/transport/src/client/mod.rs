//! The client's end: a [`Dialer`] makes connections, a [`Connection`] makes calls and receives
//! events.
//!
//! Each connection has a UDP port of its own. A client that reconnected from the same port would be
//! sent to the same server by every load balancer that goes by addresses, also while that one
//! drains. Reconnecting and retrying are the caller's business; the errors say what it needs for
//! that.

mod connection;
mod error;
mod trust;

pub use connection::Connection;
pub use error::{CallError, ConnectError, Lost};
pub use trust::{Trust, TrustError};

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use quinn::{
    ClientConfig, Endpoint, EndpointConfig, TokioRuntime, TransportConfig, VarInt,
    crypto::rustls::QuicClientConfig,
};
use rustls::version::TLS13;
use tokio::time::timeout;

use crate::{config::idle_timeout, service::Alpn, tls};
use trust::{Certifier, Roots};

/// Often enough for the NATs and firewalls that forget a UDP flow after 30 s.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// Calls are answered on their own streams; the server opens one stream more, for events.
const UNI_STREAMS: u32 = 4;

/// Makes connections to servers that it trusts in one way.
#[derive(Debug, Clone)]
pub struct Dialer {
    roots: Roots,
    alpn: Vec<u8>,
    connect_timeout: Duration,
    idle_timeout: Duration,
}

impl Dialer {
    /// A dialer for the protocol `qpq` that waits 5 s for a handshake.
    ///
    /// # Errors
    /// [`TrustError`]: the roots cannot be read.
    pub fn new(trust: Trust) -> Result<Self, TrustError> {
        Ok(Self {
            roots: Roots::load(trust)?,
            alpn: Alpn::Qpq.name().to_vec(),
            connect_timeout: Duration::from_secs(5),
            idle_timeout: IDLE_TIMEOUT,
        })
    }

    /// Asks for another protocol.
    #[must_use]
    pub fn with_alpn(mut self, alpn: Vec<u8>) -> Self {
        self.alpn = alpn;
        self
    }

    /// Waits so long for a handshake.
    #[must_use]
    pub fn with_connect_timeout(mut self, connect_timeout: Duration) -> Self {
        self.connect_timeout = connect_timeout;
        self
    }

    /// Connects from a new UDP port. `server_name` is a DNS name or an IP address: what the
    /// certificate is checked for where [`Trust`] has it checked, and what is asked for in the
    /// handshake.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub async fn connect(
        &self,
        addr: SocketAddr,
        server_name: &str,
    ) -> Result<Connection, ConnectError> {
        let certifier = Arc::new(self.roots.certifier());
        let config = self.config(&certifier)?;
        let endpoint = endpoint(addr).map_err(ConnectError::Socket)?;
        let connecting = endpoint
            .connect_with(config, addr, server_name)
            .map_err(|error| ConnectError::from_start(error, addr, server_name))?;
        let connected = timeout(self.connect_timeout, connecting).await;
        let lost = match connected {
            Ok(Ok(quic)) => {
                let fingerprint = certifier.seen().ok_or(ConnectError::NoCertificate)?;
                return Ok(Connection::new(endpoint, quic, fingerprint));
            }
            Ok(Err(lost)) => lost,
            Err(_) => return Err(ConnectError::TimedOut),
        };
        Err(ConnectError::from_handshake(lost, certifier.rejected()))
    }

    fn config(&self, certifier: &Arc<Certifier>) -> Result<ClientConfig, ConnectError> {
        let mut tls = rustls::ClientConfig::builder_with_provider(tls::provider())
            .with_protocol_versions(&[&TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::clone(certifier) as _)
            .with_no_client_auth();
        tls.alpn_protocols = vec![self.alpn.clone()];
        // Resumption saves bytes and no time, and the next connection may go to another server.
        tls.resumption = rustls::client::Resumption::disabled();
        let crypto = QuicClientConfig::try_from(tls).map_err(|_| {
            rustls::Error::General("the provider lacks TLS13_AES_128_GCM_SHA256".into())
        })?;
        let mut transport = TransportConfig::default();
        transport
            .keep_alive_interval(Some(KEEP_ALIVE))
            .max_idle_timeout(Some(idle_timeout(self.idle_timeout)))
            .max_concurrent_bidi_streams(VarInt::from_u32(0))
            .max_concurrent_uni_streams(VarInt::from_u32(UNI_STREAMS))
            .datagram_receive_buffer_size(None);
        let mut config = ClientConfig::new(Arc::new(crypto));
        config.transport_config(Arc::new(transport));
        Ok(config)
    }
}

fn endpoint(to: SocketAddr) -> std::io::Result<Endpoint> {
    let any = match to {
        SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let socket = std::net::UdpSocket::bind((any, 0))?;
    Endpoint::new(EndpointConfig::default(), None, socket, Arc::new(TokioRuntime))
}
