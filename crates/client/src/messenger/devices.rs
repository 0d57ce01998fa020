//! The devices of this account, and those of the people in our conversations.
//!
//! Each device is a leaf of every group that its account is in. The directory (ResolveIdentity)
//! returns the devices of an account. Before something is sent to a conversation, the directory is
//! asked again about some of its accounts; the member that writes next adds what is missing and
//! removes what was revoked. A device is added only with its account's statement, which every
//! member checks, so a lying directory can leave devices out and cannot add one.

use std::collections::BTreeSet;

use qpq_domain::{DeviceId, IdentityKey, UnixMillis, Username};
use qpq_mls::{Change, Device, GroupId, MemberDevice, NewMember, database::DatabaseError};
use qpq_proto::{methods, v1};

use super::{
    Messenger,
    changes::{Cause, Operation},
    directory::is_not_found,
    inbox::unless_final,
    log::ConversationId,
    now,
    people::Person,
    records::Corrupt,
    state::State,
    store::StateStore,
    tables::{CHECKED, SETTINGS},
};
use crate::{
    client::Client,
    error::{CallError, Error},
    link::ConnectionEvent,
    profile::Profile,
};

/// The most accounts that the directory is asked about before one message.
const MAX_ACCOUNTS: usize = 16;

/// A device that is not registered yet, in the form of [`encode_device`].
const CANDIDATE: &[u8] = b"device-candidate";
/// The time at which the server was last asked for the devices of this account.
const OWN_DEVICES_SINCE: &[u8] = b"own-devices-since";
/// The number of other devices of this account, as the server said last.
const OTHER_DEVICES: &[u8] = b"other-devices";

