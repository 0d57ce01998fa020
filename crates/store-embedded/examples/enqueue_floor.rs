//! The cost of an enqueue, compared with the minimum: bare inserts with the same group commit,
//! through the same sqlx, alternating in one run and directory. Prints rates, CPU time and their
//! ratios.
//!
//! `cargo run --release -p qpq-store-embedded --example enqueue_floor [floor|inboxes|depth|groups]`
//! - `floor` (default): bare inserts against `Inboxes::enqueue`, without and with message ids;
//! - `inboxes`: enqueue and fetch with 10³ to 10⁶ inboxes; `depth`: with 1 to 10 000 messages in
//!   the inbox;
//! - `groups`: one message to each of 1 000 inboxes against one to a group of them.

#![allow(clippy::print_stdout, reason = "the program prints its measurements")]

use std::{path::Path, sync::Arc, time::Duration};

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike as _;
use qpq_domain::{
    AccountId, ChannelId, DeliveryLimits, GroupId, IdentityKey, MessageId, Seq, StoreLimits,
    UnixMillis,
};
use qpq_ports::{
    Ack, Batch, Enqueued, GroupMessage, GroupRecipients, NewGroup, NewMembers, NewMessage,
    PageLimit, ReadQuery, Reader, Stores, View,
};
use qpq_store_embedded::EmbeddedStore;
use sqlx::{
    ConnectOptions as _, Connection as _, SqliteConnection,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous},
};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinSet,
    time::Instant,
};

const PAYLOAD: usize = 1_024;
const IN_FLIGHT: u64 = 256;
const NOW: UnixMillis = UnixMillis(1_800_000_000_000);

#[tokio::main]
async fn main() {
    match std::env::args().nth(1).as_deref() {
        None | Some("floor") => floor().await,
        Some("inboxes") => inboxes().await,
        Some("depth") => depth().await,
        Some("groups") => groups().await,
        Some(other) => println!("{other}: neither floor nor inboxes nor depth nor groups"),
    }
}

// Measuring
// -----------------------------------------------------------------------------------------------

/// The cost of operations.
struct Cost {
    per_second: f64,
    cpu_micros: f64,
}

fn cpu() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_SELF).expect("supported");
    let micros = (usage.user_time() + usage.system_time()).num_microseconds();
    Duration::from_micros(u64::try_from(micros).expect("not negative"))
}

/// Runs `count` operations, [`IN_FLIGHT`] at a time.
async fn measure<F, O>(count: u64, operation: F) -> Cost
where
    F: Fn(u64) -> O + Clone + Send + 'static,
    O: Future<Output = ()> + Send,
{
    let (begun, cpu_before) = (Instant::now(), cpu());
    let mut tasks = JoinSet::new();
    for task in 0..IN_FLIGHT {
        let operation = operation.clone();
        tasks.spawn(async move {
            for n in (task..count).step_by(usize::try_from(IN_FLIGHT).expect("small")) {
                operation(n).await;
            }
        });
    }
    tasks.join_all().await;
    let (elapsed, cpu_used) = (begun.elapsed(), cpu() - cpu_before);
    Cost {
        per_second: count as f64 / elapsed.as_secs_f64(),
        cpu_micros: cpu_used.as_secs_f64() * 1e6 / count as f64,
    }
}

impl Cost {
    fn print(&self, what: &str, floor: &Self) {
        println!(
            "{what:<34} {:>8.0}/s {:>7.1} µs CPU   rate × {:.2}, CPU × {:.2}",
            self.per_second,
            self.cpu_micros,
            self.per_second / floor.per_second,
            self.cpu_micros / floor.cpu_micros
        );
    }
}

// The floor
// -----------------------------------------------------------------------------------------------

type BareJob = (Vec<u8>, oneshot::Sender<()>);

