//! Leaving a group. Only a group's creator changes its members. A member who leaves drops the group
//! immediately and asks the creator, whose client removes everyone that has asked in one page of
//! the inbox.

use std::{collections::BTreeMap, sync::atomic::Ordering};

use qpq_domain::{IdentityKey, UnixMillis};
use qpq_mls::{GroupId, GroupKind};

use super::{
    Messenger,
    log::{ConversationId, Event},
    send::{SendOutcome, group_of},
    state::State,
};
use crate::error::Error;

/// The members of each group that have asked to be removed, and the time of the last request.
pub(super) type Leaving = BTreeMap<GroupId, (UnixMillis, Vec<IdentityKey>)>;

impl Messenger {
    /// Leaves a group that another person created. Its keys are deleted when this returns, and
    /// nothing that is sent to it is shown any more. The others see us leave when the creator's
    /// client has read that.
    pub async fn leave(&self, group: ConversationId) -> Result<SendOutcome, Error> {
        let id = group_of(group)?;
        // Messages that are not read before the keys are deleted can never be decrypted.
        if !self.shared.verified.load(Ordering::Relaxed) {
            self.sync().await?;
        }
        self.store()
            .change(move |state| {
                state.count_encryption()?;
                if let Some(farewell) = state.mls.leave(id)? {
                    state.outbox.push(farewell, None, super::now())?;
                }
                Ok(state.log.mark_all_seen(group)?)
            })
            .await?;
        self.outcome(self.flush().await, None).await
    }
}

impl State {
    /// Removes those who have asked for it from groups that we made: one change for each group, so
    /// that many who leave concurrently cost the others no old keys.
    pub(super) fn remove_leaving(&mut self, leaving: Leaving) -> Result<(), Error> {
        for (id, (at, mut members)) in leaving {
            let Some(group) = self.mls.group(&id)? else { continue };
            let is_ours = group.active
                && group.creator == self.me()
                && matches!(group.kind, GroupKind::Group { .. });
            members.retain(|key| group.members.iter().any(|member| member.identity == *key));
            if !is_ours || members.is_empty() {
                continue;
            }
            self.count_encryption()?;
            let commit = self.mls.remove(id, &members)?;
            self.outbox.push(commit, None, super::now())?;
            self.log.push(Some(ConversationId::Group(id)), at, Event::Removed { members })?;
        }
        Ok(())
    }
}
