//! The client profile of docs/client.md, written from that text without our client's code.

use ed25519_dalek::{Signature, SigningKey, VerifyingKey};
use mls_rs::{
    Extension, ExtensionList,
    extension::{ExtensionType, MlsExtension as _, built_in::RequiredCapabilitiesExt},
    identity::{CredentialType, SigningIdentity},
};
use prost::Message as _;
use qpq_domain::Username;
use sha2::{Digest as _, Sha256, Sha512};

/// An Ed25519 public key.
pub(crate) type Key = [u8; 32];

/// The extension with a group's profile.
pub(crate) const PROFILE: ExtensionType = ExtensionType::new(0xF0A1);

const VERSION: u8 = 1;
const DEVICE_CREDENTIAL: u8 = 1;
const TEXT: u8 = 1;
const CONTROL: u8 = 2;

/// The credential of a device, after its first byte.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct DeviceCredential {
    #[prost(string, tag = "1")]
    pub(crate) username: String,
    #[prost(bytes = "vec", tag = "2")]
    pub(crate) identity_key: Vec<u8>,
    #[prost(bytes = "vec", tag = "3")]
    pub(crate) device_id: Vec<u8>,
    #[prost(string, tag = "4")]
    pub(crate) device_name: String,
    #[prost(bytes = "vec", tag = "5")]
    pub(crate) device_proof: Vec<u8>,
}

impl DeviceCredential {
    /// Returns the credential of a device, with the account's statement about its key.
    pub(crate) fn certified(
        account: &SigningKey,
        username: &str,
        device_id: [u8; 16],
        device_name: &str,
        device_key: &Key,
    ) -> Self {
        use ed25519_dalek::Signer as _;
        let identity_key = account.verifying_key().to_bytes();
        let statement = statement(&identity_key, &device_id, device_key);
        Self {
            username: username.into(),
            identity_key: identity_key.to_vec(),
            device_id: device_id.to_vec(),
            device_name: device_name.into(),
            device_proof: account.sign(&statement).to_vec(),
        }
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        versioned(DEVICE_CREDENTIAL, self)
    }
}

fn statement(identity_key: &Key, device_id: &[u8; 16], device_key: &Key) -> Vec<u8> {
    [&b"qpq/device/1"[..], identity_key, device_id, device_key].concat()
}

/// The account of a leaf and, if it has one, its device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Leaf {
    pub(crate) account: Key,
    pub(crate) username: String,
    pub(crate) device: Option<[u8; 16]>,
}

impl Leaf {
    /// Reads a leaf; `None` unless its credential is one of the profile and proven.
    pub(crate) fn read(leaf: &SigningIdentity) -> Option<Self> {
        let credential = &leaf.credential.as_basic()?.identifier;
        let key: Key = leaf.signature_key.as_bytes().try_into().ok()?;
        let leaf = match credential.split_first()? {
            (&DEVICE_CREDENTIAL, protobuf) => {
                let device = DeviceCredential::decode(protobuf).ok()?;
                let account: Key = device.identity_key.try_into().ok()?;
                let device_id: [u8; 16] = device.device_id.try_into().ok()?;
                let proof = Signature::from_slice(&device.device_proof).ok()?;
                VerifyingKey::from_bytes(&account)
                    .ok()?
                    .verify_strict(&statement(&account, &device_id, &key), &proof)
                    .ok()?;
                (device.device_name.len() <= 256).then_some(Self {
                    account,
                    username: device.username,
                    device: Some(device_id),
                })?
            }
            _ => {
                let username = String::from_utf8(credential.clone()).ok()?;
                Self { account: key, username, device: None }
            }
        };
        let canonical = Username::parse(&leaf.username).ok()?;
        (canonical.as_str() == leaf.username).then_some(leaf)
    }
}

/// The profile of a group, after its first byte.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct GroupProfile {
    #[prost(bytes = "vec", tag = "1")]
    pub(crate) creator: Vec<u8>,
    #[prost(uint64, tag = "2")]
    pub(crate) created_at: u64,
    #[prost(bytes = "vec", tag = "3")]
    pub(crate) channel: Vec<u8>,
    #[prost(bytes = "vec", optional, tag = "4")]
    pub(crate) peer: Option<Vec<u8>>,
    #[prost(string, optional, tag = "5")]
    pub(crate) name: Option<String>,
    #[prost(bytes = "vec", repeated, tag = "6")]
    pub(crate) admins: Vec<Vec<u8>>,
}

