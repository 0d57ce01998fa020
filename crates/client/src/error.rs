//! The errors of this crate, grouped by the reaction of the caller.

use std::{fmt, path::PathBuf, time::Duration};

use qpq_domain::{IdentityKey, Username};
use qpq_proto::{Status, v1::ErrorDetail};
use qpq_transport::Fingerprint;

/// The error of a call.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CallError {
    /// The server refused the call.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// The other side is not the server that we trust, or does not speak our protocol. A further
    /// attempt would not help.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// There was no connection within [`Options::patience`](crate::Options::patience).
    #[error("no connection to {server} for {} s: {reason}", waited.as_secs())]
    Unreachable {
        /// The server's address.
        server: String,
        /// The time for which a connection was tried.
        waited: Duration,
        /// The reason why the last attempt failed.
        reason: NoConnection,
    },
    /// There is a connection, but the answer did not arrive in time.
    #[error("{method} was not answered in time")]
    TimedOut {
        /// The method that was called.
        method: &'static str,
    },
    /// The connection was lost, and the call may or may not have had its effect.
    #[error("the connection was lost during {method}")]
    Lost {
        /// The method that was called.
        method: &'static str,
    },
    /// The request is larger than a frame may be. Nothing was sent.
    #[error("the request has {size} bytes, at most {max} fit")]
    TooLarge {
        /// The size of the request, in bytes.
        size: usize,
        /// The maximum size, in bytes.
        max: usize,
    },
    /// The server's answer violates the protocol.
    #[error("the server's answer to {method} is malformed")]
    Malformed {
        /// The method that was called.
        method: &'static str,
    },
    /// The server assigned a message a seq that no inbox can have reached. Nothing was changed.
    #[error("the server numbered a message {seq}, which no inbox can have reached")]
    ImpossibleSeq {
        /// The seq.
        seq: u64,
    },
}

impl CallError {
    /// Returns the server's refusal, if this is one.
    pub fn server(&self) -> Option<&ServerError> {
        match self {
            Self::Server(error) => Some(error),
            _ => None,
        }
    }

    /// Returns whether the server refused with this code, e.g. `delivery.no_such_recipient`.
    pub fn is_code(&self, code: &str) -> bool {
        self.server().is_some_and(|error| error.code == code)
    }

    /// Returns whether there is no session, or it has ended, so that a login is necessary.
    pub fn is_unauthorized(&self) -> bool {
        self.server().is_some_and(|error| error.status == Status::Unauthorized)
    }

    /// Returns whether the same call may succeed later without further action.
    pub fn is_temporary(&self) -> bool {
        match self {
            Self::Server(error) => error.status.is_temporary(),
            Self::Unreachable { .. } | Self::TimedOut { .. } | Self::Lost { .. } => true,
            Self::Connect(_)
            | Self::TooLarge { .. }
            | Self::Malformed { .. }
            | Self::ImpossibleSeq { .. } => false,
        }
    }
}

/// The reason why there is no connection at present.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoConnection {
    /// The server refuses new connections: their number has reached the maximum, or the server is
    /// stopping.
    #[error("The server is full and refuses new connections, or it is stopping")]
    Full,
    /// Another problem, as a sentence.
    #[error("{0}")]
    Other(String),
}

impl From<String> for NoConnection {
    fn from(reason: String) -> Self {
        Self::Other(reason)
    }
}

/// A server's refusal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerError {
    /// The kind of refusal.
    pub status: Status,
    /// The stable, machine-readable code, such as `rpc.rate_limited`. Empty if the server sent
    /// none.
    pub code: String,
    /// An English sentence from the server. Show it as the server's words.
    pub message: String,
    /// The time to wait before another attempt, if the server stated one.
    pub retry_after: Option<Duration>,
    /// The request's field that was refused, by its name in the protocol.
    pub field: Option<String>,
}

impl ServerError {
    pub(crate) fn new(status: Status, detail: ErrorDetail) -> Self {
        Self {
            status,
            retry_after: detail.retry_after(),
            code: detail.code,
            message: detail.message,
            field: Some(detail.field).filter(|field| !field.is_empty()),
        }
    }
}

impl ServerError {
    /// Returns whether the call may have had its effect in spite of the refusal.
    pub(crate) fn is_uncertain(&self) -> bool {
        matches!(self.status, Status::DeadlineExceeded | Status::Unavailable | Status::Internal)
    }
}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the server answered {}", self.status.name())?;
        if !self.code.is_empty() {
            write!(f, " ({})", self.code)?;
        }
        if !self.message.is_empty() {
            write!(f, ": {}", self.message)?;
        }
        Ok(())
    }
}

impl std::error::Error for ServerError {}

