//! Changes of groups: their creation, members and metadata.

use std::{borrow::Cow, collections::HashSet};

use qpq_domain::{AccountId, GroupId, IdentityKey, MAX_MEMBERS, Pair, Role, UnixMillis};
use qpq_ports::{Creation, GroupRefusal, MetadataChange, NewGroup, NewMembers};
use sqlx::{Row as _, SqliteConnection};

use super::Head;
use crate::{
    bans,
    error::NeverWritten,
    row::{Columns as _, millis},
    statement::{Done, SMALL, Statement},
};

type Refusable<T> = Result<T, GroupRefusal>;

/// The start of a statement. Splits the blob ?1 into a table of keys of 32 bytes each, because
/// SQLite binds no lists.
macro_rules! with_listed {
    ($statement:literal) => {
        concat!(
            "WITH RECURSIVE listed (place, identity) AS (
                 SELECT 1, substr(?1, 1, 32) WHERE length(?1) >= 32
                  UNION ALL
                 SELECT place + 1, substr(?1, place * 32 + 1, 32)
                   FROM listed WHERE (place + 1) * 32 <= length(?1)) ",
            $statement
        )
    };
}

const UNKNOWN: &str = with_listed!(
    "SELECT l.identity FROM listed l
      WHERE NOT EXISTS (SELECT 1 FROM account a WHERE a.identity = l.identity) LIMIT 1"
);

/// Selects a listed account that is banned from the group ?2 at ?3.
const BANNED: &str = with_listed!(
    "SELECT l.identity FROM listed l CROSS JOIN account a ON a.identity = l.identity
            CROSS JOIN group_ban b ON b.group_id = ?2 AND b.account = a.id
      WHERE b.expires_at IS NULL OR b.expires_at > ?3"
);

/// Adds the listed accounts to the group ?2 at ?3 with the role ?4, in their order.
const ADD: &str = with_listed!(
    "INSERT INTO group_member (group_id, account, role, joined_at)
     SELECT ?2, a.id, ?4, ?3 FROM listed l CROSS JOIN account a ON a.identity = l.identity
      WHERE true ON CONFLICT DO NOTHING"
);

/// Promotes the listed members of the group ?2 to admins.
const PROMOTE_LISTED: &str = with_listed!(
    "UPDATE group_member SET role = 1
      WHERE group_id = ?2 AND role = 0
        AND account IN (SELECT a.id FROM listed l CROSS JOIN account a ON a.identity = l.identity)"
);

const CREATE: &str = "
    INSERT INTO mls_group (id, pair, name, description, settings, version, epoch, created_at)
    VALUES (?1, ?2, ?3, ?4, x'', 0, 0, ?5)";

const ADD_ADMIN: &str =
    "INSERT INTO group_member (group_id, account, role, joined_at) VALUES (?1, ?2, 1, ?3)";

const BY_PAIR: &str = "SELECT id FROM mls_group WHERE pair = ?1";

const REMOVE: &str = "
    DELETE FROM group_member
     WHERE group_id = ?1 AND account = (SELECT id FROM account WHERE identity = ?2)";

/// Makes the oldest member an admin if there is no admin.
const PROMOTE: &str = "
    UPDATE group_member SET role = 1
     WHERE id = (SELECT id FROM group_member INDEXED BY group_member_joined
                  WHERE group_id = ?1 ORDER BY id LIMIT 1)
       AND NOT EXISTS (SELECT 1 FROM group_member INDEXED BY group_member_admin
                        WHERE group_id = ?1 AND role = 1)";

/// Groups of the account ?1. ?2: maximum rows.
const OF_ACCOUNT: &str = "SELECT group_id FROM group_member WHERE account = ?1 LIMIT +?2";
const LEAVE: &str = "DELETE FROM group_member WHERE group_id = ?1 AND account = ?2";
const FORGET_INFO: &str =
    "UPDATE mls_group SET group_info = NULL WHERE id = ?1 AND group_info IS NOT NULL";

const IS_EMPTY: &str = "SELECT NOT EXISTS (SELECT 1 FROM group_member WHERE group_id = ?1)";
const FORGET_COMMITS: &str = "DELETE FROM group_commit WHERE group_id = ?1";
const DELETE: &str = "DELETE FROM mls_group WHERE id = ?1";

const UPDATE: &str = "
    UPDATE mls_group SET name = coalesce(?2, name), description = coalesce(?3, description),
                         settings = coalesce(?4, settings), version = version + 1
     WHERE id = ?1 RETURNING version";

