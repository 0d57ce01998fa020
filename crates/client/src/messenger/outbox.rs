//! The ciphertexts that the server does not have yet. An item is stored in the transaction that
//! stores the encryption state after it, and is removed once the server has it for all recipients.
//! After a crash in between, the same bytes are sent again under the same message id, which the
//! server recognizes.

use qpq_domain::{ChannelId, IdentityKey, MessageId, UnixMillis};
use qpq_mls::{
    Parcel,
    database::{Database, DatabaseError, NewItem},
};
use rand::{RngCore as _, rngs::OsRng};

use super::{
    log::EntryId,
    records::{SavedOutgoing, decode, encode},
    tables::OUTBOX,
};

/// One ciphertext for some recipients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Outgoing {
    pub(crate) message_id: MessageId,
    /// The recipients for which the server does not have the item yet.
    pub(crate) recipients: Vec<IdentityKey>,
    pub(crate) channel: ChannelId,
    pub(crate) payload: Vec<u8>,
    /// The entry of the own message; `None` for a message of MLS itself.
    pub(crate) entry: Option<EntryId>,
}

/// The queue, oldest first. Items have numbers in the order in which they are to be sent.
#[derive(Debug)]
pub(crate) struct Outbox {
    database: Database,
}

/// The position of an item in the outbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct OutboxPosition(u64);

/// The server's answer for one recipient of an item.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum RecipientStatus {
    /// The server has stored the item.
    Accepted,
    /// Temporarily refused, for example because the recipient's inbox is full.
    Later,
    /// Permanently refused, with the reason.
    Refused(String),
}

/// The result for an item after the server's answer.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Settled {
    pub(crate) entry: Option<EntryId>,
    /// The recipients for which the server refuses the item permanently, and the reasons.
    pub(crate) refused: Vec<(IdentityKey, String)>,
    /// Whether no recipient is left.
    pub(crate) done: bool,
}

impl Outbox {
    pub(super) fn new(database: &Database) -> Self {
        Self { database: database.clone() }
    }

    pub(crate) fn push(
        &self,
        parcel: Parcel,
        entry: Option<EntryId>,
        now: UnixMillis,
    ) -> Result<(), DatabaseError> {
        let Parcel { recipients, channel, payload } = parcel;
        self.restore(&Outgoing {
            message_id: fresh_message_id(now),
            recipients,
            channel,
            payload,
            entry,
        })
    }

    /// Appends an item that was saved.
    pub(crate) fn restore(&self, item: &Outgoing) -> Result<(), DatabaseError> {
        let lane = item.entry.map(|entry| entry.0.to_be_bytes());
        let new = NewItem { key: None, lane: lane.as_ref().map(|lane| &lane[..]), open: true };
        self.database.append(OUTBOX, new, &encode(&SavedOutgoing::from(item))).map(drop)
    }

    /// Removes the items from a number on, and returns the entries of those that have one. Keeps
    /// decisions, which are not encrypted with the keys of a group.
    ///
    /// The removed items without an entry are answers to questions, which are asked again.
    pub(super) fn remove_encrypted(
        &self,
        number: u64,
        decisions: ChannelId,
    ) -> Result<Vec<EntryId>, DatabaseError> {
        let mut entries = Vec::new();
        let mut after = number.checked_sub(1);
        while let Some(item) = self.database.items_after(OUTBOX, after, 1)?.pop() {
            after = Some(item.number);
            let outgoing = decode::<SavedOutgoing>(&item.value)?.restore()?;
            if outgoing.channel != decisions {
                self.database.remove_item(OUTBOX, item.number)?;
                entries.extend(outgoing.entry);
            }
        }
        Ok(entries)
    }

    pub(crate) fn is_empty(&self) -> Result<bool, DatabaseError> {
        Ok(self.database.items_after(OUTBOX, None, 1)?.is_empty())
    }

    /// Returns the position after the last item.
    pub(crate) fn end(&self) -> Result<OutboxPosition, DatabaseError> {
        self.database.next_number(OUTBOX).map(OutboxPosition)
    }

