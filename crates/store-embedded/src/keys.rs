//! KeyPackages and hybrid keys in SQLite.
//!
//! A KeyPackage is deleted in the transaction that takes it, and its fingerprint is stored in
//! another table until its lifetime ends. Therefore each is taken once and cannot be uploaded
//! again. Takes and counts compare the lifetime of a package with the caller's instant, and never
//! rely on a sweep to have removed an expired package.

use std::collections::HashSet;

use async_trait::async_trait;
use qpq_domain::{AccountId, DeviceId, IdentityKey, UnixMillis};
use qpq_ports::{
    DevicePackage, HybridKey, HybridKeys, KeyPackages, NewKeyPackage, PackageOwner, Stock,
    StoreResult, TakenKeyPackage, Upload, UploadMode,
};
use sqlx::{
    Row as _, SqliteConnection,
    query::Query,
    sqlite::{SqliteArguments, SqliteRow},
};

use crate::{
    error::{NeverWritten, read_failed},
    messages::remove::SWEEP_ROWS,
    row::{Columns as _, millis},
    statement::{Done, SMALL, Statement},
    store::EmbeddedStore,
};

#[async_trait]
impl KeyPackages for EmbeddedStore {
    async fn upload(
        &self,
        owner: PackageOwner,
        packages: Vec<NewKeyPackage>,
        mode: UploadMode,
        now: UnixMillis,
    ) -> StoreResult<Upload> {
        let expired_by = self.memory.clock.bounds(now).earliest;
        let max_count = self.limits.key_packages.max_count;
        self.writer.run(UploadPackages { owner, packages, mode, now, expired_by, max_count }).await
    }

    async fn take(
        &self,
        target: &IdentityKey,
        now: UnixMillis,
    ) -> StoreResult<Option<TakenKeyPackage>> {
        self.writer.run(TakePackage { target: *target, now }).await
    }

    async fn take_of_devices(
        &self,
        target: &IdentityKey,
        now: UnixMillis,
    ) -> StoreResult<Vec<DevicePackage>> {
        self.writer.run(TakePackageOfEachDevice { target: *target, now }).await
    }

    async fn known(&self, account: AccountId) -> StoreResult<HashSet<[u8; 32]>> {
        let rows = sqlx::query("SELECT fingerprint FROM key_package WHERE owner = ?1")
            .bind(account.0)
            .fetch_all(&self.readers)
            .await
            .map_err(read_failed)?;
        rows.iter()
            .map(|row| row.hash("fingerprint"))
            .collect::<Result<_, _>>()
            .map_err(read_failed)
    }

    async fn stock(&self, owner: PackageOwner, now: UnixMillis) -> StoreResult<Stock> {
        let found = of_owner(STOCK, &owner).bind(millis(now)).fetch_one(&self.readers).await;
        found.and_then(|row| stock(&row)).map_err(read_failed)
    }
}

#[async_trait]
impl HybridKeys for EmbeddedStore {
    async fn put(&self, owner: AccountId, key: HybridKey) -> StoreResult<()> {
        self.writer.run(PutHybridKey { owner, key }).await
    }

    async fn get(&self, targets: &[IdentityKey]) -> StoreResult<Vec<Option<HybridKey>>> {
        let mut reader = self.readers.acquire().await.map_err(read_failed)?;
        let mut keys = Vec::with_capacity(targets.len());
        for target in targets {
            let row = sqlx::query(
                "SELECT h.key, h.signature FROM account a JOIN hybrid_key h ON h.owner = a.id
                  WHERE a.identity = ?1",
            )
            .bind(&target.as_bytes()[..])
            .fetch_optional(&mut *reader)
            .await
            .map_err(read_failed)?;
            keys.push(row.as_ref().map(hybrid_key).transpose().map_err(read_failed)?);
        }
        Ok(keys)
    }
}

fn hybrid_key(row: &SqliteRow) -> sqlx::Result<HybridKey> {
    let signature = row.try_get::<Option<&[u8]>, _>("signature")?.map(<[u8; 64]>::try_from);
    let signature = signature.transpose().map_err(|_| NeverWritten("signature"))?;
    Ok(HybridKey { key: row.bytes("key")?, signature })
}

type SqliteQuery<'q> = Query<'q, sqlx::Sqlite, SqliteArguments>;

