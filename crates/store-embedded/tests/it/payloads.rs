//! Payloads that several messages share: stored once, removed with the last of them, and part of
//! each message in a copy and in an export.

use std::{path::Path, time::Duration};

use bytes::Bytes;
use qpq_domain::{ChannelId, IdentityKey, MessageId, Seq, StoreLimits, Username};
use qpq_ports::{
    Ack, Admission, Batch, Enqueued, NewAccount, NewMessage, ReadQuery, Reader, Stores, View,
    transfer::{Cell, Table, sha256},
};
use qpq_store_embedded::{
    BackupError, DATABASE_FILE, EmbeddedStore, Export, copy_database, inspect,
};
use sqlx::{AssertSqlSafe, ConnectOptions as _, Connection as _, sqlite::SqliteConnectOptions};

use crate::ops::{START, key};

const RECIPIENTS: u8 = 6;

async fn open(path: &Path, limits: StoreLimits) -> EmbeddedStore {
    let store = EmbeddedStore::open(path, limits).await;
    store.unwrap_or_else(|error| panic!("{error}"))
}

/// Opens a store with the accounts 0 to [`RECIPIENTS`].
async fn with_accounts(path: &Path, limits: StoreLimits) -> EmbeddedStore {
    let store = open(path, limits).await;
    for n in 0..=RECIPIENTS {
        let account = NewAccount {
            username: Username::parse(&format!("user{n}")).expect("a username"),
            identity: key(n),
            opaque_record: vec![0; 192],
            admission: Admission::Open,
            now: START,
        };
        store.stores().accounts.register(account).await.expect("register");
    }
    store
}

/// Creates messages of account 0 to all others, which share `payload`.
fn fan_out(payload: &Bytes, id: Option<u8>) -> Vec<NewMessage> {
    let to = |recipient| NewMessage {
        sender: key(0),
        recipient,
        channel: ChannelId::DEFAULT,
        payload: payload.clone(),
        payload_sha256: sha256(payload).try_into().expect("32 bytes"),
        message_id: id.map(|id| MessageId::new([id; 16])),
        now: START,
        ttl: Duration::from_secs(60),
    };
    (1..=RECIPIENTS).map(key).map(to).collect()
}

async fn send(stores: &Stores, messages: Vec<NewMessage>) -> Vec<Enqueued> {
    stores.inboxes.enqueue(Batch::new(messages)).await.expect("enqueue")
}

async fn ack_all(stores: &Stores, inbox: IdentityKey) {
    let read = ReadQuery { reader: Reader::single(inbox), view: View::All };
    let ack = Ack { up_to: Some(Seq(u64::MAX)), ..Ack::default() };
    stores.inboxes.ack(read, ack, START).await.expect("ack");
}

/// Executes a statement on a database. Returns the number that the statement selects, or 0.
async fn sql(database: &Path, statement: &str) -> i64 {
    let options = SqliteConnectOptions::new().filename(database);
    let mut connection = options.connect().await.expect("connect");
    let number = sqlx::query_scalar(AssertSqlSafe(statement)).fetch_optional(&mut connection).await;
    connection.close().await.expect("close");
    number.expect("execute").unwrap_or_default()
}

async fn stored_payloads(directory: &Path) -> i64 {
    sql(&directory.join(DATABASE_FILE), "SELECT count(*) FROM payload").await
}

#[tokio::test]
async fn a_shared_payload_is_stored_once_and_removed_with_its_last_message() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path();
    let store = with_accounts(path, StoreLimits::default()).await;
    let stores = store.stores();
    send(&stores, fan_out(&Bytes::from(vec![1; 511]), None)).await;
    assert_eq!(stored_payloads(path).await, 0, "a small one is in each row");
    for size in [512, 100_000] {
        let outcomes = send(&stores, fan_out(&Bytes::from(vec![1; size]), None)).await;
        assert!(outcomes.iter().all(|outcome| matches!(outcome, Enqueued::Accepted(_))));
    }
    assert_eq!(stored_payloads(path).await, 2);
    for n in 1..RECIPIENTS {
        ack_all(&stores, key(n)).await;
        assert_eq!(stored_payloads(path).await, 2, "after {n}");
    }
    ack_all(&stores, key(RECIPIENTS)).await;
    assert_eq!(stored_payloads(path).await, 0);
    send(&stores, fan_out(&Bytes::from(vec![1; 512]), None)).await;
    let later = START.plus(Duration::from_secs(61));
    while stores.maintenance.sweep(later).await.expect("sweep").rows > 0 {}
    assert_eq!(stored_payloads(path).await, 0, "expired");
    store.close().await;
}

