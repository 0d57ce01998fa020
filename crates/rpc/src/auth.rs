//! The callers of handlers, as types. Authentication has two steps:
//!
//! 1. [`Authenticate`] runs before the request is decoded, is cheap, and returns the principal,
//!    whose budgets the call consumes.
//! 2. [`Authorize`] runs on the decoded request and returns the caller that the handler receives.
//!    Checks that depend on the request belong here, for example whether the caller is an
//!    administrator of the group in the request, and so do expensive checks.
//!
//! The row of a method names a marker of `qpq_proto::auth`, which determines the types of principal
//! and caller. Only this file creates their values. A handler whose caller requires more than its
//! row authenticates does not compile.

use std::{
    future::{Future, ready},
    time::Duration,
};

use qpq_domain::{AccountId, DeviceId, IdentityKey, Role, SessionToken, TokenHash, UnixMillis};
use qpq_ports::{BanScope, ModerationRight, Moderator, Session};
use qpq_proto::{auth as marker, convert, v1};

use crate::{Cx, Error, Subject};

/// The maximum age of a login that counts as fresh.
pub const MAX_FRESH_AGE: Duration = Duration::from_secs(5 * 60);

/// The time between two updates of a session's last use. An update on each call would be a write
/// on each call.
const TOUCH_INTERVAL: Duration = Duration::from_secs(10 * 60);

/// The lifetimes of sessions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionLifetimes {
    /// The time from the last use to the end of the session. A use is recorded only if the last
    /// record is ten minutes old, or a tenth of this time if that is shorter. So a session can end
    /// that much earlier.
    pub idle: Duration,
    /// The time from the login to the end of the session.
    pub absolute: Duration,
}

impl Default for SessionLifetimes {
    fn default() -> Self {
        const DAY: Duration = Duration::from_secs(24 * 60 * 60);
        Self { idle: DAY * 30, absolute: DAY * 90 }
    }
}

impl SessionLifetimes {
    /// Returns the end of a session created at `created_at` and last used at `used_at`.
    pub fn expires_at(&self, created_at: UnixMillis, used_at: UnixMillis) -> UnixMillis {
        used_at.plus(self.idle).min(created_at.plus(self.absolute))
    }

    /// Returns whether the session has ended by `now`: by the recorded end, or by the lifetimes
    /// that are configured now, so that shorter ones apply immediately.
    fn has_ended(&self, session: &Session, now: UnixMillis) -> bool {
        now >= session
            .expires_at
            .min(self.expires_at(session.authenticated_at, session.last_used_at))
    }

    fn needs_touch(&self, session: &Session, now: UnixMillis) -> bool {
        now.since(session.last_used_at) >= TOUCH_INTERVAL.min(self.idle / 10)
    }
}

/// The owner of a session.
#[derive(Clone, Debug)]
pub struct Caller {
    /// The session's account.
    pub account: AccountId,
    /// The account's identity key.
    pub identity: IdentityKey,
    /// The device to which the session is bound. The client named it at the login. The device need
    /// not be registered: a read of an inbox checks that.
    pub device: Option<DeviceId>,
    /// The key under which the session is stored.
    pub token: TokenHash,
    login: Login,
}

/// The login of a session. Private, so that no other file can create a [`Caller`].
#[derive(Clone, Copy, Debug)]
struct Login {
    authenticated_at: UnixMillis,
}

/// A caller whose password was checked within the last five minutes.
#[derive(Clone, Debug)]
pub struct FreshCaller(Caller);

/// An administrator of this server.
#[derive(Clone, Debug)]
pub struct Admin(Caller);

/// An administrator of this server, or an admin of the group in the request.
#[derive(Clone, Debug)]
pub struct ModeratingCaller {
    caller: Caller,
    right: ModerationRight,
    scope: BanScope,
}

impl FreshCaller {
    /// Returns the caller as that of any session.
    pub fn caller(&self) -> &Caller {
        &self.0
    }
}

impl Admin {
    /// Returns the caller as that of any session.
    pub fn caller(&self) -> &Caller {
        &self.0
    }
}

impl ModeratingCaller {
    /// Returns the account and the right by which it moderates.
    pub fn moderator(&self) -> Moderator {
        let Caller { account, identity, .. } = self.caller;
        Moderator { account, identity, right: self.right }
    }

    /// Returns the part of the server that the request is about.
    pub fn scope(&self) -> BanScope {
        self.scope
    }
}

/// The result of authentication.
pub trait Principal: Send {
    /// Returns the subject whose budgets the call consumes, in addition to those of the
    /// connection's address. `None` if only the address has budgets.
    fn subject(&self) -> Option<Subject<'_>>;
}

/// An anonymous client.
impl Principal for () {
    fn subject(&self) -> Option<Subject<'_>> {
        None
    }
}

impl Principal for Caller {
    fn subject(&self) -> Option<Subject<'_>> {
        Some(Subject::Account(self.account))
    }
}

/// The first step: from the serialized request to a principal.
pub trait Authenticate: qpq_proto::Auth {
    /// The principal of an authenticated request.
    type Principal: Principal;

    /// Authenticates a request by its serialized `payload`.
    fn authenticate(
        cx: Cx<'_>,
        payload: &[u8],
    ) -> impl Future<Output = Result<Self::Principal, Error>> + Send;
}

/// The second step: from the principal and the decoded request to the handler's caller. A request
/// that is refused here has consumed its budgets already.
pub trait Authorize<R>: Authenticate {
    /// The caller that a handler receives.
    type Caller: Send;

    /// Allows or refuses `request`.
    fn authorize(
        cx: Cx<'_>,
        principal: Self::Principal,
        request: &R,
    ) -> impl Future<Output = Result<Self::Caller, Error>> + Send;
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
    type Principal = Caller;

