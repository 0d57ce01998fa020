//! `init` creates or copies all files of a cluster and overwrites none.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, sync::Arc};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use qpq_rpc::OpaqueServer;
use qpq_runtime::data_dir::cluster::ClusterDir;
use qpq_transport::{ClusterKeyFiles, ClusterKeys, Identity};

use crate::harness::{FILES, Workspace, contents, mode, run, run_failing, run_with, text};

/// Loads a directory as an edge does. Returns the fingerprint of the certificate.
fn load_as_an_edge(dir: &Path) -> String {
    let shared = ClusterDir::open(dir).unwrap();
    shared.cluster_id().unwrap();
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
fn a_new_directory_is_complete_and_readable_by_its_owner_only() {
    let workspace = Workspace::new();
    let shared = workspace.path("deeper/shared");
    let stdout = run(&["init", "--out", text(&shared)]);
    assert_eq!(contents(&shared).into_keys().collect::<Vec<_>>(), FILES);
    assert_eq!(mode(&shared), 0o700);
    for name in FILES {
        assert_eq!(mode(&shared.join(name)), 0o600, "{name}");
    }
    let fingerprint = load_as_an_edge(&shared);
    assert!(stdout.contains(&format!("fingerprint   {fingerprint}")), "{stdout}");
    assert!(stdout.contains("QPQ_CLUSTER__SECRETS_DIR"), "{stdout}");
    let id = fs::read_to_string(shared.join("cluster-id")).unwrap();
    assert!(stdout.contains(&format!("cluster       {id}")), "{stdout}");
}

#[test]
fn two_clusters_have_different_secrets() {
    let ((_one, one), (_two, two)) = (Workspace::with_shared_dir(), Workspace::with_shared_dir());
    let (one, two) = (contents(&one), contents(&two));
    for name in FILES {
        assert_ne!(one[name], two[name], "{name}");
    }
}

#[test]
fn init_on_a_complete_directory_fails_and_changes_no_file() {
    let (_workspace, shared) = Workspace::with_shared_dir();
    let before = contents(&shared);
    let stderr = run_failing(1, &["init", "--out", text(&shared)]);
    assert!(
        stderr.contains(text(&shared)) && stderr.contains("nothing is overwritten"),
        "{stderr}"
    );
    assert_eq!(contents(&shared), before);
    // With --if-missing it succeeds.
    let stdout = run(&["init", "--if-missing", "--out", text(&shared)]);
    assert!(stdout.contains("already exists"), "{stdout}");
    assert!(stdout.contains(&load_as_an_edge(&shared)), "{stdout}");
    assert_eq!(contents(&shared), before);
    fs::remove_file(shared.join("reset-key")).unwrap();
    let stderr = run_failing(1, &["init", "--if-missing", "--out", text(&shared)]);
    assert!(stderr.contains("reset-key is missing"), "{stderr}");
    assert!(!shared.join("reset-key").exists());
}

#[test]
fn an_interrupted_init_is_completed_by_the_next_run() {
    let order = [
        "opaque-setup.bin",
        "delivery-key.bin",
        "ticket-keys",
        "token-key",
        "reset-key",
        "at-rest-keys",
        "server-cert.der",
        "server-key.der",
    ];
    let (workspace, complete) = Workspace::with_shared_dir();
    for written in 0..=order.len() {
        let shared = workspace.path(&format!("interrupted-{written}"));
        fs::create_dir(&shared).unwrap();
        for name in &order[..written] {
            fs::copy(complete.join(name), shared.join(name)).unwrap();
        }
        fs::write(shared.join("cluster-id.123.new"), "").unwrap();
        let before = contents(&shared);
        run(&["init", "--if-missing", "--out", text(&shared)]);
        load_as_an_edge(&shared);
        let after = contents(&shared);
        // A certificate without its key is replaced.
        let kept = before.iter().filter(|(name, _)| written != 7 || *name != "server-cert.der");
        for (name, bytes) in kept {
            assert_eq!(&after[name], bytes, "{name}");
        }
    }
}

#[test]
fn an_empty_volume_is_filled_and_restricted_to_its_owner() {
    let workspace = Workspace::new();
    let shared = workspace.path("volume");
    fs::create_dir_all(shared.join("lost+found")).unwrap();
    fs::set_permissions(&shared, fs::Permissions::from_mode(0o755)).unwrap();
    run(&["init", "--out", text(&shared)]);
    assert_eq!(mode(&shared), 0o700);
    load_as_an_edge(&shared);
}

#[test]
fn a_directory_with_other_files_is_refused_and_unchanged() {
    let workspace = Workspace::new();
    let dir = workspace.path("home");
    fs::create_dir(&dir).unwrap();
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(dir.join("qpq.db"), "a database").unwrap();
    let stderr = run_failing(1, &["init", "--out", text(&dir)]);
    assert!(stderr.contains("qpq.db is not one of a cluster's files"), "{stderr}");
    assert_eq!(contents(&dir).len(), 1);
    assert_eq!(mode(&dir), 0o755);
    // A key without a certificate may be the only copy of the key.
    let dir = workspace.path("key");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("server-key.der"), "a key").unwrap();
    let stderr = run_failing(1, &["init", "--out", text(&dir)]);
    assert!(stderr.contains("server-key.der exists without"), "{stderr}");
    assert_eq!(fs::read(dir.join("server-key.der")).unwrap(), b"a key");
    assert!(!dir.join("cluster-id").exists());
    // A file with the name of the directory is named.
    let file = workspace.path("file");
    fs::write(&file, "").unwrap();
    let stderr = run_failing(1, &["init", "--out", text(&file.join("shared"))]);
    assert!(stderr.contains(text(&file)), "{stderr}");
}

