//! Everything on the wire, for both sides: the messages ([`v1`], compiled from `qpq/v1/*.proto`),
//! the method table ([`methods`]) from which server, client, metrics and `docs/rpc.md` know each
//! RPC, status and events, and the parsers that make domain types of the messages' bytes
//! ([`convert`]).
//!
//! Frames are not here: `qpq-wire` has them. To add an RPC: its messages in a `.proto` file, a row
//! in `methods.rs`, its handler in `qpq-rpc`.

pub mod auth;
pub mod convert;
pub mod deadlines;
pub mod delivery_proof;
pub mod docs;
pub mod event;
pub mod limits;
pub mod methods;
pub mod session;
pub mod status;

pub use auth::{Auth, AuthKind};
pub use convert::FieldError;
pub use deadlines::DeadlineClass;
pub use event::{Event, EventType};
pub use limits::{LimitClass, LimitDefault, LimitSubject};
pub use methods::{METHODS, Method, MethodInfo, RequestSize};
pub use status::Status;

/// The messages, as the `.proto` files have them; their comments are there. A message with a secret
/// in it shows only whether the secret is set. `bytes` fields are slices of the buffer that they
/// were decoded from, and keep it alive.
pub mod v1 {
    #![allow(clippy::all, missing_docs, rustdoc::all, reason = "generated")]
    include!(concat!(env!("OUT_DIR"), "/qpq.v1.rs"));
    include!(concat!(env!("OUT_DIR"), "/debug.rs"));
}

#[cfg(test)]
mod field_numbers;

/// Stands for a secret in `Debug`.
struct Redacted {
    is_set: bool,
}

impl std::fmt::Debug for Redacted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.is_set { "redacted" } else { "unset" })
    }
}
