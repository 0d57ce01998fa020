//! Opening a data directory: made if missing, locked against a second server, brought to the newest
//! schema, and tried with one real commit before anybody relies on it.

use std::{
    fs::{DirBuilder, File, OpenOptions, TryLockError},
    io,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use sqlx::{
    ConnectOptions as _, SqliteConnection, SqlitePool,
    migrate::{MigrateError, Migrator},
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};

use crate::{accounts, clock::Belief, damage, error::Kind, maintenance};

static MIGRATIONS: Migrator = sqlx::migrate!();

/// "qpq1", see the first migration.
const APPLICATION_ID: i64 = 1_903_194_417;

/// Connections for reading. Each is a thread that sleeps unless it reads.
const READERS: u32 = 4;

/// Rows that a reader is ahead of whoever takes them. A row can be a MiB, and a page ends after
/// four.
pub(crate) const ROWS_AHEAD: usize = 8;

const LOCK_FILE: &str = "lock";
/// The database in a data directory.
pub const DATABASE_FILE: &str = "qpq.db";

/// The file in a data directory that says where everything in it has gone: whoever finds it starts
/// no server there.
pub const MOVED_FILE: &str = "moved-to-cluster";

/// The file in a data directory whose restore has begun and not ended: no server starts there.
pub const RESTORING_FILE: &str = "restore-unfinished";

/// Why a data directory cannot be used, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(
        "{} is in use by another server: stop that one first, or give this one a directory of its own",
        .0.display()
    )]
    InUse(PathBuf),
    #[error("{} is not a directory: name one, or a path where one can be made", .0.display())]
    NotADirectory(PathBuf),
    #[error(
        "{} cannot be written ({cause}): make it writable for the user that runs the server, or name another directory",
        path.display()
    )]
    NotWritable { path: PathBuf, cause: String },
    #[error("no space is left for {}: free some, then start again; nothing is lost", .0.display())]
    Full(PathBuf),
    #[error(
        "{} is damaged ({cause}): keep a copy, restore the latest backup with `qpq-admin restore`, or rescue what can be read with `sqlite3 {} .recover`",
        path.display(),
        path.display()
    )]
    Corrupt { path: PathBuf, cause: String },
    #[error("{} is some other program's database: move it away, or name another directory", .0.display())]
    NotOurs(PathBuf),
    #[error(
        "{} was written by a newer version (schema {found}, this one knows up to {known}): start that version, or restore the backup made before the upgrade",
        path.display()
    )]
    NewerSchema { path: PathBuf, found: i64, known: i64 },
    #[error(
        "{} was written by an unreleased version whose schema {version} was another: start that version, or use a new directory",
        path.display()
    )]
    OtherSchema { path: PathBuf, version: i64 },
    #[error(
        "{} was moved into a cluster, and what is here is no longer kept up: start that cluster's edges. {} says which one it is",
        .0.display(), .0.join(MOVED_FILE).display()
    )]
    Moved(PathBuf),
    #[error(
        "{} was written by an older version (schema {found}, this one has {known}): start this version's qpq-server on it once and stop it",
        path.display()
    )]
    OlderSchema { path: PathBuf, found: i64, known: i64 },
    #[error(
        "{} holds a part of a backup: a restore was interrupted. Run `qpq-admin restore` again, with the same backup or another one",
        .0.display()
    )]
    Restoring(PathBuf),
    #[error("{} cannot be opened ({cause}): see to the disk, then start again", path.display())]
    Failed { path: PathBuf, cause: String },
}

/// An open data directory.
pub(crate) struct Opened {
    /// Held as long as the store is open.
    pub(crate) lock: File,
    pub(crate) connection: SqliteConnection,
    pub(crate) belief: Option<Belief>,
    pub(crate) options: SqliteConnectOptions,
    pub(crate) readers: SqlitePool,
}

