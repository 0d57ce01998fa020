//! Copies of a database for a backup, checks of such a copy, and the exclusive use of a data
//! directory that is being restored.
//!
//! SQLite creates the copy (`VACUUM INTO`), on a connection of its own. The copy shows the state of
//! one commit, whatever a server writes meanwhile, and contains no freed pages. Files copied one
//! after the other from under a running server do not show one commit and are damaged. The copy is
//! read in one transaction, so the server's write-ahead log is not truncated until the copy is
//! complete. Writers do not wait.

use std::{
    fs::File,
    path::{Path, PathBuf},
    time::Duration,
};

use futures_util::TryStreamExt as _;
use qpq_ports::transfer::sha256;
use sqlx::{
    AssertSqlSafe, ConnectOptions as _, Connection as _, Row as _, SqliteConnection,
    sqlite::{SqliteConnectOptions, SqliteRow},
};

use crate::{
    directory,
    files::{DATABASE_FILE, RESTORING_FILE, TRANSFERRED_FILE, blob_path},
    open::ROWS_AHEAD,
    open_error::{OpenError, failed as open_failed},
    row::Columns as _,
    schema,
};

/// The time for which a copy waits for a lock. A running server keeps a lock no longer than a
/// checkpoint takes.
const LOCK_TIMEOUT: Duration = Duration::from_secs(30);

/// Maximum number of damages in one error.
const MAX_NAMED_DAMAGES: usize = 5;

/// The content of a database, and its schema.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inspection {
    /// The number of the last migration.
    pub schema: i64,
    /// The id of the history that the seqs belong to, in hexadecimal digits. `None` in a database
    /// of a release that had no such id.
    pub store_id: Option<String>,
    /// Tables with their numbers of rows, in alphabetical order.
    pub rows: Vec<(String, u64)>,
}

/// The reason why a database cannot be copied, or a copy cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    #[error("{} contains no server data: there is no {DATABASE_FILE} in it", .0.display())]
    NoData(PathBuf),
    #[error("the data directory {0}")]
    Source(OpenError),
    #[error("no space is left for {}: the copy was removed", .0.display())]
    Full(PathBuf),
    #[error("{} cannot be copied to {}: {cause}", from.display(), to.display())]
    Copy { from: PathBuf, to: PathBuf, cause: String },
    #[error("{} is damaged: {}", path.display(), damages.join("; "))]
    Damaged { path: PathBuf, damages: Vec<String> },
    #[error("the copy {0}")]
    Copied(OpenError),
}

/// The exclusive use of a data directory that is being restored: no server starts on it.
#[derive(Debug)]
pub struct Claim {
    _lock: File,
}

impl Claim {
    /// Acquires the lock that a running server has.
    pub fn take(data_dir: &Path) -> Result<Self, OpenError> {
        Ok(Self { _lock: directory::lock_any(data_dir)? })
    }
}

/// Copies the database in `data_dir` to the new file `to`, readable by its owner alone and durable
/// when this returns. A server may use the database meanwhile.
pub async fn copy_database(data_dir: &Path, to: &Path) -> Result<(), BackupError> {
    let from = data_dir.join(DATABASE_FILE);
    if !from.is_file() {
        return Err(BackupError::NoData(data_dir.to_owned()));
    }
    if data_dir.join(TRANSFERRED_FILE).exists() {
        return Err(BackupError::Source(OpenError::Transferred(data_dir.to_owned())));
    }
    if data_dir.join(RESTORING_FILE).exists() {
        return Err(BackupError::Source(OpenError::Restoring(data_dir.to_owned())));
    }
    let source = |error: sqlx::Error| BackupError::Source(open_failed(&from, &error));
    let mut connection = SqliteConnectOptions::new()
        .filename(&from)
        .busy_timeout(LOCK_TIMEOUT)
        .disable_statement_logging()
        .connect()
        .await
        .map_err(source)?;
    schema::check_ownership(&mut connection, &from).await.map_err(BackupError::Source)?;
    let into = to.to_str().ok_or_else(|| BackupError::Copy {
        from: from.clone(),
        to: to.to_owned(),
        cause: "its path is not UTF-8".into(),
    })?;
    let copied = sqlx::query("VACUUM INTO ?1").bind(into).execute(&mut connection).await;
    // The copy is complete or has failed. The end of this connection changes neither.
    let _ = connection.close().await;
    copied.map_err(|error| match open_failed(&from, &error) {
        OpenError::Full(_) => BackupError::Full(to.to_owned()),
        damaged @ OpenError::Corrupt { .. } => BackupError::Source(damaged),
        _ => BackupError::Copy { from: from.clone(), to: to.to_owned(), cause: error.to_string() },
    })?;
    qpq_durable_file::sync(to).map_err(|error| BackupError::Copy {
        from,
        to: to.to_owned(),
        cause: error.to_string(),
    })
}

