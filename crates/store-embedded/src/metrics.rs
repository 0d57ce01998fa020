//! The names of the embedded store's metrics.
//!
//! | name | kind | unit | content |
//! |---|---|---|---|
//! | `qpq_store_queue_jobs` | gauge | calls | writes that wait for the writer |
//! | `qpq_store_batch_jobs` | histogram | calls | writes in one transaction |
//! | `qpq_store_commit_seconds` | histogram | seconds | `COMMIT` alone, with its fsync |
//! | `qpq_store_batch_seconds` | histogram | seconds | a transaction, from `BEGIN` to the end of `COMMIT` |
//! | `qpq_clock_doubted` | gauge | 0 or 1 | whether the clock jumped and nothing that has expired is removed |
//! | `qpq_store_errors_total{kind}` | counter | failures | failed reads, statements and transactions, by kind |

pub(crate) const QUEUE_LENGTH: &str = "qpq_store_queue_jobs";
pub(crate) const BATCH_LENGTH: &str = "qpq_store_batch_jobs";
pub(crate) const COMMIT_SECONDS: &str = "qpq_store_commit_seconds";
pub(crate) const BATCH_SECONDS: &str = "qpq_store_batch_seconds";
pub(crate) const CLOCK_DOUBTED: &str = "qpq_clock_doubted";
pub(crate) const ERRORS: &str = "qpq_store_errors_total";

/// Registers the descriptions and units.
pub(crate) fn describe() {
    use metrics::Unit::{Count, Seconds};
    metrics::describe_gauge!(QUEUE_LENGTH, Count, "Writes that wait for the writer");
    metrics::describe_histogram!(BATCH_LENGTH, Count, "Writes in one transaction");
    metrics::describe_histogram!(COMMIT_SECONDS, Seconds, "COMMIT alone, with its fsync");
    metrics::describe_histogram!(BATCH_SECONDS, Seconds, "A whole transaction");
    metrics::describe_gauge!(
        CLOCK_DOUBTED,
        Count,
        "Whether the clock jumped and nothing that has expired is removed"
    );
    metrics::describe_counter!(ERRORS, Count, "Failed reads, statements and transactions, by kind");
}
