//! Rules of [`crate::Blobs`].

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use qpq_domain::{BlobId, BlobLimits, UnixMillis};
use sha2::{Digest as _, Sha256};
use tokio::task::JoinSet;

use super::{
    Factory,
    bench::{Bench, MINUTE, NOW, RegisteredAccount},
};
use crate::{
    BlobFinish, BlobOwner, BlobPart, BlobRange, BlobState, Blobs, ChunkOutcome, Collected,
    NewChunk, StoreError, Unreference,
};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
const HOUR: Duration = Duration::from_secs(60 * 60);

/// Returns different content for each number.
fn content(n: u64, size: usize) -> Bytes {
    let blocks =
        (0_u64..).map(|block| Sha256::digest([n.to_be_bytes(), block.to_be_bytes()].concat()));
    blocks.flatten().take(size).collect()
}

fn id(content: &[u8]) -> BlobId {
    BlobId::new(Sha256::digest(content).into())
}

fn owner(account: RegisteredAccount, content: &[u8]) -> BlobOwner {
    BlobOwner { account: account.account, blob: id(content) }
}

fn chunk(account: RegisteredAccount, content: &Bytes, offset: usize, end: usize) -> NewChunk {
    NewChunk {
        owner: owner(account, content),
        size: content.len() as u64,
        mime: "image/jpeg".into(),
        offset: offset as u64,
        bytes: content.slice(offset..end),
        now: NOW,
    }
}

impl Bench {
    async fn chunk(&self, chunk: NewChunk) -> ChunkOutcome {
        self.stores.blobs.upload(chunk).await.expect("upload")
    }

    async fn finish(&self, owner: BlobOwner) -> BlobFinish {
        self.stores.blobs.finish(owner, NOW).await.expect("finish")
    }

    /// Uploads all of a blob.
    async fn store(&self, account: RegisteredAccount, content: &Bytes) {
        let stored = self.chunk(chunk(account, content, 0, content.len())).await;
        assert_eq!(stored, ChunkOutcome::Stored { received: content.len() as u64 });
        assert_eq!(self.finish(owner(account, content)).await, BlobFinish::Whole);
    }

    async fn state(&self, owner: BlobOwner) -> BlobState {
        self.stores.blobs.renew(owner, NOW).await.expect("renew")
    }

    async fn part(&self, owner: BlobOwner, offset: usize, length: usize) -> Option<BlobPart> {
        let range = BlobRange { reader: owner, offset: offset as u64, length };
        self.stores.blobs.read(range, NOW).await.expect("read")
    }

    /// Returns the whole blob if it is readable at `now`.
    async fn whole(&self, owner: BlobOwner, now: UnixMillis) -> Option<Bytes> {
        let range = BlobRange { reader: owner, offset: 0, length: usize::MAX };
        self.stores.blobs.read(range, now).await.expect("read").map(|part| part.bytes)
    }

    async fn unreference(&self, owner: BlobOwner) -> Unreference {
        self.stores.blobs.unreference(owner, NOW).await.expect("unreference")
    }

    /// Collects until nothing is left.
    async fn collect(&self, now: UnixMillis) -> Collected {
        collect(&*self.stores.blobs, now).await
    }
}

async fn collect(blobs: &dyn Blobs, now: UnixMillis) -> Collected {
    let mut all = Collected::default();
    loop {
        let some = blobs.collect(now).await.expect("collect");
        if some.is_empty() {
            return all;
        }
        all.uploads += some.uploads;
        all.references += some.references;
        all.objects += some.objects;
    }
}

/// Limits that a few small blobs reach: a quota of 1 000 bytes.
fn small() -> BlobLimits {
    BlobLimits { max_bytes: 600, quota: 1_000, ..BlobLimits::default() }
}