/// Checks every page, index, count and payload of the database file `path`, which no process may be
/// using. Writes nothing.
pub async fn inspect(path: &Path) -> Result<Inspection, BackupError> {
    let failed = |error: sqlx::Error| BackupError::Copied(open_failed(path, &error));
    let mut connection = connect_to_copy(path).await.map_err(failed)?;
    let schema = schema::check_known(&mut connection, path).await.map_err(BackupError::Copied)?;
    let damages = damages(&mut connection, schema).await.map_err(failed)?;
    if !damages.is_empty() {
        return Err(BackupError::Damaged { path: path.to_owned(), damages });
    }
    let rows = count(&mut connection).await.map_err(failed)?;
    let has_id = rows.iter().any(|(table, _)| table == "store");
    let store_id =
        if has_id { Some(store_id(&mut connection).await.map_err(failed)?) } else { None };
    // Nothing was written, so a failure loses nothing.
    let _ = connection.close().await;
    Ok(Inspection { schema, store_id, rows })
}

/// The file with the bytes of a blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlobFile {
    /// The path in the data directory.
    pub path: PathBuf,
    /// The size in bytes.
    pub bytes: u64,
    /// The SHA-256 of the content.
    pub sha256: [u8; 32],
}

/// Returns the files of all blobs in the database file `path`, which no process may be using. The
/// files of open uploads are not among them: after a restore, these uploads start again.
pub async fn blob_files(path: &Path) -> Result<Vec<BlobFile>, BackupError> {
    let failed = |error: sqlx::Error| BackupError::Copied(open_failed(path, &error));
    let mut connection = connect_to_copy(path).await.map_err(failed)?;
    let schema = schema::check_known(&mut connection, path).await.map_err(BackupError::Copied)?;
    if schema < BLOBS {
        return Ok(Vec::new());
    }
    let rows = sqlx::query("SELECT hash, object, size FROM blob ORDER BY object")
        .fetch_all(&mut connection)
        .await
        .map_err(failed)?;
    // Nothing was written, so a failure loses nothing.
    let _ = connection.close().await;
    let file = |row: &SqliteRow| {
        let object: &str = row.try_get("object")?;
        Ok(BlobFile {
            path: blob_path(Path::new(""), object),
            bytes: row.unsigned("size")?,
            sha256: row.hash("hash")?,
        })
    };
    rows.iter().map(file).collect::<sqlx::Result<_>>().map_err(failed)
}

/// Connects to a database file that no process is using, for reading.
async fn connect_to_copy(path: &Path) -> sqlx::Result<SqliteConnection> {
    SqliteConnectOptions::new()
        .filename(path)
        .read_only(true)
        .immutable(true)
        .row_buffer_size(ROWS_AHEAD)
        .disable_statement_logging()
        .connect()
        .await
}

async fn store_id(connection: &mut SqliteConnection) -> sqlx::Result<String> {
    sqlx::query_scalar("SELECT lower(hex(store_id)) FROM store").fetch_one(connection).await
}

async fn count(connection: &mut SqliteConnection) -> sqlx::Result<Vec<(String, u64)>> {
    let tables: Vec<String> = sqlx::query_scalar(
        "SELECT name FROM sqlite_schema
          WHERE type = 'table' AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\'
            AND name <> '_sqlx_migrations'
          ORDER BY name",
    )
    .fetch_all(&mut *connection)
    .await?;
    let mut rows = Vec::with_capacity(tables.len());
    for table in tables {
        let sql = format!("SELECT count(*) FROM \"{}\"", table.replace('"', "\"\""));
        let number: i64 =
            sqlx::query_scalar(AssertSqlSafe(sql)).fetch_one(&mut *connection).await?;
        rows.push((table, number.unsigned_abs()));
    }
    Ok(rows)
}

/// The rules of the schema that SQLite does not check, with a query for the number of rows that
/// break each.
///
/// Removed messages leave gaps in an inbox, so its seqs need not be contiguous. No seq is beyond
/// the last one that was assigned, and the indexes prevent that a seq is used twice.
const RULES: [(&str, &str); 5] = [
    (
        "inboxes with a message whose seq was never assigned",
        "SELECT count(DISTINCT m.inbox) FROM message m JOIN inbox i ON i.id = m.inbox
          WHERE m.seq < 1 OR m.seq > i.last_seq",
    ),
    (
        "inboxes whose counts are not those of their messages",
        "SELECT count(*) FROM inbox i LEFT JOIN
             (SELECT inbox, count(*) AS n, sum(size) AS b FROM message GROUP BY inbox) m
             ON m.inbox = i.id
          WHERE i.messages <> coalesce(m.n, 0) OR i.bytes <> coalesce(m.b, 0)",
    ),
    (
        "messages of no account",
        "SELECT count(*) FROM message m
          WHERE NOT EXISTS (SELECT 1 FROM account a WHERE a.id = m.inbox)",
    ),
    (
        // A deleted account has no inbox, and may have messages until it is erased.
        "accounts without an inbox",
        "SELECT count(*) FROM account a WHERE a.username NOT LIKE 'deleted:%'
            AND NOT EXISTS (SELECT 1 FROM inbox i WHERE i.id = a.id)",
    ),
    (
        "message ids remembered of a seq that was never assigned",
        "SELECT count(*) FROM recent_id r JOIN inbox i ON i.id = r.inbox WHERE r.seq > i.last_seq",
    ),
];

