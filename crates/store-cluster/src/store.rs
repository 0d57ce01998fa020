//! The store of one edge. Connects to the three servers and owns the background tasks. Each port is
//! implemented in the file of its area.

use std::{fmt, sync::Arc, time::Duration};

use parking_lot::Mutex;
use qpq_domain::{Backoff, StoreLimits};
use qpq_ports::{Clock, Stores};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};

use crate::{
    Config, ConnectError,
    blobs::BlobStore,
    effects::Applier,
    error::Server,
    groups::GroupSenders,
    history::History,
    inboxes::{Committers, Completers, Heads, Leases},
    invites::InviteBook,
    jobs::JobQueue,
    maintenance::{self, SweepSizes},
    metrics,
    nats::{Bus, EdgeId},
    postgres::{self, ClusterMark, Database},
    redis::Redis,
    sessions::SessionCopies,
    skeletons,
    time::Time,
    wakes::WakeRegistry,
};

/// Time between two updates of the connection metrics.
const OBSERVE_EVERY: Duration = Duration::from_secs(5);
/// Maximum time of one attempt to connect, so that a hanging attempt leaves time for another one.
const ATTEMPT: Duration = Duration::from_secs(10);
/// The waits between attempts to connect.
const BACKOFF: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));

/// The store of this edge, which implements every port. Cheap to clone.
///
/// Its tasks end when the last clone is dropped. No message is lost: messages that the edge had
/// leased are visible again a few seconds later.
#[derive(Clone)]
pub struct ClusterStore {
    pub(crate) inner: Arc<Inner>,
}

/// The parts that the ports of the store share.
pub(crate) struct Inner {
    pub(crate) database: Database,
    pub(crate) redis: Redis,
    pub(crate) bus: Bus,
    pub(crate) history: History,
    pub(crate) time: Time,
    pub(crate) limits: StoreLimits,
    /// The fingerprint of the cluster's OPAQUE setup.
    pub(crate) opaque_setup: [u8; 32],
    /// True if the instants of calls replace the time of Redis, as in tests that set the time.
    pub(crate) time_is_injected: bool,
    pub(crate) heads: Heads,
    pub(crate) committers: Committers,
    pub(crate) group_senders: GroupSenders,
    pub(crate) completers: Completers,
    pub(crate) leases: Leases,
    pub(crate) wakes: WakeRegistry,
    pub(crate) applier: Applier,
    pub(crate) sweep_sizes: SweepSizes,
    pub(crate) blobs: BlobStore,
    /// Time between two checks of whether NATS delivers account events.
    pub(crate) event_interval: Duration,
    tasks: Mutex<JoinSet<()>>,
}

impl ClusterStore {
    /// Connects to all three servers, and checks that the database belongs to this cluster. Retries
    /// a server that is unreachable. Needs a tokio runtime, and uses it while the store is open.
    pub async fn connect(config: &Config) -> Result<Self, ConnectError> {
        metrics::describe();
        let edge = EdgeId::random();
        let timeout = config.start_timeout;
        let blobs = BlobStore::new(&config.blobs)?;
        let (database, history, time) = open_database(config).await?;
        let connect = |within| Server::Redis.answers(within, Redis::connect(config));
        let redis = retrying(timeout, connect).await?;
        let connect = |within| Server::Nats.answers(within, Bus::connect(config, &edge));
        let bus = retrying(timeout, connect).await?;
        Ok(Self::start(config, edge, (database, history, time), (redis, bus), blobs))
    }

