//! The live stream: what comes in, as it comes in.
//!
//! The server's events only say when to look; what there is comes from Peek alone. So a lost event
//! costs seconds, never a message: every few seconds, and after every reconnect, the inbox is
//! looked at anyway.

use std::{pin::Pin, time::Duration};

use futures_util::{FutureExt as _, Stream, StreamExt as _, stream};
use qpq_proto::Event as Signal;
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
};
use crate::{error::Error, link::Renewed};

/// The interval of looks at the inbox without an event, to which up to half is added.
const FALLBACK: Duration = Duration::from_secs(4);
/// The interval where the server sends no events.
const POLL: Duration = Duration::from_secs(1);
/// Entries that wait to be taken from the stream before it stops reading.
const AHEAD: usize = 64;

/// A stream of entries that runs until it is dropped.
#[derive(Debug)]
pub struct Listener {
    entries: mpsc::Receiver<Result<Entry, Error>>,
    /// The error after the entries that were given last.
    failed: Option<Error>,
    task: JoinHandle<()>,
}

impl Listener {
    /// The next entry: first those that were not marked as seen, then what comes. Lost connections
    /// are made again without an entry
    /// ([`Client::connection_events`](crate::Client::connection_events) tells); an error is the
    /// end, after which comes `None`. Cancel-safe.
    pub async fn next(&mut self) -> Option<Result<Entry, Error>> {
        match self.failed.take() {
            Some(error) => Some(Err(error)),
            None => self.entries.recv().await,
        }
    }

    /// As [`Listener::next`], together with all that has come already, at least one: to be marked
    /// as seen together, at the price of one. Cancel-safe.
    pub async fn next_all(&mut self) -> Option<Result<Vec<Entry>, Error>> {
        if let Some(error) = self.failed.take() {
            return Some(Err(error));
        }
        let mut taken = Vec::new();
        self.entries.recv_many(&mut taken, AHEAD).await;
        let mut entries = Vec::with_capacity(taken.len());
        for entry in taken {
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
    /// Listens to the inbox. Entries come once; mark them as seen once they were shown.
    pub fn listen(&self) -> Listener {
        let (sender, entries) = mpsc::channel(AHEAD);
        let ear = Ear { messenger: self.clone(), sender, last: None, sending: JoinSet::new() };
        let task = tokio::spawn(ear.run());
        Listener { entries, failed: None, task }
    }
}

struct Ear {
    messenger: Messenger,
    sender: mpsc::Sender<Result<Entry, Error>>,
    /// The last entry given.
    last: Option<EntryId>,
    /// The task that sends the outbox, if it runs. It runs concurrently with reading, so that a
    /// large outbox, or a server that accepts little at a time, does not delay what comes.
    sending: JoinSet<Result<(), Error>>,
}

/// Why a round of listening ended.
enum Ended {
    /// The connection was lost or is about to be: subscribe again.
    Connection,
    /// Nobody listens any more.
    Dropped,
}

/// The result of waiting for signals.
enum Waited {
    Signals(Vec<Signal>),
    /// It is time to look without one.
    Nothing,
    /// There will be no more.
    End,
    /// Nobody listens any more.
    Dropped,
}

type Signals = Pin<Box<dyn Stream<Item = Signal> + Send>>;

impl Ear {
    async fn run(mut self) {
        let mut failures = 0;
        loop {
            let error = match self.round(&mut failures).await {
                Ok(Ended::Connection) => continue,
                Ok(Ended::Dropped) => return,
                Err(error) => error,
            };
            if !error.call().is_some_and(crate::CallError::is_temporary) {
                // If nobody listens any more, nobody needs the error.
                let _ = self.sender.send(Err(error)).await;
                return;
            }
            failures += 1;
            sleep(self.messenger.client().options().backoff.delay(failures, OsRng.next_u64()))
                .await;
        }
    }

    /// Subscribes, then looks whenever there may be something.
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
            self.send().await?;
            keys = NewKeys::NotNeeded;
            *failures = 0;
            let until = Instant::now() + every + OsRng.gen_range(Duration::ZERO..=every / 2);
            match self.wait(&mut signals, until).await? {
                Waited::Nothing => {}
                Waited::Dropped => return Ok(Ended::Dropped),
                Waited::End => return Ok(Ended::Connection),
                Waited::Signals(received) => {
                    if received.iter().any(|signal| matches!(signal, Signal::KeyPackagesLow(_))) {
                        keys = NewKeys::Needed;
                    }
                    let is_draining =
                        received.iter().any(|signal| matches!(signal, Signal::Draining(_)));
                    if is_draining && self.messenger.client().renew().await == Renewed::Yes {
                        return Ok(Ended::Connection);
                    }
                }
            }
        }
    }

    /// Takes in what has come and gives it; answers whether anyone still listens.
    async fn read(&mut self, mut keys: NewKeys) -> Result<bool, Error> {
        if self.messenger.sync().await? == NewKeys::Needed {
            keys = NewKeys::Needed;
        }
        self.messenger.settle_names().await?;
        // Messages come before everything that can wait.
        if !self.give().await? {
            return Ok(false);
        }
        self.messenger.settle_keys(keys).await?;
        unless_final("repair", self.messenger.repair().await)?;
        Ok(true)
    }

    /// Starts to send what is to be sent, unless that is under way.
    async fn send(&mut self) -> Result<(), Error> {
        if self.sending.is_empty() && self.messenger.has_unsent().await? {
            let messenger = self.messenger.clone();
            self.sending.spawn(async move { messenger.flush().await });
        }
        Ok(())
    }

    /// Waits for signals. Passes on the results of sending meanwhile.
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
                    if !self.give().await? {
                        return Ok(Waited::Dropped);
                    }
                }
            }
        }
    }

    /// Gives what was not given yet; answers whether anyone still listens.
    async fn give(&mut self) -> Result<bool, Error> {
        loop {
            let entries = self.messenger.unseen_after(self.last, AHEAD).await?;
            let Some(last) = entries.last().map(|entry| entry.id) else { return Ok(true) };
            for entry in entries {
                if self.sender.send(Ok(entry)).await.is_err() {
                    return Ok(false);
                }
            }
            self.last = Some(last);
        }
    }
}

/// Waits for a signal, and takes all that are there with it: one look serves them all. `None`:
/// there will be no more. Cancel-safe.
async fn next_signals(signals: &mut Signals) -> Option<Vec<Signal>> {
    let mut heard = vec![signals.next().await?];
    while let Some(Some(signal)) = signals.next().now_or_never() {
        heard.push(signal);
    }
    Some(heard)
}
