//! Devices that join a group by themselves, from the GroupInfo on the server.

use std::collections::BTreeSet;

use qpq_domain::IdentityKey;
use qpq_mls::{Change, Commit, Error, GroupChange, GroupId, Ignored, Lost, Received};

use crate::world::{ANN, BOB, CAT, DAN, World, is_lost, is_refused_from, now, texts};

impl World {
    fn known(&self, who: &[usize]) -> BTreeSet<IdentityKey> {
        who.iter().map(|&who| self.key(who)).collect()
    }

    /// Joins by itself, with a commit that the server accepts.
    fn join(&mut self, who: usize, group_info: &[u8], known: &[usize]) -> Vec<Received> {
        let commit = self.try_join(who, group_info, known).unwrap();
        let received = self.clients[who].confirm_joining(commit.group).unwrap();
        self.post_commit(&commit);
        received
    }

    fn try_join(
        &mut self,
        who: usize,
        group_info: &[u8],
        known: &[usize],
    ) -> Result<Commit, Error> {
        let known = self.known(known);
        self.clients[who].join_by_itself(group_info, &known, now())
    }

    fn assert_all_talk(&mut self, group: GroupId, who: &[usize]) {
        for &author in who {
            let text = format!("by {author}");
            self.say(author, group, &text);
            for &reader in who.iter().filter(|&&reader| reader != author) {
                assert_eq!(texts(&self.deliver_all(reader)), [&text], "read by {reader}");
            }
        }
    }
}

/// Creates a group of ann, bob and cat, and returns the GroupInfo of its epoch, by `author`.
fn group_and_info(author: usize) -> (World, GroupId, Vec<u8>) {
    let mut world = World::with_devices(4);
    let group = world.group(&[ANN, BOB, CAT]);
    let commit = world.change(author, group, &Change::default());
    for who in [ANN, BOB, CAT] {
        world.deliver_all(who);
    }
    (world, group, commit.group_info)
}

#[test]
fn a_new_device_of_a_member_joins_and_all_members_see_a_device_added() {
    let (mut world, group, info) = group_and_info(BOB);
    let phone = world.new_device(CAT, "phone");
    let received = world.join(phone, &info, &[BOB]);
    let [Received::Joined { group: joined, by }] = &received[..] else { panic!("{received:?}") };
    assert_eq!(joined.members, [ANN, BOB, CAT].map(|who| world.member(who)));
    assert_eq!(*by, world.member(CAT));
    let added = GroupChange::DeviceAdded { member: world.member(CAT), name: "phone".into() };
    let by = world.member(CAT);
    for who in [ANN, BOB, CAT] {
        let committed = Received::Committed { group, by: by.clone(), changes: vec![added.clone()] };
        assert_eq!(world.deliver(who), [committed]);
    }
    assert_eq!(world.deliver(phone), [Received::Duplicate], "its own commit");
    world.assert_all_talk(group, &[ANN, BOB, CAT, phone]);
    // The phone changes the group like any other device.
    world.restart(phone);
    world.change(phone, group, &Change::default());
    for who in [ANN, BOB, CAT] {
        let committed = Received::Committed { group, by: by.clone(), changes: vec![] };
        assert_eq!(world.deliver(who), [committed]);
    }
}

#[test]
fn a_device_that_lost_its_state_joins_again_in_place_of_its_old_leaf() {
    // This also works if the device created the GroupInfo itself, and if there is an empty leaf
    // before its own.
    for (author, has_gap) in [(ANN, false), (CAT, false), (CAT, true), (BOB, true)] {
        let (mut world, group, mut info) = group_and_info(author);
        if has_gap {
            world.remove(ANN, group, &[BOB]);
            world.add(ANN, group, &[DAN]);
            world.deliver_all(CAT);
            world.deliver_all(DAN);
            let removal = world.removal(&[DAN]);
            world.change(ANN, group, &removal);
            world.deliver_all(CAT);
            let author = if author == BOB { ANN } else { author };
            info = world.change(author, group, &Change::default()).group_info;
            world.deliver_all(ANN);
            world.deliver_all(CAT);
        }
        let before = world.clients[ANN].devices(&group).unwrap().len();
        world.lose_state(CAT);
        let received = world.join(CAT, &info, &[ANN, BOB, CAT]);
        assert!(matches!(received[..], [Received::Joined { .. }]), "{received:?}");
        let by = world.member(CAT);
        let changes = vec![GroupChange::Rejoined { member: by.clone(), name: "cat".into() }];
        assert_eq!(world.deliver(ANN), [Received::Committed { group, by, changes }]);
        for who in [ANN, CAT] {
            assert_eq!(world.clients[who].devices(&group).unwrap().len(), before);
        }
        world.assert_all_talk(group, &[ANN, CAT]);
    }
}

