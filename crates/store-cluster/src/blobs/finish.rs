//! The completion of an upload.
//!
//! 1. One transaction claims the upload for a while, so that other calls do not repeat the work.
//!    For an object of the bucket, it also stores the intent to write that object.
//! 2. The chunks are read and hashed. A wrong hash removes the upload.
//! 3. The object is written.
//! 4. One transaction replaces the upload with a reference. It fails if a collection has begun to
//!    remove the object meanwhile, and everything is repeated with another object.
//!
//! The claim only saves work. Two calls that complete one upload write two objects, and the
//! transaction of one of them leaves its object in the trash.

use std::time::Duration;

use bytes::Bytes;
use qpq_domain::UnixMillis;
use qpq_ports::{BlobFinish, BlobOwner, StoreError, StoreResult};
use sha2::{Digest as _, Sha256};
use sqlx::{PgConnection, Row as _};
use tokio::time::timeout;

use super::{Place, Upload, bucket_failed, chunks, dispose, new_object, of_owner, return_quota};
use crate::{
    ClusterStore,
    postgres::{Repeat, Scope, Statement, row::millis},
};

/// The time for which one call completes an upload alone. Other calls try again later.
const CLAIM: Duration = Duration::from_secs(30);

/// Maximum time for which a completion waits for others, which may wait for a slow bucket.
const QUEUE_TIMEOUT: Duration = Duration::from_secs(10);

/// Maximum attempts. Each failed one needs a collection that is an hour late, or another call that
/// completes the upload.
const MAX_ATTEMPTS: u32 = 3;

/// The bytes that are read from Postgres at a time.
const PAGE: u64 = 4 << 20;

/// The error if each attempt to complete an upload lost a race.
#[derive(Debug, thiserror::Error)]
#[error("other calls changed the upload in {MAX_ATTEMPTS} attempts to complete it")]
struct Contended;

pub(super) async fn run(
    store: &ClusterStore,
    owner: BlobOwner,
    now: UnixMillis,
) -> StoreResult<BlobFinish> {
    let inner = &store.inner;
    let until = store.latest(now).plus(CLAIM);
    for _ in 0..MAX_ATTEMPTS {
        let intended = new_object(&owner);
        let claim = Claim {
            owner,
            now,
            until,
            intended: &intended,
            bucket_above: inner.blobs.bucket.as_ref().map(|_| inner.blobs.places.small),
            trash_after: store.trash_after(now),
        };
        let upload = match inner.database.run(&claim).await? {
            Claimed::Upload(upload) => upload,
            Claimed::Not(outcome) => return Ok(outcome),
        };
        let release = Release { owner, object: &upload.object };
        let place = match write(store, &owner, &upload, &intended).await {
            Ok(Checked::Written(place)) => place,
            Ok(Checked::Missing) => {
                inner.database.run(&release).await?;
                continue;
            }
            Ok(Checked::OtherHash) => {
                let discard = Discard { owner, object: &upload.object, idle_by: None };
                inner.database.run(&discard).await?;
                return Ok(BlobFinish::HashMismatch);
            }
            Err(error) => {
                // A failure delays the next call until the end of the claim.
                let _ = inner.database.run(&release).await;
                return Err(error);
            }
        };
        let complete = Complete {
            owner,
            upload: &upload,
            object: if place == Place::Bucket { &intended } else { &upload.object },
            place,
            expires_at: store.latest(now).plus(inner.limits.blobs.lifetime),
            trash_after: store.trash_after(now),
        };
        if inner.database.run(&complete).await? == Completed::Yes {
            return Ok(BlobFinish::Whole);
        }
        inner.database.run(&release).await?;
    }
    Err(StoreError::unavailable(Contended))
}

/// The result of a check of the chunks.
enum Checked {
    /// The chunks have the hash, and are written in their place.
    Written(Place),
    /// The chunks have another hash.
    OtherHash,
    /// Chunks are missing: another call has completed or removed the upload.
    Missing,
}

