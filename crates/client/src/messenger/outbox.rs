//! What is still to be sent. An item is put here, and saved, together with the encryption state
//! that made it; it goes once the server has it for everyone. A crash in between sends the same
//! bytes under the same message id again, which the server recognizes.

use std::collections::VecDeque;

use qpq_domain::{ChannelId, IdentityKey, MessageId, UnixMillis};
use qpq_mls::Parcel;
use rand::{RngCore as _, rngs::OsRng};

use super::log::EntryId;

/// One ciphertext for some recipients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Outgoing {
    pub(crate) message_id: MessageId,
    /// Those for whom the server does not have it yet.
    pub(crate) recipients: Vec<IdentityKey>,
    pub(crate) channel: ChannelId,
    pub(crate) payload: Vec<u8>,
    /// The message of ours that it is; `None` for what MLS itself has to say.
    pub(crate) entry: Option<EntryId>,
}

/// The queue, oldest first.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Outbox(VecDeque<Outgoing>);

/// What the server said about one recipient of an item.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It has it, durably.
    Accepted,
    /// Not now: the recipient's inbox is full, or the like.
    Later,
    /// Never.
    Refused(String),
}

/// What is to be told about an item after the server's answer.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Settled {
    pub(crate) entry: Option<EntryId>,
    /// Those who will never get it, and why.
    pub(crate) refused: Vec<(IdentityKey, String)>,
    /// Whether nobody is left to send it to.
    pub(crate) done: bool,
}

impl Outbox {
    pub(crate) fn push(&mut self, parcel: Parcel, entry: Option<EntryId>, now: UnixMillis) {
        let Parcel { recipients, channel, payload } = parcel;
        self.restore(Outgoing {
            message_id: fresh_message_id(now),
            recipients,
            channel,
            payload,
            entry,
        });
    }

    /// Puts back an item that was saved.
    pub(crate) fn restore(&mut self, item: Outgoing) {
        self.0.push_back(item);
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Outgoing> {
        self.0.iter()
    }

    /// What is in it, oldest first.
    pub(crate) fn ids(&self) -> Vec<MessageId> {
        self.0.iter().map(|item| item.message_id).collect()
    }

    /// What is in it up to a message of ours; nothing if that is not.
    pub(crate) fn ids_until(&self, entry: EntryId) -> Vec<MessageId> {
        let last = self.0.iter().position(|item| item.entry == Some(entry));
        self.0.iter().take(last.map_or(0, |last| last + 1)).map(|item| item.message_id).collect()
    }

    pub(crate) fn get(&self, id: MessageId) -> Option<&Outgoing> {
        self.0.iter().find(|item| item.message_id == id)
    }

    /// Takes in what the server said about the recipients of an item, in their order.
    pub(crate) fn settle(&mut self, id: MessageId, verdicts: &[(IdentityKey, Verdict)]) -> Settled {
        let Some(place) = self.0.iter().position(|item| item.message_id == id) else {
            return Settled::default();
        };
        let item = &mut self.0[place];
        let mut settled = Settled { entry: item.entry, ..Settled::default() };
        for (recipient, verdict) in verdicts {
            if let Verdict::Refused(reason) = verdict {
                settled.refused.push((*recipient, reason.clone()));
            }
            if *verdict != Verdict::Later {
                item.recipients.retain(|left| left != recipient);
            }
        }
        if item.recipients.is_empty() {
            settled.done = true;
            self.0.remove(place);
        }
        settled
    }
}

/// A fresh message id: a UUIDv7 (RFC 9562 §5.7), the time in milliseconds and 74 random bits.
pub(crate) fn fresh_message_id(now: UnixMillis) -> MessageId {
    let mut id = [0; MessageId::LEN];
    OsRng.fill_bytes(&mut id);
    id[..6].copy_from_slice(&now.0.to_be_bytes()[2..]);
    id[6] = 0x70 | id[6] & 0x0f;
    id[8] = 0x80 | id[8] & 0x3f;
    MessageId::new(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_id_is_a_uuid_v7_of_its_time() {
        let id = fresh_message_id(UnixMillis(0x0123_4567_89ab));
        let text = id.to_string();
        assert_eq!(&text[..13], "0123456789ab7");
        assert!(matches!(&text[16..17], "8" | "9" | "a" | "b"), "{text}");
        assert_ne!(id, fresh_message_id(UnixMillis(0x0123_4567_89ab)));
    }

    #[test]
    fn an_item_stays_for_those_who_do_not_have_it_under_the_same_id() {
        let people = [1, 2, 3].map(|n| IdentityKey::new([n; 32]));
        let mut outbox = Outbox::default();
        let parcel = Parcel {
            recipients: people.to_vec(),
            channel: ChannelId::new([9; 16]),
            payload: vec![7; 3],
        };
        outbox.push(parcel.clone(), Some(EntryId(4)), UnixMillis(1));
        outbox.push(parcel, None, UnixMillis(2));
        let [first, second] = outbox.ids()[..] else { panic!("two were put in") };

        let verdicts = [
            (people[0], Verdict::Accepted),
            (people[1], Verdict::Later),
            (people[2], Verdict::Refused("gone".into())),
        ];
        let settled = outbox.settle(first, &verdicts);
        assert_eq!(settled.refused, [(people[2], "gone".to_owned())]);
        assert!(!settled.done);
        assert_eq!(outbox.get(first).unwrap().recipients, people[1..2]);
        assert_eq!(outbox.ids(), [first, second]);
        assert_eq!(outbox.ids_until(EntryId(4)), [first]);
        assert_eq!(outbox.ids_until(EntryId(5)), []);

        let settled = outbox.settle(first, &[(people[1], Verdict::Accepted)]);
        assert_eq!((settled.entry, settled.done), (Some(EntryId(4)), true));
        assert_eq!((outbox.ids(), outbox.get(first)), (vec![second], None));
    }
}
