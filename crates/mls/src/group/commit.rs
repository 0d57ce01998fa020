//! Commits of ours.
//!
//! A commit is *pending* from its creation until the server has accepted or refused it. A pending
//! commit has no effect on the group.

use std::collections::BTreeSet;

use openmls::{
    group::MlsGroup,
    prelude::{
        KeyPackage, LeafNodeIndex, LeafNodeParameters, MlsMessageBodyIn, MlsMessageIn,
        NewSignerBundle, OpenMlsProvider as _, group_info::VerifiableGroupInfo,
    },
};
use qpq_domain::IdentityKey;
use tls_codec::{DeserializeBytes as _, Serialize as _};

use super::{
    Group, MessageEffect, Removal, join_config,
    rules::{self, Accepted, Before, Committer, are_consistent},
};
use crate::{
    error::Error,
    identity::Identity,
    leaf::{LeafSigner, MemberDevice},
    outline, packages,
    profile::{GroupId, Profile},
    received::Ignored,
    store::Store,
};

/// The content of a commit of ours.
#[derive(Default)]
pub(crate) struct CommitContent {
    pub(crate) add: Vec<KeyPackage>,
    pub(crate) remove: Vec<LeafNodeIndex>,
    pub(crate) profile: Option<Profile>,
}

/// The messages of a commit.
#[derive(Debug)]
pub(crate) struct CommitMessages {
    pub(crate) commit: Vec<u8>,
    /// The Welcome for the devices that are added.
    pub(crate) welcome: Option<Vec<u8>>,
    /// The GroupInfo for devices that join by themselves later.
    pub(crate) group_info: Vec<u8>,
}

impl Group {
    /// Creates a pending commit.
    ///
    /// `signer` has the key of our leaf. `next` has the key of the leaf after the commit, if the
    /// key changes.
    pub(crate) fn commit(
        &mut self,
        signer: &LeafSigner,
        next: Option<&LeafSigner>,
        account: &IdentityKey,
        content: CommitContent,
    ) -> Result<CommitMessages, Error> {
        self.discard_commit()?;
        self.mls.set_aad(outline::claim(account));
        let is_renamed =
            next.is_none() && self.own_credential() != Some(signer.credential().credential);
        let mut builder = self
            .mls
            .commit_builder()
            .consume_proposal_store(false)
            .force_self_update(true)
            .propose_adds(content.add)
            .propose_removals(content.remove);
        if is_renamed {
            // The name of the device has changed.
            let renamed =
                LeafNodeParameters::builder().with_credential_with_key(signer.credential()).build();
            builder = builder.leaf_node_parameters(renamed);
        }
        if let Some(profile) = content.profile {
            builder = builder
                .propose_group_context_extensions(profile.extensions())
                .map_err(Error::mls)?;
        }
        let loaded = builder
            .load_psks(self.store.storage())
            .map_err(Error::mls)?
            .use_ratchet_tree_extension(true);
        let (rand, crypto) = (self.store.rand(), self.store.crypto());
        let built = match next {
            None => loaded.build(rand, crypto, signer, |_| true),
            Some(next) => {
                let bundle =
                    NewSignerBundle { signer: next, credential_with_key: next.credential() };
                loaded.build_with_new_signer(rand, crypto, signer, bundle, |_| true)
            }
        };
        let (commit, welcome, group_info) = built
            .map_err(Error::mls)?
            .stage_commit(&self.store)
            .map_err(Error::mls)?
            .into_messages();
        // The server does not check commits. If the server accepted a commit that the members
        // refuse, the group could not continue.
        if let Some(Err(reason)) = self.judge_pending() {
            self.discard_commit()?;
            return Err(Error::Mls(reason.to_string()));
        }
        Ok(CommitMessages {
            commit: commit.to_bytes().map_err(Error::mls)?,
            welcome: welcome.map(|welcome| welcome.to_bytes()).transpose().map_err(Error::mls)?,
            group_info: group_info
                .map(|info| info.to_bytes())
                .transpose()
                .map_err(Error::mls)?
                .unwrap_or_default(),
        })
    }

    /// Returns whether a commit of ours is pending.
    pub(crate) fn has_pending_commit(&self) -> bool {
        self.mls.pending_commit().is_some()
    }

    /// Judges the pending commit as the other members will. Returns `None` if none is pending.
    fn judge_pending(&self) -> Option<Result<Accepted, Ignored>> {
        let commit = self.mls.pending_commit()?;
        let leaves = self.leaves();
        let before = Before { id: &self.id, profile: &self.profile, leaves: &leaves };
        Some(rules::judge(&before, Committer::Member(self.mls.own_leaf_index()), commit))
    }

    /// Applies the pending commit, which the server has accepted. Returns `None` if none is
    /// pending.
    pub(crate) fn confirm_commit(&mut self) -> Result<Option<MessageEffect>, Error> {
        let Some(judged) = self.judge_pending() else { return Ok(None) };
        let accepted = judged.map_err(|reason| Error::Mls(reason.to_string()))?;
        let last_epoch = self.epoch();
        self.mls.merge_pending_commit(&self.store).map_err(Error::mls)?;
        Ok(Some(self.applied(accepted, last_epoch, Removal::Open)))
    }

