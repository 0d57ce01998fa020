//! RevokeDevice (702).

use std::sync::Arc;

use qpq_ports::DeviceRevocation;
use qpq_proto::{convert, methods, v1};

use crate::{Caller, Cx, Error, Handled, Handler, account_events::AccountEvent};

impl Handler for methods::RevokeDevice {
    async fn handle(cx: Cx<'_>, caller: Caller, request: v1::RevokeDeviceRequest) -> Handled<Self> {
        let device = convert::required_device_id(&request.device_id, "device_id")?;
        let (app, now) = (Arc::clone(cx.app), cx.now);
        // A task, because a client that cancels the call after the commit must not prevent the
        // account events, which end the waiting calls of the device.
        let revocation = cx.app.tasks.spawn(async move {
            let revoked = app.stores.devices.revoke(caller.account, device, now).await;
            for event in [AccountEvent::SessionsEnded, AccountEvent::DevicesChanged] {
                app.account_events.publish(&caller.identity, event);
            }
            revoked
        });
        match revocation.await.map_err(Error::internal)?? {
            // A repeated revocation finds nothing, and succeeds.
            DeviceRevocation::Revoked { .. } | DeviceRevocation::NotFound => {}
        }
        Ok(v1::RevokeDeviceResponse { success: true }.into())
    }
}
