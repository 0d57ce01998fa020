//! Groups that any member changes: concurrent changes, roles, joining again, renewal of keys.

use std::time::Duration;

use futures_util::future::join_all;
use qpq_client::{Error, Messenger, MlsError, Role, SendOutcome, methods, v1};
use qpq_ports::{Clock as _, SystemClock};

use crate::harness::{
    Server, accept_and_read, copy_dir, crash_after, dm, history, read, reopen, restart, username,
};

type Conversation = qpq_client::ConversationId;

/// Creates a group of the named users by the first of them, which all have joined.
async fn group_of(users: &[&Messenger]) -> Conversation {
    let group = users[0].create_group("friends").await.unwrap();
    for user in &users[1..] {
        users[0].add(group, &user.profile().username).await.unwrap();
    }
    for user in &users[1..] {
        accept_and_read(user).await;
    }
    group
}

async fn names(user: &Messenger, group: Conversation) -> Vec<String> {
    let members = user.members(group).await.unwrap();
    let mut names: Vec<_> = members.iter().map(ToString::to_string).collect();
    names.sort_unstable();
    names
}

#[tokio::test]
async fn only_admins_change_a_group() {
    let server = Server::start().await;
    let [alice, bob, carol] = server.users(["alice", "bob", "carol"]).await;
    let group = group_of(&[&alice, &bob]).await;
    let bobs = bob.profile().identity;
    let alices = alice.profile().identity;
    let is_refused = |done: Result<SendOutcome, Error>| {
        assert!(matches!(done, Err(Error::Mls(MlsError::NotAdmin))), "{done:?}");
    };
    is_refused(bob.add(group, &username("carol")).await);
    is_refused(bob.rename(group, "mine").await);
    is_refused(bob.set_role(group, bobs, Role::Admin).await);
    is_refused(bob.remove(group, alices).await);

    alice.set_role(group, bobs, Role::Admin).await.unwrap();
    assert_eq!(read(&bob).await, ["admins: bob"]);
    bob.add(group, &username("carol")).await.unwrap();
    bob.rename(group, "close friends").await.unwrap();
    assert_eq!(read(&alice).await, ["+carol", "bob named it close friends"]);
    assert_eq!(accept_and_read(&carol).await, ["joined by bob", "bob named it close friends"]);
    bob.set_role(group, alices, Role::Member).await.unwrap();
    assert_eq!(read(&alice).await, ["no admins: alice"]);
    is_refused(alice.rename(group, "mine").await);
    let last = bob.set_role(group, bobs, Role::Member).await;
    assert!(matches!(last, Err(Error::Mls(MlsError::LastAdmin))), "{last:?}");
    bob.remove(group, alices).await.unwrap();
    assert_eq!(read(&alice).await, ["-alice"]);
    assert_eq!(read(&carol).await, ["no admins: alice", "-alice"]);
    let shown = carol.group_members(group).await.unwrap();
    let roles: Vec<_> =
        shown.iter().map(|member| (member.person.to_string(), member.role)).collect();
    assert_eq!(roles.len(), 2);
    assert!(roles.contains(&("bob".into(), Role::Admin)));
    assert!(roles.contains(&("carol".into(), Role::Member)));
}

#[tokio::test]
async fn messages_of_a_removed_member_with_old_keys_are_shown_as_unreadable() {
    const REFUSED: &str =
        "unreadable of carol: it arrived after its sender's device had been removed from the group";
    let server = Server::start().await;
    let [alice, bob, carol] = server.users(["alice", "bob", "carol"]).await;
    let group = group_of(&[&alice, &bob, &carol]).await;
    read(&bob).await;
    carol.send(group, "before the removal").await.unwrap();
    alice.remove(group, carol.profile().identity).await.unwrap();
    // Carol's client does not read the commit.
    let with_old_keys = async |text| carol.send(group, text).await.unwrap();
    with_old_keys("unread by the remover").await;
    assert_eq!(read(&bob).await, ["carol: before the removal", "-carol", REFUSED]);
    // The inbox does not show whether this one precedes the commit.
    let first = ["carol: before the removal", "carol: unread by the remover"];
    assert_eq!(read(&alice).await, first);
    with_old_keys("late").await;
    for user in [&alice, &bob] {
        assert_eq!(read(user).await, [REFUSED]);
    }
    assert_eq!(read(&carol).await, ["-carol"], "nobody asks for a repeat");
}

