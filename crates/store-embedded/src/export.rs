//! The export of a data directory, which moves its content into a cluster.
//!
//! An export changes nothing. It locks the directory, so no server starts there meanwhile, and it
//! is refused while a server runs there.
//!
//! Rows are read in the order of their keys, in bounded batches. Each batch begins after a given
//! key, so an export can stop anywhere and continue later.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use futures_util::TryStreamExt as _;
use qpq_ports::transfer::{Cell, Digest, Digests, Row, Table, sha256};
use sqlx::{
    AssertSqlSafe, ConnectOptions as _, Row as _, SqliteConnection, TypeInfo as _, ValueRef as _,
    query::Query,
    sqlite::{SqliteArguments, SqliteConnectOptions, SqliteRow},
};

use crate::{
    directory::{self, DATABASE_FILE, MOVED_FILE},
    open::ROWS_AHEAD,
    open_error::{OpenError, failed as open_failed},
    schema,
};

/// Maximum rows in one batch.
const BATCH_ROWS: i64 = 1_024;

/// The bytes after which a batch ends.
const BATCH_BYTES: usize = 4 << 20;

/// A data directory that is being exported.
#[derive(Debug)]
pub struct Export {
    connection: SqliteConnection,
    data_dir: PathBuf,
    /// Prevents that a server starts.
    _lock: File,
}

/// Why a data directory cannot be exported, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    #[error(
        "{} holds no server's data: there is no {DATABASE_FILE} in it. Name the data directory of \
         the server to move",
        .0.display()
    )]
    NoData(PathBuf),
    #[error("the data directory {0}")]
    Open(OpenError),
    #[error("{} cannot be read ({cause}): check the disk, then run this again", path.display())]
    Read { path: PathBuf, cause: String },
}

impl From<OpenError> for ExportError {
    fn from(error: OpenError) -> Self {
        Self::Open(error)
    }
}

impl Export {
    /// Locks the directory. Its schema must be the one of this version.
    pub async fn open(data_dir: &Path) -> Result<Self, ExportError> {
        let path = data_dir.join(DATABASE_FILE);
        if !path.is_file() {
            return Err(ExportError::NoData(data_dir.to_owned()));
        }
        let lock = directory::lock(data_dir)?;
        let mut connection = SqliteConnectOptions::new()
            .filename(&path)
            .read_only(true)
            .pragma("query_only", "on")
            .row_buffer_size(ROWS_AHEAD)
            .disable_statement_logging()
            .connect()
            .await
            .map_err(|error| open_failed(&path, &error))?;
        schema::check_current(&mut connection, &path).await?;
        Ok(Self { connection, data_dir: data_dir.to_owned(), _lock: lock })
    }

    /// Returns the text that was stored when the directory was moved, if it was.
    pub fn moved(&self) -> Result<Option<String>, ExportError> {
        let path = self.data_dir.join(MOVED_FILE);
        match std::fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(ExportError::Read { path, cause: error.to_string() }),
        }
    }

    /// Returns a batch of the rows after the key `after`, or of the first ones. Empty at the end.
    pub async fn rows(
        &mut self,
        table: Table,
        after: Option<&[Cell]>,
    ) -> Result<Vec<Row>, ExportError> {
        let failed = failed(&self.data_dir);
        let (name, columns, key) = (table.name(), table.column_list(), table.key_list());
        let condition = after.map_or(String::new(), |after| {
            format!("WHERE ({key}) > ({})", vec!["?"; after.len()].join(", "))
        });
        let sql =
            format!("SELECT {columns} FROM {name} {condition} ORDER BY {key} LIMIT {BATCH_ROWS}");
        let query = after.into_iter().flatten().fold(sqlx::query(AssertSqlSafe(sql)), bind);
        let mut found = query.fetch(&mut self.connection);
        let (mut rows, mut bytes) = (Vec::new(), 0);
        while bytes < BATCH_BYTES {
            let Some(row) = found.try_next().await.map_err(&failed)? else { break };
            let row = cells(&row).map_err(&failed)?;
            bytes += row.iter().map(Cell::len).sum::<usize>();
            rows.push(row);
        }
        Ok(rows)
    }

    /// Returns the digests of all canonical rows. Calls `seen` for each row.
    pub async fn digests(&mut self, mut seen: impl FnMut()) -> Result<Digests, ExportError> {
        let failed = failed(&self.data_dir);
        let mut digests = Digests::default();
        for table in Table::ALL {
            let mut digest = Digest::default();
            let mut rows = sqlx::query(canonical(table)).fetch(&mut self.connection);
            while let Some(row) = rows.try_next().await.map_err(&failed)? {
                let mut row = cells(&row).map_err(&failed)?;
                if let (Table::Message, Some(Cell::Bytes(payload))) = (table, row.last_mut()) {
                    *payload = sha256(payload);
                }
                digest.add(&row);
                seen();
            }
            digests.set(table, digest);
        }
        Ok(digests)
    }
}

