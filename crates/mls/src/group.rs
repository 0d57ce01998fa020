//! One group as this client sees it: openmls's state, the group's profile, and the rules that
//! openmls leaves to us (who may commit, what a commit may change, who a sender was).

#[cfg(test)]
mod tests;

use openmls::{
    framing::errors::MessageDecryptionError,
    group::{
        GroupId as MlsGroupId, MlsGroup, MlsGroupCreateConfig, MlsGroupJoinConfig,
        ProcessMessageError, ProposalValidationError, StageCommitError, StagedCommit,
        ValidationError,
    },
    prelude::{
        ContentType, KeyPackage, KeyPackageVerifyError, LeafNodeIndex, OpenMlsProvider as _,
        PrivateMessageIn, ProcessedMessage, ProcessedMessageContent, Proposal, ProtocolMessage,
        Sender, SenderRatchetConfiguration,
    },
    treesync::errors::LeafNodeValidationError,
};
use qpq_domain::{IdentityKey, UnixMillis, Username};

use crate::{
    codec::{Malformed, Reader, Writer},
    content::{Content, Said},
    database::{Database, DatabaseError},
    error::Error,
    identity::{Identity, Member},
    outline, packages,
    profile::{GroupId, GroupKind, Profile},
    received::{Ignored, Lost},
    store::Store,
    summary::GroupSummary,
    tables,
};

/// Ciphertexts are padded to a multiple of this many bytes.
const PADDING: usize = 32;

/// The most epochs that an application message may be behind its group. Each costs forward secrecy,
/// and room: 2 KB in a group of four, 80 KB in one of two hundred.
const PAST_EPOCHS: usize = 10;

/// How far back in one sender's messages a late one may be, and how many may be lost in a row: as
/// many as fit an inbox.
const OUT_OF_ORDER: u32 = 1_000;
pub(crate) const FORWARD: u32 = 10_000;

/// The effect of one message on a group.
#[derive(Debug)]
pub(crate) enum MessageEffect {
    Message { sender: Member, content: Content },
    Asked { sender: Member, digests: Vec<[u8; 32]> },
    Leaving { sender: Member },
    Committed { added: Vec<Member>, removed: Vec<Member> },
    Lost(Lost),
    Ignored(Ignored),
}

pub(crate) struct Group {
    id: GroupId,
    profile: Profile,
    mls: MlsGroup,
    store: Store,
    departed: Vec<Departed>,
}

/// A member whose leaf was emptied, remembered as long as its messages of earlier epochs can be
/// read.
struct Departed {
    leaf: u32,
    last_epoch: u64,
    member: Member,
}

impl Group {
    /// Creates a group whose only member is this account.
    pub(crate) fn make(
        identity: &Identity,
        username: &Username,
        profile: Profile,
        now: UnixMillis,
    ) -> Result<Self, Error> {
        Self::make_as(GroupId::random(&profile.creator), identity, username, profile, now)
    }

    fn make_as(
        id: GroupId,
        identity: &Identity,
        username: &Username,
        profile: Profile,
        now: UnixMillis,
    ) -> Result<Self, Error> {
        let store = Store::default();
        let config = MlsGroupCreateConfig::builder()
            .ciphersuite(packages::SUITE)
            .capabilities(packages::capabilities())
            .lifetime(packages::lifetime(now))
            .padding_size(PADDING)
            .max_past_epochs(PAST_EPOCHS)
            .sender_ratchet_configuration(ratchet())
            .use_ratchet_tree_extension(true)
            .with_group_context_extensions(profile.extensions())
            .build();
        let mls = MlsGroup::new_with_group_id(
            &store,
            identity,
            &config,
            MlsGroupId::from_slice(id.as_bytes()),
            identity.credential(username),
        )
        .map_err(Error::mls)?;
        Ok(Self { id, profile, mls, store, departed: Vec::new() })
    }

    /// A group that was joined by a Welcome.
    pub(crate) fn joined(id: GroupId, profile: Profile, mls: MlsGroup, store: Store) -> Self {
        Self { id, profile, mls, store, departed: Vec::new() }
    }

    pub(crate) fn id(&self) -> GroupId {
        self.id
    }

    pub(crate) fn profile(&self) -> &Profile {
        &self.profile
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.mls.epoch().as_u64()
    }

    pub(crate) fn is_active(&self) -> bool {
        self.mls.is_active()
    }

    pub(crate) fn members(&self) -> Vec<Member> {
        self.leaves().into_iter().map(|(_, member)| member).collect()
    }

    pub(crate) fn summary(&self) -> GroupSummary {
        GroupSummary {
            id: self.id,
            kind: self.profile.kind.clone(),
            channel: self.profile.channel,
            creator: self.profile.creator,
            created_at: self.profile.created_at,
            epoch: self.epoch(),
            members: self.members(),
            active: self.is_active(),
        }
    }