#[cfg(test)]
pub(super) const STATEMENTS: [&str; 16] = [
    OF_ACCOUNT,
    LEAVE,
    FORGET_INFO,
    UNKNOWN,
    BANNED,
    ADD,
    PROMOTE_LISTED,
    CREATE,
    ADD_ADMIN,
    BY_PAIR,
    REMOVE,
    PROMOTE,
    IS_EMPTY,
    FORGET_COMMITS,
    DELETE,
    UPDATE,
];

/// Creates a group, or finds the one that exists.
pub(super) struct CreateGroup {
    pub(super) new: NewGroup,
    /// The instant at which a ban must be in force.
    pub(super) at: UnixMillis,
}

impl Statement for CreateGroup {
    type Answer = Refusable<Creation>;
    const NAME: &'static str = "create group";

    fn bytes(&self) -> usize {
        let NewGroup { name, description, .. } = &self.new;
        SMALL + name.len() + description.len() + self.keys().len() * size_of::<IdentityKey>()
    }

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<Refusable<Creation>>> {
        let NewGroup { id, creator, now, .. } = &self.new;
        if let Some(pair) = self.pair()
            && let Some(existing) = by_pair(tx, pair).await?
        {
            if bans::is_banned_from(tx, &existing, *creator, self.at).await? {
                return Ok(Done::keep(Err(GroupRefusal::Banned)));
            }
            // A member who has left the group is added again, unless it is banned.
            let banned = banned(tx, &existing, &self.keys(), self.at).await?;
            let keys: Vec<_> =
                self.keys().iter().copied().filter(|key| !banned.contains(key)).collect();
            add(tx, &existing, &keys, Role::Member, *now).await?;
            return Ok(Done::keep(Ok(Creation::Existed(existing))));
        }
        if let Some(head) = Head::find(tx, id, *creator).await? {
            let is_repeat = head.role.is_some() && self.pair().is_none();
            let found =
                if is_repeat { Ok(Creation::Existed(*id)) } else { Err(GroupRefusal::IdTaken) };
            return Ok(Done::keep(found));
        }
        let keys = match resolve(tx, &self.keys()).await? {
            Ok(keys) => keys,
            Err(refusal) => return Ok(Done::keep(Err(refusal))),
        };
        self.insert(tx).await?;
        let others = add(tx, id, &keys, Role::Member, *now).await?;
        if 1 + others > MAX_MEMBERS as u64 {
            return Ok(Done::undo(Err(GroupRefusal::Full)));
        }
        Ok(Done::keep(Ok(Creation::Created(*id))))
    }
}

impl CreateGroup {
    fn pair(&self) -> Option<&Pair> {
        match &self.new.members {
            NewMembers::Direct(pair) => Some(pair),
            NewMembers::Listed(_) => None,
        }
    }

    /// Returns the keys of the members. The creator's may be among them.
    fn keys(&self) -> Cow<'_, [IdentityKey]> {
        match &self.new.members {
            NewMembers::Direct(pair) => Cow::Owned(pair.keys().to_vec()),
            NewMembers::Listed(keys) => Cow::Borrowed(keys),
        }
    }

    /// Inserts the group with its creator.
    async fn insert(&self, tx: &mut SqliteConnection) -> sqlx::Result<()> {
        let NewGroup { id, creator, name, description, now, .. } = &self.new;
        sqlx::query(CREATE)
            .bind(&id.as_bytes()[..])
            .bind(self.pair().map(|pair| pair.as_bytes().to_vec()))
            .bind(&name[..])
            .bind(&description[..])
            .bind(millis(*now))
            .execute(&mut *tx)
            .await?;
        sqlx::query(ADD_ADMIN)
            .bind(&id.as_bytes()[..])
            .bind(creator.0)
            .bind(millis(*now))
            .execute(tx)
            .await
            .map(drop)
    }
}

async fn by_pair(tx: &mut SqliteConnection, pair: &Pair) -> sqlx::Result<Option<GroupId>> {
    let row = sqlx::query(BY_PAIR).bind(&pair.as_bytes()[..]).fetch_optional(tx).await?;
    row.map(|row| {
        let id = GroupId::try_from(row.try_get::<&[u8], _>("id")?);
        id.map_err(|_| NeverWritten("id").into())
    })
    .transpose()
}

