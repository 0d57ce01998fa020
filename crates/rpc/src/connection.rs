//! What the server knows of one client connection: where it comes from, which session it uses,
//! which logins are under way on it. Nothing here outlives the connection, and no other connection
//! can touch it: that is what makes a login undisturbable and lets any edge be killed.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use qpq_domain::{AccountId, IdentityKey, StoreId, TokenHash, UnixMillis, Username};
use tokio::task::AbortHandle;

use crate::{answers::Budget, opaque::PendingLogin};

/// Logins under way on one connection; one more pushes the oldest out.
const MAX_PENDING: usize = 4;

/// How long a client may take between LoginStart and LoginFinish.
const PENDING_LIFETIME: Duration = Duration::from_secs(60);

/// Where a connection's events go: frames on a stream that the server opens with the first one.
pub trait Events: Send + Sync {
    /// Queues one event; false when the connection is gone or takes no more.
    fn send(&self, event_type: u16, payload: Bytes) -> bool;
}

/// One client connection.
pub struct Connection {
    ip: IpAddr,
    events: Arc<dyn Events>,
    /// The memory for answers to it.
    answers: Budget,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    session: Option<TokenHash>,
    pending: Vec<Pending>,
    subscription: Option<AbortHandle>,
    /// The history of the messages that were shown last, and left in the inbox.
    shown_in: Option<StoreId>,
    closed: bool,
}

struct Pending {
    username: Username,
    login: UnfinishedLogin,
    started_at: UnixMillis,
}

/// A login between its two calls.
#[derive(Debug)]
pub(crate) struct UnfinishedLogin {
    pub(crate) opaque: PendingLogin,
    /// Whose it will be; `None` where the user does not exist.
    pub(crate) account: Option<(AccountId, IdentityKey)>,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").finish_non_exhaustive()
    }
}

impl Connection {
    pub(crate) fn new(addr: SocketAddr, events: Arc<dyn Events>, answers: Budget) -> Self {
        Self { ip: addr.ip().to_canonical(), events, answers, state: Mutex::default() }
    }

    /// The client's address; an IPv4 address mapped into IPv6 is the IPv4 one.
    pub(crate) fn ip(&self) -> IpAddr {
        self.ip
    }

    pub(crate) fn events(&self) -> &Arc<dyn Events> {
        &self.events
    }

    pub(crate) fn answers(&self) -> &Budget {
        &self.answers
    }

    /// The session of requests that name none.
    pub(crate) fn session(&self) -> Option<TokenHash> {
        self.state.lock().session
    }

    /// Makes `token` the session of requests that name none.
    pub(crate) fn bind(&self, token: TokenHash) {
        self.state.lock().session = Some(token);
    }

    /// Forgets the session if it is still `token`.
    pub(crate) fn unbind(&self, token: &TokenHash) {
        let mut state = self.state.lock();
        if state.session.as_ref() == Some(token) {
            state.session = None;
        }
    }

    /// Notes the history of messages that are shown to be acknowledged later.
    pub(crate) fn shows(&self, store_id: StoreId) {
        self.state.lock().shown_in = Some(store_id);
    }

    /// The history that seqs in an ack belong to, as far as this connection knows.
    pub(crate) fn shown_in(&self) -> Option<StoreId> {
        self.state.lock().shown_in
    }

    /// Forgets the history of what was shown, if it is still `store_id`.
    pub(crate) fn forget_shown(&self, store_id: StoreId) {
        let mut state = self.state.lock();
        if state.shown_in == Some(store_id) {
            state.shown_in = None;
        }
    }

    /// Keeps the task that serves this connection's subscription; the one before ends.
    pub(crate) fn subscribe(&self, task: AbortHandle) {
        let mut state = self.state.lock();
        // The call that brings it may outlive the connection by a moment.
        let over = if state.closed { Some(task) } else { state.subscription.replace(task) };
        drop(state);
        if let Some(over) = over {
            over.abort();
        }
    }

    /// Ends what runs for the connection and wipes what it keeps.
    pub(crate) fn close(&self) {
        let closed = State { closed: true, ..State::default() };
        let state = std::mem::replace(&mut *self.state.lock(), closed);
        if let Some(task) = state.subscription {
            task.abort();
        }
    }

    /// Keeps a login until its second call. It replaces one of the same name, and the oldest where
    /// there are too many.
    pub(crate) fn start_login(&self, username: Username, login: UnfinishedLogin, now: UnixMillis) {
        let mut state = self.state.lock();
        let pending = &mut state.pending;
        pending.retain(|other| other.is_alive(now) && other.username != username);
        if pending.len() == MAX_PENDING {
            pending.remove(0);
        }
        pending.push(Pending { username, login, started_at: now });
    }

    /// The login under way for `username`, once.
    pub(crate) fn take_login(
        &self,
        username: &Username,
        now: UnixMillis,
    ) -> Option<UnfinishedLogin> {
        let mut state = self.state.lock();
        state.pending.retain(|pending| pending.is_alive(now));
        let index = state.pending.iter().position(|pending| pending.username == *username)?;
        Some(state.pending.remove(index).login)
    }
}

impl Pending {
    fn is_alive(&self, now: UnixMillis) -> bool {
        now.since(self.started_at) < PENDING_LIFETIME
    }
}
