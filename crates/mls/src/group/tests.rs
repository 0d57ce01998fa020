//! Members and outsiders who break the rules with openmls's own means: what an honest client could
//! never be made to send.

use std::collections::BTreeSet;

use openmls::prelude::{BasicCredential, CredentialWithKey, KeyPackageIn, ProtocolVersion};
use openmls::prelude::{LeafNodeParameters, MlsMessageBodyIn, MlsMessageIn, NewSignerBundle};
use qpq_domain::ChannelId;
use tls_codec::DeserializeBytes as _;

use super::*;
use crate::{Arrival, Client, Received, Rules, packages::Use};

/// openmls compares lifetimes with the system's clock.
#[expect(clippy::disallowed_methods, reason = "the clock that openmls reads cannot be another")]
fn now() -> UnixMillis {
    let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    UnixMillis(u64::try_from(since_epoch.as_millis()).unwrap())
}

trait Hear {
    fn hear(&mut self, bytes: &[u8]) -> Vec<Received>;
}

impl Hear for Client {
    fn hear(&mut self, bytes: &[u8]) -> Vec<Received> {
        self.receive(bytes, Arrival { at: now(), channel: ChannelId::DEFAULT }).unwrap()
    }
}

fn client(name: &str) -> Client {
    let name = Username::parse(name).unwrap();
    Client::create(&Database::in_memory(), Identity::generate(), name).unwrap()
}

/// A package of `client` as openmls wants it.
fn package(client: &mut Client) -> KeyPackage {
    named_package(client, client.username.clone())
}

/// The same, under any name.
fn named_package(client: &mut Client, name: Username) -> KeyPackage {
    let bytes =
        packages::make(&client.database, &client.identity, &name, Use::Once, now()).unwrap();
    let MlsMessageBodyIn::KeyPackage(package) =
        MlsMessageIn::tls_deserialize_exact_bytes(&bytes).unwrap().extract()
    else {
        panic!("a key package")
    };
    KeyPackageIn::validate(package, Store::default().crypto(), ProtocolVersion::Mls10).unwrap()
}

/// A group of `creator` and `others`, which have all joined.
fn group_of(creator: &mut Client, others: &mut [&mut Client]) -> GroupId {
    let id = creator.create_group("g", ChannelId::DEFAULT, now()).unwrap();
    let packages: Vec<_> = others.iter_mut().map(|other| package(other)).collect();
    let (_commit, welcome) =
        creator.groups.get_mut(&id).unwrap().add(&creator.identity, &packages).unwrap();
    for other in others {
        assert!(matches!(other.hear(&welcome)[..], [Received::Joined(_)]));
    }
    id
}

fn say(from: &mut Client, group: GroupId, text: &str) -> Vec<u8> {
    from.encrypt(group, &Content { id: [0; 16], sent_at: 0, text: text.into(), repeats: None })
        .unwrap()
        .payload
}

/// Whether `to` still reads what `from` says.
fn assert_hears(from: &mut Client, to: &mut Client, group: GroupId) {
    let message = say(from, group, "still there?");
    let received = to.hear(&message);
    assert!(matches!(received[..], [Received::Message { .. }]), "{received:?}");
}

/// A commit built by `client` in its group, whatever it contains; its own state stays as it was.
macro_rules! commit {
    ($client:expr, $id:expr, |$builder:ident| $build:expr) => {{
        let group = $client.groups.get_mut(&$id).unwrap();
        let $builder = group.mls.commit_builder();
        let bundle = $build
            .load_psks(group.store.storage())
            .unwrap()
            .build(group.store.rand(), group.store.crypto(), &$client.identity, |_| true)
            .unwrap()
            .stage_commit(&group.store)
            .unwrap();
        let (commit, welcome, _) = bundle.into_messages();
        group.mls.clear_pending_commit(group.store.storage()).unwrap();
        (commit.to_bytes().unwrap(), welcome.map(|welcome| welcome.to_bytes().unwrap()))
    }};
}

