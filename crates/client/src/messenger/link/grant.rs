//! The grant: the content of an account that a new device receives.

use hkdf::Hkdf;
use hmac::{Hmac, Mac as _};
use prost::Message as _;
use qpq_domain::{ChannelId, IdentityKey};
use qpq_mls::{
    Identity,
    sealed::{self, SealingKeyPair},
};
use sha2::Sha256;
use zeroize::Zeroizing;

use super::request::Request;
use crate::{
    error::Error,
    messenger::{
        people::Known,
        records::{Corrupt, SavedPerson},
    },
    secret::ExportKey,
};

/// The first bytes of a message that is a grant.
pub(super) const PREFIX: &[u8] = b"QPQG";
/// The `info` of HPKE.
const INFO: &[u8] = b"qpq/link/1";
/// The label of the MAC and of its key.
const LABEL: &[u8] = b"qpq/link-grant/1";

/// The maximum size of a grant before it is sealed, in bytes. A message has at most 1 MiB.
const MAX_LEN: usize = 960 * 1024;

#[derive(Clone, PartialEq, prost::Message)]
struct Encoded {
    #[prost(bytes = "vec", tag = "1")]
    identity_seed: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    device_proof: Vec<u8>,
    #[prost(message, repeated, tag = "3")]
    conversations: Vec<EncodedConversation>,
    #[prost(message, repeated, tag = "4")]
    people: Vec<EncodedPerson>,
    #[prost(bytes = "vec", repeated, tag = "5")]
    blocked: Vec<Vec<u8>>,
    #[prost(bytes = "vec", tag = "6")]
    mac: Vec<u8>,
}

impl Drop for Encoded {
    fn drop(&mut self) {
        zeroize::Zeroize::zeroize(&mut self.identity_seed);
    }
}

#[derive(Clone, PartialEq, prost::Message)]
struct EncodedConversation {
    #[prost(bytes = "vec", tag = "1")]
    channel: Vec<u8>,
    #[prost(bytes = "vec", repeated, tag = "2")]
    members: Vec<Vec<u8>>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct EncodedPerson {
    #[prost(bytes = "vec", tag = "1")]
    identity: Vec<u8>,
    #[prost(string, tag = "2")]
    username: String,
    #[prost(uint32, tag = "3")]
    standing: u32,
    #[prost(uint64, optional, tag = "4")]
    compared_at: Option<u64>,
    #[prost(bool, tag = "5")]
    is_acquainted: bool,
}

/// The content of a grant.
#[derive(Debug)]
pub(super) struct Grant {
    /// The account's signature over the new device's key.
    pub(super) proof: [u8; 64],
    pub(super) account: AccountContent,
}

/// The content of an account that a new device receives, by a grant or a recovery bundle.
#[derive(Debug)]
pub(in crate::messenger) struct AccountContent {
    pub(in crate::messenger) identity: Identity,
    pub(in crate::messenger) conversations: Vec<GrantedConversation>,
    pub(in crate::messenger) people: Vec<GrantedPerson>,
    pub(in crate::messenger) blocked: Vec<IdentityKey>,
}

/// A conversation of the account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::messenger) struct GrantedConversation {
    pub(in crate::messenger) channel: ChannelId,
    /// The members, who may vouch for the group.
    pub(in crate::messenger) members: Vec<IdentityKey>,
}

/// A person that the account knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::messenger) struct GrantedPerson {
    pub(in crate::messenger) identity: IdentityKey,
    pub(in crate::messenger) known: Known,
    pub(in crate::messenger) is_acquainted: bool,
}

impl Grant {
    /// Seals the grant for a request, and returns the message.
    ///
    /// A grant that would be too large leaves out people that are not acquaintances.
    pub(super) fn seal(&self, request: &Request, export_key: &ExportKey) -> Result<Vec<u8>, Error> {
        let mut encoded = Encoded::new(&self.account, self.proof.to_vec());
        encoded.shorten(MAX_LEN);
        encoded.mac = mac(&encoded, request, export_key).finalize().into_bytes().to_vec();
        let content = Zeroizing::new(encoded.encode_to_vec());
        let sealed = sealed::seal(&request.hpke_key, INFO, &request.digest(), &content)?;
        Ok([PREFIX, &sealed].concat())
    }

