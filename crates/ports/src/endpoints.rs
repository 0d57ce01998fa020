//! Direct endpoints of clients. Each account has at most one, which its client publishes for a
//! limited time.

use std::fmt;

use async_trait::async_trait;
use bytes::Bytes;
use qpq_domain::{IdentityKey, UnixMillis};

use crate::StoreResult;

/// Stores endpoints. A store may lose any of them at any time: clients publish again.
///
/// An identity key belongs to one account permanently. So an endpoint of another history of the
/// store is still that of its owner, and needs no store id.
#[async_trait]
pub trait Endpoints: Send + Sync {
    /// Stores the endpoint of `owner` in place of the previous one.
    async fn publish(
        &self,
        owner: &IdentityKey,
        endpoint: Endpoint,
        now: UnixMillis,
    ) -> StoreResult<()>;

    /// Removes the endpoint of `owner`, if there is one.
    async fn remove(&self, owner: &IdentityKey) -> StoreResult<()>;

    /// Returns the endpoint of `owner`, unless it has expired by `now`.
    async fn resolve(&self, owner: &IdentityKey, now: UnixMillis) -> StoreResult<Option<Endpoint>>;
}

/// A published endpoint.
#[derive(Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// The address, in a format that only clients read.
    pub node_addr: Bytes,
    /// The time at which the endpoint expires.
    pub expires_at: UnixMillis,
}

/// Leaves out the address, because logs name no address.
impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoint").field("expires_at", &self.expires_at).finish_non_exhaustive()
    }
}
