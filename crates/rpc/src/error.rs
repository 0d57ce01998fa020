//! Every failure of a call: its meaning ([`Error`]), and one table with the client's status, code
//! and message, and the level of the server's log. `docs/errors.md` is generated from the table.
//!
//! Handlers choose only the meaning. The cause is part of the error and is only logged. The client
//! receives the status, the code, the fixed message, and possibly the name of a field and a time to
//! wait.

use std::{error::Error as StdError, fmt, time::Duration};

use bytes::Bytes;
use prost::Message as _;
use qpq_ports::{BanRefusal, GroupRefusal, ReadError, StoreError};
use qpq_proto::{FieldError, Status, session::Malformed, v1::ErrorDetail};
use tracing::Level;

use crate::Answer;

/// The cause of a failure.
pub type Cause = Box<dyn StdError + Send + Sync>;

macro_rules! errors {
    ($(
        $(#[$doc:meta])*
        $name:ident $(($data:ty))? => $status:ident $code:literal $level:ident $message:literal;
    )+) => {
        /// The reason why a call was not answered Ok.
        #[derive(Debug)]
        pub enum Error {
            $($(#[$doc])* $name $(($data))?,)+
        }

        /// A row of the table: an [`Error`] without its data.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Code {
            $($(#[$doc])* $name,)+
        }

        impl Code {
            /// All rows, in the order of the table.
            pub const ALL: &[Self] = &[$(Self::$name,)+];

            const fn row(self) -> Row {
                match self {
                    $(Self::$name => Row {
                        status: Status::$status,
                        code: $code,
                        level: Level::$level,
                        message: $message,
                    },)+
                }
            }
        }

        impl Error {
            /// Returns the row of the error.
            pub const fn code(&self) -> Code {
                match self {
                    $(Self::$name { .. } => Code::$name,)+
                }
            }
        }
    };
}

/// A refused field and the reason.
#[derive(Debug, thiserror::Error)]
#[error("{field} was refused")]
pub struct RefusedField {
    /// The field's name in the `.proto` file.
    pub field: &'static str,
    /// The reason, which is only logged.
    #[source]
    pub cause: Cause,
}

struct Row {
    status: Status,
    code: &'static str,
    level: Level,
    message: &'static str,
}

errors! {
    UnknownMethod => UnknownMethod "rpc.unknown_method" DEBUG
        "The server does not have this method.";
    TooLarge => BadRequest "rpc.too_large" DEBUG
        "The request is larger than this method accepts.";
    MalformedFrame => BadRequest "rpc.malformed_frame" DEBUG
        "The stream does not contain exactly one request frame.";
    SlowRequest => DeadlineExceeded "rpc.slow_request" DEBUG
        "The request was not complete within 10 seconds.";
    /// The payload is not the method's message.
    Malformed(Cause) => BadRequest "rpc.malformed" DEBUG
        "The payload is not this method's protobuf message.";
    /// A field has a wrong length or value.
    InvalidField(FieldError) => BadRequest "rpc.invalid_field" DEBUG
        "A field of the request has a wrong length or value.";
    /// A budget is exhausted. The value is the time until the call is allowed.
    RateLimited(Duration) => RateLimited "rpc.rate_limited" DEBUG
        "Too many calls. Wait and try again.";
    DeadlineExceeded => DeadlineExceeded "rpc.deadline" WARN
        "The call took too long. It may or may not have taken effect.";
    /// Too many computations wait.
    Overloaded => Unavailable "rpc.overloaded" WARN
        "The server is busy. Wait and try again.";
    /// The client's unfinished requests already use all the memory that one client may use.
    UnfinishedRequests => RateLimited "rpc.unfinished_requests" DEBUG
        "Earlier requests are not finished yet. Wait for their answers and try again.";
    /// All memory for requests is in use.
    RequestsFull => Unavailable "rpc.requests_full" WARN
        "The server has no memory for another request now. Wait and try again.";
    /// The client's unread answers already use all the memory that one client may use.
    UnreadAnswers => RateLimited "rpc.unread_answers" DEBUG
        "Earlier answers are not read yet. Read them and try again.";
    /// All memory for answers is in use.
    AnswersFull => Unavailable "rpc.answers_full" WARN
        "The server has no memory for another answer now. Wait and try again.";
    /// A store cannot be reached or cannot commit.
    Unavailable(StoreError) => Unavailable "rpc.unavailable" WARN
        "The server cannot do this now. Wait and try again.";
    /// Another transaction committed first in every attempt.
    Conflict(StoreError) => Unavailable "rpc.conflict" WARN
        "Another call changed the same data at the same time. Try again.";
    Internal(Cause) => Internal "rpc.internal" ERROR
        "The server failed. Its log has the cause.";

    SessionRequired => Unauthorized "auth.session_required" DEBUG
        "This method needs a session. Log in.";
    /// The session is unknown, revoked or expired. Clients cannot distinguish these cases.
    SessionExpired => Unauthorized "auth.session_expired" DEBUG
        "The session has ended. Log in again.";
    FreshLoginRequired => Unauthorized "auth.fresh_login_required" DEBUG
        "This method needs a login within the last 5 minutes. Log in again.";
    AdminRequired => Forbidden "auth.admin_required" DEBUG
        "Only administrators of the server can call this method.";
    /// The named field is not the expected OPAQUE message.
    MalformedOpaque(&'static str) => BadRequest "auth.malformed" DEBUG
        "The field is not the OPAQUE message that this method expects.";
    InvalidUsername => BadRequest "auth.invalid_username" DEBUG
        "A username has 1 to 64 characters: letters of one script, digits, '.', '-', '_' and apostrophes.";
    InvalidIdentityKey => BadRequest "auth.invalid_identity_key" DEBUG
        "An identity key is a canonical Ed25519 public key of 32 bytes.";
    IdentityProofRequired => BadRequest "auth.identity_proof_required" DEBUG
        "This server requires the identity key's signature. Set identity_proof.";
    InvalidIdentityProof => BadRequest "auth.invalid_identity_proof" DEBUG
        "The identity proof is not this identity key's signature over this registration.";
    UsernameTaken => Forbidden "auth.username_taken" DEBUG
        "The username, or one that looks like it, is taken. Choose another.";
    IdentityTaken => Forbidden "auth.identity_taken" DEBUG
        "The identity key already belongs to an account. Create a new one.";
    RegistrationClosed => Forbidden "auth.registration_closed" DEBUG
        "This server does not accept new accounts.";
    InviteRequired => Forbidden "auth.invite_required" DEBUG
        "A new account on this server needs an invite. Ask its operator for one.";
    /// The invite is unknown, used up, expired, or for another username. Clients cannot distinguish
    /// these cases.
    InviteInvalid => Forbidden "auth.invite_invalid" DEBUG
        "The invite is wrong, used up or expired. Check it, or ask the operator for another one.";
    RegistrationNotStarted => Forbidden "auth.registration_not_started" DEBUG
        "A new password begins with OpaqueRegisterStart for your own username on the same connection, at most 60 s before.";
    /// A wrong password, an unknown username, no login in progress, or another account's key.
    /// Clients cannot distinguish these cases.
    LoginFailed => Unauthorized "auth.failed" DEBUG
        "Wrong username or password, or the login took too long. Start again.";

    /// The account is banned from the server. Returned only after the password was checked.
    Banned => Forbidden "auth.banned" DEBUG
        "This account is banned from the server. Ask its administrators.";

    NotOwner => Forbidden "delivery.not_owner" DEBUG
        "Only the owner can read an inbox.";
    DeviceRequired => Forbidden "delivery.device_required" DEBUG
        "The account has devices. Register this one, and name the device that reads.";
    OtherDevice => Forbidden "delivery.other_device" DEBUG
        "The session belongs to another device. Read as that device.";
    /// Returned once for each loss.
    PositionLost => Forbidden "delivery.position_lost" INFO
        "The device was away too long: messages that waited for it were removed. Read again.";
    NoSuchRecipient => NotFound "delivery.no_such_recipient" DEBUG
        "No account has this identity key.";
    /// The recipient blocks the sender.
    DeliveryRefused => Forbidden "delivery.refused" DEBUG
        "The recipient does not accept messages from this account.";
    QueueFull => RateLimited "delivery.queue_full" DEBUG
        "The recipient's inbox is full until its owner reads it. Try again later.";
    /// The inbox is more than half full.
    SenderShare => RateLimited "delivery.sender_share" DEBUG
        "The recipient's inbox is more than half full and contains the maximum of your messages. Try again later.";
    PayloadTooLarge => BadRequest "delivery.payload_too_large" DEBUG
        "The message is larger than this server accepts.";
    InvalidBatch => BadRequest "delivery.invalid_batch" DEBUG
        "A batch is one payload for many recipients or a list of messages, at most 1000, without repeated recipients.";
    BatchTooLarge => BadRequest "delivery.batch_too_large" DEBUG
        "The batch is larger than this server accepts; the payload counts for each recipient. Send it in parts.";
    /// The value is the epoch of the group.
    StaleEpoch(u64) => Forbidden "delivery.stale_epoch" DEBUG
        "The group has another epoch. Fetch and apply its messages, then commit again.";

    /// The cause is the check that failed.
    InvalidPackage(RefusedField) => BadRequest "keys.invalid_package" DEBUG
        "The KeyPackage is malformed, expired, of another owner, or was handed out before.";
    KeyPackagesFull => RateLimited "keys.too_many" DEBUG
        "The account has the maximum number of KeyPackages. Wait until some are fetched.";
    NotKeyOwner => Forbidden "keys.not_owner" DEBUG
        "Only the owner of an identity key can upload keys for it.";
    InvalidHybridKey => BadRequest "keys.invalid_hybrid_key" DEBUG
        "A hybrid key is a valid X25519 and a valid ML-KEM-768 public key, 1216 bytes together.";
    InvalidHybridSignature => BadRequest "keys.invalid_signature" DEBUG
        "The signature is not the identity key's over this hybrid key.";

    GroupNotFound => NotFound "group.not_found" DEBUG
        "There is no such group.";
    NotGroupMember => Forbidden "group.not_member" DEBUG
        "Only members of the group can do this.";
    NotGroupAdmin => Forbidden "group.admin_required" DEBUG
        "Only admins of the group can do this.";
    BannedFromGroup => Forbidden "group.banned" DEBUG
        "The account is banned from the group. Nothing was changed.";
    NoSuchMember => NotFound "group.no_such_account" DEBUG
        "No account has one of these identity keys. Nothing was changed.";
    GroupFull => Forbidden "group.too_many_members" DEBUG
        "A group has at most 10000 members. Nothing was changed.";
    GroupIdTaken => Forbidden "group.id_taken" DEBUG
        "Another group has this id. Choose another one.";
    StaleGroupVersion => Forbidden "group.stale_version" DEBUG
        "The group was changed meanwhile. Read it and try again.";

    /// An administrator cannot be banned from the server.
    BanOfAdmin => Forbidden "moderation.administrator" DEBUG
        "An administrator of the server cannot be banned. End its administration first.";
    OwnAccount => Forbidden "moderation.own_account" DEBUG
        "An account cannot ban or block itself.";
    TooManyReports => Forbidden "moderation.too_many_reports" DEBUG
        "The account has the maximum number of stored reports. Old reports are removed with time.";
    TooManyBlocks => Forbidden "moderation.too_many_blocks" DEBUG
        "An account blocks at most 10000 accounts. Unblock one first.";

    InvalidDeviceKey => BadRequest "device.invalid_key" DEBUG
        "A device key is a canonical Ed25519 public key of 32 bytes.";
    InvalidDeviceProof => BadRequest "device.invalid_proof" DEBUG
        "The device proof is not the identity key's signature over this device and its key.";
    DeviceExists => Forbidden "device.exists" DEBUG
        "The device is registered with another key. Choose another device id.";
    DeviceKeyTaken => Forbidden "device.key_taken" DEBUG
        "The device key belongs to another device or account. Create a new one.";
    DevicesFull => Forbidden "device.too_many" DEBUG
        "An account has at most 16 devices. Revoke one first.";
    /// An edge of the cluster runs a release without devices.
    OlderEdges => Unavailable "device.older_servers" WARN
        "Devices can be registered once every server of the cluster is upgraded. Try again later.";

    EmptyBundle => BadRequest "recovery.empty" DEBUG
        "A recovery bundle has at least one byte. Remove one with DeleteRecoveryBundle.";
    BundleTooLarge => BadRequest "recovery.too_large" DEBUG
        "A recovery bundle has at most 64 KiB.";
    StaleBundleVersion => Forbidden "recovery.stale_version" DEBUG
        "Another bundle was stored meanwhile. Read it and try again.";
    /// The value is the time until the next fetch.
    BundleFetchesUsedUp(Duration) => RateLimited "recovery.fetch_limit" WARN
        "A recovery bundle can be fetched 10 times a day. Try again later.";
    BlobNotFound => NotFound "blob.not_found" DEBUG
        "There is no such blob.";
    BlobGap => BadRequest "blob.gap" DEBUG
        "The chunk begins after the bytes that the server has. An empty chunk returns their number.";
    BlobOtherBytes => BadRequest "blob.other_bytes" DEBUG
        "The server has other bytes at this position. Send the same bytes, or another hash.";
    BlobOtherSize => BadRequest "blob.other_size" DEBUG
        "The blob was begun with another total size.";
    BlobTooLarge => BadRequest "blob.too_large" DEBUG
        "The blob is larger than this server accepts.";
    BlobHashMismatch => BadRequest "blob.hash_mismatch" DEBUG
        "The bytes do not have this hash. The upload was removed.";
    BlobQuota => Forbidden "blob.quota_exceeded" DEBUG
        "The account's blobs and uploads would exceed its quota.";
    BlobUploadsFull => RateLimited "blob.too_many_uploads" DEBUG
        "The account has the maximum of open uploads. Finish one of them first.";
    BlobInProgress => Unavailable "blob.in_progress" DEBUG
        "Another call completes this upload now. Wait and try again.";

    UserNotFound => NotFound "users.not_found" DEBUG
        "There is no such account.";
    UnknownDomain => NotFound "federation.unknown_domain" DEBUG
        "This server does not know the other server of the username.";
}

impl Code {
    /// Returns the status of the response frame.
    pub const fn status(self) -> Status {
        self.row().status
    }

    /// Returns the code for clients and metrics, which never changes.
    pub const fn as_str(self) -> &'static str {
        self.row().code
    }

    /// Returns the fixed message.
    pub const fn message(self) -> &'static str {
        self.row().message
    }

    /// Returns the level of the log.
    pub const fn level(self) -> Level {
        self.row().level
    }

    /// Returns the time to wait before a retry, for errors that contain none. Every `RateLimited`
    /// and `Unavailable` row has one.
    const fn default_wait(self) -> Option<Duration> {
        match self {
            Self::Conflict => Some(Duration::from_millis(50)),
            Self::Overloaded => Some(Duration::from_millis(500)),
            Self::QueueFull | Self::SenderShare => Some(Duration::from_secs(10)),
            Self::KeyPackagesFull | Self::OlderEdges | Self::BlobUploadsFull => {
                Some(Duration::from_secs(60))
            }
            _ => match self.status() {
                Status::RateLimited | Status::Unavailable => Some(Duration::from_secs(1)),
                _ => None,
            },
        }
    }
}

impl Error {
    /// Creates a failure of the server itself.
    pub fn internal(cause: impl Into<Cause>) -> Self {
        Self::Internal(cause.into())
    }

    /// Creates the refusal of a KeyPackage in `field`.
    pub fn invalid_package(field: &'static str, cause: impl Into<Cause>) -> Self {
        Self::InvalidPackage(RefusedField { field, cause: cause.into() })
    }

    /// Returns the time to wait before a retry; always set with RateLimited and Unavailable.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::RateLimited(wait) | Self::BundleFetchesUsedUp(wait) => Some(*wait),
            other => other.code().default_wait(),
        }
    }

    /// Returns the name of the refused field.
    pub const fn field(&self) -> Option<&'static str> {
        match self {
            Self::InvalidField(error) => Some(error.field),
            Self::InvalidPackage(refused) => Some(refused.field),
            Self::MalformedOpaque(field) => Some(field),
            Self::InvalidUsername => Some("username"),
            Self::InvalidIdentityKey => Some("identity_key"),
            Self::InviteRequired | Self::InviteInvalid => Some("invite"),
            Self::InvalidIdentityProof | Self::IdentityProofRequired => Some("identity_proof"),
            Self::InvalidHybridKey => Some("hybrid_public_key"),
            Self::InvalidHybridSignature => Some("signature"),
            Self::EmptyBundle | Self::BundleTooLarge => Some("bundle"),
            Self::InvalidDeviceKey => Some("device_key"),
            Self::InvalidDeviceProof => Some("device_proof"),
            _ => None,
        }
    }

    /// Returns the answer for the client.
    pub fn answer(&self) -> Answer {
        let code = self.code();
        let mut detail = ErrorDetail::new(code.as_str(), code.message());
        if let Some(wait) = self.retry_after() {
            detail = detail.with_retry_after(wait);
        }
        if let Some(field) = self.field() {
            detail = detail.with_field(field);
        }
        if let Self::StaleEpoch(epoch) = self {
            detail = detail.with_epoch(*epoch);
        }
        Answer {
            status: code.status().code(),
            payload: Bytes::from(detail.encode_to_vec()),
            lease: None,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code().message())
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match self {
            Self::Malformed(cause) | Self::Internal(cause) => Some(&**cause),
            Self::InvalidPackage(cause) => Some(cause),
            Self::Unavailable(cause) | Self::Conflict(cause) => Some(cause),
            Self::InvalidField(cause) => Some(cause),
            _ => None,
        }
    }
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Unavailable(_) => Self::Unavailable(error),
            StoreError::Conflict(_) => Self::Conflict(error),
            StoreError::Corrupt(_) => Self::Internal(error.into()),
        }
    }
}

