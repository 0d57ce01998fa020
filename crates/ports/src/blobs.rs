//! Blobs: encrypted files, uploaded in chunks and identified by the SHA-256 of their content.
//!
//! An account has a *reference* to each blob that it has uploaded. The content is stored once for
//! all references, and removed after the last one. An account receives a reference only for bytes
//! that it has uploaded, also if the content is stored already: otherwise a call with the hash of a
//! file would reveal whether some account has uploaded that file.
//!
//! An open upload reserves the size of the blob in the quota of its account. Its end, whatever the
//! reason, returns the reservation or turns it into that of the reference.

use async_trait::async_trait;
use bytes::Bytes;
use qpq_domain::{AccountId, BlobId, UnixMillis};

use crate::StoreResult;

/// Stores blobs and the chunks of uploads.
///
/// The backend's configuration limits sizes, quotas and lifetimes ([`qpq_domain::BlobLimits`]).
#[async_trait]
pub trait Blobs: Send + Sync {
    /// Stores a chunk that begins at or before the end of the bytes that are stored, durably. The
    /// first chunk opens the upload. Bytes that are stored already are compared, not replaced.
    ///
    /// Once all bytes are stored, [`finish`](Self::finish) completes the blob.
    async fn upload(&self, chunk: NewChunk) -> StoreResult<ChunkOutcome>;

    /// Checks the hash of an upload whose bytes are all stored, and replaces the upload with a
    /// reference to the blob. A wrong hash removes the upload. Safe to repeat.
    async fn finish(&self, upload: BlobOwner, now: UnixMillis) -> StoreResult<BlobFinish>;

    /// Returns the state of a blob as its owner may see it. Extends the lifetime of a reference.
    async fn renew(&self, owner: BlobOwner, now: UnixMillis) -> StoreResult<BlobState>;

    /// Reads a part of a blob that has a reference of any account at `now`. `None` if there is no
    /// such blob.
    async fn read(&self, range: BlobRange, now: UnixMillis) -> StoreResult<Option<BlobPart>>;

    /// Removes a reference and returns its quota. The content is removed later by
    /// [`collect`](Self::collect) if this was the last reference.
    async fn unreference(&self, owner: BlobOwner, now: UnixMillis) -> StoreResult<Unreference>;

    /// Removes uploads and references of the account, at most one bounded batch. Returns their
    /// number. The caller repeats the call until the number is zero.
    async fn release(&self, account: AccountId, now: UnixMillis) -> StoreResult<u64>;

    /// Removes uploads and references that have expired by `now`, and content without a reference
    /// once no read can be using it. Removes at most one bounded batch of each. The caller repeats
    /// the call.
    async fn collect(&self, now: UnixMillis) -> StoreResult<Collected>;
}

/// An account with a reference to a blob, or with an upload of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlobOwner {
    /// The account.
    pub account: AccountId,
    /// The blob.
    pub blob: BlobId,
}

/// A chunk of an upload.
#[derive(Clone, Debug)]
pub struct NewChunk {
    /// The uploading account and the hash of the whole blob.
    pub owner: BlobOwner,
    /// The size of the whole blob, in bytes, more than zero.
    pub size: u64,
    /// The MIME type. That of the first chunk counts.
    pub mime: String,
    /// The position of the chunk in the blob.
    pub offset: u64,
    /// The bytes: at least one, and no more than the blob has after `offset`.
    pub bytes: Bytes,
    /// The instant of the call.
    pub now: UnixMillis,
}

/// The outcome of the upload of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChunkOutcome {
    /// The bytes are stored.
    Stored {
        /// The number of stored bytes, from the start of the blob.
        received: u64,
    },
    /// The account has a reference to the blob. The bytes were not compared.
    Whole,
    /// The chunk begins after the stored bytes. Nothing was stored.
    Gap {
        /// The number of stored bytes, from the start of the blob.
        received: u64,
    },
    /// Other bytes are stored at this position. Nothing was stored.
    OtherBytes,
    /// The upload, or the blob, has another size. Nothing was stored.
    OtherSize,
    /// The blob is larger than the store accepts.
    TooLarge,
    /// The blob exceeds the quota of the account.
    QuotaExceeded,
    /// The account has the maximum number or size of open uploads.
    TooManyUploads,
}

/// The outcome of the completion of an upload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlobFinish {
    /// The account has a reference to the blob.
    Whole,
    /// The content has another hash. The upload was removed.
    HashMismatch,
    /// Bytes are missing.
    Incomplete {
        /// The number of stored bytes, from the start of the blob. Zero if there is no upload.
        received: u64,
    },
    /// Another call completes the upload now.
    InProgress,
}

/// The state of a blob as its owner may see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlobState {
    /// The account has a reference to the blob.
    Whole {
        /// The size of the blob, in bytes.
        size: u64,
    },
    /// The account uploads the blob.
    Uploading {
        /// The number of stored bytes, from the start of the blob.
        received: u64,
        /// The size of the blob, in bytes.
        size: u64,
    },
    /// The account has neither a reference nor an upload.
    Unknown,
}

/// A part of a blob to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlobRange {
    /// The reading account, and the blob. The account need not have a reference.
    pub reader: BlobOwner,
    /// The position of the first byte. From the end of the blob on, the part is empty.
    pub offset: u64,
    /// Maximum number of bytes.
    pub length: usize,
}

/// A part of a blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlobPart {
    /// The bytes from the requested position on.
    pub bytes: Bytes,
    /// The size of the whole blob, in bytes.
    pub size: u64,
    /// The MIME type of the reader's own reference; without one, that of another reference.
    pub mime: String,
}

/// The outcome of the removal of a reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unreference {
    /// The reference was removed.
    Removed,
    /// The account has no reference to the blob.
    NotFound,
}

/// The result of [`Blobs::collect`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// The number of removed uploads.
    pub uploads: u64,
    /// The number of removed references.
    pub references: u64,
    /// The number of removed files or objects.
    pub objects: u64,
}

impl Collected {
    /// Returns whether nothing was removed.
    pub const fn is_empty(&self) -> bool {
        self.uploads == 0 && self.references == 0 && self.objects == 0
    }
}
