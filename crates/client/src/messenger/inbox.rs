//! Reading the inbox: Peek, process, save, then Ack.
//!
//! A message is recognized by its content, never by its seq: a server that was restored from a
//! backup assigns the same seqs to other messages. Each read begins at the start of the queue and
//! acknowledges, by their seqs, exactly the messages that were processed. A message processed in a
//! read that crashed before its Ack is recognized when it arrives again.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use qpq_domain::{ChannelId, Seq, UnixMillis};
use qpq_mls::{Arrival, Received, Rules, Unpassed};
use qpq_proto::{methods, v1};
use sha2::{Digest as _, Sha256};

use super::{
    Messenger,
    leave::Leaving,
    log::{Entry, Event},
    marker::Marking,
    note::{is_from, note},
    now,
    requests::joins,
    state::{LEGACY_CURSOR, REPLACE_PACKAGES, State},
};
use crate::{
    error::{CallError, Error},
    link::Live,
    profile::{self, Task},
};

/// The maximum number of messages that are processed and saved in one transaction.
const PAGE: u32 = 200;
/// The maximum number of pages of one read, so that a server that always has more does not block
/// the client.
const MAX_PAGES: usize = 1_000;
/// The maximum difference between the seqs of consecutive messages. An inbox that accepts 100 000
/// messages each second needs four months for it.
const MAX_STEP: u64 = 1 << 40;
/// The maximum wait for another process that reads the inbox. Both processes see the messages that
/// it reads.
const TURN_TIMEOUT: Duration = Duration::from_secs(5);

/// The maximum number of reads by a caller that needs the end of the inbox.
const MAX_TURNS: usize = 6;

/// The highest processed seq of the server's present history.
pub(super) const LAST_SEQ: &[u8] = b"last-seq";

impl Messenger {
    /// Processes the messages of the inbox, and returns all entries that were not marked as seen,
    /// oldest first.
    ///
    /// Also sends waiting messages, fills up our KeyPackages, and asks the directory about new
    /// names.
    pub async fn receive(&self) -> Result<Vec<Entry>, Error> {
        unless_final("devices", self.refresh_own_devices().await)?;
        let mut keys = self.sync().await?;
        if !self.shared.keys_checked.swap(true, Ordering::Relaxed) {
            keys = NewKeys::Needed;
        }
        self.settle_names().await?;
        self.settle_keys(keys).await?;
        Box::pin(self.settle_groups()).await?;
        unless_final("repair", Box::pin(self.repair()).await)?;
        unless_final("outbox", Box::pin(self.flush()).await)?;
        self.unseen().await
    }

    /// Processes the messages of the inbox, and leaves all other work to a
    /// [`Listener`](super::Listener) that is created next.
    pub async fn catch_up(&self) -> Result<(), Error> {
        self.sync().await?;
        self.settle_names().await
    }

    /// Asks the directory about new names.
    pub(super) async fn settle_names(&self) -> Result<(), Error> {
        unless_final("names", self.check_names().await)
    }

    /// Runs the changes of groups that are due.
    ///
    /// These are pending changes, renewals of keys, and joins of groups that cannot be read here.
    pub(super) async fn settle_groups(&self) -> Result<(), Error> {
        unless_final("changes", self.run_changes(None).await.map(drop))?;
        unless_final("key renewal", self.renew_keys().await)?;
        unless_final("joining again", self.rejoin_lost().await)
    }

    /// Fills up our KeyPackages.
    pub(super) async fn settle_keys(&self, keys: NewKeys) -> Result<(), Error> {
        match keys {
            NewKeys::Needed => {
                let published = self.publish_key_packages().await;
                let refused = matches!(
                    &published,
                    Err(Error::Call(error)) if error.is_code("keys.invalid_package")
                );
                self.shared.keys_refused.store(refused, Ordering::Relaxed);
                unless_final("key packages", published)
            }
            NewKeys::NotNeeded => Ok(()),
        }
    }

