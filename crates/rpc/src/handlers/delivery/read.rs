//! Reading: destructively (201 Fetch, 202 FetchWait), without trace (203 Peek), and removing what
//! was read (204 Ack).

use std::time::Duration;

use qpq_domain::{DeviceId, IdentityKey, Seq};
use qpq_ports::{Ack, Lease, PageLimit, ReadQuery, Reader, View};
use qpq_proto::{LimitClass, convert, methods, v1};
use tokio::time::{Instant, sleep_until};

use super::page;
use crate::{
    Answered, App, Caller, Cx, Error, Handler,
    account_events::AccountEvent,
    answers::Reservation,
    app::drain_began,
    auth,
    waiters::{Left, Turn},
};

/// The most seqs that one Ack names: as many as an inbox holds by default.
const MAX_ACK_SEQS: usize = 10_000;

impl Handler for methods::Fetch {
    async fn handle(
        cx: Cx<'_>,
        caller: Caller,
        request: v1::FetchRequest,
    ) -> Result<Answered<v1::FetchResponse>, Error> {
        let scope = Scope { all_channels: request.all_channels, channel_id: &request.channel_id };
        let read = own(&caller, &request.recipient_key, scope, &request.device_id)?;
        let limit = page::limit(request.limit);
        let Some((lease, memory)) = lease(cx, &caller, read, limit).await? else {
            let store_id = page::store_id(&cx.app.stores.maintenance.store_id());
            return Ok(v1::FetchResponse { store_id, ..Default::default() }.into());
        };
        owe(cx, &caller, page::cost(lease.page()));
        let response = v1::FetchResponse {
            payloads: page::envelopes(lease.page()),
            more: lease.page().more,
            store_id: page::store_id(&lease.page().store_id),
        };
        Ok(Answered::with_lease(response, lease, memory))
    }
}

impl Handler for methods::FetchWait {
    // No `async fn`: what the future keeps while it waits is a few words, not the request and the
    // caller twice.
    fn handle(
        cx: Cx<'_>,
        caller: Caller,
        request: v1::FetchWaitRequest,
    ) -> impl Future<Output = Result<Answered<v1::FetchWaitResponse>, Error>> + Send {
        let scope = Scope { all_channels: request.all_channels, channel_id: &request.channel_id };
        let read = own(&caller, &request.recipient_key, scope, &request.device_id);
        let limit = page::limit(request.limit);
        let deadline = Instant::now() + Self::wait(cx.app, &request);
        async move {
            let read = read?;
            let Some((lease, memory)) = wait(cx, &caller, &read, limit, deadline).await? else {
                let store_id = page::store_id(&cx.app.stores.maintenance.store_id());
                return Ok(v1::FetchWaitResponse { store_id, ..Default::default() }.into());
            };
            owe(cx, &caller, page::cost(lease.page()));
            let response = v1::FetchWaitResponse {
                payloads: page::envelopes(lease.page()),
                more: lease.page().more,
                store_id: page::store_id(&lease.page().store_id),
            };
            Ok(Answered::with_lease(response, lease, memory))
        }
    }

    fn wait(app: &App, request: &v1::FetchWaitRequest) -> Duration {
        app.config.delivery.wait(request.timeout_ms)
    }
}

impl Handler for methods::Peek {
    async fn handle(
        cx: Cx<'_>,
        caller: Caller,
        request: v1::PeekRequest,
    ) -> Result<Answered<v1::PeekResponse>, Error> {
        let scope = Scope { all_channels: request.all_channels, channel_id: &request.channel_id };
        let read = own(&caller, &request.recipient_key, scope, &request.device_id)?;
        let wanted = page::limit(request.limit);
        let after = Seq(request.after_seq);
        let mut room = page::room(cx, &caller, wanted).await?;
        let mut page = cx.app.stores.inboxes.peek(read, after, room.limit, cx.now).await?;
        while !room.fits(&page) {
            drop((page, room));
            room = page::full_room(cx, &caller, wanted).await?;
            page = cx.app.stores.inboxes.peek(read, after, room.limit, cx.now).await?;
        }
        if !page.envelopes.is_empty() {
            cx.conn.shows(page.store_id);
        }
        owe(cx, &caller, page::cost(&page));
        let response = v1::PeekResponse {
            payloads: page::envelopes(&page),
            more: page.more,
            store_id: page::store_id(&page.store_id),
        };
        Ok(Answered { response, lease: None, memory: Some(room.memory) })
    }
}

