//! The interface of the server for its embedder, which passes connections and calls and receives
//! answers.

use std::{fmt, net::SocketAddr, sync::Arc};

use bytes::Bytes;
use qpq_ports::{Lease, StoreResult};
use qpq_proto::Status;
use qpq_wire::Refusal;
use tracing::{Instrument as _, Level, Span, field::Empty};

use crate::{
    App, ClientConnection, Cx, Error, Events, Parts,
    dispatch::{self, TABLE},
    observe::Observer,
};

/// The RPC server, which all connections share.
#[derive(Debug)]
pub struct Rpc {
    app: Arc<App>,
    observer: Observer,
}

/// The content of a response frame.
pub struct Answer {
    /// The status byte.
    pub status: u8,
    /// The method's response message, or an `ErrorDetail`.
    pub payload: Bytes,
    /// The lease of the messages in the payload. The lease is completed once the client has the
    /// whole payload, and released if it is dropped before.
    pub lease: Option<Box<dyn Lease>>,
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Answer")
            .field("status", &Status::from(self.status))
            .field("bytes", &self.payload.len())
            .finish_non_exhaustive()
    }
}

impl Rpc {
    /// Creates the server. Metrics go to the recorder that is installed at the first call, so
    /// install it before.
    pub fn new(parts: Parts) -> Arc<Self> {
        Arc::new(Self { app: Arc::new(App::new(parts)), observer: Observer::new(TABLE) })
    }

    /// Adds a connection from `addr`. After a Subscribe its events are sent to `events`.
    pub fn connected(&self, addr: SocketAddr, events: Arc<dyn Events>) -> Arc<ClientConnection> {
        Arc::new(ClientConnection::new(addr, events, self.app.answers.new_connection()))
    }

    /// Returns whether memory for answers is short. The embedder then gives slow clients less time.
    pub fn is_short_of_memory(&self) -> bool {
        self.app.answers.is_short()
    }

    /// Returns the number of bytes that are reserved for answers.
    pub fn answer_bytes(&self) -> usize {
        self.app.answers.used()
    }

    /// Removes a closed connection, its unfinished logins and its subscription.
    pub fn disconnected(&self, conn: &ClientConnection) {
        conn.close();
    }

    /// Accepts or refuses a request by its header, before any of its payload is read.
    pub fn admit(
        &self,
        _conn: &ClientConnection,
        method: u16,
        payload_len: u32,
    ) -> Result<(), Answer> {
        let row = dispatch::row(method);
        let checked = match row.and_then(|row| TABLE.get(row)) {
            Some(entry) => dispatch::check_size(&self.app, &entry.info, payload_len),
            None => Err(Error::UnknownMethod),
        };
        checked.map_err(|error| self.observer.begin(row, 0).refuse(&error))
    }

    /// Executes one call. Dropping the future cancels it.
    pub async fn call(
        self: &Arc<Self>,
        conn: &Arc<ClientConnection>,
        method: u16,
        payload: Bytes,
    ) -> Answer {
        let row = dispatch::row(method);
        let observation = self.observer.begin(row, payload.len());
        let Some(entry) = row.and_then(|row| TABLE.get(row)) else {
            return observation.refuse(&Error::UnknownMethod);
        };
        let cx = Cx { app: &self.app, conn, now: self.app.clock.now() };
        let span = call_span(entry.info.name);
        match (entry.call)(cx, payload).instrument(span.clone()).await {
            Ok(answer) => {
                span.record("code", "ok");
                observation.succeed(answer.payload.len());
                answer
            }
            Err(error) => {
                record_refusal(&span, &error);
                observation.refuse(&error)
            }
        }
    }

    /// Returns the answer to a request that the transport refuses. `method` is `None` if the
    /// header was not read.
    pub fn refuse(&self, _conn: &ClientConnection, method: Option<u16>, why: Refusal) -> Answer {
        let error = match why {
            Refusal::TooLarge => Error::TooLarge,
            Refusal::Malformed => Error::MalformedFrame,
            Refusal::Timeout => Error::SlowRequest,
            Refusal::ClientMemory => Error::UnfinishedRequests,
            Refusal::ServerMemory => Error::RequestsFull,
            Refusal::Internal => Error::internal("a call panicked, see the log"),
        };
        self.observer.begin(method.and_then(dispatch::row), 0).refuse(&error)
    }

    /// Begins the drain: Health answers `draining`, waiting calls end, subscribers receive
    /// Draining. Calls are served as before.
    pub fn drain(&self) {
        self.app.drain();
    }

    /// Completes once no call waits and every subscriber has received Draining. Call it after
    /// [`Rpc::drain`].
    pub async fn drained(&self) {
        self.app.drained().await;
    }

    /// Waits for the tasks that calls have spawned. Call it after the last connection is removed.
    pub async fn closed(&self) {
        self.app.tasks.close();
        self.app.tasks.wait().await;
    }

    /// Checks whether the store can commit, and records the result for Health. The embedder calls
    /// it every few seconds.
    pub async fn check_store(&self) -> StoreResult<()> {
        let outcome = self.app.stores.maintenance.check().await;
        self.app.set_store_fails(outcome.is_err());
        outcome
    }

    /// Receives the account events of other edges. Never completes: the embedder runs it while it
    /// serves.
    pub async fn receive_account_events(self: Arc<Self>) {
        self.app.account_events.receive().await;
    }

    /// Returns the state that all handlers share.
    pub fn app(&self) -> &Arc<App> {
        &self.app
    }
}

/// Returns the span of a call. The fields with a dot are for traces, see `qpq_runtime::trace`.
fn call_span(method: &'static str) -> Span {
    tracing::debug_span!(
        target: "qpq::rpc",
        "call",
        otel.name = method,
        otel.kind = "server",
        otel.status_code = Empty,
        method,
        code = Empty
    )
}

/// Records a refusal in the call's span. Only a failure of the server is an error of the span.
fn record_refusal(span: &Span, error: &Error) {
    let code = error.code();
    span.record("code", code.as_str());
    if code.level() <= Level::WARN {
        span.record("otel.status_code", "ERROR");
    }
}
