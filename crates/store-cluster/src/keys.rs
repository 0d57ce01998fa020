//! KeyPackages and hybrid keys in Postgres.
//!
//! A KeyPackage leaves its table in the statement that takes it, and its fingerprint goes into
//! another table, where it stays until the package's lifetime ends. So a package is taken once, by
//! whichever edge, and cannot be uploaded again. Whether a package has expired is decided by the
//! caller's instant in every statement, not by whether a sweep has removed it. Expired packages are
//! deleted only if the clocks of Postgres and of the edge agree that they have expired.
//!
//! A package belongs to a device, or to the account itself (`device` is NULL). Uploads of one
//! account are serialized by a lock on the account, which a revocation of a device takes, too.
//! Takes do not wait for a lock.

use std::collections::{HashMap, HashSet};

use async_trait::async_trait;
use qpq_domain::{AccountId, DeviceId, IdentityKey, UnixMillis};
use qpq_ports::{
    DevicePackage, HybridKey, HybridKeys, KeyPackages, NewKeyPackage, PackageOwner, Stock,
    StoreResult, TakenKeyPackage, Upload, UploadMode,
};
use sqlx::{PgConnection, Row as _, postgres::PgRow};

use crate::{
    ClusterStore,
    error::NeverWritten,
    postgres::{
        Repeat, Scope, Statement,
        row::{Columns as _, millis, now_of},
    },
    time::Time,
};

/// The condition for a package whose lifetime contains $2. Where the beginning is not known, the
/// package was stored by a release that did not keep it.
macro_rules! alive {
    () => {
        "not_after >= $2 AND coalesce(not_before, 0) <= $2"
    };
}

/// Takes the oldest package that no other transaction is taking. A locked package is skipped: the
/// transaction that locked it commits next. (If that fails, a later package or the last resort was
/// taken instead, which is harmless.) `=` and not IN: a sub-select that is planned as a join may
/// lock and take more than one row.
macro_rules! take {
    ($of:literal) => {
        concat!(
            "WITH taken AS (
                DELETE FROM key_package WHERE id = (
                    SELECT k.id FROM account a JOIN key_package k ON k.owner = a.id
                     WHERE a.identity = $1 AND NOT k.last_resort AND ",
            alive!(),
            $of,
            "        ORDER BY k.id LIMIT 1 FOR UPDATE OF k SKIP LOCKED)
                RETURNING owner, fingerprint, not_after, bytes),
            given AS (
                INSERT INTO key_package_given (owner, fingerprint, not_after)
                SELECT owner, fingerprint, not_after FROM taken ON CONFLICT DO NOTHING)
            SELECT bytes FROM taken"
        )
    };
}

/// Returns a last-resort package, and records it as given: once a newer one has replaced it, it may
/// not be uploaded again. The lock prevents a replacement and a new upload before that is recorded.
/// During a replacement this waits, and returns the newer one.
macro_rules! take_last_resort {
    ($of:literal) => {
        concat!(
            "WITH shown AS (
                SELECT k.owner, k.fingerprint, k.not_after, k.bytes
                  FROM account a JOIN key_package k ON k.owner = a.id
                 WHERE a.identity = $1 AND k.last_resort AND ",
            alive!(),
            $of,
            "    ORDER BY k.id LIMIT 1 FOR KEY SHARE OF k),
            given AS (
                INSERT INTO key_package_given (owner, fingerprint, not_after)
                SELECT owner, fingerprint, not_after FROM shown ON CONFLICT DO NOTHING)
            SELECT bytes FROM shown"
        )
    };
}

const TAKE: &str = take!("");
const TAKE_LAST_RESORT: &str = take_last_resort!("");
/// $3 the device, $4 whether it has those of the account in addition.
const TAKE_OF_DEVICE: &str = take!(" AND (k.device = $3 OR $4 AND k.device IS NULL) ");
const TAKE_LAST_RESORT_OF_DEVICE: &str =
    take_last_resort!(" AND (k.device = $3 OR $4 AND k.device IS NULL) ");

const DEVICES: &str = "
    SELECT d.device, d.key IS NULL AS keyless
      FROM account a JOIN device d ON d.account = a.id WHERE a.identity = $1 ORDER BY d.id";

/// Waits for an upload of $1 that is not committed yet.
const AFTER_UPLOAD: &str = "SELECT FROM account WHERE identity = $1 FOR SHARE";

/// Compatible with the lock on the owner's key that the insertion of a package takes.
const LOCK: &str = "SELECT store_now() AS postgres FROM account WHERE id = $1 FOR NO KEY UPDATE";

const EXPIRE: &str = "
    WITH packages AS (DELETE FROM key_package WHERE owner = $1 AND not_after < $2)
    DELETE FROM key_package_given WHERE owner = $1 AND not_after < $2";

/// One snapshot, in which a package is in one of the two tables or in neither.
const KNOWN: &str = "
    SELECT fingerprint, last_resort, device, false AS given FROM key_package
     WHERE owner = $1 AND fingerprint = ANY ($2)
    UNION ALL
    SELECT fingerprint, false, NULL, true FROM key_package_given
     WHERE owner = $1 AND fingerprint = ANY ($2)";

