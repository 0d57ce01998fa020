//! Bans in SQLite. A ban that has ended is not in force, whether or not a sweep has removed its
//! row.

use async_trait::async_trait;
use qpq_domain::{AccountId, GroupId, IdentityKey, UnixMillis};
use qpq_ports::{
    AuditAction, Ban, BanEffects, BanRefusal, BanScope, Bans, GroupRefusal, ModerationRight,
    Moderator, NewBan, StoreResult, Unban,
};
use sqlx::{Row as _, SqliteConnection, sqlite::SqliteRow};

use crate::{
    audit::{Action, record},
    clock::Bounds,
    effects::Effects,
    error::read_failed,
    groups::{self, Head},
    messages::remove::SWEEP_ROWS,
    row::{Columns as _, millis},
    sessions::tokens,
    statement::{Done, SMALL, Statement},
    store::EmbeddedStore,
};

const ACCOUNT: &str = "SELECT id FROM account WHERE identity = ?1";

const BAN: &str = "
    INSERT INTO ban (account, reason, banned_at, expires_at) VALUES (?1, ?2, ?3, ?4)
        ON CONFLICT DO UPDATE
       SET reason = excluded.reason, banned_at = excluded.banned_at,
           expires_at = excluded.expires_at";
const BAN_FROM_GROUP: &str = "
    INSERT INTO group_ban (account, reason, banned_at, expires_at, group_id)
    VALUES (?1, ?2, ?3, ?4, ?5)
        ON CONFLICT DO UPDATE
       SET reason = excluded.reason, banned_at = excluded.banned_at,
           expires_at = excluded.expires_at";

const END_SESSIONS: &str = "DELETE FROM session WHERE account = ?1 RETURNING token";

const UNBAN: &str = "
    DELETE FROM ban WHERE account = ?1
    RETURNING expires_at IS NULL OR expires_at > ?2 AS in_force";
const UNBAN_FROM_GROUP: &str = "
    DELETE FROM group_ban WHERE account = ?1 AND group_id = ?3
    RETURNING expires_at IS NULL OR expires_at > ?2 AS in_force";

/// Returns whether the account ?1 is banned from the server at ?2.
const IS_BANNED: &str = "
    SELECT EXISTS (SELECT 1 FROM ban
                    WHERE account = ?1 AND (expires_at IS NULL OR expires_at > ?2))";
/// Returns whether the account ?1 is banned from the group ?3 at ?2.
const IS_BANNED_FROM_GROUP: &str = "
    SELECT EXISTS (SELECT 1 FROM group_ban
                    WHERE group_id = ?3 AND account = ?1
                      AND (expires_at IS NULL OR expires_at > ?2))";

const LIST: &str = "
    SELECT a.identity, b.reason, b.banned_at, b.expires_at
      FROM ban b JOIN account a ON a.id = b.account
     WHERE b.expires_at IS NULL OR b.expires_at > ?1
     ORDER BY b.banned_at DESC, a.id DESC LIMIT +?2";
const LIST_OF_GROUP: &str = "
    SELECT a.identity, b.reason, b.banned_at, b.expires_at
      FROM group_ban b JOIN account a ON a.id = b.account
     WHERE b.group_id = ?3 AND (b.expires_at IS NULL OR b.expires_at > ?1)
     ORDER BY b.banned_at DESC, a.id DESC LIMIT +?2";

const SWEEP: &str = "
    DELETE FROM ban WHERE account IN (
        SELECT account FROM ban WHERE expires_at <= ?1 ORDER BY expires_at LIMIT +?2)";
const SWEEP_OF_GROUPS: &str = "
    DELETE FROM group_ban WHERE (group_id, account) IN (
        SELECT group_id, account FROM group_ban
         WHERE expires_at <= ?1 ORDER BY expires_at LIMIT +?2)";

#[cfg(test)]
pub(crate) const STATEMENTS: [&str; 10] = [
    ACCOUNT,
    BAN,
    BAN_FROM_GROUP,
    END_SESSIONS,
    UNBAN,
    UNBAN_FROM_GROUP,
    IS_BANNED,
    IS_BANNED_FROM_GROUP,
    SWEEP,
    SWEEP_OF_GROUPS,
];

#[async_trait]
impl Bans for EmbeddedStore {
    async fn ban(&self, ban: NewBan) -> StoreResult<Result<BanEffects, BanRefusal>> {
        let bounds = self.memory.clock.bounds(ban.now);
        self.writer.run(StoreBan { ban, bounds }).await
    }

