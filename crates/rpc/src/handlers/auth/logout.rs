//! Logout (104).

use std::sync::Arc;

use qpq_proto::{
    methods::Logout,
    v1::{LogoutRequest, LogoutResponse},
};

use crate::{Caller, Cx, Error, Handled, Handler, account_events::AccountEvent};

impl Handler for Logout {
    async fn handle(cx: Cx<'_>, caller: Caller, request: LogoutRequest) -> Handled<Self> {
        let (app, all) = (Arc::clone(cx.app), request.all_sessions);
        // A task, because a client that cancels the call after the commit must not prevent the
        // account event, which ends its waiting calls.
        let revocation = cx.app.tasks.spawn(async move {
            let sessions = &app.stores.sessions;
            let revoked = if all {
                sessions.revoke_all(caller.account).await
            } else {
                sessions.revoke(&caller.token).await
            };
            app.account_events.publish(&caller.identity, AccountEvent::SessionsEnded);
            revoked
        });
        let revoked = revocation.await.map_err(Error::internal)??;
        cx.conn.unbind(&caller.token);
        Ok(LogoutResponse { revoked }.into())
    }
}
