//! The deletion of accounts in SQLite, and the erasure of their data.
//!
//! The deletion leaves the row of the account, which other rows refer to, with a random username
//! and a random identity key, and removes its inbox and sessions. The statements of the erasure are
//! generated from the descriptions of the tables (`tables`). Each batch begins with the account's
//! own rows, so a batch after a restart needs no memory of the batches before it. Only the position
//! among other accounts' inboxes is stored.
//!
//! SQLite overwrites deleted rows with zeros (`secure_delete`). When the erasure is done, the log,
//! which has earlier states of pages, is written back and truncated.

use std::{sync::LazyLock, time::Duration};

use qpq_domain::{AccountId, IdentityKey, Skeleton, UnixMillis};
use qpq_ports::{
    Blobs as _, CALLS_ENDED, Deletion, Erasing, ErasureId, NAME_RESERVED, StoreResult, View,
    identity_tombstone, key_tombstone, name_tombstone,
};
use sqlx::{Row as _, SqliteConnection};

use crate::{
    effects::Effects,
    error::{NeverWritten, read_failed},
    groups, jobs,
    messages::remove::SWEEP_ROWS,
    row::{Columns as _, millis},
    sessions::tokens,
    statement::{Done, Statement},
    store::EmbeddedStore,
    tables::{ErasureStep, ErasureSteps},
};

/// Maximum inboxes of other accounts in which one batch looks for messages of the account.
const INBOXES: i64 = 256;
/// Maximum messages of other accounts' inboxes that one batch changes. Small, because SQLite writes
/// the whole row, and a message has up to a MiB.
const MESSAGES: i64 = 32;
/// Maximum groups that one batch leaves.
const GROUPS: i64 = 16;
/// The wait for readers that prevent the truncation of the log.
const LOG_IN_USE: Duration = Duration::from_secs(1);

static STEPS: LazyLock<ErasureSteps> = LazyLock::new(ErasureSteps::generate);

const FIND_ACCOUNT: &str = "
    SELECT a.identity, a.username FROM account a JOIN inbox i ON i.id = a.id WHERE a.id = ?1";

const STORE_TOMBSTONE: &str = "
    INSERT INTO tombstone (hash, until) VALUES (?1, ?2)
    ON CONFLICT DO UPDATE SET until = excluded.until";

/// Usernames have no colon, so the placeholder is no username.
const ANONYMIZE: &str = "
    UPDATE account SET username = 'deleted:' || hex(randomblob(16)), identity = randomblob(32),
           opaque_record = x'', skeleton = '', lookalike = 1
     WHERE id = ?1";

const DELETE_INBOX: &str = "DELETE FROM inbox WHERE id = ?1";
const END_SESSIONS: &str = "DELETE FROM session WHERE account = ?1 RETURNING token";

const BEGIN: &str = "
    INSERT INTO erasure (id, account, identity, deleted_at) VALUES (randomblob(16), ?1, ?2, ?3)
    RETURNING id";

const ACCOUNT: &str = "SELECT account FROM erasure WHERE id = ?1";
const FIND: &str =
    "SELECT account, identity, deleted_at, begun_at, after FROM erasure WHERE id = ?1";
const MOVE: &str = "UPDATE erasure SET begun_at = ?2, after = ?3 WHERE id = ?1";

/// Returns the last of the next inboxes: ?1 the inbox before them, ?2 maximum inboxes. NULL if
/// there is none.
const NEXT_INBOXES: &str = "
    SELECT max(id) FROM (SELECT id FROM inbox WHERE id > ?1 ORDER BY id LIMIT +?2)";

const FORGET_ERASURE: &str = "DELETE FROM erasure WHERE id = ?1";
const DELETE_ACCOUNT: &str = "DELETE FROM account WHERE id = ?1";

