//! Invites: the right to register an account, bound to the possession of a code.
//!
//! A registration uses an invite in its own transaction, see [`Accounts`](crate::Accounts).

use std::time::Duration;

use async_trait::async_trait;
use qpq_domain::{InviteHash, InviteId, UnixMillis, Username};

use crate::StoreResult;

/// Time for which an invite is listed after it has expired. Then a sweep removes it.
pub const EXPIRED_INVITES: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// Stores invites.
#[async_trait]
pub trait Invites: Send + Sync {
    /// Creates an invite. Durable when it returns. A repeat with the same code changes nothing.
    async fn create(&self, invite: NewInvite) -> StoreResult<Invite>;

    /// Returns at most `limit` invites, the newest first.
    async fn list(&self, limit: u32) -> StoreResult<Vec<Invite>>;

    /// Removes an invite. Accounts that were registered with it stay.
    async fn revoke(&self, invite: InviteId) -> StoreResult<InviteRevocation>;
}

/// An invite to be created.
#[derive(Clone, Debug)]
pub struct NewInvite {
    /// The hash of the code.
    pub code: InviteHash,
    /// The number of registrations that the invite allows, at least 1.
    pub uses: u32,
    /// The time until the invite expires.
    pub lifetime: Duration,
    /// The only username that can be registered with the invite; `None` if any can.
    pub username: Option<Username>,
    /// A note for the operator.
    pub note: String,
    /// The instant of the call.
    pub now: UnixMillis,
}

/// A stored invite.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invite {
    /// The id.
    pub id: InviteId,
    /// The number of registrations that the invite allows.
    pub uses: u32,
    /// The number of registrations that are left.
    pub uses_left: u32,
    /// The only username that can be registered with the invite; `None` if any can.
    pub username: Option<Username>,
    /// The operator's note.
    pub note: String,
    /// The time of the creation.
    pub created_at: UnixMillis,
    /// The time at which the invite expires.
    pub expires_at: UnixMillis,
}

/// The outcome of a revocation of an invite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InviteRevocation {
    /// The invite was removed.
    Revoked,
    /// There is no such invite.
    NotFound,
}
