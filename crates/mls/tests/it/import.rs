//! The import of the state of releases up to 0.1, from files that such a release saved.

use std::path::Path;

use proptest::{prelude::*, sample::Index};
use prost::Message as _;
use qpq_mls::{
    Change, Client, Device, ImportError, Received,
    database::Database,
    vault::{self, VaultKey},
};

use crate::world::{ReceiveNow as _, content, now, texts};

/// The part of a vault's content that belongs to this crate.
#[derive(Clone, PartialEq, prost::Message)]
struct Saved {
    #[prost(bytes = "vec", tag = "2")]
    mls: Vec<u8>,
}

/// Returns the snapshot in the vault of a profile that an earlier release wrote.
fn snapshot(name: &str) -> Vec<u8> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../client/tests/fixtures").join(name);
    let hex = std::fs::read_to_string(dir.join("key.hex")).unwrap();
    let mut key = [0; 48];
    for (byte, digits) in key.iter_mut().zip(hex.trim().as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).unwrap(), 16).unwrap();
    }
    let key = VaultKey::from_bytes(&key);
    let content = vault::read(&dir.join("state.vault"), &key).unwrap().unwrap();
    Saved::decode(&content[..]).unwrap().mls
}

fn import(bytes: &[u8]) -> Result<Client, ImportError> {
    Client::import(&Database::in_memory(), bytes, now())
}

#[test]
fn conversations_of_an_earlier_release_continue() {
    let mut alice = import(&snapshot("alice")).unwrap();
    let mut bob = import(&snapshot("bob")).unwrap();
    let direct = alice.direct(&bob.identity().public()).unwrap().unwrap();
    let message = alice.encrypt(direct, &content("after the import")).unwrap();
    // Bob has not read the earlier messages of alice.
    assert_eq!(texts(&bob.receive_now(&message.payload)), ["after the import"]);
    for group in bob.groups().unwrap() {
        let message = bob.encrypt(group.id, &content("and back")).unwrap();
        assert_eq!(texts(&alice.receive_now(&message.payload)), ["and back"]);
    }
    // Groups of earlier releases change like any others, and get leaves of devices.
    let device = Device::generate(bob.identity(), "laptop");
    bob.set_device(device).unwrap();
    for group in bob.groups().unwrap() {
        assert_eq!(bob.joined_at(&group.id).unwrap(), Some(0));
        let commit = bob.commit(group.id, &Change::default(), now()).unwrap().unwrap();
        bob.confirm(group.id).unwrap();
        let received = alice.receive_now(&commit.payload);
        assert!(matches!(received[..], [Received::Committed { .. }]), "{received:?}");
        let message = bob.encrypt(group.id, &content("as a device")).unwrap();
        assert_eq!(texts(&alice.receive_now(&message.payload)), ["as a device"]);
        let names: Vec<_> = alice.devices(&group.id).unwrap();
        assert!(names.iter().any(|leaf| leaf.name() == "laptop"));
    }
}

#[test]
fn a_damaged_snapshot_and_a_newer_one_have_errors_of_their_own() {
    let mut bytes = snapshot("alice");
    for len in (0..bytes.len()).step_by(997).chain([bytes.len() - 1]) {
        assert_eq!(import(&bytes[..len]).err(), Some(ImportError::Damaged), "cut to {len}");
    }
    bytes.push(0);
    assert_eq!(import(&bytes).err(), Some(ImportError::Damaged));
    bytes.pop();
    bytes[4] = 2;
    assert_eq!(import(&bytes).err(), Some(ImportError::Newer));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn a_changed_byte_anywhere_in_a_snapshot_fails_the_import(
        at in any::<Index>(),
        bits in 1..=u8::MAX,
    ) {
        let mut bytes = snapshot("alice");
        let at = at.index(bytes.len());
        bytes[at] ^= bits;
        prop_assert!(import(&bytes).is_err());
    }
}
