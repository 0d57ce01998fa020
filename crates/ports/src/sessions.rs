//! Sessions: the accounts that tokens log in, and the times of login, use and expiry.

use async_trait::async_trait;
use qpq_domain::{AccountId, DeviceId, IdentityKey, TokenHash, UnixMillis};

use crate::StoreResult;

/// Stores the sessions that logins have created and that have not ended. Receives the hashes of
/// tokens, never the tokens.
///
/// The caller decides whether a session has expired, since it knows the configured lifetimes. A
/// store removes expired sessions only in [`Maintenance::sweep`](crate::Maintenance::sweep).
#[async_trait]
pub trait Sessions: Send + Sync {
    /// Creates a session, unless its account was deleted or is banned from the server. Durable when
    /// it returns.
    ///
    /// A concurrent deletion or ban either prevents the session or ends it.
    async fn create(&self, session: NewSession) -> StoreResult<SessionCreation>;

    /// Returns the session with this token. May read a cache, which a revocation reaches within a
    /// second.
    async fn find(&self, token: &TokenHash) -> StoreResult<Option<Session>>;

    /// Returns the session with this token without any cache, for operations that a revoked session
    /// must not perform even once.
    async fn confirm(&self, token: &TokenHash) -> StoreResult<Option<Session>>;

    /// Records that the session was used at `now`, and that it ends at `expires_at` unless it is
    /// used again.
    async fn touch(
        &self,
        token: &TokenHash,
        now: UnixMillis,
        expires_at: UnixMillis,
    ) -> StoreResult<()>;

    /// Ends one session. Returns the number of ended sessions: 0 or 1.
    async fn revoke(&self, token: &TokenHash) -> StoreResult<u32>;

    /// Ends every session of the account. Returns their number.
    async fn revoke_all(&self, account: AccountId) -> StoreResult<u32>;
}

/// The outcome of a creation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SessionCreation {
    /// The session is created.
    Created,
    /// No account has the number and the identity key of the session.
    NoAccount,
    /// The account is banned from the server ([`Bans`](crate::Bans)).
    Banned,
}

/// A session to be created.
#[derive(Clone, Debug)]
pub struct NewSession {
    /// The SHA-256 of the token.
    pub token: TokenHash,
    /// The state of the session.
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
    /// The time of the last login by OPAQUE. The session counts as fresh for a limited time from
    /// then on.
    pub authenticated_at: UnixMillis,
    /// The time of the last call of the session, with the precision that the caller records.
    pub last_used_at: UnixMillis,
    /// The time at which the session ends unless it is used again.
    pub expires_at: UnixMillis,
}
