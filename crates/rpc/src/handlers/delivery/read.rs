//! The steps that Fetch, FetchWait, Peek and Ack share.

use bytes::Bytes;
use qpq_domain::{DeviceId, IdentityKey};
use qpq_ports::{Lease, PageLimit, ReadError, ReadQuery, Reader, View};
use qpq_proto::{LimitClass, convert};

use super::page;
use crate::{Caller, Cx, Error, Subject, answers::Reservation, auth};

/// The fields of a request that name the inbox, the device and the channels.
pub(super) struct Target<'a> {
    pub(super) recipient_key: &'a Bytes,
    pub(super) device_id: &'a Bytes,
    pub(super) channel_id: &'a Bytes,
    pub(super) all_channels: bool,
}

impl Target<'_> {
    /// Returns the query for the caller's own inbox. An empty `recipient_key` means the caller's
    /// own key.
    pub(super) fn query(&self, caller: &Caller) -> Result<ReadQuery, Error> {
        let named: Option<IdentityKey> =
            convert::optional_identity_key(self.recipient_key, "recipient_key")?;
        if named.is_some_and(|named| named != caller.identity) {
            return Err(Error::NotOwner);
        }
        let view = if self.all_channels {
            View::All
        } else {
            View::Channel(convert::channel_id(self.channel_id, "channel_id")?)
        };
        let named: Option<DeviceId> = convert::device_id(self.device_id, "device_id")?;
        let device = match (caller.device, named) {
            (Some(own), Some(named)) if named != own => return Err(Error::OtherDevice),
            (own, named) => named.or(own),
        };
        Ok(ReadQuery { reader: Reader { inbox: caller.identity, device }, view })
    }
}

/// Returns the error for a read that the store refused.
///
/// A device that lost its position receives that error once, and its next read begins at the new
/// position. A device that was revoked during the call receives the error of an ended session.
pub(super) async fn refused(
    cx: Cx<'_>,
    caller: &Caller,
    query: &ReadQuery,
    error: ReadError,
) -> Error {
    let prepared = match (&error, query.reader.device) {
        (ReadError::DeviceRequired, _) => auth::recheck(cx, caller).await,
        (ReadError::PositionLost, Some(device)) => {
            let devices = &cx.app.stores.devices;
            devices.confirm_position(caller.account, device).await.map_err(Error::from)
        }
        _ => Ok(()),
    };
    prepared.err().unwrap_or_else(|| error.into())
}

/// Adds the cost of this call, without the call itself, to the debt that the caller's next call
/// pays.
pub(super) fn owe(cx: Cx<'_>, caller: &Caller, cost: u32) {
    let subject = Subject::Account(caller.account).key();
    cx.app.debts.add(LimitClass::Receive, subject, cost, cx.now);
}

/// A lease, and the memory for the answer with its messages.
pub(super) type Leased = (Box<dyn Lease>, Reservation);

/// Leases the messages of the view, as many as there is memory for. `None` if the view is empty.
pub(super) async fn lease(
    cx: Cx<'_>,
    caller: &Caller,
    query: ReadQuery,
    wanted: PageLimit,
) -> Result<Option<Leased>, Error> {
    let inboxes = &cx.app.stores.inboxes;
    let mut space = page::space(cx, caller, wanted).await?;
    loop {
        let lease = match inboxes.lease(query, space.limit, cx.app.clock.now()).await {
            Ok(lease) => lease,
            Err(error) => return Err(refused(cx, caller, &query, error).await),
        };
        if space.fits(lease.page()) {
            let is_empty = lease.page().envelopes.is_empty();
            return Ok((!is_empty).then_some((lease, space.memory)));
        }
        drop((lease, space));
        space = page::full_space(cx, caller, wanted).await?;
    }
}
