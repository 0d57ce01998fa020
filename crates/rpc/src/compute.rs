//! Limits concurrent computations: OPAQUE, the most expensive work that an unauthenticated client
//! can trigger, and the checks of uploaded KeyPackages.
//!
//! A login costs 0.3 ms of a core. `spawn_blocking` would add two context switches to this short
//! work and, in a flood, hundreds of threads that compete with the runtime's. Without a limit, a
//! flood would occupy all workers of the runtime, and other calls would wait. So a computation runs
//! on the worker of its call, and at most half of the cores compute concurrently. Further
//! computations wait in order; when too many wait, the next one is refused.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use tokio::sync::Semaphore;

use crate::Error;

#[derive(Debug)]
pub(crate) struct ComputeLimiter {
    permits: Semaphore,
    waiting: AtomicUsize,
    max_waiting: usize,
}

impl ComputeLimiter {
    pub(crate) fn new(max_waiting: usize) -> Self {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        Self::with_permits((cores / 2).max(1), max_waiting)
    }

    fn with_permits(permits: usize, max_waiting: usize) -> Self {
        Self { permits: Semaphore::new(permits), waiting: AtomicUsize::new(0), max_waiting }
    }

    /// Executes `work`, of at most about a millisecond, after the calls that wait already. Fails
    /// with [`Error::Overloaded`] if too many wait.
    pub(crate) async fn run<T>(&self, work: impl FnOnce() -> T) -> Result<T, Error> {
        let _permit = match self.permits.try_acquire() {
            Ok(permit) => permit,
            Err(_) => {
                let _waiting = self.begin_waiting()?;
                self.permits.acquire().await.map_err(Error::internal)?
            }
        };
        Ok(work())
    }

    fn begin_waiting(&self) -> Result<Waiting<'_>, Error> {
        // Counted before the comparison, so that two calls never get the same last place.
        let waiting = Waiting(&self.waiting);
        if self.waiting.fetch_add(1, Ordering::Relaxed) >= self.max_waiting {
            return Err(Error::Overloaded);
        }
        Ok(waiting)
    }
}

/// A waiting call, counted until it is dropped.
struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::task::Poll;

    use futures_util::{future::FutureExt, poll};

    use super::*;

    #[tokio::test]
    async fn work_beyond_the_permits_waits_and_beyond_the_queue_is_refused() {
        let limiter = ComputeLimiter::with_permits(1, 1);
        let permit = limiter.permits.acquire().await.expect("open");
        let mut first = Box::pin(limiter.run(|| 1));
        assert!(poll!(&mut first).is_pending());
        assert!(matches!(limiter.run(|| 2).now_or_never(), Some(Err(Error::Overloaded))));
        drop(permit);
        assert!(matches!(poll!(&mut first), Poll::Ready(Ok(1))));
        assert!(matches!(limiter.run(|| 3).now_or_never(), Some(Ok(3))));
    }

    #[tokio::test]
    async fn a_cancelled_call_does_not_count_as_waiting() {
        let limiter = ComputeLimiter::with_permits(1, 1);
        let _permit = limiter.permits.acquire().await.expect("open");
        for _ in 0..3 {
            let mut waiting = Box::pin(limiter.run(|| ()));
            assert!(poll!(&mut waiting).is_pending());
        }
        assert_eq!(limiter.waiting.load(Ordering::Relaxed), 0);
    }
}
