//! Usernames that people confuse: the rule for new names, and the skeleton that lookalikes share.
//!
//! Unicode Technical Standard 39, "Unicode Security Mechanisms": restriction levels (§5.2) keep
//! scripts from being mixed in one name, skeletons (§4) find two names that look the same.
//!
//! Stores keep skeletons, so the skeleton of a name must not change with the tables of a new
//! Unicode version. A test below has frozen examples. If it fails after an update of
//! `unicode-security`, the stores need a migration that computes every skeleton again.

use unicode_normalization::char::is_combining_mark;
use unicode_security::{RestrictionLevel, RestrictionLevelDetection as _, skeleton};

use crate::{Choice, InvalidUsername, Username};

/// The scripts that may be mixed in a new username (UTS 39 §5.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum UsernameScripts {
    /// One script, or Latin together with the scripts of one of these: Chinese (Han and Bopomofo),
    /// Japanese (Han, Hiragana and Katakana), Korean (Han and Hangul).
    #[default]
    HighlyRestrictive,
    /// In addition, Latin with one other recommended script that is not Cyrillic or Greek.
    ModeratelyRestrictive,
    /// Every mixture, and every symbol that RFC 8265 allows.
    Any,
}

impl Choice for UsernameScripts {
    const ALL: &'static [(&'static str, Self)] = &[
        ("highly-restrictive", Self::HighlyRestrictive),
        ("moderately-restrictive", Self::ModeratelyRestrictive),
        ("any", Self::Any),
    ];
}

/// The form that usernames share if people confuse them: the skeleton of UTS 39 §4.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Skeleton(Box<str>);

impl Skeleton {
    /// Returns the skeleton of a username that is stored in canonical form.
    pub fn of(username: &str) -> Self {
        Self(skeleton(username).collect::<String>().into())
    }

    /// Returns the skeleton as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Skeleton {
    /// Writes no part of the skeleton, because usernames are personal and must not appear in logs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Skeleton(redacted)")
    }
}

impl Username {
    /// Checks that the name may be the name of a new account.
    pub fn check_new(&self, scripts: UsernameScripts) -> Result<(), InvalidUsername> {
        let name = self.as_str();
        if name.starts_with(is_combining_mark) || name.contains(is_invisible) {
            return Err(InvalidUsername::Invisible);
        }
        let level = match scripts {
            UsernameScripts::HighlyRestrictive => RestrictionLevel::HighlyRestrictive,
            UsernameScripts::ModeratelyRestrictive => RestrictionLevel::ModeratelyRestrictive,
            UsernameScripts::Any => return Ok(()),
        };
        // The level of a name with a character outside the identifier profile (§3.1) is
        // `Unrestricted`.
        if name.check_restriction_level(level) { Ok(()) } else { Err(InvalidUsername::Scripts) }
    }

    /// Returns whether the name can be displayed as it is, without a sign that it is a name.
    ///
    /// Such a name passes the strictest rule for new names and cannot be confused with `you`, the
    /// word that displays use for the reader's own account.
    pub fn is_unambiguous(&self) -> bool {
        self.check_new(UsernameScripts::HighlyRestrictive).is_ok()
            && self.skeleton().as_str() != "you"
    }

    /// Returns the skeleton. A new account cannot have the skeleton of another account.
    pub fn skeleton(&self) -> Skeleton {
        Skeleton::of(self.as_str())
    }
}

