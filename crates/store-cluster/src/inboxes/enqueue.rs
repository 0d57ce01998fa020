//! Acceptance of the messages of many calls in one transaction.
//!
//! The heads of all inboxes are locked first, in the order of their numbers. So decisions about
//! seqs, caps and repeated message ids stay valid until the commit, and no two transactions
//! deadlock. Two statements read what the decisions need, and one statement writes all results.

use std::collections::{HashMap, HashSet};

use qpq_domain::{DeliveryLimits, IdentityKey, MessageId, Seq, StoreId, UnixMillis};
use qpq_ports::{Enqueued, NewMessage, Receipt};
use sqlx::{PgConnection, Row as _};

use super::remove::{self, Due, SWEEP, Stale};
use crate::{
    history::store_id,
    postgres::{
        Repeat, Scope, Statement,
        row::{Columns as _, millis, millis_of, now_of, number},
    },
    time::{Bounds, Time},
};

const LOCK: &str = concat!(
    "SELECT a.identity, i.id, i.last_seq, i.messages, i.bytes, i.next_expiry,
            store_now() AS postgres, ",
    store_id!(),
    " AS store_id
       FROM account a JOIN inbox i ON i.id = a.id
      WHERE a.identity = ANY ($1) ORDER BY i.id FOR NO KEY UPDATE OF i"
);

/// Receipts of messages that are queued, or removed and remembered. $6: how long ids are
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

/// As [`WRITE`], for payloads that several messages share: $13 the payloads, each once, $14 which
/// of them each message has, from 1.
const WRITE_SHARED: &str = "
    WITH moved AS (
        UPDATE inbox i
           SET last_seq = i.last_seq + h.added, messages = i.messages + h.added,
               bytes = i.bytes + h.bytes, next_expiry = least(i.next_expiry, h.expiry)
          FROM unnest($1::int8[], $2::int8[], $3::int8[], $4::int8[])
               AS h (id, added, bytes, expiry)
         WHERE i.id = h.id),
    shared AS MATERIALIZED (
        SELECT * FROM unnest($13::bytea[]) WITH ORDINALITY AS s (payload, place))
    INSERT INTO message (inbox, seq, expires_at, enqueued_at, channel, sender, message_id,
                         payload_sha256, payload)
    SELECT m.inbox, m.seq, m.expires_at, m.enqueued_at, m.channel, m.sender, m.message_id,
           m.payload_sha256, s.payload
      FROM unnest($5::int8[], $6::int8[], $7::int8[], $8::int8[], $9::bytea[], $10::bytea[],
                  $11::bytea[], $12::bytea[], $14::int8[])
           AS m (inbox, seq, expires_at, enqueued_at, channel, sender, message_id, payload_sha256,
                 place)
      JOIN shared s ON s.place = m.place";

/// What a sender has in an inbox whose head is locked, up to a number of rows: $1 inbox, $2 sender,
/// $3 rows to look at, $4 now. Each index has the messages that the other one lacks.
const HELD: &str = "
    SELECT count(*) AS messages, coalesce(sum(octet_length(payload)), 0)::int8 AS bytes
      FROM ((SELECT payload FROM message
              WHERE inbox = $1 AND sender = $2 AND message_id IS NOT NULL
                AND expires_at > $4 LIMIT $3)
            UNION ALL
            (SELECT payload FROM message
              WHERE inbox = $1 AND sender = $2 AND message_id IS NULL
                AND expires_at > $4 LIMIT $3)) AS held";

/// An inbox whose head is locked, and the decisions about it.
struct Head {
    id: i64,
    next: Seq,
    messages: u64,
    bytes: u64,
    next_expiry: i64,
    stale: Stale,
    postgres: Option<UnixMillis>,
    added: i64,
    added_bytes: i64,
    /// The messages and bytes of each sender that was looked up.
    held: HashMap<IdentityKey, (u64, u64)>,
}

/// The outcome for a message, and when it expires if it was accepted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Outcome {
    pub(crate) enqueued: Enqueued,
    pub(crate) expires_at: UnixMillis,
}

