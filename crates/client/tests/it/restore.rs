//! Stores that go back in time: the server's, as when a backup is restored, and the profile's own.

use std::{fs, path::PathBuf};

use qpq_client::{Event, Messenger, VaultKey, methods, v1};

use crate::harness::{Server, accept_and_read, copy_dir, dm, history, read, reopen, username};

#[tokio::test]
async fn messages_after_a_restore_of_the_server_are_shown_and_the_restore_is_reported() {
    let mut server = Server::start().await;
    let [alice, bob] = server.users(["alice", "bob"]).await;
    let with_bob = dm(&alice, "bob").await;
    alice.send(with_bob, "hello").await.unwrap();
    assert_eq!(read(&bob).await, ["alice: hello"]);
    let night = server.copy_data().await;
    for number in 0..5 {
        alice.send(with_bob, &format!("before {number}")).await.unwrap();
    }
    assert_eq!(read(&bob).await.len(), 5);
    server.restore_data(&night).await;
    for number in 0..8 {
        alice.send(with_bob, &format!("after {number}")).await.unwrap();
    }
    let shown = read(&bob).await;
    let expected: Vec<_> = (0..8).map(|number| format!("alice: after {number}")).collect();
    assert_eq!(shown[0], "the server went back");
    assert_eq!(shown[1..], expected);
    assert!(read(&bob).await.is_empty());
    alice.send(with_bob, "and on").await.unwrap();
    assert_eq!(read(&bob).await, ["alice: and on"], "it is said once");
}

#[tokio::test]
async fn messages_repeated_by_a_restored_server_are_shown_once() {
    let mut server = Server::start().await;
    let [alice, bob] = server.users(["alice", "bob"]).await;
    let (with_bob, with_alice) = (dm(&alice, "bob").await, dm(&bob, "alice").await);
    alice.send(with_bob, "queued when the backup was made").await.unwrap();
    let night = server.copy_data().await;
    assert_eq!(read(&bob).await.len(), 1);
    alice.send(with_bob, "after the backup").await.unwrap();
    assert_eq!(read(&bob).await.len(), 1);
    server.restore_data(&night).await;
    assert!(read(&bob).await.is_empty(), "it was shown before");
    alice.send(with_bob, "after the restore").await.unwrap();
    assert_eq!(read(&bob).await, ["the server went back", "alice: after the restore"]);
    assert_eq!(history(&bob, with_alice).await.len(), 3);
    assert!(fs::exists(server.profile("bob").join("state.db")).unwrap());
}

/// Replaces a profile's directory by an older copy, while no process uses it.
fn put_back(server: &Server, name: &str, copy: &std::path::Path) {
    fs::remove_dir_all(server.profile(name)).unwrap();
    copy_dir(copy, &server.profile(name));
}

async fn closed(messenger: Messenger) -> VaultKey {
    let key = messenger.vault_key().await;
    messenger.client().close().await;
    key
}

/// Copies a profile's directory while no process uses it. Returns the profile, opened again, its
/// key, and the path of the copy.
async fn copied(
    server: &Server,
    name: &str,
    messenger: Messenger,
) -> (Messenger, VaultKey, PathBuf) {
    let dir = server.profile(name);
    let key = closed(messenger).await;
    let copy = dir.with_extension("night");
    copy_dir(&dir, &copy);
    (reopen(&dir, &key).await, key, copy)
}

#[tokio::test]
async fn messages_of_a_restored_profile_are_shown() {
    let server = Server::start().await;
    let [alice, bob] = server.users(["alice", "bob"]).await;
    let (with_bob, with_alice) = (dm(&alice, "bob").await, dm(&bob, "alice").await);
    let group = bob.create_group("friends").await.unwrap();
    bob.add(group, &username("alice")).await.unwrap();
    alice.send(with_bob, "hello").await.unwrap();
    accept_and_read(&alice).await;
    let (alice, key, copy) = copied(&server, "alice", alice).await;
    for number in 0..3 {
        alice.send(with_bob, &format!("day {number}")).await.unwrap();
        alice.send(group, &format!("day {number} to friends")).await.unwrap();
    }
    assert_eq!(read(&bob).await.len(), 7);
    closed(alice).await;

    // First without reading the inbox before sending, then after reading it.
    for looks in [false, true] {
        put_back(&server, "alice", &copy);
        let alice = reopen(&server.profile("alice"), &key).await;
        if looks {
            let entries = alice.receive().await.unwrap();
            assert!(entries.iter().any(|entry| entry.event == Event::Restored), "{entries:?}");
        }
        for number in 0..4 {
            alice.send(with_bob, &format!("next day {number}")).await.unwrap();
            alice.send(group, &format!("next day {number} to friends")).await.unwrap();
        }
        let shown = read(&bob).await;
        let expected: Vec<_> = (0..4)
            .flat_map(|number| {
                [
                    format!("alice: next day {number}"),
                    format!("alice: next day {number} to friends"),
                ]
            })
            .collect();
        assert_eq!(shown, expected, "looks first: {looks}");
        bob.send(with_alice, "answer").await.unwrap();
        let answered = read(&alice).await;
        assert!(answered.contains(&"bob: answer".to_owned()), "{answered:?}");
        closed(alice).await;
    }
}

