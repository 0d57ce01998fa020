//! `bench-cluster`: measures edges and their stores on this machine, and compares them with floors:
//! the same transactions alone, the same scripts alone, a bare quinn echo. Everything is measured
//! several times in one run, as ratios and medians.

use std::{collections::BTreeMap, fs, sync::Arc, time::Duration};

use anyhow::Context as _;
use bytes::Bytes;
use nix::unistd::{SysconfVar, sysconf};
use qpq_domain::StoreLimits;
use qpq_ports::{Clock as _, SystemClock};
use qpq_store_cluster::{COMMITTERS, ClusterStore, Config, Endpoint, Migrate, Timing, measure};
use tokio::task::JoinSet;

use qpq_tests::{
    client::{self, Client},
    cluster::{Cluster, Place, Plan},
    process::resident,
};

use crate::{
    bench::{Series, Target},
    fan_out::{self, CpuTimes, Subject},
    floor::own_cpu,
    modes::{self, Stage},
    open_loop::closed_loop,
};

#[derive(clap::Args)]
pub(crate) struct ClusterArgs {
    /// The parts to measure. Default: all.
    #[arg(value_enum)]
    parts: Vec<Part>,
    /// The number of measurements of each part.
    #[arg(long, default_value_t = 5)]
    repeats: usize,
    /// Duration of a measurement in seconds.
    #[arg(long, default_value_t = 4)]
    seconds: u64,
    /// The number of connections in `parked` and `drain`.
    #[arg(long, default_value_t = 10_000)]
    connections: usize,
    /// The number of members in `group`.
    #[arg(long, default_value_t = 1_000)]
    members: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// Durable messages per second and CPU per message, at 64, 256 and 1 024 in flight, with
    /// floors.
    Enqueue,
    /// Latency from an Enqueue at one edge to the FetchWait at another, at a half, a quarter and a
    /// tenth of the maximum rate.
    Pair,
    /// CPU per call with four edges compared with one, for the same load per edge and in total.
    Edges,
    /// CPU of an Enqueue to an account with four devices, compared with one reader.
    Devices,
    /// CPU of a message to a group, compared with single messages.
    Group,
    /// Memory of waiting FetchWait calls.
    Parked,
    /// Duration of the drain of many connections.
    Drain,
}

const PAYLOAD: usize = 1_024;
const ACCOUNTS: usize = 64;
/// The maximum number of messages in one transaction, of the store and of the floor.
const BATCH: usize = 256;

pub(crate) async fn bench(args: ClusterArgs) -> anyhow::Result<()> {
    let wanted = |part| args.parts.is_empty() || args.parts.contains(&part);
    println!(
        "{} processors for edges, Postgres, Redis, NATS and the load generator; each figure is the \
         median of {} [lowest to highest]\n",
        std::thread::available_parallelism()?,
        args.repeats
    );
    if wanted(Part::Enqueue) {
        Box::pin(enqueue(&args)).await?;
    }
    if wanted(Part::Pair) {
        pair(&args).await?;
    }
    if wanted(Part::Edges) {
        edges(&args).await?;
    }
    if wanted(Part::Devices) {
        let mut figures = Series::default();
        for _ in 0..args.repeats {
            let cluster = cluster(1).await?;
            subject(&cluster).devices(args.duration(), &mut figures).await?;
        }
        fan_out::print_devices(&figures);
    }
    if wanted(Part::Group) {
        let mut figures = Series::default();
        for _ in 0..args.repeats {
            let cluster = cluster(1).await?;
            subject(&cluster).group(args.members, args.duration(), &mut figures).await?;
        }
        fan_out::print_group(args.members, &figures);
    }
    if wanted(Part::Parked) {
        parked(&args).await?;
    }
    if wanted(Part::Drain) {
        drain(&args).await?;
    }
    Ok(())
}

impl ClusterArgs {
    fn duration(&self) -> Duration {
        Duration::from_secs(self.seconds)
    }
}