    /// Returns the position after the last item of an own message; `None` if there is none.
    pub(crate) fn end_of(&self, entry: EntryId) -> Result<Option<OutboxPosition>, DatabaseError> {
        let last = self.database.last_in_lane(OUTBOX, &entry.0.to_be_bytes(), 1)?;
        Ok(last.first().map(|item| OutboxPosition(item.number + 1)))
    }

    /// Returns the first item after `from` and before `end`, and its position.
    pub(crate) fn next(
        &self,
        from: Option<OutboxPosition>,
        end: OutboxPosition,
    ) -> Result<Option<(OutboxPosition, Outgoing)>, DatabaseError> {
        let after = from.map(|OutboxPosition(number)| number);
        let items = self.database.items_after(OUTBOX, after, 1)?;
        let Some(item) = items.first().filter(|item| item.number < end.0) else {
            return Ok(None);
        };
        Ok(Some((OutboxPosition(item.number), decode::<SavedOutgoing>(&item.value)?.restore()?)))
    }

    /// Stores the server's answer for the recipients of an item.
    pub(crate) fn settle(
        &self,
        OutboxPosition(number): OutboxPosition,
        statuses: &[(IdentityKey, RecipientStatus)],
    ) -> Result<Settled, DatabaseError> {
        let Some(item) = self.database.item(OUTBOX, number)? else {
            return Ok(Settled::default());
        };
        let mut item = decode::<SavedOutgoing>(&item.value)?.restore()?;
        let mut settled = Settled { entry: item.entry, ..Settled::default() };
        let before = item.recipients.len();
        for (recipient, status) in statuses {
            if let RecipientStatus::Refused(reason) = status {
                settled.refused.push((*recipient, reason.clone()));
            }
            if *status != RecipientStatus::Later {
                item.recipients.retain(|left| left != recipient);
            }
        }
        if item.recipients.is_empty() {
            settled.done = true;
            self.database.remove_item(OUTBOX, number)?;
        } else if item.recipients.len() < before {
            let saved = encode(&SavedOutgoing::from(&item));
            self.database.replace_item(OUTBOX, number, &saved)?;
        }
        Ok(settled)
    }
}

/// Returns a fresh message id: a UUIDv7 (RFC 9562 §5.7), with the time in milliseconds and 74
/// random bits.
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
    fn an_item_stays_under_the_same_id_for_recipients_that_do_not_have_it() {
        let people = [1, 2, 3].map(|n| IdentityKey::new([n; 32]));
        let outbox = Outbox::new(&Database::in_memory());
        let parcel = Parcel {
            recipients: people.to_vec(),
            channel: ChannelId::new([9; 16]),
            payload: vec![7; 3],
        };
        outbox.push(parcel.clone(), Some(EntryId(4)), UnixMillis(1)).unwrap();
        outbox.push(parcel, None, UnixMillis(2)).unwrap();
        let end = outbox.end().unwrap();
        let (first, item) = outbox.next(None, end).unwrap().unwrap();
        let (second, _) = outbox.next(Some(first), end).unwrap().unwrap();
        assert_eq!(outbox.next(Some(second), end).unwrap(), None);
        assert_eq!(outbox.end_of(EntryId(4)).unwrap(), Some(second));
        assert_eq!(outbox.end_of(EntryId(5)).unwrap(), None);

        let statuses = [
            (people[0], RecipientStatus::Accepted),
            (people[1], RecipientStatus::Later),
            (people[2], RecipientStatus::Refused("gone".into())),
        ];
        let settled = outbox.settle(first, &statuses).unwrap();
        assert_eq!(settled.refused, [(people[2], "gone".to_owned())]);
        assert!(!settled.done);
        let (place, left) = outbox.next(None, end).unwrap().unwrap();
        assert_eq!((place, left.message_id), (first, item.message_id));
        assert_eq!(left.recipients, people[1..2]);

        let settled = outbox.settle(first, &[(people[1], RecipientStatus::Accepted)]).unwrap();
        assert_eq!((settled.entry, settled.done), (Some(EntryId(4)), true));
        assert_eq!(outbox.next(None, end).unwrap().unwrap().0, second);
        assert_eq!(outbox.settle(first, &[]).unwrap(), Settled::default());
    }
}
