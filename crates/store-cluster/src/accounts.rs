//! Accounts in Postgres. An insert is all there is: no statement here updates or replaces one, so
//! of two edges that register the same name or key at a time, the unique indexes let one through,
//! and the other is told what is there.

use std::sync::Arc;

use async_trait::async_trait;
use qpq_domain::{AccountId, IdentityKey, Username};
use qpq_ports::{Account, Accounts, Credentials, NewAccount, Registration, StoreResult};
use sqlx::{PgConnection, postgres::PgRow};

use crate::postgres::{
    Database, Repeat,
    row::{Columns as _, millis},
};

/// An account and its inbox. Waits for whoever is inserting the same name or key, and gives way if
/// that is committed.
const INSERT: &str = "
    WITH new AS (
        INSERT INTO account (username, identity, opaque_record, created_at) VALUES ($1, $2, $3, $4)
        ON CONFLICT DO NOTHING RETURNING id),
    empty AS (INSERT INTO inbox (id) SELECT id FROM new)
    SELECT id FROM new";

const CREDENTIALS: &str = "SELECT id, identity, opaque_record FROM account WHERE username = $1";
const BY_USERNAME: &str =
    "SELECT id, username, identity, created_at FROM account WHERE username = $1";
const BY_IDENTITY: &str =
    "SELECT id, username, identity, created_at FROM account WHERE identity = $1";

#[derive(Debug)]
pub(crate) struct ClusterAccounts {
    database: Database,
}

impl ClusterAccounts {
    pub(crate) fn new(database: Database) -> Self {
        Self { database }
    }
}

#[async_trait]
impl Accounts for ClusterAccounts {
    async fn register(&self, account: NewAccount) -> StoreResult<Registration> {
        let account = Arc::new(account);
        // Twice is as good as once: the second time it is a repeated request, and says so.
        self.database
            .run("register", Repeat::Harmless, |connection| {
                let account = Arc::clone(&account);
                Box::pin(async move { register(connection, &account).await })
            })
            .await
    }

    async fn credentials(&self, username: &Username) -> StoreResult<Option<Credentials>> {
        self.database
            .once("credentials", Repeat::Harmless, |connection| {
                let username = username.clone();
                Box::pin(async move { find_credentials(connection, &username).await })
            })
            .await
    }

    async fn by_username(&self, username: &Username) -> StoreResult<Option<Account>> {
        self.database
            .once("account", Repeat::Harmless, |connection| {
                let username = username.clone();
                Box::pin(async move {
                    let row = sqlx::query(BY_USERNAME)
                        .bind(username.as_str())
                        .fetch_optional(connection)
                        .await?;
                    row.as_ref().map(account).transpose()
                })
            })
            .await
    }

    async fn by_identity(&self, identity: &IdentityKey) -> StoreResult<Option<Account>> {
        let identity = *identity;
        self.database
            .once("account", Repeat::Harmless, move |connection| {
                Box::pin(async move {
                    let query = sqlx::query(BY_IDENTITY).bind(&identity.as_bytes()[..]);
                    query.fetch_optional(connection).await?.as_ref().map(account).transpose()
                })
            })
            .await
    }
}

async fn register(connection: &mut PgConnection, new: &NewAccount) -> sqlx::Result<Registration> {
    let inserted: Option<i64> = sqlx::query_scalar(INSERT)
        .bind(new.username.as_str())
        .bind(&new.identity.as_bytes()[..])
        .bind(&new.opaque_record[..])
        .bind(millis(new.now))
        .fetch_optional(&mut *connection)
        .await?;
    if let Some(id) = inserted {
        return Ok(Registration::Registered(AccountId(id)));
    }
    // A statement of its own sees what the insert gave way to.
    Ok(match find_credentials(connection, &new.username).await? {
        None => Registration::IdentityTaken,
        Some(held) if held.identity == new.identity && held.opaque_record == new.opaque_record => {
            Registration::Repeated(held.account)
        }
        Some(_) => Registration::UsernameTaken,
    })
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
