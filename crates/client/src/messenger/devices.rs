//! The devices of this account: listing, renaming and revoking them, and registering this one.

use qpq_domain::{DeviceId, UnixMillis};
use qpq_mls::{Device, database::DatabaseError};
use qpq_proto::{methods, v1};

use super::{
    Messenger, directory::is_not_found, now, records::Corrupt, state::State, store::StateStore,
    tables::SETTINGS,
};
use crate::{
    client::Client,
    error::{CallError, Error},
    profile::Profile,
};

/// A device that is not registered yet, in the form of [`encode_device`].
const CANDIDATE: &[u8] = b"device-candidate";
/// The time at which the server was last asked for the devices of this account.
const OWN_DEVICES_SINCE: &[u8] = b"own-devices-since";
/// The number of other devices of this account, by the server's last answer.
pub(super) const OTHER_DEVICES: &[u8] = b"other-devices";

/// Present once the server has said that this device was revoked.
const REVOKED: &[u8] = b"device-revoked";

/// A device of this account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnDevice {
    /// The device's id.
    pub id: DeviceId,
    /// The device's name, chosen by its owner. The people in our conversations see it.
    pub name: String,
    /// The time of the registration, by the server's clock.
    pub registered_at: UnixMillis,
    /// The time of the last use, by the server's clock.
    pub last_seen_at: UnixMillis,
    /// Whether this is the device in use.
    pub is_this: bool,
}

impl Messenger {
    /// Returns the devices of this account, the oldest first.
    pub async fn devices(&self) -> Result<Vec<OwnDevice>, Error> {
        let answer =
            self.client().call::<methods::ListDevices>(v1::ListDevicesRequest::default()).await?;
        let this = self.device_id().await?;
        let mut devices = Vec::with_capacity(answer.devices.len());
        for device in answer.devices {
            let id = DeviceId::try_from(&device.device_id[..])
                .map_err(|_| CallError::Malformed { method: "ListDevices" })?;
            devices.push(OwnDevice {
                id,
                name: device.device_name,
                registered_at: UnixMillis(device.registered_at),
                last_seen_at: UnixMillis(device.last_seen_at),
                is_this: Some(id) == this,
            });
        }
        devices.sort_by_key(|device| (device.registered_at, device.id));
        let others = devices.iter().filter(|device| !device.is_this).count() as u64;
        self.store()
            .change(move |state| {
                state.set_number(OWN_DEVICES_SINCE, Some(now().0))?;
                Ok(state.set_number(OTHER_DEVICES, Some(others))?)
            })
            .await?;
        Ok(devices)
    }

    /// Renames this device. The members of a group see the name with our next commit.
    pub async fn rename_device(&self, name: &str) -> Result<(), Error> {
        check_name(name)?;
        let device = self.store().read(|state| Ok(state.mls.device().cloned())).await?;
        let renamed = device.ok_or(Error::NoDevice)?.renamed(name);
        // The server would register a revoked device again.
        if self.is_revoked().await {
            return Err(Error::DeviceRevoked);
        }
        self.register_device(&renamed).await?;
        self.store()
            .change(move |state| {
                state.mls.set_device(renamed)?;
                // The packages on the server have the old name.
                Ok(state.replace_packages()?)
            })
            .await
    }

    /// Revokes another device of this account: its sessions end, and it is removed from every
    /// conversation.
    ///
    /// # Errors
    /// [`Error::ThisDevice`], [`Error::NoSuchDevice`].
    pub async fn revoke_device(&self, id: DeviceId) -> Result<(), Error> {
        if self.device_id().await? == Some(id) {
            return Err(Error::ThisDevice);
        }
        let request = v1::RevokeDeviceRequest {
            device_id: id.as_bytes().to_vec().into(),
            ..Default::default()
        };
        match self.client().call::<methods::RevokeDevice>(request).await {
            Ok(_) => {}
            Err(error) if is_not_found(&error) => return Err(Error::NoSuchDevice),
            Err(error) => return Err(error.into()),
        }
        self.update_own_devices().await
    }

