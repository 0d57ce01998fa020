//! The code of a request, which a person compares on two machines.

use std::{fmt, str::FromStr};

use argon2::{Algorithm, Argon2, Params, Version};

/// The salt of Argon2id.
const SALT: &[u8; 16] = b"qpq/link-code/1\0";
const MEMORY_KIB: u32 = 64 * 1024;
const PASSES: u32 = 3;

/// The characters of Crockford's base32, which has no I, L, O or U.
const ALPHABET: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
/// The number of characters, of 5 bits each.
const LEN: usize = 10;

/// The code of a request: 50 bits, shown as `XXXXX-XXXXX`.
///
/// The code stands for the whole request, with the keys in it. A server that wants a device of its
/// own to be approved needs another request with the same code. This is a second preimage of 50
/// bits: 2⁵⁰ computations of Argon2id with 64 MiB and 3 passes on average. A large graphics card
/// does some thousand of these in a second, so a million cards need days, and the request is valid
/// for 15 minutes. Candidates cannot be computed in advance, since each contains its time of
/// creation: a table of them is useful for 15 minutes only, and one with candidates for one in a
/// thousand codes takes 2⁴⁰ computations.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct LinkCode(u64);

impl LinkCode {
    /// Derives the code of a serialized request: the first 50 bits of Argon2id (version 1.3,
    /// 64 MiB, 3 passes, 1 lane, 32 bytes of output).
    pub(super) fn of(request: &[u8]) -> Self {
        let params = Params::new(MEMORY_KIB, PASSES, 1, Some(32)).expect("they are valid");
        let mut output = [0; 32];
        Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
            .hash_password_into(request, SALT, &mut output)
            .expect("the lengths are valid");
        let mut first = [0; 8];
        first.copy_from_slice(&output[..8]);
        Self(u64::from_be_bytes(first) >> 14)
    }
}

impl fmt::Display for LinkCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for place in 0..LEN {
            if place == LEN / 2 {
                f.write_str("-")?;
            }
            let digit = self.0 >> (5 * (LEN - 1 - place)) & 31;
            write!(f, "{}", char::from(ALPHABET[usize::try_from(digit).expect("5 bits")]))?;
        }
        Ok(())
    }
}

impl fmt::Debug for LinkCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LinkCode({self})")
    }
}

/// The text is not a code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a code has 10 letters and digits, such as 7K2QM-94XTB")]
pub struct InvalidLinkCode;

impl FromStr for LinkCode {
    type Err = InvalidLinkCode;

    /// Reads a code as typed: in either case, with or without hyphens and spaces, and with the
    /// letters O, I and L in the place of the digits 0 and 1.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let is_digit = |byte: &u8| *byte != b'-' && !byte.is_ascii_whitespace();
        let digits: Vec<u8> = text.bytes().filter(is_digit).collect();
        if digits.len() != LEN {
            return Err(InvalidLinkCode);
        }
        let mut code = 0;
        for byte in digits {
            let byte = match byte.to_ascii_uppercase() {
                b'O' => b'0',
                b'I' | b'L' => b'1',
                other => other,
            };
            let digit = ALPHABET.iter().position(|one| *one == byte).ok_or(InvalidLinkCode)?;
            code = code << 5 | digit as u64;
        }
        Ok(Self(code))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_typed_code_is_parsed_in_any_case_and_with_similar_letters() {
        let code = LinkCode(0b00000_00001_00010_11111_00000_10000_01010_00001_00000_11110);
        assert_eq!(code.to_string(), "012Z0-GA10Y");
        for typed in ["012Z0-GA10Y", "012z0ga10y", "ol2zo gaioy", " 012Z0-GAL0-Y\n"] {
            assert_eq!(typed.parse(), Ok(code), "{typed}");
        }
        for typed in ["", "012Z0-GA10", "012Z0-GA10YY", "012Z0-GA10U", "012Z0-GA1é"] {
            assert_eq!(typed.parse::<LinkCode>(), Err(InvalidLinkCode), "{typed}");
        }
    }
}
