//! Content sealed to a public key: HPKE (RFC 9180) in base mode, with DHKEM(X25519, HKDF-SHA256),
//! HKDF-SHA256 and AES-128-GCM. The sender is not authenticated.

use std::{fmt, sync::LazyLock};

use openmls_rust_crypto::RustCrypto;
use openmls_traits::{
    crypto::OpenMlsCrypto as _,
    types::{HpkeAeadType, HpkeCiphertext, HpkeConfig, HpkeKdfType, HpkeKemType},
};
use rand::{RngCore as _, rngs::OsRng};
use zeroize::Zeroizing;

use crate::error::Error;

const SUITE: HpkeConfig =
    HpkeConfig(HpkeKemType::DhKem25519, HpkeKdfType::HkdfSha256, HpkeAeadType::AesGcm128);
/// The length of the encapsulated key, which precedes the ciphertext, in bytes.
const ENCAPSULATED: usize = 32;

static CRYPTO: LazyLock<RustCrypto> = LazyLock::new(RustCrypto::default);

/// A key pair to which content is sealed.
pub struct SealingKeyPair {
    public: [u8; 32],
    private: Zeroizing<Vec<u8>>,
}

impl SealingKeyPair {
    /// Creates a key pair from the randomness of the operating system.
    pub fn generate() -> Self {
        let mut seed = Zeroizing::new([0; 32]);
        OsRng.fill_bytes(&mut *seed);
        Self::from_seed(&seed)
    }

    /// Derives a key pair from a secret seed (RFC 9180 §7.1.3).
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        let pair = CRYPTO.derive_hpke_keypair(SUITE, seed).expect("32 bytes are a seed");
        let public = pair.public.try_into().expect("an X25519 key has 32 bytes");
        Self { public, private: Zeroizing::new(pair.private.to_vec()) }
    }

    /// Returns the public key.
    pub fn public(&self) -> &[u8; 32] {
        &self.public
    }

    /// Opens the output of [`seal`]. `None` if it was sealed to another key or with other
    /// parameters, or was changed.
    pub fn open(&self, sealed: &[u8], info: &[u8], aad: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        let (encapsulated, ciphertext) = sealed.split_at_checked(ENCAPSULATED)?;
        let input = HpkeCiphertext {
            kem_output: encapsulated.to_vec().into(),
            ciphertext: ciphertext.to_vec().into(),
        };
        let opened = CRYPTO.hpke_open(SUITE, &input, &self.private, info, aad).ok()?;
        Some(Zeroizing::new(opened))
    }
}

impl fmt::Debug for SealingKeyPair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SealingKeyPair(redacted)")
    }
}

/// Seals content to a public key. The result is the encapsulated key (32 bytes), followed by the
/// ciphertext.
pub fn seal(public: &[u8; 32], info: &[u8], aad: &[u8], content: &[u8]) -> Result<Vec<u8>, Error> {
    let sealed = CRYPTO.hpke_seal(SUITE, public, info, aad, content).map_err(Error::mls)?;
    Ok([sealed.kem_output.as_slice(), sealed.ciphertext.as_slice()].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sealed_content_opens_only_with_its_key_and_parameters() {
        let pair = SealingKeyPair::generate();
        let sealed = seal(pair.public(), b"info", b"aad", b"secret").unwrap();
        assert_eq!(pair.open(&sealed, b"info", b"aad").unwrap()[..], *b"secret");
        assert!(pair.open(&sealed, b"other", b"aad").is_none());
        assert!(pair.open(&sealed, b"info", b"other").is_none());
        assert!(SealingKeyPair::generate().open(&sealed, b"info", b"aad").is_none());
        for place in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[place] ^= 1;
            assert!(pair.open(&changed, b"info", b"aad").is_none(), "byte {place}");
        }
        assert!(pair.open(&sealed[..31], b"info", b"aad").is_none());
    }

    #[test]
    fn a_seed_always_yields_the_same_key_pair() {
        let [one, other] = [0, 1].map(|_| SealingKeyPair::from_seed(&[7; 32]));
        assert_eq!(one.public(), other.public());
        let sealed = seal(one.public(), b"", b"", b"x").unwrap();
        assert_eq!(other.open(&sealed, b"", b"").unwrap()[..], *b"x");
    }
}
