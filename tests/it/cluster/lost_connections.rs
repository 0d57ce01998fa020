//! *Two lost connections*: the connections to Postgres are lost in the middle of every kind of
//! transaction. A call that is answered Ok has taken effect, and a call that is refused temporarily
//! may be repeated. After all repeats the call has taken effect exactly once.
//!
//! Each operation runs with two faults. With the first fault the table that the operation writes is
//! locked, so that its statements wait, and two waiting backends are terminated. With the second
//! fault the answers of Postgres are delayed and all connections are cut repeatedly, so that some
//! connections are lost during a commit.

use std::{collections::HashSet, future::Future, time::Duration};

use bytes::Bytes;
use qpq_domain::{MessageId, Seq};
use qpq_proto::{
    methods::{
        Ack, CountKeyPackages, Enqueue, Fetch, FetchHybridKey, FetchKeyPackage, Logout,
        OpaqueRegisterFinish, Peek, UploadHybridKey, UploadKeyPackage,
    },
    v1,
};
use qpq_test_services::{
    history::{Edge, History, Inbox, Tag},
    proxy,
};
use qpq_tests::{
    accounts::{self, Account, identity, login_with, registration, upload},
    client::Client,
    cluster::{Cluster, EntryPoints, Plan, Wiring},
    roaming::{CallOutcome, Roamer},
    traffic::{keep, payload, seen},
};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use sqlx::{Connection as _, PgConnection};
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};

use super::{STUCK, key_packages::client_of, until};

const EDGES: usize = 2;
const SEED: u64 = 0x2c0;
const UNAUTHORIZED: u8 = 2;
/// The number of calls of each operation with a fault, concurrently at both edges.
const TIMES: usize = 12;

/// The number of cuts of a fault. The first [`EARLY`] cuts follow each other quickly.
const CUTS: usize = 40;
const EARLY: usize = 6;

/// Terminates at most two backends of edges that wait for a lock.
const TERMINATE: &str = "
    SELECT count(pg_terminate_backend(pid)) FROM (
        SELECT pid FROM pg_stat_activity
         WHERE application_name LIKE 'qpq-server%' AND wait_event_type = 'Lock' LIMIT 2) AS waiting";

#[derive(Clone, Copy, Debug)]
enum ConnectionFault {
    /// Two backends are terminated while they write this table.
    Terminated { table: &'static str },
    /// All connections are cut repeatedly.
    Cut,
}

struct World {
    cluster: Cluster,
    entry_points: EntryPoints,
    account: Account,
    seed: u64,
}

impl World {
    async fn new() -> Self {
        let plan = Plan { edges: EDGES, wiring: Wiring::Proxied, seed: SEED, ..Plan::default() }
            // Without a cache, each call reads its session from Postgres and records its use if a
            // record is due.
            .with("QPQ_CLUSTER__SESSION_CACHE", "1ms");
        let cluster = Cluster::start(plan).await.expect("a cluster");
        let entry_points = cluster.entry_points();
        let account = cluster.accounts(1).await.expect("an account").remove(0);
        Self { cluster, entry_points, account, seed: SEED }
    }

    /// Runs `work` with `fault`.
    async fn with_fault<T>(&mut self, fault: ConnectionFault, work: impl Future<Output = T>) -> T {
        self.seed += 1;
        match fault {
            ConnectionFault::Terminated { table } => self.terminate(table, work).await,
            ConnectionFault::Cut => self.cut(work).await,
        }
    }

    async fn terminate<T>(&self, table: &str, work: impl Future<Output = T>) -> T {
        let mut operator =
            PgConnection::connect(&self.cluster.postgres.url()).await.expect("a connection");
        let mut locker =
            PgConnection::connect(&self.cluster.postgres.url()).await.expect("a connection");
        let mut lock = locker.begin().await.expect("a transaction");
        let sql = sqlx::AssertSqlSafe(format!("LOCK TABLE {table} IN SHARE MODE"));
        sqlx::query(sql).execute(&mut *lock).await.expect("the lock");
        let terminate = async {
            let mut terminated = 0;
            while terminated < 2 {
                let more: i64 = sqlx::query_scalar(TERMINATE)
                    .fetch_one(&mut operator)
                    .await
                    .expect("terminated");
                terminated += more;
                sleep(Duration::from_millis(5)).await;
            }
            lock.rollback().await.expect("unlocked");
        };
        tokio::join!(work, async {
            timeout(STUCK, terminate).await.expect("two backends wait for the table")
        })
        .0
    }

