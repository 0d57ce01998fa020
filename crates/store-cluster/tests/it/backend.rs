//! Postgres, Redis and NATS for one test, and edges on them. A backend under test is one edge with
//! a database and a namespace of its own. To crash, it loses its runtime: its tasks end in any
//! state, and nothing is closed. Then another edge replaces it.

use std::{
    fmt,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use futures_util::future::BoxFuture;
use qpq_domain::{StoreLimits, UnixMillis};
use qpq_ports::{
    Stores,
    conformance::{Backend, Factory},
};
use qpq_store_cluster::{BlobPlaces, Clocks, ClusterStore, Config, Endpoint, Migrate, Timing};
use qpq_test_services::{
    Authority, Nats, Postgres, Redis, RedisCluster, RedisSentinel, resp::Reply,
};
use tokio::{
    runtime::{Builder, Runtime},
    time::{Instant, sleep},
};

/// Time after which a wait fails.
pub(crate) const NEVER: Duration = Duration::from_secs(60);
/// Time between two checks of a condition.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// The database with the schema that others are copied from.
const TEMPLATE: &str = "template";

/// No test here simulates a power failure, so Postgres need not wait for the disk.
pub(crate) const QUICK: &[(&str, &str)] = &[("fsync", "off")];

/// Any kind of Redis.
pub(crate) trait AnyRedis: fmt::Debug + Send + Sync + 'static {
    fn url(&self) -> String;

    /// Returns the nodes that have the keys.
    fn nodes(&self) -> &[Redis];
}

impl AnyRedis for Redis {
    fn url(&self) -> String {
        self.url()
    }

    fn nodes(&self) -> &[Redis] {
        std::slice::from_ref(self)
    }
}

impl AnyRedis for RedisCluster {
    fn url(&self) -> String {
        self.url()
    }

    fn nodes(&self) -> &[Redis] {
        self.nodes()
    }
}

impl AnyRedis for RedisSentinel {
    fn url(&self) -> String {
        self.url()
    }

    fn nodes(&self) -> &[Redis] {
        self.pair()
    }
}

/// The three servers.
#[derive(Debug)]
pub(crate) struct Servers<R = Redis> {
    pub(crate) postgres: Postgres,
    pub(crate) redis: R,
    pub(crate) nats: Nats,
    /// The authority of the servers' certificates, if connections are encrypted.
    authority: Option<Authority>,
    clusters: AtomicU32,
}

// Starting servers takes large futures, which are boxed here for all tests.
impl Servers {
    pub(crate) fn start() -> BoxFuture<'static, Arc<Self>> {
        Self::with(Redis::start())
    }

    /// Starts the servers with TLS, with certificates of an authority that no system trusts.
    pub(crate) fn start_encrypted() -> BoxFuture<'static, Arc<Self>> {
        Box::pin(async {
            let authority = Authority::new().expect("an authority");
            let redis = Redis::start_encrypted(&authority).await;
            Self::encrypted(redis.expect("Redis"), authority).await
        })
    }
}

