//! Rules of [`crate::Jobs`].

use std::{collections::HashSet, time::Duration};

use qpq_domain::UnixMillis;

use super::{
    Factory,
    bench::{Bench, MINUTE, NOW},
};
use crate::{
    Claim, ClaimRequest, ClaimState, DeadChange, Job, JobEnd, JobId, JobKind, JobStats, NewJob,
};

const MAIL: JobKind = JobKind::new("mail");
const OTHER: JobKind = JobKind::new("other");

/// The longest wait of the jobs in these tests.
const HORIZON: Duration = Duration::from_secs(3_600);
const DAY: Duration = Duration::from_secs(86_400);

/// Creates a job that is due immediately.
fn job(payload: &str) -> NewJob {
    NewJob { kind: MAIL, key: None, payload: payload.into(), delay: Duration::ZERO }
}

fn keyed(payload: &str) -> NewJob {
    NewJob { key: Some(b"peer".to_vec()), ..job(payload) }
}

fn request(limit: u32) -> ClaimRequest {
    ClaimRequest { kind: MAIL, limit, lease: MINUTE, horizon: HORIZON }
}

async fn put(bench: &Bench, job: NewJob) -> u64 {
    bench.stores.jobs.put(vec![job], NOW).await.expect("put")
}

async fn claim(bench: &Bench, limit: u32, now: UnixMillis) -> Vec<Job> {
    bench.stores.jobs.claim(request(limit), now).await.expect("claim")
}

async fn claim_one(bench: &Bench, now: UnixMillis) -> Job {
    let mut jobs = claim(bench, 9, now).await;
    assert_eq!(jobs.len(), 1, "{jobs:?}");
    jobs.remove(0)
}

/// Ends the run of a claimed job as a worker that has the claim.
async fn end(bench: &Bench, job: &Job, end: JobEnd, now: UnixMillis) {
    assert_eq!(finish(bench, job.claim, end, now).await, ClaimState::Valid);
}

async fn finish(bench: &Bench, claim: Claim, end: JobEnd, now: UnixMillis) -> ClaimState {
    bench.stores.jobs.finish(claim, end, now).await.expect("finish")
}

fn payloads(jobs: &[Job]) -> Vec<&str> {
    jobs.iter().map(|job| std::str::from_utf8(&job.payload).expect("text")).collect()
}

pub async fn the_longest_due_jobs_of_a_kind_are_claimed_first(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let later = |payload, minutes| NewJob { delay: minutes * MINUTE, ..job(payload) };
    let jobs = vec![later("third", 2), job("first"), later("second", 1), later("not yet", 9)];
    assert_eq!(bench.stores.jobs.put(jobs, NOW).await.expect("put"), 4);
    put(&bench, NewJob { kind: OTHER, ..job("of another kind") }).await;
    let at = NOW.plus(2 * MINUTE);
    assert_eq!(payloads(&claim(&bench, 2, at).await), ["first", "second"]);
    assert_eq!(payloads(&claim(&bench, 9, at).await), ["third"]);
    assert!(claim(&bench, 9, at).await.is_empty());
}

pub async fn concurrent_claims_never_share_a_job(factory: &dyn Factory) {
    const MANY: usize = 60;
    let bench = Bench::new(factory).await;
    let jobs = (0..MANY).map(|n| job(&n.to_string())).collect();
    bench.stores.jobs.put(jobs, NOW).await.expect("put");
    let claims = (0..8).map(|_| async {
        let mut mine = Vec::new();
        loop {
            let claimed = claim(&bench, 3, NOW).await;
            if claimed.is_empty() {
                return mine;
            }
            mine.extend(claimed.into_iter().map(|job| job.claim.job));
        }
    });
    let all: Vec<JobId> =
        futures_util::future::join_all(claims).await.into_iter().flatten().collect();
    assert_eq!(all.len(), MANY);
    assert_eq!(HashSet::<JobId>::from_iter(all).len(), MANY);
}

