//! A cluster for one test: real Postgres, Redis and NATS, shared secrets of `qpq-admin init`, and
//! any number of edges.
//!
//! Edges run as processes, or in the test's process with the server's `compose()`. The port of an
//! edge stays reserved while it is stopped. Optionally each edge has proxies to its clients and
//! stores.

use std::{
    ffi::OsString,
    fs::{self, OpenOptions},
    io::Write as _,
    net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use qpq_domain::StoreId;
use qpq_proto::{methods::Health, v1};
use qpq_runtime::config::{self, Sources};
use qpq_server::{Config, FOREIGN_VARIABLES, Running, compose};
use qpq_test_services::{
    Nats, Postgres, Redis,
    proxy::{TcpProxy, UdpProxy},
};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use rustls::pki_types::CertificateDer;
use tempfile::TempDir;
use tokio::{
    process::Command,
    time::{Instant, sleep},
};

use crate::{
    accounts::{self, Account},
    client::{Client, Pin, endpoint},
    metrics::Metrics,
    process::{Server, sibling},
    roaming::PATIENCE,
    traffic::store_id,
};

/// The ports of edges: below Linux's ports for outgoing connections, and apart from those of the
/// stores.
const PORTS: std::ops::Range<u16> = 12_000..20_000;

/// The interval between two checks of a condition.
const POLL: Duration = Duration::from_millis(10);

/// The place where edges run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In this process.
    Here,
    /// Each edge in a process of its own, which can be killed.
    Apart,
}

/// The connections between clients, edges and stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wiring {
    Direct,
    /// Each edge has its own proxy for its clients and for each store.
    Proxied,
}

/// The cluster to start.
#[derive(Clone, Debug)]
pub struct Plan {
    pub edges: usize,
    pub place: Place,
    pub wiring: Wiring,
    /// The seed of the proxies' decisions.
    pub seed: u64,
    /// Settings of all edges, which take precedence over those of [`Cluster::variables`].
    pub variables: Vec<(&'static str, String)>,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            edges: 3,
            place: Place::Here,
            wiring: Wiring::Direct,
            seed: 0,
            variables: Vec::new(),
        }
    }
}

impl Plan {
    pub fn with(mut self, variable: &'static str, value: impl Into<String>) -> Self {
        self.variables.push((variable, value.into()));
        self
    }
}

/// A running cluster. Dropping it ends everything. If the test failed, the directory with the
/// edges' logs is kept.
#[derive(Debug)]
pub struct Cluster {
    pub postgres: Postgres,
    pub redis: Redis,
    pub nats: Nats,
    edges: Vec<Edge>,
    pin: Pin,
    plan: Plan,
    dir: Option<TempDir>,
}

/// The addresses of the edges, for clients.
#[derive(Clone, Debug)]
pub struct EntryPoints {
    pub pin: Pin,
    pub addrs: Arc<[SocketAddr]>,
}

/// The proxies of one edge.
#[derive(Debug)]
pub struct Links {
    pub clients: UdpProxy,
    pub postgres: TcpProxy,
    pub redis: TcpProxy,
    pub nats: TcpProxy,
}

#[derive(Debug)]
struct Edge {
    port: Port,
    links: Option<Links>,
    /// The offset of the edge's clock, in the format of faketime.
    clock: parking_lot::Mutex<Option<&'static str>>,
    life: tokio::sync::Mutex<Life>,
}

#[derive(Debug)]
enum Life {
    Down,
    Here(Box<Running>),
    Apart(Box<Server>),
}

