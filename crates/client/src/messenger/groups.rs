//! Groups: creating one, inviting, removing, renaming, admins, and joining again.

use std::{sync::atomic::Ordering, time::Duration};

use qpq_domain::{ChannelId, IdentityKey, UnixMillis, Username};
use qpq_mls::{Change, GroupId, GroupKind, database::DatabaseError};
use qpq_proto::{methods, v1};
use rand::{RngCore as _, rngs::OsRng};

use super::{
    Messenger,
    changes::{Operation, ServerGroup},
    log::ConversationId,
    now,
    people::Person,
    send::{SendOutcome, group_of},
    state::State,
    tables::TRIED,
};
use crate::error::Error;

/// The maximum length of a group's name, in bytes of UTF-8.
pub const MAX_GROUP_NAME: usize = 256;

/// The time between two attempts to join a group by an external commit.
const TRY_AGAIN_AFTER: Duration = Duration::from_secs(600);

/// The role of a member of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Reads and writes.
    Member,
    /// Also adds and removes members, renames the group, and changes roles.
    Admin,
}

/// A member of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupMember {
    /// The account.
    pub person: Person,
    /// The role of the account.
    pub role: Role,
    /// The names of the account's devices in the group; empty for a device without a name.
    pub devices: Vec<String>,
}

impl Messenger {
    /// Creates a group whose only member is this account. Works without a connection.
    ///
    /// `name` has 1 to [`MAX_GROUP_NAME`] bytes.
    pub async fn create_group(&self, name: &str) -> Result<ConversationId, Error> {
        check_name(name)?;
        let mut channel = [0; 16];
        OsRng.fill_bytes(&mut channel);
        let (name, channel) = (name.to_owned(), ChannelId::new(channel));
        let id = self
            .store()
            .change(move |state| Ok(state.mls.create_group(&name, channel, now())?))
            .await?;
        Ok(ConversationId::Group(id))
    }

    /// Adds an account, with all of its devices, to a group that we are an admin of.
    pub async fn add(
        &self,
        group: ConversationId,
        username: &Username,
    ) -> Result<SendOutcome, Error> {
        let id = group_of(group)?;
        self.verify().await?;
        let person = self.resolve(username).await?;
        // Checked first, because an addition that is refused would still use up a KeyPackage.
        let is_member = self
            .store()
            .read(move |state| {
                state.check_not_blocked(&person.identity)?;
                state.check_admin(&id)?;
                state.is_member(&id, &person.identity)
            })
            .await?;
        if is_member {
            return Err(Error::AlreadyMember(person.username));
        }
        let mut add = self.fetch_packages(&person).await?;
        if self
            .store()
            .read(move |state| Ok(state.mls.group(&id)?))
            .await?
            .is_some_and(|group| group.members.len() == 1)
        {
            // The first commit also adds the other devices of this account.
            add.extend(self.fetch_own_packages().await?);
        }
        let identity = person.identity;
        self.store().change(move |state| Ok(state.note_contact(&identity)?)).await?;
        self.change_group(id, Change { add, ..Change::default() }).await
    }

    /// Removes an account, with all of its devices, from a group that we are an admin of.
    pub async fn remove(
        &self,
        group: ConversationId,
        member: IdentityKey,
    ) -> Result<SendOutcome, Error> {
        let id = group_of(group)?;
        self.verify().await?;
        let is_member = self
            .store()
            .read(move |state| {
                state.check_admin(&id)?;
                state.is_member(&id, &member)
            })
            .await?;
        if !is_member {
            return Err(qpq_mls::Error::NotAMember(member).into());
        }
        self.change_group(id, Change { remove: vec![member], ..Change::default() }).await
    }

    /// Renames a group that we are an admin of.
    pub async fn rename(&self, group: ConversationId, name: &str) -> Result<SendOutcome, Error> {
        let id = group_of(group)?;
        check_name(name)?;
        self.verify().await?;
        self.store().read(move |state| state.check_admin(&id)).await?;
        self.change_group(id, Change { name: Some(name.to_owned()), ..Change::default() }).await
    }

