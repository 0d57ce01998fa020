//! Detects that the profile's own state went back in time: an older copy of its directory was
//! restored, whose sending keys were used before.
//!
//! The state counts its encryptions. Before each message, the count is sent to the account's own
//! inbox, in the same call if possible: sealed, with the device's id, on a channel that only the
//! account can derive. This *marker* stays there until a newer one of the device replaces it. A
//! state that finds a marker with a higher count than its own is an older copy. The client then
//! skips, in every group, the keys that may have been used after the copy was made, before it
//! encrypts. Texts that were encrypted before the inbox was read are encrypted again.
//!
//! A marker expires after 90 days, and a restored server may have lost it. Without a marker the
//! older copy is not detected; a receiver that cannot decrypt its messages asks for a repeat
//! (`repair`).

use qpq_domain::{ChannelId, DeviceId, IdentityKey};
use qpq_mls::{
    Identity,
    database::DatabaseError,
    vault::{self, VaultKey},
};
use sha2::{Digest as _, Sha256};

use super::{
    log::{DeliveryState, Event},
    now,
    state::State,
    tables::OUTBOX,
};
use crate::error::Error;

/// The number of messages that the state has encrypted.
const GENERATION: &[u8] = b"generation";
/// The count of the last marker that the server accepted.
const MARKED: &[u8] = b"marked";
/// The number in the outbox of the first item that was encrypted before the inbox was read.
const UNVERIFIED: &[u8] = b"unverified";
/// The number of messages that the state had encrypted before the item of [`UNVERIFIED`].
const VERIFIED_GENERATION: &[u8] = b"verified-generation";

/// Present in the state of a device that was linked to an account.
pub(super) const LINKED: &[u8] = b"linked";

/// The lifetime of a marker, in seconds: the maximum that the server accepts.
pub(super) const MARKER_TTL_SECS: u32 = 90 * 24 * 3600;

/// The number of skipped keys in addition to those known to be used, since the server may not have
/// accepted the latest markers.
const SLACK: u64 = 64;

/// The key and the channel of an account's markers.
pub(super) struct Marking {
    key: VaultKey,
    pub(super) channel: ChannelId,
    pub(super) owner: IdentityKey,
    device: Option<DeviceId>,
    /// Whether markers without a device are ours, from before this device was registered.
    has_unnamed: bool,
}

impl Marking {
    fn of(identity: &Identity, device: Option<DeviceId>, has_unnamed: bool) -> Self {
        Self {
            key: account_key(identity, b"qpq/marker-key/1"),
            channel: account_channel(identity, b"qpq/marker-channel/1"),
            owner: identity.public(),
            device,
            has_unnamed,
        }
    }

    /// Seals a marker: the count, and the id of the device.
    fn seal(&self, generation: u64) -> Vec<u8> {
        let mut content = generation.to_be_bytes().to_vec();
        content.extend(self.device.iter().flat_map(|device| *device.as_bytes()));
        vault::seal(&self.key, &content)
    }

    /// Returns the count in a marker; `None` if the marker is not of this device.
    pub(super) fn open(&self, bytes: &[u8]) -> Option<u64> {
        let content = vault::open(&self.key, bytes).ok()?;
        let (count, device) = content.split_at_checked(8)?;
        let is_ours = match device {
            [] => self.has_unnamed,
            device => self.device.is_some_and(|own| device == own.as_bytes()),
        };
        is_ours.then(|| u64::from_be_bytes(count.try_into().expect("eight bytes")))
    }
}

/// Derives a key that only the account's devices know.
pub(super) fn account_key(identity: &Identity, label: &[u8]) -> VaultKey {
    let mut key = [0; 48];
    key[..32].copy_from_slice(&digest_of_seed(identity, label));
    VaultKey::from_bytes(&key)
}

/// Derives a channel that only the account's devices know.
pub(super) fn account_channel(identity: &Identity, label: &[u8]) -> ChannelId {
    let digest = digest_of_seed(identity, label);
    ChannelId::try_from(&digest[..16]).expect("a channel id has 16 bytes")
}

