//! `qpq recovery`, and `qpq login` on a machine without the account. The tests named after a loss
//! are the rows of the table in docs/security.md.

use crate::harness::{PASSWORD, Person, Ran, World, finish};

const NEW: &str = "a much better password";

/// Runs a command with this password and `--json`.
async fn with_password(person: &Person, args: &[&str], password: &str) -> Ran {
    let mut command = person.command(&[args, &["--json"]].concat());
    command.env("QPQ_PASSWORD", password).stdin(std::process::Stdio::piped());
    finish(command.spawn().unwrap(), "").await
}

/// Writes a secret to a file of the person. Returns the path.
fn file(person: &Person, name: &str, secret: &str) -> String {
    std::fs::create_dir_all(&person.home).unwrap();
    let path = person.home.join(name);
    std::fs::write(&path, format!("{secret}\n")).unwrap();
    path.to_str().unwrap().to_owned()
}

/// Runs `qpq recovery show`. Returns the code.
async fn show(person: &Person) -> String {
    let shown = &with_password(person, &["recovery", "show"], PASSWORD).await.json()[0];
    assert_eq!(shown["event"], "recovery_code");
    shown["code"].as_str().unwrap().to_owned()
}

async fn verify(person: &Person, code: &str, password: &str) -> Ran {
    let code = file(person, "code", code);
    with_password(person, &["recovery", "verify", "--code-file", &code], password).await
}

/// Changes the password from the present one to the other one.
async fn passwd(person: &Person, from: &str, to: &str) -> Ran {
    let new = file(person, "new", to);
    with_password(person, &["passwd", "--new-password-file", &new], from).await
}

/// Logs in as alice on a new machine.
async fn log_in_on_new(machine: &Person, password: &str) -> Ran {
    with_password(machine, &["login", "alice", "--device", "new laptop"], password).await
}

/// Returns alice, who writes with bob and is in the group friends, and bob.
async fn alice_and_bob(world: &World) -> (Person, Person) {
    let (alice, bob) = (world.user("alice").await, world.user("bob").await);
    alice.ok(&["send", "bob", "hello"]).await;
    bob.ok(&["recv"]).await;
    bob.ok(&["send", "alice", "hello alice"]).await;
    alice.ok(&["recv"]).await;
    alice.ok(&["group", "create", "friends", "bob"]).await;
    bob.ok(&["recv"]).await;
    (alice, bob)
}

/// Checks that a restored machine writes and reads in both conversations.
async fn check_restored(machine: &Person, bob: &Person) {
    let listed = machine.ok(&["group", "list"]).await;
    assert!(listed.contains("friends"), "{listed}");
    machine.ok(&["send", "bob", "I am back"]).await;
    machine.ok(&["send", "friends", "to all"]).await;
    let read = bob.ok(&["recv"]).await;
    assert!(read.contains("I am back") && read.contains("to all"), "{read}");
    bob.ok(&["send", "alice", "welcome back"]).await;
    bob.ok(&["send", "friends", "welcome all"]).await;
    let read = machine.ok(&["recv"]).await;
    assert!(read.contains("welcome back") && read.contains("welcome all"), "{read}");
}

#[tokio::test]
async fn after_a_lost_laptop_the_password_restores_the_account_on_a_new_machine() {
    let world = World::new().await;
    let (alice, bob) = alice_and_bob(&world).await;
    let code = show(&alice).await;
    assert_eq!(code.split(' ').count(), 12);
    let machine = world.person("machine");
    let restored = &log_in_on_new(&machine, PASSWORD).await.json()[0];
    assert_eq!((&restored["event"], &restored["username"]), (&"restored".into(), &"alice".into()));
    check_restored(&machine, &bob).await;
    // The lost laptop is revoked, and learns nothing more.
    machine.ok(&["device", "revoke", "first device"]).await;
    alice.fails(&["recv"], 3, "auth.session_expired").await;
    alice.fails(&["login"], 1, "client.device_revoked").await;
}