/// Removes names that are not reserved any more: ?1 now, ?2 maximum rows.
const FORGET_NAMES: &str = "
    DELETE FROM tombstone WHERE hash IN (
        SELECT hash FROM tombstone WHERE until IS NOT NULL AND until <= ?1 ORDER BY until
         LIMIT +?2)";

#[cfg(test)]
pub(crate) fn statements() -> impl Iterator<Item = &'static str> {
    let own = STEPS.own.iter().flat_map(|step| match step {
        ErasureStep::DeleteRows(sql)
        | ErasureStep::ForgetKey(sql)
        | ErasureStep::BuryIdentity(sql) => vec![sql.as_str()],
        ErasureStep::RetireKeys { find, delete } => vec![find.as_str(), delete.as_str()],
        ErasureStep::LeaveGroups => vec![],
    });
    let plain = [
        FIND_ACCOUNT,
        STORE_TOMBSTONE,
        ANONYMIZE,
        DELETE_INBOX,
        END_SESSIONS,
        BEGIN,
        ACCOUNT,
        FIND,
        MOVE,
        NEXT_INBOXES,
        FORGET_ERASURE,
        DELETE_ACCOUNT,
        FORGET_NAMES,
    ];
    let generated = STEPS.in_inboxes.iter().chain(&STEPS.of_name).map(String::as_str);
    own.chain(generated).chain(plain)
}

impl EmbeddedStore {
    /// Makes an account unusable, see [`qpq_ports::Accounts::delete`].
    pub(crate) async fn delete_account(
        &self,
        account: AccountId,
        now: UnixMillis,
    ) -> StoreResult<Deletion> {
        let reserved_until = self.memory.clock.bounds(now).latest.plus(NAME_RESERVED);
        let deleted_at = self.memory.clock.believed(now);
        self.writer.run(DeleteAccount { account, deleted_at, reserved_until }).await
    }

    /// Erases a batch, see [`qpq_ports::Accounts::erase`].
    pub(crate) async fn erase_batch(
        &self,
        erasure: ErasureId,
        now: UnixMillis,
    ) -> StoreResult<Erasing> {
        // The blobs first, whose bytes are in files.
        if let Some(account) = self.erased_account(erasure).await?
            && self.release(account, now).await? > 0
        {
            return Ok(Erasing::More);
        }
        let now = self.memory.clock.believed(now);
        match self.writer.run(Erase { erasure, now }).await? {
            // The truncation is repeated with the job, until it succeeds.
            Erasing::Done if !self.writer.truncate_log().await? => Ok(Erasing::WaitFor(LOG_IN_USE)),
            progress => Ok(progress),
        }
    }
}

impl EmbeddedStore {
    /// Returns the account of an erasure; `None` once the erasure is done.
    async fn erased_account(&self, erasure: ErasureId) -> StoreResult<Option<AccountId>> {
        let query = sqlx::query_scalar(ACCOUNT).bind(&erasure.as_bytes()[..]);
        let account = query.fetch_optional(&self.readers).await.map_err(read_failed)?;
        Ok(account.map(AccountId))
    }
}

/// Makes an account unusable and stores its erasure.
struct DeleteAccount {
    account: AccountId,
    deleted_at: UnixMillis,
    reserved_until: UnixMillis,
}

