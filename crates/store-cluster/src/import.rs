//! Taking in what an embedded node held: accounts, sessions, keys, inboxes with their messages.
//!
//! Rows are first laid out in tables beside the cluster's own, where no edge looks; that may be
//! interrupted at any moment, and goes on behind the last row that was committed. Then one
//! transaction moves them all to where they belong, reads them back there, and commits if they come
//! to exactly what the node's come to. So users of the cluster see all of the node or nothing of
//! it, however often this is killed, and what is compared nobody can have changed meanwhile.
//!
//! Redis needs nothing. Edges show a queue in Redis if it shows the state that the inbox's head in
//! Postgres has, and load it from Postgres otherwise. An inbox that is moved belongs to an account
//! that the cluster has never had (an identity that it has is refused), so nobody has read it here
//! and no queue of it was loaded; and no edge waits for it, as there was no session to wait with.
//! What could be in Redis all the same, from another database that used it under the same
//! namespace, shows a state that inbox was in *there*. Therefore a moved head does not begin with 0
//! removals but with 2⁴⁰, in the transaction that makes it visible: no inbox that began in a
//! cluster gets that far.

use std::fmt::Write as _;

use futures_util::TryStreamExt as _;
use qpq_ports::transfer::{Cell, Column, Digest, Digests, Kind, Row, Table};
use sqlx::{
    AssertSqlSafe, ConnectOptions as _, Connection as _, PgConnection, Postgres, Row as _,
    TypeInfo as _, ValueRef as _,
    postgres::{PgArguments, PgRow},
    query::Query,
};
use tokio::time::{Duration, Instant, sleep};

use crate::{Config, ConnectError, postgres, skeletons};

/// Held by whoever is moving a node in. Any number that nothing else locks ("qpq move").
const LOCK: i64 = 0x71_7071_6d6f_7665;
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Names in an error at most.
const NAMED: usize = 10;

/// A connection on which a node is moved in.
#[derive(Debug)]
pub struct Import {
    connection: PgConnection,
    opaque_setup: [u8; 32],
}

/// Why a node is not moved in, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    #[error("another run of this is at work: let it end")]
    Busy,
    #[error(
        "the cluster has other users of the same name or identity: {}{}. They cannot be moved beside each other, and nothing was moved",
        names.join(", "), if *more { " and others" } else { "" }
    )]
    Clash { names: Vec<String>, more: bool },
    #[error(
        "what arrived is not what was sent ({}), and nothing of it was kept: run this again",
        .0.iter().map(|table| table.name()).collect::<Vec<_>>().join(", ")
    )]
    Differs(Vec<Table>),
    #[error(transparent)]
    Cluster(#[from] ConnectError),
    #[error(
        "Postgres did not do it ({0}): see to it, then run this again; it goes on where it stopped"
    )]
    Postgres(Box<sqlx::Error>),
}

impl From<sqlx::Error> for ImportError {
    fn from(error: sqlx::Error) -> Self {
        Self::Postgres(Box::new(error))
    }
}

impl Import {
    /// Connects to the cluster's Postgres, whose schema must be there, and checks that it is of the
    /// cluster with this OPAQUE setup, if it is of one. Writes nothing.
    pub async fn connect(config: &Config) -> Result<Self, ConnectError> {
        let options = postgres::options(config)?;
        postgres::prepare(&options, config.migrate, config.start_timeout).await?;
        // A table that is moved takes longer than a call may.
        let patient = options.options([
            ("statement_timeout", "0"),
            ("lock_timeout", "0"),
            ("idle_in_transaction_session_timeout", "0"),
        ]);
        let connection = patient.connect().await.map_err(|error| postgres::failed(&error))?;
        let mut import = Self { connection, opaque_setup: config.opaque_setup };
        let setup: Option<Vec<u8>> = sqlx::query_scalar("SELECT opaque_setup FROM cluster")
            .fetch_optional(&mut import.connection)
            .await
            .map_err(|error| postgres::failed(&error))?;
        match setup {
            Some(setup) if setup != import.opaque_setup => Err(ConnectError::OtherCluster),
            _ => Ok(import),
        }
    }

