//! OpaqueRegisterStart (100).

use qpq_proto::{
    LimitClass,
    methods::OpaqueRegisterStart,
    v1::{OpaqueRegisterStartRequest, OpaqueRegisterStartResponse},
};

use super::{exact, new_username, refused};
use crate::{Cx, Handled, Handler, Subject, opaque};

impl Handler for OpaqueRegisterStart {
    /// Reads no account: a taken username has the same response.
    async fn handle(cx: Cx<'_>, (): (), request: OpaqueRegisterStartRequest) -> Handled<Self> {
        exact(&request.request, opaque::len::REGISTRATION_REQUEST, "request")?;
        let username = new_username(cx, &request.username)?;
        cx.limit(LimitClass::Register, Subject::Username(&username)).await?;
        let work = || cx.app.opaque.start_registration(&username, &request.request);
        let response = cx.app.opaque_limiter.run(work).await?.map_err(refused("request"))?;
        Ok(OpaqueRegisterStartResponse { response: response.into() }.into())
    }
}
