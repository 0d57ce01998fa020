//! Processing of one page of the inbox, in one transaction.

use std::collections::BTreeSet;

use qpq_domain::{ChannelId, IdentityKey, Seq, UnixMillis};
use qpq_mls::{Arrival, Received, Rules, database::DatabaseError};
use qpq_proto::v1;
use sha2::{Digest as _, Sha256};

use super::{
    inbox::NewKeys,
    leave::Leaving,
    log::Event,
    marker::Marking,
    note::{is_from, note},
    requests::joins,
    state::{LEGACY_CURSOR, REPLACE_PACKAGES, State},
};
use crate::error::{CallError, Error};

/// The maximum difference between the seqs of consecutive messages. An inbox that accepts 100 000
/// messages each second needs four months for it.
const MAX_STEP: u64 = 1 << 40;
/// The highest processed seq of the server's present history.
pub(super) const LAST_SEQ: &[u8] = b"last-seq";

/// A marker of our own in the inbox.
#[derive(Debug, Clone, Copy)]
pub(super) struct OwnMarker {
    seq: u64,
    pub(super) generation: u64,
}

/// The result of processing a page.
pub(super) struct PageOutcome {
    pub(super) keys: NewKeys,
    /// The seqs to acknowledge.
    pub(super) processed: Vec<u64>,
    /// The newest marker so far, which stays in the inbox.
    pub(super) newest: Option<OwnMarker>,
    /// Whether there was a message to a group that was not processed before.
    pub(super) news: bool,
    /// The members to remove.
    leaving: Leaving,
}

impl PageOutcome {
    fn new(newest: Option<OwnMarker>) -> Self {
        Self {
            keys: NewKeys::NotNeeded,
            processed: Vec::new(),
            newest,
            news: false,
            leaving: Leaving::new(),
        }
    }

    /// Notes a message on the marker channel, with its count if it is a marker of this device. All
    /// markers but the newest count as processed: the acknowledgement removes them.
    fn add_marker(&mut self, seq: u64, generation: Option<u64>) {
        let replaced =
            match (generation.map(|generation| OwnMarker { seq, generation }), self.newest) {
                (Some(marker), Some(newest)) if marker.generation < newest.generation => Some(seq),
                (Some(marker), _) => self.newest.replace(marker).map(|older| older.seq),
                (None, _) => Some(seq),
            };
        self.processed.extend(replaced);
    }

    /// Notes one result of a message.
    fn add(
        &mut self,
        state: &mut State,
        received: Received,
        at: UnixMillis,
        now: UnixMillis,
    ) -> Result<(), Error> {
        match received {
            Received::Leaving { group, sender } => {
                state.note_leaving(&group, &sender.identity)?;
                let members = self.leaving.entry(group).or_default();
                if !members.contains(&sender.identity) {
                    members.push(sender.identity);
                }
                return Ok(());
            }
            Received::RotationRequested { channel } => return state.note_rotation(channel, now),
            Received::Joined { .. }
            | Received::Requested(_)
            | Received::Refused { used_package: true } => self.keys = NewKeys::Needed,
            _ => {}
        }
        note(state, received, at)
    }
}

/// The state of the inbox's seqs.
struct Seqs {
    /// The highest processed seq; `None` after the store went back, when any seq may follow.
    last: Option<u64>,
    /// The seq up to which an earlier release may have processed messages without noting them.
    legacy: u64,
    /// Whether this page showed that the server's store went back.
    went_back: bool,
}

/// Processes a page of the inbox.
pub(super) fn process_page(
    state: &mut State,
    page: v1::PeekResponse,
    newest: Option<OwnMarker>,
    now: UnixMillis,
) -> Result<PageOutcome, Error> {
    let (blocked, database) = (state.blocked()?, state.database().clone());
    let has_other_devices = state.has_other_devices()?;
    let me = state.me();
    // Another device of this account is not a stranger.
    let joins = |request: &qpq_mls::Request| {
        Ok(request.inviter.identity == me || joins(&database, request)?)
    };
    let legacy = state.number(LEGACY_CURSOR)?.unwrap_or(0);
    let last = Some(state.number(LAST_SEQ)?.unwrap_or(legacy));
    let mut seqs = Seqs { last, legacy, went_back: false };
    if state.is_other_store(&page.store_id)? {
        seqs.go_back(state, now)?;
    }
    let newest_at = page.payloads.iter().map(|envelope| UnixMillis(envelope.enqueued_at)).max();
    let (marking, decisions) = (state.marking()?, state.decision_channel());
    let outcome = PageOutcome::new(newest);
    let mut processor = PageProcessor { state, marking, decisions, blocked, seqs, outcome, now };
    for envelope in page.payloads {
        processor.process(&envelope, &joins, has_other_devices)?;
    }
    let PageProcessor { state, seqs, mut outcome, .. } = processor;
    state.remove_leaving(std::mem::take(&mut outcome.leaving))?;
    state.set_number(LAST_SEQ, seqs.last)?;
    state.forget_old(newest_at.map_or(UnixMillis(0), |at| at.min(now)))?;
    if seqs.went_back || state.number(REPLACE_PACKAGES)?.is_some() {
        outcome.keys = NewKeys::Needed;
    }
    Ok(outcome)
}

