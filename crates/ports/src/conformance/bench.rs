//! A backend under test, with short names for the operations of the rules.

use std::time::Duration;

use qpq_domain::{
    AccountId, BlobLimits, ChannelId, DeliveryLimits, DeviceId, DeviceKey, IdentityKey,
    KeyPackageLimits, MessageId, Seq, StoreLimits, TokenHash, UnixMillis, Username,
};

use super::{Backend, Factory};
use crate::{
    Ack, Admission, Batch, CertifiedKey, ClaimRequest, DeviceRegistration, DeviceRevocation, ERASE,
    Enqueued, Erasing, ErasureId, JobEnd, Lease, NewAccount, NewDevice, NewMessage, Page,
    PageLimit, ReadError, ReadQuery, Reader, Receipt, Registration, Stores, View,
};

/// The instant at which each test begins.
pub(super) const NOW: UnixMillis = UnixMillis(1_800_000_000_000);

pub(super) const MINUTE: Duration = Duration::from_secs(60);

/// A limit that no page reaches.
pub(super) const EVERYTHING: PageLimit = PageLimit { messages: u32::MAX, bytes: usize::MAX };

pub(super) struct Bench {
    pub(super) backend: Box<dyn Backend>,
    pub(super) stores: Stores,
}

/// A registered account.
#[derive(Clone, Copy, Debug)]
pub(super) struct RegisteredAccount {
    pub(super) account: AccountId,
    pub(super) identity: IdentityKey,
}

impl Bench {
    pub(super) async fn new(factory: &dyn Factory) -> Self {
        Self::with(factory, DeliveryLimits::default(), KeyPackageLimits::default()).await
    }

    pub(super) async fn with(
        factory: &dyn Factory,
        delivery: DeliveryLimits,
        caps: KeyPackageLimits,
    ) -> Self {
        let limits = StoreLimits { delivery, key_packages: caps, ..StoreLimits::default() };
        Self::with_limits(factory, limits).await
    }

    pub(super) async fn with_blobs(factory: &dyn Factory, blobs: BlobLimits) -> Self {
        Self::with_limits(factory, StoreLimits { blobs, ..StoreLimits::default() }).await
    }

    async fn with_limits(factory: &dyn Factory, limits: StoreLimits) -> Self {
        let backend = factory.fresh(limits).await;
        let stores = backend.stores();
        Self { backend, stores }
    }

    pub(super) async fn crash(&mut self) {
        self.backend.crash().await;
        self.stores = self.backend.stores();
    }

    /// Registers the account with this number.
    pub(super) async fn account(&self, n: u8) -> RegisteredAccount {
        let account = new_account(&format!("account{n}"), n, n);
        let identity = account.identity;
        match self.stores.accounts.register(account).await.expect("register") {
            Registration::Registered(account) => RegisteredAccount { account, identity },
            other => panic!("account {n}: {other:?}"),
        }
    }

    /// Registers a device of the account, with a key of its own, by a session that does not exist.
    pub(super) async fn device(&self, owner: RegisteredAccount, n: u8) -> DeviceRegistration {
        self.stores.devices.register(device(owner, n)).await.expect("register")
    }

    /// Registers a device that uses the identity key.
    pub(super) async fn device_without_key(&self, owner: RegisteredAccount, n: u8) {
        let device = NewDevice { key: None, ..device(owner, n) };
        let registered = self.stores.devices.register(device).await.expect("register");
        assert_eq!(registered, DeviceRegistration::Registered);
    }

    /// Revokes a device, which must be registered.
    pub(super) async fn revoke(&self, owner: RegisteredAccount, n: u8) {
        let revoked = self.stores.devices.revoke(owner.account, device_id(n), NOW).await;
        assert!(matches!(revoked, Ok(DeviceRevocation::Revoked { .. })), "{revoked:?}");
    }

    /// Returns the texts that wait for a reader.
    pub(super) async fn waiting(&self, read: ReadQuery) -> Vec<String> {
        texts(&self.peek(read).await).into_iter().map(str::to_owned).collect()
    }

