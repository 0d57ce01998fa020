//! Why a client did not do something.

use qpq_domain::IdentityKey;

use crate::{database::DatabaseError, key_package::Rejected};

/// Why something was not done. The state is as it was.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error("there is no such group here")]
    UnknownGroup,
    #[error("only an admin of the group may do that: ask one")]
    NotAdmin,
    #[error("we were removed from the group: ask an admin to be added again")]
    NoLongerMember,
    /// The change would leave the group without an admin, and so without any further change.
    #[error("the group needs an admin: make another member one first")]
    LastAdmin,
    #[error("what the server has of the group cannot be used to join it")]
    BadGroupInfo,
    #[error("no change to the group is waiting for the server")]
    NothingPending,
    #[error("nobody else is in the group: add a member first")]
    Alone,
    #[error("name at least one person")]
    Nobody,
    #[error("a conversation needs another person")]
    Yourself,
    #[error("a direct conversation is between two: start a group instead")]
    DirectIsForTwo,
    #[error("{0} is in the group already, or was named twice")]
    AlreadyMember(IdentityKey),
    #[error("{0} is not in the group")]
    NotAMember(IdentityKey),
    #[error("the key package of {identity} cannot be used: {reason}")]
    BadPackage { identity: IdentityKey, reason: Rejected },
    #[error("the key package of {0} names another user: do not trust it")]
    WrongName(IdentityKey),
    #[error("{0} uses a client that cannot join our groups")]
    Incompatible(IdentityKey),
    /// A change to the group that others read only later would shut them out.
    #[error("the key package of {0} is about to run out: they have to come online once")]
    PackageTooOld(IdentityKey),
    /// The state is an older copy, and more keys were used since than others allow to be skipped.
    #[error("this copy of the profile is too old for the group: join it again")]
    CopyTooOld,
    #[error("MLS: {0}")]
    Mls(String),
    #[error(transparent)]
    Database(#[from] DatabaseError),
}

impl Error {
    pub(crate) fn mls(error: impl std::error::Error) -> Self {
        Self::Mls(error.to_string())
    }
}
