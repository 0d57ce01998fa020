//! A second implementation of MLS, mls-rs, in groups with our client through a real server. The
//! mls-rs member follows docs/client.md and shares no code with our client.

mod lines;
mod member;
mod profile;
mod rules;
mod session;
mod vectors;

use std::path::Path;

use qpq_client::{
    ConversationId, Event, IdentityKey, Messenger, Options, Password, Person, Role, Trust, Username,
};

use self::member::{Change, Member};
use crate::server::{self, Running};

/// A server, and the profiles of our clients.
struct World {
    running: Running,
    dir: tempfile::TempDir,
}

impl World {
    async fn start() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let running = server::start(&dir.path().join("data")).await;
        Self { running, dir }
    }

    /// Registers a user of our client.
    async fn user(&self, name: &str) -> Messenger {
        let trust = Trust::Pinned(self.running.pin.0.into());
        let mut options = Options::new(self.running.addr.to_string(), trust);
        options.devices_every = std::time::Duration::ZERO;
        let profile: &Path = &self.dir.path().join(name);
        let password = Password::from("correct horse battery staple");
        Messenger::register(profile, options, &username(name), &password, None)
            .await
            .expect("the name is free")
    }

    /// Registers a user of mls-rs.
    async fn member(&self, name: &str) -> Member {
        Member::register(&self.running, name).await
    }
}

fn username(name: &str) -> Username {
    Username::parse(name).expect("a name")
}

/// Receives, and returns a line for each new entry.
async fn read(messenger: &Messenger) -> Vec<String> {
    let entries = messenger.receive().await.expect("the server answers");
    let ids: Vec<_> = entries.iter().map(|entry| entry.id).collect();
    messenger.mark_seen(&ids).await.expect("the profile is writable");
    let names =
        |people: &[Person]| people.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let line = |event: &Event| match event {
        Event::Received { from, text, .. } => format!("{from}: {text}"),
        Event::Joined { by } => format!("joined by {by}"),
        Event::Requested { by, .. } => format!("{by} asks"),
        Event::Added { members } => format!("+{}", names(members)),
        Event::Removed { members, .. } => format!("-{}", names(members)),
        Event::Renamed { by, name } => format!("{by} renames it {name}"),
        Event::Promoted { members } => format!("promoted {}", names(members)),
        Event::Demoted { members } => format!("demoted {}", names(members)),
        Event::DeviceAdded { person, device } => format!("+{device} of {person}"),
        Event::DeviceRemoved { person, device } => format!("-{device} of {person}"),
        Event::Rejoined { person, device } => format!("{device} of {person} joins again"),
        other => format!("{other:?}"),
    };
    entries.iter().map(|entry| line(&entry.event)).collect()
}

/// Receives, accepts the only request, and returns a line for each entry since.
async fn accept(messenger: &Messenger) -> (ConversationId, Vec<String>) {
    messenger.receive().await.expect("the server answers");
    let requests = messenger.requests().await.expect("the profile is readable").waiting;
    let [request] = &requests[..] else { panic!("{} requests", requests.len()) };
    let conversation = messenger.accept(request.id).await.expect("a request");
    (conversation, read(messenger).await)
}

async fn send(messenger: &Messenger, conversation: ConversationId, text: &str) {
    let sent = messenger.send(conversation, text).await.expect("it is saved");
    assert!(matches!(sent.outcome, qpq_client::SendOutcome::Sent), "{:?}", sent.outcome);
}

