//! The results of processing a received message.

use std::{collections::BTreeSet, fmt};

use qpq_domain::{ChannelId, IdentityKey, UnixMillis};

use crate::{
    content::Content,
    database::DatabaseError,
    identity::Member,
    leaf::MemberDevice,
    profile::{GroupId, GroupKind},
    summary::GroupSummary,
};

/// The result of processing a message.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Received {
    /// We are in a group, for the first time or again. The caller must compare its members with the
    /// directory.
    Joined {
        group: GroupSummary,
        /// The member that invited us; this account if this device joined by itself.
        by: Member,
    },
    Message {
        group: GroupId,
        channel: ChannelId,
        sender: Member,
        content: Content,
    },
    /// A member could not read these messages, named by the SHA-256 of their bytes, and asks us to
    /// repeat those that were ours. Nothing is shown.
    Asked {
        group: GroupId,
        sender: Member,
        digests: Vec<[u8; 32]>,
    },
    /// A member has left the group, and asks the admins to be removed. If the member is this
    /// account, on another device, the group is dropped.
    Leaving {
        group: GroupId,
        sender: Member,
    },
    /// A member changed the group. The caller must compare added accounts with the directory. A
    /// commit that only renews keys has no changes.
    Committed {
        group: GroupId,
        by: Member,
        changes: Vec<GroupChange>,
    },
    /// The server asks, on behalf of a member's client, that all members of this channel renew
    /// their keys.
    RotationRequested {
        channel: ChannelId,
    },
    /// The message is kept until the commit or Welcome before it arrives. The caller may
    /// acknowledge the message once the state is saved.
    Buffered,
    /// The message was processed before, and may be acknowledged.
    Duplicate,
    /// A stranger's Welcome, which waits for [`accept`](crate::Client::accept) or
    /// [`decline`](crate::Client::decline). The Welcome has used up a KeyPackage of ours, and
    /// may be acknowledged once the state is saved.
    Requested(Request),
    /// The message is from a blocked person, or for a group that we have left or declined to join.
    /// Such a message has no effect, and may be acknowledged.
    Refused {
        /// Whether the message has used up a KeyPackage of ours.
        used_package: bool,
    },
    /// The message may have had content for this account, cannot be read, and may be
    /// acknowledged.
    Unreadable(Unreadable),
    /// The message has no effect, now or later, and may be acknowledged.
    Ignored(Ignored),
}

/// A change of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GroupChange {
    /// An account was added, with its devices.
    Added(Member),
    /// An account was removed, with all of its devices; this account may be the one.
    Removed(Member),
    /// A further device of a member was added.
    DeviceAdded { member: Member, name: String },
    /// A device of a member was removed, and others of it stay.
    DeviceRemoved { member: Member, name: String },
    /// A device of a member that had lost its state joined again by itself.
    Rejoined { member: Member, name: String },
    /// The group was renamed.
    Renamed { name: String },
    /// A member became an admin.
    Promoted(Member),
    /// A member is no longer an admin.
    Demoted(Member),
}

impl GroupChange {
    pub(crate) fn added(leaf: &MemberDevice, is_new: bool) -> Self {
        let (member, name) = (leaf.member.clone(), leaf.name().to_owned());
        if is_new { Self::Added(member) } else { Self::DeviceAdded { member, name } }
    }

    pub(crate) fn removed(leaf: &MemberDevice, is_over: bool) -> Self {
        let (member, name) = (leaf.member.clone(), leaf.name().to_owned());
        if is_over { Self::Removed(member) } else { Self::DeviceRemoved { member, name } }
    }

    pub(crate) fn joined(leaf: &MemberDevice, was_known: bool) -> Self {
        let (member, name) = (leaf.member.clone(), leaf.name().to_owned());
        if was_known { Self::Rejoined { member, name } } else { Self::DeviceAdded { member, name } }
    }
}

/// The rules about people under which a message is received.
#[derive(Clone, Copy)]
pub struct Rules<'a> {
    /// People whose messages are refused. Their Welcomes are not used, and no message is kept for a
    /// group that one of them created, or that names one of them as its sender.
    ///
    /// Their messages to a group that we are in are processed like all others, so that the group's
    /// keys stay in step.
    pub blocked: &'a BTreeSet<IdentityKey>,
    /// Returns whether the group of a Welcome is joined immediately. If not, the Welcome waits as a
    /// request.
    pub joins: &'a dyn Fn(&Request) -> Result<bool, DatabaseError>,
    /// Whether the account has other devices. A Welcome for none of our KeyPackages is then
    /// regarded as a Welcome for one of those devices.
    pub has_other_devices: bool,
}

impl fmt::Debug for Rules<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rules").field("blocked", &self.blocked).finish_non_exhaustive()
    }
}

/// The time and channel of a message's arrival.
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
    /// The member that sent the Welcome. The key is proven, the name is a claim.
    pub inviter: Member,
    /// The number of members, including us.
    pub members: usize,
    /// The MLS epoch that the Welcome leads to.
    pub epoch: u64,
    pub arrival: Arrival,
    /// The number of messages to the group that were dropped while the request waited.
    pub missed: u64,
}

/// A message whose content is lost to us, unless its sender repeats it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unreadable {
    /// The reason why the content is lost.
    pub reason: Lost,
    /// SHA-256 of the message, by which its sender finds the text to repeat.
    pub digest: [u8; 32],
    /// The group that the message names, if any.
    pub group: Option<GroupId>,
    /// The sender that the message names, without a proof. With [`Lost::NotAMember`] it is proven.
    pub claimed_sender: Option<IdentityKey>,
    pub arrival: Arrival,
}

/// The reason why the content of a message is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum Lost {
    #[error("it invites us with a key package that this device no longer has")]
    NoPackage,
    #[error("its keys were used or deleted before, or are too far ahead")]
    NoKeys,
    #[error("it is not encrypted with the group's keys")]
    Undecryptable,
    #[error("the invitation or group change that it needs never arrived")]
    NeverCame,
    #[error("too many messages wait for an invitation or a group change")]
    Displaced,
    #[error("it arrived after its sender's device had been removed from the group")]
    NotAMember,
}

/// The reason why a message has no effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum Ignored {
    #[error("not a private MLS message or Welcome of ours")]
    NotMls,
    #[error("a Welcome that is forged, broken, or of a person that may not invite")]
    BadWelcome,
    #[error("a change to the group by a member that may not make it")]
    NotAllowed,
    #[error("a change to the group that nobody may make")]
    ForbiddenCommit,
    /// openmls compares lifetimes with the time of reading, not of sending. From here on we cannot
    /// follow the group.
    #[error(
        "a change to the group, read after the added member's key package expired: join it again"
    )]
    LifetimeOver,
    #[error("a change to the group that came after another one for the same epoch")]
    OldCommit,
    #[error("this account is no longer a member of the group")]
    NoLongerMember,
    #[error("the departure of a person who had left the group before")]
    AlreadyLeft,
    #[error("from before we joined the group")]
    BeforeJoining,
    #[error("a Welcome for another device of this account")]
    ForAnotherDevice,
    #[error("our own message")]
    OwnMessage,
    #[error("against the rules of MLS")]
    Invalid,
    #[error("a kind of message that this client does not know")]
    UnknownContent,
}
