//! OpaqueLoginStart (102).

use qpq_proto::{
    methods::OpaqueLoginStart,
    v1::{OpaqueLoginStartRequest, OpaqueLoginStartResponse},
};
use rand::rngs::OsRng;

use super::{exact, refused, username};
use crate::{Cx, Handled, Handler, connection::UnfinishedLogin, limits, opaque};

impl Handler for OpaqueLoginStart {
    /// Performs one look-up, parses one record and computes one 3DH, whether or not the account
    /// exists.
    async fn handle(cx: Cx<'_>, (): (), request: OpaqueLoginStartRequest) -> Handled<Self> {
        exact(&request.request, opaque::len::KE1, "request")?;
        let username = username(&request.username)?;
        limits::take_login(cx, &username).await?;
        let credentials = cx.app.stores.accounts.credentials(&username).await?;
        let record = credentials.as_ref().map(|known| known.opaque_record.as_slice());
        let work = || cx.app.opaque.start_login(&mut OsRng, &username, record, &request.request);
        let (response, pending) =
            cx.app.opaque_limiter.run(work).await?.map_err(refused("request"))?;
        cx.conn.start_login(username, UnfinishedLogin { opaque: pending, credentials }, cx.now);
        Ok(OpaqueLoginStartResponse { response: response.into() }.into())
    }
}
