//! The operations of a random history, and their execution on the store. Operations and answers are
//! sent to a child process as text, so the model returns the same strings.

use std::{collections::HashMap, time::Duration};

use qpq_domain::{
    AccountId, ChannelId, DeliveryLimits, DeviceId, DeviceKey, GroupId, IdentityKey, InviteHash,
    KeyPackageLimits, MessageId, Seq, StoreLimits, TokenHash, UnixMillis, Username,
};
use qpq_ports::{
    Ack, Admission, AtRestKeyId, Batch, BundleFetch, CertifiedKey, Commit, Deletion, DevicePackage,
    Enqueued, GroupMessage, GroupRecipients, GroupSent, HybridKey, Invite, Lease, NewAccount,
    NewBundle, NewDevice, NewGroup, NewInvite, NewKeyPackage, NewMembers, NewMessage, NewSession,
    PackageOwner, Page, PageLimit, PasswordChange, PasswordChanged, ReadError, ReadQuery, Reader,
    Receipt, Registration, Session, Stores, Upload, UploadMode, View,
    conformance::deletion::run_job,
};
use serde::{Deserialize, Serialize};

/// The instant at which histories begin.
pub(crate) const START: UnixMillis = UnixMillis(1_800_000_000_000);

/// The unit in which time advances.
pub(crate) const MINUTE: Duration = Duration::from_secs(60);

/// Returns small limits, which random histories reach.
pub(crate) fn limits() -> StoreLimits {
    StoreLimits {
        delivery: DeliveryLimits {
            max_messages: 6,
            max_bytes: 2_000,
            sender_share: 3,
            recent_ids: 15 * MINUTE,
            device_absence: 5 * MINUTE,
            ..DeliveryLimits::default()
        },
        key_packages: KeyPackageLimits { max_count: 4, ..KeyPackageLimits::default() },
        ..StoreLimits::default()
    }
}

/// The number of a device key that is the identity key of account 1.
pub(crate) const OF_AN_ACCOUNT: u8 = 5;

/// One operation. Accounts, channels, ids, packages, devices and sessions are numbers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Op {
    Register {
        name: u8,
        key: u8,
        record: u8,
    },
    Find {
        key: u8,
    },
    CreateInvite {
        n: u8,
        uses: u8,
        minutes: u8,
    },
    RegisterInvited {
        name: u8,
        key: u8,
        invite: u8,
    },
    RevokeInvite {
        n: u8,
    },
    ListInvites,
    /// Deletes the account [`DELETED`].
    Delete,
    /// Runs the erasures that are due.
    Erase,
    Enqueue(Vec<Message>),
    /// Creates the group of [`MEMBERS`].
    CreateGroup,
    SendToGroup(GroupSend),
    Lease {
        inbox: u8,
        device: Option<u8>,
        view: Option<u8>,
        messages: u32,
        bytes: usize,
        slot: u8,
    },
    Complete {
        slot: u8,
    },
    Release {
        slot: u8,
    },
    Peek {
        inbox: u8,
        device: Option<u8>,
        view: Option<u8>,
        after: u64,
        messages: u32,
    },
    Ack {
        inbox: u8,
        device: Option<u8>,
        view: Option<u8>,
        up_to: Option<u64>,
        seqs: Vec<u64>,
    },
    Upload {
        owner: u8,
        device: Option<u8>,
        packages: Vec<Package>,
    },
    Take {
        target: u8,
    },
    TakeOfDevices {
        target: u8,
    },
    PutHybrid {
        owner: u8,
        key: u8,
    },
    GetHybrid {
        targets: Vec<u8>,
    },
    CreateSession {
        token: u8,
        owner: u8,
        minutes: u8,
    },
    FindSession {
        token: u8,
    },
    Touch {
        token: u8,
        minutes: u8,
    },
    Revoke {
        token: u8,
    },
    RevokeAll {
        owner: u8,
    },
    ChangePassword {
        owner: u8,
        token: u8,
        record: u8,
    },
    RegisterDevice {
        owner: u8,
        device: u8,
        name: u8,
        key: Option<u8>,
        token: u8,
    },
    RevokeDevice {
        owner: u8,
        device: u8,
    },
    ConfirmPosition {
        owner: u8,
        device: u8,
    },
    ListDevices {
        owner: u8,
    },
    Block {
        owner: u8,
        blocked: u8,
    },
    Unblock {
        owner: u8,
        blocked: u8,
    },
    PutBundle {
        owner: u8,
        replaces: u64,
        n: u8,
    },
    FetchBundle {
        owner: u8,
    },
    RemoveBundle {
        owner: u8,
    },
    Sweep,
}

