//! A member whose MLS is mls-rs, on the bare client of these tests. This member and our client
//! share no code except the messages of the protocol and the form of usernames.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashSet},
    time::Duration,
};

use bytes::Bytes;
use ed25519_dalek::SigningKey;
use mls_rs::{
    CipherSuite, ExtensionList, Group, MlsMessage, WireFormat,
    client_builder::{
        BaseConfig, ClientBuilder, IntoConfigOutput, WithCryptoProvider, WithIdentityProvider,
        WithMlsRules,
    },
    crypto::{SignaturePublicKey, SignatureSecretKey},
    extension::{ExtensionType, recommended::LastResortKeyPackageExt},
    group::{CommitOutput, ReceivedMessage},
    identity::{SigningIdentity, basic::BasicCredential},
};
use mls_rs_crypto_rustcrypto::RustCryptoProvider;
use qpq_ports::{Clock as _, SystemClock};
use sha2::{Digest as _, Sha256};

use super::{
    lines::{self, Leaves},
    profile::{
        Content, Control, GroupProfile, Key, PROFILE, Text, authenticated_data, direct_channel,
        group_id,
    },
    rules::{Accounts, Rules, accounts, leaves},
    session::{Device, Offer, Offered, Session},
};
use crate::server::Running;

const SUITE: CipherSuite = CipherSuite::CURVE25519_AES128;
const LIFETIME: Duration = Duration::from_secs(84 * 24 * 3600);

type Config = WithMlsRules<
    Rules,
    WithIdentityProvider<Accounts, WithCryptoProvider<RustCryptoProvider, BaseConfig>>,
>;
type Mls = mls_rs::Client<IntoConfigOutput<Config>>;
type MlsGroup = Group<IntoConfigOutput<Config>>;

/// The id of a group.
pub(crate) type GroupId = [u8; 32];

/// A member on mls-rs: an account without devices, or a device.
pub(crate) struct Member {
    session: Session,
    device: Option<Device>,
    rules: Rules,
    mls: Mls,
    groups: BTreeMap<GroupId, MlsGroup>,
    /// The server's epoch of each channel, as far as it is known.
    epochs: BTreeMap<Vec<u8>, u64>,
    /// Messages that this member has sent; its inbox receives them too if the account has other
    /// devices.
    sent: HashSet<Bytes>,
    /// The lines of messages that were read while a commit was repeated.
    unseen: Vec<String>,
    /// The digest of the last message that was read.
    last_read: [u8; 32],
}

/// A change of a group. A change of nothing renews the member's own keys.
#[derive(Clone, Debug, Default)]
pub(crate) struct Change {
    /// Usernames to add, with all of their devices.
    pub(crate) add: Vec<&'static str>,
    /// Usernames to remove, with all of their devices.
    pub(crate) remove: Vec<&'static str>,
    pub(crate) name: Option<&'static str>,
    /// Usernames of the admins.
    pub(crate) admins: Option<Vec<&'static str>>,
}

impl Member {
    /// Registers an account without devices, and publishes KeyPackages.
    pub(crate) async fn register(running: &Running, username: &str) -> Self {
        Self::start(Session::register(running, username).await, None, Rules::Kept).await
    }

    /// Registers a member that commits what it may not. See [`Member::register`].
    pub(crate) async fn register_unruly(running: &Running, username: &str) -> Self {
        Self::start(Session::register(running, username).await, None, Rules::Broken).await
    }

    /// Registers an account with a first device.
    pub(crate) async fn register_with_device(running: &Running, username: &str) -> Self {
        let session = Session::register(running, username).await;
        let device = session.register_device("first").await;
        Self::start(session, Some(device), Rules::Kept).await
    }

    /// Creates another device of the same account.
    pub(crate) async fn link(&self, running: &Running, device: &str) -> Self {
        let session = self.session.another(running).await;
        let device = session.register_device(device).await;
        Self::start(session, Some(device), Rules::Kept).await
    }