pub async fn a_job_is_claimed_again_after_its_lease_has_ended(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    put(&bench, job("work")).await;
    let first = claim(&bench, 1, NOW).await.remove(0);
    assert_eq!(first.attempt, 1);
    let before_the_end = UnixMillis(NOW.plus(MINUTE).0 - 1);
    assert!(claim(&bench, 1, before_the_end).await.is_empty());
    let second = claim(&bench, 1, NOW.plus(MINUTE)).await.remove(0);
    assert_eq!((second.claim.job, second.attempt), (first.claim.job, 2));
    assert_ne!(second.claim.token, first.claim.token);
    // The first worker has lost the job.
    let now = NOW.plus(MINUTE);
    assert_eq!(finish(&bench, first.claim, JobEnd::Done, now).await, ClaimState::Lost);
    let renewed = bench.stores.jobs.renew(first.claim, MINUTE, now).await.expect("renew");
    assert_eq!(renewed, ClaimState::Lost);
    assert_eq!(finish(&bench, second.claim, JobEnd::Done, now).await, ClaimState::Valid);
    assert!(claim(&bench, 1, now.plus(9 * MINUTE)).await.is_empty());
}

pub async fn a_renewed_claim_lasts_longer(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    put(&bench, job("long work")).await;
    let claimed = claim(&bench, 1, NOW).await.remove(0);
    let half = NOW.plus(MINUTE / 2);
    let renewed = bench.stores.jobs.renew(claimed.claim, MINUTE, half).await.expect("renew");
    assert_eq!(renewed, ClaimState::Valid);
    assert!(claim(&bench, 1, NOW.plus(MINUTE)).await.is_empty());
    assert_eq!(claim(&bench, 1, half.plus(MINUTE)).await.len(), 1);
}

pub async fn a_failed_job_is_due_at_its_retry_and_counts_its_attempts(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    put(&bench, job("work")).await;
    let mut now = NOW;
    for attempt in 1..=3 {
        let claimed = claim(&bench, 1, now).await.remove(0);
        assert_eq!(
            (claimed.attempt, payloads(std::slice::from_ref(&claimed))),
            (attempt, vec!["work"])
        );
        let at = now.plus(5 * MINUTE);
        let retry = JobEnd::RetryAfter { wait: 5 * MINUTE, error: "no route".into() };
        assert_eq!(finish(&bench, claimed.claim, retry.clone(), now).await, ClaimState::Valid);
        assert_eq!(finish(&bench, claimed.claim, retry, now).await, ClaimState::Lost);
        assert!(claim(&bench, 1, UnixMillis(at.0 - 1)).await.is_empty());
        now = at;
    }
}

pub async fn a_repeated_job_starts_with_no_attempts(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    put(&bench, job("every minute")).await;
    for minute in 0..3 {
        let now = NOW.plus(minute * MINUTE);
        let claimed = claim(&bench, 1, now).await.remove(0);
        assert_eq!(claimed.attempt, 1);
        finish(&bench, claimed.claim, JobEnd::RepeatAfter { wait: MINUTE }, now).await;
        assert!(claim(&bench, 1, now).await.is_empty());
    }
}

pub async fn a_released_job_is_due_immediately_and_its_attempt_does_not_count(
    factory: &dyn Factory,
) {
    let bench = Bench::new(factory).await;
    put(&bench, job("work")).await;
    for _ in 0..3 {
        let claimed = claim_one(&bench, NOW).await;
        assert_eq!(claimed.attempt, 1);
        end(&bench, &claimed, JobEnd::Released, NOW).await;
    }
}

