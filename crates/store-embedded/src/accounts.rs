//! Accounts in SQLite. An insert is all there is: no statement here updates or replaces one.

use async_trait::async_trait;
use futures_util::FutureExt as _;
use qpq_domain::{AccountId, IdentityKey, Username};
use qpq_ports::{Account, Accounts, Credentials, NewAccount, Registration, StoreResult};
use sqlx::{Row as _, SqliteConnection, SqlitePool, sqlite::SqliteRow};

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
    let inserted: Option<i64> = sqlx::query_scalar(
        "INSERT INTO account (username, identity, opaque_record, created_at) VALUES (?1, ?2, ?3, ?4)
         ON CONFLICT DO NOTHING RETURNING id",
    )
    .bind(new.username.as_str())
    .bind(&new.identity.as_bytes()[..])
    .bind(&new.opaque_record[..])
    .bind(millis(new.now))
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
    Ok(match holder.as_ref().map(credentials).transpose()? {
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