async fn members(messenger: &Messenger, conversation: ConversationId) -> Vec<String> {
    let members = messenger.members(conversation).await.expect("a group");
    members.iter().map(|person| person.username.to_string()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_client_joins_our_group_reads_writes_and_is_removed() {
    let world = World::start().await;
    let (ann, bob) = (world.user("ann").await, world.user("bob").await);
    let mut rob = world.member("rob").await;

    let group = ann.create_group("friends").await.expect("a group");
    ann.add(group, &username("rob")).await.expect("rob has KeyPackages");
    assert_eq!(rob.read().await, ["joined friends by ann"]);
    let id = rob.group("friends");
    send(&ann, group, "hi rob").await;
    assert_eq!(rob.read().await, ["ann: hi rob"]);
    rob.send(id, "hi ann").await;
    assert_eq!(read(&ann).await, ["rob: hi ann"]);

    ann.add(group, &username("bob")).await.expect("bob has KeyPackages");
    let (_, lines) = accept(&bob).await;
    assert_eq!(lines, ["joined by ann"]);
    assert_eq!(rob.read().await, ["ann commits +bob"]);
    assert_eq!(rob.members(id), ["ann", "rob", "bob"]);
    send(&bob, group, "hello both").await;
    rob.send(id, "x".repeat(50_000).as_str()).await;
    assert_eq!(rob.read().await, ["bob: hello both"]);
    assert_eq!(read(&bob).await[..], [format!("rob: {}", "x".repeat(50_000))]);
    assert_eq!(read(&ann).await.len(), 2);

    let key = IdentityKey::new(rob.account());
    ann.remove(group, key).await.expect("rob is a member");
    assert_eq!(rob.read().await, ["ann commits -rob (us)"]);
    assert_eq!(read(&bob).await, ["-rob"]);
    send(&bob, group, "between us").await;
    assert_eq!(read(&ann).await, ["bob: between us"]);
    assert_eq!(rob.read().await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_direct_conversation_begins_on_either_side() {
    let world = World::start().await;
    let (ann, bob) = (world.user("ann").await, world.user("bob").await);
    let mut rob = world.member("rob").await;

    let with_rob = ann.conversation_with(&username("rob")).await.expect("rob is registered");
    send(&ann, with_rob, "hi rob").await;
    assert_eq!(rob.read().await, ["joined by ann", "ann: hi rob"]);
    let with_ann = rob.direct("ann");
    rob.send(with_ann, "hi ann").await;
    assert_eq!(read(&ann).await, ["rob: hi ann"]);

    let with_bob = rob.create_direct("bob").await;
    rob.send(with_bob, "hi bob").await;
    assert_eq!(read(&bob).await, ["rob: hi bob"]);
    let with_rob = bob.conversation_with(&username("rob")).await.expect("rob is registered");
    send(&bob, with_rob, "hi again").await;
    assert_eq!(rob.read().await, ["bob: hi again"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn our_clients_join_a_foreign_clients_group_and_follow_its_commits() {
    let world = World::start().await;
    let (ann, bob) = (world.user("ann").await, world.user("bob").await);
    let (mut rob, mut ron) = (world.member("rob").await, world.member("ron").await);

    let id = rob.create_group("climbing").await;
    rob.change(id, Change { add: vec!["ann", "ron"], ..Change::default() }).await;
    rob.send(id, "welcome").await;
    let (group, lines) = accept(&ann).await;
    assert_eq!(lines, ["joined by rob", "rob: welcome"]);
    assert_eq!(ron.read().await, ["joined climbing by rob", "rob: welcome"]);
    send(&ann, group, "hello").await;
    assert_eq!(rob.read().await, ["ann: hello"]);
    assert_eq!(ron.read().await, ["ann: hello"]);

    // A commit that renews its author's keys, one that adds and one that removes.
    rob.change(id, Change::default()).await;
    rob.send(id, "with fresh keys").await;
    assert_eq!(read(&ann).await, ["rob: with fresh keys"]);
    rob.change(id, Change { add: vec!["bob"], ..Change::default() }).await;
    assert_eq!(read(&ann).await, ["+bob"]);
    let (_, lines) = accept(&bob).await;
    assert_eq!(lines, ["joined by rob"]);
    assert_eq!(members(&bob, group).await, ["rob", "ann", "ron", "bob"]);
    rob.change(id, Change { remove: vec!["ron"], ..Change::default() }).await;
    assert_eq!(read(&ann).await, ["-ron"]);
    assert_eq!(
        ron.read().await,
        ["rob commits", "rob: with fresh keys", "rob commits +bob", "rob commits -ron (us)"]
    );
    send(&bob, group, "ron is away").await;
    assert_eq!(rob.read().await, ["bob: ron is away"]);
    assert_eq!(read(&ann).await, ["bob: ron is away"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn members_leave_groups_of_the_other_implementation() {
    let world = World::start().await;
    let (ann, bob) = (world.user("ann").await, world.user("bob").await);
    let mut rob = world.member("rob").await;

    let ours = ann.create_group("ours").await.expect("a group");
    ann.add(ours, &username("rob")).await.expect("rob has KeyPackages");
    rob.read().await;
    rob.send_leaving(rob.group("ours")).await;
    read(&ann).await;
    assert_eq!(rob.read().await, ["ann commits -rob (us)"]);
    assert_eq!(members(&ann, ours).await, ["ann"]);

    let id = rob.create_group("theirs").await;
    rob.change(id, Change { add: vec!["bob"], ..Change::default() }).await;
    let (theirs, _) = accept(&bob).await;
    bob.leave(theirs).await.expect("a group of another creator");
    assert_eq!(rob.read().await, ["bob leaves"]);
    rob.change(id, Change { remove: vec!["bob"], ..Change::default() }).await;
    assert_eq!(rob.members(id), ["rob"]);
    assert_eq!(read(&bob).await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn our_clients_follow_the_commits_of_a_foreign_member_and_admin() {
    let world = World::start().await;
    let (ann, bob) = (world.user("ann").await, world.user("bob").await);
    let mut rob = world.member("rob").await;
    let group = ann.create_group("friends").await.expect("a group");
    ann.add(group, &username("rob")).await.expect("rob has KeyPackages");
    ann.add(group, &username("bob")).await.expect("bob has KeyPackages");
    accept(&bob).await;
    assert_eq!(rob.read().await, ["joined friends by ann", "ann commits +bob"]);
    let id = rob.group("friends");

    // A member renews its keys.
    rob.change(id, Change::default()).await;
    rob.send(id, "with fresh keys").await;
    assert_eq!(read(&ann).await, ["rob: with fresh keys"]);
    assert_eq!(read(&bob).await, ["rob: with fresh keys"]);
    send(&bob, group, "fine").await;
    assert_eq!(rob.read().await, ["bob: fine"]);

    // An admin changes the members, the name and the admins.
    let key = IdentityKey::new(rob.account());
    ann.set_role(group, key, Role::Admin).await.expect("ann is an admin");
    assert_eq!(read(&bob).await, ["promoted rob"]);
    assert_eq!(rob.read().await, ["ann commits profile"]);
    let cat = world.user("cat").await;
    rob.change(id, Change { add: vec!["cat"], ..Change::default() }).await;
    let (_, lines) = accept(&cat).await;
    assert_eq!(lines, ["joined by rob"]);
    rob.change(id, Change { name: Some("club"), ..Change::default() }).await;
    rob.change(id, Change { remove: vec!["bob"], ..Change::default() }).await;
    assert_eq!(read(&ann).await, ["bob: fine", "+cat", "rob renames it club", "-bob"]);
    assert_eq!(read(&bob).await, ["+cat", "rob renames it club", "-bob"]);
    assert_eq!(read(&cat).await, ["rob renames it club", "-bob"]);
    rob.change(id, Change { admins: Some(vec!["rob"]), ..Change::default() }).await;
    assert_eq!(read(&ann).await, ["demoted ann"]);
    ann.rename(group, "mine").await.expect_err("ann is no longer an admin");
    send(&ann, group, "well").await;
    assert_eq!(rob.read().await, ["ann: well"]);
    assert_eq!(read(&cat).await, ["demoted ann", "ann: well"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn commits_of_both_implementations_at_the_same_time_all_take_effect() {
    let world = World::start().await;
    let (ann, _bob) = (world.user("ann").await, world.user("bob").await);
    let (mut rob, mut ron) = (world.member("rob").await, world.member("ron").await);
    let group = ann.create_group("busy").await.expect("a group");
    ann.add(group, &username("rob")).await.expect("rob has KeyPackages");
    ann.add(group, &username("ron")).await.expect("ron has KeyPackages");
    rob.read().await;
    ron.read().await;
    let (of_rob, of_ron) = (rob.group("busy"), ron.group("busy"));
    for name in ["one", "two", "three"] {
        let renamed = ann.rename(group, name);
        let (renamed, (), ()) = tokio::join!(
            renamed,
            rob.change(of_rob, Change::default()),
            ron.change(of_ron, Change::default()),
        );
        renamed.expect("it is made in the end");
    }
    for member in [&mut rob, &mut ron] {
        let lines = member.read().await;
        assert!(lines.iter().all(|line| line.contains(" commits")), "{lines:?}");
    }
    read(&ann).await;
    send(&ann, group, "still together").await;
    assert_eq!(rob.read().await, ["ann: still together"]);
    assert_eq!(ron.read().await, ["ann: still together"]);
    ron.send(of_ron, "yes").await;
    assert_eq!(read(&ann).await, ["ron: yes"]);
    assert_eq!(rob.read().await, ["ron: yes"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_of_a_foreign_account_are_added_join_by_themselves_and_are_removed() {
    let world = World::start().await;
    let (ann, bob) = (world.user("ann").await, world.user("bob").await);
    let mut first = Member::register_with_device(&world.running, "rob").await;
    let group = ann.create_group("friends").await.expect("a group");
    ann.add(group, &username("rob")).await.expect("rob has KeyPackages");
    ann.add(group, &username("bob")).await.expect("bob has KeyPackages");
    accept(&bob).await;
    assert_eq!(first.read().await, ["joined friends by ann", "ann commits +bob"]);
    let id = first.group("friends");

    // A second device, which our client adds before it sends.
    let mut second = first.link(&world.running, "second").await;
    send(&ann, group, "hi rob").await;
    assert_eq!(first.read().await, ["ann commits +rob", "ann: hi rob"]);
    assert_eq!(second.read().await, ["joined friends by ann", "ann: hi rob"]);
    assert_eq!(read(&bob).await, ["+second of rob", "ann: hi rob"]);
    second.send(id, "from the second").await;
    assert_eq!(first.read().await, ["rob: from the second"]);
    assert_eq!(read(&ann).await, ["+second of rob", "rob: from the second"]);

    // A third one joins by itself.
    let mut third = first.link(&world.running, "third").await;
    third.join_by_itself(id, &first.channel(id)).await;
    third.send(id, "from the third").await;
    assert_eq!(read(&ann).await, ["+third of rob", "rob: from the third"]);
    assert_eq!(first.read().await, ["a device joins", "rob: from the third"]);
    send(&ann, group, "hi third").await;
    assert_eq!(third.read().await, ["ann: hi third"]);

    // As after the loss of its state, in the place of its leaf.
    third.join_by_itself(id, &first.channel(id)).await;
    third.send(id, "here again").await;
    assert_eq!(read(&ann).await, ["third of rob joins again", "rob: here again"]);
    assert_eq!(first.read().await, ["ann: hi third", "a device joins -rob", "rob: here again"]);

    // Our client removes a device that is revoked.
    first.revoke(&second).await;
    send(&ann, group, "without the second").await;
    assert_eq!(first.read().await, ["ann commits -rob", "ann: without the second"]);
    assert_eq!(third.members(id).len(), 5);
    assert_eq!(third.read().await, ["ann commits -rob", "ann: without the second"]);
    assert_eq!(third.members(id), ["ann", "rob", "bob", "rob"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn commits_beyond_the_rights_of_their_author_are_refused_by_both_implementations() {
    let world = World::start().await;
    let (ann, bob) = (world.user("ann").await, world.user("bob").await);
    let (cat, mut ron) = (world.user("cat").await, world.member("ron").await);
    let group = ann.create_group("friends").await.expect("a group");
    for name in ["ron", "bob"] {
        ann.add(group, &username(name)).await.expect("there are KeyPackages");
    }
    accept(&bob).await;
    let changes = [
        ("rob1", Change { name: Some("mine"), ..Change::default() }),
        ("rob2", Change { admins: Some(vec!["rob2"]), ..Change::default() }),
        ("rob3", Change { remove: vec!["bob"], ..Change::default() }),
        ("rob4", Change { add: vec!["cat"], ..Change::default() }),
    ];
    for (name, change) in changes {
        let mut unruly = Member::register_unruly(&world.running, name).await;
        ann.add(group, &username(name)).await.expect("there are KeyPackages");
        unruly.read().await;
        ron.read().await;
        read(&bob).await;
        // The server accepts the commit, and no member follows it.
        unruly.change(unruly.group("friends"), change).await;
        for messenger in [&ann, &bob] {
            let lines = read(messenger).await;
            let refusal = lines.last().expect("a line");
            assert!(refusal.contains("a member that may not make it"), "{name}: {lines:?}");
        }
        let lines = ron.read().await;
        assert!(matches!(&lines[..], [line] if line.starts_with("refused: ")), "{lines:?}");
    }
    let lines = read(&cat).await;
    assert!(matches!(&lines[..], [line] if line.starts_with("Unreadable")), "{lines:?}");
    assert_eq!(cat.requests().await.expect("a profile").waiting, []);

    send(&bob, group, "as before").await;
    assert_eq!(read(&ann).await, ["bob: as before"]);
    assert_eq!(ron.read().await, ["bob: as before"]);
    ann.rename(group, "ours").await.expect("ann is an admin");
    assert_eq!(ron.read().await, ["ann commits profile"]);
    assert_eq!(read(&bob).await, ["ann renames it ours"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_implementation_repeats_what_the_other_could_not_read() {
    let world = World::start().await;
    let ann = world.user("ann").await;
    let mut rob = world.member("rob").await;
    let with_rob = ann.conversation_with(&username("rob")).await.expect("rob is registered");
    send(&ann, with_rob, "hi").await;
    assert_eq!(rob.read().await, ["joined by ann", "ann: hi"]);
    let first = rob.direct("ann");

    let digest = rob.send_damaged(first, "lost").await;
    let lines = read(&ann).await;
    assert!(matches!(&lines[..], [line] if line.starts_with("Unreadable")), "{lines:?}");
    assert_eq!(rob.read().await, ["joined by ann", "ann could not read"]);
    assert_ne!(rob.direct("ann"), first, "the question is in a new group");
    rob.repeat("ann", "lost", digest).await;
    assert_eq!(read(&ann).await, ["rob: lost"]);

    send(&ann, with_rob, "once more").await;
    assert_eq!(rob.read().await, ["ann: once more"]);
    rob.ask_for_last("ann").await;
    assert_eq!(read(&ann).await, [""; 0]);
    assert_eq!(rob.read().await, ["ann again: once more"]);
    send(&ann, with_rob, "in the newest group").await;
    assert_eq!(rob.read().await, ["ann: in the newest group"]);
}
