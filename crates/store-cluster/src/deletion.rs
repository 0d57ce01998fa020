//! The deletion of accounts in Postgres, and the erasure of their data.
//!
//! The deletion locks the inbox's head first, as every transaction that changes an inbox does, and
//! then the account. It leaves the row of the account, which other rows refer to, with a random
//! username and a random identity key, and removes the inbox and the sessions. So no edge finds the
//! account any more, whatever its release is.
//!
//! The statements of the erasure are generated from the descriptions of the tables (`tables`). Each
//! batch begins with the account's own rows, so a batch of another edge needs no memory of the
//! batches before it. Only the position among other accounts' inboxes is stored. Vacuum removes the
//! deleted rows from the files of Postgres.

use std::{collections::HashSet, mem, sync::LazyLock};

use parking_lot::Mutex;
use qpq_domain::{AccountId, IdentityKey, Skeleton, TokenHash, UnixMillis};
use qpq_ports::{
    Blobs as _, CALLS_ENDED, Deletion, Endpoints as _, Erasing, ErasureId, NAME_RESERVED,
    StoreError, StoreResult, identity_tombstone, name_tombstone,
};
use sqlx::{PgConnection, Row as _};

use crate::{
    ClusterStore,
    effects::Effects,
    groups, jobs,
    postgres::{
        Repeat, Scope, Statement,
        row::{Columns as _, millis, now_of},
    },
    redis::queue::RegistrationId,
    sessions::tokens,
    store::Inner,
    tables::{ErasureStep, ErasureSteps},
};

/// Maximum rows that one step of a batch deletes or changes.
const ROWS: i64 = 256;
/// Maximum inboxes of other accounts in which one batch looks for messages of the account.
const INBOXES: i64 = 1_000;
/// Maximum groups that one batch leaves.
const GROUPS: i64 = 16;

static STEPS: LazyLock<ErasureSteps> = LazyLock::new(ErasureSteps::generate);

const LOCK_INBOX: &str = "SELECT store_now() AS postgres FROM inbox WHERE id = $1 FOR UPDATE";
const LOCK_ACCOUNT: &str = "SELECT identity, username FROM account WHERE id = $1 FOR UPDATE";
const REGISTRATIONS: &str = "SELECT id FROM device WHERE account = $1";

const STORE_TOMBSTONE: &str = "
    INSERT INTO tombstone (hash, until) VALUES ($1, $2)
    ON CONFLICT (hash) DO UPDATE SET until = excluded.until";

/// Usernames have no colon, so the placeholder is no username. Its skeleton is not compared.
const ANONYMIZE: &str = "
    UPDATE account
       SET username = 'deleted:' || gen_random_uuid(), opaque_record = '',
           identity = sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())),
           skeleton = '', lookalike = true
     WHERE id = $1";

const DELETE_INBOX: &str = "DELETE FROM inbox WHERE id = $1";
const END_SESSIONS: &str = "DELETE FROM session WHERE account = $1 RETURNING token";

const BEGIN: &str = "
    INSERT INTO erasure (id, account, identity, deleted_at) VALUES ($1, $2, $3, $4)";

const ACCOUNT: &str = "SELECT account FROM erasure WHERE id = $1";
const FIND: &str = "
    SELECT account, identity, deleted_at, begun_at, after, store_now() AS postgres
      FROM erasure WHERE id = $1 FOR UPDATE";
const MOVE: &str = "UPDATE erasure SET begun_at = $2, after = $3 WHERE id = $1";

/// Returns the last of the next inboxes: $1 the inbox before them, $2 maximum inboxes.
const NEXT_INBOXES: &str = "
    SELECT max(id) FROM (SELECT id FROM inbox WHERE id > $1 ORDER BY id LIMIT $2) AS next";

const FORGET_ERASURE: &str = "DELETE FROM erasure WHERE id = $1";
const DELETE_ACCOUNT: &str = "DELETE FROM account WHERE id = $1";

/// Removes names that are not reserved any more. $1 now, $2 maximum rows.
pub(crate) const FORGET_NAMES: &str = "
    DELETE FROM tombstone WHERE hash = ANY (ARRAY (
        SELECT hash FROM tombstone
         WHERE until IS NOT NULL AND until <= (SELECT least($1, store_now()))
         ORDER BY until LIMIT $2 FOR UPDATE SKIP LOCKED))";

impl ClusterStore {
    /// Makes an account unusable, see [`qpq_ports::Accounts::delete`].
    pub(crate) async fn delete_account(
        &self,
        account: AccountId,
        now: UnixMillis,
    ) -> StoreResult<Deletion> {
        let store = self.clone();
        // A separate task, so that the copies of the sessions are dropped even if the caller is
        // dropped.
        let deleting = tokio::spawn(async move {
            let Inner { database, applier, .. } = &*store.inner;
            let erasure = ErasureId::new(rand::random());
            let delete = DeleteAccount { account, erasure, now, deleted: Mutex::default() };
            let outcome = database.run(&delete).await;
            let Deleted { inbox, registrations, tokens } = mem::take(&mut *delete.deleted.lock());
            let ended_sessions: Vec<_> = tokens.into_iter().collect();
            if let Err(error) = outcome {
                applier.sessions.uncertain(&ended_sessions).await;
                return Err(error.into());
            }
            applier.apply(Effects { ended_sessions, ..Effects::default() }).await;
            let Some(inbox) = inbox else { return Ok(Deletion::NotFound) };
            store.inner.readers_changed(inbox).await;
            // A failure is counted in the metrics of Redis. The erasure removes the keys again, and
            // Redis expires them.
            let _ = store.inner.redis.forget_inbox(&inbox, &registrations).await;
            Ok(Deletion::Deleted(erasure))
        });
        deleting.await.unwrap_or_else(|error| Err(StoreError::unavailable(error)))
    }

