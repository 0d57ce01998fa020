//! Blobs over several edges and a real object store: uploads through different edges, failures of
//! the object store, and calls that end at any step.

use std::{
    collections::BTreeSet, future::poll_fn, pin::pin, sync::Arc, task::Poll, time::Duration,
};

use bytes::Bytes;
use qpq_domain::{BlobId, StoreLimits, UnixMillis};
use qpq_ports::{
    BlobFinish, BlobOwner, BlobRange, BlobState, Blobs, ChunkOutcome, NewChunk, StoreError,
    Unreference,
};
use qpq_store_cluster::{BlobPlaces, BucketConfig, ClusterStore, Config};
use qpq_test_services::SeaweedFs;
use sha2::{Digest as _, Sha256};
use tokio::{task::JoinSet, time::Instant};

use crate::{
    backend::{NEVER, Servers, edge},
    people::{HOUR, NOW, Person, person},
};

/// The size of the largest blob that stays in Postgres.
const SMALL: usize = 1_000;

/// Edges of one cluster, its object store, and people with accounts.
struct World<const N: usize> {
    servers: Arc<Servers>,
    objects: SeaweedFs,
    config: Config,
    edges: [ClusterStore; N],
    people: [Person; 3],
}

impl<const N: usize> World<N> {
    async fn new() -> Self {
        Self::with_timeout(Duration::from_secs(20)).await
    }

    /// Starts a cluster whose requests to the object store have this time limit.
    async fn with_timeout(timeout: Duration) -> Self {
        let (servers, objects) = tokio::join!(Servers::start(), SeaweedFs::start());
        let objects = objects.expect("SeaweedFS");
        let bucket = BucketConfig {
            endpoint: objects.url(),
            bucket: objects.bucket().into(),
            region: "us-east-1".into(),
            access_key: objects.access_key().into(),
            secret_key: objects.secret_key().into(),
            ca: None,
            timeout,
        };
        let blobs =
            BlobPlaces { bucket: Some(bucket), small: SMALL as u64, ..BlobPlaces::default() };
        let config = Config { blobs, ..servers.cluster(StoreLimits::default()).await };
        let mut edges = Vec::new();
        for _ in 0..N {
            edges.push(edge(&config).await);
        }
        let edges: [ClusterStore; N] =
            edges.try_into().unwrap_or_else(|_| panic!("as many as started"));
        let stores = edges[0].stores();
        let people = [person(&stores, 1).await, person(&stores, 2).await, person(&stores, 3).await];
        Self { servers, objects, config, edges, people }
    }

    fn blobs(&self, edge: usize) -> Arc<dyn Blobs> {
        self.edges[edge].stores().blobs
    }

    async fn sql(&self, sql: &str) -> Vec<String> {
        let answer = self.servers.postgres.sql_in(&self.config.namespace, sql).await;
        answer
            .expect("Postgres")
            .lines()
            .map(str::to_owned)
            .filter(|line| !line.is_empty())
            .collect()
    }

    async fn objects(&self) -> BTreeSet<String> {
        self.objects.objects().await.expect("a list").into_iter().collect()
    }

