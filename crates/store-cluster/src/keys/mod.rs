//! KeyPackages and hybrid keys in Postgres.
//!
//! A KeyPackage is deleted by the statement that takes it, and its fingerprint is stored in another
//! table until the package's lifetime ends. So a package is taken once over all edges, and cannot
//! be uploaded again. Every statement compares the lifetime of a package with the caller's instant,
//! so an expired package counts as absent even if no sweep has removed it yet. Expired packages are
//! deleted only if the clocks of Postgres and of the edge agree that they have expired.
//!
//! A package belongs to a device, or to the account itself (`device` is NULL). Uploads of one
//! account are serialized by a lock on the account, which a revocation of a device takes, too. A
//! take waits for an upload only if it finds no one-time package.

mod hybrid;
mod take;
mod upload;

use std::collections::HashSet;

use async_trait::async_trait;
use qpq_domain::{AccountId, DeviceId, IdentityKey, UnixMillis};
use qpq_ports::{
    DevicePackage, KeyPackages, NewKeyPackage, PackageOwner, Stock, StoreResult, TakenKeyPackage,
    Upload, UploadMode,
};
use sqlx::{PgConnection, Row as _};

use self::{
    take::{TakeOwner, TakePackages},
    upload::UploadPackages,
};
use crate::{
    ClusterStore,
    postgres::{
        Repeat, Scope, Statement,
        row::{Columns as _, millis},
    },
};

/// The condition that the lifetime of a package contains $2. A package of an earlier release has no
/// `not_before`.
macro_rules! alive {
    () => {
        "not_after >= $2 AND coalesce(not_before, 0) <= $2"
    };
}
use alive;

/// Locks an account against other uploads. Compatible with the lock on the owner's key that the
/// insertion of a package takes.
const LOCK: &str = "SELECT store_now() AS postgres FROM account WHERE id = $1 FOR NO KEY UPDATE";

const STOCK: &str = concat!(
    "SELECT count(*) FILTER (WHERE NOT last_resort) AS available,
            coalesce(bool_or(last_resort), false) AS last_resort
       FROM key_package WHERE owner = $1 AND device IS NOT DISTINCT FROM $3 AND ",
    alive!()
);

/// $3: true if the device had no key of its own. With the last such device, the packages that the
/// identity key signs are removed, too.
const REMOVE_OF_DEVICE: &str = "
    DELETE FROM key_package
     WHERE owner = $1 AND (device = $2 OR $3 AND device IS NULL AND NOT EXISTS (
        SELECT 1 FROM device WHERE account = $1 AND key IS NULL))";

#[async_trait]
impl KeyPackages for ClusterStore {
    async fn upload(
        &self,
        owner: PackageOwner,
        packages: Vec<NewKeyPackage>,
        mode: UploadMode,
        now: UnixMillis,
    ) -> StoreResult<Upload> {
        let (max_count, time) = (self.inner.limits.key_packages.max_count, &self.inner.time);
        let upload = UploadPackages { owner, packages: &packages, mode, now, max_count, time };
        Ok(self.inner.database.run(&upload).await?)
    }

    async fn take(
        &self,
        target: &IdentityKey,
        now: UnixMillis,
    ) -> StoreResult<Option<TakenKeyPackage>> {
        let take = TakePackages { target, owner: TakeOwner::Account, now };
        let taken = self.inner.database.run(&take).await?;
        Ok(taken.into_iter().find_map(|(_, package)| package))
    }

    async fn take_of_devices(
        &self,
        target: &IdentityKey,
        now: UnixMillis,
    ) -> StoreResult<Vec<DevicePackage>> {
        let take = TakePackages { target, owner: TakeOwner::EachDevice, now };
        let taken = self.inner.database.run(&take).await?;
        let of_device = |(device, package)| Some(DevicePackage { device: device?, package });
        Ok(taken.into_iter().filter_map(of_device).collect())
    }

    async fn known(&self, account: AccountId) -> StoreResult<HashSet<[u8; 32]>> {
        Ok(self.inner.database.run(&ListPackages(account)).await?)
    }

    async fn stock(&self, owner: PackageOwner, now: UnixMillis) -> StoreResult<Stock> {
        Ok(self.inner.database.run(&CountPackages { owner, now }).await?)
    }
}

struct ListPackages(AccountId);

impl Statement for ListPackages {
    type Output = HashSet<[u8; 32]>;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "key_packages_known"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<HashSet<[u8; 32]>> {
        let rows = sqlx::query("SELECT fingerprint FROM key_package WHERE owner = $1")
            .bind(self.0.0)
            .fetch_all(connection)
            .await?;
        rows.iter().map(|row| row.hash("fingerprint")).collect()
    }
}

struct CountPackages {
    owner: PackageOwner,
    now: UnixMillis,
}

impl Statement for CountPackages {
    type Output = Stock;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "key_package_stock"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Stock> {
        stock(connection, self.owner, self.now).await
    }
}

/// Removes the packages of a revoked device. The caller has locked the head of the account's inbox.
pub(crate) async fn remove_of_device(
    connection: &mut PgConnection,
    account: AccountId,
    device: &DeviceId,
    is_keyless: bool,
) -> sqlx::Result<()> {
    sqlx::query(LOCK).bind(account.0).execute(&mut *connection).await?;
    let query = sqlx::query(REMOVE_OF_DEVICE).bind(account.0).bind(&device.as_bytes()[..]);
    query.bind(is_keyless).execute(connection).await.map(drop)
}

async fn stock(
    connection: &mut PgConnection,
    owner: PackageOwner,
    now: UnixMillis,
) -> sqlx::Result<Stock> {
    let query = sqlx::query(STOCK).bind(owner.account.0).bind(millis(now));
    let row = query.bind(device_of(&owner)).fetch_one(connection).await?;
    let available = row.unsigned("available")?;
    Ok(Stock {
        available: u32::try_from(available).unwrap_or(u32::MAX),
        has_last_resort: row.try_get("last_resort")?,
    })
}

/// Returns the device of an owner as a column.
fn device_of(owner: &PackageOwner) -> Option<&[u8]> {
    owner.device.as_ref().map(|device| &device.as_bytes()[..])
}
