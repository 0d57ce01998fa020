//! Invites in SQLite. A registration uses an invite in its own transaction, see `accounts`.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use async_trait::async_trait;
use qpq_domain::{InviteHash, InviteId, UnixMillis, Username};
use qpq_ports::{EXPIRED_INVITES, Invite, InviteRevocation, Invites, NewInvite, StoreResult};
use sqlx::{
    ConnectOptions as _, Row as _, SqliteConnection,
    sqlite::{SqliteConnectOptions, SqliteRow},
};

use crate::{
    error::{NeverWritten, read_failed},
    files::DATABASE_FILE,
    messages::remove::SWEEP_ROWS,
    open_error::{OpenError, failed},
    row::{Columns as _, millis},
    schema::check_current,
    statement::{Done, SMALL, Statement},
    store::EmbeddedStore,
};

const CREATE: &str = "
    INSERT INTO invite (code, uses, uses_left, username, note, created_at, expires_at)
    VALUES (?1, ?2, ?2, ?3, ?4, ?5, ?6) ON CONFLICT DO NOTHING";
const FIND: &str = "SELECT * FROM invite WHERE code = ?1";
const LIST: &str = "SELECT * FROM invite ORDER BY created_at DESC, code DESC LIMIT +?1";
const REVOKE: &str = "DELETE FROM invite WHERE code BETWEEN ?1 AND ?2";
/// Finds a valid invite, and whether it names the username ?2.
const VALID: &str = "
    SELECT coalesce(username = ?2, 0) AS is_named FROM invite
     WHERE code = ?1 AND uses_left > 0 AND expires_at > ?3
       AND (username IS NULL OR username = ?2)";
const USE: &str = "UPDATE invite SET uses_left = uses_left - 1 WHERE code = ?1";
const SWEEP: &str = "
    DELETE FROM invite WHERE code IN (
        SELECT code FROM invite WHERE expires_at <= ?1 ORDER BY expires_at LIMIT +?2)";

/// All statements but [`LIST`], which reads all invites.
#[cfg(test)]
pub(crate) const STATEMENTS: [&str; 6] = [CREATE, FIND, REVOKE, VALID, USE, SWEEP];

/// The invites for the tools of the operator, whether or not a server is running.
#[derive(Debug)]
pub struct InvitesOperator {
    connection: SqliteConnection,
    path: PathBuf,
}

impl InvitesOperator {
    /// Opens the invites in the data directory `data_dir`.
    pub async fn open(data_dir: &Path) -> Result<Self, OpenError> {
        let path = data_dir.join(DATABASE_FILE);
        let mut connection = SqliteConnectOptions::new()
            .filename(&path)
            .busy_timeout(Duration::from_secs(5))
            .disable_statement_logging()
            .connect()
            .await
            .map_err(|error| failed(&path, &error))?;
        check_current(&mut connection, &path).await?;
        Ok(Self { connection, path })
    }

    /// Creates an invite, as [`Invites::create`] does.
    pub async fn create(&mut self, invite: &NewInvite) -> Result<Invite, OpenError> {
        let created = create(&mut self.connection, invite).await;
        created.map_err(|error| failed(&self.path, &error))
    }

    /// Returns the newest invites, as [`Invites::list`] does.
    pub async fn list(&mut self, limit: u32) -> Result<Vec<Invite>, OpenError> {
        let rows = sqlx::query(LIST).bind(i64::from(limit)).fetch_all(&mut self.connection).await;
        let found = rows.and_then(|rows| rows.iter().map(invite).collect());
        found.map_err(|error| failed(&self.path, &error))
    }

    /// Removes an invite, as [`Invites::revoke`] does.
    pub async fn revoke(&mut self, id: InviteId) -> Result<InviteRevocation, OpenError> {
        revoke(&mut self.connection, id).await.map_err(|error| failed(&self.path, &error))
    }
}

#[async_trait]
impl Invites for EmbeddedStore {
    async fn create(&self, invite: NewInvite) -> StoreResult<Invite> {
        self.writer.run(Create(invite)).await
    }

    async fn list(&self, limit: u32) -> StoreResult<Vec<Invite>> {
        let rows = sqlx::query(LIST).bind(i64::from(limit)).fetch_all(&self.readers).await;
        rows.and_then(|rows| rows.iter().map(invite).collect()).map_err(read_failed)
    }

    async fn revoke(&self, invite: InviteId) -> StoreResult<InviteRevocation> {
        self.writer.run(Revoke(invite)).await
    }
}

struct Create(NewInvite);

impl Statement for Create {
    type Answer = Invite;
    const NAME: &'static str = "create invite";

    fn bytes(&self) -> usize {
        SMALL + self.0.note.len()
    }

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<Invite>> {
        create(tx, &self.0).await.map(Done::keep)
    }
}

struct Revoke(InviteId);

impl Statement for Revoke {
    type Answer = InviteRevocation;
    const NAME: &'static str = "revoke invite";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<InviteRevocation>> {
        revoke(tx, self.0).await.map(Done::keep)
    }
}

/// Removes up to [`SWEEP_ROWS`] invites that have expired long ago. Returns their number.
pub(crate) struct SweepInvites {
    pub(crate) now: UnixMillis,
}

impl Statement for SweepInvites {
    type Answer = u64;
    const NAME: &'static str = "sweep invites";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<u64>> {
        let query = sqlx::query(SWEEP).bind(millis(self.now.minus(EXPIRED_INVITES)));
        let removed = query.bind(SWEEP_ROWS).execute(tx).await?;
        Ok(Done::keep(removed.rows_affected()))
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

/// Finds an invite with which `username` can be registered.
pub(crate) async fn find_valid(
    connection: &mut SqliteConnection,
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

/// Counts one use of a valid invite.
pub(crate) async fn count_use(
    connection: &mut SqliteConnection,
    code: &InviteHash,
) -> sqlx::Result<()> {
    sqlx::query(USE).bind(&code.as_bytes()[..]).execute(connection).await.map(drop)
}

async fn create(connection: &mut SqliteConnection, new: &NewInvite) -> sqlx::Result<Invite> {
    sqlx::query(CREATE)
        .bind(&new.code.as_bytes()[..])
        .bind(i64::from(new.uses))
        .bind(new.username.as_ref().map(Username::as_str))
        .bind(&new.note)
        .bind(millis(new.now))
        .bind(millis(new.now.plus(new.lifetime)))
        .execute(&mut *connection)
        .await?;
    let query = sqlx::query(FIND).bind(&new.code.as_bytes()[..]);
    invite(&query.fetch_one(connection).await?)
}

async fn revoke(connection: &mut SqliteConnection, id: InviteId) -> sqlx::Result<InviteRevocation> {
    let [first, last] = id.hashes();
    let query = sqlx::query(REVOKE).bind(first.as_bytes().to_vec()).bind(last.as_bytes().to_vec());
    Ok(match query.execute(connection).await?.rows_affected() {
        0 => InviteRevocation::NotFound,
        _ => InviteRevocation::Revoked,
    })
}

fn invite(row: &SqliteRow) -> sqlx::Result<Invite> {
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
