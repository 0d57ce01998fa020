//! A client's MLS state, and what it does of its own accord: publish key packages, start groups,
//! add, remove, send. What it does with what it receives is in [`crate::receive`].

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    fmt,
    time::Duration,
};

use qpq_domain::{ChannelId, IdentityKey, UnixMillis, Username};

use zeroize::Zeroizing;

use crate::{
    codec::{Malformed, Reader, Writer},
    content::Content,
    database::{Database, DatabaseError, Value},
    error::Error,
    group::Group,
    identity::{Identity, read_username},
    key_package::{self, Policy},
    packages::{self, Use},
    profile::{self, GroupId, GroupKind, Profile},
    received::Request,
    requests,
    summary::GroupSummary,
    tables, waiting,
};

/// One account's MLS state, in a [`Database`].
///
/// Groups are loaded when they are needed, and written back by [`Client::save`]. A client that
/// shares its database with other processes lives no longer than one transaction. See the crate's
/// documentation for when to save.
pub struct Client {
    pub(crate) database: Database,
    pub(crate) identity: Identity,
    pub(crate) username: Username,
    /// Groups in use.
    pub(crate) groups: BTreeMap<GroupId, Group>,
    /// Those of them that have changed since they were saved.
    pub(crate) changed: BTreeSet<GroupId>,
}

impl fmt::Debug for Client {
    /// Shows the owner and no content.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("identity", &self.identity).finish_non_exhaustive()
    }
}

/// The most keys of ours that are skipped in a group, which leaves others some of what they allow
/// to be missing.
const MAX_SKIPPED: u64 = crate::group::FORWARD as u64 - 2_000;

/// Bytes to be enqueued, the same for each recipient.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parcel {
    pub recipients: Vec<IdentityKey>,
    pub channel: ChannelId,
    pub payload: Vec<u8>,
}

/// The messages to send after members were added.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Added {
    /// For those who were members before; `None` if there was nobody but us. To be sent first.
    pub commit: Option<Parcel>,
    /// For the new members.
    pub welcome: Parcel,
}

