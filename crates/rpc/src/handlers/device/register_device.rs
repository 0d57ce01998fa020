//! RegisterDevice (700).

use qpq_domain::{DeviceId, DeviceKey, IdentityKey, MAX_DEVICE_NAME};
use qpq_ports::{CertifiedKey, DeviceRegistration, NewDevice};
use qpq_proto::{convert, methods, v1};

use crate::{Caller, Cx, Error, Handled, Handler, account_events::AccountEvent};

impl Handler for methods::RegisterDevice {
    async fn handle(
        cx: Cx<'_>,
        caller: Caller,
        request: v1::RegisterDeviceRequest,
    ) -> Handled<Self> {
        let device = convert::required_device_id(&request.device_id, "device_id")?;
        convert::no_longer_than(&request.device_name, MAX_DEVICE_NAME, "device_name")?;
        let key = certified_key(&caller.identity, &device, &request)?;
        let name = request.device_name;
        let Caller { account, token, .. } = caller;
        let new = NewDevice { account, device, name, key, session: token, now: cx.now };
        match cx.app.stores.devices.register(new).await? {
            DeviceRegistration::Registered | DeviceRegistration::Repeated => {}
            DeviceRegistration::OtherKey => return Err(Error::DeviceExists),
            DeviceRegistration::KeyTaken => return Err(Error::DeviceKeyTaken),
            DeviceRegistration::Full => return Err(Error::DevicesFull),
            DeviceRegistration::OlderEdges => return Err(Error::OlderEdges),
        }
        cx.app.account_events.publish(&caller.identity, AccountEvent::DevicesChanged);
        Ok(v1::RegisterDeviceResponse { success: true }.into())
    }
}

/// Returns the device's key and the identity key's signature over it, both checked. `None` if the
/// request has no key.
fn certified_key(
    identity: &IdentityKey,
    device: &DeviceId,
    request: &v1::RegisterDeviceRequest,
) -> Result<Option<CertifiedKey>, Error> {
    if request.device_key.is_empty() {
        // A signature without a key proves nothing.
        let has_proof = !request.device_proof.is_empty();
        return if has_proof { Err(Error::InvalidDeviceKey) } else { Ok(None) };
    }
    let key = DeviceKey::try_from(&request.device_key[..]).map_err(|_| Error::InvalidDeviceKey)?;
    key.check_registrable().map_err(|_| Error::InvalidDeviceKey)?;
    let proof: [u8; 64] =
        request.device_proof[..].try_into().map_err(|_| Error::InvalidDeviceProof)?;
    identity
        .verify(&key.certification(identity, device), &proof)
        .map_err(|_| Error::InvalidDeviceProof)?;
    Ok(Some(CertifiedKey { key, proof }))
}
