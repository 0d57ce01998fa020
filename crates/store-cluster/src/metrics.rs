//! The metrics of the cluster store.
//!
//! | name | kind | unit | what |
//! |---|---|---|---|
//! | `qpq_pg_seconds{op}` | histogram | seconds | duration of a transaction or statement, including the wait for a connection |
//! | `qpq_pg_retries_total{op}` | counter | retries | transactions that were retried because another one interfered |
//! | `qpq_pg_errors_total{op,kind}` | counter | failures | transactions and statements that failed after all retries |
//! | `qpq_pg_connections{state}` | gauge | connections | connections of this edge, `busy` and `idle` |
//! | `qpq_clock_skew_seconds` | gauge | seconds | time by which the edge's clock is ahead of the clock of Postgres, negative if behind |
//! | `qpq_sweeps_shrunk_total` | counter | sweeps | transactions of a sweep that took too long and were retried with fewer rows |
//! | `qpq_enqueue_queue_messages` | gauge | messages | messages that wait for a committer |
//! | `qpq_enqueue_batch_messages` | histogram | messages | messages that were committed in one transaction |
//! | `qpq_completion_batch_pages` | histogram | pages | pages that clients have received and that were removed in one transaction |
//! | `qpq_redis_seconds{op}` | histogram | seconds | duration of a script or command |
//! | `qpq_redis_errors_total{op}` | counter | failures | scripts and commands that failed |
//! | `qpq_redis_breaker_open` | gauge | 0 or 1 | whether Redis does not answer and is not called |
//! | `qpq_redis_skipped_total` | counter | calls | scripts and commands that were not sent because Redis does not answer |
//! | `qpq_hot_reads_total{from}` | counter | reads | reads by their source: `redis`, `reloaded`, `postgres` |
//! | `qpq_lost_queues_total` | counter | queues | queues in Redis with messages that Postgres had lost although its history was the same: it was restored without `qpq-admin mark-restored` |
//! | `qpq_leases` | gauge | leases | pages of this edge on their way to a client |
//! | `qpq_waiters` | gauge | subscriptions | calls and subscriptions of this edge that wait for an inbox |
//! | `qpq_wakes_total{way}` | counter | wakes | inboxes that were woken: `local`, `sent`, `received`, `found` by a poll |
//! | `qpq_bus_dropped_total` | counter | messages | messages that NATS did not accept in time; waiting calls poll instead |
//! | `qpq_bus_connected` | gauge | 0 or 1 | whether NATS is connected |
//! | `qpq_cluster_edges` | gauge | edges | edges whose heartbeats arrived through NATS in the last seconds, including this one: 1 while NATS is disconnected |
//! | `qpq_session_lookups_total{from}` | counter | lookups | sessions by where they were found: `process`, `redis`, `postgres` |
//! | `qpq_histories_total` | counter | histories | times that this edge detected another history of the store: after a promotion or a restore |
//! | `qpq_limit_failures_total` | counter | failures | calls that could not be counted against their limit |

use metrics::{
    Unit::{Count, Seconds},
    describe_counter, describe_gauge, describe_histogram,
};

pub(crate) const PG_SECONDS: &str = "qpq_pg_seconds";
pub(crate) const PG_RETRIES: &str = "qpq_pg_retries_total";
pub(crate) const PG_ERRORS: &str = "qpq_pg_errors_total";
pub(crate) const PG_CONNECTIONS: &str = "qpq_pg_connections";
pub(crate) const CLOCK_SKEW: &str = "qpq_clock_skew_seconds";
pub(crate) const SWEEPS_SHRUNK: &str = "qpq_sweeps_shrunk_total";
pub(crate) const ENQUEUE_QUEUE: &str = "qpq_enqueue_queue_messages";
pub(crate) const ENQUEUE_BATCH: &str = "qpq_enqueue_batch_messages";
pub(crate) const COMPLETION_BATCH: &str = "qpq_completion_batch_pages";
pub(crate) const REDIS_SECONDS: &str = "qpq_redis_seconds";
pub(crate) const REDIS_ERRORS: &str = "qpq_redis_errors_total";
pub(crate) const REDIS_BREAKER: &str = "qpq_redis_breaker_open";
pub(crate) const REDIS_SKIPPED: &str = "qpq_redis_skipped_total";
pub(crate) const HOT_READS: &str = "qpq_hot_reads_total";
pub(crate) const LOST_QUEUES: &str = "qpq_lost_queues_total";
pub(crate) const LEASES: &str = "qpq_leases";
pub(crate) const WAITERS: &str = "qpq_waiters";
pub(crate) const WAKES: &str = "qpq_wakes_total";
pub(crate) const BUS_DROPPED: &str = "qpq_bus_dropped_total";
pub(crate) const BUS_CONNECTED: &str = "qpq_bus_connected";
pub(crate) const EDGES: &str = "qpq_cluster_edges";
pub(crate) const SESSION_LOOKUPS: &str = "qpq_session_lookups_total";
pub(crate) const HISTORIES: &str = "qpq_histories_total";
pub(crate) const LIMIT_FAILURES: &str = "qpq_limit_failures_total";

