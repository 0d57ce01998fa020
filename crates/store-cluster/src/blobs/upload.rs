//! The upload of a chunk: one transaction, which locks the upload first.

use qpq_domain::{BlobLimits, UnixMillis};
use qpq_ports::{ChunkOutcome, NewChunk};
use sqlx::{PgConnection, Row as _};

use super::{Upload, chunks, new_object, of_owner};
use crate::postgres::{
    Repeat, Scope, Statement,
    row::{Columns as _, millis, number},
};

/// Opens the upload, if there is none, and stores a chunk.
pub(super) struct StoreChunk {
    pub(super) chunk: NewChunk,
    pub(super) expires_at: UnixMillis,
    pub(super) limits: BlobLimits,
}

const SIZE_OF_OWN: &str = "
    SELECT b.size FROM blob_ref r JOIN blob b ON b.hash = r.hash
     WHERE r.account = $1 AND r.hash = $2 AND r.expires_at > $3";

const OPEN: &str = "
    INSERT INTO upload (account, hash, object, size, received, mime, expires_at)
    VALUES ($1, $2, $3, $4, 0, $5, $6) ON CONFLICT (account, hash) DO NOTHING";

const LOCK: &str = "
    SELECT object, size, received FROM upload WHERE account = $1 AND hash = $2 FOR UPDATE";

/// Reserves $2 bytes, unless more than $3 would be reserved then.
const RESERVE: &str = "
    INSERT INTO blob_quota AS q (account, used) VALUES ($1, $2)
    ON CONFLICT (account) DO UPDATE SET used = q.used + excluded.used
     WHERE q.used + excluded.used <= $3";

/// Counts the uploads of an account whose quota is locked.
const USE: &str = "
    SELECT count(*) AS uploads, coalesce(sum(size), 0)::bigint AS staged
      FROM upload WHERE account = $1";

const ADVANCE: &str = "
    UPDATE upload SET received = $3, expires_at = greatest(expires_at, $4)
     WHERE account = $1 AND hash = $2";

const CANCEL: &str = "DELETE FROM upload WHERE account = $1 AND hash = $2";

impl Statement for StoreChunk {
    type Output = ChunkOutcome;

    /// A repeat finds the bytes of the first attempt.
    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Transaction;

    fn name(&self) -> &'static str {
        "store_chunk"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<ChunkOutcome> {
        let NewChunk { owner, size, .. } = &self.chunk;
        loop {
            let own = of_owner(SIZE_OF_OWN, owner).bind(millis(self.chunk.now));
            if let Some(row) = own.fetch_optional(&mut *connection).await? {
                let is_same = row.unsigned("size")? == *size;
                return Ok(if is_same { ChunkOutcome::Whole } else { ChunkOutcome::OtherSize });
            }
            if self.open(connection).await?
                && let Some(refusal) = self.reserve(connection).await?
            {
                of_owner(CANCEL, owner).execute(connection).await?;
                return Ok(refusal);
            }
            let locked = of_owner(LOCK, owner).fetch_optional(&mut *connection).await?;
            if let Some(row) = locked {
                return self.store(connection, Upload::read(&row)?).await;
            }
            // Another call has completed or removed the upload since.
        }
    }
}

impl StoreChunk {
    /// Inserts the upload. Returns whether there was none.
    async fn open(&self, connection: &mut PgConnection) -> sqlx::Result<bool> {
        let NewChunk { owner, size, mime, .. } = &self.chunk;
        let opened = of_owner(OPEN, owner)
            .bind(new_object(owner))
            .bind(number(*size))
            .bind(mime)
            .bind(millis(self.expires_at))
            .execute(connection)
            .await?;
        Ok(opened.rows_affected() > 0)
    }

    /// Reserves the quota of a new upload, or returns the reason for a refusal, in which case
    /// nothing is reserved.
    async fn reserve(&self, connection: &mut PgConnection) -> sqlx::Result<Option<ChunkOutcome>> {
        let (account, size) = (self.chunk.owner.account, self.chunk.size);
        let limits = &self.limits;
        if size > limits.quota {
            return Ok(Some(ChunkOutcome::QuotaExceeded));
        }
        let reserve = sqlx::query(RESERVE).bind(account.0).bind(number(size));
        let reserved = reserve.bind(number(limits.quota)).execute(&mut *connection).await?;
        if reserved.rows_affected() == 0 {
            return Ok(Some(ChunkOutcome::QuotaExceeded));
        }
        // The new upload is among these. The lock of the quota makes others of the account wait.
        let row = sqlx::query(USE).bind(account.0).fetch_one(&mut *connection).await?;
        let (uploads, staged): (i64, i64) = (row.try_get("uploads")?, row.try_get("staged")?);
        if uploads > limits.max_uploads.into() || staged > number(limits.max_staged) {
            super::return_quota(connection, account, number(size)).await?;
            return Ok(Some(ChunkOutcome::TooManyUploads));
        }
        Ok(None)
    }

    /// Stores the chunk of an upload that is locked.
    async fn store(
        &self,
        connection: &mut PgConnection,
        upload: Upload,
    ) -> sqlx::Result<ChunkOutcome> {
        let NewChunk { owner, size, offset, bytes, .. } = &self.chunk;
        let Upload { object, size: expected, received } = upload;
        if *size != expected {
            return Ok(ChunkOutcome::OtherSize);
        }
        if *offset > received {
            return Ok(ChunkOutcome::Gap { received });
        }
        let end = offset + bytes.len() as u64;
        let repeated = usize::try_from(received - offset).unwrap_or(usize::MAX).min(bytes.len());
        let (repeated, new) = bytes.split_at(repeated);
        if !repeated.is_empty() {
            let length = repeated.len() as u64;
            if chunks::read(connection, &object, *offset, length).await? != repeated {
                return Ok(ChunkOutcome::OtherBytes);
            }
        }
        if new.is_empty() {
            return Ok(ChunkOutcome::Stored { received });
        }
        chunks::append(connection, &object, received, new).await?;
        let advance = of_owner(ADVANCE, owner).bind(number(end)).bind(millis(self.expires_at));
        advance.execute(connection).await?;
        Ok(ChunkOutcome::Stored { received: end })
    }
}
