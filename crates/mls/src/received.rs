//! The results of processing a received message.

use std::{collections::BTreeSet, fmt};

use qpq_domain::{ChannelId, IdentityKey, UnixMillis};

use crate::{
    content::Content,
    database::DatabaseError,
    identity::Member,
    profile::{GroupId, GroupKind},
    summary::GroupSummary,
};

/// The result of processing a message.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Received {
    /// We are in a group: a new one, or one that its creator added us to again. `members` are to be
    /// compared with the directory; the inviter is `creator`.
    Joined(GroupSummary),
    Message {
        group: GroupId,
        channel: ChannelId,
        sender: Member,
        content: Content,
    },
    /// A member could not read these messages, named by the SHA-256 of their bytes, and asks for
    /// those that were ours. Nothing is to be shown.
    Asked {
        group: GroupId,
        sender: Member,
        digests: Vec<[u8; 32]>,
    },
    /// A member has left the group, and asks its creator to be removed.
    Leaving {
        group: GroupId,
        sender: Member,
    },
    /// The group's creator changed who is in it. `added` are to be compared with the directory.
    Committed {
        group: GroupId,
        added: Vec<Member>,
        removed: Vec<Member>,
    },
    /// It came too early and is kept until what it needs is there. It may be acknowledged once the
    /// state is saved.
    Buffered,
    /// The message was processed before. It may be acknowledged.
    Duplicate,
    /// A stranger's Welcome, which waits for [`accept`](crate::Client::accept) or
    /// [`decline`](crate::Client::decline). The Welcome has used up a key package of ours. It may
    /// be acknowledged once the state is saved.
    Requested(Request),
    /// It is from a person whose messages are refused, or for a group that we have left or declined
    /// to join. It has no effect. It may be acknowledged.
    Refused {
        /// Whether it has used up a key package of ours.
        used_package: bool,
    },
    /// The message may have had content for this account, and cannot be read. It may be
    /// acknowledged.
    Unreadable(Unreadable),
    /// The message has no effect, now or later. It may be acknowledged.
    Ignored(Ignored),
}

/// The rules about people that a message is received by.
#[derive(Clone, Copy)]
pub struct Rules<'a> {
    /// People whose messages are refused. Their Welcomes are not used, and no message is kept for a
    /// group that one of them created, or that names one of them as its sender.
    ///
    /// What they send to a group that we are in is processed like anything else: the group's keys
    /// stay in step.
    pub blocked: &'a BTreeSet<IdentityKey>,
    /// Returns whether the group of a Welcome is joined immediately. If not, the Welcome waits as a
    /// request.
    pub joins: &'a dyn Fn(&Request) -> Result<bool, DatabaseError>,
}

impl fmt::Debug for Rules<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rules").field("blocked", &self.blocked).finish_non_exhaustive()
    }
}

/// When and on which channel a message arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arrival {
    pub at: UnixMillis,
    pub channel: ChannelId,
}

/// A group that a Welcome leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    pub group: GroupId,
    pub kind: GroupKind,
    /// The group's creator, who sent the Welcome. The key is proven, the name is a claim.
    pub creator: Member,
    /// The number of members, including us.
    pub members: usize,
    pub epoch: u64,
    pub arrival: Arrival,
    /// The number of messages to the group that were dropped while the request waited.
    pub missed: u64,
}

/// A message whose content is lost to us, unless its sender repeats it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unreadable {
    pub reason: Lost,
    /// SHA-256 of its bytes: by it the sender finds what to repeat.
    pub digest: [u8; 32],
    /// The group that it names, if it names one.
    pub group: Option<GroupId>,
    /// The sender that the message names, without a proof.
    pub claimed_sender: Option<IdentityKey>,
    pub arrival: Arrival,
}

/// The reason why the content of a message is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum Lost {
    #[error("it invites us with a key package that is not here any more")]
    NoPackage,
    #[error("its keys were used or deleted before, or are too far ahead")]
    NoKeys,
    #[error("it is not encrypted with the group's keys")]
    Undecryptable,
    #[error("what it needs never came")]
    NeverCame,
    #[error("too many others wait for what never came")]
    Displaced,
}

/// The reason why a message has no effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum Ignored {
    #[error("not a private MLS message or Welcome of ours")]
    NotMls,
    #[error("a Welcome that is forged, broken, or not its group's creator's")]
    BadWelcome,
    #[error("a change to the group by a member that is not its creator")]
    NotTheCreator,
    #[error("a change to the group that not even its creator may make")]
    ForbiddenCommit,
    /// openmls compares lifetimes with the time of reading, not of sending. The group goes on
    /// without us from here.
    #[error(
        "a change to the group, read after the added member's key package ran out: ask its creator to add us again"
    )]
    LifetimeOver,
    #[error("a change to the group from before the last one")]
    OldCommit,
    #[error("we are not in the group any more")]
    NoLongerMember,
    #[error("the farewell of a person who is not in the group any more")]
    AlreadyGone,
    #[error("our own message")]
    OwnMessage,
    #[error("against the rules of MLS")]
    Invalid,
    #[error("a kind of message that this client does not know")]
    UnknownContent,
}