/// Returns whether `c` is a joiner or another character without a shape of its own
/// (Default_Ignorable_Code_Point), which a skeleton omits.
fn is_invisible(c: char) -> bool {
    skeleton(c.encode_utf8(&mut [0; 4])).next().is_none()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use UsernameScripts::{Any, HighlyRestrictive, ModeratelyRestrictive};

    fn name(raw: &str) -> Username {
        Username::parse(raw).unwrap_or_else(|error| panic!("{raw:?}: {error}"))
    }

    fn is_refused(raw: &str) -> bool {
        Username::parse(raw).and_then(|name| name.check_new(HighlyRestrictive)).is_err()
    }

    #[test]
    fn names_of_one_script_are_accepted() {
        for raw in [
            "alice",
            "a.b-c_9",
            "o'brien",
            "straße",
            "zoë",
            "Алиса",
            "Ёлка7",
            "Σίσυφος",
            "אליס",
            "فاطمة",
            "山田太郎",
            "やまだ",
            "ヤマダタロウ",
            "김철수",
            "राम",
            "สมชาย",
            "山田taro",
            "kim김",
            "1234",
        ] {
            assert_eq!(name(raw).check_new(HighlyRestrictive), Ok(()), "{raw}");
        }
    }

    #[test]
    fn mixed_scripts_symbols_and_invisible_characters_are_refused() {
        for raw in [
            "\u{430}lice",       // Cyrillic a
            "\u{430}dmin",       // Cyrillic a
            "al\u{456}ce",       // Cyrillic i
            "al\u{200d}ice",     // zero-width joiner
            "al\u{200c}ice",     // zero-width non-joiner
            "al\u{ad}ice",       // soft hyphen
            "al\u{2060}ice",     // word joiner
            "al\u{fe0f}ice",     // variation selector
            "al\u{34f}ice",      // combining grapheme joiner
            "al\u{115f}ice",     // Hangul filler
            "al\u{e0061}ice",    // tag
            "क\u{94d}\u{200d}ष", // a joiner that RFC 8265 allows
            "\u{301}",           // combining acute alone
            "\u{301}alice",
            "\u{94d}क",
            "*",
            "a*b",
            "bob?",
            "bob!01010101",
            "[friends]",
            "\"you\"",
            "αlice",  // Greek alpha
            "раypal", // Cyrillic er and a
            "алис\u{65}",
        ] {
            assert!(is_refused(raw), "{raw:?}");
        }
    }

    #[test]
    fn other_levels_accept_more_scripts_but_no_invisible_characters() {
        let (mixed, cyrillic) = (name("kofi\u{995}"), name("\u{430}lice"));
        assert_eq!(mixed.check_new(HighlyRestrictive), Err(InvalidUsername::Scripts));
        assert_eq!(mixed.check_new(ModeratelyRestrictive), Ok(()));
        assert_eq!(cyrillic.check_new(ModeratelyRestrictive), Err(InvalidUsername::Scripts));
        assert_eq!(cyrillic.check_new(Any), Ok(()));
        assert_eq!(name("*").check_new(Any), Ok(()));
        for raw in ["\u{301}", "क\u{94d}\u{200d}ष"] {
            assert_eq!(name(raw).check_new(Any), Err(InvalidUsername::Invisible), "{raw:?}");
        }
    }

    #[test]
    fn names_that_could_be_confused_with_display_words_are_ambiguous() {
        for raw in ["alice", "Алиса", "yousuf", "you2"] {
            assert!(name(raw).is_unambiguous(), "{raw}");
        }
        for raw in ["you", "YOU", "уоu", "*", "\u{301}", "bob?", "[friends]", "\u{430}lice"] {
            assert!(!name(raw).is_unambiguous(), "{raw}");
        }
    }

    /// A change of these values needs a migration of every store, see the top of this file.
    #[test]
    fn canonical_names_and_skeletons_are_frozen() {
        for (raw, canonical, skeleton) in [
            ("Alice", "alice", "alice"),
            ("ＡＬＩＣＥ", "alice", "alice"),
            ("Straße", "strasse", "strasse"),
            ("mom", "mom", "rnorn"),
            ("rnorn", "rnorn", "rnorn"),
            ("b0b", "b0b", "bOb"),
            ("paypa1", "paypa1", "paypal"),
            ("ı", "ı", "i"),
            ("o'brien", "o'brien", "o'brien"),
            ("Zoe\u{308}", "zo\u{eb}", "zoe\u{308}"),
            ("\u{430}lice", "\u{430}lice", "alice"),
            ("al\u{456}ce", "al\u{456}ce", "alice"),
            ("СОСО", "сосо", "coco"),
            ("Ёлка", "ёлка", "e\u{308}л\u{138}a"),
            ("ΣΊΣΥΦΟΣ", "σίσυφοσ", "oi\u{301}ou\u{278}oo"),
            ("αβγ", "αβγ", "aßy"),
            ("אליס", "אליס", "\u{5d0}\u{5dc}'o"),
            ("فاطمة", "فاطمة", "\u{641}l\u{637}\u{645}o\u{308}"),
            ("山田太郎", "山田太郎", "山田太郎"),
            ("ヤマダ", "ヤマダ", "ヤマ\u{5915}\u{ff9e}"),
            ("김", "김", "\u{1100}\u{4e28}\u{1106}"),
            ("राम", "राम", "\u{930}\u{119d1}\u{92e}"),
            ("ไทย", "ไทย", "\u{e44}\u{e11}\u{e22}"),
            ("\u{1c5}", "d\u{17e}", "dz\u{306}"),
            ("ﬁn", "fin", "fin"),
            ("x²", "x2", "x2"),
        ] {
            let name = name(raw);
            assert_eq!((name.as_str(), name.skeleton().as_str()), (canonical, skeleton), "{raw}");
        }
    }

    proptest! {
        #[test]
        fn the_skeleton_of_a_skeleton_is_the_same(raw in "\\PC{1,20}") {
            let once: String = skeleton(&raw).collect();
            let twice: String = skeleton(&once).collect();
            prop_assert_eq!(once, twice);
        }
    }
}