/// Starts a writer that appends rows, commits them in groups, and answers.
async fn bare_writer(path: &Path) -> mpsc::UnboundedSender<BareJob> {
    let mut connection = SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .pragma("cache_size", "-65536")
        .pragma("wal_autocheckpoint", "4096")
        .disable_statement_logging()
        .connect()
        .await
        .expect("connect");
    run(&mut connection, "CREATE TABLE IF NOT EXISTS bare (id INTEGER PRIMARY KEY, payload BLOB)")
        .await;
    let (jobs, mut waiting) = mpsc::unbounded_channel::<BareJob>();
    tokio::spawn(async move {
        while let Some(first) = waiting.recv().await {
            let mut batch = vec![first];
            while batch.len() < 1_024
                && let Ok(job) = waiting.try_recv()
            {
                batch.push(job);
            }
            run(&mut connection, "BEGIN IMMEDIATE").await;
            let mut answers = Vec::with_capacity(batch.len());
            for (payload, answer) in batch {
                sqlx::query("INSERT INTO bare (payload) VALUES (?1)")
                    .bind(payload)
                    .execute(&mut connection)
                    .await
                    .expect("insert");
                answers.push(answer);
            }
            run(&mut connection, "COMMIT").await;
            answers.into_iter().for_each(|answer| answer.send(()).expect("it waits"));
        }
    });
    jobs
}

async fn run(connection: &mut SqliteConnection, sql: &'static str) {
    sqlx::query(sql).execute(connection).await.expect("execute");
}

async fn floor() {
    const COUNT: u64 = 40_000;
    const INBOXES: u64 = 1_000;
    let directory = tempfile::tempdir_in(".").expect("a directory");
    let bare = bare_writer(&directory.path().join("bare.db")).await;
    let store = store_with(&directory.path().join("data"), INBOXES).await;
    let stores = store.stores();
    println!("{PAYLOAD} byte payloads, {IN_FLIGHT} in flight, {INBOXES} inboxes");
    for round in 0..4 {
        let jobs = bare.clone();
        let floor = measure(COUNT, move |_| {
            let jobs = jobs.clone();
            async move {
                let (answer, done) = oneshot::channel();
                jobs.send((vec![7; PAYLOAD], answer)).expect("the writer runs");
                done.await.expect("answered");
            }
        })
        .await;
        floor.print("bare inserts", &floor);
        for (what, ids) in [("enqueue", None), ("enqueue with message ids", Some(round * COUNT))] {
            enqueues(&stores, COUNT, INBOXES, ids).await.print(what, &floor);
            // Restores the state at the beginning of the round.
            empty(&stores, INBOXES).await;
        }
    }
    drop(stores);
    store.close().await;
}

// The store
// -----------------------------------------------------------------------------------------------

/// Opens a store with this number of accounts. Inserts them by SQL, because a million registrations
/// through the ports would take long.
async fn store_with(path: &Path, accounts: u64) -> EmbeddedStore {
    let delivery =
        DeliveryLimits { max_messages: u64::MAX, max_bytes: u64::MAX, ..DeliveryLimits::default() };
    let limits = StoreLimits { delivery, ..StoreLimits::default() };
    EmbeddedStore::open(path, limits).await.unwrap_or_else(|error| panic!("{error}")).close().await;
    let mut connection =
        SqliteConnectOptions::new().filename(path.join("qpq.db")).connect().await.expect("connect");
    for sql in [
        "WITH RECURSIVE n (id) AS (SELECT 1 UNION ALL SELECT id + 1 FROM n WHERE id < ?1)
         INSERT INTO account (id, username, identity, opaque_record, created_at)
         SELECT id, 'user' || id, unhex(printf('%064x', id)), zeroblob(192), 0 FROM n",
        "INSERT INTO inbox (id) SELECT id FROM account WHERE id <= ?1",
    ] {
        let bound = i64::try_from(accounts).expect("few enough");
        sqlx::query(sql).bind(bound).execute(&mut connection).await.expect("execute");
    }
    connection.close().await.expect("close");
    EmbeddedStore::open(path, limits).await.unwrap_or_else(|error| panic!("{error}"))
}

/// Returns the identity key of an account of [`store_with`], counted from 0.
fn identity(n: u64) -> IdentityKey {
    let mut bytes = [0; 32];
    bytes[24..].copy_from_slice(&(n + 1).to_be_bytes());
    IdentityKey::new(bytes)
}

fn message(to: u64, id: Option<u64>) -> NewMessage {
    NewMessage {
        sender: identity(0),
        recipient: identity(to),
        channel: ChannelId::DEFAULT,
        payload: vec![7; PAYLOAD].into(),
        payload_sha256: [7; 32],
        message_id: id.map(|id| MessageId::new((u128::from(id) << 64).to_be_bytes())),
        now: NOW,
        ttl: Duration::from_secs(30 * 24 * 60 * 60),
    }
}

/// Returns the inbox for message `n`, pseudo-randomly.
fn recipient(n: u64, inboxes: u64) -> u64 {
    n.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(31) % inboxes
}

