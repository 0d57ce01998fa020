//! What happened in the conversations: messages sent and received, members coming and going, and
//! what the reader of an inbox must know (something was missing, something could not be read). Kept
//! inside the profile's encrypted state.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
};

use qpq_domain::{IdentityKey, Seq, UnixMillis, Username};
use qpq_mls::{GroupId, GroupSummary, Kind};

use super::people::Person;

/// Entries kept of one conversation once they were seen.
const KEPT: usize = 1_000;
/// Entries, and bytes of text, kept of one conversation at all: nobody can fill the disk.
const MOST: usize = 10_000;
const MOST_BYTES: usize = 16 << 20;
/// Entries kept that belong to no conversation, seen or not: whoever knows our key can make such.
const KEPT_NOTICES: usize = 200;

/// A conversation: with one person, or a group.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ConversationId {
    /// With the owner of this key.
    Direct(IdentityKey),
    Group(GroupId),
}

impl ConversationId {
    /// The conversation that an MLS group is (part of), as `me` sees it.
    pub(crate) fn of(group: &GroupSummary, me: &IdentityKey) -> Self {
        match &group.kind {
            Kind::Direct { peer } if group.maker == *me => Self::Direct(*peer),
            Kind::Direct { .. } => Self::Direct(group.maker),
            Kind::Group { .. } => Self::Group(group.id),
        }
    }
}

impl fmt::Display for ConversationId {
    /// 64 hexadecimal digits: the person's key or the group's id.
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

/// An entry's number in its profile, rising.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EntryId(pub u64);

/// One thing that happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry<P = Person> {
    pub id: EntryId,
    /// `None`: it belongs to no conversation.
    pub conversation: Option<ConversationId>,
    /// When the server took the message; for our own, when it was written.
    pub at: UnixMillis,
    pub event: Event<P>,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event<P = Person> {
    /// We wrote.
    Sent { text: String, delivery: Delivery },
    /// Somebody wrote. `sent_at` is by the sender's clock.
    Received { from: P, text: String, sent_at: UnixMillis },
    /// `by` took us into the conversation.
    Joined { by: P },
    /// Somebody was taken into the group.
    Added { members: Vec<P> },
    /// Somebody was removed from the group, maybe we.
    Removed { members: Vec<P> },
    /// Something in the inbox could not be read; it is gone.
    Unreadable { reason: String },
    /// These messages of the inbox never came: they expired, or another client took them.
    Missing { first: Seq, last: Seq },
    /// Somebody in a conversation of ours claims a name that the directory does not give to its
    /// key.
    NameRefuted { person: P, claimed: Username },
    /// Somebody in a conversation of ours has a name that was confirmed for another key before.
    NewKey { person: P },
    /// The server will not take a message of ours for this person.
    Undeliverable { to: P, reason: String },
}

/// How far a message of ours got.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Delivery {
    /// On this machine, until the server can be reached.
    Queued,
    /// The server has it, durably, for everyone.
    Sent,
    /// The server refused it for somebody, for good.
    Failed,
}

impl<P> Event<P> {
    /// The same event with its people seen in another way.
    pub(crate) fn map<Q>(&self, mut see: impl FnMut(&P) -> Q) -> Event<Q> {
        match self {
            Self::Sent { text, delivery } => {
                Event::Sent { text: text.clone(), delivery: *delivery }
            }
            Self::Received { from, text, sent_at } => {
                Event::Received { from: see(from), text: text.clone(), sent_at: *sent_at }
            }
            Self::Joined { by } => Event::Joined { by: see(by) },
            Self::Added { members } => Event::Added { members: members.iter().map(see).collect() },
            Self::Removed { members } => {
                Event::Removed { members: members.iter().map(see).collect() }
            }
            Self::Unreadable { reason } => Event::Unreadable { reason: reason.clone() },
            Self::Missing { first, last } => Event::Missing { first: *first, last: *last },
            Self::NewKey { person } => Event::NewKey { person: see(person) },
            Self::NameRefuted { person, claimed } => {
                Event::NameRefuted { person: see(person), claimed: claimed.clone() }
            }
            Self::Undeliverable { to, reason } => {
                Event::Undeliverable { to: see(to), reason: reason.clone() }
            }
        }
    }
}

/// An entry as it is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Kept {
    pub(crate) entry: Entry<IdentityKey>,
    pub(crate) seen: bool,
}

/// All entries of a profile.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Log {
    next: u64,
    conversations: BTreeMap<Option<ConversationId>, Entries>,
}

/// The entries of one conversation.
#[derive(Debug, Default, PartialEq, Eq)]
struct Entries {
    kept: VecDeque<Kept>,
    bytes: usize,
}

impl Entries {
    fn push(&mut self, entry: Kept) {
        self.bytes += entry.text_len();
        self.kept.push_back(entry);
    }

    fn has_too_many(&self) -> bool {
        let Some(first) = self.kept.front() else { return false };
        let len = self.kept.len();
        match first.entry.conversation {
            None => len > KEPT_NOTICES,
            Some(_) => len > MOST || self.bytes > MOST_BYTES || (len > KEPT && first.seen),
        }
    }

    fn drop_first(&mut self) {
        if let Some(first) = self.kept.pop_front() {
            self.bytes -= first.text_len();
        }
    }
}

impl Kept {
    fn text_len(&self) -> usize {
        match &self.entry.event {
            Event::Sent { text, .. } | Event::Received { text, .. } => text.len(),
            _ => 0,
        }
    }
}