    async fn start(session: Session, device: Option<Device>, rules: Rules) -> Self {
        let mls = match &device {
            Some(device) => mls_client(&device.key, device.credential.to_bytes(), rules),
            None => mls_client(session.key(), session.username.clone().into_bytes(), rules),
        };
        let member = Self {
            session,
            device,
            rules,
            mls,
            groups: BTreeMap::new(),
            epochs: BTreeMap::new(),
            sent: HashSet::new(),
            unseen: Vec::new(),
            last_read: [0; 32],
        };
        let once = (0..4).map(|_| member.package(ExtensionList::new())).collect();
        let mut extensions = ExtensionList::new();
        extensions.set_from(LastResortKeyPackageExt).expect("it is empty");
        member.session.upload_packages(once, member.package(extensions)).await;
        member
    }

    fn package(&self, extensions: ExtensionList) -> Bytes {
        let package = self.mls.generate_key_package_message(extensions, <_>::default(), None);
        encode(&package.expect("a KeyPackage"))
    }

    pub(crate) fn account(&self) -> Key {
        self.session.account
    }

    /// Revokes another device of this account.
    pub(crate) async fn revoke(&self, other: &Self) {
        let device = other.device.as_ref().expect("a device");
        self.session.revoke_device(device.id).await;
    }

    /// Reads the inbox to its end, and returns a line for each message that is for this member.
    pub(crate) async fn read(&mut self) -> Vec<String> {
        let mut lines = std::mem::take(&mut self.unseen);
        loop {
            let messages = self.session.next_messages().await;
            if messages.is_empty() {
                return lines;
            }
            lines.extend(messages.iter().filter_map(|message| self.process(message)));
        }
    }

    fn process(&mut self, bytes: &Bytes) -> Option<String> {
        if self.sent.contains(bytes) {
            return None;
        }
        self.last_read = Sha256::digest(bytes).into();
        let message = MlsMessage::from_bytes(bytes).expect("an MLSMessage");
        if message.wire_format() == WireFormat::Welcome {
            return self.join(&message);
        }
        let id: GroupId = message.group_id().expect("a group").try_into().expect("32 bytes");
        // A group that this device is not in, or not yet.
        let group = self.groups.get_mut(&id)?;
        let before = leaves_of(group);
        let line = match group.process_incoming_message(message) {
            Ok(ReceivedMessage::ApplicationMessage(message)) => {
                let from = &before[&message.sender_index];
                let claim = authenticated_data(&from.account);
                assert_eq!(message.authenticated_data, claim, "the message names its sender");
                let content = Content::read(message.data()).expect("content");
                lines::of_content(&from.username, content)
            }
            Ok(ReceivedMessage::Commit(commit)) => lines::of_commit(&before, &commit),
            Ok(other) => panic!("unexpected: {other:?}"),
            Err(error) => format!("refused: {error}"),
        };
        group.write_to_storage().expect("memory");
        Some(line)
    }

    /// Joins the group of a Welcome; `None` if it is for another device of the account.
    fn join(&mut self, welcome: &MlsMessage) -> Option<String> {
        let (mut group, info) = match self.mls.join_group(None, welcome, None) {
            Ok(joined) => joined,
            Err(mls_rs::error::MlsError::WelcomeKeyPackageNotFound) => return None,
            Err(error) => panic!("a Welcome that cannot be used: {error}"),
        };
        let id: GroupId = group.group_id().try_into().expect("32 bytes");
        let (profile, leaves) = (profile(&group), leaves_of(&group));
        let members = accounts(leaves.values());
        assert!(members.iter().all(|account| profile.admits(account)), "{leaves:?}");
        let by = &leaves[&info.sender];
        let own = leaves.values().filter(|leaf| leaf.account == self.account()).count();
        let may_invite = profile.admins_of(&members).contains(&by.account) || own > 1;
        assert!(may_invite, "{by:?}");
        group.write_to_storage().expect("memory");
        self.groups.insert(id, group);
        Some(match &profile.name {
            Some(name) => format!("joined {name} by {}", by.username),
            None => format!("joined by {}", by.username),
        })
    }

    /// Sends a text to all members of a group.
    pub(crate) async fn send(&mut self, id: GroupId, text: &str) {
        self.send_content(id, &text_of(text, None)).await;
    }

