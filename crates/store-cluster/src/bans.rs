//! Bans in Postgres. A ban that has ended is not in force, whether or not a sweep has removed its
//! row.
//!
//! A ban of the server locks the account, as a trigger does before it lets a session in. So a
//! concurrent session is refused or ended. A ban of a group locks the group, as do all changes of
//! its members and all messages to them.

use std::{collections::HashSet, mem};

use async_trait::async_trait;
use parking_lot::Mutex;
use qpq_domain::{AccountId, GroupId, IdentityKey, Role, TokenHash, UnixMillis};
use qpq_ports::{
    AuditAction, Ban, BanEffects, BanRefusal, BanScope, Bans, GroupRefusal, ModerationRight,
    Moderator, NewBan, StoreError, StoreResult, Unban,
};
use sqlx::{PgConnection, Row as _, postgres::PgRow};

use crate::{
    ClusterStore,
    audit::{Action, record},
    effects::Effects,
    groups,
    postgres::{
        Repeat, Scope, Statement,
        row::{Columns as _, millis, now_of},
    },
    sessions::tokens,
    store::Inner,
    time::{Bounds, Time},
};

const FIND: &str = "
    SELECT id, store_now() AS postgres FROM account WHERE identity = $1";
/// Waits for the transactions that insert sessions of the account, see the trigger
/// `session_of_banned`.
const LOCK: &str = "
    SELECT id, store_now() AS postgres FROM account WHERE identity = $1 FOR UPDATE";

const BAN: &str = "
    INSERT INTO ban (account, reason, banned_at, expires_at) VALUES ($1, $2, $3, $4)
        ON CONFLICT (account) DO UPDATE
       SET reason = excluded.reason, banned_at = excluded.banned_at,
           expires_at = excluded.expires_at";
const BAN_FROM_GROUP: &str = "
    INSERT INTO group_ban (account, reason, banned_at, expires_at, group_id)
    VALUES ($1, $2, $3, $4, $5)
        ON CONFLICT (group_id, account) DO UPDATE
       SET reason = excluded.reason, banned_at = excluded.banned_at,
           expires_at = excluded.expires_at";

const END_SESSIONS: &str = "DELETE FROM session WHERE account = $1 RETURNING token";

const UNBAN: &str = "
    DELETE FROM ban WHERE account = $1
    RETURNING expires_at IS NULL OR expires_at > $2 AS in_force";
const UNBAN_FROM_GROUP: &str = "
    DELETE FROM group_ban WHERE account = $1 AND group_id = $3
    RETURNING expires_at IS NULL OR expires_at > $2 AS in_force";

const LIST: &str = "
    SELECT a.identity, b.reason, b.banned_at, b.expires_at
      FROM ban b JOIN account a ON a.id = b.account
     WHERE b.expires_at IS NULL OR b.expires_at > (SELECT least($1, store_now()))
     ORDER BY b.banned_at DESC, a.id DESC LIMIT $2";
const LIST_OF_GROUP: &str = "
    SELECT a.identity, b.reason, b.banned_at, b.expires_at
      FROM group_ban b JOIN account a ON a.id = b.account
     WHERE b.group_id = $3
       AND (b.expires_at IS NULL OR b.expires_at > (SELECT least($1, store_now())))
     ORDER BY b.banned_at DESC, a.id DESC LIMIT $2";

/// Returns whether the account $1 is banned from the server at $2.
const IS_BANNED: &str = "
    SELECT EXISTS (SELECT 1 FROM ban
                    WHERE account = $1
                      AND (expires_at IS NULL OR expires_at > least($2, store_now())))";

/// Returns the accounts of $1 that are banned from the group $2 at $3.
const BANNED_FROM_GROUP: &str = "
    SELECT account FROM group_ban
     WHERE account = ANY ($1::int8[]) AND group_id = $2
       AND (expires_at IS NULL OR expires_at > least($3, store_now()))";

/// Removes bans of the server that have ended. $1 now, $2 rows.
pub(crate) const SWEEP: &str = "
    DELETE FROM ban WHERE account = ANY (ARRAY (
        SELECT account FROM ban WHERE expires_at <= (SELECT least($1, store_now()))
         ORDER BY expires_at LIMIT $2 FOR UPDATE SKIP LOCKED))";
/// Removes bans of groups that have ended. See [`SWEEP`].
pub(crate) const SWEEP_OF_GROUPS: &str = "
    DELETE FROM group_ban WHERE ctid = ANY (ARRAY (
        SELECT ctid FROM group_ban WHERE expires_at <= (SELECT least($1, store_now()))
         ORDER BY expires_at LIMIT $2 FOR UPDATE SKIP LOCKED))";

