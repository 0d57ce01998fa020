//! The leases, and the pages that reads may return because of them.
//!
//! A read takes its snapshot before it decides what to return. In between, another call may remove
//! messages that are in the snapshot. So removals are counted while an inbox is read:
//!
//! 1. The read registers itself ([`ReadInProgress`]) and notes the count.
//! 2. The read takes its snapshot.
//! 3. Under the lock, the read leases what it may return. If the count has changed, it begins again
//!    at step 1.
//!
//! A removal is counted after its commit and before its lease ends. So only a read with an older
//! count can have removed messages in its snapshot, and that read begins again.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use qpq_domain::{Seq, StoreId};
use qpq_ports::{Page, Reader, View};

use super::{
    shards::{Shards, shrink},
    wakes::WakeTable,
};
use crate::messages::read::Snapshot;

/// The leases of all readers. A reader without leases and reads takes no memory.
#[derive(Debug)]
pub(crate) struct LeaseTable {
    readers: Shards<Reader, ReaderState>,
    wakes: Arc<WakeTable>,
}

#[derive(Debug, Default)]
struct ReaderState {
    reads_in_progress: usize,
    removals: u64,
    leased: HashSet<Seq>,
}

/// The number of removals at an instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RemovalCount(u64);

impl LeaseTable {
    pub(super) fn new(wakes: Arc<WakeTable>) -> Self {
        Self { readers: Shards::default(), wakes }
    }

    /// Counts a committed removal.
    pub(super) fn removed(&self, reader: &Reader) {
        if let Some(state) = self.readers.lock(reader).get_mut(reader) {
            state.removals += 1;
        }
    }

    /// Ends a read or a lease, and frees the state after the last one.
    fn end(&self, reader: &Reader, change: impl FnOnce(&mut ReaderState)) {
        let mut shard = self.readers.lock(reader);
        let state = shard.get_mut(reader).expect("exists while a read or lease does");
        change(state);
        if state.reads_in_progress == 0 && state.leased.is_empty() {
            shard.remove(reader);
            shrink(&mut shard);
        }
    }
}

/// A read that has not returned. The state of its reader exists while it does.
#[derive(Debug)]
pub(crate) struct ReadInProgress<'t> {
    table: &'t Arc<LeaseTable>,
    reader: Reader,
}

impl<'t> ReadInProgress<'t> {
    pub(crate) fn begin(table: &'t Arc<LeaseTable>, reader: Reader) -> Self {
        table.readers.lock(&reader).entry(reader).or_default().reads_in_progress += 1;
        Self { table, reader }
    }

    /// Returns the count to note before the snapshot.
    pub(crate) fn removals(&self) -> RemovalCount {
        self.with_state(|state| RemovalCount(state.removals))
    }

    /// Returns the messages of the snapshot that are not leased. `None` if messages were removed
    /// since `noted`: the snapshot must be taken again.
    pub(crate) fn page(
        &self,
        noted: RemovalCount,
        store_id: StoreId,
        snapshot: &Snapshot,
    ) -> Option<Page> {
        self.with_state(|state| state.page(noted, store_id, snapshot))
    }

    /// As [`ReadInProgress::page`], and leases the messages of the page, if there are any.
    pub(crate) fn lease(
        &self,
        noted: RemovalCount,
        store_id: StoreId,
        snapshot: &Snapshot,
        view: View,
    ) -> Option<(Page, Option<LeaseGuard>)> {
        self.with_state(|state| {
            let page = state.page(noted, store_id, snapshot)?;
            let seqs: Box<[Seq]> = page.envelopes.iter().map(|envelope| envelope.seq).collect();
            state.leased.extend(&seqs[..]);
            let table = Arc::clone(self.table);
            let guard =
                (!seqs.is_empty()).then(|| LeaseGuard { table, reader: self.reader, view, seqs });
            Some((page, guard))
        })
    }

    fn with_state<T>(&self, use_state: impl FnOnce(&mut ReaderState) -> T) -> T {
        let mut shard: parking_lot::MutexGuard<'_, HashMap<_, _>> =
            self.table.readers.lock(&self.reader);
        use_state(shard.get_mut(&self.reader).expect("exists while the read does"))
    }
}

impl Drop for ReadInProgress<'_> {
    fn drop(&mut self) {
        self.table.end(&self.reader, |state| state.reads_in_progress -= 1);
    }
}

