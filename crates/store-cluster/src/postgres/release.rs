//! Checks that every edge of the cluster runs a release with devices.
//!
//! An edge of an earlier release removes messages for the single reader, also in an inbox with
//! devices. So the first registration of a device in a cluster is refused while such an edge is
//! connected. The registration also marks the cluster, so that no such edge starts afterwards: an
//! edge compares its fingerprint of the OPAQUE setup with the stored one, and refuses to start if
//! they differ. The mark replaces the stored fingerprint by a hash of it, which only this and later
//! releases accept.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use sqlx::PgConnection;

/// The application name of this release's connections. Those of earlier releases have another one.
pub(super) const APPLICATION_NAME: &str = "qpq-server/devices";

/// The stored fingerprint of a marked cluster: one that has or had devices. $1 the fingerprint.
macro_rules! marked {
    () => {
        "sha256('qpq/devices/1'::bytea || $1)"
    };
}

/// Returns whether the cluster's stored fingerprint is $1, marked or not.
const IS_CLUSTER_OF: &str =
    concat!("SELECT opaque_setup = $1 OR opaque_setup = ", marked!(), " FROM cluster");

const IS_MARKED: &str =
    concat!("SELECT EXISTS (SELECT 1 FROM cluster WHERE opaque_setup = ", marked!(), ")");

/// A starting edge of an earlier release tries to insert into the table. If it does so before this
/// lock, [`OLDER_EDGES`] finds its connection. If it does so afterwards, it finds the mark and
/// refuses to start. The lock is compatible with reads, such as those of a backup. `NOWAIT`,
/// because the transaction has locked the head of an inbox.
const LOCK: &str = "LOCK TABLE cluster IN SHARE ROW EXCLUSIVE MODE NOWAIT";

/// Returns whether an edge of an earlier release is connected, by the application name of its
/// connections. Other programs (`psql`, `pg_dump`) have other names.
const OLDER_EDGES: &str = "
    SELECT EXISTS (SELECT 1 FROM pg_stat_activity
                    WHERE datname = current_database() AND application_name = 'qpq-server')";

const MARK: &str =
    concat!("UPDATE cluster SET opaque_setup = ", marked!(), " WHERE opaque_setup = $1");

/// The refusal because an edge of an earlier release is connected to the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OlderEdges;

/// Marks the cluster as one whose edges support devices, unless it is marked or an edge of an
/// earlier release is connected.
pub(crate) async fn mark_cluster(
    connection: &mut PgConnection,
    opaque_setup: &[u8; 32],
) -> sqlx::Result<Result<(), OlderEdges>> {
    let is_marked = sqlx::query_scalar(IS_MARKED).bind(&opaque_setup[..]);
    if is_marked.fetch_one(&mut *connection).await? {
        return Ok(Ok(()));
    }
    sqlx::query(LOCK).execute(&mut *connection).await?;
    if sqlx::query_scalar(OLDER_EDGES).fetch_one(&mut *connection).await? {
        return Ok(Err(OlderEdges));
    }
    sqlx::query(MARK).bind(&opaque_setup[..]).execute(connection).await?;
    Ok(Ok(()))
}

/// The mark of the cluster. All edges of a marked cluster can read the data that this release
/// writes. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct ClusterMark {
    opaque_setup: [u8; 32],
    /// True once the mark was found. A mark is never removed.
    is_set: Arc<AtomicBool>,
}

impl ClusterMark {
    pub(crate) fn new(opaque_setup: [u8; 32]) -> Self {
        Self { opaque_setup, is_set: Arc::default() }
    }

    /// Marks the cluster, unless an edge of an earlier release is connected.
    pub(crate) async fn set(
        &self,
        connection: &mut PgConnection,
    ) -> sqlx::Result<Result<(), OlderEdges>> {
        mark_cluster(connection, &self.opaque_setup).await
    }

    /// Returns whether the cluster is marked, as the transaction sees it.
    pub(crate) async fn is_set(&self, connection: &mut PgConnection) -> sqlx::Result<bool> {
        if self.is_set.load(Ordering::Relaxed) {
            return Ok(true);
        }
        let query = sqlx::query_scalar(IS_MARKED).bind(&self.opaque_setup[..]);
        let is_set = query.fetch_one(connection).await?;
        self.is_set.store(is_set, Ordering::Relaxed);
        Ok(is_set)
    }
}

/// Returns whether the database belongs to the cluster with this fingerprint; `None` if it belongs
/// to no cluster yet.
pub(crate) async fn is_cluster_of(
    connection: &mut PgConnection,
    opaque_setup: &[u8; 32],
) -> sqlx::Result<Option<bool>> {
    sqlx::query_scalar(IS_CLUSTER_OF).bind(&opaque_setup[..]).fetch_optional(connection).await
}
