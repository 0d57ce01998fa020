//! The beginning of another history, after the store was replaced by an older copy of itself.

use qpq_ports::NewHistory;
use sqlx::SqliteConnection;

use crate::{
    effects::Effects,
    row::Columns as _,
    statement::{Done, Scope, Statement},
};

/// Stores another store id and removes all one-time KeyPackages.
pub(crate) struct BeginHistory;

impl Statement for BeginHistory {
    type Answer = NewHistory;
    const NAME: &'static str = "begin history";
    const SCOPE: Scope = Scope::Alone;

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<NewHistory>> {
        let row = sqlx::query("UPDATE store SET store_id = randomblob(16) RETURNING store_id")
            .fetch_one(&mut *tx)
            .await?;
        let store_id = row.store_id("store_id")?;
        // Any of them may have been given out after the copy was made.
        sqlx::query(
            "INSERT OR IGNORE INTO key_package_given (owner, fingerprint, not_after)
             SELECT owner, fingerprint, not_after FROM key_package WHERE last_resort = 0",
        )
        .execute(&mut *tx)
        .await?;
        let removed_packages = sqlx::query("DELETE FROM key_package WHERE last_resort = 0")
            .execute(tx)
            .await?
            .rows_affected();
        let effects = Effects { new_store_id: Some(store_id), ..Effects::default() };
        Ok(Done::with(NewHistory { store_id, removed_packages }, effects))
    }
}
