//! Registration, login and logout (100 to 104): OPAQUE on the outside, sessions on the inside.
//!
//! What a login answers depends on nothing that tells whether the user exists: both starts look
//! alike in content and in work done, a finish without a right password is one refusal, and budgets
//! are kept by the name as typed.

use std::sync::Arc;

use qpq_domain::{IdentityKey, SessionToken, Username};
use qpq_ports::{Credentials, NewAccount, NewSession, Registration, Session};
use qpq_proto::{
    LimitClass, convert,
    methods::{
        Logout, OpaqueLoginFinish, OpaqueLoginStart, OpaqueRegisterFinish, OpaqueRegisterStart,
    },
    v1::{
        LogoutRequest, LogoutResponse, OpaqueLoginFinishRequest, OpaqueLoginFinishResponse,
        OpaqueLoginStartRequest, OpaqueLoginStartResponse, OpaqueRegisterFinishRequest,
        OpaqueRegisterFinishResponse, OpaqueRegisterStartRequest, OpaqueRegisterStartResponse,
    },
};
use rand::{RngCore as _, rngs::OsRng};
use subtle::ConstantTimeEq as _;

use crate::{
    Answered, Caller, Cx, Error, Handler, IdentityProof, Subject, account_events::AccountEvent,
    connection::UnfinishedLogin, limits, opaque, opaque::OpaqueError,
};

impl Handler for OpaqueRegisterStart {
    /// Looks at no account: the answer is the same for a name that is taken.
    async fn handle(
        cx: Cx<'_>,
        (): (),
        request: OpaqueRegisterStartRequest,
    ) -> Result<Answered<OpaqueRegisterStartResponse>, Error> {
        exact(&request.request, opaque::len::REGISTRATION_REQUEST, "request")?;
        let username = new_username(cx, &request.username)?;
        cx.limit(LimitClass::Register, Subject::Username(&username)).await?;
        let work = || cx.app.opaque.start_registration(&username, &request.request);
        let response = cx.app.gate.run(work).await?.map_err(refused("request"))?;
        Ok(OpaqueRegisterStartResponse { response: response.into() }.into())
    }
}

impl Handler for OpaqueRegisterFinish {
    async fn handle(
        cx: Cx<'_>,
        (): (),
        request: OpaqueRegisterFinishRequest,
    ) -> Result<Answered<OpaqueRegisterFinishResponse>, Error> {
        exact(&request.upload, opaque::len::RECORD, "upload")?;
        let username = new_username(cx, &request.username)?;
        cx.limit(LimitClass::Register, Subject::Username(&username)).await?;
        let identity = enrollable(&request.identity_key)?;
        check_proof(cx, &identity, &username, &request)?;
        let opaque_record =
            cx.app.opaque.finish_registration(&request.upload).map_err(refused("upload"))?;
        let account = NewAccount { username, identity, opaque_record, now: cx.now };
        match cx.app.stores.accounts.register(account).await? {
            Registration::Registered(_) | Registration::Repeated(_) => {
                Ok(OpaqueRegisterFinishResponse { success: true }.into())
            }
            Registration::UsernameTaken => Err(Error::UsernameTaken),
            Registration::IdentityTaken => Err(Error::IdentityTaken),
        }
    }
}

impl Handler for OpaqueLoginStart {
    /// One look-up, one record parsed and one 3DH done, for a user that exists and for one that
    /// does not.
    async fn handle(
        cx: Cx<'_>,
        (): (),
        request: OpaqueLoginStartRequest,
    ) -> Result<Answered<OpaqueLoginStartResponse>, Error> {
        exact(&request.request, opaque::len::KE1, "request")?;
        let username = username(&request.username)?;
        limits::take_login(cx, &username).await?;
        let credentials = cx.app.stores.accounts.credentials(&username).await?;
        let record = credentials.as_ref().map(|known| known.opaque_record.as_slice());
        let work = || cx.app.opaque.start_login(&mut OsRng, &username, record, &request.request);
        let (response, pending) = cx.app.gate.run(work).await?.map_err(refused("request"))?;
        let account = credentials.map(|Credentials { account, identity, .. }| (account, identity));
        cx.conn.start_login(username, UnfinishedLogin { opaque: pending, account }, cx.now);
        Ok(OpaqueLoginStartResponse { response: response.into() }.into())
    }
}

