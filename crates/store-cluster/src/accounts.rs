//! Accounts in Postgres. An account is inserted and never replaced, except for its OPAQUE record;
//! `deletion` removes it. If two edges register the same name, skeleton or key concurrently, the
//! unique indexes accept one, and the other edge answers from the stored row.

use std::{collections::HashSet, mem};

use async_trait::async_trait;
use parking_lot::Mutex;
use qpq_domain::{AccountId, IdentityKey, Skeleton, TokenHash, UnixMillis, Username};
use qpq_ports::{
    Account, Accounts, Admission, Credentials, Deletion, Erasing, ErasureId, NewAccount,
    PasswordChange, PasswordChanged, Registration, StoreError, StoreResult, identity_tombstone,
    name_tombstone,
};
use sqlx::{PgConnection, postgres::PgRow};

use crate::{
    ClusterStore,
    effects::Effects,
    invites::{self, ValidFor},
    postgres::{
        Repeat, Scope, Statement,
        row::{Columns as _, millis},
    },
    sessions::tokens,
    skeletons::FillSkeletons,
    store::Inner,
};

/// Maximum attempts to register while edges of the previous release add accounts without a
/// skeleton.
const MAX_ATTEMPTS: u32 = 8;

/// Inserts an account and its inbox, unless an account without a skeleton exists, or the key or the
/// name of a deleted account has the tombstone $6 or $7. Waits for a concurrent insert of the same
/// name, skeleton or key, and inserts nothing if that one is committed.
const INSERT: &str = "
    WITH new AS (
        INSERT INTO account (username, identity, opaque_record, created_at, skeleton)
        SELECT $1, $2, $3, $4, $5
         WHERE NOT EXISTS (SELECT 1 FROM account WHERE skeleton IS NULL)
           AND NOT EXISTS (SELECT 1 FROM tombstone WHERE hash = $6)
           AND NOT EXISTS (SELECT 1 FROM tombstone
                            WHERE hash = $7 AND until > least($4, store_now()))
        ON CONFLICT DO NOTHING RETURNING id),
    empty AS (INSERT INTO inbox (id) SELECT id FROM new)
    SELECT id FROM new";

/// Returns whether the skeleton $1 belongs to an account, whether the identity key $2 with the
/// tombstone $3 belongs or belonged to one, and whether the name with the tombstone $4 is reserved
/// at $5.
const TAKEN: &str = "
    SELECT EXISTS (SELECT 1 FROM account WHERE skeleton = $1 AND NOT lookalike),
           EXISTS (SELECT 1 FROM account WHERE identity = $2)
           OR EXISTS (SELECT 1 FROM tombstone WHERE hash = $3),
           EXISTS (SELECT 1 FROM tombstone WHERE hash = $4 AND until > least($5, store_now()))";

const CREDENTIALS: &str = "SELECT id, identity, opaque_record FROM account WHERE username = $1";
const BY_USERNAME: &str =
    "SELECT id, username, identity, created_at FROM account WHERE username = $1";
const BY_IDENTITY: &str =
    "SELECT id, username, identity, created_at FROM account WHERE identity = $1";

/// Waits for the sessions that other transactions create for the account, whose foreign keys lock
/// its row, and prevents that another one is created before the commit. A separate statement, so
/// that [`END_OTHER_SESSIONS`] sees the sessions for which this one waited.
const LOCK: &str = "SELECT id FROM account WHERE id = $1 FOR UPDATE";

const REPLACE_RECORD: &str = "
    UPDATE account SET opaque_record = $3
     WHERE id = $1 AND EXISTS (SELECT 1 FROM session WHERE token = $2 AND account = $1)";
const END_OTHER_SESSIONS: &str =
    "DELETE FROM session WHERE account = $1 AND token <> $2 RETURNING token";

/// The error if other edges insert accounts without a skeleton faster than this one computes the
/// skeletons.
#[derive(Debug, thiserror::Error)]
#[error("accounts without a skeleton were added during each of {MAX_ATTEMPTS} attempts")]
struct SkeletonsUnknown;

