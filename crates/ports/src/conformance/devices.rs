//! Rules of [`crate::Devices`].

use std::{collections::BTreeSet, sync::Arc};

use qpq_domain::{DeviceKey, MAX_DEVICES, TokenHash};
use tokio::task::JoinSet;

use super::{
    Factory,
    bench::{Bench, MINUTE, NOW, RegisteredAccount, device, device_id},
};
use crate::{
    CertifiedKey, Device, DeviceRegistration as Registered, DeviceRevocation, NewDevice,
    NewSession, Session,
};

impl Bench {
    async fn register(&self, device: NewDevice) -> Registered {
        self.stores.devices.register(device).await.expect("register")
    }

    async fn devices(&self, owner: RegisteredAccount) -> Vec<Device> {
        self.stores.devices.list(owner.account).await.expect("list")
    }

    async fn session(&self, owner: RegisteredAccount, n: u8, device: Option<u8>) -> TokenHash {
        let session = Session {
            account: owner.account,
            identity: owner.identity,
            device: device.map(device_id),
            authenticated_at: NOW,
            last_used_at: NOW,
            expires_at: NOW.plus(60 * MINUTE),
        };
        let token = TokenHash::new([n; 32]);
        self.stores.sessions.create(NewSession { token, session }).await.expect("create");
        token
    }

    /// Returns the device of a session, on which `find` and `confirm` must agree; `None` if the
    /// session has ended.
    async fn bound(&self, token: TokenHash) -> Option<Option<u8>> {
        let sessions = &self.stores.sessions;
        let found = sessions.find(&token).await.expect("find");
        assert_eq!(found, sessions.confirm(&token).await.expect("confirm"));
        found.map(|session| session.device.map(|device| device.as_bytes()[0]))
    }
}

pub async fn a_device_is_listed_as_it_was_registered(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    let (alice, bob) = (bench.account(1).await, bench.account(2).await);
    assert_eq!(bench.devices(alice).await, []);
    let later = NOW.plus(MINUTE);
    assert_eq!(bench.register(device(alice, 2)).await, Registered::Registered);
    let second = NewDevice { key: None, now: later, ..device(alice, 1) };
    assert_eq!(bench.register(second).await, Registered::Registered);
    // Another account may have a device with the same id.
    assert_eq!(bench.register(device(bob, 2)).await, Registered::Registered);
    bench.crash().await;
    let first = device(alice, 2);
    let expected = [
        Device {
            id: device_id(2),
            name: "device 2".into(),
            key: first.key,
            registered_at: NOW,
            last_seen_at: NOW,
        },
        Device {
            id: device_id(1),
            name: "device 1".into(),
            key: None,
            registered_at: later,
            last_seen_at: later,
        },
    ];
    assert_eq!(bench.devices(alice).await, expected);
    assert_eq!(bench.devices(bob).await.len(), 1);
}

pub async fn a_repeat_changes_nothing_but_the_name(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    bench.register(device(alice, 1)).await;
    let before = bench.devices(alice).await;
    let repeat = NewDevice { now: NOW.plus(MINUTE), ..device(alice, 1) };
    assert_eq!(bench.register(repeat.clone()).await, Registered::Repeated);
    assert_eq!(bench.devices(alice).await, before);
    let renamed = NewDevice { name: "phone".into(), ..repeat };
    assert_eq!(bench.register(renamed).await, Registered::Repeated);
    bench.crash().await;
    let [now] = &bench.devices(alice).await[..] else { panic!("one device") };
    assert_eq!(now, &Device { name: "phone".into(), ..before[0].clone() });
}

pub async fn another_key_of_a_registered_device_is_refused(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    bench.register(device(alice, 1)).await;
    let other = CertifiedKey { key: DeviceKey::new([99; 32]), proof: [1; 64] };
    for key in [None, Some(other)] {
        let changed = NewDevice { key, name: "phone".into(), ..device(alice, 1) };
        assert_eq!(bench.register(changed).await, Registered::OtherKey);
    }
    assert_eq!(bench.devices(alice).await[0].name, "device 1");
}

pub async fn a_key_belongs_to_one_device_permanently(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    let (alice, bob) = (bench.account(1).await, bench.account(2).await);
    bench.register(device(alice, 1)).await;
    let key = device(alice, 1).key;
    let by_bob = NewDevice { key, ..device(bob, 1) };
    let by_another = NewDevice { key, ..device(alice, 2) };
    assert_eq!(bench.register(by_bob.clone()).await, Registered::KeyTaken);
    assert_eq!(bench.register(by_another.clone()).await, Registered::KeyTaken);
    bench.revoke(alice, 1).await;
    bench.crash().await;
    assert_eq!(bench.register(by_bob).await, Registered::KeyTaken);
    assert_eq!(bench.register(by_another).await, Registered::KeyTaken);
    assert_eq!(bench.devices(alice).await, []);
    assert_eq!(bench.register(device(alice, 1)).await, Registered::Registered, "its own");
}

