//! One connection: its handshake, a task for each of its streams, and the notification of its end.

use std::{pin::pin, sync::Arc};

use quinn::{Incoming, VarInt, crypto::rustls::HandshakeData};
use tokio::{
    sync::Semaphore,
    time::{error::Elapsed, timeout},
};

use crate::{
    admission::{ConnectionPermit, HandshakePermit},
    client_certificate::ClientCertificate,
    config::Timeouts,
    context::{ConnectionContext, OpenStream, ServerContext},
    events::EventSink,
    service::{Alpn, Peer, Service},
    stream,
};

/// Serves a connection to its end.
///
/// The state of the handshake is in a box, which is freed after the handshake. The task lives as
/// long as its connection, which may be idle for days.
pub(crate) fn serve<S: Service>(
    server: Arc<ServerContext<S>>,
    incoming: Incoming,
    connection_permit: ConnectionPermit,
    handshake_permit: HandshakePermit,
) -> impl Future<Output = ()> + Send {
    let handshake = Box::pin(handshake(Arc::clone(&server), incoming));
    async move {
        let Some((quic, alpn)) = handshake.await else { return };
        drop(handshake_permit);
        serve_open(server, quic, alpn).await;
        drop(connection_permit);
    }
}

async fn handshake<S: Service>(
    server: Arc<ServerContext<S>>,
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
    // TLS has agreed on one of these protocols, or failed.
    let alpn = Alpn::by_name(data.protocol.as_deref()?)?;
    Some((connection, alpn))
}

/// Waits for the handshake, for a shorter time while many are in progress.
async fn in_time<S: Service, F: Future>(
    server: &ServerContext<S>,
    handshake: F,
) -> Result<F::Output, Elapsed> {
    let Timeouts { handshake: longest, handshake_under_pressure: shortest, .. } = server.timeouts;
    let mut handshake = pin!(handshake);
    match timeout(shortest.min(longest), handshake.as_mut()).await {
        Err(_) if !server.admission.is_under_pressure() => {
            timeout(longest.saturating_sub(shortest), handshake).await
        }
        ended => ended,
    }
}

async fn serve_open<S: Service>(
    server: Arc<ServerContext<S>>,
    quic: quinn::Connection,
    alpn: Alpn,
) {
    server.metrics.connections_accepted.increment(1);
    let certificate = ClientCertificate::of(&quic);
    let peer = Peer { addr: quic.remote_address(), alpn, certificate };
    let events = EventSink::new(quic.clone(), server.connections.clone());
    let open = OpenConnection {
        context: Arc::new(ConnectionContext {
            request_memory: server.request_memory.connection(peer.addr.ip()),
            state: server.service.connected(peer, events.clone()),
            stream_permits: Semaphore::new(server.max_streams),
            quic,
            server,
        }),
        events,
    };
    open.context.server.metrics.connections_open.increment(1.0);
    accept_streams(&open.context).await;
}

async fn accept_streams<S: Service>(connection: &Arc<ConnectionContext<S>>) {
    loop {
        // At the limit no stream is accepted, so that the client waits.
        let Ok(permit) = connection.stream_permits.acquire().await else { return };
        let Ok((send, recv)) = connection.quic.accept_bi().await else { return };
        permit.forget();
        let stream = OpenStream::new(Arc::clone(connection));
        connection.server.streams.spawn(stream::serve(stream, send, recv));
    }
}

/// An open connection. Its drop notifies the service, in whichever way the task ends.
struct OpenConnection<S: Service> {
    context: Arc<ConnectionContext<S>>,
    events: EventSink,
}

impl<S: Service> Drop for OpenConnection<S> {
    fn drop(&mut self) {
        let ConnectionContext { server, state, quic, .. } = &*self.context;
        // Needed only if this task panicked: no other task would accept streams.
        quic.close(VarInt::from_u32(0), b"");
        self.events.close();
        server.metrics.connections_open.decrement(1.0);
        server.service.disconnected(state);
    }
}
