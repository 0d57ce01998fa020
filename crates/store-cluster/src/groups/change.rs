//! Changes of groups: their creation, members and metadata.

use std::collections::{HashMap, HashSet};

use qpq_domain::{AccountId, GroupId, IdentityKey, MAX_MEMBERS, Pair, Role, UnixMillis};
use qpq_ports::{Creation, GroupRefusal, MetadataChange, NewGroup, NewMembers};
use sqlx::{PgConnection, Row as _};

use super::{lock, lock_as_admin, role_of};
use crate::{
    bans,
    postgres::{
        Repeat, Scope, Statement,
        row::{Columns as _, millis},
    },
    time::Time,
};

const FIND: &str = "SELECT id, identity FROM account WHERE identity = ANY ($1)";

/// Waits for a concurrent insert of the same id or pair, and inserts nothing if that is committed.
const CREATE: &str = "
    INSERT INTO mls_group (id, pair, name, description, settings, version, epoch, created_at)
    VALUES ($1, $2, $3, $4, '', 0, 0, $5) ON CONFLICT DO NOTHING";

const ADD_ADMIN: &str =
    "INSERT INTO group_member (group_id, account, role, joined_at) VALUES ($1, $2, 1, $3)";

/// Adds accounts in their order, with the role $4.
const ADD: &str = "
    INSERT INTO group_member (group_id, account, role, joined_at)
    SELECT $1, l.account, $4, $3 FROM unnest($2::int8[]) WITH ORDINALITY AS l (account, place)
     ORDER BY l.place ON CONFLICT (group_id, account) DO NOTHING";

/// Promotes the listed members to admins.
const PROMOTE_LISTED: &str = "
    UPDATE group_member SET role = 1
     WHERE group_id = $1 AND account = ANY ($2::int8[]) AND role = 0";

/// Returns the number of members that the group would have with these accounts.
const COUNT_WITH: &str = "
    SELECT (SELECT count(*) FROM group_member WHERE group_id = $1)
         + (SELECT count(*) FROM unnest($2::int8[]) AS l (account)
             WHERE NOT EXISTS (SELECT 1 FROM group_member m
                                WHERE m.group_id = $1 AND m.account = l.account))";

const LOCK_PAIR: &str = "SELECT id FROM mls_group WHERE pair = $1 FOR NO KEY UPDATE";
const EXISTS: &str = "SELECT EXISTS (SELECT 1 FROM mls_group WHERE id = $1)";

const REMOVE: &str = "DELETE FROM group_member WHERE group_id = $1 AND account = $2";

/// Makes the oldest member an admin if there is no admin.
const PROMOTE: &str = "
    UPDATE group_member SET role = 1
     WHERE id = (SELECT min(id) FROM group_member WHERE group_id = $1)
       AND NOT EXISTS (SELECT 1 FROM group_member WHERE group_id = $1 AND role = 1)";

/// Groups of the account $1. $2: maximum rows.
const OF_ACCOUNT: &str =
    "SELECT group_id AS id FROM group_member WHERE account = $1 ORDER BY group_id LIMIT $2";
const FORGET_INFO: &str =
    "UPDATE mls_group SET group_info = NULL WHERE id = $1 AND group_info IS NOT NULL";

const HAS_MEMBERS: &str = "SELECT EXISTS (SELECT 1 FROM group_member WHERE group_id = $1)";
const DELETE_COMMITS: &str = "DELETE FROM group_commit WHERE group_id = $1";
const DELETE: &str = "DELETE FROM mls_group WHERE id = $1";

const UPDATE: &str = "
    UPDATE mls_group SET name = coalesce($2, name), description = coalesce($3, description),
                         settings = coalesce($4, settings), version = version + 1
     WHERE id = $1 RETURNING version";

/// Creates a group, or finds the existing one. Returns `None` if a conflicting group was removed
/// meanwhile.
pub(super) struct CreateGroup<'a> {
    pub(super) new: &'a NewGroup,
    pub(super) time: &'a Time,
}

