//! References of accounts to blobs: renewed, found for a read, and removed.

use qpq_domain::UnixMillis;
use qpq_ports::{BlobOwner, BlobState};
use sqlx::{PgConnection, Row as _};

use super::{Place, Upload, dispose, of_owner, return_quota};
use crate::postgres::{
    Repeat, Scope, Statement,
    row::{Columns as _, millis},
};

/// Extends a reference that is valid at `now`, or returns the state of the upload.
pub(super) struct Renew {
    pub(super) owner: BlobOwner,
    pub(super) now: UnixMillis,
    pub(super) expires_at: UnixMillis,
}

const RENEW: &str = "
    UPDATE blob_ref SET expires_at = greatest(expires_at, $4)
     WHERE account = $1 AND hash = $2 AND expires_at > $3
    RETURNING (SELECT size FROM blob b WHERE b.hash = $2) AS size";

const FIND_UPLOAD: &str =
    "SELECT object, size, received FROM upload WHERE account = $1 AND hash = $2";

impl Statement for Renew {
    type Output = BlobState;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "renew_blob"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<BlobState> {
        let renew = of_owner(RENEW, &self.owner).bind(millis(self.now));
        let renewed = renew.bind(millis(self.expires_at)).fetch_optional(&mut *connection).await?;
        if let Some(row) = renewed {
            return Ok(BlobState::Whole { size: row.unsigned("size")? });
        }
        let upload = of_owner(FIND_UPLOAD, &self.owner).fetch_optional(connection).await?;
        Ok(match upload.as_ref().map(Upload::read).transpose()? {
            Some(Upload { size, received, .. }) => BlobState::Uploading { received, size },
            None => BlobState::Unknown,
        })
    }
}

/// Finds a blob that has a reference of any account at `now`.
pub(super) struct Find {
    pub(super) reader: BlobOwner,
    pub(super) now: UnixMillis,
}

pub(super) struct Found {
    pub(super) object: String,
    pub(super) place: Place,
    pub(super) size: u64,
    pub(super) mime: String,
}

/// The blob $2, with the MIME type of the reference of the account $1, or else of another
/// reference. NULL: no reference is valid at $3.
const FIND: &str = "
    SELECT object, place, size,
           coalesce((SELECT mime FROM blob_ref
                      WHERE account = $1 AND hash = $2 AND expires_at > $3),
                    (SELECT mime FROM blob_ref WHERE hash = $2 AND expires_at > $3 LIMIT 1)) AS mime
      FROM blob WHERE hash = $2";

impl Statement for Find {
    type Output = Option<Found>;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "find_blob"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Option<Found>> {
        let find = of_owner(FIND, &self.reader).bind(millis(self.now));
        let Some(row) = find.fetch_optional(connection).await? else { return Ok(None) };
        let Some(mime) = row.try_get("mime")? else { return Ok(None) };
        Ok(Some(Found {
            object: row.try_get("object")?,
            place: Place::read(&row)?,
            size: row.unsigned("size")?,
            mime,
        }))
    }
}

/// Removes a reference, and the blob with its last one. Returns whether there was a reference.
pub(super) struct DropReference {
    owner: BlobOwner,
    /// Only if the reference has expired by this instant.
    expired_by: Option<UnixMillis>,
    trash_after: UnixMillis,
}

impl DropReference {
    pub(super) const fn any(owner: BlobOwner, trash_after: UnixMillis) -> Self {
        Self { owner, expired_by: None, trash_after }
    }

    pub(super) const fn expired(owner: BlobOwner, by: UnixMillis, trash_after: UnixMillis) -> Self {
        Self { owner, expired_by: Some(by), trash_after }
    }
}

const LOCK_BLOB: &str = "SELECT size FROM blob WHERE hash = $1 FOR UPDATE";

const DROP: &str = "
    DELETE FROM blob_ref WHERE account = $1 AND hash = $2
       AND ($3::bigint IS NULL OR expires_at <= least($3, store_now()))";

/// A statement of its own, so that it sees the references that were committed before the lock.
const REMOVE_UNUSED: &str = "
    DELETE FROM blob WHERE hash = $1 AND NOT EXISTS (SELECT 1 FROM blob_ref WHERE hash = $1)
    RETURNING object, place";

impl Statement for DropReference {
    type Output = bool;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Transaction;

    fn name(&self) -> &'static str {
        "drop_reference"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<bool> {
        let Self { owner, expired_by, trash_after } = self;
        let hash = &owner.blob.as_bytes()[..];
        let lock = sqlx::query(LOCK_BLOB).bind(hash);
        let Some(blob) = lock.fetch_optional(&mut *connection).await? else { return Ok(false) };
        let dropped = of_owner(DROP, owner).bind(expired_by.map(millis));
        if dropped.execute(&mut *connection).await?.rows_affected() == 0 {
            return Ok(false);
        }
        let unused = sqlx::query(REMOVE_UNUSED).bind(hash).fetch_optional(&mut *connection).await?;
        if let Some(row) = unused {
            let object: &str = row.try_get("object")?;
            dispose(connection, object, Place::read(&row)?, *trash_after).await?;
        }
        return_quota(connection, owner.account, blob.try_get("size")?).await?;
        Ok(true)
    }
}