#[async_trait]
impl Bans for ClusterStore {
    async fn ban(&self, ban: NewBan) -> StoreResult<Result<BanEffects, BanRefusal>> {
        let store = self.clone();
        // A separate task, so that the copies of the sessions are dropped even if the caller is
        // dropped.
        let banning = tokio::spawn(async move {
            let Inner { database, applier, time, .. } = &*store.inner;
            let statement = StoreBan { ban: &ban, time, ended: Mutex::default() };
            let outcome = database.run(&statement).await;
            let ended_sessions: Vec<_> =
                mem::take(&mut *statement.ended.lock()).into_iter().collect();
            match outcome {
                Ok(outcome) => {
                    let count = u32::try_from(ended_sessions.len()).unwrap_or(u32::MAX);
                    applier.apply(Effects { ended_sessions, ..Effects::default() }).await;
                    Ok(outcome.map(|effects| BanEffects { ended_sessions: count, ..effects }))
                }
                Err(error) => {
                    applier.sessions.uncertain(&ended_sessions).await;
                    Err(error.into())
                }
            }
        });
        banning.await.unwrap_or_else(|error| Err(StoreError::unavailable(error)))
    }

    async fn unban(&self, unban: Unban) -> StoreResult<Result<bool, BanRefusal>> {
        let Inner { database, time, .. } = &*self.inner;
        Ok(database.run(&RemoveBan { unban, time }).await?)
    }

    async fn list(
        &self,
        scope: BanScope,
        moderator: Moderator,
        limit: u32,
        now: UnixMillis,
    ) -> StoreResult<Result<Vec<Ban>, BanRefusal>> {
        let now = self.inner.time.bounds(now, None).earliest;
        Ok(self.inner.database.run(&ListBans { scope, moderator, limit, now }).await?)
    }
}

/// Returns whether the account is banned from the server.
pub(crate) async fn is_banned(
    connection: &mut PgConnection,
    account: AccountId,
    now: UnixMillis,
) -> sqlx::Result<bool> {
    let query = sqlx::query_scalar(IS_BANNED).bind(account.0).bind(millis(now));
    query.fetch_one(connection).await
}

/// Returns the accounts that are banned from a group.
pub(crate) async fn banned_from(
    connection: &mut PgConnection,
    group: &GroupId,
    accounts: &[i64],
    now: UnixMillis,
) -> sqlx::Result<Vec<i64>> {
    let query = sqlx::query_scalar(BANNED_FROM_GROUP).bind(accounts).bind(&group.as_bytes()[..]);
    query.bind(millis(now)).fetch_all(connection).await
}

/// Locks the group of the scope, and checks that the moderator is an admin of it if that is its
/// right.
async fn lock_group(
    connection: &mut PgConnection,
    scope: BanScope,
    moderator: &Moderator,
) -> sqlx::Result<Result<(), BanRefusal>> {
    let Some(group) = scope.group() else { return Ok(Ok(())) };
    let locked = match moderator.right {
        ModerationRight::Server => {
            groups::lock(connection, group).await?.ok_or(GroupRefusal::NotFound)
        }
        ModerationRight::Group => {
            groups::lock_as_admin(connection, group, moderator.account).await?
        }
    };
    Ok(locked.map(drop).map_err(BanRefusal::Group))
}

/// Returns the account with this identity key, and Postgres' time.
async fn find(
    connection: &mut PgConnection,
    sql: &'static str,
    identity: &IdentityKey,
) -> sqlx::Result<Option<(i64, Option<UnixMillis>)>> {
    let query = sqlx::query(sql).bind(&identity.as_bytes()[..]);
    let row = query.fetch_optional(connection).await?;
    row.map(|row| Ok((row.try_get("id")?, now_of(&row)?))).transpose()
}

/// Stores a ban with its immediate effects.
struct StoreBan<'a> {
    ban: &'a NewBan,
    time: &'a Time,
    /// The sessions that were ended, in all attempts. An attempt whose commit was not answered may
    /// have succeeded.
    ended: Mutex<HashSet<TokenHash>>,
}

impl Statement for StoreBan<'_> {
    type Output = Result<BanEffects, BanRefusal>;

    /// A repeat stores the same ban, and adds another entry to the audit trail.
    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Transaction;

    fn name(&self) -> &'static str {
        "ban"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Self::Output> {
        let NewBan { scope, subject, moderator, reason, now, .. } = self.ban;
        if let Err(refusal) = lock_group(connection, *scope, moderator).await? {
            return Ok(Err(refusal));
        }
        let sql = if *scope == BanScope::Server { LOCK } else { FIND };
        let Some((account, postgres)) = find(connection, sql, subject).await? else {
            return Ok(Err(BanRefusal::NoSuchAccount));
        };
        if account == moderator.account.0 {
            return Ok(Err(BanRefusal::OwnAccount));
        }
        let bounds = self.time.bounds(*now, postgres);
        self.insert(connection, account, &bounds).await?;
        let action = Action {
            at: bounds.agreed,
            actor: Some(moderator.identity).into(),
            action: AuditAction::Ban,
            subject: Some(subject),
            group: scope.group(),
            reason,
        };
        record(connection, action).await?;
        match scope {
            BanScope::Server => {
                let query = sqlx::query(END_SESSIONS).bind(account);
                let ended = tokens(&query.fetch_all(connection).await?)?;
                self.ended.lock().extend(ended);
                Ok(Ok(BanEffects::default()))
            }
            BanScope::Group(group) => {
                let was_member = groups::remove(connection, group, account).await?;
                Ok(Ok(BanEffects { ended_sessions: 0, was_member }))
            }
        }
    }
}