impl<R: AnyRedis> Servers<R> {
    /// Starts the other two servers with TLS, with certificates of the authority of a Redis.
    pub(crate) fn encrypted(redis: R, authority: Authority) -> BoxFuture<'static, Arc<Self>> {
        Box::pin(async {
            let postgres = Postgres::start_encrypted(QUICK, &authority).await.expect("Postgres");
            let nats = Nats::start_encrypted(&authority).await.expect("NATS");
            Self::prepared(postgres, redis, nats, Some(authority)).await
        })
    }

    pub(crate) fn with<'a>(
        redis: impl Future<Output = anyhow::Result<R>> + Send + 'a,
    ) -> BoxFuture<'a, Arc<Self>> {
        Box::pin(async {
            let (postgres, redis, nats) =
                tokio::join!(Postgres::start_with(QUICK), redis, Nats::start());
            let postgres = postgres.expect("Postgres");
            Self::prepared(postgres, redis.expect("Redis"), nats.expect("NATS"), None).await
        })
    }

    async fn prepared(
        postgres: Postgres,
        redis: R,
        nats: Nats,
        authority: Option<Authority>,
    ) -> Arc<Self> {
        let servers = Self { postgres, redis, nats, authority, clusters: AtomicU32::new(0) };
        let template = servers.postgres.create_database(TEMPLATE).await.expect("a database");
        qpq_store_cluster::migrate(&servers.config(template, StoreLimits::default()))
            .await
            .expect("the schema");
        servers.set_postgres_clock(TEMPLATE, "NULL").await;
        Arc::new(servers)
    }

    /// Creates a cluster with a database and a namespace of its own.
    pub(crate) async fn cluster(&self, limits: StoreLimits) -> Config {
        let name = format!("cluster{}", self.clusters.fetch_add(1, Ordering::Relaxed));
        let create = format!("CREATE DATABASE {name} TEMPLATE {TEMPLATE}");
        self.postgres.sql(&create).await.expect("a database");
        let url = self.postgres.url();
        let (server, _) = url.rsplit_once('/').expect("it names a database");
        Config { namespace: name.clone(), ..self.config(format!("{server}/{name}"), limits) }
    }

    /// Sets Postgres' clock in a database to `millis`. With NULL, the instants of calls are used
    /// instead.
    pub(crate) async fn set_postgres_clock(&self, database: &str, millis: &str) {
        let set = format!(
            "CREATE OR REPLACE FUNCTION store_now() RETURNS bigint LANGUAGE sql VOLATILE AS
             'SELECT ({millis})::bigint'"
        );
        self.postgres.sql_in(database, &set).await.expect("a clock that stands");
    }

    /// Marks a cluster without edges as one that has had devices.
    pub(crate) async fn mark(&self, config: &Config) {
        let mark = "INSERT INTO cluster (opaque_setup)
                    SELECT sha256('qpq/devices/1'::bytea || decode(repeat('07', 32), 'hex'))";
        self.postgres.sql_in(&config.namespace, mark).await.expect("a new cluster");
    }

    fn config(&self, database: String, limits: StoreLimits) -> Config {
        let ca: Option<PathBuf> = self.authority.as_ref().map(Authority::file);
        let endpoint = |url: String| Endpoint { url, password: None, ca: ca.clone() };
        Config {
            postgres: endpoint(database),
            redis: endpoint(self.redis.url()),
            nats: endpoint(self.nats.url()),
            postgres_connections: 12,
            postgres_timeout: Duration::from_secs(20),
            redis_timeout: Duration::from_secs(5),
            start_timeout: NEVER,
            namespace: String::new(),
            migrate: Migrate::Never,
            opaque_setup: [7; 32],
            limits,
            timing: Timing {
                poll: Duration::from_millis(200),
                lease: Duration::from_secs(1),
                session_cache: Duration::from_secs(15),
            },
            clocks: Clocks { edge: None, ..Clocks::default() },
            // As large as the limits of tests allow.
            blobs: BlobPlaces { max_without_bucket: u64::MAX, ..BlobPlaces::default() },
        }
    }

    /// Waits until all leases of the cluster have expired. All edges are dead and renew none.
    async fn leases_have_run_out(&self, config: &Config) {
        eventually("the leases of a dead edge to run out", || async {
            for node in self.redis.nodes() {
                if has_leases(node, &config.namespace).await {
                    return false;
                }
            }
            true
        })
        .await;
    }
}

/// Returns whether this node has a lease that has not expired. A node that is down has none.
async fn has_leases(node: &Redis, namespace: &str) -> bool {
    let Ok(mut redis) = node.connect().await else { return false };
    let now = redis.command(["TIME"]).await.expect("TIME");
    let [seconds, micros] = now.array().expect("a list") else { panic!("{now:?} is not a time") };
    let clock = number::<u64>(seconds) * 1_000 + number::<u64>(micros) / 1_000;
    let leases = redis.command(["KEYS", &format!("{namespace}:*}}l*")]).await.expect("KEYS");
    for key in leases.array().expect("a list") {
        let fields = redis.command(["HGETALL", key.text().expect("text")]).await.expect("HGETALL");
        for pair in fields.array().expect("a list").chunks(2) {
            let is_end = pair[0].text().expect("text").starts_with('e');
            if is_end && number::<u64>(&pair[1]) > clock {
                return true;
            }
        }
    }
    false
}

