//! The people that we know: keys with names, and whether the server's directory agrees on them.
//!
//! A name in an MLS group is its owner's claim. The directory (ResolveIdentity) is asked about
//! every key that appears in a conversation of ours, and its answer is saved. Only safety numbers
//! protect against a lying directory.

use std::fmt;

use qpq_domain::{IdentityKey, UnixMillis, Username};
use qpq_mls::database::{Database, DatabaseError};

use super::{
    records::{SavedPerson, decode, encode},
    tables::{PEOPLE, UNCHECKED},
};

/// A person, with the name that we know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Person {
    /// The identity key, proven by the signatures of the person's messages.
    pub identity: IdentityKey,
    /// The name to show together with `standing`.
    pub username: Username,
    /// The verification of the name.
    pub standing: Standing,
}

/// The verification of a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Standing {
    /// The own account.
    Own,
    /// The person claims the name; the directory was not asked yet.
    Claimed,
    /// The directory has the name for this key.
    Confirmed,
    /// The directory has another name for this key, or does not know the key: the name is a false
    /// claim.
    Refuted,
    /// The directory has the name for this key now, and confirmed it for another key before: the
    /// person has a new key, or the directory lies. Nothing is sent to the new key until
    /// [`Messenger::accept_new_identity`](super::Messenger::accept_new_identity).
    NewKey,
}

impl fmt::Display for Person {
    /// Writes the name. An unverified name is followed by a question mark, a false one by the key.
    /// A name that could be mistaken for something else (`you`, `*`, mixed scripts) is preceded by
    /// an `@`, which no username contains, and followed by the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { identity, username, standing } = self;
        if !username.is_unambiguous() {
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
    /// The time at which the safety number with this key was compared.
    pub(crate) compared_at: Option<UnixMillis>,
}

/// All people that we know.
#[derive(Debug)]
pub(crate) struct People {
    database: Database,
}

impl People {
    pub(super) fn new(database: &Database) -> Self {
        Self { database: database.clone() }
    }

    fn get(&self, identity: &IdentityKey) -> Result<Option<Known>, DatabaseError> {
        let Some(row) = self.database.get(PEOPLE, identity.as_bytes())? else { return Ok(None) };
        Ok(Some(decode::<SavedPerson>(&row)?.restore()?.1))
    }

    fn put(&self, identity: &IdentityKey, known: &Known) -> Result<(), DatabaseError> {
        let lane = Some(known.username.as_str().as_bytes());
        let saved = encode(&SavedPerson::new(identity, known));
        self.database.put(PEOPLE, identity.as_bytes(), lane, &saved)?;
        match known.standing {
            Standing::Claimed => self.database.put(UNCHECKED, identity.as_bytes(), None, &saved),
            _ => self.database.delete(UNCHECKED, identity.as_bytes()).map(drop),
        }
    }

    /// Sets the name and the standing of a key.
    pub(crate) fn set(
        &self,
        identity: IdentityKey,
        username: Username,
        standing: Standing,
    ) -> Result<(), DatabaseError> {
        let compared_at = self.compared_at(&identity)?.filter(|_| standing == Standing::Confirmed);
        self.put(&identity, &Known { username, standing, compared_at })
    }

    /// Notes that the directory has `username` for this key. Returns the standing:
    /// [`Standing::NewKey`] if the name was confirmed for another key.
    pub(crate) fn judge(
        &self,
        identity: IdentityKey,
        username: Username,
    ) -> Result<Standing, DatabaseError> {
        let standing = match self.confirmed(&username)? {
            Some(known) if known != identity => Standing::NewKey,
            _ => Standing::Confirmed,
        };
        self.set(identity, username, standing)?;
        Ok(standing)
    }

    /// Notes that the safety number with this key was compared.
    pub(crate) fn set_compared(
        &self,
        identity: &IdentityKey,
        at: UnixMillis,
    ) -> Result<(), DatabaseError> {
        match self.get(identity)? {
            Some(known) => self.put(identity, &Known { compared_at: Some(at), ..known }),
            None => Ok(()),
        }
    }

    /// Returns the time at which the safety number with this key was compared; `None` if never
    /// compared.
    pub(crate) fn compared_at(
        &self,
        identity: &IdentityKey,
    ) -> Result<Option<UnixMillis>, DatabaseError> {
        Ok(self.get(identity)?.and_then(|known| known.compared_at))
    }

    /// Notes a claim, unless the name of the key is certain. If the claim differs from an earlier
    /// one, the directory is asked again.
    pub(crate) fn claim(
        &self,
        identity: IdentityKey,
        username: &Username,
    ) -> Result<(), DatabaseError> {
        let is_news = match self.get(&identity)? {
            None => true,
            Some(known) => known.username != *username && known.standing != Standing::Own,
        };
        if is_news { self.set(identity, username.clone(), Standing::Claimed) } else { Ok(()) }
    }

