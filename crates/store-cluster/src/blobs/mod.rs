//! Blobs: rows and chunks in Postgres, the bytes of larger blobs in the bucket.
//!
//! Every edge can accept the next chunk, because all chunks are rows. The completion of an upload
//! either leaves the chunks where they are, as the bytes of the blob, or writes them to one object
//! of the bucket. The intent to write an object is a row of `blob_trash` before the object is
//! written, and the transaction that refers to the object removes the row. No key is used twice. So
//! neither a killed edge nor a concurrent collection can leave a reference without bytes, or bytes
//! that nothing leads to.

mod chunks;
mod collect;
mod finish;
mod references;
mod upload;

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use qpq_blob_store::{Bucket, BucketError};
use qpq_domain::{AccountId, UnixMillis};
use qpq_ports::{
    BlobFinish, BlobOwner, BlobPart, BlobRange, BlobState, Blobs, ChunkOutcome, Collected,
    NewChunk, StoreError, StoreResult, Unreference,
};
use sqlx::{
    Postgres, Row as _,
    postgres::{PgArguments, PgRow},
    query::Query,
};
use tokio::sync::Semaphore;

use crate::{
    BlobPlaces, ClusterStore, ConnectError,
    error::NeverWritten,
    postgres::row::{Columns as _, millis},
};

/// The time for which an object without a use is kept, for the calls that read or write it. Longer
/// than any call.
const TRASH: Duration = Duration::from_secs(60 * 60);

/// Maximum number of objects that an edge writes concurrently. Each is in memory as a whole.
const FINISHING: usize = 4;

/// The parts of the store that only blobs use.
pub(crate) struct BlobStore {
    places: BlobPlaces,
    bucket: Option<Bucket>,
    finishing: Semaphore,
}

/// The place of the bytes of a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Rows of `blob_chunk`.
    Postgres,
    /// One object of the bucket.
    Bucket,
}

impl Place {
    fn read(row: &PgRow) -> sqlx::Result<Self> {
        match row.try_get::<i16, _>("place")? {
            0 => Ok(Self::Postgres),
            1 => Ok(Self::Bucket),
            _ => Err(NeverWritten("place").into()),
        }
    }

    const fn column(self) -> i16 {
        match self {
            Self::Postgres => 0,
            Self::Bucket => 1,
        }
    }
}

impl BlobStore {
    pub(crate) fn new(places: &BlobPlaces) -> Result<Self, ConnectError> {
        let bucket = places.bucket.as_ref().map(Bucket::new).transpose();
        let bucket = bucket.map_err(|error| ConnectError::Bucket(error.to_string()))?;
        Ok(Self { places: places.clone(), bucket, finishing: Semaphore::new(FINISHING) })
    }

    /// Returns the size of the largest blob that this store can keep.
    fn largest(&self) -> u64 {
        if self.bucket.is_some() { u64::MAX } else { self.places.max_without_bucket }
    }

    /// Returns the bucket if a blob of this size is written there.
    fn bucket_for(&self, size: u64) -> Option<&Bucket> {
        self.bucket.as_ref().filter(|_| size > self.places.small)
    }

    /// Returns the bucket in which an existing object is.
    fn bucket(&self) -> StoreResult<&Bucket> {
        self.bucket.as_ref().ok_or_else(|| StoreError::unavailable(NoBucket))
    }
}

/// The error for a blob in a bucket that the configuration does not name.
#[derive(Debug, thiserror::Error)]
#[error("a blob is in a bucket, but blobs.endpoint is not configured")]
struct NoBucket;

fn bucket_failed(error: BucketError) -> StoreError {
    tracing::warn!(%error, "bucket operation failed");
    match error {
        // Each row refers to an object that was written before.
        BucketError::NotFound => StoreError::corrupt(error),
        BucketError::Refused | BucketError::Unavailable(_) => StoreError::unavailable(error),
    }
}

type PgQuery<'q> = Query<'q, Postgres, PgArguments>;

