//! Batches of work that costs less for each item when many items are processed together. Workers
//! take the batches from one queue.
//!
//! A backend commits the messages of many calls in one transaction, removes the pages of many reads
//! in one statement, and looks up many inboxes in one query. While a worker is busy, the next items
//! gather in the queue. The cost of an item falls with the size of its batch. Items are taken in
//! the order in which they were sent, and a batch ends at its limit. Therefore an item waits only
//! for earlier items. [`admission`](crate::admission) bounds the items of one sender in a queue.

use std::{collections::VecDeque, fmt, mem, sync::Arc};

use parking_lot::Mutex;
use tokio::{
    sync::{Notify, oneshot},
    task::JoinHandle,
};

use crate::{StoreError, StoreResult};

/// The error for an item sent to a batcher that is closed or has no worker left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the store is closed")]
pub struct Closed;

impl From<Closed> for StoreError {
    fn from(closed: Closed) -> Self {
        Self::unavailable(closed)
    }
}

/// The size of an item, or of a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BatchSize {
    /// Items, or the units that an item counts as: messages, pages, calls.
    pub count: usize,
    /// Bytes in memory.
    pub bytes: usize,
}

/// Processes batches, one at a time.
pub trait BatchWorker: Send + 'static {
    /// An element of the queue.
    type Item: Send + 'static;

    /// The size of a complete batch. Reaching one of the two bounds is enough.
    const LIMIT: BatchSize;

    /// Returns the size of an item. By default an item counts as one and has no bytes.
    fn size(_item: &Self::Item) -> BatchSize {
        BatchSize { count: 1, bytes: 0 }
    }

    /// Processes a batch, which has at least one item. A panic ends the worker.
    fn run(&mut self, batch: Vec<Self::Item>) -> impl Future<Output = ()> + Send;

    /// Completes the work after the last batch.
    fn end(self) -> impl Future<Output = ()> + Send
    where
        Self: Sized,
    {
        async {}
    }
}

/// A queue and its workers. Cheap to clone.
///
/// When the last clone is dropped, the workers process the items in the queue and end.
pub struct Batcher<T> {
    handle: Arc<Handle<T>>,
}

struct Handle<T> {
    queue: Arc<Queue<T>>,
    workers: tokio::sync::Mutex<Vec<JoinHandle<()>>>,
}

struct Queue<T> {
    state: Mutex<State<T>>,
    /// Notified when the first item is added to the queue, and when items are left after a batch.
    filled: Notify,
}

struct State<T> {
    items: VecDeque<T>,
    workers: usize,
    closed: bool,
}

impl<T: Send + 'static> Batcher<T> {
    /// Starts a task for each worker. Needs a tokio runtime.
    pub fn start<W: BatchWorker<Item = T>>(workers: impl IntoIterator<Item = W>) -> Self {
        let workers: Vec<W> = workers.into_iter().collect();
        let state = State { items: VecDeque::new(), workers: workers.len(), closed: false };
        let queue = Arc::new(Queue { state: Mutex::new(state), filled: Notify::new() });
        let start = |worker| tokio::spawn(work(worker, Presence(Arc::clone(&queue))));
        let workers = workers.into_iter().map(start).collect();
        Self { handle: Arc::new(Handle { queue, workers: tokio::sync::Mutex::new(workers) }) }
    }

    /// Adds an item to the queue.
    pub fn send(&self, item: T) -> Result<(), Closed> {
        let queue = &self.handle.queue;
        let mut state = queue.state.lock();
        if state.closed {
            return Err(Closed);
        }
        let was_empty = state.items.is_empty();
        state.items.push_back(item);
        drop(state);
        // A worker that leaves items in the queue notifies the next worker, so one notification is
        // enough.
        if was_empty {
            queue.filled.notify_one();
        }
        Ok(())
    }

    /// Refuses further items, and completes when the workers have processed those in the queue and
    /// ended.
    pub async fn close(&self) {
        self.handle.queue.close();
        let mut workers = self.handle.workers.lock().await;
        for worker in workers.iter_mut() {
            // A worker that panicked has ended as well. Its items were dropped.
            let _ = worker.await;
        }
        workers.clear();
    }
}