pub async fn a_blob_is_read_in_parts_after_its_last_chunk(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    let (alice, bob) = (bench.account(1).await, bench.account(2).await);
    let content = content(1, 2_500_000);
    let blob = owner(alice, &content);
    for (begin, end) in [(0, 1 << 20), (1 << 20, 2 << 20), (2 << 20, content.len())] {
        assert_eq!(bench.part(blob, 0, 1).await, None, "not whole yet");
        let stored = bench.chunk(chunk(alice, &content, begin, end)).await;
        assert_eq!(stored, ChunkOutcome::Stored { received: end as u64 });
    }
    assert_eq!(bench.part(blob, 0, 1).await, None, "not checked yet");
    assert_eq!(bench.finish(blob).await, BlobFinish::Whole);
    bench.crash().await;
    let by_bob = owner(bob, &content);
    for (offset, length) in [
        (0, 1 << 20),
        (0, 1),
        ((1 << 20) - 1, 2),
        ((1 << 20) - 7, 1_000_000),
        (2_000_000, 1 << 20),
        (2_499_999, 10),
        (2_500_000, 10),
        (9_000_000, 10),
        (0, 0),
    ] {
        let end = (offset + length).min(content.len());
        let bytes = content.slice(offset.min(end)..end);
        let expected = BlobPart { bytes, size: 2_500_000, mime: "image/jpeg".into() };
        assert_eq!(bench.part(by_bob, offset, length).await, Some(expected), "{offset} {length}");
    }
    assert_eq!(bench.state(blob).await, BlobState::Whole { size: 2_500_000 });
    assert_eq!(bench.state(by_bob).await, BlobState::Unknown);
}

pub async fn an_upload_resumes_at_the_received_bytes_after_a_crash(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    let content = content(1, 10_000);
    let blob = owner(alice, &content);
    assert_eq!(bench.state(blob).await, BlobState::Unknown);
    let incomplete = BlobFinish::Incomplete { received: 0 };
    assert_eq!(bench.finish(blob).await, incomplete);
    let mut received = 0;
    while received < content.len() {
        let end = (received + 3_000).min(content.len());
        bench.chunk(chunk(alice, &content, received, end)).await;
        bench.crash().await;
        let state = bench.state(blob).await;
        assert_eq!(state, BlobState::Uploading { received: end as u64, size: 10_000 });
        received = end;
    }
    assert_eq!(bench.finish(blob).await, BlobFinish::Whole);
    assert_eq!(bench.whole(blob, NOW).await, Some(content));
}

pub async fn small_chunks_of_any_size_make_a_whole_blob(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    let content = content(1, 200_000);
    let sizes = [1, 2, 60_000, 3, 1, 64 << 10, 1, 5_000, 70_000];
    let mut begin = 0;
    for size in sizes {
        let end = (begin + size).min(content.len());
        bench.chunk(chunk(alice, &content, begin, end)).await;
        begin = end;
    }
    bench.chunk(chunk(alice, &content, begin, content.len())).await;
    let blob = owner(alice, &content);
    assert_eq!(bench.finish(blob).await, BlobFinish::Whole);
    for (offset, length) in [(0, 200_000), (1, 1), (2, 60_000), (60_001, 10), (150_000, 50_000)] {
        let part = bench.part(blob, offset, length).await.expect("whole");
        assert_eq!(part.bytes, content.slice(offset..offset + length), "{offset} {length}");
    }
}

pub async fn equal_bytes_may_be_repeated_and_other_bytes_are_refused(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    let content = content(1, 10_000);
    bench.chunk(chunk(alice, &content, 0, 4_000)).await;
    bench.chunk(chunk(alice, &content, 4_000, 5_000)).await;
    for (begin, end) in [(0, 4_000), (0, 5_000), (3_000, 4_500), (4_999, 5_000)] {
        let repeated = bench.chunk(chunk(alice, &content, begin, end)).await;
        assert_eq!(repeated, ChunkOutcome::Stored { received: 5_000 });
    }
    let mut other = content.to_vec();
    other[3_500] ^= 1;
    let other: Bytes = other.into();
    for (begin, end) in [(0, 4_000), (3_500, 3_501), (3_000, 6_000)] {
        let bytes = other.slice(begin..end);
        let refused = NewChunk { bytes, ..chunk(alice, &content, begin, end) };
        assert_eq!(bench.chunk(refused).await, ChunkOutcome::OtherBytes);
    }
    // A chunk that begins in stored bytes and ends after them.
    let overlapping = bench.chunk(chunk(alice, &content, 2_000, 8_000)).await;
    assert_eq!(overlapping, ChunkOutcome::Stored { received: 8_000 });
    bench.chunk(chunk(alice, &content, 7_999, 10_000)).await;
    assert_eq!(bench.finish(owner(alice, &content)).await, BlobFinish::Whole);
    assert_eq!(bench.whole(owner(alice, &content), NOW).await, Some(content));
}

