//! Identifiers, usernames, keys and limits, with the rules that depend on no other crate.
//!
//! All other crates depend on this one, so it contains no runtime, no wire format and no database.
//! Bytes of requests become these types at the boundary (`proto::convert`) and become bytes again
//! only when they are sent or stored.

#![warn(missing_docs)]

mod backoff;
mod choice;
mod device;
mod group;
mod identity;
mod ids;
mod invite;
mod limits;
mod lookalike;
mod moderation;
mod session;
mod time;
mod username;

pub use backoff::Backoff;
pub use choice::Choice;
pub use device::{DeviceKey, MAX_DEVICE_NAME, MAX_DEVICES};
pub use group::{
    MAX_GROUP_DESCRIPTION, MAX_GROUP_INFO, MAX_GROUP_NAME, MAX_GROUP_SETTINGS, MAX_MEMBERS, Pair,
    Role,
};
pub use identity::{IdentityKey, InvalidIdentity};
pub use ids::{
    AccountId, BlobId, ChannelId, DeviceId, GroupId, MessageId, Seq, StoreId, WrongLength,
};
pub use invite::{
    InvalidInviteCode, InvalidInviteId, InviteCode, InviteHash, InviteId, MAX_INVITE_NOTE,
    MAX_INVITE_USES,
};
pub use limits::{
    BlobLimits, DeliveryLimits, KeyPackageLimits, MAX_BATCH, MAX_BLOB_CHUNK, MAX_ENDPOINT,
    MAX_MIME_TYPE, StoreLimits,
};
pub use lookalike::{Skeleton, UsernameScripts};
pub use moderation::{MAX_BAN_REASON, MAX_BLOCKS, MAX_CONVERSATION_ID, MAX_REPORT, ReportLimits};
pub use session::{SessionToken, TokenHash};
pub use time::UnixMillis;
pub use username::{InvalidUsername, Username};