/// Checks the hash of the chunks, and writes the object if the blob belongs into the bucket.
async fn write(
    store: &ClusterStore,
    owner: &BlobOwner,
    upload: &Upload,
    intended: &str,
) -> StoreResult<Checked> {
    let inner = &store.inner;
    let bucket = inner.blobs.bucket_for(upload.size);
    // Only what is written to the bucket is in memory as a whole.
    let _permit = match bucket {
        Some(_) => {
            let permit = timeout(QUEUE_TIMEOUT, inner.blobs.finishing.acquire()).await;
            Some(permit.map_err(StoreError::unavailable)?.map_err(StoreError::unavailable)?)
        }
        None => None,
    };
    let (mut hash, mut parts, mut offset) = (Sha256::new(), Vec::<Bytes>::new(), 0);
    while offset < upload.size {
        let length = PAGE.min(upload.size - offset);
        let read = chunks::Read { object: &upload.object, offset, length };
        let part = inner.database.run(&read).await?;
        if part.len() as u64 != length {
            return Ok(Checked::Missing);
        }
        offset += part.len() as u64;
        hash.update(&part);
        if bucket.is_some() {
            parts.push(part);
        }
        tokio::task::yield_now().await;
    }
    if hash.finalize()[..] != owner.blob.as_bytes()[..] {
        return Ok(Checked::OtherHash);
    }
    let Some(bucket) = bucket else { return Ok(Checked::Written(Place::Postgres)) };
    bucket.put(intended, parts).await.map_err(bucket_failed)?;
    Ok(Checked::Written(Place::Bucket))
}

/// Claims an upload whose bytes are all stored.
struct Claim<'a> {
    owner: BlobOwner,
    now: UnixMillis,
    until: UnixMillis,
    /// The object to be written, if the upload is larger than `bucket_above`.
    intended: &'a str,
    bucket_above: Option<u64>,
    trash_after: UnixMillis,
}

enum Claimed {
    Upload(Upload),
    Not(BlobFinish),
}

const LOCK: &str = "
    SELECT object, size, received, finishing_until > coalesce(store_now(), $3) AS is_claimed
      FROM upload WHERE account = $1 AND hash = $2 FOR UPDATE";

const CLAIM_UPLOAD: &str =
    "UPDATE upload SET finishing_until = $3 WHERE account = $1 AND hash = $2";

const HAS_REFERENCE: &str = "
    SELECT EXISTS (SELECT 1 FROM blob_ref
                    WHERE account = $1 AND hash = $2 AND expires_at > $3) AS has_reference";

impl Statement for Claim<'_> {
    type Output = Claimed;

    /// A repeat would find the claim of the first attempt.
    const REPEAT: Repeat = Repeat::Never;
    const SCOPE: Scope = Scope::Transaction;

    fn name(&self) -> &'static str {
        "claim_upload"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Claimed> {
        let lock = of_owner(LOCK, &self.owner).bind(millis(self.now));
        let Some(row) = lock.fetch_optional(&mut *connection).await? else {
            let query = of_owner(HAS_REFERENCE, &self.owner).bind(millis(self.now));
            let is_whole = query.fetch_one(connection).await?.try_get("has_reference")?;
            return Ok(Claimed::Not(if is_whole {
                BlobFinish::Whole
            } else {
                BlobFinish::Incomplete { received: 0 }
            }));
        };
        let upload = Upload::read(&row)?;
        if upload.received < upload.size {
            return Ok(Claimed::Not(BlobFinish::Incomplete { received: upload.received }));
        }
        if row.try_get("is_claimed")? {
            return Ok(Claimed::Not(BlobFinish::InProgress));
        }
        let claim = of_owner(CLAIM_UPLOAD, &self.owner).bind(millis(self.until));
        claim.execute(&mut *connection).await?;
        if self.bucket_above.is_some_and(|above| upload.size > above) {
            dispose(connection, self.intended, Place::Bucket, self.trash_after).await?;
        }
        Ok(Claimed::Upload(upload))
    }
}

/// Ends the claim of an upload.
struct Release<'a> {
    owner: BlobOwner,
    object: &'a str,
}

const RELEASE: &str =
    "UPDATE upload SET finishing_until = 0 WHERE account = $1 AND hash = $2 AND object = $3";

impl Statement for Release<'_> {
    type Output = ();

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "release_upload"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<()> {
        let release = of_owner(RELEASE, &self.owner).bind(self.object.to_owned());
        release.execute(connection).await.map(drop)
    }
}

