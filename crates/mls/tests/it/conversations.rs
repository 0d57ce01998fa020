//! What people do: direct conversations, groups, adding and removing, and what is refused.

use qpq_domain::{ChannelId, Username};
use qpq_mls::{
    Error, GroupKind, Identity, Ignored, Invitee, Lost, Received, direct_channel, key_package,
};

use crate::world::{ANN, BOB, CAT, DAN, Hear as _, World, client, content, is_lost, now, texts};

#[test]
fn two_people_talk() {
    let mut world = World::new(2);
    let (ann, bob) = (world.key(ANN), world.key(BOB));
    let group = world.clients[ANN].create_direct(bob, now()).unwrap();
    let added = world.try_add(ANN, group, &[BOB]).unwrap();
    assert_eq!(added.commit, None, "nobody else is in the group");
    assert_eq!(added.welcome.recipients, [bob]);
    assert_eq!(added.welcome.channel, direct_channel(&ann, &bob));
    world.post(&added.welcome);

    let [Received::Joined(joined)] = &world.deliver(BOB)[..] else { panic!("joined") };
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

    let [Received::Joined(joined)] = &world.deliver(BOB)[..] else { panic!("joined") };
    assert_eq!(
        (&joined.kind, joined.channel),
        (&GroupKind::Group { name: "the four".into() }, channel)
    );
    let added = vec![world.member(CAT), world.member(DAN)];
    assert_eq!(world.deliver(BOB), [Received::Committed { group, added, removed: vec![] }]);
    for newcomer in [CAT, DAN] {
        let [Received::Joined(joined)] = &world.deliver(newcomer)[..] else { panic!("joined") };
        assert_eq!(joined.members, [ANN, BOB, CAT, DAN].map(|who| world.member(who)));
    }

    for who in [ANN, BOB, CAT, DAN] {
        world.say(who, group, &format!("from {}", world.name(who)));
    }
    assert_eq!(texts(&world.deliver_all(BOB)), ["from ann", "from cat", "from dan"]);
    assert_eq!(texts(&world.deliver_all(DAN)), ["from ann", "from bob", "from cat"]);

    let cat = world.key(CAT);
    let commit = world.clients[ANN].remove(group, &[cat]).unwrap();
    assert_eq!(commit.recipients, [BOB, CAT, DAN].map(|who| world.key(who)));
    world.post(&commit);
    world.say(ANN, group, "without cat");
    assert_eq!(texts(&world.deliver_all(BOB)), ["without cat"]);
    let removed = Received::Committed { group, added: vec![], removed: vec![world.member(CAT)] };
    assert_eq!(world.deliver_all(CAT).last(), Some(&removed));
    assert!(!world.clients[CAT].group(&group).unwrap().unwrap().active);
    assert_eq!(
        world.clients[CAT].encrypt(group, &content("still here?")),
        Err(Error::NoLongerMember)
    );

    // What ann says now does not even go to cat, and would be of no use to it.
    let secret = world.encrypt(ANN, group, "secret");
    assert_eq!(world.clients[CAT].hear(&secret), [Received::Ignored(Ignored::NoLongerMember)]);

    world.add(ANN, group, &[CAT]);
    assert!(matches!(world.deliver_all(CAT)[..], [Received::Joined(_)]), "and back again");
    world.say(CAT, group, "back");
    assert_eq!(texts(&world.deliver_all(ANN)).last(), Some(&"back"));
}

#[test]
fn only_the_creator_changes_a_group() {
    let mut world = World::new(3);
    let group = world.group(&[ANN, BOB]);
    assert_eq!(world.try_add(BOB, group, &[CAT]), Err(Error::NotTheCreator));
    let ann = world.key(ANN);
    assert_eq!(world.clients[BOB].remove(group, &[ann]), Err(Error::NotTheCreator));
}

