//! The beginning of another history, after the store was replaced by an older copy of itself.

use qpq_ports::{NewHistory, OldSessions};
use sqlx::SqliteConnection;

use crate::{
    effects::Effects,
    row::Columns as _,
    sessions::tokens,
    statement::{Done, Scope, Statement},
};

/// Stores another store id, removes all one-time KeyPackages, and ends all sessions if requested.
pub(crate) struct BeginHistory(pub(crate) OldSessions);

impl Statement for BeginHistory {
    type Answer = NewHistory;
    const NAME: &'static str = "begin history";
    const SCOPE: Scope = Scope::Alone;

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<NewHistory>> {
        let row = sqlx::query("UPDATE store SET store_id = randomblob(16) RETURNING store_id")
            .fetch_one(&mut *tx)
            .await?;
        let store_id = row.store_id("store_id")?;
        // Any of these packages may have been taken after the copy was created.
        sqlx::query(
            "INSERT OR IGNORE INTO key_package_given (owner, fingerprint, not_after)
             SELECT owner, fingerprint, not_after FROM key_package WHERE last_resort = 0",
        )
        .execute(&mut *tx)
        .await?;
        let removed_packages = sqlx::query("DELETE FROM key_package WHERE last_resort = 0")
            .execute(&mut *tx)
            .await?
            .rows_affected();
        let sessions_ended = match self.0 {
            OldSessions::Keep => Vec::new(),
            OldSessions::End => {
                tokens(&sqlx::query("DELETE FROM session RETURNING token").fetch_all(tx).await?)?
            }
        };
        let ended_sessions = sessions_ended.len() as u64;
        let effects = Effects {
            new_store_id: Some(store_id),
            sessions_changed: sessions_ended,
            ..Effects::default()
        };
        Ok(Done::with(NewHistory { store_id, removed_packages, ended_sessions }, effects))
    }
}