    /// Reads and processes all messages of the inbox.
    pub(super) async fn sync(&self) -> Result<NewKeys, Error> {
        Ok(self.read_inbox().await?.0)
    }

    /// Processes all messages of the inbox, and fills up our KeyPackages if necessary.
    pub(super) async fn sync_and_settle_keys(&self) -> Result<(), Error> {
        let keys = self.sync().await?;
        self.settle_keys(keys).await
    }

    /// Processes all messages of the inbox, and waits for other processes that read it.
    ///
    /// # Errors
    /// [`Error::GroupBusy`] if the end is not reached.
    pub(super) async fn sync_to_end(&self) -> Result<NewKeys, Error> {
        let mut keys = NewKeys::NotNeeded;
        for _ in 0..MAX_TURNS {
            let (needed, extent) = self.read_inbox().await?;
            keys = keys.or(needed);
            if extent == Extent::Whole {
                return Ok(keys);
            }
        }
        Err(Error::GroupBusy)
    }

    /// Processes the messages of the inbox. Returns whether its end was reached.
    async fn read_inbox(&self) -> Result<(NewKeys, Extent), Error> {
        let _alone = self.shared.reading.lock().await;
        let turn = profile::turn(self.store().dir(), Task::ReadInbox, TURN_TIMEOUT).await?;
        let Some(_turn) = turn else { return Ok((NewKeys::NotNeeded, Extent::Part)) };
        let (mut keys, mut extent) = (NewKeys::NotNeeded, Extent::Part);
        let (mut after, mut newest, mut news) = (Seq::ZERO, None, false);
        let unpassed = self.store().read(|state| Ok(state.mls.unpassed()?)).await?;
        for _ in 0..MAX_PAGES {
            let (page, connection) = self.peek(after).await?;
            let more = page.more;
            if let Some(last) = page.payloads.last().map(|envelope| Seq(envelope.seq)) {
                check_order(after, &page.payloads)?;
                let before = newest;
                let taken =
                    self.store().change(move |state| take_in(state, page, before, now())).await?;
                keys = keys.or(taken.keys);
                news |= taken.news;
                newest = taken.newest;
                if !taken.processed.is_empty() {
                    self.ack(&connection, taken.processed).await?;
                }
                after = last;
            }
            if !more {
                let marked = newest.map(|marker| marker.generation);
                keys = keys.or(self.end_pass(marked, news, unpassed).await?);
                extent = Extent::Whole;
                break;
            }
        }
        Ok((keys, extent))
    }

    /// Does the work that requires an inbox that was read to its end.
    ///
    /// `unpassed` was noted before the pass. A restored copy of the state needs new KeyPackages.
    async fn end_pass(
        &self,
        marked: Option<u64>,
        news: bool,
        unpassed: Vec<Unpassed>,
    ) -> Result<NewKeys, Error> {
        let is_first = !self.shared.verified.load(Ordering::Relaxed);
        if !is_first && !news && unpassed.is_empty() {
            return Ok(NewKeys::NotNeeded);
        }
        let keys = self
            .store()
            .change(move |state| {
                state.mls.end_pass(&unpassed)?;
                if is_first {
                    state.compare_with(marked)?;
                }
                state.give_up()?;
                let replaces = state.number(REPLACE_PACKAGES)?.is_some();
                Ok(if replaces { NewKeys::Needed } else { NewKeys::NotNeeded })
            })
            .await?;
        self.shared.verified.store(true, Ordering::Relaxed);
        Ok(keys)
    }

    async fn peek(&self, after: Seq) -> Result<(v1::PeekResponse, Arc<Live>), Error> {
        let request = v1::PeekRequest {
            all_channels: true,
            after_seq: after.0,
            limit: PAGE,
            ..Default::default()
        };
        match self.client().call_any::<methods::Peek>(request).await {
            Err(error) if error.is_code("delivery.device_required") => {
                self.note_revoked().await;
                Err(Error::DeviceRevoked)
            }
            answer => Ok(answer?),
        }
    }