/// The outcomes for the messages of one transaction.
#[derive(Clone, Debug)]
pub(crate) struct Outcomes {
    /// The history that the seqs belong to; none if no message had a recipient.
    pub(crate) store_id: Option<StoreId>,
    /// In the order of the messages.
    pub(crate) of_each: Vec<Outcome>,
}

/// Accepts each message or returns why not.
///
/// Nothing is removed before its time by both clocks is over, and the time to live of a message
/// counts from the later of the two.
pub(crate) struct Accept<'a> {
    pub(crate) messages: &'a [NewMessage],
    pub(crate) limits: &'a DeliveryLimits,
    pub(crate) time: &'a Time,
}

impl Statement for Accept<'_> {
    type Output = Outcomes;

    /// A caller repeats a message by its id.
    const REPEAT: Repeat = Repeat::Never;
    const SCOPE: Scope = Scope::Transaction;

    fn name(&self) -> &'static str {
        "enqueue"
    }

    async fn run(&self, connection: &mut PgConnection) -> sqlx::Result<Outcomes> {
        accept(connection, self).await
    }
}

async fn accept(
    connection: &mut PgConnection,
    Accept { messages, limits, time }: &Accept<'_>,
) -> sqlx::Result<Outcomes> {
    let (store_id, mut heads) = lock(connection, messages).await?;
    let postgres = heads.values().find_map(|head| head.postgres);
    let bounds: Vec<_> =
        messages.iter().map(|message| time.bounds(message.now, postgres)).collect();
    make_room(connection, &mut heads, messages, &bounds, limits).await?;
    let mut known = known(connection, &heads, messages, &bounds, limits).await?;
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
    write(connection, &heads, messages, &outcomes).await?;
    Ok(Outcomes { store_id, of_each: outcomes })
}

impl Head {
    /// Accepts the message unless the inbox is full, or is more than half full and the sender holds
    /// its share. `times` are those of its acceptance and of its expiry, `so_far` is what this
    /// transaction has decided.
    async fn decide(
        &mut self,
        connection: &mut PgConnection,
        message: &NewMessage,
        limits: &DeliveryLimits,
        times: (UnixMillis, UnixMillis),
        so_far: impl Iterator<Item = (&NewMessage, &Outcome)>,
    ) -> sqlx::Result<Enqueued> {
        let size = message.payload.len() as u64;
        // Expired messages count for nothing, removed or not.
        let messages = self.messages.saturating_sub(self.stale.messages);
        let bytes = self.bytes.saturating_sub(self.stale.bytes);
        if !limits.has_room(messages, bytes, size) {
            return Ok(Enqueued::QueueFull);
        }
        if limits.limits_senders(messages, bytes) {
            if !self.held.contains_key(&message.sender) {
                let held = self.look_up(connection, message, limits, times.0, so_far).await?;
                self.held.insert(message.sender, held);
            }
            let (messages, bytes) = self.held[&message.sender];
            if messages >= limits.sender_messages() || bytes + size > limits.sender_bytes() {
                return Ok(Enqueued::SenderShare);
            }
        }
        Ok(Enqueued::Accepted(self.accept(message, times)))
    }