impl GroupProfile {
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        versioned(VERSION, self)
    }

    /// Returns the extensions of the group context.
    pub(crate) fn extensions(&self) -> ExtensionList {
        let profile = Extension::new(PROFILE, self.to_bytes());
        vec![profile, required()].into()
    }

    /// Reads the profile from the extensions of the group with this id; `None` if they are not
    /// those that the profile allows.
    pub(crate) fn read(group_id: &[u8], extensions: &ExtensionList) -> Option<Self> {
        let [profile, capabilities] = &extensions[..] else { return None };
        if profile.extension_type != PROFILE || *capabilities != required() {
            return None;
        }
        let (&VERSION, protobuf) = profile.extension_data.split_first()? else { return None };
        let profile = Self::decode(protobuf).ok()?;
        let creator: Key = profile.creator[..].try_into().ok()?;
        let random: [u8; 16] = group_id.get(..16)?.try_into().ok()?;
        let keys = || profile.admins.iter().chain(&profile.peer);
        let is_consistent = self::group_id(&creator, random)[..] == *group_id
            && profile.channel.len() == 16
            && keys().all(|key| key.len() == 32)
            && match (&profile.peer, &profile.name) {
                (Some(peer), None) => {
                    let peer: Key = peer[..].try_into().ok()?;
                    profile.admins.is_empty() && profile.channel == direct_channel(&creator, &peer)
                }
                (None, Some(_)) => true,
                _ => false,
            };
        is_consistent.then_some(profile)
    }

    /// Returns the accounts that may change the group, of `members` in the order of the leaves.
    pub(crate) fn admins_of(&self, members: &[Key]) -> Vec<Key> {
        if self.peer.is_some() {
            return members.to_vec();
        }
        let is_named = |key: &&Key| match &self.admins[..] {
            [] => self.creator == **key,
            named => named.iter().any(|admin| admin == *key),
        };
        let present: Vec<Key> = members.iter().filter(is_named).copied().collect();
        if present.is_empty() { members.iter().take(1).copied().collect() } else { present }
    }

    /// Returns whether an account may be a member.
    pub(crate) fn admits(&self, account: &Key) -> bool {
        match &self.peer {
            Some(peer) => self.creator == account || peer == account,
            None => true,
        }
    }
}

fn required() -> Extension {
    let none: Vec<CredentialType> = Vec::new();
    RequiredCapabilitiesExt::new(vec![PROFILE], Vec::new(), none)
        .into_extension()
        .expect("it is small")
}

/// Returns the id of a group: random bytes, and the binding of its creator.
pub(crate) fn group_id(creator: &Key, random: [u8; 16]) -> [u8; 32] {
    let digest = Sha256::digest([&b"qpq/group/1"[..], creator, &random].concat());
    let mut id = [0; 32];
    id[..16].copy_from_slice(&random);
    id[16..].copy_from_slice(&digest[..16]);
    id
}

/// Returns the channel of the direct conversation of two accounts.
pub(crate) fn direct_channel(one: &Key, other: &Key) -> [u8; 16] {
    let (smaller, larger) = (one.min(other), one.max(other));
    let digest = Sha256::digest([&b"qpq/dm/1"[..], smaller, larger].concat());
    digest[..16].try_into().expect("16 bytes")
}

/// Returns the authenticated data of the messages of an account.
pub(crate) fn authenticated_data(account: &Key) -> Vec<u8> {
    [&[VERSION][..], account].concat()
}

/// A text, after its first byte.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Text {
    #[prost(string, tag = "1")]
    pub(crate) text: String,
    #[prost(uint64, tag = "2")]
    pub(crate) sent_at: u64,
    #[prost(bytes = "vec", tag = "3")]
    pub(crate) id: Vec<u8>,
    #[prost(bytes = "vec", optional, tag = "4")]
    pub(crate) repeats: Option<Vec<u8>>,
}

/// A message from client to client, after its first byte.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Control {
    #[prost(bytes = "vec", repeated, tag = "1")]
    pub(crate) could_not_read: Vec<Vec<u8>>,
    #[prost(bool, tag = "2")]
    pub(crate) leaving: bool,
}

/// The content of an application message.
#[derive(Debug, PartialEq)]
pub(crate) enum Content {
    Text(Text),
    Control(Control),
}

impl Content {
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        match self {
            Self::Text(text) => versioned(TEXT, text),
            Self::Control(control) => versioned(CONTROL, control),
        }
    }

    pub(crate) fn read(bytes: &[u8]) -> Option<Self> {
        match bytes.split_first()? {
            (&TEXT, protobuf) => Text::decode(protobuf).ok().map(Self::Text),
            (&CONTROL, protobuf) => Control::decode(protobuf).ok().map(Self::Control),
            _ => None,
        }
    }
}

/// Returns the safety number of two accounts.
pub(crate) fn safety_number(one: &Key, other: &Key) -> String {
    format!("{} {}", fingerprint(one.min(other)), fingerprint(one.max(other)))
}

/// Returns the half of a safety number that is about one key.
pub(crate) fn fingerprint(key: &Key) -> String {
    let mut digest = Sha512::digest([&b"qpq/safety/1"[..], key].concat());
    for _ in 1..4096 {
        digest = Sha512::digest([&digest[..], key].concat());
    }
    let groups: Vec<_> = (0..6)
        .map(|group| {
            let mut number = [0; 8];
            number[3..].copy_from_slice(&digest[5 * group..5 * group + 5]);
            format!("{:05}", u64::from_be_bytes(number) % 100_000)
        })
        .collect();
    groups.join(" ")
}

fn versioned(version: u8, message: &impl prost::Message) -> Vec<u8> {
    [&[version][..], &message.encode_to_vec()].concat()
}
