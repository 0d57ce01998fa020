//! The saved form of a pending change.

use qpq_domain::{ChannelId, DeviceId, IdentityKey, MessageId, Username};
use qpq_mls::{Change, Commit, GroupId, NewMember};

use super::{Cause, Offer, Operation, PendingChange};
use crate::messenger::records::Corrupt;

/// Every kind of change in one flat record; `kind` determines the fields that are used.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SavedChange {
    #[prost(uint32, tag = "1")]
    kind: u32,
    #[prost(bytes = "vec", tag = "2")]
    group: Vec<u8>,
    #[prost(bytes = "vec", tag = "3")]
    channel: Vec<u8>,
    #[prost(uint32, tag = "4")]
    attempts: u32,
    #[prost(message, repeated, tag = "5")]
    add: Vec<SavedNewMember>,
    #[prost(bytes = "vec", repeated, tag = "6")]
    remove: Vec<Vec<u8>>,
    /// An identity key, followed by a device id if the device has one.
    #[prost(bytes = "vec", repeated, tag = "7")]
    remove_devices: Vec<Vec<u8>>,
    #[prost(string, optional, tag = "8")]
    name: Option<String>,
    #[prost(bytes = "vec", repeated, tag = "9")]
    promote: Vec<Vec<u8>>,
    #[prost(bytes = "vec", repeated, tag = "10")]
    demote: Vec<Vec<u8>>,
    #[prost(bytes = "vec", repeated, tag = "11")]
    known: Vec<Vec<u8>>,
    #[prost(message, optional, tag = "12")]
    offer: Option<SavedOffer>,
    #[prost(bool, tag = "13")]
    is_automatic: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
