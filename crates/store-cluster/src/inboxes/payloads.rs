//! Payloads of messages: in the row of the message, or stored once for the messages that share it.
//!
//! A payload that is stored once counts its messages, and is removed with the last of them.
//! Removals lock the payloads in the order of their numbers and after all heads. A transaction with
//! several removals therefore counts down once, after the last of them.

use std::collections::HashMap;

use qpq_ports::NewMessage;
use sqlx::PgConnection;

use crate::postgres::{ClusterMark, row::number};

/// The minimum size of a payload that is stored once. Measured for 1 000 inboxes
/// (docs/decisions/0008): a payload of 1 KiB that is stored once writes 43 % of the log that a copy
/// in each row writes, one of 256 bytes 76 %. This size is between the two, since a payload that is
/// stored once costs a lock and a probe with each removal.
const SHARED_BYTES: usize = 512;

/// The minimum number of messages that share a payload that is stored once. The row and the index
/// entry of such a payload write about as much log as three copies of the minimum size.
const SHARED_MESSAGES: usize = 4;

/// The size of the payload of a message `m`. Reads no payload.
macro_rules! size {
    () => {
        "coalesce(m.size, octet_length(m.payload))"
    };
}
pub(super) use size;

/// The payload of a message `m`.
macro_rules! payload {
    () => {
        "coalesce(m.payload, (SELECT p.bytes FROM payload p WHERE p.id = m.payload_id))"
    };
}
pub(super) use payload;

/// Common table expressions that count down the payloads of the rows of `removed`, and remove those
/// without messages. `shared` reads the counts after it has locked the rows.
macro_rules! counted_down {
    () => {
        ", shared AS MATERIALIZED (
            SELECT p.id, p.refs, g.n
              FROM payload p
              JOIN (SELECT payload_id, count(*)::int AS n FROM removed
                     WHERE payload_id IS NOT NULL GROUP BY payload_id) g ON g.payload_id = p.id
             ORDER BY p.id FOR NO KEY UPDATE OF p),
        counted_down AS (
            UPDATE payload p SET refs = s.refs - s.n FROM shared s
             WHERE p.id = s.id AND s.refs > s.n),
        freed AS (DELETE FROM payload p USING shared s WHERE p.id = s.id AND s.refs <= s.n) "
    };
}
pub(super) use counted_down;

/// See [`counted_down!`].
pub(crate) const COUNTED_DOWN: &str = counted_down!();

/// $1: the payload of each message that was removed.
const COUNT_DOWN: &str = concat!(
    "WITH removed AS (SELECT * FROM unnest($1::int8[]) AS g (payload_id))",
    counted_down!(),
    "SELECT 1"
);

/// Stores payloads. Their numbers are assigned in the order of the places.
const STORE: &str = "
    INSERT INTO payload (refs, bytes)
    SELECT s.refs, s.bytes
      FROM unnest($1::int4[], $2::bytea[]) WITH ORDINALITY AS s (refs, bytes, place)
     ORDER BY s.place RETURNING id";

/// The distinct payloads of messages.
pub(super) struct Payloads<'a> {
    all: Vec<Payload<'a>>,
    /// The place of each message's payload in `all`, from 1.
    pub(super) places: Vec<i64>,
}

struct Payload<'a> {
    bytes: &'a [u8],
    messages: usize,
    /// The number of the payload, if it is stored once.
    id: Option<i64>,
}

impl<'a> Payloads<'a> {
    /// Collects the distinct payloads. Two messages share a payload if they share its memory, as in
    /// a fan-out.
    pub(super) fn of(messages: impl IntoIterator<Item = &'a NewMessage>) -> Self {
        let (mut all, mut places): (Vec<Payload<'a>>, _) = (Vec::new(), Vec::new());
        let mut known = HashMap::new();
        for message in messages {
            let bytes = &message.payload[..];
            let place = *known.entry((bytes.as_ptr(), bytes.len())).or_insert_with(|| {
                all.push(Payload { bytes, messages: 0, id: None });
                all.len()
            });
            all[place - 1].messages += 1;
            places.push(number(place as u64));
        }
        Self { all, places }
    }

    pub(super) fn are_shared(&self) -> bool {
        self.all.len() < self.places.len()
    }

    /// Stores the payloads that enough messages share, each once, if all edges can read such
    /// payloads.
    pub(super) async fn store(
        &mut self,
        connection: &mut PgConnection,
        mark: &ClusterMark,
    ) -> sqlx::Result<()> {
        let mut shared: Vec<_> = self.all.iter_mut().filter(|one| one.is_worth_a_row()).collect();
        if shared.is_empty() || !mark.is_set(connection).await? {
            return Ok(());
        }
        let refs = shared.iter().map(|payload| i32::try_from(payload.messages).unwrap_or(i32::MAX));
        let mut ids: Vec<i64> = sqlx::query_scalar(STORE)
            .bind(refs.collect::<Vec<_>>())
            .bind(shared.iter().map(|payload| payload.bytes).collect::<Vec<_>>())
            .fetch_all(connection)
            .await?;
        ids.sort_unstable();
        for (payload, id) in shared.iter_mut().zip(ids) {
            payload.id = Some(id);
        }
        Ok(())
    }

    /// Returns the payloads that are in the rows of their messages.
    pub(super) fn in_rows(&self) -> Vec<Option<&'a [u8]>> {
        self.all.iter().map(|payload| payload.id.is_none().then_some(payload.bytes)).collect()
    }

    /// Returns the numbers of the payloads that are stored once.
    pub(super) fn ids(&self) -> Vec<Option<i64>> {
        self.all.iter().map(|payload| payload.id).collect()
    }

    /// Returns the sizes of the payloads that are stored once.
    pub(super) fn sizes(&self) -> Vec<Option<i32>> {
        let size = |payload: &Payload<'_>| i32::try_from(payload.bytes.len()).unwrap_or(i32::MAX);
        self.all.iter().map(|payload| payload.id.map(|_| size(payload))).collect()
    }
}

impl Payload<'_> {
    const fn is_worth_a_row(&self) -> bool {
        self.bytes.len() >= SHARED_BYTES && self.messages >= SHARED_MESSAGES
    }
}

/// Counts down the payloads of messages that were removed. `of_each` may name a payload several
/// times.
pub(super) async fn count_down(connection: &mut PgConnection, of_each: &[i64]) -> sqlx::Result<()> {
    if of_each.is_empty() {
        return Ok(());
    }
    sqlx::query(COUNT_DOWN).bind(of_each).execute(connection).await.map(drop)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;
    use qpq_domain::{ChannelId, IdentityKey, UnixMillis};

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

    #[test]
    fn a_payload_has_a_row_from_512_bytes_and_four_messages_on() {
        for (size, messages, has_row) in
            [(511, 4, false), (512, 3, false), (512, 4, true), (1 << 20, 1, false)]
        {
            let payload = Bytes::from(vec![1; size]);
            let messages: Vec<_> = (0..messages).map(|_| message(payload.clone())).collect();
            assert_eq!(Payloads::of(&messages).all[0].is_worth_a_row(), has_row, "{size} bytes");
        }
    }
}
