//! Shared payloads: the messages that share one, and its removal with the last of them.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::join_all;
use qpq_domain::{
    ChannelId, DeliveryLimits, DeviceId, GroupId, MessageId, Seq, StoreLimits, UnixMillis,
};
use qpq_ports::{
    Ack, Batch, DeviceRegistration, Enqueued, GroupMessage, GroupRecipients, NewDevice, NewGroup,
    NewMembers, NewMessage, PageLimit, ReadQuery, Reader, StoreError, Stores, View,
};
use qpq_store_cluster::{ClusterStore, Config};
use sqlx::{Connection as _, PgConnection};
use tokio::task::JoinSet;

use crate::{
    backend::{Servers, edge, eventually},
    people::{HOUR, NOW, Person, open, person, token},
};

const EVERYTHING: PageLimit = PageLimit { messages: u32::MAX, bytes: usize::MAX };
const UP_TO: fn(u64) -> Ack = |seq| Ack { up_to: Some(Seq(seq)), seqs: Vec::new(), store_id: None };

/// Edges of one cluster, and people.
struct World<const N: usize> {
    servers: Arc<Servers>,
    config: Config,
    edges: [ClusterStore; N],
    people: Vec<Person>,
}

impl<const N: usize> World<N> {
    async fn unmarked(people: u8) -> Self {
        Self::start(people, false, DeliveryLimits::default()).await
    }

    async fn marked(people: u8) -> Self {
        Self::start(people, true, DeliveryLimits::default()).await
    }

    async fn start(people: u8, is_marked: bool, delivery: DeliveryLimits) -> Self {
        let servers = Servers::start().await;
        let config = servers.cluster(StoreLimits { delivery, ..StoreLimits::default() }).await;
        if is_marked {
            servers.mark(&config).await;
        }
        let edges = join_all((0..N).map(|_| edge(&config))).await;
        let edges: [ClusterStore; N] = edges.try_into().expect("as many");
        let stores = edges[0].stores();
        let mut all = Vec::new();
        for n in 1..=people {
            all.push(person(&stores, n).await);
        }
        Self { servers, config, edges, people: all }
    }

    fn stores(&self) -> [Stores; N] {
        std::array::from_fn(|n| self.edges[n].stores())
    }

    async fn sql(&self, sql: &str) -> String {
        let answer = self.servers.postgres.sql_in(&self.config.namespace, sql).await;
        answer.expect("Postgres").trim().to_owned()
    }

    /// Returns the number of payloads, of messages that share one, and of wrong counts.
    async fn payloads(&self) -> String {
        self.sql(
            "SELECT (SELECT count(*) FROM payload), count(payload_id),
                    (SELECT count(*) FROM payload p WHERE p.refs <>
                     (SELECT count(*) FROM message m WHERE m.payload_id = p.id))
               FROM message",
        )
        .await
    }

    /// Sends one payload to the first `count` people.
    async fn fan_out(&self, stores: &Stores, payload: Bytes, count: usize) {
        let messages = self.people[..count].iter().map(|to| message(*to, payload.clone()));
        let outcomes = stores.inboxes.enqueue(Batch::new(messages.collect())).await;
        let outcomes = outcomes.expect("enqueue");
        assert!(outcomes.iter().all(|one| matches!(one, Enqueued::Accepted(_))), "{outcomes:?}");
    }
}

fn message(recipient: Person, payload: Bytes) -> NewMessage {
    NewMessage {
        sender: recipient.identity,
        recipient: recipient.identity,
        channel: ChannelId::DEFAULT,
        payload,
        payload_sha256: [7; 32],
        message_id: None,
        now: NOW,
        ttl: HOUR,
    }
}

fn payload(n: u8, size: usize) -> Bytes {
    vec![n; size].into()
}

fn all_of(person: Person) -> ReadQuery {
    ReadQuery { reader: Reader::single(person.identity), view: View::All }
}

fn of_device(person: Person, n: u8) -> ReadQuery {
    let reader = Reader { inbox: person.identity, device: Some(DeviceId::new([n; 16])) };
    ReadQuery { reader, view: View::All }
}

async fn register(stores: &Stores, person: Person, n: u8) {
    open(stores, n, person).await;
    let device = NewDevice {
        account: person.account,
        device: DeviceId::new([n; 16]),
        name: format!("device {n}"),
        key: None,
        session: token(n),
        now: NOW,
    };
    let registered = stores.devices.register(device).await.expect("register");
    assert_eq!(registered, DeviceRegistration::Registered);
}

