//! Public keys for starting conversations: KeyPackages (300, 301, 305), each handed out once, and
//! hybrid keys (302 to 304).

mod count_key_packages;
mod fetch_hybrid_key;
mod fetch_hybrid_keys;
mod fetch_key_package;
mod hybrid;
mod upload_hybrid_key;
mod upload_key_package;

use std::iter;

use qpq_domain::{DeviceId, IdentityKey};
use qpq_ports::{Device, PackageOwner};
use qpq_proto::convert;

use crate::{Caller, Cx, Error};

/// The devices of the caller's account and the device of the session, which determine the owners of
/// KeyPackages.
struct OwnDevices {
    devices: Vec<Device>,
    of_session: Option<DeviceId>,
}

impl OwnDevices {
    async fn of(cx: Cx<'_>, caller: &Caller) -> Result<Self, Error> {
        let devices = cx.app.stores.devices.list(caller.account).await?;
        Ok(Self { devices, of_session: caller.device })
    }

    /// Returns the device of the session, if it is registered.
    fn current(&self) -> Option<&Device> {
        self.devices.iter().find(|device| Some(device.id) == self.of_session)
    }

    /// Returns the owner of the packages that the session uploads and counts.
    fn owner(&self, caller: &Caller) -> PackageOwner {
        let device = self.current().map(|device| device.id);
        PackageOwner { account: caller.account, device }
    }

    /// Returns the keys that may sign the account's packages.
    fn signers(&self, identity: &IdentityKey) -> Vec<[u8; 32]> {
        let of_devices = self.devices.iter().filter_map(|device| device.key);
        let of_devices = of_devices.map(|certified| *certified.key.as_bytes());
        iter::once(*identity.as_bytes()).chain(of_devices).collect()
    }

    /// Returns the device that owns a package by its signature key; `None` for the account itself.
    /// A package whose key the server cannot read belongs to the session's device. So does a
    /// package of the identity key, unless that device has its own key.
    fn signed_by(&self, signature_key: Option<&[u8; 32]>) -> Option<DeviceId> {
        let has_key = |device: &&Device| {
            device.key.is_some_and(|certified| Some(certified.key.as_bytes()) == signature_key)
        };
        if let Some(device) = self.devices.iter().find(has_key) {
            return Some(device.id);
        }
        let current = self.current()?;
        (signature_key.is_none() || current.key.is_none()).then_some(current.id)
    }
}

/// Checks that an upload is for the caller's own identity key. An empty field means the caller's
/// own key.
fn check_owner(caller: &Caller, identity_key: &[u8]) -> Result<(), Error> {
    match convert::optional_identity_key(identity_key, "identity_key")? {
        Some(named) if named != caller.identity => Err(Error::NotKeyOwner),
        _ => Ok(()),
    }
}
