//! The store that needs nothing installed: everything durable in one SQLite file, everything else
//! in this process.
//!
//! [`EmbeddedStore::open`] takes a data directory for itself and gives the ports of `qpq_ports`.
//! Inside:
//! - one writer commits many requests in one transaction (`writer`), readers beside it see the last
//!   commit (WAL);
//! - an inbox is a range of one table, its head kept by triggers, so neither enqueue nor read ever
//!   counts or scans (`migrations/0001_init.sql`, `inboxes`);
//! - leases, wakes, rate limits and the session cache are in memory: this process is the only one,
//!   and who has died holds none of them.

mod accounts;
mod backup;
mod clock;
mod damage;
mod error;
mod export;
mod history;
mod inboxes;
mod keys;
mod limiter;
mod maintenance;
mod metrics;
mod open;
mod row;
mod sessions;
mod shards;
mod wakes;
mod writer;

use std::{fmt, path::Path, sync::Arc};

use qpq_domain::{Delivery, KeyPackageCaps};
use qpq_ports::{SingleEdge, Stores};
use sqlx::SqlitePool;

pub use backup::{BackupError, Claim, Inspection, copy_database, inspect};
pub use clock::{Accepted, JUMP, accept_clock};
pub use export::{Export, ExportError};
pub use open::{DATABASE_FILE, MOVED_FILE, OpenError, RESTORING_FILE};

use crate::{
    accounts::EmbeddedAccounts, clock::Guard, history::History, inboxes::EmbeddedInboxes,
    keys::EmbeddedKeys, limiter::EmbeddedLimiter, maintenance::EmbeddedMaintenance,
    sessions::EmbeddedSessions, wakes::EmbeddedWakes, writer::Writer,
};

/// What the deployment allows.
#[derive(Clone, Copy, Debug, Default)]
pub struct Limits {
    pub delivery: Delivery,
    pub key_packages: KeyPackageCaps,
}

/// An open data directory. What [`EmbeddedStore::stores`] gives keeps it open too.
pub struct EmbeddedStore {
    writer: Writer,
    readers: SqlitePool,
    stores: Stores,
}

impl EmbeddedStore {
    /// Opens `data_dir`, made if missing. Needs a tokio runtime, and uses it as long as the store
    /// is open.
    pub async fn open(data_dir: &Path, limits: Limits) -> Result<Self, OpenError> {
        metrics::describe();
        let opened = open::open(data_dir).await?;
        let readers = opened.readers;
        let history = History::read(&readers)
            .await
            .map_err(|error| open::failed(&data_dir.join(open::DATABASE_FILE), &error))?;
        let guard = Guard::new(opened.belief);
        let writer = Writer::start(
            opened.connection,
            opened.options,
            limits.delivery,
            guard.clone(),
            opened.lock,
        );
        let wakes = Arc::default();
        let sessions = Arc::new(EmbeddedSessions::new(writer.clone(), readers.clone()));
        let keys = Arc::new(EmbeddedKeys::new(
            writer.clone(),
            readers.clone(),
            guard.clone(),
            limits.key_packages,
        ));
        let stores = Stores {
            accounts: Arc::new(EmbeddedAccounts::new(writer.clone(), readers.clone())),
            inboxes: Arc::new(EmbeddedInboxes::new(
                writer.clone(),
                readers.clone(),
                Arc::clone(&wakes),
                history.clone(),
                guard.clone(),
                limits.delivery,
            )),
            wakes: Arc::new(EmbeddedWakes(wakes)),
            key_packages: Arc::clone(&keys) as _,
            hybrid_keys: keys,
            limiter: Arc::new(EmbeddedLimiter::default()),
            account_events: Arc::new(SingleEdge),
            maintenance: Arc::new(EmbeddedMaintenance::new(
                writer.clone(),
                Arc::clone(&sessions),
                history,
                guard,
                limits.delivery.recent_ids,
            )),
            sessions,
        };
        Ok(Self { writer, readers, stores })
    }

    /// The ports.
    pub fn stores(&self) -> Stores {
        self.stores.clone()
    }

    /// Ends what waits to be written, writes the log back into the database file and gives the
    /// directory free. Whoever still has ports gets `Unavailable` from them. A store that is
    /// dropped instead loses nothing; its next start reads the log.
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