impl Statement for CreateGroup<'_> {
    type Output = Option<Result<Creation, GroupRefusal>>;

    /// A repeat would find the group of the first attempt and report it as an existing one.
    const REPEAT: Repeat = Repeat::Never;
    const SCOPE: Scope = Scope::Transaction;

    fn name(&self) -> &'static str {
        "create_group"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Self::Output> {
        if let Some(found) = self.find(connection).await? {
            return Ok(Some(found));
        }
        let accounts = match resolve(connection, &self.keys()).await? {
            Ok(accounts) => accounts,
            Err(refusal) => return Ok(Some(Err(refusal))),
        };
        let NewGroup { id, creator, name, description, now, .. } = self.new;
        let others: Vec<_> = accounts.into_iter().filter(|account| *account != creator.0).collect();
        if 1 + others.len() > MAX_MEMBERS {
            return Ok(Some(Err(GroupRefusal::Full)));
        }
        let created = sqlx::query(CREATE)
            .bind(&id.as_bytes()[..])
            .bind(self.pair().map(|pair| pair.as_bytes().to_vec()))
            .bind(name)
            .bind(description)
            .bind(millis(*now))
            .execute(&mut *connection)
            .await?;
        if created.rows_affected() == 0 {
            // A separate statement, because it sees the group that the insert conflicts with.
            return self.find(connection).await;
        }
        sqlx::query(ADD_ADMIN)
            .bind(&id.as_bytes()[..])
            .bind(creator.0)
            .bind(millis(*now))
            .execute(&mut *connection)
            .await?;
        add(connection, id, &others, Role::Member, *now).await?;
        Ok(Some(Ok(Creation::Created(*id))))
    }
}

impl CreateGroup<'_> {
    const fn pair(&self) -> Option<&Pair> {
        match &self.new.members {
            NewMembers::Direct(pair) => Some(pair),
            NewMembers::Listed(_) => None,
        }
    }

    /// Returns the keys of the members. The creator's may be among them.
    fn keys(&self) -> Vec<IdentityKey> {
        match &self.new.members {
            NewMembers::Direct(pair) => pair.keys().to_vec(),
            NewMembers::Listed(keys) => keys.clone(),
        }
    }

    /// Returns the outcome if a group with the same pair or id exists.
    async fn find(
        &self,
        connection: &mut PgConnection,
    ) -> sqlx::Result<Option<Result<Creation, GroupRefusal>>> {
        let NewGroup { id, creator, now, .. } = self.new;
        if let Some(pair) = self.pair() {
            let query = sqlx::query(LOCK_PAIR).bind(pair.as_bytes().to_vec());
            if let Some(row) = query.fetch_optional(&mut *connection).await? {
                let existing = row.group("id")?;
                return Ok(Some(match resolve(connection, &pair.keys()).await? {
                    Ok(mut both) => {
                        let at = self.time.bounds(*now, None).earliest;
                        let banned = bans::banned_from(connection, &existing, &both, at).await?;
                        if banned.contains(&creator.0) {
                            return Ok(Some(Err(GroupRefusal::Banned)));
                        }
                        // One of the two may have left the group.
                        both.retain(|account| !banned.contains(account));
                        add(connection, &existing, &both, Role::Member, *now).await?;
                        Ok(Creation::Existed(existing))
                    }
                    Err(refusal) => Err(refusal),
                }));
            }
        }
        let exists = sqlx::query_scalar(EXISTS).bind(&id.as_bytes()[..]);
        if !exists.fetch_one(&mut *connection).await? {
            return Ok(None);
        }
        let is_member = role_of(connection, id, *creator).await?.is_some();
        Ok(Some(if is_member && self.pair().is_none() {
            Ok(Creation::Existed(*id))
        } else {
            Err(GroupRefusal::IdTaken)
        }))
    }
}

