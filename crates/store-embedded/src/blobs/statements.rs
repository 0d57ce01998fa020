//! The statements of blobs. Each one keeps the quotas and the rows of all files complete.

use std::time::Duration;

use qpq_domain::{AccountId, BlobId, BlobLimits, UnixMillis};
use qpq_ports::{BlobFinish, BlobOwner, ChunkOutcome};
use sqlx::{
    Row as _, SqliteConnection,
    query::Query,
    sqlite::{SqliteArguments, SqliteRow},
};

use crate::{
    error::NeverWritten,
    row::{Columns as _, millis, number},
    statement::{Done, SMALL, Statement},
};

/// The time for which a file without a use is kept, for the reads and backups that use it.
const TRASH: Duration = Duration::from_secs(60 * 60);

/// Maximum rows that one statement removes.
pub(super) const BATCH: i64 = 64;

/// Returns the time from which on a file that is unused since `latest` may be removed.
pub(super) fn trash_after(latest: UnixMillis) -> UnixMillis {
    latest.plus(TRASH)
}

/// An open upload.
pub(super) struct Upload {
    pub(super) object: String,
    pub(super) size: u64,
    pub(super) received: u64,
}

impl Upload {
    pub(super) fn read(row: &SqliteRow) -> sqlx::Result<Self> {
        Ok(Self {
            object: row.try_get("object")?,
            size: row.unsigned("size")?,
            received: row.unsigned("received")?,
        })
    }
}

type SqliteQuery<'q> = Query<'q, sqlx::Sqlite, SqliteArguments>;

/// Binds account and blob as ?1 and ?2.
fn of_owner(sql: &'static str, owner: &BlobOwner) -> SqliteQuery<'static> {
    sqlx::query(sql).bind(owner.account.0).bind(owner.blob.as_bytes().to_vec())
}

/// Opens an upload, or finds the reason for a refusal.
pub(super) struct Begin {
    pub(super) owner: BlobOwner,
    pub(super) size: u64,
    pub(super) mime: String,
    pub(super) now: UnixMillis,
    pub(super) expires_at: UnixMillis,
    pub(super) limits: BlobLimits,
}

pub(super) enum Begun {
    Opened(Upload),
    Refused(ChunkOutcome),
}

const SIZE_OF_OWN: &str = "
    SELECT b.size FROM blob_ref r JOIN blob b ON b.hash = r.hash
     WHERE r.account = ?1 AND r.hash = ?2 AND r.expires_at > ?3";

const USE: &str = "
    SELECT count(*) AS uploads, coalesce(sum(size), 0) AS staged,
           coalesce((SELECT used FROM blob_quota WHERE account = ?1), 0) AS used
      FROM upload WHERE account = ?1";

/// Opens an upload under the name of a file that was never used.
const OPEN: &str = "
    INSERT INTO upload (account, hash, object, size, received, mime, expires_at)
    VALUES (?1, ?2, lower(hex(?2)) || '.' || lower(hex(randomblob(16))), ?3, 0, ?4, ?5)
    RETURNING object, size, received";

const RESERVE: &str = "
    INSERT INTO blob_quota (account, used) VALUES (?1, ?2)
    ON CONFLICT (account) DO UPDATE SET used = used + excluded.used";

impl Statement for Begin {
    type Answer = Begun;
    const NAME: &'static str = "begin upload";

    fn bytes(&self) -> usize {
        SMALL + self.mime.len()
    }

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<Begun>> {
        if let Some(refusal) = self.refusal(tx).await? {
            return Ok(Done::keep(Begun::Refused(refusal)));
        }
        let row = of_owner(OPEN, &self.owner)
            .bind(number(self.size))
            .bind(&self.mime)
            .bind(millis(self.expires_at))
            .fetch_one(&mut *tx)
            .await?;
        let reserve = sqlx::query(RESERVE).bind(self.owner.account.0).bind(number(self.size));
        reserve.execute(tx).await?;
        Ok(Done::keep(Begun::Opened(Upload::read(&row)?)))
    }
}

impl Begin {
    async fn refusal(&self, tx: &mut SqliteConnection) -> sqlx::Result<Option<ChunkOutcome>> {
        let own = of_owner(SIZE_OF_OWN, &self.owner).bind(millis(self.now));
        if let Some(row) = own.fetch_optional(&mut *tx).await? {
            let is_same = row.unsigned("size")? == self.size;
            return Ok(Some(if is_same { ChunkOutcome::Whole } else { ChunkOutcome::OtherSize }));
        }
        let row = sqlx::query(USE).bind(self.owner.account.0).fetch_one(tx).await?;
        let (uploads, staged) = (row.unsigned("uploads")?, row.unsigned("staged")?);
        let limits = &self.limits;
        Ok(if row.unsigned("used")? + self.size > limits.quota {
            Some(ChunkOutcome::QuotaExceeded)
        } else if uploads >= limits.max_uploads.into() || staged + self.size > limits.max_staged {
            Some(ChunkOutcome::TooManyUploads)
        } else {
            None
        })
    }
}

/// Counts bytes that are durable in the file. Answers whether the upload is open.
pub(super) struct Advance {
    pub(super) owner: BlobOwner,
    pub(super) object: String,
    pub(super) received: u64,
    pub(super) expires_at: UnixMillis,
}

const ADVANCE: &str = "
    UPDATE upload SET received = max(received, ?4), expires_at = max(expires_at, ?5)
     WHERE account = ?1 AND hash = ?2 AND object = ?3";

impl Statement for Advance {
    type Answer = bool;
    const NAME: &'static str = "advance upload";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<bool>> {
        let advance = of_owner(ADVANCE, &self.owner).bind(&self.object);
        let advance = advance.bind(number(self.received)).bind(millis(self.expires_at));
        Ok(Done::keep(advance.execute(tx).await?.rows_affected() > 0))
    }
}

