//! The profile of a group: its id, kind, channel, creator and admins. The profile is part of the
//! group's context (RFC 9420 §8.1), so all members have the same one, and a joining device receives
//! it authenticated by the group's keys.

use std::fmt;

use openmls::prelude::{
    Extension, ExtensionType, Extensions, GroupContext, RequiredCapabilitiesExtension,
    UnknownExtension,
};
use prost::Message as _;
use qpq_domain::{ChannelId, IdentityKey, UnixMillis};
use rand::RngCore as _;
use sha2::{Digest as _, Sha256};

/// The extension that carries the profile, from the range for private use (RFC 9420 §17.3).
pub(crate) const EXTENSION: u16 = 0xF0A1;

const VERSION: u8 = 1;

/// A group's id: 16 random bytes, then the first 16 of SHA-256(`"qpq/group/1"` ‖ creator's identity
/// key ‖ random bytes).
///
/// The second half binds the creator. To claim the id, with a Welcome that arrives before the
/// creator's, another account would have to find a second preimage.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupId([u8; 32]);

impl GroupId {
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    pub(crate) fn random(creator: &IdentityKey) -> Self {
        let mut nonce = [0; 16];
        rand::rngs::OsRng.fill_bytes(&mut nonce);
        Self::bind(nonce, creator)
    }

    fn bind(nonce: [u8; 16], creator: &IdentityKey) -> Self {
        let mut hash = Sha256::new();
        hash.update(b"qpq/group/1");
        hash.update(creator.as_bytes());
        hash.update(nonce);
        let mut id = [0; 32];
        id[..16].copy_from_slice(&nonce);
        id[16..].copy_from_slice(&hash.finalize()[..16]);
        Self(id)
    }

    pub(crate) fn is_created_by(&self, creator: &IdentityKey) -> bool {
        let mut nonce = [0; 16];
        nonce.copy_from_slice(&self.0[..16]);
        Self::bind(nonce, creator) == *self
    }
}

impl TryFrom<&[u8]> for GroupId {
    type Error = qpq_domain::WrongLength;

    fn try_from(bytes: &[u8]) -> Result<Self, Self::Error> {
        bytes
            .try_into()
            .map(Self)
            .map_err(|_| qpq_domain::WrongLength { expected: 32, actual: bytes.len() })
    }
}

impl fmt::Display for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GroupId({self})")
    }
}

/// The two kinds of conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GroupKind {
    /// A conversation between two accounts, to which no other can be added. `peer` is the account
    /// that did not create the group.
    Direct {
        peer: IdentityKey,
    },
    Group {
        name: String,
    },
}