fn digest_of_seed(identity: &Identity, label: &[u8]) -> [u8; 32] {
    Sha256::digest([label, &identity.seed()[..]].concat()).into()
}

/// A marker to be sent.
#[derive(Debug, Clone)]
pub(super) struct Marker {
    pub(super) generation: u64,
    pub(super) owner: IdentityKey,
    pub(super) channel: ChannelId,
    pub(super) payload: Vec<u8>,
}

impl State {
    /// Returns the key and the channel of this device's markers.
    pub(super) fn marking(&self) -> Result<Marking, DatabaseError> {
        let device = self.mls.device().map(qpq_mls::Device::id);
        // A linked device had no state before it was registered.
        let is_linked = self.number(LINKED)?.is_some();
        Ok(Marking::of(self.mls.identity(), device, !is_linked))
    }

    /// Counts one encryption.
    pub(super) fn count_encryption(&self) -> Result<(), DatabaseError> {
        let generation = self.number(GENERATION)?.unwrap_or(0);
        self.set_number(GENERATION, Some(generation + 1))
    }

    /// Returns the marker to be sent before anything else; `None` if the server has it.
    pub(super) fn due_marker(&self) -> Result<Option<Marker>, DatabaseError> {
        let generation = self.number(GENERATION)?.unwrap_or(0);
        if self.number(MARKED)?.unwrap_or(0) >= generation {
            return Ok(None);
        }
        let marking = self.marking()?;
        let payload = marking.seal(generation);
        Ok(Some(Marker { generation, owner: marking.owner, channel: marking.channel, payload }))
    }

    /// Notes that the server has a marker.
    pub(super) fn set_marked(&self, generation: u64) -> Result<(), DatabaseError> {
        let before = self.number(MARKED)?.unwrap_or(0);
        self.set_number(MARKED, Some(before.max(generation)))
    }

    /// Returns whether messages may have been encrypted before the inbox was read.
    pub(super) fn is_unverified(&self) -> Result<bool, DatabaseError> {
        Ok(self.number(UNVERIFIED)?.is_some())
    }

    /// Forgets that messages were encrypted before the inbox was read: a process that uses the
    /// state since then has compared it.
    pub(super) fn end_unverified(&self) -> Result<(), DatabaseError> {
        self.set_number(VERIFIED_GENERATION, None)?;
        self.set_number(UNVERIFIED, None)
    }

    /// Notes that the messages encrypted from now on are encrypted before the inbox is read.
    pub(super) fn begin_unverified(&self) -> Result<(), DatabaseError> {
        if self.number(UNVERIFIED)?.is_none() {
            let end = self.database().next_number(OUTBOX)?;
            self.set_number(UNVERIFIED, Some(end))?;
            self.set_number(VERIFIED_GENERATION, Some(self.number(GENERATION)?.unwrap_or(0)))?;
        }
        Ok(())
    }

    /// Compares the state with the newest marker in the inbox, which was read to its end. If the
    /// state is the older, skips the keys that may have been used.
    pub(super) fn compare_with(&mut self, marked: Option<u64>) -> Result<(), Error> {
        let generation = self.number(GENERATION)?.unwrap_or(0);
        // Items that were encrypted since then may use the same keys as the newer state.
        let verified = self.number(VERIFIED_GENERATION)?.unwrap_or(generation);
        // Another process of this profile may have sent markers of these items.
        let known = verified.max(self.number(MARKED)?.unwrap_or(0));
        if let Some(marked) = marked.filter(|marked| *marked > known) {
            self.mls.skip_keys((marked - verified).saturating_add(SLACK))?;
            self.set_number(GENERATION, Some(generation.max(marked)))?;
            self.set_number(MARKED, Some(marked))?;
            self.log.push(None, now(), Event::Restored)?;
            // The private halves of packages that were created after the copy are lost.
            self.replace_packages()?;
            self.encrypt_again()?;
        }
        Ok(self.end_unverified()?)
    }

