//! Accounts with several devices.

use qpq_domain::ChannelId;
use qpq_mls::{
    Change, Client, Device, Error, GroupChange, GroupId, Identity, Ignored, Lost, NewMember,
    Received,
};

use crate::world::{ANN, BOB, CAT, DAN, ReceiveNow as _, World, client, is_lost, now, texts};

/// Returns the devices of a group, by account and name.
fn devices(world: &mut World, who: usize, group: GroupId) -> Vec<(String, String)> {
    let devices = world.clients[who].devices(&group).unwrap();
    let name = |device: &qpq_mls::MemberDevice| device.name().to_owned();
    devices.iter().map(|device| (device.member.username.to_string(), name(device))).collect()
}

fn device_added(world: &World, who: usize, name: &str) -> GroupChange {
    GroupChange::DeviceAdded { member: world.member(who), name: name.into() }
}

#[test]
fn each_device_of_an_account_reads_and_writes() {
    let mut world = World::with_devices(3);
    let phone = world.new_device(BOB, "phone");
    let group = world.group(&[ANN, CAT]);
    let commit = world.add(ANN, group, &[BOB, phone]);
    assert_eq!((&commit.invited, &commit.added), (&vec![world.key(BOB)], &vec![world.key(BOB)]));
    for device in [BOB, phone] {
        let received = world.deliver(device);
        let [Received::Joined { group: joined, .. }] = &received[..] else {
            panic!("{received:?}")
        };
        assert_eq!(joined.members, [ANN, CAT, BOB].map(|who| world.member(who)));
    }
    let changes = vec![GroupChange::Added(world.member(BOB))];
    let by = world.member(ANN);
    assert_eq!(world.deliver(CAT), [Received::Committed { group, by, changes }]);
    let all = [("ann", "ann"), ("cat", "cat"), ("bob", "bob"), ("bob", "phone")];
    let all = all.map(|(account, device)| (account.to_owned(), device.to_owned()));
    assert_eq!(devices(&mut world, CAT, group), all);

    world.say(ANN, group, "to both");
    for device in [BOB, phone, CAT] {
        assert_eq!(texts(&world.deliver(device)), ["to both"]);
    }
    for (device, sibling) in [(BOB, phone), (phone, BOB)] {
        world.say(device, group, "from either");
        assert_eq!(world.deliver(device), [Received::Ignored(Ignored::OwnMessage)]);
        for reader in [sibling, ANN, CAT] {
            let received = world.deliver(reader);
            let [Received::Message { sender, .. }] = &received[..] else { panic!("{received:?}") };
            assert_eq!(*sender, world.member(BOB));
        }
    }
}

#[test]
fn a_devices_own_commit_is_a_duplicate_and_other_devices_apply_it() {
    let mut world = World::with_devices(2);
    let phone = world.new_device(ANN, "phone");
    let group = world.group(&[ANN, BOB]);
    world.add(ANN, group, &[phone]);
    for device in [ANN, phone, BOB] {
        world.deliver_all(device);
    }
    let commit = world.change(ANN, group, &Change::default());
    assert_eq!(commit.recipients, [world.key(ANN), world.key(BOB)]);
    assert_eq!(world.deliver(ANN), [Received::Duplicate]);
    let by = world.member(ANN);
    for device in [phone, BOB] {
        let renewed = Received::Committed { group, by: by.clone(), changes: vec![] };
        assert_eq!(world.deliver(device), [renewed]);
    }
}