/// Adds members to a group. Only for its admins.
pub(super) struct AddMembers<'a> {
    pub(super) group: GroupId,
    pub(super) actor: AccountId,
    pub(super) members: &'a [IdentityKey],
    pub(super) role: Role,
    pub(super) now: UnixMillis,
    pub(super) time: &'a Time,
}

impl Statement for AddMembers<'_> {
    type Output = Result<u32, GroupRefusal>;

    /// A repeat would count no new members, since the first attempt has added them.
    const REPEAT: Repeat = Repeat::Never;
    const SCOPE: Scope = Scope::Transaction;

    fn name(&self) -> &'static str {
        "add_members"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Self::Output> {
        let Self { group, actor, members, role, now, time } = self;
        if let Err(refusal) = lock_as_admin(connection, group, *actor).await? {
            return Ok(Err(refusal));
        }
        let accounts = match resolve(connection, members).await? {
            Ok(accounts) => accounts,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let at = time.bounds(*now, None).earliest;
        if !bans::banned_from(connection, group, &accounts, at).await?.is_empty() {
            return Ok(Err(GroupRefusal::Banned));
        }
        let count: i64 = sqlx::query_scalar(COUNT_WITH)
            .bind(&group.as_bytes()[..])
            .bind(&accounts)
            .fetch_one(&mut *connection)
            .await?;
        if usize::try_from(count).unwrap_or_default() > MAX_MEMBERS {
            return Ok(Err(GroupRefusal::Full));
        }
        let added = add(connection, group, &accounts, *role, *now).await?;
        Ok(Ok(u32::try_from(added).unwrap_or(u32::MAX)))
    }
}

/// Returns the accounts of the keys, in order and without duplicates. Refuses a key without an
/// account, and more keys than a group may have members.
async fn resolve(
    connection: &mut PgConnection,
    keys: &[IdentityKey],
) -> sqlx::Result<Result<Vec<i64>, GroupRefusal>> {
    let mut seen = HashSet::with_capacity(keys.len());
    let distinct: Vec<_> = keys.iter().copied().filter(|key| seen.insert(*key)).collect();
    // A creator whose key is not listed is counted by the caller.
    if distinct.len() > MAX_MEMBERS {
        return Ok(Err(GroupRefusal::Full));
    }
    let bytes: Vec<&[u8]> = distinct.iter().map(|key| &key.as_bytes()[..]).collect();
    let rows = sqlx::query(FIND).bind(bytes).fetch_all(connection).await?;
    let found = rows.iter().map(|row| Ok((row.identity("identity")?, row.try_get("id")?)));
    let found: HashMap<IdentityKey, i64> = found.collect::<sqlx::Result<_>>()?;
    let account = |key| found.get(&key).copied().ok_or(GroupRefusal::NoSuchAccount(key));
    Ok(distinct.into_iter().map(account).collect())
}

/// Adds the accounts that are not members, and promotes the others if the role is admin. Returns
/// the number of added accounts.
async fn add(
    connection: &mut PgConnection,
    group: &GroupId,
    accounts: &[i64],
    role: Role,
    now: UnixMillis,
) -> sqlx::Result<u64> {
    let group = &group.as_bytes()[..];
    let stored = match role {
        Role::Member => 0_i16,
        Role::Admin => {
            let promote = sqlx::query(PROMOTE_LISTED).bind(group).bind(accounts);
            promote.execute(&mut *connection).await?;
            1
        }
    };
    let add = sqlx::query(ADD).bind(group).bind(accounts).bind(millis(now)).bind(stored);
    Ok(add.execute(connection).await?.rows_affected())
}

/// Removes a member. Removes the group with its last member.
pub(super) struct RemoveMember {
    pub(super) group: GroupId,
    pub(super) actor: AccountId,
    pub(super) member: IdentityKey,
}

impl Statement for RemoveMember {
    type Output = Result<(), GroupRefusal>;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Transaction;