    /// Acks on the connection of the Peek that returned these seqs: the server compares the history
    /// of both there. On another connection, after a restore, the same seqs could be those of other
    /// messages. If that connection has ended, the messages arrive again and are recognized.
    async fn ack(&self, connection: &Arc<Live>, seqs: Vec<u64>) -> Result<(), CallError> {
        let request = v1::AckRequest { all_channels: true, seqs, ..Default::default() };
        match self.client().call_on::<methods::Ack>(connection, request).await {
            Ok(_) => Ok(()),
            Err(error) if error.is_temporary() => {
                tracing::debug!(%error, "ack failed, the messages will be read again");
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
}

/// Refuses a page that does not follow `after` in seq order. A server that repeats the same page
/// would otherwise block the client.
fn check_order(after: Seq, envelopes: &[v1::Envelope]) -> Result<(), CallError> {
    let mut last = after.0;
    for envelope in envelopes {
        if envelope.seq <= last {
            return Err(CallError::Malformed { method: "Peek" });
        }
        last = envelope.seq;
    }
    Ok(())
}

/// Logs and ignores a failure, unless every call fails until the user acts.
///
/// Work that the server does not do now must not delay messages. The next read tries again.
pub(super) fn unless_final(what: &'static str, done: Result<(), Error>) -> Result<(), Error> {
    match done {
        Err(Error::Call(error))
            if !error.is_unauthorized() && !matches!(error, CallError::Connect(_)) =>
        {
            tracing::warn!(%error, what, "deferred work failed, retrying with the next read");
            Ok(())
        }
        done => done,
    }
}

/// The part of the inbox that was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Extent {
    Whole,
    Part,
}

/// Whether our KeyPackages on the server may have to be filled up or replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NewKeys {
    Needed,
    NotNeeded,
}

impl NewKeys {
    fn or(self, other: Self) -> Self {
        if self == Self::Needed { self } else { other }
    }
}

/// A marker of our own in the inbox.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seen {
    seq: u64,
    generation: u64,
}

/// The result of processing a page.
pub(super) struct TakenIn {
    keys: NewKeys,
    /// The seqs to acknowledge.
    processed: Vec<u64>,
    /// The newest marker so far, which stays in the inbox.
    newest: Option<Seen>,
    /// Whether there was a message that is no marker and was not processed before.
    news: bool,
    /// The members to remove.
    leaving: Leaving,
}

