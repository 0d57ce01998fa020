//! Direct conversations and groups: creating, adding, removing, and the changes that are refused.

use qpq_domain::{ChannelId, Username};
use qpq_mls::{
    Change, Error, GroupChange, GroupKind, Identity, Ignored, Lost, NewMember, Received,
    direct_channel, key_package,
};

use crate::world::{
    ANN, BOB, CAT, DAN, ReceiveNow as _, World, client, content, is_lost, now, texts,
};

#[test]
fn both_members_of_a_direct_conversation_read_each_others_messages() {
    let mut world = World::new(2);
    let (ann, bob) = (world.key(ANN), world.key(BOB));
    let group = world.clients[ANN].create_direct(bob, now()).unwrap();
    let commit = world.add(ANN, group, &[BOB]);
    assert_eq!(commit.recipients, [], "nobody else is in the group");
    assert_eq!((&commit.invited, &commit.added), (&vec![bob], &vec![bob]));
    assert_eq!(commit.channel, direct_channel(&ann, &bob));

    let [Received::Joined { group: joined, by }] = &world.deliver(BOB)[..] else {
        panic!("joined")
    };
    assert_eq!(*by, world.member(ANN));
    assert_eq!(joined.admins, [ann, bob]);
    assert_eq!(joined.kind, GroupKind::Direct { peer: bob });
    assert_eq!(
        (joined.id, joined.creator, joined.channel),
        (group, ann, direct_channel(&ann, &bob))
    );
    assert_eq!(joined.members, [world.member(ANN), world.member(BOB)]);
    assert_eq!(world.clients[BOB].direct(&ann).unwrap(), Some(group));
    assert_eq!(world.clients[ANN].direct(&bob).unwrap(), Some(group));

    world.say(ANN, group, "hi bob");
    world.say(BOB, group, "hi ann");
    let expected = Received::Message {
        group,
        channel: direct_channel(&ann, &bob),
        sender: world.member(ANN),
        content: content("hi bob"),
    };
    assert_eq!(world.deliver(BOB), [expected]);
    assert_eq!(texts(&world.deliver(ANN)), ["hi ann"]);
}

#[test]
fn a_group_grows_and_shrinks() {
    let mut world = World::new(4);
    let channel = ChannelId::new([5; 16]);
    let group = world.clients[ANN].create_group("the four", channel, now()).unwrap();
    world.add(ANN, group, &[BOB]);
    world.add(ANN, group, &[CAT, DAN]);

    let [Received::Joined { group: joined, .. }] = &world.deliver(BOB)[..] else {
        panic!("joined")
    };
    assert_eq!(
        (&joined.kind, joined.channel),
        (&GroupKind::Group { name: "the four".into() }, channel)
    );
    let by = world.member(ANN);
    let changes = [CAT, DAN].map(|who| GroupChange::Added(world.member(who))).to_vec();
    assert_eq!(world.deliver(BOB), [Received::Committed { group, by: by.clone(), changes }]);
    for newcomer in [CAT, DAN] {
        let [Received::Joined { group: joined, .. }] = &world.deliver(newcomer)[..] else {
            panic!("joined")
        };
        assert_eq!(joined.members, [ANN, BOB, CAT, DAN].map(|who| world.member(who)));
    }

    for who in [ANN, BOB, CAT, DAN] {
        world.say(who, group, &format!("from {}", world.name(who)));
    }
    assert_eq!(texts(&world.deliver_all(BOB)), ["from ann", "from cat", "from dan"]);
    assert_eq!(texts(&world.deliver_all(DAN)), ["from ann", "from bob", "from cat"]);

    let commit = world.remove(ANN, group, &[CAT]);
    assert_eq!(commit.removed, [world.key(CAT)]);
    assert_eq!(commit.recipients, [BOB, CAT, DAN].map(|who| world.key(who)));
    world.say(ANN, group, "without cat");
    assert_eq!(texts(&world.deliver_all(BOB)), ["without cat"]);
    let changes = vec![GroupChange::Removed(world.member(CAT))];
    let removed = Received::Committed { group, by, changes };
    assert_eq!(world.deliver_all(CAT).last(), Some(&removed));
    assert!(!world.clients[CAT].group(&group).unwrap().unwrap().active);
    assert_eq!(
        world.clients[CAT].encrypt(group, &content("still here?")),
        Err(Error::NoLongerMember)
    );

    // The server no longer delivers ann's messages to cat, and cat could not decrypt them.
    let secret = world.encrypt(ANN, group, "secret");
    assert_eq!(
        world.clients[CAT].receive_now(&secret),
        [Received::Ignored(Ignored::NoLongerMember)]
    );

    world.add(ANN, group, &[CAT]);
    assert!(matches!(world.deliver_all(CAT)[..], [Received::Joined { .. }]), "and back again");
    world.say(CAT, group, "back");
    assert_eq!(texts(&world.deliver_all(ANN)).last(), Some(&"back"));
}

