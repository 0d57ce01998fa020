//! The parts that work on inboxes is divided into.

use qpq_domain::IdentityKey;

/// One of 65 536 equal parts of all inboxes, since identity keys are evenly distributed. A store
/// assigns a range of shards to each of its tasks. The shard of an inbox never changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Shard(
    /// The first two bytes of the identity key.
    pub u16,
);

impl Shard {
    /// Returns the shard of an inbox.
    pub fn of(inbox: &IdentityKey) -> Self {
        let [low, high, ..] = *inbox.as_bytes();
        Self(u16::from_be_bytes([low, high]))
    }

    /// Returns which of `places` equal ranges the shard is in, from 0.
    ///
    /// # Panics
    /// If `places` is 0.
    pub fn among(self, places: usize) -> usize {
        assert!(places > 0, "no place for an inbox");
        usize::from(self.0) * places / (usize::from(u16::MAX) + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shard_has_a_place_and_places_are_ranges() {
        for places in [1, 2, 3, 7, 4_096] {
            let of_each: Vec<_> = (0..=u16::MAX).map(|shard| Shard(shard).among(places)).collect();
            assert!(of_each.is_sorted());
            assert_eq!((of_each[0], of_each[usize::from(u16::MAX)]), (0, places - 1));
        }
    }

    #[test]
    fn an_inbox_stays_where_it_is() {
        let mut key = [7; 32];
        key[..2].copy_from_slice(&[0xab, 0xcd]);
        assert_eq!(Shard::of(&IdentityKey::new(key)), Shard(0xabcd), "stored data depends on it");
    }
}
