//! The one writer: a task that owns the only writing connection and commits many requests in one
//! transaction.
//!
//! Whatever changes the store is a *job*. The writer takes all that wait (up to a bound), runs them
//! one after the other in one transaction, and answers them once its `COMMIT` has returned: nothing
//! is acknowledged before it is durable, and the price of an fsync is shared. While it commits, the
//! next jobs gather.
//!
//! - Messages to be enqueued are no jobs of their own: all that wait go to the database together,
//!   after the jobs. A transaction is bounded, and a sender has no more waiting than one holds
//!   ([`qpq_ports::room`]), so a large batch of one sender delays nobody else's message by more.
//! - A job that only concerns itself (a constraint, a row that cannot be read) fails alone, if it
//!   runs in a savepoint.
//! - A failure of the store (full, I/O, corrupt) rolls the whole batch back; each of its jobs is
//!   told, the connection is thrown away, and the next batch begins with a new one. So the store
//!   works again as soon as the disk does. How large the batch was is remembered until one as large
//!   is committed: a small one may fit where that did not.
//! - A caller may go away: its job is carried out or not, but the writer does not care.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use futures_util::future::BoxFuture;
use qpq_domain::Delivery;
use qpq_ports::{
    Enqueued, NewMessage, StoreError, StoreResult,
    admission::{Admission, AdmissionPermit},
};
use sqlx::{ConnectOptions as _, Connection as _, SqliteConnection, sqlite::SqliteConnectOptions};
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use crate::{
    clock::Guard,
    damage,
    error::{Kind, Shared},
    inboxes::enqueue,
    metrics as names,
};

/// Jobs in one transaction at most, and their bytes: what the last one of a batch waits for.
const BATCH_JOBS: usize = 1_024;
const BATCH_BYTES: usize = 8 << 20;

/// What a message takes in memory beside its payload, while it waits.
const MESSAGE_BYTES: usize = 256;

/// What a failure inside a job undoes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// The job alone: it has a savepoint.
    Job,
    /// The batch: for jobs that no row can make fail, and that are many.
    Batch,
    /// The job alone: it has a transaction of its own, for what may well fail and should take
    /// nobody with it.
    SingleEdge,
}

/// How a job ended.
#[derive(Debug)]
pub(crate) enum Outcome<T> {
    Keep(T),
    /// What the job wrote is to be undone; needs [`Scope::Job`].
    Undo(T),
}

#[derive(Debug, thiserror::Error)]
#[error("the store is closed")]
struct Closed;

/// Sends jobs to the writer. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Writer {
    jobs: mpsc::UnboundedSender<Message>,
    room: Admission,
    refused: Arc<Refused>,
}

/// The bytes of the largest batch that was refused since one as large was committed; 0 for none.
#[derive(Debug, Default)]
struct Refused(AtomicUsize);

impl Refused {
    fn bytes(&self) -> Option<usize> {
        Some(self.0.load(Ordering::Relaxed)).filter(|bytes| *bytes > 0)
    }

    fn refused(&self, bytes: usize) {
        self.0.fetch_max(bytes.max(1), Ordering::Relaxed);
    }

    fn committed(&self, bytes: usize) {
        if self.bytes().is_some_and(|refused| refused <= bytes) {
            self.0.store(0, Ordering::Relaxed);
        }
    }
}

enum Message {
    Job(Box<dyn Job>),
    Enqueue(EnqueueCall),
    Close(oneshot::Sender<()>),
}