#[test]
fn a_commit_of_another_than_the_creator_is_ignored() {
    let (mut ann, mut bob, mut cat, mut dan) =
        (client("ann"), client("bob"), client("cat"), client("dan"));
    let id = group_of(&mut ann, &mut [&mut bob, &mut cat]);
    let dans = package(&mut dan);
    let (added, welcome) = commit!(bob, id, |builder| builder.propose_adds([dans]));
    let (refreshed, _) = commit!(bob, id, |builder| builder.force_self_update(true));
    let (removed, _) =
        commit!(bob, id, |builder| builder.propose_removals([LeafNodeIndex::new(0)]));
    for commit in [added, refreshed, removed] {
        for victim in [&mut ann, &mut cat] {
            assert_eq!(victim.hear(&commit), [Received::Ignored(Ignored::NotTheCreator)]);
        }
    }
    assert_eq!(dan.hear(&welcome.unwrap()), [Received::Ignored(Ignored::BadWelcome)]);
    assert_hears(&mut ann, &mut cat, id);
    assert_hears(&mut cat, &mut ann, id);
    assert_hears(&mut bob, &mut ann, id);
    // The creator's own commit for the same epoch is applied all the same.
    let (_, _) = ann.groups.get_mut(&id).unwrap().add(&ann.identity, &[package(&mut dan)]).unwrap();
}

#[test]
fn proposals_are_ignored() {
    let (mut ann, mut bob, mut cat) = (client("ann"), client("bob"), client("cat"));
    let id = group_of(&mut ann, &mut [&mut bob, &mut cat]);
    let group = bob.groups.get_mut(&id).unwrap();
    let (proposal, _) = group
        .mls
        .propose_remove_member(&group.store, &bob.identity, LeafNodeIndex::new(2))
        .unwrap();
    let proposal = proposal.to_bytes().unwrap();
    for victim in [&mut ann, &mut cat] {
        assert_eq!(victim.hear(&proposal), [Received::Ignored(Ignored::NotTheCreator)]);
    }
    // A stored proposal would stop both from sending, and ride on the creator's next commit.
    assert_hears(&mut cat, &mut ann, id);
    let mut dan = client("dan");
    ann.groups.get_mut(&id).unwrap().add(&ann.identity, &[package(&mut dan)]).unwrap();
    assert_eq!(ann.group(&id).unwrap().unwrap().members.len(), 4);
}

#[test]
fn not_even_the_creator_changes_the_profile_the_leaf_or_a_direct_conversation() {
    let (mut ann, mut bob, mut cat) = (client("ann"), client("bob"), client("cat"));
    let id = group_of(&mut ann, &mut [&mut bob]);
    let mut profile = ann.groups[&id].profile.clone();
    profile.channel = ChannelId::new([1; 16]);
    let (moved, _) = commit!(ann, id, |builder| builder
        .propose_group_context_extensions(profile.extensions())
        .unwrap());
    assert_eq!(bob.hear(&moved), [Received::Ignored(Ignored::ForbiddenCommit)]);

    let renamed = CredentialWithKey {
        credential: BasicCredential::new(b"bob".to_vec()).into(),
        ..ann.identity.credential(&ann.username)
    };
    let parameters = LeafNodeParameters::builder().with_credential_with_key(renamed).build();
    let (renamed, _) = commit!(ann, id, |builder| builder.leaf_node_parameters(parameters));
    assert_eq!(bob.hear(&renamed), [Received::Ignored(Ignored::ForbiddenCommit)]);

    let bobs_name = bob.username.clone();
    let impostor = named_package(&mut cat, bobs_name);
    let (second_bob, _) = commit!(ann, id, |builder| builder.propose_adds([impostor]));
    assert_eq!(bob.hear(&second_bob), [Received::Ignored(Ignored::ForbiddenCommit)]);
    assert_hears(&mut ann, &mut bob, id);
    assert_hears(&mut bob, &mut ann, id);

    let direct = ann.create_direct(bob.identity.public(), now()).unwrap();
    let bobs = package(&mut bob);
    let (_, welcome) = ann.groups.get_mut(&direct).unwrap().add(&ann.identity, &[bobs]).unwrap();
    bob.hear(&welcome);
    let cats = package(&mut cat);
    let (third, welcome) = commit!(ann, direct, |builder| builder.propose_adds([cats]));
    assert_eq!(bob.hear(&third), [Received::Ignored(Ignored::ForbiddenCommit)]);
    assert_eq!(cat.hear(&welcome.unwrap()), [Received::Ignored(Ignored::BadWelcome)]);
    assert_hears(&mut ann, &mut bob, direct);
}

