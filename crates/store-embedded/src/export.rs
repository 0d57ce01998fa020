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
    directory,
    files::{DATABASE_FILE, TRANSFERRED_FILE},
    open::ROWS_AHEAD,
    open_error::{OpenError, failed as open_failed},
    schema,
    tables::{CanonicalRows, TableDescription},
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
    /// Keeps a server from starting in the directory.
    _lock: File,
}

/// The reason why a data directory cannot be exported, with instructions for the operator.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    #[error(
        "{} contains no server data: there is no {DATABASE_FILE} in it. Name the data directory of \
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
    /// Locks the directory. The database's schema must be that of this version.
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

    /// Returns the text that a transfer of the directory has stored in it; `None` without a
    /// transfer.
    pub fn transferred(&self) -> Result<Option<String>, ExportError> {
        let path = self.data_dir.join(TRANSFERRED_FILE);
        match std::fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(ExportError::Read { path, cause: error.to_string() }),
        }
    }

    /// Returns a batch of the rows after the key `after`, or of the first rows. Empty at the end.
    pub async fn rows(
        &mut self,
        table: Table,
        after: Option<&[Cell]>,
    ) -> Result<Vec<Row>, ExportError> {
        let failed = failed(&self.data_dir);
        let description = TableDescription::of(table);
        let (values, key) = (description.value_list(), description.key_list());
        let condition = after.map_or(String::new(), |after| {
            format!("WHERE ({key}) > ({})", vec!["?"; after.len()].join(", "))
        });
        let sql = format!(
            "SELECT {values} FROM {} t {condition} ORDER BY {key} LIMIT {BATCH_ROWS}",
            description.name
        );
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

    /// Returns the number of blobs, which a transfer leaves out.
    pub async fn blobs(&mut self) -> Result<u64, ExportError> {
        let count: i64 = sqlx::query_scalar("SELECT count(*) FROM blob")
            .fetch_one(&mut self.connection)
            .await
            .map_err(failed(&self.data_dir))?;
        Ok(count.unsigned_abs())
    }

    /// Returns the digests of all canonical rows. Calls `seen` for each row.
    pub async fn digests(&mut self, mut seen: impl FnMut()) -> Result<Digests, ExportError> {
        let failed = failed(&self.data_dir);
        let mut digests = Digests::default();
        for table in Table::ALL {
            let mut digest = Digest::default();
            let CanonicalRows { sql, hashed } = TableDescription::of(table).canonical_rows();
            let mut rows = sqlx::query(AssertSqlSafe(sql)).fetch(&mut self.connection);
            while let Some(row) = rows.try_next().await.map_err(&failed)? {
                let mut row = cells(&row).map_err(&failed)?;
                for cell in &hashed {
                    if let Cell::Bytes(bytes) = &mut row[*cell] {
                        *bytes = sha256(bytes);
                    }
                }
                digest.add(&row);
                seen();
            }
            digests.set(table, digest);
        }
        Ok(digests)
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
    use qpq_domain::{IdentityKey, StoreLimits, UnixMillis, Username};
    use qpq_ports::{Admission, NewAccount};

    use super::*;
    use crate::EmbeddedStore;

    /// A server that was killed leaves its last commits in the log next to the database.
    #[tokio::test]
    async fn rows_that_are_only_in_the_log_are_exported() {
        let (directory, copy) =
            (tempfile::tempdir().expect("one"), tempfile::tempdir().expect("two"));
        let store =
            EmbeddedStore::open(directory.path(), StoreLimits::default()).await.expect("it opens");
        let account = NewAccount {
            username: Username::parse("alice").expect("a name"),
            identity: IdentityKey::new([1; 32]),
            opaque_record: vec![2; 192],
            admission: Admission::Open,
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
}