/// Describes the metrics to the recorder.
pub(crate) fn describe() {
    describe_postgres();
    describe_redis();
    describe_edges();
    // Zero from the start, so that a rate includes the first event.
    for name in [BUS_DROPPED, HISTORIES, LOST_QUEUES, LIMIT_FAILURES, REDIS_SKIPPED, SWEEPS_SHRUNK]
    {
        metrics::counter!(name).increment(0);
    }
    for name in [ENQUEUE_QUEUE, LEASES, REDIS_BREAKER, WAITERS] {
        metrics::gauge!(name).increment(0);
    }
}

fn describe_postgres() {
    describe_histogram!(
        PG_SECONDS,
        Seconds,
        "Duration of a transaction or statement, including the wait for a connection"
    );
    describe_counter!(
        PG_RETRIES,
        Count,
        "Transactions that were retried because another one interfered"
    );
    describe_counter!(
        PG_ERRORS,
        Count,
        "Transactions and statements that failed after all retries"
    );
    describe_gauge!(PG_CONNECTIONS, Count, "Connections of this edge, `busy` and `idle`");
    describe_gauge!(
        CLOCK_SKEW,
        Seconds,
        "Time by which the edge's clock is ahead of the clock of Postgres, negative if behind"
    );
    describe_counter!(
        SWEEPS_SHRUNK,
        Count,
        "Transactions of a sweep that took too long and were retried with fewer rows"
    );
    describe_gauge!(ENQUEUE_QUEUE, Count, "Messages that wait for a committer");
    describe_histogram!(ENQUEUE_BATCH, Count, "Messages that were committed in one transaction");
    describe_histogram!(
        COMPLETION_BATCH,
        Count,
        "Pages that clients have received and that were removed in one transaction"
    );
}

fn describe_redis() {
    describe_histogram!(REDIS_SECONDS, Seconds, "Duration of a script or command");
    describe_counter!(REDIS_ERRORS, Count, "Scripts and commands that failed");
    describe_gauge!(REDIS_BREAKER, Count, "Whether Redis does not answer and is not called");
    describe_counter!(
        REDIS_SKIPPED,
        Count,
        "Scripts and commands that were not sent because Redis does not answer"
    );
    describe_counter!(HOT_READS, Count, "Reads by their source: `redis`, `reloaded`, `postgres`");
    describe_counter!(
        LOST_QUEUES,
        Count,
        "Queues in Redis with messages that Postgres had lost although its history was the same: it was restored without `qpq-admin mark-restored`"
    );
}

/// Describes the metrics of the reads of an edge, and of its contact with other edges.
fn describe_edges() {
    describe_gauge!(LEASES, Count, "Pages of this edge on their way to a client");
    describe_gauge!(WAITERS, Count, "Calls and subscriptions of this edge that wait for an inbox");
    describe_counter!(
        WAKES,
        Count,
        "Inboxes that were woken: `local`, `sent`, `received`, `found` by a poll"
    );
    describe_counter!(
        BUS_DROPPED,
        Count,
        "Messages that NATS did not accept in time; waiting calls poll instead"
    );
    describe_gauge!(BUS_CONNECTED, Count, "Whether NATS is connected");
    describe_gauge!(
        EDGES,
        Count,
        "Edges whose heartbeats arrived through NATS in the last seconds, including this one: 1 while NATS is disconnected"
    );
    describe_counter!(
        SESSION_LOOKUPS,
        Count,
        "Sessions by where they were found: `process`, `redis`, `postgres`"
    );
    describe_counter!(
        HISTORIES,
        Count,
        "Times that this edge detected another history of the store: after a promotion or a restore"
    );
    describe_counter!(LIMIT_FAILURES, Count, "Calls that could not be counted against their limit");
}
