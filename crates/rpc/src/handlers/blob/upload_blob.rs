//! UploadBlob (600).

use bytes::Bytes;
use qpq_domain::{BlobId, MAX_BLOB_CHUNK, MAX_MIME_TYPE};
use qpq_ports::{BlobFinish, BlobOwner, BlobState, ChunkOutcome, NewChunk};
use qpq_proto::{
    FieldError, LimitClass,
    convert::{self, FieldReason},
    methods, v1,
};

use crate::{Caller, Cx, Error, Handled, Handler, Subject};

/// The minimum cost of a chunk in bytes, because each chunk also costs a commit.
const MIN_COST: usize = 64 << 10;

impl Handler for methods::UploadBlob {
    async fn handle(cx: Cx<'_>, caller: Caller, request: v1::UploadBlobRequest) -> Handled<Self> {
        let blob = convert::blob_id(&request.blob_hash, "blob_hash")?;
        let owner = BlobOwner { account: caller.account, blob };
        if request.chunk.is_empty() {
            return match cx.app.stores.blobs.renew(owner, cx.now).await? {
                BlobState::Whole { size } => Ok(whole(&blob, size).into()),
                BlobState::Uploading { received, size } if received == size => {
                    finish(cx, owner, size).await
                }
                BlobState::Uploading { received, .. } => Ok(incomplete(received).into()),
                BlobState::Unknown => Ok(incomplete(0).into()),
            };
        }
        let chunk = parse(cx, owner, request)?;
        let cost = u32::try_from(chunk.bytes.len().max(MIN_COST)).unwrap_or(u32::MAX);
        cx.charge(LimitClass::BlobBytes, Subject::Account(caller.account), cost).await?;
        let size = chunk.size;
        match cx.app.stores.blobs.upload(chunk).await? {
            ChunkOutcome::Stored { received } if received == size => finish(cx, owner, size).await,
            ChunkOutcome::Stored { received } => Ok(incomplete(received).into()),
            ChunkOutcome::Whole => Ok(whole(&blob, size).into()),
            ChunkOutcome::Gap { .. } => Err(Error::BlobGap),
            ChunkOutcome::OtherBytes => Err(Error::BlobOtherBytes),
            ChunkOutcome::OtherSize => Err(Error::BlobOtherSize),
            ChunkOutcome::TooLarge => Err(Error::BlobTooLarge),
            ChunkOutcome::QuotaExceeded => Err(Error::BlobQuota),
            ChunkOutcome::TooManyUploads => Err(Error::BlobUploadsFull),
        }
    }
}

/// Checks the fields of a chunk with bytes.
fn parse(cx: Cx<'_>, owner: BlobOwner, request: v1::UploadBlobRequest) -> Result<NewChunk, Error> {
    let v1::UploadBlobRequest { chunk: bytes, offset, total_size: size, mime_type: mime, .. } =
        request;
    convert::no_longer_than(&bytes, MAX_BLOB_CHUNK, "chunk")?;
    convert::no_longer_than(&mime, MAX_MIME_TYPE, "mime_type")?;
    let ends_inside = offset.checked_add(bytes.len() as u64).is_some_and(|end| end <= size);
    if !ends_inside {
        return Err(FieldError::new("total_size", FieldReason::Combination).into());
    }
    Ok(NewChunk { owner, size, mime, offset, bytes, now: cx.now })
}

/// Completes an upload whose bytes the store has.
async fn finish(cx: Cx<'_>, upload: BlobOwner, size: u64) -> Handled<methods::UploadBlob> {
    match cx.app.stores.blobs.finish(upload, cx.now).await? {
        BlobFinish::Whole => Ok(whole(&upload.blob, size).into()),
        BlobFinish::HashMismatch => Err(Error::BlobHashMismatch),
        BlobFinish::Incomplete { received } => Ok(incomplete(received).into()),
        BlobFinish::InProgress => Err(Error::BlobInProgress),
    }
}

fn whole(blob: &BlobId, size: u64) -> v1::UploadBlobResponse {
    let blob_id = Bytes::copy_from_slice(blob.as_bytes());
    v1::UploadBlobResponse { blob_id, received: size }
}

fn incomplete(received: u64) -> v1::UploadBlobResponse {
    v1::UploadBlobResponse { blob_id: Bytes::new(), received }
}