impl Log {
    /// Adds what somebody else did; it is to be shown.
    pub(crate) fn push(
        &mut self,
        conversation: Option<ConversationId>,
        at: UnixMillis,
        event: Event<IdentityKey>,
    ) -> EntryId {
        let id = EntryId(self.next);
        self.restore(Kept { entry: Entry { id, conversation, at, event }, seen: false });
        id
    }

    /// Adds what we did, which need not be shown to us.
    pub(crate) fn push_own(
        &mut self,
        conversation: ConversationId,
        at: UnixMillis,
        event: Event<IdentityKey>,
    ) -> EntryId {
        let (id, conversation) = (EntryId(self.next), Some(conversation));
        self.restore(Kept { entry: Entry { id, conversation, at, event }, seen: true });
        id
    }

    /// Puts an entry back that was saved.
    pub(crate) fn restore(&mut self, kept: Kept) {
        self.next = self.next.max(kept.entry.id.0 + 1);
        let conversation = kept.entry.conversation;
        let entries = self.conversations.entry(conversation).or_default();
        entries.push(kept);
        while entries.has_too_many() {
            entries.drop_first();
        }
    }

    /// Every entry, in the order in which they came to each conversation.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Kept> {
        self.conversations.values().flat_map(|entries| &entries.kept)
    }

    /// A conversation's entries, oldest first.
    pub(crate) fn of(
        &self,
        conversation: &ConversationId,
    ) -> impl DoubleEndedIterator<Item = &Kept> {
        self.conversations.get(&Some(*conversation)).into_iter().flat_map(|entries| &entries.kept)
    }

    /// What was not seen yet, oldest first.
    pub(crate) fn unseen(&self) -> Vec<&Entry<IdentityKey>> {
        let mut unseen: Vec<_> =
            self.all().filter(|kept| !kept.seen).map(|kept| &kept.entry).collect();
        unseen.sort_unstable_by_key(|entry| entry.id);
        unseen
    }

    /// Marks entries as seen; answers whether anything changed.
    pub(crate) fn mark_seen(&mut self, ids: &[EntryId]) -> bool {
        let mut changed = false;
        for kept in self.conversations.values_mut().flat_map(|entries| &mut entries.kept) {
            if !kept.seen && ids.contains(&kept.entry.id) {
                kept.seen = true;
                changed = true;
            }
        }
        changed
    }

    /// Which conversation an entry belongs to.
    pub(crate) fn conversation(&self, id: EntryId) -> Option<ConversationId> {
        self.all().find(|kept| kept.entry.id == id)?.entry.conversation
    }

    /// How far our message got, if it is still here.
    pub(crate) fn delivery(&self, id: EntryId) -> Option<Delivery> {
        match self.all().find(|kept| kept.entry.id == id)?.entry.event {
            Event::Sent { delivery, .. } => Some(delivery),
            _ => None,
        }
    }

    /// The same, to be changed.
    pub(crate) fn delivery_mut(&mut self, id: EntryId) -> Option<&mut Delivery> {
        let mut entries = self.conversations.values_mut().flat_map(|entries| &mut entries.kept);
        match &mut entries.find(|kept| kept.entry.id == id)?.entry.event {
            Event::Sent { delivery, .. } => Some(delivery),
            _ => None,
        }
    }

    /// The number that the next entry gets.
    pub(crate) fn next(&self) -> EntryId {
        EntryId(self.next)
    }

    /// Gives no number below this one from now on.
    pub(crate) fn skip_to(&mut self, next: EntryId) {
        self.next = self.next.max(next.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(n: usize) -> Event<IdentityKey> {
        Event::Sent { text: n.to_string(), delivery: Delivery::Queued }
    }

    fn received(n: usize) -> Event<IdentityKey> {
        let from = IdentityKey::new([1; 32]);
        Event::Received { from, text: n.to_string(), sent_at: UnixMillis(0) }
    }

    #[test]
    fn old_entries_go_but_what_was_not_seen_stays() {
        let mut log = Log::default();
        let (one, other) =
            ([1, 2].map(|n| ConversationId::Direct(IdentityKey::new([n; 32])))).into();
        for n in 0..KEPT + 5 {
            log.push_own(one, UnixMillis(0), sent(n));
            log.push(Some(other), UnixMillis(0), received(n));
        }
        assert_eq!(log.of(&one).count(), KEPT);
        assert_eq!(log.of(&other).count(), KEPT + 5);
        let ids: Vec<_> = log.unseen().iter().map(|entry| entry.id).collect();
        assert!(log.mark_seen(&ids));
        assert!(!log.mark_seen(&ids));
        log.push(Some(other), UnixMillis(0), received(0));
        assert_eq!(log.of(&other).count(), KEPT);
        assert_eq!(log.unseen().len(), 1);
    }

    #[test]
    fn nobody_can_fill_the_disk() {
        let mut log = Log::default();
        let one = ConversationId::Direct(IdentityKey::new([1; 32]));
        for n in 0..MOST + 5 {
            log.push(Some(one), UnixMillis(0), received(n));
        }
        assert_eq!(log.of(&one).count(), MOST);
        let text = "x".repeat(MOST_BYTES / 4);
        for _ in 0..9 {
            let event = Event::Received {
                from: IdentityKey::new([1; 32]),
                text: text.clone(),
                sent_at: UnixMillis(0),
            };
            log.push(Some(one), UnixMillis(0), event);
        }
        assert_eq!(log.of(&one).count(), 4);
    }

    #[test]
    fn strangers_cannot_fill_the_disk_with_rubbish() {
        let mut log = Log::default();
        for n in 0..KEPT_NOTICES + 5 {
            log.push(None, UnixMillis(0), Event::Unreadable { reason: n.to_string() });
        }
        assert_eq!(log.unseen().len(), KEPT_NOTICES);
    }
}
