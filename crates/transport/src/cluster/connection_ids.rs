//! Connection ids that only the edge that created them recognises.
//!
//! An edge answers a packet for an unknown connection with a stateless reset, which ends the
//! connection at the client. If a balancer routes by address, such a packet often belongs to a
//! connection of *another* edge, because the client's address has changed. All edges share the
//! reset key, so any edge could end any connection after seeing one of its packets (RFC 9000
//! §21.11).
//!
//! So an id is `random 8 ‖ MAC 4`, with a MAC key that differs between edges. An edge answers only
//! ids with a valid MAC, which belong to its own ended connections. The edge ignores all other ids,
//! so a connection continues once its packets reach its own edge again.

use std::{sync::Arc, time::Duration};

use aws_lc_rs::hmac;
use quinn::{ConnectionId, ConnectionIdGenerator};
use quinn_proto::InvalidCid;

const RANDOM_LEN: usize = 8;
/// The length of the MAC. An edge mistakes one in 2³² ids of other edges for its own.
const MAC_LEN: usize = 4;
const LEN: usize = RANDOM_LEN + MAC_LEN;

/// The key with which an edge recognises its own ids.
#[derive(Clone)]
pub(crate) struct ConnectionIdKey {
    key: Arc<hmac::Key>,
}

impl ConnectionIdKey {
    /// Creates a random key, with which ids are recognised until the process ends.
    pub(crate) fn random() -> Self {
        let mut key = [0; 32];
        aws_lc_rs::rand::fill(&mut key).expect("the operating system provides randomness");
        Self { key: Arc::new(hmac::Key::new(hmac::HMAC_SHA256, &key)) }
    }

    /// Derives the key from the reset key and the edge's name. The key is the same after a restart.
    ///
    /// Reset tokens are MACs of connection ids, which have 12 bytes, under the same key. The label
    /// here has another length, so its MAC is never a reset token.
    pub(crate) fn derive(reset: &hmac::Key, edge: &str) -> Self {
        let label = [b"qpq connection ids v1 of ", edge.as_bytes()].concat();
        let key = hmac::sign(reset, &label);
        Self { key: Arc::new(hmac::Key::new(hmac::HMAC_SHA256, key.as_ref())) }
    }

    fn mac(&self, random: &[u8]) -> [u8; MAC_LEN] {
        *hmac::sign(&self.key, random).as_ref().first_chunk().expect("a MAC is longer")
    }
}

/// Returns the generator of one endpoint.
pub(crate) fn generator(key: &ConnectionIdKey) -> Box<dyn ConnectionIdGenerator> {
    Box::new(Ids(key.clone()))
}

struct Ids(ConnectionIdKey);

impl ConnectionIdGenerator for Ids {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut id = [0; LEN];
        aws_lc_rs::rand::fill(&mut id[..RANDOM_LEN])
            .expect("the operating system provides randomness");
        let mac = self.0.mac(&id[..RANDOM_LEN]);
        id[RANDOM_LEN..].copy_from_slice(&mac);
        ConnectionId::new(&id)
    }

    fn validate(&self, id: &ConnectionId) -> Result<(), InvalidCid> {
        let (random, mac) = id.split_at_checked(RANDOM_LEN).ok_or(InvalidCid)?;
        if self.0.mac(random) == *mac { Ok(()) } else { Err(InvalidCid) }
    }

    fn cid_len(&self) -> usize {
        LEN
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_edge_recognises_its_own_ids_also_after_a_restart() {
        let reset = hmac::Key::new(hmac::HMAC_SHA256, &[7; 32]);
        let named = |name| Ids(ConnectionIdKey::derive(&reset, name));
        let mut one = named("one");
        let id = one.generate_cid();
        assert_eq!(id.len(), one.cid_len());
        assert_ne!(id, one.generate_cid());
        assert!(one.validate(&id).is_ok());
        assert!(named("one").validate(&id).is_ok());
        assert!(named("two").validate(&id).is_err());
        assert!(Ids(ConnectionIdKey::random()).validate(&id).is_err());
        let other = hmac::Key::new(hmac::HMAC_SHA256, &[8; 32]);
        assert!(Ids(ConnectionIdKey::derive(&other, "one")).validate(&id).is_err());
    }

    #[test]
    fn an_id_of_any_length_without_a_valid_mac_is_not_recognised() {
        let ids = Ids(ConnectionIdKey::random());
        for len in 0..=20 {
            assert!(ids.validate(&ConnectionId::new(&vec![7; len])).is_err(), "{len}");
        }
    }
}
