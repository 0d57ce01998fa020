//! Group completion: pages that clients have got are removed many at a time, as messages are
//! committed many at a time. A completion by itself would cost a transaction, which is many times
//! what removing its rows costs.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use qpq_domain::{Seq, StoreId, UnixMillis};
use qpq_ports::{StoreError, StoreResult};
use tokio::sync::{Mutex, mpsc, oneshot};

use super::remove;
use crate::{
    error::Shared,
    metrics as names,
    postgres::{Database, Repeat},
    redis::queue::UNKNOWN_REMOVAL,
};

/// Transactions at a time.
const SETTLERS: usize = 2;
/// Pages in one transaction at most.
const BATCH: usize = 256;

#[derive(Debug, thiserror::Error)]
#[error("the store is closed")]
struct Closed;

/// Takes pages to be removed. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Completers {
    pages: mpsc::UnboundedSender<Completed>,
}

/// A page that its client has.
#[derive(Debug)]
struct Completed {
    store_id: StoreId,
    inbox: i64,
    seqs: Vec<Seq>,
    now: UnixMillis,
    answer: oneshot::Sender<StoreResult<Completion>>,
}

/// What became of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Completion {
    /// Its messages are gone, by the inbox's removal of this number. That is unknown if nothing of
    /// the page was left: others removed it, or this edge did and Postgres's answer was lost.
    Removed(u64),
    /// The page is of another history than the present one. Nothing was removed.
    OtherHistory,
}

impl Completers {
    /// Needs a tokio runtime, on which they work as long as somebody has them.
    pub(super) fn start(database: &Database, recent_ids: Duration) -> Self {
        let (pages, waiting) = mpsc::unbounded_channel();
        let waiting = Arc::new(Mutex::new(waiting));
        for _ in 0..SETTLERS {
            tokio::spawn(complete(database.clone(), recent_ids, Arc::clone(&waiting)));
        }
        Self { pages }
    }

    /// Removes the messages of a page that was read in a history, durably.
    pub(super) async fn complete(
        &self,
        store_id: StoreId,
        inbox: i64,
        seqs: Vec<Seq>,
        now: UnixMillis,
    ) -> StoreResult<Completion> {
        let (answer, completed) = oneshot::channel();
        self.pages
            .send(Completed { store_id, inbox, seqs, now, answer })
            .map_err(|_| StoreError::unavailable(Closed))?;
        completed.await.unwrap_or_else(|_| Err(StoreError::unavailable(Closed)))
    }
}

async fn complete(
    database: Database,
    recent_ids: Duration,
    waiting: Arc<Mutex<mpsc::UnboundedReceiver<Completed>>>,
) {
    let mut pages = Vec::with_capacity(BATCH);
    loop {
        // Held while it waits: the other is then at work, or has nothing to do either.
        if waiting.lock().await.recv_many(&mut pages, BATCH).await == 0 {
            return;
        }
        while !pages.is_empty() {
            // One page of an inbox at a time, so that each removal stands for one page; and pages of
            // one history, which is nearly always all of them.
            let (mut inboxes, store_id) = (HashSet::new(), pages[0].store_id);
            let (batch, later) = pages
                .drain(..)
                .partition(|page| page.store_id == store_id && inboxes.insert(page.inbox));
            pages = later;
            remove_all(&database, recent_ids, store_id, batch).await;
        }
    }
}

async fn remove_all(
    database: &Database,
    recent_ids: Duration,
    store_id: StoreId,
    batch: Vec<Completed>,
) {
    metrics::histogram!(names::COMPLETION_BATCH).record(batch.len() as f64);
    let now = batch.iter().map(|page| page.now).max().unwrap_or_default();
    let shown: Arc<[(i64, Seq)]> =
        batch.iter().flat_map(|page| page.seqs.iter().map(|seq| (page.inbox, *seq))).collect();
    let removed: Result<Option<HashMap<i64, u64>>, Shared> = database
        .once_shared("complete", Repeat::Harmless, |connection| {
            let shown = Arc::clone(&shown);
            Box::pin(
                async move { remove::shown(connection, &store_id, &shown, now, recent_ids).await },
            )
        })
        .await;
    for page in batch {
        let outcome = match &removed {
            Ok(Some(removed)) => Ok(Completion::Removed(
                removed.get(&page.inbox).copied().unwrap_or(UNKNOWN_REMOVAL),
            )),
            Ok(None) => Ok(Completion::OtherHistory),
            Err(error) => Err(error.clone().into()),
        };
        // Whoever gave up changes nothing.
        let _ = page.answer.send(outcome);
    }
}