impl Cluster {
    /// Starts stores and edges. Returns when every edge is ready.
    pub async fn start(plan: Plan) -> anyhow::Result<Self> {
        let (postgres, redis, nats) =
            tokio::try_join!(Postgres::start(), Box::pin(Redis::start()), Nats::start())?;
        let dir = tempfile::Builder::new().prefix("qpq-cluster-").tempdir()?;
        init(&dir.path().join("secrets")).await?;
        let certificate = fs::read(dir.path().join("secrets/server-cert.der"))?;
        let pin = Pin::of(&CertificateDer::from(certificate))?;
        let mut random = StdRng::seed_from_u64(plan.seed);
        let mut edges = Vec::new();
        for _ in 0..plan.edges {
            let port = Port::reserve()?;
            let links = match plan.wiring {
                Wiring::Direct => None,
                Wiring::Proxied => {
                    let mut own = || StdRng::seed_from_u64(random.r#gen());
                    let store = |port: u16| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
                    Some(Links {
                        clients: UdpProxy::start(port.addr(), own()).await?,
                        postgres: TcpProxy::start(store(postgres.port()), own()).await?,
                        redis: TcpProxy::start(store(redis.port()), own()).await?,
                        nats: TcpProxy::start(store(nats.port()), own()).await?,
                    })
                }
            };
            edges.push(Edge {
                port,
                links,
                clock: parking_lot::Mutex::default(),
                life: tokio::sync::Mutex::new(Life::Down),
            });
        }
        let cluster = Self { postgres, redis, nats, edges, pin, plan, dir: Some(dir) };
        for n in 0..cluster.edges.len() {
            cluster.start_edge(n).await?;
        }
        Ok(cluster)
    }

    pub fn entry_points(&self) -> EntryPoints {
        let addr = |edge: &Edge| match &edge.links {
            Some(links) => links.clients.addr(),
            None => edge.port.addr(),
        };
        EntryPoints { pin: self.pin, addrs: self.edges.iter().map(addr).collect() }
    }

    /// Returns the proxies of an edge.
    ///
    /// # Panics
    /// If the cluster has no proxies.
    pub fn links(&self, edge: usize) -> &Links {
        self.edges[edge].links.as_ref().expect("the plan has Wiring::Proxied")
    }

    /// Returns the directory of the cluster, also for files of the test.
    ///
    /// The directory is removed with the cluster, unless the test fails.
    pub fn dir(&self) -> &Path {
        self.dir.as_ref().expect("only drop removes it").path()
    }

    /// Returns the directory with the secrets that all edges share.
    pub fn secrets_dir(&self) -> PathBuf {
        self.dir().join("secrets")
    }

    /// Creates accounts, each with a session, through the first edge.
    pub async fn accounts(&self, count: usize) -> anyhow::Result<Vec<Account>> {
        accounts::make(&endpoint(self.pin)?, self.entry_points().addrs[0], count).await
    }

    /// Connects to an edge.
    pub async fn client(&self, edge: usize) -> anyhow::Result<Client> {
        Client::connect(&endpoint(self.pin)?, self.entry_points().addrs[edge]).await
    }

    /// Returns the number of messages in Postgres.
    pub async fn messages_left(&self) -> anyhow::Result<u64> {
        Ok(self.postgres.sql("SELECT count(*) FROM message").await?.parse()?)
    }

    /// Calls Health at an edge.
    pub async fn health(&self, n: usize) -> anyhow::Result<v1::HealthResponse> {
        let client = Client::connect(&endpoint(self.pin)?, self.entry_points().addrs[n]).await?;
        client.must::<Health>(&v1::HealthRequest {}, None).await
    }

    /// Waits until every edge reports the same store id, other than `before`. Returns it.
    pub async fn store_id_other_than(&self, before: Option<StoreId>) -> anyhow::Result<StoreId> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut reported = Vec::new();
            for n in 0..self.edges.len() {
                reported.push(store_id(&self.health(n).await?.store_id));
            }
            if reported.iter().all(|id| *id == reported[0] && Some(*id) != before) {
                return Ok(reported[0]);
            }
            ensure!(Instant::now() < deadline, "edges report the stores {reported:?}");
            sleep(POLL).await;
        }
    }

    /// Runs `qpq-admin mark-restored` for the database with this URL. The sessions stay valid, so
    /// that traffic goes on.
    pub async fn mark_restored(&self, postgres: &str) -> anyhow::Result<()> {
        let output = Command::new(sibling("qpq-admin")?)
            .args(["mark-restored", "--keep-sessions"])
            .env_clear()
            .envs(self.variables(0))
            .env("QPQ_POSTGRES__URL", postgres)
            .stdin(Stdio::null())
            .output()
            .await?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "qpq-admin mark-restored: {error}");
        Ok(())
    }

    /// Returns the metrics of an edge that runs as a process.
    pub async fn metrics(&self, n: usize) -> anyhow::Result<Metrics> {
        match &*self.edges[n].life.lock().await {
            Life::Apart(server) => Metrics::of(server).await,
            Life::Down | Life::Here(_) => anyhow::bail!("edge {n} is not a process"),
        }
    }

    /// Starts an edge and waits until it serves clients. An edge with a wrong clock serves without
    /// being ready.
    pub async fn start_edge(&self, n: usize) -> anyhow::Result<()> {
        let mut life = self.edges[n].life.lock().await;
        ensure!(matches!(*life, Life::Down), "edge {n} is running");
        *life = match self.plan.place {
            Place::Here => Life::Here(Box::new(Box::pin(compose(&self.config(n)?)).await?)),
            Place::Apart => {
                let started =
                    Server::start(self.command(n)?, |line| line.contains(" dm bob")).await;
                Life::Apart(Box::new(
                    started.with_context(|| format!("edge {n} logged: {}", self.log(n)))?,
                ))
            }
        };
        Ok(())
    }

    /// Kills an edge with SIGKILL; drops one that runs in this process.
    pub async fn kill_edge(&self, n: usize) -> anyhow::Result<()> {
        match std::mem::replace(&mut *self.edges[n].life.lock().await, Life::Down) {
            Life::Down => anyhow::bail!("edge {n} is down"),
            Life::Here(running) => drop(running),
            Life::Apart(server) => server.stop().await?,
        }
        Ok(())
    }

    /// Ends an edge with SIGTERM, as an orchestrator does, and waits until it has ended.
    pub async fn drain_edge(&self, n: usize) -> anyhow::Result<()> {
        match std::mem::replace(&mut *self.edges[n].life.lock().await, Life::Down) {
            Life::Down => anyhow::bail!("edge {n} is down"),
            Life::Here(running) => running.shutdown(std::future::pending()).await,
            Life::Apart(server) => {
                server.terminate()?;
                let status = server.ended().await?;
                ensure!(status.success(), "edge {n} ended with {status}");
            }
        }
        Ok(())
    }

    /// Sets the clock of an edge that runs as a process, from its next start. `+100d` is a hundred
    /// days ahead.
    pub fn set_clock(&self, n: usize, offset: Option<&'static str>) {
        *self.edges[n].clock.lock() = offset;
    }

    /// Returns the settings of an edge as environment variables.
    pub fn variables(&self, n: usize) -> Vec<(&'static str, String)> {
        let edge = &self.edges[n];
        let through = |url: String, own: u16, proxy: Option<&TcpProxy>| match proxy {
            Some(proxy) => url.replace(&format!("127.0.0.1:{own}"), &proxy.addr().to_string()),
            None => url,
        };
        let links = edge.links.as_ref();
        let mut variables = vec![
            ("QPQ_LISTEN", edge.port.addr().to_string()),
            ("QPQ_DATA_DIR", self.dir().join(format!("data-{n}")).display().to_string()),
            ("QPQ_HTTP__LISTEN", "off".into()),
            ("QPQ_LIMITS__ENABLED", "false".into()),
            ("QPQ_TRANSPORT__SILENT_PEER_TIMEOUT", "3s".into()),
            ("QPQ_DELIVERY__MAX_MESSAGES", "10000000".into()),
            ("QPQ_DELIVERY__MAX_BYTES", "100GiB".into()),
            (
                "QPQ_POSTGRES__URL",
                through(self.postgres.url(), self.postgres.port(), links.map(|l| &l.postgres)),
            ),
            (
                "QPQ_REDIS__URL",
                through(self.redis.url(), self.redis.port(), links.map(|l| &l.redis)),
            ),
            ("QPQ_NATS__URL", through(self.nats.url(), self.nats.port(), links.map(|l| &l.nats))),
            ("QPQ_CLUSTER__SECRETS_DIR", self.secrets_dir().display().to_string()),
            ("QPQ_CLUSTER__EDGE", format!("edge-{n}")),
            ("QPQ_CLUSTER__MIGRATE", "at_start".into()),
            ("QPQ_CLUSTER__POLL", "500ms".into()),
            ("QPQ_CLUSTER__LEASE", "2s".into()),
            ("QPQ_CLUSTER__SESSION_CACHE", "2s".into()),
        ];
        variables.retain(|(name, _)| self.plan.variables.iter().all(|(other, _)| other != name));
        variables.extend(self.plan.variables.iter().cloned());
        variables
    }

    /// Returns the log of an edge that runs as a process.
    pub fn log(&self, n: usize) -> String {
        fs::read_to_string(self.log_file(n)).unwrap_or_default()
    }

    fn log_file(&self, n: usize) -> PathBuf {
        self.dir().join(format!("edge-{n}.log"))
    }

    /// Returns the command of an edge, without the environment of the test.
    pub fn command(&self, n: usize) -> anyhow::Result<Command> {
        let log = OpenOptions::new().create(true).append(true).open(self.log_file(n))?;
        let mut command = Command::new(sibling("qpq-server")?);
        command
            .env_clear()
            .envs(self.variables(n))
            .env("RUST_LOG", "warn")
            .current_dir(self.dir())
            .stderr(log)
            .kill_on_drop(true);
        if let Some(offset) = *self.edges[n].clock.lock() {
            command
                .env("LD_PRELOAD", faketime()?)
                .env("FAKETIME", offset)
                // Only the wall clock is wrong. The edge measures waits by the monotonic clock.
                .env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        }
        Ok(command)
    }

    /// Returns the settings of an edge for `compose()`.
    pub fn config(&self, n: usize) -> anyhow::Result<Config> {
        configuration(&self.variables(n))
    }
}

