//! Sending one message and showing received ones.

use serde_json::json;

use crate::harness::World;

#[tokio::test]
async fn messages_are_received_once_and_in_order() {
    let world = World::new().await;
    let (alice, bob) = (world.user("alice").await, world.user("bob").await);
    assert_eq!(alice.ok(&["send", "bob", "one"]).await, "Sent to bob.\n");
    assert_eq!(alice.run_with(&["send", "bob", "-"], "two\n").await.out, "Sent to bob.\n");
    alice.ok(&["send", "@Bob", "-3"]).await;
    assert_eq!(bob.ok(&["recv"]).await, "alice: one\nalice: two\nalice: -3\n");
    let again = bob.run(&["recv"]).await;
    assert_eq!(
        (again.code, again.out.as_str(), again.err.as_str()),
        (Some(0), "", "No new messages.\n")
    );
    assert_eq!(bob.run_with(&["send", "alice"], "back").await.code, Some(0));
    assert_eq!(alice.ok(&["recv"]).await, "bob: back\n");
}

#[tokio::test]
async fn a_file_is_sent_shown_and_saved() {
    let world = World::new().await;
    let (alice, bob) = (world.user("alice").await, world.user("bob").await);
    let dir = tempfile::tempdir().unwrap();
    let (photo, saved) = (dir.path().join("photo.png"), dir.path().join("saved"));
    let mut content = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\x02\x80\0\0\x01\xe0".to_vec();
    content.resize(1_300_000, 7);
    std::fs::write(&photo, &content).unwrap();
    let (photo, to) = (photo.to_str().unwrap(), saved.to_str().unwrap());
    assert_eq!(alice.ok(&["send", "bob", "--file", photo]).await, "Sent to bob.\n");
    alice.ok(&["send", "bob", "look"]).await;
    let shown = "alice: [file: photo.png, 1.2 MiB, image/png, 640×480]\nalice: look\n";
    assert_eq!(bob.ok(&["recv"]).await, shown);
    assert!(bob.ok(&["save", "alice", "--to", to]).await.starts_with("Saved "));
    assert_eq!(std::fs::read(&saved).unwrap(), content);

    bob.fails(&["save", "alice", "1", "--to", to], 1, "client.file_exists").await;
    let report = &bob.json(&["save", "alice", "--to", to, "--force"]).await[0];
    assert_eq!((&report["event"], &report["size"]), (&json!("saved"), &json!(1_300_000)));
    bob.fails(&["save", "alice", "2"], 1, "client.no_such_file").await;
    alice.fails(&["send", "bob", "--file", "/nonexistent"], 1, "client.io").await;

    alice.ok(&["send", "bob", "--file", photo]).await;
    let received = bob.run(&["recv", "--json"]).await;
    assert_eq!(
        received.json()[0]["file"],
        json!({
            "name": "photo.png", "size": 1_300_000, "mime": "image/png",
            "width": 640, "height": 480,
        })
    );
}

#[tokio::test]
async fn json_output_of_send_and_recv_consists_of_objects() {
    let world = World::new().await;
    let (alice, bob) = (world.user("alice").await, world.user("bob").await);
    let sent = &alice.json(&["send", "bob", "grüße\n\u{1b}[2J"]).await[0];
    let identity = &alice.json(&["whoami"]).await[0]["identity"];
    assert_eq!((&sent["event"], &sent["to"]), (&json!("sent"), &json!("bob")));
    let ran = bob.run(&["recv", "--json"]).await;
    assert!(!ran.out.contains('\u{1b}'));
    let [message] = &ran.json()[..] else { panic!("{ran:?}") };
    assert_eq!(message["event"], "message");
    assert_eq!(message["text"], "grüße\n\u{1b}[2J");
    assert_eq!(
        message["from"],
        json!({ "username": "alice", "identity": identity, "standing": "confirmed" })
    );
    assert_eq!(message["conversation"], json!({ "kind": "direct", "id": identity }));
    assert!(message["at"].as_u64().unwrap() > 0 && message["sent_at"].as_u64().unwrap() > 0);
}

#[tokio::test]
async fn a_message_cannot_control_the_terminal_or_pass_for_another() {
    let world = World::new().await;
    let (alice, bob) = (world.user("alice").await, world.user("bob").await);
    alice.run_with(&["send", "bob", "-"], "hi\x1b]0;x\x07\nmallory: pay\u{9b}31m\u{202e}\n").await;
    assert_eq!(
        bob.ok(&["recv"]).await,
        "alice: hi\\u{1b}]0;x\\u{7}\n  | mallory: pay\\u{9b}31m\\u{202e}\n"
    );
}

#[tokio::test]
async fn texts_that_cannot_be_sent_are_refused_with_a_reason() {
    let world = World::new().await;
    let alice = world.user("alice").await;
    let error = alice.fails(&["send", "nobody", "hi"], 1, "client.no_such_user").await;
    assert_eq!(error["message"], "there is no user nobody");
    alice.fails(&["send", "alice", "hi"], 1, "client.yourself").await;
    alice.fails(&["send", "nobody", " "], 2, "client.usage").await;
    alice.fails(&["send", "a/b", "hi"], 2, "client.usage").await;
    alice.fails(&["group", "send", "nothing", "hi"], 1, "client.no_such_group").await;
    let bob = world.user("bob").await;
    let long = "x".repeat(64 * 1024 + 1);
    let ran = alice.run_with(&["send", "bob", "-", "--json"], &long).await;
    ran.fails(1, "client.text_too_long");
    assert_eq!(bob.ok(&["send", "alice", "still works"]).await, "Sent to alice.\n");
}

#[tokio::test]
async fn receiving_waits_for_the_given_time() {
    let world = World::new().await;
    let (alice, bob) = (world.user("alice").await, world.user("bob").await);
    bob.fails(&["recv", "--timeout", "1"], 7, "client.nothing").await;

    let mut waiting = bob.start(&["recv", "--timeout", "50"]);
    let mut following = alice.start(&["recv", "--follow"]);
    let carol = world.user("carol").await;
    for name in ["alice", "bob"] {
        carol.ok(&["send", name, "one"]).await;
    }
    assert_eq!(waiting.read_line().await, "carol: one");
    assert_eq!(waiting.end().await.code(), Some(0));
    assert_eq!(following.read_line().await, "carol: one");
    // One command continues to read while another sends.
    alice.ok(&["send", "bob", "hi"]).await;
    carol.ok(&["send", "alice", "two"]).await;
    assert_eq!(following.read_line().await, "carol: two");
    assert_eq!(following.interrupt().await.code(), Some(130));
    // Messages that were shown are not shown again.
    assert_eq!(alice.ok(&["recv", "--follow", "--timeout", "1"]).await, "");
}