    fn name(&self) -> &'static str {
        "remove_member"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Self::Output> {
        let Self { group, actor, member } = self;
        let keys = vec![&member.as_bytes()[..]];
        let found = sqlx::query(FIND).bind(keys).fetch_optional(&mut *connection).await?;
        let account: Option<i64> = found.map(|row| row.try_get("id")).transpose()?;
        let locked = if account == Some(actor.0) {
            // Also for an account that has left the group, so that the call can be repeated.
            lock(connection, group).await?.ok_or(GroupRefusal::NotFound)
        } else {
            lock_as_admin(connection, group, *actor).await?
        };
        if let Err(refusal) = locked {
            return Ok(Err(refusal));
        }
        let Some(account) = account else { return Ok(Ok(())) };
        remove(connection, group, account).await?;
        Ok(Ok(()))
    }
}

/// Removes a member from a locked group, and with the last member the group. Returns whether it
/// was a member.
pub(crate) async fn remove(
    connection: &mut PgConnection,
    group: &GroupId,
    account: i64,
) -> sqlx::Result<bool> {
    let query = sqlx::query(REMOVE).bind(&group.as_bytes()[..]).bind(account);
    if query.execute(&mut *connection).await?.rows_affected() == 0 {
        return Ok(false);
    }
    after_removal(connection, group).await?;
    Ok(true)
}

/// Removes a locked group if it has no members. Otherwise makes sure that it has an admin.
async fn after_removal(connection: &mut PgConnection, group: &GroupId) -> sqlx::Result<()> {
    let group = &group.as_bytes()[..];
    let has_members = sqlx::query_scalar(HAS_MEMBERS).bind(group).fetch_one(&mut *connection);
    let statements: &[&'static str] =
        if has_members.await? { &[PROMOTE] } else { &[DELETE_COMMITS, DELETE] };
    for sql in statements {
        sqlx::query(*sql).bind(group).execute(&mut *connection).await?;
    }
    Ok(())
}

/// Removes an account that is being erased from at most `limit` of its groups. Returns their
/// number.
///
/// The GroupInfo of a group has the identity keys of the members, so it is removed with the
/// account. The next commit stores another one.
pub(crate) async fn leave_groups(
    connection: &mut PgConnection,
    account: i64,
    limit: i64,
) -> sqlx::Result<i64> {
    let rows =
        sqlx::query(OF_ACCOUNT).bind(account).bind(limit).fetch_all(&mut *connection).await?;
    for row in &rows {
        let group = row.group("id")?;
        if lock(connection, &group).await?.is_none() {
            continue;
        }
        let id = &group.as_bytes()[..];
        sqlx::query(REMOVE).bind(id).bind(account).execute(&mut *connection).await?;
        sqlx::query(FORGET_INFO).bind(id).execute(&mut *connection).await?;
        after_removal(connection, &group).await?;
    }
    Ok(i64::try_from(rows.len()).unwrap_or(i64::MAX))
}

/// Changes the metadata. Only for admins. Returns the new version.
pub(super) struct UpdateMetadata<'a> {
    pub(super) group: GroupId,
    pub(super) actor: AccountId,
    pub(super) change: &'a MetadataChange,
}

impl Statement for UpdateMetadata<'_> {
    type Output = Result<u64, GroupRefusal>;

    /// A repeat would find the version of the first attempt, and refuse or repeat the change.
    const REPEAT: Repeat = Repeat::Never;
    const SCOPE: Scope = Scope::Transaction;

    fn name(&self) -> &'static str {
        "update_group"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Self::Output> {
        let Self { group, actor, change } = self;
        let locked = match lock_as_admin(connection, group, *actor).await? {
            Ok(locked) => locked,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let MetadataChange { name, description, settings, expected_version } = change;
        if expected_version.is_some_and(|expected| expected != locked.version) {
            return Ok(Err(GroupRefusal::StaleVersion(locked.version)));
        }
        let row = sqlx::query(UPDATE)
            .bind(&group.as_bytes()[..])
            .bind(name.as_deref())
            .bind(description.as_deref())
            .bind(settings.as_deref())
            .fetch_one(connection)
            .await?;
        row.unsigned("version").map(Ok)
    }
}
