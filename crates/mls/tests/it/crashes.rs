//! Clients that end at any moment and start again from what they saved.

use std::collections::BTreeMap;

use proptest::{prelude::*, sample::Index};
use qpq_domain::ChannelId;
use qpq_mls::{Arrival, GroupId, Ignored, Received};

use crate::world::{ANN, BOB, CAT, Hear as _, World, content, now, restored};

#[test]
fn a_crash_between_saving_and_acknowledging_makes_a_duplicate() {
    let mut world = World::new(3);
    let group = world.clients[ANN].create_group("g", ChannelId::DEFAULT, now()).unwrap();
    world.add(ANN, group, &[BOB]);
    world.say(ANN, group, "one");
    world.add(ANN, group, &[CAT]);
    for message in world.inboxes[BOB].clone() {
        let before = restored(&mut world.clients[BOB]);
        let first = world.clients[BOB].hear(&message);
        // Saved, not acknowledged: it comes again.
        world.restart(BOB);
        assert_eq!(world.clients[BOB].hear(&message), [Received::Duplicate]);
        // Not even saved: it comes again and means the same.
        let mut earlier = before;
        assert_eq!(earlier.hear(&message), first);
    }
}

#[test]
fn an_older_copy_that_skips_keys_is_read_by_everyone() {
    let mut world = World::new(3);
    let group = world.group(&[ANN, BOB, CAT]);
    let night = restored(&mut world.clients[BOB]);
    for number in 0..5 {
        world.say(BOB, group, &format!("day {number}"));
    }
    world.deliver_all(ANN);
    world.clients[BOB] = night;
    world.clients[BOB].skip_keys(5).unwrap();
    world.restart(BOB);
    world.say(BOB, group, "next day");
    assert_eq!(crate::world::texts(&world.deliver_all(ANN)), ["next day"]);
    assert_eq!(world.deliver_all(CAT).len(), 6, "also by who has read nothing yet");
    world.clients[BOB].skip_keys(1_000_000).unwrap();
    let refused = world.clients[BOB].encrypt(group, &content("too far"));
    assert_eq!(refused, Err(qpq_mls::Error::CopyTooOld));
}

#[derive(Debug, Clone)]
enum Step {
    Say(Index),
    Add(Index),
    Remove(Index),
    /// Delivers one of the next few messages of an inbox, out of turn.
    Deliver(Index, usize),
    /// Delivers the next message, restarts from the state before, delivers it again, restarts, and
    /// once more.
    DeliverAcrossCrashes(Index),
    Restart(Index),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => any::<Index>().prop_map(Step::Say),
        1 => any::<Index>().prop_map(Step::Add),
        1 => any::<Index>().prop_map(Step::Remove),
        6 => (any::<Index>(), 0..3_usize).prop_map(|(who, ahead)| Step::Deliver(who, ahead)),
        2 => any::<Index>().prop_map(Step::DeliverAcrossCrashes),
        2 => any::<Index>().prop_map(Step::Restart),
    ]
}

/// The world, and what a plain model expects of it: everyone who is never removed reads each
/// message sent to them once.
struct Model {
    world: World,
    group: GroupId,
    /// How many times each recipient got each message: by recipient and text.
    got: BTreeMap<(usize, String), usize>,
    author: BTreeMap<String, usize>,
    was_removed: [bool; 4],
    sent: usize,
    /// How many epochs the slowest may be behind the creator.
    lag: usize,
}

impl Model {
    fn new() -> Self {
        let mut world = World::new(4);
        let group = world.group(&[ANN, BOB, CAT]);
        Self {
            world,
            group,
            got: BTreeMap::new(),
            author: BTreeMap::new(),
            was_removed: [false; 4],
            sent: 0,
            lag: 0,
        }
    }

    fn run(&mut self, step: &Step) {
        match step {
            Step::Say(who) => self.say(who.index(4)),
            Step::Add(who) => self.change(1 + who.index(3), false),
            Step::Remove(who) => self.change(1 + who.index(3), true),
            Step::Deliver(who, ahead) => self.deliver(who.index(4), *ahead),
            Step::DeliverAcrossCrashes(who) => self.deliver_across_crashes(who.index(4)),
            Step::Restart(who) => self.world.restart(who.index(4)),
        }
    }

