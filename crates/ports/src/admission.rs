//! Admission for messages that wait to be committed, bounded for all senders together and for each one.
//!
//! A backend commits in the order in which calls got room. Without a bound for each sender, the
//! large batches of one would fill the room, and every other call would wait until most of them are
//! committed. With it, one sender never has more in the room than one transaction holds, so a call
//! of another waits for the transaction in progress and its own, and no longer.

use std::{
    collections::{HashMap, hash_map},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use qpq_domain::IdentityKey;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

/// How long a call waits for room before the store counts as unavailable.
const PATIENCE: Duration = Duration::from_secs(5);

/// Bytes are counted in units of this many.
const UNIT: usize = 1 << 10;

/// What all calls together may have in the room: 64 MiB.
const ALL: usize = 64 << 10;

/// What one sender may have in the room: 4 MiB, or 512 messages.
const SENDER: usize = 4 << 10;

/// What a message counts in its sender's share besides its bytes: what its row costs to write.
const MESSAGE: usize = SENDER / 512;

/// A call waited in vain.
#[derive(Debug, thiserror::Error)]
#[error("there was no room for a call to wait in for {PATIENCE:?}")]
pub struct Busy;

/// The room. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Admission {
    all: Arc<Semaphore>,
    senders: Arc<Mutex<HashMap<IdentityKey, Sender>>>,
}

/// A sender that has something in the room, or waits for it.
#[derive(Debug)]
struct Sender {
    share: Arc<Semaphore>,
    calls: usize,
}

/// A call's place in the room, returned when dropped.
#[derive(Debug)]
pub struct AdmissionPermit {
    _all: OwnedSemaphorePermit,
    // In this order: a share is returned before its sender is forgotten.
    _share: Option<OwnedSemaphorePermit>,
    _call: Option<OneCall>,
}

/// Counts a call of a sender.
#[derive(Debug)]
struct OneCall {
    senders: Arc<Mutex<HashMap<IdentityKey, Sender>>>,
    sender: IdentityKey,
}

impl Default for Admission {
    fn default() -> Self {
        Self { all: Arc::new(Semaphore::new(ALL)), senders: Arc::default() }
    }
}

impl Admission {
    /// Waits for room for work that is no sender's.
    pub async fn admit(&self, bytes: usize) -> Result<AdmissionPermit, Busy> {
        let all = patiently(&self.all, units(bytes, 0, ALL)).await?;
        Ok(AdmissionPermit { _all: all, _share: None, _call: None })
    }

    /// Waits for room for `messages` of `sender`, which have so many bytes.
    pub async fn admit_from(
        &self,
        sender: &IdentityKey,
        messages: usize,
        bytes: usize,
    ) -> Result<AdmissionPermit, Busy> {
        let (call, share) = self.call_of(sender);
        // The share first: whoever has used it up waits apart from everybody else.
        let share = patiently(&share, units(bytes, messages, SENDER)).await?;
        let all = patiently(&self.all, units(bytes, 0, ALL)).await?;
        Ok(AdmissionPermit { _all: all, _share: Some(share), _call: Some(call) })
    }

    fn call_of(&self, sender: &IdentityKey) -> (OneCall, Arc<Semaphore>) {
        let mut senders = self.senders.lock();
        let entry = senders
            .entry(*sender)
            .or_insert_with(|| Sender { share: Arc::new(Semaphore::new(SENDER)), calls: 0 });
        entry.calls += 1;
        let share = Arc::clone(&entry.share);
        drop(senders);
        (OneCall { senders: Arc::clone(&self.senders), sender: *sender }, share)
    }
}

impl Drop for OneCall {
    fn drop(&mut self) {
        let mut senders = self.senders.lock();
        if let hash_map::Entry::Occupied(mut entry) = senders.entry(self.sender) {
            entry.get_mut().calls -= 1;
            if entry.get().calls == 0 {
                entry.remove();
            }
        }
    }
}

fn units(bytes: usize, messages: usize, most: usize) -> u32 {
    let units = bytes.div_ceil(UNIT).saturating_add(messages.saturating_mul(MESSAGE));
    u32::try_from(units.clamp(1, most)).expect("clamped")
}

async fn patiently(semaphore: &Arc<Semaphore>, units: u32) -> Result<OwnedSemaphorePermit, Busy> {
    if let Ok(permit) = Arc::clone(semaphore).try_acquire_many_owned(units) {
        return Ok(permit);
    }
    let permit = timeout(PATIENCE, Arc::clone(semaphore).acquire_many_owned(units)).await;
    Ok(permit.map_err(|_elapsed| Busy)?.expect("never closed"))
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    const ALICE: IdentityKey = IdentityKey::new([1; 32]);
    const BOB: IdentityKey = IdentityKey::new([2; 32]);

    #[tokio::test]
    async fn one_sender_never_fills_the_room() {
        let room = Admission::default();
        let mut places = Vec::new();
        while let Some(place) = room.admit_from(&ALICE, 1, 1 << 20).now_or_never() {
            places.push(place.expect("there is room"));
        }
        assert_eq!(places.len(), 3, "the fourth of 1 MiB and its row are beyond 4 MiB");
        assert!(room.admit_from(&BOB, 1, 1 << 20).now_or_never().is_some());
        assert!(room.admit(1 << 20).now_or_never().is_some());
        places.pop();
        assert!(room.admit_from(&ALICE, 1, 1 << 20).now_or_never().is_some());
    }

    #[tokio::test]
    async fn messages_count_whatever_their_size() {
        let room = Admission::default();
        let _first = room.admit_from(&ALICE, 256, 0).now_or_never().expect("there is room");
        let _second = room.admit_from(&ALICE, 256, 0).now_or_never().expect("there is room");
        assert!(room.admit_from(&ALICE, 1, 0).now_or_never().is_none());
        assert!(room.admit_from(&BOB, 256, 0).now_or_never().is_some());
    }

    #[tokio::test]
    async fn what_is_larger_than_the_room_gets_all_of_it() {
        let room = Admission::default();
        let place = room.admit_from(&ALICE, 1, 1 << 30).now_or_never().expect("there is room");
        assert!(room.admit_from(&BOB, 1, 0).now_or_never().is_none());
        drop(place);
        assert!(room.admit_from(&BOB, 1, 0).now_or_never().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_waits_in_vain_is_refused_and_leaves_nothing() {
        let room = Admission::default();
        let place = room.admit_from(&ALICE, 512, 0).await.expect("there is room");
        room.admit_from(&ALICE, 1, 0).await.expect_err("there is none");
        // Dropped while it waits.
        assert!(room.admit_from(&ALICE, 1, 0).now_or_never().is_none());
        assert_eq!(room.senders.lock().get(&ALICE).map(|sender| sender.calls), Some(1));
        drop(place);
        assert!(room.senders.lock().is_empty());
        assert_eq!(room.all.available_permits(), ALL);
    }
}
