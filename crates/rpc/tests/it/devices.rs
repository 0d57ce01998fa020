//! Devices (700 to 702), and their effects in other areas: reads, KeyPackages, look-ups, events.

use std::time::Duration;

use bytes::Bytes;
use ed25519_dalek::{Signer as _, SigningKey};
use qpq_domain::{DeviceId, DeviceKey, Username};
use qpq_mls::{Client as MlsClient, Identity};
use qpq_ports::Clock as _;
use qpq_proto::{
    Status, methods,
    v1::{
        AckRequest, CountKeyPackagesRequest, Device, FetchKeyPackageRequest, FetchRequest,
        FetchWaitRequest, ListDevicesRequest, OpaqueLoginFinishRequest, PeekRequest,
        RegisterDeviceRequest, ResolveIdentityRequest, RevokeDeviceRequest, SubscribeRequest,
        UploadKeyPackageRequest,
    },
};

use crate::{
    harness::{Refused, Server, User},
    user::message,
    waiters::Waiters,
};

fn id(n: u8) -> Bytes {
    vec![n; 16].into()
}

fn device_key(n: u8) -> SigningKey {
    SigningKey::from_bytes(&[n; 32])
}

/// Returns the registration of a device with a key of its own.
fn registration(user: &User, n: u8) -> RegisterDeviceRequest {
    let public = DeviceKey::new(device_key(n).verifying_key().to_bytes());
    let message = public.certification(&user.identity, &DeviceId::new([n; 16]));
    RegisterDeviceRequest {
        device_id: id(n),
        device_name: format!("device {n}"),
        device_key: Bytes::copy_from_slice(public.as_bytes()),
        device_proof: Bytes::copy_from_slice(&user.signing.sign(&message).to_bytes()),
        ..Default::default()
    }
}

impl User {
    async fn register(&self, n: u8) {
        let request = registration(self, n);
        assert!(self.ok::<methods::RegisterDevice>(request).await.success);
    }

    async fn revoke(&self, n: u8) {
        let request = RevokeDeviceRequest { device_id: id(n), ..Default::default() };
        assert!(self.ok::<methods::RevokeDevice>(request).await.success);
    }

    async fn devices(&self) -> Vec<Device> {
        self.ok::<methods::ListDevices>(ListDevicesRequest::default()).await.devices
    }

    /// Logs in as a device on a new connection.
    async fn on(&self, server: &Server, n: u8) -> Self {
        let user = self.elsewhere(server);
        let login = user.client.start_login(&self.name, "password").await.expect("started");
        let finish = OpaqueLoginFinishRequest { device_id: id(n), ..login.finish() };
        let session = user.client.call::<methods::OpaqueLoginFinish>(finish).await;
        Self { token: session.expect("logged in").session_token, ..user }
    }

    /// Returns the texts in the inbox, or the refusal of the read.
    async fn waiting(&self) -> Result<Vec<String>, Refused> {
        let all = PeekRequest { all_channels: true, ..Default::default() };
        let page = self.ask::<methods::Peek>(all).await?.response;
        let text = |data: Bytes| String::from_utf8(data.to_vec()).expect("text");
        Ok(page.payloads.into_iter().map(|envelope| text(envelope.data)).collect())
    }

    async fn ack_all(&self) -> u32 {
        let all = AckRequest { seq_up_to: u64::MAX, all_channels: true, ..Default::default() };
        self.ok::<methods::Ack>(all).await.removed
    }
}