#[test]
fn a_device_joins_with_the_group_info_of_one_that_joined_by_itself() {
    let (mut world, group, info) = group_and_info(ANN);
    world.lose_state(CAT);
    let cats = world.try_join(CAT, &info, &[ANN]).unwrap();
    world.clients[CAT].confirm_joining(group).unwrap();
    world.post_commit(&cats);
    world.deliver_all(ANN);
    world.deliver_all(BOB);
    world.lose_state(BOB);
    assert_eq!(world.try_join(BOB, &cats.group_info, &[ANN]), Err(Error::BadGroupInfo));
    world.join(BOB, &cats.group_info, &[CAT]);
    for who in [ANN, CAT] {
        world.deliver_all(who);
    }
    world.assert_all_talk(group, &[ANN, BOB, CAT]);
}

#[test]
fn an_account_that_is_not_a_member_does_not_join() {
    let (mut world, _, info) = group_and_info(ANN);
    let dan = world.key(DAN);
    assert_eq!(world.try_join(DAN, &info, &[ANN]), Err(Error::NotAMember(dan)));
    assert_eq!(world.clients[DAN].groups(), Ok(vec![]));
}

#[test]
fn an_account_that_was_removed_does_not_join_again() {
    let (mut world, group, _) = group_and_info(ANN);
    let info = world.remove(ANN, group, &[CAT]).group_info;
    let cat = world.key(CAT);
    assert_eq!(world.try_join(CAT, &info, &[ANN]), Err(Error::NotAMember(cat)));
}

#[test]
fn group_info_of_an_account_that_is_not_known_is_refused() {
    let (mut world, group, info) = group_and_info(BOB);
    world.lose_state(CAT);
    for known in [&[][..], &[ANN], &[ANN, CAT, DAN]] {
        assert_eq!(world.try_join(CAT, &info, known), Err(Error::BadGroupInfo));
    }
    assert_eq!(world.clients[CAT].confirm_joining(group), Err(Error::NothingPending));
    world.join(CAT, &info, &[BOB]);
}

#[test]
fn damaged_group_info_is_refused_and_the_genuine_one_remains_usable() {
    let (mut world, group, info) = group_and_info(BOB);
    world.lose_state(CAT);
    let known = world.known(&[ANN, BOB, CAT]);
    for at in (0..info.len()).step_by(7).chain([info.len() - 1]) {
        let mut damaged = info.clone();
        damaged[at] ^= 1 << (at % 8);
        let result = world.clients[CAT].join_by_itself(&damaged, &known, now());
        assert_eq!(result.err(), Some(Error::BadGroupInfo), "byte {at}");
        let cut = world.clients[CAT].join_by_itself(&info[..at], &known, now());
        assert_eq!(cut.err(), Some(Error::BadGroupInfo), "cut to {at}");
    }
    for other in [&b""[..], b"rubbish", &[0; 66]] {
        let result = world.clients[CAT].join_by_itself(other, &known, now());
        assert_eq!(result.err(), Some(Error::BadGroupInfo));
    }
    world.join(CAT, &info, &[BOB]);
    world.deliver_all(ANN);
    world.deliver_all(BOB);
    world.assert_all_talk(group, &[ANN, BOB, CAT]);
}

#[test]
fn a_refused_external_commit_leaves_the_old_state_in_use() {
    let (mut world, group, info) = group_and_info(BOB);
    let commit = world.try_join(CAT, &info, &[BOB]).unwrap();
    world.say(CAT, group, "from the old state");
    assert_eq!(texts(&world.deliver(ANN)), ["from the old state"]);
    world.deliver_all(BOB);
    world.restart(CAT);
    // The server has accepted another commit for the epoch.
    world.change(ANN, group, &Change::default());
    world.clients[CAT].discard_joining(group).unwrap();
    assert_eq!(world.clients[CAT].confirm_joining(group), Err(Error::NothingPending));
    for who in [BOB, CAT] {
        world.deliver_all(who);
    }
    let old = world.receive(BOB, &commit.payload);
    assert_eq!(old, [Received::Ignored(Ignored::OldCommit)]);
    world.assert_all_talk(group, &[ANN, BOB, CAT]);
}