/// The reason why there can be no connection, even after further attempts.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// The server has another certificate than the one that was pinned.
    #[error(
        "the server's certificate has changed: expected fingerprint {expected}, got {seen}; \
         if its operator confirms the new one, pin it, otherwise somebody is in between"
    )]
    PinMismatch {
        /// The fingerprint that was pinned.
        expected: Fingerprint,
        /// The fingerprint of the server's key.
        seen: Fingerprint,
    },
    /// The server's certificate is not for its name, or not issued by anyone we trust.
    #[error("the server's certificate is not trusted: {reason}")]
    Untrusted {
        /// The reason, by the TLS library.
        reason: String,
    },
    /// The other side does not speak our protocol.
    #[error("the other side does not speak qpq: {reason}")]
    NotQpq {
        /// The reason, by the QUIC library.
        reason: String,
    },
    /// The given address or trust material cannot be used.
    #[error("{reason}")]
    Misconfigured {
        /// A sentence that says what cannot be used.
        reason: String,
    },
}

/// The error of a registration or a login.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AuthError {
    /// Login: the password is wrong or the account does not exist. The protocol does not
    /// distinguish the two.
    #[error("wrong username or password")]
    WrongPassword,
    /// Registration: another account has the name.
    #[error("the username is taken")]
    UsernameTaken,
    /// Registration: another account has the key.
    #[error("the identity key is already registered")]
    IdentityTaken,
    /// Registration: the server accepts new accounts only with an invite.
    #[error("a new account on this server needs an invite")]
    InviteRequired,
    /// Registration: the invite is wrong, used up, expired, or for another username.
    #[error("the invite is wrong, used up or expired")]
    InviteInvalid,
    /// Registration: the server accepts no new accounts.
    #[error("the server accepts no new accounts")]
    RegistrationClosed,
    /// Login: an administrator has banned the account.
    #[error("the account is banned")]
    Banned,
    /// Registration: RFC 8265 does not allow the password.
    #[error("a password is not empty and has no control characters, such as tabs")]
    PasswordRefused,
    /// The call failed.
    #[error(transparent)]
    Call(#[from] CallError),
}

impl AuthError {
    /// Maps the refusals of methods 100 to 103 to variants.
    pub(crate) fn from_call(error: CallError) -> Self {
        match error.server().map(|server| server.code.as_str()) {
            Some("auth.failed") => Self::WrongPassword,
            Some("auth.username_taken") => Self::UsernameTaken,
            Some("auth.identity_taken") => Self::IdentityTaken,
            Some("auth.invite_required") => Self::InviteRequired,
            Some("auth.invite_invalid") => Self::InviteInvalid,
            Some("auth.registration_closed") => Self::RegistrationClosed,
            Some("auth.banned") => Self::Banned,
            _ => Self::Call(error),
        }
    }
}

