//! Changes of groups: admins and names, commits that wait for the server, and two commits for the
//! same epoch.

use std::slice::from_ref;

use qpq_domain::ChannelId;
use qpq_mls::{Change, Commit, Error, GroupChange, GroupId, GroupKind, Ignored, Received};

use crate::world::{ANN, BOB, CAT, DAN, World, content, now, texts};

fn rename(name: &str) -> Change {
    Change { name: Some(name.into()), ..Change::default() }
}

fn promote(world: &World, who: usize) -> Change {
    Change { promote: vec![world.key(who)], ..Change::default() }
}

fn demote(world: &World, who: usize) -> Change {
    Change { demote: vec![world.key(who)], ..Change::default() }
}

fn committed(world: &World, group: GroupId, by: usize, changes: &[GroupChange]) -> Received {
    Received::Committed { group, by: world.member(by), changes: changes.to_vec() }
}

fn admins(world: &World, who: usize, group: GroupId) -> Vec<usize> {
    let admins = world.clients[who].group(&group).unwrap().unwrap().admins;
    (ANN..=DAN.min(world.clients.len() - 1))
        .filter(|&who| admins.contains(&world.key(who)))
        .collect()
}

fn kind(world: &World, who: usize, group: GroupId) -> GroupKind {
    world.clients[who].group(&group).unwrap().unwrap().kind
}

fn epoch(world: &World, who: usize, group: GroupId) -> u64 {
    world.clients[who].group(&group).unwrap().unwrap().epoch
}

#[test]
fn a_new_name_and_new_admins_reach_everyone() {
    let mut world = World::with_devices(4);
    let group = world.group(&[ANN, BOB, CAT]);
    let named = GroupKind::Group { name: "the three".into() };
    world.change(ANN, group, &rename("the three"));
    let renamed = GroupChange::Renamed { name: "the three".into() };
    for reader in [BOB, CAT] {
        assert_eq!(world.deliver(reader), [committed(&world, group, ANN, from_ref(&renamed))]);
    }
    let change = promote(&world, BOB);
    world.change(ANN, group, &change);
    let promoted = GroupChange::Promoted(world.member(BOB));
    for reader in [BOB, CAT] {
        assert_eq!(world.deliver(reader), [committed(&world, group, ANN, from_ref(&promoted))]);
    }
    for who in [ANN, BOB, CAT] {
        world.restart(who);
        assert_eq!(kind(&world, who, group), named);
        assert_eq!(admins(&world, who, group), [ANN, BOB]);
    }

    // The new admin demotes the first one, and invites.
    let change = demote(&world, ANN);
    world.change(BOB, group, &change);
    let demoted = GroupChange::Demoted(world.member(ANN));
    for reader in [ANN, CAT] {
        assert_eq!(world.deliver(reader), [committed(&world, group, BOB, from_ref(&demoted))]);
    }
    world.add(BOB, group, &[DAN]);
    let received = world.deliver(DAN);
    let [Received::Joined { group: joined, by }] = &received[..] else { panic!("{received:?}") };
    assert_eq!((&joined.kind, &joined.admins), (&named, &vec![world.key(BOB)]));
    assert_eq!(*by, world.member(BOB));
    let removal = world.removal(&[CAT]);
    assert_eq!(world.create(ANN, group, &removal), Err(Error::NotAdmin));
}

#[test]
fn only_an_admin_changes_the_name_and_the_admins() {
    let mut world = World::with_devices(3);
    let group = world.group(&[ANN, BOB, CAT]);
    for change in [rename("mine"), promote(&world, BOB), demote(&world, ANN)] {
        assert!(matches!(
            world.create(BOB, group, &change),
            Err(Error::NotAdmin | Error::LastAdmin)
        ));
    }
    assert!(!world.clients[BOB].is_pending(group).unwrap());
}

#[test]
fn a_change_without_effect_creates_no_commit() {
    let mut world = World::with_devices(2);
    let group = world.group(&[ANN, BOB]);
    for change in [rename("friends"), promote(&world, ANN), demote(&world, BOB)] {
        assert_eq!(world.create(ANN, group, &change), Ok(None));
    }
    let bob = world.key(BOB);
    let direct = world.clients[ANN].create_direct(bob, now()).unwrap();
    world.add(ANN, direct, &[BOB]);
    let change = demote(&world, BOB);
    assert_eq!(world.create(ANN, direct, &change), Err(Error::DirectIsForTwo));
}