impl ReaderState {
    fn page(&self, noted: RemovalCount, store_id: StoreId, snapshot: &Snapshot) -> Option<Page> {
        if RemovalCount(self.removals) != noted {
            return None;
        }
        let is_free = |seq: &Seq| !self.leased.contains(seq);
        let envelopes: Vec<_> = snapshot
            .envelopes
            .iter()
            .take_while(|envelope| is_free(&envelope.seq))
            .cloned()
            .collect();
        let is_whole = envelopes.len() == snapshot.envelopes.len();
        let more = is_whole && snapshot.next.as_ref().is_some_and(is_free);
        Some(Page { store_id, more, envelopes })
    }
}

/// Hides leased messages from other reads until it is dropped, which releases them.
///
/// Dropped after the messages were removed, it only ends the lease.
#[derive(Debug)]
pub(crate) struct LeaseGuard {
    table: Arc<LeaseTable>,
    reader: Reader,
    view: View,
    seqs: Box<[Seq]>,
}

impl LeaseGuard {
    pub(crate) fn reader(&self) -> Reader {
        self.reader
    }
}

impl Drop for LeaseGuard {
    fn drop(&mut self) {
        self.table.end(&self.reader, |state| {
            self.seqs.iter().for_each(|seq| {
                state.leased.remove(seq);
            });
        });
        self.table.wakes.wake(&self.reader, self.view);
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use qpq_domain::{ChannelId, DeviceId, IdentityKey, UnixMillis};
    use qpq_ports::Envelope;

    use super::*;

    const STORE: StoreId = StoreId::new([7; 16]);
    const READER: Reader = Reader::single(IdentityKey::new([1; 32]));

    fn table() -> Arc<LeaseTable> {
        Arc::new(LeaseTable::new(Arc::default()))
    }

    fn snapshot(seqs: &[u64]) -> Snapshot {
        let envelope = |seq: &u64| Envelope {
            seq: Seq(*seq),
            channel: ChannelId::DEFAULT,
            payload: Bytes::new(),
            enqueued_at: UnixMillis(0),
        };
        Snapshot { inbox: Some(1), envelopes: seqs.iter().map(envelope).collect(), next: None }
    }

    fn lease(
        table: &Arc<LeaseTable>,
        reader: Reader,
        seqs: &[u64],
    ) -> (Vec<u64>, Option<LeaseGuard>) {
        let read = ReadInProgress::begin(table, reader);
        let leased = read.lease(read.removals(), STORE, &snapshot(seqs), View::All);
        let (page, guard) = leased.expect("nothing was removed");
        (page.envelopes.iter().map(|envelope| envelope.seq.0).collect(), guard)
    }

    #[test]
    fn a_read_ends_before_the_first_leased_message() {
        let table = table();
        let (seqs, guard) = lease(&table, READER, &[2, 3]);
        assert_eq!(seqs, [2, 3]);
        assert_eq!(lease(&table, READER, &[1, 2, 3, 4]).0, [1]);
        drop(guard);
        assert_eq!(lease(&table, READER, &[1, 2, 3, 4]).0, [1, 2, 3, 4]);
    }

    #[test]
    fn a_lease_hides_messages_from_its_own_reader_alone() {
        let table = table();
        let device = Reader { device: Some(DeviceId::new([1; 16])), ..READER };
        let (_, _guard) = lease(&table, READER, &[1, 2]);
        assert_eq!(lease(&table, device, &[1, 2]).0, [1, 2]);
        assert!(lease(&table, READER, &[1, 2]).0.is_empty());
    }

    #[test]
    fn a_snapshot_from_before_a_removal_is_taken_again() {
        let table = table();
        let read = ReadInProgress::begin(&table, READER);
        let noted = read.removals();
        table.removed(&READER);
        assert!(read.page(noted, STORE, &snapshot(&[1])).is_none());
        assert!(read.lease(noted, STORE, &snapshot(&[1]), View::All).is_none());
        assert!(read.page(read.removals(), STORE, &snapshot(&[1])).is_some());
    }

    #[test]
    fn memory_is_freed_with_the_last_read_and_lease_of_a_reader() {
        let table = table();
        let read = ReadInProgress::begin(&table, READER);
        let (_, guard) = lease(&table, READER, &[1]);
        drop(read);
        assert_eq!(table.readers.len(), 1);
        drop(guard);
        assert_eq!(table.readers.len(), 0);
    }
}
