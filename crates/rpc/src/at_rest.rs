//! The keys at rest: they seal data of accounts that the store keeps, so that a copy of the
//! database alone does not contain that data.
//!
//! The keys are in a file outside of the database, oldest first. The last one is the *next* key. Of
//! the others, the newest one seals, and all keys open. A rotation appends a key, so the next key
//! begins to seal. Edges read the file at their start. During a rotation, an edge that still has
//! the file from before can therefore open what a restarted edge seals. Keys are never removed,
//! because rows that were sealed long ago may need them.
//!
//! | bytes | content |
//! |---|---|
//! | 1 | 1: this format |
//! | 8 | the key's id |
//! | 24 | a random nonce |
//! | rest | XChaCha20-Poly1305. Associated data: `qpq/at-rest/1` ‖ purpose u8 ‖ identity key ‖ version u64 |

use std::fmt;

use chacha20poly1305::{
    KeyInit as _, XChaCha20Poly1305, XNonce,
    aead::{Aead as _, Payload},
};
use qpq_domain::IdentityKey;
use qpq_ports::AtRestKeyId;
use rand::{CryptoRng, RngCore, rngs::OsRng};
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

const KEY_LEN: usize = 32;
const NONCE_LEN: usize = 24;
const FORMAT: u8 = 1;
const HEADER_LEN: usize = 1 + size_of::<AtRestKeyId>() + NONCE_LEN;
const LABEL: &[u8] = b"qpq/at-rest/1";
const ID_LABEL: &[u8] = b"qpq/at-rest-key/1";

/// The kind of sealed data. What is sealed for one purpose does not open for another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// A recovery bundle and its version.
    RecoveryBundle = 1,
}

/// The row that sealed data belongs to. Data of another row does not open.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The kind of the data.
    pub purpose: Purpose,
    /// The account's identity key.
    pub identity: &'a IdentityKey,
    /// The version of the data; 0 for data without versions.
    pub version: u64,
}

/// Sealed data, and the id of the key that has sealed it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sealed {
    /// The key's id, which `bytes` contains, too.
    pub key: AtRestKeyId,
    /// The sealed data.
    pub bytes: Vec<u8>,
}

/// The keys at rest.
pub struct AtRestKeys {
    /// At least two, oldest first. The last one is the next key.
    keys: Vec<Key>,
}

struct Key {
    id: AtRestKeyId,
    cipher: XChaCha20Poly1305,
}

/// The error for bytes that are not a list of keys at rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it does not contain two or more different keys of 32 bytes")]
pub struct InvalidAtRestKeys;

/// The reason why sealed data does not open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// The data is too short, or has another format.
    #[error("sealed data has an unknown format")]
    Format,
    /// The key is not among the keys at rest.
    #[error("data is sealed under the key {0}, which is not in the file at-rest-keys")]
    UnknownKey(AtRestKeyId),
    /// The data was changed, or is of another row.
    #[error("sealed data is damaged, or belongs to another row")]
    Damaged,
}

impl fmt::Debug for AtRestKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.keys.iter().map(|key| key.id)).finish()
    }
}

impl AtRestKeys {
    /// Generates the contents of a new file: a key that seals, and the next one.
    pub fn generate(rng: &mut (impl RngCore + CryptoRng)) -> Zeroizing<Vec<u8>> {
        let mut file = Zeroizing::new(vec![0; 2 * KEY_LEN]);
        rng.fill_bytes(&mut file);
        file
    }

    /// Returns the contents of a file with one more key. The former next key seals.
    pub fn rotated(
        file: &[u8],
        rng: &mut (impl RngCore + CryptoRng),
    ) -> Result<Zeroizing<Vec<u8>>, InvalidAtRestKeys> {
        Self::parse(file)?;
        let mut rotated = Zeroizing::new(vec![0; file.len() + KEY_LEN]);
        let (old, new) = rotated.split_at_mut(file.len());
        old.copy_from_slice(file);
        rng.fill_bytes(new);
        Ok(rotated)
    }

    /// Parses the contents of a file.
    pub fn parse(file: &[u8]) -> Result<Self, InvalidAtRestKeys> {
        let (keys, rest) = file.as_chunks::<KEY_LEN>();
        let mut ids: Vec<_> = keys.iter().map(id).collect();
        ids.sort_unstable();
        ids.dedup();
        let is_blank = keys.contains(&[0; KEY_LEN]);
        if keys.len() < 2 || ids.len() < keys.len() || !rest.is_empty() || is_blank {
            return Err(InvalidAtRestKeys);
        }
        let key =
            |key: &[u8; KEY_LEN]| Key { id: id(key), cipher: XChaCha20Poly1305::new(key.into()) };
        Ok(Self { keys: keys.iter().map(key).collect() })
    }

    /// Returns whether data that is sealed under this key can be opened.
    pub fn contains(&self, key: AtRestKeyId) -> bool {
        self.keys.iter().any(|known| known.id == key)
    }

