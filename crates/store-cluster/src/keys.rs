//! KeyPackages and hybrid keys in Postgres.
//!
//! A KeyPackage leaves its table in the statement that gives it out, and its fingerprint goes into another, where it stays
//! until its lifetime ends: so it is given out once over all edges, and cannot come back. Whoever uploads holds the owner's
//! account row, so that two edges do not both find room for the last package.

use async_trait::async_trait;
use qpq_domain::{AccountId, IdentityKey, KeyPackageCaps, UnixMillis};
use qpq_ports::{HybridKeys, KeyPackages, NewKeyPackage, Stock, StoreResult, TakenKeyPackage, Upload};
use sqlx::{PgConnection, Row as _, postgres::PgRow};

use crate::postgres::{
    Database, Repeat,
    row::{Columns as _, millis},
};

/// The oldest package, which is deleted and noted as given out. A row that somebody else is taking is passed over: if all
/// that are left are being taken, none is left, and the last resort is in its place. `=` and not `IN`, whose subquery may be
/// run again for another row.
const TAKE: &str = "
    WITH taken AS (
        DELETE FROM key_package WHERE id = (
            SELECT k.id FROM account a JOIN key_package k ON k.owner = a.id
             WHERE a.identity = $1 AND NOT k.last_resort AND k.not_after >= $2
             ORDER BY k.id LIMIT 1 FOR UPDATE OF k SKIP LOCKED)
        RETURNING owner, fingerprint, not_after, bytes),
    given AS (
        INSERT INTO key_package_given (owner, fingerprint, not_after)
        SELECT owner, fingerprint, not_after FROM taken ON CONFLICT DO NOTHING)
    SELECT bytes FROM taken";

/// The last-resort package stays; but once a newer one has taken its place, it may not come back.
const LAST_RESORT: &str = "
    WITH shown AS (
        SELECT k.owner, k.fingerprint, k.not_after, k.bytes FROM account a JOIN key_package k ON k.owner = a.id
         WHERE a.identity = $1 AND k.last_resort AND k.not_after >= $2),
    given AS (
        INSERT INTO key_package_given (owner, fingerprint, not_after)
        SELECT owner, fingerprint, not_after FROM shown ON CONFLICT DO NOTHING)
    SELECT bytes FROM shown";

const STOCK: &str = "
    SELECT count(*) FILTER (WHERE NOT last_resort) AS available, coalesce(bool_or(last_resort), false) AS last_resort
      FROM key_package WHERE owner = $1 AND not_after >= $2";

const HYBRID: &str = "
    SELECT h.key FROM unnest($1::bytea[]) WITH ORDINALITY AS t (identity, n)
      LEFT JOIN account a ON a.identity = t.identity LEFT JOIN hybrid_key h ON h.owner = a.id ORDER BY t.n";

#[derive(Debug)]
pub(crate) struct ClusterKeys {
    database: Database,
    caps: KeyPackageCaps,
}

impl ClusterKeys {
    pub(crate) fn new(database: Database, caps: KeyPackageCaps) -> Self {
        Self { database, caps }
    }
}

#[async_trait]
impl KeyPackages for ClusterKeys {
    async fn upload(
        &self,
        owner: AccountId,
        packages: Vec<NewKeyPackage>,
        now: UnixMillis,
    ) -> StoreResult<Upload> {
        let most = self.caps.max_count;
        let outcome = self
            .database
            .run("upload", Repeat::Harmless, |connection| {
                let packages = packages.clone();
                Box::pin(async move { upload(connection, owner, packages, now, most).await })
            })
            .await?;
        Ok(outcome)
    }

    async fn take(&self, target: &IdentityKey, now: UnixMillis) -> StoreResult<Option<TakenKeyPackage>> {
        let target = *target;
        self.database
            .run("take", Repeat::Never, |connection| {
                Box::pin(async move { take(connection, &target, now).await })
            })
            .await
    }

    async fn stock(&self, owner: AccountId, now: UnixMillis) -> StoreResult<Stock> {
        self.database
            .once("stock", Repeat::Harmless, |connection| {
                Box::pin(async move { stock(connection, owner, now).await })
            })
            .await
    }
}

#[async_trait]
impl HybridKeys for ClusterKeys {
    async fn put(&self, owner: AccountId, key: Vec<u8>) -> StoreResult<()> {
        self.database
            .once("put_hybrid", Repeat::Harmless, |connection| {
                let key = key.clone();
                Box::pin(async move {
                    sqlx::query(
                        "INSERT INTO hybrid_key (owner, key) VALUES ($1, $2)
                         ON CONFLICT (owner) DO UPDATE SET key = excluded.key",
                    )
                    .bind(owner.0)
                    .bind(key)
                    .execute(connection)
                    .await
                    .map(drop)
                })
            })
            .await
    }

