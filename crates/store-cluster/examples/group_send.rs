//! Measures messages to groups: the cost of a message to a thousand members as one send and as
//! single messages, the duration of a send to ten thousand members, and the delay that it causes
//! others.
//!
//! `cargo run --release -p qpq-store-cluster --example group_send`, on Linux, with the servers of
//! the tests installed. The CPU time is that of the process and of the Postgres backends of its
//! connections.

#![allow(clippy::print_stdout, reason = "the program prints its measurements")]

use std::{fs, ops::Sub, sync::Arc, time::Duration};

use anyhow::Context as _;
use bytes::Bytes;
use qpq_domain::{AccountId, ChannelId, GroupId, IdentityKey, MessageId, StoreLimits, UnixMillis};
use qpq_ports::{Batch, Enqueued, GroupMessage, GroupRecipients, NewMessage, StoreResult, Stores};
use qpq_store_cluster::{Clocks, ClusterStore, Config, Endpoint, Migrate, Timing};
use qpq_test_services::{Nats, Postgres, Redis};
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep},
};

const DATABASE: &str = "measured";
/// The number of clock ticks in a second, in which Linux counts CPU time.
const TICKS: f64 = 100.0;
const IN_FLIGHT: usize = 64;
const REPEATS: usize = 5;

/// Accounts 1 to 10 000 are in one group, the first 1 000 of them also in another, and 10 more in
/// none.
const ACCOUNTS: &str = "
    INSERT INTO account (id, username, identity, opaque_record, created_at, skeleton)
    SELECT n, 'p' || n, sha256(n::text::bytea), '', 0, 'p' || n FROM generate_series(1, 10010) n;
    INSERT INTO inbox (id) SELECT id FROM account;
    INSERT INTO mls_group (id, name, description, settings, version, epoch, created_at)
    SELECT decode(repeat(id, 16), 'hex'), '', '', '', 0, 0, 0
      FROM unnest(ARRAY['01', '02']) AS g (id);
    INSERT INTO group_member (group_id, account, role, joined_at)
    SELECT decode(repeat('01', 16), 'hex'), n, 0, 0 FROM generate_series(1, 1000) n
     UNION ALL
    SELECT decode(repeat('02', 16), 'hex'), n, 0, 0 FROM generate_series(1, 10000) n;
    ANALYZE";

const MARK: &str = "
    INSERT INTO cluster (opaque_setup)
    SELECT sha256('qpq/devices/1'::bytea || decode(repeat('07', 32), 'hex'))";

const EMPTY: &str = "
    TRUNCATE message, payload, recent_id;
    UPDATE inbox SET messages = 0, bytes = 0, next_expiry = 9223372036854775807;
    VACUUM ANALYZE inbox; CHECKPOINT";

struct World {
    postgres: Postgres,
    store: ClusterStore,
    stores: Stores,
    identities: Vec<IdentityKey>,
}

/// The resources that were used up to an instant, or between two.
#[derive(Clone, Copy, Debug)]
struct Used {
    /// CPU time of this process, in seconds.
    process: f64,
    /// CPU time of the Postgres backends, in seconds.
    postgres: f64,
    /// Bytes of the write-ahead log.
    wal: f64,
}

impl Sub for Used {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            process: self.process - before.process,
            postgres: self.postgres - before.postgres,
            wal: self.wal - before.wal,
        }
    }
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> anyhow::Result<()> {
    for is_marked in [false, true] {
        let way = if is_marked { "payload stored once" } else { "payload in each row" };
        let world = World::start(is_marked).await?;
        for size in [1 << 10, 64 << 10] {
            if !is_marked {
                report(&format!("1 000 single messages of {size} B"), world.singles(size).await?);
            }
            report(&format!("one send of {size} B, {way}"), world.sends(1, 1_000, size).await?);
        }
        report(&format!("10 000 members, 1 KiB, {way}"), world.sends(2, 10_000, 1 << 10).await?);
        for size in [1 << 10, 64 << 10] {
            world.delays(size).await?;
        }
        world.store.close().await;
    }
    Ok(())
}

