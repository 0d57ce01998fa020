//! BanUser (421).

use std::{sync::Arc, time::Duration};

use qpq_domain::MAX_BAN_REASON;
use qpq_ports::{BanScope, NewBan};
use qpq_proto::{convert, methods, v1};

use crate::{
    Cx, Error, Handled, Handler, ModeratingCaller, account_events::AccountEvent, auth::is_admin,
};

impl Handler for methods::BanUser {
    async fn handle(
        cx: Cx<'_>,
        caller: ModeratingCaller,
        request: v1::BanUserRequest,
    ) -> Handled<Self> {
        let subject = convert::identity_key(&request.identity_key, "identity_key")?;
        convert::no_longer_than(&request.reason, MAX_BAN_REASON, "reason")?;
        let ban = NewBan {
            scope: caller.scope(),
            subject,
            moderator: caller.moderator(),
            reason: request.reason,
            duration: (request.duration_secs > 0)
                .then(|| Duration::from_secs(request.duration_secs)),
            now: cx.now,
        };
        let is_of_server = ban.scope == BanScope::Server;
        // Otherwise one administrator whose device was stolen could shut out all others.
        if is_of_server && subject != ban.moderator.identity && is_admin(cx, &subject).await? {
            return Err(Error::BanOfAdmin);
        }
        let app = Arc::clone(cx.app);
        // A task, because a client that cancels the call after the commit must not prevent the
        // account event, which ends the waiting calls of the banned account.
        let banning = cx.app.tasks.spawn(async move {
            let banned = app.stores.bans.ban(ban).await;
            if is_of_server {
                app.account_events.publish(&subject, AccountEvent::SessionsEnded);
            }
            banned
        });
        banning.await.map_err(Error::internal)???;
        Ok(v1::BanUserResponse { success: true }.into())
    }
}
