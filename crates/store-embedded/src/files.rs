//! The names of the files in a data directory.

use std::path::{Path, PathBuf};

/// The database in a data directory.
pub const DATABASE_FILE: &str = "qpq.db";

/// The file that marks a data directory as moved into a cluster, which the file names. No server
/// starts there.
pub const TRANSFERRED_FILE: &str = "moved-to-cluster";

/// The file that marks a data directory during a restore. No server starts there.
pub const RESTORING_FILE: &str = "restore-unfinished";

/// The file that a process locks while it uses the data directory.
pub const LOCK_FILE: &str = "lock";

/// The directory with the bytes of blobs.
pub const BLOBS_DIRECTORY: &str = "blobs";

/// Returns the path of the file with the bytes of a blob, in a directory for the first byte of the
/// hash.
pub(crate) fn blob_path(data_dir: &Path, object: &str) -> PathBuf {
    data_dir.join(BLOBS_DIRECTORY).join(object.get(..2).unwrap_or("00")).join(object)
}
