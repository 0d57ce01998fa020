//! The id of the history that the store's seqs belong to, in memory.
//!
//! The data directory is locked, so no other process changes the id while the store is open.

use std::sync::Arc;

use parking_lot::Mutex;
use qpq_domain::StoreId;
use sqlx::SqlitePool;

use crate::row::Columns as _;

/// The present store id. Cheap to clone.
///
/// The id changes only between two transactions of the writer, so it stays the same while a
/// statement runs.
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

    pub(super) fn set(&self, store_id: StoreId) {
        *self.0.lock() = store_id;
    }
}