pub async fn a_gap_stores_nothing(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    let content = content(1, 1_000);
    let gap = bench.chunk(chunk(alice, &content, 1, 1_000)).await;
    assert_eq!(gap, ChunkOutcome::Gap { received: 0 });
    bench.chunk(chunk(alice, &content, 0, 500)).await;
    let gap = bench.chunk(chunk(alice, &content, 501, 1_000)).await;
    assert_eq!(gap, ChunkOutcome::Gap { received: 500 });
    let blob = owner(alice, &content);
    assert_eq!(bench.finish(blob).await, BlobFinish::Incomplete { received: 500 });
    bench.chunk(chunk(alice, &content, 500, 1_000)).await;
    assert_eq!(bench.finish(blob).await, BlobFinish::Whole);
}

pub async fn another_size_is_refused_and_the_upload_stays(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    let content = content(1, 1_000);
    bench.chunk(chunk(alice, &content, 0, 500)).await;
    let other = NewChunk { size: 1_001, ..chunk(alice, &content, 500, 1_000) };
    assert_eq!(bench.chunk(other.clone()).await, ChunkOutcome::OtherSize);
    bench.chunk(chunk(alice, &content, 500, 1_000)).await;
    assert_eq!(bench.finish(owner(alice, &content)).await, BlobFinish::Whole);
    assert_eq!(bench.chunk(other).await, ChunkOutcome::OtherSize);
}

pub async fn a_wrong_hash_removes_the_upload_and_returns_its_quota(factory: &dyn Factory) {
    let bench = Bench::with_blobs(factory, small()).await;
    let alice = bench.account(1).await;
    let (content, other) = (content(1, 600), content(2, 600));
    let blob = owner(alice, &content);
    for _ in 0..3 {
        let wrong = NewChunk { bytes: other.clone(), ..chunk(alice, &content, 0, 600) };
        assert_eq!(bench.chunk(wrong).await, ChunkOutcome::Stored { received: 600 });
        assert_eq!(bench.finish(blob).await, BlobFinish::HashMismatch);
        assert_eq!(bench.state(blob).await, BlobState::Unknown);
        assert_eq!(bench.whole(blob, NOW).await, None);
    }
    bench.store(alice, &content).await;
    assert_eq!(bench.whole(blob, NOW).await, Some(content));
}

pub async fn a_completed_upload_may_be_completed_again(factory: &dyn Factory) {
    let bench = Bench::with_blobs(factory, small()).await;
    let alice = bench.account(1).await;
    let content = content(1, 500);
    bench.store(alice, &content).await;
    let blob = owner(alice, &content);
    assert_eq!(bench.finish(blob).await, BlobFinish::Whole);
    // A repeat of the last chunk, whose answer was lost.
    assert_eq!(bench.chunk(chunk(alice, &content, 400, 500)).await, ChunkOutcome::Whole);
    assert_eq!(bench.chunk(chunk(alice, &content, 0, 500)).await, ChunkOutcome::Whole);
    bench.store(alice, &self::content(2, 500)).await;
}

pub async fn known_content_still_takes_its_bytes(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let (alice, bob) = (bench.account(1).await, bench.account(2).await);
    let content = content(1, 1_000);
    bench.store(alice, &content).await;
    let blob = owner(bob, &content);
    assert_eq!(bench.state(blob).await, BlobState::Unknown);
    assert_eq!(bench.finish(blob).await, BlobFinish::Incomplete { received: 0 });
    let stored = bench.chunk(chunk(bob, &content, 0, 999)).await;
    assert_eq!(stored, ChunkOutcome::Stored { received: 999 });
    assert_eq!(bench.finish(blob).await, BlobFinish::Incomplete { received: 999 });
    let mut wrong = content.to_vec();
    wrong[999] ^= 1;
    let wrong =
        NewChunk { bytes: Bytes::from(wrong).slice(999..), ..chunk(bob, &content, 999, 1_000) };
    bench.chunk(wrong).await;
    assert_eq!(bench.finish(blob).await, BlobFinish::HashMismatch);
    assert_eq!(bench.whole(owner(alice, &content), NOW).await, Some(content.clone()));
    bench.store(bob, &content).await;
}

