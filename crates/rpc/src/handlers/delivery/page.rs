//! Pages of messages: the space in an answer, and envelopes on the wire.

use bytes::Bytes;
use qpq_domain::StoreId;
use qpq_ports::{Page, PageLimit};
use qpq_proto::{convert, v1};
use qpq_wire::MAX_PAYLOAD as MAX_RESPONSE;

use crate::{Caller, Cx, Error, Subject, answers::Reservation};

/// The space for `more` and `store_id` in an answer, in bytes.
const OVERHEAD: usize = 32;

/// The maximum cost of the envelopes of one answer, in bytes.
const MAX_PAGE: usize = MAX_RESPONSE as usize - OVERHEAD;

/// The maximum size of a payload: alone in a page, it fits an answer. A larger one could never be
/// read, so it is refused even if the configuration allows it.
pub(super) const MAX_PAYLOAD: usize = MAX_PAGE - ENVELOPE;

/// The maximum size of an envelope without its payload, in bytes.
const ENVELOPE: usize = 64;

/// The limit of a page, and the memory that is reserved for its answer.
pub(super) struct Space {
    pub(super) limit: PageLimit,
    pub(super) memory: Reservation,
}

/// Reserves space for a page of up to `wanted`, as much as there is memory for, but at least for
/// the largest message that the server accepts.
pub(super) async fn space(cx: Cx<'_>, caller: &Caller, wanted: PageLimit) -> Result<Space, Error> {
    let largest_message = cx.app.config.delivery.max_payload.min(MAX_PAYLOAD) + ENVELOPE;
    let (least, most) = (largest_message + OVERHEAD, wanted.bytes + OVERHEAD);
    let subject = Subject::Account(caller.account).key();
    let bytes = cx.app.answers.page(cx, subject, least, most);
    let memory = cx.app.answers.reserve(cx, Some(subject), bytes).await?;
    Ok(Space { limit: PageLimit { bytes: bytes - OVERHEAD, ..wanted }, memory })
}

/// Reserves space for all of `wanted`: for a page whose first message is larger than the server
/// accepts now, because the configured maximum was reduced.
pub(super) async fn full_space(
    cx: Cx<'_>,
    caller: &Caller,
    wanted: PageLimit,
) -> Result<Space, Error> {
    let subject = Subject::Account(caller.account).key();
    let memory = cx.app.answers.reserve(cx, Some(subject), wanted.bytes + OVERHEAD).await?;
    Ok(Space { limit: wanted, memory })
}

impl Space {
    /// Returns whether `page` fits. If so, frees the surplus of memory.
    pub(super) fn fits(&mut self, page: &Page) -> bool {
        let bytes = page.envelopes.iter().map(qpq_ports::Envelope::cost).sum::<usize>() + OVERHEAD;
        let fits = bytes <= self.memory.bytes();
        if fits {
            self.memory.shrink(bytes);
        }
        fits
    }
}

/// The maximum number of messages of one answer.
const MAX_MESSAGES: u32 = 1_000;

/// The number of messages that costs as much as one call.
const MESSAGES_PER_CALL: usize = 100;
/// The number of bytes that costs as much as one call.
const BYTES_PER_CALL: usize = 256 << 10;

/// Returns the limit of a page for the `limit` of a request, in which 0 means as many messages as
/// fit.
pub(super) fn limit(limit: u32) -> PageLimit {
    let messages = convert::limit(limit).map_or(MAX_MESSAGES, u32::from).min(MAX_MESSAGES);
    PageLimit { messages, bytes: MAX_PAGE }
}

/// Returns the cost of a page in calls, without the call itself.
pub(super) fn cost(page: &Page) -> u32 {
    let bytes: usize = page.envelopes.iter().map(qpq_ports::Envelope::cost).sum();
    calls(page.envelopes.len())
        .saturating_add(u32::try_from(bytes / BYTES_PER_CALL).unwrap_or(u32::MAX))
}

/// Returns the cost of a number of messages in calls, without the call itself.
pub(super) fn calls(messages: usize) -> u32 {
    u32::try_from(messages / MESSAGES_PER_CALL).unwrap_or(u32::MAX)
}

/// Converts a store id for an answer.
pub(super) fn store_id(id: &StoreId) -> Bytes {
    Bytes::copy_from_slice(id.as_bytes())
}

/// Converts the envelopes of a page for an answer. The payloads are shared, not copied.
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
        assert!(encoded_len(vec![largest(MAX_PAYLOAD)]) <= MAX_RESPONSE as usize);
    }

    #[test]
    fn messages_up_to_the_cost_of_a_page_fit_one_answer() {
        for payload_len in [0, 1, 63, 64, 1_000, 1 << 20] {
            let envelope = largest(payload_len);
            let count = MAX_PAGE / envelope.cost();
            assert!(
                encoded_len(vec![envelope; count]) <= MAX_RESPONSE as usize,
                "{count} of {payload_len}"
            );
        }
    }

    proptest! {
        #[test]
        fn an_envelope_is_at_most_as_large_as_its_cost(payload_len in 0_usize..70_000) {
            let envelope = largest(payload_len);
            let one = encoded_len(vec![envelope.clone()]);
            let two = encoded_len(vec![envelope.clone(); 2]);
            prop_assert!(two - one <= envelope.cost());
        }
    }

    #[test]
    fn a_page_has_at_most_a_thousand_messages() {
        assert_eq!(limit(0).messages, 1_000);
        assert_eq!(limit(u32::MAX).messages, 1_000);
        assert_eq!(limit(1).messages, 1);
    }

    #[test]
    fn the_cost_of_a_page_depends_on_its_messages_and_bytes() {
        let cost_of = |count, payload_len| {
            let envelopes = vec![largest(payload_len); count];
            cost(&Page { store_id: StoreId::new([0; 16]), envelopes, more: false })
        };
        assert_eq!(cost_of(99, 0), 0);
        assert_eq!(cost_of(1_000, 0), 10);
        assert_eq!(cost_of(4, (256 << 10) - 64), 4);
    }
}