#[test]
fn only_an_admin_adds_and_removes_accounts() {
    let mut world = World::new(4);
    let group = world.group(&[ANN, BOB, CAT]);
    assert_eq!(world.try_add(BOB, group, &[DAN]), Err(Error::NotAdmin));
    for other in [ANN, CAT] {
        let removal = world.removal(&[other]);
        assert_eq!(world.create(BOB, group, &removal), Err(Error::NotAdmin));
    }
    assert_eq!(world.clients[BOB].confirm(group), Err(Error::NothingPending));
    world.say(BOB, group, "as before");
    assert_eq!(texts(&world.deliver(ANN)), ["as before"]);
}

#[test]
fn impossible_changes_are_refused_and_change_nothing() {
    let mut world = World::new(3);
    let (ann, bob) = (world.key(ANN), world.key(BOB));
    assert_eq!(world.clients[ANN].create_direct(ann, now()), Err(Error::Yourself));
    let direct = world.clients[ANN].create_direct(bob, now()).unwrap();
    let group = world.clients[ANN].create_group("g", ChannelId::DEFAULT, now()).unwrap();
    let other = world.clients[BOB].create_group("g", ChannelId::DEFAULT, now()).unwrap();
    let before = world.clients[ANN].groups().unwrap();

    assert_eq!(world.clients[ANN].encrypt(group, &content("hello?")), Err(Error::Alone));
    assert_eq!(world.clients[ANN].encrypt(other, &content("hello?")), Err(Error::UnknownGroup));
    assert_eq!(world.try_add(ANN, direct, &[CAT]), Err(Error::DirectIsForTwo));
    let itself = world.removal(&[ANN]);
    assert_eq!(world.create(ANN, group, &itself), Err(Error::Yourself));
    let stranger = Change { promote: vec![bob], ..Change::default() };
    assert_eq!(world.create(ANN, group, &stranger), Err(Error::NotAMember(bob)));
    assert_eq!(world.clients[ANN].confirm(group), Err(Error::NothingPending));
    assert_eq!(world.clients[ANN].confirm_joining(group), Err(Error::NothingPending));
    assert_eq!(world.clients[ANN].forget(&other), Err(Error::UnknownGroup));
    assert_eq!(world.clients[ANN].groups().unwrap(), before);

    // Adding a present member or removing an absent one changes nothing.
    let absent = world.removal(&[CAT]);
    assert_eq!(world.create(ANN, group, &absent), Ok(None));
    world.add(ANN, group, &[BOB]);
    assert_eq!(world.try_add(ANN, group, &[BOB]), Ok(None));
    let commit = world.add(ANN, group, &[CAT, BOB]);
    assert_eq!(commit.invited, [world.key(CAT)]);
}

#[test]
fn a_package_that_is_not_its_invitees_is_refused() {
    let mut world = World::new(3);
    let group = world.clients[ANN].create_group("g", ChannelId::DEFAULT, now()).unwrap();
    let (bob, cat) = (world.key(BOB), world.key(CAT));
    let (bobs, mut broken) = (world.package(BOB), world.package(BOB));
    *broken.last_mut().unwrap() ^= 1;
    let (bobs_name, cats_name) = (world.name(BOB).clone(), world.name(CAT).clone());
    let mut add = |identity, username: &Username, key_package: &[u8]| {
        let (username, key_package) = (username.clone(), key_package.to_vec());
        let add = vec![NewMember { identity, username, key_package }];
        let change = Change { add, ..Change::default() };
        world.clients[ANN].commit(group, &change, now()).unwrap_err()
    };

    assert_eq!(add(cat, &cats_name, &bobs), Error::WrongName(cat));
    assert_eq!(add(bob, &cats_name, &bobs), Error::WrongName(bob));
    let bad = Error::BadPackage { identity: bob, reason: key_package::Rejected::BadSignature };
    assert_eq!(add(bob, &bobs_name, &broken), bad);
    let malformed = Error::BadPackage { identity: bob, reason: key_package::Rejected::Malformed };
    assert_eq!(add(bob, &bobs_name, &bobs[..bobs.len() - 1]), malformed);
}

#[test]
fn packages_of_clients_pass_the_servers_check() {
    let mut world = World::new(1);
    let owner = world.key(ANN);
    let policy = key_package::Policy::default();
    let last_resort = world.clients[ANN].last_resort_key_package(now()).unwrap();
    let checked = key_package::check(&last_resort, &policy, &[*owner.as_bytes()], now()).unwrap();
    assert!(checked.verified && checked.last_resort);
    let mut references = vec![checked.reference];
    for package in world.clients[ANN].key_packages(20, now()).unwrap() {
        let checked = key_package::check(&package, &policy, &[*owner.as_bytes()], now()).unwrap();
        assert!(checked.verified && !checked.last_resort);
        references.push(checked.reference);
    }
    references.sort_unstable();
    references.dedup();
    assert_eq!(references.len(), 21);
}