impl StoreBan<'_> {
    async fn insert(
        &self,
        connection: &mut PgConnection,
        account: i64,
        bounds: &Bounds,
    ) -> sqlx::Result<()> {
        let NewBan { scope, reason, duration, .. } = self.ban;
        let expires_at = duration.map(|duration| millis(bounds.latest.plus(duration)));
        let sql = if *scope == BanScope::Server { BAN } else { BAN_FROM_GROUP };
        let query = sqlx::query(sql)
            .bind(account)
            .bind(reason)
            .bind(millis(bounds.agreed))
            .bind(expires_at);
        let query = match scope {
            BanScope::Server => query,
            BanScope::Group(group) => query.bind(&group.as_bytes()[..]),
        };
        query.execute(connection).await.map(drop)
    }
}

/// Removes a ban. Returns whether it was in force.
struct RemoveBan<'a> {
    unban: Unban,
    time: &'a Time,
}

impl Statement for RemoveBan<'_> {
    type Output = Result<bool, BanRefusal>;

    /// A repeat would find no ban, since the first attempt has removed it.
    const REPEAT: Repeat = Repeat::Never;
    const SCOPE: Scope = Scope::Transaction;

    fn name(&self) -> &'static str {
        "unban"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Self::Output> {
        let Unban { scope, subject, moderator, now } = &self.unban;
        if let Err(refusal) = lock_group(connection, *scope, moderator).await? {
            return Ok(Err(refusal));
        }
        let Some((account, postgres)) = find(connection, FIND, subject).await? else {
            return Ok(Err(BanRefusal::NoSuchAccount));
        };
        let bounds = self.time.bounds(*now, postgres);
        let sql = if *scope == BanScope::Server { UNBAN } else { UNBAN_FROM_GROUP };
        let query = sqlx::query(sql).bind(account).bind(millis(bounds.earliest));
        let query = match scope {
            BanScope::Server => query,
            BanScope::Group(group) => query.bind(&group.as_bytes()[..]),
        };
        let removed = query.fetch_optional(&mut *connection).await?;
        let was_in_force = removed.map(|row| row.try_get("in_force")).transpose()? == Some(true);
        if was_in_force {
            let action = Action {
                at: bounds.agreed,
                actor: Some(moderator.identity).into(),
                action: AuditAction::Unban,
                subject: Some(subject),
                group: scope.group(),
                reason: "",
            };
            record(connection, action).await?;
        }
        Ok(Ok(was_in_force))
    }
}

struct ListBans {
    scope: BanScope,
    moderator: Moderator,
    limit: u32,
    now: UnixMillis,
}

impl Statement for ListBans {
    type Output = Result<Vec<Ban>, BanRefusal>;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "bans"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Self::Output> {
        if let Some(group) = self.scope.group() {
            let role = groups::role_in(connection, group, self.moderator.account).await?;
            let refusal = match (role, self.moderator.right) {
                (None, _) => Some(GroupRefusal::NotFound),
                (Some(_), ModerationRight::Server) | (Some(Some(Role::Admin)), _) => None,
                (Some(None), _) => Some(GroupRefusal::NotMember),
                (Some(Some(Role::Member)), _) => Some(GroupRefusal::NotAdmin),
            };
            if let Some(refusal) = refusal {
                return Ok(Err(BanRefusal::Group(refusal)));
            }
        }
        let sql = if self.scope == BanScope::Server { LIST } else { LIST_OF_GROUP };
        let query = sqlx::query(sql).bind(millis(self.now)).bind(i64::from(self.limit));
        let query = match self.scope.group() {
            None => query,
            Some(group) => query.bind(&group.as_bytes()[..]),
        };
        let rows = query.fetch_all(connection).await?;
        rows.iter().map(ban).collect::<sqlx::Result<_>>().map(Ok)
    }
}

fn ban(row: &PgRow) -> sqlx::Result<Ban> {
    let expires = row.try_get::<Option<i64>, _>("expires_at")?.is_some();
    Ok(Ban {
        identity: row.identity("identity")?,
        reason: row.try_get("reason")?,
        banned_at: row.at("banned_at")?,
        expires_at: expires.then(|| row.at("expires_at")).transpose()?,
    })
}