    /// Commits the addition of `packages`: the commit for those who are members already, the
    /// Welcome for the new ones.
    pub(crate) fn add(
        &mut self,
        identity: &Identity,
        packages: &[KeyPackage],
    ) -> Result<(Vec<u8>, Vec<u8>), Error> {
        let (commit, welcome, _group_info) =
            self.mls.add_members(&self.store, identity, packages).map_err(Error::mls)?;
        self.mls.merge_pending_commit(&self.store).map_err(Error::mls)?;
        self.forget_departed();
        Ok((commit.to_bytes().map_err(Error::mls)?, welcome.to_bytes().map_err(Error::mls)?))
    }

    /// Commits the removal of members, who are all in the group.
    pub(crate) fn remove(
        &mut self,
        identity: &Identity,
        keys: &[IdentityKey],
    ) -> Result<Vec<u8>, Error> {
        let last_epoch = self.epoch();
        let (leaves, departed): (Vec<_>, Vec<_>) = self
            .leaves()
            .into_iter()
            .filter(|(_, member)| keys.contains(&member.identity))
            .map(|(leaf, member)| (leaf, Departed { leaf: leaf.u32(), last_epoch, member }))
            .unzip();
        let (commit, _welcome, _group_info) =
            self.mls.remove_members(&self.store, identity, &leaves).map_err(Error::mls)?;
        self.mls.merge_pending_commit(&self.store).map_err(Error::mls)?;
        self.departed.extend(departed);
        self.forget_departed();
        commit.to_bytes().map_err(Error::mls)
    }

    pub(crate) fn encrypt(
        &mut self,
        identity: &Identity,
        content: &[u8],
    ) -> Result<Vec<u8>, Error> {
        self.mls.set_aad(outline::claim(&identity.public()));
        let message =
            self.mls.create_message(&self.store, identity, content).map_err(Error::mls)?;
        message.to_bytes().map_err(Error::mls)
    }

    /// Uses up `count` of our sending keys.
    pub(crate) fn skip_keys(&mut self, identity: &Identity, count: u64) -> Result<(), Error> {
        (0..count).try_for_each(|_| self.encrypt(identity, b"").map(drop))
    }

    /// Processes a message of this group that is not of a future epoch.
    pub(crate) fn process(&mut self, message: PrivateMessageIn) -> MessageEffect {
        if !self.is_active() {
            return MessageEffect::Ignored(Ignored::NoLongerMember);
        }
        let (epoch, content_type) = (message.epoch().as_u64(), message.content_type());
        if content_type != ContentType::Application && epoch < self.epoch() {
            // Each epoch has one commit, and another was applied. A creator who restored an older
            // state makes a second one.
            return MessageEffect::Ignored(Ignored::OldCommit);
        }
        let processed = match self.mls.process_message(&self.store, ProtocolMessage::from(message))
        {
            Ok(processed) => processed,
            Err(error) => return unreadable(&error),
        };
        self.apply(processed).unwrap_or_else(MessageEffect::Ignored)
    }

    fn apply(&mut self, processed: ProcessedMessage) -> Result<MessageEffect, Ignored> {
        let epoch = processed.epoch().as_u64();
        let Sender::Member(leaf) = *processed.sender() else { return Err(Ignored::Invalid) };
        let sender = self.sender(leaf, epoch);
        let has_departed = self.departed_as(leaf, epoch).is_some();
        let credential = processed.credential().clone();
        match processed.into_content() {
            ProcessedMessageContent::ApplicationMessage(message) => {
                let sender = sender
                    .filter(|member| {
                        Member::read(member.identity.as_bytes(), &credential).as_ref()
                            == Some(member)
                    })
                    .ok_or(Ignored::Invalid)?;
                match Said::decode(&message.into_bytes()).ok_or(Ignored::UnknownContent)? {
                    Said::Text(content) => Ok(MessageEffect::Message { sender, content }),
                    Said::CouldNotRead(digests) => Ok(MessageEffect::Asked { sender, digests }),
                    Said::Leaving if has_departed => Err(Ignored::AlreadyGone),
                    Said::Leaving => Ok(MessageEffect::Leaving { sender }),
                }
            }
            ProcessedMessageContent::StagedCommitMessage(commit) => {
                if sender.map(|member| member.identity) != Some(self.profile.creator) {
                    return Err(Ignored::NotTheCreator);
                }
                self.merge(*commit)
            }
            ProcessedMessageContent::OwnPrivateMessage => Err(Ignored::OwnMessage),
            _ => Err(Ignored::NotTheCreator),
        }
    }