async fn enqueues(stores: &Stores, count: u64, inboxes: u64, ids: Option<u64>) -> Cost {
    let port = Arc::clone(&stores.inboxes);
    measure(count, move |n| {
        let port = Arc::clone(&port);
        async move {
            let message = message(recipient(n, inboxes), ids.map(|first| first + n));
            let outcomes = port.enqueue(Batch::new(vec![message])).await.expect("enqueue");
            assert!(matches!(outcomes[..], [Enqueued::Accepted(_)]), "{outcomes:?}");
        }
    })
    .await
}

fn all(n: u64) -> ReadQuery {
    ReadQuery { reader: Reader::single(identity(n)), view: View::All }
}

async fn empty(stores: &Stores, inboxes: u64) {
    for n in 0..inboxes {
        let everything = Ack { up_to: Some(Seq(u64::MAX)), ..Ack::default() };
        stores.inboxes.ack(all(n), everything, NOW).await.expect("ack");
    }
}

/// Leases and completes one message.
async fn fetches(stores: &Stores, count: u64, inboxes: u64) -> Cost {
    let port = Arc::clone(&stores.inboxes);
    measure(count, move |n| {
        let port = Arc::clone(&port);
        async move {
            let limit = PageLimit { messages: 1, bytes: 4 << 20 };
            let lease = port.lease(all(recipient(n, inboxes)), limit, NOW).await.expect("lease");
            lease.complete(NOW).await.expect("complete");
        }
    })
    .await
}

async fn inboxes() {
    const COUNT: u64 = 40_000;
    let directory = tempfile::tempdir_in(".").expect("a directory");
    let mut floors: Option<(Cost, Cost, Cost)> = None;
    for inboxes in [1_000, 10_000, 100_000, 1_000_000] {
        let store = store_with(&directory.path().join(inboxes.to_string()), inboxes).await;
        let stores = store.stores();
        println!("{inboxes} inboxes");
        let active = enqueues(&stores, COUNT, 1_000, None).await;
        let spread = enqueues(&stores, COUNT, inboxes, None).await;
        let fetch = fetches(&stores, COUNT, inboxes).await;
        let (a, s, f) = floors.get_or_insert(copies(&active, &spread, &fetch));
        active.print("  enqueue to the same 1 000", a);
        spread.print("  enqueue to any", s);
        fetch.print("  fetch and complete one, of any", f);
        drop(stores);
        store.close().await;
    }
}

fn copies(a: &Cost, b: &Cost, c: &Cost) -> (Cost, Cost, Cost) {
    let copy = |cost: &Cost| Cost { ..*cost };
    (copy(a), copy(b), copy(c))
}

async fn depth() {
    const COUNT: u64 = 4_000;
    let directory = tempfile::tempdir_in(".").expect("a directory");
    let store = store_with(&directory.path().join("data"), 1_000).await;
    let stores = store.stores();
    let mut floors: Option<(Cost, Cost, Cost)> = None;
    let mut there = 0;
    for depth in [1, 10, 100, 1_000, 10_000] {
        // Each message has a payload of its own, so that no payload is stored once for several.
        let filling: Vec<_> = (there..depth).map(|_| message(0, None)).collect();
        for part in filling.chunks(500) {
            stores.inboxes.enqueue(Batch::new(part.to_vec())).await.expect("enqueue");
        }
        there = depth;
        println!("{depth} messages deep");
        let port = Arc::clone(&stores.inboxes);
        let peek = measure(COUNT, move |_| {
            let port = Arc::clone(&port);
            async move {
                let limit = PageLimit { messages: 1, bytes: 4 << 20 };
                port.peek(all(0), Seq::ZERO, limit, NOW).await.expect("peek");
            }
        })
        .await;
        let enqueue = enqueues(&stores, COUNT, 1, None).await;
        let fetch = fetches(&stores, COUNT, 1).await;
        let (p, e, f) = floors.get_or_insert(copies(&peek, &enqueue, &fetch));
        peek.print("  peek at one", p);
        enqueue.print("  enqueue", e);
        fetch.print("  fetch and complete one", f);
        // Concurrent fetches of one inbox often find its message leased and fetch nothing. Removes
        // the messages that are left because of that.
        let page = PageLimit { messages: u32::MAX, bytes: usize::MAX };
        let left = stores.inboxes.peek(all(0), Seq::ZERO, page, NOW).await.expect("peek").envelopes;
        if let Some(last) =
            left.len().checked_sub(usize::try_from(depth).expect("small")).filter(|n| *n > 0)
        {
            let ack = Ack { up_to: Some(left[last - 1].seq), ..Ack::default() };
            stores.inboxes.ack(all(0), ack, NOW).await.expect("ack");
        }
    }
    drop(stores);
    store.close().await;
}

