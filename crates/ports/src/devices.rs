//! Devices of accounts. Each registered device reads the account's inbox on a position of its own.

use async_trait::async_trait;
use qpq_domain::{AccountId, DeviceId, DeviceKey, TokenHash, UnixMillis};

use crate::StoreResult;

/// Stores devices.
///
/// An inbox without devices has a single reader. From the first registration on, each device is a
/// reader:
///
/// - The first device inherits the messages that the single reader has not completed. A later one
///   starts after the newest message.
/// - A message is removed once every device that was registered when it was accepted has completed
///   it or was revoked.
/// - When the last device is revoked, its queued messages stay, for the single reader.
#[async_trait]
pub trait Devices: Send + Sync {
    /// Registers a device, which is a reader of the account's inbox from then on. Binds the session
    /// to the device if it has none.
    ///
    /// A repeat with the same key binds the session, replaces the name, and changes nothing else.
    async fn register(&self, device: NewDevice) -> StoreResult<DeviceRegistration>;

    /// Lets a device read from its new position on, after
    /// [`ReadError::PositionLost`](crate::ReadError::PositionLost) informed its client of the loss.
    /// Changes nothing if the account has no such device, or the device has not lost its position.
    async fn confirm_position(&self, account: AccountId, device: DeviceId) -> StoreResult<()>;

    /// Returns the devices of the account, in the order of their registration.
    async fn list(&self, account: AccountId) -> StoreResult<Vec<Device>>;

    /// Removes a device in one step: its position in the inbox, its KeyPackages, and the sessions
    /// that are bound to it. If the account has no such device, changes nothing and returns
    /// [`DeviceRevocation::NotFound`].
    ///
    /// The KeyPackages that the identity key signs are removed with the last device that has no key
    /// of its own. The key of a revoked device stays taken: only a device of the same account with
    /// the same id can be registered with it.
    async fn revoke(
        &self,
        account: AccountId,
        device: DeviceId,
        now: UnixMillis,
    ) -> StoreResult<DeviceRevocation>;
}

/// A device to be registered.
#[derive(Clone, Debug)]
pub struct NewDevice {
    /// The account.
    pub account: AccountId,
    /// The device's id.
    pub device: DeviceId,
    /// The name, for the owner of the account to read.
    pub name: String,
    /// The device's own key; `None` if it uses the identity key.
    pub key: Option<CertifiedKey>,
    /// The session that registers the device.
    pub session: TokenHash,
    /// The instant of the call.
    pub now: UnixMillis,
}

/// A device key, and the identity key's signature over it
/// ([`DeviceKey::certification`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CertifiedKey {
    /// The device's key.
    pub key: DeviceKey,
    /// The signature.
    pub proof: [u8; 64],
}

/// The outcome of a registration of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceRegistration {
    /// The device is registered.
    Registered,
    /// The device was registered before, with the same key.
    Repeated,
    /// The device is registered with another key.
    OtherKey,
    /// The key belongs to another device, perhaps a revoked one, or is the identity key of an
    /// account.
    KeyTaken,
    /// The account has [`qpq_domain::MAX_DEVICES`] devices.
    Full,
    /// An edge of the cluster runs an older release, which does not know devices.
    OlderEdges,
}

/// The outcome of a revocation of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceRevocation {
    /// The device was revoked.
    Revoked {
        /// The number of sessions that were ended.
        ended_sessions: u32,
    },
    /// The account has no such device.
    NotFound,
}

/// A registered device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// The device's id.
    pub id: DeviceId,
    /// The name.
    pub name: String,
    /// The device's own key; `None` if it uses the identity key.
    pub key: Option<CertifiedKey>,
    /// The time of the registration.
    pub registered_at: UnixMillis,
    /// The time of the device's last read of the inbox, with a precision of ten minutes. Before the
    /// first read, the time of the registration.
    pub last_seen_at: UnixMillis,
}
