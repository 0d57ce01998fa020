//! A client's whole MLS state, and what it does of its own accord: publish key packages, start
//! groups, add, remove, send. What it does with what it is sent is in [`crate::receive`].

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use qpq_domain::{ChannelId, IdentityKey, UnixMillis, Username};

use crate::{
    content::Content,
    group::{Group, GroupSummary},
    identity::Identity,
    key_package::{self, Policy, Rejected},
    packages::{self, Packages, Use},
    profile::{self, GroupId, Kind, Profile},
    waiting::Waiting,
};

/// All that one account's client knows of MLS. See the crate's documentation for when to save it.
pub struct Client {
    pub(crate) identity: Identity,
    pub(crate) username: Username,
    pub(crate) packages: Packages,
    pub(crate) groups: BTreeMap<GroupId, Group>,
    pub(crate) waiting: Waiting,
}

impl fmt::Debug for Client {
    /// Whose it is, and nothing that it holds.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("identity", &self.identity).finish_non_exhaustive()
    }
}

/// Bytes to be enqueued, the same for each recipient.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parcel {
    pub recipients: Vec<IdentityKey>,
    pub channel: ChannelId,
    pub payload: Vec<u8>,
}

/// What adding members gives to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Added {
    /// For those who were members before; `None` if there was nobody but us. To be sent first.
    pub commit: Option<Parcel>,
    /// For the new members.
    pub welcome: Parcel,
}

/// Somebody to be added, as the directory knows them, with a key package as the server gave it out.
#[derive(Debug, Clone, Copy)]
pub struct Invitee<'a> {
    pub identity: IdentityKey,
    pub username: &'a Username,
    pub key_package: &'a [u8],
}

/// Why something was not done. The state is as it was.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error("there is no such group here")]
    UnknownGroup,
    #[error("only the group's maker adds and removes members: ask them")]
    NotTheMaker,
    #[error("we were removed from the group: ask its maker to be added again")]
    NoLongerMember,
    #[error("nobody else is in the group: add someone first")]
    Alone,
    #[error("name at least one person")]
    Nobody,
    #[error("a conversation needs someone else")]
    Yourself,
    #[error("a direct conversation is between two: start a group instead")]
    DirectIsForTwo,
    #[error("{0} is in the group already, or was named twice")]
    AlreadyMember(IdentityKey),
    #[error("{0} is not in the group")]
    NotAMember(IdentityKey),
    #[error("the key package of {identity} cannot be used: {reason}")]
    BadPackage { identity: IdentityKey, reason: Rejected },
    #[error("the key package of {0} names another user: do not trust it")]
    WrongName(IdentityKey),
    #[error("{0} uses a client that cannot join our groups")]
    Incompatible(IdentityKey),
    #[error("MLS: {0}")]
    Mls(String),
}

impl Error {
    pub(crate) fn mls(error: impl std::error::Error) -> Self {
        Self::Mls(error.to_string())
    }
}

impl Client {
    pub fn new(identity: Identity, username: Username) -> Self {
        Self {
            identity,
            username,
            packages: Packages::default(),
            groups: BTreeMap::new(),
            waiting: Waiting::default(),
        }
    }

    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    pub fn username(&self) -> &Username {
        &self.username
    }

    /// Makes `count` key packages to be uploaded, each for one use, good for 84 days.
    pub fn key_packages(&mut self, count: usize, now: UnixMillis) -> Vec<Vec<u8>> {
        (0..count)
            .map(|_| self.packages.make(&self.identity, &self.username, Use::Once, now))
            .collect()
    }

    /// Makes the package that the server gives out when no other is left, good for 84 days. Earlier
    /// ones keep working.
    pub fn last_resort_key_package(&mut self, now: UnixMillis) -> Vec<u8> {
        self.packages.make(&self.identity, &self.username, Use::LastResort, now)
    }

    /// Makes a direct conversation with `peer`, who is to be added next.
    ///
    /// Look for one with [`Client::direct`] first; a second one is right when the peer has lost the
    /// first.
    pub fn create_direct(&mut self, peer: IdentityKey, now: UnixMillis) -> Result<GroupId, Error> {
        let me = self.identity.public();
        if peer == me {
            return Err(Error::Yourself);
        }
        self.create(Profile::direct(me, peer, now), now)
    }

