//! Bugs that users of comparable programs reported, tested here.

use std::{fs::OpenOptions, process::Stdio};

use qpq_client::{Client, Options, Password, Trust, Username, methods, v1};
use qpq_server::UsernameScripts;
use serde_json::json;

use crate::harness::{PASSWORD, Person, World, finish};

/// Enqueues payloads that are not messages.
async fn send_junk(world: &World, from: &Person, to: &Person, payloads: &[Vec<u8>]) {
    let fingerprint = world.fingerprint.parse().unwrap();
    let client = Client::new(Options::new(&world.address, Trust::Pinned(fingerprint))).unwrap();
    let username = Username::parse(&from.name).unwrap();
    client.login(&username, &Password::from(PASSWORD)).await.unwrap();
    let identity = to.json(&["whoami"]).await[0]["identity"].as_str().unwrap().to_owned();
    for payload in payloads {
        let request = v1::EnqueueRequest {
            recipient_key: hex::decode(&identity).unwrap().into(),
            payload: payload.clone().into(),
            ..Default::default()
        };
        client.call::<methods::Enqueue>(request).await.unwrap();
    }
}

/// Runs a command with the time of day changed by `by`. The monotonic clock stays as it is.
async fn at_another_time(person: &Person, by: &str, args: &[&str]) -> crate::harness::Ran {
    let library = ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib"]
        .map(|dir| format!("{dir}/faketime/libfaketimeMT.so.1"))
        .into_iter()
        .find(|path| std::path::Path::new(path).is_file())
        .expect("libfaketime is needed: `apt-get install faketime`");
    let mut command = person.command(args);
    command.env("LD_PRELOAD", library).env("FAKETIME", by).env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
    finish(command.stdin(Stdio::piped()).spawn().unwrap(), "").await
}

#[tokio::test]
async fn one_line_end_of_either_form_is_removed() {
    let world = World::new().await;
    let (alice, bob) = (world.user("alice").await, world.user("bob").await);
    for (typed, received) in [
        ("a\r\nb\r\n", "a\r\nb"),
        ("c\n", "c"),
        ("d\r\n\r\n", "d\r\n"),
        ("e\n\n", "e\n"),
        ("f\r", "f\r"),
        ("g", "g"),
    ] {
        assert_eq!(alice.run_with(&["send", "bob", "-"], typed).await.code, Some(0));
        assert_eq!(bob.json(&["recv"]).await[0]["text"], received, "{typed:?}");
    }
    assert_eq!(alice.run_with(&["dm", "bob"], "one\r\ntwo\r\n").await.code, Some(0));
    assert_eq!(bob.ok(&["recv"]).await, "alice: one\nalice: two\n");
}

#[tokio::test]
async fn a_waiting_time_of_more_than_a_year_is_refused() {
    let world = World::new().await;
    let alice = world.user("alice").await;
    for seconds in ["18446744073709551615", "31536001"] {
        alice.fails(&["recv", "--timeout", seconds], 2, "client.usage").await;
        alice.fails(&["dm", "bob", "--linger", seconds], 2, "client.usage").await;
    }
}

#[tokio::test]
async fn an_ended_session_is_replaced_where_the_password_is_available() {
    let world = World::new().await;
    let (alice, bob) = (world.user("alice").await, world.user("bob").await);
    let thief = alice.stolen_copy();
    thief.ok(&["logout", "--all"]).await;
    alice.fails(&["send", "bob", "one"], 3, "auth.session_expired").await;
    let with_password = |args: &[&str]| {
        let mut command = alice.command(args);
        command.env("QPQ_PASSWORD", PASSWORD).stdin(Stdio::piped());
        finish(command.spawn().unwrap(), "")
    };
    let sent = with_password(&["send", "bob", "two"]).await;
    assert_eq!((sent.code, sent.err.as_str()), (Some(0), ""), "{sent:?}");
    // The new session also serves commands without a password.
    alice.ok(&["send", "bob", "three"]).await;
    assert_eq!(bob.ok(&["recv"]).await, "alice: two\nalice: three\n");
}