struct SavedNewMember {
    #[prost(bytes = "vec", tag = "1")]
    identity: Vec<u8>,
    #[prost(string, tag = "2")]
    username: String,
    #[prost(bytes = "vec", tag = "3")]
    key_package: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct SavedOffer {
    #[prost(bytes = "vec", tag = "1")]
    message_id: Vec<u8>,
    #[prost(uint64, tag = "2")]
    expected_epoch: u64,
    #[prost(bytes = "vec", tag = "3")]
    group: Vec<u8>,
    #[prost(bytes = "vec", tag = "4")]
    channel: Vec<u8>,
    #[prost(bytes = "vec", tag = "5")]
    payload: Vec<u8>,
    #[prost(bytes = "vec", repeated, tag = "6")]
    recipients: Vec<Vec<u8>>,
    #[prost(bytes = "vec", tag = "7")]
    group_info: Vec<u8>,
    #[prost(bytes = "vec", optional, tag = "8")]
    welcome: Option<Vec<u8>>,
    #[prost(bytes = "vec", repeated, tag = "9")]
    invited: Vec<Vec<u8>>,
    #[prost(bytes = "vec", repeated, tag = "10")]
    added: Vec<Vec<u8>>,
    #[prost(bytes = "vec", repeated, tag = "11")]
    removed: Vec<Vec<u8>>,
    #[prost(bool, tag = "12")]
    is_applied: bool,
}

impl From<&PendingChange> for SavedChange {
    fn from(pending: &PendingChange) -> Self {
        let mut saved = match &pending.operation {
            Operation::Change { group, change, cause } => Self {
                kind: 1,
                is_automatic: *cause == Cause::Client,
                group: group.as_bytes().to_vec(),
                add: change.add.iter().map(SavedNewMember::from).collect(),
                remove: bytes(&change.remove),
                remove_devices: change.remove_devices.iter().map(device_bytes).collect(),
                name: change.name.clone(),
                promote: bytes(&change.promote),
                demote: bytes(&change.demote),
                ..Self::default()
            },
            Operation::Join { channel, known } => Self {
                kind: 2,
                channel: channel.as_bytes().to_vec(),
                known: bytes(known),
                ..Self::default()
            },
            Operation::Leave { channel } => {
                Self { kind: 3, channel: channel.as_bytes().to_vec(), ..Self::default() }
            }
        };
        saved.attempts = pending.attempts;
        saved.offer = pending.offer.as_ref().map(SavedOffer::from);
        saved
    }
}

impl SavedChange {
    pub(super) fn restore(self) -> Result<PendingChange, Corrupt> {
        let operation = match self.kind {
            1 => Operation::Change {
                group: group(&self.group)?,
                cause: if self.is_automatic { Cause::Client } else { Cause::Person },
                change: Change {
                    add: self
                        .add
                        .into_iter()
                        .map(SavedNewMember::restore)
                        .collect::<Result<_, _>>()?,
                    remove: keys(&self.remove)?,
                    remove_devices: self
                        .remove_devices
                        .iter()
                        .map(|device| read_device(device))
                        .collect::<Result<_, _>>()?,
                    name: self.name,
                    promote: keys(&self.promote)?,
                    demote: keys(&self.demote)?,
                },
            },
            2 => Operation::Join { channel: channel(&self.channel)?, known: keys(&self.known)? },
            3 => Operation::Leave { channel: channel(&self.channel)? },
            _ => return Err(Corrupt::new("a change of a kind that this version does not know")),
        };
        let offer = self.offer.map(SavedOffer::restore).transpose()?;
        Ok(PendingChange { operation, attempts: self.attempts, offer })
    }
}

impl From<&NewMember> for SavedNewMember {
    fn from(new: &NewMember) -> Self {
        Self {
            identity: new.identity.as_bytes().to_vec(),
            username: new.username.to_string(),
            key_package: new.key_package.clone(),
        }
    }
}

impl SavedNewMember {
    fn restore(self) -> Result<NewMember, Corrupt> {
        Ok(NewMember {
            identity: key(&self.identity)?,
            username: Username::parse(&self.username).map_err(Corrupt::new)?,
            key_package: self.key_package,
        })
    }
}

impl From<&Offer> for SavedOffer {
    fn from(offer: &Offer) -> Self {
        let commit = &offer.commit;
        Self {
            message_id: offer.message_id.as_bytes().to_vec(),
            expected_epoch: offer.expected_epoch,
            group: commit.group.as_bytes().to_vec(),
            channel: commit.channel.as_bytes().to_vec(),
            payload: commit.payload.clone(),
            recipients: bytes(&commit.recipients),
            group_info: commit.group_info.clone(),
            welcome: commit.welcome.clone(),
            invited: bytes(&commit.invited),
            added: bytes(&commit.added),
            removed: bytes(&commit.removed),
            is_applied: offer.is_applied,
        }
    }
}

impl SavedOffer {
    fn restore(self) -> Result<Offer, Corrupt> {
        Ok(Offer {
            message_id: MessageId::try_from(&self.message_id[..]).map_err(Corrupt::new)?,
            expected_epoch: self.expected_epoch,
            commit: Commit {
                group: group(&self.group)?,
                channel: channel(&self.channel)?,
                payload: self.payload,
                recipients: keys(&self.recipients)?,
                group_info: self.group_info,
                welcome: self.welcome,
                invited: keys(&self.invited)?,
                added: keys(&self.added)?,
                removed: keys(&self.removed)?,
            },
            is_applied: self.is_applied,
        })
    }
}

fn bytes(keys: &[IdentityKey]) -> Vec<Vec<u8>> {
    keys.iter().map(|key| key.as_bytes().to_vec()).collect()
}

fn keys(saved: &[Vec<u8>]) -> Result<Vec<IdentityKey>, Corrupt> {
    saved.iter().map(|bytes| key(bytes)).collect()
}

fn key(bytes: &[u8]) -> Result<IdentityKey, Corrupt> {
    IdentityKey::try_from(bytes).map_err(Corrupt::new)
}

fn group(bytes: &[u8]) -> Result<GroupId, Corrupt> {
    GroupId::try_from(bytes).map_err(Corrupt::new)
}

fn channel(bytes: &[u8]) -> Result<ChannelId, Corrupt> {
    ChannelId::try_from(bytes).map_err(Corrupt::new)
}

fn device_bytes((identity, device): &(IdentityKey, Option<DeviceId>)) -> Vec<u8> {
    let device = device.iter().flat_map(|device| *device.as_bytes());
    identity.as_bytes().iter().copied().chain(device).collect()
}

fn read_device(saved: &[u8]) -> Result<(IdentityKey, Option<DeviceId>), Corrupt> {
    let (identity, device) =
        saved.split_at_checked(32).ok_or_else(|| Corrupt::new("a device is cut short"))?;
    let device = match device {
        [] => None,
        bytes => Some(DeviceId::try_from(bytes).map_err(Corrupt::new)?),
    };
    Ok((key(identity)?, device))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encoded_changes_decode_to_the_same_changes() {
        let key = |n| IdentityKey::new([n; 32]);
        let group = GroupId::try_from(&[1; 32][..]).unwrap();
        let change = Change {
            add: vec![NewMember {
                identity: key(2),
                username: Username::parse("bob").unwrap(),
                key_package: vec![3; 10],
            }],
            remove: vec![key(4)],
            remove_devices: vec![(key(5), None), (key(6), Some(DeviceId::new([7; 16])))],
            name: Some("friends".into()),
            promote: vec![key(8)],
            demote: vec![key(9)],
        };
        let channel = ChannelId::new([10; 16]);
        let offer = Offer {
            message_id: MessageId::new([11; 16]),
            expected_epoch: 12,
            commit: Commit {
                group,
                channel,
                payload: vec![13],
                recipients: vec![key(14)],
                group_info: vec![15],
                welcome: Some(vec![16]),
                invited: vec![key(17)],
                added: vec![key(18)],
                removed: vec![key(19)],
            },
            is_applied: true,
        };
        for operation in [
            Operation::Change { group, change, cause: Cause::Person },
            Operation::Change { group, change: Change::default(), cause: Cause::Client },
            Operation::Join { channel, known: vec![key(20)] },
            Operation::Leave { channel },
        ] {
            for offer in [None, Some(offer.clone())] {
                let pending = PendingChange { operation: operation.clone(), attempts: 3, offer };
                assert_eq!(SavedChange::from(&pending).restore(), Ok(pending));
            }
        }
    }
}
