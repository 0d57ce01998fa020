//! Maintenance of the store and of this process.
//!
//! Expired rows are removed by a job, once a minute on one edge of the cluster. Measurements are
//! folded by a task of each process, because they are in its memory.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use qpq_domain::UnixMillis;
use qpq_jobs::{Completion, Failure, Policy, Work};
use qpq_ports::{Job, JobKind, Maintenance, NewJob};
use qpq_runtime::metrics::Metrics;
use tokio::time::interval;

/// Interval between two sweeps.
const INTERVAL: Duration = Duration::from_secs(60);
/// Batches in one run. A larger backlog is continued by the next run, which is due immediately.
const BATCHES: usize = 100;
/// Interval between two foldings of measurements.
const FOLD: Duration = Duration::from_secs(5);

/// Removes expired rows, in batches, so that no other work waits long.
///
/// Edges of earlier releases sweep by themselves. In a cluster one sweep at a time removes rows,
/// and another one finds nothing to do, so both may run together.
pub(crate) struct Sweep(pub(crate) Arc<dyn Maintenance>);

impl Sweep {
    const KIND: JobKind = JobKind::new("sweep");
}

#[async_trait]
impl Work for Sweep {
    fn kind(&self) -> JobKind {
        Self::KIND
    }

    fn policy(&self) -> Policy {
        Policy {
            concurrency: 1,
            lease: Duration::from_secs(15),
            // The next sweep is the only remedy of a sweep that failed.
            max_attempts: None,
            backoff_cap: Duration::from_secs(5 * 60),
            ..Policy::default()
        }
    }

    fn recurring(&self) -> Option<NewJob> {
        let key = Some(Vec::new());
        Some(NewJob { kind: Self::KIND, key, payload: Vec::new(), delay: Duration::ZERO })
    }

    async fn run(&self, _: &Job, now: UnixMillis) -> Result<Completion, Failure> {
        let mut removed = 0;
        let mut next = Duration::ZERO;
        for _ in 0..BATCHES {
            match self.0.sweep(now).await.map_err(|error| Failure::temporary(&error))? {
                0 => {
                    next = INTERVAL;
                    break;
                }
                rows => removed += rows,
            }
            tokio::task::yield_now().await;
        }
        if removed > 0 {
            tracing::debug!(removed, "expired rows removed");
        }
        Ok(Completion::RepeatAfter(next))
    }
}

/// Keeps the memory of measurements small while nothing scrapes them.
pub(crate) async fn fold(metrics: Metrics) {
    let mut ticks = interval(FOLD);
    loop {
        ticks.tick().await;
        metrics.run_maintenance();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use qpq_domain::StoreId;
    use qpq_ports::{Claim, JobId, NewHistory, OldSessions, StoreError, StoreResult};

    use super::*;

    const NOW: UnixMillis = UnixMillis(1_800_000_000_000);

    /// Removes one row in each batch until none is left, or fails.
    struct Rows {
        left: AtomicU64,
        fails: bool,
    }

    #[async_trait]
    impl Maintenance for Rows {
        async fn check(&self) -> StoreResult<()> {
            Ok(())
        }

        async fn sweep(&self, _: UnixMillis) -> StoreResult<u64> {
            if self.fails {
                return Err(StoreError::unavailable(std::io::Error::other("disk full")));
            }
            let taken = self
                .left
                .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
            Ok(u64::from(taken.is_ok()))
        }

        fn store_id(&self) -> StoreId {
            StoreId::new([0; 16])
        }

        async fn begin_history(&self, _: OldSessions) -> StoreResult<NewHistory> {
            unreachable!("a sweep begins no history")
        }
    }

    async fn run(rows: &Arc<Rows>) -> Result<Completion, Failure> {
        let claim = Claim { job: JobId(1), token: [0; 16] };
        let job = Job { claim, payload: Vec::new(), attempt: 1 };
        Sweep(Arc::clone(rows) as _).run(&job, NOW).await
    }

    fn rows(left: u64) -> Arc<Rows> {
        Arc::new(Rows { left: left.into(), fails: false })
    }

    #[tokio::test]
    async fn a_sweep_repeats_after_a_minute_when_nothing_is_left() {
        let rows = rows(BATCHES as u64 - 1);
        assert_eq!(run(&rows).await, Ok(Completion::RepeatAfter(INTERVAL)));
        assert_eq!(rows.left.load(Ordering::SeqCst), 0);
    }

    #[tokio::test]
    async fn a_sweep_repeats_immediately_while_a_backlog_is_left() {
        let rows = rows(BATCHES as u64 + 1);
        assert_eq!(run(&rows).await, Ok(Completion::RepeatAfter(Duration::ZERO)));
        assert_eq!(run(&rows).await, Ok(Completion::RepeatAfter(INTERVAL)));
    }

    #[tokio::test]
    async fn a_failed_sweep_is_retried_and_names_its_cause() {
        let rows = Arc::new(Rows { left: 0.into(), fails: true });
        let Err(Failure::Temporary(error)) = run(&rows).await else { panic!("it fails") };
        assert!(error.contains("disk full"), "{error}");
    }
}
