//! Blobs and their files: calls that end at any step, and files that are missing after a restore.

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    future::poll_fn,
    path::Path,
    pin::pin,
    task::Poll,
    time::Duration,
};

use bytes::Bytes;
use qpq_domain::{BlobId, IdentityKey, StoreLimits, UnixMillis, Username};
use qpq_ports::{
    Admission, BlobFinish, BlobOwner, BlobRange, BlobState, ChunkOutcome, NewAccount, NewChunk,
    Registration, StoreResult, Stores,
};
use qpq_store_embedded::{BLOBS_DIRECTORY, DATABASE_FILE, blob_files, copy_database, inspect};
use sha2::{Digest as _, Sha256};
use sqlx::{ConnectOptions as _, sqlite::SqliteConnectOptions};
use tempfile::TempDir;

use crate::{backend::Process, child::Child};

const NOW: UnixMillis = UnixMillis(1_800_000_000_000);
const HOUR: Duration = Duration::from_secs(60 * 60);

fn content(n: u64, size: usize) -> Bytes {
    let blocks =
        (0_u64..).map(|block| Sha256::digest([n.to_be_bytes(), block.to_be_bytes()].concat()));
    blocks.flatten().take(size).collect()
}

/// Returns the account with this number, and registers it if it is new.
async fn owner(stores: &Stores, n: u8, content: &[u8]) -> BlobOwner {
    let username = Username::parse(&format!("account{n}")).expect("a username");
    let identity = IdentityKey::new([n; 32]);
    let admission = Admission::Open;
    let new = NewAccount { username, identity, opaque_record: vec![1; 192], admission, now: NOW };
    let account = match stores.accounts.register(new).await.expect("register") {
        Registration::Registered(account) => account,
        _ => stores.accounts.by_identity(&identity).await.expect("find").expect("registered").id,
    };
    BlobOwner { account, blob: BlobId::new(Sha256::digest(content).into()) }
}

/// Uploads a blob in two chunks, starting where an earlier attempt stopped.
async fn upload(stores: &Stores, owner: BlobOwner, content: &Bytes) -> StoreResult<()> {
    let half = content.len() / 2;
    loop {
        let begin = match stores.blobs.renew(owner, NOW).await? {
            BlobState::Whole { .. } => return Ok(()),
            BlobState::Uploading { received, .. } => usize::try_from(received).expect("small"),
            BlobState::Unknown => 0,
        };
        if begin == content.len() {
            match stores.blobs.finish(owner, NOW).await? {
                BlobFinish::Whole => return Ok(()),
                BlobFinish::Incomplete { .. } => continue,
                other => panic!("{other:?}"),
            }
        }
        let end = if begin < half { half } else { content.len() };
        let chunk = NewChunk {
            owner,
            size: content.len() as u64,
            mime: "text/plain".into(),
            offset: begin as u64,
            bytes: content.slice(begin..end),
            now: NOW,
        };
        match stores.blobs.upload(chunk).await? {
            ChunkOutcome::Stored { .. } | ChunkOutcome::Whole | ChunkOutcome::Gap { .. } => {}
            refused => panic!("{refused:?}"),
        }
    }
}

async fn read(stores: &Stores, reader: BlobOwner) -> Option<Bytes> {
    let range = BlobRange { reader, offset: 0, length: usize::MAX };
    stores.blobs.read(range, NOW).await.expect("read").map(|part| part.bytes)
}

/// Polls a call until it is complete, or has waited `limit` times, and drops it. Returns whether it
/// was complete.
async fn interrupted(call: impl Future<Output = ()>, limit: usize) -> bool {
    let (mut call, mut waits) = (pin!(call), 0);
    poll_fn(|cx| match call.as_mut().poll(cx) {
        Poll::Ready(()) => Poll::Ready(true),
        Poll::Pending if waits == limit => Poll::Ready(false),
        Poll::Pending => {
            waits += 1;
            Poll::Pending
        }
    })
    .await
}

fn files(data_dir: &Path) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    // Created with the first file.
    let Ok(directories) = fs::read_dir(data_dir.join(BLOBS_DIRECTORY)) else { return names };
    for directory in directories {
        for file in fs::read_dir(directory.expect("an entry").path()).expect("a directory") {
            names.insert(file.expect("an entry").file_name().into_string().expect("digits"));
        }
    }
    names
}

async fn column(data_dir: &Path, sql: &'static str) -> BTreeSet<String> {
    let options = SqliteConnectOptions::new().filename(data_dir.join(DATABASE_FILE));
    let mut connection = options.read_only(true).connect().await.expect("a database");
    let rows: Vec<String> = sqlx::query_scalar(sql).fetch_all(&mut connection).await.expect("rows");
    rows.into_iter().collect()
}

