//! The published endpoints, in memory: clients publish again after a restart.
//!
//! The memory is bounded. When it is full, the endpoints that were not published or resolved for
//! the longest time are removed.

use std::time::Duration;

use moka::{policy::EvictionPolicy, sync::Cache};
use qpq_domain::{IdentityKey, UnixMillis};
use qpq_ports::Endpoint;

/// Maximum memory of all endpoints, in bytes.
const CAPACITY: u64 = 64 << 20;
/// The memory of an endpoint in addition to its address, in bytes.
const OVERHEAD: usize = 256;
/// Time after which an endpoint is removed in any case: the longest lifetime that a client may
/// choose.
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);

/// The endpoints by the identity keys of their owners.
#[derive(Debug)]
pub(crate) struct EndpointTable(Cache<IdentityKey, Endpoint>);

impl EndpointTable {
    pub(crate) fn new() -> Self {
        Self::with_capacity(CAPACITY)
    }

    fn with_capacity(bytes: u64) -> Self {
        let size = |_: &IdentityKey, endpoint: &Endpoint| {
            u32::try_from(endpoint.node_addr.len() + OVERHEAD).unwrap_or(u32::MAX)
        };
        let cache = Cache::builder()
            .max_capacity(bytes)
            .weigher(size)
            .eviction_policy(EvictionPolicy::lru())
            .time_to_live(LONGEST)
            .build();
        Self(cache)
    }

    pub(crate) fn publish(&self, owner: IdentityKey, endpoint: Endpoint) {
        self.0.insert(owner, endpoint);
    }

    pub(crate) fn remove(&self, owner: &IdentityKey) {
        self.0.invalidate(owner);
    }

    pub(crate) fn resolve(&self, owner: &IdentityKey, now: UnixMillis) -> Option<Endpoint> {
        self.0.get(owner).filter(|endpoint| endpoint.expires_at > now)
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    #[test]
    fn the_memory_of_endpoints_is_bounded_and_the_newest_stay() {
        let table = EndpointTable::with_capacity(100_000);
        let owner = |n: u8| IdentityKey::new([n; 32]);
        let endpoint =
            Endpoint { node_addr: Bytes::from(vec![7; 4_096]), expires_at: UnixMillis(1) };
        for n in 0..=255 {
            table.publish(owner(n), endpoint.clone());
            table.0.run_pending_tasks();
        }
        assert!(table.0.weighted_size() <= 100_000);
        assert_eq!(table.resolve(&owner(255), UnixMillis(0)), Some(endpoint));
        assert_eq!(table.resolve(&owner(0), UnixMillis(0)), None);
    }
}
