//! The client without any encryption of messages: typed calls that reconnect and retry,
//! registration, login, logout.

use std::{fmt, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};
use parking_lot::RwLock;
use qpq_domain::{DeviceId, IdentityKey, SessionToken, UnixMillis, Username};
use qpq_mls::Identity;
use qpq_proto::{DeadlineClass, Method, ServerEvent, Status, methods, v1};
use qpq_transport::Fingerprint;
use rand::{RngCore as _, rngs::OsRng};
use tokio::{
    sync::watch,
    task::{JoinError, spawn_blocking},
    time::{Instant, sleep},
};

use crate::{
    call::{self, Repeat},
    error::{AuthError, CallError, ConnectError},
    link::{ConnectionEvent, Failure, Link, Live, Renewed},
    opaque::{Login, OpaqueError, Registration},
    options::Options,
    secret::{ExportKey, Password},
};

/// The minimum time limit of an attempt. With less, the last attempt before the end of patience
/// could not succeed.
const MIN_ATTEMPT: Duration = Duration::from_secs(1);

/// A client of one server, which reconnects when the connection is lost. Cheap to clone; all clones
/// share the connection and the session.
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

struct Shared {
    options: Options,
    link: Link,
    token: RwLock<Option<SessionToken>>,
    /// The device that sessions are bound to.
    device: RwLock<Option<DeviceId>>,
}

/// The result of a login. The client that logged in uses the token from then on.
#[derive(Debug, Clone)]
pub struct Session {
    /// The token of the session.
    pub token: SessionToken,
    /// The end of the session unless it is used; `None` if the server does not state it.
    pub expires_at: Option<UnixMillis>,
    /// The key that OPAQUE derives at each login, for the encryption of the profile.
    pub export_key: ExportKey,
    /// The form of the password that the account was registered with.
    pub(crate) password: Password,
}

/// The result of a registration.
#[derive(Debug, Clone)]
pub struct Registered {
    /// The key that each login derives.
    pub export_key: ExportKey,
}

/// A registration that has not reached the server.
///
/// The caller can save data under a key derived from `export_key` before
/// [`Client::finish_registration`] creates the account.
#[derive(Debug)]
pub struct PendingRegistration {
    username: Username,
    upload: Bytes,
    /// The key that each login will derive.
    pub export_key: ExportKey,
    /// The form of the password that is registered.
    pub(crate) password: Password,
}

/// A change of the password that has not reached the server, as [`PendingRegistration`].
pub(crate) struct PendingPasswordChange {
    /// The connection on which the change was started.
    live: Arc<Live>,
    upload: Bytes,
    /// The key that each login with the new password will derive.
    pub(crate) export_key: ExportKey,
    /// The form of the new password that is registered.
    pub(crate) password: Password,
}

/// The sessions that a logout ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogoutScope {
    /// The session that the client uses.
    ThisSession,
    /// Every session of the account.
    EverySession,
}

impl Client {
    /// Creates a client, which connects when it is first used.
    ///
    /// # Errors
    /// [`ConnectError::Misconfigured`]: the address or the trust material cannot be used.
    pub fn new(options: Options) -> Result<Self, ConnectError> {
        let link = Link::new(&options)?;
        Ok(Self {
            shared: Arc::new(Shared {
                options,
                link,
                token: RwLock::default(),
                device: RwLock::default(),
            }),
        })
    }

    /// Returns the options that the client was created with.
    pub fn options(&self) -> &Options {
        &self.shared.options
    }

    /// Connects unless there is a connection, and returns the server's fingerprint. Other calls
    /// connect by themselves.
    pub async fn connect(&self) -> Result<Fingerprint, CallError> {
        let live = self.shared.link.live(self.patience()).await?;
        Ok(live.connection().fingerprint())
    }

    /// Returns a receiver of the connection's present state and of each later one.
    pub fn connection_events(&self) -> watch::Receiver<ConnectionEvent> {
        self.shared.link.events()
    }

