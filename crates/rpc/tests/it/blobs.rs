//! Blobs (600 and 601).

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use qpq_domain::{AccountId, UnixMillis};
use qpq_ports::{
    BlobFinish, BlobOwner, BlobPart, BlobRange, BlobState, Blobs, ChunkOutcome, Collected,
    NewChunk, StoreError, StoreResult, Stores, Unreference,
};
use qpq_proto::{
    Status, methods,
    v1::{DownloadBlobRequest, DownloadBlobResponse, UploadBlobRequest, UploadBlobResponse},
};
use sha2::{Digest as _, Sha256};

use crate::harness::{Server, User};

fn content(size: usize) -> Bytes {
    (0_u32..).flat_map(u32::to_be_bytes).take(size).collect()
}

fn hash(content: &[u8]) -> Bytes {
    Bytes::copy_from_slice(&Sha256::digest(content))
}

fn chunk(content: &Bytes, begin: usize, end: usize) -> UploadBlobRequest {
    UploadBlobRequest {
        blob_hash: hash(content),
        chunk: content.slice(begin..end),
        offset: begin as u64,
        total_size: content.len() as u64,
        mime_type: "image/png".into(),
        ..Default::default()
    }
}

/// Returns a request without a chunk, which asks for the state.
fn state(content: &Bytes) -> UploadBlobRequest {
    UploadBlobRequest { blob_hash: hash(content), ..Default::default() }
}

impl User {
    async fn send_chunk(&self, request: UploadBlobRequest) -> (Bytes, u64) {
        let UploadBlobResponse { blob_id, received } =
            self.ok::<methods::UploadBlob>(request).await;
        (blob_id, received)
    }

    async fn refuses_chunk(&self, request: UploadBlobRequest, status: Status, code: &str) {
        self.refused::<methods::UploadBlob>(request).await.assert(status, code);
    }

    async fn download(&self, content: &Bytes, offset: u64, length: u32) -> DownloadBlobResponse {
        let request =
            DownloadBlobRequest { blob_id: hash(content), offset, length, ..Default::default() };
        self.ok::<methods::DownloadBlob>(request).await
    }
}

const NOTHING: Bytes = Bytes::new();

#[tokio::test]
async fn a_blob_is_uploaded_in_chunks_and_downloaded_in_parts_by_another_account() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    let content = content((2 << 20) + 5);
    assert_eq!(alice.send_chunk(state(&content)).await, (NOTHING, 0));
    assert_eq!(alice.send_chunk(chunk(&content, 0, 1 << 20)).await, (NOTHING, 1 << 20));
    assert_eq!(alice.send_chunk(state(&content)).await, (NOTHING, 1 << 20));
    assert_eq!(alice.send_chunk(chunk(&content, 1 << 20, 2 << 20)).await, (NOTHING, 2 << 20));
    let request = DownloadBlobRequest { blob_id: hash(&content), ..Default::default() };
    let refused = bob.refused::<methods::DownloadBlob>(request).await;
    refused.assert(Status::NotFound, "blob.not_found");
    let last = chunk(&content, 2 << 20, content.len());
    let whole = (hash(&content), content.len() as u64);
    assert_eq!(alice.send_chunk(last.clone()).await, whole);
    // The answer was lost.
    assert_eq!(alice.send_chunk(last).await, whole);
    assert_eq!(alice.send_chunk(state(&content)).await, whole);

    let mut parts = Vec::new();
    while parts.len() < content.len() {
        let part = bob.download(&content, parts.len() as u64, 0).await;
        assert_eq!((part.total_size, part.mime_type.as_str()), (whole.1, "image/png"));
        assert!(!part.chunk.is_empty() && part.chunk.len() <= 1 << 20);
        parts.extend_from_slice(&part.chunk);
    }
    assert_eq!(parts, content);
    assert_eq!(bob.download(&content, 10, 7).await.chunk, content.slice(10..17));
    assert_eq!(bob.download(&content, 0, u32::MAX).await.chunk.len(), 1 << 20);
    assert_eq!(bob.download(&content, u64::MAX, 1).await.chunk, NOTHING);
}

