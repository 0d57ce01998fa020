//! Devices over several edges: registrations, reads, completions and revocations at different
//! edges, with losses in Redis.

use std::{sync::Arc, time::Duration};

use futures_util::{StreamExt as _, future::join_all};
use qpq_domain::{
    ChannelId, DeliveryLimits, DeviceId, DeviceKey, IdentityKey, MAX_DEVICES, Seq, StoreLimits,
    UnixMillis,
};
use qpq_ports::{
    AccountEvent, Batch, CertifiedKey, DeviceRegistration, DeviceRevocation, Enqueued, HybridKey,
    Lease, NewDevice, NewMessage, PageLimit, ReadError, ReadQuery, Reader, Stores, View,
    transfer::{Cell, Digest, Digests, Row, Table, sha256},
};
use qpq_store_cluster::{ClusterStore, Config, Import, ImportError};
use sqlx::{Connection as _, PgConnection};
use tokio::{task::JoinSet, time::timeout};

use crate::{
    backend::{Process, Servers, edge, eventually},
    people::{HOUR, NOW, Person, open, person, token},
};

const EVERYTHING: PageLimit = PageLimit { messages: u32::MAX, bytes: usize::MAX };

/// Edges of one cluster, and a person with an account there.
struct World<const N: usize> {
    servers: Arc<Servers>,
    config: Config,
    edges: [ClusterStore; N],
    alice: Person,
}

impl<const N: usize> World<N> {
    async fn with(delivery: DeliveryLimits) -> Self {
        let servers = Servers::start().await;
        let config = servers.cluster(StoreLimits { delivery, ..StoreLimits::default() }).await;
        let edges = join_all((0..N).map(|_| edge(&config))).await;
        let edges: [ClusterStore; N] = edges.try_into().expect("as many");
        let alice = person(&edges[0].stores(), 1).await;
        Self { servers, config, edges, alice }
    }

    async fn new() -> Self {
        Self::with(DeliveryLimits::default()).await
    }

    fn stores(&self) -> [Stores; N] {
        std::array::from_fn(|n| self.edges[n].stores())
    }

    async fn sql(&self, sql: &str) -> String {
        self.servers.postgres.sql_in(&self.config.namespace, sql).await.expect("Postgres")
    }

    async fn send(&self, stores: &Stores, texts: &[&str]) {
        let messages = texts.iter().map(|text| message(self.alice, text)).collect();
        let outcomes = stores.inboxes.enqueue(Batch::new(messages)).await.expect("enqueue");
        assert!(outcomes.iter().all(|outcome| matches!(outcome, Enqueued::Accepted(_))));
    }

    async fn register(&self, stores: &Stores, n: u8) -> DeviceRegistration {
        stores.devices.register(device(self.alice, n)).await.expect("register")
    }

    async fn is_registered(&self, stores: &Stores, n: u8) {
        assert_eq!(self.register(stores, n).await, DeviceRegistration::Registered);
    }

    async fn revoke(&self, stores: &Stores, n: u8) -> DeviceRevocation {
        stores.devices.revoke(self.alice.account, id(n), NOW).await.expect("revoke")
    }

    fn single(&self) -> ReadQuery {
        ReadQuery { reader: Reader::single(self.alice.identity), view: View::All }
    }

    fn of(&self, n: u8) -> ReadQuery {
        let reader = Reader { inbox: self.alice.identity, device: Some(id(n)) };
        ReadQuery { reader, view: View::All }
    }

    async fn lease(&self, stores: &Stores, read: ReadQuery) -> Box<dyn Lease> {
        stores.inboxes.lease(read, EVERYTHING, NOW).await.expect("lease")
    }

    async fn waiting(&self, stores: &Stores, read: ReadQuery) -> Vec<String> {
        let page = stores.inboxes.peek(read, Seq::ZERO, EVERYTHING, NOW).await.expect("peek");
        let text = |payload: &[u8]| String::from_utf8(payload.to_vec()).expect("text");
        page.envelopes.iter().map(|envelope| text(&envelope.payload)).collect()
    }
}

