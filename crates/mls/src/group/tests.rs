//! Tests of members and outsiders that break the rules: messages that no honest client sends,
//! created with openmls directly.

use std::collections::BTreeSet;

use openmls::{
    group::{ProcessMessageError, ProposalValidationError, StageCommitError, ValidationError},
    prelude::{
        BasicCredential, CredentialWithKey, KeyPackage, KeyPackageIn, KeyPackageVerifyError,
        LeafNodeParameters, MlsMessageBodyIn, MlsMessageIn, NewSignerBundle, ProtocolVersion,
    },
    treesync::errors::LeafNodeValidationError,
};
use qpq_domain::{ChannelId, Username};
use tls_codec::DeserializeBytes as _;

use super::{process::unreadable, *};
use crate::{
    Arrival, Change, Client, Commit, Content, Identity, Ignored, NewMember, Received, Rules,
    packages::Use,
};

/// openmls compares lifetimes with the system's clock.
#[expect(clippy::disallowed_methods, reason = "the clock that openmls reads cannot be another")]
fn now() -> UnixMillis {
    let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    UnixMillis(u64::try_from(since_epoch.as_millis()).unwrap())
}

trait ReceiveNow {
    fn receive_now(&mut self, bytes: &[u8]) -> Vec<Received>;
}

impl ReceiveNow for Client {
    fn receive_now(&mut self, bytes: &[u8]) -> Vec<Received> {
        self.receive(bytes, Arrival { at: now(), channel: ChannelId::DEFAULT }).unwrap()
    }
}

fn client(name: &str) -> Client {
    let name = Username::parse(name).unwrap();
    Client::create(&Database::in_memory(), Identity::generate(), name).unwrap()
}

/// A package of `client` as openmls wants it.
fn package(client: &mut Client) -> KeyPackage {
    package_of(&client.database, &client.leaf())
}

/// A package for the leaf of `signer`, whatever that says.
fn package_of(database: &Database, signer: &LeafSigner) -> KeyPackage {
    let bytes = packages::create(database, signer, Use::Once, now()).unwrap();
    let MlsMessageBodyIn::KeyPackage(package) =
        MlsMessageIn::tls_deserialize_exact_bytes(&bytes).unwrap().extract()
    else {
        panic!("a key package")
    };
    KeyPackageIn::validate(package, Store::default().crypto(), ProtocolVersion::Mls10).unwrap()
}

/// A device of `client`, with a fresh package, as the server would offer it to others.
fn offer(client: &mut Client) -> NewMember {
    let key_package = client.key_packages(1, now()).unwrap().remove(0);
    offer_with(client, key_package)
}

fn offer_with(client: &Client, key_package: Vec<u8>) -> NewMember {
    NewMember { identity: client.identity.public(), username: client.username.clone(), key_package }
}

/// Commits a change, which the server accepts.
fn change(client: &mut Client, id: GroupId, change: &Change) -> Commit {
    let commit = client.commit(id, change, now()).unwrap().expect("it changes something");
    client.confirm(id).unwrap();
    commit
}

fn add(client: &mut Client, id: GroupId, others: &mut [&mut Client]) -> Commit {
    let add = others.iter_mut().map(|other| offer(other)).collect();
    change(client, id, &Change { add, ..Change::default() })
}

fn remove(client: &mut Client, id: GroupId, other: &Client) -> Commit {
    let remove = vec![other.identity.public()];
    change(client, id, &Change { remove, ..Change::default() })
}

