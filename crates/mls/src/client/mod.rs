//! A client's MLS state. Creates KeyPackages, groups and messages.
//!
//! Changes of groups are in [`change`], the processing of received messages in [`crate::receive`].

mod change;

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    fmt,
};

use qpq_domain::{ChannelId, DeviceId, IdentityKey, UnixMillis, Username};

use zeroize::Zeroizing;

use crate::{
    codec::{Malformed, Reader, Writer},
    content::Content,
    database::{Database, DatabaseError, Value},
    error::Error,
    group::Group,
    identity::{Identity, read_username},
    leaf::{Device, LeafSigner, MemberDevice},
    packages::{self, Use},
    profile::{GroupId, GroupKind, Profile},
    received::Request,
    requests,
    summary::GroupSummary,
    tables, waiting,
};

pub use self::change::{Change, Commit, NewMember};

/// One account's MLS state, in a [`Database`].
///
/// Groups are loaded when they are needed, and written back by [`Client::save`]. A client that
/// shares its database with other processes lives no longer than one transaction. See the crate's
/// documentation for when to save.
pub struct Client {
    pub(crate) database: Database,
    pub(crate) identity: Identity,
    pub(crate) username: Username,
    pub(crate) device: Option<Device>,
    /// The loaded groups.
    pub(crate) groups: BTreeMap<GroupId, Group>,
    /// The loaded groups with unsaved changes.
    pub(crate) changed: BTreeSet<GroupId>,
}

impl fmt::Debug for Client {
    /// Shows the identity and no content.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("identity", &self.identity).finish_non_exhaustive()
    }
}

/// The maximum number of sending keys that are skipped in a group.
///
/// Receivers accept a gap of `FORWARD` keys; the rest is left for lost messages.
const MAX_SKIPPED: u64 = crate::group::FORWARD as u64 - 2_000;

/// A payload to be enqueued for each recipient.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parcel {
    pub recipients: Vec<IdentityKey>,
    pub channel: ChannelId,
    /// An MLSMessage.
    pub payload: Vec<u8>,
}

impl Client {
    /// Creates an account's state in a database that has none.
    pub fn create(
        database: &Database,
        identity: Identity,
        username: Username,
    ) -> Result<Self, DatabaseError> {
        let name = username.as_str().as_bytes();
        let mut writer = Writer::with_capacity(32 + 4 + name.len());
        writer.raw(identity.seed());
        writer.bytes(name);
        database.put(tables::ACCOUNT, b"account", None, writer.written())?;
        Ok(Self::assemble(database, identity, username, None))
    }

    /// Creates an account's state in memory.
    pub fn in_memory(identity: Identity, username: Username) -> Self {
        Self::create(&Database::in_memory(), identity, username).expect("memory does not fail")
    }

    /// Opens an account's state.
    pub fn open(database: &Database) -> Result<Self, DatabaseError> {
        let damaged = |Malformed| DatabaseError::Damaged("the account's row is cut short".into());
        let row = database
            .get(tables::ACCOUNT, b"account")?
            .ok_or_else(|| DatabaseError::Damaged("it has no account".into()))?;
        let mut reader = Reader::new(&row);
        let seed = Zeroizing::new(reader.array().map_err(damaged)?);
        let username = read_username(&mut reader).map_err(damaged)?;
        let device = database.get(tables::DEVICE, b"device")?;
        let device = device.map(|row| read_device(&mut Reader::new(&row))).transpose();
        let device = device.map_err(damaged)?;
        Ok(Self::assemble(database, Identity::from_seed(&seed), username, device))
    }

    fn assemble(
        database: &Database,
        identity: Identity,
        username: Username,
        device: Option<Device>,
    ) -> Self {
        Self {
            database: database.clone(),
            identity,
            username,
            device,
            groups: BTreeMap::new(),
            changed: BTreeSet::new(),
        }
    }

    /// Writes the changed groups to the database. Must be called before the transaction ends.
    pub fn save(&mut self) -> Result<(), DatabaseError> {
        let me = self.identity.public();
        for id in std::mem::take(&mut self.changed) {
            if let Some(group) = self.groups.get_mut(&id) {
                group.save(&self.database, &me)?;
            }
        }
        Ok(())
    }

    /// Returns the database of the state.
    pub fn database(&self) -> &Database {
        &self.database
    }

    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    pub fn username(&self) -> &Username {
        &self.username
    }

    /// Returns this device; `None` while the account has no devices.
    pub fn device(&self) -> Option<&Device> {
        self.device.as_ref()
    }

