//! Blobs: rows in SQLite, bytes in files.
//!
//! The row of an upload is committed before its file is created, and a chunk is durable in the file
//! before the row counts it. The completion of an upload is one transaction. A file without a use
//! is named by a row of `blob_trash` until it is removed. So after a crash at any point, each
//! reference has its bytes, and each file has a row that leads to its use or its removal.

mod collect;
pub(crate) mod files;
mod statements;

use async_trait::async_trait;
use qpq_domain::{AccountId, UnixMillis};
use qpq_ports::{
    BlobFinish, BlobOwner, BlobPart, BlobRange, BlobState, Blobs, ChunkOutcome, Collected,
    NewChunk, StoreResult, Unreference,
};
use sqlx::Row as _;

use crate::{
    error::read_failed,
    row::{Columns as _, millis},
    store::EmbeddedStore,
};
use files::Written;
use statements::{
    Advance, Begin, Begun, Complete, Discard, DropReference, Release, Renew, Upload, trash_after,
};

#[cfg(test)]
pub(crate) use statements::STATEMENTS;

#[async_trait]
impl Blobs for EmbeddedStore {
    async fn upload(&self, chunk: NewChunk) -> StoreResult<ChunkOutcome> {
        let NewChunk { owner, size, mime, offset, bytes, now } = chunk;
        let limits = self.limits.blobs;
        if size > limits.max_bytes {
            return Ok(ChunkOutcome::TooLarge);
        }
        let guard = self.blobs.lock(owner).await;
        let latest = self.memory.clock.bounds(now).latest;
        let expires_at = latest.plus(limits.upload_idle);
        let upload = match self.open_upload(owner).await? {
            Some(upload) => upload,
            None => {
                let begin = Begin { owner, size, mime, now, expires_at, limits };
                match self.writer.run(begin).await? {
                    Begun::Opened(upload) => upload,
                    Begun::Refused(outcome) => return Ok(outcome),
                }
            }
        };
        let Upload { object, size: expected, received } = upload;
        if size != expected {
            return Ok(ChunkOutcome::OtherSize);
        }
        if offset > received {
            return Ok(ChunkOutcome::Gap { received });
        }
        let end = offset + bytes.len() as u64;
        let (_guard, written) = self.blobs.write(guard, &object, received, offset, bytes).await?;
        match written {
            Written::OtherBytes => return Ok(ChunkOutcome::OtherBytes),
            Written::Lost => {
                self.discard(owner, object, now).await?;
                return Ok(ChunkOutcome::Gap { received: 0 });
            }
            Written::Stored if end <= received => return Ok(ChunkOutcome::Stored { received }),
            Written::Stored => {}
        }
        let advance = Advance { owner, object, received: end, expires_at };
        if self.writer.run(advance).await? {
            Ok(ChunkOutcome::Stored { received: end })
        } else {
            // Expired while its last chunk arrived.
            Ok(ChunkOutcome::Gap { received: 0 })
        }
    }

    async fn finish(&self, upload: BlobOwner, now: UnixMillis) -> StoreResult<BlobFinish> {
        let guard = self.blobs.lock(upload).await;
        let Some(Upload { object, size, received }) = self.open_upload(upload).await? else {
            return Ok(if self.has_reference(upload, now).await? {
                BlobFinish::Whole
            } else {
                BlobFinish::Incomplete { received: 0 }
            });
        };
        if received < size {
            return Ok(BlobFinish::Incomplete { received });
        }
        let (_guard, hash) = self.blobs.hash(guard, &object, size).await?;
        match hash {
            Some(hash) if hash == *upload.blob.as_bytes() => {
                let latest = self.memory.clock.bounds(now).latest;
                let complete = Complete {
                    owner: upload,
                    object,
                    expires_at: latest.plus(self.limits.blobs.lifetime),
                    trash_after: trash_after(latest),
                };
                self.writer.run(complete).await
            }
            Some(_) => {
                self.discard(upload, object, now).await?;
                Ok(BlobFinish::HashMismatch)
            }
            None => {
                self.discard(upload, object, now).await?;
                Ok(BlobFinish::Incomplete { received: 0 })
            }
        }
    }