#[test]
fn any_member_adds_a_further_device_of_a_member() {
    let mut world = World::with_devices(3);
    let group = world.group(&[ANN, BOB, CAT]);
    let phone = world.new_device(CAT, "phone");
    let commit = world.add(BOB, group, &[phone]);
    assert_eq!((&commit.invited, &commit.added), (&vec![world.key(CAT)], &vec![]));
    let (by, changes) = (world.member(BOB), vec![device_added(&world, CAT, "phone")]);
    for device in [ANN, CAT] {
        let committed = Received::Committed { group, by: by.clone(), changes: changes.clone() };
        assert_eq!(world.deliver(device), [committed]);
    }
    assert_eq!(world.deliver(CAT), [Received::Ignored(Ignored::ForAnotherDevice)]);
    // The account's inbox has the commit too, before the Welcome.
    assert_eq!(world.deliver(phone), [Received::Buffered]);
    let received = world.deliver(phone);
    let [Received::Joined { by: inviter, .. }, Received::Ignored(Ignored::BeforeJoining)] =
        &received[..]
    else {
        panic!("{received:?}")
    };
    assert_eq!(*inviter, by);
    world.say(phone, group, "from the phone");
    assert_eq!(texts(&world.deliver_all(ANN)), ["from the phone"]);
}

#[test]
fn an_account_adds_its_own_further_device_to_a_direct_conversation() {
    let mut world = World::with_devices(2);
    let phone = world.new_device(BOB, "phone");
    let (ann, bob) = (world.key(ANN), world.key(BOB));
    let direct = world.clients[ANN].create_direct(bob, now()).unwrap();
    world.add(ANN, direct, &[BOB]);
    world.deliver_all(BOB);
    world.inboxes[phone].clear();
    world.add(BOB, direct, &[phone]);
    world.deliver_all(phone);
    assert_eq!(world.clients[phone].direct(&ann).unwrap(), Some(direct));
    world.say(phone, direct, "it is me");
    assert_eq!(texts(&world.deliver_all(ANN)), ["it is me"]);
}

#[test]
fn any_member_removes_a_further_device_and_only_an_admin_the_last_one() {
    let mut world = World::with_devices(3);
    let phone = world.new_device(CAT, "phone");
    let group = world.group(&[ANN, BOB]);
    world.add(ANN, group, &[CAT, phone]);
    for device in [BOB, CAT, phone] {
        world.deliver_all(device);
    }
    let (both, last) = (world.removal(&[CAT]), world.device_removal(CAT));
    assert_eq!(world.create(BOB, group, &both), Err(Error::NotAdmin));

    let first = world.device_removal(phone);
    let commit = world.change(BOB, group, &first);
    assert_eq!((commit.added, commit.removed), (vec![], vec![]));
    let (by, member) = (world.member(BOB), world.member(CAT));
    let changes = vec![GroupChange::DeviceRemoved { member, name: "phone".into() }];
    let removed = Received::Committed { group, by, changes };
    for device in [ANN, CAT, phone] {
        assert_eq!(world.deliver(device), std::slice::from_ref(&removed));
    }
    assert!(!world.clients[phone].group(&group).unwrap().unwrap().active);
    assert!(world.clients[CAT].group(&group).unwrap().unwrap().active);

    assert_eq!(world.create(BOB, group, &last), Err(Error::NotAdmin));
    let commit = world.change(ANN, group, &last);
    assert_eq!(commit.removed, [world.key(CAT)]);
    let (by, changes) = (world.member(ANN), vec![GroupChange::Removed(world.member(CAT))]);
    assert_eq!(world.deliver(BOB), [Received::Committed { group, by, changes }]);
}

#[test]
fn an_account_that_is_removed_loses_all_devices_in_one_change() {
    let mut world = World::with_devices(3);
    let phone = world.new_device(CAT, "phone");
    let group = world.group(&[ANN, BOB]);
    world.add(ANN, group, &[CAT, phone]);
    for device in [BOB, CAT, phone] {
        world.deliver_all(device);
    }
    world.remove(ANN, group, &[CAT]);
    let (by, changes) = (world.member(ANN), vec![GroupChange::Removed(world.member(CAT))]);
    for device in [BOB, CAT, phone] {
        let removed = Received::Committed { group, by: by.clone(), changes: changes.clone() };
        assert_eq!(world.deliver(device), [removed]);
    }
}

