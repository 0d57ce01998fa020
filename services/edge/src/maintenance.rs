//! What the server does by itself: expired rows are swept, the store is checked, metrics are
//! folded.

use std::{sync::Arc, time::Duration};

use qpq_ports::{Clock, Stores};
use qpq_runtime::metrics::Metrics;
use tokio::time::{MissedTickBehavior, interval};

/// Between two sweeps.
const SWEEP: Duration = Duration::from_secs(60);
/// Between two foldings of what was measured.
const FOLD: Duration = Duration::from_secs(5);

/// Removes what has expired, every minute, batch after batch so that nobody waits long behind it.
pub(crate) async fn sweep(stores: Stores, clock: Arc<dyn Clock>) {
    let mut ticks = interval(SWEEP);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let mut removed = 0;
        loop {
            match stores.maintenance.sweep(clock.now()).await {
                Ok(0) => break,
                Ok(rows) => removed += rows,
                Err(error) => {
                    let cause = &error as &dyn std::error::Error;
                    tracing::warn!(
                        cause,
                        "expired rows could not be removed; the next sweep tries again"
                    );
                    break;
                }
            }
            tokio::task::yield_now().await;
        }
        if removed > 0 {
            tracing::debug!(removed, "swept what has expired");
        }
    }
}

/// Keeps the memory of measurements small while nobody scrapes them.
pub(crate) async fn fold(metrics: Metrics) {
    let mut ticks = interval(FOLD);
    loop {
        ticks.tick().await;
        metrics.run_maintenance();
    }
}