    /// Sets the device that signs from now on. In groups that the account is a member of, the next
    /// commit of ours replaces our leaf by the leaf of the device.
    pub fn set_device(&mut self, device: Device) -> Result<(), DatabaseError> {
        let mut writer = Writer::with_capacity(16 + 4 + device.name().len() + 32 + 64);
        writer.raw(device.id().as_bytes());
        writer.bytes(device.name().as_bytes());
        writer.raw(device.seed());
        writer.raw(device.proof());
        self.database.put(tables::DEVICE, b"device", None, writer.written())?;
        self.device = Some(device);
        Ok(())
    }

    /// Returns the key and credential of new leaves of ours.
    pub(crate) fn leaf(&self) -> LeafSigner {
        match &self.device {
            Some(device) => LeafSigner::of_device(device, &self.identity.public(), &self.username),
            None => LeafSigner::of_account(&self.identity, &self.username),
        }
    }

    /// Returns the key and credential of our leaf in a group, which may be older than our device.
    fn signer_in(&self, group: &Group) -> LeafSigner {
        let leaf = self.leaf();
        match group.own_key() {
            Some(key) if key != leaf.public() => {
                LeafSigner::of_account(&self.identity, &self.username)
            }
            _ => leaf,
        }
    }

    /// Creates `count` KeyPackages for upload, each for one use and valid for 84 days.
    pub fn key_packages(
        &mut self,
        count: usize,
        now: UnixMillis,
    ) -> Result<Vec<Vec<u8>>, DatabaseError> {
        packages::remove_expired(&self.database, now)?;
        let leaf = self.leaf();
        (0..count).map(|_| packages::create(&self.database, &leaf, Use::Once, now)).collect()
    }

    /// Creates a last-resort KeyPackage, valid for 84 days. Earlier ones remain usable.
    ///
    /// The server issues it when no other is left.
    pub fn last_resort_key_package(&mut self, now: UnixMillis) -> Result<Vec<u8>, DatabaseError> {
        packages::create(&self.database, &self.leaf(), Use::LastResort, now)
    }

    /// Creates a direct conversation with `peer`, who is added next.
    ///
    /// Look for an existing one with [`Client::direct`] first. Create a second one only if the peer
    /// has lost the state of the first.
    pub fn create_direct(&mut self, peer: IdentityKey, now: UnixMillis) -> Result<GroupId, Error> {
        let me = self.identity.public();
        if peer == me {
            return Err(Error::Yourself);
        }
        self.create_group_of(Profile::direct(me, peer, now), now)
    }

    /// Creates a group whose only member is this account, and whose messages go to `channel`.
    pub fn create_group(
        &mut self,
        name: &str,
        channel: ChannelId,
        now: UnixMillis,
    ) -> Result<GroupId, Error> {
        let creator = self.identity.public();
        self.create_group_of(
            Profile {
                kind: GroupKind::Group { name: name.into() },
                channel,
                creator,
                created_at: now,
                admins: Vec::new(),
            },
            now,
        )
    }

    fn create_group_of(&mut self, profile: Profile, now: UnixMillis) -> Result<GroupId, Error> {
        let group = Group::create(&self.leaf(), profile, now)?;
        let id = group.id();
        self.insert(group);
        Ok(id)
    }

    pub(crate) fn insert(&mut self, group: Group) {
        self.changed.insert(group.id());
        self.groups.insert(group.id(), group);
    }

    /// Returns a group for modification. Loads the group if necessary.
    pub(crate) fn load(&mut self, id: GroupId) -> Result<Option<&mut Group>, DatabaseError> {
        if let Entry::Vacant(place) = self.groups.entry(id) {
            let Some(group) = Group::load(&self.database, id)? else { return Ok(None) };
            place.insert(group);
        }
        self.changed.insert(id);
        Ok(self.groups.get_mut(&id))
    }

    fn active(&mut self, id: GroupId) -> Result<&mut Group, Error> {
        let group = self.load(id)?.ok_or(Error::UnknownGroup)?;
        if group.is_active() { Ok(group) } else { Err(Error::NoLongerMember) }
    }

    /// Encrypts a message to all members of a group. See the crate's documentation on saving before
    /// sending.
    pub fn encrypt(&mut self, group: GroupId, content: &Content) -> Result<Parcel, Error> {
        self.encrypt_bytes(group, &content.encode())
    }

    /// Encrypts a request to repeat messages that we could not read, named by the SHA-256 of their
    /// bytes. See the crate's documentation on saving before sending.
    pub fn ask(&mut self, group: GroupId, digests: Vec<[u8; 32]>) -> Result<Parcel, Error> {
        self.encrypt_bytes(group, &crate::content::could_not_read(&digests))
    }