    /// Applies the creator's commit, if it does nothing but add, remove and refresh keys.
    fn merge(&mut self, commit: StagedCommit) -> Result<MessageEffect, Ignored> {
        let before = self.leaves();
        let mut added = Vec::new();
        let mut removed = Vec::new();
        for queued in commit.queued_proposals() {
            match queued.proposal() {
                Proposal::Add(add) => {
                    let leaf = add.key_package().leaf_node();
                    let member = Member::read(leaf.signature_key().as_slice(), leaf.credential())
                        .filter(|member| self.profile.admits(&member.identity))
                        .ok_or(Ignored::ForbiddenCommit)?;
                    added.push(member);
                }
                Proposal::Remove(remove) => {
                    let gone = before.iter().find(|(leaf, _)| *leaf == remove.removed());
                    removed.push(gone.ok_or(Ignored::ForbiddenCommit)?.clone());
                }
                _ => return Err(Ignored::ForbiddenCommit),
            }
        }
        // openmls collects the removals of a commit in a hash map.
        removed.sort_unstable_by_key(|(leaf, _)| leaf.u32());
        let staying =
            before.iter().filter(|entry| !removed.contains(entry)).map(|(_, member)| member);
        if !are_distinct(staying.chain(&added)) || !self.keeps_creators_leaf(&commit, &before) {
            return Err(Ignored::ForbiddenCommit);
        }
        let last_epoch = self.epoch();
        self.mls.merge_staged_commit(&self.store, commit).map_err(|_| Ignored::Invalid)?;
        let departed = removed.iter().map(|(leaf, member)| Departed {
            leaf: leaf.u32(),
            last_epoch,
            member: member.clone(),
        });
        self.departed.extend(departed);
        self.forget_departed();
        Ok(MessageEffect::Committed {
            added,
            removed: removed.into_iter().map(|(_, member)| member).collect(),
        })
    }

    /// A commit with a path replaces the committer's leaf; key and name must stay what they were.
    fn keeps_creators_leaf(
        &self,
        commit: &StagedCommit,
        before: &[(LeafNodeIndex, Member)],
    ) -> bool {
        let Some(leaf) = commit.update_path_leaf_node() else { return true };
        let after = Member::read(leaf.signature_key().as_slice(), leaf.credential());
        let creator =
            before.iter().map(|(_, member)| member).find(|m| m.identity == self.profile.creator);
        creator.is_some() && after.as_ref() == creator
    }

    fn leaves(&self) -> Vec<(LeafNodeIndex, Member)> {
        self.mls
            .members()
            .filter_map(|leaf| {
                Some((leaf.index, Member::read(&leaf.signature_key, &leaf.credential)?))
            })
            .collect()
    }

    /// Returns the member that had `leaf` in `epoch`.
    fn sender(&self, leaf: LeafNodeIndex, epoch: u64) -> Option<Member> {
        self.departed_as(leaf, epoch).cloned().or_else(|| {
            let now = self.mls.member_at(leaf)?;
            Member::read(&now.signature_key, &now.credential)
        })
    }

    /// Returns the member that had `leaf` in `epoch` and was removed since.
    fn departed_as(&self, leaf: LeafNodeIndex, epoch: u64) -> Option<&Member> {
        self.departed
            .iter()
            .filter(|departed| departed.leaf == leaf.u32() && departed.last_epoch >= epoch)
            .min_by_key(|departed| departed.last_epoch)
            .map(|departed| &departed.member)
    }

    fn forget_departed(&mut self) {
        let oldest = self.epoch().saturating_sub(PAST_EPOCHS as u64);
        self.departed.retain(|departed| departed.last_epoch >= oldest);
    }

    /// Loads a group; `None` if there is none of this id.
    pub(crate) fn load(database: &Database, id: GroupId) -> Result<Option<Self>, DatabaseError> {
        let Some(row) = database.get(tables::GROUPS, id.as_bytes())? else { return Ok(None) };
        let (_, departed) = read_row(&row)?;
        let store = Store::load(database, id.as_bytes())?;
        Self::assemble(id, store, departed)
            .map(Some)
            .map_err(|Malformed| DatabaseError::Damaged("a group's values do not fit".into()))
    }

    /// Saves what has changed.
    pub(crate) fn save(
        &mut self,
        database: &Database,
        me: &IdentityKey,
    ) -> Result<(), DatabaseError> {
        self.store.save(database, self.id.as_bytes())?;
        let summary = self.summary();
        let name_len = match &summary.kind {
            GroupKind::Direct { .. } => 0,
            GroupKind::Group { name } => name.len(),
        };
        let names = summary.members.iter().map(|member| 36 + member.username.as_str().len());
        let departed = self.departed.iter().map(|d| 48 + d.member.username.as_str().len());
        let len = 256 + name_len + names.sum::<usize>() + departed.sum::<usize>();
        let mut writer = Writer::with_capacity(len);
        summary.write(&mut writer);
        writer.count(self.departed.len());
        for departed in &self.departed {
            departed.write(&mut writer);
        }
        let peer = summary.peer_of(me);
        let lane = peer.as_ref().map(|peer| &peer.as_bytes()[..]);
        database.put(tables::GROUPS, self.id.as_bytes(), lane, writer.written())
    }

