//! Inboxes in SQLite.
//!
//! A message is a row, found by its inbox and seq; the inbox's head (last seq, count, bytes) is
//! another, kept by triggers. `enqueue` accepts, `read` reads a snapshot, `remove` deletes and
//! remembers ids, and `lease` decides which of the rows that were read may be shown.
//!
//! A message that has expired is gone, whether or not a sweep has come by: it is not shown, not
//! counted as acked, and its id is remembered from the instant of its expiry. So what a caller sees
//! never depends on when the sweeper ran.

pub(crate) mod enqueue;
mod lease;
#[cfg(test)]
mod plans;
mod read;
mod remove;

use std::sync::Arc;

use async_trait::async_trait;
use futures_util::FutureExt as _;
use qpq_domain::{Delivery, Seq, UnixMillis};
use qpq_ports::{
    Ack, Batch, Enqueued, Inboxes, Lease, Page, PageLimit, ReadQuery, StoreResult, View,
};
use sqlx::SqlitePool;

pub(crate) use remove::{forget, sweep};

use self::{
    lease::{Claim, InboxVisit, LeaseTable},
    remove::Selection,
};
use crate::{
    clock::Guard,
    error::read_failed,
    history::History,
    wakes::WakeTable,
    writer::{Outcome, Scope, Writer},
};

/// Seqs in an ack that are looked for one by one.
const LONG_ACK: usize = 256;

#[derive(Debug)]
pub(crate) struct EmbeddedInboxes {
    writer: Writer,
    readers: SqlitePool,
    wakes: Arc<WakeTable>,
    leases: Arc<LeaseTable>,
    history: History,
    clock: Guard,
    limits: Delivery,
}

impl EmbeddedInboxes {
    pub(crate) fn new(
        writer: Writer,
        readers: SqlitePool,
        wakes: Arc<WakeTable>,
        history: History,
        clock: Guard,
        limits: Delivery,
    ) -> Self {
        let leases = Arc::new(LeaseTable::new(Arc::clone(&wakes)));
        Self { writer, readers, wakes, leases, history, clock, limits }
    }
}

#[async_trait]
impl Inboxes for EmbeddedInboxes {
    async fn enqueue(&self, Batch { messages }: Batch) -> StoreResult<Vec<Enqueued>> {
        if messages.is_empty() {
            return Ok(Vec::new());
        }
        let wakes = Arc::clone(&self.wakes);
        self.writer
            .enqueue(messages, move |messages, outcomes| {
                for (message, outcome) in messages.iter().zip(outcomes) {
                    if matches!(outcome, Enqueued::Accepted(_)) {
                        wakes.wake(&message.recipient, View::Channel(message.channel));
                    }
                }
            })
            .await
    }

    async fn lease(
        &self,
        read: ReadQuery,
        limit: PageLimit,
        now: UnixMillis,
    ) -> StoreResult<Box<dyn Lease>> {
        let reader = InboxVisit::enter(&self.leases, read.reader.inbox);
        // Before the mark, so that whoever waits for a connection does not read in vain.
        let mut connection = self.readers.acquire().await.map_err(read_failed)?;
        loop {
            let (mark, store_id) = (reader.mark(), self.history.id());
            let snapshot = read::snapshot(&mut connection, &read, Seq::ZERO, limit, now).await?;
            if let Some((page, claim)) = reader.claim(mark, store_id, &snapshot, read.view) {
                return Ok(Box::new(InboxLease {
                    claimed: claim.zip(snapshot.inbox),
                    page,
                    read,
                    writer: self.writer.clone(),
                    history: self.history.clone(),
                    clock: self.clock.clone(),
                    limits: self.limits,
                    shown_at: now,
                }));
            }
        }
    }

    async fn peek(
        &self,
        read: ReadQuery,
        after: Seq,
        limit: PageLimit,
        now: UnixMillis,
    ) -> StoreResult<Page> {
        let reader = InboxVisit::enter(&self.leases, read.reader.inbox);
        let mut connection = self.readers.acquire().await.map_err(read_failed)?;
        loop {
            let (mark, store_id) = (reader.mark(), self.history.id());
            let snapshot = read::snapshot(&mut connection, &read, after, limit, now).await?;
            if let Some(page) = reader.look(mark, store_id, &snapshot) {
                return Ok(page);
            }
        }
    }

    async fn ack(&self, read: ReadQuery, ack: Ack, now: UnixMillis) -> StoreResult<u32> {
        let mut ack = remove::sensible(ack);
        if ack.seqs.len() > LONG_ACK {
            // A list can be much longer than any inbox: the writer shall not go through it.
            let there = read::seqs(&self.readers, &read.reader.inbox).await?;
            ack.seqs.retain(|seq| there.contains(seq));
        }
        if ack.is_empty() {
            return Ok(0);
        }
        // By a clock that went back, ids would be forgotten too soon.
        let removed_at = self.clock.bounds(now).latest;
        let bytes = ack.seqs.len() * size_of::<Seq>();
        let (leases, wakes, recent_ids) =
            (Arc::clone(&self.leases), Arc::clone(&self.wakes), self.limits.recent_ids);
        let history = self.history.clone();
        self.writer
            .run(
                Scope::Batch,
                bytes,
                move |connection| {
                    async move {
                        if ack.store_id.is_some_and(|store_id| store_id != history.id()) {
                            return Ok(Outcome::Keep(0));
                        }
                        remove::acked(connection, &read, &ack, (now, removed_at), recent_ids)
                            .await
                            .map(Outcome::Keep)
                    }
                    .boxed()
                },
                move |removed| {
                    if *removed > 0 {
                        leases.removed(&read.reader.inbox);
                        wakes.wake(&read.reader.inbox, read.view);
                    }
                },
            )
            .await
    }
}

/// A page and, unless it is empty, the claim on its messages.
#[derive(Debug)]
struct InboxLease {
    page: Page,
    claimed: Option<(Claim, i64)>,
    read: ReadQuery,
    writer: Writer,
    history: History,
    clock: Guard,
    limits: Delivery,
    shown_at: UnixMillis,
}

#[async_trait]
impl Lease for InboxLease {
    fn page(&self) -> &Page {
        &self.page
    }

    fn free_payloads(&mut self) {
        self.page.free_payloads();
    }

    async fn complete(self: Box<Self>, now: UnixMillis) -> StoreResult<()> {
        let Self { page, claimed, read, writer, history, clock, limits, shown_at } = *self;
        let (Some((claim, inbox)), [first, .., last] | [first @ last]) =
            (claimed, &page.envelopes[..])
        else {
            return Ok(());
        };
        let store_id = page.store_id;
        // All of the view between the first and the last that had not expired when they were read:
        // what was shown.
        let selection =
            Selection { inbox, view: read.view, from: first.seq, to: last.seq, alive_at: shown_at };
        let removed_at = clock.bounds(now).latest;
        writer
            .run(
                Scope::Batch,
                0,
                move |connection| {
                    async move {
                        if store_id != history.id() {
                            return Ok(Outcome::Keep(None));
                        }
                        remove::selected(connection, &selection, removed_at, limits.recent_ids)
                            .await
                            .map(|removed| Outcome::Keep(Some(removed)))
                    }
                    .boxed()
                },
                // Neither committed nor of this history: the claim is dropped, and with it released.
                move |removed| {
                    if removed.is_some() {
                        claim.removed();
                    }
                },
            )
            .await
            .map(drop)
    }
}
