//! `init`: what it makes, what it takes, and that it overwrites nothing.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, sync::Arc};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use qpq_rpc::OpaqueServer;
use qpq_runtime::data_dir::cluster::ClusterDir;
use qpq_transport::{ClusterKeyFiles, ClusterKeys, Identity};

use crate::harness::{FILES, Place, contents, mode, refusal, run, run_with, text};

/// Reads a directory by the same code as an edge; the certificate's fingerprint.
fn as_an_edge_reads_it(dir: &Path) -> String {
    let fleet = ClusterDir::open(dir).unwrap();
    fleet.cluster_id().unwrap();
    OpaqueServer::parse(&fs::read(dir.join("opaque-setup.bin")).unwrap()).unwrap();
    let keys: Arc<ClusterKeys> = ClusterKeys::load(ClusterKeyFiles {
        tickets: dir.join("ticket-keys"),
        tokens: dir.join("token-key"),
        reset: dir.join("reset-key"),
    })
    .unwrap();
    drop(keys);
    let identity =
        Identity::load(&dir.join("server-cert.der"), &dir.join("server-key.der")).unwrap();
    identity.fingerprint().to_string()
}

#[test]
fn everything_is_made_for_its_owner_alone_and_can_be_used() {
    let place = Place::new();
    let fleet = place.path("deeper/fleet");
    let printed = run(&["init", "--out", text(&fleet)]);
    assert_eq!(contents(&fleet).into_keys().collect::<Vec<_>>(), FILES);
    assert_eq!(mode(&fleet), 0o700);
    for name in FILES {
        assert_eq!(mode(&fleet.join(name)), 0o600, "{name}");
    }
    let fingerprint = as_an_edge_reads_it(&fleet);
    assert!(printed.contains(&format!("fingerprint   {fingerprint}")), "{printed}");
    assert!(printed.contains("QPQ_CLUSTER__SECRETS_DIR"), "{printed}");
    let id = fs::read_to_string(fleet.join("cluster-id")).unwrap();
    assert!(printed.contains(&format!("cluster       {id}")), "{printed}");
}

#[test]
fn two_clusters_have_nothing_in_common() {
    let ((_one, one), (_two, two)) = (Place::with_fleet(), Place::with_fleet());
    let (one, two) = (contents(&one), contents(&two));
    for name in FILES {
        assert_ne!(one[name], two[name], "{name}");
    }
}

#[test]
fn a_second_init_refuses_and_touches_nothing() {
    let (_place, fleet) = Place::with_fleet();
    let before = contents(&fleet);
    let said = refusal(1, &["init", "--out", text(&fleet)]);
    assert!(said.contains(text(&fleet)) && said.contains("nothing is overwritten"), "{said}");
    assert_eq!(contents(&fleet), before);
    // Unless that is what was asked for.
    let printed = run(&["init", "--if-missing", "--out", text(&fleet)]);
    assert!(printed.contains("is there already"), "{printed}");
    assert!(printed.contains(&as_an_edge_reads_it(&fleet)), "{printed}");
    assert_eq!(contents(&fleet), before);
    fs::remove_file(fleet.join("reset-key")).unwrap();
    let said = refusal(1, &["init", "--if-missing", "--out", text(&fleet)]);
    assert!(said.contains("reset-key is missing"), "{said}");
    assert!(!fleet.join("reset-key").exists());
}

#[test]
fn an_init_that_was_stopped_anywhere_is_completed_by_the_next() {
    let order = [
        "opaque-setup.bin",
        "delivery-key.bin",
        "ticket-keys",
        "token-key",
        "reset-key",
        "server-cert.der",
        "server-key.der",
    ];
    let (place, whole) = Place::with_fleet();
    for written in 0..=order.len() {
        let fleet = place.path(&format!("stopped-{written}"));
        fs::create_dir(&fleet).unwrap();
        for name in &order[..written] {
            fs::copy(whole.join(name), fleet.join(name)).unwrap();
        }
        fs::write(fleet.join("cluster-id.123.new"), "").unwrap();
        let before = contents(&fleet);
        run(&["init", "--if-missing", "--out", text(&fleet)]);
        as_an_edge_reads_it(&fleet);
        let after = contents(&fleet);
        // A certificate without its key is no use to anybody.
        let kept = before.iter().filter(|(name, _)| written != 6 || *name != "server-cert.der");
        for (name, bytes) in kept {
            assert_eq!(&after[name], bytes, "{name}");
        }
    }
}

