//! Acceptance of the messages of many calls in one transaction.
//!
//! The heads of all inboxes are locked first, in the order of their numbers. So decisions about
//! seqs, caps and repeated message ids stay valid until the commit, and no two transactions
//! deadlock. Two statements read the data for the decisions, and one statement writes all results.

mod room;

use std::collections::{HashMap, HashSet};

use qpq_domain::{DeliveryLimits, IdentityKey, MessageId, Seq, StoreId, UnixMillis};
use qpq_ports::{Enqueued, Envelope, NewMessage, Receipt};
use sqlx::{PgConnection, Row as _};

use self::room::SenderInInbox;
use super::{payloads::Payloads, remove::ExpiredCounts};
use crate::{
    blocks,
    effects::{Accepted, ToInbox},
    history::store_id,
    postgres::{
        ClusterMark, Repeat, Scope, Statement,
        row::{Columns as _, millis, millis_of, now_of, number},
    },
    redis::queue::{Queued, RegistrationId},
    time::{Bounds, Time},
};

/// Locks the heads. The list of devices is from before the lock, so a registration that the lock
/// waited for is missing. The list only determines the queues to push to.
const LOCK: &str = concat!(
    "SELECT a.identity, i.id, i.last_seq, i.messages, i.bytes, i.next_expiry, i.blocks,
            CASE WHEN i.devices > 0 THEN ARRAY (SELECT id FROM device WHERE account = i.id) END
            AS devices, store_now() AS postgres, ",
    store_id!(),
    " AS store_id
       FROM account a JOIN inbox i ON i.id = a.id
      WHERE a.identity = ANY ($1) ORDER BY i.id FOR NO KEY UPDATE OF i"
);

/// Receipts of messages that are queued, or removed and remembered. $6: the time for which ids are
/// remembered.
const KNOWN: &str = "
    SELECT k.n, x.seq, x.channel, x.payload_sha256, x.enqueued_at
      FROM unnest($1::int4[], $2::int8[], $3::bytea[], $4::bytea[], $5::int8[])
           AS k (n, inbox, sender, id, now)
     CROSS JOIN LATERAL (
        SELECT m.seq, m.channel, m.payload_sha256, m.enqueued_at FROM message m
         WHERE m.inbox = k.inbox AND m.sender = k.sender AND m.message_id = k.id
           AND m.expires_at > k.now - $6
        UNION ALL
        SELECT r.seq, r.channel, r.payload_sha256, r.enqueued_at FROM recent_id r
         WHERE r.inbox = k.inbox AND r.sender = k.sender AND r.message_id = k.id
           AND r.forget_at > k.now
         LIMIT 1) x";

const WRITE: &str = "
    WITH moved AS (
        UPDATE inbox i
           SET last_seq = i.last_seq + h.added, messages = i.messages + h.added,
               bytes = i.bytes + h.bytes, next_expiry = least(i.next_expiry, h.expiry)
          FROM unnest($1::int8[], $2::int8[], $3::int8[], $4::int8[])
               AS h (id, added, bytes, expiry)
         WHERE i.id = h.id)
    INSERT INTO message (inbox, seq, expires_at, enqueued_at, channel, sender, message_id,
                         payload_sha256, payload)
    SELECT * FROM unnest($5::int8[], $6::int8[], $7::int8[], $8::int8[], $9::bytea[], $10::bytea[],
                         $11::bytea[], $12::bytea[], $13::bytea[])";

