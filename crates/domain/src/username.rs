//! Usernames in canonical form, so that names that differ only in case or width are the same.
//!
//! The canonical form is the OPAQUE credential identifier (RFC 9807) and the unique key of an
//! account, and the key log hashes it. Therefore the canonical form of a registered name must never
//! change.

use std::{borrow::Cow, fmt, str::FromStr};

use icu_casemap::CaseMapper;
use precis_core::profile::PrecisFastInvocation as _;
use precis_profiles::UsernameCaseMapped;
use unicode_normalization::UnicodeNormalization as _;

/// A username in canonical form.
///
/// The canonical form is NFKC, case-folded, and a valid PRECIS UsernameCaseMapped string (RFC 8265
/// §3.3) of 1 to 64 characters without `@`, `:`, `/`, space and control characters.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Username(Box<str>);

/// The reason why a string is not a valid username.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidUsername {
    /// The name is empty or longer than [`Username::MAX_CHARS`].
    #[error("a username has 1 to 64 characters")]
    Length,
    /// The name contains `@`, `:`, `/`, a space or a control character.
    #[error("a username must not contain '@', ':', '/', spaces or control characters")]
    Forbidden,
    /// The name is not a PRECIS UsernameCaseMapped string.
    #[error("a username has only letters, digits and punctuation that RFC 8265 allows")]
    Precis,
    /// The new name begins with a combining mark or contains an invisible character.
    #[error("a new username must not begin with a combining mark or contain invisible characters")]
    Invisible,
    /// The new name mixes scripts, or contains characters that are neither letters nor digits.
    #[error("a new username has letters of one script, digits, '.', '-', '_' and apostrophes")]
    Scripts,
}

impl Username {
    /// The maximum number of characters (Unicode scalar values) of the canonical form.
    pub const MAX_CHARS: usize = 64;

    /// Parses a username and returns its canonical form.
    ///
    /// Accepts every name that has ever been accepted, so that its account can be found. The name
    /// of a new account must also pass [`Username::check_new`].
    pub fn parse(raw: &str) -> Result<Self, InvalidUsername> {
        // Bounds the work for hostile input, and refuses no valid name: a character of a canonical
        // form is composed of at most three, each of at most four bytes.
        if raw.is_empty() || raw.len() > 3 * 4 * Self::MAX_CHARS {
            return Err(InvalidUsername::Length);
        }
        let canonical = if is_canonical_ascii(raw) {
            Cow::Borrowed(raw)
        } else {
            Cow::Owned(canonicalize(raw)?)
        };
        if !(1..=Self::MAX_CHARS).contains(&canonical.chars().count()) {
            return Err(InvalidUsername::Length);
        }
        Ok(Self(canonical.into()))
    }

    /// Returns the canonical form.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Returns whether `raw` has only lower-case ASCII letters, digits, `.`, `-` and `_`.
///
/// Such a name is its own canonical form, so most names need no Unicode tables.
fn is_canonical_ascii(raw: &str) -> bool {
    raw.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_'))
}

/// Returns the canonical form of `raw`.
///
/// Folding can undo normalization, and normalization can undo folding, so both are applied until
/// the name no longer changes.
fn canonicalize(raw: &str) -> Result<String, InvalidUsername> {
    const ROUNDS: usize = 4;
    let mut name = raw.to_owned();
    for _ in 0..ROUNDS {
        let folded: String =
            CaseMapper::new().fold_string(&name.nfkc().collect::<String>()).nfkc().collect();
        if folded.chars().any(is_forbidden) {
            return Err(InvalidUsername::Forbidden);
        }
        let mapped = UsernameCaseMapped::enforce(folded.as_str())
            .map_err(|_| InvalidUsername::Precis)?
            .into_owned();
        if mapped == name {
            return Ok(name);
        }
        name = mapped;
    }
    Err(InvalidUsername::Precis)
}

fn is_forbidden(c: char) -> bool {
    matches!(c, '@' | ':' | '/') || c.is_control() || c.is_whitespace()
}

impl FromStr for Username {
    type Err = InvalidUsername;

    fn from_str(raw: &str) -> Result<Self, InvalidUsername> {
        Self::parse(raw)
    }
}

impl fmt::Display for Username {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Username {
    /// Writes no part of the name, because usernames are personal and must not appear in logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Username(redacted)")
    }
}

#[cfg(test)]
mod tests {
    use std::iter;

    use proptest::prelude::*;

    use super::*;

    fn canonical(raw: &str) -> String {
        Username::parse(raw).unwrap_or_else(|e| panic!("{raw:?}: {e}")).as_str().to_owned()
    }

    #[test]
    fn names_that_differ_in_case_width_or_composition_are_the_same() {
        for raw in ["alice", "Alice", "ALICE", "ａｌｉｃｅ", "ＡＬＩＣＥ"] {
            assert_eq!(canonical(raw), "alice");
        }
        assert_eq!(canonical("Zoe\u{308}"), canonical("zo\u{eb}"));
        assert_eq!(canonical("STRASSE"), canonical("straße"));
        assert_eq!(canonical("ΣΊΣΥΦΟΣ"), canonical("Σίσυφος"));
        assert_eq!(canonical("a.b-c_9"), "a.b-c_9");
    }

    #[test]
    fn canonical_names_outside_1_to_64_characters_are_refused() {
        assert_eq!(Username::parse(""), Err(InvalidUsername::Length));
        assert_eq!(canonical(&"x".repeat(64)), "x".repeat(64));
        assert_eq!(Username::parse(&"x".repeat(65)), Err(InvalidUsername::Length));
        assert_eq!(canonical(&"字".repeat(64)).chars().count(), 64);
        assert_eq!(Username::parse(&"字".repeat(65)), Err(InvalidUsername::Length));
        assert_eq!(Username::parse(&"x".repeat(1 << 20)), Err(InvalidUsername::Length));
    }

    #[test]
    fn a_decomposed_name_of_64_canonical_characters_is_accepted() {
        let name = "각".repeat(64);
        let decomposed: String = name.nfd().collect();
        assert_eq!(decomposed.len(), 576);
        assert_eq!(canonical(&decomposed), name);
        let decomposed: String = "각".repeat(65).nfd().collect();
        assert_eq!(Username::parse(&decomposed), Err(InvalidUsername::Length));
    }

    /// [`Username::parse`] allows three decomposed characters, 12 bytes, for each canonical one.
    #[test]
    fn a_character_that_is_composed_of_more_than_three_is_not_canonical() {
        for c in '\0'..=char::MAX {
            if iter::once(c).nfd().count() > 3 {
                let raw = String::from(c);
                assert!(!Username::parse(&raw).is_ok_and(|name| name.as_str() == raw), "{c:?}");
            }
        }
    }

    #[test]
    fn names_with_separators_control_characters_or_spaces_are_refused() {
        for raw in [
            "a@b",
            "a:b",
            "a/b",
            "a\0b",
            "a\nb",
            "a b",
            "a\u{7f}",
            "\u{85}x",
            "a＠b",
            "a\u{200b}b",
            "a\u{202e}b",
        ] {
            assert!(Username::parse(raw).is_err(), "{raw:?}");
        }
    }

    proptest! {
        #[test]
        fn the_canonical_form_of_a_canonical_name_is_the_same(raw in "\\PC{0,70}") {
            if let Ok(name) = Username::parse(&raw) {
                prop_assert_eq!(Username::parse(name.as_str()), Ok(name));
            }
        }

        #[test]
        fn parsing_an_arbitrary_string_does_not_panic(raw in any::<String>()) {
            let _ = Username::parse(&raw);
        }
    }
}
