//! Public keys that others fetch to start a conversation: KeyPackages, each given out once, and
//! hybrid keys, which stay.

use std::collections::HashSet;

use async_trait::async_trait;
use qpq_domain::{AccountId, IdentityKey, UnixMillis};

use crate::StoreResult;

/// KeyPackages (RFC 9420 §10) on the server, already validated.
#[async_trait]
pub trait KeyPackages: Send + Sync {
    /// Stores all of `packages` or none. One that is there already counts as stored and changes
    /// nothing; a new last-resort package takes the place of the old one. How many one owner may
    /// have is the backend's configuration ([`qpq_domain::KeyPackageCaps`]).
    ///
    /// [`UploadMode::Replace`] first removes what the owner has stored, the last-resort package
    /// included. Removing and storing are one step: a concurrent [`take`](Self::take) gets a package
    /// of before or of after, and an upload that is refused removes nothing. A removed package that
    /// was not given out may be uploaded again.
    async fn upload(
        &self,
        owner: AccountId,
        packages: Vec<NewKeyPackage>,
        mode: UploadMode,
        now: UnixMillis,
    ) -> StoreResult<Upload>;

    /// Takes the oldest package of `target` that is valid at `now`, for good: no two calls ever get
    /// the same one. When none is left, the last-resort package, which stays. `None` when there is
    /// neither, or no such account.
    async fn take(
        &self,
        target: &IdentityKey,
        now: UnixMillis,
    ) -> StoreResult<Option<TakenKeyPackage>>;

    /// The fingerprints of the packages that the owner has stored now.
    async fn known(&self, owner: AccountId) -> StoreResult<HashSet<[u8; 32]>>;

    /// What the owner has left at `now`.
    async fn stock(&self, owner: AccountId, now: UnixMillis) -> StoreResult<Stock>;
}

/// What an upload does with the packages that are stored already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UploadMode {
    /// Keeps them.
    Add,
    /// Removes them.
    Replace,
}

/// A KeyPackage to be stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewKeyPackage {
    /// What identifies it, however it is wrapped: its reference (RFC 9420 §5.2) where that can be
    /// computed.
    pub fingerprint: [u8; 32],
    /// As uploaded, byte for byte.
    pub bytes: Vec<u8>,
    pub last_resort: bool,
    /// When its lifetime begins: it is neither counted nor given out before.
    pub not_before: UnixMillis,
    /// When its lifetime ends: it is not given out after, and not before then forgotten.
    pub not_after: UnixMillis,
}

/// What became of an upload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Upload {
    Stored(Stock),
    /// The package with this index was given out before and may not come again; nothing was stored.
    GivenOut(usize),
    /// The owner has as many as allowed; nothing was stored.
    Full,
}

/// A package that was taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TakenKeyPackage {
    pub bytes: Vec<u8>,
    pub last_resort: bool,
}

/// What an owner has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Stock {
    /// Packages that are given out once each.
    pub available: u32,
    pub has_last_resort: bool,
}

/// X25519 ‖ ML-KEM-768 public keys, one an account, replaced by the owner.
#[async_trait]
pub trait HybridKeys: Send + Sync {
    async fn put(&self, owner: AccountId, key: Vec<u8>) -> StoreResult<()>;

    /// The keys of `targets` in their order; `None` where there is none, or no such account.
    async fn get(&self, targets: &[IdentityKey]) -> StoreResult<Vec<Option<Vec<u8>>>>;
}