#[tokio::test]
async fn registered_devices_are_listed_and_resolved() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    assert_eq!(alice.devices().await, []);
    alice.register(1).await;
    server.clock.advance(Duration::from_secs(60));
    let keyless =
        RegisterDeviceRequest { device_id: id(2), device_name: "pad".into(), ..Default::default() };
    alice.ok::<methods::RegisterDevice>(keyless).await;
    let [first, second] = &alice.devices().await[..] else { panic!("two devices") };
    let registered = registration(&alice, 1);
    assert_eq!(first.device_id, id(1));
    assert_eq!(first.device_name, "device 1");
    assert_eq!(
        (&first.device_key, &first.device_proof),
        (&registered.device_key, &registered.device_proof)
    );
    assert!(first.current, "the registration has bound the session");
    assert!(!first.has_push_token);
    assert_eq!((second.device_name.as_str(), second.current), ("pad", false));
    assert!(second.device_key.is_empty() && second.device_proof.is_empty());
    assert_eq!(second.registered_at, first.registered_at + 60_000);
    let resolve = ResolveIdentityRequest { identity_key: alice.key(), ..Default::default() };
    let resolved = bob.ok::<methods::ResolveIdentity>(resolve).await;
    assert_eq!(resolved.device_count, 2);
    let [public, _] = &resolved.devices[..] else { panic!("two devices") };
    assert_eq!(public.device_id, id(1));
    assert_eq!(
        (&public.device_key, &public.device_proof),
        (&registered.device_key, &registered.device_proof)
    );
    assert_eq!(public.registered_at, first.registered_at);
}

#[tokio::test]
async fn a_repeat_is_ok_and_another_key_is_refused() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    alice.register(1).await;
    alice.register(1).await;
    let renamed = RegisterDeviceRequest { device_name: "phone".into(), ..registration(&alice, 1) };
    alice.ok::<methods::RegisterDevice>(renamed).await;
    assert_eq!(alice.devices().await[0].device_name, "phone");
    let keyless = RegisterDeviceRequest { device_id: id(1), ..Default::default() };
    let refused = alice.refused::<methods::RegisterDevice>(keyless).await;
    refused.assert(Status::Forbidden, "device.exists");
}

#[tokio::test]
async fn a_device_key_must_be_certified_by_the_identity_key() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    let good = registration(&alice, 1);
    let refuse = async |request, code| {
        let refused = alice.refused::<methods::RegisterDevice>(request).await;
        refused.assert(Status::BadRequest, code);
    };
    let of_bob = registration(&bob, 1).device_proof;
    let of_another = registration(&alice, 2).device_proof;
    for device_proof in [of_bob, of_another, Bytes::new(), vec![7; 64].into(), vec![7; 63].into()] {
        let request = RegisterDeviceRequest { device_proof, ..good.clone() };
        refuse(request, "device.invalid_proof").await;
    }
    // A point of small order, for which one signature is valid for every message, and keys of a
    // wrong length.
    for device_key in [vec![0; 32], vec![7; 31], vec![7; 33], vec![]] {
        let request = RegisterDeviceRequest { device_key: device_key.into(), ..good.clone() };
        refuse(request, "device.invalid_key").await;
    }
    for (device_id, field) in [(Bytes::new(), "device_id"), (vec![1; 15].into(), "device_id")] {
        let request = RegisterDeviceRequest { device_id, ..good.clone() };
        alice.refused::<methods::RegisterDevice>(request).await.assert_field(field);
    }
    let long = RegisterDeviceRequest { device_name: "x".repeat(257), ..good };
    alice.refused::<methods::RegisterDevice>(long).await.assert_field("device_name");
    assert_eq!(alice.devices().await, []);
}

#[tokio::test]
async fn a_device_key_belongs_to_one_device_and_an_account_has_sixteen() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    for n in 1..=16 {
        alice.register(n).await;
    }
    let one_more = alice.refused::<methods::RegisterDevice>(registration(&alice, 17)).await;
    one_more.assert(Status::Forbidden, "device.too_many");
    alice.revoke(16).await;
    let key = DeviceKey::new(device_key(1).verifying_key().to_bytes());
    let message = key.certification(&alice.identity, &DeviceId::new([16; 16]));
    let taken = RegisterDeviceRequest {
        device_key: Bytes::copy_from_slice(key.as_bytes()),
        device_proof: Bytes::copy_from_slice(&alice.signing.sign(&message).to_bytes()),
        ..registration(&alice, 16)
    };
    let refused = alice.refused::<methods::RegisterDevice>(taken).await;
    refused.assert(Status::Forbidden, "device.key_taken");
}

#[tokio::test]
async fn each_device_reads_every_message_once() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    bob.send(&alice, b"before").await;
    alice.register(1).await;
    let phone = alice.on(&server, 2).await;
    phone.register(2).await;
    bob.send(&alice, b"after").await;
    assert_eq!(alice.waiting().await.expect("a reader"), ["before", "after"]);
    assert_eq!(phone.waiting().await.expect("a reader"), ["after"]);
    assert_eq!(alice.ack_all().await, 2);
    assert_eq!(phone.ack_all().await, 1);
    for reader in [&alice, &phone] {
        assert!(reader.waiting().await.expect("a reader").is_empty());
    }
}

