//! The vectors of proto/vectors/client.json against this implementation of docs/client.md.

use ed25519_dalek::SigningKey;
use mls_rs::{
    ExtensionList,
    crypto::SignaturePublicKey,
    identity::{SigningIdentity, basic::BasicCredential},
    mls_rs_codec::{MlsDecode as _, MlsEncode as _},
};
use serde::Deserialize;

use super::profile::{
    Content, Control, DeviceCredential, GroupProfile, Key, Leaf, Text, authenticated_data,
    direct_channel, fingerprint, group_id, safety_number,
};

#[derive(Deserialize)]
struct Vectors {
    credentials: Vec<CredentialVector>,
    profiles: Vec<ProfileVector>,
    direct_channels: Vec<ChannelVector>,
    texts: Vec<TextVector>,
    controls: Vec<ControlVector>,
    authenticated_data: Vec<AuthenticatedDataVector>,
    safety_numbers: Vec<SafetyVector>,
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
    profile: Hex,
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
struct SafetyVector {
    one: Hex,
    other: Hex,
    fingerprint_of_one: String,
    safety_number: String,
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
        self.0[..].try_into().expect("the length of a vector's field")
    }
}

fn vectors() -> Vectors {
    serde_json::from_str(include_str!("../../../proto/vectors/client.json")).expect("vectors")
}

#[test]
fn credentials_are_as_in_the_vectors() {
    for vector in vectors().credentials {
        let account = SigningKey::from_bytes(&vector.account_seed.array());
        assert_eq!(account.verifying_key().to_bytes(), vector.identity_key.array::<32>());
        let written = match &vector.device {
            None => vector.username.as_bytes().to_vec(),
            Some(device) => {
                let key = SigningKey::from_bytes(&device.seed.array()).verifying_key().to_bytes();
                assert_eq!(key, vector.signature_key.array::<32>());
                let credential = DeviceCredential::certified(
                    &account,
                    &vector.username,
                    device.id.array(),
                    &device.name,
                    &key,
                );
                assert_eq!(credential.device_proof, device.proof.0);
                credential.to_bytes()
            }
        };
        assert_eq!(written, vector.credential.0);
        let leaf = |signature_key: Key| {
            Leaf::read(&SigningIdentity::new(
                BasicCredential::new(vector.credential.0.clone()).into_credential(),
                SignaturePublicKey::new_slice(&signature_key),
            ))
        };
        let expected = Leaf {
            account: vector.identity_key.array(),
            username: vector.username.clone(),
            device: vector.device.as_ref().map(|device| device.id.array()),
        };
        assert_eq!(leaf(vector.signature_key.array()), Some(expected));
        if vector.device.is_some() {
            assert_eq!(leaf(vector.identity_key.array()), None, "another key than was certified");
        }
    }
}

#[test]
fn profiles_and_group_ids_are_as_in_the_vectors() {
    for vector in vectors().profiles {
        let profile = GroupProfile {
            creator: vector.creator.0.clone(),
            created_at: vector.created_at,
            channel: vector.channel.0,
            peer: vector.peer.map(|peer| peer.0),
            name: vector.name,
            admins: vector.admins.into_iter().map(|key| key.0).collect(),
        };
        assert_eq!(profile.to_bytes(), vector.profile.0);
        let written = profile.extensions().mls_encode_to_vec().expect("it is small");
        assert_eq!(written, vector.extensions.0);
        let read = ExtensionList::mls_decode(&mut &vector.extensions.0[..]).expect("extensions");
        assert_eq!(GroupProfile::read(&vector.group_id.0, &read), Some(profile));
        let random = vector.group_id.array::<32>()[..16].try_into().expect("16 bytes");
        assert_eq!(group_id(&vector.creator.array(), random)[..], vector.group_id.0);
    }
}

#[test]
fn direct_channels_are_as_in_the_vectors() {
    for vector in vectors().direct_channels {
        let channel = direct_channel(&vector.one.array(), &vector.other.array());
        assert_eq!(channel, vector.channel.array::<16>());
    }
}

#[test]
fn contents_are_as_in_the_vectors() {
    let vectors = vectors();
    let texts = vectors.texts.into_iter().map(|vector| {
        let text = Text {
            text: vector.text,
            sent_at: vector.sent_at,
            id: vector.id.0,
            repeats: vector.repeats.map(|digest| digest.0),
        };
        (Content::Text(text), vector.content.0)
    });
    let controls = vectors.controls.into_iter().map(|vector| {
        let control = Control {
            could_not_read: vector.could_not_read.into_iter().map(|digest| digest.0).collect(),
            leaving: vector.leaving,
        };
        (Content::Control(control), vector.content.0)
    });
    for (content, bytes) in texts.chain(controls) {
        assert_eq!(content.to_bytes(), bytes);
        assert_eq!(Content::read(&bytes), Some(content));
    }
}

#[test]
fn authenticated_data_is_as_in_the_vectors() {
    for vector in vectors().authenticated_data {
        let written = authenticated_data(&vector.identity_key.array());
        assert_eq!(written, vector.authenticated_data.0);
    }
}

#[test]
fn safety_numbers_are_as_in_the_vectors() {
    for vector in vectors().safety_numbers {
        let (one, other) = (vector.one.array(), vector.other.array());
        assert_eq!(fingerprint(&one), vector.fingerprint_of_one);
        assert_eq!(safety_number(&one, &other), vector.safety_number);
    }
}