#[async_trait]
impl Accounts for ClusterStore {
    async fn register(&self, account: NewAccount) -> StoreResult<Registration> {
        let database = &self.inner.database;
        let register = Register { skeleton: account.username.skeleton(), account };
        for _ in 0..MAX_ATTEMPTS {
            if let Some(registration) = database.run(&register).await? {
                return Ok(registration);
            }
            while database.run(&FillSkeletons).await? > 0 {}
        }
        Err(StoreError::unavailable(SkeletonsUnknown))
    }

    async fn credentials(&self, username: &Username) -> StoreResult<Option<Credentials>> {
        Ok(self.inner.database.run(&FindCredentials(username)).await?)
    }

    async fn change_password(&self, change: PasswordChange) -> StoreResult<PasswordChanged> {
        let store = self.clone();
        // A separate task, so that the copies of the sessions are invalidated even if the caller is
        // dropped.
        let changing = tokio::spawn(async move {
            let Inner { database, applier, .. } = &*store.inner;
            let change = ChangePassword { change, ended: Mutex::default() };
            let changed = database.run(&change).await;
            // The tokens of all attempts: an attempt whose commit was not answered may have
            // succeeded.
            let tokens = mem::take(&mut *change.ended.lock());
            let ended_sessions: Vec<_> = tokens.into_iter().collect();
            let count = u32::try_from(ended_sessions.len()).unwrap_or(u32::MAX);
            match changed {
                Ok(true) => {
                    applier.apply(Effects { ended_sessions, ..Effects::default() }).await;
                    Ok(PasswordChanged::Changed { ended_sessions: count })
                }
                // A first attempt may have succeeded before the session ended.
                Ok(false) => {
                    applier.sessions.uncertain(&ended_sessions).await;
                    Ok(PasswordChanged::SessionEnded)
                }
                Err(error) => {
                    applier.sessions.uncertain(&ended_sessions).await;
                    Err(error.into())
                }
            }
        });
        changing.await.unwrap_or_else(|error| Err(StoreError::unavailable(error)))
    }

    async fn by_username(&self, username: &Username) -> StoreResult<Option<Account>> {
        Ok(self.inner.database.run(&FindAccount::ByUsername(username)).await?)
    }

    async fn by_identity(&self, identity: &IdentityKey) -> StoreResult<Option<Account>> {
        Ok(self.inner.database.run(&FindAccount::ByIdentity(identity)).await?)
    }

    async fn delete(&self, account: AccountId, now: UnixMillis) -> StoreResult<Deletion> {
        self.delete_account(account, now).await
    }

    async fn erase(&self, erasure: ErasureId, now: UnixMillis) -> StoreResult<Erasing> {
        self.erase_batch(erasure, now).await
    }
}

/// Registers an account. Returns `None` if the skeleton of another account is not computed yet.
struct Register {
    account: NewAccount,
    skeleton: Skeleton,
}

impl Statement for Register {
    type Output = Option<Registration>;

    /// A repeat finds the account of the first attempt.
    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Transaction;

    fn name(&self) -> &'static str {
        "register"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Option<Registration>> {
        let Self { account: new, skeleton } = self;
        if let Some(refusal) = refusal(connection, new).await? {
            return Ok(Some(refusal));
        }
        let (key, name) = (identity_tombstone(&new.identity), name_tombstone(skeleton));
        let inserted: Option<i64> = sqlx::query_scalar(INSERT)
            .bind(new.username.as_str())
            .bind(&new.identity.as_bytes()[..])
            .bind(&new.opaque_record[..])
            .bind(millis(new.now))
            .bind(skeleton.as_str())
            .bind(&key)
            .bind(&name)
            .fetch_optional(&mut *connection)
            .await?;
        if let Some(id) = inserted {
            if let Some(code) = new.admission.invite() {
                invites::count_use(connection, code).await?;
            }
            return Ok(Some(Registration::Registered(AccountId(id))));
        }
        // A separate statement, because it sees the row that the insert conflicts with.
        if let Some(stored) = find_credentials(connection, &new.username).await? {
            return Ok(Some(conflict(new, &stored)));
        }
        let taken: (bool, bool, bool) = sqlx::query_as(TAKEN)
            .bind(skeleton.as_str())
            .bind(&new.identity.as_bytes()[..])
            .bind(&key)
            .bind(&name)
            .bind(millis(new.now))
            .fetch_one(connection)
            .await?;
        Ok(match taken {
            (true, _, _) | (false, false, true) => Some(Registration::UsernameTaken),
            (false, true, _) => Some(Registration::IdentityTaken),
            (false, false, false) => None,
        })
    }
}