    /// Sends that this member leaves a group.
    pub(crate) async fn send_leaving(&mut self, id: GroupId) {
        let leaving = Control { leaving: true, ..Control::default() };
        self.send_content(id, &Content::Control(leaving)).await;
    }

    /// Sends a text in a form that nobody can decrypt. Returns the digest of the message.
    pub(crate) async fn send_damaged(&mut self, id: GroupId, text: &str) -> [u8; 32] {
        let mut payload = self.encrypt(id, &text_of(text, None)).to_vec();
        *payload.last_mut().expect("a ciphertext") ^= 1;
        let digest = Sha256::digest(&payload).into();
        self.enqueue(id, payload.into()).await;
        digest
    }

    /// Asks a member to repeat the last message that was read, in a new direct group.
    pub(crate) async fn ask_for_last(&mut self, peer: &'static str) {
        let could_not_read = vec![self.last_read.to_vec()];
        let id = self.create_direct(peer).await;
        let question = Control { could_not_read, ..Control::default() };
        self.send_content(id, &Content::Control(question)).await;
    }

    /// Repeats a text in the newest direct group with a member.
    pub(crate) async fn repeat(&mut self, peer: &str, text: &str, digest: [u8; 32]) {
        self.send_content(self.direct(peer), &text_of(text, Some(digest))).await;
    }

    async fn send_content(&mut self, id: GroupId, content: &Content) {
        let payload = self.encrypt(id, content);
        self.enqueue(id, payload).await;
    }

    fn encrypt(&mut self, id: GroupId, content: &Content) -> Bytes {
        let claim = authenticated_data(&self.account());
        let group = self.groups.get_mut(&id).expect("a group");
        let message = group.encrypt_application_message(&content.to_bytes(), claim);
        group.write_to_storage().expect("memory");
        encode(&message.expect("a member encrypts"))
    }

    async fn enqueue(&mut self, id: GroupId, payload: Bytes) {
        self.sent.insert(payload.clone());
        self.session.enqueue(&self.recipients(id), payload, &self.channel(id)).await;
    }

    /// The accounts that get what this member sends: the others, and its own if it has other
    /// devices in the group.
    fn recipients(&self, id: GroupId) -> Vec<Key> {
        let leaves = leaves_of(&self.groups[&id]);
        let own = leaves.values().filter(|leaf| leaf.account == self.account()).count();
        let mut recipients = accounts(leaves.values());
        recipients.retain(|account| *account != self.account() || own > 1);
        recipients
    }

    /// Returns the usernames of a group's leaves, in their order.
    pub(crate) fn members(&self, id: GroupId) -> Vec<String> {
        leaves_of(&self.groups[&id]).into_values().map(|leaf| leaf.username).collect()
    }

    /// Returns the only group of this name.
    pub(crate) fn group(&self, name: &str) -> GroupId {
        let is_it = |group: &MlsGroup| profile(group).name.as_deref() == Some(name);
        let found: Vec<_> = self.groups.iter().filter(|(_, group)| is_it(group)).collect();
        let [(id, _)] = found[..] else { panic!("{} groups of the name {name}", found.len()) };
        *id
    }

    /// Returns the newest group of the direct conversation with a member.
    pub(crate) fn direct(&self, peer: &str) -> GroupId {
        let is_it = |group: &MlsGroup| {
            profile(group).name.is_none()
                && leaves_of(group).values().any(|leaf| leaf.username == peer)
        };
        let found = self.groups.iter().filter(|(_, group)| is_it(group));
        let newest = found.max_by_key(|(id, group)| (profile(group).created_at, Reverse(*id)));
        *newest.expect("a direct conversation").0
    }

    /// Creates a group whose only member this one is.
    pub(crate) async fn create_group(&mut self, name: &str) -> GroupId {
        let channel: [u8; 16] = rand::random();
        self.session.create_group(channel).await;
        self.create(GroupProfile {
            creator: self.account().to_vec(),
            created_at: SystemClock.now().0,
            channel: channel.to_vec(),
            peer: None,
            name: Some(name.into()),
            admins: vec![],
        })
    }

