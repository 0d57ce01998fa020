//! The history of the conversations: messages sent and received, members added and removed, and
//! notices for the reader of an inbox (messages are missing, or could not be read). Kept inside the
//! profile's encrypted state.

use std::fmt;

use qpq_domain::{IdentityKey, Seq, UnixMillis, Username};
use qpq_mls::{
    GroupId, GroupKind, GroupSummary, SharedFile,
    database::{Database, DatabaseError, Item, NewItem},
};

use super::{
    people::Person,
    records::{SavedConversation, SavedEntry, conversation_key, decode, encode},
    tables::{CONVERSATIONS, ENTRIES},
};

/// A conversation: with one person, or a group.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ConversationId {
    /// With the owner of this key.
    Direct(IdentityKey),
    /// A group.
    Group(GroupId),
}

impl ConversationId {
    /// Returns the conversation that an MLS group belongs to, from the view of `me`.
    pub(crate) fn of(group: &GroupSummary, me: &IdentityKey) -> Self {
        match &group.kind {
            GroupKind::Direct { peer } if group.creator == *me => Self::Direct(*peer),
            GroupKind::Direct { .. } => Self::Direct(group.creator),
            GroupKind::Group { .. } => Self::Group(group.id),
        }
    }
}

impl fmt::Display for ConversationId {
    /// Writes 64 hexadecimal digits: the person's key or the group's id.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Direct(key) => key.fmt(f),
            Self::Group(id) => id.fmt(f),
        }
    }
}

impl fmt::Debug for ConversationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Direct(key) => f.debug_tuple("Direct").field(key).finish(),
            Self::Group(id) => f.debug_tuple("Group").field(id).finish(),
        }
    }
}

/// The number of an entry in its profile. Later entries have higher numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EntryId(pub u64);

/// An event in the history of a profile, with its time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry<P = Person> {
    /// The entry's number.
    pub id: EntryId,
    /// The conversation of the entry; `None` if the entry belongs to none.
    pub conversation: Option<ConversationId>,
    /// The time at which the server accepted the message or, if it is ours, at which it was
    /// written.
    pub at: UnixMillis,
    /// The content of the entry.
    pub event: Event<P>,
}

/// An event of the history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event<P = Person> {
    /// We wrote.
    Sent {
        /// The text.
        text: String,
        /// The state of the delivery.
        delivery: DeliveryState,
        /// The file that was sent, if any.
        file: Option<SharedFile>,
    },
    /// Another person wrote.
    Received {
        /// The sender.
        from: P,
        /// The text.
        text: String,
        /// The time of sending, by the sender's clock.
        sent_at: UnixMillis,
        /// The file that the message is about, if any.
        file: Option<SharedFile>,
    },
    /// `by` invited us into the conversation.
    Joined {
        /// The member that invited us.
        by: P,
    },
    /// A stranger's request waits, for a group of this name or for a direct conversation. Further
    /// requests have no entry until requests are listed or one is decided on.
    Requested {
        /// The stranger.
        by: P,
        /// The group's name.
        group: Option<String>,
    },
    /// A new device asks to be linked to the account. Further requests have no entry while this one
    /// is unseen.
    DeviceRequested {
        /// The name that the device claims, without a proof.
        name: String,
    },
    /// A further device of a person is in the conversation.
    DeviceAdded {
        /// The device's owner.
        person: P,
        /// The name of the device.
        device: String,
    },
    /// A device of a person was removed from the conversation, and others of it stay.
    DeviceRemoved {
        /// The device's owner.
        person: P,
        /// The name of the device.
        device: String,
    },
    /// A device that had lost its state of the conversation joined it again by itself.
    Rejoined {
        /// The device's owner.
        person: P,
        /// The name of the device.
        device: String,
    },
    /// The group was renamed.
    Renamed {
        /// The admin who renamed the group.
        by: P,
        /// The new name.
        name: String,
    },
    /// Members are admins from now on.
    Promoted {
        /// The new admins.
        members: Vec<P>,
    },
    /// Members are no longer admins.
    Demoted {
        /// The former admins.
        members: Vec<P>,
    },
    /// A change of the conversation that we wanted could not be made.
    NotChanged {
        /// The reason, as a sentence.
        reason: String,
    },
    /// Members were added to the group.
    Added {
        /// The new members.
        members: Vec<P>,
    },
    /// Members left the group, or were removed from it.
    Removed {
        /// The member that removed them; `None` if they have left, or if an earlier release noted
        /// the removal. Our own account, if we have left the group on another device.
        by: Option<P>,
        /// The members that were removed; we may be among them.
        members: Vec<P>,
    },
    /// A message in the inbox could not be read. `from` is the sender that the message names, if
    /// any, without proof.
    Unreadable {
        /// The claimed sender.
        from: Option<P>,
        /// The reason, as a sentence.
        reason: String,
    },
    /// Messages of the inbox never arrived: they expired, or another client received them.
    Missing {
        /// The seq of the first missing message.
        first: Seq,
        /// The seq of the last missing message.
        last: Seq,
    },
    /// The server's store went back in time, as when a backup is restored. Messages accepted since
    /// the backup and not yet delivered are lost; their senders see them as sent.
    WentBack,
    /// This profile's own state went back in time: an older copy of it was restored. Keys were
    /// renewed before anything was sent.
    Restored,
    /// A person in a conversation of ours claims a name that the directory does not have for its
    /// key.
    NameRefuted {
        /// The person.
        person: P,
        /// The name that is falsely claimed.
        claimed: Username,
    },
    /// A person in a conversation of ours has a name that was confirmed for another key before.
    NewKey {
        /// The person, with the new key.
        person: P,
    },
    /// The server refused a message of ours for this person permanently.
    Undeliverable {
        /// The recipient.
        to: P,
        /// The server's reason.
        reason: String,
    },
}