    async fn renew(&self, owner: BlobOwner, now: UnixMillis) -> StoreResult<BlobState> {
        if self.has_reference(owner, now).await? {
            let latest = self.memory.clock.bounds(now).latest;
            let expires_at = latest.plus(self.limits.blobs.lifetime);
            if let Some(size) = self.writer.run(Renew { owner, now, expires_at }).await? {
                return Ok(BlobState::Whole { size });
            }
        }
        Ok(match self.open_upload(owner).await? {
            Some(Upload { received, size, .. }) => BlobState::Uploading { received, size },
            None => BlobState::Unknown,
        })
    }

    async fn read(&self, range: BlobRange, now: UnixMillis) -> StoreResult<Option<BlobPart>> {
        let BlobRange { reader, offset, length } = range;
        let row = sqlx::query(READ)
            .bind(&reader.blob.as_bytes()[..])
            .bind(reader.account.0)
            .bind(millis(now))
            .fetch_optional(&self.readers)
            .await
            .map_err(read_failed)?;
        let Some(row) = row else { return Ok(None) };
        let mime: Option<String> = row.try_get("mime").map_err(read_failed)?;
        let Some(mime) = mime else { return Ok(None) };
        let object: String = row.try_get("object").map_err(read_failed)?;
        let size = row.unsigned("size").map_err(read_failed)?;
        let left = usize::try_from(size.saturating_sub(offset)).unwrap_or(usize::MAX);
        let bytes = match left.min(length) {
            0 => bytes::Bytes::new(),
            length => self.blobs.read(&object, offset, length).await?,
        };
        Ok(Some(BlobPart { bytes, size, mime }))
    }

    async fn unreference(&self, owner: BlobOwner, now: UnixMillis) -> StoreResult<Unreference> {
        let trash_after = trash_after(self.memory.clock.bounds(now).latest);
        let is_removed = self.writer.run(DropReference { owner, trash_after }).await?;
        Ok(if is_removed { Unreference::Removed } else { Unreference::NotFound })
    }

    async fn release(&self, account: AccountId, now: UnixMillis) -> StoreResult<u64> {
        let trash_after = trash_after(self.memory.clock.bounds(now).latest);
        self.writer.run(Release { account, trash_after }).await
    }

    async fn collect(&self, now: UnixMillis) -> StoreResult<Collected> {
        collect::run(self, now).await
    }
}

/// The blob ?1, with the MIME type of the reference of the account ?2, or else of another
/// reference. NULL: no reference is valid at ?3.
const READ: &str = "
    SELECT object, size,
           coalesce((SELECT mime FROM blob_ref
                      WHERE account = ?2 AND hash = ?1 AND expires_at > ?3),
                    (SELECT mime FROM blob_ref WHERE hash = ?1 AND expires_at > ?3 LIMIT 1)) AS mime
      FROM blob WHERE hash = ?1";

const FIND_UPLOAD: &str =
    "SELECT object, size, received FROM upload WHERE account = ?1 AND hash = ?2";

const HAS_REFERENCE: &str = "
    SELECT EXISTS (SELECT 1 FROM blob_ref WHERE account = ?1 AND hash = ?2 AND expires_at > ?3)";

impl EmbeddedStore {
    async fn open_upload(&self, owner: BlobOwner) -> StoreResult<Option<Upload>> {
        let query = sqlx::query(FIND_UPLOAD).bind(owner.account.0);
        let found = query.bind(&owner.blob.as_bytes()[..]).fetch_optional(&self.readers).await;
        let upload = found.and_then(|row| row.as_ref().map(Upload::read).transpose());
        upload.map_err(read_failed)
    }

    async fn has_reference(&self, owner: BlobOwner, now: UnixMillis) -> StoreResult<bool> {
        let query = sqlx::query_scalar(HAS_REFERENCE).bind(owner.account.0);
        let query = query.bind(&owner.blob.as_bytes()[..]).bind(millis(now));
        query.fetch_one(&self.readers).await.map_err(read_failed)
    }

    async fn discard(&self, owner: BlobOwner, object: String, now: UnixMillis) -> StoreResult<()> {
        let trash_after = trash_after(self.memory.clock.bounds(now).latest);
        self.writer.run(Discard { owner, object, trash_after }).await
    }
}