#[tokio::test]
async fn concurrent_changes_of_several_admins_all_take_effect() {
    let server = Server::start().await;
    let [alice, bob, carol] = server.users(["alice", "bob", "carol"]).await;
    let guests = server.users(["dave", "eve", "frank"]).await;
    let group = group_of(&[&alice, &bob, &carol]).await;
    for admin in [&bob, &carol] {
        alice.set_role(group, admin.profile().identity, Role::Admin).await.unwrap();
    }
    for member in [&bob, &carol] {
        member.receive().await.unwrap();
    }
    let invited = [&alice, &bob, &carol].into_iter().zip(["dave", "eve", "frank"]);
    let done =
        join_all(invited.map(async |(admin, guest)| admin.add(group, &username(guest)).await))
            .await;
    for outcome in done {
        assert!(matches!(outcome, Ok(SendOutcome::Sent)), "{outcome:?}");
    }
    for user in [&alice, &bob, &carol] {
        user.receive().await.unwrap();
    }
    for guest in &guests {
        accept_and_read(guest).await;
    }
    let everyone = ["alice", "bob", "carol", "dave", "eve", "frank"];
    for user in [&alice, &bob, &carol, &guests[0], &guests[1], &guests[2]] {
        assert_eq!(names(user, group).await, everyone);
    }
    guests[2].send(group, "hello all").await.unwrap();
    for user in [&alice, &bob, &carol, &guests[0], &guests[1]] {
        assert_eq!(read(user).await.last().map(String::as_str), Some("frank: hello all"));
    }
}

#[tokio::test]
async fn a_change_takes_effect_once_after_a_crash_at_any_step() {
    let server = Server::start().await;
    let [alice, bob, carol] = server.users(["alice", "bob", "carol"]).await;
    let group = group_of(&[&alice, &bob]).await;
    let (dir, key) = (server.profile("alice"), alice.vault_key().await);
    let mut alice = alice;
    let mut rounds = 0;
    for polls in (1..).step_by(3) {
        let is_member = names(&alice, group).await.contains(&"carol".to_owned());
        assert!(!is_member);
        let added = crash_after(polls, alice.add(group, &username("carol"))).await;
        let is_done = added.is_some();
        drop(alice);
        alice = restart(&dir, &key).await;
        alice.flush().await.unwrap();
        // After an early crash nothing was saved.
        if !names(&alice, group).await.contains(&"carol".to_owned()) {
            alice.add(group, &username("carol")).await.unwrap();
        }
        alice.send(group, "hello").await.unwrap();
        assert_eq!(read(&bob).await, ["+carol", "alice: hello"], "after {polls} polls");
        assert_eq!(accept_and_read(&carol).await, ["joined by alice", "alice: hello"]);
        alice.remove(group, carol.profile().identity).await.unwrap();
        assert_eq!(read(&bob).await, ["-carol"]);
        assert_eq!(read(&carol).await, ["-carol"]);
        rounds += 1;
        if is_done {
            break;
        }
    }
    assert!(rounds > 5, "{rounds}");
}

#[tokio::test]
async fn a_device_joins_again_by_itself_and_the_other_members_see_the_rejoining() {
    let server = Server::start().await;
    let [alice, bob, carol] = server.users(["alice", "bob", "carol"]).await;
    let group = group_of(&[&alice, &bob, &carol]).await;
    read(&bob).await;
    bob.rejoin(group).await.unwrap();
    assert_eq!(read(&alice).await, ["bob rejoined on first device"]);
    alice.send(group, "welcome back").await.unwrap();
    bob.send(group, "thanks").await.unwrap();
    assert_eq!(read(&bob).await, ["joined by bob", "alice: welcome back"]);
    let seen = read(&carol).await;
    assert_eq!(seen, ["bob rejoined on first device", "alice: welcome back", "bob: thanks"]);
    assert_eq!(names(&carol, group).await, ["alice", "bob", "carol"]);

    alice.remove(group, bob.profile().identity).await.unwrap();
    read(&bob).await;
    let refused = bob.rejoin(group).await;
    let is_refused = refused
        .as_ref()
        .is_err_and(|error| error.call().is_some_and(|error| error.is_code("group.not_member")));
    assert!(is_refused, "{refused:?}");
}

