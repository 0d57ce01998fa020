//! Endpoints in Redis, which removes them when they expire. Redis may lose any of them: clients
//! publish again.
//!
//! A value is a version byte, `expires_at` (8 bytes, big-endian) and the address. A value of
//! another version, which an edge of another release has stored, counts as none.

use async_trait::async_trait;
use bytes::{BufMut as _, Bytes, BytesMut};
use qpq_domain::{IdentityKey, UnixMillis};
use qpq_ports::{Endpoint, Endpoints, StoreResult};
use redis::Cmd;

use crate::{ClusterStore, redis::Redis};

/// The first byte of a value.
const VERSION: u8 = 1;

#[async_trait]
impl Endpoints for ClusterStore {
    async fn publish(
        &self,
        owner: &IdentityKey,
        endpoint: Endpoint,
        now: UnixMillis,
    ) -> StoreResult<()> {
        let lifetime = u64::try_from(endpoint.expires_at.since(now).as_millis());
        let mut set = Cmd::new();
        set.arg("SET").arg(key(&self.inner.redis, owner)).arg(&encode(&endpoint)[..]);
        // Redis refuses a lifetime of zero.
        set.arg("PX").arg(lifetime.unwrap_or(u64::MAX).max(1));
        self.inner.redis.command("endpoint_publish", &set).await
    }

    async fn remove(&self, owner: &IdentityKey) -> StoreResult<()> {
        let mut unlink = Cmd::new();
        unlink.arg("UNLINK").arg(key(&self.inner.redis, owner));
        self.inner.redis.command::<u64>("endpoint_remove", &unlink).await.map(drop)
    }

    async fn resolve(&self, owner: &IdentityKey, now: UnixMillis) -> StoreResult<Option<Endpoint>> {
        let mut get = Cmd::new();
        get.arg("GET").arg(key(&self.inner.redis, owner));
        let value: Option<Vec<u8>> = self.inner.redis.command("endpoint_resolve", &get).await?;
        let found = value.and_then(|value| decode(value.into()));
        Ok(found.filter(|endpoint| endpoint.expires_at > now))
    }
}

fn key(redis: &Redis, owner: &IdentityKey) -> String {
    let (high, low) = owner.as_bytes().split_at(16);
    let half = |bytes: &[u8]| u128::from_be_bytes(bytes.try_into().expect("16 bytes"));
    redis.key(format_args!("ep:{:032x}{:032x}", half(high), half(low)))
}

fn encode(endpoint: &Endpoint) -> Bytes {
    let mut value = BytesMut::with_capacity(9 + endpoint.node_addr.len());
    value.put_u8(VERSION);
    value.put_u64(endpoint.expires_at.0);
    value.put_slice(&endpoint.node_addr);
    value.freeze()
}

fn decode(value: Bytes) -> Option<Endpoint> {
    let (&[VERSION], rest) = value.split_first_chunk()? else { return None };
    let (expires_at, address) = rest.split_first_chunk()?;
    let expires_at = UnixMillis(u64::from_be_bytes(*expires_at));
    Some(Endpoint { node_addr: value.slice_ref(address), expires_at })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_read_as_it_was_written_and_no_value_of_another_version_is() {
        for address in [&b""[..], b"address"] {
            let endpoint =
                Endpoint { node_addr: Bytes::from_static(address), expires_at: UnixMillis(7) };
            let value = encode(&endpoint);
            assert_eq!(decode(value.clone()), Some(endpoint));
            for length in 0..9 {
                assert_eq!(decode(value.slice(..length)), None, "{length} bytes");
            }
            let mut other = value.to_vec();
            other[0] = VERSION + 1;
            assert_eq!(decode(other.into()), None);
        }
    }
}