impl Handler for OpaqueLoginFinish {
    /// Counted by address alone: guesses are bounded by the starts, which are counted by name, and
    /// who has started must be able to finish whatever others do to the name's budget.
    ///
    /// The session is bound to the account's own key and to the device that the client names. The
    /// device need not be registered yet (registering one takes a session): the name gives no right
    /// that the session has not, it only says whose position a read that names no device is meant
    /// to move, and reads check it.
    async fn handle(
        cx: Cx<'_>,
        (): (),
        request: OpaqueLoginFinishRequest,
    ) -> Result<Answered<OpaqueLoginFinishResponse>, Error> {
        exact(&request.finalization, opaque::len::KE3, "finalization")?;
        let username = username(&request.username)?;
        let claimed = convert::optional_identity_key(&request.identity_key, "identity_key")?;
        let device = convert::device_id(&request.device_id, "device_id")?;
        let login = cx.conn.take_login(&username, cx.now).ok_or(Error::LoginFailed)?;
        login.opaque.finish(&request.finalization).map_err(refused("finalization"))?;
        let (account, identity) = login.account.ok_or(Error::LoginFailed)?;
        if claimed.is_some_and(|claimed| !bool::from(claimed.as_bytes().ct_eq(identity.as_bytes())))
        {
            return Err(Error::LoginFailed);
        }

        let token = new_token()?;
        let expires_at = cx.app.config.sessions.expires_at(cx.now, cx.now);
        let session = Session {
            account,
            identity,
            device,
            authenticated_at: cx.now,
            last_used_at: cx.now,
            expires_at,
        };
        cx.app.stores.sessions.create(NewSession { token: token.hash(), session }).await?;
        limits::remember_login(cx, &username).await;
        cx.app.tokens.found(token.hash());
        cx.conn.bind(token.hash());
        Ok(OpaqueLoginFinishResponse {
            session_token: token.expose().to_vec().into(),
            expires_at: expires_at.0,
        }
        .into())
    }
}

impl Handler for Logout {
    async fn handle(
        cx: Cx<'_>,
        caller: Caller,
        request: LogoutRequest,
    ) -> Result<Answered<LogoutResponse>, Error> {
        let (app, all) = (Arc::clone(cx.app), request.all_sessions);
        // In a task: a client that resets the call between the commit and the notice must not keep
        // its waits alive.
        let ended = tokio::spawn(async move {
            let sessions = &app.stores.sessions;
            let revoked = if all {
                sessions.revoke_all(caller.account).await
            } else {
                sessions.revoke(&caller.token).await
            };
            app.account_events.publish(&caller.identity, AccountEvent::SessionsEnded);
            revoked
        });
        let revoked = ended.await.map_err(Error::internal)??;
        cx.conn.unbind(&caller.token);
        Ok(LogoutResponse { revoked }.into())
    }
}

fn username(raw: &str) -> Result<Username, Error> {
    Username::parse(raw).map_err(|_| Error::InvalidUsername)
}

/// The name of an account that is to be registered. Older accounts may have names that this
/// refuses.
fn new_username(cx: Cx<'_>, raw: &str) -> Result<Username, Error> {
    let username = username(raw)?;
    username.check_new(cx.app.config.username_scripts).map_err(|_| Error::InvalidUsername)?;
    Ok(username)
}

fn exact(bytes: &[u8], len: usize, field: &'static str) -> Result<(), Error> {
    if bytes.len() == len { Ok(()) } else { Err(Error::MalformedOpaque(field)) }
}

/// What a failure of OPAQUE means to the client that sent `field`.
fn refused(field: &'static str) -> impl Fn(OpaqueError) -> Error {
    move |error| match error {
        OpaqueError::Malformed => Error::MalformedOpaque(field),
        OpaqueError::WrongPassword => Error::LoginFailed,
        OpaqueError::CorruptRecord => Error::internal(error),
    }
}

fn enrollable(bytes: &[u8]) -> Result<IdentityKey, Error> {
    let key = IdentityKey::try_from(bytes).map_err(|_| Error::InvalidIdentityKey)?;
    key.check_enrollable().map_err(|_| Error::InvalidIdentityKey)?;
    Ok(key)
}

/// A proof that is there is checked, whether or not one is required.
fn check_proof(
    cx: Cx<'_>,
    identity: &IdentityKey,
    username: &Username,
    request: &OpaqueRegisterFinishRequest,
) -> Result<(), Error> {
    if request.identity_proof.is_empty() {
        return match cx.app.config.identity_proof {
            IdentityProof::Optional => Ok(()),
            IdentityProof::Required => Err(Error::IdentityProofRequired),
        };
    }
    let signature: &[u8; 64] =
        request.identity_proof.as_ref().try_into().map_err(|_| Error::InvalidIdentityProof)?;
    let message = IdentityKey::registration_message(username, &request.upload);
    identity.verify(&message, signature).map_err(|_| Error::InvalidIdentityProof)
}

fn new_token() -> Result<SessionToken, Error> {
    let mut bytes = zeroize::Zeroizing::new([0; SessionToken::LEN]);
    OsRng.try_fill_bytes(bytes.as_mut()).map_err(Error::internal)?;
    Ok(SessionToken::new(*bytes))
}