/// The signature key would be another afterwards, and who signed with it unproven.
#[test]
fn the_creator_cannot_become_another() {
    let (mut ann, mut bob) = (client("ann"), client("bob"));
    let id = group_of(&mut ann, &mut [&mut bob]);
    let other = Identity::generate();
    let group = ann.groups.get_mut(&id).unwrap();
    let signer =
        NewSignerBundle { signer: &other, credential_with_key: other.credential(&ann.username) };
    let bundle = group
        .mls
        .commit_builder()
        .load_psks(group.store.storage())
        .unwrap()
        .build_with_new_signer(
            group.store.rand(),
            group.store.crypto(),
            &ann.identity,
            signer,
            |_| true,
        )
        .unwrap()
        .stage_commit(&group.store)
        .unwrap();
    let commit = bundle.into_messages().0.to_bytes().unwrap();
    group.mls.clear_pending_commit(group.store.storage()).unwrap();
    assert_eq!(bob.hear(&commit), [Received::Ignored(Ignored::ForbiddenCommit)]);
    assert_hears(&mut ann, &mut bob, id);
}

/// The creator may refresh its keys without changing who is there.
#[test]
fn the_creators_key_refresh_is_followed() {
    let (mut ann, mut bob) = (client("ann"), client("bob"));
    let id = group_of(&mut ann, &mut [&mut bob]);
    let group = ann.groups.get_mut(&id).unwrap();
    let bundle =
        group.mls.self_update(&group.store, &ann.identity, LeafNodeParameters::default()).unwrap();
    let commit = bundle.into_messages().0.to_bytes().unwrap();
    group.mls.merge_pending_commit(&group.store).unwrap();
    assert_eq!(
        bob.hear(&commit),
        [Received::Committed { group: id, added: vec![], removed: vec![] }]
    );
    assert_hears(&mut ann, &mut bob, id);
    assert_hears(&mut bob, &mut ann, id);
}

/// Makes a group as `creator` with any id and profile, and returns the Welcome for `victim`.
fn forged_welcome(
    creator: &Client,
    id: GroupId,
    profile: &Profile,
    victim: &mut Client,
) -> Vec<u8> {
    let mut group =
        Group::make_as(id, &creator.identity, &creator.username, profile.clone(), now()).unwrap();
    group.add(&creator.identity, &[package(victim)]).unwrap().1
}

#[test]
fn a_group_id_or_a_creator_cannot_be_usurped() {
    let (mut ann, mut bob, mallory) = (client("ann"), client("bob"), client("mallory"));
    let id = ann.create_group("g", ChannelId::DEFAULT, now()).unwrap();
    let anns = ann.groups[&id].profile.clone();
    let mallorys = Profile { creator: mallory.identity.public(), ..anns.clone() };
    // Mallory knows the id and is faster: as itself, and in ann's name.
    for profile in [&mallorys, &anns] {
        let forged = forged_welcome(&mallory, id, profile, &mut bob);
        assert_eq!(bob.hear(&forged), [Received::Ignored(Ignored::BadWelcome)]);
    }
    // Nor does it start a conversation that names ann as its creator under a fresh id.
    let direct = Profile::direct(ann.identity.public(), bob.identity.public(), now());
    let forged =
        forged_welcome(&mallory, GroupId::random(&ann.identity.public()), &direct, &mut bob);
    assert_eq!(bob.hear(&forged), [Received::Ignored(Ignored::BadWelcome)]);

    let bobs = package(&mut bob);
    let (_, welcome) = ann.groups.get_mut(&id).unwrap().add(&ann.identity, &[bobs]).unwrap();
    assert!(
        matches!(bob.hear(&welcome)[..], [Received::Joined(_)]),
        "the real one is not hindered"
    );
}

#[test]
fn our_own_message_come_back_is_ignored() {
    let (mut ann, mut bob) = (client("ann"), client("bob"));
    let id = group_of(&mut ann, &mut [&mut bob]);
    let message = say(&mut ann, id, "echo");
    assert_eq!(ann.hear(&message), [Received::Ignored(Ignored::OwnMessage)]);
    assert!(matches!(bob.hear(&message)[..], [Received::Message { .. }]));
}

#[test]
fn content_that_is_not_ours_is_ignored() {
    let (mut ann, mut bob) = (client("ann"), client("bob"));
    let id = group_of(&mut ann, &mut [&mut bob]);
    let group = ann.groups.get_mut(&id).unwrap();
    let message = group.mls.create_message(&group.store, &ann.identity, b"\x02newer").unwrap();
    let received = bob.hear(&message.to_bytes().unwrap());
    assert_eq!(received, [Received::Ignored(Ignored::UnknownContent)]);
    assert_hears(&mut ann, &mut bob, id);
}

