//! Backups and restores that are killed: each can be repeated, and no directory starts as if the
//! restore had ended.

use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
};

use qpq_store_embedded::RESTORING_FILE;

use super::node::{Node, refuses_to_open};
use crate::{
    harness::{contents, run, text},
    transfer::scene::embedded,
};

fn start(arguments: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_qpq-admin"))
        .args(arguments)
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Kills the child once `is_there`; false if it ended before.
fn kill_once(child: &mut Child, is_there: impl Fn() -> bool) -> bool {
    loop {
        if is_there() {
            child.kill().unwrap();
            // It may have ended between the look and the blow.
            return child.wait().unwrap().code().is_none();
        }
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        std::thread::yield_now();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_is_killed_has_no_name_and_can_be_repeated() {
    let node = Node::new().await;
    let unfinished = node.place.path("backup.unfinished");
    let backup = node.place.path("backup");
    let mut killed = 0;
    for part in ["lock", "qpq.db", "opaque-setup.bin", "manifest.json"] {
        let mut child = start(&["backup", text(&backup), "--data-dir", text(&node.dir)]);
        if kill_once(&mut child, || unfinished.join(part).exists()) {
            killed += 1;
            assert!(!backup.exists());
        } else {
            // It was faster than this test: the next one begins where it did.
            run(&["verify", text(&backup)]);
            fs::remove_dir_all(&backup).unwrap();
        }
    }
    assert!(killed > 0);
    run(&["backup", text(&backup), "--data-dir", text(&node.dir)]);
    run(&["verify", text(&backup)]);
    assert!(!unfinished.exists());
}

/// Restores once more, to the end; the result is what was backed up.
async fn ends_well(node: &Node, backup: &Path, dir: &Path, replace: &[&str]) {
    assert!(refuses_to_open(dir).await, "no server starts on half a restore");
    let arguments = ["restore", text(backup), "--data-dir", text(dir)];
    run(&[&arguments[..], replace].concat());
    assert!(!dir.join(RESTORING_FILE).exists() && !dir.join("restoring").exists());
    let restored = embedded(dir).await;
    let (one, two) = (node.store.stores(), restored.stores());
    node.content.compare_accounts(&one, &two).await;
    node.content.compare_inboxes(&one, &two, node.content.now()).await;
    assert_ne!(one.maintenance.store_id(), two.maintenance.store_id());
    restored.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_that_is_killed_can_be_repeated_and_never_starts_half() {
    let node = Node::new().await;
    let backup = node.back_up("backup");
    let mut killed = 0;
    let marks = [
        "restore-unfinished",
        "restoring/qpq.db",
        "restoring/lock",
        "restoring/server-key.der",
        "qpq.db",
        "server-key.der",
    ];
    for (number, mark) in marks.iter().enumerate() {
        let dir = node.place.path(&format!("there{number}"));
        let mut child = start(&["restore", text(&backup), "--data-dir", text(&dir)]);
        if kill_once(&mut child, || dir.join(mark).exists()) {
            if dir.join(RESTORING_FILE).exists() {
                killed += 1;
                ends_well(&node, &backup, &dir, &[]).await;
            } else {
                // Killed between its last step and its end.
                embedded(&dir).await.close().await;
            }
        }
    }
    assert!(killed > 0);
}

/// The states that a kill leaves only for an instant, made by hand.
#[tokio::test(flavor = "multi_thread")]
async fn a_replacement_goes_on_from_every_step() {
    let node = Node::new().await;
    let backup = node.back_up("backup");
    let old = node.place.path("old");
    run(&["restore", text(&backup), "--data-dir", text(&old)]);
    let files = contents(&old);
    let aside = "before-restore-1";
    let steps: [(&str, &[&str]); 5] = [
        ("staging\n", &["--replace"]),
        ("clearing before-restore-1\n", &[]),
        ("placing before-restore-1\n", &[]),
        ("placing\n", &[]),
        ("clearing before-restore-1\n", &["--replace"]),
    ];
    for (number, (step, replace)) in steps.into_iter().enumerate() {
        let dir = node.place.path(&format!("dir{number}"));
        fs::create_dir_all(dir.join(aside)).unwrap();
        fs::create_dir(dir.join("restoring")).unwrap();
        fs::write(dir.join("restoring/qpq.db"), "half of it").unwrap();
        let is_cleared = step.starts_with("placing");
        for (place, (name, bytes)) in files.iter().enumerate() {
            // Half of what was there is aside already; of what is placed, half is there.
            let at = if is_cleared || place % 2 == 0 { dir.join(aside) } else { dir.clone() };
            fs::write(at.join(name), bytes).unwrap();
            if is_cleared && place % 2 == 0 {
                fs::write(dir.join(name), "placed, and perhaps not whole").unwrap();
            }
        }
        fs::write(dir.join(RESTORING_FILE), step).unwrap();
        ends_well(&node, &backup, &dir, replace).await;
        if step.contains(aside) {
            let kept = contents(&dir.join(aside));
            for name in ["qpq.db", "opaque-setup.bin", "server-key.der"] {
                assert!(kept[name] == files[name], "{step}: {name} is as it was before");
            }
        }
    }
}
