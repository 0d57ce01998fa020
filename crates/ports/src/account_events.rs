//! Account events between edges, for calls in progress at another edge.

use futures_util::stream::BoxStream;
use qpq_domain::IdentityKey;

/// A change of an account that matters to calls in progress. An event carries no state, and the
/// calls also check by themselves, so loss, duplication or delay only costs latency.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AccountEvent {
    /// One or more sessions of the account were revoked.
    SessionsEnded,
    /// One of the account's KeyPackages was taken.
    KeyPackageTaken,
    /// A device of the account was registered, renamed, revoked, or moved to another position.
    DevicesChanged,
}

impl AccountEvent {
    /// All account events. `event as usize` is the index of `event`.
    pub const ALL: [Self; 3] = [Self::SessionsEnded, Self::KeyPackageTaken, Self::DevicesChanged];
}

/// Publishes account events to the other edges of a deployment.
pub trait AccountEvents: Send + Sync {
    /// Publishes an event to every other edge, without waiting for the delivery.
    fn publish(&self, identity: &IdentityKey, event: AccountEvent);

    /// Returns the events that other edges publish from now on. In a deployment of one edge the
    /// stream never yields.
    fn listen(&self) -> BoxStream<'static, (IdentityKey, AccountEvent)>;
}

/// The events of a deployment of one edge: none.
#[derive(Clone, Copy, Debug, Default)]
pub struct SingleEdge;

impl AccountEvents for SingleEdge {
    fn publish(&self, _: &IdentityKey, _: AccountEvent) {}

    fn listen(&self) -> BoxStream<'static, (IdentityKey, AccountEvent)> {
        Box::pin(futures_util::stream::pending())
    }
}
