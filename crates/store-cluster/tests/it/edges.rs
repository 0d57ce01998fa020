//! Concurrent operations of several edges on the same accounts, KeyPackages, budgets and rows.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use qpq_domain::{ChannelId, IdentityKey, KeyPackageLimits, StoreLimits, UnixMillis};
use qpq_ports::{
    Batch, Bucket, Enqueued, LimitKey, NewAccount, NewMessage, PackageOwner, Registration, Stock,
    StoreError, Stores, TakenKeyPackage, Upload, UploadMode, Verdict,
};
use qpq_store_cluster::{ClusterStore, Config};
use tokio::task::JoinSet;

use crate::{
    backend::{Servers, edge, eventually},
    people::{HOUR, NOW, Person, last_resort, new_account, open, package, person},
};

/// Edges of one cluster, and its servers.
struct Edges<const N: usize> {
    servers: Arc<Servers>,
    config: Config,
    running: [ClusterStore; N],
}

impl<const N: usize> Edges<N> {
    async fn start(key_packages: KeyPackageLimits) -> Self {
        let servers = Servers::start().await;
        let config = servers.cluster(StoreLimits { key_packages, ..StoreLimits::default() }).await;
        let running = futures_util::future::join_all((0..N).map(|_| edge(&config))).await;
        let running = running.try_into().expect("as many");
        Self { servers, config, running }
    }

    fn stores(&self) -> [Stores; N] {
        std::array::from_fn(|n| self.running[n].stores())
    }
}

