//! The state of one client connection: its address, its session, its unfinished logins and
//! registrations, its subscription. No other connection can change this state, so no other client
//! can disturb a login. The state ends with the connection, so any edge can be killed.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use qpq_domain::{StoreId, TokenHash, UnixMillis, Username};
use qpq_ports::Credentials;
use tokio::task::AbortHandle;

use crate::{answers::Memory, opaque::PendingLogin};

/// The maximum number of unfinished logins on one connection, and of unfinished registrations. A
/// further one removes the oldest.
const MAX_PENDING: usize = 4;

/// The maximum time between the start of a login or registration and its end.
const PENDING_LIFETIME: Duration = Duration::from_secs(60);

/// The stream of a connection's events. The server opens it with the first event.
pub trait Events: Send + Sync {
    /// Queues one event. Returns false if the connection is closed or accepts no more events.
    fn send(&self, event_type: u16, payload: Bytes) -> bool;
}

/// One client connection.
pub struct ClientConnection {
    ip: IpAddr,
    events: Arc<dyn Events>,
    answer_memory: Memory,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    session: Option<TokenHash>,
    logins: PendingStates<UnfinishedLogin>,
    /// The usernames for which an OPAQUE registration was started, for ChangePassword.
    registrations: PendingStates<()>,
    subscription: Option<AbortHandle>,
    /// The history of the store (its id) from which messages were peeked last.
    peeked_history: Option<StoreId>,
    closed: bool,
}

/// The states between the starts of logins or registrations and their ends: at most one for each
/// username.
struct PendingStates<T>(Vec<Pending<T>>);

struct Pending<T> {
    username: Username,
    state: T,
    started_at: UnixMillis,
}

/// A login between OpaqueLoginStart and OpaqueLoginFinish.
#[derive(Debug)]
pub(crate) struct UnfinishedLogin {
    pub(crate) opaque: PendingLogin,
    /// The account and the record with which the login started; `None` if there is no such account.
    pub(crate) credentials: Option<Credentials>,
}

impl fmt::Debug for ClientConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientConnection").finish_non_exhaustive()
    }
}

impl ClientConnection {
    pub(crate) fn new(addr: SocketAddr, events: Arc<dyn Events>, answer_memory: Memory) -> Self {
        Self { ip: addr.ip().to_canonical(), events, answer_memory, state: Mutex::default() }
    }

    /// Returns the client's address. An IPv4 address mapped into IPv6 is returned as IPv4.
    pub(crate) fn ip(&self) -> IpAddr {
        self.ip
    }

    pub(crate) fn events(&self) -> &Arc<dyn Events> {
        &self.events
    }

    pub(crate) fn answer_memory(&self) -> &Memory {
        &self.answer_memory
    }

    /// Returns the session of requests without a token.
    pub(crate) fn session(&self) -> Option<TokenHash> {
        self.state.lock().session
    }

    /// Sets the session of requests without a token.
    pub(crate) fn bind(&self, token: TokenHash) {
        self.state.lock().session = Some(token);
    }

    /// Removes the session if it is still `token`.
    pub(crate) fn unbind(&self, token: &TokenHash) {
        let mut state = self.state.lock();
        if state.session.as_ref() == Some(token) {
            state.session = None;
        }
    }

    /// Records the history of peeked messages, which the client acks later.
    pub(crate) fn set_peeked_history(&self, store_id: StoreId) {
        self.state.lock().peeked_history = Some(store_id);
    }

    /// Returns the history to which the seqs of an ack belong, if the connection has peeked.
    pub(crate) fn peeked_history(&self) -> Option<StoreId> {
        self.state.lock().peeked_history
    }

    /// Removes the history of peeked messages if it is still `store_id`.
    pub(crate) fn clear_peeked_history(&self, store_id: StoreId) {
        let mut state = self.state.lock();
        if state.peeked_history == Some(store_id) {
            state.peeked_history = None;
        }
    }

    /// Takes ownership of the subscription's task, and aborts the previous one.
    pub(crate) fn subscribe(&self, task: AbortHandle) {
        let mut state = self.state.lock();
        // The call of a Subscribe can end after its connection is closed.
        let aborted = if state.closed { Some(task) } else { state.subscription.replace(task) };
        drop(state);
        if let Some(task) = aborted {
            task.abort();
        }
    }

    /// Aborts the subscription and wipes the state.
    pub(crate) fn close(&self) {
        let closed = State { closed: true, ..State::default() };
        let state = std::mem::replace(&mut *self.state.lock(), closed);
        if let Some(task) = state.subscription {
            task.abort();
        }
    }

    /// Adds an unfinished login. Removes one of the same username, and the oldest if there are too
    /// many.
    pub(crate) fn start_login(&self, username: Username, login: UnfinishedLogin, now: UnixMillis) {
        self.state.lock().logins.add(username, login, now);
    }

    /// Removes and returns the unfinished login of `username`.
    pub(crate) fn take_login(
        &self,
        username: &Username,
        now: UnixMillis,
    ) -> Option<UnfinishedLogin> {
        self.state.lock().logins.take(username, now)
    }

    /// Records that a registration of `username` was started, as [`Self::start_login`] does for a
    /// login.
    pub(crate) fn start_registration(&self, username: Username, now: UnixMillis) {
        self.state.lock().registrations.add(username, (), now);
    }

    /// Removes the started registration of `username`. Returns whether there was one.
    pub(crate) fn take_registration(&self, username: &Username, now: UnixMillis) -> bool {
        self.state.lock().registrations.take(username, now).is_some()
    }
}

/// Ends the subscription also if the embedder drops the connection without `Rpc::disconnected`.
impl Drop for ClientConnection {
    fn drop(&mut self) {
        self.close();
    }
}

impl<T> Default for PendingStates<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> PendingStates<T> {
    fn add(&mut self, username: Username, state: T, now: UnixMillis) {
        let pending = &mut self.0;
        pending.retain(|other| other.is_alive(now) && other.username != username);
        if pending.len() == MAX_PENDING {
            pending.remove(0);
        }
        pending.push(Pending { username, state, started_at: now });
    }

    fn take(&mut self, username: &Username, now: UnixMillis) -> Option<T> {
        self.0.retain(|pending| pending.is_alive(now));
        let index = self.0.iter().position(|pending| pending.username == *username)?;
        Some(self.0.remove(index).state)
    }
}

impl<T> Pending<T> {
    fn is_alive(&self, now: UnixMillis) -> bool {
        now.since(self.started_at) < PENDING_LIFETIME
    }
}
