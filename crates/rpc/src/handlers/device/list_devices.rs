//! ListDevices (701).

use bytes::Bytes;
use qpq_domain::DeviceId;
use qpq_ports::Device;
use qpq_proto::{methods, v1};

use crate::{Caller, Cx, Handled, Handler};

impl Handler for methods::ListDevices {
    async fn handle(cx: Cx<'_>, caller: Caller, _: v1::ListDevicesRequest) -> Handled<Self> {
        let devices = cx.app.stores.devices.list(caller.account).await?;
        let devices = devices.into_iter().map(|device| listed(device, caller.device)).collect();
        Ok(v1::ListDevicesResponse { devices }.into())
    }
}

fn listed(device: Device, of_session: Option<DeviceId>) -> v1::Device {
    let bytes = |bytes: &[u8]| Bytes::copy_from_slice(bytes);
    let key = device.key.as_ref();
    v1::Device {
        device_id: bytes(device.id.as_bytes()),
        device_name: device.name,
        registered_at: device.registered_at.0,
        last_seen_at: device.last_seen_at.0,
        has_push_token: false,
        current: of_session == Some(device.id),
        device_key: key.map_or_else(Bytes::new, |key| bytes(key.key.as_bytes())),
        device_proof: key.map_or_else(Bytes::new, |key| bytes(&key.proof)),
    }
}
