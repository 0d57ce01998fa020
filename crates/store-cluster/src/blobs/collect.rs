//! The removal of expired uploads and references, and of bytes without a use. Any edge may run it,
//! also several concurrently.

use qpq_domain::{AccountId, BlobId, UnixMillis};
use qpq_ports::{BlobOwner, Collected, StoreResult};
use sqlx::{PgConnection, Row as _, postgres::PgRow};

use super::{Place, bucket_failed, chunks, finish::Discard, references::DropReference};
use crate::{
    ClusterStore,
    error::NeverWritten,
    postgres::{
        Repeat, Scope, Statement,
        row::{Columns as _, millis},
    },
};

/// Maximum rows of each kind in one run.
const BATCH: i64 = 64;

/// The time after which another run removes an object whose removal was begun.
const AGAIN: i64 = 10 * 60 * 1_000;

/// Removes one batch of each kind.
pub(super) async fn run(store: &ClusterStore, now: UnixMillis) -> StoreResult<Collected> {
    let (database, trash_after) = (&store.inner.database, store.trash_after(now));
    let mut collected = Collected::default();
    for (owner, object) in database.run(&Uploads::idle(now)).await? {
        database.run(&Discard { owner, object: &object, idle_by: Some(now) }).await?;
        collected.uploads += 1;
    }
    for owner in database.run(&References::expired(now)).await? {
        let drop = DropReference::expired(owner, now, trash_after);
        collected.references += u64::from(database.run(&drop).await?);
    }
    for (object, place) in database.run(&Begin { now }).await? {
        // The row is removed last. A run that ends before that is repeated by a later one.
        if place == Place::Bucket {
            let removed = store.inner.blobs.bucket()?.remove(&object).await;
            removed.map_err(bucket_failed)?;
        }
        database.run(&Forget { object: &object, place }).await?;
        collected.objects += 1;
    }
    Ok(collected)
}

/// Removes a batch of uploads and references of an account. Returns their number.
pub(super) async fn release(
    store: &ClusterStore,
    account: AccountId,
    trash_after: UnixMillis,
) -> StoreResult<u64> {
    let database = &store.inner.database;
    let uploads = database.run(&Uploads { sql: UPLOADS_OF, by: account.0 }).await?;
    let references = database.run(&References { sql: REFERENCES_OF, by: account.0 }).await?;
    let removed = uploads.len() + references.len();
    for (owner, object) in uploads {
        database.run(&Discard { owner, object: &object, idle_by: None }).await?;
    }
    for owner in references {
        database.run(&DropReference::any(owner, trash_after)).await?;
    }
    Ok(removed as u64)
}

/// Finds a batch of uploads.
struct Uploads {
    sql: &'static str,
    by: i64,
}

/// An upload that an edge completes now is left to a later run.
const IDLE_UPLOADS: &str = "
    SELECT account, hash, object FROM upload
     WHERE expires_at <= (SELECT least($1, store_now()))
       AND finishing_until <= (SELECT coalesce(store_now(), $1))
     ORDER BY expires_at LIMIT $2";

const UPLOADS_OF: &str = "SELECT account, hash, object FROM upload WHERE account = $1 LIMIT $2";

impl Uploads {
    fn idle(now: UnixMillis) -> Self {
        Self { sql: IDLE_UPLOADS, by: millis(now) }
    }
}

impl Statement for Uploads {
    type Output = Vec<(BlobOwner, String)>;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "find_uploads"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Self::Output> {
        let rows = sqlx::query(self.sql).bind(self.by).bind(BATCH).fetch_all(connection).await?;
        rows.iter().map(|row| Ok((owner(row)?, row.try_get("object")?))).collect()
    }
}

/// Finds a batch of references.
struct References {
    sql: &'static str,
    by: i64,
}

const EXPIRED_REFERENCES: &str = "
    SELECT account, hash FROM blob_ref WHERE expires_at <= (SELECT least($1, store_now()))
     ORDER BY expires_at LIMIT $2";

const REFERENCES_OF: &str =
    "SELECT account, hash FROM blob_ref WHERE account = $1 ORDER BY hash LIMIT $2";

impl References {
    fn expired(now: UnixMillis) -> Self {
        Self { sql: EXPIRED_REFERENCES, by: millis(now) }
    }
}

impl Statement for References {
    type Output = Vec<BlobOwner>;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "find_references"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Vec<BlobOwner>> {
        let rows = sqlx::query(self.sql).bind(self.by).bind(BATCH).fetch_all(connection).await?;
        rows.iter().map(owner).collect()
    }
}

fn owner(row: &PgRow) -> sqlx::Result<BlobOwner> {
    let hash: &[u8] = row.try_get("hash")?;
    let blob = BlobId::try_from(hash).map_err(|_| NeverWritten("hash"))?;
    Ok(BlobOwner { account: row.account("account")?, blob })
}

/// Begins the removal of a batch of objects: from then on, no blob can refer to them.
struct Begin {
    now: UnixMillis,
}

const BEGIN: &str = "
    UPDATE blob_trash SET removing = true, not_before = $1 + $3
     WHERE object = ANY (ARRAY (
        SELECT object FROM blob_trash WHERE not_before <= (SELECT least($1, store_now()))
         ORDER BY not_before LIMIT $2 FOR UPDATE SKIP LOCKED))
    RETURNING object, place";

impl Statement for Begin {
    type Output = Vec<(String, Place)>;

    /// A repeat leaves the objects of the first attempt to a later run.
    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "begin_removal"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Self::Output> {
        let begin = sqlx::query(BEGIN).bind(millis(self.now)).bind(BATCH).bind(AGAIN);
        let rows = begin.fetch_all(connection).await?;
        rows.iter().map(|row| Ok((row.try_get("object")?, Place::read(row)?))).collect()
    }
}

/// Forgets an object, unless it was added again. Removes its bytes if they are in Postgres.
struct Forget<'a> {
    object: &'a str,
    place: Place,
}

impl Statement for Forget<'_> {
    type Output = ();

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Transaction;

    fn name(&self) -> &'static str {
        "forget_object"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<()> {
        if self.place == Place::Postgres {
            chunks::remove(connection, self.object).await?;
        }
        sqlx::query("DELETE FROM blob_trash WHERE object = $1 AND removing")
            .bind(self.object)
            .execute(connection)
            .await
            .map(drop)
    }
}
