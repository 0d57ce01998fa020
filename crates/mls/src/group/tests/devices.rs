//! Devices and members that break the rules about accounts, admins and joining, and the stored
//! state of groups.

use super::*;
use crate::{Device, Lost, leaf::DeviceDescription};

/// Creates a client of the same account on another device.
fn on_device(account: &Client, name: &str) -> Client {
    let identity = Identity::from_seed(account.identity.seed());
    let device = Device::generate(&identity, name);
    let username = account.username.clone();
    let mut client = Client::create(&Database::in_memory(), identity, username).unwrap();
    client.set_device(device).unwrap();
    client
}

/// Returns a device in the name of `victim`, certified by another account.
fn forged(victim: &Client) -> LeafSigner {
    let device = Device::generate(&Identity::generate(), "spy");
    LeafSigner::of_device(&device, &victim.identity.public(), &victim.username)
}

fn summary(client: &Client, id: GroupId) -> GroupSummary {
    client.group(&id).unwrap().unwrap()
}

/// Builds an external commit by `signer`, who need not be a member.
fn external_commit(group_info: &[u8], signer: &LeafSigner) -> Vec<u8> {
    let store = Store::default();
    let message = MlsMessageIn::tls_deserialize_exact_bytes(group_info).unwrap();
    let MlsMessageBodyIn::GroupInfo(info) = message.extract() else { panic!("a GroupInfo") };
    let parameters =
        LeafNodeParameters::builder().with_capabilities(packages::capabilities()).build();
    let (_, bundle) = MlsGroup::external_commit_builder()
        .with_config(join_config())
        .build_group(&store, info, signer.credential())
        .unwrap()
        .leaf_node_parameters(parameters)
        .load_psks(store.storage())
        .unwrap()
        .build(store.rand(), store.crypto(), signer, |_| true)
        .unwrap()
        .finalize(&store)
        .unwrap();
    bundle.into_messages().0.to_bytes().unwrap()
}

#[test]
fn a_device_whose_proof_is_forged_is_refused_in_a_commit_and_in_a_welcome() {
    let (mut ann, mut bob, mut dan) = (client("ann"), client("bob"), client("dan"));
    let id = group_of(&mut ann, &mut [&mut bob]);
    let spy = package_of(&Database::in_memory(), &forged(&bob));
    let dans = package(&mut dan);
    let (commit, welcome) = commit!(ann, id, |builder| builder.propose_adds([spy, dans]));
    assert_eq!(bob.receive_now(&commit), [Received::Ignored(Ignored::ForbiddenCommit)]);
    assert_eq!(dan.receive_now(&welcome.unwrap()), [Received::Ignored(Ignored::BadWelcome)]);
    assert_reads(&mut ann, &mut bob, id);
}

#[test]
fn a_second_leaf_of_a_device_is_refused() {
    let (mut ann, mut bob) = (client("ann"), client("bob"));
    let mut laptop = on_device(&bob, "laptop");
    let id = group_of(&mut ann, &mut [&mut bob, &mut laptop]);
    // Another key under the same id, which the account has certified.
    let key = ed25519_dalek::SigningKey::generate(&mut rand::rngs::OsRng);
    let public = qpq_domain::DeviceKey::new(key.verifying_key().to_bytes());
    let place = laptop.device.as_ref().unwrap().id();
    let proof = bob.identity.certify(&place, &public);
    let second = Device::new(place, "laptop", key.as_bytes(), proof);
    let signer = LeafSigner::of_device(&second, &bob.identity.public(), &bob.username);
    let package = package_of(&Database::in_memory(), &signer);
    let (commit, _) = commit!(ann, id, |builder| builder.propose_adds([package]));
    for victim in [&mut bob, &mut laptop] {
        assert_eq!(victim.receive_now(&commit), [Received::Ignored(Ignored::ForbiddenCommit)]);
    }
    let info = change(&mut ann, id, &Change::default());
    bob.receive_now(&info.payload);
    let commit = external_commit(&info.group_info, &signer);
    assert_eq!(bob.receive_now(&commit), [Received::Ignored(Ignored::ForbiddenCommit)]);
    assert_reads(&mut ann, &mut bob, id);
}

#[test]
fn commits_of_a_non_admin_that_change_name_or_admins_are_ignored() {
    let (mut ann, mut bob, mut cat) = (client("ann"), client("bob"), client("cat"));
    let id = group_of(&mut ann, &mut [&mut bob, &mut cat]);
    let profile = bob.groups[&id].profile.clone();
    let named = GroupKind::Group { name: "bob's".into() };
    let renamed = Profile { kind: named, ..profile.clone() };
    let promoted = Profile { admins: vec![bob.identity.public()], ..profile };
    let before = summary(&cat, id);
    for next in [renamed, promoted] {
        let (commit, _) = commit!(bob, id, |builder| builder
            .propose_group_context_extensions(next.extensions())
            .unwrap());
        for victim in [&mut ann, &mut cat] {
            assert_eq!(victim.receive_now(&commit), [Received::Ignored(Ignored::NotAllowed)]);
        }
    }
    assert_eq!(summary(&cat, id), before);
    assert_reads(&mut ann, &mut cat, id);
    assert_reads(&mut bob, &mut ann, id);
}