    /// Keeps other runs out as long as this is connected. The connection of one that was killed may
    /// live on until it has noticed, and then what it did is decided.
    pub async fn lock(&mut self, patience: Duration) -> Result<(), ImportError> {
        let until = Instant::now() + patience;
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
            sleep(LOOK_EVERY).await;
        }
    }

    /// Whether the node that comes to this was moved in before.
    pub async fn is_done(&mut self, digests: &Digests) -> Result<bool, ImportError> {
        if !self.has_table("import_done").await? {
            return Ok(false);
        }
        Ok(sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM import_done WHERE digests = $1)")
            .bind(digests.to_string())
            .fetch_one(&mut self.connection)
            .await?)
    }

    /// Refuses accounts whose name or identity the cluster has already.
    pub async fn check(&mut self, accounts: &[Row]) -> Result<(), ImportError> {
        let names = Values::of(accounts, "username", Table::Account);
        let identities = Values::of(accounts, "identity", Table::Account);
        let sql = "SELECT n.username FROM unnest($1::text[], $2::bytea[]) AS n (username, identity)
                    WHERE EXISTS (SELECT 1 FROM account a WHERE a.username = n.username)
                       OR EXISTS (SELECT 1 FROM account a WHERE a.identity = n.identity)
                    ORDER BY 1 LIMIT 11";
        let query = identities.bind(names.bind(sqlx::query(sql)));
        let rows = query.fetch_all(&mut self.connection).await?;
        let names: Vec<_> = rows.iter().map(|row| row.try_get(0)).collect::<sqlx::Result<_>>()?;
        if names.is_empty() { Ok(()) } else { Err(clash(names)) }
    }

    /// Prepares to take rows in, or to go on doing so, from the node that comes to this. What there
    /// is of another one, whose move was given up, is dropped.
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
        sqlx::raw_sql(AssertSqlSafe(drop_tables())).execute(&mut *open).await?;
        sqlx::raw_sql(AssertSqlSafe(create_tables())).execute(&mut *open).await?;
        sqlx::query("INSERT INTO import_begun VALUES ($1)")
            .bind(digests.to_string())
            .execute(&mut *open)
            .await?;
        Ok(open.commit().await?)
    }

    /// The key of the last row that was taken in, and how many there are.
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

    /// Takes rows in. All of them are committed when it returns.
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

    /// Moves everything to where it belongs, if it comes to `expected` there, and then what it was
    /// laid out in is gone. `seen` is told of every row that is read back.
    pub async fn finish(
        &mut self,
        expected: &Digests,
        seen: impl FnMut(),
    ) -> Result<(), ImportError> {
        let mut open = self.connection.begin().await?;
        let clashes: Vec<String> = sqlx::query_scalar(CLASHES).fetch_all(&mut *open).await?;
        if !clashes.is_empty() {
            return Err(clash(clashes));
        }
        sqlx::query("INSERT INTO cluster (opaque_setup) VALUES ($1) ON CONFLICT DO NOTHING")
            .bind(&self.opaque_setup[..])
            .execute(&mut *open)
            .await?;
        let setup: Vec<u8> =
            sqlx::query_scalar("SELECT opaque_setup FROM cluster").fetch_one(&mut *open).await?;
        if setup != self.opaque_setup {
            return Err(ConnectError::OtherCluster.into());
        }
        for step in MOVE {
            sqlx::raw_sql(*step).execute(&mut *open).await?;
        }
        let arrived = digests(&mut open, seen).await?;
        let differs: Vec<Table> = Table::ALL
            .into_iter()
            .filter(|table| arrived.of(*table) != expected.of(*table))
            .collect();
        if !differs.is_empty() {
            open.rollback().await?;
            sqlx::raw_sql(AssertSqlSafe(drop_tables())).execute(&mut self.connection).await?;
            return Err(ImportError::Differs(differs));
        }
        sqlx::raw_sql(AssertSqlSafe(drop_tables())).execute(&mut *open).await?;
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
        // If this is interrupted, the next registration does it.
        while skeletons::fill(&mut self.connection).await? > 0 {}
        Ok(())
    }

    /// Ends the connection.
    pub async fn close(self) {
        // Everything is committed; how the connection ends changes nothing.
        let _ = self.connection.close().await;
    }

    async fn has_table(&mut self, name: &str) -> sqlx::Result<bool> {
        sqlx::query_scalar("SELECT to_regclass($1) IS NOT NULL")
            .bind(name)
            .fetch_one(&mut self.connection)
            .await
    }
}