#[tokio::test]
async fn a_session_reads_only_as_its_own_device() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let unbound = alice.elsewhere(&server).again().await;
    let bound = alice.on(&server, 2).await;
    // Without registered devices, all sessions read at one position.
    for session in [&unbound, &bound] {
        session.waiting().await.expect("the single reader");
    }
    alice.register(1).await;
    for session in [&unbound, &bound] {
        let refused = session.waiting().await.expect_err("no reader");
        refused.assert(Status::Forbidden, "delivery.device_required");
    }
    let named = |n| PeekRequest { device_id: id(n), ..Default::default() };
    unbound.ok::<methods::Peek>(named(1)).await;
    let unknown = unbound.refused::<methods::Peek>(named(9)).await;
    unknown.assert(Status::Forbidden, "delivery.device_required");
    for n in [2, 9] {
        let other = alice.refused::<methods::Peek>(named(n)).await;
        other.assert(Status::Forbidden, "delivery.other_device");
    }
    for refused in [
        alice
            .refused::<methods::Fetch>(FetchRequest { device_id: id(2), ..Default::default() })
            .await,
        alice
            .refused::<methods::FetchWait>(FetchWaitRequest {
                device_id: id(2),
                ..Default::default()
            })
            .await,
        alice
            .refused::<methods::Ack>(AckRequest {
                device_id: id(2),
                seq_up_to: 1,
                ..Default::default()
            })
            .await,
    ] {
        refused.assert(Status::Forbidden, "delivery.other_device");
    }
}

#[tokio::test]
async fn a_revoked_device_is_logged_out_and_its_waiting_call_ends() {
    let (server, waiters) = Waiters::server().await;
    let alice = server.user("alice").await;
    alice.register(1).await;
    let phone = alice.on(&server, 2).await;
    phone.register(2).await;
    let waiting = {
        let phone = phone.elsewhere(&server);
        tokio::spawn(async move {
            let wait = FetchWaitRequest { timeout_ms: 60_000, ..Default::default() };
            phone.refused::<methods::FetchWait>(wait).await
        })
    };
    waiters.waited(1).await;
    alice.revoke(2).await;
    waiting.await.expect("no panic").assert(Status::Unauthorized, "auth.session_expired");
    let refused = phone.waiting().await.expect_err("no session");
    refused.assert(Status::Unauthorized, "auth.session_expired");
    alice.waiting().await.expect("another device");
    alice.revoke(2).await;
    assert_eq!(alice.devices().await.len(), 1);
}

#[tokio::test]
async fn a_waiting_call_without_a_device_ends_when_a_device_becomes_the_reader() {
    let (server, waiters) = Waiters::server().await;
    let alice = server.user("alice").await;
    let waiting = {
        let unbound = alice.elsewhere(&server).again().await;
        tokio::spawn(async move {
            let wait = FetchWaitRequest { timeout_ms: 60_000, ..Default::default() };
            unbound.refused::<methods::FetchWait>(wait).await
        })
    };
    waiters.waited(1).await;
    alice.register(1).await;
    waiting.await.expect("no panic").assert(Status::Forbidden, "delivery.device_required");
}

/// Returns packages that are signed by the device's key.
fn packages(server: &Server, user: &User, n: u8, count: usize) -> Vec<Bytes> {
    let name = Username::parse(&user.name).expect("a username");
    let mut client = MlsClient::in_memory(Identity::from_seed(&device_key(n).to_bytes()), name);
    let packages = client.key_packages(count, server.clock.now()).expect("packages");
    packages.into_iter().map(Bytes::from).collect()
}

