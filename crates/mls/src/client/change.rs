//! Changes of a group: commits of ours, and external commits of this device.
//!
//! A change has three steps. [`Client::commit`] creates the commit. The server accepts this commit
//! or one of another member. [`Client::confirm`] applies the commit, or [`Client::discard`] drops
//! it. The Welcome is sent after [`Client::confirm`].

use std::{collections::BTreeSet, time::Duration};

use openmls::prelude::{ExtensionType, KeyPackage, LeafNodeIndex};
use qpq_domain::{ChannelId, DeviceId, IdentityKey, UnixMillis, Username};
use sha2::{Digest as _, Sha256};

use super::{Client, recipients};
use crate::{
    database::DatabaseError,
    error::Error,
    group::{CommitContent, CommitMessages, Group, Leaf, accounts},
    key_package::{self, Policy},
    leaf::{Device, MemberDevice},
    packages, passes,
    profile::{self, GroupId, GroupKind, Profile},
    receive::day,
    received::Received,
};

/// The minimum time for which a KeyPackage must remain valid when its device is added.
///
/// A member that reads the commit after the package has expired cannot follow it. A commit waits in
/// an inbox for at most 30 days by default; one day is a margin.
const MIN_LEFT: Duration = Duration::from_secs(31 * 24 * 3600);

/// A change of a group. An empty change renews our own keys.
///
/// Additions of present devices and removals of absent ones are ignored.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Change {
    /// Devices of new or present members.
    pub add: Vec<NewMember>,
    /// Accounts to be removed, with all of their devices.
    pub remove: Vec<IdentityKey>,
    /// Devices to be removed.
    pub remove_devices: Vec<(IdentityKey, Option<DeviceId>)>,
    /// The group's new name.
    pub name: Option<String>,
    /// Members that become admins.
    pub promote: Vec<IdentityKey>,
    /// Admins that become ordinary members.
    pub demote: Vec<IdentityKey>,
}

impl Change {
    fn is_key_renewal(&self) -> bool {
        *self == Self::default()
    }
}

/// A device to add, with the account and username that the directory has for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewMember {
    pub identity: IdentityKey,
    pub username: Username,
    /// A KeyPackage of the device, bare or as an MLSMessage.
    pub key_package: Vec<u8>,
}

/// A commit that waits for the server's acceptance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Commit {
    pub group: GroupId,
    pub channel: ChannelId,
    /// The commit, as an MLSMessage.
    pub payload: Vec<u8>,
    /// The recipients of the commit: the members before it, and this account if it has other
    /// devices in the group.
    pub recipients: Vec<IdentityKey>,
    /// The GroupInfo of the epoch that the commit leads to, as an MLSMessage.
    pub group_info: Vec<u8>,
    /// The Welcome for the devices that are added, to be sent to `invited` once the commit is
    /// accepted.
    pub welcome: Option<Vec<u8>>,
    /// The accounts whose devices are added.
    pub invited: Vec<IdentityKey>,
    /// The accounts that become members.
    pub added: Vec<IdentityKey>,
    /// The accounts that cease to be members.
    pub removed: Vec<IdentityKey>,
}

impl Client {
    /// Creates a commit that changes a group. Returns `None` if there is nothing to change.
    ///
    /// The group does not change before [`Client::confirm`]. An earlier pending commit is dropped.
    ///
    /// # Errors
    /// [`Error::NotAdmin`] and others if the change is not possible.
    pub fn commit(
        &mut self,
        id: GroupId,
        change: &Change,
        now: UnixMillis,
    ) -> Result<Option<Commit>, Error> {
        let me = self.identity.public();
        let next = self.leaf();
        self.active(id)?;
        let signer = self.signer_in(&self.groups[&id]);
        let device = self.device.as_ref().map(Device::id);
        let group = self.active(id)?;
        // Another member may have added this device already, next to the leaf of the account. Since
        // a device has one leaf, the leaf of the account then stays as it is.
        let is_new = |(_, leaf): &Leaf| leaf.member.identity != me || leaf.id() != device;
        let becomes_next = next.public() != signer.public() && group.leaves().iter().all(is_new);
        let next = becomes_next.then_some(next);
        let planned = Planned::new(group, &me, change, now)?;
        if planned.is_empty() && !change.is_key_renewal() {
            return Ok(None);
        }
        let Planned { add, remove, profile, invited, added, removed } = planned;
        let recipients = recipients(group, &me);
        let content = CommitContent { add, remove, profile };
        let CommitMessages { commit, welcome, group_info } =
            group.commit(&signer, next.as_ref(), &me, content)?;
        let channel = group.profile().channel;
        self.note_own(&commit, now)?;
        Ok(Some(Commit {
            group: id,
            channel,
            payload: commit,
            recipients,
            group_info,
            welcome,
            invited,
            added,
            removed,
        }))
    }

