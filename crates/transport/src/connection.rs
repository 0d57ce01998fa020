//! One connection's life: handshake, then a task for each stream, then the news that it is gone.

use std::{pin::pin, sync::Arc};

use quinn::{Incoming, crypto::rustls::HandshakeData};
use tokio::{
    sync::Semaphore,
    time::{error::Elapsed, timeout},
};

use crate::{
    Alpn, EventSink, Peer, Service, Timeouts,
    gate::{Handshaking, Place},
    server::Shared,
    stream,
};

/// What the accept loop counted for a connection.
pub(crate) struct Admission {
    pub(crate) place: Place,
    pub(crate) handshaking: Handshaking,
}

/// What the stream tasks of a connection share.
pub(crate) struct Connection<S: Service> {
    pub(crate) server: Arc<Shared<S>>,
    pub(crate) quic: quinn::Connection,
    pub(crate) state: Arc<S::Connection>,
    /// Bounds the stream tasks. QUIC's own bound is on open streams, and a stream's task may
    /// outlive it: a cancelled call that is slow to drop, a delivery being noted.
    streams: Semaphore,
}

/// Serves a connection to its end. What only the handshake needs is a box that goes with it: the
/// task lives as long as its client, which may be silent for days.
pub(crate) fn serve<S: Service>(
    server: Arc<Shared<S>>,
    incoming: Incoming,
    admission: Admission,
) -> impl Future<Output = ()> + Send {
    let shaking = Box::pin(shake_hands(Arc::clone(&server), incoming));
    async move {
        let Admission { place, handshaking } = admission;
        let Some((quic, alpn)) = shaking.await else { return };
        drop(handshaking);
        serve_open(server, quic, alpn).await;
        drop(place);
    }
}

async fn serve_open<S: Service>(server: Arc<Shared<S>>, quic: quinn::Connection, alpn: Alpn) {
    server.metrics.connections_accepted.increment(1);
    let peer = Peer { addr: quic.remote_address(), alpn };
    let events = EventSink::new(quic.clone());
    let open = Open {
        connection: Arc::new(Connection {
            state: server.service.connected(peer, events.clone()),
            streams: Semaphore::new(server.max_streams),
            quic,
            server,
        }),
        events,
    };
    open.connection.server.metrics.connections_open.increment(1.0);
    accept_streams(&open.connection).await;
}

async fn shake_hands<S: Service>(
    server: Arc<Shared<S>>,
    incoming: Incoming,
) -> Option<(quinn::Connection, Alpn)> {
    let metrics = &server.metrics;
    metrics.handshakes.increment(1.0);
    let connected = match incoming.accept() {
        Ok(connecting) => in_time(&server, connecting).await,
        Err(error) => Ok(Err(error)),
    };
    metrics.handshakes.decrement(1.0);
    let connection = match connected {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => {
            metrics.handshakes_failed.increment(1);
            tracing::debug!(%error, "handshake failed");
            return None;
        }
        Err(_) => {
            metrics.handshakes_timed_out.increment(1);
            return None;
        }
    };
    let data = connection.handshake_data()?.downcast::<HandshakeData>().ok()?;
    // TLS has agreed on one of ours, or failed.
    let alpn = Alpn::by_name(data.protocol.as_deref()?)?;
    Some((connection, alpn))
}

/// Waits for the handshake, for a shorter time while many are in progress.
async fn in_time<S: Service, F: Future>(
    server: &Shared<S>,
    handshake: F,
) -> Result<F::Output, Elapsed> {
    let Timeouts { handshake: longest, handshake_under_pressure: shortest, .. } = server.timeouts;
    let mut handshake = pin!(handshake);
    match timeout(shortest.min(longest), handshake.as_mut()).await {
        Err(_) if !server.gate.is_under_pressure() => {
            timeout(longest.saturating_sub(shortest), handshake).await
        }
        ended => ended,
    }
}

async fn accept_streams<S: Service>(connection: &Arc<Connection<S>>) {
    loop {
        // At the bound nothing is accepted, so that the client waits.
        let Ok(permit) = connection.streams.acquire().await else { return };
        let Ok((send, recv)) = connection.quic.accept_bi().await else { return };
        permit.forget();
        tokio::spawn(stream::serve(OpenStream::new(Arc::clone(connection)), send, recv));
    }
}

/// An open connection; its drop tells those concerned, however the task ends.
struct Open<S: Service> {
    connection: Arc<Connection<S>>,
    events: EventSink,
}

impl<S: Service> Drop for Open<S> {
    fn drop(&mut self) {
        let Connection { server, state, quic, .. } = &*self.connection;
        // Of use only if this task panicked: then nobody would accept streams any more.
        quic.close(quinn::VarInt::from_u32(0), b"");
        self.events.close();
        server.metrics.connections_open.decrement(1.0);
        server.service.disconnected(state);
    }
}

/// A stream being served; its drop counts it out, however the task ends.
pub(crate) struct OpenStream<S: Service> {
    pub(crate) connection: Arc<Connection<S>>,
}

impl<S: Service> OpenStream<S> {
    fn new(connection: Arc<Connection<S>>) -> Self {
        connection.server.in_flight.enter();
        connection.server.metrics.streams_open.increment(1.0);
        Self { connection }
    }
}

impl<S: Service> Drop for OpenStream<S> {
    fn drop(&mut self) {
        let server = &self.connection.server;
        self.connection.streams.add_permits(1);
        server.metrics.streams_open.decrement(1.0);
        server.in_flight.leave();
    }
}
