//! Bans and blocks over several edges: a decision at one edge holds at all others from its commit
//! on, and edges of the previous release create no session of a banned account.

use std::{sync::Arc, time::Duration};

use qpq_domain::{ChannelId, GroupId, MAX_BLOCKS, Role, StoreLimits};
use qpq_ports::{
    BanScope, Batch, Blocking, Creation, Enqueued, GroupMessage, GroupRecipients, GroupRefusal,
    ModerationRight, Moderator, NewBan, NewGroup, NewMembers, NewMessage, NewSession, Session,
    SessionCreation, Stores, Unban,
};
use qpq_store_cluster::{ClusterStore, Config};
use tokio::task::JoinSet;

use crate::{
    backend::{Servers, edge, eventually},
    people::{HOUR, NOW, Person, open, person, token},
};

const G: GroupId = GroupId::new([0xee; 16]);

/// Two edges of one cluster, an administrator, and two other accounts.
struct World {
    servers: Arc<Servers>,
    config: Config,
    edges: [ClusterStore; 2],
    people: [Person; 3],
}

impl World {
    async fn new() -> Self {
        let servers = Servers::start().await;
        let config = servers.cluster(StoreLimits::default()).await;
        let edges = [edge(&config).await, edge(&config).await];
        let stores = edges[0].stores();
        let people = [person(&stores, 1).await, person(&stores, 2).await, person(&stores, 3).await];
        Self { servers, config, edges, people }
    }

    fn stores(&self) -> [Stores; 2] {
        [self.edges[0].stores(), self.edges[1].stores()]
    }

    async fn sql(&self, sql: &str) -> String {
        let answer = self.servers.postgres.sql_in(&self.config.namespace, sql).await;
        answer.expect("Postgres").trim().to_owned()
    }
}

fn administrator(person: Person) -> Moderator {
    let Person { account, identity } = person;
    Moderator { account, identity, right: ModerationRight::Server }
}

fn ban(scope: BanScope, by: Person, subject: Person) -> NewBan {
    NewBan {
        scope,
        subject: subject.identity,
        moderator: administrator(by),
        reason: String::new(),
        duration: None,
        now: NOW,
    }
}

fn unban(scope: BanScope, by: Person, subject: Person) -> Unban {
    Unban { scope, subject: subject.identity, moderator: administrator(by), now: NOW }
}

fn message(from: Person, to: Person, n: usize) -> NewMessage {
    NewMessage {
        sender: from.identity,
        recipient: to.identity,
        channel: ChannelId::DEFAULT,
        payload: n.to_string().into(),
        payload_sha256: [7; 32],
        message_id: None,
        now: NOW,
        ttl: HOUR,
    }
}

async fn send(stores: &Stores, message: NewMessage) -> Enqueued {
    stores.inboxes.enqueue(Batch::new(vec![message])).await.expect("enqueue")[0]
}

