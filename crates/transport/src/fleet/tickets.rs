//! Session tickets that every edge of the fleet makes and takes.
//!
//! A ticket is `key id 8 ‖ nonce 12 ‖ ciphertext ‖ tag 16`, AES-256-GCM with the key id as
//! associated data. rustls's own ticketer cannot be given a key. 0-RTT is out of reach with any
//! ticketer: rustls takes early data only with sessions that it remembers itself, so a call cannot
//! be replayed to another edge.

use arc_swap::ArcSwap;
use aws_lc_rs::aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey};
use rustls::server::ProducesTickets;
use sha2::{Digest, Sha256};

use super::KeyRing;

/// What clients are told. A ticket is really good for two rotations of the ring, so this is twice
/// the time between them that the documentation asks for.
const LIFETIME_SECONDS: u32 = 12 * 60 * 60;

const ID_LEN: usize = 8;

pub(crate) struct Tickets {
    keys: ArcSwap<[TicketKey; 3]>,
}

struct TicketKey {
    id: [u8; ID_LEN],
    key: RandomizedNonceKey,
}

impl Tickets {
    pub(super) fn new(ring: &KeyRing) -> Self {
        Self { keys: ArcSwap::from_pointee(ring.keys().map(TicketKey::new)) }
    }

    pub(super) fn exchange(&self, ring: &KeyRing) {
        self.keys.store(ring.keys().map(TicketKey::new).into());
    }
}

impl TicketKey {
    fn new(key: &[u8; 32]) -> Self {
        let name = Sha256::new().chain_update(b"qpq ticket key id v1").chain_update(key).finalize();
        Self {
            id: *name.first_chunk().expect("a hash is longer"),
            key: RandomizedNonceKey::new(&AES_256_GCM, key).expect("AES-256 takes 32 bytes"),
        }
    }
}

impl ProducesTickets for Tickets {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        LIFETIME_SECONDS
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        let [current, ..] = &**self.keys.load();
        let mut sealed = plain.to_vec();
        let nonce =
            current.key.seal_in_place_append_tag(Aad::from(&current.id), &mut sealed).ok()?;
        Some([&current.id[..], nonce.as_ref(), &sealed].concat())
    }

    fn decrypt(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        let (id, rest) = ticket.split_first_chunk::<ID_LEN>()?;
        let (nonce, sealed) = rest.split_first_chunk::<NONCE_LEN>()?;
        let keys = self.keys.load();
        let key = keys.iter().find(|key| key.id == *id)?;
        let mut opened = sealed.to_vec();
        let nonce = Nonce::assume_unique_for_key(*nonce);
        let len = key.key.open_in_place(nonce, Aad::from(id), &mut opened).ok()?.len();
        opened.truncate(len);
        Some(opened)
    }
}

impl std::fmt::Debug for Tickets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tickets(redacted)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_is_taken_until_its_key_is_forgotten() {
        let ring = KeyRing::generate();
        let tickets = Tickets::new(&ring);
        let ticket = tickets.encrypt(b"a session").unwrap();
        let opened = |ring: &KeyRing| Tickets::new(ring).decrypt(&ticket);
        assert_eq!(opened(&ring).unwrap(), b"a session");
        let once = ring.rotated();
        assert_eq!(opened(&once).unwrap(), b"a session");
        assert_eq!(opened(&once.rotated()), None);
        // An edge that has not yet seen the rotation takes what the others already make.
        let early = Tickets::new(&once).encrypt(b"a session").unwrap();
        assert_eq!(tickets.decrypt(&early).unwrap(), b"a session");
        tickets.exchange(&once.rotated());
        assert_eq!(tickets.decrypt(&early).unwrap(), b"a session");
        assert_eq!(tickets.decrypt(&ticket), None);
    }

    #[test]
    fn what_is_no_ticket_is_refused_without_a_panic() {
        let tickets = Tickets::new(&KeyRing::generate());
        let ticket = tickets.encrypt(b"a session").unwrap();
        assert_ne!(ticket, tickets.encrypt(b"a session").unwrap(), "the nonce is another");
        for len in 0..ticket.len() {
            assert_eq!(tickets.decrypt(&ticket[..len]), None, "{len}");
        }
        for place in 0..ticket.len() {
            let mut changed = ticket.clone();
            changed[place] ^= 1;
            assert_eq!(tickets.decrypt(&changed), None, "{place}");
        }
        assert_eq!(tickets.decrypt(&[&ticket[..], b"x"].concat()), None);
    }
}
