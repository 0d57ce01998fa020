//! Failures, and the messages that report them.

use serde_json::json;

use crate::harness::World;

#[tokio::test]
async fn the_error_of_send_names_an_unreachable_server_and_logout_succeeds_without_it() {
    let mut world = World::new().await;
    let (alice, bob) = (world.user("alice").await, world.user("bob").await);
    world.stop().await;
    let sending = alice.run(&["send", "bob", "hi", "--json"]);
    let (sent, out) = tokio::join!(sending, bob.json(&["logout"]));
    sent.fails(4, "client.unreachable");
    let error = sent.error();
    let said = error["message"].as_str().unwrap();
    assert!(said.contains(&world.address) && said.ends_with("neither sent nor saved"), "{said}");
    assert_eq!(out[0]["sessions_ended"], json!(null));
    assert!(out[0]["problem"].as_str().unwrap().contains(&world.address));
    assert!(bob.kept_keys().is_empty());
    assert_eq!(alice.kept_keys().len(), 1);
}

#[tokio::test]
async fn a_server_with_another_certificate_is_refused_until_the_new_one_is_pinned() {
    let mut world = World::new().await;
    let wrong = "ab".repeat(32);
    let carol = world.person("carol");
    carol.fails(&["register", "carol", "--pin", &wrong], 5, "client.pin_mismatch").await;
    carol.fails(&["health", "--pin", &wrong], 5, "client.pin_mismatch").await;
    let error = carol.fails(&["health", "--system-roots"], 5, "client.untrusted").await;
    assert!(!error["message"].as_str().unwrap().contains('{'), "{error}");

    let (alice, bob) = (world.user("alice").await, world.user("bob").await);
    let before = world.fingerprint.clone();
    world.stop().await;
    world.start_with_another_certificate().await;
    let ran = alice.run(&["send", "bob", "hi"]).await;
    assert_eq!(ran.code, Some(5));
    assert!(ran.err.contains(&before) && ran.err.contains(&world.fingerprint), "{}", ran.err);
    // A pin for one command does not help.
    alice
        .fails(&["send", "bob", "hi", "--pin", &world.fingerprint], 2, "client.other_server")
        .await;
    for person in [&alice, &bob] {
        person.ok(&["login", "--pin", &world.fingerprint]).await;
    }
    alice.ok(&["send", "bob", "hi"]).await;
    assert_eq!(bob.ok(&["recv"]).await, "alice: hi\n");
}

#[tokio::test]
async fn a_profile_is_used_by_several_processes() {
    let world = World::new().await;
    let (alice, bob) = (world.user("alice").await, world.user("bob").await);
    let mut chat = alice.start(&["dm", "bob"]);
    bob.ok(&["send", "alice", "hi"]).await;
    assert_eq!(chat.read_line().await, "bob: hi");
    alice.ok(&["send", "bob", "during the chat"]).await;
    assert_eq!(bob.ok(&["recv"]).await, "alice: during the chat\n");
    assert_eq!(alice.run(&["recv"]).await.code, Some(0));
    assert_eq!(alice.kept_keys().len(), 1);
    assert_eq!(chat.end().await.code(), Some(0));
    alice.ok(&["logout"]).await;
}

#[tokio::test]
async fn commands_on_a_damaged_profile_fail_with_profile_damaged() {
    let world = World::new().await;
    let alice = world.user("alice").await;
    let dir = alice.home.join("profiles/default");
    let state = std::fs::read(dir.join("state.db")).unwrap();
    std::fs::write(dir.join("state.db"), &state[..4096]).unwrap();
    alice.fails(&["recv"], 1, "profile.damaged").await;
    std::fs::write(dir.join("state.db"), b"rubbish").unwrap();
    alice.fails(&["recv"], 1, "profile.damaged").await;
    std::fs::write(dir.join("profile.json"), b"{").unwrap();
    alice.fails(&["recv"], 1, "profile.damaged").await;
    std::fs::write(dir.join("state.db"), state).unwrap();
}

#[tokio::test]
async fn a_wrong_command_line_is_reported_with_the_reason() {
    let world = World::new().await;
    let alice = world.person("alice");
    alice.fails(&["send"], 2, "client.usage").await;
    alice.fails(&["register", "alice", "--server", "host:port"], 2, "client.misconfigured").await;
    alice.fails(&["health", "--pin", "abc"], 2, "client.usage").await;
    alice.fails(&["-p", "../x", "whoami"], 2, "client.usage").await;
    alice.fails(&["whoami"], 3, "profile.missing").await;
    let plain = alice.run(&["dance"]).await;
    assert_eq!((plain.code, plain.out.as_str()), (Some(2), ""));
    assert!(plain.err.contains("dance"));
    let help = alice.ok(&["help"]).await;
    assert!(help.contains("Exit codes:") && help.contains("Examples:"), "{help}");
    assert!(alice.ok(&["completions", "bash"]).await.contains("_qpq()"));
}

#[tokio::test]
async fn health_needs_no_account() {
    let world = World::new().await;
    let nobody = world.person("nobody");
    let health = &nobody.json(&["health"]).await[0];
    assert_eq!((&health["status"], &health["server"]), (&json!("ok"), &json!(world.address)));
    assert_eq!(health["fingerprint"], json!(world.fingerprint));
    assert!(nobody.ok(&["health", "--pin", &world.fingerprint]).await.contains(" is ok: version "));
}