/// Inserts messages of which several share a payload: $13 the payloads, $14 their numbers and $15
/// their sizes if they are stored once, $16 the index of each message's payload, from 1. See
/// [`WRITE`].
const WRITE_SHARED: &str = "
    WITH moved AS (
        UPDATE inbox i
           SET last_seq = i.last_seq + h.added, messages = i.messages + h.added,
               bytes = i.bytes + h.bytes, next_expiry = least(i.next_expiry, h.expiry)
          FROM unnest($1::int8[], $2::int8[], $3::int8[], $4::int8[])
               AS h (id, added, bytes, expiry)
         WHERE i.id = h.id),
    shared AS MATERIALIZED (
        SELECT * FROM unnest($13::bytea[], $14::int8[], $15::int4[])
          WITH ORDINALITY AS s (payload, payload_id, size, place))
    INSERT INTO message (inbox, seq, expires_at, enqueued_at, channel, sender, message_id,
                         payload_sha256, payload, payload_id, size)
    SELECT m.inbox, m.seq, m.expires_at, m.enqueued_at, m.channel, m.sender, m.message_id,
           m.payload_sha256, s.payload, s.payload_id, s.size
      FROM unnest($5::int8[], $6::int8[], $7::int8[], $8::int8[], $9::bytea[], $10::bytea[],
                  $11::bytea[], $12::bytea[], $16::int8[])
           AS m (inbox, seq, expires_at, enqueued_at, channel, sender, message_id, payload_sha256,
                 place)
      JOIN shared s ON s.place = m.place";

/// The locked head of an inbox, and the messages that the transaction adds to the inbox.
struct Head {
    id: i64,
    /// The seq of the next message.
    next: Seq,
    messages: u64,
    bytes: u64,
    next_expiry: i64,
    expired: ExpiredCounts,
    /// The time of Postgres when the head was locked.
    postgres: Option<UnixMillis>,
    /// The number of accounts that the owner blocks.
    blocks: i32,
    /// The senders of these messages that the owner blocks.
    blocked: HashSet<IdentityKey>,
    /// The registered devices; `None` without any.
    devices: Option<Vec<RegistrationId>>,
    /// The number of messages that the transaction adds.
    added: i64,
    /// The size of the messages that the transaction adds.
    added_bytes: i64,
    /// The messages and bytes of each sender that was looked up.
    sender_counts: HashMap<IdentityKey, (u64, u64)>,
}

/// The outcome for a message, and the message's expiry if it was accepted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Outcome {
    pub(crate) enqueued: Enqueued,
    pub(crate) expires_at: UnixMillis,
}

/// The outcomes for the messages of one transaction.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outcomes {
    /// The history that the seqs belong to; `None` if no recipient exists.
    pub(crate) store_id: Option<StoreId>,
    /// The outcome for each message, in their order.
    pub(crate) of_each: Vec<Outcome>,
    /// The devices of the inboxes that have any.
    pub(crate) devices: HashMap<IdentityKey, Vec<RegistrationId>>,
}

impl Outcomes {
    /// Returns the messages that were accepted; `None` if there are none.
    pub(crate) fn accepted(mut self, messages: &[NewMessage]) -> Option<Accepted> {
        let mut inboxes: HashMap<IdentityKey, ToInbox> = HashMap::new();
        for (message, outcome) in messages.iter().zip(&self.of_each) {
            let Enqueued::Accepted(receipt) = &outcome.enqueued else { continue };
            let inbox = inboxes.entry(message.recipient).or_insert_with(|| ToInbox {
                devices: self.devices.remove(&message.recipient),
                messages: Vec::with_capacity(1),
            });
            inbox.messages.push(Queued {
                envelope: Envelope {
                    seq: receipt.seq,
                    channel: message.channel,
                    payload: message.payload.clone(),
                    enqueued_at: receipt.enqueued_at,
                },
                expires_at: outcome.expires_at,
            });
        }
        let store_id = self.store_id?;
        (!inboxes.is_empty()).then_some(Accepted { store_id, inboxes })
    }
}

/// Accepts each message or returns the reason for its refusal.
///
/// A message is removed only after it has expired by both clocks, and its time to live counts from
/// the later of the two.
pub(crate) struct Accept<'a> {
    pub(crate) messages: &'a [NewMessage],
    pub(crate) limits: &'a DeliveryLimits,
    pub(crate) time: &'a Time,
    pub(crate) mark: &'a ClusterMark,
}

impl Statement for Accept<'_> {
    type Output = Outcomes;

    /// A repeat is left to the caller, whose message ids make it safe.
    const REPEAT: Repeat = Repeat::Never;
    const SCOPE: Scope = Scope::Transaction;

    fn name(&self) -> &'static str {
        "enqueue"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Outcomes> {
        accept(connection, self).await
    }
}

