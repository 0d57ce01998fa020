//! Which messages are leased, and what a reader may therefore show. In memory: a process that has
//! died leases nothing.
//!
//! A reader's snapshot is older than the moment at which it decides what to show, and in between
//! another reader may have completed what the snapshot still holds. So removals are counted for as
//! long as anybody reads: a reader enters first, notes the count, takes its snapshot, and then,
//! under the lock, either claims what it may or, if the count has moved, reads again. Who removes
//! commits first and counts after: a message that is gone from the table can only be shown by a
//! reader whose note is older, and that one reads again.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use qpq_domain::{IdentityKey, Seq, StoreId};
use qpq_ports::{Page, View};

use super::read::Snapshot;
use crate::{
    shards::{Shards, shrink},
    wakes::WakeTable,
};

/// The inboxes in which something is leased or being read. The others take no memory.
#[derive(Debug)]
pub(super) struct LeaseTable {
    inboxes: Shards<IdentityKey, Entry>,
    wakes: Arc<WakeTable>,
}

#[derive(Debug, Default)]
struct Entry {
    readers: usize,
    removals: u64,
    leased: HashSet<Seq>,
}

/// The count of removals that a reader noted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mark(u64);

impl LeaseTable {
    pub(super) fn new(wakes: Arc<WakeTable>) -> Self {
        Self { inboxes: Shards::default(), wakes }
    }

    /// Something was removed from `inbox` and that is committed.
    pub(super) fn removed(&self, inbox: &IdentityKey) {
        if let Some(entry) = self.inboxes.lock(inbox).get_mut(inbox) {
            entry.removals += 1;
        }
    }

    fn end(&self, inbox: &IdentityKey, change: impl FnOnce(&mut Entry)) {
        let mut inboxes = self.inboxes.lock(inbox);
        let entry = inboxes.get_mut(inbox).expect("it lives as long as its readers and leases");
        change(entry);
        if entry.readers == 0 && entry.leased.is_empty() {
            inboxes.remove(inbox);
            shrink(&mut inboxes);
        }
    }
}

/// Somebody who reads an inbox. While there is one, the inbox's entry is there.
#[derive(Debug)]
pub(super) struct InboxVisit<'t> {
    table: &'t Arc<LeaseTable>,
    inbox: IdentityKey,
}

impl<'t> InboxVisit<'t> {
    pub(super) fn enter(table: &'t Arc<LeaseTable>, inbox: IdentityKey) -> Self {
        table.inboxes.lock(&inbox).entry(inbox).or_default().readers += 1;
        Self { table, inbox }
    }

    /// To be noted before the snapshot is taken.
    pub(super) fn mark(&self) -> Mark {
        self.entry(|entry| Mark(entry.removals))
    }

    /// What of the snapshot may be shown. None when it is too old and must be taken again.
    pub(super) fn look(&self, mark: Mark, store_id: StoreId, snapshot: &Snapshot) -> Option<Page> {
        self.entry(|entry| entry.visible(mark, store_id, snapshot))
    }

    /// As [`InboxVisit::look`], and leases what may be shown, if anything.
    pub(super) fn claim(
        &self,
        mark: Mark,
        store_id: StoreId,
        snapshot: &Snapshot,
        view: View,
    ) -> Option<(Page, Option<Claim>)> {
        self.entry(|entry| {
            let page = entry.visible(mark, store_id, snapshot)?;
            let seqs: Box<[Seq]> = page.envelopes.iter().map(|envelope| envelope.seq).collect();
            entry.leased.extend(&seqs[..]);
            let claim = (!seqs.is_empty()).then(|| Claim {
                table: Arc::clone(self.table),
                inbox: self.inbox,
                view,
                seqs,
                removed: false,
            });
            Some((page, claim))
        })
    }

    fn entry<T>(&self, look: impl FnOnce(&mut Entry) -> T) -> T {
        let mut inboxes: parking_lot::MutexGuard<'_, HashMap<_, _>> =
            self.table.inboxes.lock(&self.inbox);
        look(inboxes.get_mut(&self.inbox).expect("it lives as long as its readers"))
    }
}

impl Drop for InboxVisit<'_> {
    fn drop(&mut self) {
        self.table.end(&self.inbox, |entry| entry.readers -= 1);
    }
}

impl Entry {
    fn visible(&self, mark: Mark, store_id: StoreId, snapshot: &Snapshot) -> Option<Page> {
        if Mark(self.removals) != mark {
            return None;
        }
        let free = |seq: &Seq| !self.leased.contains(seq);
        let envelopes: Vec<_> =
            snapshot.envelopes.iter().take_while(|envelope| free(&envelope.seq)).cloned().collect();
        let whole = envelopes.len() == snapshot.envelopes.len();
        Some(Page { store_id, more: whole && snapshot.next.as_ref().is_some_and(free), envelopes })
    }
}

/// Leased messages. Dropped, they are released.
#[derive(Debug)]
pub(super) struct Claim {
    table: Arc<LeaseTable>,
    inbox: IdentityKey,
    /// What they were read in.
    view: View,
    seqs: Box<[Seq]>,
    removed: bool,
}

impl Claim {
    /// The messages are gone, and that is committed.
    pub(super) fn removed(mut self) {
        self.removed = true;
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.table.end(&self.inbox, |entry| {
            self.seqs.iter().for_each(|seq| {
                entry.leased.remove(seq);
            });
            if self.removed {
                entry.removals += 1;
            }
        });
        self.table.wakes.wake(&self.inbox, self.view);
    }
}