    /// Checks that each blob has its bytes, that nothing is stored that no row leads to, and that
    /// the quotas are right.
    async fn audit(&self) {
        let set = |lines: Vec<String>| lines.into_iter().collect::<BTreeSet<_>>();
        // The objects first: one that is written later than its row is not among them.
        let objects = self.objects().await;
        let blobs = set(self.sql("SELECT object FROM blob WHERE place = 1").await);
        let trash = set(self.sql("SELECT object FROM blob_trash WHERE place = 1").await);
        assert!(blobs.is_subset(&objects), "blobs without objects: {blobs:?} {objects:?}");
        assert!(blobs.is_disjoint(&trash), "blobs in the trash: {blobs:?} {trash:?}");
        let known: BTreeSet<_> = blobs.union(&trash).cloned().collect();
        assert!(objects.is_subset(&known), "objects without rows: {objects:?} {known:?}");
        for rule in [
            "SELECT object FROM blob_chunk c WHERE NOT EXISTS (
                SELECT FROM blob b WHERE b.object = c.object AND b.place = 0)
               AND NOT EXISTS (SELECT FROM upload u WHERE u.object = c.object)
               AND NOT EXISTS (SELECT FROM blob_trash t WHERE t.object = c.object AND t.place = 0)",
            "SELECT object FROM blob b WHERE place = 0 AND size <> coalesce((
                SELECT sum(octet_length(bytes)) FROM blob_chunk c WHERE c.object = b.object), 0)",
            "SELECT object FROM upload u WHERE received <> coalesce((
                SELECT sum(octet_length(bytes)) FROM blob_chunk c WHERE c.object = u.object), 0)",
            "SELECT hash FROM blob b WHERE NOT EXISTS (
                SELECT FROM blob_ref r WHERE r.hash = b.hash)",
            "SELECT a.id FROM account a
              WHERE coalesce((SELECT used FROM blob_quota q WHERE q.account = a.id), 0) <>
                    coalesce((SELECT sum(size) FROM upload u WHERE u.account = a.id), 0) +
                    coalesce((SELECT sum(size) FROM blob_ref r JOIN blob b ON b.hash = r.hash
                               WHERE r.account = a.id), 0)",
        ] {
            assert_eq!(self.sql(rule).await, Vec::<String>::new(), "{rule}");
        }
    }

    /// Collects everything that any call left, and checks that only blobs remain.
    async fn audit_after_collection(&self) {
        let (blobs, deadline) = (self.blobs(0), Instant::now() + NEVER);
        // What a collection puts into the trash is removed two hours later. If the object store is
        // slow, a begun removal is repeated ten minutes later.
        let (mut now, mut empty) = (NOW.plus(48 * HOUR), 0);
        while empty < 3 {
            match blobs.collect(now).await {
                Ok(collected) if collected.is_empty() => {
                    (now, empty) = (now.plus(2 * HOUR), empty + 1)
                }
                Ok(_) => empty = 0,
                Err(error) => {
                    assert!(Instant::now() < deadline, "{error:?}");
                    (now, empty) = (now.plus(2 * HOUR), 0);
                }
            }
        }
        self.audit().await;
        let objects = self.sql("SELECT object FROM blob WHERE place = 1").await;
        assert_eq!(self.objects().await, objects.into_iter().collect());
        for table in ["blob_trash", "upload"] {
            let count = self.sql(&format!("SELECT count(*) FROM {table}")).await;
            assert_eq!(count, ["0"], "{table}");
        }
    }
}

/// Returns different content for each number.
fn content(n: u64, size: usize) -> Bytes {
    let blocks =
        (0_u64..).map(|block| Sha256::digest([n.to_be_bytes(), block.to_be_bytes()].concat()));
    blocks.flatten().take(size).collect()
}

fn owner(person: Person, content: &[u8]) -> BlobOwner {
    let blob = BlobId::new(Sha256::digest(content).into());
    BlobOwner { account: person.account, blob }
}

fn chunk(person: Person, content: &Bytes, begin: usize, end: usize) -> NewChunk {
    NewChunk {
        owner: owner(person, content),
        size: content.len() as u64,
        mime: String::new(),
        offset: begin as u64,
        bytes: content.slice(begin..end),
        now: NOW,
    }
}

