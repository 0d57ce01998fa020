//! ChangePassword (105).

use std::sync::Arc;

use qpq_ports::{Account, PasswordChange, PasswordChanged};
use qpq_proto::{
    methods::ChangePassword,
    v1::{ChangePasswordRequest, ChangePasswordResponse},
};
use subtle::ConstantTimeEq as _;

use super::{exact, refused};
use crate::{Cx, Error, FreshCaller, Handled, Handler, account_events::AccountEvent, opaque};

impl Handler for ChangePassword {
    /// Replaces the record if an OpaqueRegisterStart for the caller's own username precedes on this
    /// connection. Without it, a repeat of the last change is answered Ok, so that a client whose
    /// answer was lost can confirm the change with the same upload.
    async fn handle(
        cx: Cx<'_>,
        caller: FreshCaller,
        request: ChangePasswordRequest,
    ) -> Handled<Self> {
        exact(&request.upload, opaque::len::RECORD, "upload")?;
        let opaque_record =
            cx.app.opaque.finish_registration(&request.upload).map_err(refused("upload"))?;
        let caller = caller.caller().clone();
        let account = cx.app.stores.accounts.by_identity(&caller.identity).await?;
        let Account { username, .. } = account.ok_or(Error::SessionExpired)?;
        if !cx.conn.take_registration(&username, cx.now) {
            let stored = cx.app.stores.accounts.credentials(&username).await?;
            let is_repeat =
                stored.is_some_and(|stored| stored.opaque_record.ct_eq(&opaque_record).into());
            return match is_repeat {
                true => Ok(ChangePasswordResponse { revoked: 0 }.into()),
                false => Err(Error::RegistrationNotStarted),
            };
        }

        let change =
            PasswordChange { account: caller.account, session: caller.token, opaque_record };
        let app = Arc::clone(cx.app);
        // A task, because a client that cancels the call after the commit must not prevent the
        // account event, which ends the waiting calls of the other sessions.
        let changing = cx.app.tasks.spawn(async move {
            let changed = app.stores.accounts.change_password(change).await;
            app.account_events.publish(&caller.identity, AccountEvent::SessionsEnded);
            changed
        });
        match changing.await.map_err(Error::internal)?? {
            PasswordChanged::Changed { ended_sessions } => {
                Ok(ChangePasswordResponse { revoked: ended_sessions }.into())
            }
            PasswordChanged::SessionEnded => Err(Error::SessionExpired),
        }
    }
}
