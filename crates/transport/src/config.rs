//! What a server may be asked to bear: limits and timeouts, with the reasons for their defaults.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use quinn::{IdleTimeout, TransportConfig, VarInt};

/// How long a drain lets calls in flight go on by default.
pub const DRAIN_DEADLINE: Duration = Duration::from_secs(30);

/// Flow control of one connection: a stream may have this much unread, ...
const STREAM_RECEIVE_WINDOW: u32 = 128 * 1024;
/// ... all streams together this much, ...
const RECEIVE_WINDOW: u32 = 1024 * 1024;
/// ... and this much may be sent and unacknowledged.
const SEND_WINDOW: u64 = 1024 * 1024;
/// Handshake bytes held out of order.
const CRYPTO_BUFFER: usize = 16 * 1024;

/// How a [`Server`](crate::Server) is set up.
#[derive(Debug, Clone)]
pub struct Config {
    /// The addresses to listen on. Port 0 takes a free one; `[::]` takes IPv4 too.
    pub listen: Vec<SocketAddr>,
    /// How much is borne.
    pub limits: Limits,
    /// For how long.
    pub timeouts: Timeouts,
}

impl Config {
    /// The defaults, listening on `listen`.
    #[must_use]
    pub fn new(listen: SocketAddr) -> Self {
        Self { listen: vec![listen], limits: Limits::default(), timeouts: Timeouts::default() }
    }
}

/// How much a server bears. What is above is refused, never queued and never ignored.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Connections, those in their handshake included. An idle one costs about 45 KiB. Default 16
    /// 384.
    pub max_connections: usize,
    /// Connections from one IP address. Above the number of clients that may be behind one address:
    /// a NAT, or a load balancer that hides its clients. Default 1 024.
    pub max_connections_per_ip: usize,
    /// Handshakes at a time. Default 2 048, one second's worth on one core.
    pub max_handshakes: usize,
    /// Handshakes at a time from one IP address that has proven to be the client's. A share of
    /// `max_handshakes`, so that half-open handshakes of a few addresses leave room for the others.
    /// Default 256.
    pub max_handshakes_per_ip: usize,
    /// From so many handshakes at a time on, clients must prove their address (Retry, one round
    /// trip more), until there are half as many. 0: always. Default 256.
    pub retry_above: usize,
    /// Calls in flight on one connection; a client that opens more waits. Default 64: each allowed
    /// stream costs 83 bytes on every connection, used or not.
    pub max_streams: u32,
    /// The rate, in bytes a second over the whole reply, below which a client is too slow. A reply
    /// has `stalled_reply` and its length divided by this rate. Default 8 KiB, half of what GPRS
    /// gives.
    pub min_reply_rate: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_connections: 16_384,
            max_connections_per_ip: 1_024,
            max_handshakes: 2_048,
            max_handshakes_per_ip: 256,
            retry_above: 256,
            max_streams: 64,
            min_reply_rate: 8 * 1024,
        }
    }
}

/// How long a server waits for a client.
#[derive(Debug, Clone)]
pub struct Timeouts {
    /// For the end of the handshake. Default 5 s.
    pub handshake: Duration,
    /// The same while at least `retry_above` handshakes are in progress. Default 2 s.
    pub handshake_under_pressure: Duration,
    /// For any datagram, before the connection is dropped without a word. Default 60 s.
    pub idle: Duration,
    /// For the whole request, from its first byte. Default 10 s.
    pub request: Duration,
    /// For any datagram while a reply with a [`Delivery`](crate::Delivery) is unacknowledged; then
    /// the reply is lost. Default 10 s.
    pub silent_peer: Duration,
    /// For the client to accept any more of a reply, and what it has for a whole reply in addition
    /// to the time that `min_reply_rate` gives. Then the reply is reset, so that nobody pins memory
    /// by not reading. Default 30 s; a third of it while the service is short of memory.
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

/// quinn's settings for the connections of a server.
pub(crate) fn transport(limits: &Limits, timeouts: &Timeouts) -> Arc<TransportConfig> {
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

/// As quinn wants it; longer than it can say is as long as it can say.
pub(crate) fn idle_timeout(idle: Duration) -> IdleTimeout {
    IdleTimeout::try_from(idle).unwrap_or(IdleTimeout::from(VarInt::MAX))
}
