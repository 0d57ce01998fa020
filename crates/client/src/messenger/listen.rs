//! The live stream of entries.
//!
//! The server's events only signal when to read the inbox; messages come from Peek alone. A lost
//! event costs seconds, never a message: the inbox is also read every few seconds, and after every
//! reconnect.

use std::{pin::Pin, time::Duration};

use futures_util::{FutureExt as _, Stream, StreamExt as _, stream};
use qpq_proto::ServerEvent;
use rand::{Rng as _, RngCore as _, rngs::OsRng};
use tokio::{
    sync::mpsc,
    task::{JoinHandle, JoinSet},
    time::{Instant, sleep, timeout_at},
};

use super::{
    Messenger,
    inbox::{NewKeys, unless_final},
    log::{Entry, EntryId},
    shown,
};
use crate::{error::Error, link::Renewed};

/// The interval of reads of the inbox without an event. Up to half of it is added at random.
const FALLBACK: Duration = Duration::from_secs(4);
/// The interval if the server sends no events.
const POLL: Duration = Duration::from_secs(1);
/// Maximum number of entries that wait in the stream. At this limit the inbox is read no further.
const AHEAD: usize = 64;

/// A stream of entries that runs until it is dropped.
#[derive(Debug)]
pub struct Listener {
    entries: mpsc::Receiver<Result<Entry, Error>>,
    /// The error after the entries that were returned last.
    failed: Option<Error>,
    task: JoinHandle<()>,
}

impl Listener {
    /// Returns the next entry: first those that are not marked as seen, then new ones. Cancel-safe.
    ///
    /// Lost connections are replaced without an entry
    /// ([`Client::connection_events`](crate::Client::connection_events) reports them). After an
    /// error the stream ends with `None`.
    pub async fn next(&mut self) -> Option<Result<Entry, Error>> {
        match self.failed.take() {
            Some(error) => Some(Err(error)),
            None => self.entries.recv().await,
        }
    }

