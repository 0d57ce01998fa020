//! Updates of Redis after commits, and the wakes that follow, concurrently with the next
//! transactions and in bounded memory.

use std::sync::Arc;

use tokio::{sync::Semaphore, task::JoinSet};

use crate::effects::{Accepted, Applier, Effects, ToInbox};

/// The memory for committed messages of one worker that are not in Redis yet, in units of
/// [`BUDGET_UNIT`] bytes. The messages of each transaction count at least [`MIN_PUSH`]. While Redis
/// is slow, commits wait for memory.
const PUSH_BUDGET: usize = 16 << 10;
const BUDGET_UNIT: usize = 1 << 10;
const MIN_PUSH: usize = PUSH_BUDGET / 32;

/// The committed messages of one worker that are not in Redis yet.
#[derive(Debug)]
pub(crate) struct Pushes {
    applier: Applier,
    /// Bounds the memory of `tasks`.
    budget: Arc<Semaphore>,
    tasks: JoinSet<()>,
}

impl Pushes {
    pub(crate) fn new(applier: Applier) -> Self {
        Self { applier, budget: Arc::new(Semaphore::new(PUSH_BUDGET)), tasks: JoinSet::new() }
    }

    /// Updates Redis and wakes waiting edges in a new task, once the budget has room.
    pub(crate) async fn push(&mut self, accepted: Accepted) {
        let bytes: usize = accepted.inboxes.values().map(ToInbox::bytes).sum();
        let units =
            u32::try_from((bytes / BUDGET_UNIT).clamp(MIN_PUSH, PUSH_BUDGET)).expect("clamped");
        let budget = Arc::clone(&self.budget);
        let permit = budget.acquire_many_owned(units).await.expect("never closed");
        let applier = self.applier.clone();
        while self.tasks.try_join_next().is_some() {}
        self.tasks.spawn(async move {
            applier.apply(Effects { accepted: Some(accepted), ..Effects::default() }).await;
            drop(permit);
        });
    }

    /// Waits for all updates.
    pub(crate) async fn end(mut self) {
        while self.tasks.join_next().await.is_some() {}
    }
}
