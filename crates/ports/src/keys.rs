//! Public keys that other accounts fetch to start a conversation: KeyPackages, each of which is
//! taken once, and hybrid keys, which can be fetched any number of times.

use std::collections::HashSet;

use async_trait::async_trait;
use qpq_domain::{AccountId, DeviceId, IdentityKey, UnixMillis};

use crate::StoreResult;

/// Stores validated KeyPackages (RFC 9420 §10).
#[async_trait]
pub trait KeyPackages: Send + Sync {
    /// Stores all of `packages` or none. A package that is stored already changes nothing. A new
    /// last-resort package replaces the old one of the same device. The backend's configuration
    /// limits the packages of one device ([`qpq_domain::KeyPackageLimits`]).
    ///
    /// [`UploadMode::Replace`] first removes the stored packages of `owner`, the last-resort
    /// package included. Removing and storing are one step: a concurrent [`take`](Self::take)
    /// returns a package from before or after that step, and an upload that is refused removes
    /// nothing. A removed package that was not taken may be uploaded again.
    async fn upload(
        &self,
        owner: PackageOwner,
        packages: Vec<NewKeyPackage>,
        mode: UploadMode,
        now: UnixMillis,
    ) -> StoreResult<Upload>;

    /// Permanently takes the oldest package of `target`, of any device, that is valid at `now`: no
    /// two calls return the same one. If none is left, returns the last-resort package, which
    /// stays. Returns `None` if there is neither, or no such account.
    async fn take(
        &self,
        target: &IdentityKey,
        now: UnixMillis,
    ) -> StoreResult<Option<TakenKeyPackage>>;

    /// Takes one package of each registered device of `target`, as [`take`](Self::take) does, in
    /// one step. Returns them in the order of the registrations; none if there is no device or no
    /// such account. A device without a key of its own may be served from the packages of the
    /// account ([`PackageOwner::device`] is `None`) in addition to its own.
    async fn take_of_devices(
        &self,
        target: &IdentityKey,
        now: UnixMillis,
    ) -> StoreResult<Vec<DevicePackage>>;

    /// Returns the fingerprints of the packages that are stored for all devices of the account.
    async fn known(&self, account: AccountId) -> StoreResult<HashSet<[u8; 32]>>;

    /// Returns the number of packages that `owner` has left at `now`.
    async fn stock(&self, owner: PackageOwner, now: UnixMillis) -> StoreResult<Stock>;
}

/// The owner of KeyPackages: a device, or the account itself, whose identity key signs them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PackageOwner {
    /// The account.
    pub account: AccountId,
    /// The device; `None` for the account itself.
    pub device: Option<DeviceId>,
}

impl PackageOwner {
    /// Returns the owner of the packages that the account's identity key signs.
    pub const fn account(account: AccountId) -> Self {
        Self { account, device: None }
    }
}

/// The treatment of stored packages in an upload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UploadMode {
    /// Keeps the packages that are stored already.
    Add,
    /// Removes the packages that are stored already.
    Replace,
}

/// A KeyPackage to be stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewKeyPackage {
    /// The identifier of the package, which does not depend on its wrapping: the KeyPackageRef (RFC
    /// 9420 §5.2) where that can be computed.
    pub fingerprint: [u8; 32],
    /// The package as uploaded, byte for byte.
    pub bytes: Vec<u8>,
    /// The device whose key signs it; `None` if the identity key does.
    pub device: Option<DeviceId>,
    /// `true` for the last-resort package, which is returned repeatedly while no other is left.
    pub last_resort: bool,
    /// The start of the lifetime. Before it, the package is neither counted nor taken.
    pub not_before: UnixMillis,
    /// The end of the lifetime. After it, the package is not taken. Until then, the store remembers
    /// a package that was taken.
    pub not_after: UnixMillis,
}

/// The outcome of an upload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Upload {
    /// All packages are stored. Contains the present stock of the uploading owner.
    Stored(Stock),
    /// The package with this index was taken before. Nothing was stored.
    Taken(usize),
    /// A device, or the account itself, has as many packages as are allowed. Nothing was stored.
    Full,
}

/// A package that was taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TakenKeyPackage {
    /// The package as uploaded, byte for byte.
    pub bytes: Vec<u8>,
    /// `true` for the last-resort package, which other calls return too.
    pub last_resort: bool,
}

/// A device, and the package that was taken for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DevicePackage {
    /// The device.
    pub device: DeviceId,
    /// The package; `None` if the device has none.
    pub package: Option<TakenKeyPackage>,
}

/// The packages that an owner has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Stock {
    /// Packages that can be taken once each.
    pub available: u32,
    /// `true` if there is a last-resort package.
    pub has_last_resort: bool,
}

/// Stores X25519 ‖ ML-KEM-768 public keys, one for each account.
#[async_trait]
pub trait HybridKeys: Send + Sync {
    /// Stores the owner's key in place of any earlier one.
    async fn put(&self, owner: AccountId, key: HybridKey) -> StoreResult<()>;

    /// Returns the keys of `targets` in their order: `None` for a target that has no key or is not
    /// an account.
    async fn get(&self, targets: &[IdentityKey]) -> StoreResult<Vec<Option<HybridKey>>>;
}

/// A hybrid key as its owner uploaded it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HybridKey {
    /// X25519 (32 bytes) ‖ ML-KEM-768 encapsulation key (1184 bytes, FIPS 203).
    pub key: Vec<u8>,
    /// The identity key's signature over `"qpq/hybrid/1" ‖ key`, if the owner uploaded one.
    pub signature: Option<[u8; 64]>,
}
