//! Recovery bundles: the data with which an account that has lost all devices is restored,
//! encrypted by its client, and sealed again by the server.

use std::{fmt, time::Duration};

use async_trait::async_trait;
use qpq_domain::{AccountId, UnixMillis};

use crate::StoreResult;

/// Stores at most one recovery bundle for each account. Receives bundles that are sealed under a
/// key outside of the store.
#[async_trait]
pub trait RecoveryBundles: Send + Sync {
    /// Returns the account's bundle and version. Counts no fetch.
    async fn find(&self, account: AccountId) -> StoreResult<BundleState>;

    /// Stores a bundle if the account's version is `bundle.replaces`. The version rises by one.
    ///
    /// A repeat with the same sealed bytes finds the bundle of the first call and returns
    /// [`BundlePut::Stored`].
    async fn put(&self, bundle: NewBundle) -> StoreResult<BundlePut>;

    /// Returns the account's bundle, and counts the fetch in the same step, unless `per_day`
    /// fetches were counted within the day of the first one of them: 24 hours, whatever bundles
    /// were stored or removed meanwhile. A count that begins more than a day in the future is
    /// discarded.
    async fn fetch(
        &self,
        account: AccountId,
        now: UnixMillis,
        per_day: u32,
    ) -> StoreResult<BundleFetch>;

    /// Removes the account's bundle if it has one. The version then rises by one, so that no bundle
    /// is stored over the removal by a client that did not see it. Returns whether there was a
    /// bundle.
    async fn remove(&self, account: AccountId) -> StoreResult<bool>;

    /// Returns the smallest id after `after` of a key under which a bundle is sealed.
    async fn next_key(&self, after: Option<AtRestKeyId>) -> StoreResult<Option<AtRestKeyId>>;
}

/// The maximum time between the first fetch and the last one that are counted together.
pub const FETCH_DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// The id of a key that seals data at rest. Not secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AtRestKeyId(pub [u8; 8]);

impl fmt::Display for AtRestKeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The recovery bundle of an account and its version.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BundleState {
    /// The number of times that a bundle was stored or removed.
    pub version: u64,
    /// The bundle; `None` if none was stored, or the last one was removed.
    pub bundle: Option<StoredBundle>,
}

/// A sealed bundle to be stored.
#[derive(Clone, PartialEq, Eq)]
pub struct NewBundle {
    /// The account.
    pub account: AccountId,
    /// The version that the bundle replaces.
    pub replaces: u64,
    /// The sealed bundle.
    pub sealed: Vec<u8>,
    /// The key that has sealed the bundle.
    pub key: AtRestKeyId,
    /// The instant of the call.
    pub now: UnixMillis,
}

impl fmt::Debug for NewBundle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NewBundle")
            .field("account", &self.account)
            .field("replaces", &self.replaces)
            .finish_non_exhaustive()
    }
}

/// A stored bundle.
#[derive(Clone, PartialEq, Eq)]
pub struct StoredBundle {
    /// The version.
    pub version: u64,
    /// The sealed bundle.
    pub sealed: Vec<u8>,
    /// The time at which it was stored.
    pub stored_at: UnixMillis,
}

impl fmt::Debug for StoredBundle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoredBundle")
            .field("version", &self.version)
            .field("stored_at", &self.stored_at)
            .finish_non_exhaustive()
    }
}

/// The outcome of [`RecoveryBundles::put`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BundlePut {
    /// The bundle is stored.
    Stored,
    /// The account has another version than the one to replace.
    OtherVersion,
}

/// The outcome of [`RecoveryBundles::fetch`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BundleFetch {
    /// The bundle. The fetch was counted.
    Found(StoredBundle),
    /// The account has no bundle, and this version. Nothing was counted.
    Absent(u64),
    /// The fetches of this day are used up. The value is the time until the next one.
    Limited(Duration),
}