impl<T> Clone for Batcher<T> {
    fn clone(&self) -> Self {
        Self { handle: Arc::clone(&self.handle) }
    }
}

impl<T> fmt::Debug for Batcher<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.handle.queue.state.lock();
        f.debug_struct("Batcher")
            .field("items", &state.items.len())
            .field("workers", &state.workers)
            .finish_non_exhaustive()
    }
}

impl<T> Drop for Handle<T> {
    fn drop(&mut self) {
        self.queue.close();
    }
}

impl<T> Queue<T> {
    fn close(&self) {
        self.state.lock().closed = true;
        // A worker that is not waiting checks the state before it waits.
        self.filled.notify_waiters();
    }

    /// Returns the items of the next batch; `None` when the queue is closed and empty.
    async fn next<W: BatchWorker<Item = T>>(&self) -> Option<Vec<T>> {
        loop {
            let filled = self.filled.notified();
            match self.take::<W>() {
                Taken::Batch(batch) => return Some(batch),
                Taken::Closed => return None,
                Taken::Empty => filled.await,
            }
        }
    }

    fn take<W: BatchWorker<Item = T>>(&self) -> Taken<T> {
        let mut state = self.state.lock();
        if state.items.is_empty() {
            return if state.closed { Taken::Closed } else { Taken::Empty };
        }
        let (mut size, mut length) = (BatchSize::default(), 0);
        for item in &state.items {
            if size.count >= W::LIMIT.count || size.bytes >= W::LIMIT.bytes {
                break;
            }
            let item = W::size(item);
            size = BatchSize { count: size.count + item.count, bytes: size.bytes + item.bytes };
            length += 1;
        }
        if length == state.items.len() {
            // Leaves an allocation of the size that this batch needed.
            let empty = VecDeque::with_capacity(length);
            return Taken::Batch(mem::replace(&mut state.items, empty).into());
        }
        let batch = state.items.drain(..length).collect();
        drop(state);
        self.filled.notify_one();
        Taken::Batch(batch)
    }
}

enum Taken<T> {
    Batch(Vec<T>),
    Empty,
    Closed,
}

/// A guard that counts its worker until the worker ends. The last one closes the queue.
struct Presence<T>(Arc<Queue<T>>);

impl<T> Drop for Presence<T> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.workers -= 1;
        if state.workers == 0 {
            // No worker is left for these items: their callers receive an error now.
            state.closed = true;
            let items = mem::take(&mut state.items);
            drop(state);
            drop(items);
        }
    }
}

async fn work<W: BatchWorker>(mut worker: W, presence: Presence<W::Item>) {
    while let Some(batch) = presence.0.next::<W>().await {
        worker.run(batch).await;
    }
    worker.end().await;
}

/// An item whose sender waits for an answer.
#[derive(Debug)]
pub struct Call<I, A> {
    /// The request.
    pub item: I,
    /// The sender of the answer.
    pub answer: Answer<A>,
}

/// The sender of the answer to a call.
///
/// Dropping it without an answer fails the call with [`Closed`].
#[derive(Debug)]
pub struct Answer<A>(oneshot::Sender<A>);

impl<A> Answer<A> {
    /// Answers the caller. Does nothing if the call was dropped.
    pub fn send(self, answer: A) {
        let _ = self.0.send(answer);
    }
}