#[test]
fn the_last_admin_is_not_demoted_and_does_not_leave() {
    let mut world = World::with_devices(3);
    let group = world.group(&[ANN, BOB, CAT]);
    let change = demote(&world, ANN);
    assert_eq!(world.create(ANN, group, &change), Err(Error::LastAdmin));
    assert_eq!(world.clients[ANN].leave(group), Err(Error::LastAdmin));
    // A change that also removes the only other admin is refused, too.
    let change = promote(&world, BOB);
    world.change(ANN, group, &change);
    world.deliver_all(BOB);
    let change = Change { remove: vec![world.key(BOB)], ..demote(&world, ANN) };
    assert_eq!(world.create(ANN, group, &change), Err(Error::LastAdmin));

    let farewell = world.clients[ANN].leave(group).unwrap().unwrap();
    world.post(&farewell);
    let sender = world.member(ANN);
    assert_eq!(world.deliver(BOB), [Received::Leaving { group, sender }]);
    world.remove(BOB, group, &[ANN]);
    assert_eq!(admins(&world, BOB, group), [BOB]);
}

#[test]
fn the_last_admin_leaves_a_group_without_other_members() {
    let mut world = World::with_devices(1);
    let group = world.clients[ANN].create_group("alone", ChannelId::DEFAULT, now()).unwrap();
    assert_eq!(world.clients[ANN].leave(group), Ok(None));
    assert_eq!(world.clients[ANN].group(&group), Ok(None));
}

/// Creates a group of three, and commits of ann and bob for the same epoch.
fn two_commits() -> (World, GroupId, Commit, Commit) {
    let mut world = World::with_devices(4);
    let group = world.group(&[ANN, BOB, CAT]);
    let anns = world.try_add(ANN, group, &[DAN]).unwrap().unwrap();
    let bobs = world.create(BOB, group, &Change::default()).unwrap().unwrap();
    (world, group, anns, bobs)
}

#[test]
fn of_two_commits_for_the_same_epoch_the_one_that_the_server_accepts_counts() {
    let (mut world, group, anns, bobs) = two_commits();
    // The server accepts ann's commit, and answers bob with a conflict.
    let added = committed(&world, group, ANN, &[GroupChange::Added(world.member(DAN))]);
    assert_eq!(world.accept(ANN, &anns), from_ref(&added));
    world.clients[BOB].discard(group).unwrap();
    assert_eq!(world.clients[BOB].confirm(group), Err(Error::NothingPending));
    assert_eq!(world.deliver(BOB), from_ref(&added));
    let again = world.change(BOB, group, &Change::default());
    assert_eq!(again.recipients, [ANN, CAT, DAN].map(|who| world.key(who)));
    assert_ne!(again.payload, bobs.payload);
    for who in [ANN, CAT, DAN] {
        world.deliver_all(who);
    }
    // Bob's first commit, which the server refused, has no effect on any member.
    for who in [ANN, CAT, DAN] {
        let received = world.receive(who, &bobs.payload);
        assert!(
            matches!(
                received[..],
                [Received::Ignored(Ignored::OldCommit | Ignored::BeforeJoining)]
            ),
            "{received:?}"
        );
    }
    world.say(DAN, group, "welcome me");
    for who in [ANN, BOB, CAT] {
        assert_eq!(texts(&world.deliver_all(who)), ["welcome me"]);
    }
}

#[test]
fn a_received_commit_of_the_same_epoch_drops_the_pending_one() {
    let (mut world, group, anns, _) = two_commits();
    world.accept(ANN, &anns);
    world.deliver(BOB);
    assert!(!world.clients[BOB].is_pending(group).unwrap());
    world.restart(BOB);
    assert_eq!(world.clients[BOB].confirm(group), Err(Error::NothingPending));
    world.clients[BOB].discard(group).unwrap();
    world.say(ANN, group, "all here");
    assert_eq!(texts(&world.deliver_all(BOB)), ["all here"]);
}

