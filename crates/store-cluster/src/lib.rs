//! The store of a cluster: any number of edges over one Postgres, one Redis and one NATS.
//!
//! **Postgres commits, Redis serves, NATS wakes.** Whatever is acknowledged is committed in
//! Postgres first. Redis has copies that are compared with Postgres before they are shown, and
//! state that may be lost at any moment: leases, waiters, rate limits. NATS carries word from edge
//! to edge, every bit of which may get lost.
//!
//! - `postgres`: transactions, the schema; `redis`: one connection, the queues' scripts; `nats`:
//!   the bus.
//! - `inboxes`, `wakes`: the way of a message. `accounts`, `sessions`, `keys`, `limiter`, `maintenance`:
//!   one port each.

mod account_events;
mod accounts;
mod config;
mod error;
mod history;
mod import;
mod inboxes;
mod jobs;
mod keys;
mod limiter;
mod maintenance;
#[cfg(feature = "measure")]
pub mod measure;
mod metrics;
mod nats;
mod operate;
mod postgres;
mod redis;
mod sessions;
mod skeletons;
mod time;
mod wakes;

use std::{fmt, sync::Arc, time::Duration};

use qpq_ports::{Clock, Stores};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};

pub use config::{Config, Endpoint, Limits, Migrate, Timing};
pub use error::ConnectError;
pub use history::begin_history;
pub use import::{Import, ImportError};
pub use inboxes::COMMITTERS;
pub use jobs::operator_jobs;
pub use operate::{BEGIN_HISTORY, DatabaseSnapshot, Operator, client_environment};
pub use postgres::migrate;
pub use time::Clocks;

use crate::{
    account_events::ClusterAccountEvents,
    accounts::ClusterAccounts,
    error::Server,
    history::History,
    inboxes::ClusterInboxes,
    jobs::ClusterJobs,
    keys::ClusterKeys,
    limiter::ClusterLimiter,
    maintenance::ClusterMaintenance,
    nats::{Bus, EdgeId},
    postgres::Database,
    redis::Redis,
    sessions::ClusterSessions,
    time::Time,
    wakes::{ClusterWakes, Waking},
};

/// Between two looks at the pool of connections.
const OBSERVE: Duration = Duration::from_secs(5);
/// How long one attempt at a server may take, so that one which got stuck is not the last.
const ATTEMPT: Duration = Duration::from_secs(10);
/// Before the second attempt.
const PAUSE: Duration = Duration::from_millis(100);

/// This edge's connection to the cluster's state. What [`ClusterStore::stores`] gives keeps it open
/// too.
pub struct ClusterStore {
    database: Database,
    bus: Bus,
    stores: Stores,
    time: Time,
    tasks: JoinSet<()>,
}

