//! One group: openmls's state, the group's profile, and the members that were removed.
//!
//! | file | contents |
//! |---|---|
//! | `rules` | the rules about commits |
//! | `commit` | commits of ours, and external commits of this device |
//! | `process` | the effect of received messages |

mod commit;
mod process;
mod rules;
#[cfg(test)]
mod tests;

use openmls::{
    group::{GroupId as MlsGroupId, MlsGroup, MlsGroupCreateConfig, MlsGroupJoinConfig},
    prelude::{Credential, LeafNodeIndex, OpenMlsProvider as _, SenderRatchetConfiguration},
};
use qpq_domain::{IdentityKey, UnixMillis};

pub(crate) use self::{
    commit::{CommitContent, CommitMessages},
    process::MessageEffect,
    rules::{Leaf, accounts, are_consistent},
};
use crate::{
    codec::{Malformed, Reader, Writer},
    database::{Database, DatabaseError, Table},
    error::Error,
    identity::Member,
    leaf::{LeafSigner, MemberDevice},
    outline, packages,
    profile::{GroupId, GroupKind, Profile},
    store::Store,
    summary::GroupSummary,
    tables,
};

/// Ciphertexts are padded to a multiple of this many bytes.
const PADDING: usize = 32;

/// The number of past epochs of which application messages are accepted.
///
/// Each epoch weakens forward secrecy and takes space: 2 KB in a group of 4, 80 KB in a group of
/// 200.
const PAST_EPOCHS: usize = 10;

/// The maximum number of messages by which one message of a sender may be late.
const OUT_OF_ORDER: u32 = 1_000;
/// The maximum number of messages of one sender that may be lost in a row: the default capacity of
/// an inbox.
pub(crate) const FORWARD: u32 = 10_000;

pub(crate) struct Group {
    id: GroupId,
    profile: Profile,
    mls: MlsGroup,
    store: Store,
    departed: Vec<Departed>,
    /// The first epoch that we were a member in. Messages of earlier epochs are not for us.
    joined_at: u64,
}

/// A member whose leaf was removed, kept while its messages of earlier epochs can be read.
struct Departed {
    leaf: u32,
    last_epoch: u64,
    member: Member,
    removal: Removal,
}

/// Whether messages of a removed leaf are still accepted.
///
/// A removed member still has the keys of past epochs. A message that follows the removal in our
/// inbox was accepted by the server after the removal, and may have been written after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Removal {
    /// A commit of ours removed the leaf. Our inbox does not contain the commit, so messages that
    /// the server accepted before it may be unread until the inbox was read to its end.
    Open,
    /// Later messages are refused.
    Closed,
    /// The device joined again by itself, and may still send what it encrypted before. Its messages
    /// are accepted until a leaf of its account is removed by a member.
    Replaced,
}

impl Group {
    /// Creates a group whose only member is this device.
    pub(crate) fn create(
        signer: &LeafSigner,
        profile: Profile,
        now: UnixMillis,
    ) -> Result<Self, Error> {
        Self::create_as(GroupId::random(&profile.creator), signer, profile, now)
    }

