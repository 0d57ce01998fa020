//! Inboxes: the queues of ciphertext, one a recipient, read in the order in which messages became
//! durable.
//!
//! A read is a *lease*: it shows messages and hides them from every other read until it is completed
//! (the client has all bytes: they are removed) or released (it has not: they are there again,
//! unchanged). A view stops in front of the first message that is leased by someone else, so nobody
//! ever gets a later message while an earlier one may still come back.
//!
//! Nobody polls. [`Wakes::subscribe`] before a read, then wait on the subscription if the read was
//! empty: whatever is committed, completed or released after the subscription wakes it.

use std::{fmt, time::Duration};

use async_trait::async_trait;
use futures_util::future::BoxFuture;
use qpq_domain::{ChannelId, DeviceId, IdentityKey, MessageId, Seq, StoreId, UnixMillis};

use crate::StoreResult;

/// The messages of one call of [`Inboxes::enqueue`] at most.
pub const CALL_MESSAGES: usize = 256;

/// The payload bytes of one call of [`Inboxes::enqueue`] at most, unless it is a single message.
pub const CALL_BYTES: usize = 1 << 20;

/// The queues.
#[async_trait]
pub trait Inboxes: Send + Sync {
    /// Accepts messages and returns one outcome for each, in their order. A message is durable when
    /// its outcome is `Accepted`. Messages to one inbox get their seqs in the order of the batch. An
    /// error means that none was accepted. The backend's configuration ([`qpq_domain::Delivery`])
    /// limits what an inbox holds and what one sender holds of it, and says how long message ids are
    /// remembered.
    async fn enqueue(&self, batch: Batch) -> StoreResult<Vec<Enqueued>>;

    /// Shows the first messages of the view and hides them from other reads until the lease ends.
    async fn lease(
        &self,
        read: ReadQuery,
        limit: PageLimit,
        now: UnixMillis,
    ) -> StoreResult<Box<dyn Lease>>;

    /// Shows the messages of the view behind `after` ([`Seq::ZERO`]: all) and leaves everything as
    /// it is. Stops, as a lease does, in front of what is leased.
    async fn peek(
        &self,
        read: ReadQuery,
        after: Seq,
        limit: PageLimit,
        now: UnixMillis,
    ) -> StoreResult<Page>;

    /// Removes messages of the view, leased or not: an ack is the reader's own word. Returns how many
    /// were removed: none if the ack names another history than the present one. Durable when it
    /// returns.
    async fn ack(&self, read: ReadQuery, ack: Ack, now: UnixMillis) -> StoreResult<u32>;
}

/// Subscriptions to what happens in an inbox.
pub trait Wakes: Send + Sync {
    /// Starts a subscription to everything that may make this read return more: messages of its
    /// view that are accepted, released, or become visible because others are removed.
    fn subscribe(&self, query: &ReadQuery) -> Box<dyn Wake>;
}

/// One subscription. Dropping it ends it.
pub trait Wake: Send + Sync {
    /// Completes once something happened since the subscription or since the last completion.
    /// Cancel-safe. May complete without cause.
    fn woken(&mut self) -> BoxFuture<'_, ()>;
}

/// Messages that are hidden from other reads. Dropping it releases them.
#[async_trait]
pub trait Lease: Send + Sync {
    fn page(&self) -> &Page;

    /// Frees the payloads of the page once they are copied. All else of the page stays.
    fn free_payloads(&mut self);

    /// Removes exactly the messages shown: the reader has them. Durable when it returns. Their ids
    /// are remembered from `now` on, or from their expiry if that came before.
    ///
    /// Removes nothing if the store has begun another history since the page was read: the seqs may
    /// belong to other messages now.
    async fn complete(self: Box<Self>, now: UnixMillis) -> StoreResult<()>;
}

/// Messages that are accepted in one transaction.
///
/// Callers keep a batch within [`CALL_MESSAGES`] and [`CALL_BYTES`]. Messages that share a payload
/// should share its [`Bytes`](bytes::Bytes): a backend then binds it once.
///
/// The condition of a group commit (the channel and the epoch that it must still have) becomes a
/// field of this type, so that it is checked in the transaction that accepts the messages.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// The messages, in the order in which each inbox gets them.
    pub messages: Vec<NewMessage>,
}

