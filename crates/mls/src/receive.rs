//! What a client does with bytes that it is sent. Whatever they are, it neither panics nor loses
//! what it had.

use openmls::prelude::{MlsMessageBodyIn, MlsMessageIn, PrivateMessageIn, Welcome};
use qpq_domain::ChannelId;
use sha2::{Digest as _, Sha256};
use tls_codec::DeserializeBytes as _;

use crate::{
    client::Client,
    content::Content,
    group::{Group, GroupSummary, Outcome},
    identity::Member,
    profile::GroupId,
    waiting::{Held, Needs},
};

/// What a message turned out to be.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Received {
    /// We are in a group: a new one, or one that its maker added us to again. `members` are to be
    /// compared with the directory; the inviter is `maker`.
    Joined(GroupSummary),
    Message {
        group: GroupId,
        channel: ChannelId,
        sender: Member,
        content: Content,
    },
    /// The group's maker changed who is in it. `added` are to be compared with the directory.
    Committed {
        group: GroupId,
        added: Vec<Member>,
        removed: Vec<Member>,
    },
    /// It came too early and is kept until what it needs is there. It may be acknowledged once the
    /// state is saved.
    Buffered,
    /// It was here before. It may be acknowledged.
    Duplicate,
    /// It has no effect and never will. It may be acknowledged.
    Ignored(Ignored),
}

/// Why a message has no effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum Ignored {
    #[error("not a private MLS message or Welcome of ours")]
    NotMls,
    #[error("a Welcome for a key package that is not here any more")]
    NotForUs,
    #[error("a Welcome that is forged, broken, or not its group's maker's")]
    BadWelcome,
    #[error("a change to the group by someone other than its maker")]
    NotTheMaker,
    #[error("a change to the group that not even its maker may make")]
    ForbiddenCommit,
    /// openmls compares lifetimes with the time of reading, not of sending. The group goes on
    /// without us from here.
    #[error(
        "a change to the group, read after the added member's key package ran out: ask its maker to add us again"
    )]
    LifetimeOver,
    #[error("we are not in the group any more")]
    NoLongerMember,
    #[error("our own message")]
    OwnMessage,
    #[error("too old: its keys were deleted")]
    TooOld,
    #[error("too far ahead of what was received from its sender")]
    TooFarAhead,
    #[error("not encrypted with the group's keys")]
    Undecryptable,
    #[error("against the rules of MLS")]
    Invalid,
    #[error("a kind of message that this client does not know")]
    UnknownContent,
}

impl Client {
    /// Takes in one message. The first result is about it; further ones are about messages that
    /// waited for it.
    ///
    /// See the crate's documentation on saving before acknowledging.
    pub fn receive(&mut self, bytes: &[u8]) -> Vec<Received> {
        let Ok(message) = MlsMessageIn::tls_deserialize_exact_bytes(bytes) else {
            return vec![Received::Ignored(Ignored::NotMls)];
        };
        match message.extract() {
            MlsMessageBodyIn::PrivateMessage(message) => self.receive_private(message, bytes),
            MlsMessageBodyIn::Welcome(welcome) => self.receive_welcome(welcome, bytes),
            // Everything else travels in the open, where our groups say nothing; an external commit
            // above all.
            _ => vec![Received::Ignored(Ignored::NotMls)],
        }
    }

    fn receive_private(&mut self, message: PrivateMessageIn, bytes: &[u8]) -> Vec<Received> {
        let Ok(id) = GroupId::try_from(message.group_id().as_slice()) else {
            return vec![Received::Ignored(Ignored::NotMls)];
        };
        let epoch = message.epoch().as_u64();
        let needs = match self.groups.get(&id) {
            None => Some(Needs::Welcome),
            Some(group) if group.is_active() && epoch > group.epoch() => Some(Needs::Commit),
            Some(_) => None,
        };
        if let Some(needs) = needs {
            return vec![match self.waiting.hold(id, epoch, needs, bytes) {
                Held::New => Received::Buffered,
                Held::Already => Received::Duplicate,
            }];
        }
        let first = self.process(id, message);
        let mut results = vec![first];
        if matches!(results[0], Received::Committed { .. }) {
            self.retry(id, &mut results);
        }
        results
    }

    fn receive_welcome(&mut self, welcome: Welcome, bytes: &[u8]) -> Vec<Received> {
        let digest: [u8; 32] = Sha256::digest(bytes).into();
        if self.groups.values().any(|group| group.was_joined_by(&digest)) {
            return vec![Received::Duplicate];
        }
        let Some(package) = self.packages.addressed_by(&welcome) else {
            return vec![Received::Ignored(Ignored::NotForUs)];
        };
        let group = match Group::join(package, welcome, digest, &self.identity.public()) {
            Ok(group) => group,
            Err(reason) => return vec![Received::Ignored(reason)],
        };
        let reference = package.reference().to_vec();
        let id = group.id();
        // The id binds the maker, so this is the same maker's word about the same group; the later
        // epoch is the newer.
        if self.groups.get(&id).is_some_and(|known| known.epoch() >= group.epoch()) {
            return vec![Received::Duplicate];
        }
        let mut results = vec![Received::Joined(group.summary())];
        self.packages.used(&reference);
        self.groups.insert(id, group);
        self.retry(id, &mut results);
        results
    }

    /// Processes what waited for the state that `id` is in now, and for the states that this leads
    /// to.
    fn retry(&mut self, id: GroupId, results: &mut Vec<Received>) {
        while let Some(epoch) = self.groups.get(&id).map(Group::epoch) {
            let Some(bytes) = self.waiting.release(&id, epoch) else { break };
            let parsed =
                MlsMessageIn::tls_deserialize_exact_bytes(&bytes).map(MlsMessageIn::extract);
            let Ok(MlsMessageBodyIn::PrivateMessage(message)) = parsed else { continue };
            results.push(self.process(id, message));
        }
    }

    fn process(&mut self, id: GroupId, message: PrivateMessageIn) -> Received {
        let group = self.groups.get_mut(&id).expect("the callers looked it up");
        match group.process(message) {
            Outcome::Message { sender, content } => {
                Received::Message { group: id, channel: group.profile().channel, sender, content }
            }
            Outcome::Committed { added, removed } => {
                Received::Committed { group: id, added, removed }
            }
            Outcome::Duplicate => Received::Duplicate,
            Outcome::Ignored(reason) => Received::Ignored(reason),
        }
    }
}
