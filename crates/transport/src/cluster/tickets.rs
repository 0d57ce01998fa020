//! TLS session tickets that every edge of the cluster issues and accepts.
//!
//! A ticket is `key id 8 ‖ nonce 12 ‖ ciphertext ‖ tag 16`, AES-256-GCM with the key id as
//! associated data. `Tickets` replaces the ticketer of rustls, whose keys cannot be set. No
//! ticketer permits 0-RTT: rustls accepts early data only for sessions in its own memory, so a call
//! cannot be replayed to another edge.

use arc_swap::ArcSwap;
use aws_lc_rs::aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey};
use rustls::server::ProducesTickets;
use sha2::{Digest, Sha256};

use super::ring::KeyRing;

/// The lifetime that is announced to clients. A ticket is accepted until the second rotation of the
/// ring, so this is twice the documented time between rotations.
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

    pub(super) fn replace(&self, ring: &KeyRing) {
        self.keys.store(ring.keys().map(TicketKey::new).into());
    }
}

impl TicketKey {
    fn new(key: &[u8; 32]) -> Self {
        let name = Sha256::new().chain_update(b"qpq ticket key id v1").chain_update(key).finalize();
        Self {
            id: *name.first_chunk().expect("a hash has more bytes"),
            key: RandomizedNonceKey::new(&AES_256_GCM, key).expect("AES-256 has keys of 32 bytes"),
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
    fn a_ticket_is_accepted_until_its_key_leaves_the_ring() {
        let ring = KeyRing::generate();
        let tickets = Tickets::new(&ring);
        let ticket = tickets.encrypt(b"a session").unwrap();
        let opened = |ring: &KeyRing| Tickets::new(ring).decrypt(&ticket);
        assert_eq!(opened(&ring).unwrap(), b"a session");
        let once = ring.rotated();
        assert_eq!(opened(&once).unwrap(), b"a session");
        assert_eq!(opened(&once.rotated()), None);
        // An edge with the old ring accepts tickets of the new one.
        let early = Tickets::new(&once).encrypt(b"a session").unwrap();
        assert_eq!(tickets.decrypt(&early).unwrap(), b"a session");
        tickets.replace(&once.rotated());
        assert_eq!(tickets.decrypt(&early).unwrap(), b"a session");
        assert_eq!(tickets.decrypt(&ticket), None);
    }

    #[test]
    fn malformed_tickets_are_refused() {
        let tickets = Tickets::new(&KeyRing::generate());
        let ticket = tickets.encrypt(b"a session").unwrap();
        assert_ne!(ticket, tickets.encrypt(b"a session").unwrap(), "the nonces differ");
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