/// Registers two accounts at the same time, each on its edge.
async fn register(a: &Stores, b: &Stores, one: NewAccount, two: NewAccount) -> [Registration; 2] {
    let (one, two) = tokio::join!(a.accounts.register(one), b.accounts.register(two));
    [one.expect("register"), two.expect("register")]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_registrations_on_two_edges_one_wins() {
    use Registration::{IdentityTaken, Registered, Repeated, UsernameTaken};
    let edges = Edges::<2>::start(KeyPackageLimits::default()).await;
    let [a, b] = edges.stores();
    for n in 0..60_u8 {
        let (name, other) = (format!("name{n}"), format!("other{n}"));
        let outcomes =
            register(&a, &b, new_account(&name, 3 * n), new_account(&name, 3 * n + 1)).await;
        assert!(
            matches!(outcomes, [Registered(_), UsernameTaken] | [UsernameTaken, Registered(_)]),
            "one name: {outcomes:?}"
        );
        let outcomes = register(
            &a,
            &b,
            new_account(&other, 3 * n + 2),
            new_account(&format!("third{n}"), 3 * n + 2),
        );
        let outcomes = outcomes.await;
        assert!(
            matches!(outcomes, [Registered(_), IdentityTaken] | [IdentityTaken, Registered(_)]),
            "one key: {outcomes:?}"
        );
        let same =
            NewAccount { identity: IdentityKey::new([200 + n % 50; 32]), ..new_account("same", 0) };
        let same = NewAccount { username: new_account(&format!("same{n}"), 0).username, ..same };
        if n < 50 {
            let outcomes = register(&a, &b, same.clone(), same.clone()).await;
            let ([Registered(one), Repeated(two)] | [Repeated(two), Registered(one)]) = outcomes
            else {
                panic!("the very same: {outcomes:?}");
            };
            assert_eq!(one, two);
            let found =
                b.accounts.by_identity(&same.identity).await.expect("find").expect("it is there");
            assert_eq!((found.id, found.username), (one, same.username));
        }
    }
}

async fn upload(stores: &Stores, owner: Person, packages: Vec<qpq_ports::NewKeyPackage>) -> Upload {
    let owner = PackageOwner::account(owner.account);
    stores.key_packages.upload(owner, packages, UploadMode::Add, NOW).await.expect("upload")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn claims_on_three_edges_never_share_a_package_and_never_run_dry() {
    const PACKAGES: u8 = 40;
    const CLAIMS: usize = 64;
    let edges = Edges::<3>::start(KeyPackageLimits::default()).await;
    let stores = edges.stores();
    for round in 1..=5 {
        let alice = person(&stores[0], round).await;
        let packages = (1..=PACKAGES).map(package).chain([last_resort(200)]).collect();
        let stored = Stock { available: PACKAGES.into(), has_last_resort: true };
        assert_eq!(upload(&stores[1], alice, packages).await, Upload::Stored(stored));
        let mut tasks = JoinSet::new();
        for n in 0..CLAIMS {
            let keys = Arc::clone(&stores[n % 3].key_packages);
            tasks.spawn(async move {
                keys.take(&alice.identity, NOW).await.expect("take").expect("never dry")
            });
        }
        let (last, single): (Vec<_>, Vec<_>) =
            tasks.join_all().await.into_iter().partition(|taken| taken.last_resort);
        let distinct: BTreeSet<u8> = single.iter().map(|taken| taken.bytes[0]).collect();
        assert_eq!((single.len(), distinct), (PACKAGES.into(), (1..=PACKAGES).collect()));
        assert_eq!(
            last,
            vec![TakenKeyPackage { bytes: vec![200; 300], last_resort: true }; CLAIMS - 40]
        );
        for n in [1, PACKAGES, 200] {
            let again = if n == 200 { package(n) } else { last_resort(n) };
            let there = Upload::Stored(Stock { available: 0, has_last_resort: true });
            let outcome = upload(&stores[2], alice, vec![again]).await;
            assert_eq!(outcome, if n == 200 { there } else { Upload::Taken(0) });
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn claims_during_replacements_of_the_last_resort_always_receive_one() {
    let edges = Edges::<3>::start(KeyPackageLimits::default()).await;
    let stores = edges.stores();
    let alice = person(&stores[0], 1).await;
    upload(&stores[0], alice, vec![last_resort(0)]).await;
    let (done, replaced) = tokio::sync::watch::channel(false);
    let mut claims = JoinSet::new();
    for n in 0..6 {
        let (keys, replaced) = (Arc::clone(&stores[1 + n % 2].key_packages), replaced.clone());
        claims.spawn(async move {
            let mut seen = BTreeSet::new();
            while !*replaced.borrow() {
                let taken =
                    keys.take(&alice.identity, NOW).await.expect("take").expect("never dry");
                assert!(taken.last_resort);
                seen.insert(taken.bytes[0]);
            }
            seen
        });
    }
    for n in 1..=100 {
        let stored = upload(&stores[0], alice, vec![last_resort(n)]).await;
        assert_eq!(stored, Upload::Stored(Stock { available: 0, has_last_resort: true }));
    }
    done.send(true).expect("they claim");
    let seen: BTreeSet<u8> = claims.join_all().await.into_iter().flatten().collect();
    assert!(seen.len() > 1, "it was replaced while it was claimed");
    for n in seen.into_iter().filter(|n| *n != 100) {
        assert_eq!(
            upload(&stores[0], alice, vec![package(n)]).await,
            Upload::Taken(0),
            "{n} was given out"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn uploads_on_two_edges_keep_the_cap() {
    let edges =
        Edges::<2>::start(KeyPackageLimits { max_count: 10, ..KeyPackageLimits::default() }).await;
    let [a, b] = edges.stores();
    for n in 1..=30 {
        let alice = person(&a, n).await;
        let half = |from| (from..from + 6).map(package).collect();
        let outcomes = tokio::join!(upload(&a, alice, half(0)), upload(&b, alice, half(100)));
        let stored = Upload::Stored(Stock { available: 6, has_last_resort: false });
        assert!(
            outcomes == (stored, Upload::Full) || outcomes == (Upload::Full, stored),
            "round {n}: {outcomes:?}"
        );
        // Both upload the same KeyPackages. The second upload finds them stored.
        let bob = person(&a, 100 + n).await;
        let same = || (0..6).map(package).chain([last_resort(9)]).collect();
        let outcomes = tokio::join!(upload(&a, bob, same()), upload(&b, bob, same()));
        let stored = Upload::Stored(Stock { available: 6, has_last_resort: true });
        assert_eq!(outcomes, (stored, stored), "round {n}");
    }
}

fn budget(n: u8) -> LimitKey {
    LimitKey { class: "edges", subject: [n; 16] }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_at_two_edges_use_one_budget() {
    let edges = Edges::<2>::start(KeyPackageLimits::default()).await;
    let [a, b] = edges.stores();
    let slow = Bucket { burst: 100, per_second: 0.001 };
    let mut tasks = JoinSet::new();
    for n in 0..8 {
        let limiter = Arc::clone(if n % 2 == 0 { &a.limiter } else { &b.limiter });
        tasks.spawn(async move {
            let mut allowed = 0;
            for _ in 0..25 {
                let verdict = limiter.take(budget(1), slow, 1, NOW).await.expect("take");
                allowed += u32::from(verdict == Verdict::Allowed);
            }
            allowed
        });
    }
    assert_eq!(tasks.join_all().await.iter().sum::<u32>(), 100);
    assert_eq!(a.limiter.take(budget(1), slow, 1, NOW).await.expect("take"), retry(1_000_000));

    // No fraction of a token is lost between edges.
    let thirds = Bucket { burst: 3, per_second: 0.3 };
    for stores in [&a, &b, &a] {
        assert_eq!(
            stores.limiter.take(budget(2), thirds, 1, NOW).await.expect("take"),
            Verdict::Allowed
        );
    }
    assert_eq!(b.limiter.take(budget(2), thirds, 1, NOW).await.expect("take"), retry(3_334));
    assert_eq!(b.limiter.take(budget(2), thirds, 3, NOW).await.expect("take"), retry(10_000));
    let soon = NOW.plus(Duration::from_millis(3_333));
    assert_eq!(a.limiter.take(budget(2), thirds, 1, soon).await.expect("take"), retry(1));
    let then = NOW.plus(Duration::from_millis(3_334));
    assert_eq!(a.limiter.take(budget(2), thirds, 1, then).await.expect("take"), Verdict::Allowed);

    let keys =
        edges.servers.redis.command(["KEYS", &format!("{}:r:*", edges.config.namespace)]).await;
    for key in keys.expect("Redis").array().expect("a list") {
        let left =
            edges.servers.redis.command(["PTTL", key.text().expect("text")]).await.expect("Redis");
        assert!(left.integer().expect("a number") > 0, "{key:?} goes by itself");
    }
}

fn retry(millis: u64) -> Verdict {
    Verdict::RetryAfter(Duration::from_millis(millis))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_redis_nothing_is_counted_and_the_check_fails() {
    let edges = Edges::<1>::start(KeyPackageLimits::default()).await;
    let [stores] = edges.stores();
    let bucket = Bucket { burst: 1, per_second: 0.001 };
    let take = || stores.limiter.take(budget(1), bucket, 1, NOW);
    assert_eq!(take().await.expect("take"), Verdict::Allowed);
    stores.maintenance.check().await.expect("healthy");
    edges.servers.redis.kill9().await.expect("Redis");
    assert!(matches!(take().await, Err(StoreError::Unavailable(_))));
    assert!(matches!(stores.maintenance.check().await, Err(StoreError::Unavailable(_))));
    edges.servers.redis.start_again().await.expect("Redis");
    eventually("the check to pass again", || async { stores.maintenance.check().await.is_ok() })
        .await;
    assert_eq!(take().await.expect("take"), Verdict::Allowed, "the restarted Redis has no buckets");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_postgres_the_check_fails() {
    let edges = Edges::<1>::start(KeyPackageLimits::default()).await;
    let [stores] = edges.stores();
    stores.maintenance.check().await.expect("healthy");
    edges.servers.postgres.kill9().await.expect("Postgres");
    let refused = stores.accounts.register(new_account("alice", 1)).await;
    assert!(matches!(refused, Err(StoreError::Unavailable(_))), "{refused:?}");
    assert!(matches!(stores.maintenance.check().await, Err(StoreError::Unavailable(_))));
    edges.servers.postgres.start_again().await.expect("Postgres");
    eventually("the check to pass again", || async { stores.maintenance.check().await.is_ok() })
        .await;
    person(&stores, 1).await;
}

/// Creates a message of an account to itself, which lives for an hour.
fn brief(person: Person) -> NewMessage {
    NewMessage {
        sender: person.identity,
        recipient: person.identity,
        channel: ChannelId::DEFAULT,
        payload: "brief".into(),
        payload_sha256: [0; 32],
        message_id: None,
        now: NOW,
        ttl: HOUR,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_sweeps_remove_each_row_once() {
    const PEOPLE: u8 = 8;
    const EACH: usize = 100;
    let edges = Edges::<3>::start(KeyPackageLimits::default()).await;
    let stores = edges.stores();
    for n in 1..=PEOPLE {
        let somebody = person(&stores[0], n).await;
        let outcomes = stores[0]
            .inboxes
            .enqueue(Batch::new(vec![brief(somebody); EACH]))
            .await
            .expect("enqueue");
        assert!(outcomes.iter().all(|outcome| matches!(outcome, Enqueued::Accepted(_))));
        open(&stores[0], n, somebody).await;
        upload(&stores[0], somebody, vec![package(n)]).await;
    }
    let after = NOW.plus(2 * HOUR);
    let mut tasks = JoinSet::new();
    for maintenance in stores.iter().map(|stores| Arc::clone(&stores.maintenance)) {
        tasks.spawn(async move {
            let mut rows = 0;
            // A sweep also returns 0 while another one is in progress, so each task sweeps more
            // often than there are batches.
            for _ in 0..20 {
                rows += maintenance.sweep(after).await.expect("sweep").rows;
            }
            rows
        });
    }
    let all = usize::from(PEOPLE) * (EACH + 2);
    let mut swept = tasks.join_all().await.iter().sum::<u64>();
    // The last rows of a batch may have been skipped by every sweep.
    loop {
        match stores[0].maintenance.sweep(after).await.expect("sweep").rows {
            0 => break,
            rows => swept += rows,
        }
    }
    assert_eq!(swept, all as u64);
    let swept = stores[1].maintenance.sweep(UnixMillis(after.0 + 1)).await.expect("sweep");
    assert_eq!(swept.rows, 0);
}