#[test]
fn an_external_commit_survives_restarts_until_it_is_confirmed() {
    for has_old_state in [true, false] {
        let (mut world, group, info) = group_and_info(BOB);
        if !has_old_state {
            world.lose_state(CAT);
        }
        let commit = world.try_join(CAT, &info, &[BOB]).unwrap();
        world.restart(CAT);
        world.restart(CAT);
        assert_eq!(world.clients[CAT].group(&group).unwrap().is_some(), has_old_state);
        world.post_commit(&commit);
        for who in [ANN, BOB] {
            world.deliver_all(who);
        }
        // A message of the new epoch comes before the server's answer.
        world.say(ANN, group, "early");
        assert_eq!(world.deliver_all(CAT), [Received::Buffered]);
        let received = world.clients[CAT].confirm_joining(group).unwrap();
        assert!(matches!(received[0], Received::Joined { .. }));
        assert_eq!(texts(&received), ["early"]);
        world.deliver_all(BOB);
        world.restart(CAT);
        assert_eq!(world.clients[CAT].confirm_joining(group), Err(Error::NothingPending));
        world.assert_all_talk(group, &[ANN, BOB, CAT]);
    }
}

#[test]
fn a_second_external_commit_replaces_the_first() {
    let (mut world, group, info) = group_and_info(BOB);
    world.lose_state(CAT);
    world.try_join(CAT, &info, &[BOB]).unwrap();
    world.restart(CAT);
    let later = world.change(BOB, group, &Change::default());
    world.deliver_all(ANN);
    world.join(CAT, &later.group_info, &[BOB]);
    world.inboxes[CAT].clear();
    world.deliver_all(ANN);
    world.deliver_all(BOB);
    world.restart(CAT);
    world.assert_all_talk(group, &[ANN, BOB, CAT]);
}

#[test]
fn messages_from_before_a_device_joined_are_ignored() {
    let (mut world, group, _) = group_and_info(BOB);
    let message = world.encrypt(ANN, group, "before");
    let commit = world.change(ANN, group, &Change::default());
    world.deliver_all(BOB);
    world.deliver_all(CAT);
    let phone = world.new_device(CAT, "phone");
    world.join(phone, &commit.group_info, &[ANN]);
    world.deliver_all(ANN);
    for old in [&message, &commit.payload] {
        let received = world.receive(phone, old);
        assert_eq!(received, [Received::Ignored(Ignored::BeforeJoining)]);
    }
    // A device that is added by a Welcome finds such messages before it in the inbox.
    let tablet = world.new_device(BOB, "tablet");
    assert_eq!(world.receive(tablet, &message), [Received::Buffered]);
    world.add(ANN, group, &[tablet]);
    let received = world.deliver_all(tablet);
    assert_eq!(received.last(), Some(&Received::Ignored(Ignored::BeforeJoining)));
}

/// Such a message comes, for example, from a member that was restored from an old copy of its
/// state.
#[test]
fn a_message_of_an_epoch_before_the_welcome_that_arrives_after_it_is_lost() {
    let (mut world, group, _) = group_and_info(BOB);
    let message = world.encrypt(ANN, group, "before");
    world.remove(ANN, group, &[CAT]);
    world.deliver_all(CAT);
    let back = world.add(ANN, group, &[CAT]);
    world.deliver_all(CAT);
    let received = world.receive(CAT, &message);
    assert!(is_lost(&received, Lost::NoKeys), "{received:?}");
    let [Received::Unreadable(lost)] = &received[..] else { panic!("{received:?}") };
    assert_eq!((lost.group, lost.claimed_sender), (Some(group), Some(world.key(ANN))));
    let old = world.receive(CAT, &back.payload);
    assert_eq!(old, [Received::Ignored(Ignored::BeforeJoining)], "commits are never for it");
}

#[test]
fn messages_from_before_a_device_joined_are_lost_after_its_inbox_was_read_completely() {
    let (mut world, group, _) = group_and_info(BOB);
    let [unread, late] = ["unread", "late"].map(|text| world.encrypt(ANN, group, text));
    let commit = world.change(ANN, group, &Change::default());
    let phone = world.new_device(CAT, "phone");
    world.join(phone, &commit.group_info, &[ANN]);
    world.restart(phone);
    let unpassed = world.clients[phone].unpassed().unwrap();
    assert_eq!(world.receive(phone, &unread), [Received::Ignored(Ignored::BeforeJoining)]);
    world.clients[phone].end_pass(&unpassed).unwrap();
    world.restart(phone);
    assert!(is_lost(&world.receive(phone, &late), Lost::NoKeys));
}

