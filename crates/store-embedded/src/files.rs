//! The names of the files in a data directory.

/// The database in a data directory.
pub const DATABASE_FILE: &str = "qpq.db";

/// The file in a data directory that was moved into a cluster. It names the cluster, and no server
/// starts there.
pub const TRANSFERRED_FILE: &str = "moved-to-cluster";

/// The file in a data directory during a restore. No server starts there.
pub const RESTORING_FILE: &str = "restore-unfinished";

/// The file whose lock a process has while it uses the data directory.
pub(crate) const LOCK_FILE: &str = "lock";
