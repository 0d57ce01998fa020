//! The store: one struct that implements every port. The file of each area has the implementation
//! of its port and the statements for it.

use std::{fmt, sync::Arc};

use qpq_domain::StoreLimits;
use qpq_ports::{SingleEdge, Stores};
use sqlx::SqlitePool;

use crate::{
    blobs::files::BlobFiles,
    damage::Damage,
    memory::{EndpointTable, Limiter, Memory},
    writer::Writer,
};

/// An open data directory, which implements the ports. Cheap to clone.
///
/// Dropping all clones without [`EmbeddedStore::close`] loses no answered change: the next start
/// reads the log.
#[derive(Clone)]
pub struct EmbeddedStore {
    pub(crate) writer: Writer,
    pub(crate) readers: SqlitePool,
    pub(crate) memory: Arc<Memory>,
    pub(crate) limiter: Arc<Limiter>,
    pub(crate) endpoints: Arc<EndpointTable>,
    pub(crate) damage: Arc<Damage>,
    pub(crate) limits: StoreLimits,
    pub(crate) blobs: Arc<BlobFiles>,
}

impl EmbeddedStore {
    /// Returns the ports. Like clones of the store, they keep the directory open.
    pub fn stores(&self) -> Stores {
        let store = Arc::new(self.clone());
        Stores {
            accounts: store.clone(),
            invites: store.clone(),
            sessions: store.clone(),
            devices: store.clone(),
            groups: store.clone(),
            inboxes: store.clone(),
            wakes: store.clone(),
            key_packages: store.clone(),
            hybrid_keys: store.clone(),
            endpoints: store.clone(),
            bans: store.clone(),
            reports: store.clone(),
            blocks: store.clone(),
            audit: store.clone(),
            recovery_bundles: store.clone(),
            blobs: store.clone(),
            limiter: store.clone(),
            account_events: Arc::new(SingleEdge),
            maintenance: store.clone(),
            jobs: store,
        }
    }

    /// Commits the waiting changes, writes the log back into the database file and unlocks the
    /// directory. Ports that are still in use return `Unavailable` from then on.
    pub async fn close(self) {
        self.readers.close().await;
        self.writer.close().await;
    }
}

impl fmt::Debug for EmbeddedStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EmbeddedStore").finish_non_exhaustive()
    }
}
