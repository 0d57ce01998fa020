//! The result of a message to a group. Stores keep the encoded result of an accepted commit, to
//! answer a repeat of the commit.
//!
//! A transfer moves the bytes to a store of another kind and does not interpret them, so every
//! store uses this encoding. Integers are big-endian.
//!
//! | content | bytes |
//! |---|---|
//! | version | u8: 1 |
//! | recipients | u8: 0 all members, 1 listed |
//! | the number of recipients | u32 |
//! | all members: the number of skipped members | u32 |
//! | listed: the time of the first accepted message | u64, milliseconds; 0 if none was accepted |
//! | listed: the SHA-256 of that message's payload | 32; zeros if none was accepted |
//! | listed: for each recipient, the outcome | u8 and its fields, as follows |
//! | 0: a message of the group with that time and hash | u64: seq |
//! | 1: another message | u64: seq, u64: time, 32: SHA-256, u8: length of the channel, channel |
//! | 2: no such recipient; 3: queue full; 4: sender share; 5: refused | |

use qpq_domain::{ChannelId, Seq, UnixMillis};

use super::{GroupMessage, GroupRecipients, GroupSent};
use crate::{Enqueued, Receipt};

const VERSION: u8 = 1;

const MEMBERS: u8 = 0;
const LISTED: u8 = 1;

const SAME: u8 = 0;
const OTHER: u8 = 1;
const NO_SUCH_RECIPIENT: u8 = 2;
const QUEUE_FULL: u8 = 3;
const SENDER_SHARE: u8 = 4;
const REFUSED: u8 = 5;

impl GroupSent {
    /// Returns the result of a message that was accepted in `epoch` with this outcome for each
    /// recipient.
    pub fn new(message: &GroupMessage, epoch: u64, outcomes: Vec<Enqueued>) -> Self {
        let is_duplicate = |outcome: &Enqueued| matches!(outcome, Enqueued::Duplicate(_));
        let is_repeat =
            message.commit.is_none() && !outcomes.is_empty() && outcomes.iter().all(is_duplicate);
        let sent = Self { epoch, recipients: count(&outcomes), outcomes, skipped: 0, is_repeat };
        if let GroupRecipients::Listed(_) = message.recipients {
            return sent;
        }
        let is_skipped = |outcome: &&Enqueued| {
            matches!(outcome, Enqueued::Refused | Enqueued::QueueFull | Enqueued::SenderShare)
        };
        let skipped: Vec<_> = sent.outcomes.iter().filter(is_skipped).collect();
        Self { skipped: count(&skipped), outcomes: Vec::new(), ..sent }
    }

    /// Encodes the result of the commit `message`, without the epoch.
    pub fn encode(&self, message: &GroupMessage) -> Vec<u8> {
        match message.recipients {
            GroupRecipients::Listed(_) => encode_listed(&self.outcomes, message.channel()),
            GroupRecipients::Others | GroupRecipients::All => {
                encode_members(self.recipients, self.skipped)
            }
        }
    }

    /// Decodes the result of a commit in `channel` that led to `epoch`, for a repeat of the commit.
    /// `None` if the bytes are malformed.
    ///
    /// The outcome of each recipient that has the message is [`Enqueued::Duplicate`].
    pub fn decode(bytes: &[u8], channel: ChannelId, epoch: u64) -> Option<Self> {
        let (recipients, outcomes, skipped) = match decode(bytes, channel)? {
            Outcome::Listed(outcomes) => (count(&outcomes), outcomes, 0),
            Outcome::Members { recipients, skipped } => (recipients, Vec::new(), skipped),
        };
        Some(Self { epoch, recipients, outcomes, skipped, is_repeat: true })
    }
}

fn count<T>(items: &[T]) -> u32 {
    u32::try_from(items.len()).unwrap_or(u32::MAX)
}

/// The result of an accepted commit, without its epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Outcome {
    /// The outcomes of listed recipients.
    Listed(Vec<Enqueued>),
    /// The numbers of all members and of the skipped ones.
    Members { recipients: u32, skipped: u32 },
}

/// Encodes the result for all members.
fn encode_members(recipients: u32, skipped: u32) -> Vec<u8> {
    let mut bytes = vec![VERSION, MEMBERS];
    bytes.extend(recipients.to_be_bytes());
    bytes.extend(skipped.to_be_bytes());
    bytes
}

/// Encodes the result for listed recipients of a message in `channel`.
fn encode_listed(outcomes: &[Enqueued], channel: ChannelId) -> Vec<u8> {
    let first = outcomes.iter().find_map(|outcome| match outcome {
        Enqueued::Accepted(receipt) => Some(*receipt),
        _ => None,
    });
    let (at, hash) =
        first.map_or_else(Default::default, |first| (first.enqueued_at, first.payload_sha256));
    let mut bytes = Vec::with_capacity(64 + outcomes.len() * 9);
    bytes.extend([VERSION, LISTED]);
    bytes.extend(u32::try_from(outcomes.len()).unwrap_or(u32::MAX).to_be_bytes());
    bytes.extend(at.0.to_be_bytes());
    bytes.extend(hash);
    for outcome in outcomes {
        match outcome {
            Enqueued::Accepted(receipt) | Enqueued::Duplicate(receipt) => {
                let Receipt { seq, channel: of_receipt, payload_sha256, enqueued_at } = receipt;
                let is_same = (*of_receipt, *payload_sha256, *enqueued_at) == (channel, hash, at);
                bytes.push(if is_same { SAME } else { OTHER });
                bytes.extend(seq.0.to_be_bytes());
                if !is_same {
                    bytes.extend(enqueued_at.0.to_be_bytes());
                    bytes.extend(payload_sha256);
                    let of_receipt = of_receipt.as_bytes();
                    bytes.push(u8::try_from(of_receipt.len()).expect("at most 16 bytes"));
                    bytes.extend(of_receipt);
                }
            }
            Enqueued::NoSuchRecipient => bytes.push(NO_SUCH_RECIPIENT),
            Enqueued::Refused => bytes.push(REFUSED),
            Enqueued::QueueFull => bytes.push(QUEUE_FULL),
            Enqueued::SenderShare => bytes.push(SENDER_SHARE),
        }
    }
    bytes
}

