//! Group completion: the pages of many completed leases are removed in one transaction. One
//! transaction for each page would cost many times as much as the removal of its rows. Pages of
//! single readers are removed by one statement, pages of devices by a transaction of several.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use qpq_domain::{Seq, StoreId, UnixMillis};
use qpq_ports::{
    StoreResult,
    batcher::{self, BatchSize, BatchWorker, Batcher},
};

use super::{
    done::{CompletePages, DeviceCompletion, DevicePage},
    remove::RemovePages,
};
use crate::{
    error::PostgresError,
    metrics as names,
    postgres::Database,
    redis::queue::{RegistrationId, UNKNOWN_REMOVAL},
};

/// Concurrent transactions.
const COMPLETERS: usize = 2;

/// The completers of leases. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Completers(Batcher<Call>);

type Call = batcher::Call<CompletedPage, StoreResult<Completion>>;

/// A page that its client has received.
#[derive(Debug)]
pub(super) struct CompletedPage {
    pub(super) store_id: StoreId,
    pub(super) inbox: i64,
    /// The registration of the device; `None` for the single reader.
    pub(super) registration: Option<RegistrationId>,
    pub(super) seqs: Vec<Seq>,
    pub(super) now: UnixMillis,
}

/// The result of a completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Completion {
    /// The messages are removed. The number is that of the reader's removal, or [`UNKNOWN_REMOVAL`]
    /// if no message of the page was left for the reader: an ack removed them, this edge removed
    /// them and the answer of Postgres was lost, or the reader no longer exists.
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
            // A batch has at most one page of each reader, so that each removal belongs to one
            // page, and only pages of one history.
            let (mut readers, store_id) = (HashSet::new(), first.item.store_id);
            let of_devices = first.item.registration.is_some();
            let (batch, later) = pages.into_iter().partition(|Call { item, .. }| {
                item.store_id == store_id
                    && item.registration.is_some() == of_devices
                    && readers.insert((item.inbox, item.registration))
            });
            pages = later;
            self.remove(store_id, of_devices, batch).await;
        }
    }
}

/// The numbers of removals, by inbox and registration; `None` if the pages are of another history.
type Removals = Option<HashMap<(i64, Option<RegistrationId>), u64>>;

impl Completer {
    async fn remove(&self, store_id: StoreId, of_devices: bool, batch: Vec<Call>) {
        metrics::histogram!(names::COMPLETION_BATCH).record(batch.len() as f64);
        let removed = if of_devices {
            self.complete_device_pages(store_id, &batch).await
        } else {
            self.remove_pages(store_id, &batch).await
        };
        for call in batch {
            let reader = (call.item.inbox, call.item.registration);
            call.answer.send(match &removed {
                Ok(Some(removed)) => Ok(Completion::Removed(
                    removed.get(&reader).copied().unwrap_or(UNKNOWN_REMOVAL),
                )),
                Ok(None) => Ok(Completion::OtherHistory),
                Err(error) => Err(error.clone().into()),
            });
        }
    }

    async fn remove_pages(
        &self,
        store_id: StoreId,
        batch: &[Call],
    ) -> Result<Removals, PostgresError> {
        let pages = || batch.iter().map(|call| &call.item);
        let rows = || pages().flat_map(|page| page.seqs.iter().map(|seq| (page.inbox, *seq)));
        let remove = RemovePages {
            store_id,
            inboxes: rows().map(|(inbox, _)| inbox).collect(),
            seqs: rows().map(|(_, seq)| seq).collect(),
            now: latest(batch),
            recent_ids: self.recent_ids,
        };
        let removed = self.database.run(&remove).await?;
        let of_single = |(inbox, number)| ((inbox, None), number);
        Ok(removed.map(|removed| removed.into_iter().map(of_single).collect()))
    }

    async fn complete_device_pages(
        &self,
        store_id: StoreId,
        batch: &[Call],
    ) -> Result<Removals, PostgresError> {
        let page = |call: &Call| {
            let CompletedPage { inbox, registration, seqs, .. } = &call.item;
            Some(DevicePage { inbox: *inbox, registration: (*registration)?, seqs: seqs.clone() })
        };
        let complete = CompletePages {
            store_id,
            pages: batch.iter().filter_map(page).collect(),
            now: latest(batch),
            recent_ids: self.recent_ids,
        };
        let done = self.database.run(&complete).await?;
        Ok(done.map(|done| {
            let removal =
                |done: DeviceCompletion| ((done.inbox, Some(done.registration)), done.number);
            done.into_iter().map(removal).collect()
        }))
    }
}

fn latest(batch: &[Call]) -> UnixMillis {
    batch.iter().map(|call| call.item.now).max().unwrap_or_default()
}
