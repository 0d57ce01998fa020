//! `qpq passwd`.

use serde_json::json;

use crate::harness::{PASSWORD, Person, Ran, World, finish};

/// Runs a command with this password.
async fn with_password(person: &Person, args: &[&str], password: &str) -> Ran {
    let mut command = person.command(&[args, &["--json"]].concat());
    command.env("QPQ_PASSWORD", password).stdin(std::process::Stdio::piped());
    finish(command.spawn().unwrap(), "").await
}

/// Writes a password to a file. Returns the path.
fn file(person: &Person, password: &str) -> String {
    let path = person.home.join("new-password");
    std::fs::write(&path, format!("{password}\n")).unwrap();
    path.to_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_changed_password_ends_other_sessions_and_keeps_this_one() {
    let world = World::new().await;
    let (alice, bob) = (world.user("alice").await, world.user("bob").await);
    let thief = alice.stolen_copy();
    assert_eq!(thief.json(&["whoami"]).await[0]["session"], "valid");
    let new = file(&alice, "a much better password");
    let args = ["passwd", "--new-password-file", &new];

    with_password(&alice, &args, "wrong").await.fails(3, "auth.failed");
    let changed = &with_password(&alice, &args, PASSWORD).await.json()[0];
    let expected = json!({
        "event": "password_changed", "profile": "default", "username": "alice",
        "sessions_ended": 1, "unlocked": true
    });
    assert_eq!(*changed, expected);

    assert_eq!(alice.json(&["whoami"]).await[0]["session"], "valid");
    alice.ok(&["send", "bob", "hi"]).await;
    assert!(bob.ok(&["recv"]).await.contains("alice"));
    assert_eq!(thief.json(&["whoami"]).await[0]["session"], "ended");
    with_password(&thief, &["login"], PASSWORD).await.fails(3, "auth.failed");
    with_password(&alice, &["login"], PASSWORD).await.fails(3, "auth.failed");
    alice.ok(&["logout"]).await;
    with_password(&alice, &["login"], "a much better password").await.json();
}
