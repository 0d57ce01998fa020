//! Renewal of KeyPackages.

use std::time::Duration;

use qpq_client::{Messenger, UnixMillis, methods, v1};
use qpq_mls::key_package::{self, Policy};
use qpq_ports::{Clock as _, SystemClock};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use crate::harness::{Server, dm, read};

const DAY: Duration = Duration::from_secs(24 * 3600);
/// The days that a fetched package is valid for at least: 84 from its creation, less the 30 after
/// which packages are replaced.
const LEFT: u32 = 54;
const SEEDS: u64 = 3;

/// Fetches a KeyPackage and returns the time of its end.
async fn fetch(by: &Messenger, of: &Messenger) -> UnixMillis {
    let identity = of.profile().identity;
    let request = v1::FetchKeyPackageRequest {
        identity_key: identity.as_bytes().to_vec().into(),
        ..Default::default()
    };
    let resolve = v1::ResolveIdentityRequest {
        identity_key: identity.as_bytes().to_vec().into(),
        ..Default::default()
    };
    let devices = by.client().call::<methods::ResolveIdentity>(resolve).await.unwrap().devices;
    let device: [u8; 32] = devices[0].device_key[..].try_into().unwrap();
    let answer = by.client().call::<methods::FetchKeyPackage>(request).await.unwrap();
    let policy = Policy { suites: vec![1], ..Policy::default() };
    key_package::check(&answer.package, &policy, &[device], SystemClock.now()).unwrap().not_after
}

/// The owner of the packages comes online at random times of the last 80 days. Each time others
/// fetch some packages, at times all, and one begins a conversation.
#[tokio::test]
async fn every_fetched_package_has_54_days_left_and_every_welcome_can_be_read() {
    let server = Server::start().await;
    let mut senders = Vec::new();
    for name in ["alice", "carol", "dave"] {
        senders.push(server.user(name).await);
    }
    for seed in 0..SEEDS {
        let mut random = StdRng::seed_from_u64(seed);
        let name = format!("bob{seed}");
        let bob = server.user(&name).await;
        let present = SystemClock.now();
        let mut days_ago = random.gen_range(70..=80);
        let mut expected = Vec::new();
        let mut waiting = senders.iter().zip(["alice", "carol", "dave"]);
        loop {
            let online = present.minus(DAY * days_ago);
            bob.publish_key_packages_at(online).await.unwrap();
            for _ in 0..random.gen_range(1..25) {
                let end = fetch(&senders[0], &bob).await;
                let left = end.since(online);
                assert!(left > DAY * LEFT - DAY, "seed {seed}, {days_ago} days ago: {left:?}");
            }
            if let Some((sender, name)) = waiting.next() {
                sender.send(dm(sender, &format!("bob{seed}")).await, "hi").await.unwrap();
                expected.push(format!("{name}: hi"));
            }
            if days_ago == 0 {
                break;
            }
            days_ago = days_ago.saturating_sub(random.gen_range(1..40));
        }
        assert_eq!(read(&bob).await, expected, "seed {seed}");
    }
}