/// Replaces an upload, whose file has the right hash, with a reference to its blob.
pub(super) struct Complete {
    pub(super) owner: BlobOwner,
    pub(super) object: String,
    pub(super) expires_at: UnixMillis,
    pub(super) trash_after: UnixMillis,
}

const CLOSE: &str = "
    DELETE FROM upload WHERE account = ?1 AND hash = ?2 AND object = ?3 AND received = size
    RETURNING size, mime";

const STORE: &str =
    "INSERT INTO blob (hash, object, size) VALUES (?1, ?2, ?3) ON CONFLICT (hash) DO NOTHING";

/// Whether an expired reference is left, which has its own reservation.
const HAS_OLD: &str =
    "SELECT EXISTS (SELECT 1 FROM blob_ref WHERE account = ?1 AND hash = ?2) AS has_old";

const REFER: &str = "
    INSERT INTO blob_ref (account, hash, mime, expires_at) VALUES (?1, ?2, ?3, ?4)
    ON CONFLICT (account, hash)
    DO UPDATE SET mime = excluded.mime, expires_at = excluded.expires_at";

const RETURN: &str = "UPDATE blob_quota SET used = used - ?2 WHERE account = ?1";

const DISPOSE: &str = "INSERT INTO blob_trash (object, not_before) VALUES (?1, ?2)";

impl Statement for Complete {
    type Answer = BlobFinish;
    const NAME: &'static str = "complete upload";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<BlobFinish>> {
        let owner = &self.owner;
        let closed = of_owner(CLOSE, owner).bind(&self.object).fetch_optional(&mut *tx).await?;
        let Some(row) = closed else {
            return Ok(Done::keep(BlobFinish::Incomplete { received: 0 }));
        };
        let (size, mime): (i64, String) = (row.try_get("size")?, row.try_get("mime")?);
        let hash = owner.blob.as_bytes().to_vec();
        let store = sqlx::query(STORE).bind(hash).bind(&self.object).bind(size);
        if store.execute(&mut *tx).await?.rows_affected() == 0 {
            dispose(tx, &self.object, self.trash_after).await?;
        }
        let row = of_owner(HAS_OLD, owner).fetch_one(&mut *tx).await?;
        if row.try_get("has_old")? {
            return_quota(tx, owner.account, size).await?;
        }
        let refer = of_owner(REFER, owner).bind(mime).bind(millis(self.expires_at));
        refer.execute(tx).await?;
        Ok(Done::keep(BlobFinish::Whole))
    }
}

