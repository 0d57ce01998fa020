//! The schema: its migrations, and the check of the program and version that wrote a database.

use std::path::Path;

use sqlx::{
    SqliteConnection,
    migrate::{MigrateError, Migrator},
};

use crate::open_error::{OpenError, failed};

static MIGRATIONS: Migrator = sqlx::migrate!();

/// "qpq1", see the first migration.
const APPLICATION_ID: i64 = 1_903_194_417;

/// Migrates the database to the newest schema.
pub(crate) async fn migrate(
    connection: &mut SqliteConnection,
    path: &Path,
) -> Result<(), OpenError> {
    // `run` does the same, but takes the connection through a trait, from which the compiler cannot
    // conclude that the future is `Send`.
    MIGRATIONS
        .run_direct(None, connection, false)
        .await
        .map_err(|error| migration_failed(path, &error))
}

/// Checks that the database is one of this program and has exactly the newest schema.
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

/// Checks that the database is one of this program and not newer. Returns the number of its last
/// migration.
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

/// Checks that the database is empty or one of this program.
pub(crate) async fn check_ownership(
    connection: &mut SqliteConnection,
    path: &Path,
) -> Result<(), OpenError> {
    let failed = |error: sqlx::Error| failed(path, &error);
    let application_id: i64 = sqlx::query_scalar("PRAGMA application_id")
        .fetch_one(&mut *connection)
        .await
        .map_err(failed)?;
    // The migrator creates its own table before the first migration, which sets the id. After a
    // crash between the two, the database has that table alone.
    let has_tables: bool = sqlx::query_scalar(
        "SELECT EXISTS (SELECT 1 FROM sqlite_schema WHERE tbl_name <> '_sqlx_migrations')",
    )
    .fetch_one(&mut *connection)
    .await
    .map_err(failed)?;
    if has_tables && application_id != APPLICATION_ID {
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
