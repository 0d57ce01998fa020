//! Blocked people, and groups that are left.

use qpq_client::{Error, Messenger, MlsError, SendOutcome};

use crate::harness::{Server, accept_and_read, dm, read, reopen, restart, username};

/// Returns the numbers of values and items in the state of a profile, without the digests by which
/// repeated messages are recognized.
fn size(server: &Server, name: &str) -> (u64, u64) {
    let path = server.profile(name).join("state.db");
    let database = rusqlite::Connection::open(path).unwrap();
    let counts = "SELECT (SELECT count(*) FROM rows), (SELECT count(*) FROM items)";
    let counted: (i64, i64) =
        database.query_row(counts, [], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
    (counted.0.cast_unsigned(), counted.1.cast_unsigned())
}

/// Creates a group of two, and writes to it.
async fn invite(creator: &Messenger, guest: &str, name: &str) {
    let group = creator.create_group(name).await.unwrap();
    creator.add(group, &username(guest)).await.unwrap();
    creator.send(group, "join us").await.unwrap();
}

#[tokio::test]
async fn messages_of_a_blocked_person_leave_nothing() {
    let server = Server::start().await;
    let [bob, mallory] = server.users(["bob", "mallory"]).await;
    mallory.send(dm(&mallory, "bob").await, "hello").await.unwrap();
    assert_eq!(read(&bob).await, ["mallory: hello"]);
    let blocked = bob.block(mallory.profile().identity).await.unwrap();
    assert_eq!(blocked.username, username("mallory"));

    let mut sizes = Vec::new();
    for _ in 0..2 {
        // More groups than there are KeyPackages: each time the stock is filled up.
        for n in 0..60 {
            invite(&mallory, "bob", &format!("offer {n}")).await;
            mallory.send(dm(&mallory, "bob").await, "hello?").await.unwrap();
        }
        assert_eq!(read(&bob).await, [""; 0]);
        sizes.push(size(&server, "bob"));
    }
    assert_eq!(sizes[0], sizes[1]);
    assert_eq!(bob.conversations().await.unwrap().len(), 1, "the one from before");

    // Nothing waits in the inbox. Others can write to bob, since he has published new KeyPackages.
    assert_eq!(read(&bob).await, [""; 0]);
    let alice = server.user("alice").await;
    invite(&alice, "bob", "friends").await;
    assert_eq!(accept_and_read(&bob).await, ["joined by alice", "alice: join us"]);
}

#[tokio::test]
async fn messages_of_a_blocked_member_are_hidden_until_unblocked() {
    let server = Server::start().await;
    let [alice, bob, mallory] = server.users(["alice", "bob", "mallory"]).await;
    let group = alice.create_group("friends").await.unwrap();
    for name in ["bob", "mallory"] {
        alice.add(group, &username(name)).await.unwrap();
    }
    accept_and_read(&mallory).await;
    accept_and_read(&bob).await;

    // Another process of the profile blocks the person. This process respects the block, also after
    // a restart.
    let (dir, key) = (server.profile("bob"), bob.vault_key().await);
    let other = reopen(&dir, &key).await;
    let mallorys = mallory.profile().identity;
    other.block(mallorys).await.unwrap();
    other.block(mallorys).await.unwrap();
    drop(other);
    mallory.send(group, "one").await.unwrap();
    alice.send(group, "two").await.unwrap();
    assert_eq!(read(&bob).await, ["alice: two"]);
    drop(bob);
    let bob = restart(&dir, &key).await;
    mallory.send(group, "three").await.unwrap();
    assert_eq!(read(&bob).await, [""; 0]);
    let names: Vec<_> =
        bob.blocked().await.unwrap().iter().map(|person| person.username.to_string()).collect();
    assert_eq!(names, ["mallory"]);

    assert!(bob.unblock(mallorys).await.unwrap());
    assert!(!bob.unblock(mallorys).await.unwrap());
    assert!(bob.blocked().await.unwrap().is_empty());
    bob.send_blocks().await.unwrap();
    mallory.send(group, "four").await.unwrap();
    assert_eq!(read(&bob).await, ["mallory: four"]);
}

#[tokio::test]
async fn the_server_refuses_a_blocked_person_once_it_knows() {
    let mut server = Server::start().await;
    let (bob, mallory) = (server.user("bob").await, server.user("mallory").await);
    let with_bob = dm(&mallory, "bob").await;
    mallory.send(with_bob, "hello").await.unwrap();
    assert_eq!(read(&bob).await, ["mallory: hello"]);
    let mallorys = mallory.profile().identity;
    bob.block(mallorys).await.unwrap();
    bob.send_blocks().await.unwrap();
    bob.send_blocks().await.unwrap();
    assert!(matches!(mallory.send(with_bob, "one").await.unwrap().outcome, SendOutcome::Refused));

    // Of changes without a connection, the server learns the last one.
    let (dir, key) = (server.profile("bob"), bob.vault_key().await);
    server.stop().await;
    bob.unblock(mallorys).await.unwrap();
    bob.block(mallorys).await.unwrap();
    bob.unblock(mallorys).await.unwrap();
    assert!(bob.send_blocks().await.is_err(), "the server cannot be reached");
    drop(bob);
    server.start_again().await;
    let bob = restart(&dir, &key).await;
    assert!(matches!(mallory.send(with_bob, "two").await.unwrap().outcome, SendOutcome::Refused));
    assert_eq!(read(&bob).await, [""; 0]);
    assert!(matches!(mallory.send(with_bob, "three").await.unwrap().outcome, SendOutcome::Sent));
    assert_eq!(read(&bob).await, ["mallory: three"]);
}

#[tokio::test]
async fn nothing_is_sent_to_a_blocked_person() {
    let server = Server::start().await;
    let [bob, mallory] = server.users(["bob", "mallory"]).await;
    let with_mallory = dm(&bob, "mallory").await;
    let group = bob.create_group("friends").await.unwrap();
    bob.block(mallory.profile().identity).await.unwrap();
    for refused in [
        bob.send(with_mallory, "hello").await.map(drop),
        bob.add(group, &username("mallory")).await.map(drop),
    ] {
        assert!(matches!(&refused, Err(Error::Blocked(name)) if *name == username("mallory")));
    }
    let oneself = bob.block(bob.profile().identity).await;
    assert!(matches!(oneself, Err(Error::Mls(MlsError::Yourself))), "{oneself:?}");
    assert_eq!(read(&mallory).await, [""; 0]);
}

#[tokio::test]
async fn a_member_who_leaves_is_removed_for_all_and_receives_nothing_more() {
    let server = Server::start().await;
    let [alice, bob, carol] = server.users(["alice", "bob", "carol"]).await;
    let group = alice.create_group("friends").await.unwrap();
    for name in ["bob", "carol"] {
        alice.add(group, &username(name)).await.unwrap();
    }
    accept_and_read(&carol).await;
    accept_and_read(&bob).await;
    alice.send(group, "unread by Bob").await.unwrap();
    read(&carol).await;
    bob.receive().await.unwrap();
    assert!(matches!(bob.leave(group).await.unwrap(), SendOutcome::Sent));
    let again = bob.leave(group).await;
    assert!(matches!(again, Err(Error::NoSuchConversation)), "{again:?}");
    assert!(bob.conversations().await.unwrap().is_empty());

    let (dir, key) = (server.profile("bob"), bob.vault_key().await);
    drop(bob);
    let bob = restart(&dir, &key).await;
    let before = size(&server, "bob");
    carol.send(group, "Bob?").await.unwrap();
    assert_eq!(read(&alice).await, ["carol: Bob?", "-bob"]);
    alice.send(group, "he has left").await.unwrap();
    assert_eq!(read(&carol).await, ["-bob", "alice: he has left"]);
    for member in [&alice, &carol] {
        assert_eq!(member.members(group).await.unwrap().len(), 2);
    }
    assert_eq!(read(&bob).await, [""; 0]);
    assert_eq!(size(&server, "bob").1, before.1, "nothing waits for the group");

    alice.add(group, &username("bob")).await.unwrap();
    alice.send(group, "welcome back").await.unwrap();
    assert_eq!(read(&bob).await, ["joined by alice", "alice: welcome back"]);
    bob.send(group, "thanks").await.unwrap();
    assert_eq!(read(&carol).await, ["+bob", "alice: welcome back", "bob: thanks"]);
}

#[tokio::test]
async fn members_who_leave_concurrently_are_removed_by_one_commit_of_an_admin() {
    let server = Server::start().await;
    let [alice, bob, carol, dave] = [
        server.user("alice").await,
        server.user("bob").await,
        server.user("carol").await,
        server.user("dave").await,
    ];
    let group = alice.create_group("friends").await.unwrap();
    for name in ["bob", "carol", "dave"] {
        alice.add(group, &username(name)).await.unwrap();
    }
    for member in [&bob, &carol, &dave] {
        accept_and_read(member).await;
    }
    // A member that the creator has blocked can leave.
    alice.block(dave.profile().identity).await.unwrap();
    carol.leave(group).await.unwrap();
    dave.leave(group).await.unwrap();
    assert_eq!(read(&alice).await, ["-carol,dave"]);
    assert_eq!(read(&bob).await, ["-carol,dave"]);
    assert_eq!(bob.members(group).await.unwrap().len(), 2);

    let direct = alice.leave(dm(&alice, "bob").await).await;
    assert!(matches!(direct, Err(Error::Mls(MlsError::DirectIsForTwo))), "{direct:?}");

    alice.leave(group).await.unwrap();
    assert_eq!(read(&bob).await, ["admins: bob", "-alice"]);
    alice.receive().await.unwrap();
    assert_eq!(bob.members(group).await.unwrap().len(), 1);
    bob.leave(group).await.unwrap();
    assert!(bob.conversations().await.unwrap().is_empty());
    assert_eq!(read(&alice).await, [""; 0]);
}