#[tokio::test]
async fn messages_for_a_server_that_is_down_are_saved_and_reported() {
    let mut world = World::new().await;
    let (alice, bob) = (world.user("alice").await, world.user("bob").await);
    alice.ok(&["send", "bob", "one"]).await;
    alice.ok(&["group", "create", "friends", "bob"]).await;
    bob.ok(&["accept", "friends"]).await;
    world.stop().await;
    let sent = alice.run(&["send", "bob", "two", "--json"]).await;
    sent.fails(4, "client.queued");
    let error = sent.error();
    assert!(error["message"].as_str().unwrap().contains(&world.address), "{error}");
    let sent = alice.run(&["group", "send", "friends", "three", "--json"]).await;
    sent.fails(4, "client.queued");
    alice.run(&["send", "carol", "four", "--json"]).await.fails(4, "client.unreachable");
    world.start_again().await;
    alice.run(&["recv"]).await;
    let received = bob.ok(&["recv"]).await;
    assert_eq!(
        received,
        "alice: one\n* alice added you to the group friends\nalice: two\n[friends] alice: three\n"
    );
}

#[tokio::test]
async fn a_chat_in_a_script_saves_its_lines_while_the_server_is_down() {
    let mut world = World::new().await;
    let (alice, bob) = (world.user("alice").await, world.user("bob").await);
    alice.ok(&["send", "bob", "one"]).await;
    world.stop().await;
    alice.run_with(&["dm", "bob", "--json"], "two\n").await.fails(4, "client.queued");
    world.start_again().await;
    alice.run(&["recv"]).await;
    assert_eq!(bob.ok(&["recv"]).await, "alice: one\nalice: two\n");
}

#[tokio::test]
async fn lines_of_a_chat_with_a_group_are_sent_to_the_group() {
    let world = World::new().await;
    let (alice, bob) = (world.user("alice").await, world.user("bob").await);
    alice.ok(&["group", "create", "my friends", "bob"]).await;
    bob.ok(&["accept", "my friends"]).await;
    bob.ok(&["recv"]).await;
    let mut talk = bob.start(&["dm", "my friends"]);
    talk.write_line("hello").await;
    assert_eq!(alice.ok(&["recv", "--timeout", "50"]).await, "[my friends] bob: hello\n");
    alice.ok(&["group", "send", "my friends", "hi"]).await;
    assert_eq!(talk.read_line().await, "alice: hi");
    assert_eq!(talk.end().await.code(), Some(0));
    bob.fails(&["dm", "no such group"], 2, "client.usage").await;
}

#[tokio::test]
async fn no_name_passes_for_oneself_or_for_a_notice() {
    let world = World::with(|config| {
        config.auth.username_scripts.0 = UsernameScripts::Any;
    })
    .await;
    let bob = world.user("bob").await;
    for name in ["you", "*", "bob?", "[friends]", "\u{430}lice"] {
        let user = world.user(name).await;
        let identity = user.json(&["whoami"]).await[0]["identity"].as_str().unwrap().to_owned();
        user.ok(&["send", "bob", "hi"]).await;
        assert_eq!(bob.ok(&["recv"]).await, format!("@{name} (key {}…): hi\n", &identity[..8]));
    }
    let mark = world.person("\u{301}");
    mark.fails(&["register", "\u{301}"], 1, "auth.invalid_username").await;
    let mark = world.user("carol").await;
    mark.ok(&["group", "create", "\u{301}x", "bob"]).await;
    assert_eq!(
        bob.ok(&["recv"]).await,
        "* carol wants to add you to the group \\u{301}x: see `qpq requests`\n"
    );
    assert_eq!(
        bob.ok(&["accept", "carol"]).await,
        "You joined the group \\u{301}x, created by carol.\n"
    );
    assert_eq!(bob.ok(&["recv"]).await, "* carol added you to the group \\u{301}x\n");
}

