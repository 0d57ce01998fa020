//! Leaving a group.
//!
//! A member that leaves drops the group immediately and notifies the others. The client of an admin
//! removes all members that have left in one page of the inbox. The last admin promotes another
//! member before it leaves.

use std::{collections::BTreeMap, sync::atomic::Ordering};

use qpq_domain::IdentityKey;
use qpq_mls::{Change, GroupChange, GroupId, GroupKind, database::DatabaseError};
use qpq_proto::{methods, v1};

use super::{
    Messenger,
    changes::{Cause, Operation},
    log::{ConversationId, Event},
    now,
    send::{SendOutcome, group_of},
    state::State,
    tables::LEAVING,
};
use crate::error::Error;

/// The members of each group that have asked to be removed.
pub(super) type Leaving = BTreeMap<GroupId, Vec<IdentityKey>>;

impl Messenger {
    /// Leaves a group.
    ///
    /// When this function returns, the group's keys are deleted, and no later message of the group
    /// is shown. The others see us leave once the client of an admin has read our `leaving`
    /// message. If we are the only admin, the oldest other member becomes one.
    pub async fn leave(&self, group: ConversationId) -> Result<SendOutcome, Error> {
        let id = group_of(group)?;
        // Messages that are not read before the keys are deleted can never be decrypted.
        if !self.shared.verified.load(Ordering::Relaxed) {
            let keys = self.sync_to_end().await?;
            self.settle_keys(keys).await?;
        }
        self.promote_successor(id).await?;
        self.store()
            .change(move |state| {
                state.count_encryption()?;
                let channel = state.server_group(&id)?.map(|known| known.channel);
                if let Some(farewell) = state.mls.leave(id)? {
                    state.outbox.push(farewell, None, now())?;
                }
                if let Some(channel) = channel {
                    state.add_change(Operation::Leave { channel })?;
                }
                Ok(state.log.mark_all_seen(group)?)
            })
            .await?;
        let sent = self.outcome(self.flush_outbox().await, None).await?;
        self.run_changes(None).await?;
        Ok(sent)
    }

    /// Promotes another member, if we are the only admin.
    async fn promote_successor(&self, id: GroupId) -> Result<(), Error> {
        let me = self.profile().identity;
        let summary = self.store().read(move |state| Ok(state.mls.group(&id)?)).await?;
        let summary = summary.ok_or(Error::NoSuchConversation)?;
        if !summary.active || summary.members.len() < 2 || summary.admins != [me] {
            return Ok(());
        }
        let is_other = |key: &IdentityKey| {
            *key != me && summary.members.iter().any(|member| member.identity == *key)
        };
        let channel = summary.channel;
        let request = v1::ListGroupMembersRequest {
            channel_id: channel.as_bytes().to_vec().into(),
            limit: 100,
            ..Default::default()
        };
        // The server's list is in the order of joining. The server promotes its first member, too.
        let oldest = match self.client().call::<methods::ListGroupMembers>(request).await {
            Ok(answer) => answer
                .members
                .iter()
                .filter_map(|member| IdentityKey::try_from(&member.identity_key[..]).ok())
                .find(is_other),
            Err(error) if error.server().is_some() && !error.is_unauthorized() => None,
            Err(error) => return Err(error.into()),
        };
        let others = summary.members.iter().map(|member| member.identity);
        let successor = oldest.or_else(|| others.clone().find(|key| *key != me));
        let promote = successor.into_iter().collect();
        match self.change_group(id, Change { promote, ..Change::default() }).await? {
            SendOutcome::Queued(Some(reason)) => Err(reason.into()),
            _ => Ok(()),
        }
    }
}

impl State {
    /// Saves a change that removes the members that have left, for each group that we administer.
    ///
    /// One change for each group, since members keep the keys of a limited number of epochs. A
    /// group that this account has left on another device was dropped.
    pub(super) fn remove_leaving(&mut self, leaving: Leaving) -> Result<(), Error> {
        let me = self.me();
        for (id, mut members) in leaving {
            if members.contains(&me) {
                let conversation = ConversationId::Group(id);
                self.log.mark_all_seen(conversation)?;
                let left = Event::Removed { by: Some(me), members: vec![me] };
                self.log.push(Some(conversation), now(), left)?;
            }
            let Some(group) = self.mls.group(&id)? else { continue };
            let is_admin = group.active
                && group.admins.contains(&me)
                && matches!(group.kind, GroupKind::Group { .. });
            members.retain(|key| group.members.iter().any(|member| member.identity == *key));
            if is_admin && !members.is_empty() {
                let change = Change { remove: members, ..Change::default() };
                self.add_change(Operation::Change { group: id, change, cause: Cause::Client })?;
            }
        }
        Ok(())
    }

    /// Notes that a member has left, before an admin removes it.
    pub(super) fn note_leaving(
        &self,
        group: &GroupId,
        member: &IdentityKey,
    ) -> Result<(), DatabaseError> {
        self.database().put(LEAVING, &leaving_key(group, member), None, b"")
    }

    /// Returns the members that had left before a commit removed them, and deletes the notes about
    /// them.
    pub(super) fn take_leaving(
        &self,
        group: &GroupId,
        changes: &[GroupChange],
    ) -> Result<Vec<IdentityKey>, DatabaseError> {
        let mut left = Vec::new();
        for change in changes {
            if let GroupChange::Removed(member) = change
                && self.database().delete(LEAVING, &leaving_key(group, &member.identity))?
            {
                left.push(member.identity);
            }
        }
        Ok(left)
    }
}

fn leaving_key(group: &GroupId, member: &IdentityKey) -> Vec<u8> {
    [&group.as_bytes()[..], member.as_bytes()].concat()
}