/// Removes an upload and its chunks, and returns its quota.
pub(super) struct Discard<'a> {
    pub(super) owner: BlobOwner,
    pub(super) object: &'a str,
    /// Only if the upload is idle at this instant.
    pub(super) idle_by: Option<UnixMillis>,
}

const REMOVE_UPLOAD: &str = "
    DELETE FROM upload WHERE account = $1 AND hash = $2 AND object = $3
       AND ($4::bigint IS NULL OR expires_at <= least($4, store_now()))
    RETURNING size, mime";

impl Statement for Discard<'_> {
    type Output = ();

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Transaction;

    fn name(&self) -> &'static str {
        "discard_upload"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<()> {
        let remove = of_owner(REMOVE_UPLOAD, &self.owner).bind(self.object.to_owned());
        let remove = remove.bind(self.idle_by.map(millis));
        if let Some(row) = remove.fetch_optional(&mut *connection).await? {
            chunks::remove(connection, self.object).await?;
            return_quota(connection, self.owner.account, row.try_get("size")?).await?;
        }
        Ok(())
    }
}

/// Replaces an upload with a reference to its blob.
struct Complete<'a> {
    owner: BlobOwner,
    upload: &'a Upload,
    /// The name of the checked bytes.
    object: &'a str,
    place: Place,
    expires_at: UnixMillis,
    trash_after: UnixMillis,
}

/// The outcome of [`Complete`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Completed {
    Yes,
    /// The upload was completed or removed by another call, or the object is being removed.
    No,
}

/// Keeps the object, unless a collection has begun to remove it.
const KEEP: &str = "DELETE FROM blob_trash WHERE object = $1 AND NOT removing";

/// Inserts the blob or locks the present one, and returns the object of either.
const STORE: &str = "
    INSERT INTO blob AS b (hash, object, place, size) VALUES ($1, $2, $3, $4)
    ON CONFLICT (hash) DO UPDATE SET size = b.size RETURNING object";

const REFER: &str = "
    INSERT INTO blob_ref (account, hash, mime, expires_at) VALUES ($1, $2, $3, $4)
    ON CONFLICT (account, hash) DO NOTHING";

/// Renews an expired reference that was not removed yet.
const REFER_AGAIN: &str =
    "UPDATE blob_ref SET mime = $3, expires_at = $4 WHERE account = $1 AND hash = $2";

impl Statement for Complete<'_> {
    type Output = Completed;

    /// A repeat finds no upload, and the caller then finds the reference.
    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Transaction;

    fn name(&self) -> &'static str {
        "complete_upload"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Completed> {
        let Self { owner, upload, object, place, .. } = self;
        // A collection that has begun to remove the object may have done so before it was written.
        if *place == Place::Bucket {
            let kept = sqlx::query(KEEP).bind(object).execute(&mut *connection).await?;
            if kept.rows_affected() == 0 {
                dispose(connection, object, *place, self.trash_after).await?;
                return Ok(Completed::No);
            }
        }
        let remove = of_owner(REMOVE_UPLOAD, owner).bind(&upload.object).bind(None::<i64>);
        let Some(row) = remove.fetch_optional(&mut *connection).await? else {
            if *place == Place::Bucket {
                dispose(connection, object, *place, self.trash_after).await?;
            }
            return Ok(Completed::No);
        };
        let (size, mime): (i64, String) = (row.try_get("size")?, row.try_get("mime")?);
        let stored: String = sqlx::query_scalar(STORE)
            .bind(&owner.blob.as_bytes()[..])
            .bind(object)
            .bind(place.column())
            .bind(size)
            .fetch_one(&mut *connection)
            .await?;
        let is_first = stored == *object;
        if *place == Place::Bucket && !is_first {
            dispose(connection, object, *place, self.trash_after).await?;
        }
        if *place == Place::Bucket || !is_first {
            chunks::remove(connection, &upload.object).await?;
        }
        let refer = |sql| of_owner(sql, owner).bind(mime.clone()).bind(millis(self.expires_at));
        if refer(REFER).execute(&mut *connection).await?.rows_affected() == 0 {
            refer(REFER_AGAIN).execute(&mut *connection).await?;
            return_quota(connection, owner.account, size).await?;
        }
        Ok(Completed::Yes)
    }
}
