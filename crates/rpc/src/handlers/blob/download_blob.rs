//! DownloadBlob (601).

use qpq_domain::{MAX_BLOB_CHUNK, MAX_MIME_TYPE};
use qpq_ports::{BlobOwner, BlobPart, BlobRange};
use qpq_proto::{convert, methods, v1};

use crate::{Caller, Cx, Error, Handled, Handler};

/// The size of an answer without its chunk, in bytes.
const OVERHEAD: usize = MAX_MIME_TYPE + 64;

impl Handler for methods::DownloadBlob {
    fn answer_bytes(request: &v1::DownloadBlobRequest) -> usize {
        length(request) + OVERHEAD
    }

    async fn handle(cx: Cx<'_>, caller: Caller, request: v1::DownloadBlobRequest) -> Handled<Self> {
        let blob = convert::blob_id(&request.blob_id, "blob_id")?;
        let range = BlobRange {
            reader: BlobOwner { account: caller.account, blob },
            offset: request.offset,
            length: length(&request),
        };
        let part = cx.app.stores.blobs.read(range, cx.now).await?.ok_or(Error::BlobNotFound)?;
        let BlobPart { bytes: chunk, size: total_size, mime: mime_type } = part;
        Ok(v1::DownloadBlobResponse { chunk, total_size, mime_type }.into())
    }
}

/// Returns the maximum number of bytes in the answer.
fn length(request: &v1::DownloadBlobRequest) -> usize {
    match convert::limit(request.length) {
        Some(length) => usize::try_from(length.get()).unwrap_or(usize::MAX).min(MAX_BLOB_CHUNK),
        None => MAX_BLOB_CHUNK,
    }
}
