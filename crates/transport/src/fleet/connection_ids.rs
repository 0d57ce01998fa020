//! Connection ids that the edge which made them recognises, and no other.
//!
//! A packet for a connection that an edge does not know is answered with a stateless reset, which
//! ends the connection at the client. Behind a balancer that goes by addresses, such packets are
//! often for a connection of *another* edge, strayed since the client's address changed; and with a
//! reset key that all edges share, every edge could end every connection, for everybody who has
//! seen one of its packets (RFC 9000 §21.11). So an id is `random 8 ‖ MAC 4`, the MAC under a key
//! of the one edge, and only ids whose MAC is right are answered: connections that this edge has
//! had and has no more. For the others there is silence: the connection is where it was, and goes
//! on when packets find it again.

use std::{sync::Arc, time::Duration};

use aws_lc_rs::hmac;
use quinn::{ConnectionId, ConnectionIdGenerator};
use quinn_proto::InvalidCid;

const RANDOM_LEN: usize = 8;
/// One id in 2³² of another edge is taken for an own one.
const MAC_LEN: usize = 4;
const LEN: usize = RANDOM_LEN + MAC_LEN;

/// The key by which an edge recognises its own ids.
#[derive(Clone)]
pub(crate) struct Recognised {
    key: Arc<hmac::Key>,
}

impl Recognised {
    /// As long as the process runs.
    pub(crate) fn while_running() -> Self {
        let mut key = [0; 32];
        aws_lc_rs::rand::fill(&mut key).expect("the operating system gives randomness");
        Self { key: Arc::new(hmac::Key::new(hmac::HMAC_SHA256, &key)) }
    }

    /// Also after a restart under the same name. Reset tokens are made with the same key from 12
    /// bytes, which the label is not.
    pub(crate) fn by_name(reset: &hmac::Key, edge: &str) -> Self {
        let label = [b"qpq connection ids v1 of ", edge.as_bytes()].concat();
        let key = hmac::sign(reset, &label);
        Self { key: Arc::new(hmac::Key::new(hmac::HMAC_SHA256, key.as_ref())) }
    }

    fn mac(&self, random: &[u8]) -> [u8; MAC_LEN] {
        *hmac::sign(&self.key, random).as_ref().first_chunk().expect("a MAC is longer")
    }
}

/// The generator of one endpoint.
pub(crate) fn generator(recognised: &Recognised) -> Box<dyn ConnectionIdGenerator> {
    Box::new(Ids(recognised.clone()))
}

struct Ids(Recognised);

impl ConnectionIdGenerator for Ids {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut id = [0; LEN];
        aws_lc_rs::rand::fill(&mut id[..RANDOM_LEN])
            .expect("the operating system gives randomness");
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
    fn an_edge_recognises_its_own_ids_and_those_it_made_before_a_restart() {
        let reset = hmac::Key::new(hmac::HMAC_SHA256, &[7; 32]);
        let named = |name| Ids(Recognised::by_name(&reset, name));
        let mut one = named("one");
        let id = one.generate_cid();
        assert_eq!(id.len(), one.cid_len());
        assert_ne!(id, one.generate_cid());
        assert!(one.validate(&id).is_ok());
        assert!(named("one").validate(&id).is_ok());
        assert!(named("two").validate(&id).is_err());
        assert!(Ids(Recognised::while_running()).validate(&id).is_err());
        let other = hmac::Key::new(hmac::HMAC_SHA256, &[8; 32]);
        assert!(Ids(Recognised::by_name(&other, "one")).validate(&id).is_err());
    }

    #[test]
    fn noise_of_any_length_is_nobodys() {
        let ids = Ids(Recognised::while_running());
        for len in 0..=20 {
            assert!(ids.validate(&ConnectionId::new(&vec![7; len])).is_err(), "{len}");
        }
    }
}