impl Writer {
    /// Starts the writer on `connection`; `options` make a new one after a failure. `guard` is
    /// dropped when the writer has ended and the connection is closed.
    pub(crate) fn start<G: Send + 'static>(
        connection: SqliteConnection,
        options: SqliteConnectOptions,
        limits: Delivery,
        clock: Guard,
        guard: G,
    ) -> Self {
        let (jobs, waiting) = mpsc::unbounded_channel();
        let refused = Arc::<Refused>::default();
        let committer = Committer {
            waiting,
            options,
            limits,
            clock,
            connection: Some(connection),
            refused: Arc::clone(&refused),
        };
        tokio::spawn(async move {
            let closed = committer.run().await;
            drop(guard);
            if let Some(closed) = closed {
                // Whoever closed the store may be gone.
                let _ = closed.send(());
            }
        });
        Self { jobs, room: Admission::default(), refused }
    }

    /// About how much a commit must hold to show that what was refused last would be taken now;
    /// `None` if nothing was.
    pub(crate) fn refused(&self) -> Option<usize> {
        self.refused.bytes()
    }

    /// Runs `work` in a transaction. Once that is committed, calls `committed` with the result, in
    /// commit order and whether or not the caller still waits, and returns the result. `bytes` is
    /// about what the job keeps in memory.
    pub(crate) async fn run<T, W, C>(
        &self,
        scope: Scope,
        bytes: usize,
        work: W,
        committed: C,
    ) -> StoreResult<T>
    where
        T: Send + 'static,
        W: for<'c> FnOnce(&'c mut SqliteConnection) -> BoxFuture<'c, sqlx::Result<Outcome<T>>>
            + Send
            + 'static,
        C: FnOnce(&T) + Send + 'static,
    {
        let room = self.room.admit(bytes).await.map_err(StoreError::unavailable)?;
        let (answer, result) = oneshot::channel();
        metrics::gauge!(names::QUEUE_JOBS).increment(1);
        let job = TypedJob {
            scope,
            bytes,
            work: Some(work),
            committed,
            result: None,
            answer,
            _room: room,
        };
        self.jobs.send(Message::Job(Box::new(job))).map_err(|_| StoreError::unavailable(Closed))?;
        result.await.unwrap_or_else(|_| Err(StoreError::unavailable(Closed)))
    }

    /// Accepts messages; `committed` as for [`Writer::run`].
    pub(crate) async fn enqueue<C>(
        &self,
        messages: Vec<NewMessage>,
        committed: C,
    ) -> StoreResult<Vec<Enqueued>>
    where
        C: FnOnce(&[NewMessage], &[Enqueued]) + Send + 'static,
    {
        let bytes = messages.iter().map(|message| message.payload.len() + MESSAGE_BYTES).sum();
        let Some(first) = messages.first() else { return Ok(Vec::new()) };
        let room = self.room.admit_from(&first.sender, messages.len(), bytes).await;
        let room = room.map_err(StoreError::unavailable)?;
        let (answer, result) = oneshot::channel();
        metrics::gauge!(names::QUEUE_JOBS).increment(1);
        let call =
            EnqueueCall { messages, bytes, committed: Box::new(committed), answer, _room: room };
        self.jobs.send(Message::Enqueue(call)).map_err(|_| StoreError::unavailable(Closed))?;
        result.await.unwrap_or_else(|_| Err(StoreError::unavailable(Closed)))
    }

    /// Lets the jobs that wait end, writes the log back into the database file and closes the
    /// connection.
    pub(crate) async fn close(&self) {
        let (closed, done) = oneshot::channel();
        if self.jobs.send(Message::Close(closed)).is_ok() {
            // An error says that the writer has ended by itself, which is as good.
            let _ = done.await;
        }
    }
}

/// A job, its types hidden.
trait Job: Send {
    fn scope(&self) -> Scope;
    fn bytes(&self) -> usize;
    /// Does the work; true when it is to be kept.
    fn run<'c>(
        &'c mut self,
        connection: &'c mut SqliteConnection,
    ) -> BoxFuture<'c, sqlx::Result<bool>>;
    fn committed(self: Box<Self>);
    fn failed(self: Box<Self>, error: StoreError);
}

struct TypedJob<T, W, C> {
    scope: Scope,
    bytes: usize,
    work: Option<W>,
    committed: C,
    result: Option<T>,
    answer: oneshot::Sender<StoreResult<T>>,
    _room: AdmissionPermit,
}

