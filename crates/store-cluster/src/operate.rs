//! Access to the cluster's Postgres for backups and restores: one connection, a snapshot that other
//! programs can read, and the environment variables by which they connect.

use percent_encoding::percent_decode_str;
use sqlx::{
    AssertSqlSafe, ConnectOptions as _, PgConnection,
    postgres::{PgConnectOptions, PgSslMode},
};

use crate::{
    Config, ConnectError, blobs::BlobStore, error::Server, history, nats, postgres, redis,
};

/// The statements that begin another history at the end of a restore, in the transaction that
/// restores the tables. The second one returns the number of removed KeyPackages, the third one the
/// number of ended sessions.
pub const BEGIN_HISTORY: [&str; 3] =
    [history::RENEW, history::REMOVE_PACKAGES, history::END_SESSIONS];

impl Config {
    /// Returns the errors in the addresses of the servers and in the files of their authorities
    /// that can be found without a connection.
    pub fn problems(&self) -> Vec<ConnectError> {
        let checks = [
            postgres::options(self).map(drop),
            redis::check_url(&self.redis.url),
            self.redis.authorities(Server::Redis).map(drop),
            nats::check_urls(self),
            self.nats.authorities(Server::Nats).map(drop),
            BlobStore::new(&self.blobs).map(drop),
        ];
        checks.into_iter().filter_map(Result::err).collect()
    }
}

/// A connection to the cluster's Postgres without statement timeouts.
#[derive(Debug)]
pub struct Operator(PgConnection);

/// The contents of the database at one moment.
#[derive(Clone, Debug)]
pub struct DatabaseSnapshot {
    /// The name by which `pg_dump` reads the same contents while the connection is open.
    pub name: String,
    /// The number of the last migration.
    pub schema: i64,
    /// The id of the history, in hexadecimal digits.
    pub store_id: String,
    /// Tables with their numbers of rows, in alphabetical order.
    pub rows: Vec<(String, u64)>,
}

impl Operator {
    /// Connects to a database that has this version's schema and belongs to this cluster, if it
    /// belongs to one. Writes nothing.
    pub async fn connect(config: &Config) -> Result<Self, ConnectError> {
        let options = postgres::options(config)?;
        postgres::prepare(&options, config.migrate, config.start_timeout).await?;
        let mut operator = Self::without_timeouts(options).await?;
        let is_own = postgres::is_cluster_of(&mut operator.0, &config.opaque_setup)
            .await
            .map_err(|error| postgres::failed(&error))?;
        if is_own.unwrap_or(true) { Ok(operator) } else { Err(ConnectError::OtherCluster) }
    }

    /// Connects to a database that may be empty.
    pub async fn connect_to_any(config: &Config) -> Result<Self, ConnectError> {
        Self::without_timeouts(postgres::options(config)?).await
    }

    /// Connects without statement timeouts.
    async fn without_timeouts(options: PgConnectOptions) -> Result<Self, ConnectError> {
        let patient = options.options([
            ("statement_timeout", "0"),
            ("lock_timeout", "0"),
            ("idle_in_transaction_session_timeout", "0"),
        ]);
        patient.connect().await.map(Self).map_err(|error| postgres::failed(&error))
    }

    /// Returns whether the database has no tables of its own.
    pub async fn is_empty(&mut self) -> Result<bool, ConnectError> {
        sqlx::query_scalar(
            "SELECT NOT EXISTS (SELECT 1 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
              WHERE n.nspname <> 'information_schema' AND n.nspname NOT LIKE 'pg\\_%')",
        )
        .fetch_one(&mut self.0)
        .await
        .map_err(|error| postgres::failed(&error))
    }

    /// Opens a snapshot, which lasts until the connection is dropped, and counts the rows of its
    /// tables.
    pub async fn snapshot(&mut self) -> Result<DatabaseSnapshot, ConnectError> {
        self.take_snapshot().await.map_err(|error| postgres::failed(&error))
    }

    async fn take_snapshot(&mut self) -> sqlx::Result<DatabaseSnapshot> {
        let connection = &mut self.0;
        sqlx::query("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            .execute(&mut *connection)
            .await?;
        let name =
            sqlx::query_scalar("SELECT pg_export_snapshot()").fetch_one(&mut *connection).await?;
        let schema: Option<i64> =
            sqlx::query_scalar("SELECT max(version) FROM _sqlx_migrations WHERE success")
                .fetch_one(&mut *connection)
                .await?;
        let store_id = sqlx::query_scalar(history::CURRENT_HEX).fetch_one(&mut *connection).await?;
        let tables: Vec<String> = sqlx::query_scalar(
            // A partitioned table has no rows of its own: its partitions have them.
            "SELECT relname::text FROM pg_class
              WHERE relkind = 'r' AND relnamespace = current_schema()::regnamespace
                AND relname <> '_sqlx_migrations' ORDER BY 1",
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
        Ok(DatabaseSnapshot { name, schema: schema.unwrap_or_default(), store_id, rows })
    }

    /// Returns the present history of the database, in hexadecimal digits.
    pub async fn history(&mut self) -> Result<String, ConnectError> {
        sqlx::query_scalar(history::CURRENT_HEX)
            .fetch_one(&mut self.0)
            .await
            .map_err(|error| postgres::failed(&error))
    }
}

/// Returns the environment variables by which the programs of Postgres (`pg_dump`, `psql`) connect
/// as an edge does. The variables include the password, since a command line is visible to every
/// user of the machine.
pub fn client_environment(config: &Config) -> Result<Vec<(&'static str, String)>, ConnectError> {
    let options = postgres::as_given(config)?;
    let host = options
        .get_socket()
        .map_or_else(|| options.get_host().to_owned(), |socket| socket.display().to_string());
    let mut environment = vec![
        ("PGHOST", host),
        ("PGPORT", options.get_port().to_string()),
        ("PGUSER", options.get_username().to_owned()),
        ("PGDATABASE", options.get_database().unwrap_or(options.get_username()).to_owned()),
        ("PGAPPNAME", "qpq-admin".to_owned()),
    ];
    let mode = match options.get_ssl_mode() {
        PgSslMode::Disable => "disable",
        PgSslMode::Allow => "allow",
        PgSslMode::Prefer => "prefer",
        PgSslMode::Require => "require",
        PgSslMode::VerifyCa => "verify-ca",
        PgSslMode::VerifyFull => "verify-full",
    };
    environment.push(("PGSSLMODE", mode.to_owned()));
    if let Some(ca) = &config.postgres.ca {
        environment.push(("PGSSLROOTCERT", ca.display().to_string()));
    }
    if let Some(options) = options.get_options() {
        environment.push(("PGOPTIONS", options.to_owned()));
    }
    if let Some(password) = options.to_url_lossy().password() {
        let password = percent_decode_str(password).decode_utf8_lossy().into_owned();
        environment.push(("PGPASSWORD", password));
    }
    Ok(environment)
}
