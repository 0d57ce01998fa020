//! Messages that arrive late, early, twice, or in another order.

use qpq_mls::{Change, Lost, Received};

use crate::world::{ANN, BOB, CAT, DAN, ReceiveNow as _, World, is_lost, is_refused_from, texts};

#[test]
fn messages_of_an_epoch_are_read_in_any_order() {
    let mut world = World::new(2);
    let group = world.group(&[ANN, BOB]);
    let sent: Vec<_> =
        (0..50).map(|number| world.encrypt(ANN, group, &number.to_string())).collect();
    // 7 and 50 are coprime, so each message is read once, and neighbours are far apart.
    for step in 0..50 {
        let number = (step * 7 + 3) % 50;
        let received = world.clients[BOB].receive_now(&sent[number]);
        assert_eq!(texts(&received), [number.to_string()]);
        world.restart(BOB);
    }
    for message in &sent {
        assert_eq!(world.clients[BOB].receive_now(message), [Received::Duplicate]);
    }
}

#[test]
fn messages_after_a_lost_one_are_read() {
    let mut world = World::new(2);
    let group = world.group(&[ANN, BOB]);
    for _ in 0..1_500 {
        world.encrypt(ANN, group, "lost");
    }
    world.say(ANN, group, "found");
    assert_eq!(texts(&world.deliver(BOB)), ["found"]);
}

#[test]
fn every_message_may_arrive_twice() {
    let mut world = World::new(4);
    let group = world.clients[ANN]
        .create_group("g", qpq_domain::ChannelId::DEFAULT, crate::world::now())
        .unwrap();
    world.add(ANN, group, &[BOB]);
    world.say(ANN, group, "one");
    world.add(ANN, group, &[CAT]);
    world.say(ANN, group, "two");
    let everything: Vec<_> = world.inboxes[BOB].drain(..).collect();
    assert_eq!(everything.len(), 4, "Welcome, message, commit, message");
    for message in &everything {
        let first = world.clients[BOB].receive_now(message);
        assert!(!matches!(first[..], [Received::Duplicate | Received::Ignored(_)]), "{first:?}");
        assert_eq!(world.clients[BOB].receive_now(message), [Received::Duplicate]);
    }
    for message in &everything {
        assert_eq!(world.clients[BOB].receive_now(message), [Received::Duplicate]);
    }
}

#[test]
fn a_message_before_its_welcome_waits() {
    let mut world = World::new(2);
    let group = world.clients[ANN]
        .create_group("g", qpq_domain::ChannelId::DEFAULT, crate::world::now())
        .unwrap();
    world.add(ANN, group, &[BOB]);
    world.say(ANN, group, "one");
    world.say(ANN, group, "two");
    let welcome = world.inboxes[BOB].pop_front().unwrap();
    assert_eq!(world.deliver_all(BOB), [Received::Buffered, Received::Buffered]);
    world.restart(BOB);
    let received = world.clients[BOB].receive_now(&welcome);
    assert!(matches!(
        received[..],
        [Received::Joined { .. }, Received::Message { .. }, Received::Message { .. }]
    ));
    assert_eq!(texts(&received), ["one", "two"]);
}

#[test]
fn messages_and_commits_of_later_epochs_wait_for_the_commits_between() {
    let mut world = World::new(4);
    let group = world.group(&[ANN, BOB]);
    world.add(ANN, group, &[CAT]);
    world.say(ANN, group, "after cat");
    world.add(ANN, group, &[DAN]);
    world.say(ANN, group, "after dan");
    let mut queue: Vec<_> = world.inboxes[BOB].drain(..).collect();
    let first_commit = queue.remove(0);
    for message in queue.iter().rev() {
        assert_eq!(world.clients[BOB].receive_now(message), [Received::Buffered]);
        assert_eq!(
            world.clients[BOB].receive_now(message),
            [Received::Duplicate],
            "it waits already"
        );
        world.restart(BOB);
    }
    let received = world.clients[BOB].receive_now(&first_commit);
    assert_eq!(texts(&received), ["after cat", "after dan"]);
    assert_eq!(received.iter().filter(|r| matches!(r, Received::Committed { .. })).count(), 2);
    for message in &queue {
        assert_eq!(world.clients[BOB].receive_now(message), [Received::Duplicate]);
    }
}