/// Binds account and blob as $1 and $2.
fn of_owner(sql: &'static str, owner: &BlobOwner) -> PgQuery<'static> {
    sqlx::query(sql).bind(owner.account.0).bind(owner.blob.as_bytes().to_vec())
}

#[async_trait]
impl Blobs for ClusterStore {
    async fn upload(&self, chunk: NewChunk) -> StoreResult<ChunkOutcome> {
        let limits = self.inner.limits.blobs;
        if chunk.size > limits.max_bytes.min(self.inner.blobs.largest()) {
            return Ok(ChunkOutcome::TooLarge);
        }
        let expires_at = self.latest(chunk.now).plus(limits.upload_idle);
        Ok(self.inner.database.run(&upload::StoreChunk { chunk, expires_at, limits }).await?)
    }

    async fn finish(&self, upload: BlobOwner, now: UnixMillis) -> StoreResult<BlobFinish> {
        finish::run(self, upload, now).await
    }

    async fn renew(&self, owner: BlobOwner, now: UnixMillis) -> StoreResult<BlobState> {
        let expires_at = self.latest(now).plus(self.inner.limits.blobs.lifetime);
        Ok(self.inner.database.run(&references::Renew { owner, now, expires_at }).await?)
    }

    async fn read(&self, range: BlobRange, now: UnixMillis) -> StoreResult<Option<BlobPart>> {
        let BlobRange { reader, offset, length } = range;
        let find = references::Find { reader, now };
        let Some(found) = self.inner.database.run(&find).await? else { return Ok(None) };
        let references::Found { object, place, size, mime } = found;
        let left = size.saturating_sub(offset);
        let length = left.min(length as u64);
        let bytes = match (length, place) {
            (0, _) => Bytes::new(),
            (_, Place::Postgres) => {
                let read = chunks::Read { object: &object, offset, length };
                let bytes = self.inner.database.run(&read).await?;
                if bytes.len() as u64 != length {
                    return Err(StoreError::corrupt(NeverWritten("blob_chunk")));
                }
                bytes
            }
            (_, Place::Bucket) => {
                let read = self.inner.blobs.bucket()?.read(&object, offset, length).await;
                read.map_err(bucket_failed)?
            }
        };
        Ok(Some(BlobPart { bytes, size, mime }))
    }

    async fn unreference(&self, owner: BlobOwner, now: UnixMillis) -> StoreResult<Unreference> {
        let drop = references::DropReference::any(owner, self.trash_after(now));
        let is_removed = self.inner.database.run(&drop).await?;
        Ok(if is_removed { Unreference::Removed } else { Unreference::NotFound })
    }

    async fn release(&self, account: AccountId, now: UnixMillis) -> StoreResult<u64> {
        collect::release(self, account, self.trash_after(now)).await
    }

    async fn collect(&self, now: UnixMillis) -> StoreResult<Collected> {
        collect::run(self, now).await
    }
}

impl ClusterStore {
    /// Returns the latest instant that the present may be.
    fn latest(&self, now: UnixMillis) -> UnixMillis {
        let time = &self.inner.time;
        time.bounds(now, time.postgres()).latest
    }

    /// Returns the time from which on an object that is unused since now may be removed.
    fn trash_after(&self, now: UnixMillis) -> UnixMillis {
        self.latest(now).plus(TRASH)
    }
}

/// Adds an object to those that are removed later. One whose removal has begun is added again,
/// since it may have been written after the removal.
async fn dispose(
    connection: &mut sqlx::PgConnection,
    object: &str,
    place: Place,
    not_before: UnixMillis,
) -> sqlx::Result<()> {
    sqlx::query(DISPOSE)
        .bind(object)
        .bind(place.column())
        .bind(millis(not_before))
        .execute(connection)
        .await
        .map(drop)
}

const DISPOSE: &str = "
    INSERT INTO blob_trash (object, place, not_before) VALUES ($1, $2, $3)
    ON CONFLICT (object) DO UPDATE SET not_before = excluded.not_before, removing = false";

/// Returns the reservation of `size` bytes to the quota of an account.
async fn return_quota(
    connection: &mut sqlx::PgConnection,
    account: AccountId,
    size: i64,
) -> sqlx::Result<()> {
    sqlx::query("UPDATE blob_quota SET used = used - $2 WHERE account = $1")
        .bind(account.0)
        .bind(size)
        .execute(connection)
        .await
        .map(drop)
}

/// An open upload.
#[derive(Clone, Debug)]
struct Upload {
    object: String,
    size: u64,
    received: u64,
}

impl Upload {
    fn read(row: &PgRow) -> sqlx::Result<Self> {
        Ok(Self {
            object: row.try_get("object")?,
            size: row.unsigned("size")?,
            received: row.unsigned("received")?,
        })
    }
}

/// Returns a name that no object has or had: the hash, which is also a prefix for the bucket, and
/// random digits.
fn new_object(owner: &BlobOwner) -> String {
    format!("{}/{:032x}", owner.blob, rand::random::<u128>())
}