    fn create_as(
        id: GroupId,
        signer: &LeafSigner,
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
            signer,
            &config,
            MlsGroupId::from_slice(id.as_bytes()),
            signer.credential(),
        )
        .map_err(Error::mls)?;
        Ok(Self { id, profile, mls, store, departed: Vec::new(), joined_at: 0 })
    }

    /// Creates the group that a Welcome leads to.
    pub(crate) fn joined(id: GroupId, profile: Profile, mls: MlsGroup, store: Store) -> Self {
        let joined_at = mls.epoch().as_u64();
        Self { id, profile, mls, store, departed: Vec::new(), joined_at }
    }

    /// Keeps the first epoch of `earlier`, which this group replaces.
    pub(crate) fn continue_from(&mut self, earlier: &Self) {
        self.joined_at = earlier.joined_at;
    }

    /// Returns the first epoch that we were a member in.
    pub(crate) fn joined_at(&self) -> u64 {
        self.joined_at
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

    /// Returns the member accounts, each once, in the order of the tree.
    pub(crate) fn members(&self) -> Vec<Member> {
        let mut members: Vec<Member> = Vec::new();
        let mut seen = std::collections::BTreeSet::new();
        for (_, leaf) in self.leaves() {
            if seen.insert(leaf.member.identity) {
                members.push(leaf.member);
            }
        }
        members
    }

    /// Returns every leaf.
    pub(crate) fn leaves(&self) -> Vec<Leaf> {
        self.mls
            .members()
            .filter_map(|leaf| {
                Some((leaf.index, MemberDevice::read(&leaf.signature_key, &leaf.credential)?))
            })
            .collect()
    }

    /// Returns the signature key of our leaf.
    pub(crate) fn own_key(&self) -> Option<[u8; 32]> {
        self.mls.own_leaf_node()?.signature_key().as_slice().try_into().ok()
    }

    fn own_credential(&self) -> Option<Credential> {
        self.mls.own_leaf_node().map(|leaf| leaf.credential().clone())
    }

    pub(crate) fn summary(&self) -> GroupSummary {
        let members = self.members();
        let keys: Vec<_> = members.iter().map(|member| member.identity).collect();
        GroupSummary {
            id: self.id,
            kind: self.profile.kind.clone(),
            channel: self.profile.channel,
            creator: self.profile.creator,
            created_at: self.profile.created_at,
            epoch: self.epoch(),
            admins: self.profile.admins_of(&keys),
            members,
            active: self.is_active(),
        }
    }

    pub(crate) fn encrypt(
        &mut self,
        signer: &LeafSigner,
        account: &IdentityKey,
        content: &[u8],
    ) -> Result<Vec<u8>, Error> {
        self.mls.set_aad(outline::claim(account));
        let message = self.mls.create_message(&self.store, signer, content).map_err(Error::mls)?;
        message.to_bytes().map_err(Error::mls)
    }

    /// Uses up `count` of our sending keys.
    pub(crate) fn skip_keys(
        &mut self,
        signer: &LeafSigner,
        account: &IdentityKey,
        count: u64,
    ) -> Result<(), Error> {
        (0..count).try_for_each(|_| self.encrypt(signer, account, b"").map(drop))
    }

    /// Returns the member that had `leaf` in `epoch`.
    fn sender(&self, leaf: LeafNodeIndex, epoch: u64) -> Option<Member> {
        self.departed_as(leaf, epoch).map(|departed| departed.member.clone()).or_else(|| {
            let now = self.mls.member_at(leaf)?;
            MemberDevice::read(&now.signature_key, &now.credential).map(|leaf| leaf.member)
        })
    }

    /// Returns the member that had `leaf` in `epoch` and was removed since.
    fn departed_as(&self, leaf: LeafNodeIndex, epoch: u64) -> Option<&Departed> {
        self.departed
            .iter()
            .filter(|departed| departed.leaf == leaf.u32() && departed.last_epoch >= epoch)
            .min_by_key(|departed| departed.last_epoch)
    }

    /// Returns whether messages of leaves that commits of ours removed are still accepted.
    pub(crate) fn has_open_removals(&self) -> bool {
        self.departed.iter().any(|departed| departed.removal == Removal::Open)
    }

    /// Refuses messages of the leaves that commits of ours removed in epochs up to `last_epoch`.
    pub(crate) fn close_removals(&mut self, last_epoch: u64) {
        for departed in &mut self.departed {
            if departed.removal == Removal::Open && departed.last_epoch <= last_epoch {
                departed.removal = Removal::Closed;
            }
        }
    }

    fn forget_departed(&mut self) {
        let oldest = self.epoch().saturating_sub(PAST_EPOCHS as u64);
        self.departed.retain(|departed| departed.last_epoch >= oldest);
    }

    /// Loads a group; `None` if there is none of this id.
    pub(crate) fn load(database: &Database, id: GroupId) -> Result<Option<Self>, DatabaseError> {
        let Some(row) = database.get(tables::GROUPS, id.as_bytes())? else { return Ok(None) };
        let Row { departed, joined_at, .. } = Row::parse(&row)?;
        let store = Store::load(database, id.as_bytes())?;
        Self::assemble(id, store, departed, joined_at)
            .map(Some)
            .map_err(|Malformed| DatabaseError::Damaged("a group's values do not fit".into()))
    }

    /// Saves the changes of the group.
    pub(crate) fn save(
        &mut self,
        database: &Database,
        me: &IdentityKey,
    ) -> Result<(), DatabaseError> {
        self.store.save(database, self.id.as_bytes())?;
        self.save_row(database, me, tables::GROUPS)
    }

    fn save_row(
        &self,
        database: &Database,
        me: &IdentityKey,
        table: Table,
    ) -> Result<(), DatabaseError> {
        let summary = self.summary();
        let name_len = match &summary.kind {
            GroupKind::Direct { .. } => 0,
            GroupKind::Group { name } => name.len(),
        };
        let names = summary.members.iter().map(|member| 36 + member.username.as_str().len());
        let departed = self.departed.iter().map(|d| 49 + d.member.username.as_str().len());
        let admins = 32 * summary.admins.len();
        let len = 256 + name_len + names.sum::<usize>() + departed.sum::<usize>() + admins;
        let mut writer = Writer::with_capacity(len);
        summary.write(&mut writer);
        writer.count(self.departed.len());
        for departed in &self.departed {
            departed.write(&mut writer);
        }
        writer.count(summary.admins.len());
        summary.admins.iter().for_each(|key| writer.raw(key.as_bytes()));
        writer.number(self.joined_at);
        self.departed.iter().for_each(|departed| writer.raw(&[departed.removal as u8]));
        let peer = summary.peer_of(me);
        let lane = peer.as_ref().map(|peer| &peer.as_bytes()[..]);
        database.put(table, self.id.as_bytes(), lane, writer.written())
    }

    /// Saves a group that this device joins, next to the state that the group would replace.
    pub(crate) fn save_joining(
        &mut self,
        database: &Database,
        me: &IdentityKey,
    ) -> Result<(), DatabaseError> {
        database.delete_lane(tables::MLS, &joining(&self.id))?;
        self.store.save(database, &joining(&self.id))?;
        self.save_row(database, me, tables::JOINING)
    }

    /// Removes and returns a group that this device was about to join.
    pub(crate) fn take_joining(
        database: &Database,
        id: GroupId,
    ) -> Result<Option<Self>, DatabaseError> {
        let Some(row) = database.get(tables::JOINING, id.as_bytes())? else { return Ok(None) };
        let Row { departed, joined_at, .. } = Row::parse(&row)?;
        // The copy counts as unsaved, so the next save writes all of it under the group's own id.
        let store = Store::load(database, &joining(&id))?.copy();
        database.delete_lane(tables::MLS, &joining(&id))?;
        database.delete(tables::JOINING, id.as_bytes())?;
        Self::assemble(id, store, departed, joined_at)
            .map(Some)
            .map_err(|Malformed| DatabaseError::Damaged("a group's values do not fit".into()))
    }

    /// Removes a group.
    pub(crate) fn delete(database: &Database, id: GroupId) -> Result<bool, DatabaseError> {
        database.delete_lane(tables::MLS, id.as_bytes())?;
        database.delete_lane(tables::UNPASSED, id.as_bytes())?;
        database.delete(tables::GROUPS, id.as_bytes())
    }

    /// Reads a group that an earlier version saved, and the digest of its Welcome.
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
        Ok((Self::assemble(id, store, departed, 0)?, welcome))
    }

    fn assemble(
        id: GroupId,
        store: Store,
        departed: Vec<Departed>,
        joined_at: u64,
    ) -> Result<Self, Malformed> {
        let mls = MlsGroup::load(store.storage(), &MlsGroupId::from_slice(id.as_bytes()))
            .ok()
            .flatten()
            .ok_or(Malformed)?;
        let profile = Profile::read(&id, mls.extensions()).ok_or(Malformed)?;
        Ok(Self { id, profile, mls, store, departed, joined_at })
    }
}

