//! Group commit: the messages of all waiting calls are accepted in one transaction, and then the
//! calls are answered. While one transaction commits, calls for the next one gather. The more calls
//! share a transaction, the less each of them costs.
//!
//! A transaction is bounded in messages and bytes, and the waiting messages of one sender fit in
//! one transaction ([`qpq_ports::admission`]). So a large batch of one sender delays another
//! sender's message by at most one transaction.
//!
//! Each committer has a range of the inboxes, and a call goes to the committer of its first
//! recipient. So single messages to an inbox are committed in the order in which they arrive at
//! this edge, and two committers of an edge rarely lock the same head.

use std::{mem, sync::Arc};

use qpq_domain::{DeliveryLimits, IdentityKey};
use qpq_ports::{
    Batch, Enqueued, NewMessage, StoreError, StoreResult,
    admission::{Admission, AdmissionPermit},
    batcher::{self, BatchSize, BatchWorker, Batcher},
};
use tracing::{Instrument as _, Span};

use super::{
    enqueue::{Accept, Outcomes},
    pushes::Pushes,
};
use crate::{
    effects::Applier,
    error::{PostgresError, PostgresErrorKind},
    history::History,
    metrics as names,
    postgres::{ClusterMark, Database},
    time::Time,
};

/// The number of committers of an edge: one waits for the disk while the other prepares its
/// transaction. With more committers, fewer messages would share the fixed cost of a transaction,
/// which is most of the cost of a message when few messages are in flight.
pub const COMMITTERS: usize = 2;
/// Memory of a waiting message in addition to its payload, in bytes.
const MESSAGE_BYTES: usize = 256;

/// The committers of this edge. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Committers {
    committers: Arc<[Batcher<Call>]>,
    admission: Admission,
}

type Call = batcher::Call<Messages, StoreResult<Vec<Enqueued>>>;

/// The messages of one call.
#[derive(Debug)]
struct Messages {
    messages: Vec<NewMessage>,
    bytes: usize,
    /// The span of the call, whose trace shows the commit.
    span: Span,
    _permit: AdmissionPermit,
}

impl Committers {
    /// Starts the committers. Needs a tokio runtime.
    pub(crate) fn start(
        database: &Database,
        history: &History,
        limits: DeliveryLimits,
        time: &Time,
        mark: &ClusterMark,
        applier: &Applier,
    ) -> Self {
        let start = |_| {
            Batcher::start([Committer {
                database: database.clone(),
                history: history.clone(),
                limits,
                time: time.clone(),
                mark: mark.clone(),
                pushes: Pushes::new(applier.clone()),
            }])
        };
        Self { committers: (0..COMMITTERS).map(start).collect(), admission: Admission::default() }
    }

    /// Accepts the messages of a batch durably.
    pub(super) async fn enqueue(&self, Batch { messages }: Batch) -> StoreResult<Vec<Enqueued>> {
        let Some(first) = messages.first() else { return Ok(Vec::new()) };
        let committer = committer_of(&first.recipient, self.committers.len());
        let bytes = messages.iter().map(|message| message.payload.len() + MESSAGE_BYTES).sum();
        let permit = self.admission.admit_from(&first.sender, messages.len(), bytes).await;
        let permit = permit.map_err(StoreError::unavailable)?;
        metrics::gauge!(names::ENQUEUE_QUEUE).increment(messages.len() as f64);
        let call = Messages { messages, bytes, span: Span::current(), _permit: permit };
        self.committers[committer].call(call).await
    }

    /// Commits the waiting messages, and ends.
    pub(crate) async fn close(&self) {
        for committer in &*self.committers {
            committer.close().await;
        }
    }
}

/// Returns the index of an inbox's committer. Each of `committers` has an equal range of the first
/// two bytes of the key, since keys are evenly distributed.
fn committer_of(inbox: &IdentityKey, committers: usize) -> usize {
    let [high, low, ..] = *inbox.as_bytes();
    usize::from(u16::from_be_bytes([high, low])) * committers / (usize::from(u16::MAX) + 1)
}

