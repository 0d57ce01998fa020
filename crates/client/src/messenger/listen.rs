//! The live stream: what comes in, as it comes in.
//!
//! The server's events only say when to look; what there is comes from Peek alone. So a lost event costs seconds, never a
//! message: every few seconds, and after every reconnect, the inbox is looked at anyway.

use std::{pin::Pin, time::Duration};

use futures_util::{FutureExt as _, Stream, StreamExt as _, stream};
use qpq_proto::Event as Signal;
use rand::{Rng as _, rngs::OsRng};
use tokio::{
    sync::mpsc,
    task::JoinHandle,
    time::{sleep, timeout},
};

use super::{
    Messenger,
    inbox::{NewKeys, unless_final},
    log::{Entry, EntryId},
};
use crate::{error::Error, link::Renewed};

/// How often to look without being told to, with half as much jitter.
const FALLBACK: Duration = Duration::from_secs(4);
/// The same where the server tells nothing.
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
    /// The next entry: first those that were not marked as seen, then what comes. Lost connections are made anew
    /// without a word ([`Client::connection_events`](crate::Client::connection_events) tells); an error is the end, after
    /// which comes `None`. Cancel-safe.
    pub async fn next(&mut self) -> Option<Result<Entry, Error>> {
        match self.failed.take() {
            Some(error) => Some(Err(error)),
            None => self.entries.recv().await,
        }
    }

    /// As [`Listener::next`], together with all that has come already, at least one: to be marked as seen together, at the
    /// price of one. Cancel-safe.
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
        let task = tokio::spawn(Ear { messenger: self.clone(), sender, last: None }.run());
        Listener { entries, failed: None, task }
    }
}

struct Ear {
    messenger: Messenger,
    sender: mpsc::Sender<Result<Entry, Error>>,
    /// The last entry given.
    last: Option<EntryId>,
}

/// Why a round of listening ended.
enum Ended {
    /// The connection was lost or is about to be: subscribe anew.
    Connection,
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
            sleep(self.messenger.client().options().backoff.delay(failures, &mut OsRng)).await;
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
            if !self.read(keys).await? || !self.send().await? {
                return Ok(Ended::Dropped);
            }
            keys = NewKeys::NotNeeded;
            *failures = 0;
            let pause = every + OsRng.gen_range(Duration::ZERO..=every / 2);
            match timeout(pause, next_signals(&mut signals)).await {
                Err(_) => {}
                Ok(None) => return Ok(Ended::Connection),
                Ok(Some(heard)) => {
                    if heard.iter().any(|signal| matches!(signal, Signal::KeyPackagesLow(_))) {
                        keys = NewKeys::Needed;
                    }
                    let is_draining = heard.iter().any(|signal| matches!(signal, Signal::Draining(_)));
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
        Ok(true)
    }

    /// Sends what is to be sent, some at a time, and reads in between: nobody who has much to say is deaf meanwhile.
    async fn send(&mut self) -> Result<bool, Error> {
        let mut backlog = self.messenger.backlog().await?;
        while backlog.is_left() {
            let sent = self.messenger.send_some(&mut backlog).await;
            if sent.is_err() {
                unless_final("outbox", sent)?;
                return self.give().await;
            }
            if !self.read(NewKeys::NotNeeded).await? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Gives what was not given yet; answers whether anyone still listens.
    async fn give(&mut self) -> Result<bool, Error> {
        for entry in self.messenger.unseen().await? {
            if self.last.is_some_and(|last| entry.id <= last) {
                continue;
            }
            self.last = Some(entry.id);
            if self.sender.send(Ok(entry)).await.is_err() {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Waits for a signal, and takes all that are there with it: one look serves them all. `None`: there will be no more.
async fn next_signals(signals: &mut Signals) -> Option<Vec<Signal>> {
    let mut heard = vec![signals.next().await?];
    while let Some(Some(signal)) = signals.next().now_or_never() {
        heard.push(signal);
    }
    Some(heard)
}
