//! The import of a single node's data: accounts, sessions, keys, inboxes with their messages.
//!
//! Rows are first stored in tables `import_…`, which no edge reads. This step may be interrupted at
//! any time, and continues after the last committed row. Then one transaction moves all rows to the
//! tables of the cluster, reads them back, and commits if their digests are those of the node. So
//! the cluster has all data of the node or none, however often the import is killed, and no other
//! transaction can have changed the compared rows.
//!
//! Redis needs no change. Edges read a queue in Redis if it shows the state of the inbox's head in
//! Postgres, and load it from Postgres otherwise. An imported inbox belongs to an account that the
//! cluster never had, because an identity key that the cluster has is refused. So no queue of the
//! inbox was loaded, and no edge waits for it. Only another database that used the same Redis under
//! the same namespace may have left a queue, which shows a state of *its* inbox. Therefore an
//! imported head begins with 2⁴⁰ removals, in the transaction that makes it visible: no inbox that
//! began in a cluster reaches that number. The same applies to an imported device.

use std::fmt::Write as _;

use futures_util::TryStreamExt as _;
use qpq_ports::transfer::{Cell, ColumnType, Digest, Digests, Row, Table};
use sqlx::{
    AssertSqlSafe, ConnectOptions as _, Connection as _, PgConnection, Postgres, Row as _,
    TypeInfo as _, ValueRef as _,
    postgres::{PgArguments, PgRow},
    query::Query,
};
use tokio::time::{Duration, Instant, sleep};

use crate::{
    Config, ConnectError, postgres, skeletons,
    tables::{self, TableDescription, sql_type},
};

/// The number of the advisory lock of an import, "qpqmove" in ASCII. Nothing else locks it.
const LOCK: i64 = 0x71_7071_6d6f_7665;
const RETRY_EVERY: Duration = Duration::from_millis(100);

/// Maximum names in an error.
const MAX_NAMES: usize = 10;
/// Maximum names that are read: one more shows that there are others.
const NAMES_READ: i64 = MAX_NAMES as i64 + 1;

/// A connection to the cluster's Postgres, by which a single node is imported.
#[derive(Debug)]
pub struct Import {
    connection: PgConnection,
    opaque_setup: [u8; 32],
}

/// The reason why a node is not imported, and advice.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    #[error("another import is running: wait until it has ended")]
    Busy,
    #[error(
        "the cluster has other accounts with the same name or identity key: {}{}. Nothing was moved",
        names.join(", "), if *more { " and others" } else { "" }
    )]
    Clash { names: Vec<String>, more: bool },
    #[error(
        "the rows that arrived differ from those that were sent ({}), and none were kept: run this again",
        .0.iter().map(|table| table.name()).collect::<Vec<_>>().join(", ")
    )]
    Differs(Vec<Table>),
    #[error(
        "the node has devices, and an edge of the cluster runs a release that does not know them: replace that edge, then run this again"
    )]
    OlderEdges,
    #[error(transparent)]
    Cluster(#[from] ConnectError),
    #[error(
        "the operation failed in Postgres ({0}): correct that, then run this again; it continues where it stopped"
    )]
    Postgres(Box<sqlx::Error>),
}

impl From<sqlx::Error> for ImportError {
    fn from(error: sqlx::Error) -> Self {
        Self::Postgres(Box::new(error))
    }
}

impl Import {
    /// Connects to the cluster's Postgres, whose schema must exist, and checks that it belongs to
    /// the cluster with this OPAQUE setup, if it belongs to one. Writes nothing.
    pub async fn connect(config: &Config) -> Result<Self, ConnectError> {
        let options = postgres::options(config)?;
        postgres::prepare(&options, config.migrate, config.start_timeout).await?;
        // Moving a table takes longer than a call may.
        let patient = options.options([
            ("statement_timeout", "0"),
            ("lock_timeout", "0"),
            ("idle_in_transaction_session_timeout", "0"),
        ]);
        let connection = patient.connect().await.map_err(|error| postgres::failed(&error))?;
        let mut import = Self { connection, opaque_setup: config.opaque_setup };
        let is_own = postgres::is_cluster_of(&mut import.connection, &import.opaque_setup)
            .await
            .map_err(|error| postgres::failed(&error))?;
        if is_own.unwrap_or(true) { Ok(import) } else { Err(ConnectError::OtherCluster) }
    }

