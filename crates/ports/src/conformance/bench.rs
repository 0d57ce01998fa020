//! A backend under test, with short names for what the rules do with it.

use std::time::Duration;

use qpq_domain::{
    AccountId, ChannelId, DeliveryLimits, IdentityKey, KeyPackageLimits, MessageId, Seq,
    UnixMillis, Username,
};

use super::{Backend, Factory};
use crate::{
    Ack, Batch, Enqueued, Lease, NewAccount, NewMessage, Page, PageLimit, ReadQuery, Reader,
    Receipt, Registration, Stores, View,
};

/// The instant at which each test begins.
pub(super) const NOW: UnixMillis = UnixMillis(1_800_000_000_000);

pub(super) const MINUTE: Duration = Duration::from_secs(60);

/// A page without limits.
pub(super) const EVERYTHING: PageLimit = PageLimit { messages: u32::MAX, bytes: usize::MAX };

pub(super) struct Bench {
    pub(super) backend: Box<dyn Backend>,
    pub(super) stores: Stores,
}

/// A registered account.
#[derive(Clone, Copy, Debug)]
pub(super) struct Person {
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
        let backend = factory.fresh(delivery, caps).await;
        let stores = backend.stores();
        Self { backend, stores }
    }

    pub(super) async fn crash(&mut self) {
        self.backend.crash().await;
        self.stores = self.backend.stores();
    }

    /// Registers the person with this number.
    pub(super) async fn person(&self, n: u8) -> Person {
        let account = account(&format!("person{n}"), n, n);
        let identity = account.identity;
        match self.stores.accounts.register(account).await.expect("register") {
            Registration::Registered(account) => Person { account, identity },
            other => panic!("person {n}: {other:?}"),
        }
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
    pub(super) async fn deliver_all(&self, from: Person, to: Person, texts: &[&str]) {
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

/// Creates an account from a name, a number for the key and one for the record.
pub(super) fn account(name: &str, key: u8, record: u8) -> NewAccount {
    NewAccount {
        username: Username::parse(name).expect("a username"),
        identity: IdentityKey::new([key; 32]),
        opaque_record: vec![record; 192],
        now: NOW,
    }
}

/// Creates a message for the default channel, without an id, that lives for a day.
pub(super) fn message(from: Person, to: Person, text: &str) -> NewMessage {
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

pub(super) fn all(person: Person) -> ReadQuery {
    ReadQuery { reader: Reader::single(person.identity), view: View::All }
}

pub(super) fn only(person: Person, n: u8) -> ReadQuery {
    ReadQuery { reader: Reader::single(person.identity), view: View::Channel(channel(n)) }
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
