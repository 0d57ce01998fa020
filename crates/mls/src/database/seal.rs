//! The two keys of a database: one names rows, one seals values.

use chacha20poly1305::{
    KeyInit as _, XChaCha20Poly1305, XNonce,
    aead::{Aead as _, Payload},
};
use hkdf::{
    Hkdf,
    hmac::{Hmac, Mac as _},
};
use rand::{RngCore as _, rngs::OsRng};
use sha2::Sha256;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use super::{DatabaseError, Table, Value};

const NONCE_LEN: usize = 24;

/// A keyed hash that stands for a key, a lane or a digest.
pub(super) type Name = [u8; 16];

/// Keys derived from the data key.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub(super) struct Secrets {
    naming: [u8; 32],
    sealing: [u8; 32],
}

impl Secrets {
    pub(super) fn random_key() -> Zeroizing<[u8; 32]> {
        let mut key = Zeroizing::new([0; 32]);
        OsRng.fill_bytes(&mut *key);
        key
    }

    pub(super) fn new(data_key: &[u8; 32]) -> Self {
        let (mut naming, mut sealing) = ([0; 32], [0; 32]);
        let derived = Hkdf::<Sha256>::new(None, data_key);
        derived.expand(b"qpq/state/name/1", &mut naming).expect("32 bytes are not too long");
        derived.expand(b"qpq/state/seal/1", &mut sealing).expect("32 bytes are not too long");
        Self { naming, sealing }
    }

    /// Returns the name of `key` in `table`. Equal keys of one table have equal names.
    pub(super) fn name(&self, table: Table, kind: NameKind, key: &[u8]) -> Name {
        let mut mac =
            <Hmac<Sha256> as hkdf::hmac::Mac>::new_from_slice(&self.naming).expect("any length");
        mac.update(&[table.0, kind as u8]);
        mac.update(key);
        let mut name = Name::default();
        name.copy_from_slice(&mac.finalize().into_bytes()[..16]);
        name
    }

    pub(super) fn seal(&self, place: &[u8], value: &[u8]) -> Vec<u8> {
        let mut sealed = vec![0; NONCE_LEN];
        OsRng.fill_bytes(&mut sealed);
        let ciphertext = XChaCha20Poly1305::new((&self.sealing).into())
            .encrypt(XNonce::from_slice(&sealed), Payload { msg: value, aad: place })
            .expect("no value comes near the limit of 256 GiB");
        sealed.extend_from_slice(&ciphertext);
        sealed
    }

    pub(super) fn open(&self, place: &[u8], sealed: &[u8]) -> Result<Value, DatabaseError> {
        let damaged = || DatabaseError::Damaged("a value does not open".into());
        let (nonce, ciphertext) = sealed.split_at_checked(NONCE_LEN).ok_or_else(damaged)?;
        XChaCha20Poly1305::new((&self.sealing).into())
            .decrypt(XNonce::from_slice(nonce), Payload { msg: ciphertext, aad: place })
            .map(Zeroizing::new)
            .map_err(|_| damaged())
    }
}

/// The kind of value that a name is derived from.
#[derive(Debug, Clone, Copy)]
pub(super) enum NameKind {
    Key = 1,
    Lane = 2,
    Digest = 3,
}
