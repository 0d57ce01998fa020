//! KeyPackages and hybrid keys in Postgres.
//!
//! A KeyPackage leaves its table in the statement that takes it, and its fingerprint goes into
//! another table, where it stays until the package's lifetime ends. So a package is taken once, by
//! whichever edge, and cannot be uploaded again. Whether a package has expired is decided by the
//! caller's instant in every statement, not by whether a sweep has removed it. Expired packages are
//! deleted only if the clocks of Postgres and of the edge agree that they have expired.
//!
//! Uploads of one owner are serialized by a lock on the account. Takes do not wait for a lock.

use std::collections::{HashMap, HashSet};

use async_trait::async_trait;
use qpq_domain::{AccountId, IdentityKey, UnixMillis};
use qpq_ports::{
    HybridKeys, KeyPackages, NewKeyPackage, Stock, StoreResult, TakenKeyPackage, Upload, UploadMode,
};
use sqlx::{PgConnection, Row as _, postgres::PgRow};

use crate::{
    ClusterStore,
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
const TAKE: &str = concat!(
    "WITH taken AS (
        DELETE FROM key_package WHERE id = (
            SELECT k.id FROM account a JOIN key_package k ON k.owner = a.id
             WHERE a.identity = $1 AND NOT k.last_resort AND ",
    alive!(),
    "        ORDER BY k.id LIMIT 1 FOR UPDATE OF k SKIP LOCKED)
        RETURNING owner, fingerprint, not_after, bytes),
    given AS (
        INSERT INTO key_package_given (owner, fingerprint, not_after)
        SELECT owner, fingerprint, not_after FROM taken ON CONFLICT DO NOTHING)
    SELECT bytes FROM taken"
);

/// Returns the last-resort package, and records it as given: once a newer one has replaced it, it
/// may not be uploaded again. The lock prevents a replacement and a new upload before that is
/// recorded. During a replacement this waits, and returns the newer one.
const TAKE_LAST_RESORT: &str = concat!(
    "WITH shown AS (
        SELECT k.owner, k.fingerprint, k.not_after, k.bytes
          FROM account a JOIN key_package k ON k.owner = a.id
         WHERE a.identity = $1 AND k.last_resort AND ",
    alive!(),
    "    FOR KEY SHARE OF k),
    given AS (
        INSERT INTO key_package_given (owner, fingerprint, not_after)
        SELECT owner, fingerprint, not_after FROM shown ON CONFLICT DO NOTHING)
    SELECT bytes FROM shown"
);

/// Waits for an upload of $1 that is not committed yet.
const AFTER_UPLOAD: &str = "SELECT FROM account WHERE identity = $1 FOR SHARE";

/// Compatible with the lock on the owner's key that the insertion of a package takes.
const LOCK: &str = "SELECT store_now() AS postgres FROM account WHERE id = $1 FOR NO KEY UPDATE";

const EXPIRE: &str = "
    WITH packages AS (DELETE FROM key_package WHERE owner = $1 AND not_after < $2)
    DELETE FROM key_package_given WHERE owner = $1 AND not_after < $2";

/// One snapshot, in which a package is in one of the two tables or in neither.
const KNOWN: &str = "
    SELECT fingerprint, last_resort, false AS given FROM key_package
     WHERE owner = $1 AND fingerprint = ANY ($2)
    UNION ALL
    SELECT fingerprint, false, true FROM key_package_given
     WHERE owner = $1 AND fingerprint = ANY ($2)";

const STOCK: &str = concat!(
    "SELECT count(*) FILTER (WHERE NOT last_resort) AS available,
            coalesce(bool_or(last_resort), false) AS last_resort
       FROM key_package WHERE owner = $1 AND ",
    alive!()
);

/// $2: whether the last-resort package is removed, too.
const REMOVE: &str = "DELETE FROM key_package WHERE owner = $1 AND ($2 OR NOT last_resort)";

/// Keeps the row, so that a take that waits for the old package finds the new one.
const REPLACE_LAST_RESORT: &str = "
    UPDATE key_package SET fingerprint = $2, not_after = $3, bytes = $4, not_before = $5
     WHERE owner = $1 AND last_resort";

const STORE: &str = "
    INSERT INTO key_package (owner, fingerprint, last_resort, not_after, bytes, not_before)
    SELECT $1, n.fingerprint, n.last_resort, n.not_after, n.bytes, n.not_before
      FROM unnest($2::bytea[], $3::bool[], $4::int8[], $5::bytea[], $6::int8[])
      WITH ORDINALITY AS n (fingerprint, last_resort, not_after, bytes, not_before, place) ORDER BY n.place";

const PUT_HYBRID: &str = "
    INSERT INTO hybrid_key (owner, key) VALUES ($1, $2) ON CONFLICT (owner) DO UPDATE SET key = excluded.key";

const GET_HYBRID: &str = "
    SELECT h.key FROM unnest($1::bytea[]) WITH ORDINALITY AS t (identity, place)
      LEFT JOIN account a ON a.identity = t.identity LEFT JOIN hybrid_key h ON h.owner = a.id ORDER BY t.place";

#[async_trait]
impl KeyPackages for ClusterStore {
    async fn upload(
        &self,
        owner: AccountId,
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

    async fn known(&self, owner: AccountId) -> StoreResult<HashSet<[u8; 32]>> {
        Ok(self.inner.database.run(&ListPackages(owner)).await?)
    }

    async fn stock(&self, owner: AccountId, now: UnixMillis) -> StoreResult<Stock> {
        Ok(self.inner.database.run(&CountPackages { owner, now }).await?)
    }
}

#[async_trait]
impl HybridKeys for ClusterStore {
    async fn put(&self, owner: AccountId, key: Vec<u8>) -> StoreResult<()> {
        Ok(self.inner.database.run(&PutHybridKey { owner, key: &key }).await?)
    }

    async fn get(&self, targets: &[IdentityKey]) -> StoreResult<Vec<Option<Vec<u8>>>> {
        Ok(self.inner.database.run(&GetHybridKeys(targets)).await?)
    }
}

struct UploadPackages<'a> {
    owner: AccountId,
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
        expire(connection, self.owner, self.now, self.time).await?;
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
        if let Some(taken) = take(connection, self.target, self.now).await? {
            return Ok(Some(taken));
        }
        // A concurrent upload may be replacing all packages. The new ones are visible once it has
        // committed.
        sqlx::query(AFTER_UPLOAD)
            .bind(&self.target.as_bytes()[..])
            .execute(&mut *connection)
            .await?;
        take(connection, self.target, self.now).await
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
    owner: AccountId,
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
    key: &'a [u8],
}

impl Statement for PutHybridKey<'_> {
    type Output = ();

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "put_hybrid_key"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<()> {
        let query = sqlx::query(PUT_HYBRID).bind(self.owner.0).bind(self.key);
        query.execute(connection).await.map(drop)
    }
}