#[tokio::test]
async fn with_a_forgotten_password_the_code_alone_restores_nothing() {
    let world = World::new().await;
    let (alice, _bob) = alice_and_bob(&world).await;
    let code = show(&alice).await;
    let machine = world.person("machine");
    let code = file(&machine, "code", &code);
    let args = ["login", "alice", "--recovery-code-file", &code];
    with_password(&machine, &args, "a guess").await.fails(3, "auth.failed");
    // The unlocked device keeps working.
    alice.ok(&["send", "bob", "still here"]).await;
}

#[tokio::test]
async fn without_laptop_and_password_nothing_restores_the_account() {
    let world = World::new().await;
    let (_alice, bob) = alice_and_bob(&world).await;
    let machine = world.person("machine");
    log_in_on_new(&machine, "a guess").await.fails(3, "auth.failed");
    // The name stays taken. The person begins again under another one, as a stranger.
    machine.fails(&["register", "alice"], 1, "auth.username_taken").await;
    machine.ok(&["register", "alice2"]).await;
    machine.ok(&["send", "bob", "it is me"]).await;
    assert!(bob.ok(&["recv"]).await.contains("alice2"));
}

#[tokio::test]
async fn after_a_stolen_password_a_change_ends_the_thiefs_session_and_reseals_the_bundle() {
    let world = World::new().await;
    let (alice, bob) = alice_and_bob(&world).await;
    show(&alice).await;
    let thief = world.person("thief");
    log_in_on_new(&thief, PASSWORD).await.json();
    assert_eq!(passwd(&alice, PASSWORD, NEW).await.json()[0]["event"], "password_changed");
    assert_eq!(thief.json(&["whoami"]).await[0]["session"], "ended");
    alice.ok(&["device", "revoke", "new laptop"]).await;
    let again = world.person("again");
    log_in_on_new(&again, PASSWORD).await.fails(3, "auth.failed");
    // The thief's restore took the bundle over, so a new one is stored. It opens with the new
    // password.
    let shown = with_password(&alice, &["recovery", "show"], NEW).await.json()[0].clone();
    let code = shown["code"].as_str().unwrap().to_owned();
    verify(&alice, &code, NEW).await.json();
    let machine = world.person("machine");
    log_in_on_new(&machine, NEW).await.json();
    check_restored(&machine, &bob).await;
}

#[tokio::test]
async fn the_code_is_verified_and_a_later_one_replaces_it() {
    let world = World::new().await;
    let (alice, _bob) = alice_and_bob(&world).await;
    verify(
        &alice,
        "legal winner thank year wave sausage worth useful legal winner thank yellow",
        PASSWORD,
    )
    .await
    .fails(1, "client.no_recovery");
    assert_eq!(alice.json(&["recovery", "status"]).await[0]["kept"], false);
    let first = show(&alice).await;
    verify(&alice, &first, PASSWORD).await.json();
    let second = show(&alice).await;
    assert_ne!(first, second);
    verify(&alice, &first, PASSWORD).await.fails(1, "client.recovery_code");
    verify(&alice, "one two", PASSWORD).await.fails(1, "client.recovery_code");
    verify(&alice, &second, PASSWORD).await.json();
    let status = &alice.json(&["recovery", "status"]).await[0];
    assert_eq!((&status["kept"], &status["version"]), (&true.into(), &2.into()));
    with_password(&alice, &["recovery", "remove"], PASSWORD).await.json();
    assert_eq!(alice.json(&["recovery", "status"]).await[0]["kept"], false);
    verify(&alice, &second, PASSWORD).await.fails(1, "client.no_recovery");
    let machine = world.person("machine");
    log_in_on_new(&machine, PASSWORD).await.fails(1, "client.no_recovery");
    // A machine without the account and without its name says what to do.
    machine.fails(&["login"], 3, "profile.missing").await;
}

#[tokio::test]
async fn a_changed_password_reseals_the_bundle_and_keeps_the_code() {
    let world = World::new().await;
    let (alice, bob) = alice_and_bob(&world).await;
    let code = show(&alice).await;
    passwd(&alice, PASSWORD, NEW).await.json();
    verify(&alice, &code, NEW).await.json();
    let machine = world.person("machine");
    log_in_on_new(&machine, NEW).await.json();
    check_restored(&machine, &bob).await;
}