pub(crate) async fn open(data_dir: &Path) -> Result<Opened, OpenError> {
    make_directory(data_dir)?;
    let lock = lock(data_dir)?;
    // What is sent here would never reach those who read in the cluster.
    if data_dir.join(MOVED_FILE).exists() {
        return Err(OpenError::Moved(data_dir.to_owned()));
    }
    let path = data_dir.join(DATABASE_FILE);
    make_private_file(&path)?;
    sync_directory(data_dir)?;
    let failed = |error: sqlx::Error| failed(&path, &error);

    let options = SqliteConnectOptions::new()
        .filename(&path)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .foreign_keys(true)
        .busy_timeout(Duration::from_secs(5))
        // Up to 64 MiB of pages in memory, a log of 16 MiB before it is written back, and not much
        // more afterwards.
        .pragma("cache_size", "-65536")
        .pragma("wal_autocheckpoint", "4096")
        .pragma("journal_size_limit", "67108864")
        // What a statement puts aside while it inserts.
        .pragma("temp_store", "memory")
        .disable_statement_logging();
    let mut connection = options.connect().await.map_err(failed)?;
    check_ownership(&mut connection, &path).await?;
    // `run` does the same behind a trait that hides from the compiler that the future is `Send`.
    MIGRATIONS
        .run_direct(None, &mut connection, false)
        .await
        .map_err(|error| migration_failed(&path, &error))?;
    damage::look_at_start(&mut connection, &path).await?;
    accounts::fill_skeletons(&mut connection).await.map_err(failed)?;
    maintenance::beat(&mut connection).await.map_err(failed)?;
    let belief = Belief::read(&mut connection).await.map_err(failed)?;

    let reading = options
        .clone()
        .pragma("query_only", "on")
        .pragma("cache_size", "-16384")
        .row_buffer_size(ROWS_AHEAD);
    let readers = SqlitePoolOptions::new()
        .max_connections(READERS)
        .acquire_timeout(Duration::from_secs(5))
        .test_before_acquire(false)
        .idle_timeout(None)
        .max_lifetime(None)
        .connect_with(reading)
        .await
        .map_err(failed)?;
    Ok(Opened { lock, connection, belief, options, readers })
}

fn make_directory(path: &Path) -> Result<(), OpenError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|error| io_failed(path, &error))
}

/// Takes the directory for this process, until the file is closed. Refuses one whose restore was
/// interrupted.
pub(crate) fn lock(data_dir: &Path) -> Result<File, OpenError> {
    let lock = lock_file(data_dir)?;
    if data_dir.join(RESTORING_FILE).exists() {
        return Err(OpenError::Restoring(data_dir.to_owned()));
    }
    Ok(lock)
}

/// Takes the directory for this process, whatever it holds.
pub(crate) fn lock_file(data_dir: &Path) -> Result<File, OpenError> {
    let path = data_dir.join(LOCK_FILE);
    let file = make_private_file(&path)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(OpenError::InUse(data_dir.to_owned())),
        Err(TryLockError::Error(error)) => Err(io_failed(&path, &error)),
    }
}

/// Opens a file, made readable for its owner alone if missing. SQLite gives its log the mode of the
/// database.
fn make_private_file(path: &Path) -> Result<File, OpenError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(|error| io_failed(path, &error))
}

/// Makes the directory's entries as durable as what will be in the files.
fn sync_directory(path: &Path) -> Result<(), OpenError> {
    File::open(path)
        .and_then(|directory| directory.sync_all())
        .map_err(|error| io_failed(path, &error))
}

fn io_failed(path: &Path, error: &io::Error) -> OpenError {
    let path = path.to_owned();
    match error.kind() {
        io::ErrorKind::NotADirectory | io::ErrorKind::AlreadyExists => {
            OpenError::NotADirectory(path)
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            OpenError::NotWritable { path, cause: error.to_string() }
        }
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => OpenError::Full(path),
        _ => OpenError::Failed { path, cause: error.to_string() },
    }
}

