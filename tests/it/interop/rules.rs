//! The rules of docs/client.md about commits, for mls-rs: who may change what.

use mls_rs::{
    ExtensionList, IdentityProvider, MlsRules,
    client_builder::PaddingMode,
    error::IntoAnyError,
    group::{GroupContext, Roster},
    identity::{CredentialType, SigningIdentity, basic::BasicCredential},
    mls_rules::{CommitDirection, CommitOptions, CommitSource, EncryptionOptions, ProposalBundle},
    time::MlsTime,
};
use mls_rs_core::identity::MemberValidationContext;

use super::profile::{GroupProfile, Key, Leaf};

/// A reason to refuse a leaf or a commit.
#[derive(Debug)]
pub(crate) struct Refused(&'static str);

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for Refused {}

impl IntoAnyError for Refused {
    fn into_dyn_error(self) -> Result<Box<dyn std::error::Error + Send + Sync>, Self> {
        Ok(self.into())
    }
}

/// The credentials of accounts and devices.
#[derive(Clone, Debug)]
pub(crate) struct Accounts;

impl Accounts {
    fn read(leaf: &SigningIdentity) -> Result<Leaf, Refused> {
        Leaf::read(leaf).ok_or(Refused("the credential is none of the profile"))
    }
}

impl IdentityProvider for Accounts {
    type Error = Refused;

    fn validate_member(
        &self,
        leaf: &SigningIdentity,
        _time: Option<MlsTime>,
        _context: MemberValidationContext<'_>,
    ) -> Result<(), Refused> {
        Self::read(leaf).map(drop)
    }

    fn validate_external_sender(
        &self,
        _sender: &SigningIdentity,
        _time: Option<MlsTime>,
        _extensions: Option<&ExtensionList>,
    ) -> Result<(), Refused> {
        Err(Refused("the profile has no external senders"))
    }

    fn identity(
        &self,
        leaf: &SigningIdentity,
        _extensions: &ExtensionList,
    ) -> Result<Vec<u8>, Refused> {
        let leaf = Self::read(leaf)?;
        Ok([&leaf.account[..], &leaf.device.unwrap_or_default()].concat())
    }

    /// An account may replace the leaf of its identity key by that of its first device.
    fn valid_successor(
        &self,
        before: &SigningIdentity,
        after: &SigningIdentity,
        _extensions: &ExtensionList,
    ) -> Result<bool, Refused> {
        let (old, new) = (Self::read(before)?, Self::read(after)?);
        let is_same_device =
            old.device == new.device && before.signature_key == after.signature_key;
        Ok((&old.account, &old.username) == (&new.account, &new.username)
            && (old.device.is_none() || is_same_device))
    }

    fn supported_types(&self) -> Vec<CredentialType> {
        vec![BasicCredential::credential_type()]
    }
}

/// The rules about commits, and the options of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rules {
    Kept,
    /// The member commits what the rules forbid.
    Broken,
}

impl MlsRules for Rules {
    type Error = Refused;

    fn filter_proposals(
        &self,
        _direction: CommitDirection,
        source: CommitSource,
        roster: &Roster<'_>,
        context: &GroupContext,
        proposals: ProposalBundle,
    ) -> Result<ProposalBundle, Refused> {
        match self {
            Self::Kept => judge(&source, roster, context, &proposals)?,
            Self::Broken => {}
        }
        Ok(proposals)
    }

    /// Each commit renews the keys of its author, and comes with a GroupInfo for devices that join
    /// by themselves.
    fn commit_options(
        &self,
        _roster: &Roster<'_>,
        _context: &GroupContext,
        _proposals: &ProposalBundle,
    ) -> Result<CommitOptions, Refused> {
        Ok(CommitOptions::new()
            .with_path_required(true)
            .with_ratchet_tree_extension(true)
            .with_single_welcome_message(true)
            .with_allow_external_commit(true))
    }

    /// The sizes of this padding are multiples of 32.
    fn encryption_options(
        &self,
        _roster: &Roster<'_>,
        _context: &GroupContext,
    ) -> Result<EncryptionOptions, Refused> {
        Ok(EncryptionOptions::new(true, PaddingMode::StepFunction))
    }
}

