//! A backup that is being written, under another name until it is complete and durable.
//!
//! A run that fails removes its files. A killed run leaves `NAME.unfinished`, which the next run
//! with the same name removes. The directory is locked while it is written, so a second run with
//! the same name is refused.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use qpq_durable_file::{self as durable_file, Created, Draft};
use sha2::{Digest as _, Sha256};

use super::manifest::{MANIFEST, MANIFEST_HASH, Manifest, Part};

const LOCK: &str = "lock";

/// The mode of every file of a backup.
const FILE_MODE: u32 = 0o600;

/// The number of bytes copied at a time.
const CHUNK: usize = 1 << 20;

/// The directory of an unfinished backup. Removed when this is dropped.
#[derive(Debug)]
pub(super) struct UnfinishedBackup {
    dir: PathBuf,
    target: PathBuf,
    _lock: File,
    is_finished: bool,
}

/// The reason why a backup cannot be written.
#[derive(Debug, thiserror::Error)]
pub(super) enum WriteError {
    #[error("{} exists already, and nothing is overwritten: name another directory", .0.display())]
    Exists(PathBuf),
    #[error("another run writes {}: wait for its end, or name another directory", .0.display())]
    Busy(PathBuf),
    #[error(
        "no space is left for {}: free space, then run this again. No file was kept",
        .0.display()
    )]
    Full(PathBuf),
    #[error("{} cannot be written: {source}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("{} cannot be read: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
}

/// Returns a function that converts I/O errors on `path`.
pub(super) fn write_failed(path: &Path) -> impl Fn(io::Error) -> WriteError + use<> {
    let path = path.to_owned();
    move |source| match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => WriteError::Full(path.clone()),
        io::ErrorKind::DirectoryNotEmpty => WriteError::Exists(path.clone()),
        _ => WriteError::Write { path: path.clone(), source },
    }
}

impl UnfinishedBackup {
    /// Creates and locks the directory of the backup `target`.
    pub(super) fn create(target: &Path) -> Result<Self, WriteError> {
        if fs::symlink_metadata(target).is_ok() {
            return Err(WriteError::Exists(target.to_owned()));
        }
        let dir = target.with_added_extension("unfinished");
        let failed = write_failed(&dir);
        match DirBuilder::new().mode(0o700).create(&dir) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(failed(error));
            }
            _ => {}
        }
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(dir.join(LOCK))
            .map_err(&failed)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(WriteError::Busy(target.to_owned())),
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
        let backup = Self { dir, target: target.to_owned(), _lock: lock, is_finished: false };
        backup.clear().map_err(failed)?;
        Ok(backup)
    }

    /// Returns the directory.
    pub(super) fn path(&self) -> &Path {
        &self.dir
    }

    /// Removes the files of a killed run.
    fn clear(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            if entry.file_name() == LOCK {
                continue;
            }
            if entry.file_type()?.is_dir() {
                fs::remove_dir_all(entry.path())?;
            } else {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    /// Copies a file to the part `name`.
    pub(super) fn copy(&self, from: &Path, name: &str) -> Result<Part, WriteError> {
        let to = self.dir.join(name);
        if let Some(parent) = to.parent() {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(parent)
                .map_err(write_failed(parent))?;
        }
        let (bytes, hash) = copy_durably(from, &to)?;
        Ok(Part { name: name.into(), bytes, sha256: hex::encode(hash) })
    }

    /// Returns the part `name`, which another program has written, with its size and hash.
    pub(super) fn measure(&self, name: &str) -> Result<Part, WriteError> {
        let (bytes, hash) = digest(&self.dir.join(name))?;
        Ok(Part { name: name.into(), bytes, sha256: hex::encode(hash) })
    }

    /// Makes the backup durable and renames it.
    pub(super) fn finish(mut self, manifest: &Manifest) -> Result<(), WriteError> {
        let (json, hash) = manifest.to_files();
        for (name, bytes) in [(MANIFEST, json), (MANIFEST_HASH, hash)] {
            let path = self.dir.join(name);
            durable_file::replace(&path, &bytes, FILE_MODE).map_err(write_failed(&path))?;
        }
        let named = || -> io::Result<()> {
            for part in &manifest.parts {
                durable_file::sync(durable_file::directory_of(&self.dir.join(&part.name)))?;
            }
            fs::remove_file(self.dir.join(LOCK))?;
            durable_file::sync(&self.dir)?;
            // Replaces nothing: renaming to a directory that is not empty fails.
            fs::rename(&self.dir, &self.target)?;
            durable_file::sync(durable_file::directory_of(&self.target))
        };
        named().map_err(write_failed(&self.target))?;
        self.is_finished = true;
        Ok(())
    }
}

impl Drop for UnfinishedBackup {
    fn drop(&mut self) {
        if !self.is_finished {
            // The next run removes files that cannot be removed now.
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

/// Copies a file to a new one that only its owner can read. Returns its size and SHA-256.
///
/// The copy is durable when this returns.
pub(super) fn copy_durably(from: &Path, to: &Path) -> Result<(u64, [u8; 32]), WriteError> {
    let read_failed = |source| WriteError::Read { path: from.to_owned(), source };
    let mut source = File::open(from).map_err(read_failed)?;
    let mut target = Draft::new(to, FILE_MODE).map_err(write_failed(to))?;
    let (mut hash, mut bytes, mut chunk) = (Sha256::new(), 0, vec![0; CHUNK]);
    loop {
        let read = source.read(&mut chunk).map_err(read_failed)?;
        if read == 0 {
            break;
        }
        hash.update(&chunk[..read]);
        bytes += read as u64;
        target.write_all(&chunk[..read]).map_err(write_failed(to))?;
    }
    match target.create().map_err(write_failed(to))? {
        Created::New => {}
        Created::Exists => return Err(WriteError::Exists(to.to_owned())),
    }
    Ok((bytes, hash.finalize().into()))
}

/// Returns the size and SHA-256 of a file.
pub(super) fn digest(path: &Path) -> Result<(u64, [u8; 32]), WriteError> {
    let failed = |source| WriteError::Read { path: path.to_owned(), source };
    let mut file = File::open(path).map_err(failed)?;
    let (mut hash, mut bytes, mut chunk) = (Sha256::new(), 0, vec![0; CHUNK]);
    loop {
        let read = file.read(&mut chunk).map_err(failed)?;
        if read == 0 {
            return Ok((bytes, hash.finalize().into()));
        }
        hash.update(&chunk[..read]);
        bytes += read as u64;
    }
}
