//! Linking: a new device becomes one of the account's.
//!
//! The new device logs in with the password and sends a *request* to the account's own inbox: its
//! device key and a key to seal to. Both machines show the *code* of the request, and a person
//! compares the two. The old device then asks for the password, certifies the device key, registers
//! the device, and sends the *grant*: the identity key, conversations, and people, sealed to the
//! new device. The new device joins the conversations by itself.
//!
//! Two checks exclude a server that lies. The code binds the grant to the new device: a server
//! cannot replace the request by its own. The grant's MAC is under a key that only the password
//! derives: a server cannot send a grant of its own.
//!
//! | file | contents |
//! |---|---|
//! | `request` | the request |
//! | `code` | the code of a request |
//! | `grant` | the grant |
//! | `approve` | the old device: requests that wait, approval |
//! | `linking` | the new device |
//! | `interrupted` | the note of a link in progress |

mod approve;
mod code;
mod grant;
mod interrupted;
mod linking;
mod request;

use std::time::Duration;

use qpq_domain::{ChannelId, DeviceId, IdentityKey};
use sha2::{Digest as _, Sha256};

#[cfg(test)]
pub(in crate::messenger) use self::grant::GrantedConversation;
pub use self::{
    approve::LinkRequest,
    code::{InvalidLinkCode, LinkCode},
    linking::Linking,
};
pub(in crate::messenger) use self::{
    grant::AccountContent,
    interrupted::{note, revoke},
    linking::{NewProfile, check_missing, identity_of, new_device, pinned},
};

/// The time for which a request is valid.
pub const LINK_REQUEST_LIFETIME: Duration = Duration::from_secs(15 * 60);

/// Returns the channel of the requests of an account.
fn request_channel(identity: &IdentityKey) -> ChannelId {
    channel(&[b"qpq/link/1", identity.as_bytes()])
}

/// Returns the first message of a restored device to its own account, and the channel. Other
/// devices ignore it as a grant that is not theirs. The seq of the message is the device's
/// position.
pub(in crate::messenger) fn position_message(device: &DeviceId) -> (ChannelId, Vec<u8>) {
    (grant_channel(device), grant::PREFIX.to_vec())
}

/// Returns the channel of the grants for a device.
fn grant_channel(device: &DeviceId) -> ChannelId {
    channel(&[b"qpq/link-grant/1", device.as_bytes()])
}

fn channel(parts: &[&[u8]]) -> ChannelId {
    let digest = Sha256::digest(parts.concat());
    ChannelId::try_from(&digest[..16]).expect("a channel id has 16 bytes")
}
