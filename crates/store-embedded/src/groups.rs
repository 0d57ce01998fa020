//! Groups in SQLite: the members, the metadata and the epoch of a channel, and messages to members.
//!
//! A read is one snapshot. A change is one statement of the only writer, so the results of its
//! checks stay true until its end.

mod change;
pub(crate) mod send;

use async_trait::async_trait;
use qpq_domain::{AccountId, GroupId, IdentityKey, Role, UnixMillis};
use qpq_ports::{
    Creation, GroupInfo, GroupMessage, GroupRecipients, GroupRefusal, GroupSent, GroupView, Groups,
    Member, MemberPage, MetadataChange, NewGroup, StoreResult,
};
use sqlx::{Row as _, SqliteConnection, sqlite::SqliteRow};

pub(crate) use self::change::leave_groups;
pub(crate) use self::change::remove;

use self::{
    change::{AddMembers, CreateGroup, RemoveMember, UpdateMetadata},
    send::SendToGroup,
};
use crate::{
    error::{NeverWritten, read_failed},
    row::{Columns as _, number},
    store::EmbeddedStore,
};

#[async_trait]
impl Groups for EmbeddedStore {
    async fn create(&self, group: NewGroup) -> StoreResult<Result<Creation, GroupRefusal>> {
        let at = self.memory.clock.bounds(group.now).earliest;
        self.writer.run(CreateGroup { new: group, at }).await
    }

    async fn add_members(
        &self,
        group: GroupId,
        actor: AccountId,
        members: Vec<IdentityKey>,
        role: Role,
        now: UnixMillis,
    ) -> StoreResult<Result<u32, GroupRefusal>> {
        let at = self.memory.clock.bounds(now).earliest;
        self.writer.run(AddMembers { group, actor, members, role, now, at }).await
    }

    async fn remove_member(
        &self,
        group: GroupId,
        actor: AccountId,
        member: IdentityKey,
    ) -> StoreResult<Result<(), GroupRefusal>> {
        self.writer.run(RemoveMember { group, actor, member }).await
    }

    async fn update(
        &self,
        group: GroupId,
        actor: AccountId,
        change: MetadataChange,
    ) -> StoreResult<Result<u64, GroupRefusal>> {
        self.writer.run(UpdateMetadata { group, actor, change }).await
    }

    async fn members(
        &self,
        group: GroupId,
        viewer: AccountId,
        page: MemberPage,
    ) -> StoreResult<Result<GroupView, GroupRefusal>> {
        let mut snapshot = self.readers.begin().await.map_err(read_failed)?;
        view(&mut snapshot, &group, viewer, page).await.map_err(read_failed)
    }

    async fn info(
        &self,
        group: GroupId,
        viewer: AccountId,
    ) -> StoreResult<Result<GroupInfo, GroupRefusal>> {
        sqlx::query(INFO)
            .bind(&group.as_bytes()[..])
            .bind(viewer.0)
            .fetch_optional(&self.readers)
            .await
            .and_then(|row| info(row.as_ref()))
            .map_err(read_failed)
    }

    async fn role(
        &self,
        group: GroupId,
        account: AccountId,
    ) -> StoreResult<Result<Option<Role>, GroupRefusal>> {
        let mut reader = self.readers.acquire().await.map_err(read_failed)?;
        let head = Head::find(&mut reader, &group, account).await.map_err(read_failed)?;
        Ok(head.map(|head| head.role).ok_or(GroupRefusal::NotFound))
    }

    async fn send(&self, message: GroupMessage) -> StoreResult<Result<GroupSent, GroupRefusal>> {
        let recipients = match &message.recipients {
            GroupRecipients::Listed(listed) => listed.len(),
            GroupRecipients::Others | GroupRecipients::All => self.count(&message.group).await?,
        };
        let sender = message.sender_key;
        let (limits, clock) = (self.limits.delivery, self.memory.clock.clone());
        let send = SendToGroup { message, recipients, limits, clock };
        self.writer.run_from(&sender, recipients, send).await
    }
}

impl EmbeddedStore {
    /// Returns the number of members of a group.
    async fn count(&self, group: &GroupId) -> StoreResult<usize> {
        let members: i64 = sqlx::query_scalar(COUNT)
            .bind(&group.as_bytes()[..])
            .fetch_one(&self.readers)
            .await
            .map_err(read_failed)?;
        Ok(usize::try_from(members).unwrap_or(0))
    }
}

const COUNT: &str = "SELECT count(*) FROM group_member WHERE group_id = ?1";

const HEAD: &str = "
    SELECT g.epoch, g.version, m.role
      FROM mls_group g LEFT JOIN group_member m ON m.group_id = g.id AND m.account = ?2
     WHERE g.id = ?1";

const VIEW: &str = "
    SELECT g.name, g.description, g.settings, g.version, g.epoch,
           EXISTS (SELECT 1 FROM group_member m
                    WHERE m.group_id = g.id AND m.account = ?2) AS is_member
      FROM mls_group g WHERE g.id = ?1";

const INFO: &str = "
    SELECT g.group_info, g.epoch,
           EXISTS (SELECT 1 FROM group_member m
                    WHERE m.group_id = g.id AND m.account = ?2) AS is_member
      FROM mls_group g WHERE g.id = ?1";

