//! DeleteAccount (950).

use std::sync::Arc;

use qpq_ports::Deletion;
use qpq_proto::{methods, v1};

use crate::{Cx, Error, FreshCaller, Handled, Handler, account_events::AccountEvent};

impl Handler for methods::DeleteAccount {
    /// The account is unusable when the call is answered. A job erases its data.
    ///
    /// A repeat whose first call succeeded has no session, and is refused like any call of an ended
    /// session.
    async fn handle(cx: Cx<'_>, caller: FreshCaller, _: v1::DeleteAccountRequest) -> Handled<Self> {
        let (app, now, deleter) = (Arc::clone(cx.app), cx.now, caller.caller().clone());
        // A task, because a client that cancels the call after the commit must not prevent the
        // account event, which ends the waiting calls of the account.
        let deletion = cx.app.tasks.spawn(async move {
            let deleted = app.stores.accounts.delete(deleter.account, now).await;
            app.account_events.publish(&deleter.identity, AccountEvent::SessionsEnded);
            if deleted.is_ok() && app.stores.endpoints.remove(&deleter.identity).await.is_err() {
                tracing::debug!("endpoint of a deleted account not removed, it expires");
            }
            deleted
        });
        match deletion.await.map_err(Error::internal)?? {
            // A concurrent call has deleted the account.
            Deletion::Deleted(_) | Deletion::NotFound => {}
        }
        cx.conn.unbind(&caller.caller().token);
        Ok(v1::DeleteAccountResponse { success: true }.into())
    }
}
