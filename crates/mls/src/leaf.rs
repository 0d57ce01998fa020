//! The leaves of a group: each is a device of an account, or an account that has no devices.
//!
//! A device signs with its own key, since the signature keys in a group are distinct (RFC 9420
//! §7.3). Its credential (§5.3) carries the account's statement about that key, so that every
//! member can check it without asking the server. The credential of an account without devices is
//! its username alone, and the leaf is signed by the identity key.

use std::fmt;

use ed25519_dalek::{Signer as _, SigningKey};
use openmls::prelude::{BasicCredential, Credential, CredentialWithKey, SignatureScheme};
use openmls_traits::signatures::{Signer, SignerError};
use prost::Message as _;
use qpq_domain::{DeviceId, DeviceKey, IdentityKey, MAX_DEVICE_NAME, Username};
use rand::RngCore as _;

use crate::identity::{Identity, Member};

/// The first byte of a device's credential. Usernames have no control characters.
const DEVICE_CREDENTIAL: u8 = 1;

/// A device of this account: its key, and the account's statement about it.
#[derive(Clone)]
pub struct Device {
    id: DeviceId,
    name: String,
    key: SigningKey,
    proof: [u8; 64],
}

impl Device {
    /// Creates a device with a fresh key, certified by its account.
    pub fn generate(identity: &Identity, name: &str) -> Self {
        let mut id = [0; 16];
        rand::rngs::OsRng.fill_bytes(&mut id);
        let key = SigningKey::generate(&mut rand::rngs::OsRng);
        let id = DeviceId::new(id);
        let proof = identity.certify(&id, &DeviceKey::new(key.verifying_key().to_bytes()));
        Self { id, name: name.to_owned(), key, proof }
    }

    /// Creates a device from its parts. `seed` is the secret seed of its key, and `proof` the
    /// account's signature over [`DeviceKey::certification`].
    pub fn new(id: DeviceId, name: &str, seed: &[u8; 32], proof: [u8; 64]) -> Self {
        Self { id, name: name.to_owned(), key: SigningKey::from_bytes(seed), proof }
    }

    pub fn id(&self) -> DeviceId {
        self.id
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the secret seed of the device's key.
    pub fn seed(&self) -> &[u8; 32] {
        self.key.as_bytes()
    }

    pub fn public(&self) -> DeviceKey {
        DeviceKey::new(self.key.verifying_key().to_bytes())
    }

    /// Returns the account's signature over [`DeviceKey::certification`].
    pub fn proof(&self) -> &[u8; 64] {
        &self.proof
    }

    /// Signs `message` with the device's key (Ed25519, RFC 8032).
    pub fn sign(&self, message: &[u8]) -> [u8; 64] {
        self.key.sign(message).to_bytes()
    }

    /// Returns the same device under another name.
    #[must_use]
    pub fn renamed(&self, name: &str) -> Self {
        Self { name: name.to_owned(), ..self.clone() }
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device").field("id", &self.id).field("name", &self.name).finish()
    }
}

/// A device of a member, as its leaf describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberDevice {
    /// The account.
    pub member: Member,
    /// The device; `None` for a leaf that is signed by the identity key.
    pub device: Option<DeviceDescription>,
}

/// The description of a device in its leaf.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceDescription {
    pub id: DeviceId,
    /// The name that the owner chose.
    pub name: String,
    pub key: DeviceKey,
    proof: [u8; 64],
}

#[derive(Clone, PartialEq, prost::Message)]
struct Encoded {
    #[prost(string, tag = "1")]
    username: String,
    #[prost(bytes = "vec", tag = "2")]
    identity_key: Vec<u8>,
    #[prost(bytes = "vec", tag = "3")]
    device_id: Vec<u8>,
    #[prost(string, tag = "4")]
    device_name: String,
    #[prost(bytes = "vec", tag = "5")]
    device_proof: Vec<u8>,
}

impl MemberDevice {
    /// Reads a leaf without checking the account's statement.
    ///
    /// The statement was checked when the leaf came into the group. `None` if the credential is not
    /// of the client profile.
    pub(crate) fn read(signature_key: &[u8], credential: &Credential) -> Option<Self> {
        let basic = BasicCredential::try_from(credential.clone()).ok()?;
        let Some((&DEVICE_CREDENTIAL, protobuf)) = basic.identity().split_first() else {
            let member = Member::read(signature_key, basic.identity())?;
            return Some(Self { member, device: None });
        };
        let encoded = Encoded::decode(protobuf).ok()?;
        let member = Member::read(&encoded.identity_key, encoded.username.as_bytes())?;
        if encoded.device_name.len() > MAX_DEVICE_NAME {
            return None;
        }
        let device = DeviceDescription {
            id: DeviceId::try_from(&encoded.device_id[..]).ok()?,
            name: encoded.device_name,
            key: DeviceKey::try_from(signature_key).ok()?,
            proof: encoded.device_proof.try_into().ok()?,
        };
        Some(Self { member, device: Some(device) })
    }

