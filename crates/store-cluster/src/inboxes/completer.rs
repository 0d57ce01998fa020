//! Group completion: the pages of many completed leases are removed in one transaction. A
//! transaction for each would cost many times what removing its rows costs.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use qpq_domain::{Seq, StoreId, UnixMillis};
use qpq_ports::{
    StoreResult,
    batcher::{self, BatchSize, BatchWorker, Batcher},
};

use super::remove::RemovePages;
use crate::{metrics as names, postgres::Database, redis::queue::UNKNOWN_REMOVAL};

/// Transactions at a time.
const COMPLETERS: usize = 2;

/// Completes leases. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Completers(Batcher<Call>);

type Call = batcher::Call<CompletedPage, StoreResult<Completion>>;

/// A page that its client has received.
#[derive(Debug)]
pub(super) struct CompletedPage {
    pub(super) store_id: StoreId,
    pub(super) inbox: i64,
    pub(super) seqs: Vec<Seq>,
    pub(super) now: UnixMillis,
}

/// The result of a completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Completion {
    /// The messages are removed, by the inbox's removal of this number. The number is unknown if
    /// nothing of the page was left: another reader removed it, or this edge did and the answer of
    /// Postgres was lost.
    Removed(u64),
    /// The page is of another history than the present one. Nothing was removed.
    OtherHistory,
}

impl Completers {
    /// Starts the completers. Needs a tokio runtime.
    pub(crate) fn start(database: &Database, recent_ids: Duration) -> Self {
        let start = |_| Completer { database: database.clone(), recent_ids };
        Self(Batcher::start((0..COMPLETERS).map(start)))
    }

    /// Removes the messages of a page durably.
    pub(super) async fn complete(&self, page: CompletedPage) -> StoreResult<Completion> {
        self.0.call(page).await
    }

    /// Removes the pages that wait, and ends.
    pub(crate) async fn close(&self) {
        self.0.close().await;
    }
}

struct Completer {
    database: Database,
    recent_ids: Duration,
}

impl BatchWorker for Completer {
    type Item = Call;

    const LIMIT: BatchSize = BatchSize { count: 256, bytes: usize::MAX };

    async fn run(&mut self, mut pages: Vec<Call>) {
        while let [first, ..] = &pages[..] {
            // One page of an inbox at a time, so that each removal stands for one page; and pages
            // of one history, which is nearly always all of them.
            let (mut inboxes, store_id) = (HashSet::new(), first.item.store_id);
            let (batch, later) = pages.into_iter().partition(|Call { item, .. }| {
                item.store_id == store_id && inboxes.insert(item.inbox)
            });
            pages = later;
            self.remove(store_id, batch).await;
        }
    }
}

impl Completer {
    async fn remove(&self, store_id: StoreId, batch: Vec<Call>) {
        metrics::histogram!(names::COMPLETION_BATCH).record(batch.len() as f64);
        let pages = || batch.iter().map(|call| &call.item);
        let rows = || pages().flat_map(|page| page.seqs.iter().map(|seq| (page.inbox, *seq)));
        let remove = RemovePages {
            store_id,
            inboxes: rows().map(|(inbox, _)| inbox).collect(),
            seqs: rows().map(|(_, seq)| seq).collect(),
            now: pages().map(|page| page.now).max().unwrap_or_default(),
            recent_ids: self.recent_ids,
        };
        let removed: Result<Option<HashMap<i64, u64>>, _> = self.database.run(&remove).await;
        for call in batch {
            call.answer.send(match &removed {
                Ok(Some(removed)) => Ok(Completion::Removed(
                    removed.get(&call.item.inbox).copied().unwrap_or(UNKNOWN_REMOVAL),
                )),
                Ok(None) => Ok(Completion::OtherHistory),
                Err(error) => Err(error.clone().into()),
            });
        }
    }
}