#[tokio::test]
async fn each_device_has_packages_of_its_own_key() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    let upload = |packages: &[Bytes], replace| UploadKeyPackageRequest {
        more_packages: packages.to_vec(),
        replace,
        ..Default::default()
    };
    let count = async |session: &User| {
        let request = CountKeyPackagesRequest::default();
        session.ok::<methods::CountKeyPackages>(request).await.available
    };
    let of_first = packages(&server, &alice, 1, 2);
    let refused = alice.refused::<methods::UploadKeyPackage>(upload(&of_first, false)).await;
    refused.assert(Status::BadRequest, "keys.invalid_package");
    alice.register(1).await;
    let phone = alice.on(&server, 2).await;
    phone.register(2).await;
    let stored = alice.ok::<methods::UploadKeyPackage>(upload(&of_first, false)).await;
    assert_eq!(stored.available, 2);
    let of_second = packages(&server, &alice, 2, 1);
    phone.ok::<methods::UploadKeyPackage>(upload(&of_second, false)).await;
    assert_eq!((count(&alice).await, count(&phone).await), (2, 1));
    let of_both = || FetchKeyPackageRequest {
        identity_key: alice.key(),
        all_devices: true,
        ..Default::default()
    };
    let taken = bob.ok::<methods::FetchKeyPackage>(of_both()).await;
    assert!(taken.package.is_empty());
    let taken: Vec<_> =
        taken.packages.into_iter().map(|entry| (entry.device_id, entry.package)).collect();
    assert_eq!(taken, [(id(1), of_first[0].clone()), (id(2), of_second[0].clone())]);
    let taken = bob.ok::<methods::FetchKeyPackage>(of_both()).await.packages;
    assert_eq!(taken[0].package, of_first[1]);
    assert!(taken[1].package.is_empty(), "an entry for a device without a package");
    let replacement = packages(&server, &alice, 2, 3);
    let stored = phone.ok::<methods::UploadKeyPackage>(upload(&replacement, true)).await;
    assert_eq!(stored.available, 3);
    alice.revoke(2).await;
    let one = FetchKeyPackageRequest { identity_key: alice.key(), ..Default::default() };
    assert!(bob.ok::<methods::FetchKeyPackage>(one).await.package.is_empty());
}

#[tokio::test]
async fn all_devices_of_an_account_without_devices_returns_its_own_package() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let name = Username::parse(&alice.name).expect("a username");
    let mut client = MlsClient::in_memory(Identity::from_seed(&alice.signing.to_bytes()), name);
    let package: Bytes =
        client.key_packages(1, server.clock.now()).expect("a package").remove(0).into();
    let upload = UploadKeyPackageRequest { package: package.clone(), ..Default::default() };
    alice.ok::<methods::UploadKeyPackage>(upload).await;
    let all = FetchKeyPackageRequest {
        identity_key: alice.key(),
        all_devices: true,
        ..Default::default()
    };
    let taken = alice.ok::<methods::FetchKeyPackage>(all).await;
    assert_eq!((taken.package, taken.packages), (package, vec![]));
}

#[tokio::test]
async fn a_device_that_lost_its_position_is_informed_once() {
    let server = Server::with(|config| {
        config.delivery.max_messages = 4;
        config.delivery.sender_share = 1;
        config.delivery.default_ttl = Duration::from_secs(80 * 86_400);
    })
    .await;
    let alice = server.user("alice").await;
    alice.register(1).await;
    for _ in 0..3 {
        alice.ok::<methods::Enqueue>(message(&alice, b"hello")).await;
    }
    server.clock.advance(Duration::from_secs(31 * 86_400));
    let alice = alice.on(&server, 1).await;
    // The store must accept the jump of the clock before it removes old messages.
    server.believe_clock().await;
    while server.rpc.app().stores.maintenance.sweep(server.clock.now()).await.expect("sweep").rows
        > 0
    {}
    alice.ok::<methods::Enqueue>(message(&alice, b"new")).await;
    let ack = AckRequest { seq_up_to: 1, ..Default::default() };
    let refused = alice.refused::<methods::Ack>(ack).await;
    refused.assert(Status::Forbidden, "delivery.position_lost");
    assert_eq!(alice.waiting().await.expect("once"), ["new"]);
}

#[tokio::test]
async fn a_subscription_needs_no_device_until_it_reads() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let unbound = alice.elsewhere(&server).again().await;
    alice.register(1).await;
    let subscribed = unbound.ok::<methods::Subscribe>(SubscribeRequest::default()).await;
    assert!(subscribed.success);
}
