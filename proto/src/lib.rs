//! The protocol for both sides: the messages ([`v1`], compiled from `qpq/v1/*.proto`), the method
//! table ([`methods`]) that server, client, metrics and `docs/rpc.md` share, statuses and events,
//! and the parsers that turn bytes of messages into domain types ([`convert`]).
//!
//! Frames are in `qpq-wire`. An RPC consists of its messages in a `.proto` file, a row in
//! `methods.rs` and a handler in `qpq-rpc`.

#![warn(missing_docs)]

pub mod auth;
pub mod convert;
pub mod deadlines;
pub mod delivery_proof;
pub mod docs;
pub mod event;
pub mod limits;
pub mod methods;
pub mod retry;
pub mod session;
pub mod status;

pub use auth::{Auth, AuthKind};
pub use convert::FieldError;
pub use deadlines::DeadlineClass;
pub use event::{EventType, ServerEvent};
pub use limits::{LimitClass, LimitDefault, LimitSubject};
pub use methods::{METHODS, Method, MethodInfo, RequestSize};
pub use retry::RetryPolicy;
pub use status::Status;

/// The first bytes of a message with a serialized [`v1::RotationRequest`] after them.
pub const ROTATION_PREFIX: [u8; 4] = *b"QPQR";

/// The generated messages; the `.proto` files document them. `Debug` shows only whether a secret
/// field is set. `bytes` fields are slices of the buffer that they were decoded from, and keep that
/// buffer alive.
pub mod v1 {
    #![allow(clippy::all, missing_docs, rustdoc::all, reason = "generated")]
    include!(concat!(env!("OUT_DIR"), "/qpq.v1.rs"));
    include!(concat!(env!("OUT_DIR"), "/debug.rs"));
}

#[cfg(test)]
mod field_numbers;

/// The placeholder of a secret in `Debug`.
struct Redacted {
    is_set: bool,
}

impl std::fmt::Debug for Redacted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.is_set { "redacted" } else { "unset" })
    }
}
