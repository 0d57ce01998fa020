//! The client's state on disk: one SQLite database whose values are sealed.
//!
//! A client saves everything in tables of two kinds:
//!
//! - *Rows* have a key. Key and lane (a second key to list rows by) are stored as keyed hashes.
//! - *Items* have an order, such as a history. Their numbers rise and are never used twice.
//!
//! Each value is sealed with XChaCha20-Poly1305 under a random data key, with its table and its
//! place as associated data, so a row moved to another place does not open. The data key is sealed
//! by the [`VaultKey`], and during a change of the password by the next one too
//! ([`Database::prepare_key`]). Only the numbers of rows and items, their sizes, and which of them
//! share a lane are not encrypted.
//!
//! The journal is a write-ahead log, and a commit returns once it is on the disk (`synchronous =
//! FULL`). Freed pages are overwritten (`secure_delete`), since deleted MLS keys must not return.
//!
//! Several processes may use one database. [`Database::write`] is one `BEGIN IMMEDIATE`
//! transaction, which reads the latest committed state.

mod items;
mod rows;
mod seal;
#[cfg(test)]
mod tests;

use std::{
    fs::{self, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use rusqlite::{Connection, ErrorCode, OptionalExtension as _};

pub use self::items::{Item, Measure, NewItem, Size};
use self::seal::Secrets;
use crate::vault::{self, Salt, VaultError, VaultKey};

/// Marks the file as this client's ("QPQS"), for `file` and for [`Database::open`].
const APPLICATION_ID: i32 = 0x5150_5153;
const FORMAT: i32 = 1;

/// The maximum wait for another process's transaction. A transaction takes milliseconds.
const BUSY_TIMEOUT: Duration = Duration::from_secs(30);

const SCHEMA: &str = "
CREATE TABLE header (name TEXT PRIMARY KEY, value BLOB NOT NULL) STRICT;
CREATE TABLE rows (
    tab INTEGER NOT NULL, key BLOB NOT NULL, lane BLOB, value BLOB NOT NULL
) STRICT;
CREATE UNIQUE INDEX rows_key ON rows (tab, key);
CREATE INDEX rows_lane ON rows (tab, lane) WHERE lane IS NOT NULL;
CREATE TABLE items (
    tab INTEGER NOT NULL, number INTEGER NOT NULL, key BLOB, lane BLOB, open INTEGER NOT NULL,
    value BLOB NOT NULL
) STRICT;
CREATE UNIQUE INDEX items_number ON items (tab, number);
CREATE UNIQUE INDEX items_key ON items (tab, key) WHERE key IS NOT NULL;
CREATE INDEX items_lane ON items (tab, lane, number) WHERE lane IS NOT NULL;
CREATE INDEX items_open ON items (tab, number) WHERE open;
CREATE INDEX items_open_lane ON items (tab, lane) WHERE open AND lane IS NOT NULL;
CREATE TABLE counters (tab INTEGER PRIMARY KEY, next INTEGER NOT NULL) STRICT;
CREATE TABLE digests (digest BLOB PRIMARY KEY, day INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE INDEX digests_day ON digests (day);
";

/// A table, by a number that never changes. Numbers below 32 are this crate's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Table(u8);

impl Table {
    /// Returns the table of this number.
    pub const fn new(number: u8) -> Self {
        Self(number)
    }
}

/// A value as returned by a read. Wiped when dropped.
pub type Value = zeroize::Zeroizing<Vec<u8>>;

/// The error of an operation on the database. A failed transaction has changed nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DatabaseError {
    #[error("the disk is full")]
    Full,
    #[error("another process has been writing to the profile for {} s", BUSY_TIMEOUT.as_secs())]
    Busy,
    #[error("the password or key does not open the state")]
    WrongKey,
    #[error("the state was written by a newer version: update this client")]
    Newer,
    #[error("the state is damaged: {0}")]
    Damaged(String),
    #[error("{0}")]
    Io(String),
}

impl From<rusqlite::Error> for DatabaseError {
    fn from(error: rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(ErrorCode::DiskFull) => Self::Full,
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => Self::Busy,
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
                Self::Damaged(error.to_string())
            }
            Some(_) => Self::Io(error.to_string()),
            // The shape of a row is not that of the schema.
            None => Self::Damaged(error.to_string()),
        }
    }
}

impl From<io::Error> for DatabaseError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull => Self::Full,
            _ => Self::Io(error.to_string()),
        }
    }
}

/// A handle to one connection. Clones share it.
#[derive(Clone)]
pub struct Database {
    inner: Arc<Inner>,
}

struct Inner {
    connection: Mutex<Connection>,
    secrets: Secrets,
}

impl std::fmt::Debug for Database {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Database").finish_non_exhaustive()
    }
}