/// The state of the delivery of a message of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DeliveryState {
    /// The message is on this machine until the server can be reached.
    Queued,
    /// The server has stored the message for every recipient.
    Sent,
    /// The server refused the message permanently for at least one recipient.
    Failed,
}

impl<P> Event<P> {
    /// Returns the same event with its people converted by `see`.
    pub(crate) fn try_map<Q, E>(
        self,
        mut see: impl FnMut(&P) -> Result<Q, E>,
    ) -> Result<Event<Q>, E> {
        let mut all = |people: Vec<P>| people.iter().map(&mut see).collect::<Result<Vec<_>, E>>();
        Ok(match self {
            Self::Sent { text, delivery, file } => Event::Sent { text, delivery, file },
            Self::Received { from, text, sent_at, file } => {
                Event::Received { from: see(&from)?, text, sent_at, file }
            }
            Self::Requested { by, group } => Event::Requested { by: see(&by)?, group },
            Self::Joined { by } => Event::Joined { by: see(&by)? },
            Self::DeviceRequested { name } => Event::DeviceRequested { name },
            Self::DeviceAdded { person, device } => {
                Event::DeviceAdded { person: see(&person)?, device }
            }
            Self::DeviceRemoved { person, device } => {
                Event::DeviceRemoved { person: see(&person)?, device }
            }
            Self::Rejoined { person, device } => Event::Rejoined { person: see(&person)?, device },
            Self::Renamed { by, name } => Event::Renamed { by: see(&by)?, name },
            Self::Promoted { members } => Event::Promoted { members: all(members)? },
            Self::Demoted { members } => Event::Demoted { members: all(members)? },
            Self::NotChanged { reason } => Event::NotChanged { reason },
            Self::Added { members } => Event::Added { members: all(members)? },
            Self::Removed { by, members } => {
                let members = all(members)?;
                Event::Removed { by: by.as_ref().map(see).transpose()?, members }
            }
            Self::Unreadable { from, reason } => {
                Event::Unreadable { from: from.as_ref().map(see).transpose()?, reason }
            }
            Self::Missing { first, last } => Event::Missing { first, last },
            Self::WentBack => Event::WentBack,
            Self::Restored => Event::Restored,
            Self::NewKey { person } => Event::NewKey { person: see(&person)? },
            Self::NameRefuted { person, claimed } => {
                Event::NameRefuted { person: see(&person)?, claimed }
            }
            Self::Undeliverable { to, reason } => Event::Undeliverable { to: see(&to)?, reason },
        })
    }
}

/// An entry as it is saved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Kept {
    pub(crate) entry: Entry<IdentityKey>,
    pub(crate) seen: bool,
}

/// All entries of a profile. None is ever removed.
#[derive(Debug)]
pub(crate) struct Log {
    database: Database,
}

impl Log {
    pub(super) fn new(database: &Database) -> Self {
        Self { database: database.clone() }
    }

    /// Adds an entry about others, which must be shown.
    pub(crate) fn push(
        &self,
        conversation: Option<ConversationId>,
        at: UnixMillis,
        event: Event<IdentityKey>,
    ) -> Result<EntryId, DatabaseError> {
        self.add(Kept { entry: self.next(conversation, at, event)?, seen: false })
    }

    /// Adds an entry about an action of ours, which counts as seen.
    pub(crate) fn push_own(
        &self,
        conversation: ConversationId,
        at: UnixMillis,
        event: Event<IdentityKey>,
    ) -> Result<EntryId, DatabaseError> {
        self.add(Kept { entry: self.next(Some(conversation), at, event)?, seen: true })
    }

