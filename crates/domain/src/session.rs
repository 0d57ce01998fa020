//! Session tokens: 32 random bytes that only the client stores. The server stores their SHA-256.

use std::fmt;

use sha2::{Digest, Sha256};
use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::ids::{WrongLength, exact};

/// The bearer secret of a session.
///
/// The type has no `Display` and a redacted `Debug`. Its memory is overwritten on drop.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct SessionToken([u8; 32]);

impl SessionToken {
    /// The length in bytes.
    pub const LEN: usize = 32;

    /// Creates a token from random bytes.
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Returns the secret, for the response that carries it.
    pub const fn expose(&self) -> &[u8; 32] {
        &self.0
    }

    /// Returns the hash that stores keep and look up.
    ///
    /// A token has 256 bits of entropy, so the hash needs neither salt nor stretching.
    pub fn hash(&self) -> TokenHash {
        TokenHash(Sha256::digest(self.0).into())
    }
}

impl TryFrom<&[u8]> for SessionToken {
    type Error = WrongLength;

    fn try_from(bytes: &[u8]) -> Result<Self, WrongLength> {
        exact(bytes).map(Self)
    }
}

impl fmt::Debug for SessionToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SessionToken(redacted)")
    }
}

/// The SHA-256 of a [`SessionToken`], the key of a session in the stores.
///
/// The time that a look-up takes reveals nothing about the token.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct TokenHash([u8; 32]);

impl TokenHash {
    /// Creates a hash from its bytes.
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Returns the bytes of the hash.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for TokenHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TokenHash(redacted)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_output_contains_neither_token_nor_hash() {
        let token = SessionToken::new([0xab; 32]);
        let shown = format!("{token:?} {:?}", token.hash());
        assert_eq!(shown, "SessionToken(redacted) TokenHash(redacted)");
    }
}
