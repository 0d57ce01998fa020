//! Rate limits: the budgets of calls, and the consequences when counting fails.

use std::{
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use qpq_domain::UnixMillis;
use qpq_ports::{Bucket, LimitKey, RateLimiter, StoreError, StoreResult, Verdict};
use qpq_proto::{
    LimitClass, LimitSubject, Status,
    methods::{
        BatchEnqueue, Enqueue, FetchKeyPackage, Health, OpaqueLoginFinish, Peek, ResolveUser,
        UploadBlob,
    },
    v1::{
        BatchEnqueueRequest, EnqueueRequest, FetchKeyPackageRequest, HealthRequest, PeekRequest,
        ResolveUserRequest, UploadBlobRequest,
    },
};
use qpq_rpc::{Config, RateLimits};

use crate::harness::{Client, Refused, Server, code, new_identity};

/// Enables the limits with one budget of two calls, refilled by one call each second.
fn tight(class: LimitClass, per: LimitSubject) -> impl FnOnce(&mut Config) {
    let two = Bucket { burst: 2, per_second: 1.0 };
    move |config| {
        config.limits = RateLimits { enabled: true, overrides: [((class, per), two)].into() }
    }
}

fn limited() -> (Status, String) {
    (Status::RateLimited, "rpc.rate_limited".into())
}

async fn health(client: &Client) -> Result<(), Refused> {
    client.call::<Health>(HealthRequest {}).await.map(drop)
}

async fn resolve(client: &Client) -> Result<(), Refused> {
    let request = ResolveUserRequest { username: "alice".into(), ..Default::default() };
    client.call::<ResolveUser>(request).await.map(drop)
}

fn at(ip: &str) -> SocketAddr {
    (ip.parse::<IpAddr>().expect("an address"), 4433).into()
}

#[tokio::test]
async fn an_address_has_a_budget_and_a_refusal_contains_the_time_to_wait() {
    let server = Server::with(tight(LimitClass::Health, LimitSubject::Ip)).await;
    let client = server.connect_from(at("192.0.2.1"));
    for _ in 0..2 {
        health(&client).await.expect("within the budget");
    }
    let refused = health(&server.connect_from(at("192.0.2.1")))
        .await
        .expect_err("another connection, same address");
    assert_eq!((refused.status, refused.code.as_str()), (Status::RateLimited, "rpc.rate_limited"));
    let wait = refused.retry_after.expect("always set");
    assert!(wait > Duration::ZERO && wait <= Duration::from_secs(1), "{wait:?}");
    health(&server.connect_from(at("192.0.2.2"))).await.expect("another address");
    server.clock.advance(wait);
    health(&client).await.expect("after the wait");
    assert_eq!(code(health(&client).await), limited());
}

#[tokio::test]
async fn ipv6_addresses_count_by_their_64_bit_prefix_and_mapped_ones_as_ipv4() {
    let server = Server::with(tight(LimitClass::Health, LimitSubject::Ip)).await;
    for ip in ["2001:db8:1:2::1", "2001:db8:1:2:ffff::"] {
        health(&server.connect_from(at(ip))).await.expect("within the budget");
    }
    assert_eq!(code(health(&server.connect_from(at("2001:db8:1:2:3:4:5:6"))).await), limited());
    health(&server.connect_from(at("2001:db8:1:3::1"))).await.expect("the next prefix");

    let mapped = Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, 0xc000, 0x0201);
    health(&server.connect_from((mapped, 1).into())).await.expect("within the budget");
    health(&server.connect_from(at("192.0.2.1"))).await.expect("within the budget");
    assert_eq!(code(health(&server.connect_from((mapped, 2).into())).await), limited());
}

#[tokio::test]
async fn a_username_has_one_budget_for_all_addresses_whether_or_not_it_exists() {
    let server = Server::with(tight(LimitClass::Login, LimitSubject::Username)).await;
    server.connect().register("alice", "password", &new_identity()).await.expect("a free name");
    for name in ["alice", "nobody"] {
        let mut waits = Vec::new();
        for (n, spelled) in
            [name.to_owned(), name.to_uppercase(), name.to_owned()].iter().enumerate()
        {
            let client = server.connect_from(at(&format!("192.0.2.{n}")));
            waits.push(
                client
                    .start_login(spelled, "guess")
                    .await
                    .err()
                    .and_then(|refused| refused.retry_after),
            );
        }
        assert_eq!(waits[..2], [None, None], "{name}");
        assert!(waits[2].is_some(), "{name}");
    }
    server.connect().start_login("bob", "guess").await.expect("another name");
}