    /// Applies the pending commit of a group, which the server has accepted.
    ///
    /// The first result is about the commit, further ones are about messages that waited for its
    /// epoch.
    pub fn confirm(&mut self, id: GroupId) -> Result<Vec<Received>, Error> {
        let group = self.load(id)?.ok_or(Error::UnknownGroup)?;
        let last_epoch = group.epoch();
        let effect = group.confirm_commit()?.ok_or(Error::NothingPending)?;
        if group.has_open_removals() {
            passes::add(&self.database, &id, last_epoch)?;
        }
        let mut results = vec![self.result(id, effect)];
        self.retry(id, &mut results)?;
        Ok(results)
    }

    /// Drops the commit of a group that the server has refused.
    pub fn discard(&mut self, id: GroupId) -> Result<(), Error> {
        match self.load(id)? {
            Some(group) => group.discard_commit(),
            None => Ok(()),
        }
    }

    /// Returns whether a commit of a group waits for the server's acceptance.
    pub fn is_pending(&mut self, id: GroupId) -> Result<bool, DatabaseError> {
        Ok(self.load(id)?.is_some_and(|group| group.has_pending_commit()))
    }

    /// Creates the external commit by which this device joins a group, from the server's GroupInfo.
    ///
    /// The present state of the group, if there is one, stays in use until
    /// [`Client::confirm_joining`]. `known` are the accounts that may vouch for the group: the
    /// author of the GroupInfo must be one of them.
    ///
    /// # Errors
    /// [`Error::BadGroupInfo`], [`Error::NotAMember`] if this account is not a member.
    pub fn join_by_itself(
        &mut self,
        group_info: &[u8],
        known: &BTreeSet<IdentityKey>,
        now: UnixMillis,
    ) -> Result<Commit, Error> {
        let me = self.identity.public();
        let signer = self.leaf();
        let is_known = |key: &IdentityKey| known.contains(key);
        let (mut group, messages) =
            Group::join_by_itself(group_info, &signer, &self.identity, is_known)?;
        // The other members do not follow a commit for an epoch before ours.
        let present = self.group(&group.id())?.filter(|present| present.active);
        if present.is_some_and(|present| group.epoch() <= present.epoch) {
            return Err(Error::BadGroupInfo);
        }
        let CommitMessages { commit, group_info, .. } = messages;
        group.save_joining(&self.database, &me)?;
        self.note_own(&commit, now)?;
        Ok(Commit {
            group: group.id(),
            channel: group.profile().channel,
            payload: commit,
            recipients: recipients(&group, &me),
            group_info,
            welcome: None,
            invited: Vec::new(),
            added: Vec::new(),
            removed: Vec::new(),
        })
    }

    /// Replaces the state of a group by the joined one, whose commit the server has accepted.
    ///
    /// The results are those of a received Welcome: [`Received::Duplicate`] if the present state
    /// has the same or a later epoch.
    pub fn confirm_joining(&mut self, id: GroupId) -> Result<Vec<Received>, Error> {
        let mut joined = Group::take_joining(&self.database, id)?.ok_or(Error::NothingPending)?;
        if let Some(present) = self.load(id)? {
            if present.epoch() >= joined.epoch() {
                // A Welcome arrived before the server's answer.
                return Ok(vec![Received::Duplicate]);
            }
            if present.is_active() {
                joined.continue_from(present);
            }
        }
        self.database.delete(crate::tables::SKIPPED, id.as_bytes())?;
        let joined_at = joined.joined_at();
        let results = self.join(joined, None)?;
        passes::add(&self.database, &id, joined_at.saturating_sub(1))?;
        Ok(results)
    }

    /// Drops a group that this device was about to join, after the server has refused the commit.
    pub fn discard_joining(&mut self, id: GroupId) -> Result<(), Error> {
        Group::take_joining(&self.database, id)?;
        Ok(())
    }

    /// Notes the digest of a commit of ours. If the account has other devices, this device receives
    /// its own commit, and recognizes it by the digest.
    fn note_own(&self, commit: &[u8], now: UnixMillis) -> Result<(), DatabaseError> {
        self.database.note_digest(&Sha256::digest(commit).into(), day(now)).map(drop)
    }
}

/// The proposals of a change in the present state of a group.
#[derive(Default)]
struct Planned {
    add: Vec<KeyPackage>,
    remove: Vec<LeafNodeIndex>,
    profile: Option<Profile>,
    invited: Vec<IdentityKey>,
    added: Vec<IdentityKey>,
    removed: Vec<IdentityKey>,
}

impl Planned {
    fn new(
        group: &Group,
        me: &IdentityKey,
        change: &Change,
        now: UnixMillis,
    ) -> Result<Self, Error> {
        let leaves = group.leaves();
        let members = accounts(leaves.iter().map(|(_, leaf)| leaf));
        let is_admin = group.profile().admins_of(&members).contains(me);
        let mut planned = Self::default();
        planned.plan_removals(&leaves, change, group.own_key(), is_admin)?;
        planned.plan_additions(group.profile(), &leaves, change, is_admin, now)?;
        planned.removed.retain(|key| !planned.invited.contains(key));
        let staying: Vec<_> =
            members.into_iter().filter(|key| !planned.removed.contains(key)).collect();
        planned.plan_profile(group.profile(), &staying, change, is_admin)?;
        Ok(planned)
    }

    fn is_empty(&self) -> bool {
        self.add.is_empty() && self.remove.is_empty() && self.profile.is_none()
    }