/// The canonical rows of a table. The importer of the other store has the same columns in the same
/// order.
fn canonical(table: Table) -> &'static str {
    match table {
        Table::Account => "SELECT username, identity, opaque_record, created_at FROM account",
        Table::Session => {
            "SELECT t.token, a.identity, t.device, t.authenticated_at, t.last_used_at, t.expires_at
               FROM session t JOIN account a ON a.id = t.account"
        }
        Table::Inbox => {
            "SELECT a.identity, t.last_seq, t.messages, t.bytes, t.next_expiry
               FROM inbox t JOIN account a ON a.id = t.id"
        }
        // The payload itself: what the row says of its hash is not taken for granted.
        Table::Message => {
            "SELECT a.identity, t.seq, t.expires_at, t.enqueued_at, t.channel, t.sender, t.message_id, t.payload_sha256,
                    t.payload
               FROM message t JOIN account a ON a.id = t.inbox"
        }
        Table::RecentId => {
            "SELECT a.identity, t.sender, t.message_id, t.seq, t.channel, t.payload_sha256, t.enqueued_at, t.forget_at
               FROM recent_id t JOIN account a ON a.id = t.inbox"
        }
        // They are given out in the order of their upload, so each has its place.
        Table::KeyPackage => {
            "SELECT a.identity, row_number() OVER (PARTITION BY t.owner ORDER BY t.id), t.fingerprint, t.last_resort,
                    t.not_after, t.bytes, t.not_before
               FROM key_package t JOIN account a ON a.id = t.owner"
        }
        Table::KeyPackageGiven => {
            "SELECT a.identity, t.fingerprint, t.not_after FROM key_package_given t JOIN account a ON a.id = t.owner"
        }
        Table::HybridKey => "SELECT a.identity, t.key FROM hybrid_key t JOIN account a ON a.id = t.owner",
    }
}

fn failed(data_dir: &Path) -> impl Fn(sqlx::Error) -> ExportError + use<> {
    let path = data_dir.join(DATABASE_FILE);
    move |error| ExportError::Read { path: path.clone(), cause: error.to_string() }
}

type SqliteQuery<'q> = Query<'q, sqlx::Sqlite, SqliteArguments>;

fn bind<'q>(query: SqliteQuery<'q>, cell: &'q Cell) -> SqliteQuery<'q> {
    match cell {
        Cell::Nothing => query.bind(None::<i64>),
        Cell::Number(number) => query.bind(number),
        Cell::Text(text) => query.bind(text),
        Cell::Bytes(bytes) => query.bind(bytes),
    }
}

/// Converts a row. The tables are STRICT, so each value has the type of its column.
fn cells(row: &SqliteRow) -> sqlx::Result<Row> {
    (0..row.len())
        .map(|column| {
            let value = row.try_get_raw(column)?;
            let (nothing, kind) = (value.is_null(), value.type_info().name().to_owned());
            Ok(match kind.as_str() {
                _ if nothing => Cell::Nothing,
                "TEXT" => Cell::Text(row.try_get(column)?),
                "BLOB" => Cell::Bytes(row.try_get(column)?),
                _ => Cell::Number(row.try_get(column)?),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use qpq_domain::{IdentityKey, UnixMillis, Username};
    use qpq_ports::NewAccount;

    use super::*;
    use crate::{EmbeddedStore, Limits};

    /// A server that was killed leaves its last commits in the log next to the database.
    #[tokio::test]
    async fn rows_that_are_only_in_the_log_are_exported() {
        let (directory, copy) =
            (tempfile::tempdir().expect("one"), tempfile::tempdir().expect("two"));
        let store =
            EmbeddedStore::open(directory.path(), Limits::default()).await.expect("it opens");
        let account = NewAccount {
            username: Username::parse("alice").expect("a name"),
            identity: IdentityKey::new([1; 32]),
            opaque_record: vec![2; 192],
            now: UnixMillis(3),
        };
        store.stores().accounts.register(account).await.expect("registered");
        for name in ["qpq.db", "qpq.db-wal"] {
            std::fs::copy(directory.path().join(name), copy.path().join(name)).expect("copied");
        }
        let mut export = Export::open(copy.path()).await.expect("it is free");
        let rows = export.rows(Table::Account, None).await.expect("read");
        let expected = [
            Cell::Number(1),
            Cell::Text("alice".into()),
            Cell::Bytes(vec![1; 32]),
            Cell::Bytes(vec![2; 192]),
            Cell::Number(3),
        ];
        assert_eq!(rows, [expected]);
        assert!(export.rows(Table::Account, Some(&rows[0][..1])).await.expect("read").is_empty());
        assert_eq!(export.digests(|| {}).await.expect("read").rows(), 2);
        let refused = Export::open(directory.path()).await.expect_err("a server runs there");
        assert!(matches!(refused, ExportError::Open(OpenError::InUse(_))), "{refused}");
    }

    /// A table of the schema that is not moved would be lost without a word.
    #[tokio::test]
    async fn all_that_is_durable_is_moved() {
        let directory = tempfile::tempdir().expect("a directory");
        let store =
            EmbeddedStore::open(directory.path(), Limits::default()).await.expect("it opens");
        store.close().await;
        let mut export = Export::open(directory.path()).await.expect("it is free");
        let rows = sqlx::query(
            "SELECT t.name AS tab, c.name AS col FROM sqlite_schema t JOIN pragma_table_info(t.name) c
              WHERE t.type = 'table'
                AND t.name NOT IN ('_sqlx_migrations', 'sqlite_sequence', 'heartbeat', 'store', 'clock')",
        )
        .fetch_all(&mut export.connection)
        .await
        .expect("read");
        for row in &rows {
            let (table, column): (String, String) = (row.get("tab"), row.get("col"));
            let moved = Table::ALL.into_iter().find(|moved| moved.name() == table);
            let moved = moved.unwrap_or_else(|| panic!("{table} is not moved"));
            // The size is the payload's, and a skeleton follows from the username.
            let derived = ["size", "skeleton", "lookalike"].contains(&column.as_str());
            let has = moved.columns().iter().any(|moved| moved.name == column) || derived;
            assert!(has, "{table}.{column} is not moved");
        }
        assert!(rows.len() > 40);
    }
}