    /// Drops the pending commit, which the server has refused.
    pub(crate) fn discard_commit(&mut self) -> Result<(), Error> {
        self.mls.clear_pending_commit(self.store.storage()).map_err(Error::mls)
    }

    /// Joins a group by an external commit (RFC 9420 §12.4.3.2).
    ///
    /// The returned group is in the epoch after the commit, and is dropped if the server refuses
    /// the commit. `is_trusted` returns whether an account may be the author of the GroupInfo.
    pub(crate) fn join_by_itself(
        group_info: &[u8],
        signer: &LeafSigner,
        identity: &Identity,
        is_trusted: impl Fn(&IdentityKey) -> bool,
    ) -> Result<(Self, CommitMessages), Error> {
        let author = outline::author_of_group_info(group_info).ok_or(Error::BadGroupInfo)?;
        let message = MlsMessageIn::tls_deserialize_exact_bytes(group_info)
            .map_err(|_| Error::BadGroupInfo)?;
        let MlsMessageBodyIn::GroupInfo(info) = message.extract() else {
            return Err(Error::BadGroupInfo);
        };
        let store = Store::default();
        let me = identity.public();
        let is_member = accounts_in(&info).contains(&me);
        let builder = MlsGroup::external_commit_builder()
            .with_config(join_config())
            .with_aad(outline::claim(&me))
            .skip_lifetime_validation()
            .build_group(&store, info, signer.credential())
            .map_err(|_| Error::BadGroupInfo)?;
        if !is_member {
            return Err(Error::NotAMember(me));
        }
        let parameters =
            LeafNodeParameters::builder().with_capabilities(packages::capabilities()).build();
        let (mls, bundle) = builder
            .leaf_node_parameters(parameters)
            .load_psks(store.storage())
            .map_err(Error::mls)?
            .use_ratchet_tree_extension(true)
            .build(store.rand(), store.crypto(), signer, |_| true)
            .map_err(Error::mls)?
            .finalize(&store)
            .map_err(Error::mls)?;
        let is_trusted = |author: Option<&IdentityKey>| is_trusted(author.unwrap_or(&me));
        let (id, profile) = check_joined(&mls, author, is_trusted).ok_or(Error::BadGroupInfo)?;
        let (commit, _, info) = bundle.into_contents();
        let info = info.ok_or(Error::BadGroupInfo)?;
        let info = openmls::prelude::MlsMessageOut::from(info);
        let messages = CommitMessages {
            commit: commit.to_bytes().map_err(Error::mls)?,
            welcome: None,
            group_info: info.tls_serialize_detached().map_err(Error::mls)?,
        };
        let joined_at = mls.epoch().as_u64();
        Ok((Self { id, profile, mls, store, departed: Vec::new(), joined_at }, messages))
    }
}

/// Checks the group that an external commit leads to, and returns its id and profile.
///
/// The members are a claim of the author and the server, and are checked as in a Welcome. The only
/// leaf that the commit removes is the earlier leaf of this device. An author without a leaf is
/// therefore this account, for which `is_trusted` receives `None`.
fn check_joined(
    mls: &MlsGroup,
    author: u32,
    is_trusted: impl Fn(Option<&IdentityKey>) -> bool,
) -> Option<(GroupId, Profile)> {
    let id = GroupId::try_from(mls.group_id().as_slice()).ok()?;
    let profile = Profile::read(&id, mls.extensions())?;
    let own = mls.own_leaf_index();
    let verified = mls.members().map(|leaf| {
        let device = MemberDevice::verify(&leaf.signature_key, &leaf.credential)?;
        Some((leaf.index, device))
    });
    let leaves: Vec<_> = verified.collect::<Option<_>>()?;
    let by = leaves.iter().find(|(place, _)| place.u32() == author);
    let mut others = leaves.iter().filter(|(place, _)| *place != own);
    let is_valid = is_trusted(by.map(|(_, leaf)| &leaf.member.identity))
        && others.all(|(_, leaf)| profile.admits(&leaf.member.identity))
        && are_consistent(leaves.iter().map(|(_, leaf)| leaf));
    is_valid.then_some((id, profile))
}

/// Returns the accounts in the tree of a GroupInfo. openmls verifies the tree later.
fn accounts_in(info: &VerifiableGroupInfo) -> BTreeSet<IdentityKey> {
    let tree = info.extensions().ratchet_tree().map(|tree| tree.ratchet_tree());
    let leaves = tree.into_iter().flat_map(|tree| tree.leaves());
    leaves
        .filter_map(|leaf| MemberDevice::verify(leaf.signature_key().as_slice(), leaf.credential()))
        .map(|leaf| leaf.member.identity)
        .collect()
}
