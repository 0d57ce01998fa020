//! Commits that no honest client creates, and commits that every member follows.

use super::*;

#[test]
fn commits_of_a_non_admin_that_add_or_remove_accounts_are_ignored() {
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
    assert_reads(&mut ann, &mut cat, id);
    assert_reads(&mut cat, &mut ann, id);
    assert_reads(&mut bob, &mut ann, id);
    // A commit of an admin for the same epoch is still applied.
    let commit = add(&mut ann, id, &mut [&mut dan]);
    assert!(matches!(cat.receive_now(&commit.payload)[..], [Received::Committed { .. }]));
}

#[test]
fn proposals_are_ignored_and_not_part_of_later_commits() {
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
    // A stored proposal would prevent both from sending, and would become part of the next commit.
    assert_reads(&mut cat, &mut ann, id);
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
    assert_reads(&mut ann, &mut bob, id);
    assert_reads(&mut bob, &mut ann, id);

    let direct = ann.create_direct(bob.identity.public(), now()).unwrap();
    let welcome = add(&mut ann, direct, &mut [&mut bob]).welcome.unwrap();
    bob.receive_now(&welcome);
    let cats = package(&mut cat);
    let (third, welcome) = commit!(ann, direct, |builder| builder.propose_adds([cats]));
    assert_eq!(bob.receive_now(&third), [Received::Ignored(Ignored::NotAllowed)]);
    assert_eq!(cat.receive_now(&welcome.unwrap()), [Received::Ignored(Ignored::BadWelcome)]);
    assert_reads(&mut ann, &mut bob, direct);
}

/// Nothing proves that the new signature key belongs to the account.
#[test]
fn a_commit_that_changes_the_account_of_a_leaf_is_refused() {
    let (mut ann, mut bob) = (client("ann"), client("bob"));
    let id = group_of(&mut ann, &mut [&mut bob]);
    let other = LeafSigner::of_account(&Identity::generate(), &ann.username);
    let commit = becoming(&mut ann, id, &other);
    assert_eq!(bob.receive_now(&commit), [Received::Ignored(Ignored::ForbiddenCommit)]);
    assert_reads(&mut ann, &mut bob, id);
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
    assert_reads(&mut ann, &mut bob, id);
    assert_reads(&mut bob, &mut ann, id);
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