async fn dispose(
    tx: &mut SqliteConnection,
    object: &str,
    not_before: UnixMillis,
) -> sqlx::Result<()> {
    let dispose = sqlx::query(DISPOSE).bind(object).bind(millis(not_before));
    dispose.execute(tx).await.map(drop)
}

async fn return_quota(
    tx: &mut SqliteConnection,
    account: AccountId,
    size: i64,
) -> sqlx::Result<()> {
    sqlx::query(RETURN).bind(account.0).bind(size).execute(tx).await.map(drop)
}

/// Removes an upload and returns its quota.
pub(super) struct Discard {
    pub(super) owner: BlobOwner,
    pub(super) object: String,
    pub(super) trash_after: UnixMillis,
}

const REMOVE_UPLOAD: &str =
    "DELETE FROM upload WHERE account = ?1 AND hash = ?2 AND object = ?3 RETURNING size";

impl Statement for Discard {
    type Answer = ();
    const NAME: &'static str = "discard upload";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<()>> {
        remove_upload(tx, &self.owner, &self.object, self.trash_after).await?;
        Ok(Done::keep(()))
    }
}

async fn remove_upload(
    tx: &mut SqliteConnection,
    owner: &BlobOwner,
    object: &str,
    trash_after: UnixMillis,
) -> sqlx::Result<()> {
    let remove = of_owner(REMOVE_UPLOAD, owner).bind(object.to_owned());
    if let Some(row) = remove.fetch_optional(&mut *tx).await? {
        dispose(tx, object, trash_after).await?;
        return_quota(tx, owner.account, row.try_get("size")?).await?;
    }
    Ok(())
}

/// Extends a reference that is valid at `now`. Answers the size of its blob.
pub(super) struct Renew {
    pub(super) owner: BlobOwner,
    pub(super) now: UnixMillis,
    pub(super) expires_at: UnixMillis,
}

const RENEW: &str = "
    UPDATE blob_ref SET expires_at = max(expires_at, ?4)
     WHERE account = ?1 AND hash = ?2 AND expires_at > ?3
    RETURNING (SELECT size FROM blob WHERE blob.hash = ?2) AS size";

impl Statement for Renew {
    type Answer = Option<u64>;
    const NAME: &'static str = "renew blob";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<Option<u64>>> {
        let renew = of_owner(RENEW, &self.owner).bind(millis(self.now));
        let renewed = renew.bind(millis(self.expires_at)).fetch_optional(tx).await?;
        Ok(Done::keep(renewed.map(|row| row.unsigned("size")).transpose()?))
    }
}

/// Removes a reference. Answers whether there was one.
pub(super) struct DropReference {
    pub(super) owner: BlobOwner,
    pub(super) trash_after: UnixMillis,
}

const DROP: &str = "
    DELETE FROM blob_ref WHERE account = ?1 AND hash = ?2
    RETURNING (SELECT size FROM blob WHERE blob.hash = ?2) AS size";

const REMOVE_UNUSED: &str = "
    DELETE FROM blob WHERE hash = ?1 AND NOT EXISTS (SELECT 1 FROM blob_ref WHERE hash = ?1)
    RETURNING object";

impl Statement for DropReference {
    type Answer = bool;
    const NAME: &'static str = "remove reference";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<bool>> {
        drop_reference(tx, &self.owner, self.trash_after).await.map(Done::keep)
    }
}

async fn drop_reference(
    tx: &mut SqliteConnection,
    owner: &BlobOwner,
    trash_after: UnixMillis,
) -> sqlx::Result<bool> {
    let dropped = of_owner(DROP, owner).fetch_optional(&mut *tx).await?;
    let Some(row) = dropped else { return Ok(false) };
    return_quota(tx, owner.account, row.try_get("size")?).await?;
    let remove = sqlx::query(REMOVE_UNUSED).bind(owner.blob.as_bytes().to_vec());
    if let Some(row) = remove.fetch_optional(&mut *tx).await? {
        dispose(tx, row.try_get("object")?, trash_after).await?;
    }
    Ok(true)
}

/// Removes a batch of uploads that have expired by `now`. Answers their number.
pub(super) struct SweepUploads {
    pub(super) now: UnixMillis,
    pub(super) trash_after: UnixMillis,
}

