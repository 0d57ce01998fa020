//! `jobs`: dead jobs are listed, retried and removed, on a single node and in a cluster.

use std::time::Duration;

use qpq_domain::StoreLimits;
use qpq_ports::{ClaimRequest, Clock as _, JobEnd, JobKind, Jobs, NewJob, SystemClock};
use qpq_store_embedded::EmbeddedStore;
use qpq_test_services::Postgres;

use crate::harness::{RunOutput, Workspace, run, run_failing, run_with, text};

const KIND: JobKind = JobKind::new("relay");

fn request() -> ClaimRequest {
    let (lease, horizon) = (Duration::from_secs(60), Duration::from_secs(3_600));
    ClaimRequest { kind: KIND, limit: 9, lease, horizon }
}

/// Stores two jobs. One is dead, one is waiting.
async fn fill(jobs: &dyn Jobs) {
    let now = SystemClock.now();
    let job = |key: &[u8]| NewJob {
        kind: KIND,
        key: Some(key.into()),
        payload: Vec::new(),
        delay: Duration::ZERO,
    };
    jobs.put(vec![job(b"one")], now).await.unwrap();
    let claimed = jobs.claim(request(), now).await.unwrap().remove(0);
    let dead = JobEnd::Dead { error: "the peer is unknown".into() };
    jobs.finish(claimed.claim, dead, now).await.unwrap();
    jobs.put(vec![job(b"two")], now).await.unwrap();
}

/// Returns the first column of the line with the error.
fn dead_id(listed: &str) -> String {
    let line = listed.lines().find(|line| line.contains("the peer is unknown"));
    let line = line.unwrap_or_else(|| panic!("no dead job in {listed}"));
    assert!(line.contains("relay"), "{line}");
    line.split_whitespace().next().unwrap().to_owned()
}

/// Returns the counts of waiting, claimed and dead jobs.
fn counts(listed: &str) -> [&str; 3] {
    let line = listed.lines().find(|line| line.starts_with("relay ")).expect("a line of the kind");
    let columns: Vec<_> = line.split_whitespace().collect();
    [columns[1], columns[2], columns[3]]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_job_of_a_single_node_is_shown_retried_and_removed() {
    for stopped in [false, true] {
        let workspace = Workspace::new();
        let dir = workspace.path("data");
        let open = || async { EmbeddedStore::open(&dir, StoreLimits::default()).await.unwrap() };
        let store = open().await;
        fill(&*store.stores().jobs).await;
        let store = if stopped {
            store.close().await;
            None
        } else {
            Some(store)
        };
        let jobs =
            |arguments: &[&str]| run(&[&["jobs"], arguments, &["--data-dir", text(&dir)]].concat());
        let listed = jobs(&["list"]);
        assert_eq!(counts(&listed), ["1", "0", "1"], "{listed}");
        let id = dead_id(&listed);
        assert_eq!(jobs(&["retry", &id]), format!("Job {id} is due now.\n"));
        let listed = jobs(&["list"]);
        assert_eq!(counts(&listed), ["2", "0", "0"], "{listed}");
        assert!(listed.contains("No job is dead."), "{listed}");

        let store = match store {
            Some(store) => store,
            None => open().await,
        };
        let queue = store.stores().jobs;
        let claimed = queue.claim(request(), SystemClock.now()).await.unwrap();
        assert_eq!(claimed.len(), 2, "the retried job runs");
        for job in claimed {
            let dead = JobEnd::Dead { error: "the peer is unknown".into() };
            queue.finish(job.claim, dead, SystemClock.now()).await.unwrap();
        }
        store.close().await;
        assert_eq!(jobs(&["remove", &id]), format!("Job {id} is removed.\n"));
        let stderr = run_failing(1, &["jobs", "remove", &id, "--data-dir", text(&dir)]);
        assert!(stderr.contains(&format!("no dead job has the number {id}")), "{stderr}");
        assert_eq!(counts(&jobs(&["list"])), ["0", "0", "1"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_job_of_a_cluster_is_shown_retried_and_removed() {
    let postgres = Postgres::start().await.unwrap();
    let url = postgres.url();
    let jobs = |arguments: &[&str]| -> RunOutput {
        run_with(&[&["jobs"], arguments].concat(), &[("QPQ_POSTGRES__URL", &url)])
    };
    let end = jobs(&["list"]);
    assert_eq!(end.code, Some(1), "{end:?}");
    assert!(end.stderr.contains("qpq-admin migrate"), "{end:?}");
    assert_eq!(run_with(&["migrate"], &[("QPQ_POSTGRES__URL", &url)]).code, Some(0));

    postgres
        .sql(
            "INSERT INTO job (kind, key, payload, run_at, attempts, died_at, last_error) VALUES
             ('relay', 'one', '', 0, 3, 1800000000000, 'the peer is unknown'),
             ('relay', 'two', '', 0, 0, NULL, NULL)",
        )
        .await
        .unwrap();
    let end = jobs(&["list"]);
    assert_eq!((end.code, counts(&end.stdout)), (Some(0), ["1", "0", "1"]), "{end:?}");
    let id = dead_id(&end.stdout);
    assert_eq!(jobs(&["retry", &id]).stdout, format!("Job {id} is due now.\n"));
    let live = "SELECT count(*) FROM job WHERE died_at IS NULL AND attempts = 0";
    assert_eq!(postgres.sql(live).await.unwrap(), "2");

    // The job fails again, and a newer job does the same work.
    postgres.sql("UPDATE job SET died_at = 1 WHERE key = 'one'").await.unwrap();
    let newer = "INSERT INTO job (kind, key, payload, run_at) VALUES ('relay', 'one', '', 0)";
    postgres.sql(newer).await.unwrap();
    let end = jobs(&["retry", &id]);
    assert!(end.code == Some(1) && end.stderr.contains("a newer job"), "{end:?}");
    assert_eq!(jobs(&["remove", &id]).stdout, format!("Job {id} is removed.\n"));
    assert_eq!(counts(&jobs(&["list"]).stdout), ["2", "0", "0"]);
}

#[test]
fn a_directory_without_server_data_is_refused() {
    let workspace = Workspace::new();
    let stderr = run_failing(1, &["jobs", "list", "--data-dir", text(&workspace.path("nowhere"))]);
    assert!(stderr.contains("nowhere"), "{stderr}");
}
