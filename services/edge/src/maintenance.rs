//! Maintenance of the store and of this process.
//!
//! Expired rows are removed by a job, once a minute on one edge of the cluster. Measurements are
//! folded by a task of each process, because they are in its memory.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use qpq_domain::UnixMillis;
use qpq_jobs::{Completion, Failure, Policy, Work};
use qpq_ports::{AccountEvent, Job, JobKind, Maintenance, NewJob, Swept};
use qpq_rpc::account_events::AccountEvents;
use qpq_runtime::metrics::Metrics;
use tokio::time::interval;

/// Interval between two sweeps.
const INTERVAL: Duration = Duration::from_secs(60);
/// Maximum number of batches in one run. The next run, which is due immediately, continues a larger
/// backlog.
const BATCHES: usize = 100;
/// Interval between two foldings of measurements.
const FOLD: Duration = Duration::from_secs(5);

/// Removes expired rows, in batches, so that no other work waits long.
///
/// Edges of earlier releases sweep without a job. In a cluster one sweep at a time removes rows,
/// and a concurrent sweep ends immediately, so edges of both releases may run together.
pub(crate) struct Sweep {
    pub(crate) maintenance: Arc<dyn Maintenance>,
    /// Notifies the other devices of an account about a device that lost its position.
    pub(crate) account_events: Arc<AccountEvents>,
}

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
            // Only another sweep removes the rows that a failed sweep left.
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
            let swept = self.maintenance.sweep(now).await;
            let Swept { rows, moved } = swept.map_err(|error| Failure::temporary(&error))?;
            for identity in moved {
                tracing::info!("a device that was away too long lost its position in an inbox");
                self.account_events.publish(&identity, AccountEvent::DevicesChanged);
            }
            if rows == 0 {
                next = INTERVAL;
                break;
            }
            removed += rows;
            tokio::task::yield_now().await;
        }
        if removed > 0 {
            tracing::debug!(removed, "expired rows removed");
        }
        Ok(Completion::RepeatAfter(next))
    }
}

/// Folds measurements at intervals, to limit their memory while no scraper reads them.
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
    use qpq_ports::{Claim, JobId, NewHistory, OldSessions, SingleEdge, StoreError, StoreResult};

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

        async fn sweep(&self, _: UnixMillis) -> StoreResult<Swept> {
            if self.fails {
                return Err(StoreError::unavailable(std::io::Error::other("disk full")));
            }
            let taken = self
                .left
                .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
            Ok(Swept { rows: taken.is_ok().into(), moved: Vec::new() })
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
        let account_events = Arc::new(AccountEvents::new(Arc::new(SingleEdge)));
        let maintenance = Arc::clone(rows) as _;
        Sweep { maintenance, account_events }.run(&job, NOW).await
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