    /// Closes the connection. The client can be used again.
    pub async fn close(&self) {
        self.shared.link.close().await;
    }

    /// Returns the session that calls use, if any.
    pub fn session(&self) -> Option<SessionToken> {
        self.shared.token.read().clone()
    }

    /// Sets the session that calls use from now on.
    pub fn set_session(&self, token: Option<SessionToken>) {
        *self.shared.token.write() = token;
    }

    /// Binds the sessions of later logins to this device.
    pub fn set_device(&self, device: Option<DeviceId>) {
        *self.shared.device.write() = device;
    }

    /// Calls a method: `client.call::<methods::Health>(HealthRequest {})`.
    ///
    /// The session token is added if the method needs a session. Lost connections are replaced and
    /// retryable refusals retried within [`Options::patience`], as far as the method's
    /// [retry policy](qpq_proto::RetryPolicy) allows it.
    pub async fn call<M: Method>(&self, request: M::Request) -> Result<M::Response, CallError> {
        Ok(self.call_any::<M>(request).await?.0)
    }

    /// Calls a method as [`Client::call`] does. Returns the connection that answered, too.
    pub(crate) async fn call_any<M: Method>(
        &self,
        request: M::Request,
    ) -> Result<(M::Response, Arc<Live>), CallError> {
        let payload = call::encode::<M>(&request, self.shared.token.read().as_ref())?;
        let repeat = call::repeat::<M>(&request);
        let until = self.patience();
        let mut limit = self.attempt_limit::<M>(&request);
        let mut failures = 0;
        loop {
            let live = self.shared.link.live(until).await?;
            let error = match self.exchange::<M>(&live, payload.clone(), limit).await {
                Ok(response) => return Ok((response, live)),
                Err(error) => error,
            };
            if !may_retry(&error, repeat) {
                return Err(error);
            }
            failures += 1;
            if !self.pause(&error, failures, until).await {
                return Err(error);
            }
            limit = limit.min(until.saturating_duration_since(Instant::now()).max(MIN_ATTEMPT));
        }
    }

    /// Calls a method once, on this connection alone.
    pub(crate) async fn call_on<M: Method>(
        &self,
        live: &Arc<Live>,
        request: M::Request,
    ) -> Result<M::Response, CallError> {
        let payload = call::encode::<M>(&request, self.shared.token.read().as_ref())?;
        self.exchange::<M>(live, payload, self.attempt_limit::<M>(&request)).await
    }

    /// Registers an account. The password never leaves this machine. A signature of `identity`
    /// proves that the key is ours.
    pub async fn register(
        &self,
        username: &Username,
        password: &Password,
        identity: &Identity,
        invite: Option<&str>,
    ) -> Result<Registered, AuthError> {
        let pending = self.begin_registration(username, password).await?;
        self.finish_registration(&pending, identity, invite).await?;
        Ok(Registered { export_key: pending.export_key })
    }

    /// Prepares a registration, without a change on the server.
    pub async fn begin_registration(
        &self,
        username: &Username,
        password: &Password,
    ) -> Result<PendingRegistration, AuthError> {
        let password = password.prepared().ok_or(AuthError::PasswordRefused)?;
        let (state, request) = Registration::start(&password);
        let answer = self
            .call::<methods::OpaqueRegisterStart>(v1::OpaqueRegisterStartRequest {
                username: username.to_string(),
                request: request.into(),
            })
            .await
            .map_err(AuthError::from_call)?;
        let typed = password.clone();
        let (upload, export_key) = blocking(move || state.finish(&typed, &answer.response))
            .await
            .map_err(|_| malformed::<methods::OpaqueRegisterStart>())?;
        let username = username.clone();
        Ok(PendingRegistration { username, upload: upload.into(), export_key, password })
    }

