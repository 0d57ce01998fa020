//! Uploads of KeyPackages. An upload is checked first. Then all of its packages are stored, or
//! none.

use std::collections::{HashMap, HashSet};

use qpq_domain::{AccountId, DeviceId, UnixMillis};
use qpq_ports::{NewKeyPackage, PackageOwner, Stock, Upload, UploadMode};
use sqlx::{PgConnection, Row as _, postgres::PgRow};

use super::{LOCK, device_of, stock};
use crate::{
    postgres::{
        Repeat, Scope, Statement,
        row::{Columns as _, millis, now_of},
    },
    time::Time,
};

const EXPIRE: &str = "
    WITH packages AS (DELETE FROM key_package WHERE owner = $1 AND not_after < $2)
    DELETE FROM key_package_given WHERE owner = $1 AND not_after < $2";

/// Finds the packages of an upload. A single statement reads both tables in one snapshot, so a
/// package that is taken concurrently is found in one of them.
const KNOWN: &str = "
    SELECT fingerprint, last_resort, device, false AS given FROM key_package
     WHERE owner = $1 AND fingerprint = ANY ($2)
    UNION ALL
    SELECT fingerprint, false, NULL, true FROM key_package_given
     WHERE owner = $1 AND fingerprint = ANY ($2)";

/// $2: the device, $3: true if the last-resort package is removed, too.
const REMOVE: &str = "
    DELETE FROM key_package
     WHERE owner = $1 AND device IS NOT DISTINCT FROM $2 AND ($3 OR NOT last_resort)";

/// Keeps the row, so that a take that waits for the old package finds the new one.
const REPLACE_LAST_RESORT: &str = "
    UPDATE key_package SET fingerprint = $2, not_after = $3, bytes = $4, not_before = $5
     WHERE owner = $1 AND last_resort AND device IS NOT DISTINCT FROM $6";

const STORE: &str = "
    INSERT INTO key_package (owner, fingerprint, last_resort, not_after, bytes, not_before, device)
    SELECT $1, n.fingerprint, n.last_resort, n.not_after, n.bytes, n.not_before, n.device
      FROM unnest($2::bytea[], $3::bool[], $4::int8[], $5::bytea[], $6::int8[], $7::bytea[])
      WITH ORDINALITY
        AS n (fingerprint, last_resort, not_after, bytes, not_before, device, place)
     ORDER BY n.place";

pub(super) struct UploadPackages<'a> {
    pub(super) owner: PackageOwner,
    pub(super) packages: &'a [NewKeyPackage],
    pub(super) mode: UploadMode,
    pub(super) now: UnixMillis,
    pub(super) max_count: u32,
    pub(super) time: &'a Time,
}

impl Statement for UploadPackages<'_> {
    type Output = Upload;

    /// A repeat finds the packages of the first attempt, or reports one that was taken meanwhile.
    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Transaction;

    fn name(&self) -> &'static str {
        "upload_key_packages"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Upload> {
        expire(connection, self.owner.account, self.now, self.time).await?;
        upload(connection, self).await
    }
}

/// Locks the owner's account against other uploads, and removes expired packages.
async fn expire(
    connection: &mut PgConnection,
    owner: AccountId,
    now: UnixMillis,
    time: &Time,
) -> sqlx::Result<()> {
    let Some(row) = sqlx::query(LOCK).bind(owner.0).fetch_optional(&mut *connection).await? else {
        return Ok(());
    };
    let expired_by = time.bounds(now, now_of(&row)?).earliest;
    sqlx::query(EXPIRE).bind(owner.0).bind(millis(expired_by)).execute(connection).await.map(drop)
}

/// Checks the upload, and then stores all packages or none. The lock excludes other uploads of the
/// account. Concurrent takes only reduce the stock. The result does not count them.
async fn upload(
    connection: &mut PgConnection,
    &UploadPackages { owner, packages, mode, now, max_count, .. }: &UploadPackages<'_>,
) -> sqlx::Result<Upload> {
    let mut known = Known::of(connection, owner.account, packages).await?;
    if mode == UploadMode::Replace {
        known.stored.retain(|_, package| package.device != owner.device);
    }
    let new = match known.choose(packages) {
        Ok(new) => new,
        Err(index) => return Ok(Upload::Taken(index)),
    };
    let account = owner.account;
    let others = new.iter().map(|package| PackageOwner { account, device: package.device });
    let mut stocks = HashMap::new();
    for of in others.chain([owner]).collect::<HashSet<_>>() {
        let stock = match mode {
            UploadMode::Replace if of == owner => Stock::default(),
            UploadMode::Add | UploadMode::Replace => stock(connection, of, now).await?,
        };
        let own = new.iter().filter(|package| package.device == of.device);
        let stock = with(stock, own, now);
        if stock.available.saturating_add(stock.has_last_resort.into()) > max_count {
            return Ok(Upload::Full);
        }
        stocks.insert(of, stock);
    }
    if mode == UploadMode::Replace {
        // A last resort is replaced in its own row, below.
        let has_another =
            new.iter().any(|package| package.last_resort && package.device == owner.device);
        sqlx::query(REMOVE)
            .bind(account.0)
            .bind(device_of(&owner))
            .bind(!has_another)
            .execute(&mut *connection)
            .await?;
    }
    let mut stored = Vec::with_capacity(new.len());
    for package in new {
        if !package.last_resort || !replace_last_resort(connection, account, package).await? {
            stored.push(package);
        }
    }
    store(connection, account, &stored).await?;
    Ok(Upload::Stored(stocks[&owner]))
}