/// Returns the channel of the direct conversation between two accounts, the same from both sides:
/// the first 16 bytes of SHA-256(`"qpq/dm/1"` ‖ smaller key ‖ larger key).
pub fn direct_channel(one: &IdentityKey, other: &IdentityKey) -> ChannelId {
    let (smaller, larger) = if one < other { (one, other) } else { (other, one) };
    let mut hash = Sha256::new();
    hash.update(b"qpq/dm/1");
    hash.update(smaller.as_bytes());
    hash.update(larger.as_bytes());
    let mut channel = [0; 16];
    channel.copy_from_slice(&hash.finalize()[..16]);
    ChannelId::new(channel)
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Profile {
    pub(crate) kind: GroupKind,
    pub(crate) channel: ChannelId,
    pub(crate) creator: IdentityKey,
    /// The time of creation by the creator's clock.
    pub(crate) created_at: UnixMillis,
    /// The accounts that may change the group. If empty, the creator alone.
    pub(crate) admins: Vec<IdentityKey>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Encoded {
    #[prost(bytes = "vec", tag = "1")]
    creator: Vec<u8>,
    #[prost(uint64, tag = "2")]
    created_at: u64,
    #[prost(bytes = "vec", tag = "3")]
    channel: Vec<u8>,
    /// The `peer` of a direct conversation.
    #[prost(bytes = "vec", optional, tag = "4")]
    peer: Option<Vec<u8>>,
    /// The name of a group.
    #[prost(string, optional, tag = "5")]
    name: Option<String>,
    #[prost(bytes = "vec", repeated, tag = "6")]
    admins: Vec<Vec<u8>>,
}

impl Profile {
    pub(crate) fn direct(creator: IdentityKey, peer: IdentityKey, created_at: UnixMillis) -> Self {
        Self {
            kind: GroupKind::Direct { peer },
            channel: direct_channel(&creator, &peer),
            creator,
            created_at,
            admins: Vec::new(),
        }
    }

    /// Returns the accounts of `members`, given in the order of the tree, that may change the
    /// group: in a direct conversation both, in a group its admins. If no admin is a member, the
    /// first member is an admin.
    pub(crate) fn admins_of(&self, members: &[IdentityKey]) -> Vec<IdentityKey> {
        if matches!(self.kind, GroupKind::Direct { .. }) {
            return members.to_vec();
        }
        let named = if self.admins.is_empty() { &[self.creator][..] } else { &self.admins };
        let mut admins: Vec<_> =
            members.iter().filter(|key| named.contains(key)).copied().collect();
        if admins.is_empty() {
            admins.extend(members.first());
        }
        admins
    }

    /// Returns whether an admin may replace this profile by `next`.
    pub(crate) fn may_become(&self, next: &Self) -> bool {
        matches!((&self.kind, &next.kind), (GroupKind::Group { .. }, GroupKind::Group { .. }))
            && (self.channel, self.creator, self.created_at)
                == (next.channel, next.creator, next.created_at)
    }

    /// Returns whether `key` may be a member.
    pub(crate) fn admits(&self, key: &IdentityKey) -> bool {
        match &self.kind {
            GroupKind::Direct { peer } => *key == self.creator || key == peer,
            GroupKind::Group { .. } => true,
        }
    }

    /// Returns the extensions of the group context: the profile, and the requirement that each
    /// member understands it.
    pub(crate) fn extensions(&self) -> Extensions<GroupContext> {
        let profile = Extension::Unknown(EXTENSION, UnknownExtension(self.encode()));
        Extensions::from_vec(vec![profile, required()]).expect("both belong in a group context")
    }

    /// Reads the profile of a group. Returns `None` if the profile is missing, does not fit the
    /// group's id, contradicts itself, or comes with other extensions.
    pub(crate) fn read(id: &GroupId, extensions: &Extensions<GroupContext>) -> Option<Self> {
        let [Extension::Unknown(EXTENSION, UnknownExtension(bytes)), demand] =
            &extensions.iter().collect::<Vec<_>>()[..]
        else {
            return None;
        };
        Self::decode(bytes)
            .filter(|profile| **demand == required() && id.is_created_by(&profile.creator))
    }

    fn encode(&self) -> Vec<u8> {
        let (peer, name) = match &self.kind {
            GroupKind::Direct { peer } => (Some(peer.as_bytes().to_vec()), None),
            GroupKind::Group { name } => (None, Some(name.clone())),
        };
        let encoded = Encoded {
            creator: self.creator.as_bytes().to_vec(),
            created_at: self.created_at.0,
            channel: self.channel.as_bytes().to_vec(),
            peer,
            name,
            admins: self.admins.iter().map(|key| key.as_bytes().to_vec()).collect(),
        };
        let mut bytes = vec![VERSION];
        encoded.encode(&mut bytes).expect("a Vec grows as needed");
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (&VERSION, protobuf) = bytes.split_first()? else { return None };
        let encoded = Encoded::decode(protobuf).ok()?;
        let creator = IdentityKey::try_from(&encoded.creator[..]).ok()?;
        let channel = ChannelId::try_from(&encoded.channel[..]).ok()?;
        let created_at = UnixMillis(encoded.created_at);
        let admins: Vec<_> = encoded
            .admins
            .iter()
            .map(|key| IdentityKey::try_from(&key[..]).ok())
            .collect::<Option<_>>()?;
        match (encoded.peer, encoded.name) {
            (Some(peer), None) if admins.is_empty() => {
                let direct =
                    Self::direct(creator, IdentityKey::try_from(&peer[..]).ok()?, created_at);
                (direct.channel == channel).then_some(direct)
            }
            (None, Some(name)) => {
                Some(Self { kind: GroupKind::Group { name }, channel, creator, created_at, admins })
            }
            _ => None,
        }
    }
}

fn required() -> Extension {
    let profile = [ExtensionType::Unknown(EXTENSION)];
    Extension::RequiredCapabilities(RequiredCapabilitiesExtension::new(&profile, &[], &[]))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANN: IdentityKey = IdentityKey::new([1; 32]);
    const BOB: IdentityKey = IdentityKey::new([2; 32]);

    #[test]
    fn a_group_id_fits_only_its_creator() {
        let id = GroupId::random(&ANN);
        assert!(id.is_created_by(&ANN));
        assert!(!id.is_created_by(&BOB));
        assert_ne!(id, GroupId::random(&ANN));
    }

    #[test]
    fn the_direct_channel_is_the_same_from_both_sides() {
        assert_eq!(direct_channel(&ANN, &BOB), direct_channel(&BOB, &ANN));
        let digest = Sha256::digest([&b"qpq/dm/1"[..], &[1; 32], &[2; 32]].concat());
        assert_eq!(direct_channel(&ANN, &BOB).as_bytes(), &digest[..16]);
    }

    #[test]
    fn encoded_profiles_decode_and_contradictory_ones_do_not() {
        let id = GroupId::random(&ANN);
        let direct = Profile::direct(ANN, BOB, UnixMillis(5));
        assert_eq!(Profile::read(&id, &direct.extensions()), Some(direct.clone()));
        let group = Profile {
            kind: GroupKind::Group { name: "friends".into() },
            channel: ChannelId::new([9; 16]),
            creator: ANN,
            created_at: UnixMillis(7),
            admins: vec![ANN, BOB],
        };
        assert_eq!(Profile::read(&id, &group.extensions()), Some(group.clone()));

        let others = Profile { creator: BOB, ..group };
        assert_eq!(
            Profile::read(&id, &others.extensions()),
            None,
            "not the creator that the id names"
        );
        let elsewhere = Profile { channel: ChannelId::new([9; 16]), ..direct };
        assert_eq!(
            Profile::read(&id, &elsewhere.extensions()),
            None,
            "not the two people's channel"
        );
        assert_eq!(Profile::read(&id, &Extensions::empty()), None);
    }

    #[test]
    fn where_no_admin_is_left_the_first_member_is_one() {
        let cat = IdentityKey::new([3; 32]);
        let mut profile = Profile {
            kind: GroupKind::Group { name: "friends".into() },
            channel: ChannelId::new([9; 16]),
            creator: ANN,
            created_at: UnixMillis(7),
            admins: vec![],
        };
        assert_eq!(profile.admins_of(&[BOB, ANN]), [ANN]);
        assert_eq!(profile.admins_of(&[BOB, cat]), [BOB]);
        profile.admins = vec![BOB, cat];
        assert_eq!(profile.admins_of(&[ANN, BOB, cat]), [BOB, cat]);
        assert_eq!(profile.admins_of(&[ANN]), [ANN]);
        assert_eq!(Profile::direct(ANN, BOB, UnixMillis(5)).admins_of(&[ANN, BOB]), [ANN, BOB]);
    }

    #[test]
    fn the_extension_number_is_one_that_openmls_does_not_interpret() {
        assert_eq!(ExtensionType::from(EXTENSION), ExtensionType::Unknown(EXTENSION));
    }
}
