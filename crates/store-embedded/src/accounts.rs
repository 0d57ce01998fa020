//! Accounts in SQLite. An account is inserted and never replaced, except for its OPAQUE record.
//! `deletion` removes it.

use async_trait::async_trait;
use qpq_domain::{AccountId, IdentityKey, Skeleton, UnixMillis, Username};
use qpq_ports::{
    Account, Accounts, Admission, Credentials, Deletion, Erasing, ErasureId, NewAccount,
    PasswordChange, PasswordChanged, Registration, StoreResult, identity_tombstone, name_tombstone,
};
use sqlx::{Connection as _, Row as _, SqliteConnection, sqlite::SqliteRow};

use crate::{
    effects::Effects,
    error::read_failed,
    invites::{self, ValidFor},
    row::{Columns as _, millis},
    sessions::tokens,
    statement::{Done, SMALL, Statement},
    store::EmbeddedStore,
};

#[async_trait]
impl Accounts for EmbeddedStore {
    async fn register(&self, account: NewAccount) -> StoreResult<Registration> {
        let known_at = self.memory.clock.bounds(account.now).earliest;
        self.writer.run(Register { account, known_at }).await
    }

    async fn credentials(&self, username: &Username) -> StoreResult<Option<Credentials>> {
        sqlx::query("SELECT id, identity, opaque_record FROM account WHERE username = ?1")
            .bind(username.as_str())
            .fetch_optional(&self.readers)
            .await
            .and_then(|row| row.as_ref().map(credentials).transpose())
            .map_err(read_failed)
    }

    async fn change_password(&self, change: PasswordChange) -> StoreResult<PasswordChanged> {
        self.writer.run(ChangePassword(change)).await
    }

    async fn by_username(&self, username: &Username) -> StoreResult<Option<Account>> {
        sqlx::query("SELECT id, username, identity, created_at FROM account WHERE username = ?1")
            .bind(username.as_str())
            .fetch_optional(&self.readers)
            .await
            .and_then(|row| row.as_ref().map(account).transpose())
            .map_err(read_failed)
    }

    async fn by_identity(&self, identity: &IdentityKey) -> StoreResult<Option<Account>> {
        sqlx::query("SELECT id, username, identity, created_at FROM account WHERE identity = ?1")
            .bind(&identity.as_bytes()[..])
            .fetch_optional(&self.readers)
            .await
            .and_then(|row| row.as_ref().map(account).transpose())
            .map_err(read_failed)
    }

    async fn delete(&self, account: AccountId, now: UnixMillis) -> StoreResult<Deletion> {
        self.delete_account(account, now).await
    }

    async fn erase(&self, erasure: ErasureId, now: UnixMillis) -> StoreResult<Erasing> {
        self.erase_batch(erasure, now).await
    }
}

fn credentials(row: &SqliteRow) -> sqlx::Result<Credentials> {
    Ok(Credentials {
        account: row.account("id")?,
        identity: row.identity("identity")?,
        opaque_record: row.try_get("opaque_record")?,
    })
}

fn account(row: &SqliteRow) -> sqlx::Result<Account> {
    Ok(Account {
        id: row.account("id")?,
        username: row.username("username")?,
        identity: row.identity("identity")?,
        created_at: row.at("created_at")?,
    })
}

/// Inserts an account and its inbox, and counts the use of its invite, or finds the reason for a
/// refusal.
struct Register {
    account: NewAccount,
    /// A name that was reserved until an earlier instant is free.
    known_at: UnixMillis,
}

/// ?6 and ?7: the tombstones of the key and of the name. ?8: now.
const INSERT: &str = "
    INSERT INTO account (username, identity, opaque_record, created_at, skeleton)
    SELECT ?1, ?2, ?3, ?4, ?5
     WHERE NOT EXISTS (SELECT 1 FROM tombstone WHERE hash = ?6 AND until IS NULL)
       AND NOT EXISTS (SELECT 1 FROM tombstone WHERE hash = ?7 AND until > ?8)
        ON CONFLICT DO NOTHING RETURNING id";

/// Returns whether the skeleton ?1 belongs to an account, and whether the key ?2 with the tombstone
/// ?3 belongs or belonged to one.
const TAKEN: &str = "
    SELECT EXISTS (SELECT 1 FROM account WHERE skeleton = ?1 AND lookalike = 0),
           EXISTS (SELECT 1 FROM account WHERE identity = ?2)
           OR EXISTS (SELECT 1 FROM tombstone WHERE hash = ?3 AND until IS NULL)";

impl Statement for Register {
    type Answer = Registration;
    const NAME: &'static str = "register account";

    fn bytes(&self) -> usize {
        SMALL + self.account.opaque_record.len()
    }

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<Registration>> {
        if let Some(refusal) = self.refusal(tx).await? {
            return Ok(Done::keep(refusal));
        }
        let registration = match self.insert(tx).await? {
            Some(account) => {
                if let Some(code) = self.account.admission.invite() {
                    invites::count_use(tx, code).await?;
                }
                Registration::Registered(account)
            }
            None => self.conflict(tx).await?,
        };
        Ok(Done::keep(registration))
    }
}