#[test]
fn a_device_removes_other_devices_of_its_account_and_not_itself() {
    let mut world = World::with_devices(2);
    let phone = world.new_device(BOB, "phone");
    let group = world.group(&[ANN, BOB]);
    world.add(BOB, group, &[phone]);
    world.deliver_all(phone);
    world.deliver_all(ANN);
    let (itself, sibling) = (world.device_removal(phone), world.device_removal(BOB));
    assert_eq!(world.create(phone, group, &itself), Err(Error::Yourself));
    world.change(phone, group, &sibling);
    let changes =
        vec![GroupChange::DeviceRemoved { member: world.member(BOB), name: "bob".into() }];
    let by = world.member(BOB);
    assert_eq!(world.deliver(ANN), [Received::Committed { group, by, changes }]);
    world.deliver_all(BOB);
    assert!(!world.clients[BOB].group(&group).unwrap().unwrap().active);
    assert_eq!(world.create(phone, group, &itself), Err(Error::Yourself), "the last one");
}

#[test]
fn an_account_whose_devices_are_replaced_stays_a_member() {
    let mut world = World::with_devices(3);
    let group = world.group(&[ANN, BOB, CAT]);
    let phone = world.new_device(CAT, "phone");
    let change = Change { remove: vec![world.key(CAT)], ..world.addition(&[phone]) };
    let commit = world.change(ANN, group, &change);
    assert_eq!((commit.added, commit.removed), (vec![], vec![]));
    assert_eq!(commit.invited, [world.key(CAT)]);
    let by = world.member(ANN);
    let (old, new) = (world.member(CAT), device_added(&world, CAT, "phone"));
    let old = GroupChange::DeviceRemoved { member: old, name: "cat".into() };
    assert_eq!(world.deliver(BOB), [Received::Committed { group, by, changes: vec![new, old] }]);
    world.deliver_all(phone);
    world.say(phone, group, "a new phone");
    assert_eq!(texts(&world.deliver_all(ANN)), ["a new phone"]);
}

#[test]
fn a_device_whose_proof_is_forged_is_not_added() {
    let mut world = World::with_devices(3);
    let group = world.group(&[ANN, BOB]);
    // A device of cat whose certification by cat was damaged.
    let real = Device::generate(world.clients[CAT].identity(), "phone");
    let mut proof = *real.proof();
    proof[0] ^= 1;
    let forged = Device::new(real.id(), real.name(), real.seed(), proof);
    let (cat, name) = (world.key(CAT), world.name(CAT).clone());
    world.clients[CAT].set_device(forged).unwrap();
    let key_package = world.clients[CAT].key_packages(1, now()).unwrap().remove(0);
    let add = vec![NewMember { identity: cat, username: name, key_package }];
    let change = Change { add, ..Change::default() };
    assert_eq!(world.create(ANN, group, &change), Err(Error::WrongName(cat)));
}

#[test]
fn a_welcome_for_another_device_differs_from_one_whose_package_was_used_or_is_lost() {
    let mut world = World::with_devices(4);
    let phone = world.new_device(CAT, "phone");
    let once = world.offer(CAT);
    let change = Change { add: vec![once], ..Change::default() };
    let mut welcome = |author: usize, change: &Change| {
        let group = world.clients[author].create_group("g", ChannelId::DEFAULT, now()).unwrap();
        let commit = world.create(author, group, change).unwrap().unwrap();
        world.clients[author].confirm(group).unwrap();
        commit.welcome.unwrap()
    };
    let [first, second, third] = [ANN, BOB, DAN].map(|author| welcome(author, &change));
    // The device does not have the package: the Welcome is also for others, or for it alone.
    assert_eq!(world.receive(phone, &first), [Received::Ignored(Ignored::ForAnotherDevice)]);
    assert!(is_lost(&world.clients[phone].receive_now(&second), Lost::NoPackage));
    // The device has used the package.
    assert!(matches!(world.receive(CAT, &first)[..], [Received::Joined { .. }]));
    assert!(is_lost(&world.receive(CAT, &second), Lost::NoPackage));
    assert!(is_lost(&world.clients[CAT].receive_now(&third), Lost::NoPackage));
}