#[test]
fn an_empty_volume_is_taken_and_closed_to_others() {
    let place = Place::new();
    let fleet = place.path("volume");
    fs::create_dir_all(fleet.join("lost+found")).unwrap();
    fs::set_permissions(&fleet, fs::Permissions::from_mode(0o755)).unwrap();
    run(&["init", "--out", text(&fleet)]);
    assert_eq!(mode(&fleet), 0o700);
    as_an_edge_reads_it(&fleet);
}

#[test]
fn a_directory_with_other_things_in_it_is_left_alone() {
    let place = Place::new();
    let dir = place.path("home");
    fs::create_dir(&dir).unwrap();
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(dir.join("qpq.db"), "a database").unwrap();
    let said = refusal(1, &["init", "--out", text(&dir)]);
    assert!(said.contains("qpq.db is none of a cluster's files"), "{said}");
    assert_eq!(contents(&dir).len(), 1);
    assert_eq!(mode(&dir), 0o755);
    // A key alone may be somebody's only copy.
    let dir = place.path("key");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("server-key.der"), "a key").unwrap();
    let said = refusal(1, &["init", "--out", text(&dir)]);
    assert!(said.contains("server-key.der is there without"), "{said}");
    assert_eq!(fs::read(dir.join("server-key.der")).unwrap(), b"a key");
    assert!(!dir.join("cluster-id").exists());
    // And what is in the way of a directory is said to be.
    let file = place.path("file");
    fs::write(&file, "").unwrap();
    let said = refusal(1, &["init", "--out", text(&file.join("fleet"))]);
    assert!(said.contains(text(&file)), "{said}");
}

#[test]
fn the_certificate_is_for_the_names_that_were_asked_for() {
    let place = Place::new();
    let holds = |dir: &Path, name: &str| {
        let cert = fs::read(dir.join("server-cert.der")).unwrap();
        cert.windows(name.len()).any(|window| window == name.as_bytes())
    };
    let fleet = place.path("flags");
    let flags = ["--domain", "example.org", "--name", "eu.example.org", "us.example.org"];
    run(&[&["init", "--out", text(&fleet)][..], &flags].concat());
    for name in ["example.org", "eu.example.org", "us.example.org", "localhost"] {
        assert!(holds(&fleet, name), "{name}");
    }
    assert!(!holds(&fleet, "example.net"));
    let fleet = place.path("variables");
    let variables =
        [("QPQ_DOMAIN", "example.net"), ("QPQ_TLS__NAMES", "a.example.net,b.example.net")];
    let end = run_with(&["init", "--out", text(&fleet)], &variables);
    assert_eq!(end.code, Some(0), "{end:?}");
    for name in ["example.net", "a.example.net", "b.example.net"] {
        assert!(holds(&fleet, name), "{name}");
    }
    let said = refusal(2, &["init", "--out", text(&place.path("none")), "--domain", "Example.org"]);
    assert!(said.contains("in lower case"), "{said}");
    let said = refusal(1, &["init", "--out", text(&place.path("none")), "--name", "ex ämple"]);
    assert!(said.contains("cannot create a certificate"), "{said}");
}

#[test]
fn a_certificate_that_is_there_is_taken() {
    let place = Place::new();
    let (cert, key) = (place.path("chain.pem"), place.path("key.pem"));
    let identity = Identity::load_or_create(&cert, &key, &["example.org".to_owned()]).unwrap();
    let fleet = place.path("fleet");
    let files = ["--tls-cert", text(&cert), "--tls-key", text(&key)];
    run(&[&["init", "--out", text(&fleet)][..], &files].concat());
    assert_eq!(as_an_edge_reads_it(&fleet), identity.fingerprint().to_string());
    assert_eq!(mode(&fleet.join("server-cert.der")), 0o600);
    // One without the other, and two that do not belong together.
    let other = place.path("other");
    let said = refusal(2, &["init", "--out", text(&other), "--tls-cert", text(&cert)]);
    assert!(said.contains("--tls-key"), "{said}");
    let (_fleet, stranger) = Place::with_fleet();
    let stranger = stranger.join("server-key.der");
    let wrong = ["--tls-cert", text(&cert), "--tls-key", text(&stranger)];
    let said = refusal(1, &[&["init", "--out", text(&other)][..], &wrong].concat());
    assert!(said.contains("cannot be used together"), "{said}");
    assert!(!other.join("cluster-id").exists() && !other.join("server-cert.der").exists());
}

