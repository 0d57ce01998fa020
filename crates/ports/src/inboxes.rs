//! Inboxes: ordered queues of encrypted messages, one for each account, read in the order in which
//! messages became durable.
//!
//! A read is a *lease*: it returns messages and hides them from every other read until it is
//! completed (the client has all bytes, and the messages are removed) or released (the messages are
//! visible again, unchanged). A view stops before the first message that another read has leased,
//! so no reader gets a later message while an earlier one may become visible again.
//!
//! Readers do not poll. They subscribe ([`Wakes::subscribe`]), read, and wait for the subscription
//! if the read was empty: a commit, a completion or a release after the subscription wakes it.

use std::{fmt, time::Duration};

use async_trait::async_trait;
use futures_util::future::BoxFuture;
use qpq_domain::{ChannelId, DeviceId, IdentityKey, MessageId, Seq, StoreId, UnixMillis};

use crate::{StoreError, StoreResult};

/// Maximum messages of a [`Batch`].
pub const CALL_MESSAGES: usize = 256;

/// Maximum payload bytes of a [`Batch`] of several messages.
pub const CALL_BYTES: usize = 1 << 20;

/// Accepts, returns and removes messages.
///
/// Reads and acks fail with [`ReadError::DeviceRequired`] if the inbox has registered devices and
/// the reader is none of them. The check and the read see the same state of the store.
#[async_trait]
pub trait Inboxes: Send + Sync {
    /// Accepts messages and returns one outcome for each, in their order. A message is durable when
    /// its outcome is `Accepted`. Messages to one inbox get their seqs in the order of the batch.
    /// An error means that none was accepted. The backend's configuration
    /// ([`qpq_domain::DeliveryLimits`]) limits the messages of an inbox and of one sender in it,
    /// and the time for which message ids are remembered.
    async fn enqueue(&self, batch: Batch) -> StoreResult<Vec<Enqueued>>;

    /// Returns the first messages of the view, and hides them from other reads until the lease
    /// ends.
    async fn lease(
        &self,
        read: ReadQuery,
        limit: PageLimit,
        now: UnixMillis,
    ) -> Result<Box<dyn Lease>, ReadError>;

    /// Returns the messages of the view after `after` ([`Seq::ZERO`]: all) and changes nothing.
    /// Stops before the first leased message, as a lease does.
    async fn peek(
        &self,
        read: ReadQuery,
        after: Seq,
        limit: PageLimit,
        now: UnixMillis,
    ) -> Result<Page, ReadError>;

    /// Removes messages of the view for the reader, leased or not, because the client has received
    /// them. Returns the number of messages that were newly removed for the reader: none if the ack
    /// names another history than the present one. Durable when it returns.
    async fn ack(&self, read: ReadQuery, ack: Ack, now: UnixMillis) -> Result<u32, ReadError>;
}

/// Creates subscriptions to changes of inboxes.
pub trait Wakes: Send + Sync {
    /// Starts a subscription to every change that lets this read return more: messages of its view
    /// that are accepted, released, or become visible because others are removed.
    fn subscribe(&self, query: &ReadQuery) -> Box<dyn Wake>;
}

/// A subscription to the changes of an inbox, until it is dropped.
pub trait Wake: Send + Sync {
    /// Completes after a change since the subscription or since the last completion. Cancel-safe.
    /// May complete without a change.
    fn woken(&mut self) -> BoxFuture<'_, ()>;
}

/// Messages that are hidden from other reads. Dropping the lease releases them.
#[async_trait]
pub trait Lease: Send + Sync {
    /// Returns the messages.
    fn page(&self) -> &Page;

    /// Frees the payloads of the page, once the caller has copied them. The rest of the page stays.
    fn free_payloads(&mut self);

    /// Removes exactly the messages of the page for the reader, which has received them. Durable
    /// when it returns. A message that waits for no other reader is deleted. Its id is remembered
    /// from `now` on, or from its expiry if that was earlier.
    ///
    /// Removes nothing
    /// - if the store has begun another history since the page was read: the seqs may then belong
    ///   to other messages;
    /// - if the single reader read the page and a device has been registered since: the first
    ///   device inherits the messages;
    /// - if a device read the page and its registration was revoked since, even if a device with
    ///   the same id was registered again.
    async fn complete(self: Box<Self>, now: UnixMillis) -> StoreResult<()>;
}

/// Messages that are accepted in one transaction.
///
/// Callers keep a batch within [`CALL_MESSAGES`] and [`CALL_BYTES`]. Messages that share a payload
/// should share its [`Bytes`](bytes::Bytes): a backend then binds it once.
///
/// Messages with a commit, and those to all members of a group, go through
/// [`Groups::send`](crate::Groups::send).
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// The messages, in the order of their seqs in each inbox.
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
    /// The account that sends the message.
    pub sender: IdentityKey,
    /// The recipient's account.
    pub recipient: IdentityKey,
    /// The channel of the inbox.
    pub channel: ChannelId,
    /// The ciphertext.
    pub payload: bytes::Bytes,
    /// SHA-256 of the payload, stored so that the answer to a repeat has the same proof.
    pub payload_sha256: [u8; 32],
    /// The sender's id for the message, by which a repeat is recognised.
    pub message_id: Option<MessageId>,
    /// The instant of the call.
    pub now: UnixMillis,
    /// The lifetime of the message: the time for which it is kept for its readers.
    pub ttl: Duration,
}

