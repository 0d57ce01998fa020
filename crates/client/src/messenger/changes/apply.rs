//! Changes of the state after an answer of the server. An accepted commit is applied, a refused one
//! is dropped.

use qpq_domain::{IdentityKey, MAX_BATCH};
use qpq_mls::{GroupId, Received};
use qpq_proto::v1;

use super::{Cause, Offer, Operation, PendingChange, SERVER_GROUPS, ServerGroup};
use crate::{
    error::{CallError, Error},
    messenger::{
        directory::is_not_found,
        enqueue::recipient_status,
        log::Event,
        note::{Shown, note},
        now,
        outbox::{RecipientStatus, fresh_message_id},
        state::State,
    },
};

impl State {
    /// Saves the commit of a pending change, to be sent to the server.
    pub(super) fn save_offer(
        &mut self,
        number: u64,
        commit: qpq_mls::Commit,
        expected_epoch: u64,
    ) -> Result<(), Error> {
        let Some(mut pending) = self.change(number)? else { return Ok(()) };
        let message_id = fresh_message_id(now());
        pending.offer = Some(Offer { message_id, expected_epoch, commit, is_applied: false });
        Ok(self.save_change(number, &pending)?)
    }

    /// Applies a commit that the server has accepted, and puts its Welcome into the outbox.
    pub(super) fn apply(
        &mut self,
        number: u64,
        pending: PendingChange,
        mut offer: Offer,
        epoch: u64,
        statuses: &[(IdentityKey, RecipientStatus)],
    ) -> Result<(), Error> {
        let id = offer.commit.group;
        let is_join = matches!(pending.operation, Operation::Join { .. });
        let received = match is_join {
            true => self.mls.confirm_joining(id),
            false => self.mls.confirm(id),
        };
        let received = match received {
            // Another member's commit was applied here for the same epoch. The server accepted
            // ours, and the other members continue from that one.
            Err(qpq_mls::Error::NothingPending) if !is_join => {
                self.remove_change(number)?;
                return Ok(self.add_rejoin(&id)?);
            }
            received => received?,
        };
        let known = ServerGroup { channel: offer.commit.channel, epoch: Some(epoch) };
        self.set_server_group(&id, known)?;
        let at = now();
        let by_person = matches!(pending.operation, Operation::Change { cause: Cause::Person, .. });
        for one in received {
            match one {
                Received::Committed { group, by, changes } if by.identity == self.me() => {
                    let shown = if by_person { Shown::Already } else { Shown::NotYet };
                    self.note_changes(&group, &by, changes, at, shown)?;
                }
                Received::Leaving { group, sender } => {
                    self.note_leaving(&group, &sender.identity)?;
                    self.remove_leaving([(group, vec![sender.identity])].into())?;
                }
                other => note(self, other, at)?,
            }
        }
        self.queue_messages(&offer, statuses)?;
        offer.is_applied = true;
        let done = PendingChange { offer: Some(offer), ..pending };
        Ok(self.save_change(number, &done)?)
    }

    /// Puts the further messages of an accepted commit into the outbox: the Welcome, and the commit
    /// for recipients whose inbox has no room now.
    fn queue_messages(
        &mut self,
        offer: &Offer,
        statuses: &[(IdentityKey, RecipientStatus)],
    ) -> Result<(), Error> {
        let commit = &offer.commit;
        let later = statuses.iter().filter(|(_, status)| *status == RecipientStatus::Later);
        let later: Vec<_> = later.map(|(key, _)| *key).collect();
        let parcel = |recipients: Vec<IdentityKey>, payload: &[u8]| qpq_mls::Parcel {
            recipients,
            channel: commit.channel,
            payload: payload.to_vec(),
        };
        let refused = |status: &RecipientStatus| match status {
            RecipientStatus::Refused(reason) => Some(reason.clone()),
            _ => None,
        };
        let conversation = self.conversation_of(&commit.group)?;
        for (to, reason) in
            statuses.iter().filter_map(|(key, status)| Some((*key, refused(status)?)))
        {
            self.log.push(conversation, now(), Event::Undeliverable { to, reason })?;
        }
        match (first_payload(offer), &commit.welcome) {
            (FirstPayload::Commit, welcome) => {
                if !later.is_empty() {
                    self.outbox.push(parcel(later, &commit.payload), None, now())?;
                }
                if let Some(welcome) = welcome {
                    self.outbox.push(parcel(commit.invited.clone(), welcome), None, now())?;
                }
            }
            (FirstPayload::Welcome, Some(welcome)) if !later.is_empty() => {
                self.outbox.push(parcel(later, welcome), None, now())?;
            }
            (FirstPayload::Welcome, _) => {}
        }
        Ok(())
    }

    /// Drops the commit of a change, since another member's was first. The next attempt creates
    /// another commit.
    pub(super) fn restart_change(
        &mut self,
        number: u64,
        pending: &PendingChange,
        group: GroupId,
    ) -> Result<(), Error> {
        self.discard_commit(&pending.operation, group)?;
        self.forget_server_epoch(&group)?;
        Ok(self.save_change(number, pending)?)
    }

