//! `clock accept`: a server whose clock jumped removes expired messages only after the clock was
//! accepted.

use std::time::Duration;

use qpq_domain::{ChannelId, IdentityKey, StoreLimits, UnixMillis, Username};
use qpq_ports::{Admission, Batch, Clock as _, NewAccount, NewMessage, Stores, SystemClock};
use qpq_store_embedded::EmbeddedStore;

use crate::harness::{Workspace, run, run_failing, text};

const DAY: Duration = Duration::from_secs(86_400);

/// Registers an account and sends it a message that expires after a day.
async fn send(stores: &Stores, now: UnixMillis) {
    let (identity, username) = (IdentityKey::new([7; 32]), Username::parse("alice").unwrap());
    let account = NewAccount {
        username,
        identity,
        opaque_record: vec![0; 192],
        admission: Admission::Open,
        now,
    };
    stores.accounts.register(account).await.unwrap();
    let message = NewMessage {
        sender: identity,
        recipient: identity,
        channel: ChannelId::DEFAULT,
        payload: "hello".into(),
        payload_sha256: [0; 32],
        message_id: None,
        now,
        ttl: DAY,
    };
    stores.inboxes.enqueue(Batch::new(vec![message])).await.unwrap();
}

#[tokio::test]
async fn a_jumped_clock_can_be_accepted_while_the_server_runs_or_is_stopped() {
    for stopped in [false, true] {
        let workspace = Workspace::new();
        let dir = workspace.path("data");
        let open = || async { EmbeddedStore::open(&dir, StoreLimits::default()).await.unwrap() };
        let mut store = Some(open().await);
        let stores = store.as_ref().unwrap().stores();
        let (now, before) = (SystemClock.now(), SystemClock.now().minus(100 * DAY));
        stores.maintenance.sweep(before).await.unwrap();
        send(&stores, before).await;
        assert_eq!(stores.maintenance.sweep(now).await.unwrap().rows, 0, "100 days ahead");
        if stopped {
            store.take().unwrap().close().await;
        }
        let stdout = run(&["clock", "accept", "--data-dir", text(&dir)]);
        assert!(stdout.contains("days ahead of the last time"), "{stdout}");
        let store = match store {
            Some(store) => store,
            None => open().await,
        };
        assert_eq!(
            store.stores().maintenance.sweep(now).await.unwrap().rows,
            1,
            "the message has expired"
        );
        store.close().await;
    }
}

#[test]
fn a_directory_without_server_data_is_refused() {
    let workspace = Workspace::new();
    let stderr =
        run_failing(1, &["clock", "accept", "--data-dir", text(&workspace.path("nowhere"))]);
    assert!(stderr.contains("the clock was not accepted"), "{stderr}");
}