struct Committer {
    database: Database,
    history: History,
    limits: DeliveryLimits,
    time: Time,
    mark: ClusterMark,
    pushes: Pushes,
}

impl BatchWorker for Committer {
    type Item = Call;

    const LIMIT: BatchSize = BatchSize { count: 256, bytes: 8 << 20 };

    fn size(call: &Call) -> BatchSize {
        BatchSize { count: call.item.messages.len(), bytes: call.item.bytes }
    }

    async fn run(&mut self, mut calls: Vec<Call>) {
        let sizes: Vec<_> = calls.iter().map(|call| call.item.messages.len()).collect();
        let messages: Vec<NewMessage> =
            calls.iter_mut().flat_map(|call| mem::take(&mut call.item.messages)).collect();
        metrics::gauge!(names::ENQUEUE_QUEUE).decrement(messages.len() as f64);
        metrics::histogram!(names::ENQUEUE_BATCH).record(messages.len() as f64);
        // Each call's trace shows the commit that it shared; the first one also shows the
        // statements.
        let count = messages.len();
        let shares: Vec<_> = calls.iter().filter_map(|call| call.item.share(count)).collect();
        let first = shares.first().cloned().unwrap_or_else(Span::none);
        let outcome = self.commit(&messages).instrument(first).await;
        drop(shares);
        match outcome {
            Ok(outcomes) => self.committed(calls, &sizes, &messages, outcomes).await,
            // Postgres rejected a message that passed all earlier checks. Commit each call
            // separately, so that the other calls succeed.
            Err(error) if error.kind() == PostgresErrorKind::Rejected && calls.len() > 1 => {
                let mut messages = &messages[..];
                for (call, size) in calls.into_iter().zip(sizes) {
                    let (own, rest) = messages.split_at(size);
                    messages = rest;
                    match self.commit(own).await {
                        Ok(outcomes) => self.committed(vec![call], &[size], own, outcomes).await,
                        Err(error) => call.answer.send(Err(error.into())),
                    }
                }
            }
            Err(error) => {
                calls.into_iter().for_each(|call| call.answer.send(Err(error.clone().into())));
            }
        }
    }

    async fn end(self) {
        self.pushes.end().await;
    }
}

impl Committer {
    async fn commit(&self, messages: &[NewMessage]) -> Result<Outcomes, PostgresError> {
        let accept = Accept { messages, limits: &self.limits, time: &self.time, mark: &self.mark };
        self.database.run(&accept).await
    }

    /// Answers the calls, and only then updates Redis: the messages are durable whether or not that
    /// succeeds.
    async fn committed(
        &mut self,
        calls: Vec<Call>,
        sizes: &[usize],
        messages: &[NewMessage],
        outcomes: Outcomes,
    ) {
        let mut of_each = outcomes.of_each.iter().map(|outcome| outcome.enqueued);
        for (call, size) in calls.into_iter().zip(sizes) {
            call.answer.send(Ok(of_each.by_ref().take(*size).collect()));
        }
        if let Some(store_id) = outcomes.store_id {
            self.history.note(store_id);
        }
        if let Some(accepted) = outcomes.accepted(messages) {
            self.pushes.push(accepted).await;
        }
    }
}

impl Messages {
    /// Returns a span for the commit of a batch in the trace of this call, if the call is traced.
    fn share(&self, messages: usize) -> Option<Span> {
        let traced = !self.span.is_none();
        traced.then(
            || tracing::debug_span!(target: "qpq::store", parent: &self.span, "commit", messages),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn committers_have_equal_ranges_of_the_inboxes() {
        let inbox = |prefix: u16| {
            let mut key = [7; 32];
            key[..2].copy_from_slice(&prefix.to_be_bytes());
            IdentityKey::new(key)
        };
        for committers in [1, 2, 3, 7] {
            let of_each: Vec<_> =
                (0..=u16::MAX).map(|prefix| committer_of(&inbox(prefix), committers)).collect();
            assert!(of_each.is_sorted());
            assert_eq!((of_each[0], of_each[usize::from(u16::MAX)]), (0, committers - 1));
        }
    }
}
