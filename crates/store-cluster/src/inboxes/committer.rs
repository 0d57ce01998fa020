//! Group commit: a few tasks, each of which commits the messages of all calls that it finds waiting
//! in one transaction, and then answers them. While one commits, the next calls gather; the more
//! there are, the cheaper each becomes.
//!
//! A transaction is bounded in messages and bytes, and a sender has no more waiting than one of them
//! holds ([`qpq_ports::room`]), so a large batch of one sender delays nobody else's message by more
//! than that.
//!
//! Which task a call goes to is its inbox's shard, so the messages to an inbox that come in here
//! are committed in the order in which they came, and two tasks of an edge rarely want the same
//! head.

use std::{collections::HashMap, sync::Arc};

use qpq_domain::{Delivery, IdentityKey};
use qpq_ports::{
    Batch, Enqueued, Envelope, NewMessage, Shard, StoreError, StoreResult,
    admission::{Admission, AdmissionPermit},
};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tracing::{Instrument as _, Span};

use super::enqueue::{self, Outcomes};
use crate::{
    error::{Kind, Shared},
    history::History,
    metrics as names,
    postgres::{Database, Repeat},
    redis::queue::Queued,
    time::Time,
    wakes::Waking,
};

/// Transactions at a time: one is on its way to the disk while the other is at work. With more,
/// each has fewer messages, and what a transaction costs by itself is most of what a message costs
/// when few are in flight.
pub const COMMITTERS: usize = 2;
/// Messages and bytes in one transaction, from which on no more calls are added.
const BATCH: usize = 256;
const BATCH_BYTES: usize = 8 << 20;
/// What a message takes in memory beside its payload, while it waits.
const MESSAGE_BYTES: usize = 256;
/// What committed batches of one committer may hold on their way to Redis, in units of [`UNIT`]
/// bytes; each takes at least [`PUSH`]. While Redis is slow, committing is too.
const PUSHES: usize = 16 << 10;
const UNIT: usize = 1 << 10;
const PUSH: usize = PUSHES / 32;

#[derive(Debug, thiserror::Error)]
#[error("the store is closed")]
struct Closed;

/// Takes messages to be committed. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Committers {
    calls: Arc<[mpsc::UnboundedSender<Call>]>,
    room: Admission,
}

#[derive(Debug)]
struct Call {
    messages: Vec<NewMessage>,
    bytes: usize,
    answer: oneshot::Sender<StoreResult<Vec<Enqueued>>>,
    /// What traces show it in.
    span: Span,
    _room: AdmissionPermit,
}

impl Committers {
    /// Needs a tokio runtime, on which they work as long as somebody has them.
    pub(super) fn start(
        database: &Database,
        history: &History,
        limits: Delivery,
        time: &Time,
        waking: &Waking,
    ) -> Self {
        let start = |_| {
            let (calls, waiting) = mpsc::unbounded_channel();
            let committer = Committer {
                waiting,
                database: database.clone(),
                history: history.clone(),
                limits,
                time: time.clone(),
                waking: waking.clone(),
                pushes: Arc::new(Semaphore::new(PUSHES)),
            };
            tokio::spawn(committer.run());
            calls
        };
        Self { calls: (0..COMMITTERS).map(start).collect(), room: Admission::default() }
    }

    /// Accepts the messages; answered once that is durable.
    pub(super) async fn enqueue(&self, Batch { messages }: Batch) -> StoreResult<Vec<Enqueued>> {
        let Some(first) = messages.first() else { return Ok(Vec::new()) };
        let committer = Shard::of(&first.recipient).among(self.calls.len());
        let bytes = messages.iter().map(|message| message.payload.len() + MESSAGE_BYTES).sum();
        let room = self.room.admit_from(&first.sender, messages.len(), bytes).await;
        let room = room.map_err(StoreError::unavailable)?;
        let (answer, outcome) = oneshot::channel();
        metrics::gauge!(names::ENQUEUE_QUEUE).increment(messages.len() as f64);
        self.calls[committer]
            .send(Call { messages, bytes, answer, span: Span::current(), _room: room })
            .map_err(|_| StoreError::unavailable(Closed))?;
        outcome.await.unwrap_or_else(|_| Err(StoreError::unavailable(Closed)))
    }
}

struct Committer {
    waiting: mpsc::UnboundedReceiver<Call>,
    database: Database,
    history: History,
    limits: Delivery,
    time: Time,
    waking: Waking,
    pushes: Arc<Semaphore>,
}

