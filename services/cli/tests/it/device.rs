//! Devices of an account: linking, approving, listing, renaming, revoking.

use std::process::Stdio;

use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::Child,
};

use crate::harness::{PASSWORD, Person, Ran, World, finish, soon};

/// A running `qpq device link`, and the code that it shows.
struct Linking {
    child: Child,
    code: String,
}

impl Linking {
    async fn start(machine: &Person, user: &str, name: &str, seconds: u32) -> Self {
        let seconds = seconds.to_string();
        let args =
            ["device", "link", "--name", name, user, "--json", "--timeout", seconds.as_str()];
        let mut command = machine.command(&args);
        let mut child =
            command.env("QPQ_PASSWORD", PASSWORD).stdin(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
        let line = soon(lines.next_line()).await.unwrap().expect("it ended");
        let asked: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(
            asked,
            json!({
                "event": "link_requested", "username": user, "name": name, "code": asked["code"]
            })
        );
        Self { child, code: asked["code"].as_str().unwrap().to_owned() }
    }

    async fn end(self) -> Ran {
        finish(self.child, "").await
    }
}

/// Runs a command with a password in the environment.
async fn with_password(person: &Person, args: &[&str], password: &str) -> Ran {
    let mut command = person.command(args);
    let child = command.env("QPQ_PASSWORD", password).stdin(Stdio::piped()).spawn().unwrap();
    finish(child, "").await
}

async fn approve(person: &Person, code: &str) -> Ran {
    with_password(person, &["device", "approve", code, "--json"], PASSWORD).await
}

/// Creates another machine of a user, linked to the account.
async fn linked(world: &World, old: &Person, name: &str) -> Person {
    let machine = world.person(&format!("{}-{name}", old.name));
    let linking = Linking::start(&machine, &old.name, name, 60).await;
    let approved = approve(old, &linking.code).await.json();
    assert_eq!(
        (&approved[0]["event"], &approved[0]["name"]),
        (&json!("device_approved"), &json!(name))
    );
    let done = linking.end().await.json();
    assert_eq!(done[0]["event"], "linked", "{done:?}");
    machine
}

async fn names(person: &Person) -> Vec<String> {
    let listed = person.json(&["device", "list"]).await;
    listed.iter().map(|device| device["name"].as_str().unwrap().to_owned()).collect()
}

/// Returns the received messages, without entries about devices.
async fn texts(person: &Person) -> Vec<String> {
    let ran = person.run(&["recv"]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    ran.out.lines().filter(|line| !line.starts_with('*')).map(str::to_owned).collect()
}

#[tokio::test]
async fn a_linked_device_reads_and_writes_as_the_account() {
    let world = World::new().await;
    let (alice, bob) = (world.user("alice").await, world.user("bob").await);
    alice.ok(&["send", "bob", "before"]).await;
    bob.ok(&["recv"]).await;
    alice.ok(&["group", "create", "friends", "bob"]).await;
    bob.ok(&["accept", "friends"]).await;
    bob.ok(&["recv"]).await;

    let machine = world.person("alice-laptop");
    let linking = Linking::start(&machine, "alice", "laptop", 60).await;
    assert_eq!(
        alice.ok(&["recv"]).await,
        "* a new device asks to be linked: laptop. Run `qpq device approve` if it is yours\n"
    );
    let listed = alice.json(&["device", "approve"]).await;
    assert_eq!(
        listed,
        [json!({
            "event": "link_request", "name": "laptop", "code": linking.code, "at": listed[0]["at"]
        })]
    );
    // The code in a form that people type.
    let typed = linking.code.to_lowercase().replace('-', "").replace('0', "o");
    approve(&alice, &typed).await.json();
    linking.end().await.json();
    assert_eq!(names(&machine).await, ["first device", "laptop"]);
    assert_eq!(machine.json(&["whoami"]).await[0]["session"], "valid");

    bob.ok(&["recv"]).await;
    bob.ok(&["send", "alice", "to both"]).await;
    bob.ok(&["group", "send", "friends", "to the group"]).await;
    for device in [&alice, &machine] {
        assert_eq!(texts(device).await, ["bob: to both", "[friends] bob: to the group"]);
    }
    machine.ok(&["send", "bob", "from the laptop"]).await;
    assert_eq!(texts(&bob).await, ["alice: from the laptop"]);
    assert_eq!(texts(&alice).await, ["you: from the laptop"]);
    assert!(texts(&machine).await.is_empty());
}

#[tokio::test]
async fn a_new_device_needs_the_password_the_code_and_an_approval() {
    let world = World::new().await;
    let alice = world.user("alice").await;
    let ran = alice.run(&["device", "approve"]).await;
    assert_eq!((ran.code, ran.out.as_str()), (Some(0), ""));
    assert!(ran.err.starts_with("No device asks to be linked."), "{ran:?}");
    alice.fails(&["device", "approve", "short"], 2, "client.usage").await;

    let machine = world.person("alice-laptop");
    let link = ["device", "link", "--name", "laptop", "alice", "--json", "--timeout", "3"];
    with_password(&machine, &link, "wrong").await.fails(3, "auth.failed");
    with_password(&alice, &link, PASSWORD).await.fails(1, "profile.exists");

    let linking = Linking::start(&machine, "alice", "laptop", 5).await;
    approve(&alice, "00000-00000").await.fails(1, "client.no_such_link_request");
    let right = ["device", "approve", &linking.code, "--json"];
    with_password(&alice, &right, "wrong").await.fails(3, "auth.failed");
    // An unlocked profile is not enough.
    let mut bare = tokio::process::Command::new("setsid");
    bare.args(["--wait", env!("CARGO_BIN_EXE_qpq")]).args(right).env_clear();
    bare.envs(alice.environment()).stdin(Stdio::null());
    let output = bare.output().await.unwrap();
    assert!(String::from_utf8(output.stderr).unwrap().contains("client.password_needed"));
    assert_eq!(names(&alice).await, ["first device"]);

    let ran = linking.end().await;
    assert_eq!((ran.code, &ran.error()["code"]), (Some(1), &json!("client.link_not_approved")));
    assert!(machine.json(&["profiles"]).await.is_empty());
    // The same machine can be linked after that.
    let linking = Linking::start(&machine, "alice", "laptop", 60).await;
    approve(&alice, &linking.code).await.json();
    linking.end().await.json();
}

#[tokio::test]
async fn a_device_that_was_killed_while_it_was_linked_is_revoked() {
    let world = World::new().await;
    let alice = world.user("alice").await;
    let machine = world.person("alice-laptop");
    let mut linking = Linking::start(&machine, "alice", "laptop", 60).await;
    linking.child.kill().await.unwrap();
    approve(&alice, &linking.code).await.json();
    assert_eq!(names(&alice).await, ["first device", "laptop"]);
    let linking = Linking::start(&machine, "alice", "laptop", 60).await;
    assert_eq!(names(&alice).await, ["first device"]);
    approve(&alice, &linking.code).await.json();
    linking.end().await.json();
    assert_eq!(names(&alice).await, ["first device", "laptop"]);
}

#[tokio::test]
async fn of_two_devices_with_the_same_name_one_is_revoked_by_its_id() {
    let world = World::new().await;
    let alice = world.user("alice").await;
    let machine = linked(&world, &alice, "laptop").await;
    let linking = Linking::start(&world.person("other"), "alice", "laptop", 60).await;
    approve(&alice, &linking.code).await.json();
    linking.end().await.json();

    machine.fails(&["device", "revoke", "laptop"], 1, "client.ambiguous_device").await;
    let listed = alice.json(&["device", "list"]).await;
    let other = listed[2]["id"].as_str().unwrap();
    machine.json(&["device", "revoke", &other[..8]]).await;
    assert_eq!(names(&machine).await, ["first device", "laptop"]);
}

#[tokio::test]
async fn commands_of_a_revoked_device_report_the_revocation_with_a_hint() {
    let world = World::new().await;
    let (alice, bob) = (world.user("alice").await, world.user("bob").await);
    alice.ok(&["send", "bob", "hello"]).await;
    bob.ok(&["recv"]).await;
    let laptop = linked(&world, &alice, "laptop").await;
    alice.fails(&["device", "revoke", "first device"], 1, "client.this_device").await;
    alice.fails(&["device", "revoke", "phone"], 1, "client.no_such_device").await;
    assert_eq!(
        alice.ok(&["device", "revoke", "laptop"]).await,
        "laptop is revoked: its sessions have ended.\n\
         It keeps the messages that it has received. New messages do not reach it.\n"
    );
    assert_eq!(names(&alice).await, ["first device"]);

    let ended = laptop.run(&["recv", "--json"]).await;
    assert_eq!((ended.code, &ended.error()["hint"]), (Some(3), &json!("run `qpq login`")));
    let recv = with_password(&laptop, &["recv", "--json"], PASSWORD).await;
    recv.fails(1, "client.device_revoked");
    let error = laptop.fails(&["login"], 1, "client.device_revoked").await;
    assert!(error["hint"].as_str().unwrap().contains("device link"), "{error}");
    // From now on each command reports this, without asking for the password. The history stays.
    for command in [&["recv"][..], &["send", "bob", "hi"], &["device", "list"]] {
        laptop.fails(command, 1, "client.device_revoked").await;
    }
    assert_eq!(laptop.run(&["blocked"]).await.code, Some(0));

    bob.ok(&["recv"]).await;
    bob.ok(&["send", "alice", "to the first alone"]).await;
    assert_eq!(texts(&alice).await, ["bob: to the first alone"]);
}

#[tokio::test]
async fn the_device_list_shows_the_names_from_registration_and_renaming() {
    let world = World::new().await;
    let alice = world.person("alice");
    alice.ok(&["register", "alice", "--device", "desk"]).await;
    let laptop = linked(&world, &alice, "laptop").await;
    assert_eq!(
        laptop.ok(&["device", "rename", "old laptop"]).await,
        "This device is now named old laptop.\n"
    );
    laptop.fails(&["device", "rename", ""], 1, "client.device_name").await;
    let listed = alice.json(&["device", "list"]).await;
    let shown: Vec<_> = listed.iter().map(|device| (&device["name"], &device["current"])).collect();
    assert_eq!(shown, [(&json!("desk"), &json!(true)), (&json!("old laptop"), &json!(false))]);
    let shown = alice.ok(&["device", "list"]).await;
    assert!(shown.starts_with("desk  this device  "), "{shown}");
}
