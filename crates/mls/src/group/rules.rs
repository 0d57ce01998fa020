//! The rules about commits that openmls does not check: which member may change what.
//!
//! The clients of all members apply them to the same state of the group, so they all accept or
//! refuse a commit alike.
//!
//! | change | allowed for |
//! |---|---|
//! | an account added or removed; name, admins | an admin |
//! | a further device of a member account | any member |
//! | a device removed that is not its account's only one | any member |
//! | an account's own devices | that account |
//! | the committer's own keys | any member |
//! | a device that joins by itself (external commit) | an account that is a member |

use std::collections::{BTreeMap, BTreeSet};

use openmls::{
    group::StagedCommit,
    prelude::{LeafNode, LeafNodeIndex, Proposal},
};
use qpq_domain::IdentityKey;

use crate::{
    identity::Member,
    leaf::MemberDevice,
    profile::{GroupId, GroupKind, Profile},
    received::{GroupChange, Ignored},
};

/// A leaf and its place in the tree.
pub(crate) type Leaf = (LeafNodeIndex, MemberDevice);

/// A group before a commit.
pub(super) struct Before<'a> {
    pub(super) id: &'a GroupId,
    pub(super) profile: &'a Profile,
    pub(super) leaves: &'a [Leaf],
}

/// The author of a commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Committer {
    Member(LeafNodeIndex),
    /// A device that joins by itself.
    Joiner,
}

/// An accepted commit.
#[derive(Debug)]
pub(super) struct Accepted {
    pub(super) by: Member,
    pub(super) changes: Vec<GroupChange>,
    /// The leaves that are removed.
    pub(super) removed: Vec<Leaf>,
    /// The new profile, if it changes.
    pub(super) profile: Option<Profile>,
}

/// The content of a commit.
#[derive(Default)]
struct Proposed {
    added: Vec<MemberDevice>,
    removed: Vec<Leaf>,
    profile: Option<Profile>,
}

/// Judges a commit, and returns the changes that it makes.
pub(super) fn judge(
    before: &Before<'_>,
    committer: Committer,
    commit: &StagedCommit,
) -> Result<Accepted, Ignored> {
    let proposed = before.read(commit)?;
    let committer = before.committer(committer, commit)?;
    let after = before.after(&proposed, &committer);
    if !are_consistent(after.iter().copied()) {
        return Err(Ignored::ForbiddenCommit);
    }
    let by = committer.member.clone();
    let accounts_before = accounts(before.leaves.iter().map(|(_, leaf)| leaf));
    let accounts_after = accounts(after.iter().copied());
    let is_admin = before.profile.admins_of(&accounts_before).contains(&by.identity);
    let is_own = |key: &IdentityKey| *key == by.identity;

    let mut changes = Vec::new();
    for leaf in &proposed.added {
        let key = leaf.member.identity;
        let is_new = !accounts_before.contains(&key);
        if !before.profile.admits(&key) || is_new && !is_admin {
            return Err(Ignored::NotAllowed);
        }
        changes.push(GroupChange::added(leaf, is_new));
    }
    for (_, leaf) in &proposed.removed {
        let key = leaf.member.identity;
        let is_over = !accounts_after.contains(&key);
        if is_over && !is_admin && !is_own(&key) {
            return Err(Ignored::NotAllowed);
        }
        changes.push(GroupChange::removed(leaf, is_over));
    }
    if let Some(joined) = committer.joins() {
        let known = proposed.removed.iter().any(|(_, leaf)| is_own(&leaf.member.identity));
        if !accounts_before.contains(&by.identity)
            || !proposed.added.is_empty()
            || proposed.removed.iter().any(|(_, leaf)| !is_own(&leaf.member.identity))
        {
            return Err(Ignored::NotAllowed);
        }
        changes = vec![GroupChange::joined(joined, known)];
    }
    if let Some(next) = &proposed.profile {
        if !is_admin || committer.joins().is_some() {
            return Err(Ignored::NotAllowed);
        }
        changes.extend(profile_changes(before, next, &after));
    }
    // An account that is added or removed is one change, with a leaf for each device.
    let mut distinct: Vec<GroupChange> = Vec::new();
    for change in changes {
        if !distinct.contains(&change) {
            distinct.push(change);
        }
    }
    Ok(Accepted { by, changes: distinct, removed: proposed.removed, profile: proposed.profile })
}

/// The author of a commit.
struct Author {
    member: Member,
    /// The place of the author's leaf before the commit; `None` for a device that joins by itself.
    place: Option<LeafNodeIndex>,
    /// The author's leaf after the commit, if the leaf changes.
    next: Option<MemberDevice>,
}

impl Author {
    /// Returns the leaf of a device that joins by itself.
    fn joins(&self) -> Option<&MemberDevice> {
        self.next.as_ref().filter(|_| self.place.is_none())
    }
}