    /// Opens a grant for a request of ours. `None` unless it is from a device of `identity` whose
    /// owner knows the password.
    pub(super) fn open(
        message: &[u8],
        keys: &SealingKeyPair,
        request: &Request,
        identity: &IdentityKey,
        export_key: &ExportKey,
    ) -> Option<Self> {
        let sealed = message.strip_prefix(PREFIX)?;
        let content = keys.open(sealed, INFO, &request.digest())?;
        let encoded = Encoded::decode(&content[..]).ok()?;
        mac(&encoded, request, export_key).verify_slice(&encoded.mac).ok()?;
        let proof = encoded.device_proof[..].try_into().ok()?;
        let grant = Self { proof, account: encoded.read().ok()? };
        let statement = request.key.certification(identity, &request.device);
        let is_certified = identity.verify(&statement, &grant.proof).is_ok();
        (grant.account.identity.public() == *identity && is_certified).then_some(grant)
    }
}

impl AccountContent {
    /// Encodes the content in at most `max` bytes. Content that would be longer is shortened as
    /// that of a grant.
    pub(in crate::messenger) fn encode(&self, max: usize) -> Zeroizing<Vec<u8>> {
        let mut encoded = Encoded::new(self, Vec::new());
        encoded.shorten(max);
        Zeroizing::new(encoded.encode_to_vec())
    }

    /// Decodes the output of [`AccountContent::encode`].
    pub(in crate::messenger) fn decode(bytes: &[u8]) -> Result<Self, Corrupt> {
        Encoded::decode(bytes).map_err(Corrupt::new)?.read()
    }
}

impl Encoded {
    fn new(account: &AccountContent, device_proof: Vec<u8>) -> Self {
        Self {
            identity_seed: account.identity.seed().to_vec(),
            device_proof,
            conversations: account.conversations.iter().map(EncodedConversation::from).collect(),
            people: account.people.iter().map(EncodedPerson::from).collect(),
            blocked: account.blocked.iter().map(|key| key.as_bytes().to_vec()).collect(),
            mac: Vec::new(),
        }
    }

    /// Shortens the content to `max` bytes: removes people that are not acquaintances, then members
    /// of the largest conversations, then other people and conversations.
    fn shorten(&mut self, max: usize) {
        if self.encoded_len() > max {
            self.people.retain(|person| person.is_acquainted);
        }
        let mut most = 8_192;
        while self.encoded_len() > max && most > 0 {
            for conversation in &mut self.conversations {
                conversation.members.truncate(most);
            }
            most /= 2;
        }
        while self.encoded_len() > max && !self.people.is_empty() {
            self.people.truncate(self.people.len() / 2);
        }
        while self.encoded_len() > max && !self.conversations.is_empty() {
            self.conversations.truncate(self.conversations.len() / 2);
        }
    }

    fn read(&self) -> Result<AccountContent, Corrupt> {
        let seed = <&[u8; 32]>::try_from(&self.identity_seed[..]).map_err(Corrupt::new)?;
        Ok(AccountContent {
            identity: Identity::from_seed(seed),
            conversations: self
                .conversations
                .iter()
                .map(EncodedConversation::read)
                .collect::<Result<_, _>>()?,
            people: self.people.iter().map(EncodedPerson::read).collect::<Result<_, _>>()?,
            blocked: keys(&self.blocked)?,
        })
    }
}

impl From<&GrantedConversation> for EncodedConversation {
    fn from(conversation: &GrantedConversation) -> Self {
        Self {
            channel: conversation.channel.as_bytes().to_vec(),
            members: conversation.members.iter().map(|key| key.as_bytes().to_vec()).collect(),
        }
    }
}

impl EncodedConversation {
    fn read(&self) -> Result<GrantedConversation, Corrupt> {
        let channel = ChannelId::try_from(&self.channel[..]).map_err(Corrupt::new)?;
        Ok(GrantedConversation { channel, members: keys(&self.members)? })
    }
}

impl From<&GrantedPerson> for EncodedPerson {
    fn from(person: &GrantedPerson) -> Self {
        let SavedPerson { identity, username, standing, compared_at } =
            SavedPerson::new(&person.identity, &person.known);
        Self { identity, username, standing, compared_at, is_acquainted: person.is_acquainted }
    }
}

impl EncodedPerson {
    fn read(&self) -> Result<GrantedPerson, Corrupt> {
        let Self { identity, username, standing, compared_at, is_acquainted } = self.clone();
        let (identity, known) =
            SavedPerson { identity, username, standing, compared_at }.restore()?;
        Ok(GrantedPerson { identity, known, is_acquainted })
    }
}

fn keys(encoded: &[Vec<u8>]) -> Result<Vec<IdentityKey>, Corrupt> {
    encoded.iter().map(|bytes| IdentityKey::try_from(&bytes[..]).map_err(Corrupt::new)).collect()
}

