//! Groups: the members of a channel, and the limits of the server's record of a group.

use crate::IdentityKey;

/// The maximum number of members.
pub const MAX_MEMBERS: usize = 10_000;
/// The maximum length of a name, in bytes.
pub const MAX_GROUP_NAME: usize = 256;
/// The maximum length of a description, in bytes.
pub const MAX_GROUP_DESCRIPTION: usize = 4 << 10;
/// The maximum length of the members' settings, in bytes.
pub const MAX_GROUP_SETTINGS: usize = 16 << 10;
/// The maximum length of a GroupInfo (RFC 9420 §12.4.3), in bytes.
pub const MAX_GROUP_INFO: usize = 1 << 20;

/// The rights of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// May send, commit, and read the list of members and the GroupInfo.
    Member,
    /// May in addition change the members and the metadata.
    Admin,
}

/// The two members of a direct group, in an order that does not depend on the creator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Pair {
    /// The lesser key, then the greater one.
    keys: [IdentityKey; 2],
}

impl Pair {
    /// Creates a pair. `None` if the keys are equal.
    pub fn new(one: IdentityKey, other: IdentityKey) -> Option<Self> {
        (one != other).then(|| Self { keys: [one.min(other), one.max(other)] })
    }

    /// Returns the two keys, the lesser one first.
    pub const fn keys(&self) -> [IdentityKey; 2] {
        self.keys
    }

    /// Returns the bytes of the two keys, the lesser one first.
    pub fn as_bytes(&self) -> [u8; 64] {
        let mut bytes = [0; 64];
        bytes[..32].copy_from_slice(self.keys[0].as_bytes());
        bytes[32..].copy_from_slice(self.keys[1].as_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pair_does_not_depend_on_the_order_of_its_keys() {
        let (one, other) = (IdentityKey::new([1; 32]), IdentityKey::new([2; 32]));
        assert_eq!(Pair::new(one, other), Pair::new(other, one));
        assert_eq!(Pair::new(other, one).map(|pair| pair.as_bytes()[0]), Some(1));
        assert_eq!(Pair::new(one, one), None);
    }
}