#[tokio::test]
async fn confusable_usernames_are_refused_with_advice() {
    let world = World::new().await;
    world.user("alice").await;
    for (name, code) in [
        ("\u{430}lice", "auth.invalid_username"),
        ("al\u{200d}ice", "client.usage"),
        ("*", "auth.invalid_username"),
        ("a1ice", "auth.username_taken"),
    ] {
        let person = world.person("other");
        let ran = person.run(&["register", name, "--json"]).await;
        assert_eq!(ran.error()["code"], code, "{ran:?}");
        assert!(person.json(&["profiles"]).await.is_empty());
    }
}

#[tokio::test]
async fn a_wrong_clock_is_reported_and_the_registration_completes_after_its_correction() {
    let world = World::new().await;
    let bob = world.user("bob").await;
    for (name, by, said) in [
        ("ahead", "+2h", "clock is 2 h ahead of the server's"),
        ("behind", "-400d", "days behind the server's"),
    ] {
        let person = world.person(name);
        let pin = world.fingerprint.clone();
        let ran = at_another_time(&person, by, &["register", name, "--pin", &pin]).await;
        assert_eq!(ran.code, Some(0), "{ran:?}");
        assert!(ran.out.contains(said), "{ran:?}");
        let sent = at_another_time(&person, by, &["recv"]).await;
        assert_eq!(sent.code, Some(0), "{sent:?}");
        assert!(sent.err.contains("Is this machine's clock right?"), "{sent:?}");
        // With the clock set right, the next command completes the registration.
        person.run(&["recv"]).await;
        bob.ok(&["send", name, "hi"]).await;
        assert_eq!(person.ok(&["recv"]).await, "bob: hi\n");
    }
}

#[tokio::test]
async fn messages_that_could_not_be_printed_are_shown_again() {
    let world = World::new().await;
    let (alice, bob) = (world.user("alice").await, world.user("bob").await);
    alice.ok(&["send", "bob", "hi"]).await;
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    let ran = bob.command(&["recv"]).stdout(full).spawn().unwrap();
    let ran = ran.wait_with_output().await.unwrap();
    assert_eq!(ran.status.code(), Some(1));
    assert!(String::from_utf8(ran.stderr).unwrap().contains("cannot write to standard output"));

    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let ran = bob.command(&["recv"]).stdout(writer).spawn().unwrap();
    let ran = ran.wait_with_output().await.unwrap();
    assert_eq!((ran.status.code(), &ran.stderr[..]), (Some(141), &b""[..]));
    assert_eq!(bob.ok(&["recv"]).await, "alice: hi\n");
}

#[tokio::test]
async fn junk_in_an_inbox_hides_nothing_that_follows() {
    let world = World::new().await;
    let (alice, bob, mallory) =
        (world.user("alice").await, world.user("bob").await, world.user("mallory").await);
    alice.ok(&["send", "bob", "before"]).await;
    let mut payloads: Vec<Vec<u8>> = vec![
        vec![0],
        vec![0xff; 3],
        b"hello".to_vec(),
        b"QPQR".to_vec(),
        vec![0; 100_000],
        vec![0, 1, 0, 3],
        // MLS 1.0: a private and a public message, a Welcome, a GroupInfo and an empty KeyPackage.
        vec![0, 1, 0, 2],
        vec![0, 1, 0, 1],
        vec![0, 1, 0, 4],
        vec![0, 1, 0, 5],
        // A length beyond the end, and one that is not minimal.
        vec![0, 1, 0, 3, 0xbf, 0xff, 0xff, 0xff],
        vec![0, 1, 0, 3, 0x40, 0x01, 0],
    ];
    payloads.push((0..=255).collect());
    payloads.push([&[0x0a, 0x80, 0x80, 0x80, 0x80, 0x10][..], &[7; 64]].concat());
    send_junk(&world, &mallory, &bob, &payloads).await;
    alice.ok(&["send", "bob", "after"]).await;
    let said = bob.ok(&["recv"]).await;
    assert!(said.starts_with("alice: before\n") && said.ends_with("alice: after\n"), "{said}");
    bob.ok(&["send", "alice", "still works"]).await;
    assert_eq!(alice.ok(&["recv"]).await, "bob: still works\n");
}