    /// Creates the account. May be repeated with the same registration and identity.
    pub async fn finish_registration(
        &self,
        pending: &PendingRegistration,
        identity: &Identity,
        invite: Option<&str>,
    ) -> Result<(), AuthError> {
        let proof =
            identity.sign(&IdentityKey::registration_message(&pending.username, &pending.upload));
        self.call::<methods::OpaqueRegisterFinish>(v1::OpaqueRegisterFinishRequest {
            username: pending.username.to_string(),
            upload: pending.upload.clone(),
            identity_key: identity.public().as_bytes().to_vec().into(),
            identity_proof: proof.to_vec().into(),
            invite: invite.unwrap_or_default().to_owned(),
        })
        .await
        .map_err(AuthError::from_call)?;
        Ok(())
    }

    /// Logs in; the client uses the session from then on.
    pub async fn login(
        &self,
        username: &Username,
        password: &Password,
    ) -> Result<Session, AuthError> {
        let mut refused = AuthError::WrongPassword;
        for form in password.forms() {
            match self.log_in_with(username, &form).await {
                Err(error @ AuthError::WrongPassword) => refused = error,
                other => return other,
            }
        }
        Err(refused)
    }

    /// Logs in with one form of the password.
    async fn log_in_with(
        &self,
        username: &Username,
        password: &Password,
    ) -> Result<Session, AuthError> {
        let until = self.patience();
        let mut failures = 0;
        // Both calls belong to one connection. If the connection is lost between them, both are
        // repeated.
        let session = loop {
            let live = self.shared.link.live(until).await?;
            let error = match self.log_in_on(&live, username, password).await {
                Ok(session) => break session,
                Err(AuthError::Call(error)) if error.is_temporary() => error,
                Err(error) => return Err(error),
            };
            failures += 1;
            if !self.pause(&error, failures, until).await {
                return Err(error.into());
            }
        };
        self.set_session(Some(session.token.clone()));
        Ok(session)
    }

    /// Prepares a change of the password, without a change on the server. The client has a session
    /// of the account.
    pub(crate) async fn begin_password_change(
        &self,
        username: &Username,
        password: &Password,
    ) -> Result<PendingPasswordChange, AuthError> {
        let password = password.prepared().ok_or(AuthError::PasswordRefused)?;
        let (state, request) = Registration::start(&password);
        let live = self.shared.link.live(self.patience()).await?;
        let start = v1::OpaqueRegisterStartRequest {
            username: username.to_string(),
            request: request.into(),
        };
        let answer = self.once::<methods::OpaqueRegisterStart>(&live, &start).await?;
        let typed = password.clone();
        let (upload, export_key) = blocking(move || state.finish(&typed, &answer.response))
            .await
            .map_err(|_| malformed::<methods::OpaqueRegisterStart>())?;
        Ok(PendingPasswordChange { live, upload: upload.into(), export_key, password })
    }

    /// Changes the password. Returns the number of other sessions that were ended.
    pub(crate) async fn finish_password_change(
        &self,
        pending: &PendingPasswordChange,
    ) -> Result<u32, CallError> {
        let request =
            v1::ChangePasswordRequest { upload: pending.upload.clone(), ..Default::default() };
        Ok(self.call_on::<methods::ChangePassword>(&pending.live, request).await?.revoked)
    }

    /// Returns whether a change of the password whose answer was lost has taken effect.
    pub(crate) async fn has_changed_password(
        &self,
        pending: &PendingPasswordChange,
    ) -> Result<bool, CallError> {
        let until = self.patience();
        let mut failures = 0;
        loop {
            // The server answers a repeat without a start Ok, and refuses another change.
            let request =
                v1::ChangePasswordRequest { upload: pending.upload.clone(), ..Default::default() };
            let error = match self.call::<methods::ChangePassword>(request).await {
                Ok(_) => return Ok(true),
                Err(error) if error.is_code("auth.registration_not_started") => return Ok(false),
                Err(error) if error.is_temporary() => error,
                Err(error) => return Err(error),
            };
            failures += 1;
            if !self.pause(&error, failures, until).await {
                return Err(error);
            }
        }
    }