    /// Drops a group and all its keys. Returns the message that asks the admins to remove us.
    ///
    /// Later messages to the group are refused until a member adds us again. There is no message if
    /// we are no longer a member, or are the only one.
    ///
    /// # Errors
    /// [`Error::LastAdmin`] if no other admin could remove us.
    pub fn leave(&mut self, id: GroupId) -> Result<Option<Parcel>, Error> {
        let group = self.group(&id)?.ok_or(Error::UnknownGroup)?;
        let me = self.identity.public();
        if group.peer_of(&me).is_some() {
            return Err(Error::DirectIsForTwo);
        }
        if group.active && group.members.len() > 1 && group.admins == [me] {
            return Err(Error::LastAdmin);
        }
        let farewell = match self.encrypt_bytes(id, &crate::content::leaving()) {
            Ok(parcel) => Some(parcel),
            Err(Error::NoLongerMember | Error::CopyTooOld | Error::Alone) => None,
            Err(error) => return Err(error),
        };
        self.forget_left(&id)?;
        Ok(farewell)
    }

    /// Drops a group that this account has left, on this device or another.
    pub(crate) fn forget_left(&mut self, id: &GroupId) -> Result<(), DatabaseError> {
        match self.forget(id) {
            Err(Error::Database(error)) => Err(error),
            _ => self.database.put(tables::LEFT, id.as_bytes(), None, b""),
        }
    }

    fn encrypt_bytes(&mut self, id: GroupId, content: &[u8]) -> Result<Parcel, Error> {
        let me = self.identity.public();
        let skipped = self.skipped(&id)?;
        let group = self.active(id)?;
        let recipients = recipients(group, &me);
        if recipients.is_empty() {
            return Err(Error::Alone);
        }
        if skipped > MAX_SKIPPED {
            return Err(Error::CopyTooOld);
        }
        let signer = self.signer_in(&self.groups[&id]);
        let group = self.active(id)?;
        group.skip_keys(&signer, &me, skipped)?;
        let payload = group.encrypt(&signer, &me, content)?;
        let parcel = Parcel { recipients, channel: group.profile().channel, payload };
        if skipped > 0 {
            self.database.delete(tables::SKIPPED, id.as_bytes())?;
        }
        Ok(parcel)
    }

    /// Skips our next `count` sending keys in every group.
    ///
    /// Called when this state is an older copy: the later state has used these keys. Receivers
    /// accept such gaps up to a limit. A direct group with a larger gap is retired.
    pub fn skip_keys(&mut self, count: u64) -> Result<(), DatabaseError> {
        let me = self.identity.public();
        for group in self.groups()?.into_iter().filter(|group| group.active) {
            let skipped = self.skip(&group.id, count)?;
            if skipped > MAX_SKIPPED && group.peer_of(&me).is_some() {
                self.retire(&group.id)?;
            }
        }
        // The later state may have accepted these requests.
        for request in self.requests()? {
            self.skip(&request.group, count)?;
        }
        Ok(())
    }

    fn skip(&self, group: &GroupId, count: u64) -> Result<u64, DatabaseError> {
        let skipped = self.skipped(group)?.saturating_add(count);
        self.database.put(tables::SKIPPED, group.as_bytes(), None, &skipped.to_be_bytes())?;
        Ok(skipped)
    }

    fn skipped(&self, group: &GroupId) -> Result<u64, DatabaseError> {
        let row = self.database.get(tables::SKIPPED, group.as_bytes())?;
        let row = row.map(|row| row[..].try_into().map(u64::from_be_bytes));
        row.transpose()
            .map(Option::unwrap_or_default)
            .map_err(|_| DatabaseError::Damaged("a count is cut short".into()))
    }

    /// Excludes a direct group from sending. Its messages can still be read.
    pub fn retire(&mut self, group: &GroupId) -> Result<(), DatabaseError> {
        self.database.put(tables::RETIRED, group.as_bytes(), None, b"")
    }

    /// Returns the direct group for messages to `peer`, if there is one with both as members.
    ///
    /// If both created a group at the same time, there are two, and messages of both can be read.
    /// Both choose the same one for sending: the one created last or, of groups of the same time,
    /// the one with the smaller id. A peer that has lost its state creates a new group, which is
    /// then chosen.
    pub fn direct(&self, peer: &IdentityKey) -> Result<Option<GroupId>, DatabaseError> {
        let mut groups = Vec::new();
        for group in self.direct_groups(peer)? {
            if self.database.get(tables::RETIRED, group.id.as_bytes())?.is_none() {
                groups.push(group);
            }
        }
        Ok(groups
            .into_iter()
            .filter(|group| group.active)
            .filter(|group| group.members.iter().any(|member| member.identity == *peer))
            .max_by_key(|group| (group.created_at, Reverse(group.id)))
            .map(|group| group.id))
    }

