//! Session tokens: 32 random bytes that only the client keeps; the server stores their SHA-256.

use std::fmt;

use sha2::{Digest, Sha256};
use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::ids::{WrongLength, exact};

/// A bearer secret. It has no `Display`, its `Debug` is redacted, and its memory is wiped.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct SessionToken([u8; 32]);

impl SessionToken {
    pub const LEN: usize = 32;

    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The secret itself, for the one answer that carries it.
    pub const fn expose(&self) -> &[u8; 32] {
        &self.0
    }

    /// What is stored and looked up. 256 bits of entropy need neither salt nor stretching.
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

/// SHA-256 of a [`SessionToken`]: the key under which a session is kept. Looking it up leaks
/// nothing about the token.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct TokenHash([u8; 32]);

impl TokenHash {
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

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
    fn neither_token_nor_hash_can_be_printed() {
        let token = SessionToken::new([0xab; 32]);
        let shown = format!("{token:?} {:?}", token.hash());
        assert_eq!(shown, "SessionToken(redacted) TokenHash(redacted)");
    }
}