/// Loads the configuration from environment variables.
pub fn configuration(variables: &[(&str, String)]) -> anyhow::Result<Config> {
    let environment = variables
        .iter()
        .map(|(name, value)| (OsString::from(name), OsString::from(value)))
        .collect();
    let loaded =
        config::load(Sources { environment, foreign: FOREIGN_VARIABLES, ..Sources::default() })?;
    Ok(loaded.settings)
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let Some(dir) = self.dir.take() else { return };
        // Standard error may be closed.
        if std::thread::panicking() {
            let _ = writeln!(
                std::io::stderr(),
                "the cluster's directory is kept: {}",
                dir.keep().display()
            );
        }
    }
}

/// Returns the path of the library that changes the clock of a process.
fn faketime() -> anyhow::Result<PathBuf> {
    let places = directories_in("/usr/lib")
        .chain(["/usr/lib".into(), "/usr/local/lib".into()])
        .map(|dir| dir.join("faketime/libfaketime.so.1"));
    places
        .into_iter()
        .find(|path| path.exists())
        .context("libfaketime is missing: `apt-get install faketime`")
}

/// Returns the directories in a directory.
fn directories_in(dir: &str) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok);
    entries.map(|entry| entry.path()).filter(|path| path.is_dir())
}

/// Creates the secrets that the edges of a cluster share.
pub async fn init(secrets: &Path) -> anyhow::Result<()> {
    let output = Command::new(sibling("qpq-admin")?)
        .args(["init", "--out"])
        .arg(secrets)
        .env_clear()
        .stdin(Stdio::null())
        .output()
        .await?;
    ensure!(output.status.success(), "qpq-admin init: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// A UDP port that is reserved for an edge among all tests of this machine, also while the edge is
/// stopped. The reservation is the TCP socket with the same number.
#[derive(Debug)]
struct Port {
    _claim: TcpListener,
    number: u16,
}

impl Port {
    fn reserve() -> anyhow::Result<Self> {
        let mut random = rand::rngs::OsRng;
        (0..1_000)
            .find_map(|_| Self::claim(random.gen_range(PORTS)))
            .context("no free port of 127.0.0.1")
    }

    fn claim(number: u16) -> Option<Self> {
        let claim = TcpListener::bind((Ipv4Addr::LOCALHOST, number)).ok()?;
        // Another server may listen on the port.
        drop(UdpSocket::bind((Ipv4Addr::LOCALHOST, number)).ok()?);
        Some(Self { _claim: claim, number })
    }

    fn addr(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.number).into()
    }
}