    /// Reads the messages that wait for a reader, and completes the read.
    pub(super) async fn drain(&self, read: ReadQuery) -> Vec<String> {
        let lease = self.lease(read, EVERYTHING).await;
        let got = texts(lease.page()).into_iter().map(str::to_owned).collect();
        lease.complete(NOW).await.expect("complete");
        got
    }

    /// Returns the errors of a lease, a peek and an ack of `read`. `None`: that operation
    /// succeeded.
    pub(super) async fn refused(&self, read: ReadQuery, now: UnixMillis) -> [Option<ReadError>; 3] {
        let inboxes = &self.stores.inboxes;
        let ack = Ack { up_to: Some(Seq(1)), ..Ack::default() };
        [
            inboxes.lease(read, EVERYTHING, now).await.err(),
            inboxes.peek(read, Seq::ZERO, EVERYTHING, now).await.err(),
            inboxes.ack(read, ack, now).await.err(),
        ]
    }

    pub(super) async fn send(&self, message: NewMessage) -> Enqueued {
        self.stores.inboxes.enqueue(Batch::new(vec![message])).await.expect("enqueue")[0]
    }

    /// Sends a message, which must be accepted.
    pub(super) async fn deliver(&self, message: NewMessage) -> Receipt {
        match self.send(message).await {
            Enqueued::Accepted(receipt) => receipt,
            other => panic!("not accepted: {other:?}"),
        }
    }

    /// Delivers messages with these texts into the default channel.
    pub(super) async fn deliver_all(
        &self,
        from: RegisteredAccount,
        to: RegisteredAccount,
        texts: &[&str],
    ) {
        for text in texts {
            self.deliver(message(from, to, text)).await;
        }
    }

    pub(super) async fn lease(&self, read: ReadQuery, limit: PageLimit) -> Box<dyn Lease> {
        self.stores.inboxes.lease(read, limit, NOW).await.expect("lease")
    }

    pub(super) async fn peek(&self, read: ReadQuery) -> Page {
        self.peek_at(read, NOW).await
    }

    pub(super) async fn peek_at(&self, read: ReadQuery, now: UnixMillis) -> Page {
        self.stores.inboxes.peek(read, Seq::ZERO, EVERYTHING, now).await.expect("peek")
    }

    /// Returns the page of an empty view.
    pub(super) fn nothing(&self) -> Page {
        Page::empty(self.stores.maintenance.store_id())
    }

    pub(super) async fn ack(&self, read: ReadQuery, up_to: Option<u64>, seqs: &[u64]) -> u32 {
        self.ack_at(read, up_to, seqs, NOW).await
    }

    pub(super) async fn ack_at(
        &self,
        read: ReadQuery,
        up_to: Option<u64>,
        seqs: &[u64],
        now: UnixMillis,
    ) -> u32 {
        let ack = Ack {
            up_to: up_to.map(Seq),
            seqs: seqs.iter().copied().map(Seq).collect(),
            store_id: None,
        };
        self.stores.inboxes.ack(read, ack, now).await.expect("ack")
    }
}

/// Creates an account from a name, a number for the key and a number for the record.
pub(super) fn new_account(name: &str, key: u8, record: u8) -> NewAccount {
    NewAccount {
        username: Username::parse(name).expect("a username"),
        identity: IdentityKey::new([key; 32]),
        opaque_record: vec![record; 192],
        admission: Admission::Open,
        now: NOW,
    }
}

/// Creates a message for the default channel, without an id and with a lifetime of a day.
pub(super) fn message(from: RegisteredAccount, to: RegisteredAccount, text: &str) -> NewMessage {
    let payload = bytes::Bytes::copy_from_slice(text.as_bytes());
    let mut payload_sha256 = [0; 32];
    payload_sha256.iter_mut().zip(text.bytes().rev()).for_each(|(to, from)| *to = from);
    NewMessage {
        sender: from.identity,
        recipient: to.identity,
        channel: ChannelId::DEFAULT,
        payload,
        payload_sha256,
        message_id: None,
        now: NOW,
        ttl: 24 * 60 * MINUTE,
    }
}

