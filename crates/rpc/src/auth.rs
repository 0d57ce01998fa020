//! Who calls, as a type. A handler's signature says whom it serves (`()`, [`Caller`],
//! [`FreshCaller`], [`Admin`]), the method's row says whom the dispatcher admits, and only this
//! file makes these values: a handler that takes a stronger caller than its row gives does not
//! compile.

use std::{future::Future, time::Duration};

use qpq_domain::{AccountId, DeviceId, IdentityKey, SessionToken, TokenHash, UnixMillis};
use qpq_ports::Session;
use qpq_proto::auth as marker;

use crate::{Cx, Error};

/// How old a login may be where a fresh one is asked for.
pub const FRESH: Duration = Duration::from_secs(5 * 60);

/// The longest time between two notes that a session is in use: a write for each call would be one
/// too many.
const TOUCH_AT_MOST_EVERY: Duration = Duration::from_secs(10 * 60);

/// How long sessions last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionLifetimes {
    /// From its last use. Uses are noted every ten minutes at most, so it can be that much shorter.
    pub idle: Duration,
    /// From the login that made it, however much it is used.
    pub absolute: Duration,
}

impl Default for SessionLifetimes {
    fn default() -> Self {
        const DAY: Duration = Duration::from_secs(24 * 60 * 60);
        Self { idle: DAY * 30, absolute: DAY * 90 }
    }
}

impl SessionLifetimes {
    /// When a session made at `made_at` and used at `used_at` ends unless it is used again.
    pub fn expires_at(&self, made_at: UnixMillis, used_at: UnixMillis) -> UnixMillis {
        used_at.plus(self.idle).min(made_at.plus(self.absolute))
    }

    /// Whether the session has ended by `now`: by what was promised when it was last noted, and by
    /// what is configured now, so that shorter lifetimes hold at once.
    fn has_ended(&self, session: &Session, now: UnixMillis) -> bool {
        now >= session
            .expires_at
            .min(self.expires_at(session.authenticated_at, session.last_used_at))
    }

    fn needs_touch(&self, session: &Session, now: UnixMillis) -> bool {
        now.since(session.last_used_at) >= TOUCH_AT_MOST_EVERY.min(self.idle / 10)
    }
}

/// Somebody with a session.
#[derive(Clone, Debug)]
pub struct Caller {
    pub account: AccountId,
    pub identity: IdentityKey,
    /// The device the session is bound to, if any. The client named it at its login; whether it is
    /// registered is for the reader of an inbox to check.
    pub device: Option<DeviceId>,
    /// What the session is stored under.
    pub token: TokenHash,
    proof: Proof,
}

/// Keeps [`Caller`] from being made elsewhere.
#[derive(Clone, Copy, Debug)]
struct Proof {
    authenticated_at: UnixMillis,
}

/// Somebody whose password was checked within the last five minutes.
#[derive(Clone, Debug)]
pub struct FreshCaller(Caller);

/// An administrator of this server.
#[derive(Clone, Debug)]
pub struct Admin(Caller);

impl FreshCaller {
    pub fn caller(&self) -> &Caller {
        &self.0
    }
}

impl Admin {
    pub fn caller(&self) -> &Caller {
        &self.0
    }
}

/// What the dispatcher knows of any principal.
pub trait Principal: Send {
    /// Whose budgets a call is counted against.
    fn account(&self) -> Option<AccountId>;
}

impl Principal for () {
    fn account(&self) -> Option<AccountId> {
        None
    }
}

impl Principal for Caller {
    fn account(&self) -> Option<AccountId> {
        Some(self.account)
    }
}

impl Principal for FreshCaller {
    fn account(&self) -> Option<AccountId> {
        Some(self.0.account)
    }
}

impl Principal for Admin {
    fn account(&self) -> Option<AccountId> {
        Some(self.0.account)
    }
}

/// Turns a row's mark into the principal that its handler gets.
pub trait Authenticate: qpq_proto::Auth {
    type Principal: Principal;

    /// Admits or refuses a request by its serialized `payload`.
    fn authenticate(
        cx: Cx<'_>,
        payload: &[u8],
    ) -> impl Future<Output = Result<Self::Principal, Error>> + Send;
}

