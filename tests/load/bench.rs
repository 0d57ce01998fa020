//! `bench`: compares each part of the server with its floor several times in one run. Prints the
//! ratio of each pair of measurements as median and spread.

use std::{collections::BTreeMap, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use anyhow::Context as _;
use bytes::Bytes;
use clap::ValueEnum;
use tempfile::TempDir;
use tokio::{process::Command, task::JoinSet};

use qpq_tests::{
    client::{Pin, endpoint},
    process::{Server, cpu_time, resident, sibling},
};

use crate::{
    echo,
    fan_out::{self, CpuTimes, Subject},
    flat, floor,
    modes::{self, Mode, Plan, Stage},
    open_loop::{closed_loop, open_loop},
};

#[derive(clap::Args)]
pub(crate) struct BenchArgs {
    /// The parts to measure. Default: all.
    parts: Vec<Part>,
    /// The number of measurements of each pair.
    #[arg(long, default_value_t = 5)]
    repeats: usize,
    /// Duration of a measurement in seconds.
    #[arg(long, default_value_t = 4)]
    seconds: u64,
    /// The number of inboxes of the large store in `flat`.
    #[arg(long, default_value_t = 1_000_000)]
    inboxes: usize,
    /// The number of connections in `idle`.
    #[arg(long, default_value_t = 1_000)]
    connections: usize,
    /// The number of members in `group`.
    #[arg(long, default_value_t = 1_000)]
    members: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Server CPU of Health, compared with the bare echo.
    Health,
    /// Memory of a waiting connection, compared with the bare echo.
    Idle,
    /// Server CPU of a login, compared with `ServerLogin::start` alone.
    Login,
    /// Durable messages per second, compared with bare SQLite inserts.
    Enqueue,
    /// Latency from Enqueue to FetchWait at half of the maximum rate.
    Pair,
    /// Cost with many inboxes and with long inboxes.
    Flat,
    /// Server CPU of an Enqueue to an account with four devices, compared with one reader.
    Devices,
    /// Server CPU of a message to a group, compared with single messages.
    Group,
}

pub(crate) async fn bench(args: BenchArgs) -> anyhow::Result<()> {
    let wanted = |part| args.parts.is_empty() || args.parts.contains(&part);
    println!(
        "{} processors; each figure is the median of {} [lowest to highest]\n",
        std::thread::available_parallelism()?,
        args.repeats
    );
    if wanted(Part::Health) {
        health(&args).await?;
    }
    if wanted(Part::Idle) {
        idle(&args).await?;
    }
    if wanted(Part::Login) {
        login(&args).await?;
    }
    if wanted(Part::Enqueue) {
        enqueue(&args).await?;
    }
    if wanted(Part::Pair) {
        pair(&args).await?;
    }
    if wanted(Part::Flat) {
        flatness(&args).await?;
    }
    if wanted(Part::Devices) {
        let mut figures = Series::default();
        for _ in 0..args.repeats {
            let server = start_server().await?;
            server.as_subject().devices(args.duration(), &mut figures).await?;
            server.server.stop().await?;
        }
        fan_out::print_devices(&figures);
    }
    if wanted(Part::Group) {
        let mut figures = Series::default();
        for _ in 0..args.repeats {
            let server = start_server().await?;
            server.as_subject().group(args.members, args.duration(), &mut figures).await?;
            server.server.stop().await?;
        }
        fan_out::print_group(args.members, &figures);
    }
    Ok(())
}

// ---- servers ----------------------------------------------------------------

struct Running {
    server: Server,
    addr: SocketAddr,
    pin: Pin,
    dir: TempDir,
}

impl Running {
    fn as_subject(&self) -> Subject<impl AsyncFn() -> anyhow::Result<CpuTimes>> {
        let pid = self.server.pid();
        let cpu = async move || Ok(vec![("server", cpu_time(pid)?.as_secs_f64() * 1e6)]);
        Subject { addr: self.addr, pin: self.pin, cpu }
    }
}

/// Starts a server with default settings, but without rate limits and with many connections per
/// address.
async fn start_server() -> anyhow::Result<Running> {
    let dir = TempDir::new()?;
    let mut command = Command::new(sibling("qpq-server")?);
    command
        .args(["--listen", "127.0.0.1:0", "--data-dir"])
        .arg(dir.path().join("data"))
        .env("QPQ_LIMITS__ENABLED", "false")
        .env("QPQ_HTTP__LISTEN", "off")
        .env("QPQ_TRANSPORT__MAX_CONNECTIONS_PER_IP", "100000")
        .stderr(std::process::Stdio::null());
    let server = Server::start(command, |line| line.contains(" dm bob")).await?;
    let words: Vec<&str> = server.said.iter().flat_map(|line| line.split_whitespace()).collect();
    let after = |flag| {
        words
            .iter()
            .skip_while(|w| **w != flag)
            .nth(1)
            .copied()
            .context("not in the server's first output")
    };
    let (addr, pin) = (after("--server")?.parse()?, after("--pin")?.parse()?);
    Ok(Running { server, addr, pin, dir })
}

/// Starts the bare echo with the certificate of `like` and answers of `reply_bytes`.
async fn start_echo(like: &Running, reply_bytes: usize) -> anyhow::Result<(Server, SocketAddr)> {
    let echo = start_echo_of(&like.dir.path().join("data"), reply_bytes).await?;
    Ok((echo.server, echo.addr))
}

pub(crate) struct Echo {
    pub(crate) server: Server,
    pub(crate) addr: SocketAddr,
}

/// Starts the bare echo with the certificate in `identity` and answers of `reply_bytes`.
pub(crate) async fn start_echo_of(identity: &Path, reply_bytes: usize) -> anyhow::Result<Echo> {
    let mut command = Command::new(std::env::current_exe()?);
    command
        .arg("echo")
        .arg("--identity")
        .arg(identity)
        .args(["--reply-bytes", &reply_bytes.to_string()]);
    let server = Server::start(command, |line| line.starts_with("listening ")).await?;
    let addr = server.said[0].trim_start_matches("listening ").parse()?;
    Ok(Echo { server, addr })
}

// ---- the parts ----------------------------------------------------------------

async fn health(args: &BenchArgs) -> anyhow::Result<()> {
    const RATE: f64 = 4_000.0;
    let server = start_server().await?;
    let stage = Stage::set(server.addr, server.pin, 64, 0).await?;
    let answer = stage.client(0).exchange(802, Bytes::new()).await?;
    let (echo, echo_addr) = start_echo(&server, answer.payload.len()).await?;
    let echo_stage = Stage::set(echo_addr, server.pin, 64, 0).await?;
    let mut cpu = Series::default();
    for _ in 0..args.repeats {
        for (name, pid, stage, method) in [
            ("qpq-server", server.server.pid(), &stage, 802),
            ("bare echo", echo.pid(), &echo_stage, echo::ECHO),
        ] {
            let before = cpu_time(pid)?;
            let tally = open_loop(RATE, args.duration(), |i| {
                let client = stage.client(i).clone();
                async move {
                    client.exchange(method, Bytes::new()).await.map(drop).map_err(|e| e.to_string())
                }
            })
            .await;
            anyhow::ensure!(tally.failed.is_empty(), "{name}: {:?}", tally.failed);
            cpu.add(name, (cpu_time(pid)? - before).as_secs_f64() * 1e6 / tally.answered as f64);
        }
    }
    println!("Health at {RATE}/s over 64 connections, server CPU µs per call");
    cpu.print("qpq-server", "bare echo", Target::AtMost(1.15));
    echo.stop().await?;
    server.server.stop().await
}

async fn idle(args: &BenchArgs) -> anyhow::Result<()> {
    let mut memory = Series::default();
    for _ in 0..args.repeats {
        let server = start_server().await?;
        let (echo, echo_addr) = start_echo(&server, 0).await?;
        let stage = Stage::set(server.addr, server.pin, 1, args.connections).await?;
        let tokens = stage.accounts.iter().map(|a| a.token.clone()).collect::<Vec<_>>();
        let waits = tokens.iter().map(|token| {
            let mut payload = Vec::new();
            prost::Message::encode(
                &qpq_proto::v1::FetchWaitRequest { timeout_ms: 60_000, ..Default::default() },
                &mut payload,
            )
            .expect("a Vec grows");
            qpq_proto::session::append_session_token(&mut payload, token);
            Bytes::from(payload)
        });
        let each = park(server.server.pid(), server.addr, server.pin, 202, waits.collect()).await?;
        memory.add("qpq-server", each);
        let each = park(
            echo.pid(),
            echo_addr,
            server.pin,
            echo::PARK,
            vec![Bytes::new(); args.connections],
        )
        .await?;
        memory.add("bare echo", each);
        echo.stop().await?;
        server.server.stop().await?;
    }
    println!("{} connections, each with one call waiting, KiB each", args.connections);
    memory.print("qpq-server", "bare echo", Target::AtMost(1.15));
    Ok(())
}

/// Returns the KiB by which the process grows for each connection with a waiting call.
async fn park(
    pid: i32,
    addr: SocketAddr,
    pin: Pin,
    method: u16,
    calls: Vec<Bytes>,
) -> anyhow::Result<f64> {
    let endpoint = endpoint(pin)?;
    // The first clients cost a server more memory (buffers, worker threads) than further ones.
    let warm = modes::connect_many(&endpoint, addr, 64).await?;
    drop(warm);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let before = resident(pid)?;
    let clients = modes::connect_many(&endpoint, addr, calls.len()).await?;
    let mut waiting = JoinSet::new();
    for (client, call) in clients.iter().cloned().zip(calls.iter().cloned()) {
        waiting.spawn(async move { client.exchange(method, call).await.map(drop) });
    }
    // The client cannot observe that the last call waits; two seconds are far more than needed.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let grown = resident(pid)?.saturating_sub(before);
    anyhow::ensure!(waiting.try_join_next().is_none(), "a waiting call was answered");
    Ok(grown as f64 / calls.len() as f64 / 1024.0)
}

async fn login(args: &BenchArgs) -> anyhow::Result<()> {
    const IN_FLIGHT: usize = 16;
    let server = start_server().await?;
    let stage = Stage::set(server.addr, server.pin, IN_FLIGHT * 8, IN_FLIGHT).await?;
    let mut cpu = Series::default();
    for _ in 0..args.repeats {
        let before = cpu_time(server.server.pid())?;
        let tally =
            closed_loop(IN_FLIGHT, args.duration(), |i| modes::login(Arc::clone(&stage), i)).await;
        anyhow::ensure!(tally.failed.is_empty(), "logins: {:?}", tally.failed);
        let used = cpu_time(server.server.pid())? - before;
        cpu.add("qpq-server", used.as_secs_f64() * 1e6 / tally.answered as f64);
        cpu.add("ServerLogin::start", floor::login_start(2_000)?);
        cpu.add("logins/s", tally.per_second());
    }
    println!("Logins, {IN_FLIGHT} in flight, server CPU µs each");
    cpu.print("qpq-server", "ServerLogin::start", Target::AtMost(1.3));
    cpu.show("logins/s");
    server.server.stop().await
}

async fn enqueue(args: &BenchArgs) -> anyhow::Result<()> {
    const IN_FLIGHT: usize = 256;
    let mut rate = Series::default();
    for _ in 0..args.repeats {
        let server = start_server().await?;
        let stage = Stage::set(server.addr, server.pin, 64, 64).await?;
        let payload = Bytes::from(vec![7; 1024]);
        let before = cpu_time(server.server.pid())?;
        let tally = closed_loop(IN_FLIGHT, args.duration(), |i| {
            modes::enqueue(Arc::clone(&stage), i, payload.clone())
        })
        .await;
        anyhow::ensure!(tally.failed.is_empty(), "enqueues: {:?}", tally.failed);
        rate.add("qpq-server", tally.per_second());
        rate.add(
            "qpq-server CPU µs",
            (cpu_time(server.server.pid())? - before).as_secs_f64() * 1e6 / tally.answered as f64,
        );
        let floor = floor::sqlite(server.dir.path(), IN_FLIGHT, 1024, args.duration()).await?;
        rate.add("bare SQLite", floor.rows_per_second);
        rate.add("bare SQLite CPU µs", floor.cpu_per_row);
        server.server.stop().await?;
    }
    println!(
        "Durable Enqueue of 1 KiB over QUIC, {IN_FLIGHT} in flight, compared with inserts of \
         {IN_FLIGHT} rows per commit, per second"
    );
    rate.print("qpq-server", "bare SQLite", Target::AtLeast(0.6));
    rate.show("qpq-server CPU µs");
    rate.show("bare SQLite CPU µs");
    Ok(())
}

async fn pair(args: &BenchArgs) -> anyhow::Result<()> {
    const PAYLOAD: usize = 1_024;
    let server = start_server().await?;
    let stage = Stage::set(server.addr, server.pin, 64, 64).await?;
    let peak = modes::pair_peak(&stage, 256, args.duration(), PAYLOAD).await?;
    let plan = Plan {
        mode: Mode::Pair,
        rate: (peak / 2.0).floor(),
        duration: args.duration() * 2,
        connections: 64,
        accounts: 64,
        payload: PAYLOAD,
    };
    println!("Enqueue to FetchWait, at half of the maximum of {peak:.0}/s");
    println!("{}", modes::pair(&plan, Some(server.server.pid()), &stage).await?);
    server.server.stop().await
}

async fn flatness(args: &BenchArgs) -> anyhow::Result<()> {
    const TIMES: usize = 4_000;
    const FEW: usize = 1_000;
    const READERS: usize = 8;
    let dir = TempDir::new()?;
    let few = flat::Subject::with_inboxes(&sub(dir.path(), "few")?, FEW).await?;
    let many = flat::Subject::with_inboxes(&sub(dir.path(), "many")?, args.inboxes).await?;
    let (mut enqueue, mut fetch) = (Series::default(), Series::default());
    for _ in 0..args.repeats {
        for (name, subject) in [("few", &few), ("many", &many)] {
            let cost = subject.costs(TIMES, None).await?;
            enqueue.add(name, cost.enqueue);
            fetch.add(name, cost.fetch);
        }
    }
    println!("{} inboxes compared with {FEW}, CPU µs of an Enqueue", args.inboxes);
    enqueue.print("many", "few", Target::AtMost(1.2));
    println!("{} inboxes compared with {FEW}, CPU µs of a Fetch of one message", args.inboxes);
    fetch.print("many", "few", Target::AtMost(1.2));
    many.close().await;

    let shallow = flat::Subject::with_inboxes(&sub(dir.path(), "shallow")?, FEW).await?;
    few.deepen(READERS, 9_400).await?;
    let (mut enqueue, mut fetch) = (Series::default(), Series::default());
    for _ in 0..args.repeats {
        for (name, subject) in [("depth 1", &shallow), ("depth 10 000", &few)] {
            let cost = subject.costs(TIMES, Some(READERS)).await?;
            enqueue.add(name, cost.enqueue);
            fetch.add(name, cost.fetch);
        }
    }
    println!("Inboxes of 10 000 messages compared with short ones, CPU µs of an Enqueue");
    enqueue.print("depth 10 000", "depth 1", Target::AtMost(1.2));
    println!("Inboxes of 10 000 messages compared with short ones, CPU µs of a Fetch of one");
    fetch.print("depth 10 000", "depth 1", Target::AtMost(1.2));
    few.close().await;
    shallow.close().await;
    Ok(())
}

fn sub(dir: &Path, name: &str) -> anyhow::Result<std::path::PathBuf> {
    let path = dir.join(name);
    std::fs::create_dir(&path)?;
    Ok(path)
}

// ---- figures ------------------------------------------------------------------

impl BenchArgs {
    fn duration(&self) -> Duration {
        Duration::from_secs(self.seconds)
    }
}

/// The target of a ratio.
#[derive(Clone, Copy)]
pub(crate) enum Target {
    AtMost(f64),
    AtLeast(f64),
}

/// Measurements by name, in order.
#[derive(Default)]
pub(crate) struct Series(BTreeMap<String, Vec<f64>>);

impl Series {
    pub(crate) fn add(&mut self, name: impl Into<String>, value: f64) {
        self.0.entry(name.into()).or_default().push(value);
    }

    /// Prints the series that are parts of another series, with names of the form `whole, part`.
    pub(crate) fn show_parts(&self) {
        self.0.keys().filter(|name| name.contains(", ")).for_each(|name| self.show(name));
    }

    pub(crate) fn show(&self, name: &str) {
        println!("  {name:<26} {}", spread(&self.0[name]));
    }

    /// Prints both series and the ratio of each pair. Ratios are stable when the machine's speed
    /// drifts.
    pub(crate) fn print(&self, subject: &str, floor: &str, wanted: Target) {
        self.show(subject);
        self.show(floor);
        let ratios: Vec<f64> =
            self.0[subject].iter().zip(&self.0[floor]).map(|(s, f)| s / f).collect();
        let median = median(&ratios);
        let (bound, met) = match wanted {
            Target::AtMost(most) => (format!("≤ {most}"), median <= most),
            Target::AtLeast(least) => (format!("≥ {least}"), median >= least),
        };
        println!(
            "  {:<26} {}   target {bound}: {}\n",
            "ratio",
            spread(&ratios),
            if met { "met" } else { "MISSED" }
        );
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}

fn spread(values: &[f64]) -> String {
    let (low, high) =
        values.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(*v), h.max(*v)));
    format!("{:>9.2} [{low:.2} to {high:.2}]", median(values))
}