impl<I: Send + 'static, T: Send + 'static> Batcher<Call<I, StoreResult<T>>> {
    /// Sends a request and returns its answer. The request stays in the queue if the caller is
    /// dropped.
    pub async fn call(&self, item: I) -> StoreResult<T> {
        let (answer, answered) = oneshot::channel();
        self.send(Call { item, answer: Answer(answer) })?;
        answered.await.unwrap_or_else(|_| Err(Closed.into()))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures_util::{FutureExt as _, poll};
    use qpq_domain::IdentityKey;
    use tokio::sync::{Semaphore, mpsc};

    use super::*;
    use crate::admission::{Admission, AdmissionPermit};

    /// A worker that reports each batch, and processes it when the test permits.
    struct Reporter {
        batches: mpsc::UnboundedSender<Vec<u32>>,
        permits: Arc<Semaphore>,
        ended: mpsc::UnboundedSender<()>,
    }

    type Item = Call<u32, StoreResult<u32>>;

    /// An item that makes its worker panic.
    const PANIC: u32 = 99;

    impl BatchWorker for Reporter {
        type Item = Item;

        const LIMIT: BatchSize = BatchSize { count: 4, bytes: 100 };

        fn size(item: &Item) -> BatchSize {
            BatchSize { count: 1, bytes: item.item as usize }
        }

        async fn run(&mut self, batch: Vec<Item>) {
            let items: Vec<_> = batch.iter().map(|call| call.item).collect();
            let panics = items.contains(&PANIC);
            self.batches.send(items).expect("the test listens");
            self.permits.acquire().await.expect("not closed").forget();
            assert!(!panics, "the item asks for it");
            for call in batch {
                call.answer.send(Ok(call.item));
            }
        }

        async fn end(self) {
            self.ended.send(()).expect("the test listens");
        }
    }

    struct Bench {
        batcher: Batcher<Item>,
        batches: mpsc::UnboundedReceiver<Vec<u32>>,
        permits: Arc<Semaphore>,
        ended: mpsc::UnboundedReceiver<()>,
    }

    impl Bench {
        fn new(workers: usize) -> Self {
            let ((report, batches), (end, ended)) =
                (mpsc::unbounded_channel(), mpsc::unbounded_channel());
            let permits = Arc::new(Semaphore::new(0));
            let worker = |_| Reporter {
                batches: report.clone(),
                permits: Arc::clone(&permits),
                ended: end.clone(),
            };
            let batcher = Batcher::start((0..workers).map(worker));
            Self { batcher, batches, permits, ended }
        }

        /// Makes the only worker busy with item 0.
        async fn busy() -> Self {
            let mut bench = Self::new(1);
            bench.send(0);
            assert_eq!(bench.batch().await, [0]);
            bench
        }

        fn send(&self, item: u32) {
            let (answer, _) = oneshot::channel();
            self.batcher.send(Call { item, answer: Answer(answer) }).expect("open");
        }

        async fn batch(&mut self) -> Vec<u32> {
            self.batches.recv().await.expect("a batch")
        }
    }

    #[tokio::test]
    async fn items_that_wait_are_processed_together_in_order_up_to_the_limit() {
        let mut bench = Bench::busy().await;
        (1..=6).for_each(|item| bench.send(item));
        bench.permits.add_permits(9);
        assert_eq!(bench.batch().await, [1, 2, 3, 4], "four items");
        assert_eq!(bench.batch().await, [5, 6]);
        let mut bench = Bench::busy().await;
        [60, 60, 1].into_iter().for_each(|item| bench.send(item));
        bench.permits.add_permits(9);
        assert_eq!(bench.batch().await, [60, 60], "100 bytes are reached by the second");
        assert_eq!(bench.batch().await, [1]);
    }

    #[tokio::test]
    async fn a_second_worker_takes_the_items_that_the_first_leaves() {
        let mut bench = Bench::new(2);
        (1..=6).for_each(|item| bench.send(item));
        let mut batches = [bench.batch().await, bench.batch().await];
        batches.sort();
        assert_eq!(batches, [vec![1, 2, 3, 4], vec![5, 6]], "while neither has been processed");
    }

    #[tokio::test]
    async fn a_dropped_call_delays_and_fails_no_other() {
        let mut bench = Bench::busy().await;
        {
            let mut dropped = Box::pin(bench.batcher.call(1));
            assert!(poll!(&mut dropped).is_pending());
        }
        let (batcher, permits) = (bench.batcher.clone(), Arc::clone(&bench.permits));
        let mut stays = Box::pin(batcher.call(2));
        assert!(poll!(&mut stays).is_pending());
        permits.add_permits(2);
        assert_eq!(stays.await.expect("answered"), 2);
        assert_eq!(bench.batch().await, [1, 2]);
    }

    #[tokio::test]
    async fn a_close_processes_waiting_items_and_refuses_later_ones() {
        let mut bench = Bench::busy().await;
        let waiting = bench.batcher.clone();
        let mut waiting = Box::pin(waiting.call(1));
        assert!(poll!(&mut waiting).is_pending());
        let closing = bench.batcher.clone();
        let mut closing = Box::pin(closing.close());
        assert!(poll!(&mut closing).is_pending());
        bench.batcher.call(2).await.expect_err("closed");
        assert!(poll!(&mut closing).is_pending(), "an item waits");
        bench.permits.add_permits(2);
        closing.await;
        assert_eq!(waiting.await.expect("answered"), 1);
        assert_eq!(bench.batch().await, [1]);
        assert_eq!(bench.ended.recv().now_or_never(), Some(Some(())));
        bench.batcher.close().await;
    }

    #[tokio::test]
    async fn dropping_the_last_handle_processes_waiting_items() {
        let Bench { batcher, mut batches, permits, mut ended } = Bench::busy().await;
        let (answer, answered) = oneshot::channel();
        batcher.send(Call { item: 1, answer: Answer(answer) }).expect("open");
        drop(batcher);
        permits.add_permits(2);
        assert_eq!(answered.await.expect("answered").expect("processed"), 1);
        assert_eq!(batches.recv().await, Some(vec![1]));
        assert_eq!(ended.recv().await, Some(()));
    }

    #[tokio::test]
    async fn a_panic_of_the_only_worker_fails_its_batch_and_all_later_calls() {
        let bench = Bench::new(1);
        bench.permits.add_permits(9);
        let (first, second) = tokio::join!(bench.batcher.call(1), bench.batcher.call(PANIC));
        first.expect_err("in the same batch");
        second.expect_err("panicked");
        bench.batcher.call(2).await.expect_err("no worker is left");
        bench.batcher.close().await;
    }

    #[tokio::test]
    async fn another_worker_continues_after_a_panic() {
        let bench = Bench::new(2);
        bench.permits.add_permits(9);
        bench.batcher.call(PANIC).await.expect_err("panicked");
        for item in 1..=8 {
            assert_eq!(bench.batcher.call(item).await.expect("answered"), item);
        }
    }

    /// A worker that takes 256 messages at a time, half of the admission of one sender.
    struct Transactions(mpsc::UnboundedSender<Vec<u8>>);

    impl BatchWorker for Transactions {
        type Item = (u8, usize, AdmissionPermit);

        const LIMIT: BatchSize = BatchSize { count: 256, bytes: usize::MAX };

        fn size((_, messages, _): &Self::Item) -> BatchSize {
            BatchSize { count: *messages, bytes: 0 }
        }

        async fn run(&mut self, batch: Vec<Self::Item>) {
            self.0.send(batch.iter().map(|(sender, ..)| *sender).collect()).expect("a test");
            // Other senders' messages come between.
            tokio::task::yield_now().await;
        }
    }

    /// One sender sends large calls as fast as it is admitted. Its messages in the queue fit in two
    /// transactions, so the call of another sender is in one of the next three.
    #[tokio::test(start_paused = true)]
    async fn a_call_waits_for_at_most_two_batches_of_a_greedy_sender() {
        let (report, mut batches) = mpsc::unbounded_channel();
        let batcher = Batcher::start([Transactions(report)]);
        let room = Admission::default();
        let greedy = {
            let (batcher, room) = (batcher.clone(), room.clone());
            tokio::spawn(async move {
                for _ in 0..100 {
                    let permit = room.admit_from(&IdentityKey::new([1; 32]), 256, 0).await;
                    batcher.send((1, 256, permit.expect("admitted"))).expect("open");
                }
            })
        };
        while batches.recv().await.expect("a batch") != [1] {}
        tokio::time::sleep(Duration::ZERO).await;
        while batches.try_recv().is_ok() {}
        let permit = room.admit_from(&IdentityKey::new([2; 32]), 1, 0).await.expect("admitted");
        batcher.send((2, 1, permit)).expect("open");
        let mut before = 0;
        while !batches.recv().await.expect("a batch").contains(&2) {
            before += 1;
        }
        assert!(before <= 2, "{before} transactions before it");
        greedy.await.expect("no panic");
        batcher.close().await;
    }
}
