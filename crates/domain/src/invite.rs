//! Invites: codes that allow registrations. Only the person who is invited has the code. The server
//! stores its SHA-256.

use std::{fmt, str::FromStr};

use sha2::{Digest, Sha256};
use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::ids::{WrongLength, exact, write_hex};

/// The maximum number of registrations that one invite allows.
pub const MAX_INVITE_USES: u32 = 1_000_000;

/// The maximum length of the note of an invite, in bytes.
pub const MAX_INVITE_NOTE: usize = 256;

/// The digits of a code: base 32 without I, L, O and U, as by Crockford.
const DIGITS: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";

/// The number of digits that are printed together.
const GROUP: usize = 4;

/// The code of an invite: 28 digits of base 32, which are 140 bits.
///
/// The type has a redacted `Debug`, and no `Display`. Its memory is overwritten on drop.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct InviteCode([u8; Self::DIGITS]);

/// The error for a text that is not the code of an invite.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an invite code has {} letters and digits", InviteCode::DIGITS)]
pub struct InvalidInviteCode;

impl InviteCode {
    /// The number of digits.
    pub const DIGITS: usize = 28;

    /// Creates a code from random bytes, of which 5 bits each are used.
    pub fn from_random(bytes: [u8; Self::DIGITS]) -> Self {
        Self(bytes.map(|byte| DIGITS[usize::from(byte % 32)]))
    }

    /// Parses a code as a person types it: in upper or lower case, with or without spaces and
    /// hyphens, and with O for 0, and I or L for 1.
    pub fn parse(text: &str) -> Result<Self, InvalidInviteCode> {
        let mut digits = [0; Self::DIGITS];
        let mut count = 0;
        for c in text.chars().filter(|c| !c.is_whitespace() && *c != '-') {
            let digit = match c.to_ascii_uppercase() {
                'O' => b'0',
                'I' | 'L' => b'1',
                c => u8::try_from(c).map_err(|_| InvalidInviteCode)?,
            };
            if !DIGITS.contains(&digit) {
                return Err(InvalidInviteCode);
            }
            *digits.get_mut(count).ok_or(InvalidInviteCode)? = digit;
            count += 1;
        }
        if count == Self::DIGITS { Ok(Self(digits)) } else { Err(InvalidInviteCode) }
    }

    /// Returns the code in groups of digits, for the person who is invited.
    pub fn expose(&self) -> String {
        let groups = self.0.chunks(GROUP).map(|group| group.iter().copied().map(char::from));
        groups.map(String::from_iter).collect::<Vec<_>>().join("-")
    }

    /// Returns the hash that stores keep and look up.
    ///
    /// A code has 140 bits of entropy, so the hash needs neither salt nor stretching.
    pub fn hash(&self) -> InviteHash {
        InviteHash(Sha256::digest(self.0).into())
    }
}

impl fmt::Debug for InviteCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("InviteCode(redacted)")
    }
}

/// The SHA-256 of an [`InviteCode`], the key of an invite in the stores.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct InviteHash([u8; 32]);

impl InviteHash {
    /// Creates a hash from its bytes.
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Returns the bytes of the hash.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Returns the id of the invite.
    pub fn id(&self) -> InviteId {
        InviteId(std::array::from_fn(|n| self.0[n]))
    }
}

impl TryFrom<&[u8]> for InviteHash {
    type Error = WrongLength;

    fn try_from(bytes: &[u8]) -> Result<Self, WrongLength> {
        exact(bytes).map(Self)
    }
}

impl fmt::Debug for InviteHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("InviteHash(redacted)")
    }
}

/// The public name of an invite: the first 8 bytes of its hash, in hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct InviteId([u8; 8]);

impl InviteId {
    /// Returns the first and the last hash that an invite with this id can have.
    pub fn hashes(&self) -> [InviteHash; 2] {
        [0, u8::MAX].map(|filling| {
            InviteHash(std::array::from_fn(|n| self.0.get(n).copied().unwrap_or(filling)))
        })
    }
}

impl fmt::Display for InviteId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0)
    }
}

/// The error for a text that is not the id of an invite.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the id of an invite has 16 hexadecimal digits")]
pub struct InvalidInviteId;

impl FromStr for InviteId {
    type Err = InvalidInviteId;

    fn from_str(text: &str) -> Result<Self, InvalidInviteId> {
        let is_hex = text.bytes().all(|byte| byte.is_ascii_hexdigit());
        if text.len() != 16 || !is_hex {
            return Err(InvalidInviteId);
        }
        u64::from_str_radix(text, 16).map(|n| Self(n.to_be_bytes())).map_err(|_| InvalidInviteId)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code() -> InviteCode {
        InviteCode::from_random(std::array::from_fn(|n| u8::try_from(n * 37 % 256).expect("small")))
    }

    #[test]
    fn a_code_is_parsed_as_it_is_printed_and_as_people_type_it() {
        let printed = code().expose();
        assert_eq!(printed.len(), 28 + 6, "{printed}");
        let typed = [
            printed.clone(),
            format!("  {} \n", printed.to_lowercase()),
            printed.replace('-', ""),
            printed.replace('-', " "),
            printed.replace('0', "o").replace('1', "l"),
            printed.replace('0', "O").replace('1', "I"),
        ];
        for text in typed {
            assert_eq!(InviteCode::parse(&text).map(|code| code.hash()), Ok(code().hash()));
        }
    }

    #[test]
    fn malformed_codes_are_refused() {
        let printed = code().expose();
        let malformed = [
            String::new(),
            printed[1..].to_owned(),
            format!("{printed}0"),
            printed.replacen(printed.chars().next().expect("a digit"), "U", 1),
            printed.replacen(printed.chars().next().expect("a digit"), "\u{440}", 1),
        ];
        for text in malformed {
            assert_eq!(InviteCode::parse(&text).err(), Some(InvalidInviteCode), "{text}");
        }
    }

    #[test]
    fn an_id_is_parsed_as_it_is_printed_and_bounds_its_hash() {
        let hash = code().hash();
        let id = hash.id();
        assert_eq!(id.to_string().parse(), Ok(id));
        let [first, last] = id.hashes();
        assert!(first.as_bytes() <= hash.as_bytes() && hash.as_bytes() <= last.as_bytes());
        assert_eq!((first.id(), last.id()), (id, id));
        for text in ["", "0123", "+123456789abcdef", "0123456789abcdefg"] {
            assert_eq!(text.parse::<InviteId>(), Err(InvalidInviteId), "{text}");
        }
    }

    #[test]
    fn debug_output_contains_neither_code_nor_hash() {
        let shown = format!("{:?} {:?}", code(), code().hash());
        assert_eq!(shown, "InviteCode(redacted) InviteHash(redacted)");
    }
}
