//! The records of a profile's database, in protobuf. Only this client reads the format.

use prost::Message;
use qpq_domain::{ChannelId, IdentityKey, MessageId, Seq, UnixMillis, Username};
use qpq_mls::{GroupId, SharedFile, database::DatabaseError};
use zeroize::Zeroizing;

use super::{
    log::{ConversationId, DeliveryState, Entry, EntryId, Event, Kept},
    outbox::Outgoing,
    people::{Known, Standing},
};

/// The error about bytes that are not a valid record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Corrupt(String);

impl Corrupt {
    pub(super) fn new(what: impl ToString) -> Self {
        Self(what.to_string())
    }
}

impl From<Corrupt> for DatabaseError {
    fn from(error: Corrupt) -> Self {
        Self::Damaged(error.0)
    }
}

/// Encodes a record. The bytes are wiped when dropped.
pub(super) fn encode(record: &impl Message) -> Zeroizing<Vec<u8>> {
    let mut bytes = Zeroizing::new(Vec::with_capacity(record.encoded_len()));
    record.encode(&mut *bytes).expect("a Vec grows as needed");
    bytes
}

/// Decodes a record from bytes that [`encode`] returned.
pub(super) fn decode<R: Message + Default>(bytes: &[u8]) -> Result<R, DatabaseError> {
    R::decode(bytes).map_err(|error| DatabaseError::Damaged(error.to_string()))
}

/// Returns a conversation as bytes: its kind, and 32 bytes of a key or group id.
pub(super) fn conversation_key(conversation: Option<ConversationId>) -> Vec<u8> {
    match conversation {
        None => Vec::new(),
        Some(ConversationId::Direct(key)) => [b"d", &key.as_bytes()[..]].concat(),
        Some(ConversationId::Group(id)) => [b"g", &id.as_bytes()[..]].concat(),
    }
}

/// The record of a conversation that has a history.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SavedConversation {
    #[prost(bytes = "vec", tag = "1")]
    id: Vec<u8>,
    /// The time of the conversation's latest entry, in Unix milliseconds.
    #[prost(uint64, tag = "2")]
    pub(super) last: u64,
}

impl SavedConversation {
    pub(super) fn new(id: ConversationId, last: UnixMillis) -> Self {
        Self { id: conversation_key(Some(id)), last: last.0 }
    }

    pub(super) fn id(&self) -> Result<ConversationId, Corrupt> {
        match self.id.split_first() {
            Some((b'd', bytes)) => Ok(ConversationId::Direct(key(bytes)?)),
            Some((b'g', bytes)) => {
                Ok(ConversationId::Group(GroupId::try_from(bytes).map_err(Corrupt::new)?))
            }
            _ => Err(Corrupt::new("a conversation of an unknown kind")),
        }
    }
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SavedPerson {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) identity: Vec<u8>,
    #[prost(string, tag = "2")]
    pub(super) username: String,
    #[prost(uint32, tag = "3")]
    pub(super) standing: u32,
    #[prost(uint64, optional, tag = "4")]
    pub(super) compared_at: Option<u64>,
}

impl SavedPerson {
    pub(super) fn new(identity: &IdentityKey, known: &Known) -> Self {
        Self {
            identity: identity.as_bytes().to_vec(),
            username: known.username.as_str().to_owned(),
            standing: standing_code(known.standing),
            compared_at: known.compared_at.map(|at| at.0),
        }
    }

