//! The state of the store that is in memory. All of it may be lost: leases and subscriptions end
//! with the process, the rest is read from the database.

mod endpoints;
mod history;
mod leases;
mod limits;
mod sessions;
mod shards;
mod wakes;

use std::sync::Arc;

pub(crate) use self::{
    endpoints::EndpointTable,
    history::History,
    leases::{ChangeCount, LeaseGuard, LeaseTable, ReadInProgress},
    limits::Limiter,
    sessions::SessionCache,
    wakes::WakeTable,
};
use crate::{clock::ClockGuard, effects::Effects};

/// The state that commits change.
#[derive(Debug)]
pub(crate) struct Memory {
    pub(crate) sessions: SessionCache,
    pub(crate) leases: Arc<LeaseTable>,
    pub(crate) wakes: Arc<WakeTable>,
    pub(crate) history: History,
    pub(crate) clock: ClockGuard,
}

impl Memory {
    pub(crate) fn new(history: History, clock: ClockGuard) -> Self {
        let wakes = Arc::<WakeTable>::default();
        let leases = Arc::new(LeaseTable::new(Arc::clone(&wakes)));
        Self { sessions: SessionCache::new(), leases, wakes, history, clock }
    }

    /// Applies the effects of a committed transaction. Called in the order of the commits, before
    /// the callers are answered.
    pub(crate) fn apply(&self, effects: Effects) {
        let Effects {
            sessions_changed,
            session_used,
            completed_by,
            readers_changed,
            wakes,
            new_store_id,
            clock_check,
        } = effects;
        if !sessions_changed.is_empty() {
            self.sessions.forget(&sessions_changed);
        }
        if let Some(session_use) = session_used {
            self.sessions.touch(&session_use);
        }
        if let Some(reader) = completed_by {
            self.leases.removed(&reader);
        }
        if let Some(inbox) = readers_changed {
            self.leases.readers_changed(&inbox);
        }
        if let Some(store_id) = new_store_id {
            self.history.set(store_id);
        }
        if let Some(check) = clock_check {
            self.clock.checked(&check);
        }
        // Last, so that a read after a wake sees all changes above.
        for (inbox, view) in wakes {
            self.wakes.wake(&inbox, view);
        }
    }
}