impl fmt::Debug for NewMessage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NewMessage").field("bytes", &self.payload.len()).finish_non_exhaustive()
    }
}

/// The outcome for one message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Enqueued {
    /// The message is durable.
    Accepted(Receipt),
    /// The sender has sent a message with this id to the recipient before. Has the receipt of that
    /// message.
    Duplicate(Receipt),
    /// No account has the recipient's identity key.
    NoSuchRecipient,
    /// The owner of the inbox blocks the sender ([`Blocks`](crate::Blocks)).
    Refused,
    /// The inbox has no room.
    QueueFull,
    /// The inbox is more than half full, and the sender has used its share of it
    /// ([`qpq_domain::DeliveryLimits::sender_share`]).
    SenderShare,
}

/// The proof that the server has accepted a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Receipt {
    /// The position in the inbox.
    pub seq: Seq,
    /// The channel of the inbox.
    pub channel: ChannelId,
    /// SHA-256 of the payload.
    pub payload_sha256: [u8; 32],
    /// The time at which the message was accepted.
    pub enqueued_at: UnixMillis,
}

/// The reason why an inbox was not read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The inbox has registered devices, and the reader is none of them.
    #[error("the reader is not a registered device of the inbox")]
    DeviceRequired,
    /// The device had not read for too long while its messages filled more than half of the inbox,
    /// so its position was moved to the newest message. Every read and ack returns this error until
    /// [`Devices::confirm_position`](crate::Devices::confirm_position).
    #[error("the device lost its position in the inbox")]
    PositionLost,
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A reader of an inbox: a device or the account itself, with a position of its own.
///
/// Leases, acks and wakes belong to a reader. An inbox without registered devices has a single
/// reader, and every call reads on its position, whatever device the call names. With registered
/// devices, each of them is a reader, and there is no other ([`Devices`](crate::Devices)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Reader {
    /// The account whose inbox is read.
    pub inbox: IdentityKey,
    /// The device that reads it, if the call names one.
    pub device: Option<DeviceId>,
}

impl Reader {
    /// Returns the only reader of an inbox without registered devices.
    pub const fn single(inbox: IdentityKey) -> Self {
        Self { inbox, device: None }
    }
}

/// The part of an inbox whose messages a read returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadQuery {
    /// The reader.
    pub reader: Reader,
    /// The channels that are read.
    pub view: View,
}

/// The channels whose messages a read returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum View {
    /// One channel.
    Channel(ChannelId),
    /// Every channel.
    All,
}

impl View {
    /// Returns whether a message can be in both views.
    pub fn overlaps(self, other: Self) -> bool {
        self == Self::All || other == Self::All || self == other
    }
}

/// The size of one read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageLimit {
    /// Maximum messages.
    pub messages: u32,
    /// Maximum sum of [`Envelope::cost`]. The first message is always returned.
    pub bytes: usize,
}

/// The messages that a read returns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// The history that the seqs belong to.
    pub store_id: StoreId,
    /// The messages, in the order of their seqs.
    pub envelopes: Vec<Envelope>,
    /// `true` if the view has more visible messages after these.
    pub more: bool,
}

impl Page {
    /// Creates a page without messages.
    pub const fn empty(store_id: StoreId) -> Self {
        Self { store_id, envelopes: Vec::new(), more: false }
    }

    /// Replaces all payloads by empty ones.
    pub fn free_payloads(&mut self) {
        for envelope in &mut self.envelopes {
            envelope.payload = bytes::Bytes::new();
        }
    }
}

/// A queued message.
#[derive(Clone, PartialEq, Eq)]
pub struct Envelope {
    /// The position in the inbox.
    pub seq: Seq,
    /// The channel of the inbox.
    pub channel: ChannelId,
    /// The ciphertext.
    pub payload: bytes::Bytes,
    /// The time at which the message was accepted.
    pub enqueued_at: UnixMillis,
}

impl Envelope {
    /// Returns the maximum size of the message in a response: the payload and 64 bytes of framing.
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

/// The messages that an ack removes.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Ack {
    /// All messages of the view up to and including this seq.
    pub up_to: Option<Seq>,
    /// Single messages of the view, in addition.
    pub seqs: Vec<Seq>,
    /// The history that the seqs belong to, if the reader names it.
    pub store_id: Option<StoreId>,
}

impl Ack {
    /// Returns whether the ack names no message.
    pub fn is_empty(&self) -> bool {
        self.up_to.is_none() && self.seqs.is_empty()
    }
}