    fn start(
        config: &Config,
        edge: EdgeId,
        (database, history, time): (Database, History, Time),
        (redis, bus): (Redis, Bus),
        blobs: BlobStore,
    ) -> Self {
        let (limits, timing) = (config.limits, &config.timing);
        let delivery = limits.delivery;
        let wakes = WakeRegistry::new(redis.clone(), bus.clone(), edge.clone());
        let sessions = SessionCopies::new(redis.clone(), bus.clone(), timing.session_cache);
        let applier = Applier { wakes: wakes.clone(), sessions: sessions.clone() };
        let leases = Leases::new(edge, timing.lease, wakes.clone());
        let mark = ClusterMark::new(config.opaque_setup);
        let mut tasks = JoinSet::new();
        tasks.spawn(redis.clone().probe());
        tasks.spawn(wakes.clone().listen());
        tasks.spawn(wakes.clone().poll(database.clone(), history.clone(), timing.poll));
        tasks.spawn(sessions.listen(history.clone()));
        tasks.spawn(leases.clone().renew());
        tasks.spawn(observe(database.clone()));
        let inner = Inner {
            heads: Heads::start(&database, &history),
            committers: Committers::start(&database, &history, delivery, &time, &mark, &applier),
            group_senders: GroupSenders::start(
                &database, &history, delivery, &time, &mark, &applier,
            ),
            completers: Completers::start(&database, delivery.recent_ids),
            leases,
            wakes,
            applier,
            database,
            redis,
            bus,
            history,
            time,
            limits,
            opaque_setup: config.opaque_setup,
            time_is_injected: config.clocks.edge.is_none(),
            sweep_sizes: SweepSizes::default(),
            blobs,
            event_interval: (timing.session_cache / 3).max(Duration::from_millis(100)),
            tasks: Mutex::new(tasks),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Returns the cluster's clock, whose instants callers pass to the ports.
    pub fn clock(&self) -> Arc<dyn Clock> {
        Arc::new(self.inner.time.clone())
    }

    /// Returns the ports.
    pub fn stores(&self) -> Stores {
        let store = Arc::new(self.clone());
        Stores {
            accounts: Arc::clone(&store) as _,
            invites: Arc::new(InviteBook::new(self.inner.database.clone())),
            sessions: Arc::clone(&store) as _,
            devices: Arc::clone(&store) as _,
            groups: Arc::clone(&store) as _,
            inboxes: Arc::clone(&store) as _,
            wakes: Arc::clone(&store) as _,
            key_packages: Arc::clone(&store) as _,
            hybrid_keys: Arc::clone(&store) as _,
            endpoints: Arc::clone(&store) as _,
            bans: Arc::clone(&store) as _,
            reports: Arc::clone(&store) as _,
            blocks: Arc::clone(&store) as _,
            audit: Arc::clone(&store) as _,
            recovery_bundles: store.clone(),
            blobs: Arc::clone(&store) as _,
            limiter: Arc::clone(&store) as _,
            account_events: Arc::clone(&store) as _,
            jobs: Arc::new(JobQueue::new(self.inner.database.clone())),
            maintenance: store,
        }
    }

    /// Commits the waiting messages, publishes the outgoing events and wakes, and disconnects.
    pub async fn close(self) {
        let inner = &*self.inner;
        inner.committers.close().await;
        inner.group_senders.close().await;
        inner.completers.close().await;
        inner.heads.close().await;
        inner.leases.close().await;
        inner.tasks.lock().abort_all();
        inner.bus.close().await;
        inner.database.close().await;
    }
}

impl fmt::Debug for ClusterStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClusterStore").finish_non_exhaustive()
    }
}

/// Prepares the database, checks that it belongs to this cluster, and reads its history and time.
async fn open_database(config: &Config) -> Result<(Database, History, Time), ConnectError> {
    let (options, timeout) = (postgres::options(config)?, config.start_timeout);
    retrying(timeout, |within| postgres::prepare(&options, config.migrate, within)).await?;
    retrying(timeout, |within| skeletons::fill_all(&options, within)).await?;
    let check = || postgres::check_cluster(&options, &config.opaque_setup);
    retrying(timeout, |within| Server::Postgres.answers(within, check())).await?;
    let database = Database::new(options, config.postgres_connections, config.postgres_timeout);
    let read = || async {
        History::read(&database).await.map_err(|error| Server::Postgres.unreachable(error))
    };
    let history = retrying(timeout, |within| Server::Postgres.answers(within, read())).await?;
    let time = Time::new(config.clocks.clone());
    let beat = || maintenance::first_beat(&database, &time);
    retrying(timeout, |within| Server::Postgres.answers(within, beat())).await?;
    Ok((database, history, time))
}

/// Repeats `connect` until it succeeds or fails permanently, or the timeout is over. The argument
/// of `connect` is the maximum time of the attempt.
async fn retrying<T, F>(
    start_timeout: Duration,
    mut connect: impl FnMut(Duration) -> F,
) -> Result<T, ConnectError>
where
    F: Future<Output = Result<T, ConnectError>>,
{
    let until = Instant::now() + start_timeout;
    let left = || until.saturating_duration_since(Instant::now());
    let mut failures = 0;
    loop {
        // Boxed, because the futures of the client libraries are large.
        let outcome = Box::pin(connect(left().min(ATTEMPT))).await;
        let Err(ConnectError::Unreachable { server, setting, cause }) = outcome else {
            return outcome;
        };
        if left() < BACKOFF.base {
            let cause = format!("{cause}; cluster.start_timeout, {start_timeout:?}, is over");
            return Err(ConnectError::Unreachable { server, setting, cause });
        }
        tracing::warn!(
            error = %ConnectError::Unreachable { server, setting, cause },
            "connection failed, retrying"
        );
        // The wait takes at most half of the remaining time, and leaves the rest to the next
        // attempt.
        failures += 1;
        sleep(BACKOFF.delay(failures, rand::random()).min(left() / 2)).await;
    }
}

async fn observe(database: Database) {
    let mut ticks = tokio::time::interval(OBSERVE_EVERY);
    loop {
        ticks.tick().await;
        database.observe();
    }
}