const STOCK: &str = concat!(
    "SELECT count(*) FILTER (WHERE NOT last_resort) AS available,
            coalesce(bool_or(last_resort), false) AS last_resort
       FROM key_package WHERE owner = $1 AND device IS NOT DISTINCT FROM $3 AND ",
    alive!()
);

/// $2: the device, $3: whether the last-resort package is removed, too.
const REMOVE: &str = "
    DELETE FROM key_package
     WHERE owner = $1 AND device IS NOT DISTINCT FROM $2 AND ($3 OR NOT last_resort)";

/// $3: whether the device had no key of its own. Without another such device, the packages that the
/// identity key signs have no device any more.
const REMOVE_OF_DEVICE: &str = "
    DELETE FROM key_package
     WHERE owner = $1 AND (device = $2 OR $3 AND device IS NULL AND NOT EXISTS (
        SELECT 1 FROM device WHERE account = $1 AND key IS NULL))";

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

const PUT_HYBRID: &str = "
    INSERT INTO hybrid_key (owner, key, signature) VALUES ($1, $2, $3)
    ON CONFLICT (owner) DO UPDATE SET key = excluded.key, signature = excluded.signature";

const GET_HYBRID: &str = "
    SELECT h.key, h.signature FROM unnest($1::bytea[]) WITH ORDINALITY AS t (identity, place)
      LEFT JOIN account a ON a.identity = t.identity LEFT JOIN hybrid_key h ON h.owner = a.id ORDER BY t.place";

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
        Ok(self.inner.database.run(&TakePackage { target, now }).await?)
    }

    async fn take_of_devices(
        &self,
        target: &IdentityKey,
        now: UnixMillis,
    ) -> StoreResult<Vec<DevicePackage>> {
        Ok(self.inner.database.run(&TakePackages { target, now }).await?)
    }

    async fn known(&self, account: AccountId) -> StoreResult<HashSet<[u8; 32]>> {
        Ok(self.inner.database.run(&ListPackages(account)).await?)
    }

    async fn stock(&self, owner: PackageOwner, now: UnixMillis) -> StoreResult<Stock> {
        Ok(self.inner.database.run(&CountPackages { owner, now }).await?)
    }
}

#[async_trait]
impl HybridKeys for ClusterStore {
    async fn put(&self, owner: AccountId, key: HybridKey) -> StoreResult<()> {
        Ok(self.inner.database.run(&PutHybridKey { owner, key: &key }).await?)
    }

    async fn get(&self, targets: &[IdentityKey]) -> StoreResult<Vec<Option<HybridKey>>> {
        Ok(self.inner.database.run(&GetHybridKeys(targets)).await?)
    }
}

struct UploadPackages<'a> {
    owner: PackageOwner,
    packages: &'a [NewKeyPackage],
    mode: UploadMode,
    now: UnixMillis,
    max_count: u32,
    time: &'a Time,
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

struct TakePackage<'a> {
    target: &'a IdentityKey,
    now: UnixMillis,
}

impl Statement for TakePackage<'_> {
    type Output = Option<TakenKeyPackage>;

    const REPEAT: Repeat = Repeat::Never;
    /// So that a dead connection is detected before a package can have been taken.
    const SCOPE: Scope = Scope::Transaction;

    fn name(&self) -> &'static str {
        "take_key_package"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Option<TakenKeyPackage>> {
        if let Some(taken) = take(connection, self.target, None, self.now).await? {
            return Ok(Some(taken));
        }
        after_upload(connection, self.target).await?;
        take(connection, self.target, None, self.now).await
    }
}

/// Takes a package of each device.
struct TakePackages<'a> {
    target: &'a IdentityKey,
    now: UnixMillis,
}

impl Statement for TakePackages<'_> {
    type Output = Vec<DevicePackage>;

    const REPEAT: Repeat = Repeat::Never;
    const SCOPE: Scope = Scope::Transaction;

    fn name(&self) -> &'static str {
        "take_key_packages"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Vec<DevicePackage>> {
        let &Self { target, now } = self;
        let query = sqlx::query(DEVICES).bind(&target.as_bytes()[..]);
        let devices = query.fetch_all(&mut *connection).await?;
        let devices: Vec<_> = devices.iter().map(signer).collect::<sqlx::Result<_>>()?;
        let mut packages = Vec::with_capacity(devices.len());
        for signer in &devices {
            let package = take(connection, target, Some(signer), now).await?;
            packages.push(DevicePackage { device: signer.device, package });
        }
        if packages.iter().any(|of_device| of_device.package.is_none()) {
            after_upload(connection, target).await?;
        }
        for (of_device, signer) in packages.iter_mut().zip(&devices) {
            if of_device.package.is_none() {
                of_device.package = take(connection, target, Some(signer), now).await?;
            }
        }
        Ok(packages)
    }
}

/// A device, and whether the identity key signs its packages.
struct Signer {
    device: DeviceId,
    is_keyless: bool,
}

