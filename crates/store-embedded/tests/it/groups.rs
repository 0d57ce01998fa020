//! Groups beyond the shared rules: wakes, and the time for which an accepted commit is remembered.

use std::{future::Future as _, path::Path, pin::pin, task, time::Duration};

use bytes::Bytes;
use qpq_domain::{AccountId, ChannelId, GroupId, MessageId, StoreLimits, UnixMillis, Username};
use qpq_ports::{
    Admission, Commit, GroupMessage, GroupRecipients, GroupRefusal, NewAccount, NewGroup,
    NewMembers, ReadQuery, Reader, Registration, Stores, View, Wake,
};
use qpq_store_embedded::{DATABASE_FILE, EmbeddedStore};
use sqlx::{ConnectOptions as _, Connection as _, sqlite::SqliteConnectOptions};

use crate::ops::{START, key};

const GROUP: GroupId = GroupId::new([7; 16]);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Opens a store with a group of three members. Returns the store and the account of the first
/// member.
async fn with_group(path: &Path) -> (EmbeddedStore, AccountId) {
    let store = EmbeddedStore::open(path, StoreLimits::default()).await;
    let store = store.unwrap_or_else(|error| panic!("{error}"));
    let stores = store.stores();
    let mut accounts = Vec::new();
    for n in 1..=3 {
        let account = NewAccount {
            username: Username::parse(&format!("user{n}")).expect("a username"),
            identity: key(n),
            opaque_record: vec![0; 192],
            admission: Admission::Open,
            now: START,
        };
        match stores.accounts.register(account).await.expect("register") {
            Registration::Registered(account) => accounts.push(account),
            other => panic!("{other:?}"),
        }
    }
    let group = NewGroup {
        id: GROUP,
        creator: accounts[0],
        members: NewMembers::Listed(vec![key(2), key(3)]),
        name: String::new(),
        description: String::new(),
        now: START,
    };
    stores.groups.create(group).await.expect("create").expect("created");
    (store, accounts[0])
}

/// Creates a commit for the first epoch.
fn commit(sender: AccountId, now: UnixMillis) -> GroupMessage {
    GroupMessage {
        group: GROUP,
        sender,
        sender_key: key(1),
        sender_device: None,
        recipients: GroupRecipients::Others,
        payload: Bytes::from_static(b"commit"),
        payload_sha256: [1; 32],
        message_id: Some(MessageId::new([1; 16])),
        ttl: DAY,
        now,
        commit: Some(Commit { expected_epoch: 0, group_info: None }),
    }
}

fn is_woken(wake: &mut Box<dyn Wake>) -> bool {
    let woken = pin!(wake.woken());
    woken.poll(&mut task::Context::from_waker(task::Waker::noop())).is_ready()
}

#[tokio::test]
async fn a_message_to_a_group_wakes_its_recipients_in_its_channel() {
    let directory = tempfile::tempdir().expect("a directory");
    let (store, sender) = with_group(directory.path()).await;
    let stores = store.stores();
    let subscribe =
        |n, view| stores.wakes.subscribe(&ReadQuery { reader: Reader::single(key(n)), view });
    let group = View::Channel(GROUP.into());
    let mut woken = [subscribe(2, group), subscribe(3, View::All)];
    let mut others = [subscribe(1, View::All), subscribe(2, View::Channel(ChannelId::DEFAULT))];
    stores.groups.send(commit(sender, START)).await.expect("send").expect("accepted");
    assert!(woken.iter_mut().all(is_woken));
    assert!(!others.iter_mut().any(is_woken));
    let repeated = stores.groups.send(commit(sender, START)).await.expect("send");
    assert!(repeated.expect("accepted").is_repeat);
    assert!(!woken.iter_mut().any(is_woken), "a repeat stores nothing");
    drop((woken, others, stores));
    store.close().await;
}

async fn remembered(directory: &Path) -> i64 {
    let options = SqliteConnectOptions::new().filename(directory.join(DATABASE_FILE));
    let mut connection = options.connect().await.expect("connect");
    let rows = sqlx::query_scalar("SELECT count(*) FROM group_commit").fetch_one(&mut connection);
    let rows = rows.await.expect("read");
    connection.close().await.expect("close");
    rows
}

async fn sweep(stores: &Stores, now: UnixMillis) {
    while stores.maintenance.sweep(now).await.expect("sweep").rows > 0 {}
}

#[tokio::test]
async fn a_commit_is_remembered_for_seven_days() {
    let directory = tempfile::tempdir().expect("a directory");
    let (store, sender) = with_group(directory.path()).await;
    let stores = store.stores();
    let send = |now| stores.groups.send(commit(sender, now));
    sweep(&stores, START).await;
    assert_eq!(send(START).await.expect("send").expect("accepted").epoch, 1);
    sweep(&stores, START.plus(30 * DAY)).await;
    assert_eq!(remembered(directory.path()).await, 1, "that clock is not believed");
    for day in 1..7 {
        sweep(&stores, START.plus(DAY * day)).await;
    }
    let almost = START.plus(7 * DAY).minus(Duration::from_millis(1));
    sweep(&stores, almost).await;
    assert!(send(almost).await.expect("send").expect("accepted").is_repeat);
    let over = START.plus(7 * DAY);
    let stale = Err(GroupRefusal::StaleEpoch(1));
    assert_eq!(send(over).await.expect("send"), stale, "whether or not it was swept");
    sweep(&stores, over).await;
    assert_eq!(remembered(directory.path()).await, 0);
    assert_eq!(send(over).await.expect("send"), stale);
    drop(stores);
    store.close().await;
}
