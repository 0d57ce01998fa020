//! Messages within a group: content, padding, `leaving`, and keys that are used once.

use super::*;

#[test]
fn our_own_messages_are_ignored() {
    let (mut ann, mut bob) = (client("ann"), client("bob"));
    let id = group_of(&mut ann, &mut [&mut bob]);
    let message = say(&mut ann, id, "echo");
    assert_eq!(ann.receive_now(&message), [Received::Ignored(Ignored::OwnMessage)]);
    assert!(matches!(bob.receive_now(&message)[..], [Received::Message { .. }]));
}

#[test]
fn content_that_is_not_ours_is_ignored() {
    let (mut ann, mut bob) = (client("ann"), client("bob"));
    let id = group_of(&mut ann, &mut [&mut bob]);
    let signer = ann.leaf();
    let group = ann.groups.get_mut(&id).unwrap();
    let message = group.mls.create_message(&group.store, &signer, b"\x02newer").unwrap();
    let received = bob.receive_now(&message.to_bytes().unwrap());
    assert_eq!(received, [Received::Ignored(Ignored::UnknownContent)]);
    assert_reads(&mut ann, &mut bob, id);
}

#[test]
fn texts_within_one_padding_block_have_ciphertexts_of_one_length() {
    let (mut ann, mut bob) = (client("ann"), client("bob"));
    let id = group_of(&mut ann, &mut [&mut bob]);
    let lengths: std::collections::BTreeSet<_> =
        (10..100).map(|len| say(&mut ann, id, &"x".repeat(len)).len()).collect();
    assert!(lengths.len() <= 1 + 90 / PADDING + 1, "{lengths:?}");
}

#[test]
fn debug_output_contains_no_secret_and_no_text() {
    let (mut ann, mut bob) = (client("ann"), client("bob"));
    let id = group_of(&mut ann, &mut [&mut bob]);
    let message = say(&mut ann, id, "secret words");
    let shown = format!("{ann:?} {bob:?} {:?}", bob.receive_now(&message));
    assert!(!shown.contains("secret words"), "{shown}");
    assert!(shown.len() < 700, "{shown}");
}

#[test]
fn an_old_leaving_message_does_not_remove_a_member_that_was_added_again() {
    let (mut alice, mut bob) = (client("alice"), client("bob"));
    let id = group_of(&mut alice, &mut [&mut bob]);
    let farewell = bob.leave(id).unwrap().unwrap();
    assert_eq!(farewell.recipients, [alice.identity.public()]);
    assert_eq!(bob.group(&id), Ok(None));
    let late = alice.ask(id, vec![[7; 32]]).unwrap();
    assert_eq!(bob.receive_now(&late.payload), [Received::Refused { used_package: false }]);

    remove(&mut alice, id, &bob);
    let welcome = add(&mut alice, id, &mut [&mut bob]).welcome.unwrap();
    assert!(matches!(bob.receive_now(&welcome)[..], [Received::Joined { .. }]));
    assert_eq!(alice.receive_now(&farewell.payload), [Received::Ignored(Ignored::AlreadyLeft)]);

    let second = bob.leave(id).unwrap().unwrap();
    let received = alice.receive_now(&second.payload);
    assert!(
        matches!(&received[..], [Received::Leaving { group, sender }]
            if *group == id && sender.identity == bob.identity.public()),
        "{received:?}"
    );
    assert_eq!(alice.leave(id), Err(Error::LastAdmin));
}

#[test]
fn an_older_copy_of_a_profile_reuses_no_key_in_a_group_that_it_accepts_again() {
    let (mut ann, mut bob) = (client("ann"), client("bob"));
    let id = ann.create_group("g", ChannelId::DEFAULT, now()).unwrap();
    let welcome = add(&mut ann, id, &mut [&mut bob]).welcome.unwrap();
    let rules =
        Rules { blocked: &BTreeSet::new(), joins: &|_| Ok(false), has_other_devices: false };
    let arrival = Arrival { at: now(), channel: ChannelId::DEFAULT };
    bob.receive_by(&welcome, arrival, &rules).unwrap();
    let copy = bob.database.copy();
    bob.accept(&id).unwrap();
    assert_reads(&mut bob, &mut ann, id);
    assert_reads(&mut bob, &mut ann, id);

    let mut bob = Client::open(&copy).unwrap();
    bob.skip_keys(2).unwrap();
    bob.accept(&id).unwrap();
    assert_reads(&mut bob, &mut ann, id);
}