#[test]
fn a_pending_commit_survives_a_restart_and_is_confirmed_after_it() {
    let (mut world, group, anns, _) = two_commits();
    let before = epoch(&world, ANN, group);
    world.restart(ANN);
    assert!(world.clients[ANN].is_pending(group).unwrap());
    assert_eq!(epoch(&world, ANN, group), before, "nothing has changed yet");
    world.accept(ANN, &anns);
    assert_eq!(epoch(&world, ANN, group), before + 1);
    world.restart(ANN);
    assert!(!world.clients[ANN].is_pending(group).unwrap());
    world.deliver_all(BOB);
    world.deliver_all(DAN);
    world.say(DAN, group, "hello");
    assert_eq!(texts(&world.deliver_all(ANN)), ["hello"]);
}

#[test]
fn a_pending_commit_survives_a_restart_and_is_discarded_after_it() {
    let (mut world, group, _, bobs) = two_commits();
    world.restart(ANN);
    world.accept(BOB, &bobs);
    world.clients[ANN].discard(group).unwrap();
    world.restart(ANN);
    assert!(!world.clients[ANN].is_pending(group).unwrap());
    assert_eq!(world.deliver(ANN), [committed(&world, group, BOB, &[])]);
    world.add(ANN, group, &[DAN]);
    for who in [BOB, CAT, DAN] {
        world.deliver_all(who);
    }
    world.say(DAN, group, "in the end");
    assert_eq!(texts(&world.deliver_all(ANN)), ["in the end"]);
}

#[test]
fn a_later_commit_replaces_the_pending_one() {
    let (mut world, group, _, _) = two_commits();
    let commit = world.create(ANN, group, &rename("later")).unwrap().unwrap();
    let renamed = GroupChange::Renamed { name: "later".into() };
    assert_eq!(world.accept(ANN, &commit), [committed(&world, group, ANN, &[renamed])]);
    assert_eq!(world.clients[ANN].group(&group).unwrap().unwrap().members.len(), 3);
}

#[test]
fn messages_are_sent_and_read_while_a_commit_waits() {
    let (mut world, group, anns, _) = two_commits();
    world.say(ANN, group, "while waiting");
    world.say(CAT, group, "so do I");
    assert_eq!(texts(&world.deliver_all(BOB)), ["while waiting", "so do I"]);
    assert_eq!(texts(&world.deliver_all(ANN)), ["so do I"]);
    let late = world.encrypt(CAT, group, "late");
    world.restart(ANN);
    world.accept(ANN, &anns);
    assert_eq!(texts(&world.receive(ANN, &late)), ["late"], "of the epoch before");
    world.deliver_all(BOB);
    world.say(BOB, group, "after");
    assert_eq!(texts(&world.deliver_all(ANN)), ["after"]);
}

#[test]
fn messages_of_the_epoch_after_our_pending_commit_wait_for_its_confirmation() {
    let (mut world, group, anns, _) = two_commits();
    // The server has accepted ann's commit, and its answer is still on its way.
    world.post_commit(&anns);
    world.deliver_all(BOB);
    world.say(BOB, group, "of the new epoch");
    let renewal = world.change(BOB, group, &Change::default());
    world.say(BOB, group, "of the one after");
    assert_eq!(renewal.recipients.len(), 3);
    for _ in 0..3 {
        assert_eq!(world.deliver(ANN), [Received::Buffered]);
    }
    world.restart(ANN);
    let received = world.clients[ANN].confirm(group).unwrap();
    let added = committed(&world, group, ANN, &[GroupChange::Added(world.member(DAN))]);
    assert_eq!(received[0], added);
    assert_eq!(received[2], committed(&world, group, BOB, &[]));
    assert_eq!(texts(&received), ["of the new epoch", "of the one after"]);
    assert_eq!(received.len(), 4);
}

#[test]
fn a_removed_member_cannot_confirm_its_pending_commit() {
    let mut world = World::with_devices(3);
    let group = world.group(&[ANN, BOB, CAT]);
    world.create(BOB, group, &Change::default()).unwrap().unwrap();
    world.remove(ANN, group, &[BOB]);
    world.deliver_all(BOB);
    assert_eq!(world.clients[BOB].confirm(group), Err(Error::NothingPending));
    assert_eq!(world.create(BOB, group, &Change::default()), Err(Error::NoLongerMember));
    assert_eq!(world.clients[BOB].encrypt(group, &content("?")), Err(Error::NoLongerMember));
}