#[tokio::test]
async fn malformed_chunks_are_refused() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let content = content((1 << 20) + 1);
    let valid = || chunk(&content, 0, 1 << 20);
    for (request, field) in [
        (UploadBlobRequest { blob_hash: vec![1; 31].into(), ..valid() }, "blob_hash"),
        (UploadBlobRequest { chunk: content.clone(), ..valid() }, "chunk"),
        (UploadBlobRequest { mime_type: "m".repeat(129), ..valid() }, "mime_type"),
        (UploadBlobRequest { total_size: 0, ..valid() }, "total_size"),
        (UploadBlobRequest { total_size: (1 << 20) - 1, ..valid() }, "total_size"),
        (UploadBlobRequest { offset: 2, ..valid() }, "total_size"),
        (UploadBlobRequest { offset: u64::MAX, ..valid() }, "total_size"),
    ] {
        let refused = alice.refused::<methods::UploadBlob>(request).await;
        assert_eq!(refused.field, field);
        refused.assert(Status::BadRequest, "rpc.invalid_field");
    }
    let request = DownloadBlobRequest { blob_id: vec![1; 33].into(), ..Default::default() };
    let refused = alice.refused::<methods::DownloadBlob>(request).await;
    refused.assert(Status::BadRequest, "rpc.invalid_field");
}

#[tokio::test]
async fn chunks_that_do_not_continue_the_upload_are_refused() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let content = content(1_000);
    alice.refuses_chunk(chunk(&content, 1, 2), Status::BadRequest, "blob.gap").await;
    alice.send_chunk(chunk(&content, 0, 500)).await;
    alice.refuses_chunk(chunk(&content, 501, 1_000), Status::BadRequest, "blob.gap").await;
    let other = UploadBlobRequest { chunk: vec![9; 100].into(), ..chunk(&content, 0, 100) };
    alice.refuses_chunk(other, Status::BadRequest, "blob.other_bytes").await;
    let other = UploadBlobRequest { total_size: 999, ..chunk(&content, 500, 900) };
    alice.refuses_chunk(other, Status::BadRequest, "blob.other_size").await;
    // A repeat, and a chunk that begins in the repeated bytes.
    assert_eq!(alice.send_chunk(chunk(&content, 0, 500)).await, (NOTHING, 500));
    let whole = (hash(&content), 1_000);
    assert_eq!(alice.send_chunk(chunk(&content, 400, 1_000)).await, whole);
}

#[tokio::test]
async fn bytes_with_another_hash_are_refused_and_the_upload_is_removed() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let content = content(1_000);
    let wrong = UploadBlobRequest { chunk: vec![7; 1_000].into(), ..chunk(&content, 0, 1_000) };
    alice.refuses_chunk(wrong, Status::BadRequest, "blob.hash_mismatch").await;
    assert_eq!(alice.send_chunk(state(&content)).await, (NOTHING, 0));
    assert_eq!(alice.send_chunk(chunk(&content, 0, 1_000)).await, (hash(&content), 1_000));
}

#[tokio::test]
async fn a_known_hash_without_its_bytes_gives_no_reference() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    let (stored, unknown) = (content(1_000), content(1_001));
    alice.send_chunk(chunk(&stored, 0, 1_000)).await;
    // The answers about content that exists are those about content that does not.
    for content in [&stored, &unknown] {
        assert_eq!(bob.send_chunk(state(content)).await, (NOTHING, 0));
        assert_eq!(bob.send_chunk(chunk(content, 0, 10)).await, (NOTHING, 10));
        assert_eq!(bob.send_chunk(state(content)).await, (NOTHING, 10));
    }
}

