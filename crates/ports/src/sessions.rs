//! Sessions: who holds which token, and since when.

use async_trait::async_trait;
use qpq_domain::{AccountId, DeviceId, IdentityKey, TokenHash, UnixMillis};

use crate::StoreResult;

/// The sessions that were opened by a login and not yet ended. Only hashes of tokens are ever seen
/// here.
///
/// Expiry by time is the caller's to judge (it knows the configured lifetimes); a store only
/// forgets what `Maintenance` sweeps.
#[async_trait]
pub trait Sessions: Send + Sync {
    async fn create(&self, session: NewSession) -> StoreResult<()>;

    /// The session with this token. May come from a cache that a revocation reaches within a
    /// second.
    async fn find(&self, token: &TokenHash) -> StoreResult<Option<Session>>;

    /// The session with this token as it is now, past every cache: for what a revoked session must
    /// not do even once more.
    async fn confirm(&self, token: &TokenHash) -> StoreResult<Option<Session>>;

    /// Notes that the session was used at `now`, and that it now ends at `expires_at` unless used
    /// again.
    async fn touch(
        &self,
        token: &TokenHash,
        now: UnixMillis,
        expires_at: UnixMillis,
    ) -> StoreResult<()>;

    /// Ends one session; how many were there (0 or 1).
    async fn revoke(&self, token: &TokenHash) -> StoreResult<u32>;

    /// Ends every session of the account; how many there were.
    async fn revoke_all(&self, account: AccountId) -> StoreResult<u32>;
}

/// A session to be opened.
#[derive(Clone, Debug)]
pub struct NewSession {
    pub token: TokenHash,
    pub session: Session,
}

/// What a session knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    pub account: AccountId,
    pub identity: IdentityKey,
    /// The device the session is bound to, if any.
    pub device: Option<DeviceId>,
    /// When OPAQUE last succeeded: what "fresh" is measured from.
    pub authenticated_at: UnixMillis,
    pub last_used_at: UnixMillis,
    /// When it ends unless it is used before.
    pub expires_at: UnixMillis,
}