/// The error of an operation of the messenger.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A registration or a login failed.
    #[error(transparent)]
    Auth(#[from] AuthError),
    /// A call failed.
    #[error(transparent)]
    Call(#[from] CallError),
    /// The profile on disk cannot be used.
    #[error(transparent)]
    Profile(#[from] ProfileError),
    /// The server has no account of this name.
    #[error("there is no user {0}")]
    NoSuchUser(Username),
    /// The user has published no keys to start a conversation with.
    #[error("{0} cannot be reached yet: no keys published; they have to log in once")]
    NoKeys(Username),
    /// The directory has another key for a name than before. Compare safety numbers before you
    /// continue.
    #[error(
        "the identity key of {username} has changed; compare safety numbers before you write to them"
    )]
    IdentityChanged {
        /// The name.
        username: Username,
        /// The key that the name was confirmed for before.
        known: IdentityKey,
        /// The key that the directory has now.
        now: IdentityKey,
    },
    /// The file is larger than a blob may be.
    #[error("the file has {size} bytes, at most {max} can be sent")]
    FileTooLarge {
        /// The size of the file, in bytes.
        size: u64,
        /// The maximum size, in bytes.
        max: u64,
    },
    /// The server no longer has the file.
    #[error("the server no longer has the file")]
    FileExpired,
    /// The bytes on the server are not the file that the message describes.
    #[error("the file on the server is not the one that was sent")]
    FileForged,
    /// There is a file of this name, which was not overwritten.
    #[error("{} exists, and was not overwritten", .0.display())]
    FileExists(PathBuf),
    /// A file cannot be written.
    #[error("{} cannot be written: {cause}", path.display())]
    FileNotWritten {
        /// The path of the file.
        path: PathBuf,
        /// The cause.
        cause: String,
    },
    /// Messages of this user are refused, so an answer would not be read.
    #[error("you have blocked {0}")]
    Blocked(Username),
    /// The person is in the group already.
    #[error("{0} is in the group already")]
    AlreadyMember(Username),
    /// Other members changed the group each time that we tried to.
    #[error("others are changing the group all the time; try again later")]
    GroupBusy,
    /// The server has no GroupInfo of the group: the group has not changed since its members use
    /// this release, or it is too large.
    #[error("the group cannot be joined without an invitation: ask an admin to add you again")]
    NoGroupInfo,
    /// The account has no device of this id.
    #[error("there is no such device")]
    NoSuchDevice,
    /// The device in use can only be revoked from another one.
    #[error("this is the device in use; revoke it from another one, or log out")]
    ThisDevice,
    /// This profile is not a device: the server does not support devices yet, or did not accept
    /// this one.
    #[error(
        "this profile is not a device of the account yet; the server may be of an older release"
    )]
    NoDevice,
    /// This device was revoked, or the account has devices and this profile is none of them.
    #[error("this device was revoked; link it again with `qpq device link`")]
    DeviceRevoked,
    /// The account has the maximum number of devices.
    #[error("the account has {max} devices, the most that it may have; revoke one first")]
    TooManyDevices {
        /// The maximum number of devices of an account.
        max: usize,
    },
    /// No device of the account approved the request in time.
    #[error("no device of the account has approved this one in time")]
    LinkNotApproved,
    /// The answer to a link request is not from a device of the account.
    #[error(
        "the answer that came is not from a device of yours: the server, or another user of it, \
         may have forged it"
    )]
    LinkGrantForged,
    /// The request of a new device was approved too late, or one of the clocks is wrong.
    #[error("the code has expired, or the clock of one of the two devices is wrong")]
    LinkRequestExpired,
    /// No request with this code waits.
    #[error("no device that asks to be linked has this code: it is mistyped, or has expired")]
    NoSuchLinkRequest,
    /// The account has no recovery bundle.
    #[error("the account has no recovery bundle, so only a device of the account can add this one")]
    NoRecovery,
    /// The recovery bundle is sealed under another password, and no code, or another one, was
    /// given.
    #[error("the recovery bundle was sealed under an earlier password, or the code is wrong")]
    RecoverySealed,
    /// The name of a device is empty, too long, or has control characters.
    #[error("a device's name has 1 to {max} bytes and no control characters")]
    DeviceName {
        /// The maximum length of a name, in bytes.
        max: usize,
    },
    /// The profile has no such conversation.
    #[error("there is no such conversation")]
    NoSuchConversation,
    /// No such request waits: it was accepted, declined or dropped.
    #[error("there is no such request")]
    NoSuchRequest,
    /// The text is longer than a message may be.
    #[error("a message has at most {max} bytes, this one has {size}")]
    TextTooLong {
        /// The length of the text, in bytes.
        size: usize,
        /// The maximum length of a message, in bytes.
        max: usize,
    },
    /// The name of a group is empty or too long.
    #[error("a group's name has 1 to {max} bytes, this one has {size}")]
    GroupName {
        /// The length of the name, in bytes.
        size: usize,
        /// The maximum length of a name, in bytes.
        max: usize,
    },
    /// The server did not answer a change of the password, and cannot be asked.
    #[error("the server did not answer, so the password may or may not have changed: {0}")]
    PasswordUncertain(#[source] CallError),
    /// MLS does not allow the operation (only a group's admins change its members), or a
    /// KeyPackage cannot be used.
    #[error(transparent)]
    Mls(#[from] qpq_mls::Error),
    /// The profile's state could not be used. The messenger reports this as [`Error::Profile`],
    /// with the path.
    #[error(transparent)]
    State(#[from] qpq_mls::database::DatabaseError),
}

impl Error {
    /// Returns the failed call, if there is one.
    pub fn call(&self) -> Option<&CallError> {
        match self {
            Self::Call(error) | Self::Auth(AuthError::Call(error)) => Some(error),
            _ => None,
        }
    }

    /// Returns whether the session has ended, so that the profile must be unlocked with its
    /// password.
    pub fn is_unauthorized(&self) -> bool {
        self.call().is_some_and(CallError::is_unauthorized)
    }
}

/// The error of a profile on disk.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// The directory has no profile.
    #[error("there is no profile in {}; register first", .0.display())]
    Missing(PathBuf),
    /// The directory has a profile already.
    #[error("there is a profile in {} already", .0.display())]
    Exists(PathBuf),
    /// Another process has exclusive use of the profile: it registers, imports an earlier release's
    /// state, or is of an earlier release. Or another process has been writing for very long.
    #[error("the profile {} is in use by another qpq; close that one first", .0.display())]
    InUse(PathBuf),
    /// A registration was interrupted: register again with the same password.
    #[error("the registration in {} was interrupted; register again", .0.display())]
    Unfinished(PathBuf),
    /// The key does not open the encrypted state.
    #[error("the password or key does not open the profile")]
    WrongKey,
    /// The content of a file is not valid.
    #[error("{} is damaged: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The reason, as a sentence.
        reason: String,
    },
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The error of the operating system.
        source: std::io::Error,
    },
}