pub async fn a_blob_is_readable_until_its_last_reference_is_removed(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let (alice, bob, carol) =
        (bench.account(1).await, bench.account(2).await, bench.account(3).await);
    let content = content(1, 100_000);
    bench.store(alice, &content).await;
    bench.store(bob, &content).await;
    let reader = owner(carol, &content);
    assert_eq!(bench.unreference(owner(carol, &content)).await, Unreference::NotFound);
    assert_eq!(bench.unreference(owner(alice, &content)).await, Unreference::Removed);
    assert_eq!(bench.unreference(owner(alice, &content)).await, Unreference::NotFound);
    bench.collect(NOW.plus(DAY)).await;
    assert_eq!(bench.whole(reader, NOW).await, Some(content.clone()));
    assert_eq!(bench.unreference(owner(bob, &content)).await, Unreference::Removed);
    assert_eq!(bench.whole(reader, NOW).await, None);
    bench.store(alice, &content).await;
    assert!(bench.collect(NOW.plus(DAY)).await.objects > 0, "the object of before");
    assert_eq!(bench.whole(reader, NOW).await, Some(content));
}

pub async fn a_mime_type_belongs_to_a_reference(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let (alice, bob) = (bench.account(1).await, bench.account(2).await);
    let content = content(1, 1_000);
    bench.store(alice, &content).await;
    let other = NewChunk { mime: "text/plain".into(), ..chunk(bob, &content, 0, 1_000) };
    bench.chunk(other).await;
    bench.finish(owner(bob, &content)).await;
    for (account, mime) in [(alice, "image/jpeg"), (bob, "text/plain")] {
        let part = bench.part(owner(account, &content), 0, 1).await.expect("whole");
        assert_eq!(part.mime, mime);
    }
}

pub async fn uploads_beyond_the_quota_are_refused(factory: &dyn Factory) {
    let bench = Bench::with_blobs(factory, small()).await;
    let alice = bench.account(1).await;
    let too_large = content(9, 601);
    assert_eq!(bench.chunk(chunk(alice, &too_large, 0, 1)).await, ChunkOutcome::TooLarge);
    let (first, second, third) = (content(1, 600), content(2, 401), content(3, 400));
    bench.store(alice, &first).await;
    let refused = bench.chunk(chunk(alice, &second, 0, 1)).await;
    assert_eq!(refused, ChunkOutcome::QuotaExceeded);
    assert_eq!(bench.state(owner(alice, &second)).await, BlobState::Unknown);
    bench.store(alice, &third).await;
    let last = content(4, 1);
    assert_eq!(bench.chunk(chunk(alice, &last, 0, 1)).await, ChunkOutcome::QuotaExceeded);
    // Other accounts have their own quotas.
    let bob = bench.account(2).await;
    bench.store(bob, &first).await;
    bench.unreference(owner(alice, &first)).await;
    bench.store(alice, &second).await;
}

pub async fn of_concurrent_uploads_as_many_as_fit_the_quota_succeed(factory: &dyn Factory) {
    let bench = Bench::with_blobs(factory, small()).await;
    let alice = bench.account(1).await;
    for round in 0..5 {
        let mut tasks = JoinSet::new();
        for n in 0..6 {
            let blobs = Arc::clone(&bench.stores.blobs);
            let content = content(round * 100 + n, 400);
            tasks.spawn(async move {
                let outcome = blobs.upload(chunk(alice, &content, 0, 400)).await.expect("upload");
                (outcome, owner(alice, &content))
            });
        }
        let outcomes = tasks.join_all().await;
        let stored = ChunkOutcome::Stored { received: 400 };
        assert_eq!(outcomes.iter().filter(|(outcome, _)| *outcome == stored).count(), 2);
        assert!(
            outcomes
                .iter()
                .all(|(outcome, _)| *outcome == stored || *outcome == ChunkOutcome::QuotaExceeded)
        );
        assert!(bench.stores.blobs.release(alice.account, NOW).await.expect("release") > 0);
    }
}

pub async fn open_uploads_are_limited_by_number_and_by_size(factory: &dyn Factory) {
    let limits = BlobLimits { max_uploads: 2, max_staged: 900, ..BlobLimits::default() };
    let bench = Bench::with_blobs(factory, limits).await;
    let alice = bench.account(1).await;
    let (first, second, third) = (content(1, 500), content(2, 401), content(3, 400));
    bench.chunk(chunk(alice, &first, 0, 1)).await;
    let refused = bench.chunk(chunk(alice, &second, 0, 1)).await;
    assert_eq!(refused, ChunkOutcome::TooManyUploads, "by size");
    bench.chunk(chunk(alice, &third, 0, 1)).await;
    let small = content(4, 1);
    let refused = bench.chunk(chunk(alice, &small, 0, 1)).await;
    assert_eq!(refused, ChunkOutcome::TooManyUploads, "by number");
    // The open uploads go on.
    bench.chunk(chunk(alice, &first, 1, 500)).await;
    assert_eq!(bench.finish(owner(alice, &first)).await, BlobFinish::Whole);
    bench.store(alice, &small).await;
}