/// Decodes the result of a message in `channel`. `None` if the bytes are malformed.
fn decode(mut bytes: &[u8], channel: ChannelId) -> Option<Outcome> {
    let bytes = &mut bytes;
    if take(bytes)? != [VERSION] {
        return None;
    }
    let [recipients] = take(bytes)?;
    let number = u32::from_be_bytes(take(bytes)?);
    let outcome = match recipients {
        MEMBERS => {
            Outcome::Members { recipients: number, skipped: u32::from_be_bytes(take(bytes)?) }
        }
        LISTED => {
            let first = Receipt {
                seq: Seq::ZERO,
                channel,
                enqueued_at: UnixMillis(u64::from_be_bytes(take(bytes)?)),
                payload_sha256: take(bytes)?,
            };
            let outcomes = (0..number).map(|_| decode_one(bytes, &first));
            Outcome::Listed(outcomes.collect::<Option<_>>()?)
        }
        _ => return None,
    };
    bytes.is_empty().then_some(outcome)
}

fn decode_one(bytes: &mut &[u8], first: &Receipt) -> Option<Enqueued> {
    let [kind] = take(bytes)?;
    Some(match kind {
        SAME => {
            let seq = Seq(u64::from_be_bytes(take(bytes)?));
            Enqueued::Duplicate(Receipt { seq, ..*first })
        }
        OTHER => {
            let seq = Seq(u64::from_be_bytes(take(bytes)?));
            let enqueued_at = UnixMillis(u64::from_be_bytes(take(bytes)?));
            let payload_sha256 = take(bytes)?;
            let [length] = take(bytes)?;
            let (channel, rest) = bytes.split_at_checked(length.into())?;
            *bytes = rest;
            let channel = ChannelId::try_from(channel).ok()?;
            Enqueued::Duplicate(Receipt { seq, channel, payload_sha256, enqueued_at })
        }
        NO_SUCH_RECIPIENT => Enqueued::NoSuchRecipient,
        REFUSED => Enqueued::Refused,
        QUEUE_FULL => Enqueued::QueueFull,
        SENDER_SHARE => Enqueued::SenderShare,
        _ => return None,
    })
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (taken, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(*taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GROUP: ChannelId = ChannelId::new([7; 16]);

    fn receipt(seq: u64) -> Receipt {
        let (payload_sha256, enqueued_at) = ([9; 32], UnixMillis(1_000));
        Receipt { seq: Seq(seq), channel: GROUP, payload_sha256, enqueued_at }
    }

    #[test]
    fn each_outcome_is_decoded_as_it_was_and_receipts_as_duplicates() {
        let others = [
            Receipt { enqueued_at: UnixMillis(999), ..receipt(5) },
            Receipt { channel: ChannelId::DEFAULT, ..receipt(6) },
            Receipt { payload_sha256: [8; 32], ..receipt(u64::MAX) },
        ];
        let mut outcomes: Vec<_> = [1, 2, 300].map(receipt).map(Enqueued::Accepted).into();
        outcomes.extend(others.map(Enqueued::Duplicate));
        outcomes.extend([Enqueued::NoSuchRecipient, Enqueued::Refused]);
        outcomes.extend([Enqueued::QueueFull, Enqueued::SenderShare]);
        let expected = outcomes.iter().map(|outcome| match outcome {
            Enqueued::Accepted(receipt) => Enqueued::Duplicate(*receipt),
            other => *other,
        });
        let decoded = decode(&encode_listed(&outcomes, GROUP), GROUP);
        assert_eq!(decoded, Some(Outcome::Listed(expected.collect())));
        for refused in [&[][..], &[Enqueued::QueueFull]] {
            let decoded = decode(&encode_listed(refused, GROUP), GROUP);
            assert_eq!(decoded, Some(Outcome::Listed(refused.to_vec())));
        }
        let members = Outcome::Members { recipients: 70_000, skipped: 3 };
        assert_eq!(decode(&encode_members(70_000, 3), GROUP), Some(members));
    }

    #[test]
    fn a_thousand_accepted_messages_take_nine_bytes_each() {
        let outcomes: Vec<_> = (0..1_000).map(|seq| Enqueued::Accepted(receipt(seq))).collect();
        assert_eq!(encode_listed(&outcomes, GROUP).len(), 46 + 9_000);
    }

    #[test]
    fn truncated_extended_and_unknown_bytes_are_not_decoded_as_an_outcome() {
        let encoded = encode_listed(&[Enqueued::Accepted(receipt(1))], GROUP);
        for length in 0..encoded.len() {
            assert_eq!(decode(&encoded[..length], GROUP), None, "the first {length} bytes");
        }
        let longer = [&encoded[..], &[0]].concat();
        assert_eq!(decode(&longer, GROUP), None);
        let of_another_version = [&[2], &encoded[1..]].concat();
        assert_eq!(decode(&of_another_version, GROUP), None);
        assert_eq!(decode(&[1, 1, 0xff, 0xff, 0xff, 0xff], GROUP), None, "no such number");
    }
}