// ?1 group, ?2 the last member of the previous page, ?3 maximum rows. A deleted account has no
// inbox, and is a member until the erasure removes it.
const PAGE: &str = "
    SELECT m.id, a.identity, a.username, m.role, m.joined_at
      FROM group_member m INDEXED BY group_member_joined
           CROSS JOIN account a ON a.id = m.account
     WHERE m.group_id = ?1 AND m.id > ?2
       AND EXISTS (SELECT 1 FROM inbox i WHERE i.id = m.account)
     ORDER BY m.id LIMIT +?3";

#[cfg(test)]
pub(crate) fn statements() -> impl Iterator<Item = &'static str> {
    [COUNT, HEAD, VIEW, INFO, PAGE].into_iter().chain(change::STATEMENTS).chain(send::STATEMENTS)
}

/// The state of a group, and the role of the calling account in it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Head {
    epoch: u64,
    version: u64,
    /// `None` if the account is not a member.
    role: Option<Role>,
}

impl Head {
    /// Returns the group; `None` if there is none with this id.
    pub(crate) async fn find(
        connection: &mut SqliteConnection,
        group: &GroupId,
        account: AccountId,
    ) -> sqlx::Result<Option<Self>> {
        let row = sqlx::query(HEAD)
            .bind(&group.as_bytes()[..])
            .bind(account.0)
            .fetch_optional(connection)
            .await?;
        row.map(|row| {
            let role = row.try_get::<Option<i64>, _>("role")?.map(role).transpose()?;
            Ok(Self { epoch: row.unsigned("epoch")?, version: row.unsigned("version")?, role })
        })
        .transpose()
    }

    /// Returns the group if the account is a member.
    async fn of_member(
        connection: &mut SqliteConnection,
        group: &GroupId,
        account: AccountId,
    ) -> sqlx::Result<Result<Self, GroupRefusal>> {
        Ok(match Self::find(connection, group, account).await? {
            None => Err(GroupRefusal::NotFound),
            Some(Self { role: None, .. }) => Err(GroupRefusal::NotMember),
            Some(head) => Ok(head),
        })
    }

    /// Returns the group if the account is an admin.
    pub(crate) async fn of_admin(
        connection: &mut SqliteConnection,
        group: &GroupId,
        account: AccountId,
    ) -> sqlx::Result<Result<Self, GroupRefusal>> {
        let head = Self::of_member(connection, group, account).await?;
        Ok(head.and_then(|head| match head.role {
            Some(Role::Admin) => Ok(head),
            _ => Err(GroupRefusal::NotAdmin),
        }))
    }
}

fn role(stored: i64) -> sqlx::Result<Role> {
    match stored {
        0 => Ok(Role::Member),
        1 => Ok(Role::Admin),
        _ => Err(NeverWritten("role").into()),
    }
}

async fn view(
    snapshot: &mut SqliteConnection,
    group: &GroupId,
    viewer: AccountId,
    page: MemberPage,
) -> sqlx::Result<Result<GroupView, GroupRefusal>> {
    let row = sqlx::query(VIEW)
        .bind(&group.as_bytes()[..])
        .bind(viewer.0)
        .fetch_optional(&mut *snapshot)
        .await?;
    let Some(row) = row else { return Ok(Err(GroupRefusal::NotFound)) };
    if !row.try_get::<bool, _>("is_member")? {
        return Ok(Err(GroupRefusal::NotMember));
    }
    let mut members = sqlx::query(PAGE)
        .bind(&group.as_bytes()[..])
        .bind(number(page.after))
        .bind(i64::from(page.limit) + 1)
        .fetch_all(snapshot)
        .await?;
    let limit = usize::try_from(page.limit).unwrap_or(usize::MAX);
    let mut next = None;
    if members.len() > limit {
        members.truncate(limit);
        next = Some(members.last().map_or(Ok(page.after), |last| last.unsigned("id"))?);
    }
    Ok(Ok(GroupView {
        members: members.iter().map(member).collect::<sqlx::Result<_>>()?,
        next,
        name: row.try_get("name")?,
        description: row.try_get("description")?,
        settings: row.bytes("settings")?.into(),
        version: row.unsigned("version")?,
        epoch: row.unsigned("epoch")?,
    }))
}

fn member(row: &SqliteRow) -> sqlx::Result<Member> {
    Ok(Member {
        identity: row.identity("identity")?,
        username: row.try_get("username")?,
        role: role(row.try_get("role")?)?,
        joined_at: row.at("joined_at")?,
    })
}

fn info(row: Option<&SqliteRow>) -> sqlx::Result<Result<GroupInfo, GroupRefusal>> {
    let Some(row) = row else { return Ok(Err(GroupRefusal::NotFound)) };
    if !row.try_get::<bool, _>("is_member")? {
        return Ok(Err(GroupRefusal::NotMember));
    }
    let group_info = row.try_get::<Option<Vec<u8>>, _>("group_info")?.map(Into::into);
    Ok(Ok(GroupInfo { group_info, epoch: row.unsigned("epoch")? }))
}
