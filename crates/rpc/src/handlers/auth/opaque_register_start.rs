//! OpaqueRegisterStart (100).

use qpq_domain::Username;
use qpq_proto::{
    LimitClass,
    methods::OpaqueRegisterStart,
    v1::{OpaqueRegisterStartRequest, OpaqueRegisterStartResponse},
};

use super::{check_new, exact, refused, username};
use crate::{Cx, Error, Handled, Handler, Subject, opaque};

impl Handler for OpaqueRegisterStart {
    /// Reads no other account than the one of the connection's session: a taken username has the
    /// same response.
    async fn handle(cx: Cx<'_>, (): (), request: OpaqueRegisterStartRequest) -> Handled<Self> {
        exact(&request.request, opaque::len::REGISTRATION_REQUEST, "request")?;
        let username = username(&request.username)?;
        if !is_own(cx, &username).await? {
            check_new(cx, &username)?;
            cx.limit(LimitClass::Register, Subject::Username(&username)).await?;
        }
        let work = || cx.app.opaque.start_registration(&username, &request.request);
        let response = cx.app.opaque_limiter.run(work).await?.map_err(refused("request"))?;
        cx.conn.start_registration(username, cx.now);
        Ok(OpaqueRegisterStartResponse { response: response.into() }.into())
    }
}

/// Returns whether the account of the connection's session has this username. Its owner changes the
/// password. The name may be one that new accounts cannot have, and the calls of others with this
/// name must not prevent the change.
async fn is_own(cx: Cx<'_>, username: &Username) -> Result<bool, Error> {
    let Some(token) = cx.conn.session() else { return Ok(false) };
    let Some(session) = cx.app.stores.sessions.find(&token).await? else { return Ok(false) };
    let account = cx.app.stores.accounts.by_identity(&session.identity).await?;
    Ok(account.is_some_and(|account| account.username == *username))
}