    /// Reads a leaf, and checks the account's statement about the device.
    pub(crate) fn verify(signature_key: &[u8], credential: &Credential) -> Option<Self> {
        Self::read(signature_key, credential).filter(Self::is_certified)
    }

    fn is_certified(&self) -> bool {
        let Some(device) = &self.device else { return true };
        let identity = &self.member.identity;
        identity.verify(&device.key.certification(identity, &device.id), &device.proof).is_ok()
    }

    /// Returns the signature key of the leaf.
    pub(crate) fn signature_key(&self) -> [u8; 32] {
        match &self.device {
            Some(device) => *device.key.as_bytes(),
            None => *self.member.identity.as_bytes(),
        }
    }

    /// Returns the device's id; `None` for a leaf that is signed by the identity key.
    pub fn id(&self) -> Option<DeviceId> {
        self.device.as_ref().map(|device| device.id)
    }

    /// Returns the device's name, which is empty for a leaf that is signed by the identity key.
    pub fn name(&self) -> &str {
        self.device.as_ref().map_or("", |device| &device.name)
    }
}

/// The key and the credential of a leaf of ours.
#[derive(Clone)]
pub(crate) struct LeafSigner {
    key: SigningKey,
    credential: Vec<u8>,
}

impl LeafSigner {
    /// Returns the signer of an account that has no devices.
    pub(crate) fn of_account(identity: &Identity, username: &Username) -> Self {
        Self {
            key: SigningKey::from_bytes(identity.seed()),
            credential: username.as_str().as_bytes().to_vec(),
        }
    }

    pub(crate) fn of_device(device: &Device, account: &IdentityKey, username: &Username) -> Self {
        let encoded = Encoded {
            username: username.to_string(),
            identity_key: account.as_bytes().to_vec(),
            device_id: device.id.as_bytes().to_vec(),
            device_name: device.name.clone(),
            device_proof: device.proof.to_vec(),
        };
        let mut credential = vec![DEVICE_CREDENTIAL];
        encoded.encode(&mut credential).expect("a Vec grows as needed");
        Self { key: device.key.clone(), credential }
    }

    pub(crate) fn credential(&self) -> CredentialWithKey {
        CredentialWithKey {
            credential: BasicCredential::new(self.credential.clone()).into(),
            signature_key: self.public().to_vec().into(),
        }
    }

    pub(crate) fn public(&self) -> [u8; 32] {
        self.key.verifying_key().to_bytes()
    }
}

impl Signer for LeafSigner {
    fn sign(&self, payload: &[u8]) -> Result<Vec<u8>, SignerError> {
        Ok(self.key.sign(payload).to_bytes().to_vec())
    }

    fn signature_scheme(&self) -> SignatureScheme {
        SignatureScheme::ED25519
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(leaf: &CredentialWithKey) -> Option<MemberDevice> {
        MemberDevice::verify(leaf.signature_key.as_slice(), &leaf.credential)
    }

    #[test]
    fn a_certified_device_and_an_account_without_devices_are_read_back() {
        let identity = Identity::generate();
        let username = Username::parse("alice").unwrap();
        let device = Device::generate(&identity, "laptop");
        let leaf = LeafSigner::of_device(&device, &identity.public(), &username).credential();
        let found = read(&leaf).unwrap();
        assert_eq!(
            found.member,
            Member { identity: identity.public(), username: username.clone() }
        );
        assert_eq!((found.id(), found.name()), (Some(device.id()), "laptop"));
        assert_eq!(found.signature_key(), *device.public().as_bytes());

        let alone = read(&LeafSigner::of_account(&identity, &username).credential()).unwrap();
        assert_eq!((alone.member, alone.device), (found.member, None));
    }

    #[test]
    fn a_device_without_a_valid_statement_of_its_account_is_refused() {
        let (identity, other) = (Identity::generate(), Identity::generate());
        let username = Username::parse("alice").unwrap();
        let forged = Device::generate(&other, "spy");
        let leaf = LeafSigner::of_device(&forged, &identity.public(), &username).credential();
        assert_eq!(read(&leaf), None, "signed by another account");
        let device = Device::generate(&identity, "laptop");
        let moved = Device { id: DeviceId::new([9; 16]), ..device.clone() };
        let leaf = LeafSigner::of_device(&moved, &identity.public(), &username).credential();
        assert_eq!(read(&leaf), None, "for another device");
        let mut leaf = LeafSigner::of_device(&device, &identity.public(), &username).credential();
        leaf.signature_key = forged.public().as_bytes().to_vec().into();
        assert_eq!(read(&leaf), None, "for another key");
    }
}
