//! Registration, login, logout and `qpq whoami`.

use std::os::unix::fs::PermissionsExt as _;

use qpq_runtime::config::Named;
use qpq_server::RegistrationMode;
use serde_json::json;

use crate::harness::{PASSWORD, World};

#[tokio::test]
async fn registering_logs_in_and_pins_the_server() {
    let world = World::new().await;
    let alice = world.person("alice");
    let said = alice.ok(&["register", "Alice"]).await;
    assert!(
        said.starts_with(&format!("alice is registered on {} and logged in.\n", world.address)),
        "{said}"
    );
    assert!(said.contains(&world.fingerprint), "{said}");

    let whoami = &alice.json(&["whoami"]).await[0];
    for (key, value) in [
        ("username", "alice"),
        ("profile", "default"),
        ("server", &world.address),
        ("trust", "pinned"),
        ("server_fingerprint", &world.fingerprint),
        ("session", "valid"),
    ] {
        assert_eq!(whoami[key], value);
    }
    assert!(alice.ok(&["whoami"]).await.contains("logged in"));
    let listed = alice.json(&["profiles"]).await;
    let expected = json!({
        "profile": "default", "username": "alice", "server": world.address, "unlocked": true,
        "registered": true
    });
    assert_eq!(listed, [expected]);
    for kept in alice.kept_keys() {
        assert_eq!(std::fs::metadata(kept).unwrap().permissions().mode() & 0o777, 0o600);
    }
}

#[tokio::test]
async fn registering_over_a_profile_or_under_a_taken_name_is_refused() {
    let world = World::new().await;
    let alice = world.user("alice").await;
    alice.fails(&["register", "alice2"], 1, "profile.exists").await;
    let other = world.person("other");
    other.fails(&["register", "ALICE"], 1, "auth.username_taken").await;
    other.fails(&["whoami"], 3, "profile.missing").await;
    assert!(other.json(&["profiles"]).await.is_empty());
    other.ok(&["register", "other"]).await;
}

#[tokio::test]
async fn a_server_that_needs_invites_accepts_as_many_accounts_as_an_invite_has_uses() {
    let mode = Named(RegistrationMode::Invite);
    let world = World::with(|config| config.auth.registration = mode).await;
    let code = world.invite(1, None).await;
    let (alice, bob) = (world.person("alice"), world.person("bob"));
    let error = alice.fails(&["register", "alice"], 1, "auth.invite_required").await;
    assert!(error["hint"].as_str().unwrap().contains("--invite CODE"), "{error}");
    alice.fails(&["register", "alice", "--invite", "nonsense"], 1, "auth.invite_invalid").await;
    alice.ok(&["register", "alice", "--invite", &code.replace('-', " ")]).await;
    bob.fails(&["register", "bob", "--invite", code], 1, "auth.invite_invalid").await;
    assert!(bob.json(&["profiles"]).await.is_empty());
}

#[tokio::test]
async fn a_server_without_registration_refuses_every_new_account() {
    let mode = Named(RegistrationMode::Closed);
    let world = World::with(|config| config.auth.registration = mode).await;
    let alice = world.person("alice");
    alice.fails(&["register", "alice"], 1, "auth.registration_closed").await;
}

#[tokio::test]
async fn one_machine_has_several_profiles() {
    let world = World::new().await;
    let home = world.person("home");
    for name in ["alice", "bob"] {
        home.ok(&["register", name, "-p", name]).await;
    }
    home.ok(&["-p", "alice", "send", "bob", "hi"]).await;
    assert_eq!(home.ok(&["-p", "bob", "recv"]).await, "alice: hi\n");
    assert_eq!(home.json(&["profiles"]).await.len(), 2);
    home.fails(&["whoami"], 3, "profile.missing").await;
}

