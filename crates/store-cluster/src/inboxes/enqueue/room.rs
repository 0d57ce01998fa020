//! Looks up the free room of inboxes that have expired messages or are more than half full, for the
//! decisions about messages.
//!
//! A transaction accepts messages into up to ten thousand inboxes, whose heads are locked until it
//! ends. So the number of rows that it reads is bounded. For an inbox beyond the bound, the counts
//! of its head are used, which include expired messages that no sweep has removed yet. A sender
//! beyond the bound counts as having used up its share of the inbox.

use std::{
    cmp::Reverse,
    collections::{HashMap, HashSet},
};

use qpq_domain::{DeliveryLimits, IdentityKey, UnixMillis};
use qpq_ports::{NewMessage, Receipt};
use sqlx::PgConnection;

use super::Head;
use crate::{
    inboxes::{
        payloads::{self, size},
        remove::{self, Due, DueId},
        sweep::SWEEP,
    },
    postgres::row::{Columns as _, millis, number},
    time::Bounds,
};

/// Maximum inboxes whose expired messages are removed and counted one inbox at a time.
const INSPECTED: usize = 64;

/// Maximum inboxes in one statement that counts messages of senders.
const LOOKED_UP: usize = 64;

/// Maximum messages of one sender that are counted. Beyond it, the sender counts as having used up
/// its share of each further inbox. A sender that is far below its shares never reaches this
/// maximum.
const COUNTED: u64 = 64 << 10;

