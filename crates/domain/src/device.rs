//! Devices of an account: their keys, and the statement by which the account certifies them.

use std::fmt;

use crate::{
    DeviceId, IdentityKey, InvalidIdentity,
    identity::verifying_key,
    ids::{WrongLength, exact, write_hex},
};

/// The maximum number of devices of an account.
pub const MAX_DEVICES: usize = 16;

/// The maximum length of a device's name, in bytes.
pub const MAX_DEVICE_NAME: usize = 256;

/// The Ed25519 public key of a device. Signs the device's KeyPackages, since the members of an MLS
/// group have distinct signature keys (RFC 9420 §7.3).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceKey([u8; 32]);

impl DeviceKey {
    /// Creates a key from its bytes, without a check.
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Returns the bytes of the key.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Checks that the key can be registered, as [`IdentityKey::check_registrable`] does.
    pub fn check_registrable(&self) -> Result<(), InvalidIdentity> {
        verifying_key(&self.0).map(drop)
    }

    /// Verifies `signature` over `message` strictly, as [`IdentityKey::verify`] does.
    pub fn verify(&self, message: &[u8], signature: &[u8; 64]) -> Result<(), InvalidIdentity> {
        IdentityKey::new(self.0).verify(message, signature)
    }

    /// Returns the message that the identity key signs to certify the key of a device:
    /// `"qpq/device/1" ‖ identity_key ‖ device_id ‖ device_key`.
    pub fn certification(&self, identity: &IdentityKey, device: &DeviceId) -> Vec<u8> {
        [&b"qpq/device/1"[..], identity.as_bytes(), device.as_bytes(), &self.0].concat()
    }
}

impl TryFrom<&[u8]> for DeviceKey {
    type Error = WrongLength;

    fn try_from(bytes: &[u8]) -> Result<Self, WrongLength> {
        exact(bytes).map(Self)
    }
}

impl fmt::Debug for DeviceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DeviceKey(")?;
        write_hex(f, &self.0[..4])?;
        f.write_str("…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_certification_has_the_documented_layout() {
        let (identity, device) = (IdentityKey::new([1; 32]), DeviceId::new([2; 16]));
        let message = DeviceKey::new([3; 32]).certification(&identity, &device);
        let expected = [&b"qpq/device/1"[..], &[1; 32], &[2; 16], &[3; 32]].concat();
        assert_eq!(message, expected);
    }

    #[test]
    fn a_key_of_small_order_cannot_be_registered() {
        assert_eq!(DeviceKey::new([0; 32]).check_registrable(), Err(InvalidIdentity::SmallOrder));
    }
}