    fn next(
        &self,
        conversation: Option<ConversationId>,
        at: UnixMillis,
        event: Event<IdentityKey>,
    ) -> Result<Entry<IdentityKey>, DatabaseError> {
        let id = EntryId(self.database.next_number(ENTRIES)?);
        Ok(Entry { id, conversation, at, event })
    }

    /// Adds an entry that was saved elsewhere.
    pub(crate) fn restore(&self, kept: &Kept) -> Result<(), DatabaseError> {
        self.add(kept.clone()).map(drop)
    }

    fn add(&self, kept: Kept) -> Result<EntryId, DatabaseError> {
        let Entry { id, conversation, at, .. } = kept.entry;
        let lane = conversation_key(conversation);
        let new = NewItem { key: None, lane: Some(&lane), open: !kept.seen };
        self.database.insert(ENTRIES, id.0, new, &encode(&SavedEntry::from(&kept)))?;
        if let Some(conversation) = conversation {
            let saved = SavedConversation::new(conversation, at);
            self.database.put(CONVERSATIONS, &lane, None, &encode(&saved))?;
        }
        Ok(id)
    }

    /// Returns the last `limit` entries of a conversation, oldest first.
    pub(crate) fn last_of(
        &self,
        conversation: &ConversationId,
        limit: usize,
    ) -> Result<Vec<Entry<IdentityKey>>, DatabaseError> {
        let lane = conversation_key(Some(*conversation));
        let limit = u32::try_from(limit).unwrap_or(u32::MAX);
        let last = self.database.last_in_lane(ENTRIES, &lane, limit)?;
        last.into_iter().rev().map(|item| Ok(read(&item)?.entry)).collect()
    }

    /// Returns up to `limit` unseen entries after `after`, oldest first.
    pub(crate) fn unseen(
        &self,
        after: Option<EntryId>,
        limit: usize,
    ) -> Result<Vec<Entry<IdentityKey>>, DatabaseError> {
        let limit = u32::try_from(limit).unwrap_or(u32::MAX);
        let items = self.database.open_items(ENTRIES, after.map(|id| id.0), limit)?;
        items.into_iter().map(|item| Ok(read(&item)?.entry)).collect()
    }

    /// Returns the number that the next entry will have.
    pub(crate) fn end(&self) -> Result<EntryId, DatabaseError> {
        self.database.next_number(ENTRIES).map(EntryId)
    }

    /// Returns up to `limit` entries for a stream that began when [`Log::end`] was `start`, and the
    /// last entry that was examined; `None` at the end.
    ///
    /// Of the entries before `start`, the unseen ones are returned. Of later entries, all about
    /// others are returned, also seen ones: another stream may have shown them first.
    pub(crate) fn to_show(
        &self,
        after: Option<EntryId>,
        start: EntryId,
        limit: usize,
    ) -> Result<(Vec<Entry<IdentityKey>>, Option<EntryId>), DatabaseError> {
        let mut unseen = self.unseen(after, limit)?;
        unseen.retain(|entry| entry.id < start);
        if let Some(last) = unseen.last().map(|entry| entry.id) {
            return Ok((unseen, Some(last)));
        }
        let after = after.map(|id| id.0).max(start.0.checked_sub(1));
        let limit = u32::try_from(limit).unwrap_or(u32::MAX);
        let items = self.database.items_after(ENTRIES, after, limit)?;
        let last = items.last().map(|item| EntryId(item.number));
        let mut entries = Vec::with_capacity(items.len());
        for item in items {
            let kept = decode::<SavedEntry>(&item.value)?.restore()?;
            // `kept.seen` is the state when the entry was added. Only the item notes that it was
            // seen later.
            if !kept.seen {
                entries.push(kept.entry);
            }
        }
        Ok((entries, last))
    }

    /// Returns the number of unseen entries of a conversation.
    pub(crate) fn count_unseen(&self, id: &ConversationId) -> Result<usize, DatabaseError> {
        let count = self.database.count_open(ENTRIES, &conversation_key(Some(*id)))?;
        Ok(usize::try_from(count).unwrap_or(usize::MAX))
    }

    /// Marks entries as seen.
    pub(crate) fn mark_seen(&self, ids: &[EntryId]) -> Result<(), DatabaseError> {
        for id in ids {
            self.database.set_open(ENTRIES, id.0, false)?;
        }
        Ok(())
    }

    /// Marks all entries of a conversation as seen.
    pub(crate) fn mark_all_seen(&self, id: ConversationId) -> Result<(), DatabaseError> {
        let unseen = self.unseen(None, usize::MAX)?;
        let of_it = unseen.into_iter().filter(|entry| entry.conversation == Some(id));
        self.mark_seen(&of_it.map(|entry| entry.id).collect::<Vec<_>>())
    }