    pub(super) fn restore(&self) -> Result<(IdentityKey, Known), Corrupt> {
        let username = Username::parse(&self.username).map_err(Corrupt::new)?;
        let standing = standing(self.standing)?;
        let compared_at = self.compared_at.map(UnixMillis);
        Ok((key(&self.identity)?, Known { username, standing, compared_at }))
    }
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SavedOutgoing {
    #[prost(bytes = "vec", tag = "1")]
    message_id: Vec<u8>,
    #[prost(bytes = "vec", repeated, tag = "2")]
    recipients: Vec<Vec<u8>>,
    #[prost(bytes = "vec", tag = "3")]
    channel: Vec<u8>,
    #[prost(bytes = "vec", tag = "4")]
    payload: Vec<u8>,
    #[prost(uint64, optional, tag = "5")]
    entry: Option<u64>,
}

impl From<&Outgoing> for SavedOutgoing {
    fn from(item: &Outgoing) -> Self {
        Self {
            message_id: item.message_id.as_bytes().to_vec(),
            recipients: item.recipients.iter().map(|key| key.as_bytes().to_vec()).collect(),
            channel: item.channel.as_bytes().to_vec(),
            payload: item.payload.clone(),
            entry: item.entry.map(|id| id.0),
        }
    }
}

impl SavedOutgoing {
    pub(super) fn restore(&self) -> Result<Outgoing, Corrupt> {
        Ok(Outgoing {
            message_id: MessageId::try_from(&self.message_id[..]).map_err(Corrupt::new)?,
            recipients: self.recipients.iter().map(|bytes| key(bytes)).collect::<Result<_, _>>()?,
            channel: ChannelId::try_from(&self.channel[..]).map_err(Corrupt::new)?,
            payload: self.payload.clone(),
            entry: self.entry.map(EntryId),
        })
    }
}

/// Every kind of event in one flat record; `kind` determines the fields that are used.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SavedEntry {
    #[prost(uint64, tag = "1")]
    id: u64,
    /// 32 bytes of a key or group id; empty for no conversation.
    #[prost(bytes = "vec", tag = "2")]
    conversation: Vec<u8>,
    #[prost(bool, tag = "3")]
    is_group: bool,
    #[prost(uint64, tag = "4")]
    at: u64,
    #[prost(bool, tag = "5")]
    seen: bool,
    #[prost(uint32, tag = "6")]
    kind: u32,
    #[prost(string, tag = "7")]
    pub(super) text: String,
    #[prost(bytes = "vec", repeated, tag = "8")]
    people: Vec<Vec<u8>>,
    #[prost(uint64, repeated, tag = "9")]
    numbers: Vec<u64>,
    /// The encoding of a file.
    #[prost(bytes = "vec", optional, tag = "10")]
    file: Option<Vec<u8>>,
}

impl From<&Kept> for SavedEntry {
    fn from(kept: &Kept) -> Self {
        let Entry { id, conversation, at, event } = &kept.entry;
        let (is_group, conversation) = match conversation {
            None => (false, Vec::new()),
            Some(ConversationId::Direct(key)) => (false, key.as_bytes().to_vec()),
            Some(ConversationId::Group(id)) => (true, id.as_bytes().to_vec()),
        };
        let mut saved =
            Self { id: id.0, conversation, is_group, at: at.0, seen: kept.seen, ..Self::default() };
        saved.set_event(event);
        saved
    }
}

impl SavedEntry {
    fn set_event(&mut self, event: &Event<IdentityKey>) {
        let removed;
        let (kind, text, people, numbers): (_, &str, &[IdentityKey], Vec<u64>) = match event {
            Event::Sent { text, delivery, .. } => (1, text, &[], vec![delivery_code(*delivery)]),
            Event::Received { from, text, sent_at, .. } => (2, text, &[*from], vec![sent_at.0]),
            Event::Joined { by } => (3, "", &[*by], vec![]),
            Event::Added { members } => (4, "", members, vec![]),
            Event::Removed { by: None, members } => (5, "", members, vec![]),
            Event::Removed { by: Some(by), members } => {
                removed = [&[*by][..], members].concat();
                (29, "", &removed, vec![])
            }
            Event::Unreadable { from, reason } => (6, reason, from.as_slice(), vec![]),
            Event::Requested { by, group: Some(name) } => (12, name, &[*by], vec![]),
            Event::Requested { by, group: None } => (13, "", &[*by], vec![]),
            Event::WentBack => (10, "", &[], vec![]),
            Event::Restored => (11, "", &[], vec![]),
            Event::Missing { first, last } => (7, "", &[], vec![first.0, last.0]),
            Event::NameRefuted { person, claimed } => (8, claimed.as_str(), &[*person], vec![]),
            Event::Undeliverable { to, reason } => (9, reason, &[*to], vec![]),
            Event::NewKey { person } => (20, "", &[*person], vec![]),
            Event::DeviceAdded { person, device } => (21, device, &[*person], vec![]),
            Event::DeviceRemoved { person, device } => (22, device, &[*person], vec![]),
            Event::Rejoined { person, device } => (23, device, &[*person], vec![]),
            Event::Renamed { by, name } => (24, name, &[*by], vec![]),
            Event::Promoted { members } => (25, "", members, vec![]),
            Event::Demoted { members } => (26, "", members, vec![]),
            Event::NotChanged { reason } => (27, reason, &[], vec![]),
            Event::DeviceRequested { name } => (28, name, &[], vec![]),
        };
        self.kind = kind;
        text.clone_into(&mut self.text);
        self.people = people.iter().map(|key| key.as_bytes().to_vec()).collect();
        self.numbers = numbers;
        if let Event::Sent { file, .. } | Event::Received { file, .. } = event {
            self.file = file.as_ref().map(SharedFile::encode);
        }
    }