impl Batch {
    /// Creates a batch of these messages.
    pub const fn new(messages: Vec<NewMessage>) -> Self {
        Self { messages }
    }
}

/// A message to be accepted.
#[derive(Clone)]
pub struct NewMessage {
    pub sender: IdentityKey,
    pub recipient: IdentityKey,
    pub channel: ChannelId,
    pub payload: bytes::Bytes,
    /// SHA-256 of the payload: kept, so that a repeat gets the same proof.
    pub payload_sha256: [u8; 32],
    pub message_id: Option<MessageId>,
    pub now: UnixMillis,
    pub ttl: Duration,
}

impl fmt::Debug for NewMessage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NewMessage").field("bytes", &self.payload.len()).finish_non_exhaustive()
    }
}

impl Page {
    /// Replaces all payloads by empty ones.
    pub fn free_payloads(&mut self) {
        for envelope in &mut self.envelopes {
            envelope.payload = bytes::Bytes::new();
        }
    }
}

/// What became of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Enqueued {
    Accepted(Receipt),
    /// The sender's message id is known for this recipient: the first message's receipt.
    Duplicate(Receipt),
    NoSuchRecipient,
    QueueFull,
    /// The inbox is more than half full, and the sender holds its share of it
    /// ([`qpq_domain::Delivery::sender_share`]).
    SenderShare,
}

/// What the server can prove about an accepted message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Receipt {
    pub seq: Seq,
    pub channel: ChannelId,
    pub payload_sha256: [u8; 32],
    pub enqueued_at: UnixMillis,
}

/// One position in an inbox: that of a device, or of the account.
///
/// Leases, acks and wakes belong to a reader. An inbox without registered devices has a single
/// reader, and the stores read it whatever device is named.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Reader {
    pub inbox: IdentityKey,
    pub device: Option<DeviceId>,
}

impl Reader {
    /// Returns the only reader of an inbox without registered devices.
    pub const fn single(inbox: IdentityKey) -> Self {
        Self { inbox, device: None }
    }
}

/// The part of an inbox that a read returns messages of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadQuery {
    pub reader: Reader,
    pub view: View,
}

/// Which messages a read sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum View {
    Channel(ChannelId),
    All,
}

impl View {
    /// Whether a message can be in both.
    pub fn overlaps(self, other: Self) -> bool {
        self == Self::All || other == Self::All || self == other
    }
}

/// How much one read takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageLimit {
    pub messages: u32,
    /// Sum over [`Envelope::cost`]; the first message comes whatever its size.
    pub bytes: usize,
}

/// What a read shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// The history that the seqs belong to.
    pub store_id: StoreId,
    /// In seq order.
    pub envelopes: Vec<Envelope>,
    /// Whether the view has more, unexpired and visible, behind these.
    pub more: bool,
}

/// A queued message.
#[derive(Clone, PartialEq, Eq)]
pub struct Envelope {
    pub seq: Seq,
    pub channel: ChannelId,
    pub payload: bytes::Bytes,
    pub enqueued_at: UnixMillis,
}

impl Page {
    /// Creates a page without messages.
    pub const fn empty(store_id: StoreId) -> Self {
        Self { store_id, envelopes: Vec::new(), more: false }
    }
}

impl Envelope {
    /// Bytes it takes in an answer at most: the payload and 64 of framing around it.
    pub fn cost(&self) -> usize {
        self.payload.len() + 64
    }
}

impl fmt::Debug for Envelope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Envelope")
            .field("seq", &self.seq)
            .field("bytes", &self.payload.len())
            .finish_non_exhaustive()
    }
}

/// What an ack removes.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Ack {
    /// Everything in the view with this seq or a lower one.
    pub up_to: Option<Seq>,
    /// Single messages of the view besides.
    pub seqs: Vec<Seq>,
    /// The history that the seqs belong to, where the reader says so.
    pub store_id: Option<StoreId>,
}

impl Ack {
    /// Whether the ack names no message.
    pub fn is_empty(&self) -> bool {
        self.up_to.is_none() && self.seqs.is_empty()
    }
}
