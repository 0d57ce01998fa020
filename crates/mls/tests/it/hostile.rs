//! Bytes from a dishonest sender cause no panic, change no state that they may not change, and lose
//! no message.

use proptest::{prelude::*, sample::Index};
use qpq_mls::{Change, Client, Received};

use crate::world::{ANN, BOB, CAT, ReceiveNow as _, World, now, restored, texts};

/// Returns bob and seven messages for him, each of which needs those before it: a Welcome, a
/// message, a commit, a message, a commit, an external commit, which is not encrypted, and a
/// message.
fn bob_and_his_inbox() -> (Client, Vec<Vec<u8>>) {
    let mut world = World::new(3);
    let group = world.clients[ANN]
        .create_group("g", qpq_domain::ChannelId::DEFAULT, crate::world::now())
        .unwrap();
    world.add(ANN, group, &[BOB]);
    world.say(ANN, group, "one");
    world.add(ANN, group, &[CAT]);
    world.say(ANN, group, "two");
    let info = world.change(ANN, group, &Change::default()).group_info;
    let phone = world.new_device(ANN, "phone");
    let known = [world.key(ANN)].into();
    let commit = world.clients[phone].join_by_itself(&info, &known, now()).unwrap();
    world.clients[phone].confirm_joining(group).unwrap();
    world.post_commit(&commit);
    world.say(phone, group, "three");
    let inbox = world.inboxes[BOB].drain(..).collect();
    (world.clients.remove(BOB), inbox)
}

fn is_harmless(received: &[Received]) -> bool {
    matches!(
        received,
        [Received::Ignored(_) | Received::Unreadable(_) | Received::Buffered | Received::Duplicate]
    )
}

#[derive(Debug, Clone)]
enum Damage {
    Flip(Index, u8),
    Cut(Index),
    Insert(Index, Vec<u8>),
    Remove(Index),
    Repeat(Index),
    Splice(Index, Index),
}

impl Damage {
    fn apply(&self, message: &[u8], others: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = message.to_vec();
        match self {
            Self::Flip(at, bits) => {
                let at = at.index(bytes.len());
                bytes[at] ^= bits;
            }
            Self::Cut(at) => bytes.truncate(at.index(bytes.len())),
            Self::Insert(at, inserted) => {
                let at = at.index(bytes.len());
                bytes.splice(at..at, inserted.iter().copied());
            }
            Self::Remove(at) => drop(bytes.remove(at.index(bytes.len()))),
            Self::Repeat(at) => bytes.extend_from_within(at.index(message.len())..),
            Self::Splice(which, at) => {
                let other = &others[which.index(others.len())];
                let at = at.index(bytes.len().min(other.len()));
                bytes.truncate(at);
                bytes.extend_from_slice(&other[at..]);
            }
        }
        bytes
    }
}

fn damage() -> impl Strategy<Value = Damage> {
    prop_oneof![
        4 => (any::<Index>(), 1..=u8::MAX).prop_map(|(at, bits)| Damage::Flip(at, bits)),
        1 => any::<Index>().prop_map(Damage::Cut),
        1 => (any::<Index>(), prop::collection::vec(any::<u8>(), 1..40))
            .prop_map(|(at, b)| Damage::Insert(at, b)),
        1 => any::<Index>().prop_map(Damage::Remove),
        1 => any::<Index>().prop_map(Damage::Repeat),
        1 => (any::<Index>(), any::<Index>()).prop_map(|(which, at)| Damage::Splice(which, at)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(80))]

    #[test]
    fn random_bytes_do_not_prevent_the_reading_of_later_messages(
        kind in 0_u8..7,
        tail in prop::collection::vec(any::<u8>(), 0..500),
    ) {
        let (mut bob, inbox) = bob_and_his_inbox();
        bob.receive_now(&inbox[0]);
        prop_assert!(is_harmless(&bob.receive_now(&tail)));
        let framed = [&[0, 1, 0, kind], &tail[..]].concat();
        prop_assert!(is_harmless(&bob.receive_now(&framed)));
        let received = bob.receive_now(&inbox[1]);
        prop_assert_eq!(texts(&received), ["one"]);
    }

    /// Damaged copies of every message before, between and after the real ones change nothing.
    #[test]
    fn damaged_copies_of_messages_change_nothing(
        damages in prop::collection::vec((any::<Index>(), damage()), 7 * 3),
    ) {
        let (mut bob, inbox) = bob_and_his_inbox();
        let mut received = Vec::new();
        for (at, message) in inbox.iter().enumerate() {
            for (which, damage) in &damages[3 * at..3 * at + 3] {
                let damaged = damage.apply(&inbox[which.index(inbox.len())], &inbox);
                if !inbox.contains(&damaged) {
                    let result = bob.receive_now(&damaged);
                    prop_assert!(is_harmless(&result), "{:?}", result);
                }
            }
            received.extend(bob.receive_now(message));
            bob = restored(&mut bob);
        }
        received.retain(|result| !is_harmless(std::slice::from_ref(result)));
        prop_assert!(matches!(
            received[..],
            [
                Received::Joined { .. },
                Received::Message { .. },
                Received::Committed { .. },
                Received::Message { .. },
                Received::Committed { .. },
                Received::Committed { .. },
                Received::Message { .. }
            ]
        ), "{:?}", received);
        prop_assert_eq!(texts(&received), ["one", "two", "three"]);
    }
}

#[test]
fn each_single_flipped_bit_of_a_welcome_leaves_the_real_one_good() {
    let (mut bob, inbox) = bob_and_his_inbox();
    let mut damaged = inbox[0].clone();
    for bit in (0..damaged.len() * 8).step_by(5) {
        damaged[bit / 8] ^= 1 << (bit % 8);
        let received = bob.receive_now(&damaged);
        assert!(is_harmless(&received), "bit {bit}: {received:?}");
        damaged[bit / 8] ^= 1 << (bit % 8);
    }
    assert!(matches!(bob.receive_now(&inbox[0])[..], [Received::Joined { .. }]));
}

#[test]
fn each_single_flipped_bit_of_a_joining_leaves_the_real_one_good() {
    let (mut bob, inbox) = bob_and_his_inbox();
    for message in &inbox[..5] {
        bob.receive_now(message);
    }
    let mut damaged = inbox[5].clone();
    for bit in (0..damaged.len() * 8).step_by(11) {
        damaged[bit / 8] ^= 1 << (bit % 8);
        let received = bob.receive_now(&damaged);
        assert!(is_harmless(&received), "bit {bit}: {received:?}");
        damaged[bit / 8] ^= 1 << (bit % 8);
    }
    assert!(matches!(bob.receive_now(&inbox[5])[..], [Received::Committed { .. }]));
    assert_eq!(texts(&bob.receive_now(&inbox[6])), ["three"]);
}
