//! Measures the transaction that commits messages, and the script that pushes them, each alone.
//! The measured times are lower bounds of the cluster's. Only the load generator enables this
//! module.

use std::time::Duration;

use qpq_domain::{ChannelId, IdentityKey, MessageId, Seq, StoreId, UnixMillis};
use qpq_ports::{Admission, Envelope, NewAccount, NewMessage, PageLimit, StoreResult, View};
use tokio::{task::JoinSet, time::Instant};

use crate::{
    COMMITTERS, Clocks, Config, ConnectError,
    inboxes::Accept,
    postgres::{self, ClusterMark, Database},
    redis::{
        Redis,
        queue::{Freshness, Push, QueueAnswer, QueueRead, Queued, ReaderId, State},
    },
    time::Time,
};

/// An arbitrary history.
const STORE: StoreId = StoreId::new([0; 16]);

/// The result of a measurement.
#[derive(Clone, Copy, Debug)]
pub struct Floor {
    pub messages: u64,
    pub elapsed: Duration,
}

/// Registers `count` accounts, whose inboxes receive the messages.
pub async fn inboxes(
    stores: &qpq_ports::Stores,
    count: u8,
    now: UnixMillis,
) -> StoreResult<Vec<IdentityKey>> {
    let mut inboxes = Vec::new();
    for n in 0..count {
        let mut key = [n; 32];
        // Spread over the committers as real keys are.
        key[0] = n.reverse_bits();
        let identity = IdentityKey::new(key);
        let username = qpq_domain::Username::parse(&format!("floor{n}")).expect("a username");
        stores
            .accounts
            .register(NewAccount {
                username,
                identity,
                opaque_record: vec![0; 192],
                admission: Admission::Open,
                now,
            })
            .await?;
        inboxes.push(identity);
    }
    Ok(inboxes)
}

/// Commits batches of `batch` messages of `payload` bytes, with one task for each committer of an
/// edge.
pub async fn transactions(
    config: &Config,
    inboxes: &[IdentityKey],
    batch: usize,
    payload: usize,
    duration: Duration,
) -> Result<StoreResult<Floor>, ConnectError> {
    let database = Database::new(
        postgres::options(config)?,
        config.postgres_connections,
        config.postgres_timeout,
    );
    let (start, limits) = (Instant::now(), config.limits.delivery);
    let mut tasks = JoinSet::new();
    for committer in 0..COMMITTERS {
        let (database, inboxes) = (database.clone(), inboxes.to_vec());
        let time = Time::new(Clocks::default());
        let mark = ClusterMark::new(config.opaque_setup);
        tasks.spawn(async move {
            let mut messages = 0;
            while start.elapsed() < duration {
                let batch: Vec<NewMessage> = (0..batch)
                    .map(|n| message(&inboxes, committer + COMMITTERS * n, payload))
                    .collect();
                let accept = Accept { messages: &batch, limits: &limits, time: &time, mark: &mark };
                database.run(&accept).await?;
                messages += batch.len() as u64;
            }
            Ok(messages)
        });
    }
    let messages = tasks.join_all().await.into_iter().sum::<StoreResult<u64>>();
    Ok(messages.map(|messages| Floor { messages, elapsed: start.elapsed() }))
}

/// Pushes messages one by one to queues that are loaded, `in_flight` at a time.
pub async fn pushes(
    config: &Config,
    inboxes: &[IdentityKey],
    in_flight: usize,
    payload: usize,
    duration: Duration,
) -> Result<StoreResult<Floor>, ConnectError> {
    let redis = Redis::connect(config).await?;
    let start = Instant::now();
    let mut tasks = JoinSet::new();
    for task in 0..in_flight {
        let (redis, inbox) = (redis.clone(), inboxes[task % inboxes.len()]);
        tasks.spawn(async move {
            let mut messages = 0;
            while start.elapsed() < duration {
                // A full queue is dropped, as in production. It is loaded again after every 128
                // messages.
                if messages % 128 == 0 {
                    load_empty(
                        &redis,
                        ReaderId::single(inbox),
                        State { store_id: STORE, head: messages, removals: messages },
                    )
                    .await?;
                }
                messages += 1;
                let messages = vec![queued(messages, payload)];
                let push = Push { inbox, devices: None, view: View::All, messages };
                redis.push(&STORE, &[push]).await?;
            }
            Ok(messages)
        });
    }
    let messages = tasks.join_all().await.into_iter().sum::<StoreResult<u64>>();
    Ok(messages.map(|messages| Floor { messages, elapsed: start.elapsed() }))
}

async fn load_empty(redis: &Redis, reader: ReaderId, state: State) -> StoreResult<()> {
    let limit = PageLimit { messages: 0, bytes: 0 };
    let query = QueueRead {
        reader: &reader,
        view: View::All,
        state,
        accept: Freshness::AtLeast,
        after: Seq::ZERO,
        limit,
        now: UnixMillis::default(),
        term: None,
        edge: None,
    };
    match redis.read(query).await? {
        QueueAnswer::NotLoaded(permit) => redis.load(&reader, permit, state, &[]).await,
        QueueAnswer::Ahead(_) | QueueAnswer::Page(_) => Ok(()),
    }
}

fn message(inboxes: &[IdentityKey], n: usize, payload: usize) -> NewMessage {
    NewMessage {
        sender: inboxes[(n + 1) % inboxes.len()],
        recipient: inboxes[n % inboxes.len()],
        channel: ChannelId::DEFAULT,
        payload: vec![7; payload].into(),
        payload_sha256: [7; 32],
        message_id: Some(MessageId::new(rand::random())),
        now: UnixMillis(1_800_000_000_000),
        ttl: Duration::from_secs(86_400),
    }
}

fn queued(seq: u64, payload: usize) -> Queued {
    Queued {
        envelope: Envelope {
            seq: Seq(seq),
            channel: ChannelId::DEFAULT,
            payload: vec![7; payload].into(),
            enqueued_at: UnixMillis(1_800_000_000_000),
        },
        expires_at: UnixMillis(1_800_086_400_000),
    }
}