    /// Excludes other imports while this connection is open. Waits for the lock up to `timeout`,
    /// because the connection of a killed import may stay open until Postgres detects its end.
    pub async fn lock(&mut self, timeout: Duration) -> Result<(), ImportError> {
        let until = Instant::now() + timeout;
        loop {
            let locked: bool = sqlx::query_scalar("SELECT pg_try_advisory_lock($1)")
                .bind(LOCK)
                .fetch_one(&mut self.connection)
                .await?;
            if locked {
                return Ok(());
            }
            if Instant::now() > until {
                return Err(ImportError::Busy);
            }
            sleep(RETRY_EVERY).await;
        }
    }

    /// Returns whether the node with these digests was imported before.
    pub async fn is_done(&mut self, digests: &Digests) -> Result<bool, ImportError> {
        if !self.has_table("import_done").await? {
            return Ok(false);
        }
        Ok(sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM import_done WHERE digests = $1)")
            .bind(digests.to_string())
            .fetch_one(&mut self.connection)
            .await?)
    }

    /// Refuses accounts whose name or identity key the cluster has already.
    pub async fn check(&mut self, accounts: &[Row]) -> Result<(), ImportError> {
        let names = Values::of(accounts, "username", Table::Account);
        let identities = Values::of(accounts, "identity", Table::Account);
        let sql = "SELECT n.username FROM unnest($1::text[], $2::bytea[]) AS n (username, identity)
                    WHERE EXISTS (SELECT 1 FROM account a WHERE a.username = n.username)
                       OR EXISTS (SELECT 1 FROM account a WHERE a.identity = n.identity)
                    ORDER BY 1 LIMIT $3";
        let query = identities.bind(names.bind(sqlx::query(sql))).bind(NAMES_READ);
        let rows = query.fetch_all(&mut self.connection).await?;
        let names: Vec<_> = rows.iter().map(|row| row.try_get(0)).collect::<sqlx::Result<_>>()?;
        if names.is_empty() { Ok(()) } else { Err(clash(names)) }
    }

    /// Prepares the import of the node with these digests, or continues it. Drops the rows of an
    /// unfinished import of another node.
    pub async fn begin(&mut self, digests: &Digests) -> Result<(), ImportError> {
        let mut open = self.connection.begin().await?;
        sqlx::raw_sql("CREATE TABLE IF NOT EXISTS import_begun (digests text NOT NULL)")
            .execute(&mut *open)
            .await?;
        let begun: Option<String> = sqlx::query_scalar("SELECT digests FROM import_begun")
            .fetch_optional(&mut *open)
            .await?;
        if begun.as_deref() == Some(digests.to_string().as_str()) {
            return Ok(open.commit().await?);
        }
        sqlx::raw_sql(AssertSqlSafe(drop_all())).execute(&mut *open).await?;
        sqlx::raw_sql(AssertSqlSafe(tables::create_import_tables())).execute(&mut *open).await?;
        sqlx::query("INSERT INTO import_begun VALUES ($1)")
            .bind(digests.to_string())
            .execute(&mut *open)
            .await?;
        Ok(open.commit().await?)
    }

    /// Returns the key of the last row that was stored, and the number of rows.
    pub async fn position(&mut self, table: Table) -> Result<(Option<Row>, u64), ImportError> {
        let (name, key) = (table.name(), table.key_list());
        let descending = key.replace(',', " DESC,");
        let sql = format!("SELECT {key} FROM import_{name} ORDER BY {descending} DESC LIMIT 1");
        let last = sqlx::query(AssertSqlSafe(sql)).fetch_optional(&mut self.connection).await?;
        let sql = format!("SELECT count(*) FROM import_{name}");
        let rows: i64 =
            sqlx::query_scalar(AssertSqlSafe(sql)).fetch_one(&mut self.connection).await?;
        Ok((last.as_ref().map(cells).transpose()?, u64::try_from(rows).unwrap_or_default()))
    }

    /// Stores rows. All of them are committed when it returns.
    pub async fn put(&mut self, table: Table, rows: &[Row]) -> Result<(), ImportError> {
        let mut arrays = String::new();
        for (n, column) in table.columns().iter().enumerate() {
            let comma = if n == 0 { "" } else { ", " };
            let _ = write!(arrays, "{comma}${}::{}[]", n + 1, sql_type(column.kind));
        }
        let (name, columns) = (table.name(), table.column_list());
        let sql = format!("INSERT INTO import_{name} ({columns}) SELECT * FROM unnest({arrays})");
        let values = table.columns().iter().map(|column| Values::of(rows, column.name, table));
        let query =
            values.fold(sqlx::query(AssertSqlSafe(sql)), |query, values| values.bind(query));
        query.execute(&mut self.connection).await?;
        Ok(())
    }

    /// Moves all rows to the tables of the cluster, if their digests there are `expected`, and
    /// drops the tables `import_…`. Calls `seen` for every row that is read back.
    pub async fn finish(
        &mut self,
        expected: &Digests,
        seen: impl FnMut(),
    ) -> Result<(), ImportError> {
        let mut open = self.connection.begin().await?;
        let clashes: Vec<String> =
            sqlx::query_scalar(CLASHES).bind(NAMES_READ).fetch_all(&mut *open).await?;
        if !clashes.is_empty() {
            return Err(clash(clashes));
        }
        sqlx::query("INSERT INTO cluster (opaque_setup) VALUES ($1) ON CONFLICT DO NOTHING")
            .bind(&self.opaque_setup[..])
            .execute(&mut *open)
            .await?;
        if postgres::is_cluster_of(&mut open, &self.opaque_setup).await? != Some(true) {
            return Err(ConnectError::OtherCluster.into());
        }
        let has_devices: bool = sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM import_device)")
            .fetch_one(&mut *open)
            .await?;
        if has_devices && postgres::mark_cluster(&mut open, &self.opaque_setup).await?.is_err() {
            return Err(ImportError::OlderEdges);
        }
        move_in(&mut open).await?;
        let arrived = digests(&mut open, seen).await?;
        let differs: Vec<Table> = Table::ALL
            .into_iter()
            .filter(|table| arrived.of(*table) != expected.of(*table))
            .collect();
        if !differs.is_empty() {
            open.rollback().await?;
            sqlx::raw_sql(AssertSqlSafe(drop_all())).execute(&mut self.connection).await?;
            return Err(ImportError::Differs(differs));
        }
        sqlx::raw_sql(AssertSqlSafe(drop_all())).execute(&mut *open).await?;
        sqlx::raw_sql(
            "DROP TABLE import_begun; CREATE TABLE IF NOT EXISTS import_done (digests text PRIMARY KEY)",
        )
        .execute(&mut *open)
        .await?;
        sqlx::query("INSERT INTO import_done VALUES ($1)")
            .bind(expected.to_string())
            .execute(&mut *open)
            .await?;
        open.commit().await?;
        // If this is interrupted, the next registration computes the missing skeletons.
        while skeletons::fill(&mut self.connection).await? > 0 {}
        Ok(())
    }

    /// Ends the connection.
    pub async fn close(self) {
        // Everything is committed, so an error is ignored.
        let _ = self.connection.close().await;
    }

    async fn has_table(&mut self, name: &str) -> sqlx::Result<bool> {
        sqlx::query_scalar("SELECT to_regclass($1) IS NOT NULL")
            .bind(name)
            .fetch_one(&mut self.connection)
            .await
    }
}