/// A group of `creator` and `others`, which have all joined.
fn group_of(creator: &mut Client, others: &mut [&mut Client]) -> GroupId {
    let id = creator.create_group("g", ChannelId::DEFAULT, now()).unwrap();
    let welcome = add(creator, id, others).welcome.unwrap();
    for other in others {
        assert!(matches!(other.receive_now(&welcome)[..], [Received::Joined { .. }]));
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
    let received = to.receive_now(&message);
    assert!(matches!(received[..], [Received::Message { .. }]), "{received:?}");
}

/// A commit built by `client` in its group, whatever it contains; its own state stays as it was.
macro_rules! commit {
    ($client:expr, $id:expr, |$builder:ident| $build:expr) => {{
        let signer = $client.leaf();
        let group = $client.groups.get_mut(&$id).unwrap();
        let $builder = group.mls.commit_builder();
        let bundle = $build
            .load_psks(group.store.storage())
            .unwrap()
            .build(group.store.rand(), group.store.crypto(), &signer, |_| true)
            .unwrap()
            .stage_commit(&group.store)
            .unwrap();
        let (commit, welcome, _) = bundle.into_messages();
        group.mls.clear_pending_commit(group.store.storage()).unwrap();
        (commit.to_bytes().unwrap(), welcome.map(|welcome| welcome.to_bytes().unwrap()))
    }};
}

/// A commit by which the leaf of `client` becomes that of `next`; its own state stays as it was.
fn becoming(client: &mut Client, id: GroupId, next: &LeafSigner) -> Vec<u8> {
    let current = client.leaf();
    let group = client.groups.get_mut(&id).unwrap();
    let bundle = NewSignerBundle { signer: next, credential_with_key: next.credential() };
    let builder = group.mls.commit_builder().load_psks(group.store.storage()).unwrap();
    let (rand, crypto) = (group.store.rand(), group.store.crypto());
    let built = builder.build_with_new_signer(rand, crypto, &current, bundle, |_| true).unwrap();
    let (commit, _, _) = built.stage_commit(&group.store).unwrap().into_messages();
    group.mls.clear_pending_commit(group.store.storage()).unwrap();
    commit.to_bytes().unwrap()
}

mod devices;

#[test]
fn a_member_that_is_no_admin_adds_and_removes_no_accounts() {
    let (mut ann, mut bob, mut cat, mut dan) =
        (client("ann"), client("bob"), client("cat"), client("dan"));
    let id = group_of(&mut ann, &mut [&mut bob, &mut cat]);
    let dans = package(&mut dan);
    let (added, welcome) = commit!(bob, id, |builder| builder.propose_adds([dans]));
    let (removed, _) =
        commit!(bob, id, |builder| builder.propose_removals([LeafNodeIndex::new(0)]));
    for commit in [added, removed] {
        for victim in [&mut ann, &mut cat] {
            assert_eq!(victim.receive_now(&commit), [Received::Ignored(Ignored::NotAllowed)]);
        }
    }
    assert_eq!(dan.receive_now(&welcome.unwrap()), [Received::Ignored(Ignored::BadWelcome)]);
    assert_hears(&mut ann, &mut cat, id);
    assert_hears(&mut cat, &mut ann, id);
    assert_hears(&mut bob, &mut ann, id);
    // An admin's commit for the same epoch is applied all the same.
    let commit = add(&mut ann, id, &mut [&mut dan]);
    assert!(matches!(cat.receive_now(&commit.payload)[..], [Received::Committed { .. }]));
}

#[test]
fn proposals_are_ignored() {
    let (mut ann, mut bob, mut cat) = (client("ann"), client("bob"), client("cat"));
    let id = group_of(&mut ann, &mut [&mut bob, &mut cat]);
    let signer = bob.leaf();
    let group = bob.groups.get_mut(&id).unwrap();
    let (proposal, _) =
        group.mls.propose_remove_member(&group.store, &signer, LeafNodeIndex::new(2)).unwrap();
    let proposal = proposal.to_bytes().unwrap();
    for victim in [&mut ann, &mut cat] {
        assert_eq!(victim.receive_now(&proposal), [Received::Ignored(Ignored::NotAllowed)]);
    }
    // A stored proposal would stop both from sending, and ride on the next commit.
    assert_hears(&mut cat, &mut ann, id);
    let mut dan = client("dan");
    add(&mut ann, id, &mut [&mut dan]);
    assert_eq!(ann.group(&id).unwrap().unwrap().members.len(), 4);
}

#[test]
fn not_even_an_admin_changes_the_channel_a_name_or_a_direct_conversation() {
    let (mut ann, mut bob, mut cat) = (client("ann"), client("bob"), client("cat"));
    let id = group_of(&mut ann, &mut [&mut bob]);
    let mut profile = ann.groups[&id].profile.clone();
    profile.channel = ChannelId::new([1; 16]);
    let (moved, _) = commit!(ann, id, |builder| builder
        .propose_group_context_extensions(profile.extensions())
        .unwrap());
    assert_eq!(bob.receive_now(&moved), [Received::Ignored(Ignored::ForbiddenCommit)]);

    let renamed = CredentialWithKey {
        credential: BasicCredential::new(b"bob".to_vec()).into(),
        ..ann.leaf().credential()
    };
    let parameters = LeafNodeParameters::builder().with_credential_with_key(renamed).build();
    let (renamed, _) = commit!(ann, id, |builder| builder.leaf_node_parameters(parameters));
    assert_eq!(bob.receive_now(&renamed), [Received::Ignored(Ignored::ForbiddenCommit)]);

    let impostor = package_of(&cat.database, &LeafSigner::of_account(&cat.identity, &bob.username));
    let (second_bob, _) = commit!(ann, id, |builder| builder.propose_adds([impostor]));
    assert_eq!(bob.receive_now(&second_bob), [Received::Ignored(Ignored::ForbiddenCommit)]);
    assert_hears(&mut ann, &mut bob, id);
    assert_hears(&mut bob, &mut ann, id);

    let direct = ann.create_direct(bob.identity.public(), now()).unwrap();
    let welcome = add(&mut ann, direct, &mut [&mut bob]).welcome.unwrap();
    bob.receive_now(&welcome);
    let cats = package(&mut cat);
    let (third, welcome) = commit!(ann, direct, |builder| builder.propose_adds([cats]));
    assert_eq!(bob.receive_now(&third), [Received::Ignored(Ignored::NotAllowed)]);
    assert_eq!(cat.receive_now(&welcome.unwrap()), [Received::Ignored(Ignored::BadWelcome)]);
    assert_hears(&mut ann, &mut bob, direct);
}

/// The signature key would be another afterwards, and who signed with it unproven.
#[test]
fn a_member_cannot_become_another() {
    let (mut ann, mut bob) = (client("ann"), client("bob"));
    let id = group_of(&mut ann, &mut [&mut bob]);
    let other = LeafSigner::of_account(&Identity::generate(), &ann.username);
    let commit = becoming(&mut ann, id, &other);
    assert_eq!(bob.receive_now(&commit), [Received::Ignored(Ignored::ForbiddenCommit)]);
    assert_hears(&mut ann, &mut bob, id);
}

#[test]
fn any_members_key_renewal_is_followed() {
    let (mut ann, mut bob) = (client("ann"), client("bob"));
    let id = group_of(&mut ann, &mut [&mut bob]);
    let commit = change(&mut ann, id, &Change::default());
    let by = |client: &Client| client.group(&id).unwrap().unwrap().members;
    let [anns, bobs] = &by(&ann)[..] else { panic!("two members") };
    let renewed = |by: &Member| Received::Committed { group: id, by: by.clone(), changes: vec![] };
    assert_eq!(bob.receive_now(&commit.payload), [renewed(anns)]);
    let commit = change(&mut bob, id, &Change::default());
    assert_eq!(ann.receive_now(&commit.payload), [renewed(bobs)]);
    assert_hears(&mut ann, &mut bob, id);
    assert_hears(&mut bob, &mut ann, id);
}

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
    // Nor does it start a conversation that names ann as its creator under a fresh id.
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
    assert_hears(&mut ann, &mut bob, id);
}

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
    assert_hears(&mut ann, &mut bob, id);
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
fn a_commit_after_the_end_of_a_lifetime_in_it_is_reported_as_such() {
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
    let shown = format!("{ann:?} {bob:?} {:?}", bob.receive_now(&message));
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

/// A Welcome's list of recipients is not authenticated, so the server can make many of one.
/// With a package that may be used again, each of them would set the group back to where it was
/// joined, and let old messages pass for new.
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

    // Removed and added again by the same package: the first Welcome is past now, though another
    // one brought us in.
    let removal = remove(&mut ann, id, &bob).payload;
    bob.receive_now(&removal);
    let only_bob = Change { add: invitees[..1].to_vec(), ..Change::default() };
    let again = change(&mut ann, id, &only_bob).welcome.unwrap();
    assert!(matches!(bob.receive_now(&again)[..], [Received::Joined { .. }]));
    for old in [&welcome, &for_bob_alone] {
        assert_eq!(bob.receive_now(old), [Received::Duplicate]);
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
fn an_old_farewell_does_not_remove_a_member_that_was_added_again() {
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
    assert_hears(&mut bob, &mut cat, id);
    assert_hears(&mut ann, &mut bob, id);
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
    assert_hears(&mut bob, &mut ann, id);
    assert_hears(&mut bob, &mut ann, id);

    let mut bob = Client::open(&copy).unwrap();
    bob.skip_keys(2).unwrap();
    bob.accept(&id).unwrap();
    assert_hears(&mut bob, &mut ann, id);
}