// Groups
// -----------------------------------------------------------------------------------------------

const GROUP: GroupId = GroupId::new([9; 16]);

/// Opens a store with a group of this number of members.
async fn store_with_group(path: &Path, members: u64) -> EmbeddedStore {
    let store = store_with(path, members).await;
    let group = NewGroup {
        id: GROUP,
        creator: AccountId(1),
        members: NewMembers::Listed((0..members).map(identity).collect()),
        name: String::new(),
        description: String::new(),
        now: NOW,
    };
    let created = store.stores().groups.create(group).await.expect("create");
    assert!(created.is_ok(), "{created:?}");
    store
}

async fn send_to_group(stores: &Stores, size: usize, id: Option<u64>) {
    let message = message(0, id);
    let message = GroupMessage {
        group: GROUP,
        sender: AccountId(1),
        sender_key: message.sender,
        sender_device: None,
        recipients: GroupRecipients::All,
        payload: vec![7; size].into(),
        payload_sha256: message.payload_sha256,
        message_id: message.message_id,
        ttl: message.ttl,
        now: NOW,
        commit: None,
    };
    let sent = stores.groups.send(message).await.expect("send").expect("a member");
    assert_eq!(sent.skipped, 0);
}

/// Runs an operation a number of times. Prints its time, and the CPU time for each recipient.
async fn repeat<O: Future<Output = ()>>(
    what: &str,
    times: u64,
    recipients: u64,
    operation: impl Fn(u64) -> O,
) {
    let (mut longest, mut sum, cpu_before) = (Duration::ZERO, Duration::ZERO, cpu());
    for n in 0..times {
        let begun = Instant::now();
        operation(n).await;
        let elapsed = begun.elapsed();
        (longest, sum) = (longest.max(elapsed), sum + elapsed);
    }
    let micros = (cpu() - cpu_before).as_secs_f64() * 1e6 / (times * recipients) as f64;
    let mean = sum / u32::try_from(times).expect("few");
    println!("  {what:<34} {mean:>10.1?}, {longest:>10.1?} at most, {micros:>6.1} µs CPU each");
}

/// Acknowledges all messages in all inboxes.
async fn acks(stores: &Stores, inboxes: u64) {
    let port = Arc::clone(&stores.inboxes);
    measure(inboxes, move |n| {
        let port = Arc::clone(&port);
        async move {
            let everything = Ack { up_to: Some(Seq(u64::MAX)), ..Ack::default() };
            port.ack(all(n), everything, NOW).await.expect("ack");
        }
    })
    .await;
}

async fn groups() {
    let directory = tempfile::tempdir_in(".").expect("a directory");
    for (members, sizes) in [(1_000, &[256, 1_024, 65_536][..]), (10_000, &[1_024])] {
        let path = directory.path().join(members.to_string());
        let store = store_with_group(&path, members).await;
        let stores = store.stores();
        for size in sizes.iter().copied() {
            println!("{members} recipients, {size} bytes");
            repeat("single messages", 5, members, |_| async {
                let port = Arc::clone(&stores.inboxes);
                measure(members, move |n| {
                    let port = Arc::clone(&port);
                    async move {
                        let message =
                            NewMessage { payload: vec![7; size].into(), ..message(n, None) };
                        let outcomes = port.enqueue(Batch::new(vec![message])).await;
                        let outcomes = outcomes.expect("enqueue");
                        assert!(matches!(outcomes[..], [Enqueued::Accepted(_)]), "{outcomes:?}");
                    }
                })
                .await;
            })
            .await;
            let first = size as u64 * 100;
            repeat("one message to the group", 5, members, |n| {
                send_to_group(&stores, size, Some(first + n))
            })
            .await;
            repeat("the same, repeated", 5, members, |n| {
                send_to_group(&stores, size, Some(first + n))
            })
            .await;
            repeat("acks of 5 and 5 each", 1, members, |_| acks(&stores, members)).await;
            for n in 5..10 {
                send_to_group(&stores, size, Some(first + n)).await;
            }
            repeat("acks of 5 that are stored once", 1, members, |_| acks(&stores, members)).await;
        }
        drop(stores);
        store.close().await;
    }
}
