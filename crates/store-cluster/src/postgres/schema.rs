//! The schema: brought up to date by `qpq-admin migrate` (or at the start, where that is configured), and checked by every
//! edge. A schema that is newer than this program is fine: a release only adds what its predecessor can live with.

use sqlx::{
    ConnectOptions as _, Connection as _, PgConnection,
    migrate::{Migrate as _, MigrateError, Migrator},
    postgres::PgConnectOptions,
};

use crate::{Config, ConnectError, Migrate};

/// The oldest Postgres that will do, as `server_version_num` has it.
const OLDEST: i32 = 150_000;

/// Brings the schema up to date; to which version. Of several at a time, one does it and the others wait.
pub async fn migrate(config: &Config) -> Result<i64, ConnectError> {
    let mut connection = connect(&super::options(config)?).await?;
    let version = run(&mut connection).await?;
    // The work is done and committed; how the connection ends changes nothing.
    let _ = connection.close().await;
    Ok(version)
}

/// Checks server and schema, and migrates if that is wanted.
pub(crate) async fn prepare(options: &PgConnectOptions, migrate: Migrate) -> Result<(), ConnectError> {
    let mut connection = connect(options).await?;
    match migrate {
        Migrate::AtStart => run(&mut connection).await.map(drop)?,
        Migrate::Never => {
            let found = version(&mut connection).await?;
            let needed = newest();
            if found < needed {
                return Err(ConnectError::Behind { found, needed });
            }
        }
    }
    // As above.
    let _ = connection.close().await;
    Ok(())
}

/// Writes down which OPAQUE setup the cluster has, or compares it with what is written.
pub(crate) async fn check_cluster(
    options: &PgConnectOptions,
    opaque_setup: &[u8; 32],
) -> Result<(), ConnectError> {
    let mut connection = connect(options).await?;
    let written: Vec<u8> = sqlx::query_scalar(
        "WITH new AS (INSERT INTO cluster (opaque_setup) VALUES ($1) ON CONFLICT DO NOTHING RETURNING opaque_setup)
         SELECT opaque_setup FROM new UNION ALL SELECT opaque_setup FROM cluster LIMIT 1",
    )
    .bind(&opaque_setup[..])
    .fetch_one(&mut connection)
    .await
    .map_err(unreachable)?;
    let _ = connection.close().await;
    if written == opaque_setup { Ok(()) } else { Err(ConnectError::OtherCluster) }
}

async fn connect(options: &PgConnectOptions) -> Result<PgConnection, ConnectError> {
    // Building an index may take longer than a call may.
    let patient = options.clone().options([("statement_timeout", "0"), ("lock_timeout", "0")]);
    let mut connection = patient.connect().await.map_err(unreachable)?;
    let (number, name): (String, String) =
        sqlx::query_as("SELECT current_setting('server_version_num'), current_setting('server_version')")
            .fetch_one(&mut connection)
            .await
            .map_err(unreachable)?;
    if number.parse::<i32>().is_ok_and(|number| number >= OLDEST) {
        Ok(connection)
    } else {
        Err(ConnectError::TooOld { server: "Postgres", found: name, needed: "15" })
    }
}

async fn run(connection: &mut PgConnection) -> Result<i64, ConnectError> {
    migrations().run_direct(None, connection, false).await.map_err(|error| match error {
        MigrateError::VersionMismatch(version) => ConnectError::OtherSchema(version),
        other => ConnectError::Migration(other.to_string()),
    })?;
    version(connection).await
}

/// The version of the schema; 0 before the first migration.
async fn version(connection: &mut PgConnection) -> Result<i64, ConnectError> {
    let migration = |error: MigrateError| ConnectError::Migration(error.to_string());
    connection.ensure_migrations_table("_sqlx_migrations").await.map_err(migration)?;
    if let Some(version) = connection.dirty_version("_sqlx_migrations").await.map_err(migration)? {
        return Err(ConnectError::Migration(format!("migration {version} was interrupted")));
    }
    let applied = connection.list_applied_migrations("_sqlx_migrations").await.map_err(migration)?;
    Ok(applied.iter().map(|migration| migration.version).max().unwrap_or_default())
}

fn migrations() -> Migrator {
    let mut migrations = sqlx::migrate!();
    // Those of a newer release.
    migrations.set_ignore_missing(true);
    migrations
}

fn newest() -> i64 {
    migrations().iter().map(|migration| migration.version).max().unwrap_or_default()
}

fn unreachable(error: sqlx::Error) -> ConnectError {
    ConnectError::Unreachable { server: "Postgres", setting: "postgres.url", cause: error.to_string() }
}
