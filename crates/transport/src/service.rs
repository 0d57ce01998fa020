//! The contract between the transport and what it serves.
//!
//! `services/edge` implements [`Service`] over the RPC dispatch; the tests here over a few lines.
//! Nothing in it names quinn, so that neither do the crates above.

use std::{fmt, future::Future, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use qpq_wire::{Request, RequestHeader};

use crate::EventSink;

/// What the transport serves: one value per process, shared by all connections.
///
/// No method but [`call`](Self::call) and [`draining`](Self::draining) may block or take long: they
/// run on the connection's own tasks.
pub trait Service: Send + Sync + 'static {
    /// What is remembered of a connection as long as it lives: its session, its pending logins.
    type Connection: Send + Sync + 'static;

    /// A connection was made. `events` sends to it, from whichever task, until it ends.
    fn connected(&self, peer: Peer, events: EventSink) -> Arc<Self::Connection>;

    /// A connection ended. Calls of it that were running are being dropped.
    fn disconnected(&self, _conn: &Self::Connection) {}

    /// Judges a request by its header, before a byte of its payload is buffered.
    ///
    /// # Errors
    /// The answer, if the request is not worth reading: an unknown method.
    fn admit(&self, conn: &Self::Connection, header: &RequestHeader) -> Result<(), Reply>;

    /// One call. The future is dropped, and so the call cancelled, when the client stops or resets
    /// the stream or the connection ends.
    fn call(
        self: Arc<Self>,
        conn: Arc<Self::Connection>,
        request: Request,
    ) -> impl Future<Output = Reply> + Send;

    /// The answer to a request that the transport itself refuses; `header` as far as it was read.
    fn refuse(
        &self,
        conn: &Self::Connection,
        header: Option<&RequestHeader>,
        why: Refusal,
    ) -> Reply;

    /// Whether replies in progress use so much memory that slow clients get less time for theirs.
    /// Asked about once a second for each reply that waits for its client.
    fn is_short_of_memory(&self) -> bool {
        false
    }

    /// The server stops: new connections are already refused, and all others are closed `deadline`
    /// from now. The transport waits for this future, for so long at most, before it looks whether
    /// calls are still in flight; so a service ends its long waits here and tells its clients.
    fn draining(&self, _deadline: Duration) -> impl Future<Output = ()> + Send {
        std::future::ready(())
    }
}

/// Who is at the other end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Where it sends from. A client may move to another address later.
    pub addr: SocketAddr,
    /// The protocol that it asked for.
    pub alpn: Alpn,
}

/// The protocols served, by their names in the TLS handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Alpn {
    /// `qpq`.
    Qpq,
    /// `qpc`, the later name of the same protocol.
    Qpc,
}

impl Alpn {
    /// All of them, the preferred one first.
    pub const ALL: [Self; 2] = [Self::Qpq, Self::Qpc];

    /// The name in the handshake.
    #[must_use]
    pub fn name(self) -> &'static [u8] {
        match self {
            Self::Qpq => b"qpq",
            Self::Qpc => b"qpc",
        }
    }

    pub(crate) fn by_name(name: &[u8]) -> Option<Self> {
        Self::ALL.into_iter().find(|alpn| alpn.name() == name)
    }
}

/// Why the transport refuses a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// The announced payload is above [`qpq_wire::MAX_PAYLOAD`]; nothing of it was read.
    TooLarge,
    /// The stream ended inside the frame, or went on after it.
    Malformed,
    /// The request was not whole in time.
    Timeout,
    /// The call panicked, or its reply does not fit a frame.
    Internal,
}

impl Refusal {
    pub(crate) const ALL: [Self; 4] =
        [Self::TooLarge, Self::Malformed, Self::Timeout, Self::Internal];

    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::TooLarge => "too_large",
            Self::Malformed => "malformed",
            Self::Timeout => "timeout",
            Self::Internal => "internal",
        }
    }
}

/// The answer to a request.
pub struct Reply {
    /// The status byte.
    pub status: u8,
    /// The serialized message, [`qpq_wire::MAX_PAYLOAD`] bytes at most.
    pub payload: Bytes,
    /// Told what became of the reply, where that matters. A reply that was never sent drops it
    /// untold: what it holds is then released in its `Drop`.
    pub on_delivery: Option<Box<dyn Delivery>>,
}

impl Reply {
    /// A reply whose fate does not matter.
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

/// Told exactly once what became of a reply's bytes.
///
/// The futures run to their end even if the connection is gone; a drain waits for them.
pub trait Delivery: Send {
    /// The client's QUIC stack has acknowledged every byte.
    fn delivered(self: Box<Self>) -> BoxFuture<'static, ()>;

    /// The client stopped the stream, the connection ended, or nothing was heard from the client
    /// for [`Timeouts::silent_peer`](crate::Timeouts::silent_peer) while bytes were unacknowledged.
    /// It may still have them.
    fn lost(self: Box<Self>) -> BoxFuture<'static, ()>;
}
