//! The history that the store's seqs belong to: one id, in the database and in memory.
//!
//! The directory is locked, so nobody else changes the id while this process has the store open.

use std::sync::Arc;

use futures_util::FutureExt as _;
use parking_lot::Mutex;
use qpq_domain::StoreId;
use qpq_ports::{NewHistory, StoreResult};
use sqlx::{SqliteConnection, SqlitePool};

use crate::{
    row::Columns as _,
    writer::{Outcome, Scope, Writer},
};

/// The present id. Cheap to clone.
///
/// A writer's job that compares with it compares exactly: the id changes between two transactions
/// of the writer, never during one.
#[derive(Clone, Debug)]
pub(crate) struct History(Arc<Mutex<StoreId>>);

impl History {
    /// Reads the id from the database.
    pub(crate) async fn read(readers: &SqlitePool) -> sqlx::Result<Self> {
        let row = sqlx::query("SELECT store_id FROM store").fetch_one(readers).await?;
        Ok(Self(Arc::new(Mutex::new(row.store_id("store_id")?))))
    }

    pub(crate) fn id(&self) -> StoreId {
        *self.0.lock()
    }

    /// Begins another history: another id, no one-time KeyPackages.
    pub(crate) async fn begin(&self, writer: &Writer) -> StoreResult<NewHistory> {
        let current = Arc::clone(&self.0);
        writer
            .run(
                Scope::SingleEdge,
                0,
                |connection| async move { begin(connection).await.map(Outcome::Keep) }.boxed(),
                move |new: &NewHistory| *current.lock() = new.store_id,
            )
            .await
    }
}

async fn begin(connection: &mut SqliteConnection) -> sqlx::Result<NewHistory> {
    let row = sqlx::query("UPDATE store SET store_id = randomblob(16) RETURNING store_id")
        .fetch_one(&mut *connection)
        .await?;
    let store_id = row.store_id("store_id")?;
    // Any of them may have been given out after the copy was made.
    sqlx::query(
        "INSERT OR IGNORE INTO key_package_given (owner, fingerprint, not_after)
         SELECT owner, fingerprint, not_after FROM key_package WHERE last_resort = 0",
    )
    .execute(&mut *connection)
    .await?;
    let removed_packages = sqlx::query("DELETE FROM key_package WHERE last_resort = 0")
        .execute(connection)
        .await?
        .rows_affected();
    Ok(NewHistory { store_id, removed_packages })
}