impl Register {
    /// Returns the refusal of a registration whose invite does not allow it. A repeat of a
    /// registration needs no invite, since the registration may have used it up.
    async fn refusal(&self, tx: &mut SqliteConnection) -> sqlx::Result<Option<Registration>> {
        let new = &self.account;
        let Some(code) = new.admission.invite() else { return Ok(None) };
        let valid = invites::find_valid(tx, code, &new.username, new.now).await?;
        let refusal = match (new.admission, valid) {
            (_, None) => Registration::InviteInvalid,
            (Admission::NamedInvite(_), Some(ValidFor::Any)) => Registration::UsernameTaken,
            (_, Some(_)) => return Ok(None),
        };
        Ok(Some(self.repeated(tx).await?.unwrap_or(refusal)))
    }

    /// Returns the account if this registration is a repeat.
    async fn repeated(&self, tx: &mut SqliteConnection) -> sqlx::Result<Option<Registration>> {
        let conflict = self.conflict(tx).await?;
        Ok(matches!(conflict, Registration::Repeated(_)).then_some(conflict))
    }

    async fn insert(&self, tx: &mut SqliteConnection) -> sqlx::Result<Option<AccountId>> {
        let new = &self.account;
        let skeleton = new.username.skeleton();
        let inserted: Option<i64> = sqlx::query_scalar(INSERT)
            .bind(new.username.as_str())
            .bind(&new.identity.as_bytes()[..])
            .bind(&new.opaque_record[..])
            .bind(millis(new.now))
            .bind(skeleton.as_str())
            .bind(identity_tombstone(&new.identity))
            .bind(name_tombstone(&skeleton))
            .bind(millis(self.known_at))
            .fetch_optional(&mut *tx)
            .await?;
        if let Some(id) = inserted {
            sqlx::query("INSERT INTO inbox (id) VALUES (?1)").bind(id).execute(tx).await?;
        }
        Ok(inserted.map(AccountId))
    }

    async fn conflict(&self, tx: &mut SqliteConnection) -> sqlx::Result<Registration> {
        let new = &self.account;
        let existing =
            sqlx::query("SELECT id, identity, opaque_record FROM account WHERE username = ?1")
                .bind(new.username.as_str())
                .fetch_optional(&mut *tx)
                .await?;
        if let Some(row) = existing {
            let existing = credentials(&row)?;
            let is_same =
                existing.identity == new.identity && existing.opaque_record == new.opaque_record;
            return Ok(if is_same {
                Registration::Repeated(existing.account)
            } else {
                Registration::UsernameTaken
            });
        }
        let taken: (bool, bool) = sqlx::query_as(TAKEN)
            .bind(new.username.skeleton().as_str())
            .bind(&new.identity.as_bytes()[..])
            .bind(identity_tombstone(&new.identity))
            .fetch_one(tx)
            .await?;
        Ok(match taken {
            (false, true) => Registration::IdentityTaken,
            // Without a reason of the key, the name belongs to an account or is reserved.
            (true, _) | (false, false) => Registration::UsernameTaken,
        })
    }
}

/// Replaces the OPAQUE record and ends the account's other sessions.
struct ChangePassword(PasswordChange);

impl Statement for ChangePassword {
    type Answer = PasswordChanged;
    const NAME: &'static str = "change password";

    fn bytes(&self) -> usize {
        SMALL + self.0.opaque_record.len()
    }

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<PasswordChanged>> {
        let PasswordChange { account, session, opaque_record } = &self.0;
        let changed = sqlx::query(
            "UPDATE account SET opaque_record = ?3
              WHERE id = ?1 AND EXISTS (SELECT 1 FROM session WHERE token = ?2 AND account = ?1)",
        )
        .bind(account.0)
        .bind(&session.as_bytes()[..])
        .bind(&opaque_record[..])
        .execute(&mut *tx)
        .await?;
        if changed.rows_affected() == 0 {
            return Ok(Done::keep(PasswordChanged::SessionEnded));
        }
        let rows =
            sqlx::query("DELETE FROM session WHERE account = ?1 AND token <> ?2 RETURNING token")
                .bind(account.0)
                .bind(&session.as_bytes()[..])
                .fetch_all(tx)
                .await?;
        let ended_sessions = u32::try_from(rows.len()).unwrap_or(u32::MAX);
        let effects = Effects { sessions_changed: tokens(&rows)?, ..Effects::default() };
        Ok(Done::with(PasswordChanged::Changed { ended_sessions }, effects))
    }
}

/// The number of accounts in one transaction of [`fill_skeletons`].
const BATCH: i64 = 1_000;

/// Computes the skeletons of accounts that were registered before the schema had skeletons.
///
/// Each batch is committed by itself, so after a kill the next start continues with the rest. Of
/// accounts with the same skeleton, the oldest keeps it and the others stay as lookalikes.
pub(crate) async fn fill_skeletons(connection: &mut SqliteConnection) -> sqlx::Result<()> {
    loop {
        let unknown: Vec<(i64, String)> = sqlx::query_as(
            "SELECT id, username FROM account WHERE skeleton IS NULL ORDER BY id LIMIT +?1",
        )
        .bind(BATCH)
        .fetch_all(&mut *connection)
        .await?;
        if unknown.is_empty() {
            return Ok(());
        }
        let mut open = connection.begin().await?;
        for (id, username) in &unknown {
            sqlx::query(
                "UPDATE account SET skeleton = ?2, lookalike =
                     EXISTS (SELECT 1 FROM account WHERE skeleton = ?2 AND lookalike = 0)
                  WHERE id = ?1",
            )
            .bind(id)
            .bind(Skeleton::of(username).as_str())
            .execute(&mut *open)
            .await?;
        }
        open.commit().await?;
        tracing::info!(accounts = unknown.len(), "skeletons of usernames computed");
    }
}
