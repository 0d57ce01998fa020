//! The members of a group: this account's signing key, and the facts about the other members.
//!
//! A member's MLS signature key is its account's identity key, and its credential (RFC 9420 §5.3)
//! is the canonical username. The key is proven by every message; the name is a claim.

use std::fmt;

use ed25519_dalek::{Signer as _, SigningKey};
use openmls::prelude::{BasicCredential, Credential, CredentialWithKey, SignatureScheme};
use openmls_traits::signatures::{Signer, SignerError};
use qpq_domain::{IdentityKey, Username};

use crate::codec::{Malformed, Reader, Writer};

/// An account's identity: the Ed25519 key by which its inbox is addressed and with which it signs
/// in groups.
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

    /// The secret seed, to be kept as secret as the account itself.
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

    pub(crate) fn credential(&self, username: &Username) -> CredentialWithKey {
        CredentialWithKey {
            credential: BasicCredential::new(username.as_str().as_bytes().to_vec()).into(),
            signature_key: self.public().as_bytes().to_vec().into(),
        }
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Identity").field(&self.public()).finish()
    }
}

impl Signer for Identity {
    fn sign(&self, payload: &[u8]) -> Result<Vec<u8>, SignerError> {
        Ok(Self::sign(self, payload).to_vec())
    }

    fn signature_scheme(&self) -> SignatureScheme {
        SignatureScheme::ED25519
    }
}

/// A member of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Proven: what the member sends is signed with it.
    pub identity: IdentityKey,
    /// Claimed: compare it with the directory's name for `identity` before showing it.
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

    /// `None` unless the key is an identity key and the credential a username in canonical form.
    pub(crate) fn read(signature_key: &[u8], credential: &Credential) -> Option<Self> {
        let identity = IdentityKey::try_from(signature_key).ok()?;
        let basic = BasicCredential::try_from(credential.clone()).ok()?;
        let claimed = std::str::from_utf8(basic.identity()).ok()?;
        let username = Username::parse(claimed).ok().filter(|name| name.as_str() == claimed)?;
        Some(Self { identity, username })
    }
}

pub(crate) fn read_username(reader: &mut Reader<'_>) -> Result<Username, Malformed> {
    let name = std::str::from_utf8(reader.bytes()?).map_err(|_| Malformed)?;
    Username::parse(name).map_err(|_| Malformed)
}