/// Starts edges as processes with production settings, but without rate limits.
async fn cluster(edges: usize) -> anyhow::Result<Cluster> {
    let plan = Plan { edges, place: Place::Apart, ..Plan::default() }
        .with("QPQ_CLUSTER__POLL", "5s")
        .with("QPQ_CLUSTER__LEASE", "10s")
        .with("QPQ_CLUSTER__SESSION_CACHE", "15s")
        .with("QPQ_TRANSPORT__SILENT_PEER_TIMEOUT", "10s")
        .with("QPQ_TRANSPORT__MAX_CONNECTIONS", "100000")
        .with("QPQ_TRANSPORT__MAX_CONNECTIONS_PER_IP", "100000");
    Cluster::start(plan).await
}

fn subject(cluster: &Cluster) -> Subject<impl AsyncFn() -> anyhow::Result<CpuTimes>> {
    let entry_points = cluster.entry_points();
    let cpu = async || Ok(Cpu::now(cluster).await?.each().to_vec());
    Subject { addr: entry_points.addrs[0], pin: entry_points.pin, cpu }
}

async fn enqueue(args: &ClusterArgs) -> anyhow::Result<()> {
    for in_flight in [64, 256, 1_024] {
        let mut figures = Series::default();
        for _ in 0..args.repeats {
            let cluster = cluster(1).await?;
            let entry_points = cluster.entry_points();
            let stage = Stage::set(entry_points.addrs[0], entry_points.pin, 64, ACCOUNTS).await?;
            let payload = Bytes::from(vec![7; PAYLOAD]);
            let before = Cpu::now(&cluster).await?;
            let tally = closed_loop(in_flight, args.duration(), |i| {
                modes::enqueue(Arc::clone(&stage), i, payload.clone())
            })
            .await;
            anyhow::ensure!(tally.failed.is_empty(), "enqueues: {:?}", tally.failed);
            let used = Cpu::now(&cluster).await?.since(&before);
            let messages = tally.answered as f64;
            figures.add("messages/s", tally.per_second());
            figures.add("p50 ms", tally.latency.value_at_quantile(0.5) as f64 / 1e3);
            figures.add("p99 ms", tally.latency.value_at_quantile(0.99) as f64 / 1e3);
            for (name, cpu) in used.each() {
                figures.add(name, cpu / messages);
            }
            figures.add("all CPU µs", used.total() / messages);
            drop(stage);
            let floor =
                Box::pin(floors(&cluster, in_flight, args.duration(), &mut figures)).await?;
            figures.add("floors CPU µs", floor);
        }
        println!("Durable Enqueue of 1 KiB, {in_flight} in flight");
        for name in ["messages/s", "p50 ms", "p99 ms", "edge", "postgres", "redis", "nats"] {
            figures.show(name);
        }
        for name in ["transactions/s alone", "transactions", "scripts", "echo"] {
            figures.show(name);
        }
        figures.print("all CPU µs", "floors CPU µs", Target::AtMost(1.5));
    }
    Ok(())
}

/// Measures the CPU microseconds per message of the transactions, the scripts and the echo, each
/// alone. Returns their sum.
async fn floors(
    cluster: &Cluster,
    in_flight: usize,
    duration: Duration,
    figures: &mut Series,
) -> anyhow::Result<f64> {
    let config = store(cluster, "floor").await?;
    let stores = ClusterStore::connect(&config).await?;
    let inboxes = measure::inboxes(&stores.stores(), ACCOUNTS as u8, SystemClock.now())
        .await
        .context("inboxes")?;
    stores.close().await;

    // The maximum number of messages in a transaction while `in_flight` messages are sent.
    let batch = (in_flight / COMMITTERS).min(BATCH);
    let (before, own) = (Cpu::now(cluster).await?, own_cpu());
    let floor = measure::transactions(&config, &inboxes, batch, PAYLOAD, duration).await??;
    let used = Cpu::now(cluster).await?.since(&before).postgres + micros(own_cpu() - own);
    let transactions = used / floor.messages as f64;
    figures.add("transactions/s alone", floor.messages as f64 / floor.elapsed.as_secs_f64());
    figures.add("transactions", transactions);

    let (before, own) = (Cpu::now(cluster).await?, own_cpu());
    let floor = measure::pushes(&config, &inboxes, in_flight, PAYLOAD, duration).await??;
    let used = Cpu::now(cluster).await?.since(&before).redis + micros(own_cpu() - own);
    let scripts = used / floor.messages as f64;
    figures.add("scripts", scripts);

    let echo = crate::bench::start_echo_of(&cluster.secrets_dir(), 120).await?;
    let stage = Stage::set(echo.addr, cluster.entry_points().pin, 64, 0).await?;
    let request = Bytes::from(vec![7; PAYLOAD + 100]);
    let before = qpq_tests::process::cpu_time(echo.server.pid())?;
    let tally = closed_loop(in_flight, duration, |i| {
        let (client, request) = (stage.client(i).clone(), request.clone());
        async move {
            client.exchange(crate::echo::ECHO, request).await.map(drop).map_err(|e| e.to_string())
        }
    })
    .await;
    let used = qpq_tests::process::cpu_time(echo.server.pid())? - before;
    echo.server.stop().await?;
    let echo = micros(used) / tally.answered as f64;
    figures.add("echo", echo);
    Ok(transactions + scripts + echo)
}

