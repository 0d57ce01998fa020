//! KeyPackages and hybrid keys in SQLite.
//!
//! A KeyPackage leaves its table in the transaction that gives it out, and its fingerprint goes
//! into another, where it stays until its lifetime ends: so it is given out once, and cannot come
//! back. Whether a package has expired is judged by the caller's instant in every statement, never
//! by whether a sweep has already come by.

use std::collections::HashSet;

use async_trait::async_trait;
use futures_util::FutureExt as _;
use qpq_domain::{AccountId, IdentityKey, KeyPackageCaps, UnixMillis};
use qpq_ports::{
    HybridKeys, KeyPackages, NewKeyPackage, Stock, StoreResult, TakenKeyPackage, Upload, UploadMode,
};
use sqlx::{Row as _, SqliteConnection, SqlitePool, sqlite::SqliteRow};

use crate::{
    clock::Guard,
    error::read_failed,
    row::{Columns as _, millis},
    writer::{Outcome, Scope, Writer},
};

/// What a job keeps in memory beside the keys themselves.
const JOB_BYTES: usize = 256;

#[derive(Debug)]
pub(crate) struct EmbeddedKeys {
    writer: Writer,
    readers: SqlitePool,
    clock: Guard,
    caps: KeyPackageCaps,
}

impl EmbeddedKeys {
    pub(crate) fn new(
        writer: Writer,
        readers: SqlitePool,
        clock: Guard,
        caps: KeyPackageCaps,
    ) -> Self {
        Self { writer, readers, clock, caps }
    }
}

#[async_trait]
impl KeyPackages for EmbeddedKeys {
    async fn upload(
        &self,
        owner: AccountId,
        packages: Vec<NewKeyPackage>,
        mode: UploadMode,
        now: UnixMillis,
    ) -> StoreResult<Upload> {
        let bytes = packages.iter().map(|package| package.bytes.len() + JOB_BYTES).sum();
        let (most, expired_by) = (self.caps.max_count, self.clock.bounds(now).earliest);
        self.writer
            .run(
                Scope::Job,
                bytes,
                move |connection| {
                    async move {
                        expire(connection, owner, expired_by).await?;
                        let upload = upload(connection, owner, packages, mode, now, most).await?;
                        Ok(match upload {
                            Upload::Stored(_) => Outcome::Keep(upload),
                            Upload::GivenOut(_) | Upload::Full => Outcome::Undo(upload),
                        })
                    }
                    .boxed()
                },
                |_| {},
            )
            .await
    }

    async fn take(
        &self,
        target: &IdentityKey,
        now: UnixMillis,
    ) -> StoreResult<Option<TakenKeyPackage>> {
        let target = *target;
        self.writer
            .run(
                Scope::Job,
                JOB_BYTES,
                move |connection| {
                    async move { take(connection, target, now).await.map(Outcome::Keep) }.boxed()
                },
                |_| {},
            )
            .await
    }

    async fn known(&self, owner: AccountId) -> StoreResult<HashSet<[u8; 32]>> {
        let rows = sqlx::query("SELECT fingerprint FROM key_package WHERE owner = ?1")
            .bind(owner.0)
            .fetch_all(&self.readers)
            .await
            .map_err(read_failed)?;
        rows.iter()
            .map(|row| row.hash("fingerprint"))
            .collect::<Result<_, _>>()
            .map_err(read_failed)
    }

    async fn stock(&self, owner: AccountId, now: UnixMillis) -> StoreResult<Stock> {
        sqlx::query(STOCK)
            .bind(owner.0)
            .bind(millis(now))
            .fetch_one(&self.readers)
            .await
            .and_then(|row| stock(&row))
            .map_err(read_failed)
    }
}

#[async_trait]
impl HybridKeys for EmbeddedKeys {
    async fn put(&self, owner: AccountId, key: Vec<u8>) -> StoreResult<()> {
        self.writer
            .run(
                Scope::Job,
                key.len() + JOB_BYTES,
                move |connection| {
                    async move {
                        sqlx::query(
                            "INSERT OR REPLACE INTO hybrid_key (owner, key) VALUES (?1, ?2)",
                        )
                        .bind(owner.0)
                        .bind(key)
                        .execute(connection)
                        .await?;
                        Ok(Outcome::Keep(()))
                    }
                    .boxed()
                },
                |()| {},
            )
            .await
    }

    async fn get(&self, targets: &[IdentityKey]) -> StoreResult<Vec<Option<Vec<u8>>>> {
        let mut reader = self.readers.acquire().await.map_err(read_failed)?;
        let mut keys = Vec::with_capacity(targets.len());
        for target in targets {
            let key = sqlx::query_scalar(
                "SELECT h.key FROM account a JOIN hybrid_key h ON h.owner = a.id WHERE a.identity = ?1",
            )
            .bind(&target.as_bytes()[..])
            .fetch_optional(&mut *reader)
            .await
            .map_err(read_failed)?;
            keys.push(key);
        }
        Ok(keys)
    }
}

/// The condition for a package whose lifetime contains ?2. Where the beginning is not known, the
/// package was stored by a release that did not keep it.
macro_rules! alive {
    () => {
        "not_after >= ?2 AND coalesce(not_before, 0) <= ?2"
    };
}

