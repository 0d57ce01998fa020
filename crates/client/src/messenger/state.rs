//! All that a profile keeps encrypted, and its bytes: protobuf, the format of this client alone.

use prost::Message as _;
use qpq_domain::{ChannelId, IdentityKey, MessageId, Seq, SessionToken, UnixMillis, Username};
use qpq_mls::GroupId;
use zeroize::{Zeroize as _, Zeroizing};

use super::{
    log::{ConversationId, Delivery, Entry, EntryId, Event, Kept, Log},
    outbox::{Outbox, Outgoing},
    people::{People, Standing},
};

/// A profile's state in memory. What is changed here is saved before anything of it leaves the
/// machine.
#[derive(Debug)]
pub(crate) struct State {
    /// The session to use until it ends.
    pub(crate) token: Option<SessionToken>,
    pub(crate) mls: qpq_mls::Client,
    /// The last message of the inbox that was taken in.
    pub(crate) cursor: Seq,
    pub(crate) outbox: Outbox,
    pub(crate) log: Log,
    pub(crate) people: People,
}

/// The bytes are no state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Corrupt(String);

impl Corrupt {
    fn new(what: impl ToString) -> Self {
        Self(what.to_string())
    }
}

impl State {
    pub(crate) fn new(identity: qpq_mls::Identity, username: Username) -> Self {
        let mut people = People::default();
        people.set(identity.public(), username.clone(), Standing::Own);
        Self {
            token: None,
            mls: qpq_mls::Client::new(identity, username),
            cursor: Seq::ZERO,
            outbox: Outbox::default(),
            log: Log::default(),
            people,
        }
    }

    pub(crate) fn me(&self) -> IdentityKey {
        self.mls.identity().public()
    }

    /// The conversation that a group of ours is part of.
    pub(crate) fn conversation_of(&self, group: &GroupId) -> Option<ConversationId> {
        self.mls.group(group).map(|summary| ConversationId::of(&summary, &self.me()))
    }