/// The error that names them.
fn clash(mut names: Vec<String>) -> ImportError {
    let more = names.len() > NAMED;
    names.truncate(NAMED);
    ImportError::Clash { names, more }
}

/// One more than are named.
const CLASHES: &str = "
    SELECT s.username FROM import_account s
     WHERE EXISTS (SELECT 1 FROM account a WHERE a.username = s.username)
        OR EXISTS (SELECT 1 FROM account a WHERE a.identity = s.identity)
     ORDER BY 1 LIMIT 11";

/// From the tables beside to the cluster's own. Accounts get new numbers; whose is what is found by
/// their identities. Skeletons follow from the names and are computed after the move: a user of the
/// node whose name looks like one of the cluster's keeps the name.
const MOVE: &[&str] = &[
    "INSERT INTO account (username, identity, opaque_record, created_at)
     SELECT username, identity, opaque_record, created_at FROM import_account ORDER BY id",
    "UPDATE import_account s SET moved = a.id FROM account a WHERE a.identity = s.identity",
    // How they are joined is planned by what is in them.
    "ANALYZE import_account, import_session, import_inbox, import_message, import_recent_id, import_key_package,
             import_key_package_given, import_hybrid_key",
    "INSERT INTO session (token, account, device, authenticated_at, last_used_at, expires_at)
     SELECT t.token, s.moved, t.device, t.authenticated_at, t.last_used_at, t.expires_at
       FROM import_session t JOIN import_account s ON s.id = t.account",
    // So many removals for the reason at the top.
    "INSERT INTO inbox (id, last_seq, removals, messages, bytes, next_expiry)
     SELECT s.moved, t.last_seq, 1::bigint << 40, t.messages, t.bytes, t.next_expiry
       FROM import_inbox t JOIN import_account s ON s.id = t.id",
    "INSERT INTO message (inbox, seq, expires_at, enqueued_at, channel, sender, message_id, payload_sha256, payload)
     SELECT s.moved, t.seq, t.expires_at, t.enqueued_at, t.channel, t.sender, t.message_id, t.payload_sha256, t.payload
       FROM import_message t JOIN import_account s ON s.id = t.inbox",
    "INSERT INTO recent_id (inbox, sender, message_id, seq, channel, payload_sha256, enqueued_at, forget_at)
     SELECT s.moved, t.sender, t.message_id, t.seq, t.channel, t.payload_sha256, t.enqueued_at, t.forget_at
       FROM import_recent_id t JOIN import_account s ON s.id = t.inbox",
    // Numbered in this order, which is that of their upload.
    "INSERT INTO key_package (owner, fingerprint, last_resort, not_after, bytes, not_before)
     SELECT s.moved, t.fingerprint, t.last_resort <> 0, t.not_after, t.bytes, t.not_before
       FROM import_key_package t JOIN import_account s ON s.id = t.owner ORDER BY t.id",
    "INSERT INTO key_package_given (owner, fingerprint, not_after)
     SELECT s.moved, t.fingerprint, t.not_after
       FROM import_key_package_given t JOIN import_account s ON s.id = t.owner",
    "INSERT INTO hybrid_key (owner, key)
     SELECT s.moved, t.key FROM import_hybrid_key t JOIN import_account s ON s.id = t.owner",
    "UPDATE import_job SET moved = nextval(pg_get_serial_sequence('job', 'id'))",
    "INSERT INTO job (id, kind, key, payload, run_at, attempts, died_at, last_error)
     SELECT moved, kind, key, payload, run_at, attempts, died_at, last_error FROM import_job
     ON CONFLICT DO NOTHING",
];

