//! The kinds of load.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context as _;
use bytes::Bytes;
use clap::ValueEnum;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use hdrhistogram::Histogram;
use parking_lot::Mutex;
use qpq_ports::{Clock as _, SystemClock};
use qpq_proto::{
    methods::{BatchEnqueue, Enqueue, Fetch, FetchKeyPackage, FetchWait, Health},
    v1,
};
use quinn::Endpoint;
use tokio::{task::JoinSet, time::Instant};

use qpq_tests::{
    accounts::{self, Account},
    client::{self, Client, Pin},
    process,
};

use crate::{
    open_loop::{Ending, Tally, closed_loop, open_loop},
    report::Report,
};

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Mode {
    /// Health: the cost of a call without work.
    Health,
    /// Enqueue of one message to one of the accounts.
    Enqueue,
    /// Enqueue to a waiting reader: the latency from the due time of the message to its delivery.
    Pair,
    /// Fetch from filled inboxes, ten messages at a time.
    Drain,
    /// Connections that each wait in a FetchWait, and their memory.
    Idle,
    /// Complete logins.
    Login,
    /// FetchKeyPackage of uploaded packages.
    Keys,
}

/// The load to send.
pub(crate) struct Plan {
    pub(crate) mode: Mode,
    pub(crate) rate: f64,
    pub(crate) duration: Duration,
    pub(crate) connections: usize,
    pub(crate) accounts: usize,
    pub(crate) payload: usize,
}

/// The connections and accounts of a load.
pub(crate) struct Stage {
    pub(crate) endpoint: Endpoint,
    pub(crate) server: SocketAddr,
    pub(crate) clients: Vec<Client>,
    pub(crate) accounts: Vec<Account>,
}

impl Stage {
    pub(crate) async fn set(
        server: SocketAddr,
        pin: Pin,
        connections: usize,
        accounts: usize,
    ) -> anyhow::Result<Arc<Self>> {
        let endpoint = client::endpoint(pin)?;
        let clients = connect_many(&endpoint, server, connections).await?;
        let accounts = accounts::make(&endpoint, server, accounts).await?;
        Ok(Arc::new(Self { endpoint, server, clients, accounts }))
    }

    pub(crate) fn client(&self, i: usize) -> &Client {
        &self.clients[i % self.clients.len()]
    }

    /// Returns the sender and the recipient of the i-th message.
    pub(crate) fn pair(&self, i: usize) -> (&Account, &Account) {
        let n = self.accounts.len();
        (&self.accounts[i % n], &self.accounts[(i + 1) % n])
    }
}

pub(crate) async fn connect_many(
    endpoint: &Endpoint,
    server: SocketAddr,
    count: usize,
) -> anyhow::Result<Vec<Client>> {
    stream::iter(0..count)
        .map(|_| Client::connect(endpoint, server))
        // With 64 concurrent handshakes, a busy machine dropped datagrams because of full buffers,
        // and handshakes timed out.
        .buffer_unordered(16)
        .try_collect()
        .await
        .context("cannot connect")
}

pub(crate) async fn run(
    plan: &Plan,
    server: SocketAddr,
    pin: Pin,
    pid: Option<i32>,
) -> anyhow::Result<Report> {
    let accounts = match plan.mode {
        Mode::Health => 0,
        Mode::Idle => plan.connections,
        _ => plan.accounts.max(2),
    };
    let connections = if matches!(plan.mode, Mode::Idle) { 1 } else { plan.connections };
    let stage = Stage::set(server, pin, connections, accounts).await?;
    match plan.mode {
        Mode::Health => offer(plan, pid, &stage, health).await,
        Mode::Enqueue => {
            let payload = Bytes::from(vec![7; plan.payload]);
            offer(plan, pid, &stage, move |stage, i| enqueue(stage, i, payload.clone())).await
        }
        Mode::Pair => pair(plan, pid, &stage).await,
        Mode::Drain => {
            fill(&stage, (plan.rate * plan.duration.as_secs_f64()) as usize * 10, plan.payload)
                .await?;
            offer(plan, pid, &stage, drain).await
        }
        Mode::Idle => idle(plan, pid, &stage).await,
        Mode::Login => offer(plan, pid, &stage, login).await,
        Mode::Keys => {
            stock_up(&stage, (plan.rate * plan.duration.as_secs_f64()) as usize).await?;
            offer(plan, pid, &stage, take_key_package).await
        }
    }
}

async fn offer<F, Fut>(
    plan: &Plan,
    pid: Option<i32>,
    stage: &Arc<Stage>,
    act: F,
) -> anyhow::Result<Report>
where
    F: Fn(Arc<Stage>, usize) -> Fut,
    Fut: Future<Output = Ending> + Send + 'static,
{
    let before = pid.map(process::cpu_time).transpose()?;
    let tally = open_loop(plan.rate, plan.duration, |i| act(Arc::clone(stage), i)).await;
    let after = pid.map(process::cpu_time).transpose()?;
    Ok(Report {
        title: format!("{:?} at {}/s", plan.mode, plan.rate).to_lowercase(),
        tally,
        server_cpu: before.zip(after).map(|(b, a)| a - b),
        notes: Vec::new(),
    })
}

