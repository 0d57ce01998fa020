//! OpaqueLoginFinish (103).

use qpq_domain::{SessionToken, TokenHash, Username};
use qpq_ports::{Credentials, NewSession, Session, SessionCreation};
use qpq_proto::{
    convert,
    methods::OpaqueLoginFinish,
    v1::{OpaqueLoginFinishRequest, OpaqueLoginFinishResponse},
};
use rand::{RngCore as _, rngs::OsRng};
use subtle::ConstantTimeEq as _;

use super::{exact, refused, username};
use crate::{Cx, Error, Handled, Handler, limits, opaque};

impl Handler for OpaqueLoginFinish {
    /// Consumes no budget of the username: each guess needs an OpaqueLoginStart, which consumes it.
    /// A client that has started a login can finish it even if others have exhausted that budget.
    ///
    /// The session is bound to the account's own key and to the device in the request. The device
    /// need not be registered yet, as its registration needs a session. The device gives the
    /// session no additional right. Requests without `device_id` read as that device, and reads
    /// check that it is registered.
    async fn handle(cx: Cx<'_>, (): (), request: OpaqueLoginFinishRequest) -> Handled<Self> {
        exact(&request.finalization, opaque::len::KE3, "finalization")?;
        let username = username(&request.username)?;
        let claimed = convert::optional_identity_key(&request.identity_key, "identity_key")?;
        let device = convert::device_id(&request.device_id, "device_id")?;
        let login = cx.conn.take_login(&username, cx.now).ok_or(Error::LoginFailed)?;
        login.opaque.finish(&request.finalization).map_err(refused("finalization"))?;
        let credentials = login.credentials.ok_or(Error::LoginFailed)?;
        let Credentials { account, identity, .. } = credentials;
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
        let created =
            cx.app.stores.sessions.create(NewSession { token: token.hash(), session }).await?;
        if created == SessionCreation::Created {
            end_if_password_changed(cx, &username, &credentials, token.hash()).await?;
        }
        // The password is right, so the next login from here consumes no budget of the username.
        limits::remember_login(cx, &username).await;
        match created {
            SessionCreation::Created => {}
            // The account was deleted after OpaqueLoginStart.
            SessionCreation::NoAccount => return Err(Error::LoginFailed),
            SessionCreation::Banned => return Err(Error::Banned),
        }
        cx.app.tokens.found(token.hash());
        cx.conn.bind(token.hash());
        Ok(OpaqueLoginFinishResponse {
            session_token: token.expose().to_vec().into(),
            expires_at: expires_at.0,
        }
        .into())
    }
}

/// Ends the new session and fails if the password was changed after the login had started. A change
/// that follows this check ends the session itself.
async fn end_if_password_changed(
    cx: Cx<'_>,
    username: &Username,
    started_with: &Credentials,
    token: TokenHash,
) -> Result<(), Error> {
    let current = cx.app.stores.accounts.credentials(username).await?;
    if current.is_some_and(|current| current.opaque_record == started_with.opaque_record) {
        return Ok(());
    }
    cx.app.stores.sessions.revoke(&token).await?;
    Err(Error::LoginFailed)
}

fn new_token() -> Result<SessionToken, Error> {
    let mut bytes = zeroize::Zeroizing::new([0; SessionToken::LEN]);
    OsRng.try_fill_bytes(bytes.as_mut()).map_err(Error::internal)?;
    Ok(SessionToken::new(*bytes))
}
