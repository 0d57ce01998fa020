//! A single server's backup: of a store in use, restored as it was, but for what a restore changes.

use std::{fs, path::PathBuf, time::Duration};

use bytes::Bytes;
use qpq_domain::{ChannelId, Seq};
use qpq_ports::{Batch, Enqueued, NewMessage, PageLimit, ReadQuery, Reader, View};
use qpq_store_embedded::{EmbeddedStore, Limits, OpenError};
use rand::{SeedableRng as _, rngs::StdRng};

use super::every_damage_is_found;
use crate::{
    harness::{Place, contents, mode, refusal, run, run_with, text},
    transfer::{
        content::{Amount, Content},
        scene::embedded,
    },
};

const SMALL: Amount = Amount { people: 8, acts: 120, payload: 3_000 };

/// A node with something in it, and a server's store that uses it.
pub(super) struct Node {
    pub(super) place: Place,
    pub(super) dir: PathBuf,
    pub(super) store: EmbeddedStore,
    pub(super) content: Content,
}

impl Node {
    pub(super) async fn new() -> Self {
        let (place, made) = Place::with_fleet();
        let dir = place.path("node");
        fs::create_dir(&dir).unwrap();
        for name in ["opaque-setup.bin", "delivery-key.bin", "server-cert.der", "server-key.der"] {
            fs::copy(made.join(name), dir.join(name)).unwrap();
        }
        let store = embedded(&dir).await;
        let random = StdRng::from_entropy();
        let content = Content::fill(&store.stores(), SMALL, random).await;
        Self { place, dir, store, content }
    }

    /// Backs the node up to `name`.
    pub(super) fn back_up(&self, name: &str) -> PathBuf {
        let backup = self.place.path(name);
        run(&["backup", text(&backup), "--data-dir", text(&self.dir)]);
        backup
    }
}