/// Returns the configuration of a store in this process, with its own database.
async fn store(cluster: &Cluster, namespace: &str) -> anyhow::Result<Config> {
    let endpoint = |url: String| Endpoint { url, password: None, ca: None };
    Ok(Config {
        postgres: endpoint(cluster.postgres.create_database(namespace).await?),
        redis: endpoint(cluster.redis.url()),
        nats: endpoint(cluster.nats.url()),
        postgres_connections: 16,
        postgres_timeout: Duration::from_secs(20),
        redis_timeout: Duration::from_secs(5),
        start_timeout: Duration::from_secs(20),
        namespace: namespace.into(),
        migrate: Migrate::AtStart,
        opaque_setup: [7; 32],
        limits: StoreLimits {
            delivery: qpq_domain::DeliveryLimits {
                max_messages: u64::MAX / 4,
                max_bytes: u64::MAX / 4,
                ..qpq_domain::DeliveryLimits::default()
            },
            ..StoreLimits::default()
        },
        timing: Timing::default(),
        clocks: qpq_store_cluster::Clocks::default(),
        blobs: qpq_store_cluster::BlobPlaces::default(),
    })
}

async fn pair(args: &ClusterArgs) -> anyhow::Result<()> {
    let cluster = cluster(2).await?;
    let entry_points = cluster.entry_points();
    let stage = Stage::set(entry_points.addrs[0], entry_points.pin, 64, ACCOUNTS).await?;
    // The waiting readers are on the other edge.
    let apart = Arc::new(Stage {
        endpoint: stage.endpoint.clone(),
        server: entry_points.addrs[1],
        clients: stage.clients.clone(),
        accounts: stage.accounts.clone(),
    });
    let peak = modes::pair_peak(&apart, 256, args.duration(), PAYLOAD).await?;
    println!("Enqueue at one edge to FetchWait at another; the maximum is {peak:.0}/s");
    for share in [0.5, 0.25, 0.1] {
        let plan = modes::Plan {
            mode: modes::Mode::Pair,
            rate: (peak * share).floor(),
            duration: args.duration() * 2,
            connections: 64,
            accounts: ACCOUNTS,
            payload: PAYLOAD,
        };
        let before = Cpu::now(&cluster).await?;
        let report = modes::pair(&plan, None, &apart).await?;
        let used = Cpu::now(&cluster).await?.since(&before);
        print!("{report}  CPU µs each:");
        for (name, cpu) in used.each() {
            print!(" {name} {:.0}", cpu / report.tally.answered as f64);
        }
        println!("\n");
    }
    Ok(())
}