/// The canonical rows of what was moved, read from the cluster's own tables. The exporter of the
/// other store has the same columns in the same order.
fn canonical(table: Table) -> &'static str {
    match table {
        Table::Account => {
            "SELECT t.username, t.identity, t.opaque_record, t.created_at
               FROM account t JOIN import_account a ON a.moved = t.id"
        }
        Table::Session => {
            "SELECT t.token, a.identity, t.device, t.authenticated_at, t.last_used_at, t.expires_at
               FROM session t JOIN import_account a ON a.moved = t.account"
        }
        Table::Inbox => {
            "SELECT a.identity, t.last_seq, t.messages, t.bytes, t.next_expiry
               FROM inbox t JOIN import_account a ON a.moved = t.id"
        }
        Table::Message => {
            "SELECT a.identity, t.seq, t.expires_at, t.enqueued_at, t.channel, t.sender, t.message_id, t.payload_sha256,
                    sha256(t.payload)
               FROM message t JOIN import_account a ON a.moved = t.inbox"
        }
        Table::RecentId => {
            "SELECT a.identity, t.sender, t.message_id, t.seq, t.channel, t.payload_sha256, t.enqueued_at, t.forget_at
               FROM recent_id t JOIN import_account a ON a.moved = t.inbox"
        }
        Table::KeyPackage => {
            "SELECT a.identity, row_number() OVER (PARTITION BY t.owner ORDER BY t.id), t.fingerprint,
                    t.last_resort::int::bigint, t.not_after, t.bytes, t.not_before
               FROM key_package t JOIN import_account a ON a.moved = t.owner"
        }
        Table::KeyPackageGiven => {
            "SELECT a.identity, t.fingerprint, t.not_after
               FROM key_package_given t JOIN import_account a ON a.moved = t.owner"
        }
        Table::HybridKey => {
            "SELECT a.identity, t.key FROM hybrid_key t JOIN import_account a ON a.moved = t.owner"
        }
        Table::Job => {
            "SELECT t.kind, t.payload, t.run_at, t.attempts, t.died_at, t.last_error
               FROM job t JOIN import_job j ON j.moved = t.id WHERE t.key IS NULL"
        }
    }
}

async fn digests(connection: &mut PgConnection, mut seen: impl FnMut()) -> sqlx::Result<Digests> {
    let mut digests = Digests::default();
    for table in Table::ALL {
        let mut digest = Digest::default();
        let mut rows = sqlx::query(canonical(table)).fetch(&mut *connection);
        while let Some(row) = rows.try_next().await? {
            digest.add(&cells(&row)?);
            seen();
        }
        digests.set(table, digest);
    }
    Ok(digests)
}

/// The tables beside the cluster's own: the same columns, and of accounts and jobs their new number. They
/// are no part of the schema: only who moves a node needs them, and only for as long.
fn create_tables() -> String {
    let mut sql = String::new();
    for table in Table::ALL {
        let _ = write!(sql, "CREATE TABLE import_{} (", table.name());
        for Column { name, kind } in table.columns() {
            let _ = write!(sql, "{name} {}, ", sql_type(*kind));
        }
        if matches!(table, Table::Account | Table::Job) {
            sql.push_str("moved bigint UNIQUE, ");
        }
        let _ = write!(sql, "PRIMARY KEY ({}));", table.key_list());
    }
    // Ciphertext does not compress.
    sql.push_str("ALTER TABLE import_message ALTER COLUMN payload SET STORAGE EXTERNAL;");
    sql
}

fn drop_tables() -> String {
    let drop = |table: Table| format!("DROP TABLE IF EXISTS import_{};", table.name());
    Table::ALL.into_iter().map(drop).collect::<String>() + "DELETE FROM import_begun;"
}

const fn sql_type(kind: Kind) -> &'static str {
    match kind {
        Kind::Number => "bigint",
        Kind::Text => "text",
        Kind::Bytes => "bytea",
    }
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
            Kind::Number => Self::Numbers(
                cells
                    .map(|cell| if let Cell::Number(number) = cell { Some(*number) } else { None })
                    .collect(),
            ),
            Kind::Text => Self::Texts(
                cells
                    .map(
                        |cell| if let Cell::Text(text) = cell { Some(text.as_str()) } else { None },
                    )
                    .collect(),
            ),
            Kind::Bytes => Self::Bytes(
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
