//! Groups over several edges: concurrent commits at different edges, and lost answers.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures_util::future::join_all;
use qpq_domain::{
    ChannelId, DeliveryLimits, GroupId, IdentityKey, MessageId, Pair, Role, Seq, StoreLimits,
    UnixMillis,
};
use qpq_ports::{
    Batch, Commit, Creation, Enqueued, GroupMessage, GroupRecipients, GroupRefusal, GroupSent,
    MemberPage, NewGroup, NewMembers, NewMessage, PageLimit, ReadQuery, Reader, Stores, View,
    transfer::{Cell, Digest, Digests, Row, Table, sha256},
};
use qpq_store_cluster::{ClusterStore, Config, Import, ImportError};
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};

use crate::{
    backend::{NEVER, Process, Servers, edge},
    people::{HOUR, NOW, Person, person},
};

const G: GroupId = GroupId::new([0xee; 16]);
const EVERYTHING: PageLimit = PageLimit { messages: u32::MAX, bytes: usize::MAX };

/// Edges of one cluster, and the members of a group, of which the first is the admin.
struct World<const N: usize> {
    servers: Arc<Servers>,
    config: Config,
    edges: [ClusterStore; N],
    people: Vec<Person>,
}

impl<const N: usize> World<N> {
    async fn with(delivery: DeliveryLimits, people: u8) -> Self {
        let servers = Servers::start().await;
        let config = servers.cluster(StoreLimits { delivery, ..StoreLimits::default() }).await;
        servers.mark(&config).await;
        let edges = join_all((0..N).map(|_| edge(&config))).await;
        let edges: [ClusterStore; N] = edges.try_into().expect("as many");
        let stores = edges[0].stores();
        let mut members = Vec::new();
        for n in 1..=people {
            members.push(person(&stores, n).await);
        }
        let group = NewGroup {
            id: G,
            creator: members[0].account,
            members: NewMembers::Listed(members.iter().map(|member| member.identity).collect()),
            name: "friends".into(),
            description: String::new(),
            now: NOW,
        };
        let created = stores.groups.create(group).await.expect("create");
        assert_eq!(created, Ok(Creation::Created(G)));
        Self { servers, config, edges, people: members }
    }

    async fn new(people: u8) -> Self {
        Self::with(DeliveryLimits::default(), people).await
    }

    fn stores(&self) -> [Stores; N] {
        std::array::from_fn(|n| self.edges[n].stores())
    }

    async fn sql(&self, sql: &str) -> String {
        let answer = self.servers.postgres.sql_in(&self.config.namespace, sql).await;
        answer.expect("Postgres").trim().to_owned()
    }
}

/// A message to all members, without a commit.
fn to_all(sender: Person, text: &str) -> GroupMessage {
    GroupMessage {
        group: G,
        sender: sender.account,
        sender_key: sender.identity,
        sender_device: None,
        recipients: GroupRecipients::All,
        payload: text.to_owned().into(),
        payload_sha256: [7; 32],
        message_id: None,
        ttl: HOUR,
        now: NOW,
        commit: None,
    }
}

fn commit(sender: Person, text: &str, epoch: u64) -> GroupMessage {
    let commit = Some(Commit { expected_epoch: epoch, group_info: Some(text.to_owned().into()) });
    GroupMessage { commit, ..to_all(sender, text) }
}

fn with_id(message: GroupMessage, n: u8) -> GroupMessage {
    GroupMessage { message_id: Some(MessageId::new([n; 16])), ..message }
}

async fn send(stores: &Stores, message: GroupMessage) -> Result<GroupSent, GroupRefusal> {
    stores.groups.send(message).await.expect("send")
}

async fn epoch(stores: &Stores, member: Person) -> (u64, Option<String>) {
    let info = stores.groups.info(G, member.account).await.expect("info").expect("a member");
    let text = |bytes: bytes::Bytes| String::from_utf8(bytes.to_vec()).expect("text");
    (info.epoch, info.group_info.map(text))
}