fn report(what: &str, runs: Vec<(usize, Duration, Used)>) {
    let messages: f64 = runs.iter().map(|run| run.0 as f64).sum();
    let sum =
        |value: fn(&Used) -> f64| runs.iter().map(|run| value(&run.2)).sum::<f64>() / messages;
    let mut times: Vec<_> = runs.iter().map(|run| run.1).collect();
    times.sort();
    println!(
        "{what}: Postgres {:.1} µs, process {:.1} µs, log {:.0} B a recipient; {:.0?} to {:.0?}",
        sum(|used| used.postgres) * 1e6,
        sum(|used| used.process) * 1e6,
        sum(|used| used.wal),
        times[0],
        times[times.len() - 1],
    );
}

impl World {
    async fn start(is_marked: bool) -> anyhow::Result<Self> {
        let (postgres, redis, nats) =
            tokio::try_join!(Postgres::start(), Redis::start(), Nats::start())?;
        let url = postgres.create_database(DATABASE).await?;
        let endpoint = |url: String| Endpoint { url, password: None, ca: None };
        let config = Config {
            postgres: endpoint(url),
            redis: endpoint(redis.url()),
            nats: endpoint(nats.url()),
            postgres_connections: 16,
            postgres_timeout: Duration::from_secs(30),
            redis_timeout: Duration::from_secs(5),
            start_timeout: Duration::from_secs(60),
            namespace: DATABASE.into(),
            migrate: Migrate::AtStart,
            opaque_setup: [7; 32],
            limits: StoreLimits::default(),
            timing: Timing::default(),
            clocks: Clocks::default(),
            blobs: qpq_store_cluster::BlobPlaces::default(),
        };
        qpq_store_cluster::migrate(&config).await?;
        postgres.sql_in(DATABASE, ACCOUNTS).await?;
        if is_marked {
            postgres.sql_in(DATABASE, MARK).await?;
        }
        let keys = "SELECT string_agg(encode(identity, 'hex'), ' ' ORDER BY id) FROM account";
        let keys = postgres.sql_in(DATABASE, keys).await?;
        let identities = keys.split_whitespace().map(identity).collect::<anyhow::Result<_>>()?;
        let store = ClusterStore::connect(&config).await?;
        // The servers run until the process ends.
        std::mem::forget((redis, nats));
        Ok(Self { postgres, stores: store.stores(), store, identities })
    }

    async fn used(&self) -> anyhow::Result<Used> {
        // Waits for the updates of Redis, which follow the answer.
        sleep(Duration::from_millis(500)).await;
        let sql = "SELECT pg_current_wal_lsn() - '0/0'::pg_lsn || ' ' || string_agg(pid::text, ' ')
                     FROM pg_stat_activity WHERE application_name LIKE 'qpq-server%'";
        let answer = self.postgres.sql_in(DATABASE, sql).await?;
        let mut words = answer.split_whitespace();
        let wal = words.next().context("a position")?.parse()?;
        let postgres =
            words.map(|pid| cpu(&format!("/proc/{pid}/stat"))).sum::<anyhow::Result<_>>()?;
        Ok(Used { process: cpu("/proc/self/stat")?, postgres, wal })
    }

    async fn empty(&self) -> anyhow::Result<()> {
        for sql in EMPTY.split(';') {
            self.postgres.sql_in(DATABASE, sql).await?;
        }
        Ok(())
    }

    /// Sends a single message to each of 1 000 accounts.
    async fn singles(&self, size: usize) -> anyhow::Result<Vec<(usize, Duration, Used)>> {
        let mut runs = Vec::new();
        for _ in 0..REPEATS {
            self.empty().await?;
            let (before, begun) = (self.used().await?, Instant::now());
            let mut tasks = JoinSet::new();
            for lane in 0..IN_FLIGHT {
                let (stores, sender) = (self.stores.clone(), self.identities[0]);
                let keys = self.identities[..1_000].iter().skip(lane).step_by(IN_FLIGHT);
                let keys: Vec<_> = keys.copied().collect();
                tasks.spawn(async move {
                    for recipient in keys {
                        enqueue(&stores, single(sender, recipient, size)).await?;
                    }
                    StoreResult::Ok(())
                });
            }
            tasks.join_all().await.into_iter().collect::<StoreResult<()>>()?;
            let elapsed = begun.elapsed();
            runs.push((1_000, elapsed, self.used().await? - before));
        }
        Ok(runs)
    }