    pub(super) fn restore(&self) -> Result<Kept, Corrupt> {
        let conversation = match (&self.conversation[..], self.is_group) {
            ([], _) => None,
            (bytes, false) => Some(ConversationId::Direct(key(bytes)?)),
            (bytes, true) => {
                Some(ConversationId::Group(GroupId::try_from(bytes).map_err(Corrupt::new)?))
            }
        };
        let entry = Entry {
            id: EntryId(self.id),
            conversation,
            at: UnixMillis(self.at),
            event: self.event()?,
        };
        Ok(Kept { entry, seen: self.seen })
    }

    fn shared_file(&self) -> Result<Option<SharedFile>, Corrupt> {
        let decode = |bytes: &Vec<u8>| {
            SharedFile::decode(bytes).ok_or_else(|| Corrupt::new("the record of a file"))
        };
        self.file.as_ref().map(decode).transpose()
    }

    fn event(&self) -> Result<Event<IdentityKey>, Corrupt> {
        let people: Vec<_> =
            self.people.iter().map(|bytes| key(bytes)).collect::<Result<_, _>>()?;
        let text = self.text.clone();
        Ok(match (self.kind, &people[..], &self.numbers[..]) {
            (1, [], &[code]) => {
                Event::Sent { text, delivery: delivery(code)?, file: self.shared_file()? }
            }
            (2, &[from], &[at]) => {
                Event::Received { from, text, sent_at: UnixMillis(at), file: self.shared_file()? }
            }
            (3, &[by], []) => Event::Joined { by },
            (4, _, []) => Event::Added { members: people },
            (5, _, []) => Event::Removed { by: None, members: people },
            (29, [by, members @ ..], []) => {
                Event::Removed { by: Some(*by), members: members.to_vec() }
            }
            (6, [], []) => Event::Unreadable { from: None, reason: text },
            (6, &[from], []) => Event::Unreadable { from: Some(from), reason: text },
            (12, &[by], []) => Event::Requested { by, group: Some(text) },
            (13, &[by], []) => Event::Requested { by, group: None },
            (10, [], []) => Event::WentBack,
            (11, [], []) => Event::Restored,
            (7, [], &[first, last]) => Event::Missing { first: Seq(first), last: Seq(last) },
            (8, &[person], []) => Event::NameRefuted {
                person,
                claimed: Username::parse(&text).map_err(Corrupt::new)?,
            },
            (9, &[to], []) => Event::Undeliverable { to, reason: text },
            (20, &[person], []) => Event::NewKey { person },
            (21, &[person], []) => Event::DeviceAdded { person, device: text },
            (22, &[person], []) => Event::DeviceRemoved { person, device: text },
            (23, &[person], []) => Event::Rejoined { person, device: text },
            (24, &[by], []) => Event::Renamed { by, name: text },
            (25, _, []) => Event::Promoted { members: people },
            (26, _, []) => Event::Demoted { members: people },
            (27, [], []) => Event::NotChanged { reason: text },
            (28, [], []) => Event::DeviceRequested { name: text },
            _ => return Err(Corrupt::new("an entry of a kind that this version does not know")),
        })
    }
}

fn key(bytes: &[u8]) -> Result<IdentityKey, Corrupt> {
    IdentityKey::try_from(bytes).map_err(Corrupt::new)
}

const fn delivery_code(delivery: DeliveryState) -> u64 {
    match delivery {
        DeliveryState::Queued => 0,
        DeliveryState::Sent => 1,
        DeliveryState::Failed => 2,
    }
}

fn delivery(code: u64) -> Result<DeliveryState, Corrupt> {
    [DeliveryState::Queued, DeliveryState::Sent, DeliveryState::Failed]
        .into_iter()
        .find(|delivery| delivery_code(*delivery) == code)
        .ok_or_else(|| Corrupt::new("an unknown delivery"))
}

const fn standing_code(standing: Standing) -> u32 {
    match standing {
        Standing::Own => 0,
        Standing::Claimed => 1,
        Standing::Confirmed => 2,
        Standing::Refuted => 3,
        Standing::NewKey => 4,
    }
}

fn standing(code: u32) -> Result<Standing, Corrupt> {
    use Standing::{Claimed, Confirmed, NewKey, Own, Refuted};
    [Own, Claimed, Confirmed, Refuted, NewKey]
        .into_iter()
        .find(|standing| standing_code(*standing) == code)
        .ok_or_else(|| Corrupt::new("an unknown standing"))
}