/// Counts what ?1 has at ?2: a walk over at most the cap of short index entries.
const STOCK: &str = concat!(
    "SELECT
        (SELECT count(*) FROM key_package WHERE owner = ?1 AND last_resort = 0 AND ",
    alive!(),
    ") AS available,
        EXISTS (SELECT 1 FROM key_package WHERE owner = ?1 AND last_resort = 1 AND ",
    alive!(),
    ") AS last_resort"
);

/// Removes the oldest package of ?1 that is alive at ?2.
const TAKE: &str = concat!(
    "DELETE FROM key_package WHERE id = (
        SELECT k.id FROM account a JOIN key_package k ON k.owner = a.id
         WHERE a.identity = ?1 AND k.last_resort = 0 AND ",
    alive!(),
    " ORDER BY k.id LIMIT 1)
     RETURNING owner, fingerprint, last_resort, not_after, bytes"
);

/// Shows the last-resort package of ?1, if it is alive at ?2.
const LAST_RESORT: &str = concat!(
    "SELECT k.owner, k.fingerprint, k.last_resort, k.not_after, k.bytes
       FROM account a JOIN key_package k ON k.owner = a.id
      WHERE a.identity = ?1 AND k.last_resort = 1 AND ",
    alive!()
);

fn stock(row: &SqliteRow) -> sqlx::Result<Stock> {
    let available = row.unsigned("available")?;
    Ok(Stock {
        available: u32::try_from(available).unwrap_or(u32::MAX),
        has_last_resort: row.try_get("last_resort")?,
    })
}

/// Removes what has expired.
async fn expire(
    connection: &mut SqliteConnection,
    owner: AccountId,
    now: UnixMillis,
) -> sqlx::Result<()> {
    for sql in [
        "DELETE FROM key_package WHERE owner = ?1 AND not_after < ?2",
        "DELETE FROM key_package_given WHERE owner = ?1 AND not_after < ?2",
    ] {
        sqlx::query(sql).bind(owner.0).bind(millis(now)).execute(&mut *connection).await?;
    }
    Ok(())
}

/// Stores the packages as far as nothing is against it; what is to be undone, the writer undoes.
async fn upload(
    connection: &mut SqliteConnection,
    owner: AccountId,
    packages: Vec<NewKeyPackage>,
    mode: UploadMode,
    now: UnixMillis,
    most: u32,
) -> sqlx::Result<Upload> {
    if mode == UploadMode::Replace {
        sqlx::query("DELETE FROM key_package WHERE owner = ?1")
            .bind(owner.0)
            .execute(&mut *connection)
            .await?;
    }
    for (index, package) in packages.into_iter().enumerate() {
        if !store(connection, owner, package).await? {
            return Ok(Upload::GivenOut(index));
        }
    }
    let row =
        sqlx::query(STOCK).bind(owner.0).bind(millis(now)).fetch_one(&mut *connection).await?;
    let stock = stock(&row)?;
    let count = stock.available.saturating_add(stock.has_last_resort.into());
    Ok(if count > most { Upload::Full } else { Upload::Stored(stock) })
}

/// Stores one package unless it is there already; false when it was given out before.
async fn store(
    connection: &mut SqliteConnection,
    owner: AccountId,
    package: NewKeyPackage,
) -> sqlx::Result<bool> {
    let known = sqlx::query(
        "SELECT EXISTS (SELECT 1 FROM key_package WHERE owner = ?1 AND fingerprint = ?2) AS there,
                EXISTS (SELECT 1 FROM key_package_given WHERE owner = ?1 AND fingerprint = ?2) AS given",
    )
    .bind(owner.0)
    .bind(&package.fingerprint[..])
    .fetch_one(&mut *connection)
    .await?;
    if known.try_get("there")? {
        return Ok(true);
    }
    if known.try_get("given")? {
        return Ok(false);
    }
    if package.last_resort {
        sqlx::query("DELETE FROM key_package WHERE owner = ?1 AND last_resort = 1")
            .bind(owner.0)
            .execute(&mut *connection)
            .await?;
    }
    sqlx::query(
        "INSERT INTO key_package (owner, fingerprint, last_resort, not_before, not_after, bytes)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
    )
    .bind(owner.0)
    .bind(&package.fingerprint[..])
    .bind(package.last_resort)
    .bind(millis(package.not_before))
    .bind(millis(package.not_after))
    .bind(package.bytes)
    .execute(connection)
    .await?;
    Ok(true)
}

async fn take(
    connection: &mut SqliteConnection,
    target: IdentityKey,
    now: UnixMillis,
) -> sqlx::Result<Option<TakenKeyPackage>> {
    let mut taken = None;
    for sql in [TAKE, LAST_RESORT] {
        taken = sqlx::query(sql)
            .bind(&target.as_bytes()[..])
            .bind(millis(now))
            .fetch_optional(&mut *connection)
            .await?;
        if taken.is_some() {
            break;
        }
    }
    let Some(row) = taken else { return Ok(None) };
    // The last-resort package too: once a newer one has taken its place, it may not come back.
    sqlx::query(
        "INSERT OR IGNORE INTO key_package_given (owner, fingerprint, not_after) VALUES (?1, ?2, ?3)",
    )
    .bind(row.account("owner")?.0)
    .bind(&row.hash("fingerprint")?[..])
    .bind(millis(row.at("not_after")?))
    .execute(connection)
    .await?;
    Ok(Some(TakenKeyPackage {
        bytes: row.bytes("bytes")?,
        last_resort: row.try_get("last_resort")?,
    }))
}