#[tokio::test]
async fn a_restored_profile_that_missed_commits_joins_its_groups_again() {
    let server = Server::start().await;
    let [alice, bob, carol] = server.users(["alice", "bob", "carol"]).await;
    let group = group_of(&[&alice, &bob]).await;
    let (dir, key) = (server.profile("bob"), bob.vault_key().await);
    bob.send(group, "before").await.unwrap();
    drop(bob);
    let night = dir.with_extension("night");
    copy_dir(&dir, &night);

    let bob = reopen(&dir, &key).await;
    alice.add(group, &username("carol")).await.unwrap();
    alice.send(group, "one").await.unwrap();
    assert_eq!(read(&bob).await, ["+carol", "alice: one"]);
    drop(bob);
    std::fs::remove_dir_all(&dir).unwrap();
    copy_dir(&night, &dir);

    let bob = reopen(&dir, &key).await;
    alice.send(group, "two").await.unwrap();
    // The commit does not arrive again. Bob's client notices that it is behind, joins again, and
    // asks for the messages that it cannot read.
    let first = read(&bob).await;
    assert!(first.contains(&"joined by bob".to_owned()), "{first:?}");
    alice.receive().await.unwrap();
    alice.send(group, "three").await.unwrap();
    let then = read(&bob).await;
    let all = [first, then].concat();
    for text in ["alice: two", "alice: three"] {
        let times = all.iter().filter(|line| *line == text).count();
        assert_eq!(times, 1, "{text}: {all:?}");
    }
    bob.send(group, "back").await.unwrap();
    assert_eq!(accept_and_read(&carol).await.last().map(String::as_str), Some("bob: back"));
}

#[tokio::test]
async fn garbage_that_the_server_accepted_as_a_commit_does_not_block_later_ones() {
    let server = Server::start().await;
    let [alice, bob, carol] = server.users(["alice", "bob", "carol"]).await;
    let group = group_of(&[&alice, &bob]).await;
    let Conversation::Group(id) = group else { panic!("{group:?}") };
    let (channel, _) = bob.group_state(id).await.unwrap();
    let garbage = |epoch| v1::BatchEnqueueRequest {
        recipient_keys: vec![alice.profile().identity.as_bytes().to_vec().into()],
        payload: vec![7; 100].into(),
        channel_id: channel.as_bytes().to_vec().into(),
        expected_epoch: epoch,
        commit: true,
        ..Default::default()
    };
    // The first commit added bob.
    bob.client().call::<methods::BatchEnqueue>(garbage(1)).await.unwrap();
    let renamed = alice.rename(group, "close friends").await;
    assert!(matches!(renamed, Ok(SendOutcome::Sent)), "{renamed:?}");
    assert_eq!(read(&bob).await, ["alice named it close friends"]);
    let stale = bob.client().call::<methods::BatchEnqueue>(garbage(2)).await.unwrap_err();
    assert!(stale.is_code("delivery.stale_epoch"), "{stale:?}");
    alice.add(group, &username("carol")).await.unwrap();
    assert_eq!(accept_and_read(&carol).await, ["joined by alice"]);
    assert_eq!(names(&carol, group).await, ["alice", "bob", "carol"]);
}

#[tokio::test]
async fn a_key_rotation_renews_each_members_keys_once() {
    let server = Server::start().await;
    let [alice, bob, carol] = server.users(["alice", "bob", "carol"]).await;
    let group = group_of(&[&alice, &bob, &carol]).await;
    alice.rotate_keys(group, "a laptop was stolen").await.unwrap();
    let later = |secs| SystemClock.now().plus(Duration::from_secs(secs));
    for user in [&alice, &bob, &carol] {
        user.receive().await.unwrap();
    }
    let epochs = epoch(&alice, group).await;
    for user in [&alice, &bob, &carol] {
        user.renew_keys_at(later(60)).await.unwrap();
    }
    for user in [&alice, &bob, &carol] {
        assert_eq!(read(user).await, [""; 0]);
    }
    for user in [&alice, &bob, &carol] {
        user.renew_keys_at(later(60)).await.unwrap();
        user.receive().await.unwrap();
        assert_eq!(epoch(user, group).await, epochs + 3, "each of the three once");
    }
    carol.send(group, "still here").await.unwrap();
    assert_eq!(read(&bob).await, ["carol: still here"]);
}

