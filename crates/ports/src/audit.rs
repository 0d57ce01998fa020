//! The audit trail: the actions of moderators and administrators, which is only appended to.

use async_trait::async_trait;
use qpq_domain::{GroupId, IdentityKey, UnixMillis};

use crate::StoreResult;

/// Reads the audit trail. Entries are written by the methods that perform the actions, in the same
/// step.
#[async_trait]
pub trait Audit: Send + Sync {
    /// Returns a page of the entries, newest first.
    async fn list(&self, page: AuditPage) -> StoreResult<Vec<AuditEntry>>;
}

/// A page of the audit trail.
#[derive(Clone, Copy, Debug)]
pub struct AuditPage {
    /// The number of the last entry of the previous page; `None` for the first page.
    pub before: Option<u64>,
    /// Maximum entries.
    pub limit: u32,
}

/// An entry of the audit trail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditEntry {
    /// The number of the entry. A later entry has a greater one.
    pub id: u64,
    /// The time of the action.
    pub at: UnixMillis,
    /// The acting party.
    pub actor: AuditActor,
    /// The action.
    pub action: AuditAction,
    /// The account that the action is about, if any.
    pub subject: Option<IdentityKey>,
    /// The group that the action is limited to, if any.
    pub group: Option<GroupId>,
    /// The reason that the actor named; empty if none.
    pub reason: String,
}

/// The acting party of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AuditActor {
    /// The account with this identity key.
    Account(IdentityKey),
    /// The operator, by `qpq-admin`.
    Operator,
}

impl AuditActor {
    /// Returns the identity key; `None` for the operator.
    pub const fn identity(&self) -> Option<&IdentityKey> {
        match self {
            Self::Account(identity) => Some(identity),
            Self::Operator => None,
        }
    }
}

impl From<Option<IdentityKey>> for AuditActor {
    fn from(identity: Option<IdentityKey>) -> Self {
        identity.map_or(Self::Operator, Self::Account)
    }
}

/// An action in the audit trail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AuditAction {
    /// An account was banned.
    Ban,
    /// A ban was ended.
    Unban,
    /// Reports were read.
    ReadReports,
}

impl AuditAction {
    /// All actions.
    pub const ALL: [Self; 3] = [Self::Ban, Self::Unban, Self::ReadReports];

    /// Returns the name, which stores keep and commands print.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ban => "ban",
            Self::Unban => "unban",
            Self::ReadReports => "read_reports",
        }
    }

    /// Returns the action with this name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|action| action.name() == name)
    }
}