impl From<ReadError> for Error {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::DeviceRequired => Self::DeviceRequired,
            ReadError::PositionLost => Self::PositionLost,
            ReadError::Store(error) => error.into(),
        }
    }
}

impl From<GroupRefusal> for Error {
    fn from(refusal: GroupRefusal) -> Self {
        match refusal {
            GroupRefusal::NotFound => Self::GroupNotFound,
            GroupRefusal::NotMember => Self::NotGroupMember,
            GroupRefusal::NotAdmin => Self::NotGroupAdmin,
            GroupRefusal::Banned => Self::BannedFromGroup,
            GroupRefusal::NoSuchAccount(_) => Self::NoSuchMember,
            GroupRefusal::Full => Self::GroupFull,
            GroupRefusal::IdTaken => Self::GroupIdTaken,
            GroupRefusal::StaleVersion(_) => Self::StaleGroupVersion,
            GroupRefusal::StaleEpoch(epoch) => Self::StaleEpoch(epoch),
        }
    }
}

impl From<BanRefusal> for Error {
    fn from(refusal: BanRefusal) -> Self {
        match refusal {
            BanRefusal::NoSuchAccount => Self::UserNotFound,
            BanRefusal::OwnAccount => Self::OwnAccount,
            BanRefusal::Group(refusal) => refusal.into(),
        }
    }
}

impl From<FieldError> for Error {
    fn from(error: FieldError) -> Self {
        Self::InvalidField(error)
    }
}

impl From<Malformed> for Error {
    fn from(error: Malformed) -> Self {
        Self::Malformed(error.into())
    }
}

impl From<prost::DecodeError> for Error {
    fn from(error: prost::DecodeError) -> Self {
        Self::Malformed(error.into())
    }
}