pub async fn an_identity_key_is_refused_as_a_device_key(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let (alice, bob) = (bench.account(1).await, bench.account(2).await);
    for identity in [alice.identity, bob.identity] {
        let key = DeviceKey::new(*identity.as_bytes());
        let key = Some(CertifiedKey { key, proof: [1; 64] });
        let device = NewDevice { key, ..device(alice, 1) };
        assert_eq!(bench.register(device).await, Registered::KeyTaken);
    }
}

pub async fn of_concurrent_registrations_as_many_as_fit_succeed(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    let mut tasks = JoinSet::new();
    for n in 1..=2 * u8::try_from(MAX_DEVICES).expect("few") {
        let devices = Arc::clone(&bench.stores.devices);
        tasks.spawn(async move { devices.register(device(alice, n)).await.expect("register") });
    }
    let outcomes = tasks.join_all().await;
    let registered = outcomes.iter().filter(|outcome| **outcome == Registered::Registered);
    assert_eq!(registered.count(), MAX_DEVICES);
    assert!(
        outcomes
            .iter()
            .all(|outcome| { matches!(outcome, Registered::Registered | Registered::Full) })
    );
    let listed = bench.devices(alice).await;
    let ids: BTreeSet<_> = listed.iter().map(|device| device.id).collect();
    assert_eq!((listed.len(), ids.len()), (MAX_DEVICES, MAX_DEVICES));
    let first = listed[0].id.as_bytes()[0];
    assert_eq!(bench.register(device(alice, first)).await, Registered::Repeated);
    bench.revoke(alice, first).await;
    assert_eq!(bench.register(device(alice, 200)).await, Registered::Registered);
}

pub async fn a_registration_binds_a_session_without_a_device(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    let free = bench.session(alice, 10, None).await;
    let bound = bench.session(alice, 11, Some(5)).await;
    let repeating = bench.session(alice, 12, None).await;
    // Loads the sessions into the backend's cache.
    assert_eq!(bench.bound(free).await, Some(None));
    assert_eq!(bench.bound(bound).await, Some(Some(5)));
    assert_eq!(bench.bound(repeating).await, Some(None));
    bench.register(NewDevice { session: free, ..device(alice, 1) }).await;
    bench.register(NewDevice { session: bound, ..device(alice, 2) }).await;
    bench.register(NewDevice { session: repeating, ..device(alice, 2) }).await;
    assert_eq!(bench.bound(free).await, Some(Some(1)));
    assert_eq!(bench.bound(bound).await, Some(Some(5)), "it stays at its device");
    assert_eq!(bench.bound(repeating).await, Some(Some(2)));
}

pub async fn a_refused_registration_binds_no_session(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let (alice, bob) = (bench.account(1).await, bench.account(2).await);
    bench.register(device(alice, 1)).await;
    let session = bench.session(bob, 10, None).await;
    let taken = NewDevice { key: device(alice, 1).key, session, ..device(bob, 1) };
    assert_eq!(bench.register(taken).await, Registered::KeyTaken);
    assert_eq!(bench.bound(session).await, Some(None));
}

pub async fn a_revocation_ends_only_the_sessions_of_its_device(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    let (alice, bob) = (bench.account(1).await, bench.account(2).await);
    for account in [alice, bob] {
        bench.register(device(account, 1)).await;
        bench.register(device(account, 2)).await;
    }
    let first = bench.session(alice, 10, Some(1)).await;
    let second = bench.session(alice, 11, Some(1)).await;
    let of_another = bench.session(alice, 12, Some(2)).await;
    let free = bench.session(alice, 13, None).await;
    let bobs = bench.session(bob, 14, Some(1)).await;
    for token in [first, second, of_another, free, bobs] {
        assert!(bench.bound(token).await.is_some());
    }
    let revoked = bench.stores.devices.revoke(alice.account, device_id(1), NOW).await;
    assert_eq!(revoked.expect("revoke"), DeviceRevocation::Revoked { ended_sessions: 2 });
    for token in [first, second] {
        assert_eq!(bench.bound(token).await, None);
    }
    assert_eq!(bench.bound(of_another).await, Some(Some(2)));
    assert_eq!(bench.bound(free).await, Some(None));
    assert_eq!(bench.bound(bobs).await, Some(Some(1)));
    let again = bench.stores.devices.revoke(alice.account, device_id(1), NOW).await;
    assert_eq!(again.expect("revoke"), DeviceRevocation::NotFound);
    bench.crash().await;
    assert_eq!(bench.bound(first).await, None);
    let left: Vec<_> = bench.devices(alice).await.into_iter().map(|device| device.id).collect();
    assert_eq!(left, [device_id(2)]);
}