/// Accepts messages in a transaction that may have locked groups, and no inbox yet.
pub(crate) async fn accept(
    connection: &mut PgConnection,
    Accept { messages, limits, time, mark }: &Accept<'_>,
) -> sqlx::Result<Outcomes> {
    let (store_id, mut heads) = lock(connection, messages).await?;
    let postgres = heads.values().find_map(|head| head.postgres);
    let bounds: Vec<_> =
        messages.iter().map(|message| time.bounds(message.now, postgres)).collect();
    room::make_room(connection, &mut heads, messages, &bounds, limits).await?;
    look_up_blocks(connection, &mut heads, messages).await?;
    let mut known = known(connection, &heads, messages, &bounds, limits).await?;
    room::look_up_senders(connection, &mut heads, messages, &bounds, &known, limits).await?;
    let mut ids: HashMap<(IdentityKey, IdentityKey, MessageId), Receipt> = HashMap::new();
    let mut outcomes = Vec::with_capacity(messages.len());
    for (n, (message, bounds)) in messages.iter().zip(&bounds).enumerate() {
        let expires_at = bounds.latest.plus(message.ttl);
        let Some(head) = heads.get_mut(&message.recipient) else {
            outcomes.push(Outcome { enqueued: Enqueued::NoSuchRecipient, expires_at });
            continue;
        };
        let id = message.message_id.map(|id| (message.recipient, message.sender, id));
        let before = known.remove(&n).or_else(|| ids.get(&id?).copied());
        let enqueued = match before {
            Some(receipt) => Enqueued::Duplicate(receipt),
            None => {
                let so_far = messages.iter().zip(&outcomes);
                let times = (bounds.agreed, expires_at);
                head.decide(connection, message, limits, times, so_far).await?
            }
        };
        if let (Some(id), Enqueued::Accepted(receipt)) = (id, &enqueued) {
            ids.insert(id, *receipt);
        }
        outcomes.push(Outcome { enqueued, expires_at });
    }
    write(connection, &heads, messages, &outcomes, mark).await?;
    let devices = heads.into_iter().filter_map(|(key, head)| Some((key, head.devices?))).collect();
    Ok(Outcomes { store_id, of_each: outcomes, devices })
}

impl Head {
    /// Returns the number and the bytes of the inbox's messages, without expired ones.
    fn counts(&self) -> (u64, u64) {
        let ExpiredCounts { messages, bytes } = self.expired;
        (self.messages.saturating_sub(messages), self.bytes.saturating_sub(bytes))
    }

    /// Accepts the message unless the owner blocks the sender, the inbox is full, or the inbox is
    /// more than half full and the sender has used up its share. `times` are the instants of its
    /// acceptance and of its expiry. `so_far` are the earlier decisions of this transaction.
    async fn decide(
        &mut self,
        connection: &mut PgConnection,
        message: &NewMessage,
        limits: &DeliveryLimits,
        times: (UnixMillis, UnixMillis),
        so_far: impl Iterator<Item = (&NewMessage, &Outcome)>,
    ) -> sqlx::Result<Enqueued> {
        if self.blocked.contains(&message.sender) {
            return Ok(Enqueued::Refused);
        }
        let size = message.payload.len() as u64;
        let (messages, bytes) = self.counts();
        if !limits.has_room(messages, bytes, size) {
            return Ok(Enqueued::QueueFull);
        }
        if limits.limits_senders(messages, bytes) {
            if !self.sender_counts.contains_key(&message.sender) {
                let counts = self.look_up(connection, message, limits, times.0, so_far).await?;
                self.sender_counts.insert(message.sender, counts);
            }
            let (messages, bytes) = self.sender_counts[&message.sender];
            if messages >= limits.sender_messages() || bytes + size > limits.sender_bytes() {
                return Ok(Enqueued::SenderShare);
            }
        }
        Ok(Enqueued::Accepted(self.accept(message, times)))
    }

