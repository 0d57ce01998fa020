//! Welcomes that are forged, old or late.

use super::*;

/// Creates a group as `creator` with any id and profile, and returns the Welcome for `victim`.
fn forged_welcome(
    creator: &Client,
    id: GroupId,
    profile: &Profile,
    victim: &mut Client,
) -> Vec<u8> {
    let signer = creator.leaf();
    let mut group = Group::create_as(id, &signer, profile.clone(), now()).unwrap();
    let content = CommitContent { add: vec![package(victim)], ..CommitContent::default() };
    let me = creator.identity.public();
    group.commit(&signer, None, &me, content).unwrap().welcome.unwrap()
}

#[test]
fn a_group_id_or_a_creator_cannot_be_usurped() {
    let (mut ann, mut bob, mallory) = (client("ann"), client("bob"), client("mallory"));
    let id = ann.create_group("g", ChannelId::DEFAULT, now()).unwrap();
    let anns = ann.groups[&id].profile.clone();
    let mallorys = Profile { creator: mallory.identity.public(), ..anns.clone() };
    // Mallory knows the id and is faster.
    let forged = forged_welcome(&mallory, id, &mallorys, &mut bob);
    assert_eq!(bob.receive_now(&forged), [Received::Ignored(Ignored::BadWelcome)]);
    // A fresh id does not help: mallory cannot name ann as the creator of a conversation.
    let direct = Profile::direct(ann.identity.public(), bob.identity.public(), now());
    let forged =
        forged_welcome(&mallory, GroupId::random(&ann.identity.public()), &direct, &mut bob);
    assert_eq!(bob.receive_now(&forged), [Received::Ignored(Ignored::BadWelcome)]);

    let welcome = add(&mut ann, id, &mut [&mut bob]).welcome.unwrap();
    assert!(
        matches!(bob.receive_now(&welcome)[..], [Received::Joined { .. }]),
        "the real one is not hindered"
    );

    // A group may lose its creator, so another member may send a Welcome. A Welcome to a group that
    // we are in has no effect, unless an admin that we know sent it.
    let mut group = Group::create_as(id, &mallory.leaf(), anns, now()).unwrap();
    let me = mallory.identity.public();
    for _ in 0..3 {
        group.commit(&mallory.leaf(), None, &me, CommitContent::default()).unwrap();
        group.confirm_commit().unwrap();
    }
    let content = CommitContent { add: vec![package(&mut bob)], ..CommitContent::default() };
    let forged = group.commit(&mallory.leaf(), None, &me, content).unwrap().welcome.unwrap();
    assert_eq!(bob.receive_now(&forged), [Received::Ignored(Ignored::BadWelcome)]);
    assert_reads(&mut ann, &mut bob, id);
}

/// The leaf of a creator that never committed with a path is as old as the group.
#[test]
fn a_leaf_whose_lifetime_is_over_does_not_keep_others_from_joining() {
    let (ann, mut bob) = (client("ann"), client("bob"));
    let creator = ann.identity.public();
    let profile = Profile {
        kind: GroupKind::Group { name: "old".into() },
        channel: ChannelId::DEFAULT,
        creator,
        created_at: UnixMillis(0),
        admins: vec![],
    };
    let year = std::time::Duration::from_secs(365 * 24 * 3600);
    let mut group = Group::create(&ann.leaf(), profile, now().minus(year)).unwrap();
    let bobs = package(&mut bob);
    let (_commit, welcome, _) =
        group.mls.add_members_without_update(&group.store, &ann.leaf(), &[bobs]).unwrap();
    let received = bob.receive_now(&welcome.to_bytes().unwrap());
    assert!(matches!(received[..], [Received::Joined { .. }]), "{received:?}");
}

