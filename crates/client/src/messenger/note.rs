//! Entries in the history for the results of received messages.

use std::collections::BTreeSet;

use qpq_domain::{IdentityKey, UnixMillis};
use qpq_mls::{Content, GroupChange, GroupId, GroupSummary, Ignored, Lost, Member, Received};

use super::{
    files::is_showable,
    log::{ConversationId, DeliveryState, Event},
    send::MAX_TEXT,
    state::State,
};
use crate::error::Error;

/// Returns whether a message is from one of these people, or claims to be.
pub(super) fn is_from(received: &Received, people: &BTreeSet<IdentityKey>) -> bool {
    match received {
        Received::Message { sender, .. } | Received::Asked { sender, .. } => {
            people.contains(&sender.identity)
        }
        Received::Unreadable(lost) => {
            lost.claimed_sender.is_some_and(|sender| people.contains(&sender))
        }
        _ => false,
    }
}

/// Notes a received message in the history.
pub(super) fn note(state: &mut State, received: Received, at: UnixMillis) -> Result<(), Error> {
    match received {
        Received::Joined { group, by } => note_joined(state, &group, &by, at)?,
        Received::Requested(request) => state.announce(request, at)?,
        Received::Message { group, sender, content, .. } => {
            note_message(state, &group, &sender, content, at)?;
        }
        Received::Asked { group, sender, digests } => {
            state.people.claim(sender.identity, &sender.username)?;
            state.answer(group, &sender.identity, digests)?;
        }
        Received::Committed { group, by, changes } => {
            state.forget_server_epoch(&group)?;
            let shown = if by.identity == state.me() { Shown::Already } else { Shown::NotYet };
            state.note_changes(&group, &by, changes, at, shown)?;
        }
        Received::Buffered
        | Received::Duplicate
        | Received::Refused { .. }
        | Received::Ignored(
            Ignored::OwnMessage
            | Ignored::AlreadyLeft
            | Ignored::BeforeJoining
            | Ignored::ForAnotherDevice,
        ) => {}
        // A message of this device, from before it joined its group again.
        Received::Unreadable(lost) if state.was_sent_here(&lost.digest)? => {}
        Received::Unreadable(lost) => {
            if lost.reason == Lost::NoPackage {
                state.replace_packages()?;
            }
            state.note_unreadable(&lost, at)?;
        }
        Received::Ignored(reason) => {
            let event = Event::Unreadable { from: None, reason: reason.to_string() };
            state.log.push(None, at, event)?;
        }
        // A result that a later version of the MLS crate has added.
        _ => {
            let event = Event::Unreadable { from: None, reason: "not understood".to_owned() };
            state.log.push(None, at, event)?;
        }
    }
    Ok(())
}

fn note_joined(
    state: &mut State,
    group: &GroupSummary,
    by: &Member,
    at: UnixMillis,
) -> Result<(), Error> {
    for member in &group.members {
        state.people.claim(member.identity, &member.username)?;
    }
    state.count_stranger(group)?;
    state.forget_server_epoch(&group.id)?;
    // A direct conversation begins with its first message.
    if let conversation @ ConversationId::Group(_) = ConversationId::of(group, &state.me()) {
        state.log.push(Some(conversation), at, Event::Joined { by: by.identity })?;
    }
    Ok(())
}

fn note_message(
    state: &mut State,
    group: &GroupId,
    sender: &Member,
    content: Content,
    at: UnixMillis,
) -> Result<(), Error> {
    if let Some(digest) = content.repeats {
        state.people.claim(sender.identity, &sender.username)?;
        return state.process_repeat(sender, content, digest, at);
    }
    let event = if sender.identity == state.me() {
        // The message was written on another device of this account.
        Event::Sent { text: content.text, delivery: DeliveryState::Sent, file: content.file }
    } else {
        state.people.claim(sender.identity, &sender.username)?;
        text_event(sender.identity, content)
    };
    state.log.push(state.conversation_of(group)?, at, event)?;
    Ok(())
}