    pub(crate) fn encode(&self) -> Zeroizing<Vec<u8>> {
        let mut saved = Saved {
            token: self.token.as_ref().map(|token| token.expose().to_vec()).unwrap_or_default(),
            mls: self.mls.export_state().to_vec(),
            cursor: self.cursor.0,
            outbox: self.outbox.iter().map(SavedOutgoing::from).collect(),
            log: self.log.all().map(SavedEntry::from).collect(),
            people: self
                .people
                .iter()
                .map(|(identity, known)| SavedPerson {
                    identity: identity.as_bytes().to_vec(),
                    username: known.username.as_str().to_owned(),
                    standing: standing_code(known.standing),
                    compared_at: known.compared_at.map(|at| at.0),
                })
                .collect(),
            next_entry: self.log.next().0,
        };
        let mut bytes = Zeroizing::new(Vec::with_capacity(saved.encoded_len()));
        saved.encode(&mut *bytes).expect("a Vec grows as needed");
        saved.wipe();
        bytes
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Corrupt> {
        let mut saved = Saved::decode(bytes).map_err(Corrupt::new)?;
        let state = Self::restore(&saved);
        saved.wipe();
        state
    }

    fn restore(saved: &Saved) -> Result<Self, Corrupt> {
        let token = (!saved.token.is_empty())
            .then(|| SessionToken::try_from(&saved.token[..]))
            .transpose()
            .map_err(Corrupt::new)?;
        let mls = qpq_mls::Client::import_state(&saved.mls).map_err(Corrupt::new)?;
        let mut state = Self {
            token,
            cursor: Seq(saved.cursor),
            ..Self::new(mls.identity().clone(), mls.username().clone())
        };
        state.mls = mls;
        for item in &saved.outbox {
            state.outbox.restore(item.restore()?);
        }
        for entry in &saved.log {
            state.log.restore(entry.restore()?);
        }
        state.log.skip_to(EntryId(saved.next_entry));
        for person in &saved.people {
            let username = Username::parse(&person.username).map_err(Corrupt::new)?;
            let identity = key(&person.identity)?;
            state.people.set(identity, username, standing(person.standing)?);
            if let Some(at) = person.compared_at {
                state.people.set_compared(&identity, UnixMillis(at));
            }
        }
        Ok(state)
    }
}

#[derive(Clone, PartialEq, prost::Message)]
struct Saved {
    #[prost(bytes = "vec", tag = "1")]
    token: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    mls: Vec<u8>,
    #[prost(uint64, tag = "3")]
    cursor: u64,
    #[prost(message, repeated, tag = "4")]
    outbox: Vec<SavedOutgoing>,
    #[prost(message, repeated, tag = "5")]
    log: Vec<SavedEntry>,
    #[prost(message, repeated, tag = "6")]
    people: Vec<SavedPerson>,
    #[prost(uint64, tag = "7")]
    next_entry: u64,
}

impl Saved {
    fn wipe(&mut self) {
        self.token.zeroize();
        self.mls.zeroize();
        for entry in &mut self.log {
            entry.text.zeroize();
        }
    }
}

#[derive(Clone, PartialEq, prost::Message)]
struct SavedPerson {
    #[prost(bytes = "vec", tag = "1")]
    identity: Vec<u8>,
    #[prost(string, tag = "2")]
    username: String,
    #[prost(uint32, tag = "3")]
    standing: u32,
    #[prost(uint64, optional, tag = "4")]
    compared_at: Option<u64>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct SavedOutgoing {
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
    fn restore(&self) -> Result<Outgoing, Corrupt> {
        Ok(Outgoing {
            message_id: MessageId::try_from(&self.message_id[..]).map_err(Corrupt::new)?,
            recipients: self.recipients.iter().map(|bytes| key(bytes)).collect::<Result<_, _>>()?,
            channel: ChannelId::try_from(&self.channel[..]).map_err(Corrupt::new)?,
            payload: self.payload.clone(),
            entry: self.entry.map(EntryId),
        })
    }
}

/// Every kind of event in one flat record; `kind` says which fields count.
#[derive(Clone, PartialEq, prost::Message)]
struct SavedEntry {
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
    text: String,
    #[prost(bytes = "vec", repeated, tag = "8")]
    people: Vec<Vec<u8>>,
    #[prost(uint64, repeated, tag = "9")]
    numbers: Vec<u64>,
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
        let (kind, text, people, numbers): (_, &str, &[IdentityKey], Vec<u64>) = match event {
            Event::Sent { text, delivery } => (1, text, &[], vec![delivery_code(*delivery)]),
            Event::Received { from, text, sent_at } => (2, text, &[*from], vec![sent_at.0]),
            Event::Joined { by } => (3, "", &[*by], vec![]),
            Event::Added { members } => (4, "", members, vec![]),
            Event::Removed { members } => (5, "", members, vec![]),
            Event::Unreadable { reason } => (6, reason, &[], vec![]),
            Event::Missing { first, last } => (7, "", &[], vec![first.0, last.0]),
            Event::NameRefuted { person, claimed } => (8, claimed.as_str(), &[*person], vec![]),
            Event::Undeliverable { to, reason } => (9, reason, &[*to], vec![]),
            Event::NewKey { person } => (20, "", &[*person], vec![]),
        };
        self.kind = kind;
        text.clone_into(&mut self.text);
        self.people = people.iter().map(|key| key.as_bytes().to_vec()).collect();
        self.numbers = numbers;
    }