    /// Changes the role of a member of a group that we are an admin of.
    ///
    /// # Errors
    /// [`qpq_mls::Error::LastAdmin`] for the only admin.
    pub async fn set_role(
        &self,
        group: ConversationId,
        member: IdentityKey,
        role: Role,
    ) -> Result<SendOutcome, Error> {
        let id = group_of(group)?;
        self.verify().await?;
        self.store().read(move |state| state.check_admin(&id)).await?;
        let change = match role {
            Role::Admin => Change { promote: vec![member], ..Change::default() },
            Role::Member => Change { demote: vec![member], ..Change::default() },
        };
        self.change_group(id, change).await
    }

    /// Joins a group again by an external commit from the server's GroupInfo.
    ///
    /// For a device whose state of the group is lost or outdated. The other members are shown that
    /// it joined. Messages that were sent meanwhile cannot be read; their senders are asked to
    /// repeat them.
    ///
    /// # Errors
    /// [`Error::NoGroupInfo`] if the server has no GroupInfo of the group.
    pub async fn rejoin(&self, group: ConversationId) -> Result<SendOutcome, Error> {
        let id = group_of(group)?;
        let operation = self.store().read(move |state| Ok(state.rejoin_operation(&id)?)).await?;
        self.run_operation(operation.ok_or(Error::NoSuchConversation)?).await
    }

    /// Asks the clients of all members of a group to renew their keys.
    pub async fn rotate_keys(&self, group: ConversationId, reason: &str) -> Result<(), Error> {
        let id = group_of(group)?;
        let known = self.store().read(move |state| Ok(state.server_group(&id)?)).await?;
        let ServerGroup { channel, .. } = known.ok_or(Error::NoSuchConversation)?;
        let request = v1::RotateKeysRequest {
            channel_id: channel.as_bytes().to_vec().into(),
            reason: reason.to_owned(),
            ..Default::default()
        };
        self.client().call::<methods::RotateKeys>(request).await?;
        Ok(())
    }

    /// Returns the members of a group, with their roles and devices.
    pub async fn group_members(&self, group: ConversationId) -> Result<Vec<GroupMember>, Error> {
        let id = group_of(group)?;
        self.store()
            .change(move |state| {
                let summary = state.mls.group(&id)?.ok_or(Error::NoSuchConversation)?;
                let devices = state.mls.devices(&id)?;
                let member = |key: &IdentityKey| {
                    let is_admin = summary.admins.contains(key);
                    let of_key = devices.iter().filter(|device| device.member.identity == *key);
                    Ok(GroupMember {
                        person: state.people.person(key)?,
                        role: if is_admin { Role::Admin } else { Role::Member },
                        devices: of_key.map(|device| device.name().to_owned()).collect(),
                    })
                };
                summary.members.iter().map(|one| member(&one.identity)).collect()
            })
            .await
    }

    /// Returns the channel and the MLS epoch of a group. For tests.
    #[doc(hidden)]
    pub async fn group_state(&self, group: GroupId) -> Result<(ChannelId, u64), Error> {
        self.store()
            .read(move |state| {
                let summary = state.mls.group(&group)?.ok_or(Error::NoSuchConversation)?;
                Ok((summary.channel, summary.epoch))
            })
            .await
    }

    /// Joins the groups in which commits were missed, and those whose Welcome was for other devices
    /// of this account.
    pub(super) async fn rejoin_lost(&self) -> Result<(), Error> {
        if !self.shared.verified.load(Ordering::Relaxed) {
            return Ok(());
        }
        let lost = self.store().read(|state| state.lost_groups()).await?;
        if lost.is_empty() {
            return Ok(());
        }
        self.store()
            .change(move |state| {
                lost.iter().try_for_each(|lost| {
                    match lost {
                        Lost::Behind(group, channel) => {
                            state.note_try(*channel)?;
                            state.add_rejoin(group)?;
                        }
                        Lost::Unknown(channel) => {
                            state.note_try(*channel)?;
                            state.add_join(*channel)?;
                        }
                    }
                    Ok(())
                })
            })
            .await?;
        self.run_changes(None).await.map(drop)
    }
}