fn session(owner: Person, n: u8) -> NewSession {
    let session = Session {
        account: owner.account,
        identity: owner.identity,
        device: None,
        authenticated_at: NOW,
        last_used_at: NOW,
        expires_at: NOW.plus(HOUR),
    };
    NewSession { token: token(n), session }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ban_at_one_edge_ends_the_sessions_at_the_others() {
    let world = World::new().await;
    let [a, b] = world.stores();
    let [root, bob, carol] = world.people;
    for n in 1..=3 {
        let owner = if n == 3 { carol } else { bob };
        let opened = open(&a, n, owner).await;
        assert_eq!(b.sessions.find(&token(n)).await.expect("find"), Some(opened), "B has a copy");
    }
    let effects = a.bans.ban(ban(BanScope::Server, root, bob)).await.expect("ban");
    assert_eq!(effects.map(|effects| effects.ended_sessions), Ok(2));
    for n in 1..=2 {
        eventually("a session to be over", || async {
            b.sessions.find(&token(n)).await.expect("find").is_none()
        })
        .await;
    }
    assert!(b.sessions.find(&token(3)).await.expect("find").is_some());
    let refused = b.sessions.create(session(bob, 4)).await.expect("create");
    assert_eq!(refused, SessionCreation::Banned);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_edge_of_the_previous_release_creates_no_session_of_a_banned_account() {
    let world = World::new().await;
    let [a, _] = world.stores();
    let [root, bob, carol] = world.people;
    a.bans.ban(ban(BanScope::Server, root, bob)).await.expect("ban").expect("allowed");
    for (owner, sessions) in [(bob, "0"), (carol, "1")] {
        let account = owner.account.0;
        world
            .sql(&format!(
                "INSERT INTO session (token, account, authenticated_at, last_used_at, expires_at)
                 VALUES (decode(repeat('ab', 32), 'hex'), {account}, {0}, {0}, {0} + 1000)
                 ON CONFLICT DO NOTHING",
                NOW.0
            ))
            .await;
        let count = format!("SELECT count(*) FROM session WHERE account = {account}");
        assert_eq!(world.sql(&count).await, sessions);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_ban_at_one_edge_and_logins_at_another_no_session_remains() {
    let world = World::new().await;
    let [a, b] = world.stores();
    let [root, bob, _] = world.people;
    for round in 0..12_u8 {
        let mut logins = JoinSet::new();
        for n in 0..8 {
            let (b, new) = (b.clone(), session(bob, round * 8 + n));
            logins.spawn(async move { b.sessions.create(new).await.expect("create") });
        }
        a.bans.ban(ban(BanScope::Server, root, bob)).await.expect("ban").expect("allowed");
        logins.join_all().await;
        for n in 0..8 {
            let found = b.sessions.confirm(&token(round * 8 + n)).await.expect("confirm");
            assert_eq!(found, None, "round {round}");
        }
        a.bans.unban(unban(BanScope::Server, root, bob)).await.expect("unban").expect("allowed");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_block_at_one_edge_holds_at_the_others_from_its_commit_on() {
    let world = World::new().await;
    let [a, b] = world.stores();
    let [_, bob, mallory] = world.people;
    for round in 0..10 {
        let sending = {
            let b = b.clone();
            tokio::spawn(async move {
                let mut accepted = 0;
                for n in 0..300 {
                    match send(&b, message(mallory, bob, n)).await {
                        Enqueued::Accepted(_) => accepted += 1,
                        Enqueued::Refused => break,
                        other => panic!("{other:?}"),
                    }
                }
                accepted
            })
        };
        tokio::time::sleep(Duration::from_millis(round)).await;
        let blocked = a.blocks.block(bob.account, mallory.identity, NOW).await.expect("block");
        assert_eq!(blocked, Blocking::Blocked);
        assert_eq!(send(&b, message(mallory, bob, 0)).await, Enqueued::Refused);
        let accepted: u64 = sending.await.expect("no panic");
        let stored = world.sql("SELECT sum(messages), sum(last_seq) FROM inbox").await;
        let (_, last_seq) = stored.split_once('|').expect("two");
        let last_seq: u64 = last_seq.parse().expect("a number");
        assert!(last_seq >= accepted, "{stored}");
        b.blocks.unblock(bob.account, mallory.identity).await.expect("unblock");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_blocks_at_two_edges_are_counted_once_and_limited() {
    let world = World::new().await;
    let [a, b] = world.stores();
    let [root, bob, mallory] = world.people;
    let mut tasks = JoinSet::new();
    for n in 0..16 {
        let stores = if n % 2 == 0 { a.clone() } else { b.clone() };
        tasks.spawn(async move {
            stores.blocks.block(bob.account, mallory.identity, NOW).await.expect("block")
        });
    }
    assert!(tasks.join_all().await.iter().all(|outcome| *outcome == Blocking::Blocked));
    let blocks = format!("SELECT blocks FROM inbox WHERE id = {}", bob.account.0);
    assert_eq!(world.sql(&blocks).await, "1");
    let full = format!("UPDATE inbox SET blocks = {MAX_BLOCKS} WHERE id = {}", bob.account.0);
    world.sql(&full).await;
    let refused = a.blocks.block(bob.account, root.identity, NOW).await.expect("block");
    assert_eq!(refused, Blocking::Full);
    let repeated = a.blocks.block(bob.account, mallory.identity, NOW).await.expect("block");
    assert_eq!(repeated, Blocking::Blocked, "a repeat needs no room");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_ban_of_a_group_and_concurrent_calls_at_another_edge_the_ban_wins() {
    let world = World::new().await;
    let [a, b] = world.stores();
    let [alice, bob, carol] = world.people;
    let group = NewGroup {
        id: G,
        creator: alice.account,
        members: NewMembers::Listed(vec![bob.identity, carol.identity]),
        name: String::new(),
        description: String::new(),
        now: NOW,
    };
    assert_eq!(a.groups.create(group).await.expect("create"), Ok(Creation::Created(G)));
    let to_all = move |text: String| GroupMessage {
        group: G,
        sender: bob.account,
        sender_key: bob.identity,
        sender_device: None,
        recipients: GroupRecipients::All,
        payload: text.into(),
        payload_sha256: [7; 32],
        message_id: None,
        ttl: HOUR,
        now: NOW,
        commit: None,
    };
    let scope = BanScope::Group(G);
    for round in 0..10 {
        let sending = {
            let b = b.clone();
            tokio::spawn(async move {
                for n in 0..300 {
                    match b.groups.send(to_all(format!("{round}.{n}"))).await.expect("send") {
                        Ok(sent) => assert_eq!(sent.skipped, 0),
                        Err(refusal) => return assert_eq!(refusal, GroupRefusal::Banned),
                    }
                }
            })
        };
        let adding = {
            let b = b.clone();
            tokio::spawn(async move {
                for _ in 0..5 {
                    let (actor, members) = (alice.account, vec![bob.identity]);
                    let added = b.groups.add_members(G, actor, members, Role::Member, NOW);
                    let added = added.await.expect("add");
                    assert!(matches!(added, Ok(_) | Err(GroupRefusal::Banned)), "{added:?}");
                }
            })
        };
        tokio::time::sleep(Duration::from_millis(round)).await;
        a.bans.ban(ban(scope, alice, bob)).await.expect("ban").expect("allowed");
        let refused = b.groups.send(to_all("late".into())).await.expect("send");
        assert_eq!(refused, Err(GroupRefusal::Banned));
        sending.await.expect("the ban ends it");
        adding.await.expect("the ban wins");
        assert_eq!(b.groups.role(G, bob.account).await.expect("role"), Ok(None));
        b.bans.unban(unban(scope, alice, bob)).await.expect("unban").expect("allowed");
        let added = b.groups.add_members(G, alice.account, vec![bob.identity], Role::Member, NOW);
        assert_eq!(added.await.expect("add"), Ok(1));
    }
}
