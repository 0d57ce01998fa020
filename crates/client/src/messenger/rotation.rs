//! Renewal of keys that a member has asked for (RotateKeys).
//!
//! Each member commits after a random part of a time that grows with the group, so that few commits
//! of a large group are for the same epoch.

use std::time::Duration;

use qpq_domain::{ChannelId, UnixMillis};
use qpq_mls::{Change, GroupId, database::DatabaseError};
use rand::{Rng as _, rngs::OsRng};

use super::{
    Messenger,
    changes::{Cause, Operation},
    now,
    records::Corrupt,
    state::State,
    tables::ROTATIONS,
};
use crate::error::Error;

/// The time in which all members renew their keys, divided by their number.
const FOR_EACH_MEMBER: Duration = Duration::from_secs(2);
/// The time after a renewal for which further requests are ignored.
const AGAIN_AFTER: Duration = Duration::from_secs(3600);

impl Messenger {
    /// Renews our keys in the groups in which a requested renewal is due.
    pub(super) async fn renew_keys(&self) -> Result<(), Error> {
        self.renew_keys_at(now()).await
    }

    /// Renews our keys in the groups in which a requested renewal is due at `now`. For tests.
    #[doc(hidden)]
    pub async fn renew_keys_at(&self, now: UnixMillis) -> Result<(), Error> {
        let is_due = self.store().read(move |state| state.is_renewal_due(now)).await?;
        if !is_due {
            return Ok(());
        }
        self.store().change(move |state| state.add_due_renewals(now)).await?;
        self.run_changes(None).await.map(drop)
    }
}

impl State {
    /// Notes that the members of a channel's groups are asked to renew their keys.
    pub(super) fn note_rotation(&self, channel: ChannelId, now: UnixMillis) -> Result<(), Error> {
        for group in self.mls.groups()? {
            if group.channel != channel || !group.active {
                continue;
            }
            let earlier = self.rotation(&group.id)?;
            if earlier.is_some_and(|(at, _)| at <= now && at.plus(AGAIN_AFTER) > now) {
                continue;
            }
            let members = u32::try_from(group.members.len()).unwrap_or(u32::MAX);
            let longest = FOR_EACH_MEMBER * members;
            let due = now.plus(OsRng.gen_range(Duration::ZERO..=longest));
            let row = [now.0.to_be_bytes(), due.0.to_be_bytes()].concat();
            let row = [&row[..], group.id.as_bytes()].concat();
            self.database().put(ROTATIONS, group.id.as_bytes(), None, &row)?;
        }
        Ok(())
    }

    /// Returns the time of the last request in a group, and the time at which our renewal is due: 0
    /// once it is done.
    fn rotation(&self, group: &GroupId) -> Result<Option<(UnixMillis, u64)>, DatabaseError> {
        let row = self.database().get(ROTATIONS, group.as_bytes())?;
        Ok(row.map(|row| parse(&row)).transpose()?.map(|(at, due, _)| (at, due)))
    }

    fn is_renewal_due(&self, now: UnixMillis) -> Result<bool, Error> {
        for row in self.database().all(ROTATIONS)? {
            let (_, due, _) = parse(&row).map_err(DatabaseError::from)?;
            if due != 0 && due <= now.0 {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Saves a change for each renewal that is due.
    fn add_due_renewals(&mut self, now: UnixMillis) -> Result<(), Error> {
        for row in self.database().all(ROTATIONS)? {
            let (at, due, group) = parse(&row).map_err(DatabaseError::from)?;
            if due == 0 || due > now.0 {
                continue;
            }
            let change = Change::default();
            self.add_change(Operation::Change { group, change, cause: Cause::Client })?;
            let row = [at.0.to_be_bytes(), [0; 8]].concat();
            let row = [&row[..], group.as_bytes()].concat();
            self.database().put(ROTATIONS, group.as_bytes(), None, &row)?;
        }
        Ok(())
    }
}

fn parse(row: &[u8]) -> Result<(UnixMillis, u64, GroupId), Corrupt> {
    let cut = || Corrupt::new("a rotation is cut short");
    let (times, group) = row.split_at_checked(16).ok_or_else(cut)?;
    let number = |bytes: &[u8]| u64::from_be_bytes(bytes.try_into().expect("eight bytes"));
    let group = GroupId::try_from(group).map_err(Corrupt::new)?;
    Ok((UnixMillis(number(&times[..8])), number(&times[8..]), group))
}

#[cfg(test)]
mod tests {
    use qpq_domain::Username;
    use qpq_mls::{Identity, database::Database};

    use super::*;

    #[test]
    fn keys_are_renewed_once_within_the_time_for_the_group_and_again_after_an_hour() {
        let name = Username::parse("alice").unwrap();
        let mut state = State::create(&Database::in_memory(), Identity::generate(), name).unwrap();
        let (start, channel) = (UnixMillis(1_800_000_000_000), ChannelId::new([7; 16]));
        let group = state.mls.create_group("g", channel, start).unwrap();
        state.note_rotation(ChannelId::new([8; 16]), start).unwrap();
        assert_eq!(state.rotation(&group).unwrap(), None, "another channel");
        state.note_rotation(channel, start).unwrap();
        let (_, due) = state.rotation(&group).unwrap().unwrap();
        assert!((start.0..=start.plus(FOR_EACH_MEMBER).0).contains(&due));
        let later = start.plus(FOR_EACH_MEMBER);
        assert!(state.is_renewal_due(later).unwrap());
        state.add_due_renewals(later).unwrap();
        assert!(!state.is_renewal_due(later.plus(AGAIN_AFTER)).unwrap());
        state.note_rotation(channel, later).unwrap();
        assert_eq!(state.rotation(&group).unwrap(), Some((start, 0)), "within the hour");
        state.note_rotation(channel, start.plus(AGAIN_AFTER)).unwrap();
        assert_ne!(state.rotation(&group).unwrap().unwrap().1, 0);
    }
}