#[tokio::test]
async fn logging_out_ends_the_session_and_forgets_the_key() {
    let world = World::new().await;
    let (alice, _bob) = (world.user("alice").await, world.user("bob").await);
    let thief = alice.stolen_copy();
    assert_eq!(thief.json(&["whoami"]).await[0]["session"], "valid");

    let out = &alice.json(&["logout"]).await[0];
    assert_eq!((&out["event"], &out["sessions_ended"]), (&json!("logged_out"), &json!(1)));
    assert!(alice.kept_keys().is_empty());
    assert_eq!(alice.json(&["whoami"]).await[0]["session"], "none");
    let error = alice.fails(&["send", "bob", "hi"], 3, "client.not_logged_in").await;
    assert_eq!(error["hint"], "run `qpq login`");
    let ran = thief.run(&["send", "bob", "hi", "--json"]).await;
    assert_eq!((ran.code, &ran.error()["hint"]), (Some(3), &json!("run `qpq login`")), "{ran:?}");
    assert_eq!(thief.json(&["whoami"]).await[0]["session"], "ended");

    // A second logout is not an error.
    assert_eq!(alice.json(&["logout"]).await[0]["sessions_ended"], json!(null));
    let said = alice.ok(&["logout"]).await;
    assert!(said.starts_with("alice is not logged in on this machine.\n"), "{said}");
    alice.ok(&["login"]).await;
    alice.ok(&["send", "bob", "hi"]).await;
}

#[tokio::test]
async fn logging_out_everywhere_ends_every_session() {
    let world = World::new().await;
    let alice = world.user("alice").await;
    let thief = alice.stolen_copy();
    thief.ok(&["login"]).await;
    alice.ok(&["login"]).await;
    assert_eq!(thief.json(&["whoami"]).await[0]["session"], "valid");
    assert_eq!(alice.json(&["logout", "--all"]).await[0]["sessions_ended"], 2);
    assert_eq!(thief.json(&["whoami"]).await[0]["session"], "ended");
    alice.fails(&["logout", "--all"], 3, "client.not_logged_in").await;
}

#[tokio::test]
async fn only_the_right_password_logs_in() {
    let world = World::new().await;
    let alice = world.user("alice").await;
    alice.ok(&["logout"]).await;
    let login = |password: &str| {
        let mut command = alice.command(&["login", "--json"]);
        command.env("QPQ_PASSWORD", password);
        async move {
            let child = command.stdin(std::process::Stdio::piped()).spawn().unwrap();
            crate::harness::finish(child, "").await
        }
    };
    login("correct horse battery stapl").await.fails(3, "auth.failed");
    assert!(alice.kept_keys().is_empty());
    assert_eq!(login(PASSWORD).await.json()[0]["event"], "logged_in");
    assert_eq!(alice.kept_keys().len(), 1);
}

#[tokio::test]
async fn a_password_is_read_from_a_file_or_the_environment_and_required_otherwise() {
    let world = World::new().await;
    let alice = world.user("alice").await;
    alice.ok(&["logout"]).await;
    let file = alice.home.join("password");
    std::fs::write(&file, format!("{PASSWORD}\nnot this line\n")).unwrap();
    let file = file.to_str().unwrap();

    // The file takes precedence over the environment, and with a password no login is needed first.
    let logged_out = alice.ok(&["keys", "--password-file", file]).await;
    assert!(logged_out.starts_with("alice\n"));
    assert!(alice.kept_keys().is_empty());
    alice.ok(&["login", "--password-file", file]).await;
    std::fs::write(file, "").unwrap();
    alice.fails(&["login", "--password-file", file], 1, "client.password").await;
    alice.fails(&["login", "--password-file", "/nowhere"], 1, "client.io").await;

    // Without a source, and without a terminal to ask at, the command reports that.
    let mut bare = tokio::process::Command::new("setsid");
    bare.args(["--wait", env!("CARGO_BIN_EXE_qpq"), "login", "--json"]).env_clear();
    bare.env("QPQ_HOME", &alice.home).env("XDG_RUNTIME_DIR", &alice.runtime);
    let output = bare.stdin(std::process::Stdio::null()).output().await.unwrap();
    assert_eq!(output.status.code(), Some(3));
    assert!(String::from_utf8(output.stderr).unwrap().contains("client.password_needed"));
}

