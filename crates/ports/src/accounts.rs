//! Accounts: a username, an identity key and an OPAQUE record, bound together for ever.

use std::fmt;

use async_trait::async_trait;
use qpq_domain::{AccountId, IdentityKey, UnixMillis, Username};

use crate::StoreResult;

/// Who exists.
#[async_trait]
pub trait Accounts: Send + Sync {
    /// Inserts an account and its inbox. Never replaces anything: a username or key once taken
    /// stays taken.
    ///
    /// A username whose skeleton (UTS 39) is that of another account is taken too. Accounts that
    /// were registered before this rule stay, whatever their skeletons are.
    async fn register(&self, account: NewAccount) -> StoreResult<Registration>;

    /// What a login needs to know about `username`.
    async fn credentials(&self, username: &Username) -> StoreResult<Option<Credentials>>;

    async fn by_username(&self, username: &Username) -> StoreResult<Option<Account>>;

    async fn by_identity(&self, identity: &IdentityKey) -> StoreResult<Option<Account>>;
}

/// An account to be made.
#[derive(Clone)]
pub struct NewAccount {
    pub username: Username,
    pub identity: IdentityKey,
    /// The OPAQUE registration record (RFC 9807 §5), 192 bytes.
    pub opaque_record: Vec<u8>,
    pub now: UnixMillis,
}

impl fmt::Debug for NewAccount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NewAccount").field("identity", &self.identity).finish_non_exhaustive()
    }
}

/// What became of a registration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Registration {
    Registered(AccountId),
    /// The very same username, key and record are there already: a repeated request.
    Repeated(AccountId),
    /// Another account has the username, or one that people confuse with it.
    UsernameTaken,
    IdentityTaken,
}

/// What OPAQUE needs of an account.
#[derive(Clone)]
pub struct Credentials {
    pub account: AccountId,
    pub identity: IdentityKey,
    pub opaque_record: Vec<u8>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("account", &self.account).finish_non_exhaustive()
    }
}

/// What others may know of an account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    pub id: AccountId,
    pub username: Username,
    pub identity: IdentityKey,
    pub created_at: UnixMillis,
}
