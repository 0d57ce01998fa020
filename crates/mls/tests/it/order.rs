//! Messages that come late, early, twice, or in another order.

use qpq_mls::{Lost, Received};

use crate::world::{ANN, BOB, CAT, DAN, ReceiveNow as _, World, is_lost, texts};

#[test]
fn messages_of_an_epoch_are_read_in_any_order() {
    let mut world = World::new(2);
    let group = world.group(&[ANN, BOB]);
    let sent: Vec<_> =
        (0..50).map(|number| world.encrypt(ANN, group, &number.to_string())).collect();
    // 7 is prime to 50: every message once, neighbours far apart.
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
fn everything_may_come_twice() {
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

/// A leaf that was emptied is given to the next one added; a late message is still its author's.
#[test]
fn a_late_message_of_a_removed_member_is_not_taken_for_its_successors() {
    let mut world = World::new(4);
    let group = world.group(&[ANN, BOB, CAT]);
    let bobs = world.encrypt(BOB, group, "bob was here");
    world.remove(ANN, group, &[BOB]);
    world.add(ANN, group, &[DAN]);
    world.deliver_all(CAT);
    world.restart(CAT);
    world.deliver_all(DAN);
    world.say(DAN, group, "dan is here");

    for (received, author) in
        [(world.clients[CAT].receive_now(&bobs), BOB), (world.deliver(CAT), DAN)]
    {
        let [Received::Message { sender, .. }] = &received[..] else { panic!("{received:?}") };
        assert_eq!(*sender, world.member(author));
    }
}