    async fn sends(
        &self,
        group: u8,
        members: usize,
        size: usize,
    ) -> anyhow::Result<Vec<(usize, Duration, Used)>> {
        let mut runs = Vec::new();
        // The first run fills the caches of the connections, and is not counted.
        for n in 0..=REPEATS {
            self.empty().await?;
            let before = self.used().await?;
            let elapsed = self.send(group, size).await?;
            if n > 0 {
                runs.push((members, elapsed, self.used().await? - before));
            }
        }
        Ok(runs)
    }

    async fn send(&self, group: u8, size: usize) -> anyhow::Result<Duration> {
        let begun = Instant::now();
        let sent = self.stores.groups.send(self.message(group, size)).await?;
        let elapsed = begun.elapsed();
        let sent = sent.map_err(|refusal| anyhow::anyhow!("{refusal:?}"))?;
        anyhow::ensure!(sent.skipped == 0 && !sent.is_repeat, "{} skipped", sent.skipped);
        Ok(elapsed)
    }

    fn message(&self, group: u8, size: usize) -> GroupMessage {
        GroupMessage {
            group: GroupId::new([group; 16]),
            sender: AccountId(1),
            sender_key: self.identities[0],
            sender_device: None,
            recipients: GroupRecipients::All,
            payload: payload(size),
            payload_sha256: [7; 32],
            message_id: Some(MessageId::new(rand::random())),
            ttl: Duration::from_secs(86_400),
            now: now(),
            commit: None,
        }
    }

    /// Sends messages to all 10 000 members, and meanwhile single messages to a member and to an
    /// inbox outside the group.
    async fn delays(&self, size: usize) -> anyhow::Result<()> {
        self.empty().await?;
        for (what, recipient) in [("a member", 5_000), ("an inbox outside the group", 10_005)] {
            let (done, is_done) = watch::channel(false);
            let (stores, sender) = (self.stores.clone(), self.identities[10_001]);
            let recipient = self.identities[recipient];
            let singles = tokio::spawn(async move {
                let mut delays = Vec::new();
                while !*is_done.borrow() {
                    let begun = Instant::now();
                    enqueue(&stores, single(sender, recipient, 1 << 10)).await?;
                    delays.push(begun.elapsed());
                    sleep(Duration::from_millis(2)).await;
                }
                StoreResult::Ok(delays)
            });
            let mut sends = Vec::new();
            for _ in 0..REPEATS {
                sends.push(self.send(2, size).await?);
                sleep(Duration::from_millis(50)).await;
            }
            done.send(true)?;
            let mut delays = singles.await??;
            delays.sort();
            println!(
                "single messages to {what} during sends of {size} B to 10 000 ({:.0?} at most): \
                 median {:.1?}, at most {:.0?}, of {}",
                sends.iter().max().context("some")?,
                delays[delays.len() / 2],
                delays.last().context("some")?,
                delays.len(),
            );
        }
        Ok(())
    }
}

fn identity(hex: &str) -> anyhow::Result<IdentityKey> {
    let mut key = [0; 32];
    for (n, byte) in key.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&hex[2 * n..2 * n + 2], 16)?;
    }
    Ok(IdentityKey::new(key))
}

fn now() -> UnixMillis {
    let since = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    UnixMillis(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

fn payload(size: usize) -> Bytes {
    (0..size).map(|_| rand::random::<u8>()).collect::<Vec<_>>().into()
}

fn single(sender: IdentityKey, recipient: IdentityKey, size: usize) -> NewMessage {
    NewMessage {
        sender,
        recipient,
        channel: ChannelId::new([9; 16]),
        payload: payload(size),
        payload_sha256: [7; 32],
        message_id: Some(MessageId::new(rand::random())),
        now: now(),
        ttl: Duration::from_secs(86_400),
    }
}

async fn enqueue(stores: &Stores, message: NewMessage) -> StoreResult<()> {
    let inboxes = Arc::clone(&stores.inboxes);
    let outcomes = inboxes.enqueue(Batch::new(vec![message])).await?;
    assert!(matches!(outcomes[..], [Enqueued::Accepted(_)]), "{outcomes:?}");
    Ok(())
}

/// Returns the seconds of CPU time that a process has used.
fn cpu(stat: &str) -> anyhow::Result<f64> {
    let stat = fs::read_to_string(stat)?;
    let (_, fields) = stat.rsplit_once(')').context("a name")?;
    let fields: Vec<_> = fields.split_whitespace().collect();
    Ok((fields[11].parse::<f64>()? + fields[12].parse::<f64>()?) / TICKS)
}