    /// Removes a group.
    pub(crate) fn delete(database: &Database, id: GroupId) -> Result<bool, DatabaseError> {
        database.delete_lane(tables::MLS, id.as_bytes())?;
        database.delete(tables::GROUPS, id.as_bytes())
    }

    /// Reads what an earlier version saved, in one piece; also the digest of the Welcome that led
    /// to it.
    pub(crate) fn read_legacy(
        reader: &mut Reader<'_>,
    ) -> Result<(Self, Option<[u8; 32]>), Malformed> {
        let id = GroupId::try_from(reader.raw(32)?).map_err(|_| Malformed)?;
        let store = Store::read(reader)?;
        let welcome = match reader.bytes()? {
            [] => None,
            digest => Some(digest.try_into().map_err(|_| Malformed)?),
        };
        let departed = reader.list(Departed::read)?;
        Ok((Self::assemble(id, store, departed)?, welcome))
    }

    fn assemble(id: GroupId, store: Store, departed: Vec<Departed>) -> Result<Self, Malformed> {
        let mls = MlsGroup::load(store.storage(), &MlsGroupId::from_slice(id.as_bytes()))
            .ok()
            .flatten()
            .ok_or(Malformed)?;
        let profile = Profile::read(&id, mls.extensions()).ok_or(Malformed)?;
        Ok(Self { id, profile, mls, store, departed })
    }
}

impl Departed {
    fn write(&self, writer: &mut Writer) {
        writer.raw(&self.leaf.to_be_bytes());
        writer.number(self.last_epoch);
        self.member.write(writer);
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(Self {
            leaf: reader.array().map(u32::from_be_bytes)?,
            last_epoch: reader.number()?,
            member: Member::from_reader(reader)?,
        })
    }
}

fn read_row(row: &[u8]) -> Result<(GroupSummary, Vec<Departed>), DatabaseError> {
    let mut reader = Reader::new(row);
    let read =
        |reader: &mut Reader<'_>| Ok((GroupSummary::read(reader)?, reader.list(Departed::read)?));
    read(&mut reader)
        .map_err(|Malformed| DatabaseError::Damaged("a group's row is cut short".into()))
}

/// The settings of groups that are joined.
pub(crate) fn join_config() -> MlsGroupJoinConfig {
    MlsGroupJoinConfig::builder()
        .padding_size(PADDING)
        .max_past_epochs(PAST_EPOCHS)
        .sender_ratchet_configuration(ratchet())
        .use_ratchet_tree_extension(true)
        .build()
}

fn ratchet() -> SenderRatchetConfiguration {
    SenderRatchetConfiguration::new(OUT_OF_ORDER, FORWARD)
}

/// Whether no two members have one key or one name.
pub(crate) fn are_distinct<'a>(members: impl Iterator<Item = &'a Member>) -> bool {
    let (mut keys, mut names) =
        (std::collections::BTreeSet::new(), std::collections::BTreeSet::new());
    members.into_iter().all(|member| keys.insert(member.identity) && names.insert(&member.username))
}

fn unreadable<E>(error: &ProcessMessageError<E>) -> MessageEffect {
    use LeafNodeValidationError::Lifetime;
    use MessageDecryptionError::{AeadError, SecretTreeError};
    use ProposalValidationError::LeafNodeValidation;
    let validation = match error {
        ProcessMessageError::ValidationError(validation) => validation,
        ProcessMessageError::InvalidCommit(StageCommitError::ProposalValidationError(
            LeafNodeValidation(Lifetime(_)),
        )) => return MessageEffect::Ignored(Ignored::LifetimeOver),
        _ => return MessageEffect::Ignored(Ignored::Invalid),
    };
    match validation {
        ValidationError::KeyPackageVerifyError(KeyPackageVerifyError::LifetimeError(_)) => {
            MessageEffect::Ignored(Ignored::LifetimeOver)
        }
        // The keys were used, deleted, or are too far ahead. Which of them it is does not matter: a
        // message that was here before was recognized by its digest.
        ValidationError::UnableToDecrypt(SecretTreeError(_)) => MessageEffect::Lost(Lost::NoKeys),
        ValidationError::UnableToDecrypt(AeadError) => MessageEffect::Lost(Lost::Undecryptable),
        ValidationError::NoPastEpochData => MessageEffect::Lost(Lost::NoKeys),
        _ => MessageEffect::Ignored(Ignored::Invalid),
    }
}