    async fn cut<T>(&self, work: impl Future<Output = T>) -> T {
        let mut random = StdRng::seed_from_u64(self.seed);
        let slow = proxy::Faults { latency: Duration::from_millis(3), ..proxy::Faults::default() };
        let before = self.cuts();
        (0..EDGES).for_each(|edge| self.cluster.links(edge).postgres.switch().set(slow));
        let mut work = std::pin::pin!(work);
        let mut cuts = 0;
        let done = loop {
            // The first cuts follow each other quickly, while calls are in progress. Later pauses
            // may be long enough for a new connection and a whole operation on it.
            let most = if cuts < EARLY { 20 } else { 250 };
            let calm = Duration::from_millis(random.gen_range(5..most));
            tokio::select! {
                done = &mut work => break done,
                () = sleep(calm), if cuts < CUTS => {
                    let edge = random.gen_range(0..EDGES);
                    self.cluster.links(edge).postgres.switch().cut_all();
                    cuts += 1;
                }
            }
        };
        (0..EDGES).for_each(|edge| self.cluster.links(edge).postgres.switch().heal());
        assert!(self.cuts() >= before + 2, "no connection was lost");
        done
    }

    fn cuts(&self) -> u64 {
        (0..EDGES).map(|edge| self.cluster.links(edge).postgres.switch().tally().cut).sum()
    }

    async fn client(&self, edge: usize) -> Client {
        Roamer::at(&self.entry_points, edge).patient().connected().await
    }

    async fn number(&self, sql: &str) -> u64 {
        self.cluster.postgres.sql(sql).await.expect("an answer").parse().expect("a number")
    }