pub async fn a_key_is_unique_until_its_job_is_done_or_dead(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    assert_eq!(put(&bench, keyed("first")).await, 1);
    assert_eq!(put(&bench, keyed("same key")).await, 0);
    assert_eq!(put(&bench, NewJob { kind: OTHER, ..keyed("another kind") }).await, 1);
    let twice = vec![keyed("a"), NewJob { key: Some(b"b".to_vec()), ..job("b") }, keyed("c")];
    assert_eq!(bench.stores.jobs.put(twice, NOW).await.expect("put"), 1);
    let claimed = claim(&bench, 9, NOW).await;
    assert_eq!(payloads(&claimed), ["first", "b"]);
    end(&bench, &claimed[0], JobEnd::Done, NOW).await;
    assert_eq!(put(&bench, keyed("after it is done")).await, 1);
    let claimed = claim_one(&bench, NOW).await;
    end(&bench, &claimed, JobEnd::Dead { error: "refused".into() }, NOW).await;
    assert_eq!(put(&bench, keyed("after it died")).await, 1);
}

pub async fn a_put_with_a_present_key_makes_the_job_due_earlier_and_never_later(
    factory: &dyn Factory,
) {
    let bench = Bench::new(factory).await;
    let after = |minutes| NewJob { delay: minutes * MINUTE, ..keyed("every hour") };
    put(&bench, after(5)).await;
    assert_eq!(put(&bench, after(9)).await, 0);
    assert!(claim(&bench, 1, NOW.plus(4 * MINUTE)).await.is_empty());
    assert_eq!(put(&bench, after(3)).await, 0);
    let claimed = claim_one(&bench, NOW.plus(3 * MINUTE)).await;
    assert_eq!(payloads(&[claimed]), ["every hour"]);
}

/// The first run may have read the state before the cause of the second put was committed.
pub async fn a_job_that_is_put_while_it_runs_runs_once_more(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let ends = [
        JobEnd::Done,
        JobEnd::RepeatAfter { wait: 50 * MINUTE },
        JobEnd::Dead { error: "refused".into() },
    ];
    for how in ends {
        put(&bench, keyed("relay")).await;
        let first = claim_one(&bench, NOW).await;
        assert_eq!(put(&bench, keyed("while it runs")).await, 0);
        assert!(claim(&bench, 1, NOW).await.is_empty(), "one worker at a time");
        end(&bench, &first, how.clone(), NOW).await;
        let second = claim_one(&bench, NOW).await;
        assert_eq!((payloads(std::slice::from_ref(&second)), second.attempt), (vec!["relay"], 1));
        end(&bench, &second, JobEnd::Done, NOW).await;
        assert!(claim(&bench, 1, NOW.plus(HORIZON)).await.is_empty(), "{how:?}");
    }
}

pub async fn concurrent_puts_of_a_key_and_ends_lose_no_run(factory: &dyn Factory) {
    const PUTS: u32 = 40;
    let bench = Bench::new(factory).await;
    let stored = std::sync::atomic::AtomicU32::new(0);
    let seen = std::sync::atomic::AtomicU32::new(0);
    let order = std::sync::atomic::Ordering::SeqCst;
    let putting = async {
        for _ in 0..PUTS {
            // The cause is stored before its job is put.
            stored.fetch_add(1, order);
            put(&bench, keyed("relay")).await;
        }
    };
    let running = async {
        while seen.load(order) < PUTS {
            for job in claim(&bench, 1, NOW).await {
                let now_stored = stored.load(order);
                seen.store(now_stored, order);
                end(&bench, &job, JobEnd::Done, NOW).await;
            }
            tokio::task::yield_now().await;
        }
    };
    let both = async { tokio::join!(putting, running) };
    let within = Duration::from_secs(60);
    tokio::time::timeout(within, both).await.expect("the last put is followed by a run");
}

