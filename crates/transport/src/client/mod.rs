//! The client's end: a [`Dialer`] creates connections, and a [`Connection`] makes calls and
//! receives events.
//!
//! Each connection has its own UDP port. A load balancer that routes by address would send a client
//! that reconnects from the same port to the same server, even while that server drains. Reconnects
//! and retries are the caller's task, and the errors contain the reasons.

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
use rustls::{client::Resumption, sign::SingleCertAndKey, version::TLS13};
use tokio::time::timeout;

use crate::{config::idle_timeout, identity::Identity, service::Alpn, tls};
use trust::{ServerVerifier, TrustAnchors};

/// The interval of keep-alive packets. NATs and firewalls may forget a UDP flow after 30 s.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// The maximum number of streams that the server may open. The server opens one, for events;
/// responses use the streams of calls.
const UNI_STREAMS: u32 = 4;

/// Creates connections to servers.
#[derive(Debug, Clone)]
pub struct Dialer {
    anchors: TrustAnchors,
    alpn: Vec<u8>,
    /// The certificate for servers that ask for one.
    identity: Option<Arc<Identity>>,
    connect_timeout: Duration,
    idle_timeout: Duration,
}

impl Dialer {
    /// Creates a dialer for the protocol `qpq` that waits 5 s for a handshake.
    ///
    /// # Errors
    /// [`TrustError`]: the certificate authorities cannot be read.
    pub fn new(trust: Trust) -> Result<Self, TrustError> {
        Ok(Self {
            anchors: TrustAnchors::load(trust)?,
            alpn: Alpn::Qpq.name().to_vec(),
            identity: None,
            connect_timeout: Duration::from_secs(5),
            idle_timeout: IDLE_TIMEOUT,
        })
    }

    /// Sets the protocol.
    #[must_use]
    pub fn with_alpn(mut self, alpn: Vec<u8>) -> Self {
        self.alpn = alpn;
        self
    }

    /// Sets the certificate for servers that ask for one.
    #[must_use]
    pub fn with_identity(mut self, identity: Arc<Identity>) -> Self {
        self.identity = Some(identity);
        self
    }

    /// Sets the time limit of the handshake.
    #[must_use]
    pub fn with_connect_timeout(mut self, connect_timeout: Duration) -> Self {
        self.connect_timeout = connect_timeout;
        self
    }

    /// Connects from a new UDP port.
    ///
    /// `server_name` is a DNS name or an IP address. The name is sent in the handshake, and the
    /// certificate is verified for the name if [`Trust`] uses certificate authorities.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub async fn connect(
        &self,
        addr: SocketAddr,
        server_name: &str,
    ) -> Result<Connection, ConnectError> {
        let verifier = Arc::new(self.anchors.verifier());
        let config = self.config(&verifier)?;
        let endpoint = endpoint(addr).map_err(ConnectError::Socket)?;
        let connecting = endpoint
            .connect_with(config, addr, server_name)
            .map_err(|error| ConnectError::from_start(error, addr, server_name))?;
        let connected = timeout(self.connect_timeout, connecting).await;
        let lost = match connected {
            Ok(Ok(quic)) => {
                let fingerprint = verifier.seen().ok_or(ConnectError::NoCertificate)?;
                return Ok(Connection::new(endpoint, quic, fingerprint));
            }
            Ok(Err(lost)) => lost,
            Err(_) => return Err(ConnectError::TimedOut),
        };
        Err(ConnectError::from_handshake(lost, verifier.rejection()))
    }

    fn config(&self, verifier: &Arc<ServerVerifier>) -> Result<ClientConfig, ConnectError> {
        let builder = rustls::ClientConfig::builder_with_provider(tls::provider())
            .with_protocol_versions(&[&TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::clone(verifier) as _);
        let mut tls = match &self.identity {
            None => builder.with_no_client_auth(),
            Some(identity) => {
                let certified = SingleCertAndKey::from(Arc::clone(identity.certified()));
                builder.with_client_cert_resolver(Arc::new(certified))
            }
        };
        tls.alpn_protocols = vec![self.alpn.clone()];
        // Resumption saves bytes but no time, and the next connection may reach another server.
        tls.resumption = Resumption::disabled();
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