/// Returns a stock with new packages of the same owner added, at most one of them a last resort.
fn with<'a>(
    mut stock: Stock,
    new: impl Iterator<Item = &'a &'a NewKeyPackage>,
    now: UnixMillis,
) -> Stock {
    for package in new {
        let is_alive = package.not_before <= now && now <= package.not_after;
        if package.last_resort {
            stock.has_last_resort = is_alive;
        } else {
            stock.available = stock.available.saturating_add(is_alive.into());
        }
    }
    stock
}

/// The packages of an upload that are stored or were given.
struct Known {
    /// The stored packages.
    stored: HashMap<[u8; 32], StoredPackage>,
    given: HashSet<[u8; 32]>,
}

/// A package that is stored.
struct StoredPackage {
    device: Option<DeviceId>,
    last_resort: bool,
}

impl Known {
    async fn of(
        connection: &mut PgConnection,
        owner: AccountId,
        packages: &[NewKeyPackage],
    ) -> sqlx::Result<Self> {
        let fingerprints: Vec<&[u8]> =
            packages.iter().map(|package| &package.fingerprint[..]).collect();
        let rows =
            sqlx::query(KNOWN).bind(owner.0).bind(fingerprints).fetch_all(connection).await?;
        let mut known = Self { stored: HashMap::new(), given: HashSet::new() };
        for row in &rows {
            known.add(row)?;
        }
        Ok(known)
    }

    fn add(&mut self, row: &PgRow) -> sqlx::Result<()> {
        let fingerprint = row.hash("fingerprint")?;
        if row.try_get("given")? {
            self.given.insert(fingerprint);
        } else {
            let (device, last_resort) = (row.device("device")?, row.try_get("last_resort")?);
            self.stored.insert(fingerprint, StoredPackage { device, last_resort });
        }
        Ok(())
    }

    /// Returns the packages to store, of each device at most one last resort, or the index of the
    /// first that was taken before.
    fn choose(mut self, packages: &[NewKeyPackage]) -> Result<Vec<&NewKeyPackage>, usize> {
        let mut new: Vec<&NewKeyPackage> = Vec::new();
        for (index, package) in packages.iter().enumerate() {
            if self.stored.contains_key(&package.fingerprint) {
                continue;
            }
            if self.given.contains(&package.fingerprint) {
                return Err(index);
            }
            let NewKeyPackage { device, last_resort, .. } = *package;
            if last_resort {
                // A last resort replaces any earlier one of the device, stored or of this upload.
                self.stored.retain(|_, stored| !(stored.last_resort && stored.device == device));
                new.retain(|other| !(other.last_resort && other.device == device));
            }
            self.stored.insert(package.fingerprint, StoredPackage { device, last_resort });
            new.push(package);
        }
        Ok(new)
    }
}

/// Replaces the last-resort package of the same device; returns whether there was one.
async fn replace_last_resort(
    connection: &mut PgConnection,
    owner: AccountId,
    package: &NewKeyPackage,
) -> sqlx::Result<bool> {
    let done = sqlx::query(REPLACE_LAST_RESORT)
        .bind(owner.0)
        .bind(&package.fingerprint[..])
        .bind(millis(package.not_after))
        .bind(&package.bytes[..])
        .bind(millis(package.not_before))
        .bind(package.device.as_ref().map(|device| &device.as_bytes()[..]))
        .execute(&mut *connection)
        .await?;
    Ok(done.rows_affected() > 0)
}

async fn store(
    connection: &mut PgConnection,
    owner: AccountId,
    packages: &[&NewKeyPackage],
) -> sqlx::Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    macro_rules! of_packages {
        ($value:expr) => {
            packages.iter().map($value).collect::<Vec<_>>()
        };
    }
    sqlx::query(STORE)
        .bind(owner.0)
        .bind(of_packages!(|package| &package.fingerprint[..]))
        .bind(of_packages!(|package| package.last_resort))
        .bind(of_packages!(|package| millis(package.not_after)))
        .bind(of_packages!(|package| &package.bytes[..]))
        .bind(of_packages!(|package| millis(package.not_before)))
        .bind(of_packages!(|package| package.device.as_ref().map(|device| &device.as_bytes()[..])))
        .execute(connection)
        .await
        .map(drop)
}
