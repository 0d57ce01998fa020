//! The tables of the messenger in the profile's database. `qpq-mls` has those below 32.

use qpq_mls::database::Table;

/// The history, in the lane of each conversation. Open items are unseen.
pub(super) const ENTRIES: Table = Table::new(32);
/// The conversations that have a history.
pub(super) const CONVERSATIONS: Table = Table::new(33);
/// The queue of outgoing messages, in the lane of the entry that each belongs to.
pub(super) const OUTBOX: Table = Table::new(34);
/// Keys with names, in the lane of the name.
pub(super) const PEOPLE: Table = Table::new(35);
/// Keys of people whose names the directory was not asked about yet.
pub(super) const UNCHECKED: Table = Table::new(36);
/// Keys of people whose messages are refused. 38 to 41 are in `repair`.
pub(super) const BLOCKED: Table = Table::new(42);
/// Blocks, and ends of blocks, that the server does not know yet.
pub(super) const UNSENT_BLOCKS: Table = Table::new(60);
/// Single values.
pub(super) const SETTINGS: Table = Table::new(37);
/// Keys of acquaintances. The groups of acquaintances are joined without asking.
pub(super) const ACQUAINTED: Table = Table::new(43);
/// The time at which the directory was last asked about the devices of an account, or of all
/// accounts of a group. 45 and 46 are in `changes`.
pub(super) const CHECKED: Table = Table::new(47);
/// Requests to renew keys: the time of arrival, the time at which the renewal is due, and the
/// group.
pub(super) const ROTATIONS: Table = Table::new(48);
/// The time of the last attempt to join a channel's group by ourselves.
pub(super) const TRIED: Table = Table::new(49);
/// Requests of new devices to be linked: the time of arrival, and the request.
pub(super) const LINK_REQUESTS: Table = Table::new(50);
/// Members that have left a group and are still in it: the group, and the identity key.
pub(super) const LEAVING: Table = Table::new(51);
/// The number of direct MLS groups that each stranger has begun.
pub(super) const STRANGERS: Table = Table::new(44);
/// The keys of files that are being uploaded, by the SHA-256 of their content.
pub(super) const UPLOADS: Table = Table::new(52);