/// A device of this account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnDevice {
    /// The device's id.
    pub id: DeviceId,
    /// The name that its owner chose. The people in our conversations see it.
    pub name: String,
    /// When it was registered, by the server's clock.
    pub registered_at: UnixMillis,
    /// When it was last in use, by the server's clock.
    pub last_seen_at: UnixMillis,
    /// Whether it is this device.
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
        // The server would register it again.
        if self.is_revoked().await {
            return Err(Error::DeviceRevoked);
        }
        self.register_device(&renamed).await?;
        self.store()
            .change(move |state| {
                state.mls.set_device(renamed)?;
                // Those on the server have the name of before.
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

    /// Asks for the devices of this account, unless that was done a short time ago.
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

    /// Returns whether the server says that this device was revoked. `false` where it cannot be
    /// asked.
    pub async fn is_revoked(&self) -> bool {
        let is_device = self.device_id().await.is_ok_and(|id| id.is_some());
        let devices = self.devices().await;
        is_device && devices.is_ok_and(|devices| devices.iter().all(|device| !device.is_this))
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

    /// Fetches one KeyPackage for each device of a person.
    pub(super) async fn fetch_packages(&self, person: &Person) -> Result<Vec<NewMember>, Error> {
        let packages = self.fetch_of(person.identity, &person.username, None).await?;
        if packages.is_empty() {
            return Err(Error::NoKeys(person.username.clone()));
        }
        Ok(packages)
    }

    /// Fetches one KeyPackage for each other device of this account.
    pub(super) async fn fetch_own_packages(&self) -> Result<Vec<NewMember>, Error> {
        if !self.store().read(|state| Ok(state.has_other_devices()?)).await? {
            return Ok(Vec::new());
        }
        let Some(own) = self.device_id().await? else { return Ok(Vec::new()) };
        let (me, username) = (self.profile().identity, &self.profile().username);
        self.fetch_of(me, username, Some(own)).await
    }

    async fn fetch_of(
        &self,
        identity: IdentityKey,
        username: &Username,
        except: Option<DeviceId>,
    ) -> Result<Vec<NewMember>, Error> {
        let request = v1::FetchKeyPackageRequest {
            identity_key: identity.as_bytes().to_vec().into(),
            all_devices: true,
            ..Default::default()
        };
        let answer = match self.client().call::<methods::FetchKeyPackage>(request).await {
            Ok(answer) => answer,
            Err(error) if is_not_found(&error) => return Ok(Vec::new()),
            Err(error) => return Err(error.into()),
        };
        let is_wanted = |package: &v1::DevicePackage| {
            let id = DeviceId::try_from(&package.device_id[..]).ok();
            !package.package.is_empty() && (except.is_none() || id != except)
        };
        let of_devices = answer.packages.into_iter().filter(is_wanted);
        let packages = of_devices.map(|one| one.package).chain(Some(answer.package));
        Ok(packages
            .filter(|package| !package.is_empty())
            .map(|package| NewMember {
                identity,
                username: username.clone(),
                key_package: package.to_vec(),
            })
            .collect())
    }

    /// Brings a conversation's devices up to date, before something is sent to it.
    ///
    /// Asks the directory about the accounts whose last answer is the oldest. A failure of the
    /// server does not delay the message.
    pub(super) async fn update_devices(&self, conversation: ConversationId) -> Result<(), Error> {
        let is_connected = matches!(
            *self.client().connection_events().borrow(),
            ConnectionEvent::Connected { .. }
        );
        if !is_connected {
            return Ok(());
        }
        let stale_after = self.client().options().devices_every;
        let due = self
            .store()
            .read(move |state| {
                let Some(group) = state.group_of(conversation)? else { return Ok(None) };
                let Some(summary) = state.mls.group(&group)?.filter(|group| group.active) else {
                    return Ok(None);
                };
                let is_recent = |at: UnixMillis| at <= now() && at.plus(stale_after) > now();
                // One row for a large group, unless some of its accounts are due.
                if state.checked_at(group.as_bytes())?.is_some_and(is_recent) {
                    return Ok(None);
                }
                let mut due = Vec::new();
                for member in summary.members {
                    let checked = state.checked_at(member.identity.as_bytes())?;
                    if !checked.is_some_and(is_recent) {
                        due.push((checked, member.identity));
                    }
                }
                due.sort_unstable();
                let are_all = due.len() <= MAX_ACCOUNTS;
                due.truncate(MAX_ACCOUNTS);
                let due: Vec<_> = due.into_iter().map(|(_, identity)| identity).collect();
                Ok(Some((group, due, are_all)))
            })
            .await?;
        let Some((group, due, are_all)) = due else { return Ok(()) };
        if are_all {
            self.store().change(move |state| Ok(state.set_checked(group.as_bytes())?)).await?;
        }
        if due.is_empty() {
            return Ok(());
        }
        match self.reconcile(group, &due).await {
            Err(Error::Call(error)) if error.is_temporary() => {
                tracing::debug!(%error, "devices are checked later");
                Ok(())
            }
            Err(error @ (Error::Mls(_) | Error::GroupBusy)) => {
                tracing::warn!(%error, "devices of a conversation cannot be brought up to date");
                Ok(())
            }
            done => unless_final("devices", done),
        }
    }

    /// Brings this account's own devices up to date in every group.
    pub(super) async fn update_own_devices(&self) -> Result<(), Error> {
        self.devices().await?;
        let me = self.profile().identity;
        let groups = self.store().read(|state| Ok(state.mls.groups()?)).await?;
        for group in groups.into_iter().filter(|group| group.active) {
            match self.reconcile(group.id, &[me]).await {
                Err(error @ (Error::Mls(_) | Error::GroupBusy)) => {
                    tracing::warn!(%error, "own devices cannot be brought up to date in a group");
                }
                done => unless_final("devices", done)?,
            }
        }
        Ok(())
    }

    /// Adds the missing devices of accounts to a group, and removes the revoked ones.
    async fn reconcile(&self, group: GroupId, accounts: &[IdentityKey]) -> Result<(), Error> {
        let mut change = Change::default();
        let devices = self.store().change(move |state| Ok(state.mls.devices(&group)?)).await?;
        let me = self.profile().identity;
        for account in accounts {
            let Some(registered) = self.registered_devices(account).await? else { continue };
            if *account == me {
                let others = registered.len().saturating_sub(1) as u64;
                self.store()
                    .change(move |state| Ok(state.set_number(OTHER_DEVICES, Some(others))?))
                    .await?;
            }
            let of_account: Vec<_> =
                devices.iter().filter(|device| device.member.identity == *account).collect();
            let Some(username) = of_account.first().map(|device| &device.member.username) else {
                continue;
            };
            change.remove_devices.extend(revoked(&of_account, &registered));
            let present: BTreeSet<_> = of_account.iter().filter_map(|device| device.id()).collect();
            // A leaf without a device, of before the account had any, is that of its first one.
            let unnamed = of_account.iter().filter(|device| device.id().is_none()).count();
            let missing = registered.difference(&present).count();
            if missing > unnamed {
                let own = self.device_id().await?.filter(|_| *account == me);
                let packages = self.fetch_of(*account, username, own).await?;
                change.add.extend(packages);
            }
            let account = *account;
            self.store().change(move |state| Ok(state.set_checked(account.as_bytes())?)).await?;
        }
        let is_changed = !change.add.is_empty() || !change.remove_devices.is_empty();
        if is_changed {
            self.run_operation(Operation::Change { group, change, cause: Cause::Client }).await?;
        }
        Ok(())
    }

    /// Returns the ids of an account's devices, by the directory.
    async fn registered_devices(
        &self,
        account: &IdentityKey,
    ) -> Result<Option<BTreeSet<DeviceId>>, Error> {
        let request = v1::ResolveIdentityRequest {
            identity_key: account.as_bytes().to_vec().into(),
            ..Default::default()
        };
        let answer = match self.client().call::<methods::ResolveIdentity>(request).await {
            Ok(answer) => answer,
            Err(error) if is_not_found(&error) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let ids = answer.devices.iter().map(|device| DeviceId::try_from(&device.device_id[..]));
        let ids: Result<_, _> = ids.collect();
        Ok(Some(ids.map_err(|_| CallError::Malformed { method: "ResolveIdentity" })?))
    }
}

/// Registers this device, unless it is registered, and returns its id.
///
/// An account without devices remains without where the server does not accept devices now.
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
            // Those on the server are signed by the identity key.
            Ok(state.replace_packages()?)
        })
        .await?;
    client.set_device(Some(id));
    Ok(Some(id))
}

