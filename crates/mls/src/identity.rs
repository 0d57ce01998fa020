//! Accounts: this account's identity key, and the accounts that are members of groups.

use std::fmt;

use ed25519_dalek::{Signer as _, SigningKey};
use qpq_domain::{DeviceId, DeviceKey, IdentityKey, Username};

use crate::codec::{Malformed, Reader, Writer};

/// An account's identity: the Ed25519 key by which its inbox is addressed, and which certifies the
/// account's devices.
#[derive(Clone)]
pub struct Identity(SigningKey);

impl Identity {
    /// Creates an identity from the randomness of the operating system.
    pub fn generate() -> Self {
        Self(SigningKey::generate(&mut rand::rngs::OsRng))
    }

    pub fn from_seed(seed: &[u8; 32]) -> Self {
        Self(SigningKey::from_bytes(seed))
    }

    /// Returns the secret seed, to be kept as secret as the account itself.
    pub fn seed(&self) -> &[u8; 32] {
        self.0.as_bytes()
    }

    pub fn public(&self) -> IdentityKey {
        IdentityKey::new(self.0.verifying_key().to_bytes())
    }

    /// Signs `message` as this account (Ed25519, RFC 8032).
    pub fn sign(&self, message: &[u8]) -> [u8; 64] {
        self.0.sign(message).to_bytes()
    }

    /// Signs the statement that the device with `key` belongs to this account.
    pub fn certify(&self, device: &DeviceId, key: &DeviceKey) -> [u8; 64] {
        self.sign(&key.certification(&self.public(), device))
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Identity").field(&self.public()).finish()
    }
}

/// An account that is a member of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// The identity key. Proven: the key of each of the member's devices is certified with it.
    pub identity: IdentityKey,
    /// The username, a claim: compare it with the directory's name for `identity` before showing
    /// it.
    pub username: Username,
}

impl Member {
    pub(crate) fn write(&self, writer: &mut Writer) {
        writer.raw(self.identity.as_bytes());
        writer.bytes(self.username.as_str().as_bytes());
    }

    pub(crate) fn from_reader(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(Self { identity: IdentityKey::new(reader.array()?), username: read_username(reader)? })
    }

    /// Reads a member; `None` unless the key is an identity key and the name a username in
    /// canonical form.
    pub(crate) fn read(identity: &[u8], claimed: &[u8]) -> Option<Self> {
        let identity = IdentityKey::try_from(identity).ok()?;
        let claimed = std::str::from_utf8(claimed).ok()?;
        let username = Username::parse(claimed).ok().filter(|name| name.as_str() == claimed)?;
        Some(Self { identity, username })
    }
}

pub(crate) fn read_username(reader: &mut Reader<'_>) -> Result<Username, Malformed> {
    let name = std::str::from_utf8(reader.bytes()?).map_err(|_| Malformed)?;
    Username::parse(name).map_err(|_| Malformed)
}
