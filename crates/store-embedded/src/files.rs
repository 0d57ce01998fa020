//! The names of the files in a data directory.

/// The database in a data directory.
pub const DATABASE_FILE: &str = "qpq.db";

/// The file that marks a data directory as moved into a cluster, which the file names. No server
/// starts there.
pub const TRANSFERRED_FILE: &str = "moved-to-cluster";

/// The file that marks a data directory during a restore. No server starts there.
pub const RESTORING_FILE: &str = "restore-unfinished";

/// The file that a process locks while it uses the data directory.
pub const LOCK_FILE: &str = "lock";
