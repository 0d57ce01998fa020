//! Names and descriptions of the metrics.
//!
//! | name | kind | unit | meaning |
//! |---|---|---|---|
//! | `qpq_job_runs_total{kind,end}` | counter | runs | runs of jobs on this edge by their end: `done`, `repeat`, `retry` (failed, runs again), `dead` (failed, never runs again), `released` (the server stopped), `lost` (another worker claimed the job) |
//! | `qpq_job_run_seconds{kind}` | histogram | seconds | duration of the runs |
//! | `qpq_jobs{kind,state}` | gauge | jobs | jobs in the store: `waiting`, `claimed`, `dead`; the same on every edge of a cluster |
//! | `qpq_jobs_overdue_seconds{kind}` | gauge | seconds | time since the oldest waiting job became due; the same on every edge of a cluster |
//! | `qpq_job_store_errors_total{op}` | counter | failures | failed operations on the queue of jobs |

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};
use qpq_ports::JobKind;

pub(crate) const RUNS: &str = "qpq_job_runs_total";
pub(crate) const SECONDS: &str = "qpq_job_run_seconds";
pub(crate) const JOBS: &str = "qpq_jobs";
pub(crate) const OVERDUE: &str = "qpq_jobs_overdue_seconds";
pub(crate) const ERRORS: &str = "qpq_job_store_errors_total";

/// The values of `end`.
const ENDS: [&str; 6] = ["done", "repeat", "retry", "dead", "released", "lost"];
/// The values of `op`.
const OPS: [&str; 5] = ["put", "claim", "renew", "finish", "stats"];

/// Exposes the counters of the runs of `kind` with zero, so that their first increase is visible.
pub(crate) fn expose_runs(kind: JobKind) {
    for end in ENDS {
        metrics::counter!(RUNS, "kind" => kind.as_str(), "end" => end).increment(0);
    }
}

/// Describes the metrics, and exposes the counters of errors. Called once, by the runner.
pub fn describe() {
    describe_counter!(RUNS, "Runs of jobs on this edge, by kind and end");
    describe_histogram!(SECONDS, Unit::Seconds, "Duration of the runs of jobs, by kind");
    describe_gauge!(JOBS, "Jobs in the store, by kind and state");
    describe_gauge!(
        OVERDUE,
        Unit::Seconds,
        "Time since the oldest waiting job of a kind became due"
    );
    describe_counter!(ERRORS, "Failed operations on the queue of jobs");
    for op in OPS {
        metrics::counter!(ERRORS, "op" => op).increment(0);
    }
}
