//! Identity keys: the Ed25519 public keys that address accounts and their inboxes.

use std::fmt;

use ed25519_dalek::{Signature, VerifyingKey};
use sha2::{Digest, Sha256};

use crate::{
    Username,
    ids::{WrongLength, exact, write_hex},
};

/// The identity key of an account.
///
/// Any 32 bytes are a valid *address*: a look-up of an unknown key finds no account. Only keys that
/// pass [`IdentityKey::check_registrable`] can be *registered*.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IdentityKey([u8; 32]);

/// The reason why a key cannot be registered or a signature is invalid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidIdentity {
    /// The bytes are not the canonical encoding of a point.
    #[error("not a canonical Ed25519 point")]
    NotAPoint,
    /// The point has small order.
    #[error("a point of small order")]
    SmallOrder,
    /// The signature does not verify.
    #[error("the signature does not verify")]
    BadSignature,
}

impl IdentityKey {
    /// The length in bytes.
    pub const LEN: usize = 32;

    /// Creates a key from its bytes, without a check.
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Returns the bytes of the key.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Checks that the key can be registered: a canonical encoding of a point of large order.
    ///
    /// Decompression alone accepts non-canonical encodings (y ≥ p), so the bytes must also equal
    /// the encoding of the point (RFC 8032 §5.1.3). With a key of small order, one signature is
    /// valid for every message.
    pub fn check_registrable(&self) -> Result<(), InvalidIdentity> {
        verifying_key(&self.0).map(drop)
    }

    /// Verifies `signature` over `message` strictly: canonical `S`, no small-order points.
    pub fn verify(&self, message: &[u8], signature: &[u8; 64]) -> Result<(), InvalidIdentity> {
        verifying_key(&self.0)?
            .verify_strict(message, &Signature::from_bytes(signature))
            .map_err(|_| InvalidIdentity::BadSignature)
    }

    /// Returns the message whose signature proves possession of the private key at registration.
    ///
    /// The message is `"qpq/register/1" ‖ u16 len ‖ username ‖ SHA-256(upload)`, with the canonical
    /// username and its length in big-endian order.
    pub fn registration_message(username: &Username, upload: &[u8]) -> Vec<u8> {
        let name = username.as_str().as_bytes();
        let len = u16::try_from(name.len()).expect("a username is at most 64 characters");
        let mut message = b"qpq/register/1".to_vec();
        message.extend_from_slice(&len.to_be_bytes());
        message.extend_from_slice(name);
        message.extend_from_slice(&Sha256::digest(upload));
        message
    }
}

/// Parses a canonical encoding of a point of large order.
pub(crate) fn verifying_key(bytes: &[u8; 32]) -> Result<VerifyingKey, InvalidIdentity> {
    let key = VerifyingKey::from_bytes(bytes).map_err(|_| InvalidIdentity::NotAPoint)?;
    if key.to_edwards().compress().to_bytes() != *bytes {
        return Err(InvalidIdentity::NotAPoint);
    }
    if key.is_weak() {
        return Err(InvalidIdentity::SmallOrder);
    }
    Ok(key)
}

impl TryFrom<&[u8]> for IdentityKey {
    type Error = WrongLength;

    fn try_from(bytes: &[u8]) -> Result<Self, WrongLength> {
        exact(bytes).map(Self)
    }
}

impl fmt::Display for IdentityKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0)
    }
}

impl fmt::Debug for IdentityKey {
    /// Writes the first four bytes: enough to distinguish keys, too few to address an account.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("IdentityKey(")?;
        write_hex(f, &self.0[..4])?;
        f.write_str("…)")
    }
}

#[cfg(test)]
mod tests {
    use ed25519_dalek::{Signer, SigningKey};

    use super::*;

    #[test]
    fn a_valid_key_can_be_registered_and_verifies_its_signatures() {
        let signing = SigningKey::from_bytes(&[9; 32]);
        let key = IdentityKey::new(signing.verifying_key().to_bytes());
        key.check_registrable().expect("a real key");
        let signature = signing.sign(b"hello").to_bytes();
        key.verify(b"hello", &signature).expect("its own signature");
        assert_eq!(key.verify(b"hullo", &signature), Err(InvalidIdentity::BadSignature));
    }

    #[test]
    fn points_of_small_order_are_refused() {
        // The neutral element, the point of order two and one of order four (y = 1, -1 and 0).
        let mut neutral = [0; 32];
        neutral[0] = 1;
        let mut order_two = [0xff; 32];
        order_two[0] = 0xec;
        order_two[31] = 0x7f;
        for bytes in [neutral, order_two, [0; 32]] {
            assert_eq!(
                IdentityKey::new(bytes).check_registrable(),
                Err(InvalidIdentity::SmallOrder),
                "{bytes:?}"
            );
        }
    }

    #[test]
    fn non_canonical_encodings_are_refused() {
        // y = p + 1 is a second encoding of the neutral element. y = p + 3 may encode a point of
        // large order.
        for low in [0xed_u8, 0xee, 0xf0] {
            let mut bytes = [0xff; 32];
            bytes[0] = low;
            bytes[31] = 0x7f;
            assert_eq!(
                IdentityKey::new(bytes).check_registrable(),
                Err(InvalidIdentity::NotAPoint),
                "{low:#x}"
            );
        }
        assert_eq!(IdentityKey::new([2; 32]).check_registrable(), Err(InvalidIdentity::NotAPoint));
    }

    #[test]
    fn the_registration_message_has_the_documented_layout() {
        let name = Username::parse("Bob").expect("a name");
        let message = IdentityKey::registration_message(&name, b"upload");
        let mut expected = b"qpq/register/1\x00\x03bob".to_vec();
        expected.extend_from_slice(&Sha256::digest(b"upload"));
        assert_eq!(message, expected);
    }

    #[test]
    fn debug_output_contains_only_the_beginning_of_a_key() {
        assert_eq!(format!("{:?}", IdentityKey::new([0xab; 32])), "IdentityKey(abababab…)");
    }
}
