//! MLS (RFC 9420) for the server and clients of quicproquo. The only crate that depends on openmls,
//! which is slow to compile.
//!
//! The server only uses [`key_package::check`], for the KeyPackages that clients upload, and is in
//! no group. Clients use [`Client`], a state machine without network: [`Client`] creates
//! KeyPackages, starts conversations, encrypts, and turns received bytes into [`Received`] values.
//! Its state is in a [`database`], sealed under a key of [`vault`].
//!
//! # The crash rule
//!
//! MLS keys are used once and then deleted. Therefore a caller must save and send in this order:
//!
//! - **Sending**: in one transaction of the database, call [`Client::encrypt`], then
//!   [`Client::save`], and save the returned [`Parcel`]. After the commit, send the parcel, and
//!   repeat this after a crash until the server has it. If a parcel is sent before its state is
//!   saved, a crash leads to a second use of its key.
//! - **Changing a group**: in one transaction, call [`Client::commit`], then [`Client::save`], and
//!   save the [`Commit`]. Then offer it to the server, again after a crash under the same message
//!   id, until the server has accepted it ([`Client::confirm`]) or another one for the same epoch
//!   ([`Client::discard`], read the inbox, begin again). Send the Welcome after that.
//! - **Receiving**: in one transaction, call [`Client::receive`], then [`Client::save`], and save
//!   the results until they have been shown. Then acknowledge the message to the server. A message
//!   that arrives again after a crash between these steps is [`Received::Duplicate`].
//! - **Passes**: before an inbox is read, call [`Client::unpassed`], and [`Client::end_pass`] once
//!   the read has reached the end of the inbox. Members that commits of ours have removed are
//!   refused from then on.
//! - **KeyPackages**: commit before uploading the packages that [`Client::key_packages`] returned:
//!   the private halves are in the database.
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
//! The time is an argument of every function that needs it. openmls itself reads the system clock
//! in two places, which cannot be given another: both the author and the receivers of a commit that
//! adds a package check that the package's lifetime has begun and not ended. A client must
//! therefore be given the system's time. One that reads such a commit only after the package's end
//! cannot follow ([`Ignored::LifetimeOver`]). The server's check depends on the given time alone.

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
pub use content::{Content, SharedFile};
pub use error::Error;
pub use identity::{Identity, Member};
pub use leaf::{Device, DeviceDescription, MemberDevice};
pub use passes::Unpassed;
pub use profile::{GroupId, GroupKind, direct_channel};
pub use received::{Arrival, GroupChange, Ignored, Lost, Received, Request, Rules, Unreadable};
pub use requests::{MAX_REQUESTS, MAX_REQUESTS_EACH};
pub use snapshot::ImportError;
pub use summary::GroupSummary;
