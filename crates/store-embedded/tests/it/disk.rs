//! Disks without room: files that may not grow, and a file system that is full. What was
//! acknowledged stays, what is not is refused, and once there is room again the same process goes
//! on.

use std::{collections::HashMap, path::Path};

use qpq_domain::Delivery;
use qpq_store_embedded::Limits;

use crate::{
    child::{Burst, Child},
    ops::{Op, START},
};

fn limits() -> Limits {
    Limits {
        delivery: Delivery { max_messages: u64::MAX, max_bytes: u64::MAX, ..Delivery::default() },
        ..Limits::default()
    }
}

/// Everything acknowledged is in the inbox, under its seq, and there is no gap.
fn verify(child: &mut Child, acknowledged: &HashMap<u64, u64>) {
    let inbox = child.inbox();
    let seqs: Vec<u64> = inbox.iter().map(|(_, seq)| *seq).collect();
    assert_eq!(seqs, (1..=inbox.len() as u64).collect::<Vec<_>>());
    let there: HashMap<u64, u64> = inbox.into_iter().collect();
    for (number, seq) in acknowledged {
        assert_eq!(there.get(number), Some(seq), "message {number}");
    }
}

/// Fills until the disk refuses, makes room, goes on, and starts again.
fn fill_and_free(
    mut child: Child,
    directory: &Path,
    starve: impl Fn(&mut Child),
    relieve: impl Fn(&mut Child),
) {
    const SIZE: usize = 20_000;
    child.open(directory, limits()).expect("there is room yet");
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
    // A commit of a few bytes may still find room in what the log has already; that says nothing of
    // what was refused.
    acknowledged.extend(child.burst(1_900, 1, 8, usize::MAX).accepted);
    for _ in 0..20 {
        let error = child.check().expect_err("there is no room for what was refused");
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
    // The signal would end the process; ignored, the write fails.
    let child = Child::spawn_after(&[], "trap '' XFSZ", directory.path());
    fill_and_free(
        child,
        directory.path(),
        |child| child.file_limit(Some(2 << 20)),
        |child| child.file_limit(None),
    );
    let mut child = Child::spawn();
    child.open(directory.path(), limits()).expect("what was left");
    let inbox = child.inbox();
    assert!(inbox.len() >= 40);
    verify(&mut child, &inbox.into_iter().collect());
}

/// Whether this user may mount a file system of its own, and how.
fn mounting() -> Option<&'static [&'static str]> {
    let ways: [&[&str]; 2] = [&["unshare", "-m"], &["unshare", "-rm"]];
    ways.into_iter().find(|way| {
        let probe = std::process::Command::new(way[0])
            .args(&way[1..])
            .args(["sh", "-c", "mount -t tmpfs none /mnt"])
            .output();
        probe.is_ok_and(|output| output.status.success())
    })
}

#[test]
fn a_full_file_system_loses_nothing_and_the_store_recovers() {
    let Some(way) = mounting() else {
        println!("skipped: this user may not mount anything");
        return;
    };
    let directory = tempfile::tempdir().expect("a directory");
    let child = Child::spawn_after(way, "mount -t tmpfs -o size=12m none \"$1\"", directory.path());
    let ballast = directory.path().join("ballast");
    let data = directory.path().join("data");
    fill_and_free(child, &data, |child| child.fill(&ballast), |child| child.remove(&ballast));
}

#[test]
fn a_full_file_system_is_named_at_the_start() {
    let Some(way) = mounting() else {
        println!("skipped: this user may not mount anything");
        return;
    };
    let directory = tempfile::tempdir().expect("a directory");
    let mut child =
        Child::spawn_after(way, "mount -t tmpfs -o size=4m none \"$1\"", directory.path());
    let ballast = directory.path().join("ballast");
    let data = directory.path().join("data");
    child.fill(&ballast);
    let error = child.open(&data, limits()).expect_err("no room");
    assert!(error.starts_with("no space is left for"), "{error}");
    child.remove(&ballast);
    child.open(&data, limits()).expect("now there is room");
    child.check().expect("healthy");
}
