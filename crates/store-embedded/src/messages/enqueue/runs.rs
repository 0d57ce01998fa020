//! Runs: consecutive messages that refer to one stored payload, or that have payloads of their own.

use super::Timed;

/// The minimum number of messages with one payload, and the minimum size of the payload in bytes,
/// for the payload to be stored once.
///
/// The rule is that of `docs/decisions/0008`. Measured for 1 000 recipients: with a payload of 256
/// bytes, both ways cost the same. With a payload of 1 KiB, storing it once saves a quarter of the
/// CPU time and half of the written bytes for each recipient.
const MIN_SHARING: usize = 4;
const MIN_BYTES: usize = 512;

/// The saved bytes from which on a payload with fewer messages is stored once as well.
const MIN_BYTES_SAVED: usize = 16 << 10;

/// The payloads of the rows of a statement: one for each row, or one for all rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Payloads {
    Own,
    Shared,
}

/// Returns the length and the kind of the run at the beginning of `messages`.
pub(super) fn next_run(messages: &[Timed<'_>]) -> (usize, Payloads) {
    let sharing = sharing(messages);
    if is_stored_once(&messages[..sharing]) {
        return (sharing, Payloads::Shared);
    }
    let mut own = sharing;
    while own < messages.len() {
        let sharing = self::sharing(&messages[own..]);
        if is_stored_once(&messages[own..own + sharing]) {
            break;
        }
        own += sharing;
    }
    (own, Payloads::Own)
}

/// Returns the number of messages at the beginning that have the payload of the first one.
fn sharing(messages: &[Timed<'_>]) -> usize {
    let payload = |timed: &Timed<'_>| {
        let payload = &timed.message.payload;
        (payload.as_ptr(), payload.len())
    };
    messages.iter().take_while(|timed| payload(timed) == payload(&messages[0])).count()
}

fn is_stored_once(sharing: &[Timed<'_>]) -> bool {
    let bytes = sharing[0].message.payload.len();
    let saved = (sharing.len() - 1) * bytes;
    bytes >= MIN_BYTES && (sharing.len() >= MIN_SHARING || saved >= MIN_BYTES_SAVED)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;
    use qpq_domain::{ChannelId, IdentityKey, UnixMillis};
    use qpq_ports::NewMessage;

    use super::*;
    use crate::clock::Bounds;

    fn message(payload: &Bytes) -> NewMessage {
        NewMessage {
            sender: IdentityKey::new([1; 32]),
            recipient: IdentityKey::new([2; 32]),
            channel: ChannelId::DEFAULT,
            payload: payload.clone(),
            payload_sha256: [0; 32],
            message_id: None,
            now: UnixMillis(0),
            ttl: Duration::ZERO,
        }
    }

    const BOUNDS: Bounds = Bounds { earliest: UnixMillis(0), latest: UnixMillis(0) };

    /// Returns the messages of each run, and whether they share a stored payload.
    fn runs(payloads: &[&Bytes]) -> Vec<(usize, bool)> {
        let messages: Vec<_> = payloads.iter().map(|payload| message(payload)).collect();
        let messages: Vec<_> =
            messages.iter().map(|message| Timed { message, bounds: BOUNDS }).collect();
        let (mut rest, mut runs) = (&messages[..], Vec::new());
        while !rest.is_empty() {
            let (number, payloads) = next_run(rest);
            runs.push((number, payloads == Payloads::Shared));
            rest = &rest[number..];
        }
        runs
    }

    #[test]
    fn a_payload_is_stored_once_from_512_bytes_and_four_messages_on() {
        let [small, enough] = [511, 512].map(|size| Bytes::from(vec![0; size]));
        let equal = Bytes::from(vec![0; 512]);
        assert_eq!(runs(&[&small; 40]), [(40, false)]);
        assert_eq!(runs(&[&enough; 40]), [(40, true)]);
        assert_eq!(runs(&[&enough; 4]), [(4, true)]);
        assert_eq!(runs(&[&enough; 3]), [(3, false)]);
        let mixed =
            [&small, &enough, &enough, &small, &small, &enough, &enough, &enough, &enough, &equal];
        assert_eq!(runs(&mixed), [(5, false), (4, true), (1, false)]);
    }

    #[test]
    fn a_large_payload_is_stored_once_for_two_messages() {
        let large = Bytes::from(vec![0; MIN_BYTES_SAVED]);
        let others: Vec<_> = (0..40).map(|_| Bytes::from(vec![0; MIN_BYTES_SAVED])).collect();
        let own: Vec<_> = others.iter().collect();
        assert_eq!(runs(&own), [(40, false)]);
        assert_eq!(runs(&[&large]), [(1, false)]);
        assert_eq!(runs(&[&large, &large]), [(2, true)]);
        let mixed = [own[0], &large, &large, &large, own[1], own[2]];
        assert_eq!(runs(&mixed), [(1, false), (3, true), (2, false)]);
    }
}