/// Binds an account to ?1 and a device to ?2.
fn of_owner<'q>(sql: &'static str, owner: &'q PackageOwner) -> SqliteQuery<'q> {
    let device = owner.device.as_ref().map(|device| &device.as_bytes()[..]);
    sqlx::query(sql).bind(owner.account.0).bind(device)
}

/// The condition for a package whose lifetime contains an instant. A package that a release without
/// the column `not_before` has stored is valid from the beginning of time.
macro_rules! valid_at {
    ($now:literal) => {
        concat!("not_after >= ", $now, " AND coalesce(not_before, 0) <= ", $now)
    };
}

/// Counts the packages of the device ?2 of the account ?1 that are valid at ?3. Reads short index
/// entries only, at most as many as the device may have packages.
const STOCK: &str = concat!(
    "SELECT
        (SELECT count(*) FROM key_package INDEXED BY key_package_of_device
          WHERE owner = ?1 AND device IS ?2 AND last_resort = 0 AND ",
    valid_at!("?3"),
    ") AS available,
        EXISTS (SELECT 1 FROM key_package INDEXED BY key_package_of_device
                 WHERE owner = ?1 AND device IS ?2 AND last_resort = 1 AND ",
    valid_at!("?3"),
    ") AS last_resort"
);

/// The oldest package of the account with the identity ?1 that is valid at ?2, of the last-resort
/// ones or of the others.
macro_rules! oldest {
    ($last_resort:literal) => {
        concat!(
            "SELECT k.id FROM account a
              CROSS JOIN key_package k INDEXED BY key_package_next ON k.owner = a.id
              WHERE a.identity = ?1 AND k.last_resort = ",
            $last_resort,
            " AND ",
            valid_at!("?2"),
            " ORDER BY k.id LIMIT 1"
        )
    };
}

/// The oldest package of the device with the registration number ?1. Includes the packages of the
/// account itself if the device has no key of its own. See `oldest`.
macro_rules! oldest_of_device {
    ($last_resort:literal) => {
        concat!(
            "SELECT min(id) FROM (
                SELECT (SELECT id FROM key_package INDEXED BY key_package_of_device
                         WHERE owner = r.account AND device IS r.device AND last_resort = ",
            $last_resort,
            " AND ",
            valid_at!("?2"),
            " ORDER BY id LIMIT 1) AS id FROM device r WHERE r.id = ?1
                UNION ALL
                SELECT (SELECT id FROM key_package INDEXED BY key_package_of_device
                         WHERE owner = r.account AND device IS NULL AND last_resort = ",
            $last_resort,
            " AND ",
            valid_at!("?2"),
            " ORDER BY id LIMIT 1) FROM device r WHERE r.id = ?1 AND r.key IS NULL)"
        )
    };
}

/// The two statements of a take, which select by the same condition.
struct TakeStatements {
    /// Removes the oldest package that is not a last resort.
    one_time: &'static str,
    /// Returns the oldest last-resort package.
    last_resort: &'static str,
}

macro_rules! take_statements {
    ($oldest:ident) => {
        TakeStatements {
            one_time: concat!(
                "DELETE FROM key_package WHERE id = (",
                $oldest!("0"),
                ") RETURNING owner, fingerprint, last_resort, not_after, bytes"
            ),
            last_resort: concat!(
                "SELECT owner, fingerprint, last_resort, not_after, bytes
                   FROM key_package WHERE id = (",
                $oldest!("1"),
                ")"
            ),
        }
    };
}
const OF_ACCOUNT: TakeStatements = take_statements!(oldest);
const OF_DEVICE: TakeStatements = take_statements!(oldest_of_device);

/// Returns the devices of the account with the identity ?1.
pub(crate) const DEVICES: &str = "
    SELECT r.id, r.device FROM account a CROSS JOIN device r ON r.account = a.id
     WHERE a.identity = ?1 ORDER BY r.id";

#[cfg(test)]
pub(crate) const STATEMENTS: [&str; 6] = [
    STOCK,
    OF_ACCOUNT.one_time,
    OF_ACCOUNT.last_resort,
    OF_DEVICE.one_time,
    OF_DEVICE.last_resort,
    DEVICES,
];

fn stock(row: &SqliteRow) -> sqlx::Result<Stock> {
    let available = row.unsigned("available")?;
    Ok(Stock {
        available: u32::try_from(available).unwrap_or(u32::MAX),
        has_last_resort: row.try_get("last_resort")?,
    })
}

/// Stores packages of one owner, all or none.
struct UploadPackages {
    owner: PackageOwner,
    packages: Vec<NewKeyPackage>,
    mode: UploadMode,
    now: UnixMillis,
    /// The instant for the removal of expired packages.
    expired_by: UnixMillis,
    max_count: u32,
}

impl Statement for UploadPackages {
    type Answer = Upload;
    const NAME: &'static str = "upload key packages";

    fn bytes(&self) -> usize {
        self.packages.iter().map(|package| package.bytes.len() + SMALL).sum()
    }

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<Upload>> {
        self.remove_expired(tx).await?;
        if self.mode == UploadMode::Replace {
            let sql = "DELETE FROM key_package WHERE owner = ?1 AND device IS ?2";
            of_owner(sql, &self.owner).execute(&mut *tx).await?;
        }
        for (index, package) in self.packages.iter().enumerate() {
            if self.store(tx, package).await? == Stored::Taken {
                return Ok(Done::undo(Upload::Taken(index)));
            }
        }
        let signers: HashSet<_> = self.packages.iter().map(|package| package.device).collect();
        for device in signers {
            let stock = self.stock(tx, PackageOwner { device, ..self.owner }).await?;
            let count = stock.available.saturating_add(stock.has_last_resort.into());
            if count > self.max_count {
                return Ok(Done::undo(Upload::Full));
            }
        }
        Ok(Done::keep(Upload::Stored(self.stock(tx, self.owner).await?)))
    }
}

/// The outcome of one package of an upload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stored {
    /// The package is stored, now or since an earlier upload.
    Yes,
    /// The package was taken before.
    Taken,
}

impl UploadPackages {
    async fn remove_expired(&self, tx: &mut SqliteConnection) -> sqlx::Result<()> {
        for sql in [
            "DELETE FROM key_package WHERE owner = ?1 AND not_after < ?2",
            "DELETE FROM key_package_given WHERE owner = ?1 AND not_after < ?2",
        ] {
            sqlx::query(sql)
                .bind(self.owner.account.0)
                .bind(millis(self.expired_by))
                .execute(&mut *tx)
                .await?;
        }
        Ok(())
    }

    async fn store(
        &self,
        tx: &mut SqliteConnection,
        package: &NewKeyPackage,
    ) -> sqlx::Result<Stored> {
        let PackageOwner { account: AccountId(owner), .. } = self.owner;
        let known = sqlx::query(
            "SELECT EXISTS (SELECT 1 FROM key_package
                             WHERE owner = ?1 AND fingerprint = ?2) AS stored,
                    EXISTS (SELECT 1 FROM key_package_given
                             WHERE owner = ?1 AND fingerprint = ?2) AS given",
        )
        .bind(owner)
        .bind(&package.fingerprint[..])
        .fetch_one(&mut *tx)
        .await?;
        if known.try_get("stored")? {
            return Ok(Stored::Yes);
        }
        if known.try_get("given")? {
            return Ok(Stored::Taken);
        }
        if package.last_resort {
            let sql = "DELETE FROM key_package
                        WHERE owner = ?1 AND device IS ?2 AND last_resort = 1";
            let signer = PackageOwner { device: package.device, ..self.owner };
            of_owner(sql, &signer).execute(&mut *tx).await?;
        }
        sqlx::query(
            "INSERT INTO key_package
                 (owner, fingerprint, last_resort, not_before, not_after, bytes, device)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        )
        .bind(owner)
        .bind(&package.fingerprint[..])
        .bind(package.last_resort)
        .bind(millis(package.not_before))
        .bind(millis(package.not_after))
        .bind(&package.bytes[..])
        .bind(package.device.as_ref().map(|device| &device.as_bytes()[..]))
        .execute(tx)
        .await?;
        Ok(Stored::Yes)
    }

    async fn stock(&self, tx: &mut SqliteConnection, owner: PackageOwner) -> sqlx::Result<Stock> {
        let row = of_owner(STOCK, &owner).bind(millis(self.now)).fetch_one(tx).await?;
        stock(&row)
    }
}

/// Removes and returns the oldest package of an account, or returns the last-resort package.
struct TakePackage {
    target: IdentityKey,
    now: UnixMillis,
}

impl Statement for TakePackage {
    type Answer = Option<TakenKeyPackage>;
    const NAME: &'static str = "take key package";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<Option<TakenKeyPackage>>> {
        let of_target = |sql| sqlx::query(sql).bind(&self.target.as_bytes()[..]);
        take(tx, &OF_ACCOUNT, of_target, self.now).await.map(Done::keep)
    }
}

/// Takes a package of each device of an account, as [`TakePackage`] does of the account.
struct TakePackageOfEachDevice {
    target: IdentityKey,
    now: UnixMillis,
}

impl Statement for TakePackageOfEachDevice {
    type Answer = Vec<DevicePackage>;
    const NAME: &'static str = "take key package of each device";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<Vec<DevicePackage>>> {
        let query = sqlx::query(DEVICES).bind(&self.target.as_bytes()[..]);
        let devices = query.fetch_all(&mut *tx).await?;
        let mut taken = Vec::with_capacity(devices.len());
        for row in devices {
            let registration: i64 = row.try_get("id")?;
            let device: DeviceId = row.device("device")?.ok_or(NeverWritten("device"))?;
            let of_device = |sql| sqlx::query(sql).bind(registration);
            let package = take(tx, &OF_DEVICE, of_device, self.now).await?;
            taken.push(DevicePackage { device, package });
        }
        Ok(Done::keep(taken))
    }
}

/// Takes a package. `query` binds the first parameter of the statements.
async fn take<'q>(
    tx: &mut SqliteConnection,
    statements: &TakeStatements,
    query: impl Fn(&'static str) -> SqliteQuery<'q>,
    now: UnixMillis,
) -> sqlx::Result<Option<TakenKeyPackage>> {
    let mut taken = None;
    for sql in [statements.one_time, statements.last_resort] {
        taken = query(sql).bind(millis(now)).fetch_optional(&mut *tx).await?;
        if taken.is_some() {
            break;
        }
    }
    let Some(row) = taken else { return Ok(None) };
    // The last-resort package is recorded too: it may not be uploaded again after a newer one has
    // replaced it.
    sqlx::query(
        "INSERT OR IGNORE INTO key_package_given (owner, fingerprint, not_after)
         VALUES (?1, ?2, ?3)",
    )
    .bind(row.account("owner")?.0)
    .bind(&row.hash("fingerprint")?[..])
    .bind(millis(row.at("not_after")?))
    .execute(tx)
    .await?;
    Ok(Some(TakenKeyPackage {
        bytes: row.bytes("bytes")?,
        last_resort: row.try_get("last_resort")?,
    }))
}

struct PutHybridKey {
    owner: AccountId,
    key: HybridKey,
}

impl Statement for PutHybridKey {
    type Answer = ();
    const NAME: &'static str = "put hybrid key";

    fn bytes(&self) -> usize {
        SMALL + self.key.key.len()
    }

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<()>> {
        let HybridKey { key, signature } = &self.key;
        sqlx::query(
            "INSERT OR REPLACE INTO hybrid_key (owner, key, signature) VALUES (?1, ?2, ?3)",
        )
        .bind(self.owner.0)
        .bind(&key[..])
        .bind(signature.as_ref().map(|signature| &signature[..]))
        .execute(tx)
        .await?;
        Ok(Done::keep(()))
    }
}

/// Removes up to [`SWEEP_ROWS`] expired packages, and as many fingerprints. Returns their number.
pub(crate) struct SweepKeyPackages {
    pub(crate) now: UnixMillis,
}

impl Statement for SweepKeyPackages {
    type Answer = u64;
    const NAME: &'static str = "sweep key packages";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<u64>> {
        let mut rows = 0;
        for sql in [
            "DELETE FROM key_package WHERE id IN (
                 SELECT id FROM key_package WHERE not_after < ?1 ORDER BY not_after LIMIT +?2)",
            "DELETE FROM key_package_given WHERE (owner, fingerprint) IN (
                 SELECT owner, fingerprint FROM key_package_given
                  WHERE not_after < ?1 ORDER BY not_after LIMIT +?2)",
        ] {
            rows += sqlx::query(sql)
                .bind(millis(self.now))
                .bind(SWEEP_ROWS)
                .execute(&mut *tx)
                .await?
                .rows_affected();
        }
        Ok(Done::keep(rows))
    }
}
