//! Stores that go back in time: the server's, as when a backup is restored.

use std::fs;

use crate::harness::{Server, dm, history, read};

#[tokio::test]
async fn what_a_restored_server_accepts_is_shown_and_the_restore_is_said() {
    let mut server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
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
async fn what_comes_again_from_a_restored_server_is_shown_once() {
    let mut server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
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
