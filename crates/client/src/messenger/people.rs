//! Whom we know: keys with names, and whether the server's directory agrees on them.
//!
//! A name in an MLS group is its owner's claim. The directory (ResolveIdentity) is asked about
//! every key that appears in a conversation of ours; what it says is kept. Against a lying
//! directory only safety numbers help.

use std::{collections::BTreeMap, fmt};

use qpq_domain::{IdentityKey, Username};

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
}

impl fmt::Display for Person {
    /// The name; one that cannot be relied on is followed by a question mark or, if it is false, by
    /// the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.standing {
            Standing::Own | Standing::Confirmed => self.username.fmt(f),
            Standing::Claimed => write!(f, "{}?", self.username),
            Standing::Refuted => write!(f, "{}!{:.8}", self.username, self.identity.to_string()),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Known {
    pub(crate) username: Username,
    pub(crate) standing: Standing,
}

/// Everyone we know of.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct People(BTreeMap<IdentityKey, Known>);

impl People {
    /// Puts back what was saved, or notes what is known for certain.
    pub(crate) fn set(&mut self, identity: IdentityKey, username: Username, standing: Standing) {
        self.0.insert(identity, Known { username, standing });
    }

    /// Notes a claim, unless something better is known. A second, different claim is asked about
    /// anew.
    pub(crate) fn claim(&mut self, identity: IdentityKey, username: &Username) {
        let known = self
            .0
            .entry(identity)
            .or_insert_with(|| Known { username: username.clone(), standing: Standing::Claimed });
        if known.username != *username && known.standing != Standing::Own {
            *known = Known { username: username.clone(), standing: Standing::Claimed };
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
            Some(Known { username, standing }) => {
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
}
