//! The one writer: a task that owns the only writing connection and commits many calls in one
//! transaction.
//!
//! The writer receives the calls that wait in batches ([`Batcher`]), runs them one after another in
//! one transaction, and answers them after its `COMMIT` has returned. So no call is answered before
//! it is durable, and the calls share the cost of an fsync. During a commit the next calls gather.
//!
//! - A call is a [`Statement`], or messages to enqueue. The messages of all calls of a batch are
//!   inserted together, after the statements. A transaction is bounded, and a sender has no more in
//!   the queue than one transaction may have ([`qpq_ports::admission`]). So a large call of one
//!   sender delays another sender's message by one transaction at most.
//! - A failure that concerns one statement (a constraint, a row that cannot be read) is returned to
//!   its caller alone, if the statement runs in a savepoint.
//! - A failure of the store (full, I/O, corrupt) rolls the batch back and is returned to all of its
//!   callers. The next batch uses a new connection, so the store works again as soon as the disk
//!   does. The size of the failed batch is remembered until a batch of at least that size commits,
//!   because a smaller one may fit on a full disk.
//! - The call of a caller that has stopped waiting is committed, or fails, like any other.

use std::{
    fs::File,
    mem,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use futures_util::future::BoxFuture;
use qpq_domain::{DeliveryLimits, IdentityKey};
use qpq_ports::{
    Enqueued, NewMessage, StoreError, StoreResult,
    admission::{Admission, AdmissionPermit},
    batcher::{BatchSize, BatchWorker, Batcher, Closed},
};
use sqlx::{
    ConnectOptions as _, Connection as _, Row as _, SqliteConnection, sqlite::SqliteConnectOptions,
};
use tokio::{sync::oneshot, time::Instant};

use crate::{
    damage,
    error::{ErrorKind, SharedError, read_failed},
    memory::Memory,
    messages::enqueue,
    metrics as names,
    statement::{Changes, Done, Scope, Statement},
};

/// The memory of a waiting message without its payload.
const MESSAGE_BYTES: usize = 256;

/// A handle that sends calls to the writer. Cheap to clone.
///
/// The task ends with [`Writer::close`], or after the last clone is dropped and the calls that wait
/// are answered.
#[derive(Clone, Debug)]
pub(crate) struct Writer {
    queue: Batcher<Item>,
    admission: Admission,
    refused: Arc<RefusedBytes>,
}

/// The bytes of the largest batch that failed since a batch of at least that size was committed; 0
/// for none.
#[derive(Debug, Default)]
struct RefusedBytes(AtomicUsize);

impl RefusedBytes {
    fn get(&self) -> Option<usize> {
        Some(self.0.load(Ordering::Relaxed)).filter(|bytes| *bytes > 0)
    }

    fn failed(&self, bytes: usize) {
        self.0.fetch_max(bytes.max(1), Ordering::Relaxed);
    }

    fn committed(&self, bytes: usize) {
        if self.get().is_some_and(|refused| refused <= bytes) {
            self.0.store(0, Ordering::Relaxed);
        }
    }
}

/// An item of the queue.
enum Item {
    Statement(Box<dyn QueuedStatement>),
    Enqueue(EnqueueCall),
    TruncateLog(oneshot::Sender<StoreResult<bool>>),
}

impl Writer {
    /// Starts the writer on `connection`. After a failure, `options` open another connection.
    /// `lock` is dropped after the connection is closed.
    pub(crate) fn start(
        connection: SqliteConnection,
        options: SqliteConnectOptions,
        limits: DeliveryLimits,
        memory: Arc<Memory>,
        lock: File,
    ) -> Self {
        let refused = Arc::<RefusedBytes>::default();
        let committer = Committer {
            options,
            limits,
            memory,
            connection: Some(connection),
            refused: Arc::clone(&refused),
            lock,
        };
        Self { queue: Batcher::start([committer]), admission: Admission::default(), refused }
    }

    /// Returns the approximate size of a commit that would show that the last failed batch can
    /// succeed now. `None` if no batch has failed since such a commit.
    pub(crate) fn refused(&self) -> Option<usize> {
        self.refused.get()
    }

    /// Runs `statement` in a transaction. Returns its answer after the commit.
    ///
    /// The effects are applied in the order of the commits, whether or not the caller still waits.
    pub(crate) async fn run<S: Statement>(&self, statement: S) -> StoreResult<S::Answer> {
        let permit = self.admission.admit(statement.bytes()).await;
        self.run_admitted(statement, permit.map_err(StoreError::unavailable)?).await
    }

    /// Runs a statement that accepts a number of messages of `sender`, as [`Writer::run`] does.
    pub(crate) async fn run_from<S: Statement>(
        &self,
        sender: &IdentityKey,
        messages: usize,
        statement: S,
    ) -> StoreResult<S::Answer> {
        let permit = self.admission.admit_from(sender, messages, statement.bytes()).await;
        self.run_admitted(statement, permit.map_err(StoreError::unavailable)?).await
    }

    async fn run_admitted<S: Statement>(
        &self,
        statement: S,
        permit: AdmissionPermit,
    ) -> StoreResult<S::Answer> {
        let (answer, answered) = oneshot::channel();
        let queued = Queued { statement, done: None, answer, _permit: permit };
        self.queue(Item::Statement(Box::new(queued)), answered).await
    }

    /// Accepts messages. Returns their outcomes after the commit.
    pub(crate) async fn enqueue(&self, messages: Vec<NewMessage>) -> StoreResult<Vec<Enqueued>> {
        let bytes = messages.iter().map(|message| message.payload.len() + MESSAGE_BYTES).sum();
        let Some(first) = messages.first() else { return Ok(Vec::new()) };
        let permit = self.admission.admit_from(&first.sender, messages.len(), bytes).await;
        let permit = permit.map_err(StoreError::unavailable)?;
        let (answer, answered) = oneshot::channel();
        let call = EnqueueCall { messages, bytes, answer, _permit: permit };
        self.queue(Item::Enqueue(call), answered).await
    }

    /// Writes the log back into the database file, and truncates the log. Returns `false` if a read
    /// in progress prevented that.
    pub(crate) async fn truncate_log(&self) -> StoreResult<bool> {
        let (answer, answered) = oneshot::channel();
        self.queue(Item::TruncateLog(answer), answered).await
    }

    async fn queue<T>(
        &self,
        item: Item,
        answered: oneshot::Receiver<StoreResult<T>>,
    ) -> StoreResult<T> {
        metrics::gauge!(names::QUEUE_LENGTH).increment(1);
        self.queue.send(item)?;
        answered.await.unwrap_or_else(|_| Err(Closed.into()))
    }

    /// Answers the calls that wait, writes the log back into the database file, closes the
    /// connection, and waits for the end of the task.
    pub(crate) async fn close(&self) {
        self.queue.close().await;
    }
}

/// A statement of any type, in the queue.
trait QueuedStatement: Send {
    fn scope(&self) -> Scope;
    fn name(&self) -> &'static str;
    fn bytes(&self) -> usize;
    /// Runs the statement and keeps its result. Returns whether its changes are kept.
    fn run<'c>(&'c mut self, tx: &'c mut SqliteConnection) -> BoxFuture<'c, sqlx::Result<Changes>>;
    /// Applies the effects and answers the caller.
    fn committed(self: Box<Self>, memory: &Memory);
    fn failed(self: Box<Self>, error: StoreError);
}

struct Queued<S: Statement> {
    statement: S,
    done: Option<Done<S::Answer>>,
    answer: oneshot::Sender<StoreResult<S::Answer>>,
    _permit: AdmissionPermit,
}

impl<S: Statement> QueuedStatement for Queued<S> {
    fn scope(&self) -> Scope {
        S::SCOPE
    }

    fn name(&self) -> &'static str {
        S::NAME
    }

    fn bytes(&self) -> usize {
        self.statement.bytes()
    }

    fn run<'c>(&'c mut self, tx: &'c mut SqliteConnection) -> BoxFuture<'c, sqlx::Result<Changes>> {
        Box::pin(async move {
            let done = self.statement.run(tx).await?;
            let changes = done.changes;
            self.done = Some(done);
            Ok(changes)
        })
    }

    fn committed(self: Box<Self>, memory: &Memory) {
        let Self { statement, done, answer, _permit } = *self;
        let done = done.expect("a committed statement has run");
        memory.apply(done.effects);
        drop(statement);
        // The caller may have stopped waiting.
        let _ = answer.send(Ok(done.answer));
    }

    fn failed(self: Box<Self>, error: StoreError) {
        let Self { statement, answer, .. } = *self;
        drop(statement);
        // The caller may have stopped waiting.
        let _ = answer.send(Err(error));
    }
}

