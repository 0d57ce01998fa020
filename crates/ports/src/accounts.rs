//! Accounts: a username and an identity key, bound together until the account is deleted, and an
//! OPAQUE record, which a change of the password replaces.

use std::fmt;

use async_trait::async_trait;
use qpq_domain::{AccountId, IdentityKey, InviteHash, TokenHash, UnixMillis, Username};

use crate::{Deletion, Erasing, ErasureId, StoreResult};

/// Stores accounts.
#[async_trait]
pub trait Accounts: Send + Sync {
    /// Inserts an account and its inbox. Never replaces one: a registered username or key stays
    /// taken. The key of a deleted account is never accepted again, and its username not for
    /// [`NAME_RESERVED`](crate::NAME_RESERVED).
    ///
    /// A username with the skeleton (UTS 39) of another account is taken too. Accounts that were
    /// registered before this rule keep their usernames, whatever their skeletons are.
    ///
    /// Uses the invite of [`NewAccount::admission`] in the same step, once for each account: a
    /// refused or repeated registration uses nothing. An invite that is not valid is reported
    /// before a taken username, so that usernames cannot be probed without an invite.
    async fn register(&self, account: NewAccount) -> StoreResult<Registration>;

    /// Returns the account and the OPAQUE record of a username, for a login.
    async fn credentials(&self, username: &Username) -> StoreResult<Option<Credentials>>;

    /// Replaces the account's OPAQUE record, and ends all sessions of the account except the one
    /// that changes the password, in one step. A session that is created before this step ends with
    /// the others. A session that is created after it is created by a login that can read the new
    /// record.
    async fn change_password(&self, change: PasswordChange) -> StoreResult<PasswordChanged>;

    /// Returns the account with this username.
    async fn by_username(&self, username: &Username) -> StoreResult<Option<Account>>;

    /// Returns the account with this identity key.
    async fn by_identity(&self, identity: &IdentityKey) -> StoreResult<Option<Account>>;

    /// Makes an account unusable in one step, and stores the job that erases its data. Durable when
    /// it returns.
    ///
    /// From then on, the account is not found by its username or key, it has no OPAQUE record, no
    /// session and no inbox, and messages to its groups skip it.
    async fn delete(&self, account: AccountId, now: UnixMillis) -> StoreResult<Deletion>;

    /// Erases one batch of a deleted account's data. Each batch is one atomic step of bounded size.
    ///
    /// Safe to repeat. An erasure that is done, or that never existed, is [`Erasing::Done`].
    async fn erase(&self, erasure: ErasureId, now: UnixMillis) -> StoreResult<Erasing>;
}

/// An account to be registered.
#[derive(Clone)]
pub struct NewAccount {
    /// The username.
    pub username: Username,
    /// The identity key.
    pub identity: IdentityKey,
    /// The OPAQUE registration record (RFC 9807 §5), 192 bytes.
    pub opaque_record: Vec<u8>,
    /// The condition of the registration.
    pub admission: Admission,
    /// The instant of the call.
    pub now: UnixMillis,
}

/// The condition under which an account is registered.
///
/// An invite is valid if it has not expired, has a use left, and names the account's username or
/// none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// The registration needs no invite.
    Open,
    /// The registration needs a valid invite.
    Invite(InviteHash),
    /// The registration needs a valid invite that names the account's username. With another valid
    /// invite the username counts as taken.
    NamedInvite(InviteHash),
}

impl Admission {
    /// Returns the hash of the invite's code, if the registration needs an invite.
    pub const fn invite(&self) -> Option<&InviteHash> {
        match self {
            Self::Open => None,
            Self::Invite(code) | Self::NamedInvite(code) => Some(code),
        }
    }
}

impl fmt::Debug for NewAccount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NewAccount").field("identity", &self.identity).finish_non_exhaustive()
    }
}

/// The outcome of a registration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Registration {
    /// The account is registered.
    Registered(AccountId),
    /// An account has the same username, key and record: the request is a repeat.
    Repeated(AccountId),
    /// Another account has the username, or one that is easily confused with it. Or the username is
    /// still reserved after the deletion of its account.
    UsernameTaken,
    /// Another account has or had the identity key.
    IdentityTaken,
    /// The invite is unknown, used up, expired, or names another username.
    InviteInvalid,
}

/// A new OPAQUE record of an account.
#[derive(Clone)]
pub struct PasswordChange {
    /// The account.
    pub account: AccountId,
    /// The session that changes the password, which stays.
    pub session: TokenHash,
    /// The OPAQUE registration record (RFC 9807 §5), 192 bytes.
    pub opaque_record: Vec<u8>,
}

impl fmt::Debug for PasswordChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PasswordChange").field("account", &self.account).finish_non_exhaustive()
    }
}

/// The outcome of a change of the password.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PasswordChanged {
    /// The record was replaced.
    Changed {
        /// The number of sessions that were ended.
        ended_sessions: u32,
    },
    /// The session has ended meanwhile, and nothing was changed.
    SessionEnded,
}

/// The data of an account that a login with OPAQUE needs.
#[derive(Clone)]
pub struct Credentials {
    /// The account's number.
    pub account: AccountId,
    /// The account's identity key.
    pub identity: IdentityKey,
    /// The OPAQUE registration record (RFC 9807 §5).
    pub opaque_record: Vec<u8>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("account", &self.account).finish_non_exhaustive()
    }
}

/// The public data of an account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// The account's number.
    pub id: AccountId,
    /// The username.
    pub username: Username,
    /// The identity key.
    pub identity: IdentityKey,
    /// The time of the registration.
    pub created_at: UnixMillis,
}