#[tokio::test]
async fn names_and_texts_of_any_script_arrive_unchanged_in_the_c_locale() {
    let world = World::new().await;
    let names = ["山田太郎", "алиса", "אליס", "सीता"];
    let bob = world.user("bob").await;
    for name in names {
        let user = world.user(name).await;
        let mut command = user.command(&["send", "bob", "grüße 👩‍👩‍👧"]);
        let sent = command.env("LC_ALL", "C").stdin(Stdio::piped()).spawn().unwrap();
        assert_eq!(finish(sent, "").await.out, "Sent to bob.\n");
        let mut command = bob.command(&["recv"]);
        let received = command.env("LC_ALL", "C").stdin(Stdio::piped()).spawn().unwrap();
        assert_eq!(finish(received, "").await.out, format!("{name}: grüße 👩‍👩‍👧\n"));
    }
}

#[tokio::test]
async fn texts_and_names_of_the_largest_size_are_accepted() {
    let world = World::new().await;
    let (alice, bob) = (world.user("alice").await, world.user("bob").await);
    let text = "x".repeat(64 * 1024);
    assert_eq!(alice.run_with(&["send", "bob", "-"], &text).await.code, Some(0));
    assert_eq!(bob.json(&["recv"]).await[0]["text"], json!(text));
    let group = "g".repeat(256);
    alice.ok(&["group", "create", &group, "bob"]).await;
    alice.fails(&["group", "create", &format!("{group}g"), "bob"], 1, "client.group_name").await;
    let long = "n".repeat(64);
    world.user(&long).await;
    world.person("o").fails(&["register", &"o".repeat(65)], 2, "client.usage").await;
}

/// Bob knows alice and has compared her key. The server assigns her name to another key.
#[tokio::test]
async fn a_second_key_under_a_confirmed_name_is_never_shown_as_that_name() {
    let mut world = World::new().await;
    let (alice, bob) = (world.user("alice").await, world.user("bob").await);
    alice.ok(&["send", "bob", "hi"]).await;
    assert_eq!(bob.ok(&["recv"]).await, "alice: hi\n");
    assert_eq!(bob.json(&["keys", "alice"]).await[0]["compared_at"], json!(null));
    assert!(bob.ok(&["keys", "alice", "--verified"]).await.contains("Compared on 20"));
    assert!(bob.json(&["keys", "alice"]).await[0]["compared_at"].as_u64().is_some());

    world.stop().await;
    world
        .sql("UPDATE account SET username = 'old', skeleton = 'old' WHERE username = 'alice'")
        .await;
    world.start_again().await;
    let impostor = world.person("impostor");
    impostor.ok(&["register", "alice", "--pin", &world.fingerprint]).await;
    let key = impostor.json(&["whoami"]).await[0]["identity"].as_str().unwrap().to_owned();
    let shown = format!("alice (new key {}…)", &key[..8]);
    impostor.ok(&["send", "bob", "I have a new phone"]).await;
    let said = bob.ok(&["recv"]).await;
    assert!(said.contains(&format!("{shown}: I have a new phone\n")), "{said}");
    assert!(said.contains(&format!("* Careful: {shown} has another key than the alice")), "{said}");
    impostor.ok(&["send", "bob", "really"]).await;
    let message = &bob.json(&["recv"]).await[0];
    assert_eq!(message["from"]["standing"], "new_key");

    // Nothing is sent to the new key, and its number is shown before it is accepted.
    bob.fails(&["send", "alice", "secret"], 1, "client.identity_changed").await;
    let error = bob.fails(&["keys", "alice"], 1, "client.identity_changed").await;
    let hint = error["hint"].as_str().unwrap();
    assert!(hint.contains("you compared the old one on 20") && hint.contains("--accept"), "{hint}");
    assert_eq!(impostor.run(&["recv"]).await.out, "");

    let accepted = &bob.json(&["keys", "alice", "--accept"]).await[0];
    assert_eq!((&accepted["identity"], &accepted["compared_at"]), (&json!(key), &json!(null)));
    impostor.ok(&["send", "bob", "thanks"]).await;
    assert_eq!(bob.ok(&["recv"]).await, "alice: thanks\n");
    bob.ok(&["send", "alice", "welcome"]).await;
}
