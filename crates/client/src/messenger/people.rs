//! Whom we know: keys with names, and whether the server's directory agrees on them.
//!
//! A name in an MLS group is its owner's claim. The directory (ResolveIdentity) is asked about
//! every key that appears in a conversation of ours; what it says is kept. Against a lying
//! directory only safety numbers help.

use std::{collections::BTreeMap, fmt};

use qpq_domain::{IdentityKey, UnixMillis, Username};

/// Somebody, as far as we know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Person {
    /// Proven: what this person sends is signed with it.
    pub identity: IdentityKey,
    /// The name to show together with `standing`.
    pub username: Username,
    pub standing: Standing,
}

/// What a name is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Standing {
    /// It is us.
    Own,
    /// The person claims the name; the directory was not asked yet.
    Claimed,
    /// The directory gives the name to this key.
    Confirmed,
    /// The directory gives this key another name, or knows no such key: the name is a false claim.
    Refuted,
    /// The directory gives the name to this key now, and it was confirmed for another key before:
    /// the person has a new key, or the directory lies. Nothing is sent to it until
    /// [`Messenger::accept_new_identity`](super::Messenger::accept_new_identity).
    NewKey,
}

impl fmt::Display for Person {
    /// The name. One that cannot be relied on is followed by a question mark or, if it is false, by
    /// the key. One that could be taken for something else than a name (`you`, `*`, mixed scripts)
    /// stands after an `@`, which is in no username, and with the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { identity, username, standing } = self;
        if !username.is_plain() {
            write!(f, "@{}", username.as_str().escape_debug())?;
            return write!(f, " (key {:.8}…)", identity.to_string());
        }
        match standing {
            Standing::Own | Standing::Confirmed => username.fmt(f),
            Standing::Claimed => write!(f, "{username}?"),
            Standing::Refuted => write!(f, "{username}!{:.8}", identity.to_string()),
            Standing::NewKey => write!(f, "{username} (new key {:.8}…)", identity.to_string()),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Known {
    pub(crate) username: Username,
    pub(crate) standing: Standing,
    /// When the safety number with this key was compared.
    pub(crate) compared_at: Option<UnixMillis>,
}

/// Everyone we know of.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct People(BTreeMap<IdentityKey, Known>);

impl People {
    /// Puts back what was saved, or notes what is known for certain.
    pub(crate) fn set(&mut self, identity: IdentityKey, username: Username, standing: Standing) {
        let compared_at = self.compared_at(&identity).filter(|_| standing == Standing::Confirmed);
        self.0.insert(identity, Known { username, standing, compared_at });
    }

    /// Notes the directory's word that `username` is the name of this key. Returns the standing:
    /// [`Standing::NewKey`] if the name was confirmed for another key.
    pub(crate) fn judge(&mut self, identity: IdentityKey, username: Username) -> Standing {
        let standing = match self.confirmed(&username) {
            Some(known) if known != identity => Standing::NewKey,
            _ => Standing::Confirmed,
        };
        self.set(identity, username, standing);
        standing
    }

    /// Notes that the safety number with this key was compared.
    pub(crate) fn set_compared(&mut self, identity: &IdentityKey, at: UnixMillis) {
        if let Some(known) = self.0.get_mut(identity) {
            known.compared_at = Some(at);
        }
    }

    /// Returns when the safety number with this key was compared, if it was.
    pub(crate) fn compared_at(&self, identity: &IdentityKey) -> Option<UnixMillis> {
        self.0.get(identity)?.compared_at
    }

    /// Notes a claim, unless something better is known. A second, different claim is asked about
    /// anew.
    pub(crate) fn claim(&mut self, identity: IdentityKey, username: &Username) {
        let claimed =
            || Known { username: username.clone(), standing: Standing::Claimed, compared_at: None };
        let known = self.0.entry(identity).or_insert_with(claimed);
        if known.username != *username && known.standing != Standing::Own {
            *known = claimed();
        }
    }

    /// Those whose names the directory was not asked about yet.
    pub(crate) fn unchecked(&self) -> Vec<(IdentityKey, Username)> {
        self.0
            .iter()
            .filter(|(_, known)| known.standing == Standing::Claimed)
            .map(|(identity, known)| (*identity, known.username.clone()))
            .collect()
    }

    /// Whose name this is for certain, if anyone's.
    pub(crate) fn confirmed(&self, username: &Username) -> Option<IdentityKey> {
        self.0
            .iter()
            .find(|(_, known)| known.standing == Standing::Confirmed && known.username == *username)
            .map(|(identity, _)| *identity)
    }

    /// The person behind a key. A key without any name shows its first digits.
    pub(crate) fn person(&self, identity: &IdentityKey) -> Person {
        match self.0.get(identity) {
            Some(Known { username, standing, .. }) => {
                Person { identity: *identity, username: username.clone(), standing: *standing }
            }
            None => Person {
                identity: *identity,
                username: Username::parse(&format!("{:.8}", identity.to_string()))
                    .expect("eight hexadecimal digits are a name"),
                standing: Standing::Refuted,
            },
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&IdentityKey, &Known)> {
        self.0.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_never_replaces_what_is_certain_but_another_name_is_asked_about() {
        let mut people = People::default();
        let (key, alice, eve) = (
            IdentityKey::new([1; 32]),
            Username::parse("alice").unwrap(),
            Username::parse("eve").unwrap(),
        );
        people.claim(key, &alice);
        assert_eq!(people.unchecked(), [(key, alice.clone())]);
        people.set(key, alice.clone(), Standing::Confirmed);
        people.claim(key, &alice);
        assert_eq!(people.person(&key).to_string(), "alice");
        assert_eq!(people.confirmed(&alice), Some(key));
        people.claim(key, &eve);
        assert_eq!(people.person(&key).to_string(), "eve?");
        assert_eq!(people.confirmed(&alice), None);
        people.set(key, eve, Standing::Refuted);
        assert_eq!(people.person(&key).to_string(), "eve!01010101");
        assert!(people.unchecked().is_empty());
    }

    #[test]
    fn a_second_key_under_a_confirmed_name_never_passes_for_the_first() {
        let mut people = People::default();
        let alice = Username::parse("alice").unwrap();
        let (old, new) = (IdentityKey::new([1; 32]), IdentityKey::new([2; 32]));
        assert_eq!(people.judge(old, alice.clone()), Standing::Confirmed);
        people.set_compared(&old, UnixMillis(5));
        for _ in 0..2 {
            assert_eq!(people.judge(new, alice.clone()), Standing::NewKey);
            assert_eq!(people.person(&new).to_string(), "alice (new key 02020202…)");
            people.claim(new, &alice);
        }
        assert_eq!(people.judge(old, alice.clone()), Standing::Confirmed);
        assert_eq!(people.person(&old).to_string(), "alice");
        assert_eq!(
            (people.confirmed(&alice), people.compared_at(&old)),
            (Some(old), Some(UnixMillis(5)))
        );
        // Accepted: what was compared was the other key.
        people.set(old, alice.clone(), Standing::Refuted);
        assert_eq!(people.judge(new, alice.clone()), Standing::Confirmed);
        assert_eq!((people.compared_at(&old), people.compared_at(&new)), (None, None));
    }

    #[test]
    fn a_name_that_could_be_something_else_is_shown_as_a_name_with_its_key() {
        for (name, shown) in [
            ("you", "@you (key 07070707…)"),
            ("*", "@* (key 07070707…)"),
            ("\u{301}", "@\\u{301} (key 07070707…)"),
            ("bob?", "@bob? (key 07070707…)"),
            ("al\u{456}ce", "@al\u{456}ce (key 07070707…)"),
            ("Алиса", "алиса"),
        ] {
            let username = Username::parse(name).unwrap();
            let identity = IdentityKey::new([7; 32]);
            let person = Person { identity, username, standing: Standing::Confirmed };
            assert_eq!(person.to_string(), shown);
        }
    }
}