#[tokio::test]
async fn blobs_beyond_a_limit_are_refused() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let content = content(100);
    let of_size = |n: u8, total_size| UploadBlobRequest {
        blob_hash: vec![n; 32].into(),
        total_size,
        ..chunk(&content, 0, 100)
    };
    let too_large = of_size(0, (50 << 20) + 1);
    alice.refuses_chunk(too_large, Status::BadRequest, "blob.too_large").await;
    for n in 1..=4 {
        alice.send_chunk(of_size(n, 50 << 20)).await;
    }
    let refused = alice.refused::<methods::UploadBlob>(of_size(5, 200)).await;
    assert!(refused.retry_after.is_some());
    refused.assert(Status::RateLimited, "blob.too_many_uploads");
}

/// Answers every call with the same outcome.
struct Fixed(fn() -> StoreError, ChunkOutcome, BlobFinish);

#[async_trait]
impl Blobs for Fixed {
    async fn upload(&self, _: NewChunk) -> StoreResult<ChunkOutcome> {
        Ok(self.1)
    }

    async fn finish(&self, _: BlobOwner, _: UnixMillis) -> StoreResult<BlobFinish> {
        match self.2 {
            BlobFinish::Whole => Err((self.0)()),
            other => Ok(other),
        }
    }

    async fn renew(&self, _: BlobOwner, _: UnixMillis) -> StoreResult<BlobState> {
        Ok(BlobState::Uploading { received: 100, size: 100 })
    }

    async fn read(&self, _: BlobRange, _: UnixMillis) -> StoreResult<Option<BlobPart>> {
        Err((self.0)())
    }

    async fn unreference(&self, _: BlobOwner, _: UnixMillis) -> StoreResult<Unreference> {
        unreachable!("no handler removes a reference")
    }

    async fn release(&self, _: AccountId, _: UnixMillis) -> StoreResult<u64> {
        unreachable!("no handler releases an account")
    }

    async fn collect(&self, _: UnixMillis) -> StoreResult<Collected> {
        unreachable!("no handler collects")
    }
}

async fn answering(outcome: ChunkOutcome, finish: BlobFinish) -> Server {
    let unavailable = || StoreError::unavailable(std::io::Error::other("no bucket"));
    let blobs = Arc::new(Fixed(unavailable, outcome, finish));
    Server::with_stores(|_| {}, |stores| Stores { blobs, ..stores }).await
}

#[tokio::test]
async fn an_unavailable_object_store_is_unavailable_with_a_wait() {
    let stored = ChunkOutcome::Stored { received: 100 };
    let server = answering(stored, BlobFinish::Whole).await;
    let alice = server.user("alice").await;
    let content = content(100);
    for request in [chunk(&content, 0, 100), state(&content)] {
        let refused = alice.refused::<methods::UploadBlob>(request).await;
        assert!(refused.retry_after.is_some());
        refused.assert(Status::Unavailable, "rpc.unavailable");
    }
    let request = DownloadBlobRequest { blob_id: hash(&content), ..Default::default() };
    let refused = alice.refused::<methods::DownloadBlob>(request).await;
    refused.assert(Status::Unavailable, "rpc.unavailable");
}

#[tokio::test]
async fn refusals_of_the_store_have_their_codes() {
    let stored = ChunkOutcome::Stored { received: 100 };
    let content = content(100);
    for (outcome, finish, status, code) in [
        (ChunkOutcome::QuotaExceeded, BlobFinish::Whole, Status::Forbidden, "blob.quota_exceeded"),
        (stored, BlobFinish::InProgress, Status::Unavailable, "blob.in_progress"),
    ] {
        let server = answering(outcome, finish).await;
        let alice = server.user("alice").await;
        alice.refuses_chunk(chunk(&content, 0, 100), status, code).await;
    }
    let server = answering(stored, BlobFinish::Incomplete { received: 7 }).await;
    let alice = server.user("alice").await;
    assert_eq!(alice.send_chunk(chunk(&content, 0, 100)).await, (NOTHING, 7));
}