    fn say(&mut self, who: usize) {
        let text = format!("{} by {who}", self.sent);
        let Ok(parcel) = self.world.clients[who].encrypt(self.group, &content(&text)) else {
            return;
        };
        self.sent += 1;
        for recipient in 0..4 {
            if parcel.recipients.contains(&self.world.key(recipient)) {
                self.got.insert((recipient, text.clone()), 0);
            }
        }
        self.author.insert(text, who);
        self.world.post(&parcel);
    }

    /// Adds or removes a member, if that is a change.
    fn change(&mut self, who: usize, remove: bool) {
        let key = self.world.key(who);
        let members = self.world.clients[ANN].group(&self.group).unwrap().unwrap().members;
        let is_member = members.iter().any(|member| member.identity == key);
        if remove != is_member {
            return;
        }
        // Messages are read for ten epochs after theirs.
        if self.lag == 10 {
            self.deliver_everything();
        }
        self.lag += 1;
        if remove {
            let commit = self.world.clients[ANN].remove(self.group, &[key]).unwrap();
            self.was_removed[who] = true;
            self.world.post(&commit);
        } else {
            self.world.add(ANN, self.group, &[who]);
        }
    }

    fn deliver(&mut self, who: usize, ahead: usize) {
        let inbox = &mut self.world.inboxes[who];
        let Some(message) = inbox.remove(ahead.min(inbox.len().saturating_sub(1))) else { return };
        let received = self.world.clients[who].hear(&message);
        self.note(who, received);
    }

    fn deliver_across_crashes(&mut self, who: usize) {
        let Some(message) = self.world.inboxes[who].pop_front() else { return };
        // The clock may go on between a crash and the next try.
        let arrival = Arrival { at: now(), channel: ChannelId::DEFAULT };
        let before = restored(&mut self.world.clients[who]);
        let lost = self.world.clients[who].receive(&message, arrival).unwrap();
        self.world.clients[who] = before;
        let received = self.world.clients[who].receive(&message, arrival).unwrap();
        assert_eq!(received, lost, "the same state makes the same of the same message");
        self.world.restart(who);
        let again = self.world.clients[who].receive(&message, arrival).unwrap();
        // Who is out of the group does not look at its messages again.
        assert!(
            matches!(again[..], [Received::Duplicate])
                || again == received
                || again == [Received::Ignored(Ignored::NoLongerMember)],
            "{received:?}, then {again:?}"
        );
        if again == received {
            assert!(!matches!(
                again[0],
                Received::Joined(_) | Received::Message { .. } | Received::Committed { .. }
            ));
        }
        self.note(who, received);
    }

    fn note(&mut self, who: usize, received: Vec<Received>) {
        for result in received {
            match result {
                Received::Message { sender, content, group, .. } => {
                    assert_eq!(group, self.group);
                    assert_eq!(sender, self.world.member(self.author[&content.text]));
                    *self.got.get_mut(&(who, content.text)).expect("it was for them") += 1;
                }
                Received::Ignored(reason) => {
                    assert!(self.was_removed[who], "{who} has always been there, yet: {reason}");
                }
                Received::Duplicate => {
                    assert!(self.was_removed[who], "nothing is delivered twice here");
                }
                _ => {}
            }
        }
    }

    fn deliver_everything(&mut self) {
        for who in 0..4 {
            while !self.world.inboxes[who].is_empty() {
                self.deliver(who, 0);
            }
        }
        self.lag = 0;
    }

    fn finish(mut self) {
        self.deliver_everything();
        for ((recipient, text), times) in &self.got {
            assert!(*times <= 1, "{recipient} read {text:?} {times} times");
            assert!(*times == 1 || self.was_removed[*recipient], "{recipient} never read {text:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn whatever_the_order_of_doings_and_crashes_everyone_reads_everything_once(
        steps in prop::collection::vec(step(), 1..80),
    ) {
        let mut model = Model::new();
        for step in &steps {
            model.run(step);
        }
        model.finish();
    }
}
