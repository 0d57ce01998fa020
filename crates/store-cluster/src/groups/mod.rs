//! Groups in Postgres: the members, the metadata and the epoch of a channel, and messages to
//! members.
//!
//! A change locks the group first, by a separate statement. The members and roles that later
//! statements of the transaction read therefore stay the same until its end. Reads lock nothing,
//! and each is one statement.

mod change;
mod send;
mod sender;

use async_trait::async_trait;
use qpq_domain::{AccountId, GroupId, IdentityKey, Role, UnixMillis};
use qpq_ports::{
    Creation, GroupInfo, GroupMessage, GroupRefusal, GroupSent, GroupView, Groups, Member,
    MemberPage, MetadataChange, NewGroup, StoreError, StoreResult,
};
use sqlx::{PgConnection, Row as _, postgres::PgRow};

pub(crate) use self::{
    change::{leave_groups, remove},
    send::FORGET_COMMITS,
    sender::GroupSenders,
};

use self::change::{AddMembers, CreateGroup, RemoveMember, UpdateMetadata};
use crate::{
    ClusterStore,
    error::NeverWritten,
    postgres::{
        Repeat, Scope, Statement,
        row::{Columns as _, now_of, number},
    },
};

/// Maximum attempts to create a group that other calls create and remove meanwhile.
const MAX_ATTEMPTS: u32 = 8;

const LOCK: &str = "
    SELECT epoch, version, store_now() AS postgres FROM mls_group
     WHERE id = $1 FOR NO KEY UPDATE";

/// Selects the role of the account $2 in the group $1, NULL if it is not a member. Without such a
/// group, the result is empty.
const ROLE_IN: &str = "
    SELECT m.role FROM mls_group g
      LEFT JOIN group_member m ON m.group_id = g.id AND m.account = $2
     WHERE g.id = $1";

const ROLE: &str = "SELECT role FROM group_member WHERE group_id = $1 AND account = $2";

/// $1 group, $2 viewer, $3 the member before the first, $4 maximum members. Returns one row, with
/// the members as arrays, so that all data is of one instant. A deleted account has no inbox, and
/// is a member until the erasure removes it.
const VIEW: &str = "
    SELECT g.name, g.description, g.settings, g.version, g.epoch,
           v.account IS NOT NULL AS is_member,
           p.ids, p.identities, p.usernames, p.roles, p.joined_at
      FROM mls_group g
      LEFT JOIN group_member v ON v.group_id = g.id AND v.account = $2
     CROSS JOIN LATERAL (
        SELECT coalesce(array_agg(m.id ORDER BY m.id), '{}') AS ids,
               coalesce(array_agg(a.identity ORDER BY m.id), '{}') AS identities,
               coalesce(array_agg(a.username ORDER BY m.id), '{}')::text[] AS usernames,
               coalesce(array_agg(m.role ORDER BY m.id), '{}') AS roles,
               coalesce(array_agg(m.joined_at ORDER BY m.id), '{}') AS joined_at
          FROM (SELECT id, account, role, joined_at FROM group_member
                 WHERE group_id = $1 AND id > $3 AND v.account IS NOT NULL
                   AND EXISTS (SELECT 1 FROM inbox i WHERE i.id = group_member.account)
                 ORDER BY id LIMIT $4) m
          JOIN account a ON a.id = m.account) p
     WHERE g.id = $1";

const INFO: &str = "
    SELECT CASE WHEN v.account IS NOT NULL THEN g.group_info END AS group_info, g.epoch,
           v.account IS NOT NULL AS is_member
      FROM mls_group g LEFT JOIN group_member v ON v.group_id = g.id AND v.account = $2
     WHERE g.id = $1";

/// The error if other calls create and remove the group faster than this one reads it.
#[derive(Debug, thiserror::Error)]
#[error("the group was created and removed during each of {MAX_ATTEMPTS} attempts")]
struct GroupChanged;

#[async_trait]
impl Groups for ClusterStore {
    async fn create(&self, group: NewGroup) -> StoreResult<Result<Creation, GroupRefusal>> {
        let create = CreateGroup { new: &group, time: &self.inner.time };
        for _ in 0..MAX_ATTEMPTS {
            if let Some(outcome) = self.inner.database.run(&create).await? {
                return Ok(outcome);
            }
        }
        Err(StoreError::conflict(GroupChanged))
    }