impl Authenticate for marker::Anonymous {
    type Principal = ();

    async fn authenticate(_: Cx<'_>, _: &[u8]) -> Result<(), Error> {
        Ok(())
    }
}

impl Authenticate for marker::Session {
    type Principal = Caller;

    async fn authenticate(cx: Cx<'_>, payload: &[u8]) -> Result<Caller, Error> {
        caller(cx, payload).await
    }
}

impl Authenticate for marker::Fresh {
    type Principal = FreshCaller;

    async fn authenticate(cx: Cx<'_>, payload: &[u8]) -> Result<FreshCaller, Error> {
        let caller = caller(cx, payload).await?;
        if cx.now.since(caller.proof.authenticated_at) > FRESH {
            return Err(Error::FreshLoginRequired);
        }
        // What such calls do is done for good, so a cache that has not heard of a revocation is not
        // good enough.
        if cx.app.stores.sessions.confirm(&caller.token).await?.is_none() {
            return Err(Error::SessionExpired);
        }
        Ok(FreshCaller(caller))
    }
}

impl Authenticate for marker::Admin {
    type Principal = Admin;

    async fn authenticate(cx: Cx<'_>, payload: &[u8]) -> Result<Admin, Error> {
        let caller = caller(cx, payload).await?;
        if cx.app.config.admins.is_empty() {
            return Err(Error::AdminRequired);
        }
        let account = cx.app.stores.accounts.by_identity(&caller.identity).await?;
        match account {
            Some(account) if cx.app.config.admins.contains(&account.username) => Ok(Admin(caller)),
            _ => Err(Error::AdminRequired),
        }
    }
}

/// Whether the caller's session is still one now: for calls that wait, which must not outlive it by
/// more than a moment.
pub async fn recheck(cx: Cx<'_>, caller: &Caller) -> Result<(), Error> {
    let now = cx.app.clock.now();
    live_session(Cx { now, ..cx }, &caller.token).await.map(drop)
}

/// The session of field 15, or the connection's own. A token that is good becomes the connection's.
async fn caller(cx: Cx<'_>, payload: &[u8]) -> Result<Caller, Error> {
    let named = match qpq_proto::session::session_token(payload)? {
        // A token of another length is one that nobody was given.
        Some(token) => {
            Some(SessionToken::try_from(token).map_err(|_| Error::SessionExpired)?.hash())
        }
        None => None,
    };
    let bound = cx.conn.session();
    let token = named.or(bound).ok_or(Error::SessionRequired)?;
    let is_bound = bound == Some(token);
    cx.app.tokens.admit(&token, is_bound, cx.conn.ip(), cx.now)?;
    let session = live_session(cx, &token).await?;
    if !is_bound {
        cx.app.tokens.found(token);
    }
    touch(cx, &token, &session).await;
    if named.is_some() {
        cx.conn.bind(token);
    }
    Ok(Caller {
        account: session.account,
        identity: session.identity,
        device: session.device,
        token,
        proof: Proof { authenticated_at: session.authenticated_at },
    })
}

/// Unknown, revoked and expired are one answer.
async fn live_session(cx: Cx<'_>, token: &TokenHash) -> Result<Session, Error> {
    let Some(session) = cx.app.stores.sessions.find(token).await? else {
        cx.app.tokens.not_found(*token, cx.conn.ip(), cx.now);
        return Err(Error::SessionExpired);
    };
    if cx.app.config.sessions.has_ended(&session, cx.now) {
        return Err(Error::SessionExpired);
    }
    Ok(session)
}

/// Notes the use, if the last note is old. A store that cannot write must not keep anyone from
/// reading.
async fn touch(cx: Cx<'_>, token: &TokenHash, session: &Session) {
    let lifetimes = &cx.app.config.sessions;
    if !lifetimes.needs_touch(session, cx.now) {
        return;
    }
    let expires_at = lifetimes.expires_at(session.authenticated_at, cx.now);
    if let Err(error) = cx.app.stores.sessions.touch(token, cx.now, expires_at).await {
        tracing::warn!(
            error = &error as &dyn std::error::Error,
            "the use of a session could not be noted"
        );
    }
}
