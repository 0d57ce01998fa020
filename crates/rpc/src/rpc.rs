//! The server as its embedder sees it: connections come and go, calls go in, answers come out.

use std::{fmt, net::SocketAddr, sync::Arc};

use bytes::Bytes;
use qpq_ports::{Clock, Lease, StoreResult};
use qpq_proto::{Method as _, Status, methods::Enqueue};
use qpq_wire::Refusal;
use tracing::{Instrument as _, Level, Span, field::Empty};

use crate::{
    App, Connection, Cx, Error, Events, Parts,
    dispatch::{self, TABLE},
    observe::Observer,
};

/// The fields of an Enqueue request except its payload, in bytes at most, with room for unknown
/// fields.
const ENQUEUE_OVERHEAD: usize = 1 << 10;

/// One server. Shared by all connections.
#[derive(Debug)]
pub struct Rpc {
    app: Arc<App>,
    observer: Observer,
}

/// What goes back to the client.
pub struct Answer {
    /// The response frame's status byte.
    pub status: u8,
    /// The method's response, or an `ErrorDetail`.
    pub payload: Bytes,
    /// To be completed once the client has every byte of this; dropped, the messages that it shows
    /// are there again.
    pub completion: Option<Settlement>,
}

/// What is to be done about the messages that an answer shows. Dropping it gives them back.
pub struct Settlement {
    lease: Box<dyn Lease>,
    clock: Arc<dyn Clock>,
}

impl Settlement {
    /// Of what `lease` shows, at `clock`'s time.
    pub fn new(lease: Box<dyn Lease>, clock: Arc<dyn Clock>) -> Self {
        Self { lease, clock }
    }

    /// Removes the messages: the client has every byte of the answer.
    pub async fn complete(self) -> StoreResult<()> {
        let now = self.clock.now();
        self.lease.complete(now).await
    }
}

impl fmt::Debug for Settlement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settlement").finish_non_exhaustive()
    }
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
    /// The server. Metrics go to the recorder that is installed when a method first answers, so
    /// install it before.
    pub fn new(parts: Parts) -> Arc<Self> {
        Arc::new(Self { app: Arc::new(App::new(parts)), observer: Observer::new(TABLE) })
    }

    /// A new connection from `addr`; its events, if it subscribes, go to `events`.
    pub fn connected(&self, addr: SocketAddr, events: Arc<dyn Events>) -> Arc<Connection> {
        Arc::new(Connection::new(addr, events, self.app.answers.of_connection()))
    }

    /// Whether answers use so much memory that slow clients get less time for theirs.
    pub fn is_short_of_memory(&self) -> bool {
        self.app.answers.are_short()
    }

    /// Bytes of memory that are reserved for answers.
    pub fn answer_bytes(&self) -> usize {
        self.app.answers.used()
    }

    /// The connection has ended, and its logins and subscription with it.
    pub fn disconnected(&self, conn: &Connection) {
        conn.close();
    }

    /// Accepts or refuses a request by its header, before any of its payload is read.
    pub fn admit(&self, _conn: &Connection, method: u16, payload_len: u32) -> Result<(), Answer> {
        let row = dispatch::row(method);
        let Err(error) = self.check_size(row, payload_len) else { return Ok(()) };
        Err(self.observer.begin(row, 0).refuse(&error))
    }

    /// Compares the announced payload with the row's largest request, and with what the
    /// configuration leaves of it.
    fn check_size(&self, row: Option<usize>, payload_len: u32) -> Result<(), Error> {
        let method = &row.and_then(|row| TABLE.get(row)).ok_or(Error::UnknownMethod)?.info;
        if payload_len > method.largest_request.bytes() {
            return Err(Error::TooLarge);
        }
        let configured = self.app.config.delivery.max_payload.saturating_add(ENQUEUE_OVERHEAD);
        if method.id == Enqueue::INFO.id && payload_len as usize > configured {
            return Err(Error::PayloadTooLarge);
        }
        Ok(())
    }

    /// One call. Dropping the future cancels it.
    pub async fn call(
        self: &Arc<Self>,
        conn: &Arc<Connection>,
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
            Ok(done) => {
                span.record("code", "ok");
                observation.succeed(done.payload.len());
                let completion =
                    done.lease.map(|lease| Settlement::new(lease, Arc::clone(&self.app.clock)));
                Answer { status: Status::Ok.code(), payload: done.payload, completion }
            }
            Err(error) => {
                note_refusal(&span, &error);
                observation.refuse(&error)
            }
        }
    }

    /// The answer to what the transport refuses; `method` is known once the header was read.
    pub fn refuse(&self, _conn: &Connection, method: Option<u16>, why: Refusal) -> Answer {
        let error = match why {
            Refusal::TooLarge => Error::TooLarge,
            Refusal::Malformed => Error::MalformedFrame,
            Refusal::Timeout => Error::SlowRequest,
            Refusal::Internal => Error::internal("a call panicked; the panic itself is in the log"),
        };
        self.observer.begin(method.and_then(dispatch::row), 0).refuse(&error)
    }

    /// The server is about to stop: Health says so, waiting calls answer, subscribers are told.
    /// Calls go on being served.
    pub fn drain(&self) {
        self.app.drain();
    }

    /// Completes once no call waits and every subscriber has been told that the server stops. After
    /// [`Rpc::drain`].
    pub async fn drained(&self) {
        self.app.nobody_watches_drain().await;
    }

    /// Looks whether the store can commit, and remembers it for Health. For the embedder to call
    /// every few seconds.
    pub async fn check_store(&self) -> StoreResult<()> {
        let outcome = self.app.stores.maintenance.check().await;
        self.app.note_store(outcome.is_err());
        outcome
    }

    /// Passes on to waiting calls what other edges tell. For the embedder to run for as long as it
    /// serves.
    pub async fn hear_other_edges(self: Arc<Self>) {
        self.app.account_events.pass_on().await;
    }

    /// What the handlers share.
    pub fn app(&self) -> &Arc<App> {
        &self.app
    }
}

/// Around all that a call does. The fields with a dot are for traces, see `qpq_runtime::trace`.
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

/// A refusal is what the client did wrong; only what the server did wrong is an error of the call.
fn note_refusal(span: &Span, error: &Error) {
    let code = error.code();
    span.record("code", code.as_str());
    if code.level() <= Level::WARN {
        span.record("otel.status_code", "ERROR");
    }
}