    async fn unban(&self, unban: Unban) -> StoreResult<Result<bool, BanRefusal>> {
        let bounds = self.memory.clock.bounds(unban.now);
        self.writer.run(RemoveBan { unban, bounds }).await
    }

    async fn list(
        &self,
        scope: BanScope,
        moderator: Moderator,
        limit: u32,
        now: UnixMillis,
    ) -> StoreResult<Result<Vec<Ban>, BanRefusal>> {
        let at = self.memory.clock.bounds(now).earliest;
        let mut snapshot = self.readers.begin().await.map_err(read_failed)?;
        let bans = list(&mut snapshot, scope, &moderator, limit, at).await;
        bans.map_err(read_failed)
    }
}

async fn list(
    snapshot: &mut SqliteConnection,
    scope: BanScope,
    moderator: &Moderator,
    limit: u32,
    at: UnixMillis,
) -> sqlx::Result<Result<Vec<Ban>, BanRefusal>> {
    if let Err(refusal) = check_right(snapshot, scope, moderator).await? {
        return Ok(Err(refusal));
    }
    let query = sqlx::query(match scope {
        BanScope::Server => LIST,
        BanScope::Group(_) => LIST_OF_GROUP,
    });
    let query = query.bind(millis(at)).bind(i64::from(limit));
    let query = match scope.group() {
        None => query,
        Some(group) => query.bind(group.as_bytes().to_vec()),
    };
    let rows = query.fetch_all(snapshot).await?;
    rows.iter().map(ban).collect::<sqlx::Result<_>>().map(Ok)
}

fn ban(row: &SqliteRow) -> sqlx::Result<Ban> {
    let expires = row.try_get::<Option<i64>, _>("expires_at")?.is_some();
    Ok(Ban {
        identity: row.identity("identity")?,
        reason: row.try_get("reason")?,
        banned_at: row.at("banned_at")?,
        expires_at: expires.then(|| row.at("expires_at")).transpose()?,
    })
}

/// Checks that the group of the scope exists, and that the moderator is an admin of it if that is
/// its right.
async fn check_right(
    connection: &mut SqliteConnection,
    scope: BanScope,
    moderator: &Moderator,
) -> sqlx::Result<Result<(), BanRefusal>> {
    let Some(group) = scope.group() else { return Ok(Ok(())) };
    let head = match moderator.right {
        ModerationRight::Server => {
            Head::find(connection, group, moderator.account).await?.ok_or(GroupRefusal::NotFound)
        }
        ModerationRight::Group => Head::of_admin(connection, group, moderator.account).await?,
    };
    Ok(head.map(drop).map_err(BanRefusal::Group))
}

/// Returns the account with this identity key.
async fn account_of(
    connection: &mut SqliteConnection,
    identity: &IdentityKey,
) -> sqlx::Result<Option<i64>> {
    sqlx::query_scalar(ACCOUNT).bind(&identity.as_bytes()[..]).fetch_optional(connection).await
}

/// Returns whether the account is banned from the server at this instant.
pub(crate) async fn is_banned(
    connection: &mut SqliteConnection,
    account: AccountId,
    at: UnixMillis,
) -> sqlx::Result<bool> {
    let query = sqlx::query_scalar(IS_BANNED).bind(account.0).bind(millis(at));
    query.fetch_one(connection).await
}

/// Returns whether the account is banned from the group at this instant.
pub(crate) async fn is_banned_from(
    connection: &mut SqliteConnection,
    group: &GroupId,
    account: AccountId,
    at: UnixMillis,
) -> sqlx::Result<bool> {
    let query = sqlx::query_scalar(IS_BANNED_FROM_GROUP).bind(account.0).bind(millis(at));
    query.bind(&group.as_bytes()[..]).fetch_one(connection).await
}

/// Stores a ban with its immediate effects.
struct StoreBan {
    ban: NewBan,
    bounds: Bounds,
}

impl Statement for StoreBan {
    type Answer = Result<BanEffects, BanRefusal>;
    const NAME: &'static str = "ban";