async fn edges(args: &ClusterArgs) -> anyhow::Result<()> {
    const IN_FLIGHT: usize = 256;
    const ONE: &str = "one edge";
    // More edges usually have more load. The same load split in four makes all batches smaller.
    let layouts = [
        (ONE, 1, IN_FLIGHT),
        ("four, as many each", 4, 4 * IN_FLIGHT),
        ("four, as many", 4, IN_FLIGHT),
    ];
    let mut figures = Series::default();
    for _ in 0..args.repeats {
        for (name, count, in_flight) in layouts {
            let cluster = cluster(count).await?;
            let entry_points = cluster.entry_points();
            let stage = Stage::set(entry_points.addrs[0], entry_points.pin, 1, ACCOUNTS).await?;
            let mut clients = Vec::new();
            for addr in entry_points.addrs.iter() {
                clients.extend(modes::connect_many(&stage.endpoint, *addr, 64 / count).await?);
            }
            let stage = Arc::new(Stage {
                endpoint: stage.endpoint.clone(),
                server: stage.server,
                clients,
                accounts: stage.accounts.clone(),
            });
            let payload = Bytes::from(vec![7; PAYLOAD]);
            let before = Cpu::now(&cluster).await?;
            let tally = closed_loop(in_flight, args.duration(), |i| {
                modes::enqueue(Arc::clone(&stage), i, payload.clone())
            })
            .await;
            anyhow::ensure!(tally.failed.is_empty(), "enqueues: {:?}", tally.failed);
            figures.add(
                name,
                Cpu::now(&cluster).await?.since(&before).total() / tally.answered as f64,
            );
        }
    }
    println!(
        "Enqueue, {IN_FLIGHT} in flight at each of four edges compared with one edge, CPU µs of \
         all processes per message"
    );
    figures.print("four, as many each", ONE, Target::AtMost(1.1));
    println!("The same {IN_FLIGHT} in flight at one edge and spread over four");
    figures.print("four, as many", ONE, Target::AtMost(1.1));
    Ok(())
}

async fn parked(args: &ClusterArgs) -> anyhow::Result<()> {
    let cluster = cluster(1).await?;
    let entry_points = cluster.entry_points();
    let stage = Stage::set(entry_points.addrs[0], entry_points.pin, 1, 200).await?;
    let pid = edge_pids()?[0];
    // The first clients cost an edge more memory than further ones.
    drop(modes::connect_many(&stage.endpoint, entry_points.addrs[0], 64).await?);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let before = resident(pid)?;
    let clients = connections(&cluster, args.connections).await?;
    let mut waiting = park(&clients, &stage);
    tokio::time::sleep(Duration::from_secs(10)).await;
    let grown = resident(pid)?.saturating_sub(before) as f64;
    anyhow::ensure!(waiting.try_join_next().is_none(), "a waiting call was answered");
    let cpu = Cpu::now(&cluster).await?;
    tokio::time::sleep(Duration::from_secs(10)).await;
    let used = Cpu::now(&cluster).await?.since(&cpu);
    println!(
        "{} connections with a waiting FetchWait: {:.1} KiB each, {:.1} MiB in total; {:.1}% of a \
         processor (edge {:.1}%, postgres {:.1}%, redis {:.1}%)\n",
        clients.len(),
        grown / clients.len() as f64 / 1024.0,
        grown / 1024.0 / 1024.0,
        used.total() / 1e5,
        used.edge / 1e5,
        used.postgres / 1e5,
        used.redis / 1e5,
    );
    Ok(())
}

async fn drain(args: &ClusterArgs) -> anyhow::Result<()> {
    let cluster = cluster(2).await?;
    let entry_points = cluster.entry_points();
    let stage = Stage::set(entry_points.addrs[0], entry_points.pin, 1, 200).await?;
    let clients = connections(&cluster, args.connections).await?;
    let mut waiting = park(&clients, &stage);
    tokio::time::sleep(Duration::from_secs(2)).await;
    let start = tokio::time::Instant::now();
    cluster.drain_edge(0).await?;
    let took = start.elapsed();
    let (mut answered, mut lost) = (0, 0);
    while let Some(ended) = waiting.join_next().await {
        if ended? { answered += 1 } else { lost += 1 }
    }
    println!(
        "Drain of {} connections, each with a waiting FetchWait: {:.1} s (target ≤ 15); {answered} \
         calls were answered, {lost} were not\n",
        clients.len(),
        took.as_secs_f64()
    );
    Ok(())
}

/// Opens connections to the first edge from several sockets, because the buffer of one socket is
/// too small for that number of handshakes.
async fn connections(cluster: &Cluster, count: usize) -> anyhow::Result<Vec<Client>> {
    let entry_points = cluster.entry_points();
    let mut clients = Vec::with_capacity(count);
    while clients.len() < count {
        let endpoint = client::endpoint(entry_points.pin)?;
        let more = (count - clients.len()).min(1_000);
        clients.extend(modes::connect_many(&endpoint, entry_points.addrs[0], more).await?);
    }
    Ok(clients)
}

