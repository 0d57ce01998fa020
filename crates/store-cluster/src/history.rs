//! The present history of the store, and the detection of another one.
//!
//! The id is derived from three values. At least one of them changes when Postgres may have
//! returned to an earlier state:
//!
//! - the identifier of the database system, with another server, or a dump that was restored into
//!   one;
//! - the timeline, with the promotion of a standby, or a recovery to a point in time;
//! - a stored salt, which is replaced after a restore that changes neither.
//!
//! The id is read in the same statement as the rows that belong to it. So the next statement
//! detects a connection that silently leads to another server, as through a pooler.
//!
//! The timeline is that of the current write position of the log, because the last checkpoint has
//! the earlier timeline until some time after a promotion. A standby writes no log and answers with
//! an error. Every role may call these functions.

use std::sync::Arc;

use qpq_domain::StoreId;
use qpq_ports::{NewHistory, OldSessions, StoreResult};
use sqlx::{Connection as _, PgConnection};
use tokio::sync::watch;

use crate::{
    Config, ConnectError, metrics as names,
    postgres::{self, Database, Repeat, Scope, Statement, row::Columns as _},
};

/// The id of the history, as an expression that Postgres evaluates once in each statement.
macro_rules! store_id {
    () => {
        "(SELECT substr(sha256(int8send(c.system_identifier)
                 || decode(substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8), 'hex')
                 || s.salt), 1, 16)
            FROM pg_control_system() c CROSS JOIN store s)"
    };
}
pub(crate) use store_id;

const CURRENT: &str = concat!("SELECT ", store_id!(), " AS store_id");

/// Reads the store id in hexadecimal digits. See [`CURRENT`].
pub(crate) const CURRENT_HEX: &str = concat!("SELECT encode(", store_id!(), ", 'hex')");

pub(crate) const RENEW: &str = "UPDATE store SET salt = uuid_send(gen_random_uuid())";

/// Removes all one-time KeyPackages. Any of them may have been taken after the copy was made from
/// which the store was restored.
pub(crate) const REMOVE_PACKAGES: &str = "
    WITH removed AS (
        DELETE FROM key_package WHERE NOT last_resort RETURNING owner, fingerprint, not_after),
    given AS (
        INSERT INTO key_package_given (owner, fingerprint, not_after)
        SELECT owner, fingerprint, not_after FROM removed ON CONFLICT DO NOTHING)
    SELECT count(*) FROM removed";

/// Ends all sessions. Any of them may have been ended after the copy was made from which the store
/// was restored.
pub(crate) const END_SESSIONS: &str = "
    WITH ended AS (DELETE FROM session RETURNING 1) SELECT count(*) FROM ended";

/// The history that this edge saw last. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct History(Arc<watch::Sender<StoreId>>);

impl History {
    /// Reads the present history from Postgres.
    pub(crate) async fn read(database: &Database) -> StoreResult<Self> {
        let id = database.run(&ReadStoreId).await?;
        Ok(Self(Arc::new(watch::Sender::new(id))))
    }

    pub(crate) fn id(&self) -> StoreId {
        *self.0.borrow()
    }

    /// Records the history of rows that were just read.
    pub(crate) fn note(&self, id: StoreId) {
        let changed = self.0.send_if_modified(|seen| {
            let changed = *seen != id;
            *seen = id;
            changed
        });
        if changed {
            metrics::counter!(names::HISTORIES).increment(1);
            tracing::warn!(
                store_id = %id,
                "the store began another history: it was restored, or a standby was promoted"
            );
        }
    }

    /// Returns a receiver that is notified when another history is detected.
    pub(crate) fn changes(&self) -> watch::Receiver<StoreId> {
        self.0.subscribe()
    }

    /// Begins another history: replaces the salt, removes the one-time KeyPackages, and ends the
    /// sessions if that is requested.
    pub(crate) async fn begin(
        &self,
        database: &Database,
        sessions: OldSessions,
    ) -> StoreResult<NewHistory> {
        let new = database.run(&BeginHistory(sessions)).await?;
        self.note(new.store_id);
        Ok(new)
    }
}

struct ReadStoreId;

impl Statement for ReadStoreId {
    type Output = StoreId;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "store_id"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<StoreId> {
        current(connection).await
    }
}

struct BeginHistory(OldSessions);

impl Statement for BeginHistory {
    type Output = NewHistory;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Transaction;

    fn name(&self) -> &'static str {
        "begin_history"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<NewHistory> {
        begin(connection, self.0).await
    }
}

/// Begins another history, as
/// [`Maintenance::begin_history`](qpq_ports::Maintenance::begin_history), through Postgres alone.
/// Has no timeout, since a large cluster has many KeyPackages to remove. Running edges detect the
/// new history.
pub async fn begin_history(
    config: &Config,
    sessions: OldSessions,
) -> Result<NewHistory, ConnectError> {
    let mut connection = postgres::connect_patiently(config).await?;
    let outcome = async {
        let mut open = connection.begin().await?;
        let new = begin(&mut open, sessions).await?;
        open.commit().await?;
        Ok(new)
    };
    let new = outcome.await.map_err(|error: sqlx::Error| postgres::failed(&error))?;
    // The transaction is committed, so an error is ignored.
    let _ = connection.close().await;
    Ok(new)
}

async fn begin(connection: &mut PgConnection, sessions: OldSessions) -> sqlx::Result<NewHistory> {
    sqlx::query(RENEW).execute(&mut *connection).await?;
    let count = |rows: i64| u64::try_from(rows).unwrap_or_default();
    let removed = sqlx::query_scalar(REMOVE_PACKAGES).fetch_one(&mut *connection).await?;
    let ended = match sessions {
        OldSessions::End => sqlx::query_scalar(END_SESSIONS).fetch_one(&mut *connection).await?,
        OldSessions::Keep => 0,
    };
    Ok(NewHistory {
        store_id: current(connection).await?,
        removed_packages: count(removed),
        ended_sessions: count(ended),
    })
}

async fn current(connection: &mut PgConnection) -> sqlx::Result<StoreId> {
    sqlx::query(CURRENT).fetch_one(connection).await?.store_id("store_id")
}