    /// Creates a direct conversation, and adds the other account to it.
    pub(crate) async fn create_direct(&mut self, peer: &'static str) -> GroupId {
        let key = self.session.resolve(peer).await;
        let channel = direct_channel(&self.account(), &key);
        self.session.create_direct(&key, channel).await;
        let id = self.create(GroupProfile {
            creator: self.account().to_vec(),
            created_at: SystemClock.now().0,
            channel: channel.to_vec(),
            peer: Some(key.to_vec()),
            name: None,
            admins: vec![],
        });
        self.change(id, Change { add: vec![peer], ..Change::default() }).await;
        id
    }

    fn create(&mut self, profile: GroupProfile) -> GroupId {
        let id = group_id(&self.account(), rand::random());
        let mut group = self
            .mls
            .create_group_with_id(id.to_vec(), profile.extensions(), <_>::default(), None)
            .expect("a group");
        group.write_to_storage().expect("memory");
        self.groups.insert(id, group);
        id
    }

    /// Changes a group: commits until the server accepts it, and sends the Welcome then.
    pub(crate) async fn change(&mut self, id: GroupId, change: Change) {
        let (mut packages, mut invited) = (Vec::new(), Vec::new());
        for name in &change.add {
            let account = self.session.resolve(name).await;
            packages.extend(self.session.packages_of(&account).await);
            invited.push(account);
        }
        let before = accounts(leaves_of(&self.groups[&id]).values());
        let new: Vec<Key> = invited.iter().filter(|key| !before.contains(key)).copied().collect();
        let GroupProfile { channel, peer, .. } = profile(&self.groups[&id]);
        // The server lets only admins change its record.
        let is_recorded = peer.is_none() && self.rules == Rules::Kept;
        if is_recorded && !new.is_empty() {
            self.session.add_members(&channel, &new).await;
        }
        let welcome = loop {
            let output = self.commit(id, &change, &packages);
            let (offer, welcome) = offer_of(&output, self.recipients(id), &invited);
            self.sent.insert(offer.payload.clone());
            let epoch = self.epochs.get(&channel).copied().unwrap_or_default();
            match self.session.offer(&channel, epoch, &offer).await {
                Offered::Accepted { epoch } => {
                    self.epochs.insert(channel.clone(), epoch);
                    break welcome;
                }
                Offered::Stale { epoch } => {
                    self.groups.get_mut(&id).expect("it is there").clear_pending_commit();
                    self.unseen = self.read().await;
                    self.epochs.insert(channel.clone(), epoch);
                }
            }
        };
        let group = self.groups.get_mut(&id).expect("it is there");
        group.apply_pending_commit().expect("our own commit");
        group.write_to_storage().expect("memory");
        if let Some(welcome) = welcome {
            self.session.enqueue(&invited, welcome, &channel).await;
        }
        let after = accounts(leaves_of(&self.groups[&id]).values());
        for account in before.iter().filter(|key| is_recorded && !after.contains(key)) {
            self.session.remove_member(&channel, account).await;
        }
    }

    fn commit(&mut self, id: GroupId, change: &Change, packages: &[Bytes]) -> CommitOutput {
        let claim = authenticated_data(&self.account());
        let group = self.groups.get_mut(&id).expect("a group");
        let leaves = leaves_of(group);
        let key_of = |name: &&str| {
            let leaf = leaves.values().find(|leaf| leaf.username == **name).expect("a member");
            leaf.account.to_vec()
        };
        let mut next = profile(group);
        next.name = change.name.map(Into::into).or(next.name);
        if let Some(admins) = &change.admins {
            next.admins = admins.iter().map(key_of).collect();
        }
        let is_changed = next != profile(group);
        let mut builder = group.commit_builder().authenticated_data(claim);
        for package in packages {
            let package = MlsMessage::from_bytes(package).expect("an MLSMessage");
            builder = builder.add_member(package).expect("a KeyPackage");
        }
        for (place, leaf) in &leaves {
            if change.remove.contains(&leaf.username.as_str()) {
                builder = builder.remove_member(*place).expect("a leaf");
            }
        }
        if is_changed {
            builder = builder.set_group_context_ext(next.extensions()).expect("extensions");
        }
        builder.build().expect("a commit within the rules")
    }

