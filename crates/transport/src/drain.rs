//! What a drain waits for: the number of calls in flight, and the phase that the server is in.

use std::{
    pin::pin,
    sync::atomic::{AtomicUsize, Ordering},
};

use tokio::sync::Notify;

/// The life of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    Serving,
    /// New connections are refused; replies are waited for until acknowledged.
    Draining,
    /// Every connection is closed.
    Closed,
}

/// Counts streams that are being served.
#[derive(Debug, Default)]
pub(crate) struct InFlight {
    count: AtomicUsize,
    zero: Notify,
}

impl InFlight {
    pub(crate) fn enter(&self) {
        self.count.fetch_add(1, Ordering::AcqRel);
    }

    pub(crate) fn leave(&self) {
        if self.count.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.zero.notify_waiters();
        }
    }

    /// Waits until there is none.
    pub(crate) async fn none(&self) {
        loop {
            let mut zero = pin!(self.zero.notified());
            // Before the look at the count, so that no notification falls between.
            zero.as_mut().enable();
            if self.count.load(Ordering::Acquire) == 0 {
                return;
            }
            zero.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn waits_for_the_last_to_leave() {
        let in_flight = InFlight::default();
        in_flight.none().await;
        in_flight.enter();
        in_flight.enter();
        let mut none = pin!(in_flight.none());
        assert!(none.as_mut().now_or_never().is_none());
        in_flight.leave();
        assert!(none.as_mut().now_or_never().is_none());
        in_flight.leave();
        none.await;
    }
}
