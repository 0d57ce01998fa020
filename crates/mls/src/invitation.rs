//! A Welcome that was decrypted and checked, before the group is joined.

use openmls::{
    group::{MlsGroupJoinConfig, StagedWelcome},
    prelude::Welcome,
};
use qpq_domain::IdentityKey;

use crate::{
    group::{Group, are_distinct, join_config},
    identity::Member,
    packages::Package,
    profile::{GroupId, Profile},
    received::{Arrival, Ignored, Request},
    store::Store,
};

/// An invitation to a group. Opening it changes nothing.
pub(crate) struct Invitation {
    staged: StagedWelcome,
    store: Store,
    id: GroupId,
    profile: Profile,
    creator: Member,
    members: usize,
}

impl Invitation {
    /// Opens a Welcome that was made for `package`. The package is left as it was.
    ///
    /// Lifetimes in the tree are not judged: members that joined long ago and never committed have
    /// old ones (RFC 9420 §7.3).
    pub(crate) fn open(
        package: &Package,
        welcome: Welcome,
        me: &IdentityKey,
    ) -> Result<Self, Ignored> {
        let store = package.store.copy();
        let config: MlsGroupJoinConfig = join_config();
        let staged = StagedWelcome::build_from_welcome(&store, &config, welcome)
            .and_then(|builder| builder.skip_lifetime_validation().build())
            .map_err(|_| Ignored::BadWelcome)?;
        let (id, profile, members) = check(&staged, me).ok_or(Ignored::BadWelcome)?;
        let count = members.len();
        let creator = members
            .into_iter()
            .find(|member| member.identity == profile.creator)
            .ok_or(Ignored::BadWelcome)?;
        Ok(Self { staged, store, id, profile, creator, members: count })
    }

    /// The description of the group, for the decision whether to join it.
    pub(crate) fn request(&self, arrival: Arrival) -> Request {
        Request {
            group: self.id,
            kind: self.profile.kind.clone(),
            creator: self.creator.clone(),
            members: self.members,
            epoch: self.staged.group_context().epoch().as_u64(),
            arrival,
            missed: 0,
        }
    }

    /// Joins the group.
    pub(crate) fn join(self) -> Result<Group, Ignored> {
        let mls = self.staged.into_group(&self.store).map_err(|_| Ignored::BadWelcome)?;
        Ok(Group::joined(self.id, self.profile, mls, self.store))
    }
}

/// Returns id, profile and members if the Welcome leads to a group that is true to itself: created
/// by who sent it, with us in it, and only with members that belong there.
fn check(staged: &StagedWelcome, me: &IdentityKey) -> Option<(GroupId, Profile, Vec<Member>)> {
    let context = staged.group_context();
    let id = GroupId::try_from(context.group_id().as_slice()).ok()?;
    let profile = Profile::read(&id, context.extensions())?;
    // openmls has verified the group info's signature with this leaf's key.
    let sender = staged.welcome_sender().ok()?;
    if sender.signature_key().as_slice() != profile.creator.as_bytes() {
        return None;
    }
    let members: Vec<Member> = staged
        .members()
        .map(|leaf| Member::read(&leaf.signature_key, &leaf.credential))
        .collect::<Option<_>>()?;
    let admitted = members.iter().all(|member| profile.admits(&member.identity));
    let with_us = members.iter().any(|member| member.identity == *me);
    (admitted && with_us && are_distinct(members.iter())).then_some((id, profile, members))
}