    /// Ends the session, or every session of the account; returns the number of ended sessions.
    /// Afterwards the client has no session.
    pub async fn logout(&self, scope: LogoutScope) -> Result<u32, CallError> {
        let request = v1::LogoutRequest {
            all_sessions: scope == LogoutScope::EverySession,
            ..Default::default()
        };
        let revoked = self.call::<methods::Logout>(request).await?.revoked;
        self.set_session(None);
        Ok(revoked)
    }

    /// Ends another session than the one in use.
    pub(crate) async fn end_session(&self, token: SessionToken) -> Result<(), CallError> {
        let request = v1::LogoutRequest::default();
        let payload = call::encode::<methods::Logout>(&request, Some(&token))?;
        let live = self.shared.link.live(self.patience()).await?;
        let limit = self.attempt_limit::<methods::Logout>(&request);
        self.exchange::<methods::Logout>(&live, payload, limit).await.map(drop)
    }

    /// Replaces the connection by a new one, if possible. Calls in progress end on the old one.
    pub(crate) async fn renew(&self) -> Renewed {
        self.shared.link.renew().await
    }

    /// Returns the health of the server. Needs no session.
    pub async fn health(&self) -> Result<v1::HealthResponse, CallError> {
        self.call::<methods::Health>(v1::HealthRequest {}).await
    }

    /// Subscribes to the server's events, until the connection is lost. Returns `None` if the
    /// server does not have the method.
    ///
    /// Events are hints: one may arrive without a cause, or be lost.
    pub async fn subscribe(
        &self,
    ) -> Result<Option<impl Stream<Item = ServerEvent> + Send + Unpin + use<>>, CallError> {
        let live = self.shared.link.with_events(self.patience()).await?;
        let request = v1::SubscribeRequest { all_channels: true, ..Default::default() };
        let payload =
            call::encode::<methods::Subscribe>(&request, self.shared.token.read().as_ref())?;
        let events = live.connection().events();
        let limit = self.attempt_limit::<methods::Subscribe>(&request);
        match self.exchange::<methods::Subscribe>(&live, payload, limit).await {
            Ok(_) => {}
            Err(CallError::Server(error)) if error.status == Status::UnknownMethod => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        }
        let decoded = events
            .take_while(|event| std::future::ready(event.is_ok()))
            .filter_map(|event| std::future::ready(event.ok()))
            .filter_map(|(event_type, payload)| {
                std::future::ready(ServerEvent::decode(event_type, payload).ok().flatten())
            });
        Ok(Some(Box::pin(decoded)))
    }

    fn patience(&self) -> Instant {
        Instant::now() + self.shared.options.patience
    }

    /// Waits before another attempt; returns whether there is time for one.
    async fn pause(&self, error: &CallError, failures: u32, until: Instant) -> bool {
        let asked = error.server().and_then(|error| error.retry_after);
        // There is no own pause after the first lost connection: the link waits before it
        // reconnects.
        let own = match error {
            CallError::Lost { .. } if failures == 1 => Duration::ZERO,
            _ => self.shared.options.backoff.delay(failures, OsRng.next_u64()),
        };
        let pause = asked.unwrap_or_default() + own;
        if Instant::now() + pause >= until {
            return false;
        }
        sleep(pause).await;
        true
    }
}

impl Client {
    /// Calls a method once, on one connection.
    ///
    /// A connection that does not answer is not used again, since it may be lost without a notice.
    async fn exchange<M: Method>(
        &self,
        live: &Arc<Live>,
        payload: Bytes,
        limit: Duration,
    ) -> Result<M::Response, CallError> {
        let method = M::INFO.name;
        match live.exchange(M::INFO.id, payload, limit).await {
            Ok((status, payload)) => call::decode::<M>(status, payload),
            Err(Failure::TimedOut) => {
                self.shared.link.retire(live).await;
                Err(CallError::TimedOut { method })
            }
            Err(Failure::Lost) => Err(CallError::Lost { method }),
            Err(Failure::Malformed) => Err(CallError::Malformed { method }),
        }
    }