    async fn add_members(
        &self,
        group: GroupId,
        actor: AccountId,
        members: Vec<IdentityKey>,
        role: Role,
        now: UnixMillis,
    ) -> StoreResult<Result<u32, GroupRefusal>> {
        let time = &self.inner.time;
        let add = AddMembers { group, actor, members: &members, role, now, time };
        Ok(self.inner.database.run(&add).await?)
    }

    async fn remove_member(
        &self,
        group: GroupId,
        actor: AccountId,
        member: IdentityKey,
    ) -> StoreResult<Result<(), GroupRefusal>> {
        Ok(self.inner.database.run(&RemoveMember { group, actor, member }).await?)
    }

    async fn update(
        &self,
        group: GroupId,
        actor: AccountId,
        change: MetadataChange,
    ) -> StoreResult<Result<u64, GroupRefusal>> {
        Ok(self.inner.database.run(&UpdateMetadata { group, actor, change: &change }).await?)
    }

    async fn members(
        &self,
        group: GroupId,
        viewer: AccountId,
        page: MemberPage,
    ) -> StoreResult<Result<GroupView, GroupRefusal>> {
        Ok(self.inner.database.run(&ViewGroup { group, viewer, page }).await?)
    }

    async fn info(
        &self,
        group: GroupId,
        viewer: AccountId,
    ) -> StoreResult<Result<GroupInfo, GroupRefusal>> {
        Ok(self.inner.database.run(&ReadInfo { group, viewer }).await?)
    }

    async fn role(
        &self,
        group: GroupId,
        account: AccountId,
    ) -> StoreResult<Result<Option<Role>, GroupRefusal>> {
        let role = self.inner.database.run(&ReadRole { group, account }).await?;
        Ok(role.ok_or(GroupRefusal::NotFound))
    }

    async fn send(&self, message: GroupMessage) -> StoreResult<Result<GroupSent, GroupRefusal>> {
        self.inner.group_senders.send(message).await
    }
}

/// A group that the transaction has locked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Locked {
    epoch: u64,
    version: u64,
    /// Postgres' time.
    postgres: Option<UnixMillis>,
}

/// Locks a group. Returns `None` if no group has the id.
pub(crate) async fn lock(
    connection: &mut PgConnection,
    group: &GroupId,
) -> sqlx::Result<Option<Locked>> {
    let row = sqlx::query(LOCK).bind(&group.as_bytes()[..]).fetch_optional(connection).await?;
    row.map(|row| {
        let (epoch, version) = (row.unsigned("epoch")?, row.unsigned("version")?);
        Ok(Locked { epoch, version, postgres: now_of(&row)? })
    })
    .transpose()
}

/// Returns the role of an account in a group; `None` if it is not a member.
async fn role_of(
    connection: &mut PgConnection,
    group: &GroupId,
    account: AccountId,
) -> sqlx::Result<Option<Role>> {
    let stored: Option<i16> = sqlx::query_scalar(ROLE)
        .bind(&group.as_bytes()[..])
        .bind(account.0)
        .fetch_optional(connection)
        .await?;
    stored.map(role).transpose()
}

/// Returns the role of an account in a group, without a lock. `None` if no group has the id.
pub(crate) async fn role_in(
    connection: &mut PgConnection,
    group: &GroupId,
    account: AccountId,
) -> sqlx::Result<Option<Option<Role>>> {
    let stored: Option<Option<i16>> = sqlx::query_scalar(ROLE_IN)
        .bind(&group.as_bytes()[..])
        .bind(account.0)
        .fetch_optional(connection)
        .await?;
    stored.map(|stored| stored.map(role).transpose()).transpose()
}

