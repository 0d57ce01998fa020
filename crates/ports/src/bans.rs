//! Bans: accounts that may not log in, or may not be members of a group.

use std::time::Duration;

use async_trait::async_trait;
use qpq_domain::{AccountId, GroupId, IdentityKey, UnixMillis};

use crate::{GroupRefusal, StoreResult};

/// Stores bans of the server and of groups.
///
/// A ban with an end is no longer in force from its end on, whether or not a sweep has removed it.
/// A ban in force has these effects:
///
/// - Server: no session of the account is created ([`Sessions::create`](crate::Sessions::create)).
/// - Group: the account is not added to the group, and sends nothing to its members
///   ([`GroupRefusal::Banned`]).
///
/// Each ban and unban is recorded in the audit trail ([`Audit`](crate::Audit)) in the same step.
#[async_trait]
pub trait Bans: Send + Sync {
    /// Bans an account, in one step with the immediate effects: a ban of the server ends all
    /// sessions of the account, and a ban of a group removes the member.
    ///
    /// Another ban of the account in the same scope is replaced, with its reason and its end.
    async fn ban(&self, ban: NewBan) -> StoreResult<Result<BanEffects, BanRefusal>>;

    /// Ends a ban. Returns whether a ban was in force.
    async fn unban(&self, unban: Unban) -> StoreResult<Result<bool, BanRefusal>>;

    /// Returns the bans in force of a scope, at most `limit`, newest first.
    async fn list(
        &self,
        scope: BanScope,
        moderator: Moderator,
        limit: u32,
        now: UnixMillis,
    ) -> StoreResult<Result<Vec<Ban>, BanRefusal>>;
}

/// The part of the server that an account is banned from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BanScope {
    /// The whole server.
    Server,
    /// One group.
    Group(GroupId),
}

impl BanScope {
    /// Returns the group; `None` for the whole server.
    pub const fn group(&self) -> Option<&GroupId> {
        match self {
            Self::Server => None,
            Self::Group(group) => Some(group),
        }
    }
}

/// The account that moderates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moderator {
    /// The account.
    pub account: AccountId,
    /// The account's identity key.
    pub identity: IdentityKey,
    /// The right by which the account moderates.
    pub right: ModerationRight,
}

/// The right of a moderator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModerationRight {
    /// The account is an administrator of the server, which the caller has checked.
    Server,
    /// The account must be an admin of the group, which the store checks.
    Group,
}

/// A ban to be stored.
#[derive(Clone, Debug)]
pub struct NewBan {
    /// The scope. With [`ModerationRight::Group`], a group.
    pub scope: BanScope,
    /// The account to ban.
    pub subject: IdentityKey,
    /// The account that bans.
    pub moderator: Moderator,
    /// The reason, for moderators to read.
    pub reason: String,
    /// The duration; `None` for a permanent ban.
    pub duration: Option<Duration>,
    /// The instant of the call.
    pub now: UnixMillis,
}

/// The end of a ban by a moderator.
#[derive(Clone, Copy, Debug)]
pub struct Unban {
    /// The scope. With [`ModerationRight::Group`], a group.
    pub scope: BanScope,
    /// The banned account.
    pub subject: IdentityKey,
    /// The account that ends the ban.
    pub moderator: Moderator,
    /// The instant of the call.
    pub now: UnixMillis,
}

/// The immediate effects of a ban.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BanEffects {
    /// The number of sessions that were ended.
    pub ended_sessions: u32,
    /// `true` if the account was a member of the group.
    pub was_member: bool,
}

/// The reason why a ban or an unban is refused. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BanRefusal {
    /// No account has the identity key.
    NoSuchAccount,
    /// The account to ban is the moderator's own.
    OwnAccount,
    /// The group refuses the call.
    Group(GroupRefusal),
}

/// A ban in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ban {
    /// The identity key of the banned account.
    pub identity: IdentityKey,
    /// The reason.
    pub reason: String,
    /// The time of the ban.
    pub banned_at: UnixMillis,
    /// The end; `None` for a permanent ban.
    pub expires_at: Option<UnixMillis>,
}