    /// Returns the number and the bytes of the sender's messages in the inbox. The number is exact
    /// below the sender's share of messages, and at least that share otherwise.
    async fn look_up(
        &self,
        connection: &mut PgConnection,
        message: &NewMessage,
        limits: &DeliveryLimits,
        now: UnixMillis,
        so_far: impl Iterator<Item = (&NewMessage, &Outcome)>,
    ) -> sqlx::Result<(u64, u64)> {
        let (recipient, sender) = (message.recipient, message.sender);
        let pair = SenderInInbox { recipient, inbox: self.id, sender, now };
        let stored = room::sender_counts(connection, &[pair], limits).await?;
        // Accepted messages are written at the end of the transaction.
        let unwritten = so_far.filter(|(other, outcome)| {
            (other.recipient, other.sender) == (recipient, sender)
                && matches!(outcome.enqueued, Enqueued::Accepted(_))
        });
        let own = unwritten.map(|(other, _)| (1, other.payload.len() as u64));
        Ok(stored.into_iter().chain(own).fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1)))
    }

    /// Assigns the next seq of the inbox to the message.
    fn accept(
        &mut self,
        message: &NewMessage,
        (enqueued_at, expires_at): (UnixMillis, UnixMillis),
    ) -> Receipt {
        let size = message.payload.len() as u64;
        let receipt = Receipt {
            seq: self.next,
            channel: message.channel,
            payload_sha256: message.payload_sha256,
            enqueued_at,
        };
        self.next = self.next.next();
        self.messages += 1;
        self.bytes += size;
        self.added += 1;
        self.added_bytes += number(size);
        self.next_expiry = self.next_expiry.min(millis(expires_at));
        if let Some((messages, bytes)) = self.sender_counts.get_mut(&message.sender) {
            *messages += 1;
            *bytes += size;
        }
        receipt
    }
}

async fn lock(
    connection: &mut PgConnection,
    messages: &[NewMessage],
) -> sqlx::Result<(Option<StoreId>, HashMap<IdentityKey, Head>)> {
    let recipients: HashSet<_> = messages.iter().map(|message| message.recipient).collect();
    let keys: Vec<&[u8]> = recipients.iter().map(|key| &key.as_bytes()[..]).collect();
    let rows = sqlx::query(LOCK).bind(keys).fetch_all(connection).await?;
    let head = |row: &sqlx::postgres::PgRow| {
        let devices: Option<Vec<i64>> = row.try_get("devices")?;
        let head = Head {
            id: row.try_get("id")?,
            next: row.seq("last_seq")?.next(),
            messages: row.unsigned("messages")?,
            bytes: row.unsigned("bytes")?,
            next_expiry: row.try_get("next_expiry")?,
            expired: ExpiredCounts::default(),
            postgres: now_of(row)?,
            blocks: row.try_get("blocks")?,
            blocked: HashSet::new(),
            devices: devices.map(|ids| ids.into_iter().map(RegistrationId).collect()),
            added: 0,
            added_bytes: 0,
            sender_counts: HashMap::new(),
        };
        Ok((row.identity("identity")?, head))
    };
    let store_id = rows.first().map(|row| row.store_id("store_id")).transpose()?;
    Ok((store_id, rows.iter().map(head).collect::<sqlx::Result<_>>()?))
}

/// Looks up the blocked senders of inboxes whose owners block anyone.
async fn look_up_blocks(
    connection: &mut PgConnection,
    heads: &mut HashMap<IdentityKey, Head>,
    messages: &[NewMessage],
) -> sqlx::Result<()> {
    if heads.values().all(|head| head.blocks == 0) {
        return Ok(());
    }
    let pair = |message: &NewMessage| {
        let head = heads.get(&message.recipient).filter(|head| head.blocks > 0)?;
        Some((head.id, message.sender))
    };
    let pairs = messages.iter().filter_map(pair).collect();
    let mut blocked = blocks::blocked(connection, &pairs).await?;
    for head in heads.values_mut() {
        if let Some(senders) = blocked.remove(&head.id) {
            head.blocked = senders;
        }
    }
    Ok(())
}