#[tokio::test]
async fn a_payload_that_no_inbox_accepts_is_not_stored() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut limits = StoreLimits::default();
    (limits.delivery.max_messages, limits.delivery.sender_share) = (2, 1);
    let store = with_accounts(directory.path(), limits).await;
    let stores = store.stores();
    let payload = Bytes::from(vec![1; 1_000]);
    send(&stores, fan_out(&payload, Some(1))).await;
    let repeated = send(&stores, fan_out(&payload, Some(1))).await;
    assert!(repeated.iter().all(|outcome| matches!(outcome, Enqueued::Duplicate(_))));
    assert_eq!(stored_payloads(directory.path()).await, 1);
    // Fills one inbox with a message of its own, and the other five with messages that share a
    // payload.
    let mut messages = fan_out(&payload, Some(2));
    send(&stores, messages.split_off(5)).await;
    send(&stores, messages).await;
    let outcomes = send(&stores, fan_out(&payload, Some(3))).await;
    assert!(outcomes.iter().all(|outcome| *outcome == Enqueued::QueueFull), "{outcomes:?}");
    assert_eq!(stored_payloads(directory.path()).await, 2);
    store.close().await;
}

#[tokio::test]
async fn a_copy_is_checked_with_its_shared_payloads() {
    let [directory, copies] = [(); 2].map(|()| tempfile::tempdir().expect("a directory"));
    let store = with_accounts(directory.path(), StoreLimits::default()).await;
    send(&store.stores(), fan_out(&Bytes::from(vec![1; 1_000]), None)).await;
    store.close().await;
    let damages = [
        ("SELECT 1", None),
        ("UPDATE payload SET bytes = zeroblob(1000)", Some("6 messages of another hash")),
        ("UPDATE payload SET bytes = zeroblob(999)", Some("6 messages of another size than the")),
        ("DELETE FROM payload", Some("6 messages whose shared payload is missing")),
        ("INSERT INTO payload VALUES (99, x'00')", Some("1 shared payloads without a message")),
    ];
    for (n, (damage, expected)) in damages.into_iter().enumerate() {
        let copy = copies.path().join(n.to_string());
        copy_database(directory.path(), &copy).await.expect("copied");
        sql(&copy, damage).await;
        match (inspect(&copy).await, expected) {
            (Ok(_), None) => {}
            (Err(BackupError::Damaged { damages, .. }), Some(expected)) => {
                assert!(damages.iter().any(|found| found.starts_with(expected)), "{damages:?}");
            }
            (found, expected) => panic!("{damage}: {found:?}, not {expected:?}"),
        }
    }
}

#[tokio::test]
async fn an_export_has_the_payload_of_each_message() {
    let directory = tempfile::tempdir().expect("a directory");
    let store = with_accounts(directory.path(), StoreLimits::default()).await;
    let stores = store.stores();
    let (shared, own) = (Bytes::from(vec![1; 1_000]), Bytes::from(vec![2; 10]));
    send(&stores, fan_out(&shared, None)).await;
    send(&stores, fan_out(&own, None)).await;
    store.close().await;
    let mut export = Export::open(directory.path()).await.expect("it is free");
    let payload = Table::Message.columns().iter().position(|column| column.name == "payload");
    let payload = payload.expect("a column");
    let rows = export.rows(Table::Message, None).await.expect("read");
    let count = |bytes: &Bytes| {
        let expected = Cell::Bytes(bytes.to_vec());
        rows.iter().filter(|row| row[payload] == expected).count()
    };
    assert_eq!((rows.len(), count(&shared), count(&own)), (12, 6, 6));
    let before = export.digests(|| {}).await.expect("read");
    drop(export);
    // The rows are the same for a store that has each payload in its message.
    let database = directory.path().join(DATABASE_FILE);
    sql(
        &database,
        "UPDATE message SET payload = (SELECT bytes FROM payload WHERE id = payload_id),
                payload_id = NULL WHERE payload_id IS NOT NULL",
    )
    .await;
    let mut export = Export::open(directory.path()).await.expect("it is free");
    assert_eq!(export.digests(|| {}).await.expect("read"), before);
}
