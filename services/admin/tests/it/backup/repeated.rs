//! Killed backups and restores: each can be repeated, and no server starts in the directory of an
//! unfinished restore.

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

/// Kills the child as soon as `is_reached`. Returns false if the child ended before.
fn kill_once(child: &mut Child, is_reached: impl Fn() -> bool) -> bool {
    loop {
        if is_reached() {
            child.kill().unwrap();
            // The child may have ended before the kill.
            return child.wait().unwrap().code().is_none();
        }
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        std::thread::yield_now();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_backup_does_not_have_the_final_name_and_can_be_repeated() {
    let node = Node::new().await;
    let unfinished = node.workspace.path("backup.unfinished");
    let backup = node.workspace.path("backup");
    let mut killed = 0;
    for part in ["lock", "qpq.db", "opaque-setup.bin", "manifest.json"] {
        let mut child = start(&["backup", text(&backup), "--data-dir", text(&node.dir)]);
        if kill_once(&mut child, || unfinished.join(part).exists()) {
            killed += 1;
            assert!(!backup.exists());
        } else {
            // The backup ended before the kill. The next run must not find it.
            run(&["verify", text(&backup)]);
            fs::remove_dir_all(&backup).unwrap();
        }
    }
    assert!(killed > 0);
    run(&["backup", text(&backup), "--data-dir", text(&node.dir)]);
    run(&["verify", text(&backup)]);
    assert!(!unfinished.exists());
}

/// Asserts that another restore succeeds and restores the contents of the backup.
async fn assert_restore_completes(node: &Node, backup: &Path, dir: &Path, replace: &[&str]) {
    assert!(refuses_to_open(dir).await, "no server starts in an unfinished restore");
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
async fn no_server_starts_after_a_killed_restore_until_it_is_repeated() {
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
        let dir = node.workspace.path(&format!("there{number}"));
        let mut child = start(&["restore", text(&backup), "--data-dir", text(&dir)]);
        if kill_once(&mut child, || dir.join(mark).exists()) {
            if dir.join(RESTORING_FILE).exists() {
                killed += 1;
                assert_restore_completes(&node, &backup, &dir, &[]).await;
            } else {
                // The restore had completed its last step.
                embedded(&dir).await.close().await;
            }
        }
    }
    assert!(killed > 0);
}

/// Creates the states after a kill by hand, because most of them exist only for an instant.
#[tokio::test(flavor = "multi_thread")]
async fn a_restore_with_replace_completes_after_a_kill_in_any_step() {
    let node = Node::new().await;
    let backup = node.back_up("backup");
    let old = node.workspace.path("old");
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
        let dir = node.workspace.path(&format!("dir{number}"));
        fs::create_dir_all(dir.join(aside)).unwrap();
        fs::create_dir(dir.join("restoring")).unwrap();
        fs::write(dir.join("restoring/qpq.db"), "half of it").unwrap();
        let is_cleared = step.starts_with("placing");
        for (index, (name, bytes)) in files.iter().enumerate() {
            // Half of the previous files were moved. In the placing step half of the new ones are
            // placed.
            let at = if is_cleared || index % 2 == 0 { dir.join(aside) } else { dir.clone() };
            fs::write(at.join(name), bytes).unwrap();
            if is_cleared && index % 2 == 0 {
                fs::write(dir.join(name), "placed, possibly incomplete").unwrap();
            }
        }
        fs::write(dir.join(RESTORING_FILE), step).unwrap();
        assert_restore_completes(&node, &backup, &dir, replace).await;
        if step.contains(aside) {
            let kept = contents(&dir.join(aside));
            for name in ["qpq.db", "opaque-setup.bin", "server-key.der"] {
                assert!(kept[name] == files[name], "{step}: {name} is unchanged");
            }
        }
    }
}