async fn epoch(user: &Messenger, group: Conversation) -> u64 {
    let Conversation::Group(id) = group else { panic!("{group:?}") };
    user.group_state(id).await.unwrap().1
}

#[tokio::test]
async fn a_change_that_the_server_cannot_accept_now_takes_effect_later() {
    let mut server = Server::start().await;
    let [alice, bob] = server.users(["alice", "bob"]).await;
    let group = group_of(&[&alice, &bob]).await;
    let with_bob = dm(&alice, "bob").await;
    alice.send(with_bob, "hi").await.unwrap();
    read(&bob).await;
    let (dir, key) = (server.profile("alice"), alice.vault_key().await);
    drop(alice);
    server.stop().await;
    let alice = reopen(&dir, &key).await;
    // The change is saved before the server is called.
    let renamed = tokio::time::timeout(Duration::from_secs(1), alice.rename(group, "later")).await;
    assert!(renamed.is_err(), "{renamed:?}");
    server.start_again().await;
    drop(alice);
    let alice = restart(&dir, &key).await;
    alice.flush().await.unwrap();
    assert_eq!(read(&bob).await, ["alice named it later"]);
    assert_eq!(
        history(&alice, group).await.last().map(String::as_str),
        Some("alice named it later")
    );
}

#[tokio::test]
async fn groups_continue_after_the_server_went_back_in_time() {
    let mut server = Server::start().await;
    let [alice, bob, carol] = server.users(["alice", "bob", "carol"]).await;
    let group = group_of(&[&alice, &bob]).await;
    let profiles = [("alice", &alice), ("bob", &bob), ("carol", &carol)];
    let mut keys = Vec::new();
    for (name, user) in profiles {
        keys.push((server.profile(name), user.vault_key().await));
    }
    drop([alice, bob, carol]);
    let copy = server.copy_data().await;
    let [alice, bob, carol] = reopen_all(&keys).await;
    let others = alice.create_group("others").await.unwrap();
    alice.add(others, &username("bob")).await.unwrap();
    alice.add(group, &username("carol")).await.unwrap();
    alice.rename(group, "close friends").await.unwrap();
    read(&bob).await;
    accept_and_read(&carol).await;
    drop([alice, bob, carol]);
    server.restore_data(&copy).await;

    let [alice, bob, carol] = reopen_all(&keys).await;
    for user in [&alice, &bob, &carol] {
        user.receive().await.unwrap();
    }
    let later = SystemClock.now().plus(Duration::from_secs(60));
    for user in [&alice, &bob, &carol] {
        user.renew_keys_at(later).await.unwrap();
        user.receive().await.unwrap();
    }
    // Now the server has the group that it did not know, and the member that it had lost.
    alice.rename(others, "best friends").await.unwrap();
    alice.rename(group, "closest friends").await.unwrap();
    for user in [&bob, &carol] {
        let lines = read(user).await;
        let named = lines.contains(&"alice named it closest friends".to_owned());
        assert!(named, "{lines:?}");
    }
    carol.rejoin(group).await.unwrap();
    carol.send(group, "still here").await.unwrap();
    for user in [&alice, &bob] {
        let lines = read(user).await;
        assert!(lines.contains(&"carol: still here".to_owned()), "{lines:?}");
    }
    assert_eq!(names(&bob, others).await, ["alice", "bob"]);
}

async fn reopen_all(keys: &[(std::path::PathBuf, qpq_client::VaultKey)]) -> [Messenger; 3] {
    let mut opened = Vec::new();
    for (dir, key) in keys {
        opened.push(restart(dir, key).await);
    }
    opened.try_into().expect("three")
}
