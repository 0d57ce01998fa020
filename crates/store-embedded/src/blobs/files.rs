//! The files with the bytes of blobs: one for each upload, which stays the file of the blob.
//!
//! A file is written at its final name from the first chunk on, because its row decides whether it
//! is an upload or a blob. So the completion of an upload moves no file, and no crash can separate
//! the two. Nothing here passes through the writer of the database.

use std::{
    collections::HashMap,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read as _},
    os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Weak},
};

use bytes::Bytes;
use parking_lot::Mutex;
use qpq_ports::{BlobOwner, StoreError, StoreResult};
use sha2::{Digest as _, Sha256};
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard, Semaphore};

use crate::files::blob_path;

/// The number of uploads that are hashed concurrently. Hashing is the expensive part of a call.
const HASHING: usize = 2;

/// The bytes that are read at a time for hashing.
const BUFFER: usize = 256 << 10;

/// The right to change the file of one upload.
pub(crate) type UploadGuard = OwnedMutexGuard<()>;

/// The files with the bytes of blobs.
pub(crate) struct BlobFiles {
    data_dir: PathBuf,
    /// The locks of the uploads that calls are changing now.
    uploads: Mutex<HashMap<BlobOwner, Weak<AsyncMutex<()>>>>,
    hashing: Semaphore,
}

/// The outcome of writing a chunk.
pub(crate) enum Written {
    /// The chunk is durable.
    Stored,
    /// The file has other bytes where the chunk repeats stored ones.
    OtherBytes,
    /// The file has fewer bytes than are recorded, as after a restore.
    Lost,
}

impl BlobFiles {
    pub(crate) fn new(data_dir: &Path) -> Self {
        Self {
            data_dir: data_dir.to_owned(),
            uploads: Mutex::default(),
            hashing: Semaphore::new(HASHING),
        }
    }

    /// Waits until no other call changes the upload.
    pub(crate) async fn lock(&self, owner: BlobOwner) -> UploadGuard {
        let lock = {
            let mut uploads = self.uploads.lock();
            uploads.retain(|_, lock| lock.strong_count() > 0);
            let found = uploads.get(&owner).and_then(Weak::upgrade);
            found.unwrap_or_else(|| {
                let lock = Arc::default();
                uploads.insert(owner, Arc::downgrade(&lock));
                lock
            })
        };
        lock.lock_owned().await
    }

    /// Stores `bytes` at `offset` of a file that has `received` bytes, which is at least `offset`.
    /// Compares the bytes that are stored already. Durable when this returns.
    ///
    /// The guard is returned after the last access to the file, also if the caller is dropped.
    pub(crate) async fn write(
        &self,
        guard: UploadGuard,
        object: &str,
        received: u64,
        offset: u64,
        bytes: Bytes,
    ) -> StoreResult<(UploadGuard, Written)> {
        let path = blob_path(&self.data_dir, object);
        blocking(move || Ok((guard, write(&path, received, offset, &bytes)?))).await
    }

    /// Reads up to `length` bytes from `offset` on.
    pub(crate) async fn read(
        &self,
        object: &str,
        offset: u64,
        length: usize,
    ) -> StoreResult<Bytes> {
        let path = blob_path(&self.data_dir, object);
        blocking(move || {
            let mut bytes = vec![0; length];
            File::open(&path)?.read_exact_at(&mut bytes, offset)?;
            Ok(bytes.into())
        })
        .await
    }

    /// Returns the SHA-256 of a file with exactly `size` bytes. `None` if it has fewer.
    pub(crate) async fn hash(
        &self,
        guard: UploadGuard,
        object: &str,
        size: u64,
    ) -> StoreResult<(UploadGuard, Option<[u8; 32]>)> {
        let _permit = self.hashing.acquire().await.map_err(StoreError::unavailable)?;
        let path = blob_path(&self.data_dir, object);
        blocking(move || Ok((guard, hash(&path, size)?))).await
    }

    /// Removes files. A file that does not exist is not an error. Durable when this returns.
    pub(crate) async fn remove(&self, objects: Vec<String>) -> StoreResult<()> {
        let paths: Vec<_> =
            objects.iter().map(|object| blob_path(&self.data_dir, object)).collect();
        blocking(move || {
            for path in &paths {
                match fs::remove_file(path) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    // Synced even if another run has removed the file, maybe not durably.
                    _ => match qpq_durable_file::sync(qpq_durable_file::directory_of(path)) {
                        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                        _ => {}
                    },
                }
            }
            Ok(())
        })
        .await
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> StoreResult<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done.map_err(StoreError::unavailable),
        Err(error) => Err(StoreError::unavailable(error)),
    }
}

fn write(path: &Path, received: u64, offset: u64, bytes: &[u8]) -> io::Result<Written> {
    let file = match OpenOptions::new().read(true).write(true).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if received > 0 {
                return Ok(Written::Lost);
            }
            create(path)?
        }
        opened => opened?,
    };
    if file.metadata()?.len() < received {
        return Ok(Written::Lost);
    }
    let repeated = usize::try_from(received - offset).unwrap_or(usize::MAX).min(bytes.len());
    let (repeated, new) = bytes.split_at(repeated);
    let mut stored = vec![0; repeated.len()];
    file.read_exact_at(&mut stored, offset)?;
    if stored != repeated {
        return Ok(Written::OtherBytes);
    }
    if !new.is_empty() {
        file.write_all_at(new, received)?;
        file.sync_data()?;
    }
    Ok(Written::Stored)
}

/// Creates an empty file whose name is durable.
fn create(path: &Path) -> io::Result<File> {
    let directory = qpq_durable_file::directory_of(path);
    DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)?;
    // Each of the names: that of the file, and those of the two directories. Another call may have
    // created a directory and not synced it yet.
    for directory in directory.ancestors().take(3) {
        qpq_durable_file::sync(directory)?;
    }
    Ok(file)
}

fn hash(path: &Path, size: u64) -> io::Result<Option<[u8; 32]>> {
    let mut file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened?.take(size),
    };
    let (mut hash, mut buffer, mut total) = (Sha256::new(), vec![0; BUFFER], 0);
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        hash.update(&buffer[..read]);
        total += read as u64;
    }
    Ok((total == size).then(|| hash.finalize().into()))
}
