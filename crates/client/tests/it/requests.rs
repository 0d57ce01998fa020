//! Groups of strangers: they wait as requests until they are accepted or declined.

use qpq_client::{Error, Messenger, methods, v1};

use crate::harness::{
    Server, accept_and_read, crash_after, dm, read, reopen, restart, soon, username,
};

/// Returns the bytes of all values and items in the state of a profile, without the digests by
/// which repeated messages are recognized.
fn bytes(server: &Server, name: &str) -> u64 {
    let path = server.profile(name).join("state.db");
    let database = rusqlite::Connection::open(path).unwrap();
    let sum = "SELECT coalesce((SELECT sum(length(value)) FROM rows), 0) +
                      coalesce((SELECT sum(length(value)) FROM items), 0)";
    database.query_row(sum, [], |row| row.get::<_, i64>(0)).unwrap().cast_unsigned()
}

/// Creates a group of two, and writes to it.
async fn invite(creator: &Messenger, guest: &str) {
    let group = creator.create_group("offer").await.unwrap();
    creator.add(group, &username(guest)).await.unwrap();
    creator.send(group, "join us").await.unwrap();
}

async fn key_packages(messenger: &Messenger) -> u32 {
    let count = v1::CountKeyPackagesRequest::default();
    let counted = messenger.client().call::<methods::CountKeyPackages>(count).await.unwrap();
    counted.available
}

#[tokio::test]
async fn messages_to_a_waiting_group_are_shown_after_the_group_is_accepted() {
    let server = Server::start().await;
    let [alice, bob, carol, dave] = [
        server.user("alice").await,
        server.user("bob").await,
        server.user("carol").await,
        server.user("dave").await,
    ];
    let group = alice.create_group("friends").await.unwrap();
    alice.add(group, &username("bob")).await.unwrap();
    assert_eq!(read(&bob).await, ["alice asks for friends"]);
    alice.add(group, &username("carol")).await.unwrap();
    alice.send(group, "one").await.unwrap();
    assert_eq!(accept_and_read(&carol).await, ["joined by alice", "alice: one"]);
    carol.send(group, "two").await.unwrap();
    alice.add(group, &username("dave")).await.unwrap();
    accept_and_read(&dave).await;
    dave.send(group, "three").await.unwrap();
    assert_eq!(read(&bob).await, [""; 0]);
    assert!(bob.conversations().await.unwrap().is_empty());
    let refused = bob.send(group, "hello?").await;
    assert!(matches!(refused, Err(Error::NoSuchConversation)), "{refused:?}");

    let waiting = bob.requests().await.unwrap().waiting;
    assert_eq!(waiting[0].from.to_string(), "alice");
    assert_eq!((waiting[0].group.as_deref(), waiting[0].members), (Some("friends"), 2));
    assert_eq!(bob.accept(waiting[0].id).await.unwrap(), group);
    let shown = read(&bob).await;
    let expected =
        ["joined by alice", "+carol", "alice: one", "carol: two", "+dave", "dave: three"];
    assert_eq!(shown, expected);
    bob.send(group, "four").await.unwrap();
    assert_eq!(read(&dave).await, ["bob: four"]);

    // The creator of the group is an acquaintance now.
    invite(&alice, "bob").await;
    assert_eq!(read(&bob).await, ["joined by alice", "alice: join us"]);
    assert!(bob.requests().await.unwrap().waiting.is_empty());
}

#[tokio::test]
async fn sixty_groups_of_a_stranger_cost_a_bounded_number_of_bytes() {
    let server = Server::start().await;
    let [bob, mallory] = server.users(["bob", "mallory"]).await;
    let mut sizes = vec![bytes(&server, "bob")];
    for round in 0..3 {
        // As many groups as there are KeyPackages: each time the stock is filled up.
        for _ in 0..20 {
            invite(&mallory, "bob").await;
        }
        let announced: &[&str] = if round == 0 { &["mallory asks for offer"] } else { &[] };
        assert_eq!(read(&bob).await, announced);
        assert_eq!(key_packages(&bob).await, 20);
        sizes.push(bytes(&server, "bob"));
    }
    let of_first = (sizes[1] - sizes[0]) / 20;
    assert!(of_first < 4 * 1024, "{of_first} bytes for each of the first 20");
    for two in sizes[1..].windows(2) {
        let each = (two[1] - two[0]) / 20;
        assert!(each < 64, "{each} bytes for each further one");
    }
    let requests = bob.requests().await.unwrap();
    assert_eq!((requests.waiting.len(), requests.dropped), (10, 50));
    assert!(bob.conversations().await.unwrap().is_empty());

    // Blocking the stranger frees the space.
    bob.block(mallory.profile().identity).await.unwrap();
    let requests = bob.requests().await.unwrap();
    assert_eq!((requests.waiting.len(), requests.dropped), (0, 0));
    assert!(bytes(&server, "bob") < sizes[0] + 20 * 1024);
}