#[test]
fn ciphertexts_do_not_tell_lengths_within_the_padding() {
    let (mut ann, mut bob) = (client("ann"), client("bob"));
    let id = group_of(&mut ann, &mut [&mut bob]);
    let lengths: std::collections::BTreeSet<_> =
        (10..100).map(|len| say(&mut ann, id, &"x".repeat(len)).len()).collect();
    assert!(lengths.len() <= 1 + 90 / PADDING + 1, "{lengths:?}");
}

#[test]
fn a_commit_read_too_late_has_a_reason_of_its_own() {
    use openmls::treesync::errors::LifetimeError::Expired;
    let over = || Expired { not_after: 1, now: 2 };
    let errors: [ProcessMessageError<()>; 2] = [
        ValidationError::from(KeyPackageVerifyError::from(over())).into(),
        StageCommitError::from(ProposalValidationError::from(
            LeafNodeValidationError::from(over()),
        ))
        .into(),
    ];
    for error in errors {
        assert!(
            matches!(unreadable(&error), MessageEffect::Ignored(Ignored::LifetimeOver)),
            "{error:?}"
        );
    }
}

#[test]
fn debug_output_contains_no_secret_and_no_text() {
    let (mut ann, mut bob) = (client("ann"), client("bob"));
    let id = group_of(&mut ann, &mut [&mut bob]);
    let message = say(&mut ann, id, "secret words");
    let shown = format!("{ann:?} {bob:?} {:?}", bob.hear(&message));
    assert!(!shown.contains("secret words"), "{shown}");
    assert!(shown.len() < 700, "{shown}");
}

/// A group's creator that never committed with a path still has the leaf that it began with.
#[test]
fn a_leaf_whose_lifetime_is_over_does_not_keep_others_from_joining() {
    let (ann, mut bob) = (client("ann"), client("bob"));
    let creator = ann.identity.public();
    let profile = Profile {
        kind: GroupKind::Group { name: "old".into() },
        channel: ChannelId::DEFAULT,
        creator,
        created_at: UnixMillis(0),
    };
    let year = std::time::Duration::from_secs(365 * 24 * 3600);
    let mut group = Group::make(&ann.identity, &ann.username, profile, now().minus(year)).unwrap();
    let bobs = package(&mut bob);
    let (_commit, welcome, _) =
        group.mls.add_members_without_update(&group.store, &ann.identity, &[bobs]).unwrap();
    let received = bob.hear(&welcome.to_bytes().unwrap());
    assert!(matches!(received[..], [Received::Joined(_)]), "{received:?}");
}

