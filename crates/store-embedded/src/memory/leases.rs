//! The leases, and the pages that reads may return because of them.
//!
//! A read takes its snapshot before it decides which messages it returns. In between, another call
//! may remove messages that are in the snapshot. So removals are counted while an inbox is read:
//!
//! 1. The read registers itself ([`ReadInProgress`]) and notes the count.
//! 2. The read takes its snapshot, which includes the reader's registration.
//! 3. Under the lock, the read leases the messages that it may return. If the reader has removed
//!    messages since, or a reader of the inbox was added or removed, the read begins again at step
//!    1.
//!
//! A removal is counted after its commit and before its lease ends. Therefore only a read that
//! noted an older count can have removed messages in its snapshot, and that read begins again.
//! Removals by one device do not affect reads of another: a message is deleted only when it waits
//! for no other device.

use std::{collections::HashSet, sync::Arc};

use parking_lot::MutexGuard;
use qpq_domain::{IdentityKey, Seq, StoreId};
use qpq_ports::{Page, View};

use super::{
    shards::{Shards, shrink},
    wakes::WakeTable,
};
use crate::{
    messages::read::Snapshot,
    reader::{InboxReader, RegistrationNumber},
};

/// The leases of all readers. An inbox without leases and reads takes no memory.
#[derive(Debug)]
pub(crate) struct LeaseTable {
    inboxes: Shards<IdentityKey, InboxState>,
    wakes: Arc<WakeTable>,
}

#[derive(Debug, Default)]
struct InboxState {
    reads_in_progress: usize,
    /// The count of removals and of changes of the readers.
    changes: ChangeCount,
    /// The count after the last change of the readers.
    readers_changed: ChangeCount,
    /// The readers with leases, and those that have removed messages during the reads in progress.
    readers: Vec<ReaderState>,
}

#[derive(Debug)]
struct ReaderState {
    registration: Option<RegistrationNumber>,
    /// The count after the last removal of this reader.
    removed: ChangeCount,
    leased: HashSet<Seq>,
}

/// The number of changes of an inbox up to some instant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ChangeCount(u64);

impl LeaseTable {
    pub(super) fn new(wakes: Arc<WakeTable>) -> Self {
        Self { inboxes: Shards::default(), wakes }
    }

    /// Counts a committed removal.
    pub(super) fn removed(&self, reader: &InboxReader) {
        if let Some(state) = self.inboxes.lock(&reader.inbox).get_mut(&reader.inbox) {
            let count = state.count_change();
            state.reader(reader.registration).removed = count;
        }
    }

    /// Counts a committed change of the readers of an inbox.
    pub(super) fn readers_changed(&self, inbox: &IdentityKey) {
        if let Some(state) = self.inboxes.lock(inbox).get_mut(inbox) {
            state.readers_changed = state.count_change();
        }
    }

    /// Ends a read or a lease, and frees the state after the last one.
    fn end(&self, inbox: &IdentityKey, change: impl FnOnce(&mut InboxState)) {
        let mut shard = self.inboxes.lock(inbox);
        let state = shard.get_mut(inbox).expect("exists while a read or lease does");
        change(state);
        if state.reads_in_progress > 0 {
            return;
        }
        // Reads no longer compare with the counts of removals.
        state.readers.retain(|reader| !reader.leased.is_empty());
        if state.readers.is_empty() {
            shard.remove(inbox);
            shrink(&mut shard);
        }
    }
}

/// A read that has not returned. The state of its inbox exists until it is dropped.
#[derive(Debug)]
pub(crate) struct ReadInProgress<'t> {
    table: &'t Arc<LeaseTable>,
    inbox: IdentityKey,
}

impl<'t> ReadInProgress<'t> {
    pub(crate) fn begin(table: &'t Arc<LeaseTable>, inbox: IdentityKey) -> Self {
        table.inboxes.lock(&inbox).entry(inbox).or_default().reads_in_progress += 1;
        Self { table, inbox }
    }

    /// Returns the count to note before the snapshot.
    pub(crate) fn changes(&self) -> ChangeCount {
        self.with_state(|state| state.changes)
    }

