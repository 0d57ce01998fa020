//! Where an inbox lives when its store is cut into several.

use qpq_domain::IdentityKey;

/// One of 65 536 slices of all inboxes, evenly filled, because identity keys are. A store that
/// spreads over databases or tasks gives each a range of shards; which shard an inbox is in never
/// changes, so growing means moving whole shards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Shard(pub u16);

impl Shard {
    /// The shard of an inbox.
    pub fn of(inbox: &IdentityKey) -> Self {
        let [low, high, ..] = *inbox.as_bytes();
        Self(u16::from_be_bytes([low, high]))
    }

    /// Which of `places` equal parts the shard is in, from 0.
    ///
    /// # Panics
    /// Without any place.
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
