//! Three generations of a key, so that edges can rotate it at different times.
//!
//! An edge with the new ring encrypts with a key that the other edges have as `next`. The other
//! edges encrypt with a key that this edge has as `previous`. So an edge accepts every value that
//! another edge has encrypted, if the time between two rotations is longer than the slowest edge
//! needs to reload.

use zeroize::Zeroizing;

const KEY_LEN: usize = 32;

type Key = Zeroizing<[u8; KEY_LEN]>;

/// A key of 32 bytes with its predecessor and its successor. The file format is
/// `previous ‖ current ‖ next`.
pub struct KeyRing {
    previous: Key,
    current: Key,
    next: Key,
}

impl KeyRing {
    /// The length of the file.
    pub const LEN: usize = 3 * KEY_LEN;

    /// Creates a ring of three random keys.
    #[must_use]
    pub fn generate() -> Self {
        Self { previous: random(), current: random(), next: random() }
    }

    /// Parses the output of [`to_bytes`](Self::to_bytes). Returns `None` for bytes that are not a
    /// ring, such as the zeros of a file after a crash.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let (keys, []) = bytes.as_chunks::<KEY_LEN>() else { return None };
        let [previous, current, next] = keys else { return None };
        if keys.iter().any(|key| is_blank(key)) || previous == current || current == next {
            return None;
        }
        Some(Self {
            previous: Zeroizing::new(*previous),
            current: Zeroizing::new(*current),
            next: Zeroizing::new(*next),
        })
    }

    /// Returns the rotated ring: the next key becomes the current one, the current one the previous
    /// one, and a random key the next one.
    #[must_use]
    pub fn rotated(&self) -> Self {
        Self { previous: self.current.clone(), current: self.next.clone(), next: random() }
    }

    /// Returns the contents of the file, which only the user of the server may read.
    #[must_use]
    pub fn to_bytes(&self) -> Zeroizing<Vec<u8>> {
        let mut bytes = Zeroizing::new(Vec::with_capacity(Self::LEN));
        for key in [&self.previous, &self.current, &self.next] {
            bytes.extend_from_slice(&key[..]);
        }
        bytes
    }

    /// Returns the keys by frequency of use: the current, the previous and the next one.
    pub(super) fn keys(&self) -> [&[u8; KEY_LEN]; 3] {
        [&self.current, &self.previous, &self.next]
    }
}

impl std::fmt::Debug for KeyRing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("KeyRing(redacted)")
    }
}

/// Returns whether all bytes are equal, as in a file of zeros after a crash.
pub(super) fn is_blank(key: &[u8]) -> bool {
    key.iter().all(|byte| Some(byte) == key.first())
}

fn random() -> Key {
    let mut key = Key::default();
    aws_lc_rs::rand::fill(&mut key[..]).expect("the operating system provides randomness");
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rotation_moves_every_key_by_one_and_adds_a_random_one() {
        let ring = KeyRing::generate();
        let (before, after) = (ring.to_bytes(), ring.rotated().to_bytes());
        assert_eq!(after[..64], before[32..]);
        assert!(before.chunks(32).all(|key| key != &after[64..]));
        assert_eq!(*KeyRing::parse(&after).unwrap().to_bytes(), *after);
    }

    #[test]
    fn bytes_that_are_not_a_ring_are_refused() {
        let good = KeyRing::generate().to_bytes();
        assert!(KeyRing::parse(&good).is_some());
        assert!(KeyRing::parse(&good[1..]).is_none());
        assert!(KeyRing::parse(&[&good[..], &[1]].concat()).is_none());
        assert!(KeyRing::parse(&[&good[..], &good[..32]].concat()).is_none());
        assert!(KeyRing::parse(&[0; KeyRing::LEN]).is_none());
        assert!(KeyRing::parse(&[&good[..64], &[0; 32]].concat()).is_none());
        assert!(KeyRing::parse(&[&good[..32], &good[..64]].concat()).is_none());
    }
}