pub(crate) fn ending<T>(outcome: anyhow::Result<Result<T, client::Refused>>) -> Result<T, String> {
    match outcome {
        Ok(Ok(response)) => Ok(response),
        Ok(Err(refused)) => Err(format!("{} {}", refused.status, refused.code)),
        Err(error) => Err(format!("connection: {error:#}")),
    }
}

pub(crate) async fn health(stage: Arc<Stage>, i: usize) -> Ending {
    ending(stage.client(i).call::<Health>(&v1::HealthRequest::default(), None).await).map(drop)
}

pub(crate) async fn enqueue(stage: Arc<Stage>, i: usize, payload: Bytes) -> Ending {
    let (sender, recipient) = stage.pair(i);
    let request = v1::EnqueueRequest {
        recipient_key: recipient.identity.clone(),
        payload,
        message_id: Bytes::copy_from_slice(&rand::random::<[u8; 16]>()),
        ..Default::default()
    };
    ending(stage.client(i).call::<Enqueue>(&request, Some(&sender.token)).await).map(drop)
}

pub(crate) async fn drain(stage: Arc<Stage>, i: usize) -> Ending {
    let (reader, _) = stage.pair(i);
    let request = v1::FetchRequest { limit: 10, ..Default::default() };
    ending(stage.client(i).call::<Fetch>(&request, Some(&reader.token)).await).map(drop)
}

pub(crate) async fn login(stage: Arc<Stage>, i: usize) -> Ending {
    // A connection has at most four pending logins, so logins are spread over the connections.
    let (account, _) = stage.pair(i);
    accounts::login(stage.client(i), &account.username)
        .await
        .map(drop)
        .map_err(|e| format!("{e:#}"))
}

pub(crate) async fn take_key_package(stage: Arc<Stage>, i: usize) -> Ending {
    let (fetcher, target) = stage.pair(i);
    let request =
        v1::FetchKeyPackageRequest { identity_key: target.identity.clone(), ..Default::default() };
    let response =
        ending(stage.client(i).call::<FetchKeyPackage>(&request, Some(&fetcher.token)).await)?;
    if response.package.is_empty() { Err("no package left".into()) } else { Ok(()) }
}

/// Adds at least `count` messages in total to the accounts' inboxes.
pub(crate) async fn fill(stage: &Arc<Stage>, count: usize, payload: usize) -> anyhow::Result<()> {
    let keys: Vec<Bytes> = stage.accounts.iter().map(|a| a.identity.clone()).collect();
    let payload = Bytes::from(vec![7; payload]);
    for _ in 0..count.div_ceil(keys.len()) {
        for recipient_keys in keys.chunks(1_000) {
            let request = v1::BatchEnqueueRequest {
                recipient_keys: recipient_keys.to_vec(),
                payload: payload.clone(),
                ..Default::default()
            };
            let response = stage
                .client(0)
                .must::<BatchEnqueue>(&request, Some(&stage.accounts[0].token))
                .await?;
            anyhow::ensure!(
                response.results.iter().all(|r| r.status == 0),
                "filling: {:?}",
                response.results.first()
            );
        }
    }
    Ok(())
}

async fn stock_up(stage: &Arc<Stage>, count: usize) -> anyhow::Result<()> {
    const CHUNK: usize = 200;
    let each = count.div_ceil(stage.accounts.len());
    anyhow::ensure!(
        each <= 1_000,
        "an account has at most 1000 packages: use more --accounts or a lower --rate"
    );
    for account in &stage.accounts {
        let mut left = each;
        while left > 0 {
            let n = left.min(CHUNK);
            accounts::publish_key_packages(stage.client(0), account, n, SystemClock.now()).await?;
            left -= n;
        }
    }
    Ok(())
}

/// Accounts that wait, each on its own connection. Each message contains its due time.
struct Readers {
    start: Instant,
    /// Microseconds from the due time of a message to its delivery.
    seen: Arc<Mutex<Histogram<u64>>>,
    waiting: JoinSet<()>,
}

