//! Safety numbers. Two people compare their number, by voice or in person, to verify that the
//! server has not replaced their keys.

use qpq_domain::IdentityKey;
use sha2::{Digest as _, Sha512};

/// The number of hashes for one fingerprint, which makes the search for a key with the same digits
/// 2¹² times as expensive.
const ITERATIONS: u32 = 4096;
/// The number of groups of five digits for each of the two keys.
const GROUPS: usize = 6;

/// Returns the safety number of two people: 12 groups of 5 digits, the same from both sides. Each
/// half is one key's fingerprint (iterated SHA-512, 30 digits, about 99 bits); that of the smaller
/// key comes first.
pub fn safety_number(one: &IdentityKey, other: &IdentityKey) -> String {
    let (smaller, larger) = if one < other { (one, other) } else { (other, one) };
    format!("{} {}", fingerprint(smaller), fingerprint(larger))
}

/// Returns one key's half of a safety number: 6 groups of 5 digits.
pub fn fingerprint(key: &IdentityKey) -> String {
    let mut hash =
        Sha512::new().chain_update(b"qpq/safety/1").chain_update(key.as_bytes()).finalize();
    for _ in 1..ITERATIONS {
        hash = Sha512::new().chain_update(hash).chain_update(key.as_bytes()).finalize();
    }
    let groups: Vec<String> = hash
        .chunks_exact(5)
        .take(GROUPS)
        .map(|chunk| {
            let number = chunk.iter().fold(0u64, |number, byte| number << 8 | u64::from(*byte));
            format!("{:05}", number % 100_000)
        })
        .collect();
    groups.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn safety_numbers_are_symmetric_and_differ_between_pairs() {
        let [a, b, c] = [1, 2, 3].map(|n| IdentityKey::new([n; 32]));
        assert_eq!(safety_number(&a, &b), safety_number(&b, &a));
        assert_ne!(safety_number(&a, &b), safety_number(&a, &c));
        assert_eq!(safety_number(&a, &b), format!("{} {}", fingerprint(&a), fingerprint(&b)));
    }

    #[test]
    fn a_safety_number_has_sixty_digits_in_groups_of_five() {
        let number = safety_number(&IdentityKey::new([4; 32]), &IdentityKey::new([5; 32]));
        let groups: Vec<_> = number.split(' ').collect();
        assert_eq!(groups.len(), 12);
        assert!(
            groups.iter().all(|g| g.len() == 5 && g.bytes().all(|b| b.is_ascii_digit())),
            "{number}"
        );
    }
}
