//! Several processes of one profile at the same time.

use std::process::Stdio;

use crate::harness::{World, finish};

#[tokio::test]
async fn twenty_sends_at_the_same_time_are_all_sent() {
    let world = World::new().await;
    let (alice, bob) = (world.user("alice").await, world.user("bob").await);
    alice.ok(&["send", "bob", "first"]).await;
    let texts: Vec<_> = (0..20).map(|number| format!("text {number:02}")).collect();
    let started: Vec<_> = texts
        .iter()
        .map(|text| alice.command(&["send", "bob", text]).stdin(Stdio::piped()).spawn().unwrap())
        .collect();
    for child in started {
        let ran = finish(child, "").await;
        assert_eq!((ran.code, ran.out.as_str(), ran.err.as_str()), (Some(0), "Sent to bob.\n", ""));
    }
    let shown = bob.ok(&["recv"]).await;
    let mut lines: Vec<_> = shown.lines().collect();
    assert_eq!(lines.remove(0), "alice: first");
    lines.sort_unstable();
    assert_eq!(lines, texts.iter().map(|text| format!("alice: {text}")).collect::<Vec<_>>());
}

#[tokio::test]
async fn messages_are_sent_while_another_process_follows_the_inbox() {
    let world = World::new().await;
    let (alice, bob) = (world.user("alice").await, world.user("bob").await);
    let mut follow = alice.start(&["recv", "--follow"]);
    for number in 0..3 {
        bob.ok(&["send", "alice", &format!("question {number}")]).await;
        assert_eq!(follow.read_line().await, format!("bob: question {number}"));
        alice.ok(&["send", "bob", &format!("answer {number}")]).await;
        assert_eq!(bob.ok(&["recv"]).await, format!("alice: answer {number}\n"));
    }
    follow.interrupt().await;
}
