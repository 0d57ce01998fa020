//! The contract between the transport and the service that it serves.
//!
//! `services/edge` implements [`Service`] with the RPC dispatch, the tests of this crate with a few
//! lines. The contract names no type of quinn, so the crates above the transport need none.

use std::{fmt, future::Future, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use qpq_wire::{Refusal, Request, RequestHeader};

use crate::{client_certificate::ClientCertificate, events::EventSink};

/// The service behind a [`Server`](crate::Server): one value for all connections.
///
/// Only [`call`](Self::call) and [`draining`](Self::draining) may wait. The other methods run on
/// the tasks of the connections and would delay them.
pub trait Service: Send + Sync + 'static {
    /// The state of a connection while it is open: its session, its pending logins.
    type Connection: Send + Sync + 'static;

    /// Creates the state of a new connection. Any task may send with `events` until the connection
    /// ends.
    fn connected(&self, peer: Peer, events: EventSink) -> Arc<Self::Connection>;

    /// Notes the end of a connection. Its running calls are being dropped.
    fn disconnected(&self, _conn: &Self::Connection) {}

    /// Checks the header of a request, before a byte of its payload is buffered.
    ///
    /// # Errors
    /// The reply, if the payload need not be read, as for an unknown method.
    fn admit(&self, conn: &Self::Connection, header: &RequestHeader) -> Result<(), Reply>;

    /// Runs a call. The future is dropped, which cancels the call, when the client stops or resets
    /// the stream or the connection ends.
    fn call(
        self: Arc<Self>,
        conn: Arc<Self::Connection>,
        request: Request,
    ) -> impl Future<Output = Reply> + Send;

    /// Returns the reply to a request that the transport refuses. `header` is `None` if it was not
    /// read.
    fn refuse(
        &self,
        conn: &Self::Connection,
        header: Option<&RequestHeader>,
        why: Refusal,
    ) -> Reply;

    /// Returns whether replies in progress use so much memory that slow clients have less time for
    /// theirs. Called about once a second for each reply that waits for its client.
    fn is_short_of_memory(&self) -> bool {
        false
    }

    /// Ends long waits and notifies clients, because the server drains.
    ///
    /// New connections are already refused, and all others are closed after `deadline`. The
    /// transport waits for this future, at most until then, before it waits for the calls in
    /// flight.
    fn draining(&self, _deadline: Duration) -> impl Future<Output = ()> + Send {
        std::future::ready(())
    }
}

/// The client of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// The address that the connection came from. A client may move to another one later.
    pub addr: SocketAddr,
    /// The protocol that the client and the server agreed on.
    pub alpn: Alpn,
    /// The verified certificate of the client, if the listener asks for one
    /// ([`Config::client_auth`](crate::Config::client_auth)).
    pub certificate: Option<ClientCertificate>,
}

/// A protocol, by its name in the TLS handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Alpn {
    /// `qpq`.
    Qpq,
    /// `qpc`, the later name of the same protocol.
    Qpc,
    /// `quicproquo/federation/1`, between servers.
    Federation,
}

impl Alpn {
    /// The protocols of clients, the preferred one first.
    pub const CLIENTS: [Self; 2] = [Self::Qpq, Self::Qpc];

    const ALL: [Self; 3] = [Self::Qpq, Self::Qpc, Self::Federation];

    /// Returns the name in the handshake.
    #[must_use]
    pub fn name(self) -> &'static [u8] {
        match self {
            Self::Qpq => b"qpq",
            Self::Qpc => b"qpc",
            Self::Federation => b"quicproquo/federation/1",
        }
    }

    pub(crate) fn by_name(name: &[u8]) -> Option<Self> {
        Self::ALL.into_iter().find(|alpn| alpn.name() == name)
    }
}

/// The response to a request.
pub struct Reply {
    /// The status byte.
    pub status: u8,
    /// The serialized message, at most [`qpq_wire::MAX_PAYLOAD`] bytes.
    pub payload: Bytes,
    /// Notified when the reply is delivered or lost. If the reply is never sent, the observer is
    /// dropped without a notification, and its `Drop` releases what it owns.
    pub on_delivery: Option<Box<dyn DeliveryObserver>>,
}

impl Reply {
    /// Creates a reply without an observer.
    #[must_use]
    pub fn new(status: u8, payload: Bytes) -> Self {
        Self { status, payload, on_delivery: None }
    }
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reply")
            .field("status", &self.status)
            .field("payload_len", &self.payload.len())
            .field("on_delivery", &self.on_delivery.is_some())
            .finish()
    }
}

/// An observer of one reply. Exactly one of its methods is called, once.
///
/// The futures run to their end even if the connection has ended, and a drain waits for them.
pub trait DeliveryObserver: Send {
    /// Called when the client's QUIC stack has acknowledged every byte.
    fn delivered(self: Box<Self>) -> BoxFuture<'static, ()>;

    /// Called when the client stopped the stream, the connection ended, or no datagram came from
    /// the client for [`Timeouts::silent_peer`](crate::Timeouts::silent_peer) while bytes were
    /// unacknowledged. The client may still have received the reply.
    fn lost(self: Box<Self>) -> BoxFuture<'static, ()>;
}