/// A person to be added, as the directory names them, with a key package of theirs.
#[derive(Debug, Clone, Copy)]
pub struct Invitee<'a> {
    pub identity: IdentityKey,
    pub username: &'a Username,
    pub key_package: &'a [u8],
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
        Ok(Self::assemble(database, identity, username))
    }

    /// Creates an account's state that ends with the process.
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
        Ok(Self::assemble(database, Identity::from_seed(&seed), username))
    }

    fn assemble(database: &Database, identity: Identity, username: Username) -> Self {
        Self {
            database: database.clone(),
            identity,
            username,
            groups: BTreeMap::new(),
            changed: BTreeSet::new(),
        }
    }

    /// Writes what has changed to the database. To be called before its transaction ends.
    pub fn save(&mut self) -> Result<(), DatabaseError> {
        let me = self.identity.public();
        for id in std::mem::take(&mut self.changed) {
            if let Some(group) = self.groups.get_mut(&id) {
                group.save(&self.database, &me)?;
            }
        }
        Ok(())
    }

    /// The database that holds the state.
    pub fn database(&self) -> &Database {
        &self.database
    }

    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    pub fn username(&self) -> &Username {
        &self.username
    }

    /// Creates `count` KeyPackages for upload, each for one use and valid for 84 days.
    pub fn key_packages(
        &mut self,
        count: usize,
        now: UnixMillis,
    ) -> Result<Vec<Vec<u8>>, DatabaseError> {
        packages::remove_expired(&self.database, now)?;
        (0..count)
            .map(|_| packages::make(&self.database, &self.identity, &self.username, Use::Once, now))
            .collect()
    }

    /// Makes the package that the server gives out when no other is left, good for 84 days. Earlier
    /// ones keep working.
    pub fn last_resort_key_package(&mut self, now: UnixMillis) -> Result<Vec<u8>, DatabaseError> {
        packages::make(&self.database, &self.identity, &self.username, Use::LastResort, now)
    }

    /// Creates a direct conversation with `peer`, who is added next.
    ///
    /// Look for one with [`Client::direct`] first; a second one is right when the peer has lost the
    /// first.
    pub fn create_direct(&mut self, peer: IdentityKey, now: UnixMillis) -> Result<GroupId, Error> {
        let me = self.identity.public();
        if peer == me {
            return Err(Error::Yourself);
        }
        self.make(Profile::direct(me, peer, now), now)
    }

    /// Makes a group of the given name, whose messages go to `channel`. Nobody is in it yet but us.
    pub fn create_group(
        &mut self,
        name: &str,
        channel: ChannelId,
        now: UnixMillis,
    ) -> Result<GroupId, Error> {
        let creator = self.identity.public();
        self.make(
            Profile {
                kind: GroupKind::Group { name: name.into() },
                channel,
                creator,
                created_at: now,
            },
            now,
        )
    }

    fn make(&mut self, profile: Profile, now: UnixMillis) -> Result<GroupId, Error> {
        let group = Group::make(&self.identity, &self.username, profile, now)?;
        let id = group.id();
        self.insert(group);
        Ok(id)
    }

    pub(crate) fn insert(&mut self, group: Group) {
        self.changed.insert(group.id());
        self.groups.insert(group.id(), group);
    }

    /// The group of this id, loaded if need be. The caller changes it.
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

    fn created_by_us(&mut self, id: GroupId) -> Result<&mut Group, Error> {
        let me = self.identity.public();
        let group = self.active(id)?;
        if group.profile().creator == me { Ok(group) } else { Err(Error::NotTheCreator) }
    }

    /// Adds people to a group that we made. See the crate's documentation on saving before sending.
    ///
    /// # Errors
    /// The reason why one of them cannot be added. Then none is added.
    pub fn add(
        &mut self,
        group: GroupId,
        invitees: &[Invitee<'_>],
        now: UnixMillis,
    ) -> Result<Added, Error> {
        let me = self.identity.public();
        let identity = self.identity.clone();
        let group = self.created_by_us(group)?;
        if invitees.is_empty() {
            return Err(Error::Nobody);
        }
        let before = group.members();
        let mut keys: BTreeSet<_> = before.iter().map(|member| member.identity).collect();
        let mut packages = Vec::with_capacity(invitees.len());
        for invitee in invitees {
            if !group.profile().admits(&invitee.identity) {
                return Err(Error::DirectIsForTwo);
            }
            if !keys.insert(invitee.identity) {
                return Err(Error::AlreadyMember(invitee.identity));
            }
            packages.push(open(invitee, now)?);
            let is_group = matches!(group.profile().kind, GroupKind::Group { .. });
            if is_group && expires_soon(invitee, now) {
                return Err(Error::PackageTooOld(invitee.identity));
            }
        }
        let (commit, welcome) = group.add(&identity, &packages)?;
        let channel = group.profile().channel;
        let others = others(&before, &me);
        Ok(Added {
            commit: (!others.is_empty()).then_some(Parcel {
                recipients: others,
                channel,
                payload: commit,
            }),
            welcome: Parcel {
                recipients: invitees.iter().map(|invitee| invitee.identity).collect(),
                channel,
                payload: welcome,
            },
        })
    }

    /// Removes people from a group that we made. The commit is for everyone, those removed too:
    /// they learn of it so.
    pub fn remove(&mut self, group: GroupId, members: &[IdentityKey]) -> Result<Parcel, Error> {
        let me = self.identity.public();
        let identity = self.identity.clone();
        let group = self.created_by_us(group)?;
        if members.is_empty() {
            return Err(Error::Nobody);
        }
        let before = group.members();
        for key in members {
            if *key == me {
                return Err(Error::Yourself);
            }
            if !before.iter().any(|member| member.identity == *key) {
                return Err(Error::NotAMember(*key));
            }
        }
        let payload = group.remove(&identity, members)?;
        Ok(Parcel { recipients: others(&before, &me), channel: group.profile().channel, payload })
    }

    /// Encrypts a message to everyone in a group. See the crate's documentation on saving before
    /// sending.
    pub fn encrypt(&mut self, group: GroupId, content: &Content) -> Result<Parcel, Error> {
        self.encrypt_bytes(group, &content.encode())
    }

    /// Encrypts a question for messages that we could not read, named by the SHA-256 of their
    /// bytes. See the crate's documentation on saving before sending.
    pub fn ask(&mut self, group: GroupId, digests: Vec<[u8; 32]>) -> Result<Parcel, Error> {
        self.encrypt_bytes(group, &crate::content::could_not_read(&digests))
    }

    /// Drops a group that another person created, and all its keys. What is still sent to it is
    /// refused until its creator adds us again. Returns the message that asks the creator to remove
    /// us, unless that has happened.
    pub fn leave(&mut self, id: GroupId) -> Result<Option<Parcel>, Error> {
        let group = self.group(&id)?.ok_or(Error::UnknownGroup)?;
        if group.peer_of(&self.identity.public()).is_some() {
            return Err(Error::DirectIsForTwo);
        }
        if group.creator == self.identity.public() {
            return Err(Error::CreatorStays);
        }
        let farewell = match self.encrypt_bytes(id, &crate::content::leaving()) {
            Ok(parcel) => Some(Parcel { recipients: vec![group.creator], ..parcel }),
            Err(Error::NoLongerMember | Error::CopyTooOld) => None,
            Err(error) => return Err(error),
        };
        self.forget(&id)?;
        self.database.put(tables::LEFT, id.as_bytes(), None, b"")?;
        Ok(farewell)
    }

    fn encrypt_bytes(&mut self, id: GroupId, content: &[u8]) -> Result<Parcel, Error> {
        let identity = self.identity.clone();
        let skipped = self.skipped(&id)?;
        let group = self.active(id)?;
        let recipients = others(&group.members(), &identity.public());
        if recipients.is_empty() {
            return Err(Error::Alone);
        }
        if skipped > MAX_SKIPPED {
            return Err(Error::CopyTooOld);
        }
        group.skip_keys(&identity, skipped)?;
        let payload = group.encrypt(&identity, content)?;
        let parcel = Parcel { recipients, channel: group.profile().channel, payload };
        if skipped > 0 {
            self.database.delete(tables::SKIPPED, id.as_bytes())?;
        }
        Ok(parcel)
    }

    /// Makes sure that none of our next `count` sending keys is used, in any group: they were used
    /// by a later state, of which this is an older copy. Receivers allow for such gaps.
    ///
    /// Direct groups with a larger gap than receivers allow are retired.
    pub fn skip_keys(&mut self, count: u64) -> Result<(), DatabaseError> {
        let me = self.identity.public();
        for group in self.groups()?.into_iter().filter(|group| group.active) {
            let skipped = self.skip(&group.id, count)?;
            if skipped > MAX_SKIPPED && group.peer_of(&me).is_some() {
                self.retire(&group.id)?;
            }
        }
        // The later state may have accepted them.
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

    /// Sends nothing to a direct group any more. It can still be read.
    pub fn retire(&mut self, group: &GroupId) -> Result<(), DatabaseError> {
        self.database.put(tables::RETIRED, group.as_bytes(), None, b"")
    }

    /// The direct conversation to use with `peer`, if there is one that both are in.
    ///
    /// If both started one at the same time there are two, which both can be read; each side finds
    /// the same one here: the one made last, or of the smaller id. A peer that has lost its state
    /// makes a new one, which wins so.
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

    /// Every direct group with `peer`.
    pub fn direct_groups(&self, peer: &IdentityKey) -> Result<Vec<GroupSummary>, DatabaseError> {
        let saved = self.database.in_lane(tables::GROUPS, peer.as_bytes())?;
        let mut groups = self.overlay(&saved)?;
        let me = self.identity.public();
        groups.retain(|group| group.peer_of(&me).as_ref() == Some(peer));
        Ok(groups)
    }

    pub fn group(&self, group: &GroupId) -> Result<Option<GroupSummary>, DatabaseError> {
        if let Some(group) = self.groups.get(group) {
            return Ok(Some(group.summary()));
        }
        let row = self.database.get(tables::GROUPS, group.as_bytes())?;
        row.map(|row| GroupSummary::parse(&row)).transpose()
    }

    pub fn groups(&self) -> Result<Vec<GroupSummary>, DatabaseError> {
        let saved = self.database.all(tables::GROUPS)?;
        self.overlay(&saved)
    }

    /// The summaries that were saved, and instead of them those of groups in use.
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

    /// Forgets the request for a group, and what is sent to the group from now on; returns whether
    /// there was one. A new Welcome of its creator is a new request.
    pub fn decline(&mut self, group: &GroupId) -> Result<bool, DatabaseError> {
        self.database.delete(tables::SKIPPED, group.as_bytes())?;
        requests::decline(&self.database, group)
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

fn others(members: &[crate::Member], me: &IdentityKey) -> Vec<IdentityKey> {
    members.iter().map(|member| member.identity).filter(|key| key != me).collect()
}

/// What an invitee's key package must have left when it is used in a group: the longest that a
/// commit waits in a member's inbox, by the default time to live, and a day. A member who reads the
/// commit after the package's end cannot follow it.
const MIN_LEFT: Duration = Duration::from_secs(31 * 24 * 3600);

fn expires_soon(invitee: &Invitee<'_>, now: UnixMillis) -> bool {
    let policy = Policy { suites: vec![packages::SUITE.into()], ..Policy::default() };
    key_package::check(invitee.key_package, &policy, &[*invitee.identity.as_bytes()], now)
        .is_ok_and(|checked| checked.not_after < now.plus(MIN_LEFT))
}

/// Checks that a key package is usable and its invitee's.
fn open(invitee: &Invitee<'_>, now: UnixMillis) -> Result<openmls::prelude::KeyPackage, Error> {
    let identity = invitee.identity;
    let policy = Policy { suites: vec![packages::SUITE.into()], ..Policy::default() };
    let bad = |reason| Error::BadPackage { identity, reason };
    key_package::check(invitee.key_package, &policy, &[*identity.as_bytes()], now).map_err(bad)?;
    let package = key_package::parse_verified(invitee.key_package).map_err(bad)?;
    let leaf = package.leaf_node();
    let member = crate::Member::read(leaf.signature_key().as_slice(), leaf.credential());
    if member.is_none_or(|member| member.username != *invitee.username) {
        return Err(Error::WrongName(identity));
    }
    let ours = openmls::prelude::ExtensionType::Unknown(profile::EXTENSION);
    if !leaf.capabilities().extensions().contains(&ours) {
        return Err(Error::Incompatible(identity));
    }
    Ok(package)
}
