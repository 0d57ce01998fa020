//! Invites in Postgres. A registration uses an invite in its own transaction, see `accounts`. The
//! lifetimes of invites follow Postgres' clock.

use std::sync::Arc;

use async_trait::async_trait;
use qpq_domain::{InviteHash, InviteId, UnixMillis, Username};
use qpq_ports::{Invite, InviteRevocation, Invites, NewInvite, StoreResult};
use sqlx::{PgConnection, Row as _, postgres::PgRow};

use crate::{
    Config, ConnectError, Migrate,
    error::NeverWritten,
    postgres::{
        self, Database, Repeat, Scope, Statement,
        row::{Columns as _, millis, millis_of},
    },
};

/// Stores an invite. $5 is the caller's time, for tests that set the time. A separate statement
/// reads the invite, because `ON CONFLICT DO NOTHING` returns no row.
const CREATE: &str = "
    INSERT INTO invite (code, uses, uses_left, username, note, created_at, expires_at)
    SELECT $1, $2, $2, $3, $4, clock.now, clock.now + $6
      FROM (SELECT coalesce(store_now(), $5) AS now) AS clock
    ON CONFLICT DO NOTHING";
const FIND: &str = "SELECT * FROM invite WHERE code = $1";
const LIST: &str = "SELECT * FROM invite ORDER BY created_at DESC, code DESC LIMIT $1";
const REVOKE: &str = "DELETE FROM invite WHERE code BETWEEN $1 AND $2";
/// Locks a valid invite, and returns whether it names the username $2. Waits for other
/// registrations with the invite, and then sees the uses that they left.
const VALID: &str = "
    SELECT coalesce(username = $2, false) AS is_named FROM invite
     WHERE code = $1 AND uses_left > 0 AND expires_at > (SELECT coalesce(store_now(), $3))
       AND (username IS NULL OR username = $2)
       FOR UPDATE";
const USE: &str = "UPDATE invite SET uses_left = uses_left - 1 WHERE code = $1";
/// Removes invites that have expired long ago. $3 is the time for which they stay.
pub(crate) const SWEEP: &str = "
    DELETE FROM invite WHERE code = ANY (ARRAY (
        SELECT code FROM invite WHERE expires_at <= (SELECT least($1, store_now())) - $3
         ORDER BY expires_at LIMIT $2 FOR UPDATE SKIP LOCKED))";

/// The invites in one database. Needs neither Redis nor NATS.
#[derive(Debug)]
pub(crate) struct InviteBook {
    database: Database,
}

impl InviteBook {
    pub(crate) fn new(database: Database) -> Self {
        Self { database }
    }
}

/// Returns the invites of the cluster's database, for the tools of the operator. Needs neither
/// Redis nor NATS.
pub async fn operator_invites(config: &Config) -> Result<Arc<dyn Invites>, ConnectError> {
    let options = postgres::options(config)?;
    postgres::prepare(&options, Migrate::Never, config.start_timeout).await?;
    Ok(Arc::new(InviteBook::new(Database::new(options, 1, config.postgres_timeout))))
}

#[async_trait]
impl Invites for InviteBook {
    async fn create(&self, invite: NewInvite) -> StoreResult<Invite> {
        Ok(self.database.run(&Create(invite)).await?)
    }

    async fn list(&self, limit: u32) -> StoreResult<Vec<Invite>> {
        Ok(self.database.run(&List(limit)).await?)
    }

    async fn revoke(&self, invite: InviteId) -> StoreResult<InviteRevocation> {
        Ok(self.database.run(&Revoke(invite)).await?)
    }
}

struct Create(NewInvite);

impl Statement for Create {
    type Output = Invite;

    /// A repeat finds the invite of the first attempt.
    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Transaction;

    fn name(&self) -> &'static str {
        "create_invite"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Invite> {
        let new = &self.0;
        sqlx::query(CREATE)
            .bind(&new.code.as_bytes()[..])
            .bind(i64::from(new.uses))
            .bind(new.username.as_ref().map(Username::as_str))
            .bind(&new.note)
            .bind(millis(new.now))
            .bind(millis_of(new.lifetime))
            .execute(&mut *connection)
            .await?;
        let query = sqlx::query(FIND).bind(&new.code.as_bytes()[..]);
        invite(&query.fetch_one(connection).await?)
    }
}

struct List(u32);

impl Statement for List {
    type Output = Vec<Invite>;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "list_invites"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Vec<Invite>> {
        let rows = sqlx::query(LIST).bind(i64::from(self.0)).fetch_all(connection).await?;
        rows.iter().map(invite).collect()
    }
}

struct Revoke(InviteId);

impl Statement for Revoke {
    type Output = InviteRevocation;

    /// A repeat finds no invite.
    const REPEAT: Repeat = Repeat::Never;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "revoke_invite"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<InviteRevocation> {
        let [first, last] = self.0.hashes();
        let query = sqlx::query(REVOKE).bind(&first.as_bytes()[..]).bind(&last.as_bytes()[..]);
        Ok(match query.execute(connection).await?.rows_affected() {
            0 => InviteRevocation::NotFound,
            _ => InviteRevocation::Revoked,
        })
    }
}

/// The scope of a valid invite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ValidFor {
    /// The invite is for any username.
    Any,
    /// The invite names the username.
    Named,
}

/// Finds an invite with which `username` can be registered. No other registration uses the invite
/// until the end of the transaction.
pub(crate) async fn lock_valid(
    connection: &mut PgConnection,
    code: &InviteHash,
    username: &Username,
    now: UnixMillis,
) -> sqlx::Result<Option<ValidFor>> {
    let is_named: Option<bool> = sqlx::query_scalar(VALID)
        .bind(&code.as_bytes()[..])
        .bind(username.as_str())
        .bind(millis(now))
        .fetch_optional(connection)
        .await?;
    Ok(is_named.map(|is_named| if is_named { ValidFor::Named } else { ValidFor::Any }))
}

/// Counts one use of an invite that [`lock_valid`] has found.
pub(crate) async fn count_use(
    connection: &mut PgConnection,
    code: &InviteHash,
) -> sqlx::Result<()> {
    sqlx::query(USE).bind(&code.as_bytes()[..]).execute(connection).await.map(drop)
}

fn invite(row: &PgRow) -> sqlx::Result<Invite> {
    let count = |column| {
        Ok::<_, sqlx::Error>(
            u32::try_from(row.unsigned(column)?).map_err(|_| NeverWritten(column))?,
        )
    };
    let username = row
        .try_get::<Option<&str>, _>("username")?
        .map(Username::parse)
        .transpose()
        .map_err(|_| NeverWritten("username"))?;
    Ok(Invite {
        id: InviteHash::new(row.hash("code")?).id(),
        uses: count("uses")?,
        uses_left: count("uses_left")?,
        username,
        note: row.try_get("note")?,
        created_at: row.at("created_at")?,
        expires_at: row.at("expires_at")?,
    })
}