impl Database {
    /// Creates the database at `path` with the content that `fill` writes.
    ///
    /// The file appears complete or not at all: it is written under another name, flushed, and
    /// renamed.
    pub fn create<E: From<DatabaseError>>(
        path: &Path,
        key: &VaultKey,
        fill: impl FnOnce(&Self) -> Result<(), E>,
    ) -> Result<Self, E> {
        let new = with_suffix(path, ".new");
        remove(&new).map_err(DatabaseError::from)?;
        remove(&with_suffix(&new, "-journal")).map_err(DatabaseError::from)?;
        {
            let database = Self::create_file(&new, key)?;
            database.write(|| fill(&database))?;
        }
        qpq_durable_file::publish(&new, path).map_err(DatabaseError::from)?;
        Ok(Self::open(path, key)?)
    }

    fn create_file(path: &Path, key: &VaultKey) -> Result<Self, DatabaseError> {
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        let connection = Connection::open(path)?;
        let data_key = Secrets::random_key();
        configure(&connection)?;
        connection.pragma_update(None, "application_id", APPLICATION_ID)?;
        connection.pragma_update(None, "user_version", FORMAT)?;
        connection.execute_batch(SCHEMA)?;
        connection.execute(
            "INSERT INTO header VALUES ('data-key', ?1)",
            [vault::seal(key, &data_key[..])],
        )?;
        Ok(Self::new(connection, Secrets::new(&data_key)))
    }

    /// Opens the existing database at `path`.
    pub fn open(path: &Path, key: &VaultKey) -> Result<Self, DatabaseError> {
        let connection = connect(path)?;
        let (data_key, opened_by) = find_data_key(&connection, key)?;
        let data_key: [u8; 32] = data_key[..]
            .try_into()
            .map_err(|_| DatabaseError::Damaged("the data key has another length".into()))?;
        configure(&connection)?;
        connection.pragma_update(None, "journal_mode", "wal")?;
        let database = Self::new(connection, Secrets::new(&data_key));
        if opened_by == OpenedBy::NextKey {
            database.replace_key(key, key)?;
        }
        Ok(database)
    }

    /// Lets `next` open the database too, in addition to `key`, which has opened it. Replaces an
    /// earlier next key.
    ///
    /// The first [`Database::open`] with the next key, or [`Database::replace_key`], makes it the
    /// only one. Both keys have the same salt.
    pub fn prepare_key(&self, key: &VaultKey, next: &VaultKey) -> Result<(), DatabaseError> {
        self.write(|| {
            let connection = self.inner.connection.lock();
            let (data_key, _) = find_data_key(&connection, key)?;
            connection.execute(
                "INSERT OR REPLACE INTO header VALUES ('data-key-next', ?1)",
                [vault::seal(next, &data_key)],
            )?;
            Ok(())
        })
    }

    /// Makes `next` the only key of the database, which `key` has opened.
    pub fn replace_key(&self, key: &VaultKey, next: &VaultKey) -> Result<(), DatabaseError> {
        self.write(|| {
            let connection = self.inner.connection.lock();
            let (data_key, _) = find_data_key(&connection, key)?;
            connection.execute(
                "UPDATE header SET value = ?1 WHERE name = 'data-key'",
                [vault::seal(next, &data_key)],
            )?;
            connection.execute("DELETE FROM header WHERE name = 'data-key-next'", [])?;
            Ok::<_, DatabaseError>(())
        })?;
        // The log still has the data key under the former key. Another process may prevent this.
        self.checkpoint()
    }

    /// Removes the next key, if there is one.
    pub fn forget_next_key(&self) -> Result<(), DatabaseError> {
        let connection = self.inner.connection.lock();
        connection.execute("DELETE FROM header WHERE name = 'data-key-next'", [])?;
        Ok(())
    }

    /// Returns the salt with which the key of the database at `path` was derived.
    pub fn salt(path: &Path) -> Result<Salt, DatabaseError> {
        let sealed = sealed_data_key(&connect(path)?)?;
        vault::salt_of(&sealed).map_err(|error| DatabaseError::Damaged(error.to_string()))
    }

    /// Creates a database in memory, under a random key.
    pub fn in_memory() -> Self {
        let connection = Connection::open_in_memory().expect("memory can be opened");
        connection.execute_batch(SCHEMA).expect("the schema is valid");
        Self::new(connection, Secrets::new(&Secrets::random_key()))
    }

    fn new(connection: Connection, secrets: Secrets) -> Self {
        connection.set_prepared_statement_cache_capacity(64);
        Self { inner: Arc::new(Inner { connection: Mutex::new(connection), secrets }) }
    }

    /// Runs `work` in one transaction that excludes other writers, in all processes, from its first
    /// read on.
    ///
    /// If `work` fails, nothing has changed. When this function returns, the changes are on the
    /// disk.
    pub fn write<R, E: From<DatabaseError>>(
        &self,
        work: impl FnOnce() -> Result<R, E>,
    ) -> Result<R, E> {
        self.transaction("BEGIN IMMEDIATE", work)
    }

