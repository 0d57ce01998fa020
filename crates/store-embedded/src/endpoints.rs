//! Endpoints, in the memory of this process.

use async_trait::async_trait;
use bytes::Bytes;
use qpq_domain::{IdentityKey, UnixMillis};
use qpq_ports::{Endpoint, Endpoints, StoreResult};

use crate::store::EmbeddedStore;

#[async_trait]
impl Endpoints for EmbeddedStore {
    async fn publish(
        &self,
        owner: &IdentityKey,
        endpoint: Endpoint,
        _: UnixMillis,
    ) -> StoreResult<()> {
        // A copy, because the bytes may be a part of a larger request.
        let node_addr = Bytes::copy_from_slice(&endpoint.node_addr);
        self.endpoints.publish(*owner, Endpoint { node_addr, ..endpoint });
        Ok(())
    }

    async fn remove(&self, owner: &IdentityKey) -> StoreResult<()> {
        self.endpoints.remove(owner);
        Ok(())
    }

    async fn resolve(&self, owner: &IdentityKey, now: UnixMillis) -> StoreResult<Option<Endpoint>> {
        Ok(self.endpoints.resolve(owner, now))
    }
}