    /// What the message's sender holds in the inbox, in messages and bytes: exact below its share
    /// of messages, and at least that share otherwise.
    async fn look_up(
        &self,
        connection: &mut PgConnection,
        message: &NewMessage,
        limits: &DeliveryLimits,
        now: UnixMillis,
        so_far: impl Iterator<Item = (&NewMessage, &Outcome)>,
    ) -> sqlx::Result<(u64, u64)> {
        let row = sqlx::query(HELD)
            .bind(self.id)
            .bind(&message.sender.as_bytes()[..])
            .bind(number(limits.sender_messages()))
            .bind(millis(now))
            .fetch_one(connection)
            .await?;
        // Accepted messages are written at the end of the transaction.
        let unwritten = so_far.filter(|(other, outcome)| {
            (other.recipient, other.sender) == (message.recipient, message.sender)
                && matches!(outcome.enqueued, Enqueued::Accepted(_))
        });
        Ok(unwritten.fold(
            (row.unsigned("messages")?, row.unsigned("bytes")?),
            |(messages, bytes), (other, _)| (messages + 1, bytes + other.payload.len() as u64),
        ))
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
        if let Some((messages, bytes)) = self.held.get_mut(&message.sender) {
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
        let head = Head {
            id: row.try_get("id")?,
            next: row.seq("last_seq")?.next(),
            messages: row.unsigned("messages")?,
            bytes: row.unsigned("bytes")?,
            next_expiry: row.try_get("next_expiry")?,
            stale: Stale::default(),
            postgres: now_of(row)?,
            added: 0,
            added_bytes: 0,
            held: HashMap::new(),
        };
        Ok((row.identity("identity")?, head))
    };
    let store_id = rows.first().map(|row| row.store_id("store_id")).transpose()?;
    Ok((store_id, rows.iter().map(head).collect::<sqlx::Result<_>>()?))
}

/// Removes expired messages of the inboxes, since they may fill an inbox or keep a message id too
/// long. At most [`SWEEP`] rows in all: the others count for nothing, and go with a
/// sweep or with the next messages.
async fn make_room(
    connection: &mut PgConnection,
    heads: &mut HashMap<IdentityKey, Head>,
    messages: &[NewMessage],
    bounds: &[Bounds],
    limits: &DeliveryLimits,
) -> sqlx::Result<()> {
    let mut rows = SWEEP;
    let mut seen = HashSet::new();
    for (message, bounds) in messages.iter().zip(bounds) {
        let Some(head) = heads.get_mut(&message.recipient) else { continue };
        if head.next_expiry > millis(bounds.earliest) || !seen.insert(message.recipient) {
            continue;
        }
        let ids = messages.iter().filter(|other| other.recipient == message.recipient);
        let ids = ids.filter_map(|other| {
            Some((&other.sender.as_bytes()[..], &other.message_id.as_ref()?.as_bytes()[..]))
        });
        let due = Due { inbox: head.id, now: bounds.earliest, rows, ids: ids.collect() };
        let left = remove::expired(connection, due, limits.recent_ids).await?;
        rows = (rows - left.removed).max(0);
        (head.messages, head.bytes, head.next_expiry) =
            (left.messages, left.bytes, left.next_expiry);
        head.stale = left.stale;
    }
    Ok(())
}

/// Returns the receipts of repeated messages, by their place.
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
    let payloads = Payloads::of(accepted.iter().map(|(message, ..)| *message));
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
        .bind(&payloads.all);
    let query = if payloads.are_shared() { query.bind(&payloads.places) } else { query };
    query.execute(connection).await.map(drop)
}

/// The distinct payloads of messages.
struct Payloads<'a> {
    all: Vec<&'a [u8]>,
    /// Which of them each message has, from 1.
    places: Vec<i64>,
}

impl<'a> Payloads<'a> {
    /// Two messages share a payload if they share its memory: a fan-out does.
    fn of(messages: impl IntoIterator<Item = &'a NewMessage>) -> Self {
        let (mut all, mut places, mut known) = (Vec::new(), Vec::new(), HashMap::new());
        for message in messages {
            let payload = &message.payload[..];
            let place = *known.entry((payload.as_ptr(), payload.len())).or_insert_with(|| {
                all.push(payload);
                number(all.len() as u64)
            });
            places.push(place);
        }
        Self { all, places }
    }

    fn are_shared(&self) -> bool {
        self.all.len() < self.places.len()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;
    use qpq_domain::{ChannelId, UnixMillis};

    use super::*;

    fn message(payload: Bytes) -> NewMessage {
        NewMessage {
            sender: IdentityKey::new([1; 32]),
            recipient: IdentityKey::new([2; 32]),
            channel: ChannelId::DEFAULT,
            payload,
            payload_sha256: [0; 32],
            message_id: None,
            now: UnixMillis(0),
            ttl: Duration::ZERO,
        }
    }

    #[test]
    fn a_payload_is_bound_once_however_many_messages_share_it() {
        let (shared, own) = (Bytes::from(vec![1; 9]), Bytes::from(vec![1; 9]));
        let messages = [&shared, &own, &shared, &shared].map(|payload| message(payload.clone()));
        let payloads = Payloads::of(&messages);
        assert_eq!((payloads.all.len(), &payloads.places[..]), (2, &[1, 2, 1, 1][..]));
        assert!(payloads.are_shared());
        assert!(!Payloads::of(&messages[..2]).are_shared());
    }
}