    fn restore(&self) -> Result<Kept, Corrupt> {
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

    fn event(&self) -> Result<Event<IdentityKey>, Corrupt> {
        let people: Vec<_> =
            self.people.iter().map(|bytes| key(bytes)).collect::<Result<_, _>>()?;
        let text = self.text.clone();
        Ok(match (self.kind, &people[..], &self.numbers[..]) {
            (1, [], &[code]) => Event::Sent { text, delivery: delivery(code)? },
            (2, &[from], &[at]) => Event::Received { from, text, sent_at: UnixMillis(at) },
            (3, &[by], []) => Event::Joined { by },
            (4, _, []) => Event::Added { members: people },
            (5, _, []) => Event::Removed { members: people },
            (6, [], []) => Event::Unreadable { reason: text },
            (7, [], &[first, last]) => Event::Missing { first: Seq(first), last: Seq(last) },
            (8, &[person], []) => Event::NameRefuted {
                person,
                claimed: Username::parse(&text).map_err(Corrupt::new)?,
            },
            (9, &[to], []) => Event::Undeliverable { to, reason: text },
            (20, &[person], []) => Event::NewKey { person },
            _ => return Err(Corrupt::new("an entry of a kind that this version does not know")),
        })
    }
}

fn key(bytes: &[u8]) -> Result<IdentityKey, Corrupt> {
    IdentityKey::try_from(bytes).map_err(Corrupt::new)
}

const fn delivery_code(delivery: Delivery) -> u64 {
    match delivery {
        Delivery::Queued => 0,
        Delivery::Sent => 1,
        Delivery::Failed => 2,
    }
}

fn delivery(code: u64) -> Result<Delivery, Corrupt> {
    [Delivery::Queued, Delivery::Sent, Delivery::Failed]
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

#[cfg(test)]
mod tests {
    use super::*;

    fn full() -> State {
        let [alice, eve] = ["alice", "eve"].map(|name| Username::parse(name).unwrap());
        let mut state = State::new(qpq_mls::Identity::from_seed(&[3; 32]), alice);
        let peer = IdentityKey::new([7; 32]);
        state.token = Some(SessionToken::new([5; 32]));
        state.cursor = Seq(12);
        state.people.claim(peer, &eve);
        let group =
            state.mls.create_group("friends", ChannelId::new([1; 16]), UnixMillis(1)).unwrap();
        let at = UnixMillis(9);
        let events = [
            Event::Sent { text: "hi".into(), delivery: Delivery::Failed },
            Event::Received { from: peer, text: "ho".into(), sent_at: at },
            Event::Joined { by: peer },
            Event::Added { members: vec![peer, peer] },
            Event::Removed { members: vec![peer] },
            Event::Unreadable { reason: "why".into() },
            Event::Missing { first: Seq(3), last: Seq(4) },
            Event::NameRefuted { person: peer, claimed: eve },
            Event::Undeliverable { to: peer, reason: "gone".into() },
            Event::NewKey { person: peer },
        ];
        let other = IdentityKey::new([9; 32]);
        state.people.judge(other, Username::parse("bob").unwrap());
        state.people.set_compared(&other, UnixMillis(6));
        state.people.judge(IdentityKey::new([10; 32]), Username::parse("bob").unwrap());
        let places = [None, Some(ConversationId::Direct(peer)), Some(ConversationId::Group(group))];
        for (event, place) in events.into_iter().zip(places.into_iter().cycle()) {
            state.log.push(place, at, event);
        }
        state.log.mark_seen(&[EntryId(2)]);
        state.outbox.restore(Outgoing {
            message_id: MessageId::new([8; 16]),
            recipients: vec![peer],
            channel: ChannelId::DEFAULT,
            payload: vec![1, 2],
            entry: Some(EntryId(0)),
        });
        state
    }

    #[test]
    fn what_is_saved_comes_back() {
        let state = full();
        let back = State::decode(&state.encode()).unwrap();
        assert_eq!(back.token.unwrap().expose(), &[5; 32]);
        assert_eq!((back.cursor, &back.outbox), (state.cursor, &state.outbox));
        assert_eq!((&back.log, &back.people), (&state.log, &state.people));
        assert_eq!(*back.mls.export_state(), *state.mls.export_state());
    }

    #[test]
    fn rubbish_is_refused() {
        let bytes = full().encode();
        assert!(State::decode(&bytes[..bytes.len() - 1]).is_err());
        assert!(State::decode(&[]).is_err());
        assert!(State::decode(b"rubbish").is_err());
    }
}