fn id(n: u8) -> DeviceId {
    DeviceId::new([n; 16])
}

fn device(person: Person, n: u8) -> NewDevice {
    let mut key = [n; 32];
    key[0] = 0xdd;
    NewDevice {
        account: person.account,
        device: id(n),
        name: format!("device {n}"),
        key: Some(CertifiedKey { key: DeviceKey::new(key), proof: [n; 64] }),
        session: token(n),
        now: NOW,
    }
}

fn message(to: Person, text: &str) -> NewMessage {
    NewMessage {
        sender: to.identity,
        recipient: to.identity,
        channel: ChannelId::DEFAULT,
        payload: text.to_owned().into(),
        payload_sha256: [0; 32],
        message_id: None,
        now: NOW,
        ttl: 10_000 * HOUR,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_of_the_single_reader_is_void_after_a_registration_at_another_edge() {
    let world = World::<2>::new().await;
    let [a, b] = world.stores();
    world.send(&a, &["1", "2"]).await;
    let lease = world.lease(&a, world.single()).await;
    let mut wake = a.wakes.subscribe(&world.of(1));
    assert_eq!(world.waiting(&a, world.of(1)).await, [""; 0], "all is leased");
    world.is_registered(&b, 1).await;
    timeout(Duration::from_secs(60), wake.woken()).await.expect("it inherits what was leased");
    lease.complete(NOW).await.expect("complete");
    for stores in [&a, &b] {
        assert_eq!(world.waiting(stores, world.of(1)).await, ["1", "2"]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_of_a_registration_that_was_replaced_at_another_edge_completes_nothing() {
    let world = World::<2>::new().await;
    let [a, b] = world.stores();
    for n in [1, 2] {
        world.is_registered(&a, n).await;
    }
    world.send(&a, &["1", "2"]).await;
    let lease = world.lease(&a, world.of(2)).await;
    assert_eq!(lease.page().envelopes.len(), 2);
    world.revoke(&b, 1).await;
    world.revoke(&b, 2).await;
    world.is_registered(&b, 2).await;
    lease.complete(NOW).await.expect("complete");
    for stores in [&b, &a] {
        assert_eq!(world.waiting(stores, world.of(2)).await, ["1", "2"]);
    }
    world.lease(&a, world.of(2)).await.complete(NOW).await.expect("complete");
    assert_eq!(world.waiting(&b, world.of(2)).await, [""; 0]);
    assert_eq!(world.sql("SELECT count(*) FROM message").await, "0");
}

/// Redis loses everything, or is rolled back to its state before a completion.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_forgets_a_completion_returns_nothing_twice_and_hides_nothing() {
    let world = World::<2>::new().await;
    let [a, b] = world.stores();
    for n in [1, 2] {
        world.is_registered(&a, n).await;
    }
    world.send(&a, &["1", "2"]).await;
    for n in [1, 2] {
        assert_eq!(world.waiting(&a, world.of(n)).await, ["1", "2"], "its queue is loaded");
    }
    let before = world.servers.redis.snapshot().await.expect("a dump");
    world.lease(&a, world.of(1)).await.complete(NOW).await.expect("complete");
    world.servers.redis.roll_back_to(&before).await.expect("the dump");
    for stores in [&a, &b] {
        eventually("Redis to be back", || async {
            let read = stores.inboxes.peek(world.of(1), Seq::ZERO, EVERYTHING, NOW).await;
            read.is_ok_and(|page| page.envelopes.is_empty())
        })
        .await;
        assert_eq!(world.waiting(stores, world.of(2)).await, ["1", "2"]);
    }
    world.send(&b, &["3"]).await;
    world.lease(&b, world.of(2)).await.complete(NOW).await.expect("complete");
    world.servers.redis.flush_all().await.expect("Redis");
    for stores in [&b, &a] {
        assert_eq!(world.waiting(stores, world.of(1)).await, ["3"]);
        assert_eq!(world.waiting(stores, world.of(2)).await, [""; 0]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_edge_that_dies_between_a_commit_and_redis_repeats_nothing() {
    let world = World::<1>::new().await;
    let [b] = world.stores();
    for n in [1, 2] {
        world.is_registered(&b, n).await;
    }
    let dying = Process::start(&world.config).await;
    let a = dying.store.stores();
    world.send(&b, &["1", "2"]).await;
    assert_eq!(world.waiting(&b, world.of(1)).await, ["1", "2"]);
    let lease = world.lease(&a, world.of(1)).await;
    assert_eq!(lease.page().envelopes.len(), 2);
    world.servers.redis.freeze();
    let completing = tokio::spawn(lease.complete(NOW));
    eventually("the completion in Postgres", || async {
        world.sql("SELECT max(upto) FROM device").await == "2"
    })
    .await;
    dying.crash().await;
    completing.abort();
    world.servers.redis.thaw();
    eventually("Redis to be back", || async {
        let read = b.inboxes.peek(world.of(1), Seq::ZERO, EVERYTHING, NOW).await;
        read.is_ok_and(|page| page.envelopes.is_empty())
    })
    .await;
    world.send(&b, &["3"]).await;
    assert_eq!(world.waiting(&b, world.of(1)).await, ["3"]);
    assert_eq!(world.waiting(&b, world.of(2)).await, ["1", "2", "3"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn registrations_at_three_edges_fill_the_account_exactly() {
    let world = World::<3>::new().await;
    let stores = world.stores();
    let mut tasks = JoinSet::new();
    for n in 0..2 * u8::try_from(MAX_DEVICES).expect("few") {
        let devices = Arc::clone(&stores[usize::from(n) % 3].devices);
        let new = device(world.alice, n);
        tasks.spawn(async move { devices.register(new).await.expect("register") });
    }
    let outcomes = tasks.join_all().await;
    let count = |of| outcomes.iter().filter(|outcome| **outcome == of).count();
    assert_eq!(count(DeviceRegistration::Registered), MAX_DEVICES);
    assert_eq!(count(DeviceRegistration::Full), MAX_DEVICES);
    let listed = stores[1].devices.list(world.alice.account).await.expect("list");
    assert_eq!(listed.len(), MAX_DEVICES);
    let counted = world.sql("SELECT devices FROM inbox WHERE devices > 0").await;
    assert_eq!(counted, MAX_DEVICES.to_string());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registration_counts_at_every_edge_immediately() {
    let world = World::<2>::new().await;
    let [a, b] = world.stores();
    world.send(&a, &["first"]).await;
    assert_eq!(world.waiting(&b, world.of(0)).await, ["first"], "the single reader's");
    for n in 0..10 {
        let (at, other) = if n % 2 == 0 { (&a, &b) } else { (&b, &a) };
        world.is_registered(at, n).await;
        let read = other.inboxes.peek(world.single(), Seq::ZERO, EVERYTHING, NOW).await;
        assert!(matches!(read, Err(ReadError::DeviceRequired)), "{read:?}");
        let expected: &[&str] = if n == 0 { &["first"] } else { &[] };
        assert_eq!(world.waiting(other, world.of(n)).await, expected);
        assert!(matches!(world.revoke(other, n).await, DeviceRevocation::Revoked { .. }));
        let read = at.inboxes.peek(world.single(), Seq::ZERO, EVERYTHING, NOW).await;
        assert_eq!(read.expect("the single reader's").envelopes.len(), usize::from(n == 0));
        if n == 0 {
            world.lease(at, world.single()).await.complete(NOW).await.expect("complete");
        }
    }
}

/// The queue of the single reader is loaded, and a call waits for it, while the first device is
/// registered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registration_while_another_edge_has_the_queue_loaded_loses_nothing() {
    let world = World::<2>::new().await;
    let [a, b] = world.stores();
    world.send(&b, &["1"]).await;
    let mut wake = a.wakes.subscribe(&world.of(1));
    assert_eq!(world.waiting(&a, world.of(1)).await, ["1"]);
    world.is_registered(&b, 1).await;
    world.send(&b, &["2"]).await;
    timeout(Duration::from_secs(60), wake.woken()).await.expect("a wake");
    for stores in [&a, &b] {
        assert_eq!(world.waiting(stores, world.of(1)).await, ["1", "2"]);
    }
    world.send(&a, &["3"]).await;
    world.lease(&b, world.of(1)).await.complete(NOW).await.expect("complete");
    assert_eq!(world.waiting(&a, world.of(1)).await, [""; 0]);
    world.send(&a, &["4"]).await;
    world.revoke(&a, 1).await;
    for stores in [&a, &b] {
        assert_eq!(world.waiting(stores, world.single()).await, ["4"], "an old queue is not used");
    }
}

/// Two edges accept many messages while devices are registered at both. Every device gets a suffix
/// of the stream without a gap.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn devices_registered_during_sends_at_two_edges_miss_no_later_message() {
    const MESSAGES: usize = 60;
    let world = World::<2>::new().await;
    let [a, b] = world.stores();
    let mut sending = JoinSet::new();
    for stores in [a.clone(), b.clone()] {
        let alice = world.alice;
        sending.spawn(async move {
            for n in 0..MESSAGES / 2 {
                let batch = Batch::new(vec![message(alice, &n.to_string())]);
                stores.inboxes.enqueue(batch).await.expect("enqueue");
            }
        });
    }
    for n in 1..=6 {
        world.is_registered(if n % 2 == 0 { &a } else { &b }, n).await;
        // Loads the queue.
        world.waiting(if n % 2 == 0 { &b } else { &a }, world.of(n)).await;
    }
    sending.join_all().await;
    for n in 1..=6 {
        for stores in [&a, &b] {
            let read = stores.inboxes.peek(world.of(n), Seq::ZERO, EVERYTHING, NOW).await;
            let page = read.expect("peek");
            let seqs: Vec<_> = page.envelopes.iter().map(|envelope| envelope.seq.0).collect();
            let expected: Vec<_> = (1..=MESSAGES as u64).collect();
            assert!(expected.ends_with(&seqs), "device {n}: {seqs:?}");
            assert!(n > 1 || seqs == expected, "the first one inherits: {seqs:?}");
        }
    }
}

/// More messages wait for a device than fit a queue, so they are read from Postgres.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_inbox_is_read_by_each_device_on_its_own_position() {
    const MESSAGES: usize = 600;
    let world = World::<2>::new().await;
    let [a, b] = world.stores();
    for n in [1, 2] {
        world.is_registered(&a, n).await;
    }
    let texts: Vec<_> = (1..=MESSAGES).map(|n| n.to_string()).collect();
    for texts in texts.chunks(200) {
        world.send(&a, &texts.iter().map(String::as_str).collect::<Vec<_>>()).await;
    }
    let limit = PageLimit { messages: 250, bytes: usize::MAX };
    let mut got = Vec::new();
    for stores in [&a, &b, &a] {
        let lease = stores.inboxes.lease(world.of(1), limit, NOW).await.expect("lease");
        got.extend(lease.page().envelopes.iter().map(|envelope| envelope.seq.0));
        lease.complete(NOW).await.expect("complete");
    }
    assert_eq!(got, (1..=MESSAGES as u64).collect::<Vec<_>>());
    assert_eq!(world.waiting(&b, world.of(1)).await, [""; 0]);
    world.send(&b, &["last"]).await;
    assert_eq!(world.waiting(&a, world.of(1)).await, ["last"], "its queue is small");
    let ack = qpq_ports::Ack { up_to: Some(Seq(599)), ..Default::default() };
    assert_eq!(b.inboxes.ack(world.of(2), ack, NOW).await.expect("ack"), 599);
    assert_eq!(world.waiting(&a, world.of(2)).await, ["600", "last"]);
    assert_eq!(world.sql("SELECT messages || '/' || bytes FROM inbox").await, "2/7");
    assert_eq!(world.sql("SELECT count(*) FROM message").await, "2");
}

/// Connects to the database as an edge of an earlier release does.
async fn older_edge(config: &Config) -> PgConnection {
    let mut connection = PgConnection::connect(&config.postgres.url).await.expect("Postgres");
    sqlx::query("SET application_name = 'qpq-server'")
        .execute(&mut connection)
        .await
        .expect("a name");
    connection
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_device_is_registered_while_an_older_edge_is_connected_and_none_starts_afterwards() {
    let world = World::<1>::new().await;
    let [a] = world.stores();
    let older = older_edge(&world.config).await;
    let fingerprint = "SELECT encode(opaque_setup, 'hex') FROM cluster";
    assert_eq!(world.register(&a, 1).await, DeviceRegistration::OlderEdges);
    assert_eq!(world.sql(fingerprint).await, "07".repeat(32));
    assert_eq!(world.waiting(&a, world.single()).await, [""; 0], "nothing is registered");
    older.close().await.expect("closed");
    eventually("the older edge to be away", || async {
        world.register(&a, 1).await != DeviceRegistration::OlderEdges
    })
    .await;
    assert_eq!(world.register(&a, 1).await, DeviceRegistration::Repeated);
    // An edge of an earlier release compares this with its own fingerprint.
    assert_ne!(world.sql(fingerprint).await, "07".repeat(32));
    let marked = "SELECT opaque_setup = sha256('qpq/devices/1' || decode(repeat('07', 32), 'hex'))
                    FROM cluster";
    assert_eq!(world.sql(marked).await, "t");
    edge(&world.config).await.close().await;
    let other = Config { opaque_setup: [8; 32], ..world.config.clone() };
    let refused = ClusterStore::connect(&other).await.expect_err("another cluster's");
    assert!(matches!(refused, qpq_store_cluster::ConnectError::OtherCluster), "{refused}");
    qpq_store_cluster::Operator::connect(&world.config).await.expect("the operator's");
    // In a marked cluster, the connection of an older edge prevents no registration.
    let _older = older_edge(&world.config).await;
    world.is_registered(&a, 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_is_bound_and_ended_at_every_edge() {
    let world = World::<3>::new().await;
    let [a, b, c] = world.stores();
    let sessions = [&a, &b, &c].map(|stores| Arc::clone(&stores.sessions));
    let bound = async |edge: usize| {
        let found = sessions[edge].find(&token(1)).await.expect("find");
        found.map(|session| session.device)
    };
    open(&a, 1, world.alice).await;
    for edge in 0..2 {
        assert_eq!(bound(edge).await, Some(None), "the edge has a copy now");
    }
    world.is_registered(&a, 1).await;
    assert_eq!(bound(0).await, Some(Some(id(1))));
    assert_eq!(bound(2).await, Some(Some(id(1))), "Redis has no old copy");
    eventually("the other edge to drop its copy", || async { bound(1).await == Some(Some(id(1))) })
        .await;
    assert_eq!(world.revoke(&b, 1).await, DeviceRevocation::Revoked { ended_sessions: 1 });
    assert_eq!(bound(1).await, None);
    for edge in [0, 2] {
        eventually("the session to be over", || async { bound(edge).await.is_none() }).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_of_devices_is_published_to_other_edges() {
    let world = World::<2>::new().await;
    let [a, b] = world.stores();
    let mut events = b.account_events.listen();
    let event = (world.alice.identity, AccountEvent::DevicesChanged);
    // A subscription takes effect after some time.
    loop {
        a.account_events.publish(&event.0, event.1);
        if let Ok(received) = timeout(Duration::from_millis(100), events.next()).await {
            assert_eq!(received, Some(event));
            return;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_absent_device_is_moved_in_bounded_steps() {
    const MESSAGES: u64 = 600;
    let limits =
        DeliveryLimits { max_messages: 1_000, sender_share: 1, ..DeliveryLimits::default() };
    let later = NOW.plus(limits.device_absence).plus(HOUR);
    let world = World::<2>::with(limits).await;
    let [a, b] = world.stores();
    for n in [1, 2] {
        world.is_registered(&a, n).await;
    }
    for _ in 0..MESSAGES / 100 {
        world.send(&a, &["x"; 100]).await;
    }
    let inboxes = Arc::clone(&a.inboxes);
    let peek =
        async |n, now: UnixMillis| inboxes.peek(world.of(n), Seq::ZERO, EVERYTHING, now).await;
    assert_eq!(peek(1, later).await.expect("peek").envelopes.len(), 600, "it is there");
    let clock = later.0.to_string();
    world.servers.set_postgres_clock(&world.config.namespace, &clock).await;
    let (mut steps, mut moved): (Vec<u64>, Vec<IdentityKey>) = (Vec::new(), Vec::new());
    loop {
        let stores = if steps.len() % 2 == 0 { &a } else { &b };
        let swept = stores.maintenance.sweep(later).await.expect("sweep");
        moved.extend(swept.moved);
        if swept.rows == 0 {
            break;
        }
        steps.push(swept.rows);
    }
    // All messages still wait for device 1, so none is removed.
    assert_eq!((steps.as_slice(), moved), (&[1, 1, 1][..], vec![world.alice.identity]));
    assert_eq!(world.sql("SELECT min(upto) || '/' || max(upto) FROM device").await, "0/600");
    assert!(matches!(peek(2, later).await, Err(ReadError::PositionLost)));
    b.devices.confirm_position(world.alice.account, id(2)).await.expect("confirm");
    assert_eq!(peek(2, later).await.expect("peek").envelopes.len(), 0);
    assert_eq!(peek(1, later).await.expect("peek").envelopes.len(), 600);
}

/// The rows of a single node with one account that has two devices, and their canonical forms.
fn node() -> Vec<(Table, Vec<Row>, Vec<Row>)> {
    let (number, bytes) = (Cell::Number, |n: u8, length| Cell::Bytes(vec![n; length]));
    let text = |text: &str| Cell::Text(text.into());
    let key = || bytes(9, 32);
    let device = |n: u8, upto| {
        let rest = vec![
            bytes(n, 16),
            text("phone"),
            if n == 1 { bytes(11, 32) } else { Cell::Nothing },
            if n == 1 { bytes(12, 64) } else { Cell::Nothing },
            number(5),
            number(6),
            number(upto),
            number(0),
        ];
        let place = i64::from(n);
        (
            [vec![number(40 + place), number(7)], rest.clone()].concat(),
            [vec![key(), number(place)], rest].concat(),
        )
    };
    let (one, two) = (device(1, 1), device(2, 0));
    let message = |seq: i64| {
        let rest = vec![
            number(seq),
            number(i64::MAX),
            number(1),
            Cell::Bytes(Vec::new()),
            bytes(1, 32),
            Cell::Nothing,
            bytes(2, 32),
        ];
        let payload = format!("text {seq}").into_bytes();
        let row = [vec![number(seq), number(7)], rest.clone(), vec![Cell::Bytes(payload.clone())]];
        (row.concat(), [vec![key()], rest, vec![Cell::Bytes(sha256(&payload))]].concat())
    };
    let (first, second) = (message(1), message(2));
    let account = vec![text("node"), key(), bytes(1, 192), number(1)];
    let inbox = vec![number(2), number(2), number(12), number(i64::MAX)];
    let of = |owner: Cell, rest: &[Cell]| [vec![owner], rest.to_vec()].concat();
    vec![
        (Table::Account, vec![of(number(7), &account)], vec![account]),
        (Table::Inbox, vec![of(number(7), &inbox)], vec![of(key(), &inbox)]),
        (Table::Message, vec![first.0, second.0], vec![first.1, second.1]),
        (
            Table::HybridKey,
            vec![vec![number(7), bytes(3, 9), bytes(4, 64)]],
            vec![vec![key(), bytes(3, 9), bytes(4, 64)]],
        ),
        (Table::Device, vec![one.0, two.0], vec![one.1, two.1]),
        (
            Table::DeviceCompleted,
            vec![vec![number(7), number(2), bytes(2, 16)]],
            vec![vec![key(), number(2), bytes(2, 16)]],
        ),
        (
            Table::DeviceKey,
            vec![vec![bytes(11, 32), number(7), bytes(1, 16)]],
            vec![vec![bytes(11, 32), key(), bytes(1, 16)]],
        ),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_imported_node_keeps_its_devices_and_needs_edges_that_know_them() {
    let world = World::<1>::new().await;
    let [a] = world.stores();
    let mut expected = Digests::default();
    for (table, _, canonical) in node() {
        let mut digest = Digest::default();
        canonical.iter().for_each(|row| digest.add(row));
        expected.set(table, digest);
    }
    let mut import = Import::connect(&world.config).await.expect("Postgres");
    import.begin(&expected).await.expect("begin");
    for (table, rows, _) in node() {
        import.put(table, &rows).await.expect("put");
    }
    let older = older_edge(&world.config).await;
    let refused = import.finish(&expected, || ()).await;
    assert!(matches!(refused, Err(ImportError::OlderEdges)), "{refused:?}");
    older.close().await.expect("closed");
    let ended = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'qpq-server'";
    eventually("the older edge to be away", || async { world.sql(ended).await == "0" }).await;
    import.finish(&expected, || ()).await.expect("finish");
    let inbox = IdentityKey::new([9; 32]);
    let of = |n| ReadQuery { reader: Reader { inbox, device: Some(id(n)) }, view: View::All };
    assert_eq!(world.waiting(&a, of(1)).await, ["text 2"]);
    assert_eq!(world.waiting(&a, of(2)).await, ["text 1"]);
    let single = ReadQuery { reader: Reader::single(inbox), view: View::All };
    let read = a.inboxes.peek(single, Seq::ZERO, EVERYTHING, NOW).await;
    assert!(matches!(read, Err(ReadError::DeviceRequired)), "{read:?}");
    let imported = a.accounts.by_identity(&inbox).await.expect("find").expect("imported");
    let devices = a.devices.list(imported.id).await.expect("list");
    assert_eq!(devices.iter().map(|device| device.id).collect::<Vec<_>>(), [id(1), id(2)]);
    for n in [1, 2] {
        let lease = a.inboxes.lease(of(n), EVERYTHING, NOW).await.expect("lease");
        lease.complete(NOW).await.expect("complete");
    }
    assert_eq!(world.sql("SELECT count(*) FROM message").await, "0");
    assert_eq!(world.sql("SELECT count(*) FROM device_done").await, "0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hybrid_key_that_an_older_edge_replaces_has_no_signature() {
    let world = World::<1>::new().await;
    let [a] = world.stores();
    let signed = HybridKey { key: vec![1; 1216], signature: Some([2; 64]) };
    a.hybrid_keys.put(world.alice.account, signed.clone()).await.expect("put");
    let get = async || a.hybrid_keys.get(&[world.alice.identity]).await.expect("get");
    assert_eq!(get().await, [Some(signed.clone())]);
    let by_older = "INSERT INTO hybrid_key (owner, key) SELECT id, sha256('key') FROM account
                    ON CONFLICT (owner) DO UPDATE SET key = excluded.key";
    world.sql(by_older).await;
    let [Some(replaced)] = &get().await[..] else { panic!("a key") };
    assert_eq!((replaced.key.len(), replaced.signature), (32, None));
    a.hybrid_keys.put(world.alice.account, signed.clone()).await.expect("put");
    assert_eq!(get().await, [Some(signed)]);
}