    /// Runs `work`, which only reads, on one snapshot.
    pub fn read<R, E: From<DatabaseError>>(
        &self,
        work: impl FnOnce() -> Result<R, E>,
    ) -> Result<R, E> {
        self.transaction("BEGIN DEFERRED", work)
    }

    fn transaction<R, E: From<DatabaseError>>(
        &self,
        begin: &str,
        work: impl FnOnce() -> Result<R, E>,
    ) -> Result<R, E> {
        self.execute_batch(begin)?;
        let open = OpenTransaction(self);
        let result = work()?;
        self.execute_batch("COMMIT")?;
        drop(open);
        Ok(result)
    }

    fn execute_batch(&self, sql: &str) -> Result<(), DatabaseError> {
        Ok(self.inner.connection.lock().execute_batch(sql)?)
    }

    /// Moves the write-ahead log into the database file, as far as other processes allow.
    pub fn checkpoint(&self) -> Result<(), DatabaseError> {
        let connection = self.inner.connection.lock();
        connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))?;
        Ok(())
    }

    /// Limits the size of the database, as a full disk does. For tests.
    #[doc(hidden)]
    pub fn limit_pages(&self, pages: u32) -> Result<(), DatabaseError> {
        let connection = self.inner.connection.lock();
        connection.query_row(&format!("PRAGMA max_page_count = {pages}"), [], |_| Ok(()))?;
        Ok(())
    }

    /// Copies everything into a database in memory. For tests.
    #[doc(hidden)]
    pub fn copy(&self) -> Self {
        let mut copy = Connection::open_in_memory().expect("memory can be opened");
        let from = self.inner.connection.lock();
        let backup = rusqlite::backup::Backup::new(&from, &mut copy).expect("both are open");
        backup.step(-1).expect("nobody else uses either");
        drop(backup);
        Self::new(copy, self.inner.secrets.clone())
    }
}

/// Rolls the transaction back unless it was committed, also when the work panics.
struct OpenTransaction<'a>(&'a Database);

impl Drop for OpenTransaction<'_> {
    fn drop(&mut self) {
        let connection = self.0.inner.connection.lock();
        if !connection.is_autocommit() {
            // A failed rollback leaves nothing to do: SQLite rolls back when the connection closes.
            let _ = connection.execute_batch("ROLLBACK");
        }
    }
}

fn connect(path: &Path) -> Result<Connection, DatabaseError> {
    use rusqlite::OpenFlags;
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    let number = |name| connection.pragma_query_value(None, name, |row| row.get::<_, i32>(0));
    if number("application_id")? != APPLICATION_ID {
        return Err(DatabaseError::Damaged("it is not a database of this client".into()));
    }
    match number("user_version")? {
        FORMAT => Ok(connection),
        version if version > FORMAT => Err(DatabaseError::Newer),
        _ => Err(DatabaseError::Damaged("it has no format version".into())),
    }
}

fn configure(connection: &Connection) -> Result<(), DatabaseError> {
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.pragma_update(None, "synchronous", "full")?;
    connection.pragma_update(None, "secure_delete", true)?;
    connection.pragma_update(None, "temp_store", "memory")?;
    connection.pragma_update(None, "journal_size_limit", 4 << 20)?;
    Ok(())
}

/// The key that has opened the data key.
#[derive(Clone, Copy, PartialEq, Eq)]
enum OpenedBy {
    Key,
    NextKey,
}

/// Opens the data key, which is sealed by the key and possibly by the next one.
fn find_data_key(
    connection: &Connection,
    key: &VaultKey,
) -> Result<(Value, OpenedBy), DatabaseError> {
    match open_data_key(key, &sealed_data_key(connection)?) {
        Err(DatabaseError::WrongKey) => match header(connection, "data-key-next")? {
            Some(sealed) => Ok((open_data_key(key, &sealed)?, OpenedBy::NextKey)),
            None => Err(DatabaseError::WrongKey),
        },
        opened => Ok((opened?, OpenedBy::Key)),
    }
}

fn open_data_key(key: &VaultKey, sealed: &[u8]) -> Result<Value, DatabaseError> {
    vault::open(key, sealed).map_err(|error| match error {
        VaultError::WrongKeyOrDamaged => DatabaseError::WrongKey,
        error => DatabaseError::Damaged(error.to_string()),
    })
}

fn sealed_data_key(connection: &Connection) -> Result<Vec<u8>, DatabaseError> {
    header(connection, "data-key")?
        .ok_or_else(|| DatabaseError::Damaged("it has no data key".into()))
}

fn header(connection: &Connection, name: &str) -> Result<Option<Vec<u8>>, DatabaseError> {
    let sql = "SELECT value FROM header WHERE name = ?1";
    Ok(connection.query_row(sql, [name], |row| row.get(0)).optional()?)
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