/// The number of fetches of a recovery bundle within a day.
pub(crate) const FETCHES: u32 = 2;

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Message {
    pub(crate) from: u8,
    pub(crate) to: u8,
    pub(crate) channel: u8,
    pub(crate) id: Option<u8>,
    pub(crate) size: usize,
    pub(crate) minutes: u8,
}

/// The only account that is deleted: one that is in no group.
pub(crate) const DELETED: u8 = 4;

/// The number of the group, and of its channel.
pub(crate) const GROUP: u8 = 3;

/// The members of the group. The first one creates it.
pub(crate) const MEMBERS: [u8; 6] = [1, 2, 3, 11, 12, 13];

/// A message to the group: to listed accounts, or to all other members.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct GroupSend {
    pub(crate) from: u8,
    pub(crate) device: Option<u8>,
    pub(crate) to: Option<Vec<u8>>,
    pub(crate) id: Option<u8>,
    pub(crate) size: usize,
    pub(crate) minutes: u8,
    /// For a commit: the number of epochs by which its expected epoch is ahead of the present one.
    pub(crate) ahead: Option<u64>,
}

/// The result of a message to the group. The outcomes are those of listed accounts.
#[derive(Clone, Debug)]
pub(crate) struct GroupResult {
    pub(crate) epoch: u64,
    pub(crate) recipients: usize,
    pub(crate) skipped: usize,
    pub(crate) outcomes: Vec<String>,
}