    /// Erases a batch, see [`qpq_ports::Accounts::erase`].
    pub(crate) async fn erase_batch(
        &self,
        erasure: ErasureId,
        now: UnixMillis,
    ) -> StoreResult<Erasing> {
        // The blobs first, whose bytes may be in the bucket.
        if let Some(account) = self.inner.database.run(&ErasedAccount(erasure)).await?
            && self.release(account, now).await? > 0
        {
            return Ok(Erasing::More);
        }
        let Erased { progress, sessions, identity } =
            self.inner.database.run(&Erase { erasure, now }).await?;
        let effects = Effects { ended_sessions: sessions, ..Effects::default() };
        self.inner.applier.apply(effects).await;
        if let (Erasing::WaitFor(_) | Erasing::Done, Some(identity)) = (progress, identity) {
            let _ = self.inner.redis.forget_inbox(&identity, &[]).await;
            let _ = self.remove(&identity).await;
        }
        Ok(progress)
    }
}

/// Returns the account of an erasure; `None` once the erasure is done.
struct ErasedAccount(ErasureId);

impl Statement for ErasedAccount {
    type Output = Option<AccountId>;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "erased_account"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Self::Output> {
        let query = sqlx::query_scalar(ACCOUNT).bind(&self.0.as_bytes()[..]);
        Ok(query.fetch_optional(connection).await?.map(AccountId))
    }
}

/// The results of all attempts at a deletion. An attempt whose commit was not answered may have
/// succeeded.
#[derive(Default)]
struct Deleted {
    inbox: Option<IdentityKey>,
    registrations: Vec<RegistrationId>,
    tokens: HashSet<TokenHash>,
}

struct DeleteAccount {
    account: AccountId,
    erasure: ErasureId,
    now: UnixMillis,
    deleted: Mutex<Deleted>,
}

impl Statement for DeleteAccount {
    type Output = ();

    /// A repeat finds no inbox, and leaves the results of the first attempt.
    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Transaction;

    fn name(&self) -> &'static str {
        "delete_account"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<()> {
        let account = self.account.0;
        let head = sqlx::query(LOCK_INBOX).bind(account).fetch_optional(&mut *connection).await?;
        let Some(head) = head else { return Ok(()) };
        let now = now_of(&head)?.unwrap_or(self.now);
        let found = sqlx::query(LOCK_ACCOUNT).bind(account).fetch_one(&mut *connection).await?;
        let identity = found.identity("identity")?;
        let username: &str = found.try_get("username")?;
        let skeleton = Skeleton::of(username);
        for sql in &STEPS.of_name {
            sqlx::query(sql.as_str()).bind(username).execute(&mut *connection).await?;
        }
        let registrations: Vec<i64> =
            sqlx::query_scalar(REGISTRATIONS).bind(account).fetch_all(&mut *connection).await?;
        let reserved_until = Some(millis(now.plus(NAME_RESERVED)));
        for (hash, until) in
            [(identity_tombstone(&identity), None), (name_tombstone(&skeleton), reserved_until)]
        {
            sqlx::query(STORE_TOMBSTONE).bind(hash).bind(until).execute(&mut *connection).await?;
        }
        sqlx::query(ANONYMIZE).bind(account).execute(&mut *connection).await?;
        sqlx::query(DELETE_INBOX).bind(account).execute(&mut *connection).await?;
        let ended = sqlx::query(END_SESSIONS).bind(account).fetch_all(&mut *connection).await?;
        let ended = tokens(&ended)?;
        sqlx::query(BEGIN)
            .bind(&self.erasure.as_bytes()[..])
            .bind(account)
            .bind(&identity.as_bytes()[..])
            .bind(millis(now))
            .execute(&mut *connection)
            .await?;
        jobs::put(connection, &[self.erasure.job()], self.now).await?;
        let mut deleted = self.deleted.lock();
        deleted.inbox = Some(identity);
        deleted.registrations = registrations.into_iter().map(RegistrationId).collect();
        deleted.tokens.extend(ended);
        Ok(())
    }
}

/// The result of a batch.
struct Erased {
    progress: Erasing,
    /// Sessions that calls in progress had created after the deletion.
    sessions: Vec<TokenHash>,
    /// The identity key that the account had; `None` if the erasure was done before.
    identity: Option<IdentityKey>,
}

/// Erases one batch.
struct Erase {
    erasure: ErasureId,
    now: UnixMillis,
}