    fn plan_removals(
        &mut self,
        leaves: &[Leaf],
        change: &Change,
        own_key: Option<[u8; 32]>,
        is_admin: bool,
    ) -> Result<(), Error> {
        let is_removed = |leaf: &MemberDevice| {
            let identity = leaf.member.identity;
            change.remove.contains(&identity)
                || change.remove_devices.contains(&(identity, leaf.id()))
        };
        let staying: BTreeSet<_> = leaves
            .iter()
            .filter(|(_, leaf)| !is_removed(leaf))
            .map(|(_, leaf)| leaf.member.identity)
            .collect();
        for (place, leaf) in leaves.iter().filter(|(_, leaf)| is_removed(leaf)) {
            if Some(leaf.signature_key()) == own_key {
                return Err(Error::Yourself);
            }
            let identity = leaf.member.identity;
            if !staying.contains(&identity) {
                if !is_admin {
                    return Err(Error::NotAdmin);
                }
                if !self.removed.contains(&identity) {
                    self.removed.push(identity);
                }
            }
            self.remove.push(*place);
        }
        Ok(())
    }

    fn plan_additions(
        &mut self,
        profile: &Profile,
        leaves: &[Leaf],
        change: &Change,
        is_admin: bool,
        now: UnixMillis,
    ) -> Result<(), Error> {
        let removed = |place: &LeafNodeIndex| self.remove.contains(place);
        let mut keys: BTreeSet<_> = leaves
            .iter()
            .filter(|(place, _)| !removed(place))
            .map(|(_, leaf)| leaf.signature_key())
            .collect();
        for new in &change.add {
            if !profile.admits(&new.identity) {
                return Err(Error::DirectIsForTwo);
            }
            let is_new = !leaves.iter().any(|(_, leaf)| leaf.member.identity == new.identity);
            if is_new && !is_admin {
                return Err(Error::NotAdmin);
            }
            let package = open(new, now)?;
            let key: [u8; 32] =
                package.leaf_node().signature_key().as_slice().try_into().expect("it was checked");
            if !keys.insert(key) {
                continue;
            }
            if matches!(profile.kind, GroupKind::Group { .. }) && expires_soon(new, key, now) {
                return Err(Error::PackageTooOld(new.identity));
            }
            self.add.push(package);
            if !self.invited.contains(&new.identity) {
                self.invited.push(new.identity);
            }
            if is_new && !self.added.contains(&new.identity) {
                self.added.push(new.identity);
            }
        }
        Ok(())
    }

    fn plan_profile(
        &mut self,
        profile: &Profile,
        members: &[IdentityKey],
        change: &Change,
        is_admin: bool,
    ) -> Result<(), Error> {
        let mut next = profile.clone();
        if let (GroupKind::Group { name }, Some(new)) = (&mut next.kind, &change.name) {
            name.clone_from(new);
        }
        if !change.promote.is_empty() || !change.demote.is_empty() {
            for key in change.promote.iter().chain(&change.demote) {
                if !members.contains(key) {
                    return Err(Error::NotAMember(*key));
                }
            }
            let mut admins = profile.admins_of(members);
            admins.extend(change.promote.iter().filter(|key| !profile.admins.contains(key)));
            admins.retain(|key| !change.demote.contains(key));
            admins.sort_unstable();
            admins.dedup();
            if admins.is_empty() {
                return Err(Error::LastAdmin);
            }
            let mut present = profile.admins_of(members);
            present.sort_unstable();
            if present != admins {
                next.admins = admins;
            }
        }
        if next == *profile {
            return Ok(());
        }
        if !is_admin {
            return Err(Error::NotAdmin);
        }
        if !profile.may_become(&next) {
            return Err(Error::DirectIsForTwo);
        }
        self.profile = Some(next);
        Ok(())
    }
}

fn policy() -> Policy {
    Policy { suites: vec![packages::SUITE.into()], ..Policy::default() }
}

fn expires_soon(new: &NewMember, key: [u8; 32], now: UnixMillis) -> bool {
    key_package::check(&new.key_package, &policy(), &[key], now)
        .is_ok_and(|checked| checked.not_after < now.plus(MIN_LEFT))
}

/// Checks that a KeyPackage is usable and belongs to the account and username of `new`.
fn open(new: &NewMember, now: UnixMillis) -> Result<KeyPackage, Error> {
    let identity = new.identity;
    let bad = |reason| Error::BadPackage { identity, reason };
    let package = key_package::parse_verified(&new.key_package).map_err(bad)?;
    let leaf = package.leaf_node();
    let key = leaf.signature_key().as_slice();
    let device = MemberDevice::verify(key, leaf.credential());
    let device = device.ok_or(Error::WrongName(identity))?;
    if device.member.identity != identity || device.member.username != new.username {
        return Err(Error::WrongName(identity));
    }
    key_package::check(&new.key_package, &policy(), &[device.signature_key()], now).map_err(bad)?;
    let ours = ExtensionType::Unknown(profile::EXTENSION);
    if !leaf.capabilities().extensions().contains(&ours) {
        return Err(Error::Incompatible(identity));
    }
    Ok(package)
}