/// Both show the same accounts and inboxes, in another history, and the second has no one-time
/// KeyPackage.
async fn assert_restored(content: &Content, one: &EmbeddedStore, two: &EmbeddedStore) {
    let (one, two) = (one.stores(), two.stores());
    content.compare_accounts(&one, &two).await;
    content.compare_inboxes(&one, &two, content.now()).await;
    assert_ne!(one.maintenance.store_id(), two.maintenance.store_id());
    for identity in content.identities() {
        let taken = two.key_packages.take(&identity, content.now()).await.unwrap();
        assert!(taken.is_none_or(|taken| taken.last_resort), "it may have been given out before");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_of_a_store_in_use_is_restored_as_it_was() {
    let node = Node::new().await;
    let backup = node.back_up("backup");
    assert_eq!(mode(&backup), 0o700);
    for name in contents(&backup).keys() {
        assert_eq!(mode(&backup.join(name)), 0o600, "{name}");
    }
    let printed = run(&["verify", text(&backup)]);
    assert!(printed.contains("is complete and undamaged") && printed.contains("accounts   8"));
    let there = node.place.path("there");
    let printed = run(&["restore", text(&backup), "--data-dir", text(&there)]);
    assert!(printed.contains("For users this means") && printed.contains("(new)"), "{printed}");
    let names: Vec<_> = contents(&there).into_keys().collect();
    let expected = [
        "delivery-key.bin",
        "lock",
        "opaque-setup.bin",
        "qpq.db",
        "server-cert.der",
        "server-key.der",
    ];
    assert_eq!(names, expected);
    for name in ["opaque-setup.bin", "server-key.der"] {
        assert_eq!(fs::read(there.join(name)).unwrap(), fs::read(node.dir.join(name)).unwrap());
    }
    let restored = embedded(&there).await;
    assert_restored(&node.content, &node.store, &restored).await;
    // Its own backup is as good.
    restored.close().await;
    let again = node.place.path("again");
    run(&["backup", text(&again), "--data-dir", text(&there)]);
    run(&["verify", text(&again)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_under_load_shows_one_commit_and_all_that_was_acknowledged_before_it() {
    let node = Node::new().await;
    let inbox = node.content.identities().next().unwrap();
    let read = ReadQuery { reader: Reader::single(inbox), view: View::All };
    let (stores, now) = (node.store.stores(), node.content.now());
    let message = move |number: u64| {
        let payload = Bytes::copy_from_slice(&number.to_be_bytes());
        NewMessage {
            sender: inbox,
            recipient: inbox,
            channel: ChannelId::DEFAULT,
            payload_sha256: <sha2::Sha256 as sha2::Digest>::digest(&payload).into(),
            payload,
            message_id: None,
            now,
            ttl: Duration::from_secs(60 * 60),
        }
    };
    let accepted = |outcome: &Enqueued| match outcome {
        Enqueued::Accepted(receipt) => receipt.seq,
        other => panic!("{other:?}"),
    };
    let before = stores.inboxes.enqueue(Batch::new((0..50).map(message).collect())).await.unwrap();
    let before: Vec<Seq> = before.iter().map(accepted).collect();
    let (backup, dir) = (node.place.path("backup"), node.dir.clone());
    let to = backup.clone();
    let mut backing_up = tokio::task::spawn_blocking(move || {
        run(&["backup", text(&to), "--data-dir", text(&dir)]);
    });
    let mut last = Seq::ZERO;
    for number in 50.. {
        let outcomes = stores.inboxes.enqueue(Batch::new(vec![message(number)])).await.unwrap();
        last = accepted(&outcomes[0]);
        if backing_up.is_finished() {
            break;
        }
    }
    (&mut backing_up).await.unwrap();
    run(&["verify", text(&backup)]);
    let there = node.place.path("there");
    run(&["restore", text(&backup), "--data-dir", text(&there)]);
    let restored = embedded(&there).await;
    let mut seqs = Vec::new();
    loop {
        let after = seqs.last().copied().unwrap_or(Seq::ZERO);
        let limit = PageLimit { messages: 1_000, bytes: 4 << 20 };
        let page = restored.stores().inboxes.peek(read, after, limit, now).await.unwrap();
        seqs.extend(page.envelopes.iter().map(|envelope| envelope.seq));
        if !page.more {
            break;
        }
    }
    assert!(before.iter().all(|seq| seqs.contains(seq)), "acknowledged before, and not in it");
    let first = before[0].0;
    let fresh: Vec<_> = seqs.iter().map(|seq| seq.0).filter(|seq| *seq >= first).collect();
    let end = *fresh.last().unwrap();
    assert_eq!(fresh, (first..=end).collect::<Vec<_>>(), "one commit, without a gap");
    assert!(end < last.0, "messages went on being accepted while the backup was made");
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_to_any_part_of_a_backup_is_found() {
    let node = Node::new().await;
    let backup = node.back_up("backup");
    every_damage_is_found(&backup, || refusal(1, &["verify", text(&backup)]));
    run(&["verify", text(&backup)]);
    // What is restored is verified first.
    fs::write(backup.join("delivery-key.bin"), [7; 32]).unwrap();
    let there = node.place.path("there");
    let said = refusal(1, &["restore", text(&backup), "--data-dir", text(&there)]);
    assert!(said.contains("delivery-key.bin is damaged"), "{said}");
    assert!(!there.exists());
    let said = refusal(1, &["verify", text(&node.dir)]);
    assert!(said.contains("is no finished backup"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_overwritten_and_half_a_backup_never_has_its_name() {
    let node = Node::new().await;
    let backup = node.place.path("backup");
    // As a run that was killed leaves it.
    let unfinished = node.place.path("backup.unfinished");
    fs::create_dir(&unfinished).unwrap();
    fs::write(unfinished.join("qpq.db"), "half").unwrap();
    fs::write(unfinished.join("lock"), "").unwrap();
    node.back_up("backup");
    assert!(!unfinished.exists());
    let before = contents(&backup);
    let said = refusal(1, &["backup", text(&backup), "--data-dir", text(&node.dir)]);
    assert!(said.contains("exists already"), "{said}");
    assert_eq!(contents(&backup), before);

    // One at work is not disturbed.
    fs::create_dir(node.place.path("other.unfinished")).unwrap();
    let lock = fs::File::create(node.place.path("other.unfinished/lock")).unwrap();
    lock.lock().unwrap();
    let other = node.place.path("other");
    let said = refusal(1, &["backup", text(&other), "--data-dir", text(&node.dir)]);
    assert!(said.contains("another run of this"), "{said}");
    drop(lock);

    // One that fails leaves nothing.
    fs::remove_file(node.dir.join("opaque-setup.bin")).unwrap();
    let said = refusal(1, &["backup", text(&other), "--data-dir", text(&node.dir)]);
    assert!(said.contains("opaque-setup.bin is missing"), "{said}");
    assert!(!other.exists() && !node.place.path("other.unfinished").exists());
    let empty = node.place.path("empty");
    fs::create_dir(&empty).unwrap();
    let said = refusal(1, &["backup", text(&other), "--data-dir", text(&empty)]);
    assert!(said.contains("holds no server's data"), "{said}");
}

/// A limit on the size of files, which SQLite meets as it meets a full disk.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_full_leaves_nothing_behind() {
    let node = Node::new().await;
    let backup = node.place.path("backup");
    let script = format!(
        "trap '' XFSZ; ulimit -f 64; exec '{}' backup '{}' --data-dir '{}'",
        env!("CARGO_BIN_EXE_qpq-admin"),
        backup.display(),
        node.dir.display()
    );
    let output = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(!backup.exists() && !node.place.path("backup.unfinished").exists());
    node.back_up("backup");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_in_use_or_with_something_in_it_is_refused_unless_told() {
    let node = Node::new().await;
    let backup = node.back_up("backup");
    let target = node.dir.clone();
    let restore = ["restore", text(&backup), "--data-dir", text(&target)];
    let said = refusal(1, &[&restore[..], &["--replace"]].concat());
    assert!(said.contains("in use by another server"), "{said}");
    let Node { place, dir, store, content } = node;
    store.close().await;
    let before = contents(&dir);
    let said = refusal(1, &restore);
    assert!(said.contains("is not empty") && said.contains("--replace"), "{said}");
    assert_eq!(contents(&dir), before);

    let printed = run(&[&restore[..], &["--replace"]].concat());
    let aside: Vec<_> = fs::read_dir(&dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir())
        .collect();
    assert_eq!(aside.len(), 1, "{aside:?}");
    assert!(printed.contains(text(&aside[0])), "{printed}");
    // Both can be used: what was restored, and what was there.
    let (restored, old) = (embedded(&dir).await, embedded(&aside[0]).await);
    assert_restored(&content, &old, &restored).await;
    drop(place);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cold_copy_is_marked_as_restored() {
    let Node { place, dir, store, content } = Node::new().await;
    let said = refusal(1, &["mark-restored", "--data-dir", text(&dir)]);
    assert!(said.contains("in use by another server"), "{said}");
    store.close().await;
    let copy = place.path("copy");
    fs::create_dir(&copy).unwrap();
    for (name, bytes) in contents(&dir) {
        fs::write(copy.join(name), bytes).unwrap();
    }
    let end = run_with(&["mark-restored"], &[("QPQ_DATA_DIR", text(&copy))]);
    assert_eq!((end.code, end.said.as_str()), (Some(0), ""), "{end:?}");
    let (one, two) = (embedded(&dir).await, embedded(&copy).await);
    assert_restored(&content, &one, &two).await;
    let said = refusal(1, &["mark-restored", "--data-dir", text(&place.path("none"))]);
    assert!(said.contains("holds no server's data"), "{said}");
}

/// What a restore that was interrupted left is no server's.
pub(super) async fn refuses_to_open(dir: &std::path::Path) -> bool {
    matches!(EmbeddedStore::open(dir, Limits::default()).await, Err(OpenError::Restoring(_)))
}