/// Returns the messages of an inbox, whose seqs have no gap.
async fn waiting(stores: &Stores, person: Person) -> Vec<String> {
    let read = ReadQuery { reader: Reader::single(person.identity), view: View::All };
    let page = stores.inboxes.peek(read, Seq::ZERO, EVERYTHING, NOW).await.expect("peek");
    let seqs: Vec<_> = page.envelopes.iter().map(|envelope| envelope.seq.0).collect();
    assert_eq!(seqs, (1..=seqs.len() as u64).collect::<Vec<_>>());
    let text = |payload: &[u8]| String::from_utf8(payload.to_vec()).expect("text");
    page.envelopes.iter().map(|envelope| text(&envelope.payload)).collect()
}

fn plain(sender: Person, recipient: IdentityKey, text: &str) -> NewMessage {
    NewMessage {
        sender: sender.identity,
        recipient,
        channel: ChannelId::DEFAULT,
        payload: text.to_owned().into(),
        payload_sha256: [7; 32],
        message_id: None,
        now: NOW,
        ttl: HOUR,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_64_commits_for_one_epoch_on_three_edges_one_wins() {
    const COMMITS: usize = 64;
    let world = World::<3>::new(8).await;
    let stores = world.stores();
    for round in 0..3_u8 {
        let mut tasks = JoinSet::new();
        for n in 0..COMMITS {
            let (stores, sender) = (stores[n % 3].clone(), world.people[n % 8]);
            // A quarter of the commits have no message id.
            let message = commit(sender, &format!("{round} of {n}"), round.into());
            let message = if n % 4 == 0 { message } else { with_id(message, n as u8 + 64 * round) };
            tasks.spawn(async move { (n, send(&stores, message).await) });
        }
        let outcomes = tasks.join_all().await;
        let won: Vec<_> = outcomes.iter().filter(|(_, outcome)| outcome.is_ok()).collect();
        let [(winner, Ok(sent))] = won[..] else { panic!("{won:?}") };
        let next = u64::from(round) + 1;
        assert_eq!((sent.epoch, sent.recipients, sent.skipped), (next, 8, 0));
        for (n, outcome) in outcomes.iter().filter(|(n, _)| n != winner) {
            assert_eq!(*outcome, Err(GroupRefusal::StaleEpoch(next)), "{n}");
        }
        let text = format!("{round} of {winner}");
        let [one, two, _] = &stores;
        assert_eq!(epoch(one, world.people[3]).await, (next, Some(text.clone())));
        for person in &world.people {
            let texts = waiting(two, *person).await;
            assert_eq!(texts.len() as u64, next, "nothing of the others: {texts:?}");
            assert_eq!(texts.last(), Some(&text));
        }
    }
    assert_eq!(world.sql("SELECT count(*) FROM message").await, "24");
    let remembered = world.sql("SELECT count(*) FROM group_commit").await;
    assert!(remembered.parse::<u32>().expect("a number") <= 3, "{remembered}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_whose_answer_was_lost_is_repeated_on_another_edge() {
    const ROUNDS: u8 = 10;
    let world = World::<1>::new(4).await;
    let [stores] = world.stores();
    let listed = || GroupRecipients::Listed(world.people.iter().map(|one| one.identity).collect());
    let mut answered = 0;
    for n in 0..ROUNDS {
        let lost = Process::start(&world.config).await;
        let message = with_id(commit(world.people[1], &format!("c{n}"), n.into()), n);
        let message =
            if n % 2 == 0 { message } else { GroupMessage { recipients: listed(), ..message } };
        let (groups, sent) = (lost.store.stores().groups, message.clone());
        let sending = tokio::spawn(async move { groups.send(sent).await });
        // The edge crashes at a time from before the transaction to after the answer.
        sleep(Duration::from_millis(u64::from(n) * 2)).await;
        lost.crash().await;
        let first = timeout(NEVER, sending).await.expect("in time").expect("no panic");
        let later = GroupMessage { now: NOW.plus(Duration::from_secs(60)), ..message.clone() };
        let repeated = send(&stores, later).await.expect("accepted");
        assert_eq!(repeated.epoch, u64::from(n) + 1);
        assert_eq!(repeated.recipients, 4);
        if let Ok(first) = first {
            let first = first.expect("accepted");
            answered += 1;
            assert!(repeated.is_repeat);
            assert_eq!(receipts(&repeated), receipts(&first));
        }
        let again = send(&stores, message).await.expect("accepted");
        assert_eq!((again.is_repeat, again.epoch), (true, repeated.epoch));
        assert_eq!(receipts(&again), receipts(&repeated));
        for person in &world.people {
            let texts = waiting(&stores, *person).await;
            assert_eq!(texts, (0..=n).map(|n| format!("c{n}")).collect::<Vec<_>>(), "once each");
        }
    }
    assert!(answered < ROUNDS, "some answers were lost");
}

fn receipts(sent: &GroupSent) -> Vec<qpq_ports::Receipt> {
    sent.outcomes
        .iter()
        .map(|outcome| match outcome {
            Enqueued::Accepted(receipt) | Enqueued::Duplicate(receipt) => *receipt,
            other => panic!("{other:?}"),
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commits_and_plain_messages_to_the_same_inboxes_do_not_deadlock() {
    const EACH: u64 = 30;
    let (c, p) = ("c".repeat(600), "p".repeat(600));
    let world = World::<3>::new(12).await;
    let stores = world.stores();
    let mut tasks = JoinSet::new();
    for (n, edge) in stores.iter().enumerate() {
        // Commits, which compete with those of the other edges.
        let (stores, sender, text) = (edge.clone(), world.people[n], c.clone());
        tasks.spawn(async move {
            let mut won = 0;
            while won < EACH {
                let (epoch, _) = epoch(&stores, sender).await;
                won += u64::from(send(&stores, commit(sender, &text, epoch)).await.is_ok());
            }
            won
        });
        // Fan-outs in another order of the inboxes, and single messages.
        let (stores, people, text) = (edge.clone(), world.people.clone(), p.clone());
        tasks.spawn(async move {
            for _ in 0..EACH {
                let shared = plain(people[n], people[n].identity, &text);
                let to = |to: &Person| NewMessage { recipient: to.identity, ..shared.clone() };
                let batch = people.iter().rev().map(to).collect();
                let outcomes = stores.inboxes.enqueue(Batch::new(batch)).await.expect("enqueue");
                assert!(outcomes.iter().all(|one| matches!(one, Enqueued::Accepted(_))));
                let one = vec![plain(people[n], people[11 - n].identity, "p")];
                stores.inboxes.enqueue(Batch::new(one)).await.expect("enqueue");
            }
            0
        });
        // Removals of accepted messages.
        let (stores, people) = (edge.clone(), world.people.clone());
        tasks.spawn(async move {
            for _ in 0..EACH {
                for person in people.iter().skip(n * 4).take(2) {
                    let reader = Reader::single(person.identity);
                    let read = ReadQuery { reader, view: View::All };
                    let lease = stores.inboxes.lease(read, EVERYTHING, NOW).await.expect("lease");
                    lease.complete(NOW).await.expect("complete");
                }
            }
            0
        });
    }
    let won: u64 = tasks.join_all().await.iter().sum();
    assert_eq!(epoch(&stores[0], world.people[0]).await.0, won);
    let deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()";
    assert_eq!(world.sql(deadlocks).await, "0");
    let counts = "SELECT count(*) FROM inbox i WHERE i.messages <>
                  (SELECT count(*) FROM message m WHERE m.inbox = i.id)";
    assert_eq!(world.sql(counts).await, "0");
    let refs = "SELECT count(*) FROM payload p WHERE p.refs <>
                (SELECT count(*) FROM message m WHERE m.payload_id = p.id)";
    assert_eq!(world.sql(refs).await, "0");
    for person in world.people.iter().filter(|person| person.account.0 % 4 == 0) {
        // The inboxes without removals have all messages.
        let texts = waiting(&stores[1], *person).await;
        assert_eq!(texts.iter().filter(|text| **text == c).count() as u64, won);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_member_receives_no_later_messages() {
    let world = World::<2>::new(6).await;
    let [one, two] = world.stores();
    for n in 1..6 {
        let (admin, leaving) = (world.people[0], world.people[n]);
        let (stores, sending) = (one.clone(), admin);
        let sends = tokio::spawn(async move {
            let mut sent = Vec::new();
            for m in 0..20 {
                let text = format!("{n}.{m}");
                sent.push((text.clone(), send(&stores, to_all(sending, &text)).await));
            }
            sent
        });
        sleep(Duration::from_millis(5 * n as u64)).await;
        let removed = two.groups.remove_member(G, admin.account, leaving.identity).await;
        assert_eq!(removed.expect("remove"), Ok(()));
        let after = send(&two, to_all(admin, &format!("after {n}"))).await.expect("accepted");
        assert_eq!(after.recipients as usize, 6 - n);
        let sent = sends.await.expect("no panic");
        let texts = waiting(&two, leaving).await;
        assert!(!texts.contains(&format!("after {n}")));
        // The member received the messages before its removal, in order, and no later one.
        let recipients: BTreeMap<_, _> = sent
            .iter()
            .map(|(text, sent)| (text.clone(), sent.as_ref().expect("accepted").recipients))
            .collect();
        let own: Vec<_> = texts.iter().filter(|text| text.starts_with(&format!("{n}."))).collect();
        for (text, recipients) in recipients {
            let is_before = recipients as usize == 7 - n;
            assert_eq!(own.contains(&&text), is_before, "{text}");
        }
        let refused = send(&one, to_all(leaving, "still here")).await;
        assert_eq!(refused, Err(GroupRefusal::NotMember));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_id_whose_messages_have_expired_is_free_in_any_number_of_inboxes() {
    const PEOPLE: u8 = 150;
    let limits =
        DeliveryLimits { recent_ids: Duration::from_secs(60), ..DeliveryLimits::default() };
    let world = World::<1>::with(limits, PEOPLE).await;
    let [stores] = world.stores();
    let sent = with_id(to_all(world.people[0], "old"), 1);
    let first = send(&stores, sent.clone()).await.expect("accepted");
    assert_eq!((first.recipients, first.is_repeat), (PEOPLE.into(), false));
    let again = send(&stores, sent.clone()).await.expect("accepted");
    assert!(again.is_repeat);
    let later = UnixMillis(NOW.plus(2 * HOUR).0);
    let renewed = GroupMessage { now: later, ..sent };
    let renewed = send(&stores, renewed).await.expect("accepted");
    assert_eq!((renewed.recipients, renewed.skipped, renewed.is_repeat), (PEOPLE.into(), 0, false));
    let heads = "SELECT count(*), min(messages), max(messages), min(bytes), max(bytes) FROM inbox";
    assert_eq!(world.sql(heads).await, format!("{PEOPLE}|1|1|3|3"), "the old ones were removed");
    assert_eq!(world.sql("SELECT count(*) FROM message").await, PEOPLE.to_string());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_of_many_half_full_inboxes_has_the_share_of_its_sender() {
    const PEOPLE: u8 = 150;
    // Five messages of eight are more than half, and a sender's share is two.
    let limits = DeliveryLimits { max_messages: 8, sender_share: 4, ..DeliveryLimits::default() };
    let world = World::<1>::with(limits, PEOPLE).await;
    let [stores] = world.stores();
    let [alice, bob] = world.people[..2] else { panic!("two") };
    let fill = |sender, count: usize| {
        let recipients = world.people.iter();
        let messages = recipients.flat_map(|to| vec![plain(sender, to.identity, "x"); count]);
        messages.collect::<Vec<_>>()
    };
    for (sender, count) in [(bob, 4), (alice, 1)] {
        for chunk in fill(sender, count).chunks(200) {
            stores.inboxes.enqueue(Batch::new(chunk.to_vec())).await.expect("enqueue");
        }
    }
    // Each inbox has five messages: alice has one of her share of two, and bob has more than his
    // share.
    let refused = send(&stores, to_all(bob, "b")).await.expect("accepted");
    assert_eq!(refused.skipped, u32::from(PEOPLE));
    let sent = send(&stores, to_all(alice, "a")).await.expect("accepted");
    assert_eq!(sent.skipped, 0);
    let refused = send(&stores, to_all(alice, "a")).await.expect("accepted");
    assert_eq!(refused.skipped, u32::from(PEOPLE));
    let carol = world.people[2];
    for (skipped, text) in [(0, "c1"), (0, "c2"), (PEOPLE.into(), "c3")] {
        assert_eq!(send(&stores, to_all(carol, text)).await.expect("accepted").skipped, skipped);
    }
    let heads = "SELECT min(messages), max(messages) FROM inbox";
    assert_eq!(world.sql(heads).await, "8|8");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_accepted_commit_is_remembered_for_seven_days() {
    const DAY: Duration = Duration::from_secs(24 * 3_600);
    let world = World::<1>::new(2).await;
    let [stores] = world.stores();
    let sent = with_id(commit(world.people[0], "one", 0), 1);
    send(&stores, sent.clone()).await.expect("accepted");
    for (days, is_remembered) in [(6, true), (8, false)] {
        let now = NOW.plus(days * DAY);
        while stores.maintenance.sweep(now).await.expect("sweep").rows > 0 {}
        let again = send(&stores, GroupMessage { now, ..sent.clone() }).await;
        match again {
            Ok(sent) => assert!(is_remembered && sent.is_repeat),
            Err(refusal) => {
                assert_eq!((is_remembered, refusal), (false, GroupRefusal::StaleEpoch(1)));
            }
        }
    }
    assert_eq!(world.sql("SELECT count(*) FROM group_commit").await, "0");
}

/// The rows of a single node with three accounts in two groups, and their canonical forms.
fn node() -> Vec<(Table, Vec<Row>, Vec<Row>)> {
    let (number, bytes) = (Cell::Number, |n: u8, length| Cell::Bytes(vec![n; length]));
    let text = |text: &str| Cell::Text(text.into());
    let account = |n: u8| {
        let rest = vec![text(&format!("node{n}")), bytes(200 + n, 32), bytes(1, 192), number(1)];
        ([vec![number(n.into())], rest.clone()].concat(), rest)
    };
    let inbox = |n: u8| {
        let rest = vec![number(0), number(0), number(0), number(i64::MAX)];
        ([vec![number(n.into())], rest.clone()].concat(), [vec![bytes(200 + n, 32)], rest].concat())
    };
    let group = |id: Cell, pair: Cell, info: Cell| {
        let first = vec![id, pair, text("name"), text("about"), bytes(4, 3), number(2), number(1)];
        let hashed = match &info {
            Cell::Bytes(info) => Cell::Bytes(sha256(info)),
            other => other.clone(),
        };
        let row = |info| [first.clone(), vec![info, number(9)]].concat();
        (row(info), row(hashed))
    };
    // The ids give the order in which the members of both groups joined. Canonical rows have the
    // place in the group instead.
    let member = |id: i64, place: i64, group: Cell, account: u8, role: i64| {
        let rest = vec![number(role), number(5)];
        (
            [vec![number(id), group.clone(), number(account.into())], rest.clone()].concat(),
            [vec![number(place), group, bytes(200 + account, 32)], rest].concat(),
        )
    };
    let (one, two) = (|| Cell::Bytes(G.as_bytes().to_vec()), || bytes(2, 16));
    let pair = Cell::Bytes([[201; 32], [203; 32]].concat());
    // The encoded outcome: version 1, all members, three recipients, one skipped.
    let outcome = || vec![number(1), number(7), Cell::Bytes(vec![1, 0, 0, 0, 0, 3, 0, 0, 0, 1])];
    let commit = (
        [vec![one(), number(1), bytes(5, 16)], outcome()].concat(),
        [vec![one(), bytes(201, 32), bytes(5, 16)], outcome()].concat(),
    );
    let of = |table, rows: Vec<(Row, Row)>| {
        let (rows, canonical) = rows.into_iter().unzip();
        (table, rows, canonical)
    };
    vec![
        of(Table::Account, [1, 2, 3].map(account).into()),
        of(Table::Inbox, [1, 2, 3].map(inbox).into()),
        of(
            Table::Group,
            vec![group(one(), Cell::Nothing, bytes(6, 3_000)), group(two(), pair, Cell::Nothing)],
        ),
        of(
            Table::GroupMember,
            vec![
                member(11, 1, one(), 3, 0),
                member(12, 1, two(), 3, 1),
                member(13, 2, one(), 1, 1),
                member(14, 2, two(), 1, 0),
                member(15, 3, one(), 2, 0),
            ],
        ),
        of(Table::GroupCommit, vec![commit]),
    ]
}

async fn import(config: &Config) -> Result<(), ImportError> {
    let mut expected = Digests::default();
    for (table, _, canonical) in node() {
        let mut digest = Digest::default();
        canonical.iter().for_each(|row| digest.add(row));
        expected.set(table, digest);
    }
    let mut import = Import::connect(config).await.expect("Postgres");
    import.begin(&expected).await?;
    for (table, rows, _) in node() {
        import.put(table, &rows).await?;
    }
    import.finish(&expected, || ()).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn imported_groups_are_as_they_were() {
    let servers = Servers::start().await;
    let config = servers.cluster(StoreLimits::default()).await;
    let stores = edge(&config).await.stores();
    // The cluster has an account of its own, so that the numbers of accounts differ.
    person(&stores, 1).await;
    import(&config).await.expect("imported");
    let mut people = Vec::new();
    for n in 1..=3 {
        let identity = IdentityKey::new([200 + n; 32]);
        let found = stores.accounts.by_identity(&identity).await.expect("find").expect("imported");
        people.push(Person { account: found.id, identity });
    }
    let page = MemberPage { after: 0, limit: 10 };
    let view = stores.groups.members(G, people[0].account, page).await.expect("members");
    let view = view.expect("a member");
    assert_eq!((&*view.name, view.version, view.epoch), ("name", 2, 1));
    let members: Vec<_> =
        view.members.iter().map(|member| (&*member.username, member.role)).collect();
    let expected = [("node3", Role::Member), ("node1", Role::Admin), ("node2", Role::Member)];
    assert_eq!(members, expected);
    let repeated = with_id(commit(people[0], "again", 0), 5);
    let repeated = GroupMessage { now: UnixMillis(7), ..repeated };
    let sent = send(&stores, repeated).await.expect("accepted");
    assert_eq!((sent.epoch, sent.recipients, sent.skipped, sent.is_repeat), (1, 3, 1, true));
    // The direct group is found by its pair.
    let pair = Pair::new(people[0].identity, people[2].identity).expect("two");
    let direct = NewGroup {
        id: GroupId::new([9; 16]),
        creator: people[0].account,
        members: NewMembers::Direct(pair),
        name: String::new(),
        description: String::new(),
        now: NOW,
    };
    let found = stores.groups.create(direct).await.expect("create");
    assert_eq!(found, Ok(Creation::Existed(GroupId::new([2; 16]))));
}