    /// Makes a group of the given name, whose messages go to `channel`. Nobody is in it yet but us.
    pub fn create_group(
        &mut self,
        name: &str,
        channel: ChannelId,
        now: UnixMillis,
    ) -> Result<GroupId, Error> {
        let maker = self.identity.public();
        self.create(
            Profile { kind: Kind::Group { name: name.into() }, channel, maker, made_at: now },
            now,
        )
    }

    fn create(&mut self, profile: Profile, now: UnixMillis) -> Result<GroupId, Error> {
        let group = Group::make(&self.identity, &self.username, profile, now)?;
        let id = group.id();
        self.groups.insert(id, group);
        Ok(id)
    }

    /// Adds people to a group that we made. See the crate's documentation on saving before sending.
    ///
    /// # Errors
    /// Whatever is wrong with any of them; then none is added.
    pub fn add(
        &mut self,
        group: GroupId,
        invitees: &[Invitee<'_>],
        now: UnixMillis,
    ) -> Result<Added, Error> {
        let me = self.identity.public();
        let group = made_by_us(&mut self.groups, group, &me)?;
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
        }
        let (commit, welcome) = group.add(&self.identity, &packages)?;
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
        let group = made_by_us(&mut self.groups, group, &me)?;
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
        let payload = group.remove(&self.identity, members)?;
        Ok(Parcel { recipients: others(&before, &me), channel: group.profile().channel, payload })
    }

    /// Encrypts a message to everyone in a group. See the crate's documentation on saving before
    /// sending.
    pub fn encrypt(&mut self, group: GroupId, content: &Content) -> Result<Parcel, Error> {
        let group = active(&mut self.groups, group)?;
        let recipients = others(&group.members(), &self.identity.public());
        if recipients.is_empty() {
            return Err(Error::Alone);
        }
        let payload = group.encrypt(&self.identity, content)?;
        Ok(Parcel { recipients, channel: group.profile().channel, payload })
    }

    /// The direct conversation to use with `peer`, if there is one that both are in.
    ///
    /// If both started one at the same time there are two, which both can be read; each side finds
    /// the same one here: the one made last, or of the smaller id. A peer that has lost its state
    /// makes a new one, which wins so.
    pub fn direct(&self, peer: &IdentityKey) -> Option<GroupId> {
        let me = self.identity.public();
        self.groups
            .values()
            .filter(|group| {
                group.is_active() && group.profile().peer_of(&me).as_ref() == Some(peer)
            })
            .filter(|group| group.members().iter().any(|member| member.identity == *peer))
            .max_by_key(|group| (group.profile().made_at, Reverse(group.id())))
            .map(Group::id)
    }

    pub fn group(&self, group: &GroupId) -> Option<GroupSummary> {
        self.groups.get(group).map(Group::summary)
    }

    pub fn groups(&self) -> impl Iterator<Item = GroupSummary> {
        self.groups.values().map(Group::summary)
    }

    /// Drops a group and all its keys, for instance because a member is not who it claims to be.
    pub fn forget(&mut self, group: &GroupId) -> Result<(), Error> {
        self.waiting.drop_group(group);
        self.groups.remove(group).map(drop).ok_or(Error::UnknownGroup)
    }
}

fn active(groups: &mut BTreeMap<GroupId, Group>, id: GroupId) -> Result<&mut Group, Error> {
    let group = groups.get_mut(&id).ok_or(Error::UnknownGroup)?;
    if group.is_active() { Ok(group) } else { Err(Error::NoLongerMember) }
}

fn made_by_us<'a>(
    groups: &'a mut BTreeMap<GroupId, Group>,
    id: GroupId,
    me: &IdentityKey,
) -> Result<&'a mut Group, Error> {
    let group = active(groups, id)?;
    if group.profile().maker == *me { Ok(group) } else { Err(Error::NotTheMaker) }
}

fn others(members: &[crate::Member], me: &IdentityKey) -> Vec<IdentityKey> {
    members.iter().map(|member| member.identity).filter(|key| key != me).collect()
}

/// Checks that a key package is usable and its invitee's.
fn open(invitee: &Invitee<'_>, now: UnixMillis) -> Result<openmls::prelude::KeyPackage, Error> {
    let identity = invitee.identity;
    let policy = Policy { suites: vec![packages::SUITE.into()], ..Policy::default() };
    let bad = |reason| Error::BadPackage { identity, reason };
    key_package::check(invitee.key_package, &policy, &identity, now).map_err(bad)?;
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