/// Starts an edge in this runtime.
pub(crate) async fn edge(config: &Config) -> ClusterStore {
    ClusterStore::connect(config).await.unwrap_or_else(|error| panic!("{error}"))
}

fn number<T: std::str::FromStr>(reply: &Reply) -> T {
    reply
        .text()
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or_else(|| panic!("{reply:?} is not a number"))
}

/// Waits until a condition is true.
pub(crate) async fn eventually<F: Future<Output = bool>>(what: &str, mut is_so: impl FnMut() -> F) {
    let deadline = Instant::now() + NEVER;
    while !is_so().await {
        assert!(Instant::now() < deadline, "waited {NEVER:?} for {what}");
        sleep(LOOK_EVERY).await;
    }
}

/// Creates clusters of one edge each, on the same servers.
#[derive(Debug)]
pub(crate) struct Clusters<R = Redis> {
    servers: Arc<Servers<R>>,
    /// True if the clusters are marked from the beginning, and so store shared payloads once.
    are_marked: bool,
}

impl Clusters {
    /// Creates clusters that are marked from the beginning.
    pub(crate) async fn start() -> Self {
        Self { servers: Servers::start().await, are_marked: true }
    }
}

impl<R> Clusters<R> {
    pub(crate) fn servers(&self) -> &Servers<R> {
        &self.servers
    }

    /// Creates clusters that the first device marks.
    pub(crate) const fn on(servers: Arc<Servers<R>>) -> Self {
        Self { servers, are_marked: false }
    }
}

#[async_trait]
impl<R: AnyRedis> Factory for Clusters<R> {
    async fn fresh(&self, limits: StoreLimits) -> Box<dyn Backend> {
        let servers = Arc::clone(&self.servers);
        let config = servers.cluster(limits).await;
        if self.are_marked {
            servers.mark(&config).await;
        }
        Box::new(Running { process: Some(Process::start(&config).await), config, servers })
    }
}

struct Running<R> {
    process: Option<Process>,
    config: Config,
    servers: Arc<Servers<R>>,
}

#[async_trait]
impl<R: AnyRedis> Backend for Running<R> {
    fn stores(&self) -> Stores {
        self.process.as_ref().expect("running").store.stores()
    }

    async fn crash(&mut self) {
        self.process.take().expect("running").crash().await;
        self.servers.leases_have_run_out(&self.config).await;
        self.process = Some(Process::start(&self.config).await);
    }

    async fn set_clock(&self, now: UnixMillis) {
        self.servers.set_postgres_clock(&self.config.namespace, &now.0.to_string()).await;
    }
}

impl<R> Drop for Running<R> {
    fn drop(&mut self) {
        if let Some(process) = self.process.take() {
            process.runtime.shutdown_background();
        }
    }
}

/// An edge in a runtime of its own, as in a process.
pub(crate) struct Process {
    pub(crate) store: ClusterStore,
    runtime: Runtime,
}

impl Process {
    pub(crate) async fn start(config: &Config) -> Self {
        let runtime =
            Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let config = config.clone();
        let connecting = runtime.spawn(async move { ClusterStore::connect(&config).await });
        let store = connecting.await.expect("no panic").unwrap_or_else(|error| panic!("{error}"));
        Self { store, runtime }
    }

    pub(crate) async fn crash(self) {
        // A runtime must not be dropped by a task. This waits for the end of the runtime, since a
        // dead process no longer executes anything.
        let runtime = self.runtime;
        tokio::task::spawn_blocking(move || drop(runtime)).await.expect("no panic");
    }
}