/// A group that cannot be read here and may be joined by an external commit.
enum Lost {
    /// Messages of a later epoch arrived without the commits before them.
    Behind(GroupId, ChannelId),
    /// Messages of a group arrived without its Welcome.
    Unknown(ChannelId),
}

impl State {
    /// Fails for a group that we may not change.
    fn check_admin(&self, group: &GroupId) -> Result<(), Error> {
        let summary = self.mls.group(group)?.ok_or(Error::NoSuchConversation)?;
        if matches!(summary.kind, GroupKind::Direct { .. }) {
            return Err(qpq_mls::Error::DirectIsForTwo.into());
        }
        if !summary.active {
            return Err(qpq_mls::Error::NoLongerMember.into());
        }
        if !summary.admins.contains(&self.me()) {
            return Err(qpq_mls::Error::NotAdmin.into());
        }
        Ok(())
    }

    fn is_member(&self, group: &GroupId, person: &IdentityKey) -> Result<bool, Error> {
        let summary = self.mls.group(group)?.ok_or(Error::NoSuchConversation)?;
        Ok(summary.members.iter().any(|member| member.identity == *person))
    }

    /// Saves a change that joins a group again, unless one is pending.
    pub(super) fn add_rejoin(&self, group: &GroupId) -> Result<(), DatabaseError> {
        self.rejoin_operation(group)?.map_or(Ok(()), |operation| self.add_change_once(operation))
    }

    /// Returns the operation that joins a group again; `None` if the group is unknown here.
    fn rejoin_operation(&self, group: &GroupId) -> Result<Option<Operation>, DatabaseError> {
        let Some(summary) = self.mls.group(group)? else { return Ok(None) };
        let channel = match self.server_group(group)? {
            Some(known) => known.channel,
            None => summary.channel,
        };
        let known = summary.members.iter().map(|member| member.identity).collect();
        Ok(Some(Operation::Join { channel, known }))
    }

    /// Saves a pending join of the channel's group, unless one is pending already. The group is not
    /// known to this client.
    fn add_join(&self, channel: ChannelId) -> Result<(), DatabaseError> {
        let mut known = self.acquaintances()?;
        known.push(self.me());
        self.add_change_once(Operation::Join { channel, known })
    }

    fn add_change_once(&self, operation: Operation) -> Result<(), DatabaseError> {
        if self.is_pending(&operation)? { Ok(()) } else { self.add_change(operation).map(drop) }
    }

    fn lost_groups(&self) -> Result<Vec<Lost>, Error> {
        let mut lost = Vec::new();
        for group in self.mls.behind()? {
            let channel = self.mls.group(&group)?.map(|group| group.channel);
            if let Some(channel) = channel
                && !self.was_tried(channel)?
            {
                lost.push(Lost::Behind(group, channel));
            }
        }
        if self.has_other_devices()? {
            for channel in self.mls.unknown_channels()? {
                if !self.was_tried(channel)? {
                    lost.push(Lost::Unknown(channel));
                }
            }
        }
        Ok(lost)
    }

    /// Returns whether an attempt to join a channel's group was made within [`TRY_AGAIN_AFTER`].
    pub(super) fn was_tried(&self, channel: ChannelId) -> Result<bool, Error> {
        let Some(row) = self.database().get(TRIED, channel.as_bytes())? else { return Ok(false) };
        let at = UnixMillis(row[..].try_into().map(u64::from_be_bytes).unwrap_or(0));
        // A time after now is from a wrong clock.
        Ok(at <= now() && at.plus(TRY_AGAIN_AFTER) > now())
    }

    fn note_try(&self, channel: ChannelId) -> Result<(), DatabaseError> {
        self.database().put(TRIED, channel.as_bytes(), None, &now().0.to_be_bytes())
    }
}

fn check_name(name: &str) -> Result<(), Error> {
    if !(1..=MAX_GROUP_NAME).contains(&name.len()) {
        return Err(Error::GroupName { size: name.len(), max: MAX_GROUP_NAME });
    }
    Ok(())
}
