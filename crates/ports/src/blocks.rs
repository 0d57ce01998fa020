//! Blocks: accounts from which an account receives no messages.

use async_trait::async_trait;
use qpq_domain::{AccountId, IdentityKey, UnixMillis};

use crate::StoreResult;

/// Stores blocks.
///
/// An inbox accepts no message of a blocked sender ([`Enqueued::Refused`](crate::Enqueued)), except
/// the repeat of one that it has accepted before. Messages that are queued stay.
#[async_trait]
pub trait Blocks: Send + Sync {
    /// Blocks an account. Does nothing if it is blocked.
    async fn block(
        &self,
        account: AccountId,
        blocked: IdentityKey,
        now: UnixMillis,
    ) -> StoreResult<Blocking>;

    /// Ends a block. Does nothing if the account is not blocked.
    async fn unblock(&self, account: AccountId, blocked: IdentityKey) -> StoreResult<Unblocking>;

    /// Returns the identity keys of the blocked accounts, in the order of the keys.
    async fn list(&self, account: AccountId) -> StoreResult<Vec<IdentityKey>>;
}

/// The outcome of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blocking {
    /// The account is blocked.
    Blocked,
    /// No account has the identity key.
    NoSuchAccount,
    /// The identity key is the account's own.
    OwnAccount,
    /// The account blocks [`qpq_domain::MAX_BLOCKS`] accounts.
    Full,
}

/// The outcome of the end of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unblocking {
    /// The account is not blocked.
    Unblocked,
    /// No account has the identity key.
    NoSuchAccount,
}