impl<T, W, C> Job for TypedJob<T, W, C>
where
    T: Send,
    W: for<'c> FnOnce(&'c mut SqliteConnection) -> BoxFuture<'c, sqlx::Result<Outcome<T>>> + Send,
    C: FnOnce(&T) + Send,
{
    fn scope(&self) -> Scope {
        self.scope
    }

    fn bytes(&self) -> usize {
        self.bytes
    }

    fn run<'c>(
        &'c mut self,
        connection: &'c mut SqliteConnection,
    ) -> BoxFuture<'c, sqlx::Result<bool>> {
        Box::pin(async move {
            let work = self.work.take().expect("a job runs once");
            let (result, keep) = match work(connection).await? {
                Outcome::Keep(result) => (result, true),
                Outcome::Undo(result) => (result, false),
            };
            self.result = Some(result);
            Ok(keep)
        })
    }

    fn committed(self: Box<Self>) {
        let result = self.result.expect("it ran without an error");
        (self.committed)(&result);
        // Nobody there any more: the caller gave up, and that changes nothing.
        let _ = self.answer.send(Ok(result));
    }

    fn failed(self: Box<Self>, error: StoreError) {
        // As above.
        let _ = self.answer.send(Err(error));
    }
}

/// Who is told, after the commit, what became of a call's messages.
type Told = dyn FnOnce(&[NewMessage], &[Enqueued]) + Send;

/// One call's messages.
struct EnqueueCall {
    messages: Vec<NewMessage>,
    bytes: usize,
    committed: Box<Told>,
    answer: oneshot::Sender<StoreResult<Vec<Enqueued>>>,
    _room: AdmissionPermit,
}

/// What becomes one transaction.
#[derive(Default)]
struct Batch {
    jobs: Vec<Box<dyn Job>>,
    calls: Vec<EnqueueCall>,
    bytes: usize,
}

impl Batch {
    fn len(&self) -> usize {
        self.jobs.len() + self.calls.len()
    }

    fn is_full(&self) -> bool {
        self.len() >= BATCH_JOBS || self.bytes >= BATCH_BYTES
    }

    /// Answers everyone. `own` are the jobs' own failures, `outcomes` those of all messages in
    /// order.
    fn committed(self, own: Vec<Option<Shared>>, outcomes: Vec<Enqueued>) {
        for (job, failure) in self.jobs.into_iter().zip(own) {
            match failure {
                None => job.committed(),
                Some(error) => job.failed(error.into()),
            }
        }
        let mut outcomes = outcomes.into_iter();
        for call in self.calls {
            let own: Vec<_> = outcomes.by_ref().take(call.messages.len()).collect();
            (call.committed)(&call.messages, &own);
            // Whoever gave up changes nothing.
            let _ = call.answer.send(Ok(own));
        }
    }

    fn failed(self, error: &Shared) {
        self.jobs.into_iter().for_each(|job| job.failed(error.clone().into()));
        for call in self.calls {
            // As above.
            let _ = call.answer.send(Err(error.clone().into()));
        }
    }
}

/// The task's state.
struct Committer {
    waiting: mpsc::UnboundedReceiver<Message>,
    options: SqliteConnectOptions,
    limits: Delivery,
    clock: Guard,
    /// None after a failure, until the next batch.
    connection: Option<SqliteConnection>,
    refused: Arc<Refused>,
}

impl Committer {
    /// Commits until the store is closed or nobody is left who could write; then answers whom to
    /// tell.
    async fn run(mut self) -> Option<oneshot::Sender<()>> {
        let mut closed = None;
        while let Some(message) = self.waiting.recv().await {
            let (mut batch, mut alone) = (Batch::default(), None);
            let mut next = Some(message);
            while let Some(message) = next {
                match message {
                    Message::Job(job) if job.scope() == Scope::SingleEdge => alone = Some(job),
                    Message::Job(job) => {
                        batch.bytes += job.bytes();
                        batch.jobs.push(job);
                    }
                    Message::Enqueue(call) => {
                        batch.bytes += call.bytes;
                        batch.calls.push(call);
                    }
                    Message::Close(done) => {
                        // What was sent before is still received, then there is nothing more.
                        self.waiting.close();
                        closed = Some(done);
                    }
                }
                let is_whole = batch.is_full() || alone.is_some();
                next = if is_whole { None } else { self.waiting.try_recv().ok() };
            }
            if batch.len() > 0 {
                self.commit(batch).await;
            }
            if let Some(job) = alone {
                self.commit(Batch { bytes: job.bytes(), jobs: vec![job], ..Batch::default() })
                    .await;
            }
        }
        if let Some(mut connection) = self.connection.take() {
            finish(&mut connection).await;
            if let Err(error) = connection.close().await {
                tracing::warn!(%error, "the database was not closed in good order; nothing acknowledged is lost");
            }
        }
        closed
    }