impl Handler for methods::Ack {
    async fn handle(
        cx: Cx<'_>,
        caller: Caller,
        request: v1::AckRequest,
    ) -> Result<Answered<v1::AckResponse>, Error> {
        let scope = Scope { all_channels: request.all_channels, channel_id: &request.channel_id };
        let read = own(&caller, &request.recipient_key, scope, &request.device_id)?;
        convert::at_most(request.seqs.len(), MAX_ACK_SEQS, "seqs")?;
        let up_to = Some(Seq(request.seq_up_to)).filter(|seq| *seq > Seq::ZERO);
        let seqs = request.seqs.iter().copied().map(Seq).collect();
        // What was shown in another history may be other messages now. Acknowledging it removes
        // nothing, once: the client may have read the present history on another connection.
        let store_id = cx.conn.shown_in();
        let ack = Ack { up_to, seqs, store_id };
        // An ack of nothing removes nothing: an answer to a client whose page was empty.
        let removed = if ack.is_empty() {
            0
        } else {
            let named = ack.seqs.len();
            let removed = cx.app.stores.inboxes.ack(read, ack, cx.now).await?;
            owe(cx, &caller, page::calls(named.max(removed as usize)));
            removed
        };
        if let Some(shown_in) = store_id
            && shown_in != cx.app.stores.maintenance.store_id()
        {
            cx.conn.forget_shown(shown_in);
        }
        Ok(v1::AckResponse { removed }.into())
    }
}

/// Has the caller's next call pay for what this one costs beyond itself.
fn owe(cx: Cx<'_>, caller: &Caller, cost: u32) {
    cx.app.owed.add(LimitClass::Receive, caller.account, cost, cx.now);
}

/// Which channels a request names.
struct Scope<'a> {
    all_channels: bool,
    channel_id: &'a [u8],
}

/// A read of the caller's own inbox, which `recipient_key` may name or leave out.
fn own(
    caller: &Caller,
    recipient_key: &[u8],
    scope: Scope<'_>,
    device_id: &[u8],
) -> Result<ReadQuery, Error> {
    let named: Option<IdentityKey> =
        convert::optional_identity_key(recipient_key, "recipient_key")?;
    if named.is_some_and(|named| named != caller.identity) {
        return Err(Error::NotOwner);
    }
    let view = if scope.all_channels {
        View::All
    } else {
        View::Channel(convert::channel_id(scope.channel_id, "channel_id")?)
    };
    let device: Option<DeviceId> = convert::device_id(device_id, "device_id")?;
    Ok(ReadQuery {
        reader: Reader { inbox: caller.identity, device: device.or(caller.device) },
        view,
    })
}

/// Leases what the view has, or the first that it gets. `None` when nothing came by the deadline,
/// the server drains, or the reader has begun too many other calls that wait.
///
/// Whatever could end the wait is subscribed to before the state behind it is read, so nothing
/// falls between. Alive while it waits are these few words: an idle client costs little more than
/// its connection.
async fn wait(
    cx: Cx<'_>,
    caller: &Caller,
    read: &ReadQuery,
    limit: PageLimit,
    deadline: Instant,
) -> Result<Option<Leased>, Error> {
    let mut waiter = cx.app.waiters.join(&*cx.app.stores.wakes, read);
    if let Some(leased) = lease(cx, caller, *read, limit).await? {
        return Ok(Some(leased));
    }
    let mut account_events = cx.app.account_events.listen(&caller.identity);
    // It was checked when the call came in, but a revocation since then was nobody's to hear.
    auth::recheck(cx, caller).await?;
    let mut draining = cx.app.draining();
    loop {
        tokio::select! {
            biased;
            () = drain_began(&mut draining) => return Ok(None),
            event = account_events.next() => {
                if event == AccountEvent::SessionsEnded {
                    auth::recheck(cx, caller).await?;
                }
                continue;
            }
            turn = waiter.next() => {
                if turn == Turn::Displaced {
                    return Ok(None);
                }
            }
            () = sleep_until(deadline) => return Ok(None),
        }
        let leased = lease(cx, caller, *read, limit).await?;
        let more = leased.as_ref().is_some_and(|(lease, _)| lease.page().more);
        waiter.has_read(if more { Left::More } else { Left::Nothing });
        if leased.is_some() {
            return Ok(leased);
        }
    }
}

/// A lease, and the memory for the answer that shows it.
type Leased = (Box<dyn Lease>, Reservation);

/// A lease of what the view has now, as far as there is memory for an answer; `None` when the view
/// has nothing.
async fn lease(
    cx: Cx<'_>,
    caller: &Caller,
    read: ReadQuery,
    wanted: PageLimit,
) -> Result<Option<Leased>, Error> {
    let inboxes = &cx.app.stores.inboxes;
    let mut room = page::room(cx, caller, wanted).await?;
    let mut lease = inboxes.lease(read, room.limit, cx.app.clock.now()).await?;
    while !room.fits(lease.page()) {
        drop((lease, room));
        room = page::full_room(cx, caller, wanted).await?;
        lease = inboxes.lease(read, room.limit, cx.app.clock.now()).await?;
    }
    let is_empty = lease.page().envelopes.is_empty();
    Ok((!is_empty).then_some((lease, room.memory)))
}
