//! Disks without room: files that may not grow, and a full file system. Acknowledged messages stay,
//! further ones are refused, and the same process works again once there is room.

use std::{collections::HashMap, path::Path};

use qpq_domain::{DeliveryLimits, StoreLimits};

use crate::{
    child::{Burst, Child},
    ops::{Op, START},
};

fn limits() -> StoreLimits {
    StoreLimits {
        delivery: DeliveryLimits {
            max_messages: u64::MAX,
            max_bytes: u64::MAX,
            ..DeliveryLimits::default()
        },
        ..StoreLimits::default()
    }
}

/// Checks that every acknowledged message is in the inbox with its seq, without gaps.
fn verify(child: &mut Child, acknowledged: &HashMap<u64, u64>) {
    let inbox = child.inbox();
    let seqs: Vec<u64> = inbox.iter().map(|(_, seq)| *seq).collect();
    assert_eq!(seqs, (1..=inbox.len() as u64).collect::<Vec<_>>());
    let queued: HashMap<u64, u64> = inbox.into_iter().collect();
    for (number, seq) in acknowledged {
        assert_eq!(queued.get(number), Some(seq), "message {number}");
    }
}

/// Enqueues until the disk is full, frees room, and enqueues again in the same process.
fn fill_and_free(
    mut child: Child,
    directory: &Path,
    starve: impl Fn(&mut Child),
    relieve: impl Fn(&mut Child),
) {
    const SIZE: usize = 20_000;
    child.open(directory, limits()).expect("there is room");
    child.apply(&Op::Register { name: 1, key: 1, record: 1 }, START);
    let mut acknowledged = HashMap::new();
    let before = child.burst(0, 20, SIZE, usize::MAX);
    assert_eq!(before.errors, Vec::<String>::new());
    acknowledged.extend(before.accepted);
    child.check().expect("healthy");

    starve(&mut child);
    let Burst { accepted, errors } = child.burst(1_000, 400, SIZE, usize::MAX);
    acknowledged.extend(accepted);
    assert!(errors.len() > 200, "8 MB do not fit: {errors:?}");
    assert!(errors.iter().all(|error| error.starts_with("unavailable")), "{errors:?}");
    verify(&mut child, &acknowledged);
    // A commit of a few bytes may still have room in the existing log. The check must fail all the
    // same, because the refused messages have none.
    acknowledged.extend(child.burst(1_900, 1, 8, usize::MAX).accepted);
    for _ in 0..20 {
        let error = child.check().expect_err("there is no room for the refused messages");
        assert!(error.starts_with("unavailable"), "{error}");
    }

    relieve(&mut child);
    child.check().expect("healthy again, without a restart");
    let after = child.burst(2_000, 20, SIZE, usize::MAX);
    assert_eq!(after.errors, Vec::<String>::new());
    acknowledged.extend(after.accepted);
    verify(&mut child, &acknowledged);
    child.kill();
    drop(child);
}

#[test]
fn files_that_may_not_grow_lose_nothing_and_the_store_recovers() {
    let directory = tempfile::tempdir().expect("a directory");
    // The signal would end the process. If it is ignored, the write fails.
    let child = Child::spawn_after(&[], "trap '' XFSZ", directory.path());
    fill_and_free(
        child,
        directory.path(),
        |child| child.file_limit(Some(2 << 20)),
        |child| child.file_limit(None),
    );
    let mut child = Child::spawn();
    child.open(directory.path(), limits()).expect("what the process left");
    let inbox = child.inbox();
    assert!(inbox.len() >= 40);
    verify(&mut child, &inbox.into_iter().collect());
}

/// Returns the command with which this user may mount a file system, if there is one.
fn mounting() -> Option<&'static [&'static str]> {
    let commands: [&[&str]; 2] = [&["unshare", "-m"], &["unshare", "-rm"]];
    commands.into_iter().find(|command| {
        let probe = std::process::Command::new(command[0])
            .args(&command[1..])
            .args(["sh", "-c", "mount -t tmpfs none /mnt"])
            .output();
        probe.is_ok_and(|output| output.status.success())
    })
}

#[test]
fn a_full_file_system_loses_nothing_and_the_store_recovers() {
    let Some(command) = mounting() else {
        println!("skipped: this user may not mount a file system");
        return;
    };
    let directory = tempfile::tempdir().expect("a directory");
    let child =
        Child::spawn_after(command, "mount -t tmpfs -o size=12m none \"$1\"", directory.path());
    let ballast = directory.path().join("ballast");
    let data = directory.path().join("data");
    fill_and_free(child, &data, |child| child.fill(&ballast), |child| child.remove(&ballast));
}

#[test]
fn a_full_file_system_is_reported_at_the_start() {
    let Some(command) = mounting() else {
        println!("skipped: this user may not mount a file system");
        return;
    };
    let directory = tempfile::tempdir().expect("a directory");
    let mut child =
        Child::spawn_after(command, "mount -t tmpfs -o size=4m none \"$1\"", directory.path());
    let ballast = directory.path().join("ballast");
    let data = directory.path().join("data");
    child.fill(&ballast);
    let error = child.open(&data, limits()).expect_err("no room");
    assert!(error.starts_with("no space is left for"), "{error}");
    child.remove(&ballast);
    child.open(&data, limits()).expect("now there is room");
    child.check().expect("healthy");
}