/// Returns the receipts of repeated messages, by their index in `messages`.
async fn known(
    connection: &mut PgConnection,
    heads: &HashMap<IdentityKey, Head>,
    messages: &[NewMessage],
    bounds: &[Bounds],
    limits: &DeliveryLimits,
) -> sqlx::Result<HashMap<usize, Receipt>> {
    let (mut places, mut inboxes, mut senders) = (Vec::new(), Vec::new(), Vec::new());
    let (mut ids, mut nows): (Vec<&[u8]>, Vec<i64>) = (Vec::new(), Vec::new());
    for (n, (message, bounds)) in messages.iter().zip(bounds).enumerate() {
        let (Some(head), Some(id)) = (heads.get(&message.recipient), &message.message_id) else {
            continue;
        };
        places.push(i32::try_from(n).expect("a batch is small"));
        inboxes.push(head.id);
        senders.push(&message.sender.as_bytes()[..]);
        ids.push(id.as_bytes());
        nows.push(millis(bounds.earliest));
    }
    if places.is_empty() {
        return Ok(HashMap::new());
    }
    let rows = sqlx::query(KNOWN)
        .bind(places)
        .bind(inboxes)
        .bind(senders)
        .bind(ids)
        .bind(nows)
        .bind(millis_of(limits.recent_ids))
        .fetch_all(connection)
        .await?;
    rows.iter()
        .map(|row| {
            let receipt = Receipt {
                seq: row.seq("seq")?,
                channel: row.channel("channel")?,
                payload_sha256: row.hash("payload_sha256")?,
                enqueued_at: row.at("enqueued_at")?,
            };
            Ok((usize::try_from(row.try_get::<i32, _>("n")?).expect("one of the above"), receipt))
        })
        .collect()
}

async fn write(
    connection: &mut PgConnection,
    heads: &HashMap<IdentityKey, Head>,
    messages: &[NewMessage],
    outcomes: &[Outcome],
    mark: &ClusterMark,
) -> sqlx::Result<()> {
    let moved: Vec<&Head> = heads.values().filter(|head| head.added > 0).collect();
    if moved.is_empty() {
        return Ok(());
    }
    let accepted: Vec<(&NewMessage, &Receipt, UnixMillis)> = messages
        .iter()
        .zip(outcomes)
        .filter_map(|(message, outcome)| match &outcome.enqueued {
            Enqueued::Accepted(receipt) => Some((message, receipt, outcome.expires_at)),
            _ => None,
        })
        .collect();
    macro_rules! of_heads {
        ($value:expr) => {
            moved.iter().map($value).collect::<Vec<_>>()
        };
    }
    macro_rules! of_messages {
        ($value:expr) => {
            accepted.iter().map($value).collect::<Vec<_>>()
        };
    }
    let mut payloads = Payloads::of(accepted.iter().map(|(message, ..)| *message));
    payloads.store(connection, mark).await?;
    let query = sqlx::query(if payloads.are_shared() { WRITE_SHARED } else { WRITE })
        .bind(of_heads!(|head| head.id))
        .bind(of_heads!(|head| head.added))
        .bind(of_heads!(|head| head.added_bytes))
        .bind(of_heads!(|head| head.next_expiry))
        .bind(of_messages!(|(message, ..)| heads[&message.recipient].id))
        .bind(of_messages!(|(_, receipt, _)| number(receipt.seq.0)))
        .bind(of_messages!(|(_, _, expires_at)| millis(*expires_at)))
        .bind(of_messages!(|(_, receipt, _)| millis(receipt.enqueued_at)))
        .bind(of_messages!(|(message, ..)| message.channel.as_bytes()))
        .bind(of_messages!(|(message, ..)| &message.sender.as_bytes()[..]))
        .bind(of_messages!(|(message, ..)| message
            .message_id
            .as_ref()
            .map(|id| &id.as_bytes()[..])))
        .bind(of_messages!(|(message, ..)| &message.payload_sha256[..]))
        .bind(payloads.in_rows());
    let query = if payloads.are_shared() {
        query.bind(payloads.ids()).bind(payloads.sizes()).bind(&payloads.places)
    } else {
        query
    };
    query.execute(connection).await.map(drop)
}
