//! The state that the tasks of a server share, and the state that the tasks of a connection share.
//!
//! The module `server` spawns the tasks of `connection`, and `connection` those of `stream`. All
//! three use the types of this module, so that no module depends on one that calls it.

use std::sync::Arc;

use tokio::sync::Semaphore;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    admission::Admission,
    config::Timeouts,
    metric::Metrics,
    request_memory::{ConnectionMemory, RequestMemory},
    service::Service,
};

/// The state of a server.
pub(crate) struct ServerContext<S> {
    pub(crate) service: Arc<S>,
    pub(crate) timeouts: Timeouts,
    pub(crate) max_streams: usize,
    pub(crate) metrics: Metrics,
    pub(crate) admission: Arc<Admission>,
    pub(crate) request_memory: Arc<RequestMemory>,
    /// Cancelled when the drain starts.
    pub(crate) draining: CancellationToken,
    /// The streams that are being served. A drain waits for them.
    pub(crate) streams: TaskTracker,
    /// The accept loops, the connections and the writers of their events. All of them end when the
    /// endpoints are closed.
    pub(crate) connections: TaskTracker,
}

/// The state of a connection.
pub(crate) struct ConnectionContext<S: Service> {
    pub(crate) server: Arc<ServerContext<S>>,
    pub(crate) quic: quinn::Connection,
    pub(crate) state: Arc<S::Connection>,
    pub(crate) request_memory: ConnectionMemory,
    /// Bounds the stream tasks. QUIC bounds only the open streams, and a task may outlive its
    /// stream: a cancelled call that is slow to drop, an observer that is being notified.
    pub(crate) stream_permits: Semaphore,
}

/// A stream that is being served. Its drop frees the permit, in whichever way its task ends.
pub(crate) struct OpenStream<S: Service> {
    pub(crate) connection: Arc<ConnectionContext<S>>,
}

impl<S: Service> OpenStream<S> {
    /// Counts a stream, for which the caller has taken a permit.
    pub(crate) fn new(connection: Arc<ConnectionContext<S>>) -> Self {
        connection.server.metrics.streams_open.increment(1.0);
        Self { connection }
    }
}

impl<S: Service> Drop for OpenStream<S> {
    fn drop(&mut self) {
        self.connection.stream_permits.add_permits(1);
        self.connection.server.metrics.streams_open.decrement(1.0);
    }
}
