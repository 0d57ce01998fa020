//! FetchWait (202): reads like Fetch, and waits for a message if there is none.

use qpq_ports::{PageLimit, ReadQuery};
use qpq_proto::{methods, v1};
use tokio::time::{Instant, sleep_until};

use super::{
    page,
    read::{Leased, Target, lease, owe},
};
use crate::{
    Caller, Cx, Error, Handled, Handler, Response,
    account_events::AccountEvent,
    auth,
    dispatch::requested_wait,
    waiters::{Turn, Unread},
};

impl Handler for methods::FetchWait {
    // Not an `async fn`: its future would contain the request and the caller twice during the wait.
    fn handle(
        cx: Cx<'_>,
        caller: Caller,
        request: v1::FetchWaitRequest,
    ) -> impl Future<Output = Handled<Self>> + Send {
        let query = Target {
            recipient_key: &request.recipient_key,
            device_id: &request.device_id,
            channel_id: &request.channel_id,
            all_channels: request.all_channels,
        }
        .query(&caller);
        let limit = page::limit(request.limit);
        let deadline = Instant::now() + requested_wait::<Self>(cx.app, &request);
        async move {
            let query = query?;
            let Some((lease, memory)) = wait(cx, &caller, &query, limit, deadline).await? else {
                let store_id = page::store_id(&cx.app.stores.maintenance.store_id());
                return Ok(v1::FetchWaitResponse { store_id, ..Default::default() }.into());
            };
            owe(cx, &caller, page::cost(lease.page()));
            let response = v1::FetchWaitResponse {
                payloads: page::envelopes(lease.page()),
                more: lease.page().more,
                store_id: page::store_id(&lease.page().store_id),
            };
            Ok(Response::with_lease(response, lease, memory))
        }
    }
}

/// Leases the messages of the view, or the first ones that arrive. `None` if none arrives by the
/// deadline, the server drains, or later waiting calls of the reader displace this one.
///
/// Each reason to end the wait is subscribed to before the corresponding state is read, so none is
/// missed. While it waits, the call occupies little more memory than these variables.
async fn wait(
    cx: Cx<'_>,
    caller: &Caller,
    query: &ReadQuery,
    limit: PageLimit,
    deadline: Instant,
) -> Result<Option<Leased>, Error> {
    let mut waiter = cx.app.waiters.join(&*cx.app.stores.wakes, query);
    if let Some(leased) = lease(cx, caller, *query, limit).await? {
        return Ok(Some(leased));
    }
    let mut account_events = cx.app.account_events.listen(&caller.identity);
    // Covers a revocation between the first check of the session and `listen`.
    auth::recheck(cx, caller).await?;
    let drain = cx.app.observe_drain();
    loop {
        tokio::select! {
            biased;
            () = drain.began() => return Ok(None),
            event = account_events.next() => match event {
                AccountEvent::SessionsEnded => {
                    auth::recheck(cx, caller).await?;
                    continue;
                }
                AccountEvent::KeyPackageTaken => continue,
                // The caller may need another device now to read the inbox. The next read checks
                // that.
                AccountEvent::DevicesChanged => {}
            },
            turn = waiter.next() => {
                if turn == Turn::Displaced {
                    return Ok(None);
                }
            }
            () = sleep_until(deadline) => return Ok(None),
        }
        let leased = lease(cx, caller, *query, limit).await?;
        let more = leased.as_ref().is_some_and(|(lease, _)| lease.page().more);
        waiter.has_read(if more { Unread::More } else { Unread::Nothing });
        if leased.is_some() {
            return Ok(leased);
        }
    }
}