/// The state of an erasure, whose row is locked.
struct Erasure {
    account: i64,
    identity: IdentityKey,
    deleted_at: UnixMillis,
    begun_at: UnixMillis,
    after: i64,
    now: UnixMillis,
}

impl Statement for Erase {
    type Output = Erased;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Transaction;

    fn name(&self) -> &'static str {
        "erase_account"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Erased> {
        let Some(erasure) = self.find(connection).await? else {
            let (progress, sessions) = (Erasing::Done, Vec::new());
            return Ok(Erased { progress, sessions, identity: None });
        };
        let ended = sqlx::query(END_SESSIONS).bind(erasure.account);
        let sessions = tokens(&ended.fetch_all(&mut *connection).await?)?;
        let progress = self.batch(connection, &erasure).await?;
        Ok(Erased { progress, sessions, identity: Some(erasure.identity) })
    }
}

impl Erase {
    fn id(&self) -> &[u8] {
        &self.erasure.as_bytes()[..]
    }

    async fn find(&self, connection: &mut PgConnection) -> sqlx::Result<Option<Erasure>> {
        let row = sqlx::query(FIND).bind(self.id()).fetch_optional(connection).await?;
        row.map(|row| {
            let now = now_of(&row)?.unwrap_or(self.now);
            let begun_at: Option<i64> = row.try_get("begun_at")?;
            let begun_at = begun_at.map(|_| row.at("begun_at")).transpose()?;
            Ok(Erasure {
                account: row.try_get("account")?,
                identity: row.identity("identity")?,
                deleted_at: row.at("deleted_at")?,
                begun_at: begun_at.unwrap_or(now),
                after: row.try_get("after")?,
                now,
            })
        })
        .transpose()
    }

    async fn batch(
        &self,
        connection: &mut PgConnection,
        erasure: &Erasure,
    ) -> sqlx::Result<Erasing> {
        for step in &STEPS.own {
            if erasure.run(connection, step).await? > 0 {
                self.store_position(connection, Some(erasure.begun_at), erasure.after).await?;
                return Ok(Erasing::More);
            }
        }
        match erasure.in_inboxes(connection).await? {
            Some(after) => {
                self.store_position(connection, Some(erasure.begun_at), after).await?;
                Ok(Erasing::More)
            }
            None => self.end_pass(connection, erasure).await,
        }
    }

    async fn store_position(
        &self,
        connection: &mut PgConnection,
        begun_at: Option<UnixMillis>,
        after: i64,
    ) -> sqlx::Result<()> {
        let query = sqlx::query(MOVE).bind(self.id()).bind(begun_at.map(millis)).bind(after);
        query.execute(connection).await.map(drop)
    }

    /// Ends a pass that has found nothing more. Deletes the account if the pass began after all
    /// calls had ended, and prepares another pass otherwise.
    async fn end_pass(
        &self,
        connection: &mut PgConnection,
        erasure: &Erasure,
    ) -> sqlx::Result<Erasing> {
        let calls_ended = erasure.deleted_at.plus(CALLS_ENDED);
        if erasure.begun_at < calls_ended {
            self.store_position(connection, None, 0).await?;
            return Ok(Erasing::WaitFor(calls_ended.since(erasure.now).min(CALLS_ENDED)));
        }
        sqlx::query(FORGET_ERASURE).bind(self.id()).execute(&mut *connection).await?;
        sqlx::query(DELETE_ACCOUNT).bind(erasure.account).execute(connection).await?;
        Ok(Erasing::Done)
    }
}

impl Erasure {
    /// Runs a step. Returns the number of changed rows.
    async fn run(
        &self,
        connection: &mut PgConnection,
        step: &'static ErasureStep,
    ) -> sqlx::Result<i64> {
        let query = match step {
            ErasureStep::DeleteRows(sql) | ErasureStep::RetireKeys(sql) => {
                sqlx::query_scalar(sql.as_str()).bind(self.account)
            }
            ErasureStep::ForgetKey(sql) => {
                sqlx::query_scalar(sql.as_str()).bind(self.identity.as_bytes().to_vec())
            }
            ErasureStep::LeaveGroups => {
                return groups::leave_groups(connection, self.account, GROUPS).await;
            }
        };
        query.bind(ROWS).fetch_one(connection).await
    }

    /// Removes the identity key from messages in the next inboxes of other accounts. Returns the
    /// last inbox that has none left; `None` if all inboxes were visited.
    async fn in_inboxes(&self, connection: &mut PgConnection) -> sqlx::Result<Option<i64>> {
        let last: Option<i64> = sqlx::query_scalar(NEXT_INBOXES)
            .bind(self.after)
            .bind(INBOXES)
            .fetch_one(&mut *connection)
            .await?;
        let Some(last) = last else { return Ok(None) };
        for sql in &STEPS.in_inboxes {
            let changed: i64 = sqlx::query_scalar(sql.as_str())
                .bind(&self.identity.as_bytes()[..])
                .bind(self.after)
                .bind(last)
                .bind(ROWS)
                .fetch_one(&mut *connection)
                .await?;
            if changed > 0 {
                return Ok(Some(self.after));
            }
        }
        Ok(Some(last))
    }
}