#[test]
fn simultaneous_direct_conversations_become_one() {
    for bobs_delay in [0, 1, 5_000] {
        let mut world = World::new(2);
        let (ann, bob) = (world.key(ANN), world.key(BOB));
        let anns_time = now();
        let bobs_time = qpq_domain::UnixMillis(anns_time.0 + bobs_delay);
        let anns = world.clients[ANN].create_direct(bob, anns_time).unwrap();
        let bobs = world.clients[BOB].create_direct(ann, bobs_time).unwrap();
        world.add(ANN, anns, &[BOB]);
        world.say(ANN, anns, "from ann's");
        world.add(BOB, bobs, &[ANN]);
        world.say(BOB, bobs, "from bob's");
        assert_eq!(texts(&world.deliver_all(ANN)), ["from bob's"], "both can be read");
        assert_eq!(texts(&world.deliver_all(BOB)), ["from ann's"]);

        let chosen = world.clients[ANN].direct(&bob).unwrap().unwrap();
        assert_eq!(world.clients[BOB].direct(&ann).unwrap(), Some(chosen), "both choose the same");
        assert_eq!(chosen, if bobs_delay == 0 { anns.min(bobs) } else { bobs });
        world.say(ANN, chosen, "one");
        world.say(BOB, chosen, "two");
        assert_eq!(texts(&world.deliver_all(BOB)), ["one"]);
        assert_eq!(texts(&world.deliver_all(ANN)), ["two"]);
    }
}

#[test]
fn a_peer_that_lost_its_state_starts_again_and_is_answered_there() {
    let mut world = World::new(2);
    let (ann, bob) = (world.key(ANN), world.key(BOB));
    let lost = world.clients[ANN].create_direct(bob, now()).unwrap();
    world.add(ANN, lost, &[BOB]);
    world.deliver_all(BOB);

    let identity = Identity::from_seed(world.clients[ANN].identity().seed());
    world.clients[ANN] = client(identity, world.name(ANN));
    let later = qpq_domain::UnixMillis(now().0 + 10);
    let anew = world.clients[ANN].create_direct(bob, later).unwrap();
    world.add(ANN, anew, &[BOB]);
    world.deliver_all(BOB);
    assert_eq!(world.clients[BOB].direct(&ann).unwrap(), Some(anew));
}

#[test]
fn a_last_resort_package_serves_more_than_once_and_another_does_not() {
    let mut world = World::new(3);
    let last_resort = world.clients[CAT].last_resort_key_package(now()).unwrap();
    let once = world.package(CAT);
    let (cat, cats_name) = (world.key(CAT), world.name(CAT).clone());
    let mut invite = |creator: usize, key_package: &[u8]| {
        let group = world.clients[creator].create_group("g", ChannelId::DEFAULT, now()).unwrap();
        let (username, key_package) = (cats_name.clone(), key_package.to_vec());
        let add = vec![NewMember { identity: cat, username, key_package }];
        let change = Change { add, ..Change::default() };
        let welcome = world.change(creator, group, &change).welcome.unwrap();
        (world.clients[CAT].receive_now(&welcome), world.clients[CAT].receive_now(&welcome))
    };

    for creator in [ANN, BOB] {
        let (first, again) = invite(creator, &last_resort);
        assert!(matches!(first[..], [Received::Joined { .. }]));
        assert_eq!(again, [Received::Duplicate]);
    }
    let (first, again) = invite(ANN, &once);
    assert!(matches!(first[..], [Received::Joined { .. }]));
    assert_eq!(again, [Received::Duplicate]);
    let (reused, _) = invite(BOB, &once);
    assert!(is_lost(&reused, Lost::NoPackage), "{reused:?}");
}

#[test]
fn a_package_that_runs_out_soon_is_refused_in_a_group_and_not_in_a_direct_conversation() {
    let days = |days: u64| std::time::Duration::from_secs(days * 24 * 3600);
    for (age, is_refused) in [(52, false), (54, true)] {
        let mut world = World::new(2);
        let made = now().minus(days(age));
        let package = world.clients[BOB].key_packages(1, made).unwrap().remove(0);
        let (bob, name) = (world.key(BOB), world.name(BOB).clone());
        let invitee = NewMember { identity: bob, username: name, key_package: package };
        let change = Change { add: vec![invitee], ..Change::default() };
        let group = world.clients[ANN].create_group("g", ChannelId::DEFAULT, now()).unwrap();
        let added = world.create(ANN, group, &change);
        assert_eq!(added.err(), is_refused.then_some(Error::PackageTooOld(bob)), "{age} days");
        let direct = world.clients[ANN].create_direct(bob, now()).unwrap();
        world.change(ANN, direct, &change);
    }
}

#[test]
fn a_forgotten_group_is_unknown() {
    let mut world = World::new(2);
    let group = world.group(&[ANN, BOB]);
    world.clients[BOB].forget(&group).unwrap();
    assert_eq!(world.clients[BOB].group(&group).unwrap(), None);
    assert_eq!(world.clients[BOB].groups().unwrap().len(), 0);
}
