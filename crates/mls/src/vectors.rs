//! The vectors of proto/vectors/client.json, which docs/client.md describes, against this crate.

use openmls::prelude::{BasicCredential, Credential, Extensions, GroupContext};
use qpq_domain::{ChannelId, DeviceId, IdentityKey, UnixMillis, Username};
use serde::Deserialize;
use tls_codec::{DeserializeBytes as _, Serialize as _};

use crate::{
    Device, Identity,
    content::{self, Content, MessageContent},
    leaf::{LeafSigner, MemberDevice},
    outline,
    profile::{GroupId, GroupKind, Profile, direct_channel},
};

#[derive(Deserialize)]
struct Vectors {
    credentials: Vec<CredentialVector>,
    profiles: Vec<ProfileVector>,
    direct_channels: Vec<ChannelVector>,
    texts: Vec<TextVector>,
    controls: Vec<ControlVector>,
    authenticated_data: Vec<AuthenticatedDataVector>,
}

#[derive(Deserialize)]
struct CredentialVector {
    username: String,
    account_seed: Hex,
    identity_key: Hex,
    device: Option<DeviceVector>,
    signature_key: Hex,
    credential: Hex,
}

#[derive(Deserialize)]
struct DeviceVector {
    seed: Hex,
    id: Hex,
    name: String,
    proof: Hex,
}

#[derive(Deserialize)]
struct ProfileVector {
    group_id: Hex,
    creator: Hex,
    created_at: u64,
    channel: Hex,
    peer: Option<Hex>,
    name: Option<String>,
    admins: Vec<Hex>,
    extensions: Hex,
}

#[derive(Deserialize)]
struct ChannelVector {
    one: Hex,
    other: Hex,
    channel: Hex,
}

#[derive(Deserialize)]
struct TextVector {
    text: String,
    sent_at: u64,
    id: Hex,
    repeats: Option<Hex>,
    content: Hex,
}

#[derive(Deserialize)]
struct ControlVector {
    could_not_read: Vec<Hex>,
    leaving: bool,
    content: Hex,
}

#[derive(Deserialize)]
struct AuthenticatedDataVector {
    identity_key: Hex,
    authenticated_data: Hex,
}

#[derive(Deserialize)]
#[serde(try_from = "String")]
struct Hex(Vec<u8>);

impl TryFrom<String> for Hex {
    type Error = hex::FromHexError;

    fn try_from(text: String) -> Result<Self, hex::FromHexError> {
        hex::decode(text).map(Self)
    }
}

impl Hex {
    fn array<const N: usize>(&self) -> [u8; N] {
        self.0[..].try_into().unwrap()
    }

    fn key(&self) -> IdentityKey {
        IdentityKey::new(self.array())
    }
}

fn vectors() -> Vectors {
    serde_json::from_str(include_str!("../../../proto/vectors/client.json")).unwrap()
}

#[test]
fn credentials_are_as_in_the_vectors() {
    for vector in vectors().credentials {
        let identity = Identity::from_seed(&vector.account_seed.array());
        assert_eq!(identity.public(), vector.identity_key.key());
        let username = Username::parse(&vector.username).unwrap();
        let signer = match &vector.device {
            None => LeafSigner::of_account(&identity, &username),
            Some(DeviceVector { seed, id, name, proof }) => {
                let id = DeviceId::new(id.array());
                let device = Device::new(id, name, &seed.array(), proof.array());
                assert_eq!(identity.certify(&id, &device.public()), proof.array());
                LeafSigner::of_device(&device, &identity.public(), &username)
            }
        };
        assert_eq!(signer.public(), vector.signature_key.array());
        let expected: Credential = BasicCredential::new(vector.credential.0).into();
        assert_eq!(signer.credential().credential, expected);
        let leaf = MemberDevice::verify(&vector.signature_key.0, &expected).unwrap();
        assert_eq!((leaf.member.identity, &leaf.member.username), (identity.public(), &username));
        assert_eq!(leaf.id().is_some(), vector.device.is_some());
    }
}

#[test]
fn profiles_are_as_in_the_vectors() {
    for vector in vectors().profiles {
        let kind = match (&vector.peer, vector.name) {
            (Some(peer), None) => GroupKind::Direct { peer: peer.key() },
            (None, Some(name)) => GroupKind::Group { name },
            _ => panic!("a direct conversation or a group"),
        };
        let profile = Profile {
            kind,
            channel: ChannelId::new(vector.channel.array()),
            creator: vector.creator.key(),
            created_at: UnixMillis(vector.created_at),
            admins: vector.admins.iter().map(Hex::key).collect(),
        };
        assert_eq!(profile.extensions().tls_serialize_detached().unwrap(), vector.extensions.0);
        let read = Extensions::<GroupContext>::tls_deserialize_exact_bytes(&vector.extensions.0);
        let id = GroupId::try_from(&vector.group_id.0[..]).unwrap();
        assert_eq!(Profile::read(&id, &read.unwrap()), Some(profile));
    }
}

#[test]
fn direct_channels_are_as_in_the_vectors() {
    for vector in vectors().direct_channels {
        let channel = direct_channel(&vector.one.key(), &vector.other.key());
        assert_eq!(channel, ChannelId::new(vector.channel.array()));
    }
}

#[test]
fn contents_are_as_in_the_vectors() {
    let vectors = vectors();
    for vector in vectors.texts {
        let text = Content {
            id: vector.id.array(),
            sent_at: vector.sent_at,
            text: vector.text,
            repeats: vector.repeats.map(|digest| digest.array()),
            file: None,
        };
        assert_eq!(text.encode(), vector.content.0);
        assert_eq!(MessageContent::decode(&vector.content.0), Some(MessageContent::Text(text)));
    }
    for vector in vectors.controls {
        let digests: Vec<_> = vector.could_not_read.iter().map(Hex::array).collect();
        let (encoded, decoded) = match vector.leaving {
            true => (content::leaving(), MessageContent::Leaving),
            false => (content::could_not_read(&digests), MessageContent::CouldNotRead(digests)),
        };
        assert_eq!(encoded, vector.content.0);
        assert_eq!(MessageContent::decode(&vector.content.0), Some(decoded));
    }
}

#[test]
fn authenticated_data_is_as_in_the_vectors() {
    for vector in vectors().authenticated_data {
        assert_eq!(outline::claim(&vector.identity_key.key()), vector.authenticated_data.0);
    }
}