/// A Welcome's list of recipients is not authenticated, so the server can make many of one.
/// With a package that may be used again, each of them would set the group back to where it was
/// joined, and let old messages pass for new.
#[test]
fn no_welcome_sets_a_group_back() {
    let (mut ann, mut bob, mut cat) = (client("ann"), client("bob"), client("cat"));
    let id = ann.create_group("g", ChannelId::DEFAULT, now()).unwrap();
    let last_resort = bob.last_resort_key_package(now()).unwrap();
    let cats = cat.key_packages(1, now()).unwrap().remove(0);
    let (bobs_name, cats_name) = (bob.username.clone(), cat.username.clone());
    let invitees = [
        crate::Invitee {
            identity: bob.identity.public(),
            username: &bobs_name,
            key_package: &last_resort,
        },
        crate::Invitee {
            identity: cat.identity.public(),
            username: &cats_name,
            key_package: &cats,
        },
    ];
    let welcome = ann.add(id, &invitees, now()).unwrap().welcome.payload;
    let for_bob_alone = without_the_second_recipient(&welcome);
    assert!(matches!(bob.hear(&welcome)[..], [Received::Joined(_)]));
    let message = say(&mut ann, id, "once");
    assert!(matches!(bob.hear(&message)[..], [Received::Message { .. }]));
    assert_eq!(bob.hear(&for_bob_alone), [Received::Duplicate]);
    assert_eq!(bob.hear(&message), [Received::Duplicate]);

    // Removed and added again by the same package: the first Welcome is past now, though another
    // one brought us in.
    let removal = ann.remove(id, &[bob.identity.public()]).unwrap().payload;
    bob.hear(&removal);
    let again = ann.add(id, &invitees[..1], now()).unwrap().welcome.payload;
    assert!(matches!(bob.hear(&again)[..], [Received::Joined(_)]));
    for old in [&welcome, &for_bob_alone] {
        assert_eq!(bob.hear(old), [Received::Duplicate]);
    }
    assert_hears(&mut ann, &mut bob, id);
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
fn an_old_farewell_does_not_remove_one_who_was_added_again() {
    let (mut alice, mut bob) = (client("alice"), client("bob"));
    let id = group_of(&mut alice, &mut [&mut bob]);
    let farewell = bob.leave(id).unwrap().unwrap();
    assert_eq!(farewell.recipients, [alice.identity.public()]);
    assert_eq!(bob.group(&id), Ok(None));
    let late = alice.ask(id, vec![[7; 32]]).unwrap();
    assert_eq!(bob.hear(&late.payload), [Received::Refused { used_package: false }]);

    alice.remove(id, &[bob.identity.public()]).unwrap();
    let again = package(&mut bob);
    let (_, welcome) = alice.groups.get_mut(&id).unwrap().add(&alice.identity, &[again]).unwrap();
    assert!(matches!(bob.hear(&welcome)[..], [Received::Joined(_)]));
    assert_eq!(alice.hear(&farewell.payload), [Received::Ignored(Ignored::AlreadyGone)]);

    let second = bob.leave(id).unwrap().unwrap();
    let received = alice.hear(&second.payload);
    assert!(
        matches!(&received[..], [Received::Leaving { group, sender }]
            if *group == id && sender.identity == bob.identity.public()),
        "{received:?}"
    );
    assert_eq!(alice.leave(id), Err(Error::CreatorStays));
}

#[test]
fn a_request_is_joined_long_after_its_key_package_expired() {
    let (mut ann, mut bob, mut cat) = (client("ann"), client("bob"), client("cat"));
    let id = ann.create_group("g", ChannelId::DEFAULT, now()).unwrap();
    let packages = [package(&mut bob), package(&mut cat)];
    let (_, welcome) = ann.groups.get_mut(&id).unwrap().add(&ann.identity, &packages).unwrap();
    cat.hear(&welcome);
    let hear = |bob: &mut Client, bytes: &[u8]| {
        let rules = Rules { blocked: &BTreeSet::new(), joins: &|_| Ok(false) };
        let arrival = Arrival { at: now(), channel: ChannelId::DEFAULT };
        bob.receive_by(bytes, arrival, &rules).unwrap()
    };
    // Of two messages, one comes before the Welcome.
    let (early, late) = (say(&mut cat, id, "early"), say(&mut ann, id, "late"));
    assert_eq!(hear(&mut bob, &early), [Received::Buffered]);
    let received = hear(&mut bob, &welcome);
    let [Received::Requested(request)] = &received[..] else { panic!("{received:?}") };
    assert_eq!((request.group, request.members), (id, 3));
    assert_eq!(request.creator.username, ann.username);
    assert_eq!(hear(&mut bob, &late), [Received::Buffered]);
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
    assert!(matches!(accepted[0], Received::Joined(_)), "{accepted:?}");
    assert_eq!(texts, ["early", "late"]);
    assert_eq!(bob.accept(&id), Ok(None));
    assert_hears(&mut bob, &mut cat, id);
    assert_hears(&mut ann, &mut bob, id);
}

#[test]
fn an_older_copy_of_a_profile_reuses_no_key_in_a_group_that_it_accepts_again() {
    let (mut ann, mut bob) = (client("ann"), client("bob"));
    let id = ann.create_group("g", ChannelId::DEFAULT, now()).unwrap();
    let packages = [package(&mut bob)];
    let (_, welcome) = ann.groups.get_mut(&id).unwrap().add(&ann.identity, &packages).unwrap();
    let rules = Rules { blocked: &BTreeSet::new(), joins: &|_| Ok(false) };
    let arrival = Arrival { at: now(), channel: ChannelId::DEFAULT };
    bob.receive_by(&welcome, arrival, &rules).unwrap();
    let copy = bob.database.copy();
    bob.accept(&id).unwrap();
    assert_hears(&mut bob, &mut ann, id);
    assert_hears(&mut bob, &mut ann, id);

    let mut bob = Client::open(&copy).unwrap();
    bob.skip_keys(2).unwrap();
    bob.accept(&id).unwrap();
    assert_hears(&mut bob, &mut ann, id);
}
