//! Identity keys: the Ed25519 public keys by which accounts, and so their inboxes, are addressed.

use std::fmt;

use ed25519_dalek::{Signature, VerifyingKey};
use sha2::{Digest, Sha256};

use crate::{
    Username,
    ids::{WrongLength, exact, write_hex},
};

/// 32 bytes that name an account. As an *address* any 32 bytes will do (an unknown one is simply
/// not found); what may be *registered* is narrower, see [`IdentityKey::check_enrollable`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IdentityKey([u8; 32]);

/// Why a key cannot be registered, or a proof does not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidIdentity {
    #[error("not a canonical Ed25519 point")]
    NotAPoint,
    #[error("a point of small order")]
    SmallOrder,
    #[error("the signature does not verify")]
    BadSignature,
}

impl IdentityKey {
    pub const LEN: usize = 32;

    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Whether the key may be registered: a canonical encoding of a point that is not of small
    /// order.
    ///
    /// Decompression alone accepts non-canonical encodings (y ≥ p), so the bytes must also be what
    /// the point encodes to (RFC 8032 §5.1.3); a key of small order would accept one signature for
    /// every message.
    pub fn check_enrollable(&self) -> Result<(), InvalidIdentity> {
        self.verifying_key().map(drop)
    }

    /// Verifies `signature` over `message` strictly: canonical `S`, no small-order points.
    pub fn verify(&self, message: &[u8], signature: &[u8; 64]) -> Result<(), InvalidIdentity> {
        self.verifying_key()?
            .verify_strict(message, &Signature::from_bytes(signature))
            .map_err(|_| InvalidIdentity::BadSignature)
    }

    fn verifying_key(&self) -> Result<VerifyingKey, InvalidIdentity> {
        let key = VerifyingKey::from_bytes(&self.0).map_err(|_| InvalidIdentity::NotAPoint)?;
        if key.to_edwards().compress().to_bytes() != self.0 {
            return Err(InvalidIdentity::NotAPoint);
        }
        if key.is_weak() {
            return Err(InvalidIdentity::SmallOrder);
        }
        Ok(key)
    }

    /// What the holder of the key signs to prove, when registering, that it has the private half:
    /// `"qpq/register/1" ‖ u16 len ‖ username ‖ SHA-256(upload)`, the username canonical, its
    /// length big-endian.
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
    /// The first four bytes: enough to tell keys apart, too little to address anyone.
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
    fn an_ordinary_key_is_enrollable_and_verifies_its_signatures() {
        let signing = SigningKey::from_bytes(&[9; 32]);
        let key = IdentityKey::new(signing.verifying_key().to_bytes());
        key.check_enrollable().expect("a real key");
        let signature = signing.sign(b"hello").to_bytes();
        key.verify(b"hello", &signature).expect("its own signature");
        assert_eq!(key.verify(b"hullo", &signature), Err(InvalidIdentity::BadSignature));
    }

    #[test]
    fn points_of_small_order_are_refused() {
        // The neutral element, the point of order two and one of order four (RFC 7748 §7, y = 1, -1
        // and 0).
        let mut neutral = [0; 32];
        neutral[0] = 1;
        let mut order_two = [0xff; 32];
        order_two[0] = 0xec;
        order_two[31] = 0x7f;
        for bytes in [neutral, order_two, [0; 32]] {
            assert_eq!(
                IdentityKey::new(bytes).check_enrollable(),
                Err(InvalidIdentity::SmallOrder),
                "{bytes:?}"
            );
        }
    }

    #[test]
    fn non_canonical_encodings_are_refused() {
        // y = p + 1 encodes the neutral element a second time; y = p + 3 a point of large order, if
        // one at all.
        for low in [0xed_u8, 0xee, 0xf0] {
            let mut bytes = [0xff; 32];
            bytes[0] = low;
            bytes[31] = 0x7f;
            assert_eq!(
                IdentityKey::new(bytes).check_enrollable(),
                Err(InvalidIdentity::NotAPoint),
                "{low:#x}"
            );
        }
        assert_eq!(IdentityKey::new([2; 32]).check_enrollable(), Err(InvalidIdentity::NotAPoint));
    }

    #[test]
    fn the_registration_message_is_the_documented_one() {
        let name = Username::parse("Bob").expect("a name");
        let message = IdentityKey::registration_message(&name, b"upload");
        let mut expected = b"qpq/register/1\x00\x03bob".to_vec();
        expected.extend_from_slice(&Sha256::digest(b"upload"));
        assert_eq!(message, expected);
    }

    #[test]
    fn debug_does_not_give_the_whole_key_away() {
        assert_eq!(format!("{:?}", IdentityKey::new([0xab; 32])), "IdentityKey(abababab…)");
    }
}
