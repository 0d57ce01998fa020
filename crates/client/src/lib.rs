//! The client library of quicproquo. [`Client`] makes typed calls, and reconnects when the
//! connection is lost. [`Messenger`] is a complete encrypted messenger on top of it, with its state
//! on disk.
//!
//! ```no_run
//! # async fn example() -> Result<(), qpq_client::Error> {
//! use qpq_client::{Messenger, Options, Password, Trust, Username};
//!
//! let options = Options::new("localhost:5001", Trust::FirstUse);
//! let alice = Username::parse("alice").expect("a name");
//! let (dir, password) = ("profiles/alice".as_ref(), Password::from("…"));
//! let messenger = Messenger::register(dir, options, &alice, &password, None).await?;
//! let bob = messenger.conversation_with(&Username::parse("bob").expect("a name")).await?;
//! messenger.send(bob, "hello").await?;
//! # Ok(())
//! # }
//! ```
//!
//! # Crashes, lost connections and restored copies
//!
//! Received and sent messages are on disk, encrypted, before they are acknowledged to the server or
//! leave the machine. A crash or a dropped future at any point loses nothing and shows nothing
//! twice. A message that could not be sent yet is sent under the same id by the next
//! [`Messenger::flush`], [`Messenger::receive`] or [`Messenger::listen`].

#![warn(missing_docs)]

mod call;
mod client;
mod dial;
mod error;
mod file_cipher;
mod link;
mod messenger;
mod opaque;
mod options;
mod profile;
mod safety;
mod secret;

pub use client::{Client, LogoutScope, PendingRegistration, Registered, Session};
pub use error::{
    AuthError, CallError, ConnectError, Error, NoConnection, ProfileError, ServerError,
};
pub use link::ConnectionEvent;
pub use messenger::{
    ContactRequest, Conversation, ConversationId, ConversationKind, DeliveryState, Entry, EntryId,
    Event, Existing, FIRST_DEVICE, GroupBan, GroupMember, InvalidLinkCode, InvalidRecoveryCode,
    LINK_REQUEST_LIFETIME, LinkCode, LinkRequest, Linking, Listener, MAX_DEVICE_NAME,
    MAX_GROUP_NAME, MAX_STRANGERS, MAX_TEXT, Membership, Messenger, NewAccount, NewFile, OwnDevice,
    PasswordChanged, Person, RecoveryCheck, RecoveryCode, RecoveryStatus, Requests, Role,
    SendOutcome, Sent, Standing,
};
pub use options::{DEFAULT_PORT, Options, Trust};
pub use profile::{Profile, ProfileStatus};
pub use qpq_domain::Backoff;
pub use safety::{fingerprint, safety_number};
pub use secret::{ExportKey, Password};

pub use qpq_domain::{DeviceId, IdentityKey, Seq, SessionToken, UnixMillis, Username};
pub use qpq_mls::{Error as MlsError, GroupId, Identity, SharedFile, vault::VaultKey};
pub use qpq_proto::{Method, ServerEvent, Status, methods, v1};
pub use qpq_transport::{Fingerprint, ParseFingerprintError};