impl Before<'_> {
    fn read(&self, commit: &StagedCommit) -> Result<Proposed, Ignored> {
        let mut proposed = Proposed::default();
        for queued in commit.queued_proposals() {
            match queued.proposal() {
                Proposal::Add(add) => {
                    let leaf = verify(add.key_package().leaf_node());
                    proposed.added.push(leaf.ok_or(Ignored::ForbiddenCommit)?);
                }
                Proposal::Remove(remove) => {
                    let leaf = self.leaves.iter().find(|(place, _)| *place == remove.removed());
                    proposed.removed.push(leaf.ok_or(Ignored::ForbiddenCommit)?.clone());
                }
                Proposal::GroupContextExtensions(change) => {
                    let next = Profile::read(self.id, change.extensions())
                        .filter(|next| self.profile.may_become(next));
                    proposed.profile = Some(next.ok_or(Ignored::ForbiddenCommit)?);
                }
                Proposal::ExternalInit(_) => {}
                _ => return Err(Ignored::ForbiddenCommit),
            }
        }
        // openmls returns the removals of a commit in the random order of a hash map.
        proposed.removed.sort_unstable_by_key(|(place, _)| place.u32());
        Ok(proposed)
    }

    fn committer(&self, committer: Committer, commit: &StagedCommit) -> Result<Author, Ignored> {
        let leaf = commit.update_path_leaf_node();
        match committer {
            Committer::Joiner => {
                let next = leaf.and_then(verify).ok_or(Ignored::ForbiddenCommit)?;
                Ok(Author { member: next.member.clone(), place: None, next: Some(next) })
            }
            Committer::Member(place) => {
                let device = self.leaves.iter().find(|(index, _)| *index == place);
                let device = device.map(|(_, device)| device).ok_or(Ignored::Invalid)?;
                let next = leaf
                    .map(|leaf| verify(leaf).filter(|next| is_successor(device, next)))
                    .map(|next| next.ok_or(Ignored::ForbiddenCommit))
                    .transpose()?;
                Ok(Author { member: device.member.clone(), place: Some(place), next })
            }
        }
    }

    fn after<'a>(&'a self, proposed: &'a Proposed, author: &'a Author) -> Vec<&'a MemberDevice> {
        let stays = |leaf: &&Leaf| !proposed.removed.iter().any(|(place, _)| *place == leaf.0);
        let staying = self.leaves.iter().filter(stays).map(|(place, leaf)| match &author.next {
            Some(next) if author.place == Some(*place) => next,
            _ => leaf,
        });
        staying.chain(&proposed.added).chain(author.joins()).collect()
    }
}

fn verify(leaf: &LeafNode) -> Option<MemberDevice> {
    MemberDevice::verify(leaf.signature_key().as_slice(), leaf.credential())
}

/// Returns whether an update path may replace the leaf `before` of its author by `after`.
///
/// Account and device stay the same. The leaf that the identity key signs may become the leaf of a
/// device of the account.
fn is_successor(before: &MemberDevice, after: &MemberDevice) -> bool {
    after.member == before.member
        && (before.device.is_none()
            || after.signature_key() == before.signature_key() && after.id() == before.id())
}

fn profile_changes(
    before: &Before<'_>,
    next: &Profile,
    after: &[&MemberDevice],
) -> Vec<GroupChange> {
    let mut changes = Vec::new();
    if let (GroupKind::Group { name: old }, GroupKind::Group { name }) =
        (&before.profile.kind, &next.kind)
        && old != name
    {
        changes.push(GroupChange::Renamed { name: name.clone() });
    }
    let accounts = accounts(after.iter().copied());
    let (old, new) = (before.profile.admins_of(&accounts), next.admins_of(&accounts));
    let member = |key: &IdentityKey| {
        after.iter().find(|leaf| leaf.member.identity == *key).map(|leaf| leaf.member.clone())
    };
    let promoted = new.iter().filter(|key| !old.contains(key)).filter_map(member);
    changes.extend(promoted.map(GroupChange::Promoted));
    let demoted = old.iter().filter(|key| !new.contains(key)).filter_map(member);
    changes.extend(demoted.map(GroupChange::Demoted));
    changes
}

/// Returns the accounts that leaves belong to, each once, in the order of the tree.
pub(crate) fn accounts<'a>(leaves: impl Iterator<Item = &'a MemberDevice>) -> Vec<IdentityKey> {
    let mut seen = BTreeSet::new();
    leaves.map(|leaf| leaf.member.identity).filter(|key| seen.insert(*key)).collect()
}

/// Returns whether each account has one name, each name one account, and each device one leaf.
pub(crate) fn are_consistent<'a>(leaves: impl Iterator<Item = &'a MemberDevice>) -> bool {
    let (mut names, mut keys, mut devices) = (BTreeMap::new(), BTreeMap::new(), BTreeSet::new());
    leaves.into_iter().all(|leaf| {
        let Member { identity, username } = &leaf.member;
        *names.entry(username).or_insert(identity) == identity
            && *keys.entry(identity).or_insert(username) == username
            && devices.insert((identity, leaf.id()))
    })
}