/// Counts the messages of senders in inboxes whose heads are locked: $1 inboxes, $2 senders, $3
/// now, $4 maximum rows of each. The two parts count the messages with and without an id, each by
/// an index of its own.
const SENDER_COUNTS: &str = concat!(
    "SELECT h.messages, h.bytes
      FROM unnest($1::int8[], $2::bytea[], $3::int8[]) WITH ORDINALITY
           AS k (inbox, sender, now, place)
     CROSS JOIN LATERAL (
        SELECT count(*) AS messages, coalesce(sum(",
    size!(),
    "), 0)::int8 AS bytes
          FROM ((SELECT payload, size FROM message
                  WHERE inbox = k.inbox AND sender = k.sender AND message_id IS NOT NULL
                    AND expires_at > k.now LIMIT $4)
                UNION ALL
                (SELECT payload, size FROM message
                  WHERE inbox = k.inbox AND sender = k.sender AND message_id IS NULL
                    AND expires_at > k.now LIMIT $4)) AS m) h
     ORDER BY k.place"
);

/// Removes expired messages of the inboxes, since they may fill an inbox or occupy a message id.
/// Removes at most [`SWEEP`] rows of the [`INSPECTED`] fullest inboxes, and in addition the expired
/// messages whose ids are used again. A sweep or a later call removes the others.
pub(super) async fn make_room(
    connection: &mut PgConnection,
    heads: &mut HashMap<IdentityKey, Head>,
    messages: &[NewMessage],
    bounds: &[Bounds],
    limits: &DeliveryLimits,
) -> sqlx::Result<()> {
    let mut seen = HashSet::new();
    let mut due: Vec<(&NewMessage, UnixMillis)> = Vec::new();
    for (message, bounds) in messages.iter().zip(bounds) {
        let Some(head) = heads.get(&message.recipient) else { continue };
        if head.next_expiry <= millis(bounds.earliest) && seen.insert(message.recipient) {
            due.push((message, bounds.earliest));
        }
    }
    let mut payloads = Vec::new();
    if due.len() > INSPECTED {
        due.sort_by_key(|(message, _)| {
            let head = &heads[&message.recipient];
            Reverse(
                (head.messages / (limits.max_messages / 16).max(1))
                    .max(head.bytes / (limits.max_bytes / 16).max(1)),
            )
        });
        let uninspected = due.split_off(INSPECTED);
        payloads = free_ids(connection, heads, messages, &uninspected, limits).await?;
    }
    let mut rows = SWEEP;
    for (message, now) in due {
        let head = heads.get_mut(&message.recipient).expect("found above");
        let ids = messages.iter().filter(|other| other.recipient == message.recipient);
        let ids = ids.filter_map(|other| {
            Some((&other.sender.as_bytes()[..], &other.message_id.as_ref()?.as_bytes()[..]))
        });
        let has_devices = head.devices.is_some();
        let due = Due { inbox: head.id, has_devices, now, rows, ids: ids.collect() };
        let remaining = remove::expired(connection, due, limits.recent_ids).await?;
        rows = (rows - remaining.removed).max(0);
        (head.messages, head.bytes, head.next_expiry) =
            (remaining.messages, remaining.bytes, remaining.next_expiry);
        head.expired = remaining.expired;
        payloads.extend(remaining.payloads);
    }
    payloads::count_down(connection, &payloads).await
}

/// Removes the expired messages of these inboxes whose ids are used again. Returns the payloads to
/// count down.
async fn free_ids(
    connection: &mut PgConnection,
    heads: &mut HashMap<IdentityKey, Head>,
    messages: &[NewMessage],
    due: &[(&NewMessage, UnixMillis)],
    limits: &DeliveryLimits,
) -> sqlx::Result<Vec<i64>> {
    let due: HashMap<_, _> = due.iter().map(|(message, now)| (message.recipient, *now)).collect();
    let ids: Vec<DueId<'_>> = messages
        .iter()
        .filter_map(|message| {
            Some(DueId {
                now: *due.get(&message.recipient)?,
                id: message.message_id.as_ref()?.as_bytes(),
                inbox: heads[&message.recipient].id,
                sender: message.sender.as_bytes(),
            })
        })
        .collect();
    if ids.is_empty() {
        return Ok(Vec::new());
    }
    let mut removed = remove::expired_ids(connection, &ids, limits.recent_ids).await?;
    if removed.is_empty() {
        return Ok(Vec::new());
    }
    let mut payloads = Vec::new();
    for head in heads.values_mut() {
        if let Some(freed) = removed.remove(&head.id) {
            head.messages = head.messages.saturating_sub(freed.messages);
            head.bytes = head.bytes.saturating_sub(freed.bytes);
            payloads.extend(freed.payloads);
        }
    }
    Ok(payloads)
}

/// Counts the senders' messages in inboxes that are more than half full.
pub(super) async fn look_up_senders(
    connection: &mut PgConnection,
    heads: &mut HashMap<IdentityKey, Head>,
    messages: &[NewMessage],
    bounds: &[Bounds],
    known: &HashMap<usize, Receipt>,
    limits: &DeliveryLimits,
) -> sqlx::Result<()> {
    let mut seen = HashSet::new();
    let mut pairs: Vec<SenderInInbox> = Vec::new();
    for (n, (message, bounds)) in messages.iter().zip(bounds).enumerate() {
        let Some(head) = heads.get(&message.recipient) else { continue };
        let (count, bytes) = head.counts();
        if !known.contains_key(&n)
            && limits.limits_senders(count, bytes)
            && limits.has_room(count, bytes, message.payload.len() as u64)
            && seen.insert((message.recipient, message.sender))
        {
            let (recipient, sender) = (message.recipient, message.sender);
            pairs.push(SenderInInbox { recipient, inbox: head.id, sender, now: bounds.agreed });
        }
    }
    let mut counted: HashMap<IdentityKey, u64> = HashMap::new();
    let mut rest = &pairs[..];
    while !rest.is_empty() {
        let next;
        (next, rest) = rest.split_at(rest.len().min(LOOKED_UP));
        let (within, beyond): (Vec<SenderInInbox>, Vec<SenderInInbox>) =
            next.iter().partition(|pair| counted.get(&pair.sender).is_none_or(|n| *n < COUNTED));
        let found = sender_counts(connection, &within, limits).await?;
        for (pair, (messages, bytes)) in within.iter().zip(found) {
            *counted.entry(pair.sender).or_default() += messages;
            let head = heads.get_mut(&pair.recipient).expect("found above");
            head.sender_counts.insert(pair.sender, (messages, bytes));
        }
        for pair in beyond {
            let head = heads.get_mut(&pair.recipient).expect("found above");
            head.sender_counts.insert(pair.sender, (limits.sender_messages(), 0));
        }
    }
    Ok(())
}

/// A sender and an inbox whose head is locked.
#[derive(Clone, Copy, Debug)]
pub(super) struct SenderInInbox {
    pub(super) recipient: IdentityKey,
    pub(super) inbox: i64,
    pub(super) sender: IdentityKey,
    pub(super) now: UnixMillis,
}

/// Returns the number and the bytes of the senders' messages in the inboxes. The number is exact
/// below the sender's share of messages, and at least that share otherwise.
pub(super) async fn sender_counts(
    connection: &mut PgConnection,
    pairs: &[SenderInInbox],
    limits: &DeliveryLimits,
) -> sqlx::Result<Vec<(u64, u64)>> {
    if pairs.is_empty() {
        return Ok(Vec::new());
    }
    let senders: Vec<&[u8]> = pairs.iter().map(|pair| &pair.sender.as_bytes()[..]).collect();
    let rows = sqlx::query(SENDER_COUNTS)
        .bind(pairs.iter().map(|pair| pair.inbox).collect::<Vec<_>>())
        .bind(senders)
        .bind(pairs.iter().map(|pair| millis(pair.now)).collect::<Vec<_>>())
        .bind(number(limits.sender_messages()))
        .fetch_all(connection)
        .await?;
    rows.iter().map(|row| Ok((row.unsigned("messages")?, row.unsigned("bytes")?))).collect()
}
