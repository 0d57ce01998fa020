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
//! - **Sending**: in one transaction of the database, call [`Client::encrypt`], [`Client::add`] or
//!   [`Client::remove`], then [`Client::save`], and save the returned [`Parcel`]s. Once that is
//!   committed, send them, again after a crash, until the server has them. A parcel that is sent
//!   from a state that was never saved would reuse a key; one that is saved but never sent (a
//!   commit above all) leaves the other members behind.
//! - **Receiving**: in one transaction, call [`Client::receive`], then [`Client::save`], and save
//!   what it returned, until it has been shown. Then acknowledge the message to the server. A
//!   message that arrives again after a crash between the two is [`Received::Duplicate`].
//! - **Key packages**: commit before uploading what [`Client::key_packages`] returned: the private
//!   halves are in the database.
//!
//! # Who may do what
//!
//! Only a group's creator commits (adds and removes members), until the server orders commits. The
//! creator is bound into the group's id, see [`GroupId`], so nobody else can pass for it. Usernames
//! in groups are their owners' claims: compare every [`Member`] of [`Received::Joined`] and
//! [`Received::Committed`] with the directory before showing its name.
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
mod outline;
mod packages;
mod profile;
mod receive;
mod received;
mod requests;
mod snapshot;
mod store;
mod summary;
mod tables;
pub mod vault;
mod waiting;

pub use client::{Added, Client, Invitee, Parcel};
pub use content::Content;
pub use error::Error;
pub use identity::{Identity, Member};
pub use profile::{GroupId, GroupKind, direct_channel};
pub use received::{Arrival, Ignored, Lost, Received, Request, Rules, Unreadable};
pub use requests::{MAX_REQUESTS, MAX_REQUESTS_EACH};
pub use snapshot::ImportError;
pub use summary::GroupSummary;
