//! The errors of a client.

use qpq_domain::IdentityKey;

use crate::{database::DatabaseError, key_package::Rejected};

/// The error of an operation of a client. The state is unchanged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error("there is no such group here")]
    UnknownGroup,
    #[error("only an admin of the group may do that: ask one")]
    NotAdmin,
    #[error("we were removed from the group: ask an admin to be added again")]
    NoLongerMember,
    /// After the change the group would have no admin, and nobody could change it.
    #[error("the group needs an admin: make another member one first")]
    LastAdmin,
    #[error("the server's description of the group cannot be used to join it")]
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
    /// Members that read the commit after the package's end could not follow it.
    #[error("the key package of {0} expires soon: they have to come online once")]
    PackageTooOld(IdentityKey),
    /// The state is an older copy, and the later state has used more keys than receivers accept as
    /// a gap.
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
