//! `rotate-ticket-keys` and `rotate-token-key`: each key moves up one place, and no other file
//! changes.

use std::{fs, io::Read as _, os::unix::fs::PermissionsExt as _, path::Path};

use crate::harness::{FILES, Workspace, contents, mode, run, run_failing, run_with, text};

const COMMANDS: [(&str, &str); 2] =
    [("rotate-ticket-keys", "ticket-keys"), ("rotate-token-key", "token-key")];

/// Returns the previous, the current and the next key.
fn ring(dir: &Path, name: &str) -> [Vec<u8>; 3] {
    let bytes = fs::read(dir.join(name)).unwrap();
    assert_eq!(bytes.len(), 96);
    [&bytes[..32], &bytes[32..64], &bytes[64..]].map(<[u8]>::to_vec)
}

#[test]
fn a_rotation_keeps_the_current_key_as_the_previous_one() {
    for (command, name) in COMMANDS {
        let (_workspace, shared) = Workspace::with_shared_dir();
        let mut others = contents(&shared);
        others.remove(name);
        let before = ring(&shared, name);
        let stdout = run(&[command, "--dir", text(&shared)]);
        assert!(stdout.contains(text(&shared.join(name))), "{stdout}");
        let after = ring(&shared, name);
        assert_eq!(after[..2], before[1..]);
        assert!(!before.contains(&after[2]));
        let end = run_with(&[command], &[("QPQ_CLUSTER__SECRETS_DIR", text(&shared))]);
        assert_eq!(end.code, Some(0), "{end:?}");
        assert_eq!(ring(&shared, name)[..2], after[1..]);
        assert_eq!(mode(&shared.join(name)), 0o600);
        let mut now = contents(&shared);
        now.remove(name);
        assert_eq!(now, others, "no other file changes or is created");
    }
}

#[test]
fn a_reader_during_a_rotation_reads_complete_keys() {
    let (_workspace, shared) = Workspace::with_shared_dir();
    let path = shared.join("ticket-keys");
    // An edge has opened the file before. Its contents stay the same, because the rotation renames
    // a new file instead of writing to the old one.
    let first = fs::read(&path).unwrap();
    let mut open = fs::File::open(&path).unwrap();
    run(&["rotate-ticket-keys", "--dir", text(&shared)]);
    let mut read = Vec::new();
    open.read_to_end(&mut read).unwrap();
    assert_eq!(read, first);
    assert_ne!(fs::read(&path).unwrap(), first);
}

#[test]
fn the_error_names_a_missing_or_damaged_file_which_stays_as_it_is() {
    for (command, rotated) in COMMANDS {
        let (workspace, shared) = Workspace::with_shared_dir();
        // A directory of an earlier release may lack the keys at rest.
        for name in FILES.into_iter().filter(|name| *name != "at-rest-keys") {
            let path = shared.join(name);
            let good = fs::read(&path).unwrap();
            fs::remove_file(&path).unwrap();
            let stderr = run_failing(1, &[command, "--dir", text(&shared)]);
            assert!(stderr.contains(&format!("{} is missing", path.display())), "{stderr}");
            assert!(stderr.contains("qpq-admin init"), "{stderr}");
            assert!(!path.exists());
            fs::write(&path, good).unwrap();
        }
        for damage in [&b"short"[..], &[0; 96]] {
            fs::write(shared.join(rotated), damage).unwrap();
            let stderr = run_failing(1, &[command, "--dir", text(&shared)]);
            assert!(stderr.contains(&format!("{rotated} is damaged")), "{stderr}");
            assert!(stderr.contains("qpq-admin init"), "{stderr}");
            assert_eq!(fs::read(shared.join(rotated)).unwrap(), damage);
        }
        let none = workspace.path("none");
        let stderr = run_failing(1, &[command, "--dir", text(&none)]);
        assert!(
            stderr.contains("there is no directory") && stderr.contains("qpq-admin init --out"),
            "{stderr}"
        );
        assert!(!none.exists());
        assert!(run_failing(2, &[command]).contains("--dir"));
    }
}

#[test]
fn a_rotation_restricts_the_file_to_its_owner() {
    let (_workspace, shared) = Workspace::with_shared_dir();
    let path = shared.join("token-key");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    run(&["rotate-token-key", "--dir", text(&shared)]);
    assert_eq!(mode(&path), 0o600);
}

#[test]
fn a_rotation_of_the_keys_at_rest_appends_a_key_and_keeps_the_others() {
    let (workspace, shared) = Workspace::with_shared_dir();
    let path = shared.join("at-rest-keys");
    let mut others = contents(&shared);
    others.remove("at-rest-keys");
    let before = fs::read(&path).unwrap();
    assert_eq!(before.len(), 64, "a current and a next key");
    for rotations in 1..=2 {
        let stdout = run(&["rotate-at-rest-keys", "--dir", text(&shared)]);
        assert!(stdout.contains(text(&path)) && stdout.contains("restart"), "{stdout}");
        let after = fs::read(&path).unwrap();
        assert_eq!(after.len(), 64 + 32 * rotations);
        assert_eq!(after[..64], before);
        assert_eq!(mode(&path), 0o600);
    }
    let mut now = contents(&shared);
    now.remove("at-rest-keys");
    assert_eq!(now, others, "no other file changes or is created");
    // The file of a single node is rotated in the same way.
    let node = workspace.path("node");
    fs::create_dir(&node).unwrap();
    fs::write(node.join("at-rest-keys"), &before).unwrap();
    run(&["rotate-at-rest-keys", "--dir", text(&node)]);
    assert_eq!(fs::read(node.join("at-rest-keys")).unwrap()[..64], before);
    for damage in [&before[..32], &before[..63], &[0; 64]] {
        fs::write(&path, damage).unwrap();
        let stderr = run_failing(1, &["rotate-at-rest-keys", "--dir", text(&shared)]);
        assert!(stderr.contains("at-rest-keys is damaged"), "{stderr}");
        assert_eq!(fs::read(&path).unwrap(), damage);
    }
}

#[test]
fn missing_keys_at_rest_are_added_once_by_either_command() {
    let add = |dir: &Path| run(&["add-at-rest-keys", "--dir", text(dir)]);
    let init = |dir: &Path| run(&["init", "--if-missing", "--out", text(dir)]);
    for command in [&add as &dyn Fn(&Path) -> String, &init] {
        let (_workspace, shared) = Workspace::with_shared_dir();
        let path = shared.join("at-rest-keys");
        fs::remove_file(&path).unwrap();
        let others = contents(&shared);
        let stderr = run_failing(1, &["rotate-at-rest-keys", "--dir", text(&shared)]);
        assert!(stderr.contains("qpq-admin add-at-rest-keys --dir"), "{stderr}");
        command(&shared);
        let added = fs::read(&path).unwrap();
        assert_eq!((added.len(), mode(&path)), (64, 0o600));
        assert!(command(&shared).contains("already exists"));
        assert_eq!(fs::read(&path).unwrap(), added);
        let mut now = contents(&shared);
        now.remove("at-rest-keys");
        assert_eq!(now, others);
    }
}