/// Returns the MAC of fields 1 to 5, for a request.
fn mac(encoded: &Encoded, request: &Request, export_key: &ExportKey) -> Hmac<Sha256> {
    let mut key = Zeroizing::new([0; 32]);
    Hkdf::<Sha256>::new(None, export_key.expose())
        .expand(LABEL, &mut *key)
        .expect("32 bytes are not too long");
    let mut content = encoded.clone();
    content.mac = Vec::new();
    let mut mac = Hmac::<Sha256>::new_from_slice(&*key).expect("a key has any length");
    mac.update(LABEL);
    mac.update(&request.digest());
    mac.update(&Zeroizing::new(content.encode_to_vec()));
    mac
}

#[cfg(test)]
mod tests {
    use qpq_domain::{DeviceId, UnixMillis, Username};
    use qpq_mls::Device;

    use super::*;
    use crate::messenger::people::Standing;

    fn export_key(byte: u8) -> ExportKey {
        ExportKey::new(Zeroizing::new([byte; ExportKey::LEN]))
    }

    struct Case {
        request: Request,
        keys: SealingKeyPair,
        grant: Grant,
    }

    fn case(people: u32, members: u32) -> Case {
        let keys = SealingKeyPair::generate();
        let device = Device::new(DeviceId::new([1; 16]), "laptop", &[2; 32], [0; 64]);
        let request = Request::create(&device, keys.public(), UnixMillis(3));
        let identity = Identity::from_seed(&[4; 32]);
        let key = |n: u32| {
            let mut bytes = [0; 32];
            bytes[..4].copy_from_slice(&n.to_be_bytes());
            IdentityKey::new(bytes)
        };
        let person = |n| GrantedPerson {
            identity: key(n),
            known: Known {
                username: Username::parse("bob").unwrap(),
                standing: Standing::Confirmed,
                compared_at: Some(UnixMillis(5)),
            },
            is_acquainted: n.is_multiple_of(2),
        };
        let grant = Grant {
            proof: identity.certify(&device.id(), &device.public()),
            account: AccountContent {
                identity,
                conversations: vec![GrantedConversation {
                    channel: ChannelId::new([6; 16]),
                    members: (0..members).map(key).collect(),
                }],
                people: (0..people).map(person).collect(),
                blocked: vec![IdentityKey::new([7; 32])],
            },
        };
        Case { request, keys, grant }
    }

    impl Case {
        fn open(&self, message: &[u8], export_key: &ExportKey) -> Option<Grant> {
            let identity = self.grant.account.identity.public();
            Grant::open(message, &self.keys, &self.request, &identity, export_key)
        }
    }

    #[test]
    fn a_grant_opens_only_with_its_request_and_the_password() {
        let case = case(3, 2);
        let message = case.grant.seal(&case.request, &export_key(8)).unwrap();
        let opened = case.open(&message, &export_key(8)).unwrap();
        assert_eq!(opened.account.identity.seed(), case.grant.account.identity.seed());
        assert_eq!(opened.account.conversations, case.grant.account.conversations);
        assert_eq!(opened.account.people, case.grant.account.people);
        assert_eq!(opened.account.blocked, case.grant.account.blocked);
        assert!(case.open(&message, &export_key(9)).is_none(), "another password");
        let other = self::case(3, 2);
        assert!(other.open(&message, &export_key(8)).is_none(), "another request");
        let mut changed = message.clone();
        *changed.last_mut().unwrap() ^= 1;
        assert!(case.open(&changed, &export_key(8)).is_none());
    }

    #[test]
    fn a_grant_for_another_account_or_without_its_statement_is_refused() {
        let mut case = case(0, 0);
        let identity = case.grant.account.identity.public();
        let seal = |case: &Case| case.grant.seal(&case.request, &export_key(8)).unwrap();
        let open = |case: &Case, message: &[u8]| {
            Grant::open(message, &case.keys, &case.request, &identity, &export_key(8))
        };
        let good = seal(&case);
        assert!(open(&case, &good).is_some());
        case.grant.proof[0] ^= 1;
        let bad = seal(&case);
        assert!(open(&case, &bad).is_none());
        case.grant.account.identity = Identity::from_seed(&[9; 32]);
        case.grant.proof =
            case.grant.account.identity.certify(&case.request.device, &case.request.key);
        let other = seal(&case);
        assert!(open(&case, &other).is_none());
    }

    #[test]
    fn a_grant_of_a_large_account_is_shortened_to_fit_a_message() {
        let case = case(20_000, 40_000);
        let message = case.grant.seal(&case.request, &export_key(8)).unwrap();
        assert!(message.len() < 1024 * 1024, "{}", message.len());
        let opened = case.open(&message, &export_key(8)).unwrap();
        assert!(opened.account.people.iter().all(|person| person.is_acquainted));
        assert!(
            opened.account.people.len() >= 5_000
                && opened.account.conversations[0].members.len() >= 1_000
        );
    }
}