/// Returns the statements that drop all that [`Import::begin`] created.
fn drop_all() -> String {
    tables::drop_import_tables() + "DELETE FROM import_begun;"
}

/// Returns the error that names the accounts.
fn clash(mut names: Vec<String>) -> ImportError {
    let more = names.len() > MAX_NAMES;
    names.truncate(MAX_NAMES);
    ImportError::Clash { names, more }
}

/// Returns the names of accounts that the cluster has already. $1 [`NAMES_READ`].
const CLASHES: &str = "
    SELECT s.username FROM import_account s
     WHERE EXISTS (SELECT 1 FROM account a WHERE a.username = s.username)
        OR EXISTS (SELECT 1 FROM account a WHERE a.identity = s.identity)
     ORDER BY 1 LIMIT $1";

/// Moves all rows from the tables `import_…` to those of the cluster. Accounts get new numbers,
/// which `import_account` assigns to the old ones by the identity keys.
async fn move_in(connection: &mut PgConnection) -> sqlx::Result<()> {
    for (table, description) in TableDescription::moved() {
        if let Some(renumber) = description.renumber() {
            sqlx::raw_sql(AssertSqlSafe(renumber)).execute(&mut *connection).await?;
        }
        sqlx::raw_sql(AssertSqlSafe(description.move_in())).execute(&mut *connection).await?;
        if table == Table::Account {
            sqlx::raw_sql(NUMBER_ACCOUNTS).execute(&mut *connection).await?;
            // Postgres plans the joins below by these statistics.
            let analyze = AssertSqlSafe(tables::analyze_import_tables());
            sqlx::raw_sql(analyze).execute(&mut *connection).await?;
        }
    }
    sqlx::raw_sql(COUNT_DEVICES).execute(&mut *connection).await?;
    sqlx::raw_sql(COUNT_BLOCKS).execute(connection).await.map(drop)
}

