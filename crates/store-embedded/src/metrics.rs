//! What the embedded store counts, all names in one place.
//!
//! | name | kind | unit | what |
//! |---|---|---|---|
//! | `qpq_store_queue_jobs` | gauge | jobs | writes that wait for the writer |
//! | `qpq_store_batch_jobs` | histogram | jobs | writes that were committed together |
//! | `qpq_store_commit_seconds` | histogram | seconds | `COMMIT` alone, its fsync included |
//! | `qpq_store_batch_seconds` | histogram | seconds | a whole transaction, from `BEGIN` to the end of `COMMIT` |
//! | `qpq_clock_doubted` | gauge | 0 or 1 | whether the clock jumped and nothing that has expired is removed |
//! | `qpq_store_errors_total{kind}` | counter | failures | failed reads, jobs and transactions, by kind |

pub(crate) const QUEUE_JOBS: &str = "qpq_store_queue_jobs";
pub(crate) const BATCH_JOBS: &str = "qpq_store_batch_jobs";
pub(crate) const COMMIT_SECONDS: &str = "qpq_store_commit_seconds";
pub(crate) const BATCH_SECONDS: &str = "qpq_store_batch_seconds";
pub(crate) const CLOCK_DOUBTED: &str = "qpq_clock_doubted";
pub(crate) const ERRORS: &str = "qpq_store_errors_total";

/// Tells the recorder what the names mean.
pub(crate) fn describe() {
    use metrics::Unit::{Count, Seconds};
    metrics::describe_gauge!(QUEUE_JOBS, Count, "Writes that wait for the writer");
    metrics::describe_histogram!(BATCH_JOBS, Count, "Writes that were committed together");
    metrics::describe_histogram!(COMMIT_SECONDS, Seconds, "COMMIT alone, its fsync included");
    metrics::describe_histogram!(BATCH_SECONDS, Seconds, "A whole transaction");
    metrics::describe_gauge!(
        CLOCK_DOUBTED,
        Count,
        "Whether the clock jumped and nothing that has expired is removed"
    );
    metrics::describe_counter!(ERRORS, Count, "Failed reads, jobs and transactions, by kind");
}
