//! Backups of a single node: of a store in use, and the contents after a restore.

use std::{fs, path::PathBuf, time::Duration};

use bytes::Bytes;
use qpq_domain::{BlobId, ChannelId, Seq, StoreLimits, UnixMillis};
use qpq_ports::{
    Batch, BlobFinish, BlobOwner, BlobRange, ChunkOutcome, Enqueued, NewChunk, NewMessage,
    PageLimit, ReadQuery, Reader, Stores, View,
};
use qpq_store_embedded::{EmbeddedStore, OpenError};
use rand::{SeedableRng as _, rngs::StdRng};

use super::assert_damage_is_found;
use crate::{
    harness::{Workspace, contents, mode, run, run_failing, run_with, text},
    transfer::{
        content::{Amount, Content},
        scene::embedded,
    },
};

const SMALL: Amount = Amount { people: 8, acts: 120, payload: 3_000 };

/// A single node with contents, and an open store on it.
pub(super) struct Node {
    pub(super) workspace: Workspace,
    pub(super) dir: PathBuf,
    pub(super) store: EmbeddedStore,
    pub(super) content: Content,
}

impl Node {
    pub(super) async fn new() -> Self {
        let (workspace, made) = Workspace::with_shared_dir();
        let dir = workspace.path("node");
        fs::create_dir(&dir).unwrap();
        for name in [
            "opaque-setup.bin",
            "delivery-key.bin",
            "at-rest-keys",
            "server-cert.der",
            "server-key.der",
        ] {
            fs::copy(made.join(name), dir.join(name)).unwrap();
        }
        let store = embedded(&dir).await;
        let random = StdRng::from_entropy();
        let content = Content::fill(&store.stores(), SMALL, random).await;
        Self { workspace, dir, store, content }
    }

    /// Backs up the node to `name`.
    pub(super) fn back_up(&self, name: &str) -> PathBuf {
        let backup = self.workspace.path(name);
        run(&["backup", text(&backup), "--data-dir", text(&self.dir)]);
        backup
    }
}

