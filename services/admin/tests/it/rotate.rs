//! `rotate-ticket-keys` and `rotate-token-key`: the keys move up by one, and nothing else changes.

use std::{fs, io::Read as _, os::unix::fs::PermissionsExt as _, path::Path};

use crate::harness::{FILES, Place, contents, mode, refusal, run, run_with, text};

const COMMANDS: [(&str, &str); 2] =
    [("rotate-ticket-keys", "ticket-keys"), ("rotate-token-key", "token-key")];

/// Previous, current, next.
fn ring(dir: &Path, name: &str) -> [Vec<u8>; 3] {
    let bytes = fs::read(dir.join(name)).unwrap();
    assert_eq!(bytes.len(), 96);
    [&bytes[..32], &bytes[32..64], &bytes[64..]].map(<[u8]>::to_vec)
}

#[test]
fn a_rotation_keeps_the_key_that_was_current_and_takes_the_next() {
    for (command, name) in COMMANDS {
        let (_place, fleet) = Place::with_fleet();
        let mut others = contents(&fleet);
        others.remove(name);
        let before = ring(&fleet, name);
        let printed = run(&[command, "--dir", text(&fleet)]);
        assert!(printed.contains(text(&fleet.join(name))), "{printed}");
        let after = ring(&fleet, name);
        assert_eq!(after[..2], before[1..]);
        assert!(!before.contains(&after[2]));
        let end = run_with(&[command], &[("QPQ_CLUSTER__SECRETS_DIR", text(&fleet))]);
        assert_eq!(end.code, Some(0), "{end:?}");
        assert_eq!(ring(&fleet, name)[..2], after[1..]);
        assert_eq!(mode(&fleet.join(name)), 0o600);
        let mut now = contents(&fleet);
        now.remove(name);
        assert_eq!(now, others, "nothing else changes, nothing is left behind");
    }
}

#[test]
fn whoever_reads_meanwhile_finds_whole_keys() {
    let (_place, fleet) = Place::with_fleet();
    let path = fleet.join("ticket-keys");
    // An edge's file, opened before: it stays whole, because the new one comes under its name and
    // not into its place.
    let first = fs::read(&path).unwrap();
    let mut open = fs::File::open(&path).unwrap();
    run(&["rotate-ticket-keys", "--dir", text(&fleet)]);
    let mut read = Vec::new();
    open.read_to_end(&mut read).unwrap();
    assert_eq!(read, first);
    assert_ne!(fs::read(&path).unwrap(), first);
}

#[test]
fn what_is_missing_or_damaged_is_named_and_nothing_is_made() {
    for (command, rotated) in COMMANDS {
        let (place, fleet) = Place::with_fleet();
        for name in FILES {
            let path = fleet.join(name);
            let good = fs::read(&path).unwrap();
            fs::remove_file(&path).unwrap();
            let said = refusal(1, &[command, "--dir", text(&fleet)]);
            assert!(said.contains(&format!("{} is missing", path.display())), "{said}");
            assert!(said.contains("qpq-admin init"), "{said}");
            assert!(!path.exists());
            fs::write(&path, good).unwrap();
        }
        for damage in [&b"short"[..], &[0; 96]] {
            fs::write(fleet.join(rotated), damage).unwrap();
            let said = refusal(1, &[command, "--dir", text(&fleet)]);
            assert!(said.contains(&format!("{rotated} is damaged")), "{said}");
            assert!(said.contains("qpq-admin init"), "{said}");
            assert_eq!(fs::read(fleet.join(rotated)).unwrap(), damage);
        }
        let none = place.path("none");
        let said = refusal(1, &[command, "--dir", text(&none)]);
        assert!(
            said.contains("there is no directory") && said.contains("qpq-admin init --out"),
            "{said}"
        );
        assert!(!none.exists());
        assert!(refusal(2, &[command]).contains("--dir"));
    }
}

#[test]
fn keys_that_others_could_read_are_closed_by_a_rotation() {
    let (_place, fleet) = Place::with_fleet();
    let path = fleet.join("token-key");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    run(&["rotate-token-key", "--dir", text(&fleet)]);
    assert_eq!(mode(&path), 0o600);
}