    /// Returns both faults for operations that write `table`.
    fn faults(table: &'static str) -> [ConnectionFault; 2] {
        [ConnectionFault::Terminated { table }, ConnectionFault::Cut]
    }
}

/// Runs the work [`TIMES`] times, concurrently at all edges.
async fn many<T, F>(entry_points: &EntryPoints, work: impl Fn(usize, Roamer) -> F) -> Vec<T>
where
    F: Future<Output = T> + Send + 'static,
    T: Send + 'static,
{
    let mut all = JoinSet::new();
    for n in 0..TIMES {
        all.spawn(work(n, Roamer::at(entry_points, n % EDGES).patient()));
    }
    all.join_all().await
}

#[tokio::test(flavor = "multi_thread")]
async fn registrations_and_logins_succeed_in_spite_of_lost_connections() {
    let mut world = World::new().await;
    for (run, fault) in World::faults("account").into_iter().enumerate() {
        let client = world.client(0).await;
        let mut requests = Vec::new();
        for n in 0..TIMES {
            let name = format!("name-{run}-{n}");
            requests.push(registration(
                &name,
                upload(&client, &name, b"password").await.unwrap(),
                &identity(),
            ));
        }
        let before = world.number("SELECT count(*) FROM account").await;
        let entry_points = world.entry_points.clone();
        let registering = many(&entry_points, |n, mut roamer| {
            let request = requests[n].clone();
            async move { roamer.must::<OpaqueRegisterFinish>(&request, None).await.success }
        });
        assert_eq!(world.with_fault(fault, registering).await, [true; TIMES], "{fault:?}");
        assert_eq!(
            world.number("SELECT count(*) FROM account").await,
            before + TIMES as u64,
            "{fault:?}"
        );
        assert_eq!(
            world.number("SELECT count(*) FROM inbox").await,
            before + TIMES as u64,
            "{fault:?}"
        );
    }
    for (run, fault) in World::faults("session").into_iter().enumerate() {
        let entry_points = world.entry_points.clone();
        let logins = many(&entry_points, |n, mut roamer| async move {
            let name = format!("name-{run}-{n}");
            let deadline = tokio::time::Instant::now() + STUCK;
            loop {
                match login_with(&roamer.connected().await, &name, b"password").await {
                    Ok(Ok(token)) => return token,
                    Ok(Err(refused)) => assert!(refused.is_temporary(), "{name}: {refused:?}"),
                    Err(_) => {}
                }
                assert!(tokio::time::Instant::now() < deadline, "{name} cannot log in");
            }
        });
        let tokens = world.with_fault(fault, logins).await;
        let mut other = Roamer::at(&world.entry_points, 1).patient();
        for token in &tokens {
            other.must::<Peek>(&v1::PeekRequest::default(), Some(token)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn uses_and_ends_of_sessions_take_effect_in_spite_of_lost_connections() {
    let mut world = World::new().await;
    // Uses of a session that are due to be recorded.
    for fault in World::faults("session") {
        let aged = "UPDATE session SET last_used_at = last_used_at - 3600000";
        world.cluster.postgres.sql(aged).await.unwrap();
        world.cluster.redis.flush_all().await.unwrap();
        let (entry_points, token) = (world.entry_points.clone(), world.account.token.clone());
        let uses = many(&entry_points, |_, mut roamer| {
            let token = token.clone();
            async move {
                roamer.must::<Peek>(&v1::PeekRequest::default(), Some(&token)).await;
            }
        });
        world.with_fault(fault, uses).await;
        // A use that could not be recorded is due again at the next call.
        let mut roamer = Roamer::at(&world.entry_points, 0).patient();
        roamer.must::<Peek>(&v1::PeekRequest::default(), Some(&world.account.token)).await;
        let age =
            "SELECT (extract(epoch FROM now()) * 1000)::int8 - last_used_at FROM session LIMIT 1";
        assert!(world.number(age).await < 3_600_000, "{fault:?}: the use was not recorded");
    }
    for fault in World::faults("session") {
        let client = world.client(0).await;
        let mut tokens = Vec::new();
        for _ in 0..TIMES {
            tokens.push(accounts::login(&client, &world.account.username).await.unwrap());
        }
        let before = world.number("SELECT count(*) FROM session").await;
        let entry_points = world.entry_points.clone();
        let logouts = many(&entry_points, |n, mut roamer| {
            let token = tokens[n].clone();
            async move {
                loop {
                    match roamer.call::<Logout>(&v1::LogoutRequest::default(), Some(&token)).await {
                        CallOutcome::Ok(_) => return,
                        // An earlier attempt took effect without an answer.
                        CallOutcome::Refused(refused) if refused.status == UNAUTHORIZED => return,
                        CallOutcome::Refused(refused) => {
                            assert!(refused.is_temporary(), "{refused:?}")
                        }
                        CallOutcome::Lost(_) => {}
                    }
                    roamer.pause().await;
                }
            }
        });
        world.with_fault(fault, logouts).await;
        assert_eq!(
            world.number("SELECT count(*) FROM session").await,
            before - TIMES as u64,
            "{fault:?}"
        );
        for edge in 0..EDGES {
            let client = world.client(edge).await;
            for token in &tokens {
                until("the session has ended", || async {
                    let peek = client.call::<Peek>(&v1::PeekRequest::default(), Some(token)).await;
                    peek.expect("an answer").is_err_and(|refused| refused.status == UNAUTHORIZED)
                })
                .await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_are_delivered_once_in_spite_of_lost_connections() {
    let mut world = World::new().await;
    let history = History::new();
    let (entry_points, account) = (world.entry_points.clone(), world.account.clone());
    let mut random = StdRng::seed_from_u64(SEED);
    let mut next_tag = 0;
    // Enqueue, Fetch and Ack, one after the other, each with both faults.
    for round in 0..2 {
        for fault in World::faults("message") {
            let mut messages = Vec::new();
            for _ in 0..TIMES {
                next_tag += 1;
                let id = MessageId::new(random.r#gen());
                let request = v1::EnqueueRequest {
                    recipient_key: account.identity.clone(),
                    payload: payload(Tag(next_tag), 100, &mut random),
                    message_id: Bytes::copy_from_slice(id.as_bytes()),
                    ..Default::default()
                };
                messages.push((id, Tag(next_tag), request));
            }
            let sending = many(&entry_points, |n, mut roamer| {
                let (mut recorder, token) = (history.recorder(), account.token.clone());
                let (id, tag, request) = messages[n].clone();
                async move {
                    let sending = recorder.sending(Inbox(0), id, tag, Edge((n % EDGES) as u16));
                    let response = roamer.must::<Enqueue>(&request, Some(&token)).await;
                    recorder.acknowledged(sending, Seq(response.seq));
                }
            });
            world.with_fault(fault, sending).await;
            if round == 0 {
                drain(&mut world, fault, &history).await
            } else {
                ack(&mut world, fault, &history).await
            }
            empty(&world, &history).await;
        }
    }
    let report = history.check();
    if !report.violations.is_empty() {
        keep(&history, &report, &format!("seed {SEED:#x}")).unwrap();
    }
    report.assert_clean();
    assert_eq!((report.messages, report.acknowledged), (4 * TIMES, 4 * TIMES));
}

async fn drain(world: &mut World, fault: ConnectionFault, history: &History) {
    let (entry_points, account) = (world.entry_points.clone(), world.account.clone());
    let draining = many(&entry_points, |_, mut roamer| {
        let (mut recorder, token) = (history.recorder(), account.token.clone());
        async move {
            let request = v1::FetchRequest { limit: 2, ..Default::default() };
            let reading = recorder.reading(Inbox(0));
            let page = roamer.must::<Fetch>(&request, Some(&token)).await.payloads;
            recorder.delivered(reading, seen(&page));
        }
    });
    world.with_fault(fault, draining).await;
}

/// Peeks without faults, and acks the messages with one.
async fn ack(world: &mut World, fault: ConnectionFault, history: &History) {
    let (entry_points, account) = (world.entry_points.clone(), world.account.clone());
    let (mut reader, mut recorder) = (Roamer::at(&entry_points, 0).patient(), history.recorder());
    let reading = recorder.reading(Inbox(0));
    let page =
        reader.must::<Peek>(&v1::PeekRequest::default(), Some(&account.token)).await.payloads;
    recorder.delivered(reading, seen(&page));
    let seqs: Vec<u64> = page.iter().map(|envelope| envelope.seq).collect();
    let acking = many(&entry_points, |n, mut roamer| {
        let (mut recorder, token) = (history.recorder(), account.token.clone());
        let seqs: Vec<u64> =
            seqs.iter().copied().filter(|seq| *seq as usize % TIMES == n).collect();
        async move {
            let acking = recorder.acking(Inbox(0), seqs.iter().copied().map(Seq));
            let request = v1::AckRequest { seqs, ..Default::default() };
            roamer.must::<Ack>(&request, Some(&token)).await;
            recorder.acked(acking);
        }
    });
    world.with_fault(fault, acking).await;
}

/// Drains the inbox until Postgres has no messages.
async fn empty(world: &World, history: &History) {
    let (mut roamer, mut recorder) =
        (Roamer::at(&world.entry_points, 0).patient(), history.recorder());
    while world.cluster.messages_left().await.expect("a count") > 0 {
        let reading = recorder.reading(Inbox(0));
        let page = roamer
            .must::<Fetch>(&v1::FetchRequest::default(), Some(&world.account.token))
            .await
            .payloads;
        recorder.delivered(reading, seen(&page));
        roamer.pause().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn key_packages_are_issued_at_most_once_in_spite_of_lost_connections() {
    let mut world = World::new().await;
    let (entry_points, owner) = (world.entry_points.clone(), world.account.clone());
    let mut mls = client_of(&owner);
    for fault in World::faults("key_package") {
        let now = qpq_ports::Clock::now(&qpq_ports::SystemClock);
        let packages: Vec<Bytes> =
            mls.key_packages(2 * TIMES, now).unwrap().into_iter().map(Bytes::from).collect();
        let last_resort = Bytes::from(mls.last_resort_key_package(now).unwrap());
        let uploading = many(&entry_points, |n, mut roamer| {
            let request = v1::UploadKeyPackageRequest {
                package: last_resort.clone(),
                last_resort: true,
                more_packages: packages[2 * n..2 * n + 2].to_vec(),
                ..Default::default()
            };
            let token = owner.token.clone();
            async move { drop(roamer.must::<UploadKeyPackage>(&request, Some(&token)).await) }
        });
        world.with_fault(fault, uploading).await;
        let mut roamer = Roamer::at(&entry_points, 0).patient();
        let stock = roamer.must::<CountKeyPackages>(&Default::default(), Some(&owner.token)).await;
        assert_eq!(
            (stock.available as usize, stock.has_last_resort),
            (2 * TIMES, true),
            "{fault:?}"
        );

        let claiming = many(&entry_points, |_, mut roamer| {
            let (token, identity_key) = (owner.token.clone(), owner.identity.clone());
            async move {
                let request = v1::FetchKeyPackageRequest { identity_key, ..Default::default() };
                roamer.must::<FetchKeyPackage>(&request, Some(&token)).await
            }
        });
        let mut issued: Vec<_> = world.with_fault(fault, claiming).await;
        // The rest is claimed without faults, until only the last-resort package is left.
        let request = v1::FetchKeyPackageRequest {
            identity_key: owner.identity.clone(),
            ..Default::default()
        };
        while !issued.last().is_some_and(|claim| claim.last_resort) {
            issued.push(roamer.must::<FetchKeyPackage>(&request, Some(&owner.token)).await);
        }
        assert!(
            issued.iter().all(|claim| !claim.package.is_empty()),
            "{fault:?}: an answer has no package"
        );
        let own: Vec<&Bytes> =
            issued.iter().filter(|c| !c.last_resort).map(|c| &c.package).collect();
        let distinct: HashSet<&Bytes> = own.iter().copied().collect();
        assert_eq!(distinct.len(), own.len(), "{fault:?}: a package was issued twice");
        assert!(
            own.iter().all(|package| packages.contains(package)),
            "{fault:?}: a package was not uploaded"
        );
        // A package in a lost answer reaches no client. This is better than to issue it twice.
        assert!(!own.is_empty(), "{fault:?}: no package was issued");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_of_hybrid_keys_take_effect_in_spite_of_lost_connections() {
    let mut world = World::new().await;
    let (entry_points, owner) = (world.entry_points.clone(), world.account.clone());
    for fault in World::faults("hybrid_key") {
        let keys: Vec<Bytes> = (0..TIMES).map(|_| hybrid_key()).collect();
        let putting = many(&entry_points, |n, mut roamer| {
            let request = v1::UploadHybridKeyRequest {
                hybrid_public_key: keys[n].clone(),
                ..Default::default()
            };
            let token = owner.token.clone();
            async move {
                roamer.must::<UploadHybridKey>(&request, Some(&token)).await;
            }
        });
        world.with_fault(fault, putting).await;
        let request = v1::FetchHybridKeyRequest {
            identity_key: owner.identity.clone(),
            ..Default::default()
        };
        let mut roamer = Roamer::at(&entry_points, 1).patient();
        let got =
            roamer.must::<FetchHybridKey>(&request, Some(&owner.token)).await.hybrid_public_key;
        assert!(keys.contains(&got), "{fault:?}");
        // A later key replaces an earlier one.
        let last = hybrid_key();
        let put =
            v1::UploadHybridKeyRequest { hybrid_public_key: last.clone(), ..Default::default() };
        roamer.must::<UploadHybridKey>(&put, Some(&owner.token)).await;
        assert_eq!(
            roamer.must::<FetchHybridKey>(&request, Some(&owner.token)).await.hybrid_public_key,
            last
        );
    }
}

/// Returns a hybrid key, X25519 ‖ ML-KEM-768, of a random point, a zero matrix and a random seed.
/// The server accepts this key, although its private key is unknown.
fn hybrid_key() -> Bytes {
    let point = curve_point();
    let (matrix, seed) = ([0_u8; 1_152], rand::random::<[u8; 32]>());
    [&point[..], &matrix[..], &seed[..]].concat().into()
}

fn curve_point() -> [u8; 32] {
    let mut point = rand::random::<[u8; 32]>();
    point[31] &= 0x7f;
    point
}