/// The messages of one call.
struct EnqueueCall {
    messages: Vec<NewMessage>,
    bytes: usize,
    answer: oneshot::Sender<StoreResult<Vec<Enqueued>>>,
    _permit: AdmissionPermit,
}

/// The calls of one transaction.
#[derive(Default)]
struct Transaction {
    statements: Vec<Box<dyn QueuedStatement>>,
    calls: Vec<EnqueueCall>,
    bytes: usize,
}

/// The results of a committed transaction.
struct Results {
    /// For each statement, a failure that concerns it alone.
    failures: Vec<Option<SharedError>>,
    /// The outcome of each message, in order.
    enqueued: Done<Vec<Enqueued>>,
}

impl Transaction {
    fn add(&mut self, statement: Box<dyn QueuedStatement>) {
        self.bytes += statement.bytes();
        self.statements.push(statement);
    }

    fn len(&self) -> usize {
        self.statements.len() + self.calls.len()
    }

    /// Applies the effects and answers all calls.
    fn committed(self, results: Results, memory: &Memory) {
        for (statement, failure) in self.statements.into_iter().zip(results.failures) {
            match failure {
                None => statement.committed(memory),
                Some(error) => statement.failed(error.into()),
            }
        }
        memory.apply(results.enqueued.effects);
        let mut outcomes = results.enqueued.answer.into_iter();
        for call in self.calls {
            let outcomes_of_call = outcomes.by_ref().take(call.messages.len()).collect();
            // The caller may have stopped waiting.
            let _ = call.answer.send(Ok(outcomes_of_call));
        }
    }

