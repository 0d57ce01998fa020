//! Retry tokens, with which a client proves its address, issued by one edge and accepted by all.
//!
//! quinn treats a token that it cannot open like a missing one. After a Retry that is fatal:
//! without the token, the server cannot repeat the original connection id, which the client
//! verifies (RFC 9000 §7.3). So all three keys are tried.

use std::sync::Arc;

use arc_swap::ArcSwap;
use aws_lc_rs::hkdf::{HKDF_SHA256, Prk, Salt};
use quinn::crypto::{AeadKey, CryptoError, HandshakeTokenKey};

use super::ring::KeyRing;

pub(crate) struct Tokens {
    keys: ArcSwap<[Prk; 3]>,
}

/// The keys for one token, derived from its random part.
struct TokenKey {
    keys: Arc<[Prk; 3]>,
    random: Vec<u8>,
}

impl Tokens {
    pub(super) fn new(ring: &KeyRing) -> Self {
        Self { keys: ArcSwap::from_pointee(extract(ring)) }
    }

    pub(super) fn replace(&self, ring: &KeyRing) {
        self.keys.store(extract(ring).into());
    }
}

fn extract(ring: &KeyRing) -> [Prk; 3] {
    let salt = Salt::new(HKDF_SHA256, b"qpq address token v1");
    ring.keys().map(|key| salt.extract(key))
}

impl HandshakeTokenKey for Tokens {
    fn aead_from_hkdf(&self, random_bytes: &[u8]) -> Box<dyn AeadKey> {
        Box::new(TokenKey { keys: self.keys.load_full(), random: random_bytes.to_vec() })
    }
}

impl AeadKey for TokenKey {
    fn seal(&self, data: &mut Vec<u8>, additional_data: &[u8]) -> Result<(), CryptoError> {
        let [current, ..] = &*self.keys;
        current.aead_from_hkdf(&self.random).seal(data, additional_data)
    }

    fn open<'a>(
        &self,
        data: &'a mut [u8],
        additional_data: &[u8],
    ) -> Result<&'a mut [u8], CryptoError> {
        for key in &*self.keys {
            // Opened in a copy, because an attempt with a wrong key destroys the data.
            let mut attempt = data.to_vec();
            if let Ok(opened) = key.aead_from_hkdf(&self.random).open(&mut attempt, additional_data)
            {
                let data = &mut data[..opened.len()];
                data.copy_from_slice(opened);
                return Ok(data);
            }
        }
        Err(CryptoError)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sealed(tokens: &Tokens) -> Vec<u8> {
        let mut data = b"an address".to_vec();
        tokens.aead_from_hkdf(b"random").seal(&mut data, b"").unwrap();
        data
    }

    fn opens(tokens: &Tokens, mut data: Vec<u8>) -> bool {
        let opened = tokens.aead_from_hkdf(b"random");
        opened.open(&mut data, b"").is_ok_and(|opened| opened == b"an address")
    }

    #[test]
    fn edges_before_and_after_a_rotation_accept_each_others_tokens() {
        let ring = KeyRing::generate();
        let (old, new) = (Tokens::new(&ring), Tokens::new(&ring.rotated()));
        assert!(opens(&old, sealed(&old)));
        assert!(opens(&old, sealed(&new)));
        assert!(opens(&new, sealed(&old)));
        let ring = ring.rotated().rotated();
        let newest = Tokens::new(&ring);
        assert!(!opens(&newest, sealed(&old)));
        new.replace(&ring);
        assert!(!opens(&new, sealed(&old)));
        assert!(opens(&new, sealed(&newest)));
    }

    #[test]
    fn tokens_of_other_clusters_and_damaged_tokens_are_refused() {
        let tokens = Tokens::new(&KeyRing::generate());
        assert!(!opens(&tokens, sealed(&Tokens::new(&KeyRing::generate()))));
        let token = sealed(&tokens);
        for len in 0..token.len() {
            assert!(!opens(&tokens, token[..len].to_vec()), "{len}");
        }
    }
}
