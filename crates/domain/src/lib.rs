//! What the server speaks about: identifiers, names, and the rules that need nothing but
//! themselves.
//!
//! Every other crate stands on this one, so it knows no runtime, no wire format and no database.
//! Bytes become these types at the door (`proto::convert`) and stay these types until they leave
//! again.

mod backoff;
mod identity;
mod ids;
mod limits;
mod lookalike;
mod session;
mod time;
mod username;

pub use backoff::Backoff;
pub use identity::{IdentityKey, InvalidIdentity};
pub use ids::{AccountId, ChannelId, DeviceId, MessageId, Seq, StoreId, WrongLength};
pub use limits::{Delivery, KeyPackageCaps, MAX_BATCH};
pub use lookalike::{Skeleton, UsernameScripts};
pub use session::{SessionToken, TokenHash};
pub use time::UnixMillis;
pub use username::{InvalidUsername, Username};
