//! UnbanUser (422).

use qpq_ports::Unban;
use qpq_proto::{convert, methods, v1};

use crate::{Cx, Handled, Handler, ModeratingCaller};

impl Handler for methods::UnbanUser {
    /// Succeeds for an account that is not banned, so that the call can be repeated.
    async fn handle(
        cx: Cx<'_>,
        caller: ModeratingCaller,
        request: v1::UnbanUserRequest,
    ) -> Handled<Self> {
        let subject = convert::identity_key(&request.identity_key, "identity_key")?;
        let (scope, moderator) = (caller.scope(), caller.moderator());
        cx.app.stores.bans.unban(Unban { scope, subject, moderator, now: cx.now }).await??;
        Ok(v1::UnbanUserResponse { success: true }.into())
    }
}
