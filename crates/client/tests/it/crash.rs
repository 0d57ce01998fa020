//! Crashes at every point where a program can stop: the future is dropped after its first poll, its
//! second, and so on, and the whole state is read from disk again. No message may be lost or appear
//! twice.

use qpq_client::{DeliveryState, Event, Messenger};

use crate::harness::{
    Server, accept_and_read, crash_after, dm, history, password, read, restart, soon, username,
};

/// More polls than any of these futures takes.
const MANY: usize = 500;

#[tokio::test]
async fn a_crash_while_receiving_loses_and_doubles_nothing() {
    let server = Server::start().await;
    let [alice, bob] = server.users(["alice", "bob"]).await;
    let with_bob = dm(&alice, "bob").await;
    let with_alice = dm(&bob, "alice").await;
    let (dir, key) = (server.profile("bob"), bob.vault_key().await);
    drop(bob);
    let mut sent = Vec::new();
    for polls in 1..MANY {
        let text = polls.to_string();
        alice.send(with_bob, &text).await.unwrap();
        sent.push(format!("alice: {text}"));
        let bob = restart(&dir, &key).await;
        let survived = soon(crash_after(polls, bob.receive())).await.is_some();
        drop(bob);
        let bob = restart(&dir, &key).await;
        assert_eq!(read(&bob).await, [format!("alice: {text}")], "after {polls} polls");
        if survived {
            assert_eq!(history(&bob, with_alice).await, sent);
            return;
        }
    }
    panic!("receiving never ended");
}

#[tokio::test]
async fn a_crash_while_sending_loses_and_doubles_nothing() {
    let server = Server::start().await;
    let [alice, bob] = server.users(["alice", "bob"]).await;
    let with_bob = dm(&alice, "bob").await;
    let with_alice = dm(&bob, "alice").await;
    let (dir, key) = (server.profile("alice"), alice.vault_key().await);
    alice.send(with_bob, "first").await.unwrap();
    drop(alice);
    for polls in 1..MANY {
        let alice = restart(&dir, &key).await;
        let survived =
            soon(crash_after(polls, alice.send(with_bob, &polls.to_string()))).await.is_some();
        drop(alice);
        let alice = restart(&dir, &key).await;
        alice.flush().await.unwrap();
        read(&bob).await;
        let saved = history(&alice, with_bob).await;
        let expected: Vec<_> = saved.iter().map(|line| line.replace("me:", "alice:")).collect();
        assert_eq!(history(&bob, with_alice).await, expected, "after {polls} polls");
        if survived {
            assert!(saved.len() > 2, "some crashes came after the message was saved");
            assert_eq!(saved.last().unwrap(), &format!("me: {polls}"));
            return;
        }
    }
    panic!("sending never ended");
}

/// The backlog is larger than the number of messages that are sent before answers are saved.
#[tokio::test]
async fn a_crash_while_working_off_a_backlog_loses_and_doubles_nothing() {
    let server = Server::start().await;
    let [alice, bob] = server.users(["alice", "bob"]).await;
    let with_bob = dm(&alice, "bob").await;
    let with_alice = dm(&bob, "alice").await;
    let (dir, key) = (server.profile("alice"), alice.vault_key().await);
    drop(alice);
    for polls in (1..MANY).step_by(7) {
        let alice = restart(&dir, &key).await;
        let texts = (0..20).map(|n| format!("{polls}, {n}")).collect();
        alice.queue_all(with_bob, texts).await.unwrap();
        let survived = soon(crash_after(polls, alice.flush())).await.is_some();
        drop(alice);
        let alice = restart(&dir, &key).await;
        alice.flush().await.unwrap();
        assert_eq!(read(&bob).await.len(), 20, "after {polls} polls");
        if survived {
            let saved = history(&alice, with_bob).await;
            let expected: Vec<_> = saved.iter().map(|line| line.replace("me:", "alice:")).collect();
            assert_eq!(history(&bob, with_alice).await, expected);
            return;
        }
    }
    panic!("sending never ended");
}

#[tokio::test]
async fn after_a_crash_while_creating_a_group_creator_and_member_agree() {
    let server = Server::start().await;
    let [alice, bob] = server.users(["alice", "bob"]).await;
    let (dir, key) = (server.profile("alice"), alice.vault_key().await);
    drop(alice);
    for polls in 1..MANY {
        let alice = restart(&dir, &key).await;
        let group = alice.create_group("friends").await.unwrap();
        let work = async {
            alice.add(group, &username("bob")).await.unwrap();
            alice.send(group, "hello").await.unwrap();
        };
        let survived = soon(crash_after(polls, work)).await.is_some();
        drop(alice);
        let alice = restart(&dir, &key).await;
        alice.flush().await.unwrap();
        let members = alice.members(group).await.unwrap().len();
        let sent = alice.history(group, usize::MAX).await.unwrap();
        let sent = sent
            .iter()
            .any(|entry| matches!(entry.event, Event::Sent { delivery: DeliveryState::Sent, .. }));
        let expected: &[&str] = match (members, sent) {
            (1, false) => &[],
            (2, false) => &["joined by alice"],
            (2, true) => &["joined by alice", "alice: hello"],
            other => panic!("{other:?}"),
        };
        assert_eq!(accept_and_read(&bob).await, expected, "after {polls} polls");
        if survived {
            assert!(sent);
            return;
        }
    }
    panic!("it never ended");
}

#[tokio::test]
async fn registering_again_after_a_crash_completes_the_registration() {
    let server = Server::start().await;
    let bob = server.user("bob").await;
    // Only every third point, since each costs three password hashes.
    for polls in (1..MANY).step_by(3) {
        let name = format!("alice{polls}");
        let (dir, alice) = (server.profile(&name), username(&name));
        let password = password();
        let register = || Messenger::register(&dir, server.options(), &alice, &password, None);
        let survived = soon(crash_after(polls, register())).await.is_some();
        let messenger = match soon(register()).await {
            Ok(messenger) => messenger,
            // The profile was complete, perhaps without the KeyPackages.
            Err(qpq_client::Error::Profile(qpq_client::ProfileError::Exists(_))) => {
                Messenger::unlock(&dir, &password).await.unwrap()
            }
            Err(error) => panic!("after {polls} polls: {error:?}"),
        };
        messenger.receive().await.unwrap();
        messenger.publish_key_packages().await.unwrap();
        bob.send(dm(&bob, &name).await, "hi").await.unwrap();
        assert_eq!(read(&messenger).await, ["bob: hi"], "after {polls} polls");
        if survived {
            return;
        }
    }
    panic!("registering never ended");
}