pub async fn a_dead_job_is_listed_and_never_runs_again(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    for (payload, minute) in [("one", 1), ("two", 2)] {
        put(&bench, job(payload)).await;
        let now = NOW.plus(minute * MINUTE);
        let claimed = claim(&bench, 1, now).await.remove(0);
        finish(&bench, claimed.claim, JobEnd::Dead { error: payload.into() }, now).await;
    }
    assert!(claim(&bench, 9, NOW.plus(1_000 * MINUTE)).await.is_empty());
    let dead = bench.stores.jobs.dead(9).await.expect("dead");
    let listed: Vec<_> = dead.iter().map(|job| (job.error.as_str(), job.died_at)).collect();
    assert_eq!(listed, [("two", NOW.plus(2 * MINUTE)), ("one", NOW.plus(MINUTE))]);
    assert!(dead.iter().all(|job| job.kind == "mail" && job.attempts == 1));
    assert_eq!(bench.stores.jobs.dead(1).await.expect("dead").len(), 1);
}

pub async fn a_dead_job_is_retried_or_removed_by_its_number(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let jobs = &bench.stores.jobs;
    let die = async |job: NewJob| {
        put(&bench, job).await;
        let claimed = claim_one(&bench, NOW).await;
        end(&bench, &claimed, JobEnd::Dead { error: "refused".into() }, NOW).await;
        claimed.claim.job
    };
    let (one, two) = (die(job("one")).await, die(keyed("two")).await);
    assert_eq!(jobs.retry_dead(one, NOW).await.expect("retry"), DeadChange::Changed);
    assert_eq!(jobs.retry_dead(one, NOW).await.expect("retry"), DeadChange::NotFound);
    assert_eq!(jobs.remove_dead(one).await.expect("remove"), DeadChange::NotFound);
    let again = claim_one(&bench, NOW).await;
    assert_eq!((again.claim.job, again.attempt), (one, 1));
    end(&bench, &again, JobEnd::Done, NOW).await;
    put(&bench, keyed("newer")).await;
    assert_eq!(jobs.retry_dead(two, NOW).await.expect("retry"), DeadChange::Superseded);
    assert_eq!(jobs.remove_dead(two).await.expect("remove"), DeadChange::Changed);
    assert_eq!(payloads(&[claim_one(&bench, NOW).await]), ["newer"]);
    assert!(jobs.dead(9).await.expect("dead").is_empty());
}

pub async fn stats_count_each_kind(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let at = NOW.plus(3 * MINUTE);
    for payload in ["dead", "claimed", "due", "due later"] {
        put(&bench, job(payload)).await;
    }
    put(&bench, NewJob { kind: OTHER, delay: 9 * MINUTE, ..job("future") }).await;
    let long = ClaimRequest { lease: 9 * MINUTE, ..request(2) };
    let claimed = bench.stores.jobs.claim(long, NOW).await.expect("claim");
    finish(&bench, claimed[0].claim, JobEnd::Dead { error: "removed".into() }, NOW).await;
    let stats = |kind: &str, counts: [u64; 3], overdue| JobStats {
        kind: kind.into(),
        waiting: counts[0],
        claimed: counts[1],
        dead: counts[2],
        overdue,
    };
    assert_eq!(
        bench.stores.jobs.stats(at).await.expect("stats"),
        [stats("mail", [2, 1, 1], 3 * MINUTE), stats("other", [1, 0, 0], Duration::ZERO)]
    );
}

pub async fn jobs_survive_a_crash(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    put(&bench, job("waiting")).await;
    put(&bench, NewJob { delay: MINUTE, ..job("later") }).await;
    let claimed = claim(&bench, 1, NOW).await.remove(0);
    bench.crash().await;
    // After a crash, a backend waits for the end of the lease, or finds that no worker is left.
    let at = NOW.plus(2 * MINUTE);
    let again = claim(&bench, 9, at).await;
    assert_eq!(HashSet::from_iter(payloads(&again)), HashSet::from(["waiting", "later"]));
    assert_eq!(finish(&bench, claimed.claim, JobEnd::Done, at).await, ClaimState::Lost);
    for job in again {
        assert_eq!(finish(&bench, job.claim, JobEnd::Done, at).await, ClaimState::Valid);
    }
    bench.crash().await;
    assert!(claim(&bench, 9, at.plus(9 * MINUTE)).await.is_empty());
}

