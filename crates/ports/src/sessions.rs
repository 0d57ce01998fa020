//! Sessions: which account a token belongs to, and since when.

use async_trait::async_trait;
use qpq_domain::{AccountId, DeviceId, IdentityKey, TokenHash, UnixMillis};

use crate::StoreResult;

/// Stores the sessions that a login has created and that have not ended. It gets hashes of tokens
/// only.
///
/// The caller decides whether a session has expired, since it knows the configured lifetimes. A
/// store only removes what [`Maintenance::sweep`](crate::Maintenance::sweep) removes.
#[async_trait]
pub trait Sessions: Send + Sync {
    /// Creates a session. Durable when it returns.
    async fn create(&self, session: NewSession) -> StoreResult<()>;

    /// Returns the session with this token. May read a cache, which a revocation reaches within a
    /// second.
    async fn find(&self, token: &TokenHash) -> StoreResult<Option<Session>>;

    /// Returns the session with this token without any cache, for operations that a revoked session
    /// must not do even once.
    async fn confirm(&self, token: &TokenHash) -> StoreResult<Option<Session>>;

    /// Records that the session was used at `now`, and that it ends at `expires_at` unless it is
    /// used again.
    async fn touch(
        &self,
        token: &TokenHash,
        now: UnixMillis,
        expires_at: UnixMillis,
    ) -> StoreResult<()>;

    /// Ends one session; returns how many there were (0 or 1).
    async fn revoke(&self, token: &TokenHash) -> StoreResult<u32>;

    /// Ends every session of the account; returns how many there were.
    async fn revoke_all(&self, account: AccountId) -> StoreResult<u32>;
}

/// A session to be created.
#[derive(Clone, Debug)]
pub struct NewSession {
    /// SHA-256 of its token.
    pub token: TokenHash,
    /// The rest of it.
    pub session: Session,
}

/// The state of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// The account that logged in.
    pub account: AccountId,
    /// The account's identity key.
    pub identity: IdentityKey,
    /// The device that the session is bound to, if any.
    pub device: Option<DeviceId>,
    /// When OPAQUE last succeeded. A session is fresh for a while from then on.
    pub authenticated_at: UnixMillis,
    /// When a call last used it, with the precision that the caller records.
    pub last_used_at: UnixMillis,
    /// When it ends unless it is used again.
    pub expires_at: UnixMillis,
}