impl GroupResult {
    pub(crate) fn text(&self, is_repeat: bool) -> String {
        let Self { epoch, recipients, skipped, outcomes } = self;
        let outcomes = outcomes.join(", ");
        format!("epoch {epoch}, {recipients} - {skipped}, repeat {is_repeat}: {outcomes}")
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Package {
    pub(crate) n: u8,
    pub(crate) device: Option<u8>,
    pub(crate) last_resort: bool,
    pub(crate) minutes: u8,
}

/// An executor of operations on a store. Its only state is the leases, which a crash ends.
pub(crate) struct Machine {
    stores: Stores,
    leases: HashMap<u8, Box<dyn Lease>>,
}

pub(crate) fn key(n: u8) -> IdentityKey {
    IdentityKey::new([n; 32])
}

/// Returns the device key with this number. The last one is an identity key.
fn device_key(n: u8) -> DeviceKey {
    DeviceKey::new(if n == OF_AN_ACCOUNT { [1; 32] } else { [0xd0 + n; 32] })
}

/// Returns the hash of the code of an invite.
fn code(n: u8) -> InviteHash {
    InviteHash::new([n; 32])
}

/// Returns an invite as text.
pub(crate) fn invite_text(uses_left: u32, uses: u32, expires_at: UnixMillis) -> String {
    format!("{uses_left} of {uses} until {}", expires_at.0)
}

fn device_id(n: u8) -> DeviceId {
    DeviceId::new([n; 16])
}

fn read(inbox: u8, device: Option<u8>, view: Option<u8>) -> ReadQuery {
    let view = view.map_or(View::All, |n| View::Channel(channel(n)));
    ReadQuery { reader: Reader { inbox: key(inbox), device: device.map(device_id) }, view }
}

/// Returns the reason of a refused read as text.
fn refusal(error: &ReadError) -> String {
    match error {
        ReadError::DeviceRequired => "device required".to_owned(),
        ReadError::PositionLost => "position lost".to_owned(),
        ReadError::Store(error) => panic!("{error}"),
    }
}

pub(crate) fn channel(n: u8) -> ChannelId {
    if n == 0 { ChannelId::DEFAULT } else { ChannelId::new([n; 16]) }
}

/// Returns a page as text: seq, channel, size and instant of each message, and whether there are
/// more.
pub(crate) fn page_text<'e>(
    envelopes: impl Iterator<Item = (u64, &'e [u8], usize, u64)>,
    more: bool,
) -> String {
    let mut text = String::from("page");
    for (seq, channel, size, at) in envelopes {
        text += &format!(" {seq}/{}/{size}/{at}", channel.first().unwrap_or(&0));
    }
    if more { text + " more" } else { text }
}

pub(crate) fn receipt_text(what: &str, seq: u64, channel: &[u8], hash: u8, at: u64) -> String {
    format!("{what} {seq}/{}/{hash}/{at}", channel.first().unwrap_or(&0))
}

fn page(page: &Page) -> String {
    for envelope in &page.envelopes {
        let filling = u8::try_from(envelope.payload.len() % 251).expect("small");
        assert!(
            envelope.payload.iter().all(|byte| *byte == filling),
            "payloads are returned unchanged"
        );
    }
    let envelopes = page
        .envelopes
        .iter()
        .map(|e| (e.seq.0, e.channel.as_bytes(), e.payload.len(), e.enqueued_at.0));
    page_text(envelopes, page.more)
}

impl Machine {
    pub(crate) fn new(stores: Stores) -> Self {
        Self { stores, leases: HashMap::new() }
    }

    /// Executes one operation at `now` and returns the answer.
    pub(crate) async fn apply(&mut self, op: Op, now: UnixMillis) -> String {
        match op {
            Op::CreateInvite { .. } | Op::RevokeInvite { .. } | Op::ListInvites => {
                self.invites(op, now).await
            }
            Op::Register { .. }
            | Op::RegisterInvited { .. }
            | Op::Find { .. }
            | Op::Delete
            | Op::Erase => self.accounts(op, now).await,
            Op::Enqueue(messages) => self.enqueue(messages, now).await,
            Op::CreateGroup => self.create_group(now).await,
            Op::SendToGroup(send) => self.send_to_group(send, now).await,
            Op::Lease { .. }
            | Op::Complete { .. }
            | Op::Release { .. }
            | Op::Peek { .. }
            | Op::Ack { .. } => self.inboxes(op, now).await,
            Op::Upload { .. }
            | Op::Take { .. }
            | Op::TakeOfDevices { .. }
            | Op::PutHybrid { .. }
            | Op::GetHybrid { .. } => self.keys(op, now).await,
            Op::Sweep => {
                while self.stores.maintenance.sweep(now).await.expect("sweep").rows > 0 {}
                "swept".to_owned()
            }
            Op::RegisterDevice { .. }
            | Op::RevokeDevice { .. }
            | Op::ConfirmPosition { .. }
            | Op::ListDevices { .. } => self.devices(op, now).await,
            Op::Block { owner, .. } | Op::Unblock { owner, .. } => {
                match self.account(owner).await {
                    Some(account) => self.blocks(op, account, now).await,
                    None => "no account".to_owned(),
                }
            }
            Op::PutBundle { .. } | Op::FetchBundle { .. } | Op::RemoveBundle { .. } => {
                self.bundles(op, now).await
            }
            _ => self.sessions(op, now).await,
        }
    }

    async fn account(&self, n: u8) -> Option<AccountId> {
        self.stores.accounts.by_identity(&key(n)).await.expect("read").map(|account| account.id)
    }

    async fn blocks(&self, op: Op, account: AccountId, now: UnixMillis) -> String {
        let blocks = &self.stores.blocks;
        match op {
            Op::Block { blocked, .. } => {
                format!("{:?}", blocks.block(account, key(blocked), now).await.expect("block"))
            }
            Op::Unblock { blocked, .. } => {
                format!("{:?}", blocks.unblock(account, key(blocked)).await.expect("unblock"))
            }
            other => unreachable!("{other:?}"),
        }
    }

    async fn accounts(&self, op: Op, now: UnixMillis) -> String {
        match op {
            Op::Register { name, key: k, record } => {
                self.register(name, k, record, Admission::Open, now).await
            }
            Op::RegisterInvited { name, key: k, invite } => {
                self.register(name, k, 1, Admission::Invite(code(invite)), now).await
            }
            Op::Find { key: k } => {
                match self.stores.accounts.by_identity(&key(k)).await.expect("read") {
                    None => "no account".to_owned(),
                    Some(account) => {
                        let credentials = self
                            .stores
                            .accounts
                            .credentials(&account.username)
                            .await
                            .expect("read");
                        let record = credentials.expect("the account exists").opaque_record[0];
                        format!("{} {record} {}", account.username, account.created_at.0)
                    }
                }
            }
            Op::Delete => {
                let Some(account) = self.account(DELETED).await else {
                    return "no account".to_owned();
                };
                match self.stores.accounts.delete(account, now).await.expect("delete") {
                    Deletion::Deleted(_) => "deleted".to_owned(),
                    Deletion::NotFound => "not found".to_owned(),
                }
            }
            Op::Erase => {
                while run_job(&self.stores, now, |_| {}).await {}
                "erased".to_owned()
            }
            other => unreachable!("{other:?}"),
        }
    }

    async fn register(
        &self,
        name: u8,
        k: u8,
        record: u8,
        admission: Admission,
        now: UnixMillis,
    ) -> String {
        let username = Username::parse(&format!("user{name}")).expect("a username");
        let opaque_record = vec![record; 192];
        let new = NewAccount { username, identity: key(k), opaque_record, admission, now };
        match self.stores.accounts.register(new).await.expect("register") {
            Registration::Registered(id) => {
                assert_eq!(self.account(k).await, Some(id));
                "registered".to_owned()
            }
            Registration::Repeated(id) => {
                assert_eq!(self.account(k).await, Some(id));
                "repeated".to_owned()
            }
            other => format!("{other:?}"),
        }
    }

    async fn invites(&self, op: Op, now: UnixMillis) -> String {
        let invites = &self.stores.invites;
        match op {
            Op::CreateInvite { n, uses, minutes } => {
                let invite = NewInvite {
                    code: code(n),
                    uses: uses.into(),
                    lifetime: MINUTE * minutes.into(),
                    username: None,
                    note: String::new(),
                    now,
                };
                let created = invites.create(invite).await.expect("create");
                invite_text(created.uses_left, created.uses, created.expires_at)
            }
            Op::RevokeInvite { n } => {
                format!("{:?}", invites.revoke(code(n).id()).await.expect("revoke"))
            }
            Op::ListInvites => {
                let mut listed = invites.list(u32::MAX).await.expect("list");
                listed.sort_by_key(|invite| invite.id.to_string());
                let text =
                    |invite: &Invite| invite_text(invite.uses_left, invite.uses, invite.expires_at);
                listed.iter().map(text).collect::<Vec<_>>().join(", ")
            }
            other => unreachable!("{other:?}"),
        }
    }

    async fn enqueue(&self, messages: Vec<Message>, now: UnixMillis) -> String {
        let messages = messages.into_iter().map(|message| enqueue(&message, now)).collect();
        let outcomes = self.stores.inboxes.enqueue(Batch::new(messages)).await.expect("enqueue");
        outcomes.into_iter().map(outcome_text).collect::<Vec<_>>().join(", ")
    }

    async fn create_group(&self, now: UnixMillis) -> String {
        let [creator, members @ ..] = MEMBERS;
        let group = NewGroup {
            id: GroupId::new([GROUP; 16]),
            creator: self.account(creator).await.expect("registered"),
            members: NewMembers::Listed(members.map(key).to_vec()),
            name: String::new(),
            description: String::new(),
            now,
        };
        let created = self.stores.groups.create(group).await.expect("create");
        assert!(created.is_ok(), "{created:?}");
        "created".to_owned()
    }

    async fn send_to_group(&self, send: GroupSend, now: UnixMillis) -> String {
        let Some(sender) = self.account(send.from).await else { return "no account".to_owned() };
        let (groups, id) = (&self.stores.groups, GroupId::new([GROUP; 16]));
        let info = match groups.info(id, sender).await.expect("info") {
            Ok(info) => info,
            Err(refusal) => return format!("{refusal:?}"),
        };
        let GroupSend { from, device, to, id: message_id, size, minutes, ahead } = send;
        let one = Message { from, to: from, channel: GROUP, id: message_id, size, minutes };
        let one = enqueue(&one, now);
        let expected = |ahead| Commit { expected_epoch: info.epoch + ahead, group_info: None };
        let message = GroupMessage {
            group: id,
            sender,
            sender_key: one.sender,
            sender_device: device.map(device_id),
            recipients: to.map_or(GroupRecipients::Others, |listed| {
                GroupRecipients::Listed(listed.into_iter().map(key).collect())
            }),
            payload: one.payload,
            payload_sha256: one.payload_sha256,
            message_id: one.message_id,
            ttl: one.ttl,
            now,
            commit: ahead.map(expected),
        };
        match groups.send(message).await.expect("send") {
            Ok(GroupSent { epoch, recipients, outcomes, skipped, is_repeat }) => {
                let outcomes = outcomes.into_iter().map(outcome_text).collect();
                let [recipients, skipped] = [recipients, skipped].map(|n| n as usize);
                GroupResult { epoch, recipients, skipped, outcomes }.text(is_repeat)
            }
            Err(refusal) => format!("{refusal:?}"),
        }
    }

    async fn inboxes(&mut self, op: Op, now: UnixMillis) -> String {
        let inboxes = &self.stores.inboxes;
        match op {
            Op::Lease { inbox, device, view, messages, bytes, slot } => {
                // Releases the previous lease of the slot first.
                self.leases.remove(&slot);
                let limit = PageLimit { messages, bytes };
                match inboxes.lease(read(inbox, device, view), limit, now).await {
                    Ok(lease) => {
                        let text = page(lease.page());
                        self.leases.insert(slot, lease);
                        text
                    }
                    Err(error) => refusal(&error),
                }
            }
            Op::Complete { slot } => match self.leases.remove(&slot) {
                None => "no lease".to_owned(),
                Some(lease) => {
                    lease.complete(now).await.expect("complete");
                    "completed".to_owned()
                }
            },
            Op::Release { slot } => {
                self.leases.remove(&slot).map_or("no lease", |_| "released").to_owned()
            }
            Op::Peek { inbox, device, view, after, messages } => {
                let limit = PageLimit { messages, bytes: usize::MAX };
                let peeked = inboxes.peek(read(inbox, device, view), Seq(after), limit, now).await;
                peeked.map_or_else(|error| refusal(&error), |peeked| page(&peeked))
            }
            Op::Ack { inbox, device, view, up_to, seqs } => {
                let seqs = seqs.into_iter().map(Seq).collect();
                let ack = Ack { up_to: up_to.map(Seq), seqs, store_id: None };
                let acked = inboxes.ack(read(inbox, device, view), ack, now).await;
                acked.map_or_else(|error| refusal(&error), |count| format!("acked {count}"))
            }
            other => unreachable!("{other:?}"),
        }
    }

    async fn keys(&self, op: Op, now: UnixMillis) -> String {
        let keys = &self.stores.key_packages;
        match op {
            Op::Upload { owner, device, packages } => {
                let Some(account) = self.account(owner).await else {
                    return "no account".to_owned();
                };
                let packages = packages.iter().map(|package| new_package(package, now)).collect();
                let owner = PackageOwner { account, device: device.map(device_id) };
                match keys.upload(owner, packages, UploadMode::Add, now).await.expect("upload") {
                    Upload::Stored(stock) => {
                        assert_eq!(keys.stock(owner, now).await.expect("stock"), stock);
                        format!("stored {} {}", stock.available, stock.has_last_resort)
                    }
                    other => format!("{other:?}"),
                }
            }
            Op::Take { target } => match keys.take(&key(target), now).await.expect("take") {
                None => "none".to_owned(),
                Some(taken) => format!("took {} {}", taken.bytes[0], taken.last_resort),
            },
            Op::TakeOfDevices { target } => {
                let taken = keys.take_of_devices(&key(target), now).await.expect("take");
                let packages = taken.iter().map(|DevicePackage { device, package }| {
                    let package = package.as_ref().map(|taken| (taken.bytes[0], taken.last_resort));
                    (device.as_bytes()[0], package)
                });
                format!("{:?}", packages.collect::<Vec<_>>())
            }
            Op::PutHybrid { owner, key } => {
                let Some(account) = self.account(owner).await else {
                    return "no account".to_owned();
                };
                let key = HybridKey { key: vec![key; 1216], signature: Some([key; 64]) };
                self.stores.hybrid_keys.put(account, key).await.expect("put");
                "put".to_owned()
            }
            Op::GetHybrid { targets } => {
                let targets: Vec<_> = targets.into_iter().map(key).collect();
                let found = self.stores.hybrid_keys.get(&targets).await.expect("get");
                let found: Vec<_> = found
                    .into_iter()
                    .map(|key| key.and_then(|key| Some(key.signature?[0])))
                    .collect();
                format!("{found:?}")
            }
            other => unreachable!("{other:?}"),
        }
    }

    async fn devices(&self, op: Op, now: UnixMillis) -> String {
        let (Op::RegisterDevice { owner, .. }
        | Op::RevokeDevice { owner, .. }
        | Op::ConfirmPosition { owner, .. }
        | Op::ListDevices { owner }) = op
        else {
            unreachable!("{op:?}")
        };
        let Some(account) = self.account(owner).await else { return "no account".to_owned() };
        let devices = &self.stores.devices;
        match op {
            Op::RegisterDevice { device, name, key, token: n, .. } => {
                let certified = |n| CertifiedKey { key: device_key(n), proof: [n; 64] };
                let new = NewDevice {
                    account,
                    device: device_id(device),
                    name: name.to_string(),
                    key: key.map(certified),
                    session: token(n),
                    now,
                };
                format!("{:?}", devices.register(new).await.expect("register"))
            }
            Op::RevokeDevice { device, .. } => {
                let revoked = devices.revoke(account, device_id(device), now).await;
                format!("{:?}", revoked.expect("revoke"))
            }
            Op::ConfirmPosition { device, .. } => {
                devices.confirm_position(account, device_id(device)).await.expect("confirm");
                "confirmed".to_owned()
            }
            Op::ListDevices { .. } => {
                let listed = devices.list(account).await.expect("list");
                let texts = listed.into_iter().map(|device| {
                    let key = device.key.map(|certified| certified.proof[0]);
                    let instants = [device.registered_at, device.last_seen_at];
                    device_text(device.id.as_bytes()[0], &device.name, key, instants)
                });
                texts.collect::<Vec<_>>().join(", ")
            }
            other => unreachable!("{other:?}"),
        }
    }

    async fn bundles(&self, op: Op, now: UnixMillis) -> String {
        let (Op::PutBundle { owner, .. } | Op::FetchBundle { owner } | Op::RemoveBundle { owner }) =
            op
        else {
            unreachable!("{op:?}")
        };
        let Some(account) = self.account(owner).await else { return "no account".to_owned() };
        let bundles = &self.stores.recovery_bundles;
        match op {
            Op::PutBundle { replaces, n, .. } => {
                let (sealed, key) = (vec![n; 100], AtRestKeyId([n; 8]));
                let bundle = NewBundle { account, replaces, sealed, key, now };
                format!("{:?}", bundles.put(bundle).await.expect("put"))
            }
            Op::FetchBundle { .. } => {
                match bundles.fetch(account, now, FETCHES).await.expect("fetch") {
                    BundleFetch::Found(found) => {
                        bundle_text(found.version, found.sealed[0], found.stored_at)
                    }
                    other => format!("{other:?}"),
                }
            }
            _ => format!("removed {}", bundles.remove(account).await.expect("remove")),
        }
    }

    async fn sessions(&self, op: Op, now: UnixMillis) -> String {
        let sessions = &self.stores.sessions;
        let after = |minutes: u8| now.plus(MINUTE * minutes.into());
        match op {
            Op::CreateSession { token: n, owner, minutes } => {
                let Some(account) = self.account(owner).await else {
                    return "no account".to_owned();
                };
                let session = Session {
                    account,
                    identity: key(owner),
                    device: (n % 2 == 0).then_some(DeviceId::new([n; 16])),
                    authenticated_at: now,
                    last_used_at: now,
                    expires_at: after(minutes),
                };
                sessions.create(NewSession { token: token(n), session }).await.expect("create");
                "opened".to_owned()
            }
            Op::FindSession { token: n } => match sessions.find(&token(n)).await.expect("find") {
                None => "none".to_owned(),
                Some(found) => {
                    assert_eq!(
                        self.account(found.identity.as_bytes()[0]).await,
                        Some(found.account)
                    );
                    let device = found.device.map(|device| device.as_bytes()[0]);
                    session_text(
                        found.identity.as_bytes()[0],
                        device,
                        [found.authenticated_at, found.last_used_at, found.expires_at],
                    )
                }
            },
            Op::Touch { token: n, minutes } => {
                sessions.touch(&token(n), now, after(minutes)).await.expect("touch");
                "touched".to_owned()
            }
            Op::Revoke { token: n } => {
                format!("revoked {}", sessions.revoke(&token(n)).await.expect("revoke"))
            }
            Op::RevokeAll { owner } => {
                let Some(account) = self.account(owner).await else {
                    return "no account".to_owned();
                };
                format!("revoked {}", sessions.revoke_all(account).await.expect("revoke"))
            }
            Op::ChangePassword { owner, token: n, record } => {
                let Some(account) = self.account(owner).await else {
                    return "no account".to_owned();
                };
                let change =
                    PasswordChange { account, session: token(n), opaque_record: vec![record; 192] };
                match self.stores.accounts.change_password(change).await.expect("change") {
                    PasswordChanged::Changed { ended_sessions } => {
                        format!("changed, revoked {ended_sessions}")
                    }
                    PasswordChanged::SessionEnded => "session ended".to_owned(),
                }
            }
            other => unreachable!("{other:?}"),
        }
    }
}

fn outcome_text(outcome: Enqueued) -> String {
    let receipt = |what, r: Receipt| {
        receipt_text(what, r.seq.0, r.channel.as_bytes(), r.payload_sha256[0], r.enqueued_at.0)
    };
    match outcome {
        Enqueued::Accepted(r) => receipt("accepted", r),
        Enqueued::Duplicate(r) => receipt("duplicate", r),
        other => format!("{other:?}"),
    }
}

pub(crate) fn session_text(owner: u8, device: Option<u8>, instants: [UnixMillis; 3]) -> String {
    format!("session of {owner} {device:?} {:?}", instants.map(|at| at.0))
}

pub(crate) fn bundle_text(version: u64, n: u8, stored_at: UnixMillis) -> String {
    format!("bundle {version} {n} {}", stored_at.0)
}

pub(crate) fn device_text(
    device: u8,
    name: &str,
    key: Option<u8>,
    instants: [UnixMillis; 2],
) -> String {
    format!("device {device} {name} {key:?} {:?}", instants.map(|at| at.0))
}

fn token(n: u8) -> TokenHash {
    TokenHash::new([n; 32])
}

fn enqueue(message: &Message, now: UnixMillis) -> NewMessage {
    let filling = u8::try_from(message.size % 251).expect("small");
    NewMessage {
        sender: key(message.from),
        recipient: key(message.to),
        channel: channel(message.channel),
        payload: vec![filling; message.size].into(),
        payload_sha256: [filling; 32],
        message_id: message.id.map(|n| MessageId::new([n; 16])),
        now,
        ttl: MINUTE * message.minutes.into(),
    }
}

fn new_package(package: &Package, now: UnixMillis) -> NewKeyPackage {
    NewKeyPackage {
        fingerprint: [package.n; 32],
        bytes: vec![package.n; 100],
        device: package.device.map(device_id),
        last_resort: package.last_resort,
        not_before: now,
        not_after: now.plus(MINUTE * package.minutes.into()),
    }
}