fn signer(row: &PgRow) -> sqlx::Result<Signer> {
    let device = row.device("device")?.ok_or(NeverWritten("device"))?;
    Ok(Signer { device, is_keyless: row.try_get("keyless")? })
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

struct PutHybridKey<'a> {
    owner: AccountId,
    key: &'a HybridKey,
}

impl Statement for PutHybridKey<'_> {
    type Output = ();

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "put_hybrid_key"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<()> {
        let HybridKey { key, signature } = self.key;
        sqlx::query(PUT_HYBRID)
            .bind(self.owner.0)
            .bind(key)
            .bind(signature.as_ref().map(|signature| &signature[..]))
            .execute(connection)
            .await
            .map(drop)
    }
}

struct GetHybridKeys<'a>(&'a [IdentityKey]);

impl Statement for GetHybridKeys<'_> {
    type Output = Vec<Option<HybridKey>>;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "get_hybrid_keys"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Self::Output> {
        let targets: Vec<&[u8]> = self.0.iter().map(|target| &target.as_bytes()[..]).collect();
        let rows = sqlx::query(GET_HYBRID).bind(targets).fetch_all(connection).await?;
        rows.iter().map(hybrid_key).collect()
    }
}

fn hybrid_key(row: &PgRow) -> sqlx::Result<Option<HybridKey>> {
    let key: Option<Vec<u8>> = row.try_get("key")?;
    let signature = row.signature("signature")?;
    Ok(key.map(|key| HybridKey { key, signature }))
}

/// Completes when no upload of the account is going on. A concurrent upload may be replacing all
/// packages. The new ones are visible once it has committed.
async fn after_upload(connection: &mut PgConnection, target: &IdentityKey) -> sqlx::Result<()> {
    let query = sqlx::query(AFTER_UPLOAD).bind(&target.as_bytes()[..]);
    query.execute(connection).await.map(drop)
}

/// Takes a package of one device, or of any.
async fn take(
    connection: &mut PgConnection,
    target: &IdentityKey,
    of: Option<&Signer>,
    now: UnixMillis,
) -> sqlx::Result<Option<TakenKeyPackage>> {
    let [single, last] = match of {
        None => [TAKE, TAKE_LAST_RESORT],
        Some(_) => [TAKE_OF_DEVICE, TAKE_LAST_RESORT_OF_DEVICE],
    };
    for (sql, last_resort) in [(single, false), (last, true)] {
        let mut query = sqlx::query_scalar(sql).bind(&target.as_bytes()[..]).bind(millis(now));
        if let Some(Signer { device, is_keyless }) = of {
            query = query.bind(&device.as_bytes()[..]).bind(is_keyless);
        }
        let bytes: Option<Vec<u8>> = query.fetch_optional(&mut *connection).await?;
        if let Some(bytes) = bytes {
            return Ok(Some(TakenKeyPackage { bytes, last_resort }));
        }
    }
    Ok(None)
}

/// Removes the packages of a device that was removed. The head of the account's inbox is locked.
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

/// The device of an owner as a column.
fn device_of(owner: &PackageOwner) -> Option<&[u8]> {
    owner.device.as_ref().map(|device| &device.as_bytes()[..])
}

/// Locks the owner's account against other uploads, and removes what has expired.
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

/// Decides first, and then stores all packages or none. The lock keeps other uploads of the account
/// out. Concurrent takes only make room that was not needed; the result is as of before them.
async fn upload(
    connection: &mut PgConnection,
    &UploadPackages { owner, packages, mode, now, max_count, .. }: &UploadPackages<'_>,
) -> sqlx::Result<Upload> {
    let mut known = Known::of(connection, owner.account, packages).await?;
    if mode == UploadMode::Replace {
        known.there.retain(|_, there| there.device != owner.device);
    }
    let new = match known.choose(packages) {
        Ok(new) => new,
        Err(index) => return Ok(Upload::GivenOut(index)),
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
        // A last resort is replaced in its place, as below.
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

/// The packages of an upload that the store has.
struct Known {
    /// The stored packages.
    there: HashMap<[u8; 32], There>,
    given: HashSet<[u8; 32]>,
}

/// A package that is stored.
struct There {
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
        let mut known = Self { there: HashMap::new(), given: HashSet::new() };
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
            self.there.insert(fingerprint, There { device, last_resort });
        }
        Ok(())
    }

    /// Returns the packages to store, of each device at most one last resort, or the index of the
    /// first that was taken before.
    fn choose(mut self, packages: &[NewKeyPackage]) -> Result<Vec<&NewKeyPackage>, usize> {
        let mut new: Vec<&NewKeyPackage> = Vec::new();
        for (index, package) in packages.iter().enumerate() {
            if self.there.contains_key(&package.fingerprint) {
                continue;
            }
            if self.given.contains(&package.fingerprint) {
                return Err(index);
            }
            let NewKeyPackage { device, last_resort, .. } = *package;
            if last_resort {
                // It replaces any earlier one of the device, stored or of this upload.
                self.there.retain(|_, there| !(there.last_resort && there.device == device));
                new.retain(|other| !(other.last_resort && other.device == device));
            }
            self.there.insert(package.fingerprint, There { device, last_resort });
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
