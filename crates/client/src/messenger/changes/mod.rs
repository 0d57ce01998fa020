//! Changes of groups that wait for the server.
//!
//! The server accepts one commit for each epoch of a group (BatchEnqueue with `commit`). A change
//! is saved before it runs. Its commit is saved with the message id under which it is sent, and
//! applied once the server has accepted it. If the commit of another member was first, the inbox is
//! read and another commit is created in the group's new state. After a crash at any point the
//! change continues with the saved step: the server answers the repeat of an accepted commit as it
//! did the first time.
//!
//! The server's epoch is not that of MLS, and not trusted: it only decides which commit is first.
//!
//! | file | contents |
//! |---|---|
//! | `run` | the steps of a change: the calls to the server |
//! | `apply` | what an answer of the server changes in the state |
//! | `record` | the saved form of a change |

mod apply;
mod record;
mod run;

use qpq_domain::{ChannelId, IdentityKey, MessageId, UnixMillis};
use qpq_mls::{
    Change, Commit, GroupId,
    database::{DatabaseError, Item, NewItem, Table},
};

use self::record::SavedChange;
use super::{
    records::{decode, encode},
    state::State,
};
use crate::error::Error;

/// The pending changes, in the order in which they were saved.
const CHANGES: Table = Table::new(45);
/// The server's record of each group: the channel id, and the epoch if it is known.
const SERVER_GROUPS: Table = Table::new(46);

/// A saved change that is not complete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PendingChange {
    pub(super) operation: Operation,
    /// The number of attempts that were refused because another commit was first.
    pub(super) attempts: u32,
    /// The commit, once it is created.
    pub(super) offer: Option<Offer>,
}

/// The content of a pending change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Operation {
    /// Changes a group.
    Change { group: GroupId, change: Change, cause: Cause },
    /// Joins the group of a channel by an external commit of this device. `known` are the accounts
    /// that may vouch for the group.
    Join { channel: ChannelId, known: Vec<IdentityKey> },
    /// Removes this account from the server's list of members, after it has left the group.
    Leave { channel: ChannelId },
}

/// The initiator of a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cause {
    /// The person. The change is not shown as news.
    Person,
    /// The client itself, without a command by the person.
    Client,
}

/// A commit that is sent to the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Offer {
    pub(super) message_id: MessageId,
    /// The server's epoch for which the commit was created.
    pub(super) expected_epoch: u64,
    pub(super) commit: Commit,
    /// Whether the commit is accepted and applied. Only the server's list of members is left to
    /// update.
    pub(super) is_applied: bool,
}

/// The server's record of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ServerGroup {
    pub(super) channel: ChannelId,
    /// The epoch up to which the inbox was read; `None` if it is unknown.
    pub(super) epoch: Option<u64>,
}

impl State {
    /// Saves an operation as a pending change; returns its number.
    pub(super) fn add_change(&self, operation: Operation) -> Result<u64, DatabaseError> {
        let pending = PendingChange { operation, attempts: 0, offer: None };
        let lane = pending.lane();
        let new = NewItem { key: None, lane: Some(&lane), open: true };
        self.database().append(CHANGES, new, &encode(&SavedChange::from(&pending)))
    }

    /// Returns whether a change is pending.
    pub(super) fn has_changes(&self) -> Result<bool, DatabaseError> {
        Ok(!self.database().items_after(CHANGES, None, 1)?.is_empty())
    }

    /// Returns whether the same operation is pending.
    pub(super) fn is_pending(&self, operation: &Operation) -> Result<bool, DatabaseError> {
        let items = self.database().in_lane_ascending(CHANGES, &lane(operation))?;
        for item in &items {
            if parse(item)?.operation == *operation {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Returns the first change after a number.
    fn next_change(
        &self,
        after: Option<u64>,
    ) -> Result<Option<(u64, PendingChange)>, DatabaseError> {
        let items = self.database().items_after(CHANGES, after, 1)?;
        items.first().map(|item| Ok((item.number, parse(item)?))).transpose()
    }

    fn change(&self, number: u64) -> Result<Option<PendingChange>, DatabaseError> {
        self.database().item(CHANGES, number)?.as_ref().map(parse).transpose()
    }

    fn save_change(&self, number: u64, pending: &PendingChange) -> Result<(), DatabaseError> {
        self.database().replace_item(CHANGES, number, &encode(&SavedChange::from(pending)))?;
        Ok(())
    }

    fn remove_change(&self, number: u64) -> Result<(), DatabaseError> {
        self.database().remove_item(CHANGES, number)
    }

    /// Returns the server's record of a group, as far as it is known here.
    pub(super) fn server_group(
        &self,
        group: &GroupId,
    ) -> Result<Option<ServerGroup>, DatabaseError> {
        let Some(row) = self.database().get(SERVER_GROUPS, group.as_bytes())? else {
            return Ok(None);
        };
        let damaged = || DatabaseError::Damaged("a group's row is cut short".into());
        let (channel, epoch) = row.split_at_checked(16).ok_or_else(damaged)?;
        let channel = ChannelId::try_from(channel).map_err(|_| damaged())?;
        let epoch = match epoch {
            [] => None,
            bytes => Some(u64::from_be_bytes(bytes.try_into().map_err(|_| damaged())?)),
        };
        Ok(Some(ServerGroup { channel, epoch }))
    }

    fn set_server_group(&self, group: &GroupId, known: ServerGroup) -> Result<(), DatabaseError> {
        let mut row = known.channel.as_bytes().to_vec();
        row.extend(known.epoch.into_iter().flat_map(u64::to_be_bytes));
        self.database().put(SERVER_GROUPS, group.as_bytes(), None, &row)
    }

    /// Forgets the server's records of groups, and schedules a commit in each group.
    ///
    /// The records may be those of an earlier time: members may be missing, and the GroupInfo is of
    /// an earlier epoch. A commit of ours corrects both.
    pub(super) fn renew_server_groups(&mut self, now: UnixMillis) -> Result<(), Error> {
        self.database().delete_where(SERVER_GROUPS, |_| true)?;
        for group in self.mls.groups()?.into_iter().filter(|group| group.active) {
            self.note_rotation(group.channel, now)?;
        }
        Ok(())
    }

    /// Forgets the server's epoch, since another member's commit arrived. The server is asked for
    /// the epoch before the next commit of ours.
    pub(super) fn forget_server_epoch(&self, group: &GroupId) -> Result<(), DatabaseError> {
        match self.server_group(group)? {
            Some(known @ ServerGroup { epoch: Some(_), .. }) => {
                self.set_server_group(group, ServerGroup { epoch: None, ..known })
            }
            _ => Ok(()),
        }
    }
}

impl PendingChange {
    /// Returns the lane, in which changes run one after the other: a group's id or a channel's.
    fn lane(&self) -> Vec<u8> {
        lane(&self.operation)
    }
}

fn lane(operation: &Operation) -> Vec<u8> {
    match operation {
        Operation::Change { group, .. } => group.as_bytes().to_vec(),
        Operation::Join { channel, .. } | Operation::Leave { channel } => {
            channel.as_bytes().to_vec()
        }
    }
}

fn parse(item: &Item) -> Result<PendingChange, DatabaseError> {
    Ok(decode::<SavedChange>(&item.value)?.restore()?)
}