    fn failed(self, error: &SharedError) {
        self.statements.into_iter().for_each(|statement| statement.failed(error.clone().into()));
        for call in self.calls {
            // The caller may have stopped waiting.
            let _ = call.answer.send(Err(error.clone().into()));
        }
    }
}

/// The state of the writer's task.
struct Committer {
    options: SqliteConnectOptions,
    limits: DeliveryLimits,
    memory: Arc<Memory>,
    /// `None` from a failure until the next batch.
    connection: Option<SqliteConnection>,
    refused: Arc<RefusedBytes>,
    lock: File,
}

impl BatchWorker for Committer {
    type Item = Item;

    const LIMIT: BatchSize = BatchSize { count: 1_024, bytes: 8 << 20 };

    fn size(item: &Item) -> BatchSize {
        let bytes = match item {
            Item::Statement(statement) => statement.bytes(),
            Item::Enqueue(call) => call.bytes,
            Item::TruncateLog(_) => 0,
        };
        BatchSize { count: 1, bytes }
    }

    async fn run(&mut self, items: Vec<Item>) {
        let mut transaction = Transaction::default();
        for item in items {
            match item {
                Item::Statement(statement) if statement.scope() == Scope::Alone => {
                    self.commit(mem::take(&mut transaction)).await;
                    let mut alone = Transaction::default();
                    alone.add(statement);
                    self.commit(alone).await;
                }
                Item::Statement(statement) => transaction.add(statement),
                Item::TruncateLog(answer) => {
                    self.commit(mem::take(&mut transaction)).await;
                    metrics::gauge!(names::QUEUE_LENGTH).decrement(1.0);
                    // The caller may have stopped waiting.
                    let _ = answer.send(self.truncate_log().await);
                }
                Item::Enqueue(call) => {
                    transaction.bytes += call.bytes;
                    transaction.calls.push(call);
                }
            }
        }
        self.commit(transaction).await;
    }

    async fn end(self) {
        if let Some(mut connection) = self.connection {
            finish(&mut connection).await;
            if let Err(error) = connection.close().await {
                tracing::warn!(%error, "database was not closed in good order, no answered call is lost");
            }
        }
        drop(self.lock);
    }
}