    /// Asks the server for the devices of this account, unless it was asked a short time ago.
    pub(super) async fn refresh_own_devices(&self) -> Result<(), Error> {
        let every = self.client().options().devices_every;
        let since = self.store().read(|state| Ok(state.number(OWN_DEVICES_SINCE)?)).await?;
        let since = since.map(UnixMillis);
        if since.is_some_and(|at| at <= now() && at.plus(every) > now()) {
            return Ok(());
        }
        self.devices().await.map(drop)
    }

    /// Returns this device's id; `None` while it has none.
    pub async fn device_id(&self) -> Result<Option<DeviceId>, Error> {
        self.store().read(|state| Ok(state.mls.device().map(Device::id))).await
    }

    /// Returns whether this device was revoked, by the server's answer or, if it cannot be asked,
    /// by its last answer.
    pub async fn is_revoked(&self) -> bool {
        if !self.device_id().await.is_ok_and(|id| id.is_some()) {
            return false;
        }
        match self.devices().await {
            Ok(devices) if devices.iter().any(|device| device.is_this) => {
                let noted = self.store().change(|state| Ok(state.set_number(REVOKED, None)?)).await;
                if let Err(error) = noted {
                    tracing::warn!(%error, "the answer about this device was not noted");
                }
                false
            }
            Ok(_) => {
                self.note_revoked().await;
                true
            }
            Err(_) => self.was_revoked().await.unwrap_or(false),
        }
    }

    /// Returns whether this device was revoked, as far as is known here. The server is not asked.
    pub async fn was_revoked(&self) -> Result<bool, Error> {
        self.store().read(|state| Ok(state.is_revoked()?)).await
    }

    /// Notes that this device was revoked, and ends its session, with which no inbox can be read.
    pub(super) async fn note_revoked(&self) {
        let noted = self.store().change(|state| {
            let token = state.token()?;
            if state.mls.device().is_some() {
                state.set_number(REVOKED, Some(1))?;
                state.set_token(None)?;
            }
            Ok(token.filter(|_| state.mls.device().is_some()))
        });
        let ended = match noted.await {
            Ok(None) => return,
            Ok(Some(token)) => self.client().end_session(token).await.map_err(Error::from),
            Err(error) => Err(error),
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "the session of a revoked device was not ended");
        }
    }

    /// Registers this device, unless it is registered.
    pub(super) async fn ensure_device(&self) -> Result<(), Error> {
        let before = Profile::read(self.store().dir())?;
        let Some(device) = register_this(self.client(), self.store()).await? else {
            return Ok(());
        };
        if before.device != Some(device) {
            Profile { device: Some(device), ..before }.write(self.store().dir())?;
        }
        Ok(())
    }

    async fn register_device(&self, device: &Device) -> Result<(), CallError> {
        register(self.client(), device).await
    }
}

/// Registers this device, unless it is registered, and returns its id.
///
/// If the server does not accept devices now, an account without devices remains without.
pub(super) async fn register_this(
    client: &Client,
    store: &StateStore,
) -> Result<Option<DeviceId>, Error> {
    if let Some(id) = store.read(|state| Ok(state.mls.device().map(Device::id))).await? {
        return Ok(Some(id));
    }
    let candidate = store
        .change(|state| {
            if let Some(row) = state.database().get(SETTINGS, CANDIDATE)? {
                return Ok(decode_device(&row).map_err(DatabaseError::from)?);
            }
            state.name_device(FIRST_DEVICE)
        })
        .await?;
    match register(client, &candidate).await {
        Ok(()) => {}
        Err(error) if error.server().is_some() && !error.is_unauthorized() => {
            tracing::info!(%error, "the server does not accept devices now");
            return Ok(None);
        }
        Err(error) => return Err(error.into()),
    }
    let id = candidate.id();
    store
        .change(move |state| {
            state.mls.set_device(candidate)?;
            state.database().delete(SETTINGS, CANDIDATE)?;
            // The packages on the server are signed by the identity key.
            Ok(state.replace_packages()?)
        })
        .await?;
    client.set_device(Some(id));
    Ok(Some(id))
}

