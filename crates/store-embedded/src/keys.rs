//! KeyPackages and hybrid keys in SQLite.
//!
//! A KeyPackage is deleted in the transaction that gives it out, and its fingerprint is inserted
//! into another table until its lifetime ends. So each is given out once and cannot be uploaded
//! again. Every statement decides by the caller's instant whether a package has expired, never by
//! whether a sweep has removed it.

use std::collections::HashSet;

use async_trait::async_trait;
use qpq_domain::{AccountId, IdentityKey, UnixMillis};
use qpq_ports::{
    HybridKeys, KeyPackages, NewKeyPackage, Stock, StoreResult, TakenKeyPackage, Upload, UploadMode,
};
use sqlx::{Row as _, SqliteConnection, sqlite::SqliteRow};

use crate::{
    error::read_failed,
    messages::remove::SWEEP_ROWS,
    row::{Columns as _, millis},
    statement::{Done, SMALL, Statement},
    store::EmbeddedStore,
};

#[async_trait]
impl KeyPackages for EmbeddedStore {
    async fn upload(
        &self,
        owner: AccountId,
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
impl HybridKeys for EmbeddedStore {
    async fn put(&self, owner: AccountId, key: Vec<u8>) -> StoreResult<()> {
        self.writer.run(PutHybridKey { owner, key }).await
    }

    async fn get(&self, targets: &[IdentityKey]) -> StoreResult<Vec<Option<Vec<u8>>>> {
        let mut reader = self.readers.acquire().await.map_err(read_failed)?;
        let mut keys = Vec::with_capacity(targets.len());
        for target in targets {
            let key = sqlx::query_scalar(
                "SELECT h.key FROM account a JOIN hybrid_key h ON h.owner = a.id
                  WHERE a.identity = ?1",
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

/// The condition for a package whose lifetime contains ?2. A release without the column did not
/// store when the lifetime begins.
macro_rules! valid {
    () => {
        "not_after >= ?2 AND coalesce(not_before, 0) <= ?2"
    };
}

/// Counts the packages that ?1 has at ?2. Reads at most the cap of short index entries.
const STOCK: &str = concat!(
    "SELECT
        (SELECT count(*) FROM key_package WHERE owner = ?1 AND last_resort = 0 AND ",
    valid!(),
    ") AS available,
        EXISTS (SELECT 1 FROM key_package WHERE owner = ?1 AND last_resort = 1 AND ",
    valid!(),
    ") AS last_resort"
);

/// Removes the oldest package of ?1 that is valid at ?2.
const TAKE: &str = concat!(
    "DELETE FROM key_package WHERE id = (
        SELECT k.id FROM account a JOIN key_package k ON k.owner = a.id
         WHERE a.identity = ?1 AND k.last_resort = 0 AND ",
    valid!(),
    " ORDER BY k.id LIMIT 1)
     RETURNING owner, fingerprint, last_resort, not_after, bytes"
);

/// Returns the last-resort package of ?1, if it is valid at ?2.
const LAST_RESORT: &str = concat!(
    "SELECT k.owner, k.fingerprint, k.last_resort, k.not_after, k.bytes
       FROM account a JOIN key_package k ON k.owner = a.id
      WHERE a.identity = ?1 AND k.last_resort = 1 AND ",
    valid!()
);

fn stock(row: &SqliteRow) -> sqlx::Result<Stock> {
    let available = row.unsigned("available")?;
    Ok(Stock {
        available: u32::try_from(available).unwrap_or(u32::MAX),
        has_last_resort: row.try_get("last_resort")?,
    })
}

/// Stores packages of one owner, all or none.
struct UploadPackages {
    owner: AccountId,
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
            sqlx::query("DELETE FROM key_package WHERE owner = ?1")
                .bind(self.owner.0)
                .execute(&mut *tx)
                .await?;
        }
        for (index, package) in self.packages.iter().enumerate() {
            if self.store(tx, package).await? == Stored::GivenOut {
                return Ok(Done::undo(Upload::GivenOut(index)));
            }
        }
        let row = sqlx::query(STOCK)
            .bind(self.owner.0)
            .bind(millis(self.now))
            .fetch_one(&mut *tx)
            .await?;
        let stock = stock(&row)?;
        let count = stock.available.saturating_add(stock.has_last_resort.into());
        Ok(if count > self.max_count {
            Done::undo(Upload::Full)
        } else {
            Done::keep(Upload::Stored(stock))
        })
    }
}

/// The outcome of one package of an upload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stored {
    /// The package is stored, now or since an earlier upload.
    Yes,
    /// The package was given out before.
    GivenOut,
}

impl UploadPackages {
    async fn remove_expired(&self, tx: &mut SqliteConnection) -> sqlx::Result<()> {
        for sql in [
            "DELETE FROM key_package WHERE owner = ?1 AND not_after < ?2",
            "DELETE FROM key_package_given WHERE owner = ?1 AND not_after < ?2",
        ] {
            sqlx::query(sql)
                .bind(self.owner.0)
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
        let owner = self.owner.0;
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
            return Ok(Stored::GivenOut);
        }
        if package.last_resort {
            sqlx::query("DELETE FROM key_package WHERE owner = ?1 AND last_resort = 1")
                .bind(owner)
                .execute(&mut *tx)
                .await?;
        }
        sqlx::query(
            "INSERT INTO key_package (owner, fingerprint, last_resort, not_before, not_after, bytes)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        )
        .bind(owner)
        .bind(&package.fingerprint[..])
        .bind(package.last_resort)
        .bind(millis(package.not_before))
        .bind(millis(package.not_after))
        .bind(&package.bytes[..])
        .execute(tx)
        .await?;
        Ok(Stored::Yes)
    }
}

/// Removes the oldest package of an account and answers it, or the last-resort package.
struct TakePackage {
    target: IdentityKey,
    now: UnixMillis,
}

impl Statement for TakePackage {
    type Answer = Option<TakenKeyPackage>;
    const NAME: &'static str = "take key package";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<Option<TakenKeyPackage>>> {
        let mut taken = None;
        for sql in [TAKE, LAST_RESORT] {
            taken = sqlx::query(sql)
                .bind(&self.target.as_bytes()[..])
                .bind(millis(self.now))
                .fetch_optional(&mut *tx)
                .await?;
            if taken.is_some() {
                break;
            }
        }
        let Some(row) = taken else { return Ok(Done::keep(None)) };
        // The last-resort package too: after a newer one has replaced it, it may not come back.
        sqlx::query(
            "INSERT OR IGNORE INTO key_package_given (owner, fingerprint, not_after)
             VALUES (?1, ?2, ?3)",
        )
        .bind(row.account("owner")?.0)
        .bind(&row.hash("fingerprint")?[..])
        .bind(millis(row.at("not_after")?))
        .execute(tx)
        .await?;
        Ok(Done::keep(Some(TakenKeyPackage {
            bytes: row.bytes("bytes")?,
            last_resort: row.try_get("last_resort")?,
        })))
    }
}

struct PutHybridKey {
    owner: AccountId,
    key: Vec<u8>,
}

impl Statement for PutHybridKey {
    type Answer = ();
    const NAME: &'static str = "put hybrid key";

    fn bytes(&self) -> usize {
        SMALL + self.key.len()
    }

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<()>> {
        sqlx::query("INSERT OR REPLACE INTO hybrid_key (owner, key) VALUES (?1, ?2)")
            .bind(self.owner.0)
            .bind(&self.key[..])
            .execute(tx)
            .await?;
        Ok(Done::keep(()))
    }
}

/// Removes up to [`SWEEP_ROWS`] expired packages, and as many fingerprints. Answers how many.
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
                 SELECT id FROM key_package WHERE not_after < ?1 ORDER BY not_after LIMIT ?2)",
            "DELETE FROM key_package_given WHERE (owner, fingerprint) IN (
                 SELECT owner, fingerprint FROM key_package_given
                  WHERE not_after < ?1 ORDER BY not_after LIMIT ?2)",
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