impl Committer {
    /// Commits a transaction, if it has calls, and answers them.
    async fn commit(&mut self, mut transaction: Transaction) {
        let (calls, bytes) = (transaction.len(), transaction.bytes);
        if calls == 0 {
            return;
        }
        metrics::gauge!(names::QUEUE_LENGTH).decrement(calls as f64);
        metrics::histogram!(names::BATCH_LENGTH).record(calls as f64);
        let begun = Instant::now();
        match self.run_transaction(&mut transaction).await {
            Ok(results) => {
                metrics::histogram!(names::BATCH_SECONDS).record(begun.elapsed());
                self.refused.committed(bytes);
                transaction.committed(results, &self.memory);
            }
            Err(error) => {
                let kind = ErrorKind::of(&error);
                kind.count();
                tracing::error!(%error, kind = kind.label(), calls, "transaction failed, nothing was committed");
                self.refused.failed(bytes);
                self.disconnect().await;
                transaction.failed(&error.into());
            }
        }
    }

    /// Runs the statements, inserts the messages and commits.
    async fn run_transaction(&mut self, transaction: &mut Transaction) -> sqlx::Result<Results> {
        let connection = match &mut self.connection {
            Some(connection) => connection,
            none => none.insert(self.options.connect().await?),
        };
        execute(connection, "BEGIN IMMEDIATE").await?;
        let mut failures = Vec::with_capacity(transaction.statements.len());
        for statement in &mut transaction.statements {
            failures.push(match statement.scope() {
                Scope::Batch | Scope::Alone => {
                    statement.run(connection).await?;
                    None
                }
                Scope::Savepoint => in_savepoint(statement.as_mut(), connection).await?,
            });
        }
        let messages: Vec<_> = transaction.calls.iter().flat_map(|call| &call.messages).collect();
        let enqueued = if messages.is_empty() {
            Done::keep(Vec::new())
        } else {
            enqueue::all(connection, &messages, &self.limits, &self.memory.clock).await?
        };
        let committing = Instant::now();
        execute(connection, "COMMIT").await?;
        metrics::histogram!(names::COMMIT_SECONDS).record(committing.elapsed());
        Ok(Results { failures, enqueued })
    }

    /// Writes the log back and truncates it. A failed attempt has changed nothing.
    async fn truncate_log(&mut self) -> StoreResult<bool> {
        let connection = match &mut self.connection {
            Some(connection) => connection,
            none => none.insert(self.options.connect().await.map_err(read_failed)?),
        };
        let checkpoint = sqlx::query("PRAGMA wal_checkpoint(TRUNCATE)").fetch_one(connection).await;
        let is_busy = checkpoint.and_then(|row| row.try_get::<i64, _>(0)).map_err(read_failed)?;
        Ok(is_busy == 0)
    }

    /// Closes the connection, whatever its state is.
    async fn disconnect(&mut self) {
        if let Some(mut connection) = self.connection.take() {
            // SQLite may have rolled back already, or the connection may be unusable. Closing it
            // ends the transaction in any case.
            let _ = execute(&mut connection, "ROLLBACK").await;
            let _ = connection.close().await;
        }
    }
}

/// Runs a statement in a savepoint. Returns a failure that concerns the statement alone. Any other
/// failure is an error of the transaction.
async fn in_savepoint(
    statement: &mut dyn QueuedStatement,
    connection: &mut SqliteConnection,
) -> sqlx::Result<Option<SharedError>> {
    execute(connection, "SAVEPOINT statement").await?;
    let ran = statement.run(connection).await;
    if !matches!(ran, Ok(Changes::Keep)) {
        execute(connection, "ROLLBACK TO statement").await?;
    }
    execute(connection, "RELEASE statement").await?;
    match ran {
        Ok(_) => Ok(None),
        Err(error) if ErrorKind::of(&error).concerns_one_statement() => {
            let kind = ErrorKind::of(&error);
            kind.count();
            let statement = statement.name();
            tracing::error!(%error, kind = kind.label(), statement, "statement failed");
            Ok(Some(error.into()))
        }
        Err(error) => Err(error),
    }
}

async fn execute(connection: &mut SqliteConnection, sql: &'static str) -> sqlx::Result<()> {
    sqlx::query(sql).execute(connection).await.map(drop)
}

/// Marks the end as clean, and writes the log back into the database file, so that the file is
/// complete without the log.
async fn finish(connection: &mut SqliteConnection) {
    if let Err(error) = damage::mark_clean_end(connection).await {
        tracing::warn!(%error, "end was not marked as clean, the next start checks every page");
    }
    if let Err(error) = execute(connection, "PRAGMA wal_checkpoint(TRUNCATE)").await {
        tracing::warn!(%error, "write-ahead log was not written back, the next start reads it");
    }
}

#[cfg(test)]
mod tests;