    /// Returns the time limit of one attempt. That of an ordinary call leaves time for a second
    /// attempt within the client's patience.
    fn attempt_limit<M: Method>(&self, request: &M::Request) -> Duration {
        let limit = call::time_limit::<M>(request);
        match M::INFO.deadline {
            DeadlineClass::Wait | DeadlineClass::Blob => limit,
            DeadlineClass::Health | DeadlineClass::Standard => {
                limit.min(self.shared.options.patience / 2)
            }
        }
    }

    async fn log_in_on(
        &self,
        live: &Arc<Live>,
        username: &Username,
        password: &Password,
    ) -> Result<Session, AuthError> {
        let (state, request) = Login::start(password);
        let start =
            v1::OpaqueLoginStartRequest { username: username.to_string(), request: request.into() };
        let answer = self.once::<methods::OpaqueLoginStart>(live, &start).await?;
        let typed = password.clone();
        let (finalization, export_key) = blocking(move || state.finish(&typed, &answer.response))
            .await
            .map_err(|error| match error {
                OpaqueError::WrongPassword => AuthError::WrongPassword,
                OpaqueError::Malformed => malformed::<methods::OpaqueLoginStart>(),
            })?;
        let finish = v1::OpaqueLoginFinishRequest {
            username: username.to_string(),
            finalization: finalization.into(),
            device_id: self.device_field(),
            ..Default::default()
        };
        let answer = self.once::<methods::OpaqueLoginFinish>(live, &finish).await?;
        let token = SessionToken::try_from(&answer.session_token[..])
            .map_err(|_| malformed::<methods::OpaqueLoginFinish>())?;
        let expires_at = (answer.expires_at > 0).then_some(UnixMillis(answer.expires_at));
        Ok(Session { token, expires_at, export_key, password: password.clone() })
    }

    fn device_field(&self) -> Bytes {
        let device = *self.shared.device.read();
        device.map(|device| Bytes::copy_from_slice(device.as_bytes())).unwrap_or_default()
    }

    /// Calls a method without session once, on one connection.
    async fn once<M: Method>(
        &self,
        live: &Arc<Live>,
        request: &M::Request,
    ) -> Result<M::Response, AuthError> {
        let payload = call::encode::<M>(request, None)?;
        self.exchange::<M>(live, payload, self.attempt_limit::<M>(request))
            .await
            .map_err(AuthError::from_call)
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("options", &self.shared.options).finish_non_exhaustive()
    }
}

fn may_retry(error: &CallError, repeat: Repeat) -> bool {
    match (error, repeat) {
        // These two statuses mean that the call had no effect.
        (CallError::Server(error), Repeat::Unsafe) => {
            matches!(error.status, Status::RateLimited | Status::Unavailable)
        }
        (_, Repeat::Unsafe) => false,
        (error, Repeat::Safe) => error.is_temporary(),
    }
}

fn malformed<M: Method>() -> AuthError {
    CallError::Malformed { method: M::INFO.name }.into()
}

/// Runs work that occupies a core for tens of milliseconds on a thread where it blocks no other
/// task.
pub(crate) async fn blocking<R: Send + 'static>(work: impl FnOnce() -> R + Send + 'static) -> R {
    match spawn_blocking(work).await.map_err(JoinError::try_into_panic) {
        Ok(result) => result,
        Err(Ok(panic)) => std::panic::resume_unwind(panic),
        // The runtime is shutting down, and this future with it.
        Err(Err(_)) => std::future::pending().await,
    }
}
