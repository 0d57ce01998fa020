//! The rules of the writer, with statements that fail as a test needs it.

use std::io;

use futures_util::{FutureExt as _, poll};
use qpq_domain::{StoreId, StoreLimits};
use tempfile::TempDir;

use super::*;
use crate::{EmbeddedStore, effects::Effects};

async fn open() -> (EmbeddedStore, TempDir) {
    let directory = tempfile::tempdir().expect("a directory");
    let store = EmbeddedStore::open(directory.path(), StoreLimits::default()).await;
    (store.unwrap_or_else(|error| panic!("{error}")), directory)
}

async fn beats(store: &EmbeddedStore) -> i64 {
    let beats = sqlx::query_scalar("SELECT beats FROM heartbeat").fetch_one(&store.readers).await;
    beats.expect("read")
}

async fn set_beats(tx: &mut SqliteConnection, beats: i64) -> sqlx::Result<()> {
    sqlx::query("UPDATE heartbeat SET beats = ?1").bind(beats).execute(tx).await.map(drop)
}

struct SetBeats(i64);

impl Statement for SetBeats {
    type Answer = i64;
    const NAME: &'static str = "set beats";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<i64>> {
        set_beats(tx, self.0).await?;
        Ok(Done::keep(self.0))
    }
}

/// Writes, and lets the writer roll its changes back.
struct Undone;

impl Statement for Undone {
    type Answer = &'static str;
    const NAME: &'static str = "undone";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<&'static str>> {
        set_beats(tx, -1).await?;
        Ok(Done::undo("refused"))
    }
}

/// Writes, and then breaks a rule of the schema.
struct Refused;

impl Statement for Refused {
    type Answer = ();
    const NAME: &'static str = "refused";

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<()>> {
        set_beats(tx, -1).await?;
        sqlx::query("INSERT INTO heartbeat (id, beats) VALUES (2, 0)").execute(tx).await?;
        Ok(Done::keep(()))
    }
}

/// Writes, and then fails as with a broken disk.
struct DiskFails;

impl Statement for DiskFails {
    type Answer = ();
    const NAME: &'static str = "disk fails";
    const SCOPE: Scope = Scope::Batch;

    async fn run(&self, tx: &mut SqliteConnection) -> sqlx::Result<Done<()>> {
        set_beats(tx, -1).await?;
        Err(sqlx::Error::Io(io::Error::other("a test")))
    }
}

struct SetStoreId(StoreId);

impl Statement for SetStoreId {
    type Answer = ();
    const NAME: &'static str = "set store id";

    async fn run(&self, _: &mut SqliteConnection) -> sqlx::Result<Done<()>> {
        let effects = Effects { new_store_id: Some(self.0), ..Effects::default() };
        Ok(Done::with((), effects))
    }
}

#[tokio::test]
async fn a_refused_statement_fails_only_its_own_call() {
    let (store, _directory) = open().await;
    let writer = &store.writer;
    let (before, refused, undone, after) = tokio::join!(
        writer.run(SetBeats(6)),
        writer.run(Refused),
        writer.run(Undone),
        writer.run(SetBeats(7))
    );
    assert_eq!(before.expect("committed"), 6);
    assert!(matches!(refused, Err(StoreError::Conflict(_))), "{refused:?}");
    assert_eq!(undone.expect("answered"), "refused");
    assert_eq!(after.expect("committed"), 7);
    assert_eq!(beats(&store).await, 7);
    assert_eq!(writer.run(Undone).await.expect("answered"), "refused");
    assert_eq!(beats(&store).await, 7, "rolled back");
}

#[tokio::test]
async fn a_failure_of_the_disk_fails_the_batch_and_not_the_next_one() {
    let (store, _directory) = open().await;
    let writer = &store.writer;
    let before = beats(&store).await;
    let (committed, failed) = tokio::join!(writer.run(SetBeats(99)), writer.run(DiskFails));
    assert!(matches!(committed, Err(StoreError::Unavailable(_))), "{committed:?}");
    assert!(matches!(failed, Err(StoreError::Unavailable(_))), "{failed:?}");
    assert_eq!(beats(&store).await, before);
    assert!(writer.refused().is_some(), "the size of the batch is remembered");
    writer.run(SetBeats(7)).await.expect("with a new connection");
    assert_eq!(beats(&store).await, 7);
}

#[tokio::test]
async fn effects_are_applied_before_the_answer_and_without_a_waiting_caller() {
    let (store, _directory) = open().await;
    let [first, second] = [1, 2].map(|n| StoreId::new([n; 16]));
    store.writer.run(SetStoreId(first)).await.expect("committed");
    assert_eq!(store.memory.history.id(), first);
    assert!(store.writer.run(SetStoreId(second)).now_or_never().is_none(), "queued and dropped");
    store.writer.run(SetBeats(7)).await.expect("committed");
    assert_eq!(store.memory.history.id(), second);
}

#[tokio::test]
async fn a_closed_writer_has_answered_the_waiting_calls_and_unlocked_the_directory() {
    let (store, directory) = open().await;
    let writer = store.writer.clone();
    let mut waiting = Box::pin(writer.run(SetBeats(7)));
    assert!(poll!(&mut waiting).is_pending());
    store.close().await;
    assert_eq!(waiting.await.expect("committed"), 7);
    let refused = writer.run(SetBeats(8)).await;
    assert!(matches!(refused, Err(StoreError::Unavailable(_))), "{refused:?}");
    writer.close().await;
    let store =
        EmbeddedStore::open(directory.path(), StoreLimits::default()).await.expect("unlocked");
    // Opening the store has added one beat.
    assert_eq!(beats(&store).await, 8);
    store.close().await;
}