impl ClusterStore {
    /// Connects to all three servers, waiting for those that are not there yet, and checks that
    /// they are this cluster's. Needs a tokio runtime, and uses it as long as the store is open.
    pub async fn connect(config: &Config) -> Result<Self, ConnectError> {
        metrics::describe();
        let edge = EdgeId::random();
        let options = postgres::options(config)?;
        let may_take = config.start_timeout;
        waiting(may_take, |within| postgres::prepare(&options, config.migrate, within)).await?;
        waiting(may_take, |within| skeletons::fill_all(&options, within)).await?;
        let check = || postgres::check_cluster(&options, &config.opaque_setup);
        waiting(may_take, |within| Server::Postgres.answers(within, check())).await?;
        let redis =
            waiting(may_take, |within| Server::Redis.answers(within, Redis::connect(config)))
                .await?;
        let join = || Bus::connect(config, &edge);
        let bus = waiting(may_take, |within| Server::Nats.answers(within, join())).await?;
        let database = Database::new(options, config.postgres_connections, config.postgres_timeout);
        let read = || async {
            History::read(&database).await.map_err(|error| Server::Postgres.unreachable(error))
        };
        let history = waiting(may_take, |within| Server::Postgres.answers(within, read())).await?;
        let time = Time::new(config.clocks.clone());
        let beat = || maintenance::first_beat(&database, &time);
        waiting(may_take, |within| Server::Postgres.answers(within, beat())).await?;
        let waking = Waking::new(redis.clone(), bus.clone(), edge.clone());
        let sessions = Arc::new(ClusterSessions::new(
            database.clone(),
            history.clone(),
            redis.clone(),
            bus.clone(),
            time.clone(),
            config.timing.session_cache,
        ));
        let keys =
            Arc::new(ClusterKeys::new(database.clone(), time.clone(), config.limits.key_packages));
        let delivery = config.limits.delivery;
        let stores = Stores {
            accounts: Arc::new(ClusterAccounts::new(database.clone())),
            inboxes: Arc::new(ClusterInboxes::start(
                database.clone(),
                history.clone(),
                waking.clone(),
                edge,
                delivery,
                time.clone(),
                &config.timing,
            )),
            wakes: Arc::new(ClusterWakes(waking.clone())),
            key_packages: Arc::clone(&keys) as _,
            hybrid_keys: keys,
            limiter: Arc::new(ClusterLimiter::new(redis.clone(), &config.clocks)),
            account_events: Arc::new(ClusterAccountEvents {
                bus: bus.clone(),
                sessions: Arc::clone(&sessions),
                waking: waking.clone(),
                every: (config.timing.session_cache / 3).max(Duration::from_millis(100)),
            }),
            maintenance: Arc::new(ClusterMaintenance::new(
                database.clone(),
                redis.clone(),
                Arc::clone(&sessions),
                history.clone(),
                time.clone(),
                delivery.recent_ids,
            )),
            jobs: Arc::new(ClusterJobs::new(database.clone())),
            sessions: Arc::clone(&sessions) as _,
        };
        let mut tasks = JoinSet::new();
        tasks.spawn(redis.clone().probe());
        tasks.spawn(waking.clone().listen());
        tasks.spawn(waking.poll(database.clone(), history.clone(), config.timing.poll));
        tasks.spawn(sessions.listen());
        tasks.spawn(observe(database.clone()));
        Ok(Self { database, bus, stores, time, tasks })
    }

    /// The cluster's time, for the caller to pass to the ports.
    pub fn clock(&self) -> Arc<dyn Clock> {
        Arc::new(self.time.clone())
    }

    /// The ports.
    pub fn stores(&self) -> Stores {
        self.stores.clone()
    }

    /// Says what other edges are still to be told, and lets go of the servers. A store that is
    /// dropped instead loses nothing; what it held is free a few seconds later.
    pub async fn close(mut self) {
        self.tasks.abort_all();
        self.bus.close().await;
        self.database.close().await;
    }
}

impl fmt::Debug for ClusterStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClusterStore").finish_non_exhaustive()
    }
}

/// Tries until it succeeds, fails for good, or has taken too long. Each attempt is told how long it
/// may take.
async fn waiting<T, F>(
    may_take: Duration,
    mut connect: impl FnMut(Duration) -> F,
) -> Result<T, ConnectError>
where
    F: Future<Output = Result<T, ConnectError>>,
{
    let until = Instant::now() + may_take;
    let left = || until.saturating_duration_since(Instant::now());
    let mut pause = PAUSE;
    loop {
        // What the client libraries need in order to connect is large.
        let outcome = Box::pin(connect(left().min(ATTEMPT))).await;
        let Err(ConnectError::Unreachable { server, setting, cause }) = outcome else {
            return outcome;
        };
        if left() < PAUSE {
            let cause = format!("{cause}; cluster.start_timeout, {may_take:?}, is over");
            return Err(ConnectError::Unreachable { server, setting, cause });
        }
        tracing::warn!(error = %ConnectError::Unreachable { server, setting, cause }, "waiting for it");
        // The last attempts come closer to each other, and none of them has no time at all.
        sleep(pause.mul_f64(0.5 + 0.5 * rand::random::<f64>()).min(left() / 2)).await;
        pause = (pause * 2).min(Duration::from_secs(5));
    }
}

async fn observe(database: Database) {
    let mut ticks = tokio::time::interval(OBSERVE);
    loop {
        ticks.tick().await;
        database.observe();
    }
}