    async fn authenticate(cx: Cx<'_>, payload: &[u8]) -> Result<Caller, Error> {
        let caller = caller(cx, payload).await?;
        if cx.now.since(caller.login.authenticated_at) > MAX_FRESH_AGE {
            return Err(Error::FreshLoginRequired);
        }
        Ok(caller)
    }
}

impl Authenticate for marker::Admin {
    type Principal = Caller;

    async fn authenticate(cx: Cx<'_>, payload: &[u8]) -> Result<Caller, Error> {
        caller(cx, payload).await
    }
}

impl Authenticate for marker::Moderator {
    type Principal = Caller;

    async fn authenticate(cx: Cx<'_>, payload: &[u8]) -> Result<Caller, Error> {
        caller(cx, payload).await
    }
}

/// Implements [`Authorize`] for markers whose principals may make every request.
macro_rules! allow_every_request {
    ($($marker:ident)+) => {$(
        impl<R> Authorize<R> for marker::$marker {
            type Caller = Self::Principal;

            fn authorize(
                _: Cx<'_>,
                principal: Self::Principal,
                _: &R,
            ) -> impl Future<Output = Result<Self::Caller, Error>> + Send {
                ready(Ok(principal))
            }
        }
    )+};
}

allow_every_request! { Anonymous Session }

impl<R: Sync> Authorize<R> for marker::Fresh {
    type Caller = FreshCaller;

    /// Confirms the session in the store: the effects of such calls are permanent, and a cached
    /// session may have been revoked.
    async fn authorize(cx: Cx<'_>, caller: Caller, _: &R) -> Result<FreshCaller, Error> {
        if cx.app.stores.sessions.confirm(&caller.token).await?.is_none() {
            return Err(Error::SessionExpired);
        }
        Ok(FreshCaller(caller))
    }
}

impl<R: Sync> Authorize<R> for marker::Admin {
    type Caller = Admin;

    async fn authorize(cx: Cx<'_>, caller: Caller, _: &R) -> Result<Admin, Error> {
        if is_admin(cx, &caller.identity).await? {
            Ok(Admin(caller))
        } else {
            Err(Error::AdminRequired)
        }
    }
}

impl<R: Moderation> Authorize<R> for marker::Moderator {
    type Caller = ModeratingCaller;

    /// Checks the right of an admin of a group here, and once more in the store, where the role
    /// cannot change meanwhile.
    async fn authorize(cx: Cx<'_>, caller: Caller, request: &R) -> Result<ModeratingCaller, Error> {
        let scope = match request.channel_id() {
            [] => BanScope::Server,
            channel => BanScope::Group(convert::group_id(channel, "channel_id")?),
        };
        if is_admin(cx, &caller.identity).await? {
            return Ok(ModeratingCaller { caller, right: ModerationRight::Server, scope });
        }
        let BanScope::Group(group) = scope else { return Err(Error::AdminRequired) };
        match cx.app.stores.groups.role(group, caller.account).await?? {
            Some(Role::Admin) => {
                Ok(ModeratingCaller { caller, right: ModerationRight::Group, scope })
            }
            Some(Role::Member) => Err(Error::NotGroupAdmin),
            None => Err(Error::NotGroupMember),
        }
    }
}

/// A request to moderate the server or a group.
pub trait Moderation: Sync {
    /// Returns the channel of the group; empty for the whole server.
    fn channel_id(&self) -> &[u8];
}

impl Moderation for v1::BanUserRequest {
    fn channel_id(&self) -> &[u8] {
        &self.channel_id
    }
}

impl Moderation for v1::UnbanUserRequest {
    fn channel_id(&self) -> &[u8] {
        &self.channel_id
    }
}

impl Moderation for v1::ListBannedRequest {
    fn channel_id(&self) -> &[u8] {
        &self.channel_id
    }
}

/// Returns whether the account with this identity key is an administrator of the server.
pub(crate) async fn is_admin(cx: Cx<'_>, identity: &IdentityKey) -> Result<bool, Error> {
    let admins = &cx.app.config.admins;
    if admins.is_empty() {
        return Ok(false);
    }
    let account = cx.app.stores.accounts.by_identity(identity).await?;
    Ok(account.is_some_and(|account| admins.contains(&account.username)))
}

/// Checks that the caller's session has not ended. For calls that wait, which must not outlive
/// their session.
pub async fn recheck(cx: Cx<'_>, caller: &Caller) -> Result<(), Error> {
    let now = cx.app.clock.now();
    live_session(Cx { now, ..cx }, &caller.token).await.map(drop)
}

/// Returns the owner of the session that field 15 names, or else of the connection's session. A
/// valid token becomes the connection's session.
async fn caller(cx: Cx<'_>, payload: &[u8]) -> Result<Caller, Error> {
    let named = match qpq_proto::session::session_token(payload)? {
        // No session has a token of another length.
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
        login: Login { authenticated_at: session.authenticated_at },
    })
}

/// Returns the session of `token`. Unknown, revoked and expired sessions have the same error, so
/// that clients cannot distinguish them.
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

/// Records the use of a session if the last record is old. A failure is only logged, because calls
/// that only read succeed while the store cannot write.
async fn touch(cx: Cx<'_>, token: &TokenHash, session: &Session) {
    let lifetimes = &cx.app.config.sessions;
    if !lifetimes.needs_touch(session, cx.now) {
        return;
    }
    let expires_at = lifetimes.expires_at(session.authenticated_at, cx.now);
    if let Err(error) = cx.app.stores.sessions.touch(token, cx.now, expires_at).await {
        tracing::warn!(
            error = &error as &dyn std::error::Error,
            "recording the use of a session failed"
        );
    }
}