#[tokio::test]
async fn a_started_login_can_finish_after_others_exhaust_the_names_budget() {
    let server = Server::with(tight(LimitClass::Login, LimitSubject::Username)).await;
    let alice = server.connect();
    alice.register("alice", "password", &new_identity()).await.expect("a free name");
    let started = alice.start_login("alice", "password").await.expect("within the budget");
    let mallory = server.connect();
    mallory.start_login("alice", "guess").await.expect("within the budget");
    assert_eq!(code(mallory.start_login("alice", "guess").await.map(|_| ())), limited());
    alice.call::<OpaqueLoginFinish>(started.finish()).await.expect("her login");
}

#[tokio::test]
async fn registrations_have_a_budget_by_name_too() {
    let server = Server::with(tight(LimitClass::Register, LimitSubject::Username)).await;
    let client = server.connect();
    client.register("alice", "password", &new_identity()).await.expect("two calls");
    assert_eq!(code(client.upload("Alice", "password").await), limited());
    client.upload("bob", "password").await.expect("another name");
}

#[tokio::test]
async fn an_account_has_one_budget_over_all_its_connections() {
    let server = Server::with(tight(LimitClass::Lookup, LimitSubject::Account)).await;
    let alice = server.user("alice").await;
    let bob = server.user("bob").await;
    let phone = server.connect();
    phone.log_in("alice", "password").await.expect("the right password");
    resolve(&alice.client).await.expect("within the budget");
    resolve(&phone).await.expect("within the budget");
    assert_eq!(code(resolve(&alice.client).await), limited());
    assert_eq!(code(resolve(&phone).await), limited());
    resolve(&bob.client).await.expect("another account");
}

/// Enables the limits with one budget of `burst` tokens, refilled by one token each second.
fn budget(class: LimitClass, per: LimitSubject, burst: u32) -> impl FnOnce(&mut Config) {
    let bucket = Bucket { burst, per_second: 1.0 };
    move |config| {
        config.limits = RateLimits { enabled: true, overrides: [((class, per), bucket)].into() }
    }
}

fn batch(count: usize, payload: &'static [u8]) -> BatchEnqueueRequest {
    let message = EnqueueRequest {
        recipient_key: new_identity().as_bytes().to_vec().into(),
        payload: payload.into(),
        ..Default::default()
    };
    BatchEnqueueRequest { messages: vec![message; count], ..Default::default() }
}

#[tokio::test]
async fn the_cost_of_a_batch_is_the_number_of_its_messages() {
    let server = Server::with(|config| {
        config.limits = RateLimits { enabled: true, ..RateLimits::default() }
    })
    .await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    for _ in 0..2 {
        alice.ok::<BatchEnqueue>(batch(1_000, b"")).await;
    }
    let refused = alice.refused::<BatchEnqueue>(batch(1_000, b"")).await;
    refused.assert(Status::RateLimited, "rpc.rate_limited");
    assert!(refused.retry_after.is_some_and(|wait| wait > Duration::ZERO));
    alice.refused::<Enqueue>(batch(1, b"").messages.remove(0)).await;
    bob.ok::<BatchEnqueue>(batch(1_000, b"")).await;
    server.clock.advance(Duration::from_secs(10));
    alice.ok::<BatchEnqueue>(batch(1_000, b"")).await;
}

#[tokio::test]
async fn a_batch_above_the_burst_needs_a_full_budget_and_leaves_a_debt() {
    let server = Server::with(budget(LimitClass::Send, LimitSubject::Account, 100)).await;
    let alice = server.user("alice").await;
    let one = batch(1, b"").messages.remove(0);
    alice.ok::<BatchEnqueue>(batch(250, b"")).await;
    alice.refused::<BatchEnqueue>(batch(1, b"")).await;
    // 100 are paid. The next call needs a full budget and pays the other 150 and itself.
    server.clock.advance(Duration::from_secs(99));
    alice.refused::<Enqueue>(one.clone()).await.assert(Status::RateLimited, "rpc.rate_limited");
    server.clock.advance(Duration::from_secs(1));
    alice
        .refused::<Enqueue>(one.clone())
        .await
        .assert(Status::NotFound, "delivery.no_such_recipient");
    server.clock.advance(Duration::from_secs(51));
    alice.refused::<Enqueue>(one.clone()).await.assert(Status::RateLimited, "rpc.rate_limited");
    server.clock.advance(Duration::from_secs(1));
    alice.refused::<Enqueue>(one).await.assert(Status::NotFound, "delivery.no_such_recipient");
}

#[tokio::test]
async fn a_batch_costs_its_address_as_much_as_single_messages() {
    let server = Server::with(budget(LimitClass::Send, LimitSubject::Ip, 100)).await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    alice.ok::<BatchEnqueue>(batch(60, b"")).await;
    bob.refused::<BatchEnqueue>(batch(60, b"")).await;
    bob.ok::<BatchEnqueue>(batch(30, b"")).await;
}

