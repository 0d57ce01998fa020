//! Damage to the database file: searched for at the start after an unclean end, and noticed while
//! the store is used.
//!
//! The database contains a mark that only an end in good order sets. The mark is absent after a
//! crash, and in files that were copied while a server wrote them and may be damaged by that.
//! Without the mark, the next start checks every page.

use std::{
    path::Path,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use qpq_ports::{StoreError, StoreResult};
use sqlx::SqliteConnection;

use crate::{
    error::corrupt_pages_met,
    open_error::{OpenError, failed},
    statement::{Done, Scope, Statement},
};

/// Maximum size of a database whose indexes the start also compares with their tables. The
/// comparison takes seconds on any disk.
const MAX_BYTES_COMPARED: i64 = 256 << 20;

/// Maximum size of a database whose pages the start checks for their structure. A larger one would
/// delay the server for too long.
const MAX_BYTES_CHECKED: i64 = 2 << 30;

/// The known damage of a store, and the need for another check.
#[derive(Debug)]
pub(crate) struct Damage {
    /// [`corrupt_pages_met`] at the last check.
    checked_at: AtomicU64,
    found: OnceLock<String>,
}

/// The error of a damaged store.
#[derive(Clone, Debug, thiserror::Error)]
#[error(
    "the database is damaged ({0}): stop the server, keep a copy of the data directory, and \
     restore the latest backup with `qpq-admin restore`"
)]
struct Damaged(String);

impl Damage {
    /// Returns the state of a store that was just opened.
    pub(crate) fn none() -> Self {
        Self { checked_at: AtomicU64::new(corrupt_pages_met()), found: OnceLock::new() }
    }

    /// Returns whether [`CheckStructure`] should run: a statement has met a damaged page since the
    /// last check. The page can be one of another store of this process.
    pub(crate) fn is_suspected(&self) -> bool {
        let met = corrupt_pages_met();
        self.found.get().is_none() && self.checked_at.swap(met, Ordering::Relaxed) != met
    }

    /// Records the result of [`CheckStructure`].
    pub(crate) fn record(&self, checked: StoreResult<Option<String>>) -> StoreResult<()> {
        let found = match checked {
            Ok(found) => found,
            Err(StoreError::Corrupt(error)) => Some(error.to_string()),
            Err(other) => return Err(other),
        };
        if let Some(cause) = found {
            tracing::error!(%cause, "database is damaged");
            // A concurrent check may have found damage too.
            let _ = self.found.set(cause);
        }
        Ok(())
    }

    /// Fails once damage was found, until the store is opened again.
    pub(crate) fn result(&self) -> StoreResult<()> {
        match self.found.get() {
            Some(cause) => Err(StoreError::corrupt(Damaged(cause.clone()))),
            None => Ok(()),
        }
    }
}

/// Checks the structure of every page. Returns the damage.
pub(crate) struct CheckStructure;

impl Statement for CheckStructure {
    type Answer = Option<String>;
    const NAME: &'static str = "check structure";
    const SCOPE: Scope = Scope::Alone;

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<Option<String>>> {
        check_structure(tx).await.map(Done::keep)
    }
}

/// Searches for damage unless the last end was in good order, and marks the database as in use.
pub(crate) async fn check_at_start(
    connection: &mut SqliteConnection,
    path: &Path,
) -> Result<(), OpenError> {
    let failed = |error: sqlx::Error| failed(path, &error);
    let is_clean: bool = sqlx::query_scalar("SELECT clean FROM heartbeat")
        .fetch_one(&mut *connection)
        .await
        .map_err(failed)?;
    if !is_clean && let Some(cause) = check(connection).await.map_err(failed)? {
        return Err(OpenError::Corrupt { path: path.to_owned(), cause });
    }
    sqlx::query("UPDATE heartbeat SET clean = 0")
        .execute(&mut *connection)
        .await
        .map_err(failed)?;
    // Writes the mark into the database file before anything else, so that a copy of that file
    // without its log has it too.
    sqlx::query("PRAGMA wal_checkpoint(TRUNCATE)")
        .fetch_all(&mut *connection)
        .await
        .map(drop)
        .map_err(failed)
}

/// Marks the database as closed in good order, unless a damaged page was met.
pub(crate) async fn mark_clean_end(connection: &mut SqliteConnection) -> sqlx::Result<()> {
    if corrupt_pages_met() > 0 {
        return Ok(());
    }
    sqlx::query("UPDATE heartbeat SET clean = 1").execute(connection).await.map(drop)
}

/// Checks as much as the size of the database permits. Returns the damage.
async fn check(connection: &mut SqliteConnection) -> sqlx::Result<Option<String>> {
    let pages: i64 = sqlx::query_scalar("PRAGMA page_count").fetch_one(&mut *connection).await?;
    let page: i64 = sqlx::query_scalar("PRAGMA page_size").fetch_one(&mut *connection).await?;
    let bytes = pages.saturating_mul(page);
    if bytes <= MAX_BYTES_COMPARED {
        return first_damage(connection, "PRAGMA integrity_check(1)").await;
    }
    if bytes <= MAX_BYTES_CHECKED {
        return check_structure(connection).await;
    }
    tracing::warn!(
        bytes,
        "last end was not in good order, and the database is too large for a check at the start: \
         take a backup and verify it"
    );
    Ok(None)
}

async fn check_structure(connection: &mut SqliteConnection) -> sqlx::Result<Option<String>> {
    first_damage(connection, "PRAGMA quick_check(1)").await
}

async fn first_damage(
    connection: &mut SqliteConnection,
    check: &'static str,
) -> sqlx::Result<Option<String>> {
    let line: String = sqlx::query_scalar(check).fetch_one(connection).await?;
    Ok((line != "ok").then(|| line.lines().collect::<Vec<_>>().join(" ")))
}