    /// Returns the ids of all keys, oldest first.
    pub fn ids(&self) -> impl Iterator<Item = AtRestKeyId> + '_ {
        self.keys.iter().map(|key| key.id)
    }

    /// Seals data for its place.
    pub fn seal(&self, place: Place<'_>, data: &[u8]) -> Sealed {
        let key = &self.keys[self.keys.len() - 2];
        let mut nonce = [0; NONCE_LEN];
        OsRng.fill_bytes(&mut nonce);
        let payload = Payload { msg: data, aad: &place.associated_data() };
        let ciphertext = key
            .cipher
            .encrypt(XNonce::from_slice(&nonce), payload)
            .expect("the data is far below the maximum of the cipher");
        let bytes = [&[FORMAT][..], &key.id.0, &nonce, &ciphertext].concat();
        Sealed { key: key.id, bytes }
    }

    /// Opens data that was sealed for this place.
    pub fn open(&self, place: Place<'_>, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, OpenError> {
        let (header, ciphertext) = sealed.split_at_checked(HEADER_LEN).ok_or(OpenError::Format)?;
        let (id, nonce) = header[1..].split_at(size_of::<AtRestKeyId>());
        if header[0] != FORMAT {
            return Err(OpenError::Format);
        }
        let id = AtRestKeyId(id.try_into().expect("the length of an id"));
        let key = self.keys.iter().find(|key| key.id == id).ok_or(OpenError::UnknownKey(id))?;
        let payload = Payload { msg: ciphertext, aad: &place.associated_data() };
        let opened = key.cipher.decrypt(XNonce::from_slice(nonce), payload);
        opened.map(Zeroizing::new).map_err(|_| OpenError::Damaged)
    }
}

impl Place<'_> {
    fn associated_data(&self) -> Vec<u8> {
        let Self { purpose, identity, version } = self;
        [LABEL, &[*purpose as u8], identity.as_bytes(), &version.to_be_bytes()].concat()
    }
}

fn id(key: &[u8; KEY_LEN]) -> AtRestKeyId {
    let hash = Sha256::new().chain_update(ID_LABEL).chain_update(key).finalize();
    AtRestKeyId(*hash.first_chunk().expect("SHA-256 has 32 bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALICE: IdentityKey = IdentityKey::new([1; 32]);
    const BOB: IdentityKey = IdentityKey::new([2; 32]);

    fn place(identity: &IdentityKey, version: u64) -> Place<'_> {
        Place { purpose: Purpose::RecoveryBundle, identity, version }
    }

    fn keys() -> (Zeroizing<Vec<u8>>, AtRestKeys) {
        let file = AtRestKeys::generate(&mut OsRng);
        let keys = AtRestKeys::parse(&file).expect("new keys");
        (file, keys)
    }

    #[test]
    fn sealed_data_opens_at_its_place_and_nowhere_else() {
        let (_, keys) = keys();
        let sealed = keys.seal(place(&ALICE, 7), b"a bundle");
        assert_eq!(*keys.open(place(&ALICE, 7), &sealed.bytes).expect("its place"), b"a bundle");
        for other in [place(&BOB, 7), place(&ALICE, 6), place(&ALICE, 8)] {
            assert_eq!(keys.open(other, &sealed.bytes), Err(OpenError::Damaged));
        }
        let again = keys.seal(place(&ALICE, 7), b"a bundle");
        assert_ne!(sealed.bytes, again.bytes, "the nonce is random");
    }

    #[test]
    fn every_changed_bit_and_every_truncation_is_noticed() {
        let (_, keys) = keys();
        let sealed = keys.seal(place(&ALICE, 1), b"a bundle").bytes;
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert!(keys.open(place(&ALICE, 1), &changed).is_err(), "byte {at}");
            assert!(keys.open(place(&ALICE, 1), &sealed[..at]).is_err(), "{at} bytes");
        }
    }

    #[test]
    fn an_edge_with_the_file_from_before_a_rotation_opens_data_sealed_after_it() {
        let (file, before) = keys();
        let old = before.seal(place(&ALICE, 1), b"old");
        let rotated = AtRestKeys::rotated(&file, &mut OsRng).expect("valid");
        let after = AtRestKeys::parse(&rotated).expect("valid");
        let new = after.seal(place(&ALICE, 2), b"new");
        assert_ne!(old.key, new.key);
        assert_eq!(*before.open(place(&ALICE, 2), &new.bytes).expect("the next key"), b"new");
        assert_eq!(*after.open(place(&ALICE, 1), &old.bytes).expect("an old key"), b"old");
        let twice = AtRestKeys::rotated(&rotated, &mut OsRng).expect("valid");
        let twice = AtRestKeys::parse(&twice).expect("valid");
        let newest = twice.seal(place(&ALICE, 3), b"newest");
        assert_eq!(
            before.open(place(&ALICE, 3), &newest.bytes),
            Err(OpenError::UnknownKey(newest.key))
        );
        assert!(after.ids().eq(twice.ids().take(3)), "no key is removed");
    }

    #[test]
    fn a_file_of_anything_else_than_keys_is_refused() {
        let (file, _) = keys();
        let doubled = [&file[..32], &file[..32]].concat();
        for bad in [&[][..], &file[..32], &file[..63], &[0; 64], &doubled] {
            assert!(AtRestKeys::parse(bad).is_err(), "{} bytes", bad.len());
            assert!(AtRestKeys::rotated(bad, &mut OsRng).is_err());
        }
    }

    #[test]
    fn a_debug_output_shows_ids_and_no_keys() {
        let (file, keys) = keys();
        let shown = format!("{keys:?}");
        assert!(!shown.contains(&format!("{:?}", &file[..4]).trim_matches(['[', ']']).to_owned()));
        assert!(keys.contains(keys.ids().next().expect("two keys")));
    }
}