    /// Returns the messages of the snapshot that are not leased. `None` if messages were removed
    /// since `noted`: the snapshot must be taken again.
    pub(crate) fn page(
        &self,
        noted: ChangeCount,
        store_id: StoreId,
        snapshot: &Snapshot,
    ) -> Option<Page> {
        self.with_state(|state| state.page(noted, store_id, snapshot))
    }

    /// Returns a page as [`ReadInProgress::page`] does, and leases its messages, if there are any.
    pub(crate) fn lease(
        &self,
        noted: ChangeCount,
        store_id: StoreId,
        snapshot: &Snapshot,
        view: View,
    ) -> Option<(Page, Option<LeaseGuard>)> {
        self.with_state(|state| {
            let page = state.page(noted, store_id, snapshot)?;
            let seqs: Box<[Seq]> = page.envelopes.iter().map(|envelope| envelope.seq).collect();
            if seqs.is_empty() {
                return Some((page, None));
            }
            let registration = snapshot.registration();
            state.reader(registration).leased.extend(&seqs[..]);
            let reader = InboxReader { inbox: self.inbox, registration };
            let guard = LeaseGuard { table: Arc::clone(self.table), reader, view, seqs };
            Some((page, Some(guard)))
        })
    }

    fn with_state<T>(&self, use_state: impl FnOnce(&mut InboxState) -> T) -> T {
        let mut shard: MutexGuard<'_, _> = self.table.inboxes.lock(&self.inbox);
        use_state(shard.get_mut(&self.inbox).expect("exists while the read does"))
    }
}

impl Drop for ReadInProgress<'_> {
    fn drop(&mut self) {
        self.table.end(&self.inbox, |state| state.reads_in_progress -= 1);
    }
}

impl InboxState {
    fn count_change(&mut self) -> ChangeCount {
        self.changes.0 += 1;
        self.changes
    }

    /// Returns the state of a reader, by a linear search because an inbox has few readers.
    fn reader(&mut self, registration: Option<RegistrationNumber>) -> &mut ReaderState {
        let known = self.readers.iter().position(|reader| reader.registration == registration);
        let index = known.unwrap_or_else(|| {
            // Most inboxes have one reader, so no memory is reserved for others.
            self.readers.reserve_exact(1);
            let (removed, leased) = (ChangeCount::default(), HashSet::new());
            self.readers.push(ReaderState { registration, removed, leased });
            self.readers.len() - 1
        });
        &mut self.readers[index]
    }