#[test]
fn late_messages_are_read_for_ten_epochs_and_then_no_more() {
    let mut world = World::new(3);
    let group = world.group(&[ANN, BOB]);
    let late: Vec<_> =
        (0..12).map(|number| world.encrypt(ANN, group, &number.to_string())).collect();
    for (epochs, message) in late.iter().enumerate() {
        let received = world.clients[BOB].receive_now(message);
        match epochs {
            0..=10 => assert_eq!(texts(&received), [epochs.to_string()], "{epochs} epochs late"),
            _ => assert!(is_lost(&received, Lost::NoKeys), "{received:?}"),
        }
        if epochs % 2 == 0 {
            world.add(ANN, group, &[CAT]);
        } else {
            world.remove(ANN, group, &[CAT]);
        }
        world.deliver_all(BOB);
    }
}

/// A leaf that was emptied becomes that of the next member; a late message still belongs to its
/// author.
#[test]
fn a_late_message_of_a_removed_member_is_not_attributed_to_its_successor() {
    let mut world = World::new(4);
    let group = world.group(&[ANN, BOB, CAT]);
    world.say(BOB, group, "bob was here");
    world.remove(ANN, group, &[BOB]);
    world.add(ANN, group, &[DAN]);
    world.restart(ANN);
    world.deliver_all(DAN);
    world.say(DAN, group, "dan is here");

    for author in [BOB, DAN] {
        let received = world.deliver(ANN);
        let [Received::Message { sender, .. }] = &received[..] else { panic!("{received:?}") };
        assert_eq!(*sender, world.member(author));
    }
}

#[test]
fn a_message_of_a_removed_member_after_the_removal_in_the_inbox_is_refused() {
    let mut world = World::new(4);
    let group = world.group(&[ANN, BOB, CAT]);
    let first = world.encrypt(BOB, group, "before the removal");
    let late = world.encrypt(BOB, group, "with the old keys");
    let question = world.clients[BOB].ask(group, vec![[1; 32]]).unwrap().payload;
    assert_eq!(texts(&world.receive(CAT, &first)), ["before the removal"]);
    world.remove(ANN, group, &[BOB]);
    world.add(ANN, group, &[DAN]);
    world.deliver_all(CAT);
    world.restart(CAT);
    for message in [late, question] {
        let received = world.receive(CAT, &message);
        assert!(is_refused_from(&received, world.key(BOB)), "{received:?}");
    }
}

/// The inbox of the member that removes another does not contain the commit.
#[test]
fn messages_of_a_member_that_we_removed_are_read_until_the_inbox_was_read_to_its_end() {
    let mut world = World::new(3);
    let group = world.group(&[ANN, BOB, CAT]);
    let [unread, during, late] =
        ["unread", "during", "late"].map(|text| world.encrypt(BOB, group, text));
    let before = world.clients[ANN].unpassed().unwrap();
    world.remove(ANN, group, &[BOB]);
    world.restart(ANN);
    // A pass that began before the commit does not count.
    world.clients[ANN].end_pass(&before).unwrap();
    let unpassed = world.clients[ANN].unpassed().unwrap();
    assert_eq!(texts(&world.receive(ANN, &unread)), ["unread"]);
    assert_eq!(texts(&world.receive(ANN, &during)), ["during"]);
    world.restart(ANN);
    world.clients[ANN].end_pass(&unpassed).unwrap();
    world.restart(ANN);
    assert_eq!(world.clients[ANN].unpassed().unwrap(), []);
    let received = world.receive(ANN, &late);
    assert!(is_refused_from(&received, world.key(BOB)), "{received:?}");
}

/// A message that waits for a commit keeps its place in the inbox.
#[test]
fn a_message_before_the_removal_that_waited_for_a_commit_is_read() {
    let mut world = World::new(3);
    let group = world.group(&[ANN, BOB, CAT]);
    world.change(ANN, group, &Change::default());
    world.deliver_all(BOB);
    let [early, late] = ["early", "late"].map(|text| world.encrypt(BOB, group, text));
    let renewal = world.inboxes[CAT].pop_front().unwrap();
    assert_eq!(world.receive(CAT, &early), [Received::Buffered]);
    world.remove(ANN, group, &[BOB]);
    assert_eq!(world.deliver_all(CAT), [Received::Buffered]);
    assert_eq!(world.receive(CAT, &late), [Received::Buffered]);
    let received = world.receive(CAT, &renewal);
    assert_eq!(texts(&received), ["early"]);
    assert!(is_refused_from(&received[3..], world.key(BOB)), "{received:?}");
}
