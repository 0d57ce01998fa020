//! Groups: the members, the metadata and the epoch of a channel, and messages to all members.
//!
//! Server-side membership decides who may commit, read the metadata and receive messages to all
//! members. The members' clients trust the MLS group instead.

mod outcome;

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use qpq_domain::{
    AccountId, ChannelId, DeviceId, GroupId, IdentityKey, MessageId, Pair, Role, UnixMillis,
};

use crate::{Enqueued, StoreResult};

/// Stores groups.
#[async_trait]
pub trait Groups: Send + Sync {
    /// Creates a group with the creator as admin and the others as members.
    ///
    /// Safe to repeat: a group that exists is returned unchanged if the creator is a member of it.
    /// A direct group is found by its pair, whatever id is proposed, and a member who left it is
    /// added again, unless the member is banned from it.
    async fn create(&self, group: NewGroup) -> StoreResult<Result<Creation, GroupRefusal>>;

    /// Adds members with a role. Only for admins. Adds all or none. Returns the number of new
    /// members.
    ///
    /// With [`Role::Admin`], present members become admins. With [`Role::Member`] they keep their
    /// role, so a repeat demotes nobody.
    async fn add_members(
        &self,
        group: GroupId,
        actor: AccountId,
        members: Vec<IdentityKey>,
        role: Role,
        now: UnixMillis,
    ) -> StoreResult<Result<u32, GroupRefusal>>;

    /// Removes a member. Does nothing for a key that is not a member's. Only for admins, and for
    /// the member itself.
    ///
    /// When the last admin leaves, the oldest member becomes admin. When the last member leaves,
    /// the group is removed.
    async fn remove_member(
        &self,
        group: GroupId,
        actor: AccountId,
        member: IdentityKey,
    ) -> StoreResult<Result<(), GroupRefusal>>;

    /// Changes the metadata and returns its new version. Only for admins.
    async fn update(
        &self,
        group: GroupId,
        actor: AccountId,
        change: MetadataChange,
    ) -> StoreResult<Result<u64, GroupRefusal>>;

    /// Returns the group and a page of its members in the order in which they joined. Only for
    /// members.
    async fn members(
        &self,
        group: GroupId,
        viewer: AccountId,
        page: MemberPage,
    ) -> StoreResult<Result<GroupView, GroupRefusal>>;

    /// Returns the GroupInfo of the last commit that had one, and the epoch. Only for members.
    async fn info(
        &self,
        group: GroupId,
        viewer: AccountId,
    ) -> StoreResult<Result<GroupInfo, GroupRefusal>>;

    /// Returns the role of an account in the group; `None` if it is not a member.
    ///
    /// For authorization. Changes check the rights of their actor themselves.
    async fn role(
        &self,
        group: GroupId,
        account: AccountId,
    ) -> StoreResult<Result<Option<Role>, GroupRefusal>>;

    /// Accepts one message of a member for the listed recipients or for all members, and its commit
    /// if it has one, in one atomic step.
    ///
    /// A commit is accepted only in the epoch that it expects. The epoch then rises by one and the
    /// GroupInfo replaces the stored one. Of concurrent commits for one epoch exactly one is
    /// accepted; nothing of the others is stored. A commit that repeats the message id of an
    /// accepted commit of the same sender has the result of that one.
    async fn send(&self, message: GroupMessage) -> StoreResult<Result<GroupSent, GroupRefusal>>;
}

/// The reason why a group refuses a call. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupRefusal {
    /// There is no such group.
    NotFound,
    /// The caller is not a member.
    NotMember,
    /// The caller is not an admin.
    NotAdmin,
    /// The account that sends, or one to be added, is banned from the group
    /// ([`Bans`](crate::Bans)).
    Banned,
    /// No account has this identity key.
    NoSuchAccount(IdentityKey),
    /// The group would have more than [`qpq_domain::MAX_MEMBERS`] members.
    Full,
    /// Another group has the id.
    IdTaken,
    /// The metadata has this version, which is not the expected one.
    StaleVersion(u64),
    /// The group is in this epoch, which is not the expected one.
    StaleEpoch(u64),
}

/// A group to be created.
#[derive(Clone, Debug)]
pub struct NewGroup {
    /// The proposed id.
    pub id: GroupId,
    /// The account that creates the group.
    pub creator: AccountId,
    /// The members.
    pub members: NewMembers,
    /// The name.
    pub name: String,
    /// The description.
    pub description: String,
    /// The instant of the call.
    pub now: UnixMillis,
}

