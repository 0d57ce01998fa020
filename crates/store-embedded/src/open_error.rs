//! The reasons why a data directory cannot be used, with instructions for the operator.

use std::{
    io,
    path::{Path, PathBuf},
};

use crate::{error::ErrorKind, files::TRANSFERRED_FILE};

/// The reason why a data directory cannot be used, with instructions for the operator.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(
        "{} is in use by another server: stop that one first, or use another directory",
        .0.display()
    )]
    InUse(PathBuf),
    #[error("{} is not a directory: choose one, or a path that does not exist yet", .0.display())]
    NotADirectory(PathBuf),
    #[error(
        "{} cannot be written ({cause}): make it writable for the user that runs the server, or choose another directory",
        path.display()
    )]
    NotWritable { path: PathBuf, cause: String },
    #[error("no space is left for {}: free some, then start again; nothing is lost", .0.display())]
    Full(PathBuf),
    #[error(
        "{} is damaged ({cause}): keep a copy, restore the latest backup with `qpq-admin restore`, or rescue what can be read with `sqlite3 {} .recover`",
        path.display(),
        path.display()
    )]
    Corrupt { path: PathBuf, cause: String },
    #[error(
        "{} is the database of another program: move it away, or choose another directory",
        .0.display()
    )]
    NotOurs(PathBuf),
    #[error(
        "{} was written by a newer version (schema {found}, this one knows up to {known}): start that version, or restore the backup made before the upgrade",
        path.display()
    )]
    NewerSchema { path: PathBuf, found: i64, known: i64 },
    #[error(
        "{} was written by an unreleased version with another schema {version}: start that version, or use a new directory",
        path.display()
    )]
    OtherSchema { path: PathBuf, version: i64 },
    #[error(
        "{} was moved into a cluster and is no longer updated: start the edges of that cluster. {} names it",
        .0.display(), .0.join(TRANSFERRED_FILE).display()
    )]
    Transferred(PathBuf),
    #[error(
        "{} was written by an older version (schema {found}, this one has {known}): start this version's qpq-server on it once and stop it",
        path.display()
    )]
    OlderSchema { path: PathBuf, found: i64, known: i64 },
    #[error(
        "{} has a part of a backup, because a restore was interrupted: run `qpq-admin restore` again, with the same backup or another one",
        .0.display()
    )]
    Restoring(PathBuf),
    #[error("{} cannot be opened ({cause}): check the disk, then start again", path.display())]
    Failed { path: PathBuf, cause: String },
}

/// Converts a failure of the database file `path`.
pub(crate) fn failed(path: &Path, error: &sqlx::Error) -> OpenError {
    let (path, cause) = (path.to_owned(), error.to_string());
    match ErrorKind::of(error) {
        ErrorKind::Corrupt | ErrorKind::BadRow => OpenError::Corrupt { path, cause },
        ErrorKind::Full => OpenError::Full(path),
        ErrorKind::NotWritable => OpenError::NotWritable { path, cause },
        ErrorKind::Constraint | ErrorKind::Other => OpenError::Failed { path, cause },
    }
}

/// Converts a failure of the file system at `path`.
pub(crate) fn io_failed(path: &Path, error: &io::Error) -> OpenError {
    let path = path.to_owned();
    match error.kind() {
        io::ErrorKind::NotADirectory | io::ErrorKind::AlreadyExists => {
            OpenError::NotADirectory(path)
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            OpenError::NotWritable { path, cause: error.to_string() }
        }
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => OpenError::Full(path),
        _ => OpenError::Failed { path, cause: error.to_string() },
    }
}
