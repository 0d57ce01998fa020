//! MLS (RFC 9420) for both sides of quicproquo; the only crate that knows openmls, which is slow to
//! compile.
//!
//! The server uses [`key_package::check`] to judge what clients upload, and nothing else: it takes
//! no part in any group. Clients use [`Client`], a state machine without network: it makes key
//! packages, starts conversations, encrypts, and turns received bytes into [`Received`] values. Its
//! state is in a [`database`], sealed under a key of [`vault`].
//!
//! # The crash rule
//!
//! MLS keys are used once and then deleted, so the order in which a caller saves and sends is what
//! makes it safe:
//!
//! - **Sending**: in one transaction of the database, call [`Client::encrypt`], then
//!   [`Client::save`], and save the returned [`Parcel`]. Once that is committed, send it, again
//!   after a crash, until the server has it. A parcel that is sent from a state that was never
//!   saved would reuse a key.
//! - **Changing a group**: in one transaction, call [`Client::commit`], then [`Client::save`], and
//!   save the [`Commit`]. Then offer it to the server, again after a crash under the same message
//!   id, until the server has accepted it ([`Client::confirm`]) or another one for the same epoch
//!   ([`Client::discard`], read the inbox, begin again). Send the Welcome after that.
//! - **Receiving**: in one transaction, call [`Client::receive`], then [`Client::save`], and save
//!   what it returned, until it has been shown. Then acknowledge the message to the server. A
//!   message that arrives again after a crash between the two is [`Received::Duplicate`].
//! - **Passes**: before an inbox is read, call [`Client::unpassed`], and [`Client::end_pass`] once
//!   the read has reached the end of the inbox. Members that commits of ours have removed are
//!   refused from then on.
//! - **Key packages**: commit before uploading what [`Client::key_packages`] returned: the private
//!   halves are in the database.
//!
//! # Permissions
//!
//! Any member commits; the server accepts one commit for each epoch. The changes that a commit may
//! have depend on its author (see `group::rules`); every member checks them. A group's creator is
//! bound into its id, see [`GroupId`]. Usernames in groups are their owners' claims: compare every
//! [`Member`] of [`Received::Joined`] and [`Received::Committed`] with the directory before showing
//! its name.
//!
//! # Time
//!
//! Every function that needs the time is given it. openmls itself reads the system clock in two
//! places that cannot be given another: whether a package's lifetime has begun and not ended when a
//! commit adds it, on the side that makes the commit and on the sides that receive it. A client
//! must therefore be given the system's time, and one that reads such a commit only after the
//! package's end cannot follow ([`Ignored::LifetimeOver`]). The server's check depends on the given
//! time alone.

mod client;
mod codec;
mod content;
pub mod database;
mod error;
mod group;
mod identity;
mod invitation;
pub mod key_package;
mod leaf;
mod outline;
mod packages;
mod passes;
mod profile;
mod receive;
mod received;
mod requests;
pub mod sealed;
mod snapshot;
mod store;
mod summary;
mod tables;
pub mod vault;
#[cfg(test)]
mod vectors;
mod waiting;

pub use client::{Change, Client, Commit, NewMember, Parcel};
pub use content::Content;
pub use error::Error;
pub use identity::{Identity, Member};
pub use leaf::{Device, DeviceDescription, MemberDevice};
pub use passes::Unpassed;
pub use profile::{GroupId, GroupKind, direct_channel};
pub use received::{Arrival, GroupChange, Ignored, Lost, Received, Request, Rules, Unreadable};
pub use requests::{MAX_REQUESTS, MAX_REQUESTS_EACH};
pub use snapshot::ImportError;
pub use summary::GroupSummary;