/// Locks a group in which the account is an admin.
pub(crate) async fn lock_as_admin(
    connection: &mut PgConnection,
    group: &GroupId,
    account: AccountId,
) -> sqlx::Result<Result<Locked, GroupRefusal>> {
    let Some(locked) = lock(connection, group).await? else {
        return Ok(Err(GroupRefusal::NotFound));
    };
    Ok(match role_of(connection, group, account).await? {
        None => Err(GroupRefusal::NotMember),
        Some(Role::Member) => Err(GroupRefusal::NotAdmin),
        Some(Role::Admin) => Ok(locked),
    })
}

fn role(stored: i16) -> sqlx::Result<Role> {
    match stored {
        0 => Ok(Role::Member),
        1 => Ok(Role::Admin),
        _ => Err(NeverWritten("role").into()),
    }
}

struct ReadRole {
    group: GroupId,
    account: AccountId,
}

impl Statement for ReadRole {
    type Output = Option<Option<Role>>;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "group_role"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Self::Output> {
        role_in(connection, &self.group, self.account).await
    }
}

struct ViewGroup {
    group: GroupId,
    viewer: AccountId,
    page: MemberPage,
}

impl Statement for ViewGroup {
    type Output = Result<GroupView, GroupRefusal>;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "group_members"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Self::Output> {
        let Self { group, viewer, page } = self;
        let row = sqlx::query(VIEW)
            .bind(&group.as_bytes()[..])
            .bind(viewer.0)
            .bind(number(page.after))
            // One more row shows whether another page follows.
            .bind(i64::from(page.limit) + 1)
            .fetch_optional(connection)
            .await?;
        let Some(row) = row else { return Ok(Err(GroupRefusal::NotFound)) };
        if !row.try_get::<bool, _>("is_member")? {
            return Ok(Err(GroupRefusal::NotMember));
        }
        let (mut members, mut ids) = (members(&row)?, row.try_get::<Vec<i64>, _>("ids")?);
        let limit = usize::try_from(page.limit).unwrap_or(usize::MAX);
        let next = if members.len() > limit {
            members.truncate(limit);
            ids.truncate(limit);
            let last = ids.last().map(|id| u64::try_from(*id).map_err(|_| NeverWritten("id")));
            Some(last.transpose()?.unwrap_or(page.after))
        } else {
            None
        };
        Ok(Ok(GroupView {
            members,
            next,
            name: row.try_get("name")?,
            description: row.try_get("description")?,
            settings: row.bytes("settings")?.into(),
            version: row.unsigned("version")?,
            epoch: row.unsigned("epoch")?,
        }))
    }
}

fn members(row: &PgRow) -> sqlx::Result<Vec<Member>> {
    let identities: Vec<Vec<u8>> = row.try_get("identities")?;
    let usernames: Vec<String> = row.try_get("usernames")?;
    let roles: Vec<i16> = row.try_get("roles")?;
    let joined: Vec<i64> = row.try_get("joined_at")?;
    let columns = identities.iter().zip(usernames).zip(roles).zip(joined);
    columns
        .map(|(((identity, username), stored), joined_at)| {
            Ok(Member {
                identity: IdentityKey::new(
                    identity[..].try_into().map_err(|_| NeverWritten("identity"))?,
                ),
                username,
                role: role(stored)?,
                joined_at: UnixMillis(
                    u64::try_from(joined_at).map_err(|_| NeverWritten("joined_at"))?,
                ),
            })
        })
        .collect()
}

struct ReadInfo {
    group: GroupId,
    viewer: AccountId,
}

impl Statement for ReadInfo {
    type Output = Result<GroupInfo, GroupRefusal>;

    const REPEAT: Repeat = Repeat::Harmless;
    const SCOPE: Scope = Scope::Statement;

    fn name(&self) -> &'static str {
        "group_info"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Self::Output> {
        let row = sqlx::query(INFO)
            .bind(&self.group.as_bytes()[..])
            .bind(self.viewer.0)
            .fetch_optional(connection)
            .await?;
        let Some(row) = row else { return Ok(Err(GroupRefusal::NotFound)) };
        if !row.try_get::<bool, _>("is_member")? {
            return Ok(Err(GroupRefusal::NotMember));
        }
        let group_info = row.try_get::<Option<Vec<u8>>, _>("group_info")?.map(Into::into);
        Ok(Ok(GroupInfo { group_info, epoch: row.unsigned("epoch")? }))
    }
}