/// Checks that each blob has its bytes, that each file has a row, and that quotas are right.
async fn audit(data_dir: &Path) {
    let copy = tempfile::tempdir().expect("a directory");
    let copy = copy.path().join("copy.db");
    let names = files(data_dir);
    copy_database(data_dir, &copy).await.expect("a copy");
    inspect(&copy).await.expect("a sound database");
    for file in blob_files(&copy).await.expect("files") {
        let bytes = fs::read(data_dir.join(&file.path)).expect("the bytes of a blob");
        assert_eq!(bytes.len() as u64, file.bytes);
        assert_eq!(<[u8; 32]>::from(Sha256::digest(&bytes)), file.sha256);
    }
    let known = column(
        data_dir,
        "SELECT object FROM blob UNION SELECT object FROM upload
         UNION SELECT object FROM blob_trash",
    )
    .await;
    assert!(names.is_subset(&known), "files without rows: {names:?} {known:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_ends_at_any_step_leaves_nothing_behind() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut process = Process::start(&directory, StoreLimits::default()).await;
    let (mut limit, mut is_complete) = (0, false);
    while !is_complete {
        let stores = process.store.stores();
        let content = content(limit as u64, 100_000);
        let (alice, bob) = (owner(&stores, 1, &content).await, owner(&stores, 2, &content).await);
        if limit % 2 == 0 {
            upload(&stores, bob, &content).await.expect("upload");
        }
        let call = async { upload(&stores, alice, &content).await.expect("upload") };
        is_complete = interrupted(call, limit).await;
        drop(stores);
        process.crash().await;
        audit(directory.path()).await;

        process = Process::start(&directory, StoreLimits::default()).await;
        let stores = process.store.stores();
        upload(&stores, alice, &content).await.expect("upload");
        assert_eq!(read(&stores, alice).await, Some(content.clone()), "after {limit} waits");
        let call = async {
            stores.blobs.unreference(alice, NOW).await.expect("unreference");
            stores.blobs.collect(NOW.plus(2 * HOUR)).await.expect("collect");
        };
        interrupted(call, limit).await;
        limit += 1;
    }
    assert!(limit > 5, "{limit} steps");
    let stores = process.store.stores();
    let later = NOW.plus(48 * HOUR);
    // The clock guard accepts a time that is far ahead only from an operator.
    accept(&directory, &stores, later).await;
    while !stores.blobs.collect(later).await.expect("collect").is_empty() {}
    let last = later.plus(2 * HOUR);
    accept(&directory, &stores, last).await;
    while !stores.blobs.collect(last).await.expect("collect").is_empty() {}
    audit(directory.path()).await;
    assert_eq!(files(directory.path()), column(directory.path(), "SELECT object FROM blob").await);
    drop(stores);
    process.crash().await;
}

async fn accept(directory: &TempDir, stores: &Stores, now: UnixMillis) {
    let accepted = qpq_store_embedded::accept_clock(directory.path(), now).await;
    accepted.unwrap_or_else(|error| panic!("{error}"));
    stores.maintenance.sweep(UnixMillis(0)).await.expect("a sweep");
}

/// The number of blobs of a round of kills.
const COUNT: u64 = 1_000;

/// Uploads the blob with this number. Removes it again if the number is odd. Reports both.
pub(crate) async fn change(stores: &Stores, n: u64, report: impl Fn(&str)) {
    let content = content(n, 60_000);
    // Another account in each round, because those of earlier ones have open uploads.
    let account = u8::try_from(1 + n / COUNT).expect("few rounds");
    let owner = owner(stores, account, &content).await;
    upload(stores, owner, &content).await.expect("upload");
    report("whole");
    if n % 2 == 1 {
        stores.blobs.unreference(owner, NOW).await.expect("unreference");
        report("removed");
    }
    stores.blobs.collect(NOW.plus(2 * HOUR)).await.expect("collect");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_blobs_survive_a_kill_and_leave_no_files() {
    const ROUNDS: u64 = 12;
    let directory = tempfile::tempdir().expect("a directory");
    let mut acknowledged = HashMap::new();
    for round in 0..ROUNDS {
        let mut child = Child::spawn();
        child.open(directory.path(), StoreLimits::default()).expect("what the last process left");
        // Killed at a different point in each round, always while most uploads are in progress.
        let most = usize::try_from(1 + round * 7).expect("small");
        acknowledged.extend(child.blobs(round * COUNT, COUNT, most));
        child.kill();
        audit(directory.path()).await;
    }
    let process = Process::start(&directory, StoreLimits::default()).await;
    let stores = process.store.stores();
    for (n, change) in acknowledged {
        let content = content(n, 60_000);
        let blob = owner(&stores, 1, &content).await;
        match change.as_str() {
            // The removal may have been executed and not reported.
            "whole" if n % 2 == 1 => {}
            "whole" => assert_eq!(read(&stores, blob).await, Some(content), "{n}"),
            _ => assert_eq!(read(&stores, blob).await, None, "{n}"),
        }
    }
    drop(stores);
    process.crash().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_whose_file_is_missing_starts_again() {
    let directory = tempfile::tempdir().expect("a directory");
    let process = Process::start(&directory, StoreLimits::default()).await;
    let stores = process.store.stores();
    let content = content(1, 100_000);
    let alice = owner(&stores, 1, &content).await;
    for stored in [50_000, 100_000] {
        let chunk = |offset: usize, end: usize| NewChunk {
            owner: alice,
            size: 100_000,
            mime: String::new(),
            offset: offset as u64,
            bytes: content.slice(offset..end),
            now: NOW,
        };
        let outcome = stores.blobs.upload(chunk(0, stored)).await.expect("upload");
        assert_eq!(outcome, ChunkOutcome::Stored { received: stored as u64 });
        let object = files(directory.path()).pop_last().expect("a file");
        let path = directory.path().join(BLOBS_DIRECTORY).join(&object[..2]).join(&object);
        fs::remove_file(path).expect("removed");
        if stored < 100_000 {
            let outcome = stores.blobs.upload(chunk(stored, 100_000)).await.expect("upload");
            assert_eq!(outcome, ChunkOutcome::Gap { received: 0 });
        } else {
            let outcome = stores.blobs.finish(alice, NOW).await.expect("finish");
            assert_eq!(outcome, BlobFinish::Incomplete { received: 0 });
        }
        assert_eq!(stores.blobs.renew(alice, NOW).await.expect("renew"), BlobState::Unknown);
        audit(directory.path()).await;
    }
    upload(&stores, alice, &content).await.expect("upload");
    assert_eq!(read(&stores, alice).await, Some(content));
    drop(stores);
    process.crash().await;
}