    /// Joins a group by itself: an external commit, which replaces the leaf that this device has in
    /// the group, if it has one.
    pub(crate) async fn join_by_itself(&mut self, id: GroupId, channel: &[u8]) {
        let claim = authenticated_data(&self.account());
        let (info, epoch) = self.session.group_info(channel).await;
        let info = MlsMessage::from_bytes(&info).expect("a GroupInfo");
        let builder = self.mls.external_commit_builder().expect("a client that signs");
        let mut builder = builder.with_authenticated_data(claim);
        if let Some(earlier) = self.groups.get(&id) {
            builder = builder.with_removal(earlier.current_member_index());
        }
        let (mut group, commit) = builder.build(info).expect("a GroupInfo with the tree");
        group.write_to_storage().expect("memory");
        assert_eq!(group.group_id(), id);
        let info = group.group_info_message_allowing_ext_commit(true).expect("a GroupInfo");
        self.groups.insert(id, group);
        let offer = Offer {
            recipients: self.recipients(id),
            payload: encode(&commit),
            group_info: encode(&info),
        };
        self.sent.insert(offer.payload.clone());
        match self.session.offer(channel, epoch, &offer).await {
            Offered::Accepted { epoch } => self.epochs.insert(channel.to_vec(), epoch),
            Offered::Stale { epoch } => panic!("another commit was first: {epoch}"),
        };
    }

    /// Returns the channel of a group.
    pub(crate) fn channel(&self, id: GroupId) -> Vec<u8> {
        profile(&self.groups[&id]).channel
    }
}

/// Returns a commit as it is offered to the server, and the Welcome that follows once it is
/// accepted. The members get the commit; where the author is alone, the Welcome takes its place.
fn offer_of(output: &CommitOutput, members: Vec<Key>, invited: &[Key]) -> (Offer, Option<Bytes>) {
    let group_info = encode(output.external_commit_group_info.as_ref().expect("a GroupInfo"));
    let welcome = output.welcome_messages.first().map(encode);
    let (recipients, payload, welcome) = match welcome {
        Some(welcome) if members.is_empty() => (invited.to_vec(), welcome, None),
        welcome => (members, encode(&output.commit_message), welcome),
    };
    (Offer { recipients, payload, group_info }, welcome)
}

/// Creates an mls-rs client that signs with this key.
fn mls_client(key: &SigningKey, credential: Vec<u8>, rules: Rules) -> Mls {
    let public = SignaturePublicKey::new_slice(key.verifying_key().as_bytes());
    let leaf = SigningIdentity::new(BasicCredential::new(credential).into_credential(), public);
    let secret = SignatureSecretKey::new_slice(&key.to_keypair_bytes());
    ClientBuilder::new()
        .crypto_provider(RustCryptoProvider::with_enabled_cipher_suites(vec![SUITE]))
        .identity_provider(Accounts)
        .mls_rules(rules)
        .extension_types([ExtensionType::LAST_RESORT_KEY_PACKAGE, PROFILE])
        .key_package_lifetime(LIFETIME)
        .signing_identity(leaf, secret, SUITE)
        .build()
}

fn profile(group: &MlsGroup) -> GroupProfile {
    let context = group.context();
    GroupProfile::read(&context.group_id, &context.extensions).expect("a group of the profile")
}

fn leaves_of(group: &MlsGroup) -> Leaves {
    leaves(&group.roster()).expect("leaves of the profile").into_iter().collect()
}

fn text_of(text: &str, repeats: Option<[u8; 32]>) -> Content {
    Content::Text(Text {
        text: text.into(),
        sent_at: SystemClock.now().0,
        id: rand::random::<[u8; 16]>().to_vec(),
        repeats: repeats.map(|digest| digest.to_vec()),
    })
}

fn encode(message: &MlsMessage) -> Bytes {
    message.to_bytes().expect("it is small").into()
}
