//! The passes of the inbox, and the commits of ours since which no pass was complete.
//!
//! A pass reads the inbox to its end. Our own inbox does not contain a commit of ours, so messages
//! that the server accepted before the commit may be unread until a pass is complete that began
//! after the commit was applied. Until then messages of the members that the commit removed are
//! accepted, and after an external commit messages of earlier epochs are expected and ignored.

use crate::{
    client::Client,
    codec::{Malformed, Reader},
    database::{Database, DatabaseError},
    profile::GroupId,
    tables::UNPASSED,
};

/// A commit of ours since which the inbox was not read to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unpassed {
    group: GroupId,
    /// The epoch that the commit ended.
    last_epoch: u64,
}

impl Unpassed {
    fn parse(value: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(value);
        let group = GroupId::try_from(reader.raw(32)?).map_err(|_| Malformed)?;
        Ok(Self { group, last_epoch: reader.number()? })
    }

    fn encode(&self) -> Vec<u8> {
        [self.group.as_bytes(), &self.last_epoch.to_be_bytes()[..]].concat()
    }
}

impl Client {
    /// Returns the commits of ours since which the inbox was not read to its end.
    ///
    /// Must be called before a pass of the inbox begins, for [`Client::end_pass`].
    pub fn unpassed(&self) -> Result<Vec<Unpassed>, DatabaseError> {
        let damaged = |Malformed| DatabaseError::Damaged("a commit's row is cut short".into());
        let rows = self.database.all(UNPASSED)?;
        rows.iter().map(|row| Unpassed::parse(row).map_err(damaged)).collect()
    }

    /// Ends a pass that has read the inbox to its end. `unpassed` was returned before the pass
    /// began.
    ///
    /// Messages of members that these commits removed are refused from now on.
    pub fn end_pass(&mut self, unpassed: &[Unpassed]) -> Result<(), DatabaseError> {
        for one in unpassed {
            self.database.delete(UNPASSED, &one.encode())?;
            if let Some(group) = self.load(one.group)? {
                group.close_removals(one.last_epoch);
            }
        }
        Ok(())
    }
}

/// Notes a commit of ours that ended `last_epoch`.
pub(crate) fn add(
    database: &Database,
    group: &GroupId,
    last_epoch: u64,
) -> Result<(), DatabaseError> {
    let row = Unpassed { group: *group, last_epoch }.encode();
    database.put(UNPASSED, &row, Some(group.as_bytes()), &row)
}

/// Returns whether the inbox was not read to its end since the commit of ours that ended
/// `last_epoch`.
pub(crate) fn is_unpassed(
    database: &Database,
    group: &GroupId,
    last_epoch: u64,
) -> Result<bool, DatabaseError> {
    let row = Unpassed { group: *group, last_epoch }.encode();
    Ok(database.get(UNPASSED, &row)?.is_some())
}
