//! Admission of messages into a backend's commit queue, bounded for each sender and for all senders
//! together.
//!
//! A backend commits in the order in which calls were admitted. Without a bound for each sender,
//! the large batches of one sender would fill the queue, and every other call would wait until most
//! of them are committed. With the bound, the messages of one sender in the queue fit in one
//! transaction, so a call of another sender waits only for the transaction in progress and its own.

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

/// Maximum time that a call waits for admission, after which the store counts as unavailable.
const QUEUE_TIMEOUT: Duration = Duration::from_secs(5);

/// The unit in which bytes are counted: 1 KiB.
const UNIT: usize = 1 << 10;

/// The maximum of all calls together, in units: 64 MiB.
const ALL: usize = 64 << 10;

/// The maximum of one sender, in units: 4 MiB, or 512 messages.
const SENDER: usize = 4 << 10;

/// The units that each message adds to the use of its sender's share, for the cost of its row: 8
/// KiB. The payload counts in addition.
const MESSAGE: usize = SENDER / 512;

/// The error for a call that was not admitted in time.
#[derive(Debug, thiserror::Error)]
#[error("the queue of the store was full for {QUEUE_TIMEOUT:?}")]
pub struct Busy;

/// The admission of calls to one queue. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Admission {
    all: Arc<Semaphore>,
    senders: Arc<Mutex<HashMap<IdentityKey, Sender>>>,
}

/// A sender that has calls in the queue, or waits for admission.
#[derive(Debug)]
struct Sender {
    share: Arc<Semaphore>,
    calls: usize,
}

/// The admission of one call. Dropping the permit ends it.
#[derive(Debug)]
pub struct AdmissionPermit {
    _all: OwnedSemaphorePermit,
    // Fields are dropped in this order: the share is returned before its sender is removed.
    _share: Option<OwnedSemaphorePermit>,
    _call: Option<OneCall>,
}

/// A guard that counts one call of a sender.
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
    /// Admits work that belongs to no sender.
    pub async fn admit(&self, bytes: usize) -> Result<AdmissionPermit, Busy> {
        let all = acquire(&self.all, units(bytes, 0, ALL)).await?;
        Ok(AdmissionPermit { _all: all, _share: None, _call: None })
    }

    /// Admits a number of messages of `sender`, of `bytes` in total.
    pub async fn admit_from(
        &self,
        sender: &IdentityKey,
        messages: usize,
        bytes: usize,
    ) -> Result<AdmissionPermit, Busy> {
        let (call, share) = self.call_of(sender);
        // The share first: a sender that has used it up waits without taking part of the total.
        let share = acquire(&share, units(bytes, messages, SENDER)).await?;
        let all = acquire(&self.all, units(bytes, 0, ALL)).await?;
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

async fn acquire(semaphore: &Arc<Semaphore>, units: u32) -> Result<OwnedSemaphorePermit, Busy> {
    if let Ok(permit) = Arc::clone(semaphore).try_acquire_many_owned(units) {
        return Ok(permit);
    }
    let permit = timeout(QUEUE_TIMEOUT, Arc::clone(semaphore).acquire_many_owned(units)).await;
    Ok(permit.map_err(|_elapsed| Busy)?.expect("never closed"))
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    const ALICE: IdentityKey = IdentityKey::new([1; 32]);
    const BOB: IdentityKey = IdentityKey::new([2; 32]);

    #[tokio::test]
    async fn one_sender_never_fills_the_queue() {
        let admission = Admission::default();
        let mut permits = Vec::new();
        while let Some(permit) = admission.admit_from(&ALICE, 1, 1 << 20).now_or_never() {
            permits.push(permit.expect("admitted"));
        }
        assert_eq!(permits.len(), 3, "the fourth of 1 MiB and its row are beyond 4 MiB");
        assert!(admission.admit_from(&BOB, 1, 1 << 20).now_or_never().is_some());
        assert!(admission.admit(1 << 20).now_or_never().is_some());
        permits.pop();
        assert!(admission.admit_from(&ALICE, 1, 1 << 20).now_or_never().is_some());
    }

    #[tokio::test]
    async fn empty_messages_count_too() {
        let admission = Admission::default();
        let _first = admission.admit_from(&ALICE, 256, 0).now_or_never().expect("admitted");
        let _second = admission.admit_from(&ALICE, 256, 0).now_or_never().expect("admitted");
        assert!(admission.admit_from(&ALICE, 1, 0).now_or_never().is_none());
        assert!(admission.admit_from(&BOB, 256, 0).now_or_never().is_some());
    }

    #[tokio::test]
    async fn a_call_larger_than_the_queue_occupies_the_whole_queue() {
        let admission = Admission::default();
        let permit = admission.admit_from(&ALICE, 1, 1 << 30).now_or_never().expect("admitted");
        assert!(admission.admit_from(&BOB, 1, 0).now_or_never().is_none());
        drop(permit);
        assert!(admission.admit_from(&BOB, 1, 0).now_or_never().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_is_not_admitted_in_time_is_refused_and_leaves_nothing() {
        let admission = Admission::default();
        let permit = admission.admit_from(&ALICE, 512, 0).await.expect("admitted");
        admission.admit_from(&ALICE, 1, 0).await.expect_err("the share is used up");
        // Dropped while it waits.
        assert!(admission.admit_from(&ALICE, 1, 0).now_or_never().is_none());
        assert_eq!(admission.senders.lock().get(&ALICE).map(|sender| sender.calls), Some(1));
        drop(permit);
        assert!(admission.senders.lock().is_empty());
        assert_eq!(admission.all.available_permits(), ALL);
    }
}
