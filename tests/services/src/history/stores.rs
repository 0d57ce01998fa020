//! The histories of the store in a run, with their messages and lifetimes.
//!
//! A history that lost messages begins a new [`Branch`]. The seqs of the state that it began with
//! belong to its parent branch, and all later seqs are its own. A history that lost nothing
//! continues the branch of the previous history.

use std::collections::{BTreeMap, HashMap};

use qpq_domain::{Seq, StoreId};

use super::{Inbox, Kept, Moment, StoreChange};

/// Consecutive histories of the store without a loss between them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Branch(usize);

/// A history of the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Store(usize);

/// A seq of an inbox, together with the branch that assigned it to a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Place {
    pub(super) inbox: Inbox,
    pub(super) seq: Seq,
    pub(super) branch: Branch,
}

/// All histories of the store, the oldest first.
#[derive(Debug)]
pub(super) struct Stores {
    all: Vec<Lifetime>,
    branches: Vec<BranchOf>,
    by_id: HashMap<StoreId, Store>,
}

#[derive(Debug)]
struct Lifetime {
    branch: Branch,
    /// The time after which the history may exist.
    from: Moment,
    /// The time after which the next history may exist.
    alone_until: Moment,
    /// The time after which the history does not exist.
    until: Moment,
}

#[derive(Debug)]
struct BranchOf {
    /// The parent branch, and the last seq of each inbox in the state that this branch began with.
    parent: Option<(Branch, BTreeMap<Inbox, Seq>)>,
    from: Moment,
    until: Moment,
}

const ALWAYS: Moment = Moment(u64::MAX);

impl Stores {
    /// Creates the histories from the changes. `first` is the store id of the only history, if the
    /// store did not change.
    ///
    /// # Panics
    /// If a change continues an unknown history, or keeps everything of a history that had ended
    /// before.
    pub(super) fn new(first: Option<StoreId>, changes: &[StoreChange]) -> Self {
        let first = changes.first().map(|change| change.continues).or(first);
        let start = Moment(0);
        let mut stores = Self {
            all: vec![Lifetime {
                branch: Branch(0),
                from: start,
                alone_until: ALWAYS,
                until: ALWAYS,
            }],
            branches: vec![BranchOf { parent: None, from: start, until: ALWAYS }],
            by_id: first.map(|id| (id, Store(0))).into_iter().collect(),
        };
        changes.iter().for_each(|change| stores.change(change));
        stores
    }

    fn change(&mut self, change: &StoreChange) {
        let continues = self.by_id.get(&change.continues);
        let continues = *continues.unwrap_or_else(|| panic!("an unknown history: {change:?}"));
        let newest = self.all.last_mut().expect("there is a first one");
        (newest.alone_until, newest.until) = (change.from, change.until);
        let newest = newest.branch;
        self.branches[newest.0].until = change.until;
        let parent = self.all[continues.0].branch;
        let branch = match &change.kept {
            Kept::Everything => {
                assert_eq!(continues.0, self.all.len() - 1, "it had ended before: {change:?}");
                self.branches[newest.0].until = ALWAYS;
                newest
            }
            Kept::UpTo(seqs) => {
                self.branches.push(BranchOf {
                    parent: Some((parent, seqs.clone())),
                    from: change.from,
                    until: ALWAYS,
                });
                Branch(self.branches.len() - 1)
            }
        };
        let before = self.by_id.insert(change.store, Store(self.all.len()));
        assert!(before.is_none(), "a store id is used twice: {change:?}");
        self.all.push(Lifetime { branch, from: change.from, alone_until: ALWAYS, until: ALWAYS });
    }

    pub(super) fn count(&self) -> usize {
        self.all.len()
    }

    /// Returns the history with this id, if there is one.
    ///
    /// # Panics
    /// If the id was not recorded, and there is more than one history.
    pub(super) fn get(&self, id: Option<StoreId>) -> Option<Store> {
        match id {
            Some(id) => self.by_id.get(&id).copied(),
            None => {
                assert_eq!(
                    self.all.len(),
                    1,
                    "the store changed: record the store id of each read"
                );
                Some(Store(0))
            }
        }
    }

    pub(super) fn branch(&self, store: Store) -> Branch {
        self.all[store.0].branch
    }

    /// Returns whether a call between `begun` and `ended` can have read from this history.
    pub(super) fn existed(&self, store: Store, begun: Moment, ended: Option<Moment>) -> bool {
        let Lifetime { from, until, .. } = self.all[store.0];
        begun <= until && ended.is_none_or(|ended| ended >= from)
    }

    /// Returns whether a call that ended at `ended` certainly took effect in this history, provided
    /// that it took effect in this history or a later one.
    pub(super) fn is_certain(&self, store: Store, ended: Moment) -> bool {
        ended < self.all[store.0].alone_until
    }

    /// Returns whether a call between `begun` and `ended` can have taken effect in this branch.
    pub(super) fn may_reach(&self, branch: Branch, begun: Moment, ended: Option<Moment>) -> bool {
        let BranchOf { from, until, .. } = self.branches[branch.0];
        begun <= until && ended.is_none_or(|ended| ended >= from)
    }

    /// Returns the possible places of a seq in the answer to a call between `begun` and `ended`.
    pub(super) fn places(
        &self,
        (inbox, seq): (Inbox, Seq),
        begun: Moment,
        ended: Option<Moment>,
    ) -> Vec<Place> {
        let stores = (0..self.all.len()).map(Store);
        let possible = stores.filter(|store| self.existed(*store, begun, ended));
        let mut places: Vec<_> = possible.map(|store| self.place(store, inbox, seq)).collect();
        places.dedup();
        places
    }

    pub(super) fn place(&self, store: Store, inbox: Inbox, seq: Seq) -> Place {
        let mut branch = self.branch(store);
        while let Some(parent) = self.shared_with(branch, inbox, seq) {
            branch = parent;
        }
        Place { inbox, seq, branch }
    }

    /// Returns whether `branch` has the message at `place`.
    pub(super) fn has(&self, branch: Branch, place: Place) -> bool {
        let mut branch = branch;
        while branch != place.branch {
            match self.shared_with(branch, place.inbox, place.seq) {
                Some(parent) => branch = parent,
                None => return false,
            }
        }
        // The branch of a place is the oldest branch that has its message.
        true
    }

    /// Returns whether the last history has the message at `place`.
    pub(super) fn survives(&self, place: Place) -> bool {
        self.has(self.all.last().expect("there is a first one").branch, place)
    }

    /// Returns the parent of `branch`, if `branch` shares this seq with it.
    fn shared_with(&self, branch: Branch, inbox: Inbox, seq: Seq) -> Option<Branch> {
        let (parent, seqs) = self.branches[branch.0].parent.as_ref()?;
        seqs.get(&inbox).is_some_and(|kept| seq <= *kept).then_some(*parent)
    }
}
