//! The recovery code: 128 random bits, written as twelve English words of BIP 39, of which the last
//! has a checksum.

use std::{fmt, str::FromStr};

use bip39::{Language, Mnemonic};
use rand::{RngCore as _, rngs::OsRng};
use zeroize::Zeroizing;

const LEN: usize = 16;

/// A code that opens an account's recovery bundle. As secret as the account.
#[derive(Clone)]
pub struct RecoveryCode(Zeroizing<[u8; LEN]>);

/// The error for a text that is not a recovery code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidRecoveryCode {
    /// The text has another number of words.
    #[error("a recovery code has 12 words, this one has {0}")]
    Length(usize),
    /// A word is not in the list.
    #[error("word {0} is not a word of recovery codes")]
    UnknownWord(usize),
    /// All words are in the list, but they do not belong together.
    #[error("a word is wrong, or the order of the words is")]
    Checksum,
}

impl RecoveryCode {
    pub(super) fn random() -> Self {
        let mut bytes = Zeroizing::new([0; LEN]);
        OsRng.fill_bytes(&mut *bytes);
        Self(bytes)
    }

    pub(super) fn expose(&self) -> &[u8; LEN] {
        &self.0
    }

    /// Returns the twelve words.
    pub fn words(&self) -> Vec<&'static str> {
        let mnemonic = Mnemonic::from_entropy(&*self.0).expect("16 bytes are a valid length");
        mnemonic.words().collect()
    }
}

impl FromStr for RecoveryCode {
    type Err = InvalidRecoveryCode;

    /// Parses twelve words, in any case and with any spaces between them.
    fn from_str(text: &str) -> Result<Self, InvalidRecoveryCode> {
        let words: Vec<_> = text.split_whitespace().map(str::to_lowercase).collect();
        if words.len() != 12 {
            return Err(InvalidRecoveryCode::Length(words.len()));
        }
        let text = Zeroizing::new(words.join(" "));
        let mnemonic = Mnemonic::parse_in_normalized(Language::English, &text).map_err(
            |error| match error {
                bip39::Error::UnknownWord(index) => InvalidRecoveryCode::UnknownWord(index + 1),
                _ => InvalidRecoveryCode::Checksum,
            },
        )?;
        let (entropy, _) = mnemonic.to_entropy_array();
        let entropy = Zeroizing::new(entropy);
        let mut bytes = Zeroizing::new([0; LEN]);
        bytes.copy_from_slice(&entropy[..LEN]);
        Ok(Self(bytes))
    }
}

impl fmt::Debug for RecoveryCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RecoveryCode(redacted)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_of_a_code_parse_to_the_same_code() {
        for _ in 0..20 {
            let code = RecoveryCode::random();
            let text = code.words().join("\n ").to_uppercase();
            assert_eq!(text.parse::<RecoveryCode>().unwrap().0, code.0);
        }
        assert_eq!(format!("{:?}", RecoveryCode::random()), "RecoveryCode(redacted)");
    }

    /// The vector with 16 bytes 0x7f of BIP 39.
    #[test]
    fn words_and_checksum_are_those_of_bip_39() {
        let text = "legal winner thank year wave sausage worth useful legal winner thank yellow";
        let code: RecoveryCode = text.parse().unwrap();
        assert_eq!((code.0[..].to_vec(), code.words().join(" ")), (vec![0x7f; 16], text.into()));
    }

    #[test]
    fn mistyped_codes_are_refused_with_the_reason() {
        let error = |text: &str| text.parse::<RecoveryCode>().err();
        let good = "legal winner thank year wave sausage worth useful legal winner thank yellow";
        assert_eq!(error(""), Some(InvalidRecoveryCode::Length(0)));
        assert_eq!(error(&good.replacen("winner ", "", 1)), Some(InvalidRecoveryCode::Length(11)));
        let unknown = good.replacen("thank", "thnak", 1);
        assert_eq!(error(&unknown), Some(InvalidRecoveryCode::UnknownWord(3)));
        let swapped = good.replacen("winner thank", "thank winner", 1);
        assert_eq!(error(&swapped), Some(InvalidRecoveryCode::Checksum));
    }
}