pub async fn an_idle_upload_is_removed_and_returns_its_quota(factory: &dyn Factory) {
    let bench = Bench::with_blobs(factory, small()).await;
    let alice = bench.account(1).await;
    let content = content(1, 600);
    let blob = owner(alice, &content);
    bench.chunk(chunk(alice, &content, 0, 100)).await;
    let later = NOW.plus(DAY - MINUTE);
    let second = NewChunk { now: later, ..chunk(alice, &content, 100, 200) };
    assert_eq!(bench.chunk(second).await, ChunkOutcome::Stored { received: 200 });
    assert_eq!(bench.collect(NOW.plus(DAY)).await.uploads, 0, "a chunk keeps it");
    let collected = bench.collect(later.plus(DAY)).await;
    assert_eq!((collected.uploads, collected.references), (1, 0));
    assert_eq!(bench.state(blob).await, BlobState::Unknown);
    bench.collect(later.plus(DAY + 2 * HOUR)).await;
    bench.store(alice, &content).await;
    assert_eq!(bench.whole(blob, NOW).await, Some(content));
}

pub async fn a_reference_expires_unless_it_is_renewed(factory: &dyn Factory) {
    let bench = Bench::with_blobs(factory, small()).await;
    let (alice, bob) = (bench.account(1).await, bench.account(2).await);
    let content = content(1, 600);
    let blob = owner(alice, &content);
    bench.store(alice, &content).await;
    let (before, after) = (NOW.plus(90 * DAY - MINUTE), NOW.plus(90 * DAY));
    let renewed = bench.stores.blobs.renew(blob, before).await.expect("renew");
    assert_eq!(renewed, BlobState::Whole { size: 600 });
    // Another account renews nothing.
    bench.stores.blobs.renew(owner(bob, &content), after).await.expect("renew");
    assert_eq!(bench.whole(blob, after).await, Some(content.clone()));
    assert_eq!(bench.collect(after).await.references, 0);
    let end = before.plus(90 * DAY);
    assert_eq!(bench.whole(blob, end).await, None);
    assert_eq!(bench.stores.blobs.renew(blob, end).await.expect("renew"), BlobState::Unknown);
    assert_eq!(bench.collect(end).await.references, 1);
    assert_eq!(bench.collect(end.plus(2 * HOUR)).await.objects, 1);
    bench.store(alice, &self::content(2, 600)).await;
}

pub async fn an_expired_reference_that_is_uploaded_again_counts_once(factory: &dyn Factory) {
    let limits = BlobLimits { quota: 1_200, ..small() };
    let bench = Bench::with_blobs(factory, limits).await;
    let alice = bench.account(1).await;
    let content = content(1, 600);
    let blob = owner(alice, &content);
    bench.store(alice, &content).await;
    let end = NOW.plus(90 * DAY);
    let again = NewChunk { now: end, ..chunk(alice, &content, 0, 600) };
    assert_eq!(bench.chunk(again).await, ChunkOutcome::Stored { received: 600 });
    let finished = bench.stores.blobs.finish(blob, end).await.expect("finish");
    assert_eq!(finished, BlobFinish::Whole);
    assert_eq!(bench.whole(blob, end).await, Some(content));
    bench.store(alice, &self::content(2, 600)).await;
    let more = self::content(3, 1);
    assert_eq!(bench.chunk(chunk(alice, &more, 0, 1)).await, ChunkOutcome::QuotaExceeded);
}

pub async fn a_released_account_has_no_blobs_and_no_quota_in_use(factory: &dyn Factory) {
    let limits = BlobLimits { max_uploads: 100, quota: 1_000, ..BlobLimits::default() };
    let bench = Bench::with_blobs(factory, limits).await;
    let (alice, bob) = (bench.account(1).await, bench.account(2).await);
    let shared = content(0, 10);
    bench.store(alice, &shared).await;
    bench.store(bob, &shared).await;
    for n in 1..=70 {
        bench.store(alice, &content(n, 10)).await;
    }
    for n in 71..=99 {
        bench.chunk(chunk(alice, &content(n, 10), 0, 1)).await;
    }
    let mut released = 0;
    loop {
        match bench.stores.blobs.release(alice.account, NOW).await.expect("release") {
            0 => break,
            some => released += some,
        }
    }
    assert_eq!(released, 100);
    assert_eq!(bench.whole(owner(alice, &content(1, 10)), NOW).await, None);
    assert_eq!(bench.whole(owner(alice, &shared), NOW).await, Some(shared));
    bench.store(alice, &content(100, 1_000)).await;
}