#[tokio::test]
async fn two_people_see_the_same_safety_number() {
    let world = World::new().await;
    let (alice, bob) = (world.user("alice").await, world.user("bob").await);
    let own = &alice.json(&["keys"]).await[0];
    assert_eq!((&own["username"], &own["last_resort"]), (&json!("alice"), &json!(true)));
    assert!(own["key_packages"].as_u64().unwrap() >= 10, "{own}");
    let (seen_by_alice, seen_by_bob) =
        (alice.json(&["keys", "bob"]).await, bob.json(&["keys", "alice"]).await);
    assert_eq!(seen_by_alice[0]["safety_number"], seen_by_bob[0]["safety_number"]);
    assert_eq!(seen_by_bob[0]["identity"], own["identity"]);
    assert!(
        seen_by_bob[0]["safety_number"]
            .as_str()
            .unwrap()
            .contains(own["fingerprint"].as_str().unwrap())
    );
    alice.fails(&["keys", "alice"], 1, "client.yourself").await;
}

#[tokio::test]
async fn an_account_is_deleted_after_its_name_and_password_were_given() {
    let world = World::new().await;
    let (alice, bob) = (world.user("alice").await, world.user("bob").await);
    bob.ok(&["send", "alice", "hi"]).await;
    let delete = async |name: &str, password: &str| {
        let mut command = alice.command(&["account", "delete", "--json"]);
        command.env("QPQ_PASSWORD", password);
        let child = command.stdin(std::process::Stdio::piped()).spawn().unwrap();
        crate::harness::finish(child, name).await
    };
    delete("bob\n", PASSWORD).await.fails(1, "client.not_confirmed");
    delete("", PASSWORD).await.fails(1, "client.not_confirmed");
    delete("alice\n", "correct horse battery stapl").await.fails(3, "auth.failed");
    assert_eq!(alice.json(&["whoami"]).await[0]["session"], "valid");

    let deleted = &delete("alice\n", PASSWORD).await.json()[0];
    let expected = json!({
        "event": "account_deleted", "username": "alice", "server": world.address,
        "profile_dir": null
    });
    assert_eq!(deleted, &expected);
    assert!(alice.kept_keys().is_empty());
    alice.fails(&["whoami"], 3, "profile.missing").await;
    let other = world.person("other");
    other.fails(&["register", "alice"], 1, "auth.username_taken").await;
    bob.fails(&["send", "alice", "still there?"], 1, "client.no_such_user").await;
}

#[tokio::test]
async fn a_profile_may_stay_after_the_deletion() {
    let world = World::new().await;
    let alice = world.user("alice").await;
    let mut command = alice.command(&["account", "delete", "--keep-profile"]);
    command.env("QPQ_PASSWORD", PASSWORD);
    let child = command.stdin(std::process::Stdio::piped()).spawn().unwrap();
    let ran = crate::harness::finish(child, "alice\n").await;
    let profile = alice.home.join("profiles/default");
    assert!(ran.out.contains(profile.to_str().unwrap()), "{ran:?}");
    assert!(profile.join("state.db").exists());
}

#[tokio::test]
async fn an_export_has_everything_and_only_its_owner_reads_it() {
    let world = World::new().await;
    let (alice, bob) = (world.user("alice").await, world.user("bob").await);
    alice.ok(&["send", "bob", "hello bob"]).await;
    bob.ok(&["recv"]).await;
    bob.ok(&["send", "alice", "hello alice"]).await;
    alice.ok(&["group", "create", "friends", "bob"]).await;
    let file = alice.home.join("export.jsonl");
    let out = file.to_str().unwrap();
    // The message of bob is still in the inbox.
    let exported = &alice.json(&["account", "export", "--out", out]).await[0];
    assert_eq!((&exported["event"], &exported["devices"]), (&json!("exported"), &json!(true)));
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    let text = std::fs::read_to_string(&file).unwrap();
    let lines: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((&lines[0]["event"], &lines[0]["username"]), (&json!("account"), &json!("alice")));
    let of = |event: &str| lines.iter().filter(|line| line["event"] == event).collect::<Vec<_>>();
    assert_eq!(of("device").len(), 1);
    assert!(of("person").iter().any(|person| person["username"] == "bob"));
    assert_eq!(of("sent")[0]["text"], "hello bob");
    assert_eq!(of("message")[0]["text"], "hello alice");
    let groups: Vec<_> =
        of("conversation").into_iter().filter(|one| one["kind"] == "group").collect();
    assert_eq!(groups[0]["name"], "friends");
    alice.fails(&["account", "export", "--out", out], 1, "client.file_exists").await;
}