/// Checks that the database is one of ours and just as new as this program.
pub(crate) async fn check_current(
    connection: &mut SqliteConnection,
    path: &Path,
) -> Result<(), OpenError> {
    let (found, known) = (check_known(connection, path).await?, newest());
    if found < known {
        return Err(OpenError::OlderSchema { path: path.to_owned(), found, known });
    }
    Ok(())
}

/// Checks that the database is one of ours and no newer than this program. Returns the number of
/// its last migration.
pub(crate) async fn check_known(
    connection: &mut SqliteConnection,
    path: &Path,
) -> Result<i64, OpenError> {
    check_ownership(connection, path).await?;
    let found: Option<i64> =
        sqlx::query_scalar("SELECT max(version) FROM _sqlx_migrations WHERE success")
            .fetch_one(connection)
            .await
            .map_err(|error| failed(path, &error))?;
    let (found, known) = (found.unwrap_or_default(), newest());
    if found > known {
        return Err(OpenError::NewerSchema { path: path.to_owned(), found, known });
    }
    Ok(found)
}

/// What went wrong with the database file.
pub(crate) fn failed(path: &Path, error: &sqlx::Error) -> OpenError {
    let (path, cause) = (path.to_owned(), error.to_string());
    match Kind::of(error) {
        Kind::Corrupt | Kind::BadRow => OpenError::Corrupt { path, cause },
        Kind::Full => OpenError::Full(path),
        Kind::NotWritable => OpenError::NotWritable { path, cause },
        Kind::Refused | Kind::Other => OpenError::Failed { path, cause },
    }
}

/// A database that has tables and not our mark is somebody else's.
pub(crate) async fn check_ownership(
    connection: &mut SqliteConnection,
    path: &Path,
) -> Result<(), OpenError> {
    let failed = |error: sqlx::Error| failed(path, &error);
    let mark: i64 = sqlx::query_scalar("PRAGMA application_id")
        .fetch_one(&mut *connection)
        .await
        .map_err(failed)?;
    // The migrator's own table comes before the first migration, which sets the mark: a crash may
    // leave it alone.
    let foreign: bool = sqlx::query_scalar(
        "SELECT EXISTS (SELECT 1 FROM sqlite_schema WHERE tbl_name <> '_sqlx_migrations')",
    )
    .fetch_one(&mut *connection)
    .await
    .map_err(failed)?;
    if foreign && mark != APPLICATION_ID {
        Err(OpenError::NotOurs(path.to_owned()))
    } else {
        Ok(())
    }
}

fn newest() -> i64 {
    MIGRATIONS.iter().map(|migration| migration.version).max().unwrap_or_default()
}

fn migration_failed(path: &Path, error: &MigrateError) -> OpenError {
    let known = newest();
    match error {
        MigrateError::VersionMissing(found) => {
            OpenError::NewerSchema { path: path.to_owned(), found: *found, known }
        }
        MigrateError::VersionMismatch(version) => {
            OpenError::OtherSchema { path: path.to_owned(), version: *version }
        }
        MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => {
            failed(path, error)
        }
        other => OpenError::Corrupt { path: path.to_owned(), cause: other.to_string() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No test can cut the power, so this one reads what SQLite promises to do about it.
    #[tokio::test]
    async fn commits_are_synced_to_a_log() {
        let directory = tempfile::tempdir().expect("a directory");
        let mut opened = open(directory.path()).await.unwrap_or_else(|error| panic!("{error}"));
        let synchronous: i64 = sqlx::query_scalar("PRAGMA synchronous")
            .fetch_one(&mut opened.connection)
            .await
            .expect("read");
        let journal: String = sqlx::query_scalar("PRAGMA journal_mode")
            .fetch_one(&mut opened.connection)
            .await
            .expect("read");
        assert_eq!((synchronous, journal.as_str()), (2, "wal"));
        let write = sqlx::query("UPDATE heartbeat SET beats = 0").execute(&opened.readers).await;
        write.expect_err("readers only read");
    }
}