/// Returns the accounts of leaves, each once, in the order of the leaves.
pub(crate) fn accounts<'a>(leaves: impl Iterator<Item = &'a Leaf>) -> Vec<Key> {
    let mut accounts = Vec::new();
    for leaf in leaves {
        if !accounts.contains(&leaf.account) {
            accounts.push(leaf.account);
        }
    }
    accounts
}

/// Returns the leaves of a group with their places.
pub(crate) fn leaves(roster: &Roster<'_>) -> Result<Vec<(u32, Leaf)>, Refused> {
    roster
        .members_iter()
        .map(|member| Ok((member.index, Accounts::read(&member.signing_identity)?)))
        .collect()
}

fn judge(
    source: &CommitSource,
    roster: &Roster<'_>,
    context: &GroupContext,
    proposals: &ProposalBundle,
) -> Result<(), Refused> {
    let profile = GroupProfile::read(&context.group_id, &context.extensions)
        .ok_or(Refused("the group has no profile"))?;
    let before = leaves(roster)?;
    let members = accounts(before.iter().map(|(_, leaf)| leaf));
    let (by, is_member) = match source {
        CommitSource::ExistingMember(member) => (Accounts::read(&member.signing_identity)?, true),
        CommitSource::NewMember(leaf) => (Accounts::read(leaf)?, false),
    };
    let is_admin = profile.admins_of(&members).contains(&by.account);

    if proposals.iter_proposals().any(|proposal| proposal.is_by_reference()) {
        return Err(Refused("a proposal is in the commit by reference"));
    }
    let added: Vec<Leaf> = proposals
        .add_proposals()
        .iter()
        .map(|add| Accounts::read(add.proposal.signing_identity()))
        .collect::<Result<_, _>>()?;
    let removed: Vec<u32> =
        proposals.remove_proposals().iter().map(|remove| remove.proposal.to_remove()).collect();
    let profiles = proposals.group_context_ext_proposals();
    let known =
        added.len() + removed.len() + profiles.len() + proposals.external_init_proposals().len();
    if known != proposals.length() {
        return Err(Refused("a proposal is of a kind that the profile has not"));
    }

    let staying = before.iter().filter(|(place, _)| !removed.contains(place)).map(|(_, leaf)| leaf);
    let joins = (!is_member).then_some(&by);
    let after: Vec<&Leaf> = staying.chain(&added).chain(joins).collect();
    are_consistent(&after)?;
    let members_after = accounts(after.iter().copied());

    for leaf in &added {
        let is_new = !members.contains(&leaf.account);
        if !profile.admits(&leaf.account) || is_new && !is_admin {
            return Err(Refused("the author may not add this account"));
        }
    }
    for (_, leaf) in before.iter().filter(|(place, _)| removed.contains(place)) {
        let is_last = !members_after.contains(&leaf.account);
        if is_last && !is_admin && leaf.account != by.account {
            return Err(Refused("the author may not remove this account"));
        }
        if !is_member && leaf.account != by.account {
            return Err(Refused("a device that joins removes only its own leaf"));
        }
    }
    if !is_member && (!members.contains(&by.account) || !added.is_empty()) {
        return Err(Refused("a device joins a group that its account is not in"));
    }
    for extensions in profiles {
        let next = GroupProfile::read(&context.group_id, &extensions.proposal)
            .ok_or(Refused("the next profile is none"))?;
        let is_same = (&next.creator, next.created_at, &next.channel)
            == (&profile.creator, profile.created_at, &profile.channel);
        if !is_admin || !is_member || !is_same || profile.name.is_none() || next.name.is_none() {
            return Err(Refused("the author may not change the profile so"));
        }
    }
    Ok(())
}

/// Each account has one name, each name one account, and each device one leaf.
fn are_consistent(leaves: &[&Leaf]) -> Result<(), Refused> {
    for (place, leaf) in leaves.iter().enumerate() {
        for other in &leaves[..place] {
            let is_same_account = leaf.account == other.account;
            if is_same_account != (leaf.username == other.username) {
                return Err(Refused("two accounts have one name, or two names one account"));
            }
            if is_same_account && leaf.device == other.device {
                return Err(Refused("a device has two leaves"));
            }
        }
    }
    Ok(())
}
