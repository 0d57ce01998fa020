//! The operations of a random history, and their execution on the store. Operations and answers are
//! sent to a child process as text, so the model returns the same strings.

use std::{collections::HashMap, time::Duration};

use qpq_domain::{
    AccountId, ChannelId, DeliveryLimits, DeviceId, IdentityKey, KeyPackageLimits, MessageId, Seq,
    StoreLimits, TokenHash, UnixMillis, Username,
};
use qpq_ports::{
    Ack, Batch, Enqueued, Lease, NewAccount, NewKeyPackage, NewMessage, NewSession, Page,
    PageLimit, ReadQuery, Reader, Receipt, Registration, Session, Stores, Upload, UploadMode, View,
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
            max_bytes: 400,
            sender_share: 3,
            recent_ids: 15 * MINUTE,
            ..DeliveryLimits::default()
        },
        key_packages: KeyPackageLimits { max_count: 4, ..KeyPackageLimits::default() },
    }
}

/// One operation. Accounts, channels, ids, packages and sessions are numbers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Op {
    Register { name: u8, key: u8, record: u8 },
    Find { key: u8 },
    Enqueue(Vec<Message>),
    Lease { inbox: u8, view: Option<u8>, messages: u32, bytes: usize, slot: u8 },
    Complete { slot: u8 },
    Release { slot: u8 },
    Peek { inbox: u8, view: Option<u8>, after: u64, messages: u32 },
    Ack { inbox: u8, view: Option<u8>, up_to: Option<u64>, seqs: Vec<u64> },
    Upload { owner: u8, packages: Vec<Package> },
    Take { target: u8 },
    PutHybrid { owner: u8, key: u8 },
    GetHybrid { targets: Vec<u8> },
    CreateSession { token: u8, owner: u8, minutes: u8 },
    FindSession { token: u8 },
    Touch { token: u8, minutes: u8 },
    Revoke { token: u8 },
    RevokeAll { owner: u8 },
    Sweep,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Message {
    pub(crate) from: u8,
    pub(crate) to: u8,
    pub(crate) channel: u8,
    pub(crate) id: Option<u8>,
    pub(crate) size: usize,
    pub(crate) minutes: u8,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Package {
    pub(crate) n: u8,
    pub(crate) last_resort: bool,
    pub(crate) minutes: u8,
}

/// Executes operations on a store. Its only state are the leases, which a crash ends.
pub(crate) struct Machine {
    stores: Stores,
    leases: HashMap<u8, Box<dyn Lease>>,
}

pub(crate) fn key(n: u8) -> IdentityKey {
    IdentityKey::new([n; 32])
}

fn read(inbox: u8, view: Option<u8>) -> ReadQuery {
    let view = view.map_or(View::All, |n| View::Channel(channel(n)));
    ReadQuery { reader: Reader::single(key(inbox)), view }
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
            Op::Register { .. } | Op::Find { .. } => self.accounts(op, now).await,
            Op::Enqueue(messages) => self.enqueue(messages, now).await,
            Op::Lease { .. }
            | Op::Complete { .. }
            | Op::Release { .. }
            | Op::Peek { .. }
            | Op::Ack { .. } => self.inboxes(op, now).await,
            Op::Upload { .. } | Op::Take { .. } | Op::PutHybrid { .. } | Op::GetHybrid { .. } => {
                self.keys(op, now).await
            }
            Op::Sweep => {
                while self.stores.maintenance.sweep(now).await.expect("sweep") > 0 {}
                "swept".to_owned()
            }
            _ => self.sessions(op, now).await,
        }
    }

    async fn account(&self, n: u8) -> Option<AccountId> {
        self.stores.accounts.by_identity(&key(n)).await.expect("read").map(|account| account.id)
    }

    async fn accounts(&self, op: Op, now: UnixMillis) -> String {
        match op {
            Op::Register { name, key: k, record } => {
                let username = Username::parse(&format!("user{name}")).expect("a username");
                let new = NewAccount {
                    username,
                    identity: key(k),
                    opaque_record: vec![record; 192],
                    now,
                };
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
            other => unreachable!("{other:?}"),
        }
    }

    async fn enqueue(&self, messages: Vec<Message>, now: UnixMillis) -> String {
        let messages = messages.into_iter().map(|message| enqueue(&message, now)).collect();
        let outcomes = self.stores.inboxes.enqueue(Batch::new(messages)).await.expect("enqueue");
        let receipt = |what, r: Receipt| {
            receipt_text(what, r.seq.0, r.channel.as_bytes(), r.payload_sha256[0], r.enqueued_at.0)
        };
        let texts: Vec<_> = outcomes
            .into_iter()
            .map(|outcome| match outcome {
                Enqueued::Accepted(r) => receipt("accepted", r),
                Enqueued::Duplicate(r) => receipt("duplicate", r),
                other => format!("{other:?}"),
            })
            .collect();
        texts.join(", ")
    }

    async fn inboxes(&mut self, op: Op, now: UnixMillis) -> String {
        let inboxes = &self.stores.inboxes;
        match op {
            Op::Lease { inbox, view, messages, bytes, slot } => {
                // Releases the previous lease of the slot first.
                self.leases.remove(&slot);
                let limit = PageLimit { messages, bytes };
                let lease = inboxes.lease(read(inbox, view), limit, now).await.expect("lease");
                let text = page(lease.page());
                self.leases.insert(slot, lease);
                text
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
            Op::Peek { inbox, view, after, messages } => {
                let limit = PageLimit { messages, bytes: usize::MAX };
                page(&inboxes.peek(read(inbox, view), Seq(after), limit, now).await.expect("peek"))
            }
            Op::Ack { inbox, view, up_to, seqs } => {
                let seqs = seqs.into_iter().map(Seq).collect();
                let ack = Ack { up_to: up_to.map(Seq), seqs, store_id: None };
                format!("acked {}", inboxes.ack(read(inbox, view), ack, now).await.expect("ack"))
            }
            other => unreachable!("{other:?}"),
        }
    }

    async fn keys(&self, op: Op, now: UnixMillis) -> String {
        let keys = &self.stores.key_packages;
        match op {
            Op::Upload { owner, packages } => {
                let Some(account) = self.account(owner).await else {
                    return "no account".to_owned();
                };
                let packages = packages.iter().map(|package| new_package(package, now)).collect();
                match keys.upload(account, packages, UploadMode::Add, now).await.expect("upload") {
                    Upload::Stored(stock) => {
                        assert_eq!(keys.stock(account, now).await.expect("stock"), stock);
                        format!("stored {} {}", stock.available, stock.has_last_resort)
                    }
                    other => format!("{other:?}"),
                }
            }
            Op::Take { target } => match keys.take(&key(target), now).await.expect("take") {
                None => "none".to_owned(),
                Some(taken) => format!("took {} {}", taken.bytes[0], taken.last_resort),
            },
            Op::PutHybrid { owner, key } => {
                let Some(account) = self.account(owner).await else {
                    return "no account".to_owned();
                };
                self.stores.hybrid_keys.put(account, vec![key; 1216]).await.expect("put");
                "put".to_owned()
            }
            Op::GetHybrid { targets } => {
                let targets: Vec<_> = targets.into_iter().map(key).collect();
                let found = self.stores.hybrid_keys.get(&targets).await.expect("get");
                let found: Vec<_> = found.into_iter().map(|key| key.map(|key| key[0])).collect();
                format!("{found:?}")
            }
            other => unreachable!("{other:?}"),
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
            other => unreachable!("{other:?}"),
        }
    }
}

pub(crate) fn session_text(owner: u8, device: Option<u8>, instants: [UnixMillis; 3]) -> String {
    format!("session of {owner} {device:?} {:?}", instants.map(|at| at.0))
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
        last_resort: package.last_resort,
        not_before: now,
        not_after: now.plus(MINUTE * package.minutes.into()),
    }
}
