//! Recovery bundles (750 to 752).

use std::time::Duration;

use bytes::Bytes;
use qpq_proto::{
    Status,
    methods::{DeleteRecoveryBundle, FetchRecoveryBundle, StoreRecoveryBundle},
    v1::{
        DeleteRecoveryBundleRequest, FetchRecoveryBundleRequest, FetchRecoveryBundleResponse,
        StoreRecoveryBundleRequest,
    },
};
use qpq_rpc::{AtRestKeys, Config};

use crate::harness::{Client, Refused, START, Server, code};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

async fn store(client: &Client, bundle: &[u8], expected_version: u64) -> Result<u64, Refused> {
    let bundle = Bytes::copy_from_slice(bundle);
    let request = StoreRecoveryBundleRequest { bundle, expected_version, ..Default::default() };
    let stored = client.call::<StoreRecoveryBundle>(request).await?;
    assert!(stored.success);
    Ok(stored.version)
}

async fn fetch(client: &Client) -> Result<FetchRecoveryBundleResponse, Refused> {
    client.call::<FetchRecoveryBundle>(FetchRecoveryBundleRequest::default()).await
}

async fn delete(client: &Client) -> Result<bool, Refused> {
    let request = DeleteRecoveryBundleRequest::default();
    client.call::<DeleteRecoveryBundle>(request).await.map(|answer| answer.success)
}

fn stale() -> (Status, String) {
    (Status::Forbidden, "recovery.stale_version".into())
}

fn not_fresh() -> (Status, String) {
    (Status::Unauthorized, "auth.fresh_login_required".into())
}

#[tokio::test]
async fn the_owner_fetches_the_bundle_as_stored_and_no_other_account_does() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    let none = fetch(&alice.client).await.expect("an answer");
    assert_eq!(none, FetchRecoveryBundleResponse::default());
    let largest = vec![7; 64 << 10];
    for (version, bundle) in [(1, &b"x"[..]), (2, &largest)] {
        server.clock.advance(Duration::from_secs(1));
        assert_eq!(store(&alice.client, bundle, 0).await, Ok(version));
        let fetched = fetch(&alice.client).await.expect("a bundle");
        assert_eq!((&fetched.bundle[..], fetched.version), (bundle, version));
        assert_eq!(fetched.stored_at, START.plus(Duration::from_secs(version)).0);
    }
    let none = fetch(&bob.client).await.expect("an answer");
    assert_eq!(none, FetchRecoveryBundleResponse::default());
}

#[tokio::test]
async fn an_empty_and_a_large_bundle_are_refused() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let refused = store(&alice.client, b"", 0).await.expect_err("empty");
    assert_eq!((refused.code.as_str(), refused.field.as_str()), ("recovery.empty", "bundle"));
    let refused = store(&alice.client, &[7; (64 << 10) + 1], 0).await.expect_err("too large");
    assert_eq!((refused.code.as_str(), refused.field.as_str()), ("recovery.too_large", "bundle"));
    assert_eq!(fetch(&alice.client).await.expect("an answer").version, 0);
}

#[tokio::test]
async fn a_bundle_replaces_only_the_expected_version() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    assert_eq!(code(store(&alice.client, b"one", 1).await), stale(), "no bundle has version 1");
    assert_eq!(store(&alice.client, b"one", 0).await, Ok(1));
    assert_eq!(store(&alice.client, b"two", 1).await, Ok(2));
    assert_eq!(store(&alice.client, b"two", 1).await, Ok(2), "a repeat");
    for expected in [1, 3, u64::MAX] {
        assert_eq!(code(store(&alice.client, b"three", expected).await), stale(), "{expected}");
    }
    assert_eq!(store(&alice.client, b"three", 0).await, Ok(3), "unconditional");
    assert_eq!(fetch(&alice.client).await.expect("a bundle").bundle, &b"three"[..]);
}

#[tokio::test]
async fn a_deleted_bundle_is_gone_and_is_not_replaced_by_a_client_that_did_not_see_that() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    assert_eq!(store(&alice.client, b"one", 0).await, Ok(1));
    for _ in 0..2 {
        assert_eq!(delete(&alice.client).await, Ok(true));
        let none = fetch(&alice.client).await.expect("an answer");
        assert_eq!((none.bundle.len(), none.version), (0, 2));
    }
    assert_eq!(code(store(&alice.client, b"one", 1).await), stale());
    assert_eq!(store(&alice.client, b"two", 2).await, Ok(3));
}

#[tokio::test]
async fn ten_fetches_a_day_are_allowed_for_all_sessions_together() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    for user in [&alice, &bob] {
        store(&user.client, b"bundle", 0).await.expect("stored");
    }
    let phone = server.connect();
    phone.log_in("alice", "password").await.expect("the right password");
    for n in 0..10 {
        let client = if n % 2 == 0 { &alice.client } else { &phone };
        fetch(client).await.expect("within the limit");
    }
    let restarted = server.reconfigured(Config::default());
    restarted.log_in("alice", "password").await.expect("the right password");
    for client in [&alice.client, &phone, &restarted] {
        let refused = fetch(client).await.expect_err("used up");
        assert_eq!(refused.status, Status::RateLimited);
        assert_eq!(refused.code, "recovery.fetch_limit");
        assert_eq!(refused.retry_after, Some(DAY));
    }
    fetch(&bob.client).await.expect("another account");
    server.clock.advance(DAY);
    phone.log_in("alice", "password").await.expect("the right password");
    fetch(&phone).await.expect("the next day");
}

#[tokio::test]
async fn fetching_and_deleting_need_a_login_within_five_minutes_and_storing_a_session() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    server.clock.advance(Duration::from_secs(5 * 60) + Duration::from_millis(1));
    assert_eq!(store(&alice.client, b"one", 0).await, Ok(1));
    assert_eq!(code(fetch(&alice.client).await), not_fresh());
    assert_eq!(code(delete(&alice.client).await), not_fresh());
    let stranger = server.connect();
    let required = (Status::Unauthorized, "auth.session_required".to_owned());
    assert_eq!(code(store(&stranger, b"one", 0).await), required);
    assert_eq!(code(fetch(&stranger).await), required);
    assert_eq!(code(delete(&stranger).await), required);
}

#[tokio::test]
async fn the_store_contains_no_bundle_in_plain_form_and_swapped_rows_do_not_open() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    let bundle = b"a bundle that is easily found in the database";
    for user in [&alice, &bob] {
        store(&user.client, bundle, 0).await.expect("stored");
    }
    let stores = &server.rpc.app().stores;
    let account = async |user: &crate::harness::User| {
        let found = stores.accounts.by_identity(&user.identity).await.expect("read");
        found.expect("there").id
    };
    let (alices, bobs) = (account(&alice).await, account(&bob).await);
    let sealed = stores.recovery_bundles.find(alices).await.expect("read").bundle.expect("there");
    assert!(!sealed.sealed.windows(bundle.len()).any(|window| window == bundle));
    let key = AtRestKeys::parse(&server.at_rest_keys).expect("valid").ids().next();
    let swapped = qpq_ports::NewBundle {
        account: bobs,
        replaces: 1,
        sealed: sealed.sealed,
        key: key.expect("two keys"),
        now: START,
    };
    stores.recovery_bundles.put(swapped).await.expect("stored");
    let refused = fetch(&bob.client).await.expect_err("alice's bundle in bob's row");
    assert_eq!((refused.status, refused.code.as_str()), (Status::Internal, "rpc.internal"));
    fetch(&alice.client).await.expect("an unchanged row");
}
