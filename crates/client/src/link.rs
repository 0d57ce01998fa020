//! The single connection of a client, which is created when it is first needed, and replaced when
//! it is lost.
//!
//! A new connection uses a new UDP port (the transport chooses it), so that a load balancer can
//! route it to another server. After a loss the first attempt is immediate; each consecutive
//! failure makes the next wait longer. A connection that was lost before its first answer counts as
//! a failure.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use qpq_domain::Backoff;
use qpq_transport::{
    Fingerprint,
    client::{self as transport, Connection, Dialer},
};
use rand::{RngCore as _, rngs::OsRng};
use tokio::{
    sync::{Mutex, oneshot, watch},
    time::{Instant, sleep_until, timeout, timeout_at},
};

use crate::{
    dial::{Failed, Target, dialer},
    error::{CallError, ConnectError, NoConnection},
    options::{Options, Trust},
};

/// The state of the connection, to be shown to a person.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConnectionEvent {
    /// There is no connection, and none is needed.
    Idle,
    /// Connected to the server.
    Connected {
        /// The fingerprint of the server's key.
        fingerprint: Fingerprint,
    },
    /// There is no connection. The next call connects, or one is connecting now.
    Reconnecting {
        /// The time since which there is no connection.
        since: Instant,
        /// The result of the last attempt.
        reason: NoConnection,
    },
}

pub(crate) struct Link {
    server: String,
    target: Target,
    dialer: Dialer,
    backoff: Backoff,
    pin_first: bool,
    slot: Mutex<Slot>,
    events: watch::Sender<ConnectionEvent>,
    /// The number of connections so far. Only the loss of the last one is reported.
    made: Arc<AtomicU64>,
}

#[derive(Default)]
struct Slot {
    live: Option<Arc<Live>>,
    /// The dialer pinned to the first connection's certificate, if trust is on first use.
    pinned: Option<Dialer>,
    /// The number of consecutive connections that were lost before their first answer.
    unanswered: u32,
}

/// A connection that was alive when a call received it. The last call to end closes it.
pub(crate) struct Live {
    connection: Connection,
    answered: AtomicBool,
    events_taken: AtomicBool,
    next_request: AtomicU32,
    /// When dropped, ends the task that watches the connection, and thereby the connection.
    _watched: oneshot::Sender<()>,
}

/// Whether there is a new connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Renewed {
    Yes,
    No,
}

/// The reason why an exchange has no answer.
#[derive(Debug, Clone)]
pub(crate) enum Failure {
    TimedOut,
    Lost,
    Malformed,
}

impl Live {
    /// Sends one request and waits for its answer: status and payload.
    pub(crate) async fn exchange(
        &self,
        method_id: u16,
        payload: Bytes,
        limit: Duration,
    ) -> Result<(u8, Bytes), Failure> {
        let request_id = self.next_request.fetch_add(1, Ordering::Relaxed);
        match self.connection.call(method_id, payload, request_id, limit).await {
            Ok(answer) => {
                self.answered.store(true, Ordering::Relaxed);
                Ok(answer)
            }
            Err(transport::CallError::TimedOut) => Err(Failure::TimedOut),
            Err(transport::CallError::Lost(_) | transport::CallError::Reset(_)) => {
                Err(Failure::Lost)
            }
            Err(transport::CallError::Malformed(_) | transport::CallError::TooLarge(_)) => {
                Err(Failure::Malformed)
            }
        }
    }

    pub(crate) fn connection(&self) -> &Connection {
        &self.connection
    }

    /// Returns the number of consecutive connections without an answer, up to this one: 0 if this
    /// one had an answer. `before` counts those before it.
    fn unanswered_after(&self, before: u32) -> u32 {
        if self.answered.load(Ordering::Relaxed) { 0 } else { before + 1 }
    }
}

/// The time that a server has to acknowledge the end of a connection.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(500);

impl Link {
    pub(crate) fn new(options: &Options) -> Result<Self, ConnectError> {
        Ok(Self {
            server: options.server.clone(),
            target: Target::new(options)?,
            dialer: dialer(&options.trust)?,
            backoff: options.backoff,
            pin_first: options.trust == Trust::FirstUse,
            slot: Mutex::default(),
            events: watch::Sender::new(ConnectionEvent::Idle),
            made: Arc::default(),
        })
    }

    pub(crate) fn events(&self) -> watch::Receiver<ConnectionEvent> {
        self.events.subscribe()
    }

