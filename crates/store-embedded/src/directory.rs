//! The data directory: its files, their permissions, and the lock of the process that uses it.

use std::{
    fs::{DirBuilder, File, OpenOptions, TryLockError},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::Path,
};

use crate::{
    files::{LOCK_FILE, RESTORING_FILE},
    open_error::{OpenError, io_failed},
};

/// Creates the directory, accessible to its owner alone, if it is missing.
pub(crate) fn create(path: &Path) -> Result<(), OpenError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|error| io_failed(path, &error))
}

/// Locks the directory for this process, until the file is closed. Refuses a directory whose
/// restore was interrupted.
pub(crate) fn lock(data_dir: &Path) -> Result<File, OpenError> {
    let lock = lock_any(data_dir)?;
    if data_dir.join(RESTORING_FILE).exists() {
        return Err(OpenError::Restoring(data_dir.to_owned()));
    }
    Ok(lock)
}

/// Locks the directory for this process, without a check of its content.
pub(crate) fn lock_any(data_dir: &Path) -> Result<File, OpenError> {
    let path = data_dir.join(LOCK_FILE);
    let file = create_private_file(&path)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(OpenError::InUse(data_dir.to_owned())),
        Err(TryLockError::Error(error)) => Err(io_failed(&path, &error)),
    }
}

/// Opens a file, and creates it, accessible to its owner alone, if it is missing. SQLite creates
/// the log of a database with the permissions of the database.
pub(crate) fn create_private_file(path: &Path) -> Result<File, OpenError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(|error| io_failed(path, &error))
}

/// Makes the entries of the directory durable.
pub(crate) fn sync(path: &Path) -> Result<(), OpenError> {
    qpq_durable_file::sync(path).map_err(|error| io_failed(path, &error))
}