/// The caller is one edge of several, or its clock jumped while the process ran.
pub async fn a_caller_with_a_wrong_clock_writes_right_waits(factory: &dyn Factory) {
    for wrong in [NOW.plus(100 * DAY), NOW.minus(100 * DAY)] {
        let bench = Bench::new(factory).await;
        bench.backend.set_clock(NOW).await;
        let jobs = &bench.stores.jobs;
        let delayed = NewJob { delay: 5 * MINUTE, ..job("work") };
        jobs.put(vec![delayed], wrong).await.expect("put");
        let mut now = NOW;
        let ends = [
            JobEnd::RepeatAfter { wait: 5 * MINUTE },
            JobEnd::RetryAfter { wait: 5 * MINUTE, error: "no route".into() },
        ];
        for how in ends {
            assert!(claim(&bench, 1, now.plus(MINUTE)).await.is_empty());
            assert!(claim(&bench, 1, wrong).await.is_empty());
            now = now.plus(6 * MINUTE);
            bench.backend.set_clock(now).await;
            let claimed = claim_one(&bench, now).await;
            end(&bench, &claimed, how, wrong).await;
        }
    }
}

pub async fn a_caller_with_a_wrong_clock_takes_no_job_from_its_worker(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    bench.backend.set_clock(NOW).await;
    put(&bench, job("work")).await;
    let claimed = claim_one(&bench, NOW).await;
    for wrong in [NOW.plus(100 * DAY), NOW.minus(100 * DAY)] {
        assert!(claim(&bench, 1, wrong).await.is_empty());
        let renewed = bench.stores.jobs.renew(claimed.claim, MINUTE, wrong).await.expect("renew");
        assert_eq!(renewed, ClaimState::Valid);
    }
    end(&bench, &claimed, JobEnd::Done, NOW).await;
}

pub async fn a_store_clock_that_jumps_and_returns_hides_no_job(factory: &dyn Factory) {
    for wrong in [NOW.plus(100 * DAY), NOW.minus(100 * DAY)] {
        for ends in [true, false] {
            let bench = Bench::new(factory).await;
            bench.backend.set_clock(NOW).await;
            put(&bench, job("every minute")).await;
            bench.backend.set_clock(wrong).await;
            let claimed = claim_one(&bench, wrong).await;
            if ends {
                end(&bench, &claimed, JobEnd::RepeatAfter { wait: MINUTE }, wrong).await;
            }
            let now = NOW.plus(2 * MINUTE);
            bench.backend.set_clock(now).await;
            // With the right clock, a wait is neither longer nor shorter than the worker asked for.
            for _ in 0..2 {
                let claimed = claim_one(&bench, now).await;
                end(&bench, &claimed, JobEnd::RepeatAfter { wait: Duration::ZERO }, now).await;
            }
            let claimed = claim_one(&bench, now).await;
            end(&bench, &claimed, JobEnd::RepeatAfter { wait: MINUTE }, now).await;
            assert!(claim(&bench, 1, now).await.is_empty());
        }
    }
}

pub async fn a_job_beyond_the_horizon_of_its_kind_is_due(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let after = |payload, delay| NewJob { delay, ..job(payload) };
    put(&bench, after("at the horizon", HORIZON)).await;
    put(&bench, after("beyond", HORIZON + MINUTE)).await;
    put(&bench, after("after the end of time", Duration::MAX)).await;
    put(&bench, job("due")).await;
    let found = claim(&bench, 9, NOW).await;
    assert_eq!(
        HashSet::from_iter(payloads(&found)),
        HashSet::from(["due", "beyond", "after the end of time"])
    );
    // A lease that ends beyond the horizon counts as ended.
    for claimed in found {
        let forever = bench.stores.jobs.renew(claimed.claim, 2 * HORIZON, NOW).await;
        assert_eq!(forever.expect("renew"), ClaimState::Valid);
    }
    assert_eq!(claim(&bench, 9, NOW).await.len(), 3);
}