    /// Returns every direct group with `peer`.
    pub fn direct_groups(&self, peer: &IdentityKey) -> Result<Vec<GroupSummary>, DatabaseError> {
        let saved = self.database.in_lane(tables::GROUPS, peer.as_bytes())?;
        let mut groups = self.overlay(&saved)?;
        let me = self.identity.public();
        groups.retain(|group| group.peer_of(&me).as_ref() == Some(peer));
        Ok(groups)
    }

    /// Returns the summary of a group.
    pub fn group(&self, group: &GroupId) -> Result<Option<GroupSummary>, DatabaseError> {
        if let Some(group) = self.groups.get(group) {
            return Ok(Some(group.summary()));
        }
        let row = self.database.get(tables::GROUPS, group.as_bytes())?;
        row.map(|row| GroupSummary::parse(&row)).transpose()
    }

    /// Returns every device that is in a group.
    pub fn devices(&mut self, group: &GroupId) -> Result<Vec<MemberDevice>, DatabaseError> {
        let Some(group) = self.load(*group)? else { return Ok(Vec::new()) };
        Ok(group.leaves().into_iter().map(|(_, leaf)| leaf).collect())
    }

    /// Returns the first epoch that we were a member in.
    pub fn joined_at(&mut self, group: &GroupId) -> Result<Option<u64>, DatabaseError> {
        Ok(self.load(*group)?.map(|group| group.joined_at()))
    }

    /// Returns the summaries of all groups.
    pub fn groups(&self) -> Result<Vec<GroupSummary>, DatabaseError> {
        let saved = self.database.all(tables::GROUPS)?;
        self.overlay(&saved)
    }

    /// Returns the current summaries of loaded groups, and the saved ones of all others.
    fn overlay(&self, saved: &[Value]) -> Result<Vec<GroupSummary>, DatabaseError> {
        let mut groups = saved
            .iter()
            .map(|row| GroupSummary::parse(row))
            .filter(|group| !group.as_ref().is_ok_and(|group| self.groups.contains_key(&group.id)))
            .collect::<Result<Vec<_>, _>>()?;
        groups.extend(self.groups.values().map(Group::summary));
        Ok(groups)
    }

    /// Returns the requests that wait, the oldest first.
    pub fn requests(&self) -> Result<Vec<Request>, DatabaseError> {
        requests::all(&self.database)
    }

    /// Returns the request for a group, if one waits.
    pub fn request(&self, group: &GroupId) -> Result<Option<Request>, DatabaseError> {
        Ok(requests::get(&self.database, group)?.map(|kept| kept.request))
    }

    /// Returns the number of requests that were dropped because too many waited. The count starts
    /// again when no request waits.
    pub fn dropped_requests(&self) -> Result<u64, DatabaseError> {
        requests::dropped(&self.database)
    }

    /// Declines the request for a group; returns whether there was one.
    ///
    /// Later messages to the group are dropped. Another Welcome of its creator is a new request.
    pub fn decline(&mut self, group: &GroupId) -> Result<bool, DatabaseError> {
        let was_waiting = requests::decline(&self.database, group)?;
        if was_waiting {
            self.database.delete(tables::SKIPPED, group.as_bytes())?;
        }
        Ok(was_waiting)
    }

    /// Declines every request of a person.
    pub fn decline_all(&mut self, creator: &IdentityKey) -> Result<(), DatabaseError> {
        requests::decline_all(&self.database, creator)
    }

    /// Drops a group and all its keys, for instance because a member is not who it claims to be.
    pub fn forget(&mut self, group: &GroupId) -> Result<(), Error> {
        waiting::remove_group(&self.database, group)?;
        let in_use = self.groups.remove(group).is_some();
        self.changed.remove(group);
        if Group::delete(&self.database, *group)? || in_use {
            Ok(())
        } else {
            Err(Error::UnknownGroup)
        }
    }
}

/// Returns the recipients of our messages to a group.
///
/// These are the other accounts, and our own if it has other devices in the group.
fn recipients(group: &Group, me: &IdentityKey) -> Vec<IdentityKey> {
    let leaves = group.leaves();
    let ours = leaves.iter().filter(|(_, leaf)| leaf.member.identity == *me).count();
    let mut accounts = crate::group::accounts(leaves.iter().map(|(_, leaf)| leaf));
    accounts.retain(|key| key != me || ours > 1);
    accounts
}

fn read_device(reader: &mut Reader<'_>) -> Result<Device, Malformed> {
    let id = DeviceId::new(reader.array()?);
    let name = std::str::from_utf8(reader.bytes()?).map_err(|_| Malformed)?;
    let seed = Zeroizing::new(reader.array()?);
    Ok(Device::new(id, name, &seed, reader.array()?))
}