    /// Returns every conversation that has entries, with the time of the last one.
    pub(crate) fn conversations(&self) -> Result<Vec<(ConversationId, UnixMillis)>, DatabaseError> {
        let rows = self.database.all(CONVERSATIONS)?;
        rows.iter()
            .map(|row| {
                let saved: SavedConversation = decode(row)?;
                Ok((saved.id()?, UnixMillis(saved.last)))
            })
            .collect()
    }

    /// Returns an entry.
    pub(crate) fn get(&self, id: EntryId) -> Result<Option<Kept>, DatabaseError> {
        self.database.item(ENTRIES, id.0)?.as_ref().map(read).transpose()
    }

    /// Returns the delivery state of our message with this id.
    pub(crate) fn delivery(&self, id: EntryId) -> Result<Option<DeliveryState>, DatabaseError> {
        Ok(match self.get(id)?.map(|kept| kept.entry.event) {
            Some(Event::Sent { delivery, .. }) => Some(delivery),
            _ => None,
        })
    }

    /// Sets the delivery state of our message.
    pub(crate) fn set_delivery(
        &self,
        id: EntryId,
        new: DeliveryState,
    ) -> Result<(), DatabaseError> {
        let Some(mut kept) = self.get(id)? else { return Ok(()) };
        if let Event::Sent { delivery, .. } = &mut kept.entry.event {
            *delivery = new;
            self.database.replace_item(ENTRIES, id.0, &encode(&SavedEntry::from(&kept)))?;
        }
        Ok(())
    }

    /// Reserves the numbers below `next`.
    pub(crate) fn skip_to(&self, next: EntryId) -> Result<(), DatabaseError> {
        self.database.skip_numbers(ENTRIES, next.0)
    }
}

fn read(item: &Item) -> Result<Kept, DatabaseError> {
    let mut kept = decode::<SavedEntry>(&item.value)?.restore()?;
    kept.seen = !item.open;
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_was_not_seen_is_ever_removed() {
        let log = Log::new(&Database::in_memory());
        let one = ConversationId::Direct(IdentityKey::new([1; 32]));
        let from = IdentityKey::new([1; 32]);
        for n in 0..1_200_u32 {
            let text = n.to_string();
            let event = Event::Received { from, text, sent_at: UnixMillis(0), file: None };
            log.push(Some(one), UnixMillis(u64::from(n)), event).unwrap();
            log.push(None, UnixMillis(0), Event::Unreadable { from: None, reason: n.to_string() })
                .unwrap();
        }
        assert_eq!(log.unseen(None, usize::MAX).unwrap().len(), 2_400);
        assert_eq!(log.count_unseen(&one).unwrap(), 1_200);
        let first = log.unseen(None, 3).unwrap();
        log.mark_seen(&first.iter().map(|entry| entry.id).collect::<Vec<_>>()).unwrap();
        assert_eq!(log.unseen(None, usize::MAX).unwrap().len(), 2_397);
        assert_eq!(log.unseen(Some(EntryId(2_300)), usize::MAX).unwrap().len(), 99);
        assert_eq!(log.last_of(&one, 2).unwrap().len(), 2);
        assert_eq!(log.conversations().unwrap(), [(one, UnixMillis(1_199))]);
    }

    #[test]
    fn a_stream_has_each_new_entry_once_also_if_another_stream_was_first() {
        let log = Log::new(&Database::in_memory());
        let one = ConversationId::Direct(IdentityKey::new([1; 32]));
        let push = || log.push(Some(one), UnixMillis(0), Event::Restored).unwrap();
        let read = |mut after, start| {
            let mut ids = Vec::new();
            loop {
                let (entries, last) = log.to_show(after, start, 2).unwrap();
                ids.extend(entries.iter().map(|entry| entry.id));
                if last.is_none() {
                    return (ids, after);
                }
                after = last;
            }
        };
        let before = [push(), push(), push(), push()];
        log.mark_seen(&before[..1]).unwrap();
        let start = log.end().unwrap();
        let (shown, after) = read(None, start);
        assert_eq!(shown, before[1..]);
        // Another stream has shown all entries but the first new one.
        let new = [push(), push(), push()];
        log.mark_seen(&before).unwrap();
        log.mark_seen(&new[1..]).unwrap();
        for _ in 0..5 {
            log.push_own(one, UnixMillis(0), Event::Restored).unwrap();
        }
        let last = push();
        let (shown, after) = read(after, start);
        assert_eq!(shown, [new[0], new[1], new[2], last]);
        assert_eq!(read(after, start).0, []);
    }
}