/// Sets the number of devices of each imported inbox. From then on, the devices are the readers.
const COUNT_DEVICES: &str = "
    UPDATE inbox i SET devices = c.devices
      FROM (SELECT s.moved, count(*) AS devices
              FROM import_device d JOIN import_account s ON s.id = d.account GROUP BY s.moved) c
     WHERE i.id = c.moved";

/// Sets the number of blocks of each imported inbox.
const COUNT_BLOCKS: &str = "
    UPDATE inbox i SET blocks = c.blocks
      FROM (SELECT s.moved, count(*) AS blocks
              FROM import_block b JOIN import_account s ON s.id = b.account GROUP BY s.moved) c
     WHERE i.id = c.moved";

const NUMBER_ACCOUNTS: &str =
    "UPDATE import_account s SET moved = a.id FROM account a WHERE a.identity = s.identity";

async fn digests(connection: &mut PgConnection, mut seen: impl FnMut()) -> sqlx::Result<Digests> {
    let mut digests = Digests::default();
    for (table, description) in TableDescription::moved() {
        let mut digest = Digest::default();
        let sql = AssertSqlSafe(description.canonical_rows());
        let mut rows = sqlx::query(sql).fetch(&mut *connection);
        while let Some(row) = rows.try_next().await? {
            digest.add(&cells(&row)?);
            seen();
        }
        digests.set(table, digest);
    }
    Ok(digests)
}

/// One column of many rows.
enum Values<'a> {
    Numbers(Vec<Option<i64>>),
    Texts(Vec<Option<&'a str>>),
    Bytes(Vec<Option<&'a [u8]>>),
}

type PgQuery<'q> = Query<'q, Postgres, PgArguments>;

impl<'a> Values<'a> {
    fn of(rows: &'a [Row], name: &str, table: Table) -> Self {
        let columns = table.columns();
        let place =
            columns.iter().position(|column| column.name == name).expect("a column of the table");
        let cells = rows.iter().map(|row| &row[place]);
        match columns[place].kind {
            ColumnType::Number => Self::Numbers(
                cells
                    .map(|cell| if let Cell::Number(number) = cell { Some(*number) } else { None })
                    .collect(),
            ),
            ColumnType::Text => Self::Texts(
                cells
                    .map(
                        |cell| if let Cell::Text(text) = cell { Some(text.as_str()) } else { None },
                    )
                    .collect(),
            ),
            ColumnType::Bytes => Self::Bytes(
                cells
                    .map(|cell| if let Cell::Bytes(bytes) = cell { Some(&bytes[..]) } else { None })
                    .collect(),
            ),
        }
    }

    fn bind<'q>(self, query: PgQuery<'q>) -> PgQuery<'q>
    where
        'a: 'q,
    {
        match self {
            Self::Numbers(numbers) => query.bind(numbers),
            Self::Texts(texts) => query.bind(texts),
            Self::Bytes(bytes) => query.bind(bytes),
        }
    }
}

fn cells(row: &PgRow) -> sqlx::Result<Row> {
    (0..row.len())
        .map(|column| {
            let value = row.try_get_raw(column)?;
            let (nothing, kind) = (value.is_null(), value.type_info().name().to_owned());
            Ok(match kind.as_str() {
                _ if nothing => Cell::Nothing,
                "TEXT" => Cell::Text(row.try_get(column)?),
                "BYTEA" => Cell::Bytes(row.try_get(column)?),
                _ => Cell::Number(row.try_get(column)?),
            })
        })
        .collect()
}