impl NewMessage {
    pub(super) fn in_channel(self, n: u8) -> Self {
        Self { channel: channel(n), ..self }
    }

    pub(super) fn with_id(self, n: u8) -> Self {
        Self { message_id: Some(MessageId::new([n; 16])), ..self }
    }

    pub(super) fn at(self, now: UnixMillis) -> Self {
        Self { now, ..self }
    }

    pub(super) fn living(self, ttl: Duration) -> Self {
        Self { ttl, ..self }
    }
}

/// Returns the channel with this number; 0 is the default one.
pub(super) fn channel(n: u8) -> ChannelId {
    if n == 0 { ChannelId::DEFAULT } else { ChannelId::new([n; 16]) }
}

pub(super) fn all(owner: RegisteredAccount) -> ReadQuery {
    ReadQuery { reader: Reader::single(owner.identity), view: View::All }
}

pub(super) fn only(owner: RegisteredAccount, n: u8) -> ReadQuery {
    ReadQuery { reader: Reader::single(owner.identity), view: View::Channel(channel(n)) }
}

/// Returns the id of the device with this number.
pub(super) fn device_id(n: u8) -> DeviceId {
    DeviceId::new([n; 16])
}

/// Creates a device from a number. Devices of different accounts have different keys.
pub(super) fn device(owner: RegisteredAccount, n: u8) -> NewDevice {
    let mut key = [n; 32];
    key[..2].copy_from_slice(&[owner.identity.as_bytes()[0], 0xdd]);
    NewDevice {
        account: owner.account,
        device: device_id(n),
        name: format!("device {n}"),
        key: Some(CertifiedKey { key: DeviceKey::new(key), proof: [n; 64] }),
        session: TokenHash::new([0; 32]),
        now: NOW,
    }
}

/// Returns the query of a device for all channels.
pub(super) fn of_device(owner: RegisteredAccount, n: u8) -> ReadQuery {
    let reader = Reader { inbox: owner.identity, device: Some(device_id(n)) };
    ReadQuery { reader, view: View::All }
}

/// Returns the query of a device for one channel.
pub(super) fn of_device_in(owner: RegisteredAccount, n: u8, in_channel: u8) -> ReadQuery {
    ReadQuery { view: View::Channel(channel(in_channel)), ..of_device(owner, n) }
}

/// Returns a page of at most this number of messages.
pub(super) fn first(messages: u32) -> PageLimit {
    PageLimit { messages, ..EVERYTHING }
}

pub(super) fn seqs(page: &Page) -> Vec<u64> {
    page.envelopes.iter().map(|envelope| envelope.seq.0).collect()
}

pub(super) fn texts(page: &Page) -> Vec<&str> {
    page.envelopes
        .iter()
        .map(|envelope| std::str::from_utf8(&envelope.payload).expect("text"))
        .collect()
}

/// Claims and runs one job of an erasure. Calls `seen` after each batch. Returns whether there was
/// a job.
pub async fn run_job(stores: &Stores, now: UnixMillis, mut seen: impl FnMut(Erasing)) -> bool {
    let (lease, horizon) = (MINUTE, Duration::from_secs(3_600));
    let request = ClaimRequest { kind: ERASE, limit: 1, lease, horizon };
    let jobs = stores.jobs.claim(request, now).await.expect("claim");
    let Some(job) = jobs.first() else { return false };
    let erasure = ErasureId::of_job(&job.payload).expect("an erasure");
    let end = loop {
        let progress = stores.accounts.erase(erasure, now).await.expect("erase");
        seen(progress);
        match progress {
            Erasing::More => {}
            Erasing::WaitFor(wait) => break JobEnd::RepeatAfter { wait },
            Erasing::Done => break JobEnd::Done,
        }
    };
    stores.jobs.finish(job.claim, end, now).await.expect("finish");
    true
}