/// Starts a FetchWait on each connection. Each task returns `true` if its call was answered.
fn park(clients: &[Client], stage: &Arc<Stage>) -> JoinSet<bool> {
    let mut waiting = JoinSet::new();
    for (n, client) in clients.iter().cloned().enumerate() {
        let token = stage.accounts[n % stage.accounts.len()].token.clone();
        waiting.spawn(async move {
            let request =
                qpq_proto::v1::FetchWaitRequest { timeout_ms: 60_000, ..Default::default() };
            matches!(
                client.call::<qpq_proto::methods::FetchWait>(&request, Some(&token)).await,
                Ok(Ok(_))
            )
        });
    }
    waiting
}

/// The CPU microseconds of each part of a cluster.
#[derive(Clone, Copy, Debug, Default)]
struct Cpu {
    edge: f64,
    postgres: f64,
    redis: f64,
    nats: f64,
}

impl Cpu {
    async fn now(cluster: &Cluster) -> anyhow::Result<Self> {
        let pid = cluster
            .postgres
            .sql("SELECT split_part(pg_read_file('postmaster.pid'), E'\\n', 1)")
            .await?;
        let own = i32::try_from(std::process::id())?;
        let processes = processes()?;
        let named = |name: &str| -> f64 {
            processes
                .values()
                .filter(|p| p.name == name && p.is_below(own, &processes))
                .map(|p| p.cpu)
                .sum()
        };
        let postmaster: i32 = pid.trim().parse()?;
        let backends: f64 = processes
            .iter()
            .filter(|(id, p)| **id == postmaster || p.parent == postmaster)
            .map(|(_, p)| p.cpu)
            .sum();
        let ended = processes.get(&postmaster).map_or(0.0, |p| p.cpu_of_ended);
        Ok(Self {
            edge: named("qpq-server"),
            postgres: backends + ended,
            redis: named("redis-server"),
            nats: named("nats-server"),
        })
    }

    fn since(self, before: &Self) -> Self {
        Self {
            edge: self.edge - before.edge,
            postgres: self.postgres - before.postgres,
            redis: self.redis - before.redis,
            nats: self.nats - before.nats,
        }
    }

    fn each(&self) -> [(&'static str, f64); 4] {
        [
            ("edge", self.edge),
            ("postgres", self.postgres),
            ("redis", self.redis),
            ("nats", self.nats),
        ]
    }

    fn total(&self) -> f64 {
        self.each().iter().map(|(_, cpu)| cpu).sum()
    }
}

struct Process {
    name: String,
    parent: i32,
    cpu: f64,
    cpu_of_ended: f64,
}

impl Process {
    fn is_below(&self, ancestor: i32, all: &BTreeMap<i32, Process>) -> bool {
        let mut parent = self.parent;
        while parent > 1 {
            if parent == ancestor {
                return true;
            }
            parent = all.get(&parent).map_or(0, |process| process.parent);
        }
        false
    }
}

/// Returns all processes of this machine, from `/proc/*/stat` (proc(5)).
fn processes() -> anyhow::Result<BTreeMap<i32, Process>> {
    let ticks = sysconf(SysconfVar::CLK_TCK)?.context("the system has no clock tick")? as f64;
    let mut all = BTreeMap::new();
    for entry in fs::read_dir("/proc")? {
        let Ok(pid) = entry?.file_name().to_string_lossy().parse::<i32>() else { continue };
        // The process may have ended.
        let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
        let (Some(open), Some(close)) = (stat.find('('), stat.rfind(')')) else { continue };
        let fields: Vec<&str> = stat[close + 1..].split_whitespace().collect();
        let number =
            |n: usize| fields.get(n).and_then(|f| f.parse::<f64>().ok()).unwrap_or_default();
        all.insert(
            pid,
            Process {
                name: stat[open + 1..close].into(),
                parent: number(1) as i32,
                cpu: (number(11) + number(12)) / ticks * 1e6,
                cpu_of_ended: (number(13) + number(14)) / ticks * 1e6,
            },
        );
    }
    Ok(all)
}

fn edge_pids() -> anyhow::Result<Vec<i32>> {
    let own = i32::try_from(std::process::id())?;
    let all = processes()?;
    Ok(all
        .iter()
        .filter(|(_, p)| p.name == "qpq-server" && p.is_below(own, &all))
        .map(|(pid, _)| *pid)
        .collect())
}

fn micros(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}
