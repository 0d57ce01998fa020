//! Hybrid public keys: X25519 (32 bytes) ‖ ML-KEM-768 encapsulation key (1184 bytes).
//!
//! The server does not use these keys, but checks them, so that senders can rely on fetched keys.
//! An X25519 key of small order would make that part of a sender's secret public. The use of an
//! invalid ML-KEM key would fail.

use bytes::Bytes;
use libcrux_ml_kem::mlkem768::{MlKem768PublicKey, validate_public_key};
use qpq_ports::HybridKey;
use x25519_dalek::{PublicKey, StaticSecret};

const X25519_LEN: usize = 32;
const ML_KEM_768_LEN: usize = 1184;

/// The length of a hybrid public key in bytes.
pub(super) const LEN: usize = X25519_LEN + ML_KEM_768_LEN;

/// The text before the key in the message that the identity key signs.
pub(super) const SIGNATURE_CONTEXT: &[u8] = b"qpq/hybrid/1";

/// Returns the fields of an answer for a stored key: the key and its signature, each empty if there
/// is none.
pub(super) fn fields(stored: Option<HybridKey>) -> (Bytes, Bytes) {
    let Some(HybridKey { key, signature }) = stored else { return Default::default() };
    let signature = signature.map_or_else(Bytes::new, |bytes| Bytes::copy_from_slice(&bytes));
    (key.into(), signature)
}

/// The reason why bytes are not a hybrid public key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum InvalidHybridKey {
    #[error("not {LEN} bytes")]
    Length,
    #[error("the X25519 half is of small order")]
    SmallOrder,
    #[error("the ML-KEM-768 half fails the modulus check (FIPS 203 §7.2)")]
    Modulus,
}

/// Checks length, order of the X25519 half, and modulus of the ML-KEM half (FIPS 203 §7.2).
pub(super) fn check(key: &[u8]) -> Result<(), InvalidHybridKey> {
    let (x25519, ml_kem) = key.split_first_chunk::<X25519_LEN>().ok_or(InvalidHybridKey::Length)?;
    let ml_kem: &[u8; ML_KEM_768_LEN] = ml_kem.try_into().map_err(|_| InvalidHybridKey::Length)?;
    if !has_large_order(*x25519) {
        return Err(InvalidHybridKey::SmallOrder);
    }
    if !validate_public_key(&MlKem768PublicKey::from(ml_kem)) {
        return Err(InvalidHybridKey::Modulus);
    }
    Ok(())
}

/// Returns whether the point is not of small order. A clamped scalar is a multiple of the cofactor,
/// so it maps exactly the points of small order to zero, in every encoding and on the twist too
/// (RFC 7748 §6.1).
fn has_large_order(x25519: [u8; X25519_LEN]) -> bool {
    StaticSecret::from([1; X25519_LEN]).diffie_hellman(&PublicKey::from(x25519)).was_contributory()
}

#[cfg(test)]
mod tests {
    use libcrux_ml_kem::mlkem768;
    use proptest::prelude::*;

    use super::*;

    fn good() -> Vec<u8> {
        let x25519 = PublicKey::from(&StaticSecret::from([7; 32]));
        let ml_kem = mlkem768::generate_key_pair([9; 64]);
        [x25519.as_bytes().as_slice(), ml_kem.pk().as_slice()].concat()
    }

    #[test]
    fn a_valid_key_passes() {
        assert_eq!(check(&good()), Ok(()));
    }

    #[test]
    fn only_the_exact_length_passes() {
        let good = good();
        for len in [0, 1, 31, 32, 1184, LEN - 1] {
            assert_eq!(check(&good[..len]), Err(InvalidHybridKey::Length), "{len}");
        }
        assert_eq!(check(&[good, vec![0]].concat()), Err(InvalidHybridKey::Length));
    }

    #[test]
    fn every_encoding_of_a_point_of_small_order_is_refused() {
        // u = 0, 1, the two points of order eight, -1, and p and p + 1, which are other encodings
        // of 0 and 1. The high bit is ignored.
        for u in [
            "0000000000000000000000000000000000000000000000000000000000000000",
            "0100000000000000000000000000000000000000000000000000000000000000",
            "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
            "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
            "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
            "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
            "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        ] {
            let mut key = good();
            key[..32].copy_from_slice(&hex::decode(u).expect("hexadecimal"));
            assert_eq!(check(&key), Err(InvalidHybridKey::SmallOrder), "{u}");
            key[31] |= 0x80;
            assert_eq!(check(&key), Err(InvalidHybridKey::SmallOrder), "{u} with the high bit set");
        }
    }

    #[test]
    fn unreduced_coefficients_and_swapped_halves_are_refused() {
        let mut key = good();
        // Two coefficients of twelve bits in three bytes: the first becomes 0xfff, above q = 3329.
        key[32] = 0xff;
        key[33] |= 0x0f;
        assert_eq!(check(&key), Err(InvalidHybridKey::Modulus));

        let good = good();
        let swapped = [&good[32..], &good[..32]].concat();
        assert!(check(&swapped).is_err());
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_do_not_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..=LEN + 8),
        ) {
            let _ = check(&bytes);
        }

        #[test]
        fn random_bytes_of_the_right_length_are_refused(
            bytes in proptest::collection::vec(any::<u8>(), LEN),
        ) {
            prop_assert!(check(&bytes).is_err());
        }
    }
}