/// Asserts that both stores have the same accounts and inboxes and different store ids, and that
/// the second has no one-time KeyPackages.
async fn assert_restored(content: &Content, one: &EmbeddedStore, two: &EmbeddedStore) {
    let (one, two) = (one.stores(), two.stores());
    content.compare_accounts(&one, &two).await;
    content.compare_inboxes(&one, &two, content.now()).await;
    assert_ne!(one.maintenance.store_id(), two.maintenance.store_id());
    for identity in content.identities() {
        let taken = two.key_packages.take(&identity, content.now()).await.unwrap();
        assert!(taken.is_none_or(|taken| taken.last_resort), "it may have been handed out before");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_of_a_store_in_use_is_restored_with_the_same_contents() {
    let node = Node::new().await;
    let backup = node.back_up("backup");
    assert_eq!(mode(&backup), 0o700);
    for name in contents(&backup).keys() {
        assert_eq!(mode(&backup.join(name)), 0o600, "{name}");
    }
    let stdout = run(&["verify", text(&backup)]);
    assert!(stdout.contains("is complete and undamaged") && stdout.contains("accounts   8"));
    let there = node.workspace.path("there");
    let stdout = run(&["restore", text(&backup), "--data-dir", text(&there)]);
    assert!(stdout.contains("For users this means") && stdout.contains("(new)"), "{stdout}");
    let names: Vec<_> = contents(&there).into_keys().collect();
    let expected = [
        "at-rest-keys",
        "delivery-key.bin",
        "lock",
        "opaque-setup.bin",
        "qpq.db",
        "server-cert.der",
        "server-key.der",
    ];
    assert_eq!(names, expected);
    for name in ["at-rest-keys", "opaque-setup.bin", "server-key.der"] {
        assert_eq!(fs::read(there.join(name)).unwrap(), fs::read(node.dir.join(name)).unwrap());
    }
    let restored = embedded(&there).await;
    assert_restored(&node.content, &node.store, &restored).await;
    // A restored directory can be backed up again.
    restored.close().await;
    let again = node.workspace.path("again");
    run(&["backup", text(&again), "--data-dir", text(&there)]);
    run(&["verify", text(&again)]);
}

/// Uploads a blob of the account with this identity key.
async fn upload(stores: &Stores, owner: BlobOwner, content: &Bytes, now: UnixMillis) {
    let chunk = NewChunk {
        owner,
        size: content.len() as u64,
        mime: "text/plain".into(),
        offset: 0,
        bytes: content.clone(),
        now,
    };
    let stored = stores.blobs.upload(chunk).await.unwrap();
    assert_eq!(stored, ChunkOutcome::Stored { received: content.len() as u64 });
    assert_eq!(stores.blobs.finish(owner, now).await.unwrap(), BlobFinish::Whole);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_contains_blobs_and_no_open_uploads() {
    let node = Node::new().await;
    let (stores, now) = (node.store.stores(), node.content.now());
    let identity = node.content.identities().next().unwrap();
    let account = stores.accounts.by_identity(&identity).await.unwrap().unwrap().id;
    let owner = |content: &Bytes| {
        let hash = <sha2::Sha256 as sha2::Digest>::digest(content);
        BlobOwner { account, blob: BlobId::new(hash.into()) }
    };
    let (kept, removed, open) = (
        Bytes::from(vec![1; 100_000]),
        Bytes::from(vec![2; 100_000]),
        Bytes::from(vec![3; 100_000]),
    );
    upload(&stores, owner(&kept), &kept, now).await;
    upload(&stores, owner(&removed), &removed, now).await;
    stores.blobs.unreference(owner(&removed), now).await.unwrap();
    let chunk = NewChunk {
        owner: owner(&open),
        size: 100_000,
        mime: String::new(),
        offset: 0,
        bytes: open.slice(..50_000),
        now,
    };
    stores.blobs.upload(chunk).await.unwrap();

    let backup = node.back_up("backup");
    run(&["verify", text(&backup)]);
    let directories: Vec<_> = fs::read_dir(backup.join("blobs")).unwrap().collect();
    assert_eq!(directories.len(), 1, "only the blob with a reference");
    assert_damage_is_found(&backup, || run_failing(1, &["verify", text(&backup)]));
    let there = node.workspace.path("there");
    for replace in [&[][..], &["--replace"][..]] {
        let arguments = ["restore", text(&backup), "--data-dir", text(&there)];
        run(&[&arguments, replace].concat());
        let restored = embedded(&there).await;
        let stores = restored.stores();
        let range = BlobRange { reader: owner(&kept), offset: 0, length: usize::MAX };
        let part = stores.blobs.read(range, now).await.unwrap().unwrap();
        assert_eq!((part.bytes, part.mime.as_str()), (kept.clone(), "text/plain"));
        // The open upload begins again.
        let chunk = NewChunk {
            owner: owner(&open),
            size: 100_000,
            mime: String::new(),
            offset: 50_000,
            bytes: open.slice(50_000..),
            now,
        };
        let outcome = stores.blobs.upload(chunk).await.unwrap();
        assert_eq!(outcome, ChunkOutcome::Gap { received: 0 });
        upload(&stores, owner(&open), &open, now).await;
        restored.close().await;
    }

    let file = fs::read_dir(node.dir.join("blobs"))
        .unwrap()
        .flat_map(|directory| fs::read_dir(directory.unwrap().path()).unwrap())
        .map(|file| file.unwrap().path())
        .find(|file| fs::read(file).unwrap() == kept)
        .unwrap();
    let again = node.workspace.path("again");
    let arguments = ["backup", text(&again), "--data-dir", text(&node.dir)];
    fs::write(&file, b"damaged").unwrap();
    assert!(run_failing(1, &arguments).contains("is damaged, and no backup was created"));
    fs::remove_file(&file).unwrap();
    assert!(run_failing(1, &arguments).contains("is missing or cannot be copied"));
    assert!(!again.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_under_load_contains_one_commit_with_all_earlier_messages() {
    let node = Node::new().await;
    // The second account, because the first one has devices.
    let inbox = node.content.identities().nth(1).unwrap();
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
    let (backup, dir) = (node.workspace.path("backup"), node.dir.clone());
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
    let there = node.workspace.path("there");
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
    assert!(
        before.iter().all(|seq| seqs.contains(seq)),
        "a message acknowledged before the backup is missing"
    );
    let first = before[0].0;
    let fresh: Vec<_> = seqs.iter().map(|seq| seq.0).filter(|seq| *seq >= first).collect();
    let end = *fresh.last().unwrap();
    assert_eq!(fresh, (first..=end).collect::<Vec<_>>(), "the seqs of one commit have no gap");
    assert!(end < last.0, "messages are accepted during the backup");
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_to_any_part_of_a_backup_is_reported() {
    let node = Node::new().await;
    let backup = node.back_up("backup");
    assert_damage_is_found(&backup, || run_failing(1, &["verify", text(&backup)]));
    run(&["verify", text(&backup)]);
    // restore verifies the backup first.
    fs::write(backup.join("delivery-key.bin"), [7; 32]).unwrap();
    let there = node.workspace.path("there");
    let stderr = run_failing(1, &["restore", text(&backup), "--data-dir", text(&there)]);
    assert!(stderr.contains("delivery-key.bin is damaged"), "{stderr}");
    assert!(!there.exists());
    let stderr = run_failing(1, &["verify", text(&node.dir)]);
    assert!(stderr.contains("is not a complete backup"), "{stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_incomplete_backup_never_has_the_final_name_and_no_file_is_overwritten() {
    let node = Node::new().await;
    let backup = node.workspace.path("backup");
    // The state after a killed run.
    let unfinished = node.workspace.path("backup.unfinished");
    fs::create_dir(&unfinished).unwrap();
    fs::write(unfinished.join("qpq.db"), "half").unwrap();
    fs::write(unfinished.join("lock"), "").unwrap();
    node.back_up("backup");
    assert!(!unfinished.exists());
    let before = contents(&backup);
    let stderr = run_failing(1, &["backup", text(&backup), "--data-dir", text(&node.dir)]);
    assert!(stderr.contains("exists already"), "{stderr}");
    assert_eq!(contents(&backup), before);

    // A backup that another run is writing is refused.
    fs::create_dir(node.workspace.path("other.unfinished")).unwrap();
    let lock = fs::File::create(node.workspace.path("other.unfinished/lock")).unwrap();
    lock.lock().unwrap();
    let other = node.workspace.path("other");
    let stderr = run_failing(1, &["backup", text(&other), "--data-dir", text(&node.dir)]);
    assert!(stderr.contains("another run writes"), "{stderr}");
    drop(lock);

    // A backup that fails leaves no files.
    let keys = (node.dir.join("at-rest-keys"), node.workspace.path("away"));
    fs::rename(&keys.0, &keys.1).unwrap();
    let stderr = run_failing(1, &["backup", text(&other), "--data-dir", text(&node.dir)]);
    assert!(stderr.contains("at-rest-keys is missing although"), "{stderr}");
    fs::rename(&keys.1, &keys.0).unwrap();
    fs::remove_file(node.dir.join("opaque-setup.bin")).unwrap();
    let stderr = run_failing(1, &["backup", text(&other), "--data-dir", text(&node.dir)]);
    assert!(stderr.contains("opaque-setup.bin is missing"), "{stderr}");
    assert!(!other.exists() && !node.workspace.path("other.unfinished").exists());
    let empty = node.workspace.path("empty");
    fs::create_dir(&empty).unwrap();
    let stderr = run_failing(1, &["backup", text(&other), "--data-dir", text(&empty)]);
    assert!(stderr.contains("contains no server data"), "{stderr}");
}

/// Simulates a full disk by a limit on the size of files.
#[tokio::test(flavor = "multi_thread")]
async fn a_backup_to_a_full_disk_leaves_no_files() {
    let node = Node::new().await;
    let backup = node.workspace.path("backup");
    let script = format!(
        "trap '' XFSZ; ulimit -f 64; exec '{}' backup '{}' --data-dir '{}'",
        env!("CARGO_BIN_EXE_qpq-admin"),
        backup.display(),
        node.dir.display()
    );
    let output = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(!backup.exists() && !node.workspace.path("backup.unfinished").exists());
    node.back_up("backup");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_in_use_or_not_empty_is_refused_without_replace() {
    let node = Node::new().await;
    let backup = node.back_up("backup");
    let target = node.dir.clone();
    let restore = ["restore", text(&backup), "--data-dir", text(&target)];
    let stderr = run_failing(1, &[&restore[..], &["--replace"]].concat());
    assert!(stderr.contains("in use by another server"), "{stderr}");
    let Node { workspace, dir, store, content } = node;
    store.close().await;
    let before = contents(&dir);
    let stderr = run_failing(1, &restore);
    assert!(stderr.contains("is not empty") && stderr.contains("--replace"), "{stderr}");
    assert_eq!(contents(&dir), before);

    let stdout = run(&[&restore[..], &["--replace"]].concat());
    let aside: Vec<_> = fs::read_dir(&dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir())
        .collect();
    assert_eq!(aside.len(), 1, "{aside:?}");
    assert!(stdout.contains(text(&aside[0])), "{stdout}");
    // Both the restored and the previous data can be used.
    let (restored, old) = (embedded(&dir).await, embedded(&aside[0]).await);
    assert_restored(&content, &old, &restored).await;
    drop(workspace);
}

#[tokio::test(flavor = "multi_thread")]
async fn mark_restored_begins_another_history_in_a_cold_copy() {
    let Node { workspace, dir, store, content } = Node::new().await;
    let stderr = run_failing(1, &["mark-restored", "--data-dir", text(&dir)]);
    assert!(stderr.contains("in use by another server"), "{stderr}");
    store.close().await;
    let copy = workspace.path("copy");
    fs::create_dir(&copy).unwrap();
    for (name, bytes) in contents(&dir) {
        fs::write(copy.join(name), bytes).unwrap();
    }
    let end = run_with(&["mark-restored"], &[("QPQ_DATA_DIR", text(&copy))]);
    assert_eq!((end.code, end.stderr.as_str()), (Some(0), ""), "{end:?}");
    let (one, two) = (embedded(&dir).await, embedded(&copy).await);
    assert_restored(&content, &one, &two).await;
    let stderr = run_failing(1, &["mark-restored", "--data-dir", text(&workspace.path("none"))]);
    assert!(stderr.contains("contains no server data"), "{stderr}");
}

/// Returns whether no server starts in `dir` because a restore has not finished.
pub(super) async fn refuses_to_open(dir: &std::path::Path) -> bool {
    matches!(EmbeddedStore::open(dir, StoreLimits::default()).await, Err(OpenError::Restoring(_)))
}
