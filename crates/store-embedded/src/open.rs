//! Opening of a data directory. The directory is created if it is missing, locked, migrated to the
//! newest schema, and tested with one commit. Then the store is built.

use qpq_domain::StoreLimits;
use std::{path::Path, sync::Arc, time::Duration};

use sqlx::{
    ConnectOptions as _, SqliteConnection, SqlitePool,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};

use crate::{
    accounts,
    blobs::files::BlobFiles,
    clock::{Belief, ClockGuard},
    damage::{self, Damage},
    directory,
    files::{DATABASE_FILE, TRANSFERRED_FILE},
    jobs, maintenance,
    memory::{EndpointTable, History, Limiter, Memory},
    metrics as names,
    open_error::{OpenError, failed},
    schema,
    store::EmbeddedStore,
    writer::Writer,
};

/// The connections for reading. Each has a thread, which sleeps unless it reads.
const READERS: u32 = 4;

/// Maximum rows that SQLite's thread reads ahead. A row can have 1 MiB, and a page of messages ends
/// after 4 MiB.
pub(crate) const ROWS_AHEAD: usize = 8;

impl EmbeddedStore {
    /// Opens `data_dir`, and creates it if it is missing. Needs a tokio runtime for as long as the
    /// store is open.
    pub async fn open(data_dir: &Path, limits: StoreLimits) -> Result<Self, OpenError> {
        names::describe();
        directory::create(data_dir)?;
        let lock = directory::lock(data_dir)?;
        // Readers in the cluster would not receive a message that is stored here.
        if data_dir.join(TRANSFERRED_FILE).exists() {
            return Err(OpenError::Transferred(data_dir.to_owned()));
        }
        let path = data_dir.join(DATABASE_FILE);
        directory::create_private_file(&path)?;
        directory::sync(data_dir)?;

        let options = options(&path);
        let (connection, belief) = connect_writer(&options, &path).await?;
        let failed = |error: sqlx::Error| failed(&path, &error);
        let readers = connect_readers(&options).await.map_err(failed)?;
        let history = History::read(&readers).await.map_err(failed)?;
        let memory = Arc::new(Memory::new(history, ClockGuard::new(belief)));
        let writer = Writer::start(connection, options, limits.delivery, Arc::clone(&memory), lock);
        Ok(Self {
            writer,
            readers,
            memory,
            limiter: Arc::new(Limiter::default()),
            endpoints: Arc::new(EndpointTable::new()),
            damage: Arc::new(Damage::none()),
            limits,
            blobs: Arc::new(BlobFiles::new(data_dir)),
        })
    }
}

fn options(path: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(path)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .foreign_keys(true)
        .busy_timeout(Duration::from_secs(5))
        // Up to 64 MiB of pages in memory. The log is written back from 16 MiB on, and a log that
        // has grown beyond 64 MiB is then truncated to that.
        .pragma("cache_size", "-65536")
        .pragma("wal_autocheckpoint", "4096")
        .pragma("journal_size_limit", "67108864")
        // Deleted rows are overwritten, so that the file has nothing of an erased account.
        .pragma("secure_delete", "on")
        // For the temporary tables of inserts.
        .pragma("temp_store", "memory")
        // All statements of the writer stay compiled. The inserts of messages alone are 66.
        .statement_cache_capacity(256)
        .disable_statement_logging()
}

/// Connects the writer, migrates and checks the database, and commits once.
async fn connect_writer(
    options: &SqliteConnectOptions,
    path: &Path,
) -> Result<(SqliteConnection, Option<Belief>), OpenError> {
    let failed = |error: sqlx::Error| failed(path, &error);
    let mut connection = options.connect().await.map_err(failed)?;
    schema::check_ownership(&mut connection, path).await?;
    schema::migrate(&mut connection, path).await?;
    damage::check_at_start(&mut connection, path).await?;
    accounts::fill_skeletons(&mut connection).await.map_err(failed)?;
    maintenance::beat(&mut connection).await.map_err(failed)?;
    let belief = Belief::read(&mut connection).await.map_err(failed)?;
    jobs::release_all(&mut connection).await.map_err(failed)?;
    Ok((connection, belief))
}

async fn connect_readers(options: &SqliteConnectOptions) -> sqlx::Result<SqlitePool> {
    let options = options
        .clone()
        .pragma("query_only", "on")
        .pragma("cache_size", "-16384")
        .row_buffer_size(ROWS_AHEAD);
    SqlitePoolOptions::new()
        .max_connections(READERS)
        .acquire_timeout(Duration::from_secs(5))
        .test_before_acquire(false)
        .idle_timeout(None)
        .max_lifetime(None)
        .connect_with(options)
        .await
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No test can cut the power, so this one reads the settings on which durability depends.
    #[tokio::test]
    async fn commits_are_synced_to_a_log() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join(DATABASE_FILE);
        directory::create_private_file(&path).expect("a file");
        let options = options(&path);
        let (mut connection, _) =
            connect_writer(&options, &path).await.unwrap_or_else(|error| panic!("{error}"));
        let synchronous: i64 = sqlx::query_scalar("PRAGMA synchronous")
            .fetch_one(&mut connection)
            .await
            .expect("read");
        let journal: String = sqlx::query_scalar("PRAGMA journal_mode")
            .fetch_one(&mut connection)
            .await
            .expect("read");
        assert_eq!((synchronous, journal.as_str()), (2, "wal"));
        let readers = connect_readers(&options).await.expect("connections");
        let write = sqlx::query("UPDATE heartbeat SET beats = 0").execute(&readers).await;
        write.expect_err("readers only read");
    }
}