/// Adds members to a group. Only for its admins.
pub(super) struct AddMembers {
    pub(super) group: GroupId,
    pub(super) actor: AccountId,
    pub(super) members: Vec<IdentityKey>,
    pub(super) role: Role,
    pub(super) now: UnixMillis,
    /// The instant at which a ban must be in force.
    pub(super) at: UnixMillis,
}

impl Statement for AddMembers {
    type Answer = Refusable<u32>;
    const NAME: &'static str = "add members";

    fn bytes(&self) -> usize {
        SMALL + self.members.len() * size_of::<IdentityKey>()
    }

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<Refusable<u32>>> {
        if let Err(refusal) = Head::of_admin(tx, &self.group, self.actor).await? {
            return Ok(Done::keep(Err(refusal)));
        }
        let keys = match resolve(tx, &self.members).await? {
            Ok(keys) => keys,
            Err(refusal) => return Ok(Done::keep(Err(refusal))),
        };
        if !banned(tx, &self.group, &keys, self.at).await?.is_empty() {
            return Ok(Done::keep(Err(GroupRefusal::Banned)));
        }
        let added = add(tx, &self.group, &keys, self.role, self.now).await?;
        let members: i64 =
            sqlx::query_scalar(super::COUNT).bind(&self.group.as_bytes()[..]).fetch_one(tx).await?;
        if members > MAX_MEMBERS as i64 {
            return Ok(Done::undo(Err(GroupRefusal::Full)));
        }
        Ok(Done::keep(Ok(u32::try_from(added).unwrap_or(u32::MAX))))
    }
}

/// Returns the keys without repetitions. Refuses a key that belongs to no account, and more keys
/// than a group may have members.
async fn resolve(
    tx: &mut SqliteConnection,
    keys: &[IdentityKey],
) -> sqlx::Result<Refusable<Vec<IdentityKey>>> {
    let mut seen = HashSet::with_capacity(keys.len());
    let distinct: Vec<_> = keys.iter().copied().filter(|key| seen.insert(*key)).collect();
    if distinct.len() > MAX_MEMBERS {
        return Ok(Err(GroupRefusal::Full));
    }
    let unknown = sqlx::query(UNKNOWN).bind(concatenated(&distinct)).fetch_optional(tx).await?;
    Ok(match unknown {
        Some(row) => Err(GroupRefusal::NoSuchAccount(row.identity("identity")?)),
        None => Ok(distinct),
    })
}

/// Returns the keys of accounts that are banned from the group at this instant.
async fn banned(
    tx: &mut SqliteConnection,
    group: &GroupId,
    keys: &[IdentityKey],
    at: UnixMillis,
) -> sqlx::Result<Vec<IdentityKey>> {
    let query = sqlx::query(BANNED).bind(concatenated(keys)).bind(&group.as_bytes()[..]);
    let rows = query.bind(millis(at)).fetch_all(tx).await?;
    rows.iter().map(|row| row.identity("identity")).collect()
}

/// Adds the accounts that are not members, and promotes the others if the role is admin. Returns
/// the number of added accounts.
async fn add(
    tx: &mut SqliteConnection,
    group: &GroupId,
    keys: &[IdentityKey],
    role: Role,
    now: UnixMillis,
) -> sqlx::Result<u64> {
    let (keys, group) = (concatenated(keys), &group.as_bytes()[..]);
    let stored = match role {
        Role::Member => 0_i64,
        Role::Admin => {
            sqlx::query(PROMOTE_LISTED).bind(&keys[..]).bind(group).execute(&mut *tx).await?;
            1
        }
    };
    let added = sqlx::query(ADD)
        .bind(&keys[..])
        .bind(group)
        .bind(millis(now))
        .bind(stored)
        .execute(tx)
        .await?;
    Ok(added.rows_affected())
}

fn concatenated(keys: &[IdentityKey]) -> Vec<u8> {
    keys.iter().flat_map(|key| *key.as_bytes()).collect()
}

/// Removes a member, and with the last member the group.
pub(super) struct RemoveMember {
    pub(super) group: GroupId,
    pub(super) actor: AccountId,
    pub(super) member: IdentityKey,
}

