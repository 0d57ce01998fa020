//! Bounds the curve arithmetic of registrations and logins, the dearest thing an anonymous request
//! can ask for.
//!
//! A login costs 0.3 ms of a core. That is too short for a thread of its own (`spawn_blocking`
//! would add two context switches and, under a flood, hundreds of threads that fight with the
//! runtime's for the same cores) and too long to be done on every worker at once: the others' calls
//! would wait behind a flood. So it is done where it is asked for, by at most half of the cores at
//! a time; the rest queue in order, and when the queue is full the next is told to come later.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use tokio::sync::Semaphore;

use crate::Error;

#[derive(Debug)]
pub(crate) struct Gate {
    permits: Semaphore,
    waiting: AtomicUsize,
    max_waiting: usize,
}

impl Gate {
    pub(crate) fn new(max_waiting: usize) -> Self {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        Self::with_permits((cores / 2).max(1), max_waiting)
    }

    fn with_permits(permits: usize, max_waiting: usize) -> Self {
        Self { permits: Semaphore::new(permits), waiting: AtomicUsize::new(0), max_waiting }
    }

    /// Does `work`, of about a millisecond at most, when its turn comes; [`Error::Overloaded`] when too many are waiting already.
    pub(crate) async fn run<T>(&self, work: impl FnOnce() -> T) -> Result<T, Error> {
        let _permit = match self.permits.try_acquire() {
            Ok(permit) => permit,
            Err(_) => {
                let _place = self.queue()?;
                self.permits.acquire().await.map_err(Error::internal)?
            }
        };
        Ok(work())
    }

    fn queue(&self) -> Result<Place<'_>, Error> {
        // Counted first and looked at then, so that no two take the last place.
        let place = Place(&self.waiting);
        if self.waiting.fetch_add(1, Ordering::Relaxed) >= self.max_waiting {
            return Err(Error::Overloaded);
        }
        Ok(place)
    }
}

/// A place in the queue, given up when dropped.
struct Place<'a>(&'a AtomicUsize);

impl Drop for Place<'_> {
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
    async fn work_waits_its_turn_and_a_full_queue_refuses() {
        let gate = Gate::with_permits(1, 1);
        let busy = gate.permits.acquire().await.expect("open");
        let mut first = Box::pin(gate.run(|| 1));
        assert!(poll!(&mut first).is_pending());
        assert!(matches!(gate.run(|| 2).now_or_never(), Some(Err(Error::Overloaded))));
        drop(busy);
        assert!(matches!(poll!(&mut first), Poll::Ready(Ok(1))));
        assert!(matches!(gate.run(|| 3).now_or_never(), Some(Ok(3))));
    }

    #[tokio::test]
    async fn who_gives_up_waiting_leaves_its_place() {
        let gate = Gate::with_permits(1, 1);
        let _busy = gate.permits.acquire().await.expect("open");
        for _ in 0..3 {
            let mut waiting = Box::pin(gate.run(|| ()));
            assert!(poll!(&mut waiting).is_pending());
        }
        assert_eq!(gate.waiting.load(Ordering::Relaxed), 0);
    }
}