impl Committer {
    async fn run(mut self) {
        while let Some(first) = self.waiting.recv().await {
            let (mut messages, mut bytes) = (first.messages.len(), first.bytes);
            let mut calls = vec![first];
            while messages < BATCH && bytes < BATCH_BYTES {
                let Ok(call) = self.waiting.try_recv() else { break };
                messages += call.messages.len();
                bytes += call.bytes;
                calls.push(call);
            }
            metrics::gauge!(names::ENQUEUE_QUEUE).decrement(messages as f64);
            metrics::histogram!(names::ENQUEUE_BATCH).record(messages as f64);
            self.commit(calls).await;
        }
    }

    async fn commit(&self, mut calls: Vec<Call>) {
        let sizes: Vec<_> = calls.iter().map(|call| call.messages.len()).collect();
        let messages: Arc<[NewMessage]> =
            calls.iter_mut().flat_map(|call| std::mem::take(&mut call.messages)).collect();
        // Each call's trace shows the commit that it shared; the first one's also what was in it.
        let shares: Vec<_> = calls.iter().filter_map(|call| call.share(messages.len())).collect();
        let first = shares.first().cloned().unwrap_or_else(Span::none);
        let outcome = self.transaction(&messages).instrument(first).await;
        drop(shares);
        match outcome {
            Ok(outcomes) => self.committed(calls, &sizes, &messages, outcomes).await,
            // Something in the batch is refused by the schema, which no message should be: the
            // others are not to suffer.
            Err(error) if error.kind() == Kind::Refused && calls.len() > 1 => {
                let mut messages = &messages[..];
                for (call, size) in calls.into_iter().zip(sizes) {
                    let (own, rest) = messages.split_at(size);
                    messages = rest;
                    let own: Arc<[NewMessage]> = own.into();
                    match self.transaction(&own).await {
                        Ok(outcomes) => self.committed(vec![call], &[size], &own, outcomes).await,
                        Err(error) => call.failed(&error),
                    }
                }
            }
            Err(error) => calls.into_iter().for_each(|call| call.failed(&error)),
        }
    }

    async fn transaction(&self, messages: &Arc<[NewMessage]>) -> Result<Outcomes, Shared> {
        let limits = self.limits;
        self.database
            .run_shared("enqueue", Repeat::Never, |connection| {
                let (messages, time) = (Arc::clone(messages), self.time.clone());
                Box::pin(async move { enqueue::all(connection, &messages, &limits, &time).await })
            })
            .await
    }

    /// Answers, and only then tells Redis: what is durable is true whether or not anybody hears of
    /// it.
    async fn committed(
        &self,
        calls: Vec<Call>,
        sizes: &[usize],
        messages: &[NewMessage],
        outcomes: Outcomes,
    ) {
        let Outcomes { store_id, of_each: outcomes } = outcomes;
        let mut inboxes: HashMap<IdentityKey, Vec<Queued>> = HashMap::new();
        for (message, outcome) in messages.iter().zip(&outcomes) {
            if let Enqueued::Accepted(receipt) = &outcome.enqueued {
                inboxes.entry(message.recipient).or_default().push(Queued {
                    envelope: Envelope {
                        seq: receipt.seq,
                        channel: message.channel,
                        payload: message.payload.clone(),
                        enqueued_at: receipt.enqueued_at,
                    },
                    expires_at: outcome.expires_at,
                });
            }
        }
        let mut outcomes = outcomes.into_iter().map(|outcome| outcome.enqueued);
        for (call, size) in calls.into_iter().zip(sizes) {
            // Whoever gave up changes nothing.
            let _ = call.answer.send(Ok(outcomes.by_ref().take(*size).collect()));
        }
        let Some(store_id) = store_id else { return };
        self.history.note(store_id);
        if inboxes.is_empty() {
            return;
        }
        let bytes: usize = inboxes.values().flatten().map(|queued| queued.envelope.cost()).sum();
        let units = u32::try_from((bytes / UNIT).clamp(PUSH, PUSHES)).expect("clamped");
        let pushes = Arc::clone(&self.pushes);
        let permit = pushes.acquire_many_owned(units).await.expect("never closed");
        let waking = self.waking.clone();
        tokio::spawn(async move {
            waking.push(store_id, inboxes).await;
            drop(permit);
        });
    }
}

impl Call {
    /// A span of this call's trace, if it is traced, for the commit of a batch of so many messages.
    fn share(&self, messages: usize) -> Option<Span> {
        let traced = !self.span.is_none();
        traced.then(
            || tracing::debug_span!(target: "qpq::store", parent: &self.span, "commit", messages),
        )
    }

    fn failed(self, error: &Shared) {
        // As above.
        let _ = self.answer.send(Err(error.clone().into()));
    }
}