#[test]
fn only_an_admin_removes_all_devices_of_an_account() {
    let (mut ann, mut bob, mut cat) = (client("ann"), client("bob"), client("cat"));
    let mut phone = on_device(&cat, "phone");
    let id = group_of(&mut ann, &mut [&mut bob, &mut cat, &mut phone]);
    let places = [2, 3].map(LeafNodeIndex::new);
    let (commit, _) = commit!(bob, id, |builder| builder.propose_removals(places));
    for victim in [&mut ann, &mut cat, &mut phone] {
        assert_eq!(victim.receive_now(&commit), [Received::Ignored(Ignored::NotAllowed)]);
    }
    // The removal of one of the two devices is allowed.
    let (commit, _) = commit!(bob, id, |builder| builder.propose_removals([places[1]]));
    for victim in [&mut ann, &mut cat, &mut phone] {
        let received = victim.receive_now(&commit);
        assert!(matches!(received[..], [Received::Committed { .. }]), "{received:?}");
    }
    assert!(!summary(&phone, id).active);
    assert_reads(&mut ann, &mut cat, id);
}

#[test]
fn a_commit_that_removes_an_own_device_and_another_account_is_ignored() {
    let (mut ann, mut bob) = (client("ann"), client("bob"));
    let mut phone = on_device(&bob, "phone");
    let id = group_of(&mut ann, &mut [&mut bob, &mut phone]);
    let places = [0, 1].map(LeafNodeIndex::new);
    let (commit, _) = commit!(phone, id, |builder| builder.propose_removals(places));
    for victim in [&mut ann, &mut bob] {
        assert_eq!(victim.receive_now(&commit), [Received::Ignored(Ignored::NotAllowed)]);
    }
    assert_reads(&mut ann, &mut bob, id);
}

#[test]
fn only_a_certified_device_of_a_member_joins_by_itself() {
    let (mut ann, mut bob, mallory) = (client("ann"), client("bob"), client("mallory"));
    let id = group_of(&mut ann, &mut [&mut bob]);
    let info = change(&mut ann, id, &Change::default());
    bob.receive_now(&info.payload);
    let before = summary(&bob, id);
    let strangers = external_commit(&info.group_info, &mallory.leaf());
    let uncertified = external_commit(&info.group_info, &forged(&ann));
    // The name of a member under the stranger's own key.
    let imitation = LeafSigner::of_account(&mallory.identity, &ann.username);
    let imitation = external_commit(&info.group_info, &imitation);
    // A member under another name.
    let phone = on_device(&ann, "phone").device.unwrap();
    let renamed = LeafSigner::of_device(&phone, &ann.identity.public(), &mallory.username);
    let renamed = external_commit(&info.group_info, &renamed);
    for (commit, reason) in [
        (strangers, Ignored::NotAllowed),
        (uncertified, Ignored::ForbiddenCommit),
        (imitation, Ignored::ForbiddenCommit),
        (renamed, Ignored::ForbiddenCommit),
    ] {
        for victim in [&mut ann, &mut bob] {
            assert_eq!(victim.receive_now(&commit), [Received::Ignored(reason)]);
        }
    }
    assert_eq!(summary(&bob, id), before);
    assert_reads(&mut ann, &mut bob, id);
}

#[test]
fn a_member_does_not_turn_its_leaf_into_that_of_another_device() {
    let (mut ann, mut bob) = (client("ann"), client("bob"));
    let mut laptop = on_device(&ann, "laptop");
    let id = group_of(&mut bob, &mut [&mut ann, &mut laptop]);
    let phone = on_device(&ann, "phone");
    let commit = becoming(&mut laptop, id, &phone.leaf());
    for victim in [&mut ann, &mut bob] {
        assert_eq!(victim.receive_now(&commit), [Received::Ignored(Ignored::ForbiddenCommit)]);
    }
    // The leaf of the account may become that of its first device.
    ann.set_device(phone.device.clone().unwrap()).unwrap();
    let commit = change(&mut ann, id, &Change::default());
    for other in [&mut bob, &mut laptop] {
        let received = other.receive_now(&commit.payload);
        assert!(matches!(received[..], [Received::Committed { .. }]), "{received:?}");
        let devices = other.devices(&id).unwrap();
        let keys: Vec<_> = devices.iter().filter_map(|leaf| leaf.device.as_ref()).collect();
        let names: Vec<_> = keys.iter().map(|DeviceDescription { name, .. }| &name[..]).collect();
        assert_eq!(names, ["phone", "laptop"]);
    }
    assert_reads(&mut ann, &mut bob, id);
}

