//! Positions of devices in the database: few rows, bounded steps of a sweep, and the precision of
//! the instant at which a device was last seen.

use std::{path::Path, time::Duration};

use bytes::Bytes;
use qpq_domain::{ChannelId, DeliveryLimits, DeviceId, Seq, StoreLimits, TokenHash, Username};
use qpq_ports::{
    Ack, Admission, Batch, Enqueued, NewAccount, NewDevice, NewMessage, PageLimit, ReadError,
    ReadQuery, Reader, Registration, Stores, View,
};
use qpq_store_embedded::{DATABASE_FILE, EmbeddedStore};
use sqlx::{ConnectOptions as _, Connection as _, sqlite::SqliteConnectOptions};

use crate::ops::{MINUTE, START, channel, key};

const EVERYTHING: PageLimit = PageLimit { messages: u32::MAX, bytes: usize::MAX };

/// The maximum number of messages in one step of a sweep.
const STEP: u64 = 256;

/// Opens a store in which a device is absent after an hour.
async fn open(path: &Path) -> EmbeddedStore {
    let delivery = DeliveryLimits {
        max_messages: 1_000,
        sender_share: 1,
        device_absence: 60 * MINUTE,
        ..DeliveryLimits::default()
    };
    let limits = StoreLimits { delivery, ..StoreLimits::default() };
    let store = EmbeddedStore::open(path, limits).await;
    store.unwrap_or_else(|error| panic!("{error}"))
}

/// Registers account 1 with two devices, and sends it messages in channels 0 and 1 alternately.
async fn with_devices(stores: &Stores, messages: u64) {
    let account = NewAccount {
        username: Username::parse("user1").expect("a username"),
        identity: key(1),
        opaque_record: vec![0; 192],
        admission: Admission::Open,
        now: START,
    };
    let registered = stores.accounts.register(account).await.expect("register");
    let Registration::Registered(account) = registered else { panic!("{registered:?}") };
    for n in [1, 2] {
        let device = NewDevice {
            account,
            device: DeviceId::new([n; 16]),
            name: String::new(),
            key: None,
            session: TokenHash::new([0; 32]),
            now: START,
        };
        stores.devices.register(device).await.expect("register");
    }
    let message = |n: u64| NewMessage {
        sender: key(1),
        recipient: key(1),
        channel: channel(u8::from(n % 2 == 1)),
        payload: Bytes::from_static(b"hello"),
        payload_sha256: [0; 32],
        message_id: None,
        now: START,
        ttl: Duration::from_secs(24 * 60 * 60),
    };
    let batch = Batch::new((0..messages).map(message).collect());
    let outcomes = stores.inboxes.enqueue(batch).await.expect("enqueue");
    assert!(outcomes.iter().all(|outcome| matches!(outcome, Enqueued::Accepted(_))));
}

fn reader(device: u8, view: View) -> ReadQuery {
    let device = Some(DeviceId::new([device; 16]));
    ReadQuery { reader: Reader { inbox: key(1), device }, view }
}

async fn ack(stores: &Stores, read: ReadQuery, up_to: u64) -> u32 {
    let ack = Ack { up_to: Some(Seq(up_to)), ..Ack::default() };
    stores.inboxes.ack(read, ack, START).await.expect("ack")
}

async fn count(directory: &Path, statement: &'static str) -> i64 {
    let options = SqliteConnectOptions::new().filename(directory.join(DATABASE_FILE));
    let mut connection = options.connect().await.expect("connect");
    let number = sqlx::query_scalar(statement).fetch_one(&mut connection).await.expect("read");
    connection.close().await.expect("close");
    number
}

#[tokio::test]
async fn only_messages_read_out_of_order_have_rows() {
    let directory = tempfile::tempdir().expect("a directory");
    let store = open(directory.path()).await;
    let stores = store.stores();
    with_devices(&stores, 100).await;
    let rows = || count(directory.path(), "SELECT count(*) FROM device_done");
    let (one, two) = (reader(1, View::All), reader(2, View::All));
    let one_channel = reader(2, View::Channel(ChannelId::DEFAULT));
    assert_eq!(ack(&stores, one, 40).await, 40);
    assert_eq!(rows().await, 0, "in order");
    assert_eq!(ack(&stores, one_channel, 60).await, 30);
    assert_eq!(rows().await, 10, "those that wait for device 1; the first 20 are removed");
    assert_eq!(ack(&stores, two, 50).await, 25);
    assert_eq!(rows().await, 5, "those after the position");
    assert_eq!(ack(&stores, one, 100).await, 60);
    assert_eq!(rows().await, 0);
    assert_eq!(count(directory.path(), "SELECT count(*) FROM message").await, 45);
    assert_eq!(ack(&stores, two, 100).await, 45);
    assert_eq!(count(directory.path(), "SELECT messages FROM inbox").await, 0);
}

#[tokio::test]
async fn an_absent_device_is_moved_in_steps_that_continue_after_a_restart() {
    let directory = tempfile::tempdir().expect("a directory");
    let store = open(directory.path()).await;
    let stores = store.stores();
    with_devices(&stores, 600).await;
    assert_eq!(ack(&stores, reader(1, View::All), 600).await, 600);
    let later = START.plus(61 * MINUTE);
    let first = stores.maintenance.sweep(later).await.expect("sweep");
    assert_eq!((first.rows, &first.moved[..]), (1 + STEP, &[key(1)][..]));
    drop(stores);
    store.close().await;

    let store = open(directory.path()).await;
    let stores = store.stores();
    for rows in [1 + STEP, 1 + 600 - 2 * STEP, 0] {
        let swept = stores.maintenance.sweep(later).await.expect("sweep");
        assert_eq!((swept.rows, swept.moved), (rows, vec![]));
    }
    assert_eq!(count(directory.path(), "SELECT messages FROM inbox").await, 0);
    let refused = stores.inboxes.peek(reader(2, View::All), Seq::ZERO, EVERYTHING, later).await;
    assert!(matches!(refused, Err(ReadError::PositionLost)), "{refused:?}");
}

#[tokio::test]
async fn a_device_that_reads_is_seen_every_ten_minutes() {
    let directory = tempfile::tempdir().expect("a directory");
    let store = open(directory.path()).await;
    let stores = store.stores();
    with_devices(&stores, 0).await;
    let seen = || count(directory.path(), "SELECT last_seen_at FROM device ORDER BY id");
    for (minutes, expected) in [(10, 0), (11, 11), (21, 11), (22, 22)] {
        let now = START.plus(minutes * MINUTE);
        let lease = stores.inboxes.lease(reader(1, View::All), EVERYTHING, now).await;
        assert!(lease.expect("lease").page().envelopes.is_empty());
        let expected = START.plus(expected * MINUTE).0;
        assert_eq!(u64::try_from(seen().await), Ok(expected), "after {minutes} minutes");
    }
}
