//! Accounts in SQLite. An account is inserted and never replaced.

use async_trait::async_trait;
use futures_util::FutureExt as _;
use qpq_domain::{AccountId, IdentityKey, Skeleton, Username};
use qpq_ports::{Account, Accounts, Credentials, NewAccount, Registration, StoreResult};
use sqlx::{Connection as _, Row as _, SqliteConnection, SqlitePool, sqlite::SqliteRow};

use crate::{
    error::read_failed,
    row::{Columns as _, millis},
    writer::{Outcome, Scope, Writer},
};

#[derive(Debug)]
pub(crate) struct EmbeddedAccounts {
    writer: Writer,
    readers: SqlitePool,
}

impl EmbeddedAccounts {
    pub(crate) fn new(writer: Writer, readers: SqlitePool) -> Self {
        Self { writer, readers }
    }
}

#[async_trait]
impl Accounts for EmbeddedAccounts {
    async fn register(&self, account: NewAccount) -> StoreResult<Registration> {
        let bytes = account.opaque_record.len() + 256;
        self.writer
            .run(
                Scope::Job,
                bytes,
                |connection| {
                    async move { register(connection, account).await.map(Outcome::Keep) }.boxed()
                },
                |_| {},
            )
            .await
    }

    async fn credentials(&self, username: &Username) -> StoreResult<Option<Credentials>> {
        sqlx::query("SELECT id, identity, opaque_record FROM account WHERE username = ?1")
            .bind(username.as_str())
            .fetch_optional(&self.readers)
            .await
            .and_then(|row| row.as_ref().map(credentials).transpose())
            .map_err(read_failed)
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
}

async fn register(
    connection: &mut SqliteConnection,
    new: NewAccount,
) -> sqlx::Result<Registration> {
    let skeleton = new.username.skeleton();
    let inserted: Option<i64> = sqlx::query_scalar(
        "INSERT INTO account (username, identity, opaque_record, created_at, skeleton)
         VALUES (?1, ?2, ?3, ?4, ?5) ON CONFLICT DO NOTHING RETURNING id",
    )
    .bind(new.username.as_str())
    .bind(&new.identity.as_bytes()[..])
    .bind(&new.opaque_record[..])
    .bind(millis(new.now))
    .bind(skeleton.as_str())
    .fetch_optional(&mut *connection)
    .await?;
    if let Some(id) = inserted {
        sqlx::query("INSERT INTO inbox (id) VALUES (?1)")
            .bind(id)
            .execute(&mut *connection)
            .await?;
        return Ok(Registration::Registered(AccountId(id)));
    }
    let holder = sqlx::query("SELECT id, identity, opaque_record FROM account WHERE username = ?1")
        .bind(new.username.as_str())
        .fetch_optional(&mut *connection)
        .await?;
    let is_lookalike: bool = sqlx::query_scalar(
        "SELECT EXISTS (SELECT 1 FROM account WHERE skeleton = ?1 AND lookalike = 0)",
    )
    .bind(skeleton.as_str())
    .fetch_one(&mut *connection)
    .await?;
    Ok(match holder.as_ref().map(credentials).transpose()? {
        None if is_lookalike => Registration::UsernameTaken,
        None => Registration::IdentityTaken,
        Some(held) if held.identity == new.identity && held.opaque_record == new.opaque_record => {
            Registration::Repeated(held.account)
        }
        Some(_) => Registration::UsernameTaken,
    })
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

/// Accounts in one transaction of [`fill_skeletons`].
const BATCH: i64 = 1_000;

/// Computes the skeletons of the accounts that have none, from before the schema had them. Each
/// batch is committed, so that a killed start continues where it stopped. Of accounts with the same
/// skeleton, the oldest holds it and the others stay as lookalikes.
pub(crate) async fn fill_skeletons(connection: &mut SqliteConnection) -> sqlx::Result<()> {
    loop {
        let unknown: Vec<(i64, String)> = sqlx::query_as(
            "SELECT id, username FROM account WHERE skeleton IS NULL ORDER BY id LIMIT ?1",
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
