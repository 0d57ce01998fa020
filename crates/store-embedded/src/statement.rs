//! Statements: changes of the store as values, which the writer runs.

use sqlx::SqliteConnection;

use crate::effects::Effects;

/// A change of the store: its parameters and the SQL that they are for.
///
/// A statement changes nothing in memory. The writer applies its [`Done::effects`] to the memory
/// once the transaction is committed. Then, or after a failure, the writer drops the statement.
pub(crate) trait Statement: Send + Sync + 'static {
    type Answer: Send + 'static;

    /// The name in logs.
    const NAME: &'static str;

    const SCOPE: Scope = Scope::Savepoint;

    /// Returns the approximate memory of the statement in the queue, in bytes.
    fn bytes(&self) -> usize {
        SMALL
    }

    /// Runs the statement in a transaction, which the writer begins and commits.
    fn run(
        &self,
        tx: &mut SqliteConnection,
    ) -> impl Future<Output = sqlx::Result<Done<Self::Answer>>> + Send;
}

/// The memory of a statement with a few small parameters, in bytes.
pub(crate) const SMALL: usize = 256;

/// The changes that the failure of a statement rolls back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// The changes of the statement, which runs in a savepoint.
    Savepoint,
    /// The changes of its batch. For frequent statements that never fail because of a row: they
    /// save the two round trips to SQLite's thread that a savepoint costs.
    Batch,
    /// The changes of the statement, which has a transaction of its own. For statements that are
    /// likely to fail with their whole transaction, which would fail the rest of a batch too.
    Alone,
}

/// The result of a statement that did not fail.
#[derive(Debug)]
pub(crate) struct Done<T> {
    pub(crate) answer: T,
    pub(crate) effects: Effects,
    pub(crate) changes: Changes,
}

/// The decision of a statement to commit or to roll back its changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Changes {
    Keep,
    /// Needs [`Scope::Savepoint`].
    Undo,
}

impl<T> Done<T> {
    /// Returns a result without effects in memory.
    pub(crate) fn keep(answer: T) -> Self {
        Self::with(answer, Effects::default())
    }

    pub(crate) fn with(answer: T, effects: Effects) -> Self {
        Self { answer, effects, changes: Changes::Keep }
    }

    /// Returns the result of a statement whose changes are rolled back.
    pub(crate) fn undo(answer: T) -> Self {
        Self { answer, effects: Effects::default(), changes: Changes::Undo }
    }
}