/// Returns the refusal of a registration whose invite does not allow it. Locks a valid invite until
/// the end of the transaction. A repeat of a registration needs no invite, since the registration
/// may have used it up.
async fn refusal(
    connection: &mut PgConnection,
    new: &NewAccount,
) -> sqlx::Result<Option<Registration>> {
    let Some(code) = new.admission.invite() else { return Ok(None) };
    let valid = invites::lock_valid(connection, code, &new.username, new.now).await?;
    let refusal = match (new.admission, valid) {
        (_, None) => Registration::InviteInvalid,
        (Admission::NamedInvite(_), Some(ValidFor::Any)) => Registration::UsernameTaken,
        (_, Some(_)) => return Ok(None),
    };
    let stored = find_credentials(connection, &new.username).await?;
    let repeat = stored.map(|stored| conflict(new, &stored));
    Ok(Some(repeat.filter(|conflict| *conflict != Registration::UsernameTaken).unwrap_or(refusal)))
}

/// Returns the outcome of a registration with the username of a stored account.
fn conflict(new: &NewAccount, stored: &Credentials) -> Registration {
    if stored.identity == new.identity && stored.opaque_record == new.opaque_record {
        Registration::Repeated(stored.account)
    } else {
        Registration::UsernameTaken
    }
}

/// Replaces the OPAQUE record and ends the account's other sessions. Collects the tokens of all
/// attempts. Returns whether the session that changes the password exists.
struct ChangePassword {
    change: PasswordChange,
    ended: Mutex<HashSet<TokenHash>>,
}

impl Statement for ChangePassword {
    type Output = bool;

    /// A repeat stores the same record.
    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Transaction;

    fn name(&self) -> &'static str {
        "change_password"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<bool> {
        let PasswordChange { account, session, opaque_record } = &self.change;
        sqlx::query(LOCK).bind(account.0).fetch_optional(&mut *connection).await?;
        let replaced = sqlx::query(REPLACE_RECORD)
            .bind(account.0)
            .bind(&session.as_bytes()[..])
            .bind(&opaque_record[..])
            .execute(&mut *connection)
            .await?;
        if replaced.rows_affected() == 0 {
            return Ok(false);
        }
        let ended = sqlx::query(END_OTHER_SESSIONS)
            .bind(account.0)
            .bind(&session.as_bytes()[..])
            .fetch_all(connection)
            .await?;
        self.ended.lock().extend(tokens(&ended)?);
        Ok(true)
    }
}

struct FindCredentials<'a>(&'a Username);

impl Statement for FindCredentials<'_> {
    type Output = Option<Credentials>;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "credentials"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Option<Credentials>> {
        find_credentials(connection, self.0).await
    }
}

enum FindAccount<'a> {
    ByUsername(&'a Username),
    ByIdentity(&'a IdentityKey),
}

impl Statement for FindAccount<'_> {
    type Output = Option<Account>;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "account"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Option<Account>> {
        let query = match self {
            Self::ByUsername(username) => sqlx::query(BY_USERNAME).bind(username.as_str()),
            Self::ByIdentity(identity) => sqlx::query(BY_IDENTITY).bind(&identity.as_bytes()[..]),
        };
        query.fetch_optional(connection).await?.as_ref().map(account).transpose()
    }
}

async fn find_credentials(
    connection: &mut PgConnection,
    username: &Username,
) -> sqlx::Result<Option<Credentials>> {
    let row = sqlx::query(CREDENTIALS).bind(username.as_str()).fetch_optional(connection).await?;
    row.as_ref().map(credentials).transpose()
}

fn credentials(row: &PgRow) -> sqlx::Result<Credentials> {
    Ok(Credentials {
        account: row.account("id")?,
        identity: row.identity("identity")?,
        opaque_record: row.bytes("opaque_record")?,
    })
}

fn account(row: &PgRow) -> sqlx::Result<Account> {
    Ok(Account {
        id: row.account("id")?,
        username: row.username("username")?,
        identity: row.identity("identity")?,
        created_at: row.at("created_at")?,
    })
}