/// Returns the entry for a text of another person.
fn text_event(from: IdentityKey, content: Content) -> Event<IdentityKey> {
    let size = content.text.len();
    if size <= MAX_TEXT {
        let Content { text, sent_at, file, .. } = content;
        if is_showable(file.as_ref()) {
            return Event::Received { from, text, sent_at: UnixMillis(sent_at), file };
        }
        let reason = "the name of its file is too long".to_owned();
        return Event::Unreadable { from: Some(from), reason };
    }
    let reason = format!("it has {size} bytes, the most is {MAX_TEXT}");
    Event::Unreadable { from: Some(from), reason }
}

/// Whether a change is news to the person.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shown {
    /// The person has changed this, here or on another device.
    Already,
    NotYet,
}

impl State {
    /// Notes the changes of a commit in the history.
    pub(super) fn note_changes(
        &mut self,
        group: &GroupId,
        by: &Member,
        changes: Vec<GroupChange>,
        at: UnixMillis,
        shown: Shown,
    ) -> Result<(), Error> {
        let Some(conversation) = self.conversation_of(group)? else { return Ok(()) };
        let is_direct = matches!(conversation, ConversationId::Direct(_));
        let left = self.take_leaving(group, &changes)?;
        for event in events(by.identity, &changes, &left) {
            // A direct conversation has the same two people from its first message on.
            if is_direct && matches!(event, Event::Added { .. } | Event::Removed { .. }) {
                continue;
            }
            match shown {
                Shown::Already => self.log.push_own(conversation, at, event)?,
                Shown::NotYet => self.log.push(Some(conversation), at, event)?,
            };
        }
        for change in &changes {
            match change {
                GroupChange::Added(member) | GroupChange::DeviceAdded { member, .. } => {
                    self.people.claim(member.identity, &member.username)?;
                    if member.identity == self.me() {
                        self.note_other_devices()?;
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Returns the entries for the changes of one commit. Members that are added or removed together
/// are one entry, without those that have `left` before they were removed.
fn events(
    by: IdentityKey,
    changes: &[GroupChange],
    left: &[IdentityKey],
) -> Vec<Event<IdentityKey>> {
    let (mut added, mut removed, mut promoted, mut demoted) = (vec![], vec![], vec![], vec![]);
    for change in changes {
        match change {
            GroupChange::Added(member) => added.push(member.identity),
            GroupChange::Removed(member) if left.contains(&member.identity) => {}
            GroupChange::Removed(member) => removed.push(member.identity),
            GroupChange::Promoted(member) => promoted.push(member.identity),
            GroupChange::Demoted(member) => demoted.push(member.identity),
            _ => {}
        }
    }
    let lists = [
        (!added.is_empty()).then_some(Event::Added { members: added }),
        (!left.is_empty()).then(|| Event::Removed { by: None, members: left.to_vec() }),
        (!removed.is_empty()).then_some(Event::Removed { by: Some(by), members: removed }),
        (!promoted.is_empty()).then_some(Event::Promoted { members: promoted }),
        (!demoted.is_empty()).then_some(Event::Demoted { members: demoted }),
    ];
    let single = changes.iter().filter_map(|change| match change {
        GroupChange::DeviceAdded { member, name } => {
            Some(Event::DeviceAdded { person: member.identity, device: name.clone() })
        }
        GroupChange::DeviceRemoved { member, name } => {
            Some(Event::DeviceRemoved { person: member.identity, device: name.clone() })
        }
        GroupChange::Rejoined { member, name } => {
            Some(Event::Rejoined { person: member.identity, device: name.clone() })
        }
        GroupChange::Renamed { name } => Some(Event::Renamed { by, name: name.clone() }),
        _ => None,
    });
    lists.into_iter().flatten().chain(single).collect()
}