/// Binds the session of a login without a device to this device, if it is registered. The profile
/// did not name the device at the time of the login.
pub(super) async fn bind_session(client: &Client, store: &StateStore) -> Result<(), Error> {
    let device = store.read(|state| Ok((state.mls.device().cloned(), state.is_revoked()?)));
    match device.await? {
        (Some(device), false) => Ok(register(client, &device).await?),
        _ => Ok(()),
    }
}

pub(super) async fn register(client: &Client, device: &Device) -> Result<(), CallError> {
    let request = v1::RegisterDeviceRequest {
        device_id: device.id().as_bytes().to_vec().into(),
        device_name: device.name().to_owned(),
        device_key: device.public().as_bytes().to_vec().into(),
        device_proof: device.proof().to_vec().into(),
        ..Default::default()
    };
    client.call::<methods::RegisterDevice>(request).await.map(drop)
}

/// The default name of the device that an account is registered on.
pub const FIRST_DEVICE: &str = "first device";

/// The maximum length of a device's name, in bytes of UTF-8.
pub const MAX_DEVICE_NAME: usize = 64;

pub(super) fn check_name(name: &str) -> Result<(), Error> {
    if !(1..=MAX_DEVICE_NAME).contains(&name.len()) || name.chars().any(char::is_control) {
        return Err(Error::DeviceName { max: MAX_DEVICE_NAME });
    }
    Ok(())
}

impl State {
    /// Creates the device that this profile is to be registered as.
    pub(super) fn name_device(&self, name: &str) -> Result<Device, Error> {
        let device = Device::generate(self.mls.identity(), name);
        self.database().put(SETTINGS, CANDIDATE, None, &encode_device(&device))?;
        Ok(device)
    }

    fn is_revoked(&self) -> Result<bool, DatabaseError> {
        Ok(self.number(REVOKED)?.is_some())
    }

    /// Returns whether the account has other devices, as far as is known here.
    pub(super) fn has_other_devices(&self) -> Result<bool, DatabaseError> {
        Ok(self.number(OTHER_DEVICES)?.is_some_and(|others| others > 0))
    }

    /// Notes that the account has other devices.
    pub(super) fn note_other_devices(&self) -> Result<(), DatabaseError> {
        self.set_number(OTHER_DEVICES, Some(self.number(OTHER_DEVICES)?.unwrap_or(0).max(1)))
    }
}

/// Encodes a device: its id, secret seed, statement and name.
pub(super) fn encode_device(device: &Device) -> zeroize::Zeroizing<Vec<u8>> {
    let mut bytes = zeroize::Zeroizing::new(Vec::with_capacity(112 + device.name().len()));
    bytes.extend_from_slice(device.id().as_bytes());
    bytes.extend_from_slice(device.seed());
    bytes.extend_from_slice(device.proof());
    bytes.extend_from_slice(device.name().as_bytes());
    bytes
}

fn decode_device(bytes: &[u8]) -> Result<Device, Corrupt> {
    let cut = || Corrupt::new("a device is cut short");
    let (id, rest) = bytes.split_at_checked(16).ok_or_else(cut)?;
    let (seed, rest) = rest.split_at_checked(32).ok_or_else(cut)?;
    let (proof, name) = rest.split_at_checked(64).ok_or_else(cut)?;
    let id = DeviceId::try_from(id).map_err(Corrupt::new)?;
    let name = std::str::from_utf8(name).map_err(Corrupt::new)?;
    let seed = zeroize::Zeroizing::new(seed.try_into().map_err(Corrupt::new)?);
    Ok(Device::new(id, name, &seed, proof.try_into().map_err(Corrupt::new)?))
}

#[cfg(test)]
mod tests {
    use qpq_mls::Identity;

    use super::*;

    #[test]
    fn an_encoded_device_decodes_to_the_same_device() {
        let device = Device::generate(&Identity::generate(), "laptop");
        let read = decode_device(&encode_device(&device)).unwrap();
        assert_eq!((read.id(), read.name(), read.seed()), (device.id(), "laptop", device.seed()));
        assert_eq!(read.proof(), device.proof());
        assert!(decode_device(&[0; 100]).is_err());
    }
}