#[test]
fn the_certificate_is_valid_for_the_requested_names() {
    let workspace = Workspace::new();
    let contains_name = |dir: &Path, name: &str| {
        let cert = fs::read(dir.join("server-cert.der")).unwrap();
        cert.windows(name.len()).any(|window| window == name.as_bytes())
    };
    let shared = workspace.path("flags");
    let flags = ["--domain", "example.org", "--name", "eu.example.org", "us.example.org"];
    run(&[&["init", "--out", text(&shared)][..], &flags].concat());
    for name in ["example.org", "eu.example.org", "us.example.org", "localhost"] {
        assert!(contains_name(&shared, name), "{name}");
    }
    assert!(!contains_name(&shared, "example.net"));
    let shared = workspace.path("variables");
    let variables =
        [("QPQ_DOMAIN", "example.net"), ("QPQ_TLS__NAMES", "a.example.net,b.example.net")];
    let end = run_with(&["init", "--out", text(&shared)], &variables);
    assert_eq!(end.code, Some(0), "{end:?}");
    for name in ["example.net", "a.example.net", "b.example.net"] {
        assert!(contains_name(&shared, name), "{name}");
    }
    let stderr = run_failing(
        2,
        &["init", "--out", text(&workspace.path("none")), "--domain", "Example.org"],
    );
    assert!(stderr.contains("in lower case"), "{stderr}");
    let stderr =
        run_failing(1, &["init", "--out", text(&workspace.path("none")), "--name", "ex ämple"]);
    assert!(stderr.contains("cannot create a certificate"), "{stderr}");
}

#[test]
fn a_named_certificate_is_copied_with_its_key() {
    let workspace = Workspace::new();
    let (cert, key) = (workspace.path("chain.pem"), workspace.path("key.pem"));
    let identity = Identity::load_or_create(&cert, &key, &["example.org".to_owned()]).unwrap();
    let shared = workspace.path("shared");
    let files = ["--tls-cert", text(&cert), "--tls-key", text(&key)];
    run(&[&["init", "--out", text(&shared)][..], &files].concat());
    assert_eq!(load_as_an_edge(&shared), identity.fingerprint().to_string());
    assert_eq!(mode(&shared.join("server-cert.der")), 0o600);
    // A certificate without a key, and a key of another certificate, are refused.
    let other = workspace.path("other");
    let stderr = run_failing(2, &["init", "--out", text(&other), "--tls-cert", text(&cert)]);
    assert!(stderr.contains("--tls-key"), "{stderr}");
    let (_other, stranger) = Workspace::with_shared_dir();
    let stranger = stranger.join("server-key.der");
    let wrong = ["--tls-cert", text(&cert), "--tls-key", text(&stranger)];
    let stderr = run_failing(1, &[&["init", "--out", text(&other)][..], &wrong].concat());
    assert!(stderr.contains("cannot be used together"), "{stderr}");
    assert!(!other.join("cluster-id").exists() && !other.join("server-cert.der").exists());
}