impl TakenIn {
    fn new(newest: Option<Seen>) -> Self {
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
        let replaced = match (generation.map(|generation| Seen { seq, generation }), self.newest) {
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
struct Numbers {
    /// The highest processed seq; `None` after the store went back, when any seq may follow.
    last: Option<u64>,
    /// The seq up to which an earlier release may have processed messages without noting them.
    legacy: u64,
    /// Whether this page showed that the server's store went back.
    went_back: bool,
}

/// Processes a page of the inbox.
pub(super) fn take_in(
    state: &mut State,
    page: v1::PeekResponse,
    newest: Option<Seen>,
    now: UnixMillis,
) -> Result<TakenIn, Error> {
    let (blocked, database) = (state.blocked()?, state.database().clone());
    let has_other_devices = state.has_other_devices()?;
    let me = state.me();
    // Another device of this account is no stranger.
    let joins = |request: &qpq_mls::Request| {
        Ok(request.inviter.identity == me || joins(&database, request)?)
    };
    let rules = Rules { blocked: &blocked, joins: &joins, has_other_devices };
    let legacy = state.number(LEGACY_CURSOR)?.unwrap_or(0);
    let last = Some(state.number(LAST_SEQ)?.unwrap_or(legacy));
    let mut numbers = Numbers { last, legacy, went_back: false };
    if state.is_other_store(&page.store_id)? {
        numbers.go_back(state, now)?;
    }
    let newest_at = page.payloads.iter().map(|envelope| UnixMillis(envelope.enqueued_at)).max();
    let (marking, decisions) = (state.marking()?, state.decision_channel());
    let taken = TakenIn::new(newest);
    let mut intake = Intake { state, marking, decisions, numbers, taken, now };
    for envelope in page.payloads {
        intake.process(&envelope, &rules)?;
    }
    let Intake { state, numbers, mut taken, .. } = intake;
    state.remove_leaving(std::mem::take(&mut taken.leaving))?;
    state.set_number(LAST_SEQ, numbers.last)?;
    state.forget_old(newest_at.map_or(UnixMillis(0), |at| at.min(now)))?;
    if numbers.went_back || state.number(REPLACE_PACKAGES)?.is_some() {
        taken.keys = NewKeys::Needed;
    }
    Ok(taken)
}

/// A page that is being processed.
struct Intake<'a> {
    state: &'a mut State,
    marking: Marking,
    /// The channel of the account's decisions.
    decisions: ChannelId,
    numbers: Numbers,
    taken: TakenIn,
    now: UnixMillis,
}

impl Intake<'_> {
    /// Processes one message: a marker, a message of a new device, a decision of another device, or
    /// a message to a group.
    fn process(&mut self, envelope: &v1::Envelope, rules: &Rules<'_>) -> Result<(), Error> {
        let Self { state, marking, decisions, numbers, taken, now } = self;
        let (seq, at) = (envelope.seq, UnixMillis(envelope.enqueued_at));
        let arrival = Arrival { at: at.max(*now), channel: channel(envelope) };
        let is_news = !state.mls.knows(&digest(&envelope.data))?;
        numbers.note(state, seq, is_news, at)?;
        if arrival.channel == marking.channel {
            // Noted like any message, so that it is recognized.
            state.mls.receive(&envelope.data, arrival)?;
            taken.add_marker(seq, marking.open(&envelope.data));
            return Ok(());
        }
        taken.processed.push(seq);
        if let Some(message) = state.link_message(arrival.channel, &envelope.data) {
            // Noted like any message, so that it is recognized.
            state.mls.receive(&envelope.data, arrival)?;
            if is_news {
                state.note_link_message(message, at, *now)?;
            }
            return Ok(());
        }
        if arrival.channel == *decisions {
            // Noted like any message, so that it is recognized.
            state.mls.receive(&envelope.data, arrival)?;
            if is_news {
                state.adopt_decision(&envelope.data, *now)?;
            }
            return Ok(());
        }
        taken.news |= is_news;
        for received in state.mls.receive_by(&envelope.data, arrival, rules)? {
            if is_from(&received, rules.blocked) {
                continue;
            }
            if matches!(received, Received::Unreadable(_)) && seq <= numbers.legacy {
                tracing::info!(seq, "a message that an earlier release has read arrived again");
                continue;
            }
            taken.add(state, received, at, *now)?;
        }
        Ok(())
    }
}

impl Numbers {
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

    /// Notes that the server's store went back. Its seqs begin at an earlier value, and KeyPackages
    /// that it issued before may be issued again.
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
    fn digests_are_removed_once_both_clocks_are_past_the_lifetime_of_messages() {
        let name = Username::parse("alice").unwrap();
        let mut state = State::create(&Database::in_memory(), Identity::generate(), name).unwrap();
        let later = START.plus(DAY * 200);
        take_in(&mut state, page(1, b"old", START), None, START).unwrap();
        for (seq, data, at, now) in [(2, b"a", START, later), (3, b"b", later, START)] {
            take_in(&mut state, page(seq, data, at), None, now).unwrap();
            assert!(state.mls.knows(&digest(b"old")).unwrap(), "one clock is ahead");
        }
        take_in(&mut state, page(4, b"c", later), None, later).unwrap();
        assert!(!state.mls.knows(&digest(b"old")).unwrap());
        assert!(state.mls.knows(&digest(b"c")).unwrap());
    }
}