    /// Commits the batch and answers everyone in it.
    async fn commit(&mut self, mut batch: Batch) {
        let (jobs, bytes) = (batch.len(), batch.bytes);
        metrics::gauge!(names::QUEUE_JOBS).decrement(jobs as f64);
        metrics::histogram!(names::BATCH_JOBS).record(jobs as f64);
        let begun = Instant::now();
        match self.transaction(&mut batch).await {
            Ok((own, outcomes)) => {
                metrics::histogram!(names::BATCH_SECONDS).record(begun.elapsed());
                self.refused.committed(bytes);
                batch.committed(own, outcomes);
            }
            Err(error) => {
                let kind = Kind::of(&error);
                metrics::counter!(names::ERRORS, "kind" => kind.name()).increment(1);
                tracing::error!(%error, kind = kind.name(), jobs, "nothing was committed");
                self.refused.refused(bytes);
                self.start_over().await;
                batch.failed(&error.into());
            }
        }
    }

    /// Runs the jobs, inserts the messages and commits. Answers the failures that were a job's own,
    /// job by job, and what became of each message.
    async fn transaction(
        &mut self,
        batch: &mut Batch,
    ) -> sqlx::Result<(Vec<Option<Shared>>, Vec<Enqueued>)> {
        let connection = match &mut self.connection {
            Some(connection) => connection,
            none => none.insert(self.options.connect().await?),
        };
        execute(connection, "BEGIN IMMEDIATE").await?;
        let mut own = Vec::with_capacity(batch.jobs.len());
        for job in &mut batch.jobs {
            own.push(match job.scope() {
                Scope::Batch | Scope::SingleEdge => {
                    job.run(connection).await?;
                    None
                }
                Scope::Job => in_savepoint(job.as_mut(), connection).await?,
            });
        }
        let messages: Vec<_> = batch.calls.iter().flat_map(|call| &call.messages).collect();
        let outcomes = if messages.is_empty() {
            Vec::new()
        } else {
            enqueue::all(connection, &messages, &self.limits, &self.clock).await?
        };
        let committing = Instant::now();
        execute(connection, "COMMIT").await?;
        metrics::histogram!(names::COMMIT_SECONDS).record(committing.elapsed());
        Ok((own, outcomes))
    }

    /// Throws the connection away, whatever state it is in.
    async fn start_over(&mut self) {
        if let Some(mut connection) = self.connection.take() {
            // It may have been rolled back already, or be past any use; closing it ends the
            // transaction in any case.
            let _ = execute(&mut connection, "ROLLBACK").await;
            let _ = connection.close().await;
        }
    }
}

/// Runs a job so that it can fail alone; answers its own failure. Any other is the store's.
async fn in_savepoint(
    job: &mut dyn Job,
    connection: &mut SqliteConnection,
) -> sqlx::Result<Option<Shared>> {
    execute(connection, "SAVEPOINT job").await?;
    let ran = job.run(connection).await;
    if !matches!(ran, Ok(true)) {
        execute(connection, "ROLLBACK TO job").await?;
    }
    execute(connection, "RELEASE job").await?;
    match ran {
        Ok(_) => Ok(None),
        Err(error) if Kind::of(&error).is_the_jobs_own() => {
            let kind = Kind::of(&error);
            metrics::counter!(names::ERRORS, "kind" => kind.name()).increment(1);
            tracing::error!(%error, kind = kind.name(), "a job failed");
            Ok(Some(error.into()))
        }
        Err(error) => Err(error),
    }
}

async fn execute(connection: &mut SqliteConnection, sql: &'static str) -> sqlx::Result<()> {
    sqlx::query(sql).execute(connection).await.map(drop)
}

/// Moves the write-ahead log into the database file, so that the file alone is whole.
async fn finish(connection: &mut SqliteConnection) {
    if let Err(error) = damage::note_clean_end(connection).await {
        tracing::warn!(%error, "the next start looks at every page of the database");
    }
    if let Err(error) = execute(connection, "PRAGMA wal_checkpoint(TRUNCATE)").await {
        tracing::warn!(%error, "the write-ahead log stays; the next start reads it");
    }
}