    /// Returns the keys whose names the directory was not asked about yet, with these names.
    pub(crate) fn unchecked(&self) -> Result<Vec<(IdentityKey, Username)>, DatabaseError> {
        let rows = self.database.all(UNCHECKED)?;
        rows.iter()
            .map(|row| {
                let (identity, known) = decode::<SavedPerson>(row)?.restore()?;
                Ok((identity, known.username))
            })
            .collect()
    }

    /// Returns the identity key for which the directory confirmed `username`.
    pub(crate) fn confirmed(
        &self,
        username: &Username,
    ) -> Result<Option<IdentityKey>, DatabaseError> {
        for row in self.database.in_lane(PEOPLE, username.as_str().as_bytes())? {
            let (identity, known) = decode::<SavedPerson>(&row)?.restore()?;
            if known.standing == Standing::Confirmed {
                return Ok(Some(identity));
            }
        }
        Ok(None)
    }

    /// Returns all people that we know.
    pub(super) fn all(&self) -> Result<Vec<(IdentityKey, Known)>, DatabaseError> {
        let rows = self.database.all(PEOPLE)?;
        rows.iter().map(|row| Ok(decode::<SavedPerson>(row)?.restore()?)).collect()
    }

    /// Notes a person as another device of this account knows it.
    pub(super) fn adopt(&self, identity: &IdentityKey, known: &Known) -> Result<(), DatabaseError> {
        self.put(identity, known)
    }

    /// Returns whether a name is known for this key.
    pub(crate) fn is_named(&self, identity: &IdentityKey) -> Result<bool, DatabaseError> {
        Ok(self.get(identity)?.is_some())
    }

    /// Returns the keys of everyone.
    pub(crate) fn everyone(&self) -> Result<Vec<IdentityKey>, DatabaseError> {
        let rows = self.database.all(PEOPLE)?;
        rows.iter().map(|row| Ok(decode::<SavedPerson>(row)?.restore()?.0)).collect()
    }

    /// Returns the person of a key. The first digits of a key are its name if it has no other.
    pub(crate) fn person(&self, identity: &IdentityKey) -> Result<Person, DatabaseError> {
        Ok(match self.get(identity)? {
            Some(Known { username, standing, .. }) => {
                Person { identity: *identity, username, standing }
            }
            None => Person {
                identity: *identity,
                username: Username::parse(&format!("{:.8}", identity.to_string()))
                    .expect("eight hexadecimal digits are a name"),
                standing: Standing::Refuted,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_never_replaces_a_certain_name_and_another_name_is_checked() {
        let people = People::new(&Database::in_memory());
        let (key, alice, eve) = (
            IdentityKey::new([1; 32]),
            Username::parse("alice").unwrap(),
            Username::parse("eve").unwrap(),
        );
        people.claim(key, &alice).unwrap();
        assert_eq!(people.unchecked().unwrap(), [(key, alice.clone())]);
        people.set(key, alice.clone(), Standing::Confirmed).unwrap();
        people.claim(key, &alice).unwrap();
        assert_eq!(people.person(&key).unwrap().to_string(), "alice");
        assert_eq!(people.confirmed(&alice).unwrap(), Some(key));
        people.claim(key, &eve).unwrap();
        assert_eq!(people.person(&key).unwrap().to_string(), "eve?");
        assert_eq!(people.confirmed(&alice).unwrap(), None);
        people.set(key, eve, Standing::Refuted).unwrap();
        assert_eq!(people.person(&key).unwrap().to_string(), "eve!01010101");
        assert!(people.unchecked().unwrap().is_empty());
    }

    #[test]
    fn a_second_key_under_a_confirmed_name_never_passes_for_the_first() {
        let people = People::new(&Database::in_memory());
        let alice = Username::parse("alice").unwrap();
        let (old, new) = (IdentityKey::new([1; 32]), IdentityKey::new([2; 32]));
        assert_eq!(people.judge(old, alice.clone()).unwrap(), Standing::Confirmed);
        people.set_compared(&old, UnixMillis(5)).unwrap();
        for _ in 0..2 {
            assert_eq!(people.judge(new, alice.clone()).unwrap(), Standing::NewKey);
            assert_eq!(people.person(&new).unwrap().to_string(), "alice (new key 02020202…)");
            people.claim(new, &alice).unwrap();
        }
        assert_eq!(people.judge(old, alice.clone()).unwrap(), Standing::Confirmed);
        assert_eq!(people.person(&old).unwrap().to_string(), "alice");
        assert_eq!(
            (people.confirmed(&alice).unwrap(), people.compared_at(&old).unwrap()),
            (Some(old), Some(UnixMillis(5)))
        );
        // The new key was accepted. The comparison was about the old one.
        people.set(old, alice.clone(), Standing::Refuted).unwrap();
        assert_eq!(people.judge(new, alice.clone()).unwrap(), Standing::Confirmed);
        assert_eq!(
            (people.compared_at(&old).unwrap(), people.compared_at(&new).unwrap()),
            (None, None)
        );
    }

    #[test]
    fn an_ambiguous_name_is_shown_with_an_at_sign_and_its_key() {
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
