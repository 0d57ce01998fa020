//! The tables of this crate in the client's database.

use crate::database::Table;

/// The identity's seed and the username.
pub(crate) const ACCOUNT: Table = Table::new(1);
/// openmls's values, in the lane of their group.
pub(crate) const MLS: Table = Table::new(2);
/// The record of each group; that of a direct group is in the lane of the peer.
pub(crate) const GROUPS: Table = Table::new(3);
/// Our KeyPackages with their private halves.
pub(crate) const PACKAGES: Table = Table::new(4);
/// Messages that wait for a Welcome or a commit, in the lane of their group.
pub(crate) const WAITING: Table = Table::new(5);
/// Direct groups that are no longer used for sending.
pub(crate) const RETIRED: Table = Table::new(6);
/// The number of our keys to skip in a group before the next encryption.
pub(crate) const SKIPPED: Table = Table::new(7);
/// Groups that we have left. Later messages to them are dropped.
pub(crate) const LEFT: Table = Table::new(8);
/// Requests of strangers, in the lane of their creator. The rows of this table count dropped
/// requests and messages.
pub(crate) const REQUESTS: Table = Table::new(9);
/// Messages to groups that wait as requests, in the lane of their group.
pub(crate) const REQUEST_MESSAGES: Table = Table::new(10);
/// Groups whose request was declined or dropped. Later messages to them are dropped.
pub(crate) const DECLINED: Table = Table::new(11);
/// This device: its id, name, secret seed, and the account's statement about it.
pub(crate) const DEVICE: Table = Table::new(12);
/// Groups that we are about to join by ourselves.
pub(crate) const JOINING: Table = Table::new(13);
/// Commits of ours since which the inbox was not read to its end, in the lane of their group.
pub(crate) const UNPASSED: Table = Table::new(15);
/// The KeyPackages of ours that were used, by their reference, with the end of their lifetime.
pub(crate) const USED: Table = Table::new(14);