/// A page that is being processed.
struct PageProcessor<'a> {
    state: &'a mut State,
    marking: Marking,
    /// The channel of the account's decisions.
    decisions: ChannelId,
    blocked: BTreeSet<IdentityKey>,
    seqs: Seqs,
    outcome: PageOutcome,
    now: UnixMillis,
}

impl PageProcessor<'_> {
    /// Processes one message: a marker, a message of a new device, a decision of another device, or
    /// a message to a group.
    fn process(
        &mut self,
        envelope: &v1::Envelope,
        joins: &dyn Fn(&qpq_mls::Request) -> Result<bool, DatabaseError>,
        has_other_devices: bool,
    ) -> Result<(), Error> {
        let Self { state, marking, decisions, blocked, seqs, outcome, now } = self;
        let (seq, at) = (envelope.seq, UnixMillis(envelope.enqueued_at));
        let arrival = Arrival { at: at.max(*now), channel: channel(envelope) };
        let is_news = !state.mls.knows(&digest(&envelope.data))?;
        seqs.note(state, seq, is_news, at)?;
        if arrival.channel == marking.channel {
            state.mls.note_received(&envelope.data, arrival.at)?;
            outcome.add_marker(seq, marking.open(&envelope.data));
            return Ok(());
        }
        outcome.processed.push(seq);
        if let Some(message) = state.link_message(arrival.channel, &envelope.data) {
            state.mls.note_received(&envelope.data, arrival.at)?;
            if is_news {
                state.note_link_message(message, at, *now)?;
            }
            return Ok(());
        }
        if arrival.channel == *decisions {
            state.mls.note_received(&envelope.data, arrival.at)?;
            if is_news {
                state.adopt_decision(&envelope.data, *now)?;
                *blocked = state.blocked()?;
            }
            return Ok(());
        }
        outcome.news |= is_news;
        let rules = Rules { blocked, joins, has_other_devices };
        for received in state.mls.receive_by(&envelope.data, arrival, &rules)? {
            if is_from(&received, blocked) {
                continue;
            }
            if matches!(received, Received::Unreadable(_)) && seq <= seqs.legacy {
                tracing::info!(seq, "a message that an earlier release has read arrived again");
                continue;
            }
            outcome.add(state, received, at, *now)?;
        }
        Ok(())
    }
}

impl Seqs {
    /// Notes the seq of a message, and a gap or a step back before it.
    fn note(
        &mut self,
        state: &mut State,
        seq: u64,
        is_news: bool,
        at: UnixMillis,
    ) -> Result<(), Error> {
        let last = self.last.unwrap_or(0);
        if seq > last.saturating_add(MAX_STEP) {
            return Err(CallError::ImpossibleSeq { seq }.into());
        }
        if !is_news {
            self.last = Some(last.max(seq));
            return Ok(());
        }
        match self.last {
            Some(last) if seq <= last && seq > self.legacy => self.go_back(state, at)?,
            Some(last) if seq > last + 1 => {
                let missing = Event::Missing { first: Seq(last + 1), last: Seq(seq - 1) };
                state.log.push(None, at, missing)?;
            }
            _ => {}
        }
        self.last = Some(self.last.unwrap_or(0).max(seq));
        Ok(())
    }

    /// Notes that the server's store went back. The seqs of the store begin at an earlier value,
    /// and KeyPackages that the store issued before may be issued again.
    fn go_back(&mut self, state: &mut State, at: UnixMillis) -> Result<(), Error> {
        if !self.went_back {
            state.log.push(None, at, Event::WentBack)?;
            state.replace_packages()?;
            state.renew_server_groups(at)?;
        }
        (self.last, self.legacy, self.went_back) = (None, 0, true);
        Ok(state.set_number(LEGACY_CURSOR, None)?)
    }
}

fn digest(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

fn channel(envelope: &v1::Envelope) -> ChannelId {
    ChannelId::try_from(&envelope.channel_id[..]).unwrap_or(ChannelId::DEFAULT)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use qpq_domain::Username;
    use qpq_mls::{Identity, database::Database};

    use super::*;

    const DAY: Duration = Duration::from_secs(24 * 3600);
    const START: UnixMillis = UnixMillis(1_800_000_000_000);

    fn page(seq: u64, data: &'static [u8], at: UnixMillis) -> v1::PeekResponse {
        let envelope =
            v1::Envelope { seq, data: data.into(), enqueued_at: at.0, ..Default::default() };
        v1::PeekResponse { payloads: vec![envelope], ..Default::default() }
    }

    #[test]
    fn digests_are_removed_after_both_clocks_are_past_the_lifetime_of_messages() {
        let name = Username::parse("alice").unwrap();
        let mut state = State::create(&Database::in_memory(), Identity::generate(), name).unwrap();
        let later = START.plus(DAY * 200);
        process_page(&mut state, page(1, b"old", START), None, START).unwrap();
        for (seq, data, at, now) in [(2, b"a", START, later), (3, b"b", later, START)] {
            process_page(&mut state, page(seq, data, at), None, now).unwrap();
            assert!(state.mls.knows(&digest(b"old")).unwrap(), "one clock is ahead");
        }
        process_page(&mut state, page(4, b"c", later), None, later).unwrap();
        assert!(!state.mls.knows(&digest(b"old")).unwrap());
        assert!(state.mls.knows(&digest(b"c")).unwrap());
    }
}