    /// Encrypts those messages again that were encrypted before the inbox was read.
    fn encrypt_again(&mut self) -> Result<(), Error> {
        let Some(from) = self.number(UNVERIFIED)? else { return Ok(()) };
        let decisions = self.decision_channel();
        for entry in self.outbox.remove_encrypted(from, decisions)? {
            let Some(kept) = self.log.get(entry)? else { continue };
            if let (Some(conversation), Event::Sent { text, file, .. }) =
                (kept.entry.conversation, kept.entry.event)
            {
                match super::send::encrypt_entry(self, conversation, entry, text, file) {
                    Ok(()) => {}
                    Err(Error::State(error) | Error::Mls(qpq_mls::Error::Database(error))) => {
                        return Err(error.into());
                    }
                    // We have left the group since, or were removed.
                    Err(error) => {
                        tracing::info!(%error, "a message of a restored copy is not sent");
                        self.log.set_delivery(entry, DeliveryState::Failed)?;
                    }
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use qpq_domain::Username;
    use qpq_mls::{Identity, Parcel, database::Database};

    use super::*;
    use crate::messenger::{log::ConversationId, tables::SETTINGS};

    fn state() -> State {
        let name = Username::parse("alice").unwrap();
        State::create(&Database::in_memory(), Identity::generate(), name).unwrap()
    }

    #[test]
    fn a_restored_copy_drops_what_it_encrypted_and_keeps_decisions() {
        let mut state = state();
        let parcel = |channel, recipient| Parcel {
            recipients: vec![recipient],
            channel,
            payload: b"encrypted".to_vec(),
        };
        let (stranger, decisions) = (IdentityKey::new([7; 32]), state.decision_channel());
        let conversation = ConversationId::Direct(stranger);
        state.begin_unverified().unwrap();
        state.count_encryption().unwrap();
        let sent = Event::Sent { text: "hi".into(), delivery: DeliveryState::Queued, file: None };
        let entry = state.log.push_own(conversation, now(), sent).unwrap();
        let channel = ChannelId::new([1; 16]);
        state.outbox.push(parcel(channel, stranger), Some(entry), now()).unwrap();
        state.outbox.push(parcel(channel, stranger), None, now()).unwrap();
        state.outbox.push(parcel(decisions, state.me()), None, now()).unwrap();

        // The conversation has no group, so the text cannot be encrypted again.
        state.compare_with(Some(u64::MAX)).unwrap();
        assert_eq!(state.log.delivery(entry).unwrap(), Some(DeliveryState::Failed));
        let end = state.outbox.end().unwrap();
        let (place, left) = state.outbox.next(None, end).unwrap().expect("one item");
        assert_eq!(left.channel, decisions);
        assert_eq!(state.outbox.next(Some(place), end).unwrap(), None);
        assert!(!state.is_unverified().unwrap());
    }

    #[test]
    fn a_marker_sent_by_another_process_of_this_state_is_not_of_a_newer_state() {
        let mut state = state();
        let restored = |state: &State| {
            let entries = state.log.unseen(None, 10).unwrap();
            entries.iter().filter(|entry| entry.event == Event::Restored).count()
        };
        // A process without a connection, and one that sends its message and a later one.
        state.begin_unverified().unwrap();
        state.count_encryption().unwrap();
        state.end_unverified().unwrap();
        state.count_encryption().unwrap();
        // The next process reads the marker of the later message, which is not noted as sent.
        state.begin_unverified().unwrap();
        state.compare_with(Some(2)).unwrap();
        assert_eq!(restored(&state), 0);
        state.begin_unverified().unwrap();
        state.compare_with(Some(3)).unwrap();
        assert_eq!(restored(&state), 1);
    }

    #[test]
    fn a_damaged_note_about_linking_is_an_error() {
        let state = state();
        assert!(state.marking().is_ok());
        state.database().put(SETTINGS, LINKED, None, b"short").unwrap();
        assert!(matches!(state.marking(), Err(DatabaseError::Damaged(_))));
    }
}
