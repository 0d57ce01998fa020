//! Damage to the database file: looked for at the start after an unclean end, and noticed while the
//! store is in use.
//!
//! Only an end in good order says so in the database. So after a crash, and where files were copied
//! from under a running server, which damages them, the next start looks at every page.

use std::{
    path::Path,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use futures_util::FutureExt as _;
use qpq_ports::{StoreError, StoreResult};
use sqlx::SqliteConnection;

use crate::{
    open::{self, OpenError},
    writer::{Outcome, Scope, Writer},
};

/// Up to this size the start compares indexes with their tables too: seconds on any disk.
const COMPARED: i64 = 256 << 20;
/// Up to this size the start looks at the structure of every page. A larger database would keep the
/// server away for too long.
const CHECKED: i64 = 2 << 30;

/// How often any store of this process has met damage. Which one it was is found by looking.
static MET: AtomicU64 = AtomicU64::new(0);

/// Notes that a statement failed because a page is damaged.
pub(crate) fn met() {
    MET.fetch_add(1, Ordering::Relaxed);
}

/// Whether one store is damaged.
#[derive(Debug)]
pub(crate) struct Damage {
    /// What [`MET`] was at the last look.
    looked_at: AtomicU64,
    found: OnceLock<String>,
}

/// The error of a store that is damaged.
#[derive(Clone, Debug, thiserror::Error)]
#[error(
    "the database is damaged ({0}): stop the server, keep a copy of the data directory, and restore the latest backup \
     with `qpq-admin restore`"
)]
struct Damaged(String);

impl Damage {
    /// Of a store that was just opened.
    pub(crate) fn new() -> Self {
        Self { looked_at: AtomicU64::new(MET.load(Ordering::Relaxed)), found: OnceLock::new() }
    }

    /// Fails once damage was found, until the store is opened again. Looks for it after a statement
    /// has met any.
    pub(crate) async fn check(&self, writer: &Writer) -> StoreResult<()> {
        let met = MET.load(Ordering::Relaxed);
        if self.found.get().is_none() && self.looked_at.swap(met, Ordering::Relaxed) != met {
            let looked = writer
                .run(
                    Scope::SingleEdge,
                    0,
                    |connection| {
                        async move { structure(connection).await.map(Outcome::Undo) }.boxed()
                    },
                    |_| {},
                )
                .await;
            let found = match looked {
                Ok(found) => found,
                Err(StoreError::Corrupt(error)) => Some(error.to_string()),
                Err(other) => return Err(other),
            };
            if let Some(cause) = found {
                tracing::error!(%cause, "the database is damaged");
                // Another check may have found it too.
                let _ = self.found.set(cause);
            }
        }
        match self.found.get() {
            Some(cause) => Err(StoreError::corrupt(Damaged(cause.clone()))),
            None => Ok(()),
        }
    }
}

/// Looks for damage unless the last end was in good order, and notes that this one is not, yet.
pub(crate) async fn look_at_start(
    connection: &mut SqliteConnection,
    path: &Path,
) -> Result<(), OpenError> {
    let failed = |error: sqlx::Error| open::failed(path, &error);
    let is_clean: bool = sqlx::query_scalar("SELECT clean FROM heartbeat")
        .fetch_one(&mut *connection)
        .await
        .map_err(failed)?;
    if !is_clean {
        let found = look(connection).await.map_err(failed)?;
        if let Some(cause) = found {
            return Err(OpenError::Corrupt { path: path.to_owned(), cause });
        }
    }
    sqlx::query("UPDATE heartbeat SET clean = 0")
        .execute(&mut *connection)
        .await
        .map_err(failed)?;
    // Into the database file itself, before anything else: also a copy of that file alone says so.
    sqlx::query("PRAGMA wal_checkpoint(TRUNCATE)")
        .fetch_all(&mut *connection)
        .await
        .map(drop)
        .map_err(failed)
}

/// Notes that the store ended in good order.
pub(crate) async fn note_clean_end(connection: &mut SqliteConnection) -> sqlx::Result<()> {
    if MET.load(Ordering::Relaxed) > 0 {
        return Ok(());
    }
    sqlx::query("UPDATE heartbeat SET clean = 1").execute(connection).await.map(drop)
}

async fn look(connection: &mut SqliteConnection) -> sqlx::Result<Option<String>> {
    let pages: i64 = sqlx::query_scalar("PRAGMA page_count").fetch_one(&mut *connection).await?;
    let page: i64 = sqlx::query_scalar("PRAGMA page_size").fetch_one(&mut *connection).await?;
    let bytes = pages.saturating_mul(page);
    match bytes {
        bytes if bytes <= COMPARED => first_line(connection, "PRAGMA integrity_check(1)").await,
        bytes if bytes <= CHECKED => structure(connection).await,
        _ => {
            tracing::warn!(
                bytes,
                "the last end was not in good order, and the database is too large to be checked at the start: take a \
                 backup and verify it"
            );
            Ok(None)
        }
    }
}

/// What is wrong with the structure of the pages.
async fn structure(connection: &mut SqliteConnection) -> sqlx::Result<Option<String>> {
    first_line(connection, "PRAGMA quick_check(1)").await
}

async fn first_line(
    connection: &mut SqliteConnection,
    check: &'static str,
) -> sqlx::Result<Option<String>> {
    let line: String = sqlx::query_scalar(check).fetch_one(connection).await?;
    Ok((line != "ok").then(|| line.lines().collect::<Vec<_>>().join(" ")))
}