#[test]
fn what_cannot_be_done_is_said_and_changes_nothing() {
    let mut world = World::new(3);
    let (ann, bob, cat) = (world.key(ANN), world.key(BOB), world.key(CAT));
    assert_eq!(world.clients[ANN].create_direct(ann, now()), Err(Error::Yourself));
    let direct = world.clients[ANN].create_direct(bob, now()).unwrap();
    let group = world.clients[ANN].create_group("g", ChannelId::DEFAULT, now()).unwrap();
    let other = world.clients[BOB].create_group("g", ChannelId::DEFAULT, now()).unwrap();
    let before = world.clients[ANN].groups().unwrap();

    assert_eq!(world.clients[ANN].encrypt(group, &content("hello?")), Err(Error::Alone));
    assert_eq!(world.clients[ANN].encrypt(other, &content("hello?")), Err(Error::UnknownGroup));
    assert_eq!(world.clients[ANN].add(group, &[], now()), Err(Error::Nobody));
    assert_eq!(world.try_add(ANN, direct, &[CAT]), Err(Error::DirectIsForTwo));
    assert_eq!(world.try_add(ANN, group, &[BOB, BOB]), Err(Error::AlreadyMember(bob)));
    assert_eq!(world.clients[ANN].remove(group, &[]), Err(Error::Nobody));
    assert_eq!(world.clients[ANN].remove(group, &[ann]), Err(Error::Yourself));
    assert_eq!(world.clients[ANN].remove(group, &[cat]), Err(Error::NotAMember(cat)));
    assert_eq!(world.clients[ANN].forget(&other), Err(Error::UnknownGroup));
    assert_eq!(world.clients[ANN].groups().unwrap(), before);

    world.add(ANN, group, &[BOB]);
    assert_eq!(world.try_add(ANN, group, &[CAT, BOB]), Err(Error::AlreadyMember(bob)));
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
        world.clients[ANN]
            .add(group, &[Invitee { identity, username, key_package }], now())
            .unwrap_err()
    };

    let foreign = Error::BadPackage { identity: cat, reason: key_package::Rejected::ForeignSigner };
    assert_eq!(add(cat, &cats_name, &bobs), foreign);
    assert_eq!(add(bob, &cats_name, &bobs), Error::WrongName(bob));
    let bad = Error::BadPackage { identity: bob, reason: key_package::Rejected::BadSignature };
    assert_eq!(add(bob, &bobs_name, &broken), bad);
    let malformed = Error::BadPackage { identity: bob, reason: key_package::Rejected::Malformed };
    assert_eq!(add(bob, &bobs_name, &bobs[..bobs.len() - 1]), malformed);
}

#[test]
fn the_server_takes_what_clients_publish() {
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
        let invitee = Invitee { identity: cat, username: &cats_name, key_package };
        let welcome = world.clients[creator].add(group, &[invitee], now()).unwrap().welcome.payload;
        (world.clients[CAT].hear(&welcome), world.clients[CAT].hear(&welcome))
    };

    for creator in [ANN, BOB] {
        let (first, again) = invite(creator, &last_resort);
        assert!(matches!(first[..], [Received::Joined(_)]));
        assert_eq!(again, [Received::Duplicate]);
    }
    let (first, again) = invite(ANN, &once);
    assert!(matches!(first[..], [Received::Joined(_)]));
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
        let invitee = Invitee { identity: bob, username: &name, key_package: &package };
        let group = world.clients[ANN].create_group("g", ChannelId::DEFAULT, now()).unwrap();
        let added = world.clients[ANN].add(group, &[invitee], now());
        assert_eq!(added.err(), is_refused.then_some(Error::PackageTooOld(bob)), "{age} days");
        let direct = world.clients[ANN].create_direct(bob, now()).unwrap();
        world.clients[ANN].add(direct, &[invitee], now()).unwrap();
    }
}

#[test]
fn a_forgotten_group_is_gone() {
    let mut world = World::new(2);
    let group = world.group(&[ANN, BOB]);
    world.clients[BOB].forget(&group).unwrap();
    assert_eq!(world.clients[BOB].group(&group).unwrap(), None);
    assert_eq!(world.clients[BOB].groups().unwrap().len(), 0);
}
