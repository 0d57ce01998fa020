//! Faults of a running cluster: edges and stores are killed, Redis is flushed or rolled back,
//! connections are closed, clocks are wrong, standbys are promoted and backups restored. A seed
//! selects the faults, and the progress of the traffic triggers them, independent of time.

use std::{fmt, time::Duration};

use anyhow::ensure;
use qpq_test_services::Snapshot;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};
use tokio::time::sleep;

use crate::{
    cluster::{Cluster, Place, Plan},
    store_change::{Change, StoreHistory},
    traffic::{self, Summary, Traffic},
};

/// One fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    KillEdge,
    KillRedis,
    FlushRedis,
    /// Rolls Redis back to its contents after the previous fault, like a failover to a replica that
    /// lags.
    RollRedisBack,
    KillNats,
    KillPostgres,
    RestartPostgres,
    CutReaders,
    /// Kills Redis and an edge concurrently, so that the edge's leases have no owner.
    KillEdgeAndRedis,
    /// Kills both servers that may lose their data.
    KillRedisAndNats,
    /// Restarts an edge with a clock that is a hundred days off, until it is killed. The edge is
    /// not ready during that time.
    WrongClock,
    /// Changes the history of the store.
    Store(Change),
}

const ALL: [Fault; 15] = [
    Fault::KillEdge,
    Fault::KillRedis,
    Fault::FlushRedis,
    Fault::RollRedisBack,
    Fault::KillNats,
    Fault::KillPostgres,
    Fault::RestartPostgres,
    Fault::CutReaders,
    Fault::KillEdgeAndRedis,
    Fault::KillRedisAndNats,
    Fault::WrongClock,
    Fault::Store(Change::FailOver),
    Fault::Store(Change::FailOverToLagging),
    Fault::Store(Change::Recover),
    Fault::Store(Change::RestoreCopy),
];

/// The offsets of wrong clocks.
const OFFSETS: [&str; 2] = ["+100d", "-100d"];

/// The maximum time for which a store is stopped.
const DOWN: Duration = Duration::from_millis(500);

/// A source of faults: each kind in turn, in a new random order in each round.
#[derive(Debug)]
pub struct FaultInjector {
    random: StdRng,
    deck: Vec<Fault>,
    /// The maximum number of messages that a change of the store loses on purpose.
    max_lag: u64,
    snapshot: Snapshot,
    store: StoreHistory,
    injected: Vec<Fault>,
}

impl FaultInjector {
    pub async fn new(cluster: &Cluster, seed: u64, max_lag: u64) -> anyhow::Result<Self> {
        Ok(Self {
            random: StdRng::seed_from_u64(seed),
            deck: Vec::new(),
            max_lag,
            snapshot: cluster.redis.snapshot().await?,
            store: StoreHistory::of(cluster).await?,
            injected: Vec::new(),
        })
    }

    /// Causes the next fault. All edges and stores run when this returns.
    pub async fn inject(&mut self, cluster: &Cluster, traffic: &Traffic) -> anyhow::Result<()> {
        if self.deck.is_empty() {
            self.deck = ALL.to_vec();
            self.deck.shuffle(&mut self.random);
        }
        let fault = self.deck.pop().expect("the deck was filled");
        let edge = self.random.gen_range(0..cluster.entry_points().addrs.len());
        let down = DOWN.mul_f64(self.random.r#gen());
        match fault {
            Fault::KillEdge => {
                cluster.kill_edge(edge).await?;
                cluster.set_clock(edge, None);
                cluster.start_edge(edge).await?;
            }
            Fault::WrongClock => {
                cluster.kill_edge(edge).await?;
                cluster.set_clock(edge, OFFSETS.choose(&mut self.random).copied());
                cluster.start_edge(edge).await?;
                let status = cluster.health(edge).await?.status;
                ensure!(status == "degraded", "an edge with a wrong clock is {status}");
            }
            Fault::KillRedis => {
                cluster.redis.kill9().await?;
                sleep(down).await;
                cluster.redis.start_again().await?;
            }
            Fault::FlushRedis => cluster.redis.flush_all().await?,
            Fault::RollRedisBack => cluster.redis.roll_back_to(&self.snapshot).await?,
            Fault::KillNats => {
                cluster.nats.kill9().await?;
                sleep(down).await;
                cluster.nats.start_again().await?;
            }
            Fault::KillPostgres => {
                cluster.postgres.kill9().await?;
                sleep(down).await;
                cluster.postgres.start_again().await?;
            }
            Fault::RestartPostgres => cluster.postgres.restart().await?,
            Fault::CutReaders => traffic.cut_readers(),
            Fault::KillEdgeAndRedis => {
                tokio::try_join!(cluster.kill_edge(edge), cluster.redis.kill9())?;
                sleep(down).await;
                cluster.redis.start_again().await?;
                cluster.start_edge(edge).await?;
            }
            Fault::KillRedisAndNats => {
                tokio::try_join!(cluster.nats.kill9(), cluster.redis.kill9())?;
                sleep(down).await;
                tokio::try_join!(cluster.nats.start_again(), cluster.redis.start_again())?;
            }
            Fault::Store(change) => {
                let lag = self.random.gen_range(1..=self.max_lag);
                self.store.change(change, cluster, traffic, lag).await?;
            }
        }
        // There is no new snapshot after a change of the store, so that Redis may also go back to a
        // state of another history.
        if !matches!(fault, Fault::Store(_)) {
            self.snapshot = cluster.redis.snapshot().await?;
        }
        self.injected.push(fault);
        Ok(())
    }
}

/// A run of traffic through a cluster with constant faults.
#[derive(Clone, Copy, Debug)]
pub struct Campaign {
    pub traffic: traffic::Plan,
    /// The average number of acknowledged messages between two faults.
    pub every: u64,
}

/// The result of a run.
#[derive(Debug)]
pub struct CampaignReport {
    pub summary: Summary,
    pub faults: Vec<Fault>,
}

impl Campaign {
    /// Runs the traffic through three edges as processes, with all faults.
    pub async fn run(self) -> anyhow::Result<CampaignReport> {
        let plan = Plan { place: Place::Apart, seed: self.traffic.seed, ..Plan::default() };
        let cluster = Cluster::start(plan).await?;
        // The accounts are created first, because a backup without them is of no use.
        let traffic = Traffic::start(&cluster, self.traffic).await?;
        let max_lag = (self.every / 2).max(1);
        let mut injector = FaultInjector::new(&cluster, self.traffic.seed, max_lag).await?;
        let mut next = 0;
        loop {
            next += injector.random.gen_range(1..=2 * self.every);
            if next >= self.traffic.messages {
                break;
            }
            traffic.acknowledged(next).await;
            injector.inject(&cluster, &traffic).await?;
        }
        let summary = traffic.finish(&cluster).await?;
        Ok(CampaignReport { summary, faults: injector.injected })
    }
}

impl fmt::Display for CampaignReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { summary: Summary { report, calls, refused, lost, .. }, faults } = self;
        write!(
            f,
            "{report}{calls} calls, {refused} refused temporarily, {} without an answer; {} faults:",
            lost.len(),
            faults.len()
        )?;
        for kind in ALL {
            write!(f, " {kind} {}", faults.iter().filter(|fault| **fault == kind).count())?;
        }
        writeln!(f)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Store(change) => write!(f, "{change:?}"),
            fault => write!(f, "{fault:?}"),
        }
    }
}