pub async fn two_devices_upload_one_blob_together(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    for round in 0..5 {
        let content = content(round, 50_000);
        let mut tasks = JoinSet::new();
        for _ in 0..4 {
            let (blobs, content) = (Arc::clone(&bench.stores.blobs), content.clone());
            tasks.spawn(async move { upload_all(&*blobs, alice, &content).await });
        }
        tasks.join_all().await;
        assert_eq!(bench.whole(owner(alice, &content), NOW).await, Some(content));
    }
}

/// Uploads a blob in chunks, also if another task uploads it too.
async fn upload_all(blobs: &dyn Blobs, account: RegisteredAccount, content: &Bytes) {
    let blob = owner(account, content);
    loop {
        let received = match blobs.renew(blob, NOW).await.expect("renew") {
            BlobState::Whole { .. } => return,
            BlobState::Uploading { received, .. } => received,
            BlobState::Unknown => 0,
        };
        let begin = usize::try_from(received).expect("small");
        if begin == content.len() {
            match blobs.finish(blob, NOW).await.expect("finish") {
                BlobFinish::HashMismatch => panic!("the content has this hash"),
                BlobFinish::Whole => return,
                BlobFinish::Incomplete { .. } | BlobFinish::InProgress => {
                    tokio::task::yield_now().await;
                }
            }
            continue;
        }
        let end = (begin + 20_000).min(content.len());
        match blobs.upload(chunk(account, content, begin, end)).await.expect("upload") {
            ChunkOutcome::Stored { .. } | ChunkOutcome::Whole | ChunkOutcome::Gap { .. } => {}
            refused => panic!("{refused:?}"),
        }
    }
}

pub async fn uploads_removals_and_collections_of_the_same_content_lose_no_blob(
    factory: &dyn Factory,
) {
    const WORKERS: u64 = 8;
    const ROUNDS: u64 = 25;
    let bench = Bench::new(factory).await;
    let mut accounts = Vec::new();
    for n in 1..=4 {
        accounts.push(bench.account(n).await);
    }
    let contents: Vec<Bytes> = (0..3).map(|n| content(n, 30_000)).collect();
    let mut tasks = JoinSet::new();
    for worker in 0..WORKERS {
        let blobs = Arc::clone(&bench.stores.blobs);
        let (accounts, contents) = (accounts.clone(), contents.clone());
        tasks.spawn(async move {
            for round in 0..ROUNDS {
                // A fixed choice that differs between workers and rounds.
                let choice = Sha256::digest([worker.to_be_bytes(), round.to_be_bytes()].concat());
                let account = accounts[usize::from(choice[0]) % accounts.len()];
                let content = &contents[usize::from(choice[1]) % contents.len()];
                match choice[2] % 8 {
                    0..4 => upload_all(&*blobs, account, content).await,
                    4..6 => {
                        blobs.unreference(owner(account, content), NOW).await.expect("unreference");
                    }
                    _ => {
                        collect(&*blobs, NOW.plus(2 * HOUR)).await;
                    }
                }
                // Whatever others do, a blob is absent, or it is complete.
                let range =
                    BlobRange { reader: owner(account, content), offset: 0, length: usize::MAX };
                match blobs.read(range, NOW).await {
                    Ok(None) => {}
                    Ok(Some(part)) => assert_eq!(part.bytes, *content),
                    // The content was removed between the look-up and the read: this test removes
                    // it without the hour that calls have.
                    Err(StoreError::Corrupt(_) | StoreError::Unavailable(_)) => {}
                    Err(error) => panic!("{error}"),
                }
            }
        });
    }
    while let Some(ended) = tasks.join_next().await {
        ended.expect("no panic");
    }
    for content in &contents {
        for account in &accounts {
            let blob = owner(*account, content);
            let expected = match bench.state(blob).await {
                BlobState::Whole { .. } => Some(content.clone()),
                BlobState::Uploading { .. } | BlobState::Unknown => continue,
            };
            assert_eq!(bench.whole(blob, NOW).await, expected);
        }
    }
}