impl Statement for DeleteAccount {
    type Answer = Deletion;
    const NAME: &'static str = "delete account";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<Deletion>> {
        let account = self.account.0;
        let found = sqlx::query(FIND_ACCOUNT).bind(account).fetch_optional(&mut *tx).await?;
        let Some(row) = found else { return Ok(Done::keep(Deletion::NotFound)) };
        let identity = row.identity("identity")?;
        let username: &str = row.try_get("username")?;
        let skeleton = Skeleton::of(username);
        for sql in &STEPS.of_name {
            sqlx::query(sql.as_str()).bind(username).execute(&mut *tx).await?;
        }
        store_tombstone(tx, &identity_tombstone(&identity), None).await?;
        store_tombstone(tx, &name_tombstone(&skeleton), Some(self.reserved_until)).await?;
        sqlx::query(ANONYMIZE).bind(account).execute(&mut *tx).await?;
        sqlx::query(DELETE_INBOX).bind(account).execute(&mut *tx).await?;
        let sessions = sqlx::query(END_SESSIONS).bind(account).fetch_all(&mut *tx).await?;
        let erasure = sqlx::query(BEGIN)
            .bind(account)
            .bind(&identity.as_bytes()[..])
            .bind(millis(self.deleted_at))
            .fetch_one(&mut *tx)
            .await?;
        let id: [u8; 16] = erasure.bytes("id")?.try_into().map_err(|_| NeverWritten("id"))?;
        let erasure = ErasureId::new(id);
        jobs::put(tx, &[erasure.job()], self.deleted_at).await?;
        let effects = Effects {
            sessions_changed: tokens(&sessions)?,
            readers_changed: Some(identity),
            // Reads that wait find no inbox.
            wakes: vec![(identity, View::All)],
            ..Effects::default()
        };
        Ok(Done::with(Deletion::Deleted(erasure), effects))
    }
}

/// Stores a tombstone until an instant, or permanently.
async fn store_tombstone(
    tx: &mut SqliteConnection,
    hash: &[u8],
    until: Option<UnixMillis>,
) -> sqlx::Result<()> {
    sqlx::query(STORE_TOMBSTONE).bind(hash).bind(until.map(millis)).execute(tx).await.map(drop)
}

/// Erases one batch.
struct Erase {
    erasure: ErasureId,
    now: UnixMillis,
}

/// The state of an erasure.
struct Erasure {
    account: i64,
    identity: IdentityKey,
    deleted_at: UnixMillis,
    begun_at: UnixMillis,
    after: i64,
}

impl Statement for Erase {
    type Answer = Erasing;
    const NAME: &'static str = "erase account";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<Erasing>> {
        let Some(erasure) = self.find(tx).await? else { return Ok(Done::keep(Erasing::Done)) };
        for step in &STEPS.own {
            if erasure.run(tx, step).await? > 0 {
                self.store_position(tx, Some(erasure.begun_at), erasure.after).await?;
                return Ok(Done::keep(Erasing::More));
            }
        }
        let progress = match erasure.in_inboxes(tx).await? {
            Some(after) => {
                self.store_position(tx, Some(erasure.begun_at), after).await?;
                Erasing::More
            }
            None => self.end_pass(tx, &erasure).await?,
        };
        Ok(Done::keep(progress))
    }
}

impl Erase {
    fn id(&self) -> &[u8] {
        &self.erasure.as_bytes()[..]
    }

    async fn find(&self, tx: &mut SqliteConnection) -> sqlx::Result<Option<Erasure>> {
        let row = sqlx::query(FIND).bind(self.id()).fetch_optional(tx).await?;
        row.map(|row| {
            let begun_at = row.try_get::<Option<i64>, _>("begun_at")?;
            let begun_at = begun_at.map(|_| row.at("begun_at")).transpose()?;
            Ok(Erasure {
                account: row.try_get("account")?,
                identity: row.identity("identity")?,
                deleted_at: row.at("deleted_at")?,
                begun_at: begun_at.unwrap_or(self.now),
                after: row.try_get("after")?,
            })
        })
        .transpose()
    }

    async fn store_position(
        &self,
        tx: &mut SqliteConnection,
        begun_at: Option<UnixMillis>,
        after: i64,
    ) -> sqlx::Result<()> {
        let query = sqlx::query(MOVE).bind(self.id()).bind(begun_at.map(millis)).bind(after);
        query.execute(tx).await.map(drop)
    }

