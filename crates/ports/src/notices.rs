//! What one edge must tell all others at once, so that calls in progress there hear of it.

use futures_util::stream::BoxStream;
use qpq_domain::IdentityKey;

/// Something about an account that is to be looked up again. It carries no state, so it may be
/// lost, doubled or late: then a call in progress learns of it a little later, by its own checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Notice {
    /// One or more sessions of the account were ended before their time.
    SessionsEnded,
    /// One of the account's KeyPackages was given out.
    KeyPackageTaken,
}

/// The way between the edges of a deployment.
pub trait Notices: Send + Sync {
    /// Tells every other edge, soon and without waiting for it.
    fn publish(&self, identity: &IdentityKey, notice: Notice);

    /// What other edges publish from now on. A deployment of one edge has nothing to hear: its
    /// stream never yields.
    fn listen(&self) -> BoxStream<'static, (IdentityKey, Notice)>;
}

/// For a deployment of one edge.
#[derive(Clone, Copy, Debug, Default)]
pub struct Alone;

impl Notices for Alone {
    fn publish(&self, _: &IdentityKey, _: Notice) {}

    fn listen(&self) -> BoxStream<'static, (IdentityKey, Notice)> {
        Box::pin(futures_util::stream::pending())
    }
}
