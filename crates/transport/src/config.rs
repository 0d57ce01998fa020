//! The limits and timeouts of a server, with the reasons for their defaults.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use quinn::{IdleTimeout, TransportConfig, VarInt};
use tokio_util::sync::CancellationToken;

use crate::{client_certificate::ClientAuth, service::Alpn};

/// The default time limit for calls in flight during a drain.
pub const DRAIN_DEADLINE: Duration = Duration::from_secs(30);

/// Flow control: the maximum of unread bytes of one stream.
const STREAM_RECEIVE_WINDOW: u32 = 128 * 1024;
/// Flow control: the maximum of unread bytes of all streams of a connection.
const RECEIVE_WINDOW: u32 = 1024 * 1024;
/// Flow control: the maximum of sent but unacknowledged bytes of a connection.
const SEND_WINDOW: u64 = 1024 * 1024;
/// The maximum number of handshake bytes that are buffered out of order.
const CRYPTO_BUFFER: usize = 16 * 1024;

/// The configuration of a [`Server`](crate::Server).
#[derive(Debug, Clone)]
pub struct Config {
    /// The addresses to listen on. Port 0 chooses a free port; `[::]` listens on IPv4 too.
    pub listen: Vec<SocketAddr>,
    /// The protocols to accept, the preferred one first.
    pub alpn: Vec<Alpn>,
    /// Whether clients must have a certificate.
    pub client_auth: ClientAuth,
    /// The limits.
    pub limits: TransportLimits,
    /// The timeouts.
    pub timeouts: Timeouts,
    /// The drain token of the process. Once it is cancelled, new connections are refused, and the
    /// server waits for the acknowledgement of every reply. [`Server::drain`](crate::Server::drain)
    /// cancels it.
    pub draining: CancellationToken,
}

impl Config {
    /// Returns the defaults for clients, listening on `listen`.
    #[must_use]
    pub fn new(listen: SocketAddr) -> Self {
        Self {
            listen: vec![listen],
            alpn: Alpn::CLIENTS.to_vec(),
            client_auth: ClientAuth::None,
            limits: TransportLimits::default(),
            timeouts: Timeouts::default(),
            draining: CancellationToken::new(),
        }
    }
}

/// The limits of a server. Work beyond a limit is refused, not ignored and, except for
/// `max_streams`, not queued.
#[derive(Debug, Clone)]
pub struct TransportLimits {
    /// The maximum number of connections, including those in their handshake. An idle one costs
    /// about 45 KiB. Default: 16 384.
    pub max_connections: usize,
    /// The maximum number of connections from one IP address. Choose more than the number of
    /// clients behind one address of a NAT or a load balancer. Default: 1 024.
    pub max_connections_per_ip: usize,
    /// The maximum number of concurrent handshakes. Default: 2 048, which is about one second of
    /// work for one core.
    pub max_handshakes: usize,
    /// The maximum number of concurrent handshakes from one IP address that its client has proved.
    /// A share of `max_handshakes`, so that half-open handshakes from a few addresses do not use up
    /// the limit of all. Default: 256.
    pub max_handshakes_per_ip: usize,
    /// The number of concurrent handshakes from which clients must prove their address (Retry, one
    /// more round trip), until the number has halved. 0: always. Default: 256.
    pub retry_above: usize,
    /// The maximum number of calls in flight on one connection. A client with that number waits
    /// before its next call. Default: 64, because each permitted stream costs 83 bytes on every
    /// connection, used or not.
    pub max_streams: u32,
    /// The maximum number of bytes of all requests that are being received or executed. Requests up
    /// to 4 KiB are not counted. Default: 256 MiB.
    pub max_request_bytes: usize,
    /// The maximum number of bytes of the requests from one IP address, a share of
    /// `max_request_bytes`. Choose more if many clients share an address, as behind a load
    /// balancer. Default: 64 MiB.
    pub max_request_bytes_per_ip: usize,
    /// The maximum number of bytes of the requests on one connection. Default: 16 MiB, four of the
    /// largest requests.
    pub max_request_bytes_per_connection: usize,
    /// The rate, in bytes per second over the whole reply, below which a client is too slow. The
    /// time for a reply is `stalled_reply` plus its length divided by this rate. Default: 8 KiB,
    /// half the rate of GPRS.
    pub min_reply_rate: u64,
}

impl Default for TransportLimits {
    fn default() -> Self {
        Self {
            max_connections: 16_384,
            max_connections_per_ip: 1_024,
            max_handshakes: 2_048,
            max_handshakes_per_ip: 256,
            retry_above: 256,
            max_streams: 64,
            max_request_bytes: 256 << 20,
            max_request_bytes_per_ip: 64 << 20,
            max_request_bytes_per_connection: 16 << 20,
            min_reply_rate: 8 * 1024,
        }
    }
}

/// The time limits for a client.
#[derive(Debug, Clone)]
pub struct Timeouts {
    /// The time limit of the handshake. Default: 5 s.
    pub handshake: Duration,
    /// The time limit of the handshake while at least `retry_above` handshakes are in progress.
    /// Default: 2 s.
    pub handshake_under_pressure: Duration,
    /// The maximum time without a datagram from the client. Then the connection is dropped without
    /// a notification. Default: 60 s.
    pub idle: Duration,
    /// The time limit of the whole request, from its first byte. Default: 10 s.
    pub request: Duration,
    /// The maximum time without a datagram from the client while a reply with a
    /// [`DeliveryObserver`](crate::DeliveryObserver) is unacknowledged. Then the reply is lost.
    /// Default: 10 s.
    pub silent_peer: Duration,
    /// The maximum time in which the client accepts no more of a reply; also part of the time limit
    /// of the whole reply, see `min_reply_rate`. Then the reply is reset, so that a client cannot
    /// occupy memory by not reading. Default: 30 s; a third of it while the service is short of
    /// memory.
    pub stalled_reply: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(5),
            handshake_under_pressure: Duration::from_secs(2),
            idle: Duration::from_secs(60),
            request: Duration::from_secs(10),
            silent_peer: Duration::from_secs(10),
            stalled_reply: Duration::from_secs(30),
        }
    }
}

/// Returns quinn's configuration for the connections of a server.
pub(crate) fn transport(limits: &TransportLimits, timeouts: &Timeouts) -> Arc<TransportConfig> {
    let mut transport = TransportConfig::default();
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(limits.max_streams))
        // Clients open no unidirectional streams.
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .max_idle_timeout(Some(idle_timeout(timeouts.idle)))
        .stream_receive_window(VarInt::from_u32(STREAM_RECEIVE_WINDOW))
        .receive_window(VarInt::from_u32(RECEIVE_WINDOW))
        .send_window(SEND_WINDOW)
        .datagram_receive_buffer_size(None)
        .crypto_buffer_size(CRYPTO_BUFFER)
        .send_fairness(false);
    Arc::new(transport)
}

/// Converts a timeout for quinn. A timeout that is too long becomes the longest possible one.
pub(crate) fn idle_timeout(idle: Duration) -> IdleTimeout {
    IdleTimeout::try_from(idle).unwrap_or(IdleTimeout::from(VarInt::MAX))
}