impl Readers {
    async fn start(stage: &Stage) -> anyhow::Result<Self> {
        let start = Instant::now();
        let seen = Arc::new(Mutex::new(Histogram::new_with_bounds(1, 120_000_000, 3)?));
        let mut waiting = JoinSet::new();
        for account in stage.accounts.clone() {
            let connection = Client::connect(&stage.endpoint, stage.server).await?;
            let seen = Arc::clone(&seen);
            waiting.spawn(async move {
                loop {
                    let request = v1::FetchWaitRequest { timeout_ms: 30_000, ..Default::default() };
                    let Ok(response) =
                        connection.must::<FetchWait>(&request, Some(&account.token)).await
                    else {
                        return;
                    };
                    let now = start.elapsed();
                    for envelope in response.payloads {
                        let due =
                            envelope.data.first_chunk::<8>().map_or(0, |b| u64::from_be_bytes(*b));
                        let waited = now.saturating_sub(Duration::from_micros(due));
                        seen.lock().saturating_record(
                            u64::try_from(waited.as_micros()).unwrap_or(u64::MAX).max(1),
                        );
                    }
                }
            });
        }
        Ok(Self { start, seen, waiting })
    }

    /// Returns a payload that contains the due time of its message, counted from the start.
    fn payload(size: usize, due: Duration) -> Bytes {
        let mut payload = vec![7; size.max(8)];
        payload[..8]
            .copy_from_slice(&u64::try_from(due.as_micros()).unwrap_or(u64::MAX).to_be_bytes());
        payload.into()
    }

    /// Waits until `count` messages are read, at most for the timeout of a FetchWait. Returns the
    /// latencies of the messages that were read.
    async fn read(mut self, count: u64) -> anyhow::Result<Histogram<u64>> {
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.seen.lock().len() < count && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        self.waiting.abort_all();
        let read = std::mem::replace(&mut *self.seen.lock(), Histogram::new(3)?);
        Ok(read)
    }
}

/// Measures the maximum number of messages per second that are both accepted and read.
pub(crate) async fn pair_peak(
    stage: &Arc<Stage>,
    in_flight: usize,
    duration: Duration,
    payload: usize,
) -> anyhow::Result<f64> {
    let readers = Readers::start(stage).await?;
    let (start, begun) = (readers.start, Instant::now());
    let tally = closed_loop(in_flight, duration, |i| {
        enqueue(Arc::clone(stage), i, Readers::payload(payload, start.elapsed()))
    })
    .await;
    let read = readers.read(tally.answered).await?;
    anyhow::ensure!(
        read.len() >= tally.answered,
        "{} acknowledged, {} read",
        tally.answered,
        read.len()
    );
    Ok(tally.answered as f64 / begun.elapsed().as_secs_f64())
}

pub(crate) async fn pair(
    plan: &Plan,
    pid: Option<i32>,
    stage: &Arc<Stage>,
) -> anyhow::Result<Report> {
    let readers = Readers::start(stage).await?;
    let (rate, size) = (plan.rate, plan.payload);
    let begun = readers.start.elapsed();
    let mut report = offer(plan, pid, stage, move |stage, i| {
        let due = begun + Duration::from_secs_f64(i as f64 / rate);
        enqueue(stage, i, Readers::payload(size, due))
    })
    .await?;
    // Every acknowledged message must be read.
    let read = readers.read(report.tally.answered).await?;
    let missing = report.tally.answered.saturating_sub(read.len());
    if missing > 0 {
        report.tally.failed.insert("acknowledged but never read".into(), missing);
    }
    let acknowledged = std::mem::replace(&mut report.tally.latency, read);
    report.notes.push(format!(
        "latency: from when it was due until its FetchWait answered; until it was acknowledged p50 {:.2}, p99 {:.2}",
        acknowledged.value_at_quantile(0.5) as f64 / 1e3,
        acknowledged.value_at_quantile(0.99) as f64 / 1e3
    ));
    Ok(report)
}

/// Opens a connection for each account and parks a FetchWait on it.
async fn idle(plan: &Plan, pid: Option<i32>, stage: &Arc<Stage>) -> anyhow::Result<Report> {
    let before = pid.map(process::resident).transpose()?;
    let clients = connect_many(&stage.endpoint, stage.server, plan.connections).await?;
    let mut waiting = JoinSet::new();
    for (client, account) in clients.iter().cloned().zip(stage.accounts.clone()) {
        waiting.spawn(async move {
            let request = v1::FetchWaitRequest { timeout_ms: 60_000, ..Default::default() };
            ending(client.call::<FetchWait>(&request, Some(&account.token)).await).map(drop)
        });
    }
    tokio::time::sleep(plan.duration).await;
    let mut notes = Vec::new();
    if let Some((before, pid)) = before.zip(pid) {
        let each =
            process::resident(pid)?.saturating_sub(before) as f64 / clients.len() as f64 / 1024.0;
        notes.push(format!("{} connections, {each:.1} KiB each", clients.len()));
    }
    let mut tally = Tally { elapsed: plan.duration, ..Tally::default() };
    while let Some(ended) = waiting.try_join_next() {
        *tally.failed.entry(ended?.err().unwrap_or_else(|| "ended early".into())).or_default() += 1;
    }
    tally.answered = waiting.len() as u64;
    Ok(Report { title: "idle".into(), tally, server_cpu: None, notes })
}
