//! Clients that end at any moment and start again from their saved state.

use std::collections::BTreeMap;

use proptest::{prelude::*, sample::Index};
use qpq_domain::ChannelId;
use qpq_mls::{
    Arrival, Change, Client, Commit, Error, GroupId, GroupSummary, Ignored, Lost, Received,
};
use sha2::{Digest as _, Sha256};

use crate::world::{ANN, BOB, CAT, DAN, ReceiveNow as _, World, content, now, restored};

#[test]
fn a_message_saved_and_not_acknowledged_before_a_crash_is_a_duplicate() {
    let mut world = World::new(3);
    let group = world.clients[ANN].create_group("g", ChannelId::DEFAULT, now()).unwrap();
    world.add(ANN, group, &[BOB]);
    world.say(ANN, group, "one");
    world.add(ANN, group, &[CAT]);
    for message in world.inboxes[BOB].clone() {
        let before = restored(&mut world.clients[BOB]);
        let first = world.clients[BOB].receive_now(&message);
        // The state was saved and the message not acknowledged: it arrives again.
        world.restart(BOB);
        assert_eq!(world.clients[BOB].receive_now(&message), [Received::Duplicate]);
        // The state was not even saved: the message arrives again, with the same result.
        let mut earlier = before;
        assert_eq!(earlier.receive_now(&message), first);
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
    /// Creates a commit, which the server has not seen yet.
    Create(Index, Wish),
    /// Offers the commit of a device to the server, for the first time or again. The answer arrives
    /// or is lost.
    Offer(Index, bool),
    /// Delivers all of an inbox.
    DeliverAll(Index),
    /// Delivers one of the next few messages of an inbox, out of turn.
    Deliver(Index, usize),
    /// Delivers the next message three times: loses the state after the first time, and restarts
    /// after the second.
    DeliverAcrossCrashes(Index),
    Restart(Index),
    /// Creates a further device of an account, which is not in the group yet.
    NewDevice(Index),
    LoseState(Index),
}

/// The change that a device attempts.
#[derive(Debug, Clone)]
enum Wish {
    Renewal,
    Name,
    Addition(Index),
    DeviceRemoval(Index),
    AccountRemoval(Index),
    Promotion(Index),
    Demotion(Index),
    /// To join by itself, even if the device regards itself as a member.
    Joining,
    /// To join by itself if the device does not regard itself as a member.
    Return,
}

fn wish() -> impl Strategy<Value = Wish> {
    prop_oneof![
        3 => Just(Wish::Renewal),
        1 => Just(Wish::Name),
        4 => any::<Index>().prop_map(Wish::Addition),
        2 => any::<Index>().prop_map(Wish::DeviceRemoval),
        1 => any::<Index>().prop_map(Wish::AccountRemoval),
        1 => any::<Index>().prop_map(Wish::Promotion),
        1 => any::<Index>().prop_map(Wish::Demotion),
        1 => Just(Wish::Joining),
        3 => Just(Wish::Return),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => any::<Index>().prop_map(Step::Say),
        8 => (any::<Index>(), wish()).prop_map(|(who, wish)| Step::Create(who, wish)),
        8 => (any::<Index>(), prop::bool::weighted(0.7))
            .prop_map(|(who, answer)| Step::Offer(who, answer)),
        6 => any::<Index>().prop_map(Step::DeliverAll),
        6 => (any::<Index>(), 0..3_usize).prop_map(|(who, ahead)| Step::Deliver(who, ahead)),
        2 => any::<Index>().prop_map(Step::DeliverAcrossCrashes),
        2 => any::<Index>().prop_map(Step::Restart),
        2 => any::<Index>().prop_map(Step::NewDevice),
        1 => any::<Index>().prop_map(Step::LoseState),
    ]
}

/// A commit whose author does not know the server's answer yet.
struct Offered {
    commit: Commit,
    /// The epoch for which the commit was created.
    epoch: u64,
    /// The devices that the commit adds, each with the number of times it had lost its state.
    added: Vec<(usize, u32)>,
    removed: Vec<usize>,
    is_joining: bool,
    is_accepted: bool,
}

struct Said {
    author: usize,
    epoch: u64,
    digest: [u8; 32],
}

/// The maximum number of devices.
const MAX_DEVICES: usize = 7;
/// The maximum number of epochs that a device may be behind the server: a message can be read for
/// ten epochs after its own.
const MAX_LAG: u64 = 10;

/// The devices, a model of the server, and the expected results.
///
/// Each message is read once by each device that has been a member since it was sent. A message of
/// a device that was removed may be refused once instead.
struct Model {
    world: World,
    group: GroupId,
    /// The server's epoch of the group.
    epoch: u64,
    group_info: Vec<u8>,
    /// The last epoch at which every inbox was empty.
    settled_at: u64,
    /// The devices in the group, with the epoch of their present leaf; `None` for one that has lost
    /// its state.
    leaves: BTreeMap<usize, Option<u64>>,
    offered: BTreeMap<usize, Offered>,
    /// Devices that were not in the group all the time.
    is_unsteady: [bool; MAX_DEVICES],
    /// The number of times that each device has lost its state.
    losses: [u32; MAX_DEVICES],
    said: BTreeMap<String, Said>,
    /// The number of times that each device read, or refused, each message.
    read: BTreeMap<(usize, String), usize>,
}

impl Model {
    fn new() -> Self {
        let mut world = World::with_devices(4);
        let channel = ChannelId::new([5; 16]);
        let group = world.clients[ANN].create_group("friends", channel, now()).unwrap();
        let group_info = world.add(ANN, group, &[BOB, CAT]).group_info;
        for who in [BOB, CAT] {
            world.deliver_all(who);
        }
        let mut is_unsteady = [true; MAX_DEVICES];
        is_unsteady[..3].fill(false);
        Self {
            world,
            group,
            epoch: 1,
            group_info,
            settled_at: 1,
            leaves: [ANN, BOB, CAT].map(|who| (who, Some(1))).into(),
            offered: BTreeMap::new(),
            is_unsteady,
            losses: [0; MAX_DEVICES],
            said: BTreeMap::new(),
            read: BTreeMap::new(),
        }
    }

    fn run(&mut self, step: &Step) {
        let size = self.world.clients.len();
        match step {
            Step::Say(who) => self.on(who, Self::is_active, |model, who| model.say(who)),
            Step::Create(who, wish) => {
                let may = |model: &Self, who| match wish {
                    Wish::Return => !model.is_active(who) && model.leaves.contains_key(&who),
                    Wish::Joining => true,
                    _ => model.is_active(who),
                };
                self.on(who, may, |model, who| model.create(who, wish));
            }
            Step::Offer(who, is_answered) => {
                let has_some = |model: &Self, who| model.offered.contains_key(&who);
                self.on(who, has_some, |model, who| model.offer(who, *is_answered));
            }
            Step::DeliverAll(who) => self.on(who, Self::has_mail, Self::deliver_all),
            Step::Deliver(who, ahead) => {
                self.on(who, Self::has_mail, |model, who| model.deliver(who, *ahead));
            }
            Step::DeliverAcrossCrashes(who) => {
                self.on(who, Self::has_mail, Self::deliver_across_crashes);
            }
            Step::Restart(who) => self.world.restart(who.index(size)),
            Step::NewDevice(who) if size < MAX_DEVICES => {
                self.world.new_device(who.index(4), &format!("device {size}"));
            }
            Step::NewDevice(_) => {}
            Step::LoseState(who) => self.lose_state(who.index(size)),
        }
    }

    /// Runs a step on one of the devices for which `may` returns `true`.
    fn on(
        &mut self,
        index: &Index,
        may: impl Fn(&Self, usize) -> bool,
        step: impl FnOnce(&mut Self, usize),
    ) {
        if let Some(who) = self.pick(index, may) {
            step(self, who);
        }
    }

    /// Picks one of the devices for which `may` returns `true`.
    fn pick(&self, index: &Index, may: impl Fn(&Self, usize) -> bool) -> Option<usize> {
        let devices: Vec<_> = (0..self.world.clients.len()).filter(|&who| may(self, who)).collect();
        (!devices.is_empty()).then(|| *index.get(&devices))
    }

    fn has_mail(&self, who: usize) -> bool {
        !self.world.inboxes[who].is_empty()
    }

    fn summary(&self, who: usize) -> Option<GroupSummary> {
        self.world.clients[who].group(&self.group).unwrap()
    }

    fn is_active(&self, who: usize) -> bool {
        self.summary(who).is_some_and(|group| group.active)
    }

    fn say(&mut self, who: usize) {
        let text = format!("{} by {who}", self.said.len());
        let Ok(parcel) = self.world.clients[who].encrypt(self.group, &content(&text)) else {
            return;
        };
        let epoch = self.summary(who).unwrap().epoch;
        let digest = Sha256::digest(&parcel.payload).into();
        self.said.insert(text, Said { author: who, epoch, digest });
        self.world.post(&parcel);
    }

    fn create(&mut self, who: usize, wish: &Wish) {
        if self.offered.contains_key(&who) {
            return;
        }
        match wish {
            Wish::Joining | Wish::Return => self.create_joining(who),
            _ => self.create_commit(who, wish),
        }
    }

    fn create_commit(&mut self, who: usize, wish: &Wish) {
        let size = self.world.clients.len();
        let key = |index: &Index| vec![self.world.key(index.index(4))];
        let (mut added, mut removed) = (Vec::new(), Vec::new());
        let change = match wish {
            Wish::Name => Change { name: Some(format!("by {who}")), ..Change::default() },
            Wish::Promotion(index) => Change { promote: key(index), ..Change::default() },
            Wish::Demotion(index) => Change { demote: key(index), ..Change::default() },
            Wish::Addition(index) => {
                let is_outside = |model: &Self, who| !model.leaves.contains_key(&who);
                let Some(device) = self.pick(index, is_outside) else { return };
                added.push((device, self.losses[device]));
                self.world.addition(&[device])
            }
            Wish::DeviceRemoval(index) => {
                removed.push(index.index(size));
                self.world.device_removal(removed[0])
            }
            Wish::AccountRemoval(index) => {
                let account = self.world.key(index.index(4));
                removed.extend((0..size).filter(|&device| self.world.key(device) == account));
                self.world.removal(&[index.index(4)])
            }
            Wish::Renewal | Wish::Joining | Wish::Return => Change::default(),
        };
        let epoch = self.summary(who).unwrap().epoch;
        let Ok(Some(commit)) = self.world.create(who, self.group, &change) else { return };
        let (is_joining, is_accepted) = (false, false);
        let offered = Offered { commit, epoch, added, removed, is_joining, is_accepted };
        self.offered.insert(who, offered);
    }

    fn create_joining(&mut self, who: usize) {
        let known = (ANN..=DAN).map(|who| self.world.key(who)).collect();
        let client = &mut self.world.clients[who];
        let commit = match client.join_by_itself(&self.group_info, &known, now()) {
            Ok(commit) => commit,
            Err(error) => {
                let key = self.world.key(who);
                assert_eq!(error, Error::NotAMember(key));
                assert!(!self.leaves.keys().any(|&device| self.world.key(device) == key));
                return;
            }
        };
        let (added, removed) = (vec![(who, self.losses[who])], vec![who]);
        let (is_joining, is_accepted) = (true, false);
        let epoch = self.epoch;
        let offered = Offered { commit, epoch, added, removed, is_joining, is_accepted };
        self.offered.insert(who, offered);
    }

    /// Offers a commit to the server, which accepts it if its epoch is the server's own.
    fn offer(&mut self, who: usize, is_answered: bool) {
        if self.epoch - self.settled_at == MAX_LAG {
            self.settle();
        }
        let Some(mut offered) = self.offered.remove(&who) else { return };
        let is_new = !offered.is_accepted;
        if is_new && offered.epoch == self.epoch {
            offered.is_accepted = true;
            self.accept(&offered);
        }
        match offered.is_accepted {
            true if is_answered => self.confirm(who, &offered),
            true => drop(self.offered.insert(who, offered)),
            false if offered.is_joining => {
                self.world.clients[who].discard_joining(self.group).unwrap();
            }
            false => self.world.clients[who].discard(self.group).unwrap(),
        }
    }

    fn accept(&mut self, offered: &Offered) {
        self.epoch += 1;
        self.group_info.clone_from(&offered.commit.group_info);
        for device in &offered.removed {
            self.leaves.remove(device);
            self.is_unsteady[*device] = true;
        }
        for &(device, losses) in &offered.added {
            // The Welcome may be for a package that the device has lost.
            let is_usable = losses == self.losses[device];
            self.leaves.entry(device).or_insert(is_usable.then_some(self.epoch));
        }
        self.world.post_commit(&offered.commit);
    }

    fn confirm(&mut self, who: usize, offered: &Offered) {
        let client = &mut self.world.clients[who];
        let results = match offered.is_joining {
            true => client.confirm_joining(self.group),
            false => client.confirm(self.group),
        };
        match results {
            Ok(results) => self.note(who, results),
            // The device was removed and added again in between.
            Err(error) => {
                assert_eq!(error, Error::NothingPending);
                assert!(self.is_unsteady[who]);
            }
        }
    }

    fn lose_state(&mut self, who: usize) {
        self.world.lose_state(who);
        self.offered.remove(&who);
        self.is_unsteady[who] = true;
        self.losses[who] += 1;
        if let Some(since) = self.leaves.get_mut(&who) {
            *since = None;
        }
    }

    fn deliver(&mut self, who: usize, ahead: usize) {
        let inbox = &mut self.world.inboxes[who];
        let Some(message) = inbox.remove(ahead.min(inbox.len().saturating_sub(1))) else { return };
        let received = self.world.receive(who, &message);
        self.note(who, received);
    }

    fn deliver_all(&mut self, who: usize) {
        let unpassed = self.world.clients[who].unpassed().unwrap();
        while self.has_mail(who) {
            self.deliver(who, 0);
        }
        self.world.clients[who].end_pass(&unpassed).unwrap();
    }

    fn deliver_across_crashes(&mut self, who: usize) {
        let Some(message) = self.world.inboxes[who].pop_front() else { return };
        // Both deliveries have the same arrival, since the clock may advance between a crash and
        // the next attempt.
        let arrival = Arrival { at: now(), channel: ChannelId::DEFAULT };
        let before = restored(&mut self.world.clients[who]);
        let lost = self.world.receive_at(who, &message, arrival);
        self.world.clients[who] = before;
        let received = self.world.receive_at(who, &message, arrival);
        assert_eq!(received, lost, "the same state makes the same of the same message");
        self.world.restart(who);
        assert_eq!(self.world.receive_at(who, &message, arrival), [Received::Duplicate]);
        self.note(who, received);
    }

    fn note(&mut self, who: usize, received: Vec<Received>) {
        let is_steady = !self.is_unsteady[who];
        for result in received {
            match result {
                Received::Message { sender, content, group, .. } => {
                    assert_eq!(group, self.group);
                    assert_eq!(sender, self.world.member(self.said[&content.text].author));
                    *self.read.entry((who, content.text)).or_default() += 1;
                }
                Received::Ignored(Ignored::OwnMessage | Ignored::ForAnotherDevice) => {}
                Received::Ignored(Ignored::BadWelcome) => {
                    // The device was removed, and added again by a member that is not an admin. The
                    // device has not processed its removal yet.
                    assert!(!is_steady);
                    if let Some(since) = self.leaves.get_mut(&who) {
                        *since = None;
                    }
                }
                Received::Ignored(reason) => {
                    assert!(!is_steady, "{who} has always been there, yet: {reason}");
                }
                Received::Unreadable(lost) if lost.reason == Lost::NotAMember => {
                    let is_it = |said: &&(_, &Said)| said.1.digest == lost.digest;
                    let (text, said) = self.said.iter().find(|said| is_it(&said)).unwrap();
                    assert!(self.is_unsteady[said.author], "{} was removed", said.author);
                    assert_eq!(lost.claimed_sender, Some(self.world.key(said.author)));
                    *self.read.entry((who, text.clone())).or_default() += 1;
                }
                Received::Unreadable(lost) => {
                    assert!(!is_steady, "{who} has always been there, yet: {lost:?}");
                }
                _ => {}
            }
        }
    }

    /// Completes all commits and deliveries in progress.
    fn settle(&mut self) {
        for who in 0..self.world.clients.len() {
            if self.offered.get(&who).is_some_and(|offered| offered.is_accepted) {
                let offered = self.offered.remove(&who).unwrap();
                self.confirm(who, &offered);
            }
        }
        for who in 0..self.world.clients.len() {
            self.deliver_all(who);
        }
        self.settled_at = self.epoch;
    }

    /// Lets each device that has lost its state, and has a leaf, join again.
    fn bring_back(&mut self) {
        for who in 0..self.world.clients.len() {
            if self.leaves.get(&who) == Some(&None) {
                self.settle();
                self.offered.remove(&who);
                self.create_joining(who);
                self.offer(who, true);
            }
        }
        self.settle();
    }

    fn finish(mut self) {
        for who in 0..self.world.clients.len() {
            self.offer(who, true);
        }
        self.settle();
        self.bring_back();
        let group = self.group;
        let names = |client: &mut Client| {
            let mut devices = client.devices(&group).unwrap();
            devices.sort_by(|one, other| one.name().cmp(other.name()));
            devices.iter().map(|device| device.name().to_owned()).collect::<Vec<_>>()
        };
        let mut expected: Vec<_> = self
            .leaves
            .keys()
            .map(|&who| self.world.clients[who].device().unwrap().name().to_owned())
            .collect();
        expected.sort();
        let first = *self.leaves.keys().next().expect("an author is never removed");
        let state = self.summary(first);
        assert_eq!(state.as_ref().map(|group| group.epoch), Some(self.epoch));
        for who in 0..self.world.clients.len() {
            if self.leaves.contains_key(&who) {
                assert_eq!(self.summary(who), state, "{who} is where the others are");
                assert_eq!(names(&mut self.world.clients[who]), expected);
            } else {
                assert!(!self.is_active(who), "{who} knows that it is not a member");
            }
        }
        for (text, said) in &self.said {
            for who in 0..self.world.clients.len() {
                let times = self.read.get(&(who, text.clone())).copied().unwrap_or_default();
                assert!(times <= 1, "{who} read {text:?} {times} times");
                let since = self.leaves.get(&who).copied().flatten();
                let is_for = who != said.author && since.is_some_and(|since| since <= said.epoch);
                assert!(times == 1 || !is_for, "{who} never read {text:?}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn in_any_order_of_steps_and_crashes_all_end_in_one_epoch_and_read_everything_once(
        steps in prop::collection::vec(step(), 1..240),
    ) {
        let mut model = Model::new();
        for step in &steps {
            model.run(step);
        }
        model.finish();
    }
}
