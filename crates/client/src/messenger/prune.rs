//! Removal of old records: the digests of received messages that inboxes can no longer contain, and
//! the digests of sent ciphertexts that members can no longer ask for.
//!
//! Each step removes a bounded number. A step runs with each page of the inbox and removes more
//! than a page adds, so both tables stay as large as the retention needs.

use std::time::Duration;

use qpq_domain::UnixMillis;

use super::state::State;
use crate::error::Error;

/// The time for which received messages are recognized. A message stays in an inbox for at most 90
/// days; the rest is a margin for servers that remove expired messages late. A message that arrives
/// again after this time is treated as a new one that cannot be read.
const RECOGNIZED_FOR: Duration = Duration::from_secs(120 * 24 * 3600);

/// The maximum number of records of each kind that one step removes. A page of the inbox adds
/// fewer.
const STEP: u32 = 500;

impl State {
    /// Removes up to [`STEP`] records of each kind that are too old to be needed.
    ///
    /// `now` is the earlier of this machine's time and the server's, so that one wrong clock does
    /// not remove records that are needed.
    pub(super) fn forget_old(&self, now: UnixMillis) -> Result<(), Error> {
        self.mls.forget_received(now.minus(RECOGNIZED_FOR), STEP)?;
        self.forget_sent(now, STEP)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use qpq_domain::{ChannelId, Username};
    use qpq_mls::{Arrival, Identity, database::Database};
    use sha2::{Digest as _, Sha256};

    use super::*;
    use crate::messenger::log::EntryId;

    const DAY: Duration = Duration::from_secs(24 * 3600);
    /// Any time of day.
    const START: UnixMillis = UnixMillis(1_800_000_000_000);

    fn state() -> State {
        let name = Username::parse("alice").unwrap();
        State::create(&Database::in_memory(), Identity::generate(), name).unwrap()
    }

    fn receive(state: &mut State, number: u32, at: UnixMillis) -> [u8; 32] {
        let bytes = number.to_be_bytes();
        state.mls.receive(&bytes, Arrival { at, channel: ChannelId::DEFAULT }).unwrap();
        Sha256::digest(bytes).into()
    }

    #[test]
    fn received_messages_are_recognized_for_120_days_and_forgotten_then() {
        let mut state = state();
        let (old, young) = (receive(&mut state, 1, START), receive(&mut state, 2, START.plus(DAY)));
        state.forget_old(START.plus(DAY * 120)).unwrap();
        assert!(state.mls.knows(&old).unwrap());
        state.forget_old(START.plus(DAY * 121)).unwrap();
        assert!(!state.mls.knows(&old).unwrap());
        assert!(state.mls.knows(&young).unwrap());
    }

    #[test]
    fn sent_ciphertexts_are_kept_while_they_may_be_asked_for_and_forgotten_then() {
        let state = state();
        // The clock was ahead by years when the first was encrypted.
        state.note_sent(b"ahead", EntryId(1), START.plus(DAY * 4000)).unwrap();
        state.note_sent(b"one", EntryId(2), START).unwrap();
        state.note_sent(b"two", EntryId(3), START.plus(DAY)).unwrap();
        assert_eq!(state.forget_sent(START.plus(DAY * 299), STEP).unwrap(), 0);
        assert_eq!(state.forget_sent(START.plus(DAY * 300), STEP).unwrap(), 1);
        assert_eq!(state.forget_sent(START.plus(DAY * 301), STEP).unwrap(), 1);
        assert_eq!(state.forget_sent(START.plus(DAY * 599), STEP).unwrap(), 1);
    }

    #[test]
    fn a_step_is_bounded_and_repeated_steps_remove_everything_old() {
        let mut state = state();
        let digests: Vec<_> = (0..STEP + 10).map(|n| receive(&mut state, n, START)).collect();
        for number in 0..STEP + 10 {
            state.note_sent(&number.to_be_bytes(), EntryId(number.into()), START).unwrap();
        }
        let known = |state: &State| {
            digests.iter().filter(|digest| state.mls.knows(digest).unwrap()).count()
        };
        let later = START.plus(DAY * 400);
        state.forget_old(later).unwrap();
        assert_eq!(known(&state), 10);
        assert_eq!(state.forget_sent(later, 3).unwrap(), 3);
        state.forget_old(later).unwrap();
        assert_eq!(known(&state), 0);
        assert_eq!(state.forget_sent(later, STEP).unwrap(), 0);
    }
}