#[test]
fn a_server_that_ran_alone_can_grow_up() {
    // Its data directory has these, beside the database.
    let (place, alone) = Place::with_fleet();
    fs::write(alone.join("qpq.db"), "a database").unwrap();
    let fleet = place.path("cluster");
    run(&["init", "--out", text(&fleet), "--from", text(&alone)]);
    let (old, new) = (contents(&alone), contents(&fleet));
    for name in ["opaque-setup.bin", "delivery-key.bin", "server-cert.der", "server-key.der"] {
        assert_eq!(old[name], new[name], "{name}");
    }
    for name in ["ticket-keys", "token-key", "reset-key", "cluster-id"] {
        assert_ne!(old[name], new[name], "{name}");
    }
    // Where it had its certificate elsewhere, a new one is made.
    for name in ["server-cert.der", "server-key.der"] {
        fs::remove_file(alone.join(name)).unwrap();
    }
    let fleet = place.path("another");
    run(&["init", "--out", text(&fleet), "--from", text(&alone)]);
    as_an_edge_reads_it(&fleet);
    // Another setup is never left in its place.
    let unfinished = place.path("unfinished");
    fs::create_dir(&unfinished).unwrap();
    let (_other, other) = Place::with_fleet();
    fs::copy(other.join("opaque-setup.bin"), unfinished.join("opaque-setup.bin")).unwrap();
    let said = refusal(1, &["init", "--out", text(&unfinished), "--from", text(&alone)]);
    assert!(said.contains("opaque-setup.bin is there already and is another"), "{said}");
    for damage in [&b"short"[..], &[0xff; 128]] {
        fs::write(alone.join("opaque-setup.bin"), damage).unwrap();
        let said =
            refusal(1, &["init", "--out", text(&place.path("none")), "--from", text(&alone)]);
        assert!(said.contains("damaged") || said.contains("cannot be used"), "{said}");
    }
    fs::remove_file(alone.join("opaque-setup.bin")).unwrap();
    let said = refusal(1, &["init", "--out", text(&place.path("none")), "--from", text(&alone)]);
    assert!(said.contains("opaque-setup.bin cannot be read"), "{said}");
}

#[test]
fn a_manifest_holds_the_same_files() {
    let place = Place::new();
    let printed = run(&["init", "--kubernetes-secret", "qpq-fleet", "--namespace", "chat"]);
    let secret: serde_json::Value = serde_json::from_str(&printed).unwrap();
    assert_eq!((&secret["apiVersion"], &secret["kind"]), (&"v1".into(), &"Secret".into()));
    assert_eq!(secret["metadata"], serde_json::json!({ "name": "qpq-fleet", "namespace": "chat" }));
    assert_eq!(secret["type"], "Opaque");
    let data = secret["data"].as_object().unwrap();
    assert_eq!(data.keys().map(String::as_str).collect::<Vec<_>>(), FILES);
    let mounted = place.path("mounted");
    fs::create_dir(&mounted).unwrap();
    for (name, value) in data {
        fs::write(mounted.join(name), BASE64_STANDARD.decode(value.as_str().unwrap()).unwrap())
            .unwrap();
    }
    as_an_edge_reads_it(&mounted);
    let without = run(&["init", "--kubernetes-secret", "qpq-fleet"]);
    let without: serde_json::Value = serde_json::from_str(&without).unwrap();
    assert_eq!(without["metadata"], serde_json::json!({ "name": "qpq-fleet" }));
    assert_ne!(without["data"], secret["data"]);
}

#[test]
fn it_must_be_said_where_and_only_once() {
    assert!(refusal(2, &["init"]).contains("--out"));
    assert!(
        refusal(2, &["init", "--out", "x", "--kubernetes-secret", "y"])
            .contains("cannot be used with")
    );
    assert!(refusal(2, &["init", "--kubernetes-secret", "Not_A_Name"]).contains("lower-case"));
    assert!(
        refusal(2, &["init", "--out", "x", "--namespace", "y"]).contains("cannot be used with")
    );
    let both = ["init", "--kubernetes-secret", "x", "--if-missing"];
    assert!(refusal(2, &both).contains("cannot be used with"));
    let both = ["init", "--out", "x", "--if-missing", "--from", "y"];
    assert!(refusal(2, &both).contains("cannot be used with"));
    assert!(refusal(2, &[]).contains("init"));
}

#[test]
fn a_manifest_that_cannot_be_written_is_a_failure() {
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_qpq-admin"))
        .args(["init", "--kubernetes-secret", "qpq-fleet"])
        .stdout(full)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("cannot write to standard output"));
}
