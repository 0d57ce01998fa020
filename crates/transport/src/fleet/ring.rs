//! Three generations of a key, so that it can be exchanged on all edges without a moment at which
//! all change at once.
//!
//! Edges look at their files at different times. One that has seen the new ring makes things with a
//! key that the others hold as `next`, and still takes what they make with a key that it holds as
//! `previous`. So two rotations must be further apart than the slowest edge is slow; within that,
//! nothing that one makes is refused by another.

use zeroize::Zeroizing;

const KEY_LEN: usize = 32;

type Key = Zeroizing<[u8; KEY_LEN]>;

/// A key of 32 bytes with the one before and the one after it. Its file is `previous ‖ current ‖
/// next`.
pub struct KeyRing {
    previous: Key,
    current: Key,
    next: Key,
}

impl KeyRing {
    /// Length of its bytes.
    pub const LEN: usize = 3 * KEY_LEN;

    /// Three new keys.
    #[must_use]
    pub fn generate() -> Self {
        Self { previous: random(), current: random(), next: random() }
    }

    /// The ring whose [`to_bytes`](Self::to_bytes) these are; `None` if they are not a ring's, as
    /// those of a file that a crash left full of zeros.
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

    /// The ring one step on: what was next is used, what was used is still taken, what was previous
    /// is forgotten.
    #[must_use]
    pub fn rotated(&self) -> Self {
        Self { previous: self.current.clone(), current: self.next.clone(), next: random() }
    }

    /// What to store, readable by the server's user alone.
    #[must_use]
    pub fn to_bytes(&self) -> Zeroizing<Vec<u8>> {
        let mut bytes = Zeroizing::new(Vec::with_capacity(Self::LEN));
        for key in [&self.previous, &self.current, &self.next] {
            bytes.extend_from_slice(&key[..]);
        }
        bytes
    }

    /// The current one, then the others in the order in which they are likely to be met.
    pub(super) fn keys(&self) -> [&[u8; KEY_LEN]; 3] {
        [&self.current, &self.previous, &self.next]
    }
}

impl std::fmt::Debug for KeyRing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("KeyRing(redacted)")
    }
}

/// Whether one byte repeated is all there is.
pub(super) fn is_blank(key: &[u8]) -> bool {
    key.iter().all(|byte| Some(byte) == key.first())
}

fn random() -> Key {
    let mut key = Key::default();
    aws_lc_rs::rand::fill(&mut key[..]).expect("the operating system gives randomness");
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rotation_moves_every_key_by_one_and_brings_one_that_is_new() {
        let ring = KeyRing::generate();
        let (before, after) = (ring.to_bytes(), ring.rotated().to_bytes());
        assert_eq!(after[..64], before[32..]);
        assert!(before.chunks(32).all(|key| key != &after[64..]));
        assert_eq!(*KeyRing::parse(&after).unwrap().to_bytes(), *after);
    }

    #[test]
    fn what_is_no_ring_is_not_taken_for_one() {
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
