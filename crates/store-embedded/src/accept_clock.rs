//! Acceptance of the present time by an operator, whether or not a server uses the store.

use std::{path::Path, time::Duration};

use qpq_domain::UnixMillis;
use sqlx::{ConnectOptions as _, Connection as _, sqlite::SqliteConnectOptions};

use crate::{
    clock::Belief,
    files::DATABASE_FILE,
    open_error::{OpenError, failed},
    schema,
};

/// The believed time before and after an acceptance of the clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Accepted {
    /// The time that was believed before. `None` if none was stored.
    pub before: Option<UnixMillis>,
    pub now: UnixMillis,
}

/// Stores the belief that the time is `now`. A running server uses it after its next sweep.
pub async fn accept_clock(data_dir: &Path, now: UnixMillis) -> Result<Accepted, OpenError> {
    let path = data_dir.join(DATABASE_FILE);
    let failed = |error: sqlx::Error| failed(&path, &error);
    let options = SqliteConnectOptions::new()
        .filename(&path)
        .busy_timeout(Duration::from_secs(5))
        .disable_statement_logging();
    let mut connection = options.connect().await.map_err(failed)?;
    schema::check_current(&mut connection, &path).await?;
    let before = Belief::read(&mut connection).await.map_err(failed)?;
    Belief::accepted(now).write(&mut connection).await.map_err(failed)?;
    connection.close().await.map_err(failed)?;
    Ok(Accepted { before: before.map(|belief| belief.believed()), now })
}