/// The members of a new group.
#[derive(Clone, Debug)]
pub enum NewMembers {
    /// Exactly two members, one of which is the creator.
    Direct(Pair),
    /// The creator and these accounts.
    Listed(Vec<IdentityKey>),
}

/// The outcome of a creation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Creation {
    /// The group is created.
    Created(GroupId),
    /// The group existed.
    Existed(GroupId),
}

/// A change of the metadata. `None` leaves a field as it is.
#[derive(Clone, Debug, Default)]
pub struct MetadataChange {
    /// The name.
    pub name: Option<String>,
    /// The description.
    pub description: Option<String>,
    /// Settings in the members' own format.
    pub settings: Option<Bytes>,
    /// The version that must be the present one.
    pub expected_version: Option<u64>,
}

/// A page of members.
#[derive(Clone, Copy, Debug)]
pub struct MemberPage {
    /// The place of the last member of the previous page ([`GroupView::next`]); 0 for the first
    /// page.
    pub after: u64,
    /// Maximum members.
    pub limit: u32,
}

/// The view of a group for its members.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupView {
    /// The members of the page.
    pub members: Vec<Member>,
    /// The place after which the next page begins; `None` if this is the last one.
    pub next: Option<u64>,
    /// The name.
    pub name: String,
    /// The description.
    pub description: String,
    /// Settings in the members' own format.
    pub settings: Bytes,
    /// The version of the metadata. Increases with each change.
    pub version: u64,
    /// The epoch. Increases with each accepted commit.
    pub epoch: u64,
}

/// A member of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// The identity key.
    pub identity: IdentityKey,
    /// The username.
    pub username: String,
    /// The rights of the member.
    pub role: Role,
    /// The time at which the member was added.
    pub joined_at: UnixMillis,
}

/// The GroupInfo and the epoch, with which a device that lost its state joins the group again by an
/// external commit (RFC 9420 §12.4.3.2).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupInfo {
    /// The GroupInfo of the last commit that had one (RFC 9420 §12.4.3).
    pub group_info: Option<Bytes>,
    /// The epoch.
    pub epoch: u64,
}

/// A message of a member to a group.
#[derive(Clone, Debug)]
pub struct GroupMessage {
    /// The group, whose channel the message is in.
    pub group: GroupId,
    /// The account that sends the message.
    pub sender: AccountId,
    /// The sender's identity key.
    pub sender_key: IdentityKey,
    /// The device that sends the message.
    pub sender_device: Option<DeviceId>,
    /// The recipients.
    pub recipients: GroupRecipients,
    /// The ciphertext.
    pub payload: Bytes,
    /// SHA-256 of the payload.
    pub payload_sha256: [u8; 32],
    /// The sender's id for the message, by which a repeat is recognised.
    pub message_id: Option<MessageId>,
    /// The lifetime of the message.
    pub ttl: Duration,
    /// The instant of the call.
    pub now: UnixMillis,
    /// The commit, if the message has one.
    pub commit: Option<Commit>,
}

impl GroupMessage {
    /// Returns the channel of the message.
    pub fn channel(&self) -> ChannelId {
        self.group.into()
    }
}

/// The recipients of a message to a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GroupRecipients {
    /// The inboxes of these accounts, members or not. Each account is listed once.
    Listed(Vec<IdentityKey>),
    /// The inboxes of all members. The sender's own inbox is included only if the sender has
    /// another device than the one that sends.
    Others,
    /// The inboxes of all members.
    All,
}

/// The condition and the result of a commit (RFC 9420 §12.4).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Commit {
    /// The epoch that the commit is for.
    pub expected_epoch: u64,
    /// The GroupInfo of the epoch after the commit.
    pub group_info: Option<Bytes>,
}

/// The result of an accepted message to a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupSent {
    /// The epoch after the message.
    pub epoch: u64,
    /// The number of inboxes that the message was for.
    pub recipients: u32,
    /// For listed recipients: the outcome of each, in order.
    pub outcomes: Vec<Enqueued>,
    /// For all members: the number of members that did not receive it, because their inboxes are
    /// full or they block the sender.
    pub skipped: u32,
    /// `true` if the message is a repeat of an accepted one.
    pub is_repeat: bool,
}