/// The recipients of a Welcome are not authenticated, so the server can derive several Welcomes
/// from one. With a last-resort package, each of them could be opened, and would reset the group
/// to the epoch of the joining: old messages would be read as new ones.
#[test]
fn a_welcome_of_an_earlier_epoch_does_not_replace_the_group() {
    let (mut ann, mut bob, mut cat) = (client("ann"), client("bob"), client("cat"));
    let id = ann.create_group("g", ChannelId::DEFAULT, now()).unwrap();
    let last_resort = bob.last_resort_key_package(now()).unwrap();
    let invitees = vec![offer_with(&bob, last_resort), offer(&mut cat)];
    let both = Change { add: invitees.clone(), ..Change::default() };
    let welcome = change(&mut ann, id, &both).welcome.unwrap();
    let for_bob_alone = without_the_second_recipient(&welcome);
    assert!(matches!(bob.receive_now(&welcome)[..], [Received::Joined { .. }]));
    let message = say(&mut ann, id, "once");
    assert!(matches!(bob.receive_now(&message)[..], [Received::Message { .. }]));
    assert_eq!(bob.receive_now(&for_bob_alone), [Received::Duplicate]);
    assert_eq!(bob.receive_now(&message), [Received::Duplicate]);

    // Bob is removed, and added again with the same package. The first Welcome has no effect now,
    // although the present state comes from another one.
    let removal = remove(&mut ann, id, &bob).payload;
    bob.receive_now(&removal);
    let only_bob = Change { add: invitees[..1].to_vec(), ..Change::default() };
    let again = change(&mut ann, id, &only_bob).welcome.unwrap();
    assert!(matches!(bob.receive_now(&again)[..], [Received::Joined { .. }]));
    for old in [&welcome, &for_bob_alone] {
        assert_eq!(bob.receive_now(old), [Received::Duplicate]);
    }
    assert_reads(&mut ann, &mut bob, id);
}

fn without_the_second_recipient(message: &[u8]) -> Vec<u8> {
    use tls_codec::{Serialize as _, Size as _};
    let MlsMessageBodyIn::Welcome(welcome) =
        MlsMessageIn::tls_deserialize_exact_bytes(message).unwrap().extract()
    else {
        panic!("a Welcome")
    };
    let all = welcome.secrets().to_vec();
    let first = vec![all[0].clone()];
    // Version, wire format and suite; the recipients; the group info.
    let rest = &message[6 + all.tls_serialized_len()..];
    [&message[..6], &first.tls_serialize_detached().unwrap(), rest].concat()
}

#[test]
fn a_request_is_joined_long_after_its_key_package_expired() {
    let (mut ann, mut bob, mut cat) = (client("ann"), client("bob"), client("cat"));
    let id = ann.create_group("g", ChannelId::DEFAULT, now()).unwrap();
    let welcome = add(&mut ann, id, &mut [&mut bob, &mut cat]).welcome.unwrap();
    cat.receive_now(&welcome);
    let receive = |bob: &mut Client, bytes: &[u8]| {
        let rules =
            Rules { blocked: &BTreeSet::new(), joins: &|_| Ok(false), has_other_devices: false };
        let arrival = Arrival { at: now(), channel: ChannelId::DEFAULT };
        bob.receive_by(bytes, arrival, &rules).unwrap()
    };
    // Of two messages, one comes before the Welcome.
    let (early, late) = (say(&mut cat, id, "early"), say(&mut ann, id, "late"));
    assert_eq!(receive(&mut bob, &early), [Received::Buffered]);
    let received = receive(&mut bob, &welcome);
    let [Received::Requested(request)] = &received[..] else { panic!("{received:?}") };
    assert_eq!((request.group, request.members), (id, 3));
    assert_eq!(request.inviter.username, ann.username);
    assert_eq!(receive(&mut bob, &late), [Received::Buffered]);
    assert_eq!(bob.group(&id), Ok(None));
    assert_eq!(bob.ask(id, vec![[0; 32]]), Err(Error::UnknownGroup));

    let year = std::time::Duration::from_secs(365 * 24 * 3600);
    bob.key_packages(1, now().plus(year)).unwrap();
    assert_eq!(bob.database.all(tables::PACKAGES).unwrap().len(), 1, "the others have expired");
    let accepted = bob.accept(&id).unwrap().unwrap();
    let texts: Vec<_> = accepted
        .iter()
        .filter_map(|received| match received {
            Received::Message { content, .. } => Some(content.text.as_str()),
            _ => None,
        })
        .collect();
    assert!(matches!(accepted[0], Received::Joined { .. }), "{accepted:?}");
    assert_eq!(texts, ["early", "late"]);
    assert_eq!(bob.accept(&id), Ok(None));
    assert_reads(&mut bob, &mut cat, id);
    assert_reads(&mut ann, &mut bob, id);
}