/// Uploads a blob, starting where an earlier attempt stopped.
async fn upload(
    blobs: &dyn Blobs,
    person: Person,
    content: &Bytes,
    now: UnixMillis,
) -> Result<(), StoreError> {
    let blob = owner(person, content);
    loop {
        let begin = match blobs.renew(blob, now).await? {
            BlobState::Whole { .. } => return Ok(()),
            BlobState::Uploading { received, .. } => usize::try_from(received).expect("small"),
            BlobState::Unknown => 0,
        };
        if begin == content.len() {
            match blobs.finish(blob, now).await? {
                BlobFinish::Whole => return Ok(()),
                BlobFinish::HashMismatch => panic!("the content has this hash"),
                BlobFinish::Incomplete { .. } | BlobFinish::InProgress => {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
            continue;
        }
        let end = (begin + content.len().div_ceil(2)).min(content.len());
        let chunk = NewChunk { now, ..chunk(person, content, begin, end) };
        match blobs.upload(chunk).await? {
            ChunkOutcome::Stored { .. } | ChunkOutcome::Whole | ChunkOutcome::Gap { .. } => {}
            refused => panic!("{refused:?}"),
        }
    }
}

/// Uploads a blob as soon as a slow object store does its part.
async fn upload_at_last(blobs: &dyn Blobs, person: Person, content: &Bytes) {
    let deadline = Instant::now() + NEVER;
    while let Err(error) = upload(blobs, person, content, NOW).await {
        assert!(matches!(error, StoreError::Unavailable(_)), "{error:?}");
        assert!(Instant::now() < deadline, "waited {NEVER:?} for the object store: {error:?}");
    }
}

/// Reads a blob as soon as a slow object store returns it.
async fn read_at_last(blobs: &dyn Blobs, reader: BlobOwner) -> Option<Bytes> {
    let deadline = Instant::now() + NEVER;
    loop {
        match read(blobs, reader).await {
            Ok(found) => return found,
            Err(error) => assert!(Instant::now() < deadline, "waited {NEVER:?}: {error:?}"),
        }
    }
}

async fn read(blobs: &dyn Blobs, reader: BlobOwner) -> Result<Option<Bytes>, StoreError> {
    let range = BlobRange { reader, offset: 0, length: usize::MAX };
    Ok(blobs.read(range, NOW).await?.map(|part| part.bytes))
}

/// Polls a call until it is complete, or has waited `limit` times. A dropped call stands for a
/// killed edge. Returns whether the call was complete.
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chunks_through_different_edges_make_a_blob_in_the_bucket() {
    let world = World::<3>::new().await;
    let [alice, bob, _] = world.people;
    let content = content(1, 2_500_000);
    let blob = owner(alice, &content);
    for (edge, begin, end) in [(0, 0, 1 << 20), (1, 1 << 20, 2 << 20), (2, 2 << 20, 2_500_000)] {
        let stored = world.blobs(edge).upload(chunk(alice, &content, begin, end)).await;
        assert_eq!(stored.expect("upload"), ChunkOutcome::Stored { received: end as u64 });
    }
    assert_eq!(world.blobs(2).finish(blob, NOW).await.expect("finish"), BlobFinish::Whole);
    assert_eq!(world.objects().await.len(), 1);
    for (edge, offset, length) in [(0, 0, 1 << 20), (1, 1_048_570, 100), (2, 2_499_990, 1 << 20)] {
        let range = BlobRange { reader: owner(bob, &content), offset, length };
        let part = world.blobs(edge).read(range, NOW).await.expect("read").expect("a blob");
        let begin = usize::try_from(offset).expect("small");
        assert_eq!(part.bytes, content.slice(begin..(begin + length).min(content.len())));
    }
    world.audit().await;
    assert_eq!(world.sql("SELECT count(*) FROM blob_chunk").await, ["0"]);
    let removed = world.blobs(1).unreference(blob, NOW).await.expect("unreference");
    assert_eq!(removed, Unreference::Removed);
    world.audit_after_collection().await;
    assert_eq!(world.objects().await.len(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn small_blobs_stay_in_postgres() {
    let world = World::<1>::new().await;
    let [alice, ..] = world.people;
    let (small, large) = (content(1, SMALL), content(2, SMALL + 1));
    let blobs = world.blobs(0);
    for content in [&small, &large] {
        upload(&*blobs, alice, content, NOW).await.expect("upload");
        let found = read(&*blobs, owner(alice, content)).await.expect("read");
        assert_eq!(found.as_ref(), Some(content));
    }
    assert_eq!(world.objects().await.len(), 1);
    world.audit_after_collection().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_object_store_delays_only_completions_and_reads() {
    let world = World::<2>::with_timeout(Duration::from_secs(2)).await;
    let [alice, ..] = world.people;
    let (before, after) = (content(1, 5_000), content(2, 5_000));
    upload_at_last(&*world.blobs(0), alice, &before).await;
    world.objects.kill9().await.expect("killed");
    let stored = world.blobs(0).upload(chunk(alice, &after, 0, 5_000)).await;
    assert_eq!(stored.expect("upload"), ChunkOutcome::Stored { received: 5_000 });
    let blob = owner(alice, &after);
    for edge in [0, 1] {
        let refused = world.blobs(edge).finish(blob, NOW).await;
        assert!(matches!(refused, Err(StoreError::Unavailable(_))), "{refused:?}");
        let refused = read(&*world.blobs(edge), owner(alice, &before)).await;
        assert!(matches!(refused, Err(StoreError::Unavailable(_))), "{refused:?}");
        world.edges[edge].stores().maintenance.check().await.expect("the edge is ready");
    }
    world.objects.start_again().await.expect("SeaweedFS");
    upload_at_last(&*world.blobs(1), alice, &after).await;
    for content in [before, after] {
        let found = read_at_last(&*world.blobs(0), owner(alice, &content)).await;
        assert_eq!(found, Some(content));
    }
    world.audit_after_collection().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_object_store_that_answers_too_late_leaves_no_orphans() {
    let world = World::<1>::with_timeout(Duration::from_secs(1)).await;
    let [alice, ..] = world.people;
    let content = content(1, 500_000);
    let blobs = world.blobs(0);
    blobs.upload(chunk(alice, &content, 0, 500_000)).await.expect("upload");
    world.objects.freeze();
    let refused = blobs.finish(owner(alice, &content), NOW).await;
    assert!(matches!(refused, Err(StoreError::Unavailable(_))), "{refused:?}");
    // Now the store executes the requests whose callers have given up.
    world.objects.thaw();
    upload_at_last(&*blobs, alice, &content).await;
    assert_eq!(read_at_last(&*blobs, owner(alice, &content)).await, Some(content));
    world.audit_after_collection().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_ends_at_any_step_leaves_nothing_behind() {
    let world = World::<1>::new().await;
    let [alice, bob, _] = world.people;
    let blobs = world.blobs(0);
    for size in [SMALL, SMALL + 1] {
        let mut is_complete = false;
        let mut limit = 0;
        while !is_complete {
            let content = content(limit as u64, size);
            // The same content of another account, whose row the call meets.
            if limit % 2 == 0 {
                upload(&*blobs, bob, &content, NOW).await.expect("upload");
            }
            let call = async { upload(&*blobs, alice, &content, NOW).await.expect("upload") };
            is_complete = interrupted(Box::pin(call), limit).await;
            // A claim of the ended call has run out.
            let later = NOW.plus(Duration::from_secs(31));
            upload(&*blobs, alice, &content, later).await.expect("upload");
            let found = read(&*blobs, owner(alice, &content)).await.expect("read");
            assert_eq!(found, Some(content.clone()), "after {limit} waits");
            let call = async {
                blobs.unreference(owner(alice, &content), NOW).await.expect("unreference");
                while !blobs.collect(NOW.plus(2 * HOUR)).await.expect("collect").is_empty() {}
            };
            interrupted(Box::pin(call), limit).await;
            limit += 1;
        }
        assert!(limit > 10, "{limit} steps");
        world.audit().await;
    }
    world.audit_after_collection().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_uploads_removals_and_collections_lose_no_blob() {
    const WORKERS: u64 = 8;
    const ROUNDS: u64 = 40;
    let world = World::<2>::new().await;
    let contents: Vec<Bytes> = (0..4).map(|n| content(n, SMALL / 2 + 600 * n as usize)).collect();
    let mut tasks = JoinSet::new();
    for worker in 0..WORKERS {
        let blobs = world.blobs(usize::from(worker % 2 == 0));
        let (people, contents) = (world.people, contents.clone());
        tasks.spawn(async move {
            // Calls whose claim was left by an ended one continue by a later clock.
            let mut now = NOW;
            for round in 0..ROUNDS {
                now = now.plus(Duration::from_secs(31));
                let choice = Sha256::digest([worker.to_be_bytes(), round.to_be_bytes()].concat());
                let person = people[usize::from(choice[0]) % people.len()];
                let content = &contents[usize::from(choice[1]) % contents.len()];
                let call = async {
                    match choice[2] % 8 {
                        0..5 => {
                            let limit = Duration::from_secs(20);
                            let call = upload(&*blobs, person, content, now);
                            // A claim of an ended call may last longer than this worker waits.
                            let _ = tokio::time::timeout(limit, call).await;
                        }
                        5..7 => {
                            let call = blobs.unreference(owner(person, content), now);
                            call.await.expect("unreference");
                        }
                        _ => {
                            blobs.collect(now.plus(2 * HOUR)).await.expect("collect");
                        }
                    }
                };
                // A third of the calls ends early.
                let limit = if choice[3] % 3 == 0 { usize::from(choice[4] % 24) } else { 1 << 20 };
                interrupted(Box::pin(call), limit).await;
            }
        });
    }
    while let Some(ended) = tasks.join_next().await {
        ended.expect("no panic");
    }
    world.audit().await;
    for content in &contents {
        for person in world.people {
            let blob = owner(person, content);
            if let BlobState::Whole { .. } = world.blobs(0).renew(blob, NOW).await.expect("renew") {
                let found = read(&*world.blobs(1), blob).await.expect("read");
                assert_eq!(found.as_ref(), Some(content));
            }
        }
    }
    world.audit_after_collection().await;
}
