//! The removal of blobs that no account needs any more.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use qpq_domain::UnixMillis;
use qpq_jobs::{Completion, Failure, Policy, Work};
use qpq_ports::{Blobs, Job, JobKind, NewJob};

/// Interval between two runs when nothing is left to remove.
const INTERVAL: Duration = Duration::from_secs(60);
/// Maximum number of batches in one run. The next run, which is due immediately, continues.
const BATCHES: usize = 100;

/// Removes idle uploads, expired references, and bytes without a reference.
pub(crate) struct CollectBlobs {
    pub(crate) blobs: Arc<dyn Blobs>,
}

impl CollectBlobs {
    const KIND: JobKind = JobKind::new("collect_blobs");
}

#[async_trait]
impl Work for CollectBlobs {
    fn kind(&self) -> JobKind {
        Self::KIND
    }

    fn policy(&self) -> Policy {
        Policy {
            concurrency: 1,
            // Only another run removes the blobs that a failed run left.
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
        for _ in 0..BATCHES {
            let collected = self.blobs.collect(now).await;
            let collected = collected.map_err(|error| Failure::temporary(&error))?;
            if collected.is_empty() {
                return Ok(Completion::RepeatAfter(INTERVAL));
            }
            tracing::debug!(
                uploads = collected.uploads,
                references = collected.references,
                objects = collected.objects,
                "unused blobs removed"
            );
        }
        Ok(Completion::RepeatAfter(Duration::ZERO))
    }
}
