//! A Welcome that was decrypted and checked, before the group is joined.

use openmls::{
    group::{MlsGroupJoinConfig, StagedWelcome},
    prelude::Welcome,
};
use qpq_domain::IdentityKey;

use crate::{
    group::{Group, accounts, are_consistent, join_config},
    identity::Member,
    leaf::MemberDevice,
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
    inviter: Member,
    members: usize,
}

impl Invitation {
    /// Opens a Welcome that was created for `package`. The package does not change.
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
        let (id, profile, inviter, members) = check(&staged, me).ok_or(Ignored::BadWelcome)?;
        Ok(Self { staged, store, id, profile, inviter, members })
    }

    /// Returns the description of the group, for the decision whether to join.
    pub(crate) fn request(&self, arrival: Arrival) -> Request {
        Request {
            group: self.id,
            kind: self.profile.kind.clone(),
            inviter: self.inviter.clone(),
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

/// Returns id, profile, inviter and the number of accounts of a valid group.
///
/// In a valid group we are a member, the profile admits all members, and the inviter may invite us.
/// An admin may invite any account. Any member may add a device of an account that is a member
/// already.
fn check(staged: &StagedWelcome, me: &IdentityKey) -> Option<(GroupId, Profile, Member, usize)> {
    let context = staged.group_context();
    let id = GroupId::try_from(context.group_id().as_slice()).ok()?;
    let profile = Profile::read(&id, context.extensions())?;
    let leaves: Vec<MemberDevice> = staged
        .members()
        .map(|leaf| MemberDevice::verify(&leaf.signature_key, &leaf.credential))
        .collect::<Option<_>>()?;
    // openmls has verified the group info's signature with this leaf's key.
    let sender = staged.welcome_sender().ok()?;
    let inviter = leaves
        .iter()
        .find(|leaf| leaf.signature_key()[..] == *sender.signature_key().as_slice())?
        .member
        .clone();
    let accounts = accounts(leaves.iter());
    let ours = leaves.iter().filter(|leaf| leaf.member.identity == *me).count();
    let may_invite = profile.admins_of(&accounts).contains(&inviter.identity)
        || inviter.identity == *me
        || ours > 1;
    let admitted = accounts.iter().all(|key| profile.admits(key));
    (admitted && ours > 0 && may_invite && are_consistent(leaves.iter())).then_some((
        id,
        profile,
        inviter,
        accounts.len(),
    ))
}
