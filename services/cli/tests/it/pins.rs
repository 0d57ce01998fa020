//! Pins of the server's key: two at a time while the key is replaced, and pins of a certificate,
//! which earlier releases stored.

use std::{fs, path::Path};

use sha2::{Digest as _, Sha256};

use crate::harness::{Person, World};

const CERT_FILES: [&str; 2] = ["server-cert.der", "server-key.der"];

/// Returns the fingerprint that the profile pins.
async fn pinned(person: &Person) -> String {
    let [whoami] = &person.json(&["whoami"]).await[..] else { panic!("one object") };
    whoami["server_fingerprint"].as_str().unwrap().to_owned()
}

/// Replaces the certificate and the key of a server by those in `from`.
async fn replace_certificate(world: &mut World, from: &Path) {
    let data = world.copy_data().await;
    for name in CERT_FILES {
        fs::copy(from.join(name), data.join(name)).unwrap();
    }
    world.restore_data(&data).await;
}

#[tokio::test]
async fn either_of_two_pinned_keys_is_accepted_and_a_third_is_refused() {
    let mut world = World::new().await;
    let (mut next, mut third) = (World::new().await, World::new().await);
    let (old, new) = (world.fingerprint.clone(), next.fingerprint.clone());
    let alice = world.person("alice");
    let neither = format!("{new},{}", third.fingerprint);
    alice.fails(&["register", "alice", "--pin", &neither], 5, "client.pin_mismatch").await;
    for pins in [format!("{old},{new}"), format!("{new},{old}")] {
        assert!(alice.ok(&["health", "--pin", &pins]).await.contains(" is ok: version "));
    }
    for malformed in [format!("{old},"), format!("{old},{new},{old}"), format!("{old},abc")] {
        alice.fails(&["health", "--pin", &malformed], 2, "client.usage").await;
    }

    let both = format!("{old},{new}");
    alice.ok(&["register", "alice", "--pin", &both]).await;
    assert_eq!(pinned(&alice).await, both);
    replace_certificate(&mut world, &next.copy_data().await).await;
    alice.ok(&["keys"]).await;
    replace_certificate(&mut world, &third.copy_data().await).await;
    let refused = alice.run(&["keys"]).await;
    assert_eq!(refused.code, Some(5), "{refused:?}");
    assert!(refused.err.contains(&third.fingerprint), "{refused:?}");
}

#[tokio::test]
async fn a_login_replaces_the_pin_of_a_certificate_by_that_of_its_key() {
    let mut world = World::new().await;
    let alice = world.user("alice").await;
    assert_eq!(pinned(&alice).await, world.fingerprint);
    let certificate = fs::read(world.copy_data().await.join(CERT_FILES[0])).unwrap();
    let earlier = hex::encode(Sha256::digest(certificate));
    let profile = alice.home.join("profiles/default/profile.json");
    let text = fs::read_to_string(&profile).unwrap();
    assert!(text.contains(&world.fingerprint), "{text}");
    fs::write(&profile, text.replace(&world.fingerprint, &earlier)).unwrap();
    assert_eq!(pinned(&alice).await, earlier);
    alice.ok(&["login"]).await;
    assert_eq!(pinned(&alice).await, world.fingerprint);
}