    /// Ends a pass that has found nothing more. Deletes the account if the pass began after all
    /// calls had ended, and prepares another pass otherwise.
    async fn end_pass(
        &self,
        tx: &mut SqliteConnection,
        erasure: &Erasure,
    ) -> sqlx::Result<Erasing> {
        let calls_ended = erasure.deleted_at.plus(CALLS_ENDED);
        if erasure.begun_at < calls_ended {
            self.store_position(tx, None, 0).await?;
            return Ok(Erasing::WaitFor(calls_ended.since(self.now).min(CALLS_ENDED)));
        }
        sqlx::query(FORGET_ERASURE).bind(self.id()).execute(&mut *tx).await?;
        sqlx::query(DELETE_ACCOUNT).bind(erasure.account).execute(tx).await?;
        Ok(Erasing::Done)
    }
}

impl Erasure {
    /// Runs a step. Returns the number of changed rows.
    async fn run(
        &self,
        tx: &mut SqliteConnection,
        step: &'static ErasureStep,
    ) -> sqlx::Result<u64> {
        match step {
            ErasureStep::DeleteRows(sql) => {
                let query = sqlx::query(sql.as_str()).bind(self.account).bind(SWEEP_ROWS);
                Ok(query.execute(tx).await?.rows_affected())
            }
            ErasureStep::ForgetKey(sql) => {
                let query = sqlx::query(sql.as_str()).bind(&self.identity.as_bytes()[..]);
                Ok(query.bind(SWEEP_ROWS).execute(tx).await?.rows_affected())
            }
            ErasureStep::BuryIdentity(sql) => {
                let query = sqlx::query(sql.as_str()).bind(&self.identity.as_bytes()[..]);
                let query = query.bind(SWEEP_ROWS).bind(identity_tombstone(&self.identity));
                Ok(query.execute(tx).await?.rows_affected())
            }
            ErasureStep::LeaveGroups => {
                groups::leave_groups(tx, AccountId(self.account), GROUPS).await
            }
            ErasureStep::RetireKeys { find, delete } => {
                let query = sqlx::query_scalar(find.as_str()).bind(self.account).bind(SWEEP_ROWS);
                let keys: Vec<Vec<u8>> = query.fetch_all(&mut *tx).await?;
                for key in &keys {
                    let raw = key[..].try_into().map_err(|_| NeverWritten("key"))?;
                    store_tombstone(tx, &key_tombstone(raw), None).await?;
                    sqlx::query(delete.as_str()).bind(&key[..]).execute(&mut *tx).await?;
                }
                Ok(keys.len() as u64)
            }
        }
    }

    /// Removes the identity key from messages in the next inboxes of other accounts. Returns the
    /// last inbox that has none left; `None` if all inboxes were visited.
    async fn in_inboxes(&self, tx: &mut SqliteConnection) -> sqlx::Result<Option<i64>> {
        let last: Option<i64> = sqlx::query_scalar(NEXT_INBOXES)
            .bind(self.after)
            .bind(INBOXES)
            .fetch_one(&mut *tx)
            .await?;
        let Some(last) = last else { return Ok(None) };
        for sql in &STEPS.in_inboxes {
            let changed = sqlx::query(sql.as_str())
                .bind(&self.identity.as_bytes()[..])
                .bind(self.after)
                .bind(last)
                .bind(MESSAGES)
                .execute(&mut *tx)
                .await?;
            if changed.rows_affected() > 0 {
                return Ok(Some(self.after));
            }
        }
        Ok(Some(last))
    }
}

/// Removes up to [`SWEEP_ROWS`] names that are not reserved any more. Returns their number.
pub(crate) struct SweepNames {
    pub(crate) now: UnixMillis,
}

impl Statement for SweepNames {
    type Answer = u64;
    const NAME: &'static str = "sweep reserved names";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<u64>> {
        let query = sqlx::query(FORGET_NAMES).bind(millis(self.now)).bind(SWEEP_ROWS);
        Ok(Done::keep(query.execute(tx).await?.rows_affected()))
    }
}