/// Returns the owner under which the database has the values of a group that is being joined.
fn joining(id: &GroupId) -> Vec<u8> {
    [b"joining", &id.as_bytes()[..]].concat()
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
            removal: Removal::Closed,
        })
    }
}

impl Removal {
    fn read(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        let [byte] = reader.array()?;
        [Self::Open, Self::Closed, Self::Replaced]
            .into_iter()
            .find(|removal| *removal as u8 == byte)
            .ok_or(Malformed)
    }
}

/// The row that describes a group.
pub(crate) struct Row {
    pub(crate) summary: GroupSummary,
    departed: Vec<Departed>,
    joined_at: u64,
}

impl Row {
    pub(crate) fn parse(row: &[u8]) -> Result<Self, DatabaseError> {
        Self::read(&mut Reader::new(row))
            .map_err(|Malformed| DatabaseError::Damaged("a group's row is cut short".into()))
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        let mut summary = GroupSummary::read(reader)?;
        let mut departed = reader.list(Departed::read)?;
        if reader.is_at_end() {
            // The row is of a release in which the creator alone changed groups.
            return Ok(Self { summary, departed, joined_at: 0 });
        }
        summary.admins = reader.list(|reader| reader.array().map(IdentityKey::new))?;
        let joined_at = reader.number()?;
        // A row of an earlier release ends here.
        if !reader.is_at_end() {
            for departed in &mut departed {
                departed.removal = Removal::read(reader)?;
            }
        }
        Ok(Self { summary, departed, joined_at })
    }
}

/// Returns the settings of groups that are joined.
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
