//! What one edge must tell all others at once, so that calls in progress there hear of it.

use futures_util::stream::BoxStream;
use qpq_domain::IdentityKey;

/// Something about an account that is to be looked up again. It carries no state, so it may be
/// lost, doubled or late: then a call in progress learns of it a little later, by its own checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AccountEvent {
    /// One or more sessions of the account were ended before their time.
    SessionsEnded,
    /// One of the account's KeyPackages was given out.
    KeyPackageTaken,
}

impl AccountEvent {
    /// All account events. `event as usize` is the index of `event`.
    pub const ALL: [Self; 2] = [Self::SessionsEnded, Self::KeyPackageTaken];
}

/// The way between the edges of a deployment.
pub trait AccountEvents: Send + Sync {
    /// Tells every other edge, soon and without waiting for it.
    fn publish(&self, identity: &IdentityKey, event: AccountEvent);

    /// What other edges publish from now on. A deployment of one edge has nothing to hear: its
    /// stream never yields.
    fn listen(&self) -> BoxStream<'static, (IdentityKey, AccountEvent)>;
}

/// For a deployment of one edge.
#[derive(Clone, Copy, Debug, Default)]
pub struct SingleEdge;

impl AccountEvents for SingleEdge {
    fn publish(&self, _: &IdentityKey, _: AccountEvent) {}

    fn listen(&self) -> BoxStream<'static, (IdentityKey, AccountEvent)> {
        Box::pin(futures_util::stream::pending())
    }
}