#[test]
fn the_leaf_of_an_account_becomes_that_of_its_first_device_with_its_next_commit() {
    let mut world = World::new(3);
    let group = world.group(&[ANN, BOB, CAT]);
    let late = world.encrypt(BOB, group, "before the commit");
    let first = Device::generate(world.clients[BOB].identity(), "laptop");
    world.clients[BOB].set_device(first).unwrap();
    world.restart(BOB);
    world.say(BOB, group, "with the old key");
    for reader in [ANN, CAT] {
        assert_eq!(texts(&world.deliver(reader)), ["with the old key"]);
    }
    let commit = world.change(BOB, group, &Change::default());
    world.restart(BOB);
    world.say(BOB, group, "with the new key");
    let by = world.member(BOB);
    for reader in [ANN, CAT] {
        let renewed = Received::Committed { group, by: by.clone(), changes: vec![] };
        assert_eq!(world.deliver(reader), [renewed]);
        assert_eq!(texts(&world.deliver(reader)), ["with the new key"]);
        assert_eq!(texts(&world.receive(reader, &late)), ["before the commit"]);
        let bobs = ("bob".to_owned(), "laptop".to_owned());
        assert!(devices(&mut world, reader, group).contains(&bobs));
    }
    // The GroupInfo of that commit is signed with the new key.
    let phone = world.new_device(CAT, "phone");
    let known = [world.key(BOB)].into();
    world.clients[phone].join_by_itself(&commit.group_info, &known, now()).unwrap();
    // The members also follow later commits.
    world.remove(ANN, group, &[CAT]);
    world.deliver_all(BOB);
    world.change(BOB, group, &Change::default());
    world.deliver_all(ANN);
    world.say(ANN, group, "all well");
    assert_eq!(texts(&world.deliver_all(BOB)), ["all well"]);
}

#[test]
fn an_account_that_leaves_on_one_device_has_left_on_all() {
    let mut world = World::with_devices(2);
    let group = world.group(&[ANN, BOB]);
    let phone = world.new_device(BOB, "phone");
    world.add(BOB, group, &[phone]);
    world.deliver_all(phone);
    let last = world.encrypt(ANN, group, "are you leaving?");
    let farewell = world.clients[BOB].leave(group).unwrap().unwrap();
    assert_eq!(farewell.recipients, [world.key(ANN), world.key(BOB)]);
    world.post(&farewell);
    world.deliver_all(BOB);
    let sender = world.member(BOB);
    assert_eq!(world.deliver(phone), [Received::Leaving { group, sender: sender.clone() }]);
    for device in [BOB, phone] {
        world.restart(device);
        assert_eq!(world.clients[device].group(&group), Ok(None));
        assert_eq!(world.receive(device, &last), [Received::Refused { used_package: false }]);
    }
    let leaving = Received::Leaving { group, sender };
    assert_eq!(world.deliver_all(ANN).last(), Some(&leaving));
    // An admin adds the account again, on one device.
    world.remove(ANN, group, &[BOB]);
    world.add(ANN, group, &[phone]);
    assert!(matches!(world.deliver_all(phone).last(), Some(Received::Joined { .. })));
}

#[test]
fn messages_after_another_device_has_left_are_refused() {
    let mut world = World::with_devices(2);
    let group = world.group(&[ANN, BOB]);
    let phone = world.new_device(BOB, "phone");
    let commit = world.add(BOB, group, &[phone]);
    world.inboxes[phone].clear();
    let farewell = world.clients[BOB].leave(group).unwrap().unwrap();
    world.deliver_all(ANN);
    let late = world.encrypt(ANN, group, "too late");
    for early in [&farewell.payload, &late] {
        assert_eq!(world.receive(phone, early), [Received::Buffered]);
    }
    let received = world.receive(phone, commit.welcome.as_ref().unwrap());
    let [
        Received::Joined { .. },
        Received::Leaving { .. },
        Received::Refused { used_package: false },
    ] = received[..]
    else {
        panic!("{received:?}")
    };
    assert_eq!(world.clients[phone].group(&group), Ok(None));
}