    /// Begins a change again with a new record of its group on the server. Returns `false` if the
    /// change is not pending, or not a change of a group.
    pub(super) fn forget_server_group(&mut self, number: u64) -> Result<bool, Error> {
        let Some(pending) = self.change(number)? else { return Ok(false) };
        let Operation::Change { group, .. } = pending.operation else { return Ok(false) };
        self.mls.discard(group)?;
        self.database().delete(SERVER_GROUPS, group.as_bytes())?;
        self.save_change(number, &PendingChange { offer: None, ..pending })?;
        Ok(true)
    }

    fn discard_commit(&mut self, operation: &Operation, group: GroupId) -> Result<(), Error> {
        match operation {
            Operation::Join { .. } => self.mls.discard_joining(group)?,
            _ => self.mls.discard(group)?,
        }
        Ok(())
    }

    /// Removes a change that failed permanently. If the change was the person's, notes the given
    /// reason in the history.
    pub(super) fn abandon_change(
        &mut self,
        number: u64,
        reason: Option<String>,
    ) -> Result<(), Error> {
        let Some(pending) = self.change(number)? else { return Ok(()) };
        let group = match &pending.operation {
            Operation::Change { group, cause: Cause::Person, .. } => Some(*group),
            _ => None,
        };
        if let Some(offer) = pending.offer.filter(|offer| !offer.is_applied) {
            self.discard_commit(&pending.operation, offer.commit.group)?;
        }
        self.remove_change(number)?;
        if let (Some(reason), Some(group)) = (reason, group) {
            let conversation = self.conversation_of(&group)?;
            self.log.push(conversation, now(), Event::NotChanged { reason })?;
        }
        Ok(())
    }
}

/// Returns whether a join failed because the server has no GroupInfo of the group.
///
/// Such a failure is not shown. A member, or another device of the account, adds this device before
/// it sends its next message.
pub(super) fn is_joined_later(pending: &PendingChange, error: &Error) -> bool {
    let is_unknown = match error {
        Error::NoGroupInfo => true,
        Error::Call(error) => is_not_found(error),
        _ => false,
    };
    is_unknown && matches!(pending.operation, Operation::Join { .. })
}

/// The maximum size of a GroupInfo on the server, in bytes.
const MAX_GROUP_INFO: usize = qpq_domain::MAX_GROUP_INFO;
/// The replacement of a GroupInfo that is too large. With the GroupInfo of an earlier epoch on the
/// server, a device would join a state of the group that no other member is in.
pub(super) const NO_GROUP_INFO: &[u8] = &[0];

/// The payload of the batch by which the server accepts a commit.
enum FirstPayload {
    /// The commit, for the other members.
    Commit,
    /// The Welcome, for the first other members of a group.
    Welcome,
}

fn first_payload(offer: &Offer) -> FirstPayload {
    let commit = &offer.commit;
    if commit.recipients.is_empty() && commit.welcome.is_some() {
        FirstPayload::Welcome
    } else {
        FirstPayload::Commit
    }
}

/// Returns the request that asks the server to accept a commit.
pub(super) fn request(offer: &Offer) -> v1::BatchEnqueueRequest {
    let commit = &offer.commit;
    let (recipients, payload) = match (first_payload(offer), &commit.welcome) {
        (FirstPayload::Welcome, Some(welcome)) => (&commit.invited, welcome),
        _ => (&commit.recipients, &commit.payload),
    };
    // All members of the group, if there are no recipients or too many for a list.
    let to_members = recipients.is_empty() || recipients.len() > MAX_BATCH;
    let listed = recipients.iter().filter(|_| !to_members);
    v1::BatchEnqueueRequest {
        recipient_keys: listed.map(|key| key.as_bytes().to_vec().into()).collect(),
        payload: payload.clone().into(),
        channel_id: commit.channel.as_bytes().to_vec().into(),
        message_id: offer.message_id.as_bytes().to_vec().into(),
        expected_epoch: offer.expected_epoch,
        commit: true,
        group_info: if commit.group_info.len() <= MAX_GROUP_INFO {
            commit.group_info.clone().into()
        } else {
            NO_GROUP_INFO.into()
        },
        to_members,
        ..Default::default()
    }
}

/// Returns the answers for the listed recipients of an accepted commit.
pub(super) fn statuses(
    offer: &Offer,
    answer: &v1::BatchEnqueueResponse,
) -> Result<Vec<(IdentityKey, RecipientStatus)>, CallError> {
    let commit = &offer.commit;
    let recipients = match first_payload(offer) {
        FirstPayload::Welcome => &commit.invited,
        FirstPayload::Commit => &commit.recipients,
    };
    if recipients.is_empty() || recipients.len() > MAX_BATCH {
        return Ok(Vec::new());
    }
    if answer.results.len() != recipients.len() {
        return Err(CallError::Malformed { method: "BatchEnqueue" });
    }
    let results = answer.results.iter();
    let statuses = results.map(|result| recipient_status(result.status, &result.code));
    Ok(recipients.iter().copied().zip(statuses).collect())
}