/// The texts written offline use as many keys as the newer state had used, and more.
#[tokio::test]
async fn a_restored_profile_that_writes_offline_is_noticed_and_its_texts_are_readable() {
    let mut server = Server::start().await;
    let [alice, bob] = server.users(["alice", "bob"]).await;
    let with_bob = dm(&alice, "bob").await;
    alice.send(with_bob, "hello").await.unwrap();
    let (alice, key, copy) = copied(&server, "alice", alice).await;
    for number in 0..3 {
        alice.send(with_bob, &format!("day {number}")).await.unwrap();
    }
    closed(alice).await;
    accept_and_read(&bob).await;

    put_back(&server, "alice", &copy);
    server.stop().await;
    let alice = reopen(&server.profile("alice"), &key).await;
    for number in 0..5 {
        alice.queue(with_bob, &format!("offline {number}")).await.unwrap();
    }
    server.start_again().await;
    assert!(read(&alice).await.contains(&"the profile went back".to_owned()));
    let expected: Vec<_> = (0..5).map(|number| format!("alice: offline {number}")).collect();
    assert_eq!(read(&bob).await, expected);
    // The next process of the same state finds its own marker.
    closed(alice).await;
    let alice = reopen(&server.profile("alice"), &key).await;
    assert!(read(&alice).await.is_empty());
}

#[tokio::test]
async fn a_restored_profile_that_only_sends_replaces_its_key_packages() {
    let server = Server::start().await;
    let [alice, bob] = server.users(["alice", "bob"]).await;
    let carol = server.user("carol").await;
    let with_bob = dm(&alice, "bob").await;
    alice.send(with_bob, "hello").await.unwrap();
    let (alice, key, copy) = copied(&server, "alice", alice).await;
    for _ in 0..20 {
        let request = v1::FetchKeyPackageRequest {
            identity_key: alice.profile().identity.as_bytes().to_vec().into(),
            ..Default::default()
        };
        bob.client().call::<methods::FetchKeyPackage>(request).await.unwrap();
    }
    alice.publish_key_packages().await.unwrap();
    for number in 0..3 {
        alice.send(with_bob, &format!("day {number}")).await.unwrap();
    }
    closed(alice).await;

    put_back(&server, "alice", &copy);
    let alice = reopen(&server.profile("alice"), &key).await;
    alice.send(with_bob, "next day").await.unwrap();
    carol.send(dm(&carol, "alice").await, "hi").await.unwrap();
    let shown = accept_and_read(&alice).await;
    assert!(shown.contains(&"carol: hi".to_owned()), "{shown:?}");
}

#[tokio::test]
async fn a_first_message_that_cannot_be_read_is_shown_as_unreadable_and_repeated() {
    let mut server = Server::start().await;
    let [alice, bob] = server.users(["alice", "bob"]).await;
    let night = server.copy_data().await;
    let carol = server.user("carol").await;
    // The package that carol uses up is issued again after the restore.
    carol.send(dm(&carol, "bob").await, "hi").await.unwrap();
    assert_eq!(read(&bob).await, ["carol: hi"]);
    server.restore_data(&night).await;
    let with_bob = dm(&alice, "bob").await;
    for text in ["one", "two"] {
        alice.send(with_bob, text).await.unwrap();
    }
    let shown = read(&bob).await;
    let named = shown.iter().filter(|line| line.starts_with("unreadable of alice")).count();
    assert_eq!(named, 2, "{shown:?}");
    alice.receive().await.unwrap();
    assert_eq!(read(&bob).await, ["alice: one", "alice: two"]);
    alice.send(with_bob, "three").await.unwrap();
    assert_eq!(read(&bob).await, ["alice: three"]);
    assert!(read(&bob).await.is_empty());
}