    async fn get(&self, targets: &[IdentityKey]) -> StoreResult<Vec<Option<Vec<u8>>>> {
        let targets: Vec<Vec<u8>> = targets.iter().map(|key| key.as_bytes().to_vec()).collect();
        self.database
            .once("get_hybrid", Repeat::Harmless, |connection| {
                let targets = targets.clone();
                Box::pin(async move { sqlx::query_scalar(HYBRID).bind(targets).fetch_all(connection).await })
            })
            .await
    }
}

/// Stores the packages, or finds out before anything is written why not.
async fn upload(
    connection: &mut PgConnection,
    owner: AccountId,
    packages: Vec<NewKeyPackage>,
    now: UnixMillis,
    most: u32,
) -> sqlx::Result<Upload> {
    sqlx::query("SELECT FROM account WHERE id = $1 FOR NO KEY UPDATE")
        .bind(owner.0)
        .execute(&mut *connection)
        .await?;
    for sql in [
        "DELETE FROM key_package WHERE owner = $1 AND not_after < $2",
        "DELETE FROM key_package_given WHERE owner = $1 AND not_after < $2",
    ] {
        sqlx::query(sql).bind(owner.0).bind(millis(now)).execute(&mut *connection).await?;
    }
    let fingerprints: Vec<&[u8]> = packages.iter().map(|package| &package.fingerprint[..]).collect();
    let given: Vec<Vec<u8>> = sqlx::query_scalar(
        "SELECT fingerprint FROM key_package_given g WHERE owner = $1 AND fingerprint = ANY ($2)
            AND NOT EXISTS (SELECT FROM key_package k WHERE k.owner = g.owner AND k.fingerprint = g.fingerprint)",
    )
    .bind(owner.0)
    .bind(&fingerprints)
    .fetch_all(&mut *connection)
    .await?;
    if let Some(index) = fingerprints.iter().position(|known| given.iter().any(|given| given == known)) {
        return Ok(Upload::GivenOut(index));
    }
    let there: Vec<Vec<u8>> =
        sqlx::query_scalar("SELECT fingerprint FROM key_package WHERE owner = $1 AND fingerprint = ANY ($2)")
            .bind(owner.0)
            .bind(&fingerprints)
            .fetch_all(&mut *connection)
            .await?;
    let mut new: Vec<NewKeyPackage> = Vec::with_capacity(packages.len());
    for package in packages {
        let known = there.iter().any(|there| there[..] == package.fingerprint)
            || new.iter().any(|new| new.fingerprint == package.fingerprint);
        if !known {
            if package.last_resort {
                // The newest one alone.
                new.retain(|new| !new.last_resort);
            }
            new.push(package);
        }
    }
    let before = stock(connection, owner, now).await?;
    let replaces = new.iter().any(|package| package.last_resort);
    let singles = new.iter().filter(|package| !package.last_resort).count();
    let available = before.available.saturating_add(u32::try_from(singles).unwrap_or(u32::MAX));
    let after = Stock { available, has_last_resort: before.has_last_resort || replaces };
    if available.saturating_add(after.has_last_resort.into()) > most {
        return Ok(Upload::Full);
    }
    if replaces {
        sqlx::query("DELETE FROM key_package WHERE owner = $1 AND last_resort")
            .bind(owner.0)
            .execute(&mut *connection)
            .await?;
    }
    if !new.is_empty() {
        insert(connection, owner, &new).await?;
    }
    Ok(Upload::Stored(after))
}

async fn insert(
    connection: &mut PgConnection,
    owner: AccountId,
    packages: &[NewKeyPackage],
) -> sqlx::Result<()> {
    sqlx::query(
        "INSERT INTO key_package (owner, fingerprint, last_resort, not_after, bytes)
         SELECT $1, p.* FROM ROWS FROM (unnest($2::bytea[]), unnest($3::bool[]), unnest($4::int8[]), unnest($5::bytea[]))
                               AS p (fingerprint, last_resort, not_after, bytes)",
    )
    .bind(owner.0)
    .bind(packages.iter().map(|package| &package.fingerprint[..]).collect::<Vec<_>>())
    .bind(packages.iter().map(|package| package.last_resort).collect::<Vec<_>>())
    .bind(packages.iter().map(|package| millis(package.not_after)).collect::<Vec<_>>())
    .bind(packages.iter().map(|package| &package.bytes[..]).collect::<Vec<_>>())
    .execute(connection)
    .await
    .map(drop)
}

async fn take(
    connection: &mut PgConnection,
    target: &IdentityKey,
    now: UnixMillis,
) -> sqlx::Result<Option<TakenKeyPackage>> {
    for (sql, last_resort) in [(TAKE, false), (LAST_RESORT, true)] {
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

async fn stock(connection: &mut PgConnection, owner: AccountId, now: UnixMillis) -> sqlx::Result<Stock> {
    let row: PgRow = sqlx::query(STOCK).bind(owner.0).bind(millis(now)).fetch_one(connection).await?;
    Ok(Stock {
        available: u32::try_from(row.unsigned("available")?).unwrap_or(u32::MAX),
        has_last_resort: row.try_get("last_resort")?,
    })
}