    /// Returns the connection. Connects if there is none. Fails at `until` at the latest.
    pub(crate) async fn live(&self, until: Instant) -> Result<Arc<Live>, CallError> {
        let asked = Instant::now();
        let mut reason = NoConnection::Other("the connection is still being made".into());
        let unreachable = |reason| CallError::Unreachable {
            server: self.server.clone(),
            waited: asked.elapsed(),
            reason,
        };
        let Ok(mut slot) = timeout_at(until, self.slot.lock()).await else {
            return Err(unreachable(reason));
        };
        if let Some(live) = slot.alive() {
            return Ok(live);
        }
        let mut failures = slot.unanswered;
        loop {
            let attempt = Instant::now() + self.backoff.delay(failures, OsRng.next_u64());
            if attempt > until {
                return Err(unreachable(reason));
            }
            sleep_until(attempt).await;
            let pinned = slot.pinned.as_ref().unwrap_or(&self.dialer);
            let Ok(dialled) = timeout_at(until, Box::pin(self.target.dial(pinned))).await else {
                return Err(unreachable("the server did not answer in time".to_owned().into()));
            };
            match dialled {
                Ok(connection) => {
                    if self.pin_first && slot.pinned.is_none() {
                        slot.pinned = Some(dialer(&Trust::Pinned(connection.fingerprint()))?);
                    }
                    let live = self.adopt(connection);
                    slot.live = Some(Arc::clone(&live));
                    return Ok(live);
                }
                Err(Failed::Permanent(error)) => {
                    self.report_loss(error.to_string().into());
                    return Err(error.into());
                }
                Err(Failed::Temporary(why)) => {
                    tracing::debug!(reason = %why, "no connection");
                    self.report_loss(why.clone());
                    reason = why;
                    failures += 1;
                }
            }
        }
    }

    /// Returns a connection whose events have no receiver yet. The caller becomes the receiver.
    pub(crate) async fn with_events(&self, until: Instant) -> Result<Arc<Live>, CallError> {
        loop {
            let live = self.live(until).await?;
            if !live.events_taken.swap(true, Ordering::Relaxed) {
                return Ok(live);
            }
            self.retire(&live).await;
        }
    }

    /// Excludes a connection from further calls. Those in progress may end on it.
    pub(crate) async fn retire(&self, live: &Arc<Live>) {
        let mut slot = self.slot.lock().await;
        if slot.live.as_ref().is_some_and(|current| Arc::ptr_eq(current, live)) {
            slot.unanswered = live.unanswered_after(slot.unanswered);
            slot.live = None;
        }
    }

    /// Replaces a connection that the server is about to end. If no new one can be created, the old
    /// one stays in use until it ends.
    pub(crate) async fn renew(&self) -> Renewed {
        let dialer = self.slot.lock().await.pinned.clone().unwrap_or_else(|| self.dialer.clone());
        match Box::pin(self.target.dial(&dialer)).await {
            Ok(connection) => {
                self.slot.lock().await.live = Some(self.adopt(connection));
                Renewed::Yes
            }
            Err(_) => Renewed::No,
        }
    }

    /// Closes the connection, if there is one, and waits briefly until the server has received
    /// that.
    pub(crate) async fn close(&self) {
        let live = self.slot.lock().await.live.take();
        if let Some(live) = live {
            // A server that does not answer ends the idle connection by itself.
            let _ = timeout(CLOSE_TIMEOUT, live.connection.close()).await;
        }
        self.events.send_replace(ConnectionEvent::Idle);
    }

    fn adopt(&self, connection: Connection) -> Arc<Live> {
        let fingerprint = connection.fingerprint();
        self.events.send_replace(ConnectionEvent::Connected { fingerprint });
        let number = self.made.fetch_add(1, Ordering::Relaxed) + 1;
        let (events, made, watched) =
            (self.events.clone(), Arc::clone(&self.made), connection.clone());
        let (watching, dropped) = oneshot::channel::<()>();
        tokio::spawn(async move {
            let lost = tokio::select! {
                lost = watched.closed() => lost,
                _ = dropped => return,
            };
            if lost != transport::Lost::ClosedLocally && made.load(Ordering::Relaxed) == number {
                tracing::debug!(reason = %lost, "connection lost");
                let (since, reason) = (Instant::now(), lost.to_string().into());
                events.send_replace(ConnectionEvent::Reconnecting { since, reason });
            }
        });
        Arc::new(Live {
            connection,
            answered: AtomicBool::new(false),
            events_taken: AtomicBool::new(false),
            next_request: AtomicU32::new(1),
            _watched: watching,
        })
    }

    /// Reports the reason why there is no connection. The first report sets the time of the loss.
    fn report_loss(&self, reason: NoConnection) {
        self.events.send_modify(|event| {
            let since = match event {
                ConnectionEvent::Reconnecting { since, .. } => *since,
                _ => Instant::now(),
            };
            *event = ConnectionEvent::Reconnecting { since, reason };
        });
    }
}

impl Slot {
    /// Returns the connection if it is alive. A lost connection is dropped, and counted in
    /// `unanswered` if it had no answer.
    fn alive(&mut self) -> Option<Arc<Live>> {
        let live = self.live.as_ref()?;
        if live.connection.lost().is_none() {
            return Some(Arc::clone(live));
        }
        self.unanswered = live.unanswered_after(self.unanswered);
        self.live = None;
        None
    }
}