async fn peek(stores: &Stores, read: ReadQuery) -> Vec<Bytes> {
    let page = stores.inboxes.peek(read, Seq::ZERO, EVERYTHING, NOW).await.expect("peek");
    page.envelopes.into_iter().map(|envelope| envelope.payload).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn payloads_are_stored_once_from_the_first_device_on() {
    let world = World::<2>::unmarked(6).await;
    let [one, two] = world.stores();
    world.fan_out(&one, payload(1, 2_000), 6).await;
    assert_eq!(world.payloads().await, "0|0|0", "an edge of an earlier release could not read it");
    register(&two, world.people[0], 1).await;
    world.fan_out(&one, payload(2, 2_000), 6).await;
    assert_eq!(world.payloads().await, "1|6|0");
    // A small payload, and one for few recipients, are not stored once.
    world.fan_out(&one, payload(3, 511), 6).await;
    world.fan_out(&one, payload(4, 2_000), 3).await;
    assert_eq!(world.payloads().await, "1|6|0");
    world.fan_out(&two, payload(5, 512), 4).await;
    assert_eq!(world.payloads().await, "2|10|0");
    // Equal payloads in separate memory are not shared.
    let messages: Vec<_> = world.people.iter().map(|to| message(*to, payload(6, 2_000))).collect();
    two.inboxes.enqueue(Batch::new(messages)).await.expect("enqueue");
    assert_eq!(world.payloads().await, "2|10|0");
    let expected = [
        payload(1, 2_000),
        payload(2, 2_000),
        payload(3, 511),
        payload(4, 2_000),
        payload(5, 512),
        payload(6, 2_000),
    ];
    assert_eq!(peek(&one, of_device(world.people[0], 1)).await, expected);
    assert_eq!(peek(&two, all_of(world.people[1])).await, expected);
    let heads = "SELECT DISTINCT bytes FROM inbox WHERE messages = 6";
    assert_eq!(world.sql(heads).await, "9023", "each inbox counts the whole payloads");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_is_too_large_for_the_rows_of_its_recipients_is_stored_once() {
    const PEOPLE: u8 = 70;
    let world = World::<1>::unmarked(PEOPLE).await;
    let [stores] = world.stores();
    let id = GroupId::new([1; 16]);
    let group = NewGroup {
        id,
        creator: world.people[0].account,
        members: NewMembers::Listed(world.people.iter().map(|one| one.identity).collect()),
        name: String::new(),
        description: String::new(),
        now: NOW,
    };
    stores.groups.create(group).await.expect("create").expect("created");
    let send = async |size| {
        let message = GroupMessage {
            group: id,
            sender: world.people[0].account,
            sender_key: world.people[0].identity,
            sender_device: None,
            recipients: GroupRecipients::All,
            payload: payload(1, size),
            payload_sha256: [7; 32],
            message_id: None,
            ttl: HOUR,
            now: NOW,
            commit: None,
        };
        stores.groups.send(message).await.map(|sent| sent.expect("accepted").skipped)
    };
    assert_eq!(send(100_000).await.expect("in the rows"), 0);
    assert_eq!(world.payloads().await, "0|0|0");
    let mut older = PgConnection::connect(&world.config.postgres.url).await.expect("Postgres");
    sqlx::query("SET application_name = 'qpq-server'").execute(&mut older).await.expect("a name");
    let refused = send(1 << 20).await;
    assert!(matches!(refused, Err(StoreError::Unavailable(_))), "{refused:?}");
    assert_eq!(send(100_000).await.expect("in the rows"), 0);
    assert_eq!(world.payloads().await, "0|0|0");
    older.close().await.expect("closed");
    eventually("the older edge to be away", || async { send(1 << 20).await.is_ok() }).await;
    assert_eq!(world.payloads().await, "1|70|0");
    let page = peek(&stores, all_of(world.people[69])).await;
    assert_eq!(page, [payload(1, 100_000), payload(1, 100_000), payload(1, 1 << 20)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shared_payload_is_removed_with_its_last_message() {
    let world = World::<2>::marked(6).await;
    let [one, two] = world.stores();
    let [a, b, c, d, e, f] = world.people[..] else { panic!("six") };
    register(&one, c, 1).await;
    register(&one, c, 2).await;
    world.fan_out(&one, payload(1, 5_000), 6).await;
    world.fan_out(&one, payload(2, 5_000), 6).await;
    assert_eq!(world.payloads().await, "2|12|0");
    // Messages are completed, acked, and acked by both devices.
    one.inboxes
        .lease(all_of(a), EVERYTHING, NOW)
        .await
        .expect("lease")
        .complete(NOW)
        .await
        .expect("complete");
    assert_eq!(world.payloads().await, "2|10|0");
    assert_eq!(two.inboxes.ack(all_of(b), UP_TO(1), NOW).await.expect("ack"), 1);
    assert_eq!(two.inboxes.ack(of_device(c, 1), UP_TO(2), NOW).await.expect("ack"), 2);
    assert_eq!(world.payloads().await, "2|9|0");
    assert_eq!(two.inboxes.ack(of_device(c, 2), UP_TO(2), NOW).await.expect("ack"), 2);
    assert_eq!(world.payloads().await, "2|7|0");
    for (person, left) in [(d, "2|5|0"), (e, "2|3|0"), (f, "1|1|0")] {
        assert_eq!(two.inboxes.ack(all_of(person), UP_TO(9), NOW).await.expect("ack"), 2);
        assert_eq!(world.payloads().await, left);
    }
    assert_eq!(peek(&one, all_of(b)).await, [payload(2, 5_000)], "the last message has it");
    assert_eq!(two.inboxes.ack(all_of(b), UP_TO(2), NOW).await.expect("ack"), 1);
    assert_eq!(world.payloads().await, "0|0|0");
    assert_eq!(world.sql("SELECT sum(messages), sum(bytes) FROM inbox").await, "0|0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn payloads_of_expired_messages_go_with_a_sweep_and_with_the_next_messages() {
    const PEOPLE: u8 = 100;
    let world = World::<1>::marked(PEOPLE).await;
    let [stores] = world.stores();
    let later = UnixMillis(NOW.plus(2 * HOUR).0);
    for n in 0..3 {
        world.fan_out(&stores, payload(n, 600), PEOPLE.into()).await;
    }
    assert_eq!(world.payloads().await, "3|300|0");
    // The enqueue removes the expired messages of some of the inboxes, and sweeps remove the rest.
    let messages: Vec<_> = world
        .people
        .iter()
        .map(|to| NewMessage {
            message_id: Some(MessageId::new([1; 16])),
            now: later,
            ..message(*to, payload(9, 5))
        })
        .collect();
    stores.inboxes.enqueue(Batch::new(messages)).await.expect("enqueue");
    let left = world.payloads().await;
    assert!(left.starts_with("3|") && left.ends_with("|0") && left != "3|300|0", "{left}");
    while stores.maintenance.sweep(later).await.expect("sweep").rows > 0 {}
    assert_eq!(world.payloads().await, "0|0|0");
    assert_eq!(world.sql("SELECT sum(messages), sum(bytes) FROM inbox").await, "100|500");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_removals_of_the_same_payloads_count_right_and_do_not_deadlock() {
    const PEOPLE: u8 = 30;
    const PAYLOADS: u8 = 8;
    let world = World::<3>::marked(PEOPLE).await;
    let stores = world.stores();
    register(&stores[0], world.people[0], 1).await;
    register(&stores[0], world.people[0], 2).await;
    for n in 0..PAYLOADS {
        world.fan_out(&stores[usize::from(n) % 3], payload(n, 700), PEOPLE.into()).await;
    }
    let mut tasks = JoinSet::new();
    for (n, person) in world.people.iter().copied().enumerate().skip(1) {
        let stores = stores[n % 3].clone();
        tasks.spawn(async move {
            let mut first = 1;
            // In different orders: single seqs, all messages, and pages.
            for seq in (1..=u64::from(PAYLOADS) / 2).rev().filter(|_| n % 2 == 0) {
                let ack = Ack { up_to: None, seqs: vec![Seq(seq)], store_id: None };
                assert_eq!(stores.inboxes.ack(all_of(person), ack, NOW).await.expect("ack"), 1);
                first = u64::from(PAYLOADS) / 2 + 1;
            }
            if n % 3 == 0 {
                let left = u64::from(PAYLOADS) + 1 - first;
                let removed = stores.inboxes.ack(all_of(person), UP_TO(99), NOW).await;
                assert_eq!(u64::from(removed.expect("ack")), left);
            }
            let limit = PageLimit { messages: 3, bytes: usize::MAX };
            loop {
                let lease = stores.inboxes.lease(all_of(person), limit, NOW).await.expect("lease");
                if lease.page().envelopes.is_empty() {
                    return;
                }
                lease.complete(NOW).await.expect("complete");
            }
        });
    }
    for n in [1, 2] {
        let (stores, person) = (stores[usize::from(n)].clone(), world.people[0]);
        tasks.spawn(async move {
            for seq in 1..=u64::from(PAYLOADS) {
                stores.inboxes.ack(of_device(person, n), UP_TO(seq), NOW).await.expect("ack");
            }
        });
    }
    tasks.join_all().await;
    assert_eq!(world.payloads().await, "0|0|0");
    let deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()";
    assert_eq!(world.sql(deadlocks).await, "0");
}
