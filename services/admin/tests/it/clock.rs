//! `clock accept`: a server whose clock jumped removes what has expired only once the clock was
//! accepted.

use std::time::Duration;

use qpq_domain::{ChannelId, IdentityKey, UnixMillis, Username};
use qpq_ports::{Batch, Clock as _, NewAccount, NewMessage, Stores, SystemClock};
use qpq_store_embedded::{EmbeddedStore, Limits};

use crate::harness::{Place, refusal, run, text};

const DAY: Duration = Duration::from_secs(86_400);

/// Registers somebody and sends them a message that lives for a day.
async fn send(stores: &Stores, now: UnixMillis) {
    let (identity, username) = (IdentityKey::new([7; 32]), Username::parse("alice").unwrap());
    let account = NewAccount { username, identity, opaque_record: vec![0; 192], now };
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
async fn a_clock_that_jumped_is_accepted_while_the_server_runs_or_is_stopped() {
    for stopped in [false, true] {
        let place = Place::new();
        let dir = place.path("data");
        let open = || async { EmbeddedStore::open(&dir, Limits::default()).await.unwrap() };
        let mut store = Some(open().await);
        let stores = store.as_ref().unwrap().stores();
        let (now, before) = (SystemClock.now(), SystemClock.now().minus(100 * DAY));
        stores.maintenance.sweep(before).await.unwrap();
        send(&stores, before).await;
        assert_eq!(stores.maintenance.sweep(now).await.unwrap(), 0, "100 days ahead");
        if stopped {
            store.take().unwrap().close().await;
        }
        let printed = run(&["clock", "accept", "--data-dir", text(&dir)]);
        assert!(printed.contains("days ahead of the time"), "{printed}");
        let store = match store {
            Some(store) => store,
            None => open().await,
        };
        assert_eq!(store.stores().maintenance.sweep(now).await.unwrap(), 1, "it has expired");
        store.close().await;
    }
}

#[test]
fn a_directory_without_a_server_is_refused() {
    let place = Place::new();
    let said = refusal(1, &["clock", "accept", "--data-dir", text(&place.path("nowhere"))]);
    assert!(said.contains("the clock was not accepted"), "{said}");
}