const IDLE_UPLOADS: &str = "
    SELECT account, hash, object FROM upload WHERE expires_at <= ?1 ORDER BY expires_at LIMIT +?2";

impl Statement for SweepUploads {
    type Answer = u64;
    const NAME: &'static str = "sweep uploads";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<u64>> {
        let idle = sqlx::query(IDLE_UPLOADS).bind(millis(self.now)).bind(BATCH);
        let rows = idle.fetch_all(&mut *tx).await?;
        remove_uploads(tx, &rows, self.trash_after).await.map(Done::keep)
    }
}

async fn remove_uploads(
    tx: &mut SqliteConnection,
    rows: &[SqliteRow],
    trash_after: UnixMillis,
) -> sqlx::Result<u64> {
    for row in rows {
        remove_upload(tx, &owner(row)?, row.try_get("object")?, trash_after).await?;
    }
    Ok(rows.len() as u64)
}

fn owner(row: &SqliteRow) -> sqlx::Result<BlobOwner> {
    let hash: &[u8] = row.try_get("hash")?;
    let blob = BlobId::try_from(hash).map_err(|_| NeverWritten("hash"))?;
    Ok(BlobOwner { account: row.account("account")?, blob })
}

/// Removes a batch of references that have expired by `now`. Answers their number.
pub(super) struct SweepReferences {
    pub(super) now: UnixMillis,
    pub(super) trash_after: UnixMillis,
}

const EXPIRED_REFERENCES: &str = "
    SELECT account, hash FROM blob_ref WHERE expires_at <= ?1 ORDER BY expires_at LIMIT +?2";

impl Statement for SweepReferences {
    type Answer = u64;
    const NAME: &'static str = "sweep references";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<u64>> {
        let expired = sqlx::query(EXPIRED_REFERENCES).bind(millis(self.now)).bind(BATCH);
        let rows = expired.fetch_all(&mut *tx).await?;
        for row in &rows {
            drop_reference(tx, &owner(row)?, self.trash_after).await?;
        }
        Ok(Done::keep(rows.len() as u64))
    }
}

/// Removes a batch of uploads and references of an account. Answers their number.
pub(super) struct Release {
    pub(super) account: AccountId,
    pub(super) trash_after: UnixMillis,
}

const UPLOADS_OF: &str = "SELECT account, hash, object FROM upload WHERE account = ?1 LIMIT +?2";

const REFERENCES_OF: &str =
    "SELECT account, hash FROM blob_ref WHERE account = ?1 ORDER BY hash LIMIT +?2";

impl Statement for Release {
    type Answer = u64;
    const NAME: &'static str = "release blobs";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<u64>> {
        let of_account = |sql| sqlx::query(sql).bind(self.account.0).bind(BATCH);
        let uploads = of_account(UPLOADS_OF).fetch_all(&mut *tx).await?;
        let removed = remove_uploads(tx, &uploads, self.trash_after).await?;
        let references = of_account(REFERENCES_OF).fetch_all(&mut *tx).await?;
        for row in &references {
            drop_reference(tx, &owner(row)?, self.trash_after).await?;
        }
        Ok(Done::keep(removed + references.len() as u64))
    }
}

/// Forgets files that were removed.
pub(super) struct ForgetFiles {
    pub(super) objects: Vec<String>,
}

const FORGET: &str = "DELETE FROM blob_trash WHERE object = ?1";

impl Statement for ForgetFiles {
    type Answer = ();
    const NAME: &'static str = "forget files";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<()>> {
        for object in &self.objects {
            sqlx::query(FORGET).bind(object).execute(&mut *tx).await?;
        }
        Ok(Done::keep(()))
    }
}

#[cfg(test)]
pub(crate) const STATEMENTS: [&str; 20] = [
    super::READ,
    super::FIND_UPLOAD,
    super::HAS_REFERENCE,
    super::collect::DUE,
    SIZE_OF_OWN,
    USE,
    OPEN,
    RESERVE,
    ADVANCE,
    CLOSE,
    STORE,
    HAS_OLD,
    REFER,
    RENEW,
    REMOVE_UPLOAD,
    DROP,
    REMOVE_UNUSED,
    IDLE_UPLOADS,
    EXPIRED_REFERENCES,
    FORGET,
];