#[tokio::test]
async fn calls_refused_by_the_accounts_budget_cost_its_address_nothing() {
    let two = Bucket { burst: 2, per_second: 1.0 };
    let three = Bucket { burst: 3, per_second: 1.0 };
    let server = Server::with(|config| {
        let overrides = [
            ((LimitClass::Lookup, LimitSubject::Account), two),
            ((LimitClass::Lookup, LimitSubject::Ip), three),
        ];
        config.limits = RateLimits { enabled: true, overrides: overrides.into() };
    })
    .await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    for _ in 0..2 {
        resolve(&alice.client).await.expect("within the budget");
    }
    for _ in 0..5 {
        assert_eq!(code(resolve(&alice.client).await), limited());
    }
    resolve(&bob.client).await.expect("the address has one left");
    assert_eq!(code(resolve(&bob.client).await), limited());
}

#[tokio::test]
async fn uploads_of_blobs_have_a_budget_of_bytes() {
    let server = Server::with(budget(LimitClass::BlobBytes, LimitSubject::Account, 200_000)).await;
    let alice = server.user("alice").await;
    let chunk = |n: u8, bytes: Vec<u8>| UploadBlobRequest {
        blob_hash: vec![n; 32].into(),
        chunk: bytes.into(),
        total_size: 1 << 20,
        ..Default::default()
    };
    alice.ok::<UploadBlob>(chunk(1, vec![0; 100_000])).await;
    // A small chunk counts as 64 KiB.
    alice.ok::<UploadBlob>(chunk(2, vec![0])).await;
    let refused = alice.refused::<UploadBlob>(chunk(3, vec![0])).await;
    refused.assert(Status::RateLimited, "rpc.rate_limited");
    // A question about the state has no bytes.
    alice.ok::<UploadBlob>(chunk(1, Vec::new())).await;
}

#[tokio::test]
async fn bytes_have_a_separate_budget_that_counts_a_fan_out_for_each_recipient() {
    let server = Server::with(budget(LimitClass::SendBytes, LimitSubject::Account, 100_000)).await;
    let alice = server.user("alice").await;
    static PAYLOAD: [u8; 20_000] = [0; 20_000];
    let fan_out = |count: u8| BatchEnqueueRequest {
        recipient_keys: (0..count).map(|n| vec![n; 32].into()).collect(),
        payload: Bytes::from_static(&PAYLOAD),
        ..Default::default()
    };
    alice.ok::<BatchEnqueue>(fan_out(3)).await;
    alice.refused::<BatchEnqueue>(fan_out(3)).await;
    // No account has this key, but the bytes are counted first.
    let one = |payload: &'static [u8]| batch(1, payload).messages.remove(0);
    alice
        .refused::<Enqueue>(one(&PAYLOAD))
        .await
        .assert(Status::NotFound, "delivery.no_such_recipient");
    alice
        .refused::<Enqueue>(one(&PAYLOAD))
        .await
        .assert(Status::NotFound, "delivery.no_such_recipient");
    alice.refused::<Enqueue>(one(&PAYLOAD)).await.assert(Status::RateLimited, "rpc.rate_limited");
    // Small messages are counted by their number alone.
    let refused = alice.refused::<Enqueue>(one(&PAYLOAD[..16_000])).await;
    refused.assert(Status::NotFound, "delivery.no_such_recipient");
}

#[tokio::test]
async fn the_cost_of_a_read_depends_on_its_page_and_is_paid_by_the_next_call() {
    let server = Server::with(budget(LimitClass::Receive, LimitSubject::Account, 22)).await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    let to_alice = EnqueueRequest { recipient_key: alice.key(), ..Default::default() };
    let filled = BatchEnqueueRequest { messages: vec![to_alice; 1_000], ..Default::default() };
    alice.ok::<BatchEnqueue>(filled.clone()).await;
    alice.ok::<BatchEnqueue>(filled).await;
    // The first read takes 1 from the budget of 22, the second 11: itself and the page of the
    // first. The third would take 11 of the 10 that are left.
    for _ in 0..2 {
        let page = alice.ok::<Peek>(PeekRequest::default()).await;
        assert_eq!((page.payloads.len(), page.more), (1_000, true));
    }
    let refused = alice.refused::<Peek>(PeekRequest::default()).await;
    refused.assert(Status::RateLimited, "rpc.rate_limited");
    assert_eq!(refused.retry_after, Some(Duration::from_secs(1)));
    alice.refused::<Peek>(PeekRequest { limit: 1, ..Default::default() }).await;
    bob.ok::<Peek>(PeekRequest::default()).await;
    server.clock.advance(Duration::from_secs(1));
    alice.ok::<Peek>(PeekRequest { limit: 1, ..Default::default() }).await;
    server.clock.advance(Duration::from_secs(1));
    alice.ok::<Peek>(PeekRequest { limit: 1, ..Default::default() }).await;
}