    /// Returns all entries that are ready, at least one. Cancel-safe.
    ///
    /// Marking several entries as seen together costs as much as marking one. See
    /// [`Listener::next`].
    pub async fn next_all(&mut self) -> Option<Result<Vec<Entry>, Error>> {
        if let Some(error) = self.failed.take() {
            return Some(Err(error));
        }
        let mut ready = Vec::new();
        self.entries.recv_many(&mut ready, AHEAD).await;
        let mut entries = Vec::with_capacity(ready.len());
        for entry in ready {
            match entry {
                Ok(entry) => entries.push(entry),
                Err(error) => self.failed = Some(error),
            }
        }
        if entries.is_empty() { self.failed.take().map(Err) } else { Some(Ok(entries)) }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Messenger {
    /// Starts a stream of the entries: first those that are not marked as seen, then all new ones.
    /// Each entry is returned once. Mark an entry as seen once it was shown.
    ///
    /// A profile may have several streams, also in several processes. Each of them returns every
    /// new entry.
    pub fn listen(&self) -> Listener {
        let (sender, entries) = mpsc::channel(AHEAD);
        let task = tokio::spawn(InboxReader::start(self.clone(), sender));
        Listener { entries, failed: None, task }
    }
}

/// The task of a [`Listener`]: reads the inbox, and sends the entries to the listener.
struct InboxReader {
    messenger: Messenger,
    sender: mpsc::Sender<Result<Entry, Error>>,
    /// The end of the entries when the listener was created.
    start: EntryId,
    /// The last entry that was sent to the listener.
    last: Option<EntryId>,
    /// The task that sends the outbox, if one runs. Sending is concurrent with reading, so that a
    /// large outbox, or a server that accepts little at a time, does not delay new entries.
    sending: JoinSet<Result<(), Error>>,
}

/// The reason why a round ended.
enum Ended {
    /// The connection was lost or is about to be: subscribe again.
    Connection,
    /// The listener was dropped.
    Dropped,
}

/// The result of waiting for signals.
enum Waited {
    Signals(Vec<ServerEvent>),
    /// The interval without a signal has passed.
    Nothing,
    /// The stream of signals has ended.
    End,
    /// The listener was dropped.
    Dropped,
}

type Signals = Pin<Box<dyn Stream<Item = ServerEvent> + Send>>;

impl InboxReader {
    async fn start(messenger: Messenger, sender: mpsc::Sender<Result<Entry, Error>>) {
        match messenger.store().read(|state| Ok(state.log.end()?)).await {
            Ok(start) => {
                Self { messenger, sender, start, last: None, sending: JoinSet::new() }.run().await;
            }
            // A dropped listener needs no error.
            Err(error) => drop(sender.send(Err(error)).await),
        }
    }

    async fn run(mut self) {
        let mut failures = 0;
        loop {
            let error = match self.round(&mut failures).await {
                Ok(Ended::Connection) => continue,
                Ok(Ended::Dropped) => return,
                Err(error) => error,
            };
            if !error.call().is_some_and(crate::CallError::is_temporary) {
                // A dropped listener needs no error.
                let _ = self.sender.send(Err(error)).await;
                return;
            }
            failures += 1;
            sleep(self.messenger.client().options().backoff.delay(failures, OsRng.next_u64()))
                .await;
        }
    }

    /// Subscribes, and reads the inbox after each signal or interval.
    async fn round(&mut self, failures: &mut u32) -> Result<Ended, Error> {
        let (mut signals, every): (Signals, _) = match self.messenger.client().subscribe().await? {
            Some(signals) => (Box::pin(signals), FALLBACK),
            None => (Box::pin(stream::pending()), POLL),
        };
        let mut keys = NewKeys::Needed;
        loop {
            if !self.read(keys).await? {
                return Ok(Ended::Dropped);
            }
            self.start_sending().await?;
            keys = NewKeys::NotNeeded;
            *failures = 0;
            let until = Instant::now() + every + OsRng.gen_range(Duration::ZERO..=every / 2);
            match self.wait(&mut signals, until).await? {
                Waited::Nothing => {}
                Waited::Dropped => return Ok(Ended::Dropped),
                Waited::End => return Ok(Ended::Connection),
                Waited::Signals(received) => {
                    if received
                        .iter()
                        .any(|signal| matches!(signal, ServerEvent::KeyPackagesLow(_)))
                    {
                        keys = NewKeys::Needed;
                    }
                    let are_devices_changed = received
                        .iter()
                        .any(|signal| matches!(signal, ServerEvent::DevicesChanged(_)));
                    if are_devices_changed {
                        let updated = self.messenger.update_own_devices().await;
                        unless_final("devices", updated)?;
                    }
                    let is_draining =
                        received.iter().any(|signal| matches!(signal, ServerEvent::Draining(_)));
                    if is_draining && self.messenger.client().renew().await == Renewed::Yes {
                        return Ok(Ended::Connection);
                    }
                }
            }
        }
    }

    /// Reads the inbox, and sends its entries. Returns whether the listener still exists.
    async fn read(&mut self, mut keys: NewKeys) -> Result<bool, Error> {
        if self.messenger.sync().await? == NewKeys::Needed {
            keys = NewKeys::Needed;
        }
        self.messenger.settle_names().await?;
        // Messages are shown before deferred work is done.
        if !self.send_entries().await? {
            return Ok(false);
        }
        self.messenger.settle_keys(keys).await?;
        self.messenger.settle_groups().await?;
        unless_final("repair", self.messenger.repair().await)?;
        unless_final("recovery bundle", Box::pin(self.messenger.update_recovery()).await)?;
        Ok(true)
    }

    /// Starts to send the outbox, unless that is in progress.
    async fn start_sending(&mut self) -> Result<(), Error> {
        if self.sending.is_empty() && self.messenger.has_unsent().await? {
            let messenger = self.messenger.clone();
            self.sending.spawn(async move { messenger.flush().await });
        }
        Ok(())
    }

    /// Waits for signals, and meanwhile for the result of sending.
    async fn wait(&mut self, signals: &mut Signals, until: Instant) -> Result<Waited, Error> {
        loop {
            tokio::select! {
                received = timeout_at(until, next_signals(signals)) => return Ok(match received {
                    Err(_) => Waited::Nothing,
                    Ok(None) => Waited::End,
                    Ok(Some(received)) => Waited::Signals(received),
                }),
                Some(sent) = self.sending.join_next() => {
                    unless_final("outbox", sent.expect("sending does not panic"))?;
                    if !self.send_entries().await? {
                        return Ok(Waited::Dropped);
                    }
                }
            }
        }
    }

    /// Sends the new entries to the listener. Returns whether the listener still exists.
    async fn send_entries(&mut self) -> Result<bool, Error> {
        loop {
            let (start, after) = (self.start, self.last);
            let (entries, last) = self
                .messenger
                .store()
                .read(move |state| {
                    let (entries, last) = state.log.to_show(after, start, AHEAD)?;
                    Ok((shown(state, entries)?, last))
                })
                .await?;
            if last.is_none() {
                return Ok(true);
            }
            for entry in entries {
                if self.sender.send(Ok(entry)).await.is_err() {
                    return Ok(false);
                }
            }
            self.last = last;
        }
    }
}

/// Returns the next signal, and all that are ready with it. Cancel-safe.
///
/// One read of the inbox serves all of these signals. `None` once the stream has ended.
async fn next_signals(signals: &mut Signals) -> Option<Vec<ServerEvent>> {
    let mut received = vec![signals.next().await?];
    while let Some(Some(signal)) = signals.next().now_or_never() {
        received.push(signal);
    }
    Some(received)
}