/// No member could commit in such a group.
#[test]
fn the_leaf_of_an_account_does_not_become_that_of_a_device_that_has_one() {
    let (mut ann, mut bob) = (client("ann"), client("bob"));
    let mut laptop = on_device(&ann, "laptop");
    let id = group_of(&mut bob, &mut [&mut ann, &mut laptop]);
    let place = laptop.device.as_ref().unwrap().id();
    let key = ed25519_dalek::SigningKey::generate(&mut rand::rngs::OsRng);
    let public = qpq_domain::DeviceKey::new(key.verifying_key().to_bytes());
    let proof = ann.identity.certify(&place, &public);
    let second = Device::new(place, "laptop", key.as_bytes(), proof);
    let next = LeafSigner::of_device(&second, &ann.identity.public(), &ann.username);
    let commit = becoming(&mut ann, id, &next);
    for victim in [&mut bob, &mut laptop] {
        assert_eq!(victim.receive_now(&commit), [Received::Ignored(Ignored::ForbiddenCommit)]);
    }
    let commit = change(&mut bob, id, &Change::default());
    assert!(matches!(laptop.receive_now(&commit.payload)[..], [Received::Committed { .. }]));
}

#[test]
fn keys_of_a_replaced_state_are_deleted() {
    let (mut ann, mut bob) = (client("ann"), client("bob"));
    let id = group_of(&mut ann, &mut [&mut bob]);
    let kept = |bob: &mut Client| {
        bob.save().unwrap();
        let in_use = bob.groups[&id].store.written_len();
        (Store::load(&bob.database, id.as_bytes()).unwrap().written_len(), in_use)
    };
    bob.save().unwrap();
    // The group is replaced because the member was removed and is added again.
    let removal = remove(&mut ann, id, &bob);
    bob.receive_now(&removal.payload);
    let again = add(&mut ann, id, &mut [&mut bob]);
    bob.receive_now(again.welcome.as_ref().unwrap());
    let (saved, in_use) = kept(&mut bob);
    assert_eq!(saved, in_use);
    // The group is replaced by joining alone, after a first attempt that was dropped.
    let known = [ann.identity.public()].into();
    bob.join_by_itself(&again.group_info, &known, now()).unwrap();
    let commit = change(&mut ann, id, &Change::default());
    bob.join_by_itself(&commit.group_info, &known, now()).unwrap();
    bob.confirm_joining(id).unwrap();
    let (saved, in_use) = kept(&mut bob);
    assert_eq!(saved, in_use);
    assert_eq!(bob.database.in_lane(tables::MLS, &joining(&id)).unwrap().len(), 0);
}

/// Earlier releases did not save whether the messages of a removed member are refused.
#[test]
fn members_that_an_earlier_release_removed_are_refused() {
    let [mut ann, mut bob, mut cat] = ["ann", "bob", "cat"].map(client);
    let id = group_of(&mut ann, &mut [&mut bob, &mut cat]);
    let late = say(&mut bob, id, "late");
    let commit = remove(&mut ann, id, &bob);
    cat.receive_now(&commit.payload);
    ann.save().unwrap();
    let row = ann.database.get(tables::GROUPS, id.as_bytes()).unwrap().unwrap();
    ann.database.put(tables::GROUPS, id.as_bytes(), None, &row[..row.len() - 1]).unwrap();
    let mut ann = Client::open(&ann.database.copy()).unwrap();
    let received = ann.receive_now(&late);
    assert!(
        matches!(&received[..], [Received::Unreadable(lost)] if lost.reason == Lost::NotAMember),
        "{received:?}"
    );
    assert_reads(&mut cat, &mut ann, id);
}

/// Earlier releases saved neither the admins nor the first epoch.
#[test]
fn rows_of_an_earlier_release_are_read() {
    let (mut ann, mut bob) = (client("ann"), client("bob"));
    let id = group_of(&mut ann, &mut [&mut bob]);
    let direct = bob.create_direct(ann.identity.public(), now()).unwrap();
    let welcome = add(&mut bob, direct, &mut [&mut ann]).welcome.unwrap();
    ann.receive_now(&welcome);
    let expected = [id, direct].map(|id| summary(&ann, id));
    ann.save().unwrap();
    for (id, admins) in [(id, 1), (direct, 2)] {
        let row = ann.database.get(tables::GROUPS, id.as_bytes()).unwrap().unwrap();
        let cut = &row[..row.len() - 8 - 32 * admins - 8];
        let lane = (id == direct).then(|| bob.identity.public());
        let lane = lane.as_ref().map(|key| &key.as_bytes()[..]);
        ann.database.put(tables::GROUPS, id.as_bytes(), lane, cut).unwrap();
    }
    let mut ann = Client::open(&ann.database.copy()).unwrap();
    assert_eq!([id, direct].map(|id| summary(&ann, id)), expected);
    assert_eq!(ann.direct(&bob.identity.public()), Ok(Some(direct)));
    assert_eq!(ann.joined_at(&id), Ok(Some(0)));
    assert_eq!([id, direct].map(|id| summary(&ann, id)), expected);
    for id in [id, direct] {
        assert_reads(&mut ann, &mut bob, id);
        assert_reads(&mut bob, &mut ann, id);
        let commit = change(&mut ann, id, &Change::default());
        bob.receive_now(&commit.payload);
        assert_reads(&mut bob, &mut ann, id);
    }
}