struct GetHybridKeys<'a>(&'a [IdentityKey]);

impl Statement for GetHybridKeys<'_> {
    type Output = Vec<Option<Vec<u8>>>;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "get_hybrid_keys"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Self::Output> {
        let targets: Vec<&[u8]> = self.0.iter().map(|target| &target.as_bytes()[..]).collect();
        sqlx::query_scalar(GET_HYBRID).bind(targets).fetch_all(connection).await
    }
}

async fn take(
    connection: &mut PgConnection,
    target: &IdentityKey,
    now: UnixMillis,
) -> sqlx::Result<Option<TakenKeyPackage>> {
    for (sql, last_resort) in [(TAKE, false), (TAKE_LAST_RESORT, true)] {
        let bytes: Option<Vec<u8>> = sqlx::query_scalar(sql)
            .bind(&target.as_bytes()[..])
            .bind(millis(now))
            .fetch_optional(&mut *connection)
            .await?;
        if let Some(bytes) = bytes {
            return Ok(Some(TakenKeyPackage { bytes, last_resort }));
        }
    }
    Ok(None)
}

async fn stock(
    connection: &mut PgConnection,
    owner: AccountId,
    now: UnixMillis,
) -> sqlx::Result<Stock> {
    let row = sqlx::query(STOCK).bind(owner.0).bind(millis(now)).fetch_one(connection).await?;
    let available = row.unsigned("available")?;
    Ok(Stock {
        available: u32::try_from(available).unwrap_or(u32::MAX),
        has_last_resort: row.try_get("last_resort")?,
    })
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

/// Decides first, and then stores all packages or none. The lock keeps other uploads of the owner
/// out. Concurrent takes only make room that was not needed; the result is as of before them.
async fn upload(
    connection: &mut PgConnection,
    &UploadPackages { owner, packages, mode, now, max_count, .. }: &UploadPackages<'_>,
) -> sqlx::Result<Upload> {
    let mut known = Known::of(connection, owner, packages).await?;
    if mode == UploadMode::Replace {
        known.there.clear();
    }
    let new = match known.choose(packages) {
        Ok(new) => new,
        Err(index) => return Ok(Upload::GivenOut(index)),
    };
    let mut stock = match mode {
        UploadMode::Add => stock(connection, owner, now).await?,
        UploadMode::Replace => Stock::default(),
    };
    let is_alive = |package: &NewKeyPackage| package.not_before <= now && now <= package.not_after;
    let singles = new.iter().filter(|package| !package.last_resort && is_alive(package)).count();
    stock.available = stock.available.saturating_add(u32::try_from(singles).unwrap_or(u32::MAX));
    let last_resort = new.iter().rfind(|package| package.last_resort);
    if let Some(package) = last_resort {
        stock.has_last_resort = is_alive(package);
    }
    if stock.available.saturating_add(stock.has_last_resort.into()) > max_count {
        return Ok(Upload::Full);
    }
    if mode == UploadMode::Replace {
        // A last resort is replaced in its place, as below.
        sqlx::query(REMOVE)
            .bind(owner.0)
            .bind(last_resort.is_none())
            .execute(&mut *connection)
            .await?;
    }
    let replaced = match last_resort {
        Some(package) => replace_last_resort(connection, owner, package).await?,
        None => false,
    };
    store(connection, owner, new.iter().filter(|package| !(replaced && package.last_resort)))
        .await?;
    Ok(Upload::Stored(stock))
}

/// The packages of an upload that the store has.
struct Known {
    /// The stored packages, and whether each is the last resort.
    there: HashMap<[u8; 32], bool>,
    given: HashSet<[u8; 32]>,
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
            self.there.insert(fingerprint, row.try_get("last_resort")?);
        }
        Ok(())
    }

    /// Returns the packages to store, at most one of them a last resort, or the index of the first
    /// that was taken before.
    fn choose(mut self, packages: &[NewKeyPackage]) -> Result<Vec<&NewKeyPackage>, usize> {
        let mut new: Vec<&NewKeyPackage> = Vec::new();
        for (index, package) in packages.iter().enumerate() {
            if self.there.contains_key(&package.fingerprint) {
                continue;
            }
            if self.given.contains(&package.fingerprint) {
                return Err(index);
            }
            if package.last_resort {
                // It replaces any earlier one, stored or of this upload.
                self.there.retain(|_, last_resort| !*last_resort);
                new.retain(|package| !package.last_resort);
            }
            self.there.insert(package.fingerprint, package.last_resort);
            new.push(package);
        }
        Ok(new)
    }
}

/// Replaces the last-resort package; returns whether there was one.
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
        .execute(connection)
        .await?;
    Ok(done.rows_affected() > 0)
}

async fn store<'a>(
    connection: &mut PgConnection,
    owner: AccountId,
    packages: impl Iterator<Item = &'a &'a NewKeyPackage>,
) -> sqlx::Result<()> {
    let packages: Vec<_> = packages.collect();
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
        .execute(connection)
        .await
        .map(drop)
}