    fn page(&self, noted: ChangeCount, store_id: StoreId, snapshot: &Snapshot) -> Option<Page> {
        let registration = snapshot.registration();
        let reader = self.readers.iter().find(|reader| reader.registration == registration);
        let removed = reader.map_or(ChangeCount::default(), |reader| reader.removed);
        if noted < removed.max(self.readers_changed) {
            return None;
        }
        let is_free = |seq: &Seq| reader.is_none_or(|reader| !reader.leased.contains(seq));
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

/// A guard that hides leased messages from other reads until it is dropped, which releases them.
///
/// If the messages were removed before, dropping the guard only ends the lease.
#[derive(Debug)]
pub(crate) struct LeaseGuard {
    table: Arc<LeaseTable>,
    reader: InboxReader,
    view: View,
    seqs: Box<[Seq]>,
}

impl LeaseGuard {
    pub(crate) fn reader(&self) -> InboxReader {
        self.reader
    }
}

impl Drop for LeaseGuard {
    fn drop(&mut self) {
        let InboxReader { inbox, registration } = self.reader;
        self.table.end(&inbox, |state| {
            let leased = &mut state.reader(registration).leased;
            self.seqs.iter().for_each(|seq| {
                leased.remove(seq);
            });
        });
        self.table.wakes.wake(&inbox, self.view);
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use qpq_domain::{ChannelId, UnixMillis};
    use qpq_ports::Envelope;

    use super::*;
    use crate::messages::read::SnapshotReader;

    const STORE: StoreId = StoreId::new([7; 16]);
    const INBOX: IdentityKey = IdentityKey::new([1; 32]);
    const SINGLE: InboxReader = InboxReader { inbox: INBOX, registration: None };

    fn device(n: i64) -> InboxReader {
        InboxReader { inbox: INBOX, registration: Some(RegistrationNumber(n)) }
    }

    fn table() -> Arc<LeaseTable> {
        Arc::new(LeaseTable::new(Arc::default()))
    }

    fn snapshot(reader: InboxReader, seqs: &[u64]) -> Snapshot {
        let envelope = |seq: &u64| Envelope {
            seq: Seq(*seq),
            channel: ChannelId::DEFAULT,
            payload: Bytes::new(),
            enqueued_at: UnixMillis(0),
        };
        let last_seen_at = UnixMillis(0);
        let reader = reader.registration.map_or(SnapshotReader::Single, |registration| {
            SnapshotReader::Device { registration, last_seen_at }
        });
        let envelopes = seqs.iter().map(envelope).collect();
        Snapshot { inbox: Some(1), reader, envelopes, next: None }
    }

    fn lease(
        table: &Arc<LeaseTable>,
        reader: InboxReader,
        seqs: &[u64],
    ) -> (Vec<u64>, Option<LeaseGuard>) {
        let read = ReadInProgress::begin(table, reader.inbox);
        let leased = read.lease(read.changes(), STORE, &snapshot(reader, seqs), View::All);
        let (page, guard) = leased.expect("nothing was removed");
        (page.envelopes.iter().map(|envelope| envelope.seq.0).collect(), guard)
    }

    #[test]
    fn a_read_ends_before_the_first_leased_message() {
        let table = table();
        let (seqs, guard) = lease(&table, SINGLE, &[2, 3]);
        assert_eq!(seqs, [2, 3]);
        assert_eq!(lease(&table, SINGLE, &[1, 2, 3, 4]).0, [1]);
        drop(guard);
        assert_eq!(lease(&table, SINGLE, &[1, 2, 3, 4]).0, [1, 2, 3, 4]);
    }

    #[test]
    fn a_lease_hides_messages_only_from_its_own_reader() {
        let table = table();
        let (_, _guard) = lease(&table, device(1), &[1, 2]);
        for other in [SINGLE, device(2)] {
            assert_eq!(lease(&table, other, &[1, 2]).0, [1, 2]);
        }
        assert!(lease(&table, device(1), &[1, 2]).0.is_empty());
    }

    #[test]
    fn a_snapshot_from_before_a_removal_of_its_reader_is_not_used() {
        let table = table();
        let read = ReadInProgress::begin(&table, INBOX);
        let noted = read.changes();
        table.removed(&device(1));
        let snapshot = |n| snapshot(device(n), &[1]);
        assert!(read.page(noted, STORE, &snapshot(1)).is_none());
        assert!(read.lease(noted, STORE, &snapshot(1), View::All).is_none());
        assert!(read.page(noted, STORE, &snapshot(2)).is_some(), "another device's");
        assert!(read.page(read.changes(), STORE, &snapshot(1)).is_some());
    }

    #[test]
    fn a_snapshot_from_before_a_change_of_the_readers_is_not_used() {
        let table = table();
        let read = ReadInProgress::begin(&table, INBOX);
        let noted = read.changes();
        table.readers_changed(&INBOX);
        for reader in [SINGLE, device(1)] {
            assert!(read.page(noted, STORE, &snapshot(reader, &[1])).is_none());
            assert!(read.page(read.changes(), STORE, &snapshot(reader, &[1])).is_some());
        }
    }

    #[test]
    fn memory_is_freed_with_the_last_read_and_lease_of_an_inbox() {
        let table = table();
        let read = ReadInProgress::begin(&table, INBOX);
        let (_, guard) = lease(&table, SINGLE, &[1]);
        table.removed(&device(1));
        drop(read);
        assert_eq!(table.inboxes.len(), 1);
        assert_eq!(table.inboxes.lock(&INBOX)[&INBOX].readers.len(), 1);
        drop(guard);
        assert_eq!(table.inboxes.len(), 0);
    }
}