impl Statement for RemoveMember {
    type Answer = Refusable<()>;
    const NAME: &'static str = "remove member";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<Refusable<()>>> {
        let head = if self.is_of_actor(tx).await? {
            // An account that has left the group already may repeat the call.
            let head = Head::find(tx, &self.group, self.actor).await?;
            head.ok_or(GroupRefusal::NotFound)
        } else {
            Head::of_admin(tx, &self.group, self.actor).await?
        };
        if let Err(refusal) = head {
            return Ok(Done::keep(Err(refusal)));
        }
        remove(tx, &self.group, &self.member).await?;
        Ok(Done::keep(Ok(())))
    }
}

/// Removes a member, and with the last member the group. Returns whether it was a member.
pub(crate) async fn remove(
    tx: &mut SqliteConnection,
    group: &GroupId,
    member: &IdentityKey,
) -> sqlx::Result<bool> {
    let removed = sqlx::query(REMOVE)
        .bind(&group.as_bytes()[..])
        .bind(&member.as_bytes()[..])
        .execute(&mut *tx)
        .await?;
    if removed.rows_affected() == 0 {
        return Ok(false);
    }
    after_removal(tx, &group.as_bytes()[..]).await?;
    Ok(true)
}

impl RemoveMember {
    /// Returns whether the member is the actor.
    async fn is_of_actor(&self, tx: &mut SqliteConnection) -> sqlx::Result<bool> {
        let account = sqlx::query_scalar("SELECT id FROM account WHERE identity = ?1")
            .bind(&self.member.as_bytes()[..])
            .fetch_optional(tx)
            .await?;
        Ok(account == Some(self.actor.0))
    }
}

/// Removes a group if it has no members. Otherwise makes its oldest member an admin if there is no
/// admin.
async fn after_removal(tx: &mut SqliteConnection, group: &[u8]) -> sqlx::Result<()> {
    let is_empty: bool =
        sqlx::query_scalar(IS_EMPTY).bind(group.to_vec()).fetch_one(&mut *tx).await?;
    let statements: &[&'static str] = if is_empty { &[FORGET_COMMITS, DELETE] } else { &[PROMOTE] };
    for sql in statements {
        sqlx::query(*sql).bind(group.to_vec()).execute(&mut *tx).await?;
    }
    Ok(())
}

/// Removes an account that is being erased from at most `limit` of its groups. Returns their
/// number.
///
/// The GroupInfo of a group has the identity keys of the members, so it is removed with the
/// account. The next commit stores another one.
pub(crate) async fn leave_groups(
    tx: &mut SqliteConnection,
    account: AccountId,
    limit: i64,
) -> sqlx::Result<u64> {
    let query = sqlx::query_scalar(OF_ACCOUNT).bind(account.0).bind(limit);
    let groups: Vec<Vec<u8>> = query.fetch_all(&mut *tx).await?;
    for group in &groups {
        sqlx::query(LEAVE).bind(&group[..]).bind(account.0).execute(&mut *tx).await?;
        sqlx::query(FORGET_INFO).bind(&group[..]).execute(&mut *tx).await?;
        after_removal(tx, group).await?;
    }
    Ok(groups.len() as u64)
}

/// Changes the metadata. Only for admins. Returns the new version.
pub(super) struct UpdateMetadata {
    pub(super) group: GroupId,
    pub(super) actor: AccountId,
    pub(super) change: MetadataChange,
}

impl Statement for UpdateMetadata {
    type Answer = Refusable<u64>;
    const NAME: &'static str = "update metadata";

    fn bytes(&self) -> usize {
        let MetadataChange { name, description, settings, expected_version: _ } = &self.change;
        let texts = [name, description].map(|text| text.as_ref().map_or(0, String::len));
        SMALL + texts.iter().sum::<usize>() + settings.as_ref().map_or(0, |bytes| bytes.len())
    }

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<Refusable<u64>>> {
        let head = match Head::of_admin(tx, &self.group, self.actor).await? {
            Ok(head) => head,
            Err(refusal) => return Ok(Done::keep(Err(refusal))),
        };
        let MetadataChange { name, description, settings, expected_version } = &self.change;
        if expected_version.is_some_and(|expected| expected != head.version) {
            return Ok(Done::keep(Err(GroupRefusal::StaleVersion(head.version))));
        }
        let row = sqlx::query(UPDATE)
            .bind(&self.group.as_bytes()[..])
            .bind(name.as_deref())
            .bind(description.as_deref())
            .bind(settings.as_deref())
            .fetch_one(tx)
            .await?;
        Ok(Done::keep(Ok(row.unsigned("version")?)))
    }
}