/// Binds a session of a login without a device to this device, if it is registered: the profile did
/// not name it yet.
pub(super) async fn bind_session(client: &Client, store: &StateStore) -> Result<(), Error> {
    match store.read(|state| Ok(state.mls.device().cloned())).await? {
        Some(device) => Ok(register(client, &device).await?),
        None => Ok(()),
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

/// Returns the devices of a group that an account has revoked.
///
/// The last device of an account stays, since its removal would remove the account.
fn revoked(
    of_account: &[&MemberDevice],
    registered: &BTreeSet<DeviceId>,
) -> Vec<(IdentityKey, Option<DeviceId>)> {
    let is_revoked = |device: &&&MemberDevice| {
        device.id().is_some_and(|id| !registered.is_empty() && !registered.contains(&id))
    };
    let revoked: Vec<_> = of_account
        .iter()
        .filter(is_revoked)
        .map(|device| (device.member.identity, device.id()))
        .collect();
    if revoked.len() == of_account.len() { Vec::new() } else { revoked }
}

/// The default name of the device that an account is registered on.
pub const FIRST_DEVICE: &str = "first device";

/// The most bytes of UTF-8 in a device's name.
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

    /// Returns whether the account has other devices, as far as is known here.
    pub(super) fn has_other_devices(&self) -> Result<bool, DatabaseError> {
        Ok(self.number(OTHER_DEVICES)?.is_some_and(|others| others > 0))
    }

    /// Notes that the account has other devices.
    pub(super) fn note_other_devices(&self) -> Result<(), DatabaseError> {
        self.set_number(OTHER_DEVICES, Some(self.number(OTHER_DEVICES)?.unwrap_or(0).max(1)))
    }

    /// Returns the MLS group to send to in a conversation.
    pub(super) fn group_of(
        &self,
        conversation: ConversationId,
    ) -> Result<Option<GroupId>, DatabaseError> {
        match conversation {
            ConversationId::Direct(peer) => self.mls.direct(&peer),
            ConversationId::Group(id) => Ok(Some(id)),
        }
    }

    /// Returns when the devices of an account, or of all accounts of a group, were asked for.
    fn checked_at(&self, subject: &[u8; 32]) -> Result<Option<UnixMillis>, DatabaseError> {
        let row = self.database().get(CHECKED, subject)?;
        let at = row.map(|row| row[..].try_into().map(u64::from_be_bytes)).transpose();
        Ok(at.map_err(Corrupt::new)?.map(UnixMillis))
    }

    fn set_checked(&self, subject: &[u8; 32]) -> Result<(), DatabaseError> {
        self.database().put(CHECKED, subject, None, &now().0.to_be_bytes())
    }
}

/// The bytes of a device: its id, secret seed, statement and name.
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
    fn a_device_survives_its_encoding() {
        let device = Device::generate(&Identity::generate(), "laptop");
        let read = decode_device(&encode_device(&device)).unwrap();
        assert_eq!((read.id(), read.name(), read.seed()), (device.id(), "laptop", device.seed()));
        assert_eq!(read.proof(), device.proof());
        assert!(decode_device(&[0; 100]).is_err());
    }
}
