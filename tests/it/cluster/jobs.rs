//! Jobs in a cluster of real processes: one edge at a time runs a job, and the job of an edge that
//! is killed runs on another one, after the lease.
//!
//! The job is the sweep. A lock on the table of sessions delays it, so that a run lasts as long as
//! the test needs.

use std::fs;

use qpq_tests::cluster::{Cluster, Place, Plan};

use super::until;

/// The timeout of statements, longer than any wait in these tests, because a statement that waits
/// for the lock must not fail.
const PATIENT: &str = "10m";

/// The stored record of a job.
#[derive(Debug, PartialEq, Eq)]
struct Stored {
    /// The token of the worker in hexadecimal digits, or `-` without a worker.
    claim: String,
    run_at: i64,
    /// The time of Postgres, in the unit of `run_at`.
    now: i64,
}

async fn stored(cluster: &Cluster, kind: &str) -> Option<Stored> {
    let sql = format!(
        "SELECT coalesce(encode(claim, 'hex'), '-') || ' ' || run_at || ' ' || store_now()
           FROM job WHERE kind = '{kind}'"
    );
    let row = cluster.postgres.sql(&sql).await.expect("a row");
    let mut columns = row.split_whitespace();
    let claim = columns.next()?.to_owned();
    let mut number = || columns.next().expect("three columns").parse().expect("a number");
    Some(Stored { claim, run_at: number(), now: number() })
}

async fn sweep(cluster: &Cluster) -> Stored {
    stored(cluster, "sweep").await.expect("every edge stores the job at its start")
}

async fn make_due(cluster: &Cluster, kind: &str) {
    let sql = format!("UPDATE job SET run_at = 0 WHERE kind = '{kind}' AND claim IS NULL");
    cluster.postgres.sql(&sql).await.expect("due");
}

/// Runs `work` while no sweep can end.
async fn while_sweeps_hang(cluster: &Cluster, work: impl AsyncFnOnce()) {
    let lock = "BEGIN; LOCK TABLE session IN ACCESS EXCLUSIVE MODE; SELECT pg_sleep(3600)";
    let working = async {
        until("the table is locked", || async {
            let held =
                "SELECT count(*) FROM pg_locks WHERE mode = 'AccessExclusiveLock' AND granted
                           AND relation = 'session'::regclass";
            cluster.postgres.sql(held).await.expect("a count") != "0"
        })
        .await;
        work().await;
        unlock(cluster).await;
    };
    // The database session with the lock ends with an error, because it is terminated.
    let (_, ()) = tokio::join!(cluster.postgres.sql(lock), working);
}

/// Lets the sweeps continue.
async fn unlock(cluster: &Cluster) {
    let terminate = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
                      WHERE query LIKE '%pg_sleep(3600)' AND pid <> pg_backend_pid()";
    cluster.postgres.sql(terminate).await.expect("unlocked");
}

async fn start(edges: usize) -> Cluster {
    let plan = Plan { edges, place: Place::Apart, ..Plan::default() }
        .with("QPQ_POSTGRES__TIMEOUT", PATIENT);
    Cluster::start(plan).await.expect("a cluster")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_job_of_a_killed_edge_runs_on_another_one_after_its_lease() {
    let cluster = start(2).await;
    until("a sweep ends", || async { sweep(&cluster).await.claim == "-" }).await;
    cluster.drain_edge(1).await.expect("only the first edge can claim");
    while_sweeps_hang(&cluster, async || {
        make_due(&cluster, "sweep").await;
        until("the first edge claims", || async { sweep(&cluster).await.claim != "-" }).await;
        cluster.kill_edge(0).await.expect("killed");
        cluster.start_edge(1).await.expect("started");
        let mut last = sweep(&cluster).await;
        assert_ne!(last.claim, "-", "the claim outlives its edge");
        let held = last.claim.clone();
        loop {
            let next = sweep(&cluster).await;
            // Only another edge changes the claim of the killed edge. The sweep of that other edge
            // may have ended already: Postgres has not noticed the kill, and the transaction of the
            // killed edge still has the lock of the sweep. Therefore the other edge finds nothing
            // to do.
            if next.claim != held {
                assert!(next.now >= last.run_at, "not before the lease ended: {last:?} {next:?}");
                break;
            }
            last = next;
            until("time goes on", || async { sweep(&cluster).await.now > last.now }).await;
        }
    })
    .await;
    until("the run ends", || async { sweep(&cluster).await.claim == "-" }).await;
    let left = sweep(&cluster).await;
    assert!(left.run_at > left.now, "the next sweep is planned");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_edge_at_a_time_runs_a_job_as_long_as_it_lasts() {
    let cluster = start(2).await;
    while_sweeps_hang(&cluster, async || {
        make_due(&cluster, "sweep").await;
        until("an edge claims", || async { sweep(&cluster).await.claim != "-" }).await;
        let first = sweep(&cluster).await;
        let mut leases = vec![first.run_at];
        // Each renewal extends the lease. The other edge polls meanwhile.
        while leases.len() < 4 {
            let next = sweep(&cluster).await;
            assert_eq!(next.claim, first.claim, "the other edge did not claim the job");
            if leases.last() != Some(&next.run_at) {
                leases.push(next.run_at);
            }
            until("time goes on", || async { sweep(&cluster).await.now > next.now }).await;
        }
    })
    .await;
    until("the run ends", || async { sweep(&cluster).await.claim == "-" }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_edge_leaves_no_claim() {
    let cluster = start(1).await;
    while_sweeps_hang(&cluster, async || {
        make_due(&cluster, "sweep").await;
        until("the edge claims", || async { sweep(&cluster).await.claim != "-" }).await;
        let released = async {
            until("the claim is released", || async { sweep(&cluster).await.claim == "-" }).await;
            let left = sweep(&cluster).await;
            assert!(left.run_at <= left.now, "due for the next edge");
            // The drain waits for the connection, which ends with its statement.
            unlock(&cluster).await;
        };
        let (drained, ()) = tokio::join!(cluster.drain_edge(0), released);
        drained.expect("it ends as it should");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_edge_rotates_the_ticket_keys_that_all_edges_share() {
    const KIND: &str = "rotate_ticket_keys";
    let plan = Plan { edges: 2, place: Place::Apart, ..Plan::default() }
        .with("QPQ_CLUSTER__ROTATE_TICKET_KEYS", "6h");
    let cluster = Cluster::start(plan).await.expect("a cluster");
    let path = cluster.secrets_dir().join("ticket-keys");
    let read = || fs::read(&path).expect("three keys");
    let before = read();
    until("the job is stored", || async { stored(&cluster, KIND).await.is_some() }).await;
    let planned = stored(&cluster, KIND).await.expect("the job");
    assert!(planned.run_at > planned.now, "a start rotates nothing");

    let file = fs::File::options().append(true).open(&path).expect("the file");
    file.set_modified(std::time::SystemTime::UNIX_EPOCH).expect("very old");
    make_due(&cluster, KIND).await;
    until("the keys are rotated", || async { read() != before }).await;
    let after = read();
    assert_eq!(after[..64], before[32..], "by one step");
    // Runs the same job again, as after a lost result.
    until("the run ends", || async {
        stored(&cluster, KIND).await.is_some_and(|job| job.claim == "-" && job.run_at > job.now)
    })
    .await;
    make_due(&cluster, KIND).await;
    until("the run ends", || async {
        stored(&cluster, KIND).await.is_some_and(|job| job.claim == "-" && job.run_at > job.now)
    })
    .await;
    assert_eq!(read(), after, "not rotated twice");
}