    fn bytes(&self) -> usize {
        SMALL + self.ban.reason.len()
    }

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<Self::Answer>> {
        let NewBan { scope, subject, moderator, reason, .. } = &self.ban;
        if let Err(refusal) = check_right(tx, *scope, moderator).await? {
            return Ok(Done::keep(Err(refusal)));
        }
        let Some(account) = account_of(tx, subject).await? else {
            return Ok(Done::keep(Err(BanRefusal::NoSuchAccount)));
        };
        if account == moderator.account.0 {
            return Ok(Done::keep(Err(BanRefusal::OwnAccount)));
        }
        self.insert(tx, account).await?;
        let at = self.bounds.latest;
        let (actor, action) = (Some(moderator.identity).into(), AuditAction::Ban);
        let (subject, group) = (Some(subject), scope.group());
        record(tx, Action { at, actor, action, subject, group, reason }).await?;
        match scope {
            BanScope::Server => self.end_sessions(tx, account).await,
            BanScope::Group(group) => {
                let was_member = groups::remove(tx, group, &self.ban.subject).await?;
                Ok(Done::keep(Ok(BanEffects { ended_sessions: 0, was_member })))
            }
        }
    }
}

impl StoreBan {
    async fn insert(&self, tx: &mut SqliteConnection, account: i64) -> sqlx::Result<()> {
        let NewBan { scope, reason, duration, .. } = &self.ban;
        let banned_at = self.bounds.latest;
        let expires_at = duration.map(|duration| millis(banned_at.plus(duration)));
        let query = match scope {
            BanScope::Server => sqlx::query(BAN),
            BanScope::Group(_) => sqlx::query(BAN_FROM_GROUP),
        };
        let query = query.bind(account).bind(&reason[..]).bind(millis(banned_at)).bind(expires_at);
        let query = match scope {
            BanScope::Server => query,
            BanScope::Group(group) => query.bind(&group.as_bytes()[..]),
        };
        query.execute(tx).await.map(drop)
    }

    async fn end_sessions(
        &self,
        tx: &mut SqliteConnection,
        account: i64,
    ) -> sqlx::Result<Done<Result<BanEffects, BanRefusal>>> {
        let rows = sqlx::query(END_SESSIONS).bind(account).fetch_all(tx).await?;
        let sessions_changed = tokens(&rows)?;
        let ended_sessions = u32::try_from(sessions_changed.len()).unwrap_or(u32::MAX);
        let effects = Effects { sessions_changed, ..Effects::default() };
        Ok(Done::with(Ok(BanEffects { ended_sessions, was_member: false }), effects))
    }
}

/// Removes a ban. Returns whether it was in force.
struct RemoveBan {
    unban: Unban,
    bounds: Bounds,
}

impl Statement for RemoveBan {
    type Answer = Result<bool, BanRefusal>;
    const NAME: &'static str = "unban";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<Self::Answer>> {
        let Unban { scope, subject, moderator, .. } = &self.unban;
        if let Err(refusal) = check_right(tx, *scope, moderator).await? {
            return Ok(Done::keep(Err(refusal)));
        }
        let Some(account) = account_of(tx, subject).await? else {
            return Ok(Done::keep(Err(BanRefusal::NoSuchAccount)));
        };
        let query = match scope {
            BanScope::Server => sqlx::query(UNBAN),
            BanScope::Group(_) => sqlx::query(UNBAN_FROM_GROUP),
        };
        let query = query.bind(account).bind(millis(self.bounds.earliest));
        let query = match scope {
            BanScope::Server => query,
            BanScope::Group(group) => query.bind(&group.as_bytes()[..]),
        };
        let removed = query.fetch_optional(&mut *tx).await?;
        let was_in_force = removed.map(|row| row.try_get("in_force")).transpose()? == Some(true);
        if was_in_force {
            let at = self.bounds.latest;
            let (actor, action) = (Some(moderator.identity).into(), AuditAction::Unban);
            let (subject, group) = (Some(subject), scope.group());
            record(tx, Action { at, actor, action, subject, group, reason: "" }).await?;
        }
        Ok(Done::keep(Ok(was_in_force)))
    }
}

/// Removes bans that have ended, up to [`SWEEP_ROWS`] of each scope. Returns their number.
pub(crate) struct SweepBans {
    pub(crate) now: UnixMillis,
}

impl Statement for SweepBans {
    type Answer = u64;
    const NAME: &'static str = "sweep bans";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<u64>> {
        let mut removed = 0;
        for sql in [SWEEP, SWEEP_OF_GROUPS] {
            let query = sqlx::query(sql).bind(millis(self.now)).bind(SWEEP_ROWS);
            removed += query.execute(&mut *tx).await?.rows_affected();
        }
        Ok(Done::keep(removed))
    }
}