#[test]
fn a_commit_that_members_would_refuse_is_not_created() {
    let mut world = World::with_devices(3);
    let group = world.group(&[ANN, BOB]);
    // A second key, certified by the account, of a device that is in the group.
    let identity = world.clients[BOB].identity().clone();
    let device = world.clients[BOB].device().unwrap().id();
    let other = Device::generate(&identity, "bob");
    let proof = identity.certify(&device, &other.public());
    let mut bob = client(identity.clone(), world.name(BOB));
    bob.set_device(Device::new(device, "bob", other.seed(), proof)).unwrap();
    let second = offer_of(&mut bob);
    // A further device of an account under another username than that of its first device.
    let mut renamed = client(identity.clone(), world.name(CAT));
    renamed.set_device(Device::generate(&identity, "phone")).unwrap();
    let renamed = offer_of(&mut renamed);
    // Another account under the username of a member.
    let identity = Identity::generate();
    let mut namesake = client(identity.clone(), world.name(BOB));
    namesake.set_device(Device::generate(&identity, "laptop")).unwrap();
    let namesake = offer_of(&mut namesake);

    for new in [second, renamed, namesake] {
        let change = Change { add: vec![new], ..Change::default() };
        let refused = world.create(ANN, group, &change);
        assert!(matches!(refused, Err(Error::Mls(_))), "{refused:?}");
        assert!(!world.clients[ANN].is_pending(group).unwrap());
    }
    world.change(ANN, group, &Change::default());
    world.deliver_all(BOB);
    world.say(BOB, group, "no harm done");
    assert_eq!(texts(&world.deliver_all(ANN)), ["no harm done"]);
}

fn offer_of(client: &mut Client) -> NewMember {
    let key_package = client.key_packages(1, now()).unwrap().remove(0);
    let identity = client.identity().public();
    NewMember { identity, username: client.username().clone(), key_package }
}

#[test]
fn the_leaf_of_an_account_stays_while_its_device_has_another() {
    let mut world = World::new(2);
    let group = world.group(&[ANN, BOB]);
    let first = Device::generate(world.clients[BOB].identity(), "laptop");
    world.clients[BOB].set_device(first.clone()).unwrap();
    // Ann's client adds each device that the server knows.
    let laptop = offer_of(&mut world.clients[BOB]);
    let change = Change { add: vec![laptop], ..Change::default() };
    world.change(ANN, group, &change);
    let member = world.member(BOB);
    let added = GroupChange::DeviceAdded { member, name: "laptop".into() };
    let by = world.member(ANN);
    assert_eq!(world.deliver(BOB), [Received::Committed { group, by, changes: vec![added] }]);
    assert_eq!(world.deliver(BOB), [Received::Duplicate], "it is in the group of the Welcome");
    // Once the unused leaf is removed, the leaf of the account becomes that of the device.
    let change =
        Change { remove_devices: vec![(world.key(BOB), Some(first.id()))], ..Change::default() };
    for change in [change, Change::default()] {
        world.change(BOB, group, &change);
        let received = world.deliver_all(ANN);
        assert!(matches!(received[..], [Received::Committed { .. }]), "{received:?}");
        world.say(BOB, group, "still me");
        assert_eq!(texts(&world.deliver_all(ANN)), ["still me"]);
    }
    let bobs = ("bob".to_owned(), "laptop".to_owned());
    assert_eq!(devices(&mut world, ANN, group)[1..], [bobs]);
}