#[tokio::test]
async fn a_target_has_a_separate_budget_for_each_fetcher() {
    let server = Server::with(tight(LimitClass::KeyFetch, LimitSubject::FetcherAndTarget)).await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    let fetch = async |client: &Client, target: &[u8]| {
        let identity_key = target.to_vec().into();
        client
            .call::<FetchKeyPackage>(FetchKeyPackageRequest { identity_key, ..Default::default() })
            .await
    };
    let (one, two) = (new_identity(), new_identity());
    for _ in 0..2 {
        fetch(&alice.client, one.as_bytes()).await.expect("within the budget");
    }
    assert_eq!(code(fetch(&alice.client, one.as_bytes()).await), limited());
    fetch(&alice.client, two.as_bytes()).await.expect("another target");
    fetch(&bob.client, one.as_bytes()).await.expect("another fetcher");
}

#[tokio::test]
async fn calls_beyond_a_budget_have_no_effect() {
    let server = Server::with(tight(LimitClass::Register, LimitSubject::Ip)).await;
    let client = server.connect();
    let identity = new_identity();
    client.register("alice", "password", &identity).await.expect("two calls");
    assert_eq!(code(client.upload("bob", "password").await), limited());
    let client = server.connect_from(at("192.0.2.9"));
    client.register("bob", "password", &new_identity()).await.expect("still free");
}

#[tokio::test]
async fn disabled_limits_allow_every_call() {
    let off = |config: &mut Config| {
        let none = Bucket { burst: 1, per_second: 0.001 };
        let overrides = [((LimitClass::Health, LimitSubject::Ip), none)].into();
        config.limits = RateLimits { enabled: false, overrides };
    };
    let server = Server::with(off).await;
    let client = server.connect();
    for _ in 0..1_000 {
        health(&client).await.expect("no limit");
    }
}

/// A limiter that is unreachable while `unreachable` is set.
struct Unreachable {
    inner: Arc<dyn RateLimiter>,
    unreachable: Arc<AtomicBool>,
}

#[async_trait]
impl RateLimiter for Unreachable {
    async fn take(
        &self,
        key: LimitKey,
        bucket: Bucket,
        cost: u32,
        now: UnixMillis,
    ) -> StoreResult<Verdict> {
        if self.unreachable.load(Ordering::SeqCst) {
            return Err(StoreError::unavailable("no limiter"));
        }
        self.inner.take(key, bucket, cost, now).await
    }

    async fn remember(
        &self,
        key: LimitKey,
        lifetime: Duration,
        now: UnixMillis,
    ) -> StoreResult<()> {
        if self.unreachable.load(Ordering::SeqCst) {
            return Err(StoreError::unavailable("no limiter"));
        }
        self.inner.remember(key, lifetime, now).await
    }

    async fn remembers(&self, key: LimitKey, now: UnixMillis) -> StoreResult<bool> {
        if self.unreachable.load(Ordering::SeqCst) {
            return Err(StoreError::unavailable("no limiter"));
        }
        self.inner.remembers(key, now).await
    }
}

#[tokio::test]
async fn without_a_limiter_logins_and_registrations_fail_and_other_calls_succeed() {
    let unreachable = Arc::new(AtomicBool::new(false));
    let switch = Arc::clone(&unreachable);
    let server = Server::with_stores(
        |config| config.limits = RateLimits::default(),
        |mut stores| {
            stores.limiter = Arc::new(Unreachable { inner: stores.limiter, unreachable: switch });
            stores
        },
    )
    .await;
    let alice = server.user("alice").await;
    unreachable.store(true, Ordering::SeqCst);
    let client = &alice.client;
    health(client).await.expect("open");
    resolve(client).await.expect("open");
    let recipient_key = alice.identity.as_bytes().to_vec().into();
    client
        .call::<Enqueue>(EnqueueRequest { recipient_key, ..Default::default() })
        .await
        .expect("messages are still accepted");
    for refused in [
        client.upload("bob", "password").await.err(),
        client.start_login("alice", "password").await.err(),
    ] {
        let refused = refused.expect("closed");
        assert_eq!(
            (refused.status, refused.code.as_str()),
            (Status::Unavailable, "rpc.unavailable")
        );
        assert!(refused.retry_after.is_some());
    }
}