#[tokio::test]
async fn a_declined_request_leaves_nothing_and_its_key_package_is_replaced() {
    let server = Server::start().await;
    let [bob, mallory] = server.users(["bob", "mallory"]).await;
    let group = mallory.create_group("offer").await.unwrap();
    mallory.add(group, &username("bob")).await.unwrap();
    for _ in 0..10 {
        invite(&mallory, "bob").await;
    }
    assert_eq!(key_packages(&bob).await, 9);
    bob.receive().await.unwrap();
    assert_eq!(key_packages(&bob).await, 20);
    let waiting = bob.requests().await.unwrap().waiting;
    assert_eq!(waiting.len(), 10);
    for request in &waiting {
        bob.decline(request.id).await.unwrap();
    }
    for again in [bob.decline(waiting[0].id).await, bob.accept(waiting[0].id).await.map(drop)] {
        assert!(matches!(again, Err(Error::NoSuchRequest)), "{again:?}");
    }
    let before = bytes(&server, "bob");
    mallory.send(group, "still there?").await.unwrap();
    assert_eq!(read(&bob).await, [""; 0]);
    assert_eq!(bytes(&server, "bob"), before);

    // A person whose request was declined can ask again.
    invite(&mallory, "bob").await;
    assert_eq!(accept_and_read(&bob).await, ["joined by mallory", "mallory: join us"]);
}

#[tokio::test]
async fn people_one_wrote_to_compared_with_or_added_are_not_strangers() {
    let server = Server::start().await;
    let [alice, bob, carol, dave] = [
        server.user("alice").await,
        server.user("bob").await,
        server.user("carol").await,
        server.user("dave").await,
    ];
    bob.send(dm(&bob, "alice").await, "hi").await.unwrap();
    bob.mark_compared(&username("carol")).await.unwrap();
    let group = bob.create_group("friends").await.unwrap();
    bob.add(group, &username("dave")).await.unwrap();
    for (creator, name) in [(&alice, "alice"), (&carol, "carol"), (&dave, "dave")] {
        invite(creator, "bob").await;
        assert_eq!(read(&bob).await, [format!("joined by {name}"), format!("{name}: join us")]);
    }
    // Receiving a message does not make its sender an acquaintance.
    alice.send(dm(&alice, "carol").await, "hi").await.unwrap();
    invite(&alice, "carol").await;
    assert_eq!(read(&carol).await, ["alice: hi", "alice asks for offer"]);
}

#[tokio::test]
async fn a_crash_leaves_a_request_or_a_group_and_never_both_or_neither() {
    let server = Server::start().await;
    let [alice, bob] = server.users(["alice", "bob"]).await;
    let (dir, key) = (server.profile("bob"), bob.vault_key().await);
    drop(bob);
    invite(&alice, "bob").await;
    let mut receives = 0;
    loop {
        let bob = restart(&dir, &key).await;
        let ended = soon(crash_after(receives, bob.receive())).await;
        drop(bob);
        let waiting = restart(&dir, &key).await.requests().await.unwrap().waiting;
        assert!(waiting.len() <= 1, "after {receives} polls");
        if ended.is_some() {
            assert_eq!(waiting.len(), 1);
            break;
        }
        receives += 1;
    }
    let id = restart(&dir, &key).await.requests().await.unwrap().waiting[0].id;
    for polls in 0.. {
        let bob = restart(&dir, &key).await;
        let ended = soon(crash_after(polls, bob.accept(id))).await;
        drop(bob);
        let bob = restart(&dir, &key).await;
        let waiting = bob.requests().await.unwrap().waiting.len();
        let joined = bob.conversations().await.unwrap().len();
        assert_eq!(waiting + joined, 1, "after {polls} polls");
        if joined == 1 {
            assert_eq!(read(&bob).await, ["joined by alice", "alice: join us"]);
            break;
        }
        assert!(ended.is_none(), "accepted, but not joined");
    }
}

#[tokio::test]
async fn a_request_is_accepted_after_the_key_packages_were_replaced() {
    let mut server = Server::start().await;
    let [alice, bob] = server.users(["alice", "bob"]).await;
    invite(&alice, "bob").await;
    assert_eq!(read(&bob).await, ["alice asks for offer"]);
    // A store that went back makes the client replace its KeyPackages.
    let night = server.copy_data().await;
    server.restore_data(&night).await;
    alice.send(dm(&alice, "bob").await, "hello").await.unwrap();
    assert!(read(&bob).await.contains(&"alice: hello".to_owned()));
    assert_eq!(accept_and_read(&bob).await, ["joined by alice", "alice: join us"]);
}

#[tokio::test]
async fn two_processes_of_a_profile_accept_a_request_once() {
    let server = Server::start().await;
    let [alice, bob] = server.users(["alice", "bob"]).await;
    let other = reopen(&server.profile("bob"), &bob.vault_key().await).await;
    invite(&alice, "bob").await;
    assert_eq!(read(&bob).await, ["alice asks for offer"]);
    let id = other.requests().await.unwrap().waiting[0].id;
    let both = tokio::join!(bob.accept(id), other.accept(id));
    let results = [both.0, both.1];
    let accepted = results.iter().filter(|result| result.is_ok()).count();
    let refused =
        results.iter().filter(|result| matches!(result, Err(Error::NoSuchRequest))).count();
    assert_eq!((accepted, refused), (1, 1), "{results:?}");
    assert_eq!(read(&other).await, ["joined by alice", "alice: join us"]);
    alice.send(dm(&alice, "bob").await, "hello").await.unwrap();
    assert_eq!(read(&bob).await, ["alice: hello"]);
}