#[test]
fn the_secrets_of_a_single_node_are_copied() {
    // A data directory has the database in addition to these files.
    let (workspace, node) = Workspace::with_shared_dir();
    fs::write(node.join("qpq.db"), "a database").unwrap();
    let shared = workspace.path("cluster");
    run(&["init", "--out", text(&shared), "--from", text(&node)]);
    let (old, new) = (contents(&node), contents(&shared));
    for name in [
        "at-rest-keys",
        "opaque-setup.bin",
        "delivery-key.bin",
        "server-cert.der",
        "server-key.der",
    ] {
        assert_eq!(old[name], new[name], "{name}");
    }
    for name in ["ticket-keys", "token-key", "reset-key", "cluster-id"] {
        assert_ne!(old[name], new[name], "{name}");
    }
    // Without a certificate and keys at rest in the data directory, new ones are created.
    fs::remove_file(node.join("at-rest-keys")).unwrap();
    for name in ["server-cert.der", "server-key.der"] {
        fs::remove_file(node.join(name)).unwrap();
    }
    let shared = workspace.path("another");
    run(&["init", "--out", text(&shared), "--from", text(&node)]);
    load_as_an_edge(&shared);
    // Another OPAQUE setup in the directory is a conflict.
    let unfinished = workspace.path("unfinished");
    fs::create_dir(&unfinished).unwrap();
    let (_other, other) = Workspace::with_shared_dir();
    fs::copy(other.join("opaque-setup.bin"), unfinished.join("opaque-setup.bin")).unwrap();
    let stderr = run_failing(1, &["init", "--out", text(&unfinished), "--from", text(&node)]);
    assert!(stderr.contains("opaque-setup.bin already exists and differs"), "{stderr}");
    for damage in [&b"short"[..], &[0xff; 128]] {
        fs::write(node.join("opaque-setup.bin"), damage).unwrap();
        let stderr = run_failing(
            1,
            &["init", "--out", text(&workspace.path("none")), "--from", text(&node)],
        );
        assert!(stderr.contains("damaged") || stderr.contains("cannot be used"), "{stderr}");
    }
    fs::remove_file(node.join("opaque-setup.bin")).unwrap();
    let stderr =
        run_failing(1, &["init", "--out", text(&workspace.path("none")), "--from", text(&node)]);
    assert!(stderr.contains("opaque-setup.bin cannot be read"), "{stderr}");
}

#[test]
fn a_kubernetes_manifest_contains_the_same_files() {
    let workspace = Workspace::new();
    let stdout = run(&["init", "--kubernetes-secret", "qpq-cluster", "--namespace", "chat"]);
    let secret: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((&secret["apiVersion"], &secret["kind"]), (&"v1".into(), &"Secret".into()));
    assert_eq!(
        secret["metadata"],
        serde_json::json!({ "name": "qpq-cluster", "namespace": "chat" })
    );
    assert_eq!(secret["type"], "Opaque");
    let data = secret["data"].as_object().unwrap();
    assert_eq!(data.keys().map(String::as_str).collect::<Vec<_>>(), FILES);
    let mounted = workspace.path("mounted");
    fs::create_dir(&mounted).unwrap();
    for (name, value) in data {
        fs::write(mounted.join(name), BASE64_STANDARD.decode(value.as_str().unwrap()).unwrap())
            .unwrap();
    }
    load_as_an_edge(&mounted);
    let without = run(&["init", "--kubernetes-secret", "qpq-cluster"]);
    let without: serde_json::Value = serde_json::from_str(&without).unwrap();
    assert_eq!(without["metadata"], serde_json::json!({ "name": "qpq-cluster" }));
    assert_ne!(without["data"], secret["data"]);
}

#[test]
fn missing_and_conflicting_options_are_refused() {
    assert!(run_failing(2, &["init"]).contains("--out"));
    assert!(
        run_failing(2, &["init", "--out", "x", "--kubernetes-secret", "y"])
            .contains("cannot be used with")
    );
    assert!(run_failing(2, &["init", "--kubernetes-secret", "Not_A_Name"]).contains("lower-case"));
    assert!(
        run_failing(2, &["init", "--out", "x", "--namespace", "y"]).contains("cannot be used with")
    );
    let both = ["init", "--kubernetes-secret", "x", "--if-missing"];
    assert!(run_failing(2, &both).contains("cannot be used with"));
    let both = ["init", "--out", "x", "--if-missing", "--from", "y"];
    assert!(run_failing(2, &both).contains("cannot be used with"));
    assert!(run_failing(2, &[]).contains("init"));
}

#[test]
fn a_manifest_that_cannot_be_written_fails_the_command() {
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_qpq-admin"))
        .args(["init", "--kubernetes-secret", "qpq-cluster"])
        .stdout(full)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("cannot write to standard output"));
}
