//! A circuit breaker in front of Redis.
//!
//! Each call to a Redis that hangs costs its timeout. After several calls in a row without an
//! answer, and no answer for as long as the timeout, the breaker opens: calls fail immediately, and
//! a task probes Redis, one command at a time, until it answers. An error of Redis is an answer
//! too: the breaker stays closed for a Redis that is full or read-only.

use std::time::Duration;

use parking_lot::Mutex;
use redis::{ErrorKind, RedisError};
use tokio::{sync::Notify, time::Instant};

use crate::metrics as names;

/// Number of unanswered calls in a row that open the breaker.
const FAILURES: u32 = 3;

#[derive(Debug, thiserror::Error)]
#[error("Redis does not answer, and is not called until it does")]
pub(super) struct Skipped;

/// The evidence of one call about the state of Redis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sign {
    Answered,
    Silent,
}

impl Sign {
    /// Returns the sign of an outcome. An error that Redis returned is an answer.
    pub(super) fn of<T>(outcome: &Result<T, RedisError>) -> Self {
        match outcome {
            Err(error)
                if error.is_io_error()
                    || error.is_connection_dropped()
                    || error.kind() == ErrorKind::ClusterConnectionNotFound =>
            {
                Self::Silent
            }
            _ => Self::Answered,
        }
    }
}

#[derive(Debug)]
pub(super) struct Breaker {
    /// The timeout of an answer.
    timeout: Duration,
    state: Mutex<State>,
    opened: Notify,
}

#[derive(Debug)]
struct State {
    open: bool,
    failures: u32,
    answered_at: Instant,
}

impl Breaker {
    pub(super) fn new(timeout: Duration, now: Instant) -> Self {
        let state = State { open: false, failures: 0, answered_at: now };
        Self { timeout, state: Mutex::new(state), opened: Notify::new() }
    }

    /// Returns an error while the breaker is open.
    pub(super) fn admit(&self) -> Result<(), Skipped> {
        if self.state.lock().open {
            metrics::counter!(names::REDIS_SKIPPED).increment(1);
            Err(Skipped)
        } else {
            Ok(())
        }
    }

    /// Records the outcome of a call.
    pub(super) fn note(&self, sign: Sign, now: Instant) {
        let mut state = self.state.lock();
        match sign {
            Sign::Answered => {
                (state.failures, state.answered_at) = (0, now);
                if std::mem::take(&mut state.open) {
                    metrics::gauge!(names::REDIS_BREAKER).set(0);
                    tracing::info!("redis answers again");
                }
            }
            Sign::Silent => {
                state.failures = state.failures.saturating_add(1);
                // In a Redis Cluster, one node may be silent while the others answer.
                let silent_for = now.saturating_duration_since(state.answered_at);
                if !state.open && state.failures >= FAILURES && silent_for >= self.timeout {
                    state.open = true;
                    metrics::gauge!(names::REDIS_BREAKER).set(1);
                    tracing::warn!(?silent_for, "redis does not answer, calls continue without it");
                    self.opened.notify_one();
                }
            }
        }
    }

    /// Completes when the breaker is open. Cancel-safe.
    pub(super) async fn opened(&self) {
        while !self.state.lock().open {
            self.opened.notified().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(2);

    #[test]
    fn three_unanswered_calls_open_the_breaker_and_one_answer_closes_it() {
        let start = Instant::now();
        let breaker = Breaker::new(TIMEOUT, start);
        for second in 2..5 {
            breaker.admit().expect("closed");
            breaker.note(Sign::Silent, start + Duration::from_secs(second));
        }
        breaker.admit().expect_err("open");
        breaker.note(Sign::Silent, start + Duration::from_secs(6));
        breaker.admit().expect_err("still open");
        breaker.note(Sign::Answered, start + Duration::from_secs(7));
        breaker.admit().expect("closed");
        breaker.note(Sign::Silent, start + Duration::from_secs(10));
        breaker.admit().expect("one alone does not open it");
    }

    #[test]
    fn calls_that_are_answered_keep_the_breaker_closed() {
        let start = Instant::now();
        let breaker = Breaker::new(TIMEOUT, start);
        for n in 0..100 {
            let now = start + n * Duration::from_secs(1);
            breaker.note(Sign::Answered, now);
            // Concurrent calls.
            (0..10).for_each(|_| breaker.note(Sign::Silent, now + Duration::from_millis(500)));
            breaker.admit().expect("closed");
        }
    }
}
