//! The schema: migrated by `qpq-admin migrate` (or at the start, if that is configured), and
//! checked by every edge. A schema that is newer than this program is accepted, since the
//! migrations of a release are compatible with the previous one.

use std::time::Duration;

use sqlx::{
    ConnectOptions as _, Connection as _, PgConnection,
    migrate::{Migrate as _, MigrateError, Migrator},
    postgres::PgConnectOptions,
};

use super::release;
use crate::{Config, ConnectError, Migrate, error::Server, skeletons};

/// The oldest Postgres that is supported, as in `server_version_num`.
const OLDEST: i32 = 150_000;

/// Migrates the schema and returns its version. Concurrent calls wait for each other.
pub async fn migrate(config: &Config) -> Result<i64, ConnectError> {
    let options = super::options(config)?;
    let version = migrate_schema(&options, config.start_timeout).await?;
    skeletons::fill_all(&options, config.start_timeout).await?;
    Ok(version)
}

/// Checks server and schema, and migrates if that is configured.
pub(crate) async fn prepare(
    options: &PgConnectOptions,
    migrate: Migrate,
    within: Duration,
) -> Result<(), ConnectError> {
    if migrate == Migrate::AtStart {
        return migrate_schema(options, within).await.map(drop);
    }
    let (connection, found) =
        Server::Postgres.answers(within, Box::pin(connect_and_read_version(options))).await?;
    let _ = connection.close().await;
    let needed = newest();
    if found < needed { Err(ConnectError::Behind { found, needed }) } else { Ok(()) }
}

/// Stores the fingerprint of the cluster's OPAQUE setup, or compares it with the stored one.
pub(crate) async fn check_cluster(
    options: &PgConnectOptions,
    opaque_setup: &[u8; 32],
) -> Result<(), ConnectError> {
    let mut connection = connect(options).await?;
    let is_own = adopt(&mut connection, opaque_setup).await.map_err(|error| failed(&error))?;
    let _ = connection.close().await;
    if is_own { Ok(()) } else { Err(ConnectError::OtherCluster) }
}

async fn adopt(connection: &mut PgConnection, opaque_setup: &[u8; 32]) -> sqlx::Result<bool> {
    if let Some(is_own) = release::is_cluster_of(connection, opaque_setup).await? {
        return Ok(is_own);
    }
    sqlx::query("INSERT INTO cluster (opaque_setup) VALUES ($1) ON CONFLICT DO NOTHING")
        .bind(&opaque_setup[..])
        .execute(&mut *connection)
        .await?;
    Ok(release::is_cluster_of(connection, opaque_setup).await? == Some(true))
}

/// Returns the error for a failure of Postgres at the start.
pub(crate) fn failed(error: &sqlx::Error) -> ConnectError {
    let server = Server::Postgres;
    match error {
        sqlx::Error::Database(refusal) => match refusal.code().as_deref() {
            // 28…: wrong credentials, or no entry in pg_hba.conf. 3D000: no such database. 42501: a
            // missing right to the database or in it.
            Some(code) if code.starts_with("28") || code == "3D000" || code == "42501" => {
                server.refuses(refusal.message())
            }
            _ => server.unreachable(error),
        },
        sqlx::Error::Tls(cause) => server.untrusted(cause),
        _ => server.tls_failure(error).unwrap_or_else(|| server.unreachable(error)),
    }
}

/// Migrates the schema, and returns its version. Connecting has a timeout. The migration has none,
/// since it may build an index or wait for another migration.
async fn migrate_schema(options: &PgConnectOptions, within: Duration) -> Result<i64, ConnectError> {
    let (mut connection, found) =
        Server::Postgres.answers(within, Box::pin(connect_and_read_version(options))).await?;
    let version = if found < newest() {
        tracing::info!(
            found,
            needed = newest(),
            "schema is outdated, migrating it without a time limit"
        );
        run(&mut connection).await?
    } else {
        Server::Postgres.answers(within, Box::pin(run(&mut connection))).await?
    };
    // The transactions are committed, so an error is ignored.
    let _ = connection.close().await;
    Ok(version)
}

/// Prepares the schema, and connects without statement timeouts.
pub(crate) async fn connect_patiently(config: &Config) -> Result<PgConnection, ConnectError> {
    let options = super::options(config)?;
    prepare(&options, config.migrate, config.start_timeout).await?;
    Server::Postgres.answers(config.start_timeout, Box::pin(connect(&options))).await
}

async fn connect_and_read_version(
    options: &PgConnectOptions,
) -> Result<(PgConnection, i64), ConnectError> {
    let mut connection = connect(options).await?;
    let version = version(&mut connection).await?;
    Ok((connection, version))
}

/// Connects without statement timeouts, and checks the version of Postgres.
pub(crate) async fn connect(options: &PgConnectOptions) -> Result<PgConnection, ConnectError> {
    // Building an index may take longer than a call.
    let patient = options.clone().options([
        ("statement_timeout", "0"),
        ("lock_timeout", "0"),
        ("idle_in_transaction_session_timeout", "0"),
    ]);
    let mut connection = patient.connect().await.map_err(|error| failed(&error))?;
    let (number, name): (String, String) = sqlx::query_as(
        "SELECT current_setting('server_version_num'), current_setting('server_version')",
    )
    .fetch_one(&mut connection)
    .await
    .map_err(|error| failed(&error))?;
    if number.parse::<i32>().is_ok_and(|number| number >= OLDEST) {
        Ok(connection)
    } else {
        Err(ConnectError::TooOld { server: "Postgres", found: name, needed: "15" })
    }
}

async fn run(connection: &mut PgConnection) -> Result<i64, ConnectError> {
    migrations().run_direct(None, connection, false).await.map_err(unmigrated)?;
    version(connection).await
}

/// Returns the version of the schema; 0 before the first migration.
async fn version(connection: &mut PgConnection) -> Result<i64, ConnectError> {
    connection.ensure_migrations_table("_sqlx_migrations").await.map_err(unmigrated)?;
    if let Some(version) = connection.dirty_version("_sqlx_migrations").await.map_err(unmigrated)? {
        return Err(ConnectError::Migration(format!("migration {version} was interrupted")));
    }
    let applied =
        connection.list_applied_migrations("_sqlx_migrations").await.map_err(unmigrated)?;
    Ok(applied.iter().map(|migration| migration.version).max().unwrap_or_default())
}

fn migrations() -> Migrator {
    let mut migrations = sqlx::migrate!();
    // The database may have migrations of a newer release.
    migrations.set_ignore_missing(true);
    migrations
}

fn newest() -> i64 {
    migrations().iter().map(|migration| migration.version).max().unwrap_or_default()
}

/// Returns the error for a failure of a migration. A lost connection is retried, since its
/// transaction was rolled back.
fn unmigrated(error: MigrateError) -> ConnectError {
    match &error {
        MigrateError::VersionMismatch(version) => ConnectError::OtherSchema(*version),
        MigrateError::Execute(lost) | MigrateError::ExecuteMigration(lost, _) if is_lost(lost) => {
            failed(lost)
        }
        _ => ConnectError::Migration(error.to_string()),
    }
}

fn is_lost(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_) => true,
        // The server is shutting down or starting.
        sqlx::Error::Database(database) => {
            database.code().is_some_and(|code| code.starts_with("57P"))
        }
        _ => false,
    }
}
