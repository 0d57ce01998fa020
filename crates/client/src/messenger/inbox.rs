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

use qpq_domain::Seq;
use qpq_mls::Unpassed;
use qpq_proto::{methods, v1};

use super::{Messenger, log::Entry, now, page::process_page, state::REPLACE_PACKAGES};
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
/// The maximum wait for another process that reads the inbox. Both processes see the messages that
/// it reads.
const TURN_TIMEOUT: Duration = Duration::from_secs(5);

/// The maximum number of reads by a caller that needs the end of the inbox.
const MAX_TURNS: usize = 6;

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
        unless_final("blocks", self.send_blocks().await)?;
        self.settle_keys(keys).await?;
        Box::pin(self.settle_groups()).await?;
        unless_final("repair", Box::pin(self.repair()).await)?;
        unless_final("outbox", Box::pin(self.flush()).await)?;
        unless_final("recovery bundle", Box::pin(self.update_recovery()).await)?;
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
        if !self.shared.verified.load(Ordering::Relaxed) {
            // The pass itself may encrypt answers.
            self.store().change(|state| Ok(state.begin_unverified()?)).await?;
        }
        let unpassed = self.store().read(|state| Ok(state.mls.unpassed()?)).await?;
        for _ in 0..MAX_PAGES {
            let (page, connection) = self.peek(after).await?;
            let more = page.more;
            if let Some(last) = page.payloads.last().map(|envelope| Seq(envelope.seq)) {
                check_order(after, &page.payloads)?;
                let before = newest;
                let outcome = self
                    .store()
                    .change(move |state| process_page(state, page, before, now()))
                    .await?;
                keys = keys.or(outcome.keys);
                news |= outcome.news;
                newest = outcome.newest;
                if !outcome.processed.is_empty() {
                    self.ack(&connection, outcome.processed).await?;
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
                state.note_lost()?;
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
