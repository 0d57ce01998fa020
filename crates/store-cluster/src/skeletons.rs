//! The skeletons of accounts that were inserted without one: before the schema had them, by an edge
//! of the previous release, or from a single node.
//!
//! An edge fills them in at its start, in batches that are committed one by one, so that a killed
//! start continues where it stopped. Before each registration, an edge fills in the skeletons of
//! accounts that were added since. An edge of the previous release does not compare skeletons. If
//! it registers a name whose skeleton another account has, the name stays, and the account is
//! marked as a *lookalike*.

use qpq_domain::Skeleton;
use sqlx::{Connection as _, PgConnection, postgres::PgConnectOptions};
use tokio::time::Duration;

use crate::{
    ConnectError,
    error::Server,
    postgres::{self, Repeat, Scope, Statement, connect},
};

/// Accounts in one statement.
const BATCH: i64 = 1_000;

const UNKNOWN: &str =
    "SELECT id, username FROM account WHERE skeleton IS NULL ORDER BY id LIMIT $1";

/// Stores skeletons. Of accounts with the same skeleton, the oldest owns it, and the others are
/// lookalikes.
const FILL: &str = "
    WITH new AS (
        SELECT id, skeleton, row_number() OVER (PARTITION BY skeleton ORDER BY id) > 1 AS later
          FROM unnest($1::bigint[], $2::text[]) AS n (id, skeleton))
    UPDATE account a
       SET skeleton = n.skeleton,
           lookalike = n.later
               OR EXISTS (SELECT 1 FROM account h WHERE h.skeleton = n.skeleton AND NOT h.lookalike)
      FROM new n WHERE a.id = n.id AND a.skeleton IS NULL";

/// Fills in the skeletons of all accounts. The timeout `within` is that of the connection and of
/// each batch.
pub(crate) async fn fill_all(
    options: &PgConnectOptions,
    within: Duration,
) -> Result<(), ConnectError> {
    let server = Server::Postgres;
    let mut connection = server.answers(within, Box::pin(connect(options))).await?;
    let mut accounts = 0;
    loop {
        let batch = async { fill(&mut connection).await.map_err(|error| postgres::failed(&error)) };
        match server.answers(within, batch).await? {
            0 => break,
            filled => accounts += filled,
        }
    }
    if accounts > 0 {
        tracing::info!(accounts, "skeletons of usernames computed");
    }
    // Every batch is committed, so an error is ignored.
    let _ = connection.close().await;
    Ok(())
}

/// Fills in the skeletons of a batch of accounts. Returns the number of accounts, 0 at the end.
pub(crate) async fn fill(connection: &mut PgConnection) -> sqlx::Result<usize> {
    let unknown: Vec<(i64, String)> =
        sqlx::query_as(UNKNOWN).bind(BATCH).fetch_all(&mut *connection).await?;
    let (ids, skeletons): (Vec<_>, Vec<_>) = unknown
        .iter()
        .map(|(id, username)| (*id, Skeleton::of(username).as_str().to_owned()))
        .unzip();
    if ids.is_empty() {
        return Ok(0);
    }
    match sqlx::query(FILL).bind(&ids).bind(&skeletons).execute(connection).await {
        Ok(_) => Ok(ids.len()),
        // Another edge registered or filled in one of these skeletons at the same time. The next
        // attempt sees that row.
        Err(sqlx::Error::Database(refusal)) if refusal.is_unique_violation() => Ok(ids.len()),
        Err(error) => Err(error),
    }
}

/// Fills in the skeletons of some accounts, as [`fill`].
pub(crate) struct FillSkeletons;

impl Statement for FillSkeletons {
    type Output = usize;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "skeletons"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<usize> {
        fill(connection).await
    }
}
