//! `qpq dm` in scripts.

use serde_json::{Value, json};

use crate::harness::World;

#[tokio::test]
async fn two_scripts_exchange_lines_until_the_end_of_input() {
    let world = World::new().await;
    let (alice, bob) = (world.user("alice").await, world.user("bob").await);
    let (mut a, mut b) = (alice.start(&["dm", "bob"]), bob.start(&["dm", "alice"]));
    for round in 0..5 {
        a.write_line(&format!("ping {round}")).await;
        assert_eq!(b.read_line().await, format!("alice: ping {round}"));
        b.write_line(&format!("pong {round}")).await;
        assert_eq!(a.read_line().await, format!("bob: pong {round}"));
    }
    // Lines typed before the end of input are sent before the program ends. Here /quit is a text
    // like any other.
    a.write_line("/quit").await;
    a.write_line("").await;
    a.write_line("bye").await;
    assert_eq!(a.end().await.code(), Some(0));
    assert_eq!(
        (b.read_line().await, b.read_line().await),
        ("alice: /quit".into(), "alice: bye".into())
    );
    assert_eq!(b.end().await.code(), Some(0));
    assert_eq!(bob.ok(&["recv", "--json"]).await, "", "all was seen");
}

#[tokio::test]
async fn sent_and_received_messages_are_json_objects() {
    let world = World::new().await;
    let (alice, bob) = (world.user("alice").await, world.user("bob").await);
    bob.ok(&["send", "alice", "waiting"]).await;
    let mut talk = alice.start(&["dm", "bob", "--json"]);
    let first: Value = serde_json::from_str(&talk.read_line().await).unwrap();
    assert_eq!((&first["event"], &first["text"]), (&json!("message"), &json!("waiting")));
    talk.write_line("hello").await;
    let sent: Value = serde_json::from_str(&talk.read_line().await).unwrap();
    assert_eq!((&sent["event"], &sent["text"]), (&json!("sent"), &json!("hello")));
    assert_eq!(talk.end().await.code(), Some(0));
    assert_eq!(bob.ok(&["recv"]).await, "alice: hello\n");
}

#[tokio::test]
async fn a_script_that_lingers_receives_the_answer() {
    let world = World::new().await;
    let (alice, bob) = (world.user("alice").await, world.user("bob").await);
    let mut asking = alice.start(&["dm", "bob", "--linger", "600"]);
    asking.write_line("how are you?").await;
    asking.end_input();
    assert_eq!(bob.ok(&["recv", "--timeout", "50"]).await, "alice: how are you?\n");
    bob.ok(&["send", "alice", "fine"]).await;
    assert_eq!(asking.read_line().await, "bob: fine");
    assert_eq!(asking.interrupt().await.code(), Some(130));
    let ended = alice.run_with(&["dm", "bob", "--linger", "1"], "good\n").await;
    assert_eq!((ended.code, ended.out.as_str(), ended.err.as_str()), (Some(0), "", ""));
}

#[tokio::test]
async fn a_chat_with_nobody_or_with_oneself_is_refused() {
    let world = World::new().await;
    let alice = world.user("alice").await;
    alice.fails(&["dm", "nobody"], 1, "client.no_such_user").await;
    alice.fails(&["dm", "alice"], 1, "client.yourself").await;
    alice.fails(&["dm", "a@b"], 2, "client.usage").await;
}
