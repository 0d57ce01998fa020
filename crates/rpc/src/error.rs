//! Every way in which a call can fail, once: what it means ([`Error`]), and in one table what the client is told, under
//! which stable code, and how loudly the server logs it. `docs/errors.md` is generated from the same table.
//!
//! Handlers name the meaning and nothing else. What caused it travels inside the error to the log and never further:
//! the wire gets the status, the code, the fixed sentence, perhaps the request field and a time to wait.

use std::{error::Error as StdError, fmt, time::Duration};

use bytes::Bytes;
use prost::Message as _;
use qpq_ports::StoreError;
use qpq_proto::{FieldError, Status, session::Malformed, v1::ErrorDetail};
use tracing::Level;

use crate::Answer;

/// What a cause is kept as.
pub type Cause = Box<dyn StdError + Send + Sync>;

macro_rules! errors {
    ($($(#[$doc:meta])* $name:ident $(($data:ty))? => $status:ident $code:literal $level:ident $message:literal;)+) => {
        /// Why a call was not answered Ok.
        #[derive(Debug)]
        pub enum Error {
            $($(#[$doc])* $name $(($data))?,)+
        }

        /// An [`Error`] without what it carries: a row of the table.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Code {
            $($(#[$doc])* $name,)+
        }

        impl Code {
            /// The table, in its order.
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
            /// Which row of the table this is.
            pub const fn code(&self) -> Code {
                match self {
                    $(Self::$name { .. } => Code::$name,)+
                }
            }
        }
    };
}

/// A field and what was wrong with it.
#[derive(Debug, thiserror::Error)]
#[error("{field} was refused")]
pub struct RefusedField {
    /// Its name in the `.proto` file.
    pub field: &'static str,
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
    UnknownMethod => UnknownMethod "rpc.unknown_method" DEBUG "The server does not have this method.";
    TooLarge => BadRequest "rpc.too_large" DEBUG "The request is larger than this method accepts.";
    MalformedFrame => BadRequest "rpc.malformed_frame" DEBUG "The stream does not hold exactly one request frame.";
    SlowRequest => DeadlineExceeded "rpc.slow_request" DEBUG "The request did not arrive whole within 10 seconds.";
    /// The payload is not the method's message.
    Malformed(Cause) => BadRequest "rpc.malformed" DEBUG "The payload is not this method's protobuf message.";
    /// A field that is not what it must be.
    InvalidField(FieldError) => BadRequest "rpc.invalid_field" DEBUG "A field of the request has a wrong length or value.";
    /// A budget is used up until the time given.
    RateLimited(Duration) => RateLimited "rpc.rate_limited" DEBUG "Too many calls: wait and try again.";
    DeadlineExceeded => DeadlineExceeded "rpc.deadline" WARN "The call took too long; it may or may not have had its effect.";
    /// The server has more dear work waiting than it can do soon.
    Overloaded => Unavailable "rpc.overloaded" WARN "The server is busy: wait and try again.";
    /// The client has as many unread answers as it may have.
    UnreadAnswers => RateLimited "rpc.unread_answers" DEBUG "Earlier answers are not read yet: read them and try again.";
    /// All memory for answers is in use.
    AnswersFull => Unavailable "rpc.answers_full" WARN "The server has no memory for another answer now: wait and try again.";
    /// A store cannot be reached or cannot commit.
    Unavailable(StoreError) => Unavailable "rpc.unavailable" WARN "The server cannot do this now: wait and try again.";
    /// Another writer was first, more often than the store cared to retry.
    Conflict(StoreError) => Unavailable "rpc.conflict" WARN "Others changed the same thing at once: try again.";
    Internal(Cause) => Internal "rpc.internal" ERROR "The server failed; the fault is logged there.";

    SessionRequired => Unauthorized "auth.session_required" DEBUG "This needs a session: log in.";
    /// Unknown, revoked or expired: nobody is told which.
    SessionExpired => Unauthorized "auth.session_expired" DEBUG "The session has ended: log in again.";
    FreshLoginRequired => Unauthorized "auth.fresh_login_required" DEBUG "This needs a login of the last 5 minutes: log in again.";
    AdminRequired => Forbidden "auth.admin_required" DEBUG "Only the server's administrators may do this.";
    /// The named field is no OPAQUE message of the right kind.
    MalformedOpaque(&'static str) => BadRequest "auth.malformed" DEBUG "This is not the OPAQUE message that belongs here.";
    InvalidUsername => BadRequest "auth.invalid_username" DEBUG "A username has 1 to 64 characters: letters of one script, digits, '.', '-', '_' and apostrophes.";
    InvalidIdentityKey => BadRequest "auth.invalid_identity_key" DEBUG "An identity key is a canonical Ed25519 public key of 32 bytes.";
    IdentityProofRequired => BadRequest "auth.identity_proof_required" DEBUG "This server wants the identity key's signature: set identity_proof.";
    InvalidIdentityProof => BadRequest "auth.invalid_identity_proof" DEBUG "The identity proof is not this identity key's signature over this registration.";
    UsernameTaken => Forbidden "auth.username_taken" DEBUG "The username, or one that looks like it, is taken: choose another.";
    IdentityTaken => Forbidden "auth.identity_taken" DEBUG "The identity key belongs to an account already: make a new one.";
    /// Wrong password, unknown user, no login under way, another account's key: nobody is told which.
    LoginFailed => Unauthorized "auth.failed" DEBUG "Wrong username or password, or the login took too long: start again.";

    NotOwner => Forbidden "delivery.not_owner" DEBUG "Only its owner reads an inbox.";
    DeviceRequired => Forbidden "delivery.device_required" DEBUG "The account has devices: name the one that reads.";
    NoSuchRecipient => NotFound "delivery.no_such_recipient" DEBUG "No account has this identity key.";
    QueueFull => RateLimited "delivery.queue_full" DEBUG "The recipient's inbox is full until its owner reads it: try later.";
    /// The inbox is more than half full.
    SenderShare => RateLimited "delivery.sender_share" DEBUG "The recipient's inbox is more than half full, and holds as much of yours as one sender may have there: try later.";
    PayloadTooLarge => BadRequest "delivery.payload_too_large" DEBUG "The message is larger than this server takes.";
    InvalidBatch => BadRequest "delivery.invalid_batch" DEBUG "A batch is one payload for many recipients or a list of messages, never both, of at most 1000, no recipient twice.";
    BatchTooLarge => BadRequest "delivery.batch_too_large" DEBUG "The batch is larger than this server accepts, the payload counted for each recipient: send it in parts.";
    StaleEpoch => Forbidden "delivery.stale_epoch" DEBUG "The channel has a newer epoch: fetch, apply what is there, and commit anew.";
    CommitUnsupported => BadRequest "delivery.commit_unsupported" DEBUG "This server does not order commits: send without commit.";

    /// With the check that failed.
    InvalidPackage(RefusedField) => BadRequest "keys.invalid_package" DEBUG "The KeyPackage is malformed, expired, of another owner, or was given out before.";
    KeyPackagesFull => RateLimited "keys.too_many" DEBUG "The account has as many KeyPackages as it may have: wait until some are fetched.";
    NotKeyOwner => Forbidden "keys.not_owner" DEBUG "Only its owner uploads an identity's keys.";
    InvalidHybridKey => BadRequest "keys.invalid_hybrid_key" DEBUG "A hybrid key is an X25519 and an ML-KEM-768 public key, 1216 bytes, both valid.";

    UserNotFound => NotFound "users.not_found" DEBUG "No such user.";
    UnknownDomain => NotFound "federation.unknown_domain" DEBUG "This server does not know the user's server.";
}

impl Code {
    pub const fn status(self) -> Status {
        self.row().status
    }

    /// What clients and metrics switch on; never changes.
    pub const fn as_str(self) -> &'static str {
        self.row().code
    }

    /// A fixed English sentence.
    pub const fn message(self) -> &'static str {
        self.row().message
    }

    /// How loudly the server logs it.
    pub const fn level(self) -> Level {
        self.row().level
    }

    /// How long to wait where the error itself does not know better. Set for every row that must say it.
    const fn default_wait(self) -> Option<Duration> {
        match self {
            Self::Conflict => Some(Duration::from_millis(50)),
            Self::Overloaded => Some(Duration::from_millis(500)),
            Self::QueueFull | Self::SenderShare => Some(Duration::from_secs(10)),
            Self::KeyPackagesFull => Some(Duration::from_secs(60)),
            _ => match self.status() {
                Status::RateLimited | Status::Unavailable => Some(Duration::from_secs(1)),
                _ => None,
            },
        }
    }
}

impl Error {
    /// A fault of the server itself.
    pub fn internal(cause: impl Into<Cause>) -> Self {
        Self::Internal(cause.into())
    }

    /// A KeyPackage in `field` that may not be stored.
    pub fn invalid_package(field: &'static str, cause: impl Into<Cause>) -> Self {
        Self::InvalidPackage(RefusedField { field, cause: cause.into() })
    }

    /// When another try makes sense; always there with RateLimited and Unavailable.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::RateLimited(wait) => Some(*wait),
            other => other.code().default_wait(),
        }
    }

    /// The request field that was refused.
    pub const fn field(&self) -> Option<&'static str> {
        match self {
            Self::InvalidField(error) => Some(error.field),
            Self::InvalidPackage(refused) => Some(refused.field),
            Self::MalformedOpaque(field) => Some(field),
            Self::InvalidUsername => Some("username"),
            Self::InvalidIdentityKey => Some("identity_key"),
            Self::InvalidIdentityProof | Self::IdentityProofRequired => Some("identity_proof"),
            Self::InvalidHybridKey => Some("hybrid_public_key"),
            _ => None,
        }
    }

    /// What goes to the client.
    pub fn answer(&self) -> Answer {
        let code = self.code();
        let mut detail = ErrorDetail::new(code.as_str(), code.message());
        if let Some(wait) = self.retry_after() {
            detail = detail.with_retry_after(wait);
        }
        if let Some(field) = self.field() {
            detail = detail.with_field(field);
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