/// The number of the migration from which on messages can share a payload.
const SHARED_PAYLOADS: i64 = 11;

/// The rules of the payloads in a schema without shared ones.
const RULES_OF_OWN: [(&str, &str); 1] = [(
    "messages of another size than their payload",
    "SELECT count(*) FROM message WHERE size <> length(payload)",
)];

/// The rules of the payloads in a schema with shared ones.
const RULES_OF_SHARED: [(&str, &str); 4] = [
    (
        "messages of another size than their payload",
        "SELECT count(*) FROM message WHERE payload_id IS NULL AND size <> length(payload)",
    ),
    (
        "messages of another size than the payload that they share",
        "SELECT count(*) FROM payload p JOIN message m ON m.payload_id = p.id
          WHERE m.size <> length(p.bytes) OR length(m.payload) > 0",
    ),
    (
        "messages whose shared payload is missing",
        "SELECT count(*) FROM message m WHERE m.payload_id IS NOT NULL
            AND NOT EXISTS (SELECT 1 FROM payload p WHERE p.id = m.payload_id)",
    ),
    (
        "shared payloads without a message",
        "SELECT count(*) FROM payload p
          WHERE NOT EXISTS (SELECT 1 FROM message m WHERE m.payload_id = p.id)",
    ),
];

/// The number of the migration that created the tables of blobs.
const BLOBS: i64 = 15;

/// The rules of blobs.
const RULES_OF_BLOBS: [(&str, &str); 3] = [
    (
        "blobs without a reference",
        "SELECT count(*) FROM blob b
          WHERE NOT EXISTS (SELECT 1 FROM blob_ref r WHERE r.hash = b.hash)",
    ),
    (
        "accounts whose used quota is not the size of their blobs and uploads",
        "SELECT count(*) FROM account a
          WHERE coalesce((SELECT used FROM blob_quota q WHERE q.account = a.id), 0) <>
                coalesce((SELECT sum(b.size) FROM blob_ref r JOIN blob b ON b.hash = r.hash
                           WHERE r.account = a.id), 0) +
                coalesce((SELECT sum(u.size) FROM upload u WHERE u.account = a.id), 0)",
    ),
    (
        "files with several uses",
        "SELECT count(*) FROM (
             SELECT object FROM blob UNION ALL SELECT object FROM upload
             UNION ALL SELECT object FROM blob_trash) GROUP BY object HAVING count(*) > 1 LIMIT 1",
    ),
];

/// Payloads with their stored hashes, and the number of their messages.
const HASHES_OF_OWN: &str = "SELECT payload, payload_sha256, 1 FROM message";
const HASHES_OF_SHARED: &str = "
    SELECT payload, payload_sha256, 1 FROM message WHERE payload_id IS NULL
     UNION ALL
    SELECT p.bytes, m.payload_sha256, m.messages
      FROM (SELECT payload_id, payload_sha256, count(*) AS messages FROM message
             WHERE payload_id IS NOT NULL GROUP BY payload_id, payload_sha256) m
           JOIN payload p ON p.id = m.payload_id";

async fn damages(connection: &mut SqliteConnection, schema: i64) -> sqlx::Result<Vec<String>> {
    let checked: Vec<String> =
        sqlx::query_scalar(AssertSqlSafe(format!("PRAGMA integrity_check({MAX_NAMED_DAMAGES})")))
            .fetch_all(&mut *connection)
            .await?;
    let mut damages: Vec<String> = checked.into_iter().filter(|line| line != "ok").collect();
    if !damages.is_empty() {
        return Ok(damages);
    }
    let orphans = sqlx::query("PRAGMA foreign_key_check").fetch_all(&mut *connection).await?;
    if !orphans.is_empty() {
        damages.push(format!("{} rows refer to rows that do not exist", orphans.len()));
    }
    let (rules, hashes): (&[_], _) = if schema < SHARED_PAYLOADS {
        (&RULES_OF_OWN, HASHES_OF_OWN)
    } else {
        (&RULES_OF_SHARED, HASHES_OF_SHARED)
    };
    let of_blobs: &[_] = if schema < BLOBS { &[] } else { &RULES_OF_BLOBS };
    for (rule, sql) in RULES.iter().chain(rules).chain(of_blobs).copied() {
        let broken: Option<i64> = sqlx::query_scalar(sql).fetch_optional(&mut *connection).await?;
        let broken = broken.unwrap_or_default();
        if broken > 0 {
            damages.push(format!("{broken} {rule}"));
        }
    }
    let mut changed = 0_i64;
    let mut payloads = sqlx::query(hashes).fetch(&mut *connection);
    while let Some(row) = payloads.try_next().await? {
        let (payload, hash): (Vec<u8>, Vec<u8>) = (row.try_get(0)?, row.try_get(1)?);
        if sha256(&payload) != hash {
            changed += row.try_get::<i64, _>(2)?;
        }
    }
    if changed > 0 {
        damages.push(format!("{changed} messages of another hash than their payload"));
    }
    Ok(damages)
}