#[test]
fn messages_of_a_device_from_before_it_joined_again_are_read_until_its_account_is_removed() {
    let (mut world, group, info) = group_and_info(BOB);
    let [queued, late] = ["queued", "late"].map(|text| world.encrypt(CAT, group, text));
    world.join(CAT, &info, &[BOB]);
    world.deliver_all(ANN);
    assert_eq!(texts(&world.receive(ANN, &queued)), ["queued"]);
    world.deliver_all(BOB);
    world.remove(ANN, group, &[CAT]);
    world.deliver_all(BOB);
    let received = world.receive(BOB, &late);
    assert!(is_refused_from(&received, world.key(CAT)), "{received:?}");
}

#[test]
fn messages_from_before_a_device_joined_again_are_lost() {
    let (mut world, group, _) = group_and_info(BOB);
    let message = world.encrypt(ANN, group, "before");
    let commit = world.change(ANN, group, &Change::default());
    let since = world.clients[CAT].joined_at(&group).unwrap();
    world.join(CAT, &commit.group_info, &[ANN]);
    world.restart(CAT);
    assert_eq!(world.clients[CAT].joined_at(&group).unwrap(), since, "it was a member already");
    assert!(is_lost(&world.receive(CAT, &message), Lost::NoKeys));
    let old = world.receive(CAT, &commit.payload);
    assert_eq!(old, [Received::Ignored(Ignored::OldCommit)]);
}

#[test]
fn of_two_devices_that_join_in_the_same_epoch_the_second_joins_in_the_next() {
    let (mut world, group, info) = group_and_info(ANN);
    for who in [BOB, CAT] {
        world.lose_state(who);
    }
    let bobs = world.try_join(BOB, &info, &[ANN]).unwrap();
    let cats = world.try_join(CAT, &info, &[ANN]).unwrap();
    world.clients[CAT].confirm_joining(group).unwrap();
    world.post_commit(&cats);
    world.clients[BOB].discard_joining(group).unwrap();
    world.deliver_all(ANN);
    assert_ne!(bobs.payload, cats.payload);
    let info = world.change(ANN, group, &Change::default()).group_info;
    world.inboxes[BOB].clear();
    world.deliver_all(CAT);
    world.join(BOB, &info, &[ANN]);
    world.deliver_all(ANN);
    world.deliver_all(CAT);
    world.assert_all_talk(group, &[ANN, BOB, CAT]);
}

#[test]
fn a_device_joins_again_in_a_direct_conversation() {
    let mut world = World::with_devices(2);
    let (ann, bob) = (world.key(ANN), world.key(BOB));
    let direct = world.clients[ANN].create_direct(bob, now()).unwrap();
    let info = world.add(ANN, direct, &[BOB]).group_info;
    world.deliver_all(BOB);
    world.lose_state(BOB);
    world.join(BOB, &info, &[ANN]);
    world.deliver_all(ANN);
    assert_eq!(world.clients[BOB].direct(&ann).unwrap(), Some(direct));
    world.assert_all_talk(direct, &[ANN, BOB]);
}

#[test]
fn an_external_commit_that_is_confirmed_late_does_not_replace_a_later_state() {
    let (mut world, group, info) = group_and_info(ANN);
    world.lose_state(CAT);
    let commit = world.try_join(CAT, &info, &[ANN]).unwrap();
    // The server has accepted it, and its answer was lost. Meanwhile the device was removed and
    // added again.
    world.post_commit(&commit);
    world.deliver_all(ANN);
    world.remove(ANN, group, &[CAT]);
    world.add(ANN, group, &[CAT]);
    world.deliver_all(BOB);
    let received = world.deliver_all(CAT);
    assert!(matches!(received.last(), Some(Received::Ignored(Ignored::BeforeJoining))));
    world.say(ANN, group, "for the later state");
    world.restart(CAT);
    assert_eq!(world.clients[CAT].confirm_joining(group), Ok(vec![Received::Duplicate]));
    assert_eq!(world.clients[CAT].confirm_joining(group), Err(Error::NothingPending));
    assert_eq!(texts(&world.deliver_all(CAT)), ["for the later state"]);
    world.deliver_all(BOB);
    world.restart(CAT);
    world.assert_all_talk(group, &[ANN, BOB, CAT]);
}
