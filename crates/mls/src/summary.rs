//! The description of a group that is saved next to its MLS state.

use qpq_domain::{ChannelId, IdentityKey, UnixMillis};

use crate::{
    codec::{Malformed, Reader, Writer},
    database::DatabaseError,
    group::Row,
    identity::Member,
    profile::{GroupId, GroupKind, Profile},
};

/// The public facts about a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupSummary {
    pub id: GroupId,
    pub kind: GroupKind,
    pub channel: ChannelId,
    pub creator: IdentityKey,
    /// The time of creation by the creator's clock.
    pub created_at: UnixMillis,
    /// The MLS epoch.
    pub epoch: u64,
    /// The members that add and remove others, and change the group's name.
    pub admins: Vec<IdentityKey>,
    /// Every member account, in the order of the tree. After our removal, we are not among them.
    pub members: Vec<Member>,
    /// `false` after our removal: no message can be sent or read.
    pub active: bool,
}

impl GroupSummary {
    /// Returns the other account of a direct group.
    pub fn peer_of(&self, me: &IdentityKey) -> Option<IdentityKey> {
        match &self.kind {
            GroupKind::Direct { peer } if self.creator == *me => Some(*peer),
            GroupKind::Direct { .. } => Some(self.creator),
            GroupKind::Group { .. } => None,
        }
    }

    pub(crate) fn write(&self, writer: &mut Writer) {
        writer.raw(self.id.as_bytes());
        match &self.kind {
            GroupKind::Direct { peer } => {
                writer.raw(&[0]);
                writer.raw(peer.as_bytes());
            }
            GroupKind::Group { name } => {
                writer.raw(&[1]);
                writer.bytes(name.as_bytes());
            }
        }
        writer.bytes(self.channel.as_bytes());
        writer.raw(self.creator.as_bytes());
        writer.number(self.created_at.0);
        writer.number(self.epoch);
        writer.raw(&[u8::from(self.active)]);
        writer.count(self.members.len());
        for member in &self.members {
            member.write(writer);
        }
    }

    pub(crate) fn read(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        let id = GroupId::try_from(reader.raw(32)?).map_err(|_| Malformed)?;
        let kind = match reader.array()? {
            [0] => GroupKind::Direct { peer: IdentityKey::new(reader.array()?) },
            [1] => {
                let name = std::str::from_utf8(reader.bytes()?).map_err(|_| Malformed)?;
                GroupKind::Group { name: name.to_owned() }
            }
            _ => return Err(Malformed),
        };
        let channel = ChannelId::try_from(reader.bytes()?).map_err(|_| Malformed)?;
        let creator = IdentityKey::new(reader.array()?);
        let created_at = UnixMillis(reader.number()?);
        let epoch = reader.number()?;
        let active = reader.array()? == [1];
        let members = reader.list(Member::from_reader)?;
        // The admins of a group whose profile names none.
        let profile = Profile { kind, channel, creator, created_at, admins: Vec::new() };
        let keys: Vec<_> = members.iter().map(|member| member.identity).collect();
        let admins = profile.admins_of(&keys);
        let Profile { kind, .. } = profile;
        Ok(Self { id, kind, channel, creator, created_at, epoch, admins, members, active })
    }

    /// Reads the summary in the row of a group.
    pub(crate) fn parse(row: &[u8]) -> Result<Self, DatabaseError> {
        Ok(Row::parse(row)?.summary)
    }
}
