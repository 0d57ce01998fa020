//! Pages of messages: how much fits an answer, and how an inbox's envelopes go onto the wire.

use bytes::Bytes;
use qpq_domain::StoreId;
use qpq_ports::{Page, PageLimit};
use qpq_proto::{convert, v1};

use crate::{Caller, Cx, Error, answers::Reservation};

/// What an answer may have at most (protocol §1).
const MAX_RESPONSE: usize = qpq_wire::MAX_PAYLOAD as usize;

/// What the envelopes of one answer may cost together; the rest is for `more` and the store id.
const MAX_PAGE: usize = MAX_RESPONSE - 32;

/// The largest payload that can be read again: alone in a page. Whatever the configuration says,
/// nothing larger is taken.
pub(super) const MAX_PAYLOAD: usize = MAX_PAGE - 64;

/// What the answer takes beyond its envelopes: `more`, `store_id`.
const AROUND: usize = MAX_RESPONSE - MAX_PAGE;

/// A page and the memory that is reserved for its answer.
pub(super) struct Room {
    pub(super) limit: PageLimit,
    pub(super) memory: Reservation,
}

/// Room for as much of `wanted` as there is memory for, and at least for the largest message that
/// the server accepts.
pub(super) async fn room(cx: Cx<'_>, caller: &Caller, wanted: PageLimit) -> Result<Room, Error> {
    let largest_message = cx.app.config.delivery.max_payload.min(MAX_PAYLOAD) + 64;
    let (least, most) = (largest_message + AROUND, wanted.bytes + AROUND);
    let bytes = cx.app.answers.page(cx, caller.account, least, most);
    let memory = cx.app.answers.reserve(cx, Some(caller.account), bytes).await?;
    Ok(Room { limit: PageLimit { bytes: bytes - AROUND, ..wanted }, memory })
}

/// Room for a page that did not fit: its first message is larger than the server accepts now.
pub(super) async fn full_room(
    cx: Cx<'_>,
    caller: &Caller,
    wanted: PageLimit,
) -> Result<Room, Error> {
    let memory = cx.app.answers.reserve(cx, Some(caller.account), wanted.bytes + AROUND).await?;
    Ok(Room { limit: wanted, memory })
}

impl Room {
    /// Whether `page` has room, and returns what it does not need.
    pub(super) fn fits(&mut self, page: &Page) -> bool {
        let bytes = page.envelopes.iter().map(qpq_ports::Envelope::cost).sum::<usize>() + AROUND;
        let fits = bytes <= self.memory.bytes();
        if fits {
            self.memory.shrink(bytes);
        }
        fits
    }
}

/// The most messages of one answer, whatever the client asks for.
const MAX_MESSAGES: u32 = 1_000;

/// Messages, and bytes, that cost as much as a call.
const MESSAGES_PER_CALL: usize = 100;
const BYTES_PER_CALL: usize = 256 << 10;

/// The page for a wire `limit`: 0 is all that fits.
pub(super) fn limit(limit: u32) -> PageLimit {
    let messages = convert::limit(limit).map_or(MAX_MESSAGES, u32::from).min(MAX_MESSAGES);
    PageLimit { messages, bytes: MAX_PAGE }
}

/// What showing these cost beyond the call, in calls.
pub(super) fn cost(page: &Page) -> u32 {
    let bytes: usize = page.envelopes.iter().map(qpq_ports::Envelope::cost).sum();
    calls(page.envelopes.len())
        .saturating_add(u32::try_from(bytes / BYTES_PER_CALL).unwrap_or(u32::MAX))
}

/// What handling so many messages costs beyond the call, in calls.
pub(super) fn calls(messages: usize) -> u32 {
    u32::try_from(messages / MESSAGES_PER_CALL).unwrap_or(u32::MAX)
}

/// Returns the store id as an answer carries it.
pub(super) fn store_id(id: &StoreId) -> Bytes {
    Bytes::copy_from_slice(id.as_bytes())
}

/// The envelopes as the answer carries them. The payloads are shared, not copied.
pub(super) fn envelopes(page: &Page) -> Vec<v1::Envelope> {
    let envelope = |envelope: &qpq_ports::Envelope| v1::Envelope {
        seq: envelope.seq.0,
        data: envelope.payload.clone(),
        channel_id: Bytes::copy_from_slice(envelope.channel.as_bytes()),
        enqueued_at: envelope.enqueued_at.0,
        origin: String::new(),
    };
    page.envelopes.iter().map(envelope).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use prost::Message as _;
    use qpq_domain::{ChannelId, Seq, UnixMillis};
    use qpq_ports::Envelope;

    use super::*;

    fn largest(payload_len: usize) -> Envelope {
        Envelope {
            seq: Seq(u64::MAX),
            channel: ChannelId::new([0xff; 16]),
            payload: vec![0; payload_len].into(),
            enqueued_at: UnixMillis(u64::MAX),
        }
    }

    fn encoded_len(envelopes: Vec<Envelope>) -> usize {
        let page = Page { store_id: StoreId::new([0xff; 16]), envelopes, more: true };
        v1::FetchResponse {
            payloads: super::envelopes(&page),
            more: page.more,
            store_id: super::store_id(&page.store_id),
        }
        .encoded_len()
    }

    #[test]
    fn the_largest_payload_fits_one_answer() {
        assert!(encoded_len(vec![largest(MAX_PAYLOAD)]) <= MAX_RESPONSE);
    }

    #[test]
    fn as_many_messages_as_a_page_costs_fit_one_answer() {
        for payload_len in [0, 1, 63, 64, 1_000, 1 << 20] {
            let envelope = largest(payload_len);
            let count = MAX_PAGE / envelope.cost();
            assert!(encoded_len(vec![envelope; count]) <= MAX_RESPONSE, "{count} of {payload_len}");
        }
    }

    proptest! {
        #[test]
        fn an_envelope_never_takes_more_than_its_cost(payload_len in 0_usize..70_000) {
            let envelope = largest(payload_len);
            let (one, two) = (encoded_len(vec![envelope.clone()]), encoded_len(vec![envelope.clone(); 2]));
            prop_assert!(two - one <= envelope.cost());
        }
    }

    #[test]
    fn no_page_has_more_than_a_thousand_messages() {
        assert_eq!(limit(0).messages, 1_000);
        assert_eq!(limit(u32::MAX).messages, 1_000);
        assert_eq!(limit(1).messages, 1);
    }

    #[test]
    fn a_page_costs_by_messages_and_by_bytes() {
        let cost_of = |count, payload_len| {
            let envelopes = vec![largest(payload_len); count];
            cost(&Page { store_id: StoreId::new([0; 16]), envelopes, more: false })
        };
        assert_eq!(cost_of(99, 0), 0);
        assert_eq!(cost_of(1_000, 0), 10);
        assert_eq!(cost_of(4, (256 << 10) - 64), 4);
    }
}
