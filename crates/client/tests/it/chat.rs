//! Conversations of two and more people, and the stream of entries.

use qpq_client::{
    ConversationKind, Error, MAX_GROUP_NAME, MAX_TEXT, Membership, MlsError, SendOutcome, Standing,
    methods, v1,
};

use crate::harness::{Server, accept_and_read, dm, history, line, read, soon, username};

#[tokio::test]
async fn two_people_chat_both_ways() {
    let server = Server::start().await;
    let [alice, bob] = server.users(["alice", "bob"]).await;
    let with_bob = dm(&alice, "bob").await;
    let sent = alice.send(with_bob, "hello Bob").await.unwrap();
    assert!(matches!(sent.outcome, SendOutcome::Sent), "{sent:?}");
    alice.send(with_bob, "are you there?").await.unwrap();
    assert_eq!(read(&bob).await, ["alice: hello Bob", "alice: are you there?"]);
    assert!(read(&bob).await.is_empty(), "what was seen does not come again");

    let with_alice = dm(&bob, "alice").await;
    bob.send(with_alice, "yes").await.unwrap();
    assert_eq!(read(&alice).await, ["bob: yes"]);
    assert_eq!(
        history(&alice, with_bob).await,
        ["me: hello Bob", "me: are you there?", "bob: yes"]
    );
    assert_eq!(alice.history(with_bob, 1).await.unwrap().len(), 1);

    let conversations = alice.conversations().await.unwrap();
    let [only] = &conversations[..] else { panic!("{conversations:?}") };
    let ConversationKind::Direct { peer } = &only.kind else { panic!("{only:?}") };
    assert_eq!((peer.username.as_str(), peer.standing), ("bob", Standing::Confirmed));
    assert_eq!(alice.members(with_bob).await.unwrap().len(), 2);
}

#[tokio::test]
async fn messages_to_an_offline_user_wait() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let bob = server.user("bob").await;
    let (dir, key) = (server.profile("bob"), bob.vault_key().await);
    drop(bob);
    let with_bob = dm(&alice, "bob").await;
    for n in 0..5 {
        alice.send(with_bob, &n.to_string()).await.unwrap();
    }
    let bob = crate::harness::reopen(&dir, &key).await;
    assert_eq!(read(&bob).await, (0..5).map(|n| format!("alice: {n}")).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_member_reads_the_messages_between_its_addition_and_its_removal() {
    let server = Server::start().await;
    let [alice, bob, carol] = server.users(["alice", "bob", "carol"]).await;
    let group = alice.create_group("friends").await.unwrap();
    alice.add(group, &username("bob")).await.unwrap();
    alice.send(group, "before Carol").await.unwrap();
    alice.add(group, &username("carol")).await.unwrap();
    alice.send(group, "welcome").await.unwrap();
    assert_eq!(
        accept_and_read(&bob).await,
        ["joined by alice", "alice: before Carol", "+carol", "alice: welcome"]
    );
    assert_eq!(accept_and_read(&carol).await, ["joined by alice", "alice: welcome"]);

    bob.send(group, "hi Carol").await.unwrap();
    carol.send(group, "hi all").await.unwrap();
    assert_eq!(read(&alice).await, ["bob: hi Carol", "carol: hi all"]);
    assert_eq!(read(&carol).await, ["bob: hi Carol"]);
    assert_eq!(carol.members(group).await.unwrap().len(), 3);

    let refused = bob.add(group, &username("alice")).await.unwrap_err();
    assert!(matches!(refused, Error::Mls(MlsError::NotAdmin)), "{refused:?}");

    let carols = carol.profile().identity;
    alice.remove(group, carols).await.unwrap();
    alice.send(group, "without Carol").await.unwrap();
    assert_eq!(read(&bob).await, ["carol: hi all", "-carol", "alice: without Carol"]);
    assert_eq!(read(&carol).await, ["-carol"]);
    let conversations = carol.conversations().await.unwrap();
    let ConversationKind::Group { membership, name, .. } = &conversations[0].kind else { panic!() };
    assert_eq!((*membership, name.as_str()), (Membership::Removed, "friends"));
    let refused = carol.send(group, "still here?").await.unwrap_err();
    assert!(matches!(refused, Error::Mls(MlsError::NoLongerMember)), "{refused:?}");
}

#[tokio::test]
async fn simultaneous_first_messages_yield_one_conversation() {
    let server = Server::start().await;
    let [alice, bob] = server.users(["alice", "bob"]).await;
    let (with_bob, with_alice) = (dm(&alice, "bob").await, dm(&bob, "alice").await);
    alice.send(with_bob, "a1").await.unwrap();
    bob.send(with_alice, "b1").await.unwrap();
    assert_eq!(read(&alice).await, ["bob: b1"]);
    assert_eq!(read(&bob).await, ["alice: a1"]);
    alice.send(with_bob, "a2").await.unwrap();
    bob.send(with_alice, "b2").await.unwrap();
    assert_eq!(read(&alice).await, ["bob: b2"]);
    assert_eq!(read(&bob).await, ["alice: a2"]);
    assert_eq!(alice.conversations().await.unwrap().len(), 1);
    assert_eq!(history(&alice, with_bob).await, ["me: a1", "bob: b1", "me: a2", "bob: b2"]);
}

#[tokio::test]
async fn unsendable_texts_are_refused_with_the_reason() {
    let server = Server::start().await;
    let [alice, bob] = server.users(["alice", "bob"]).await;
    let with_bob = dm(&alice, "bob").await;
    let refused = alice.send(with_bob, &"x".repeat(MAX_TEXT + 1)).await.unwrap_err();
    assert_eq!(refused.to_string(), "a message has at most 65536 bytes, this one has 65537");
    let largest = "x".repeat(MAX_TEXT);
    alice.send(with_bob, &largest).await.unwrap();
    assert_eq!(read(&bob).await, [format!("alice: {largest}")]);

    let refused = alice.conversation_with(&username("nobody")).await.unwrap_err();
    assert_eq!(refused.to_string(), "there is no user nobody");
    assert!(matches!(
        alice.conversation_with(&username("alice")).await,
        Err(Error::Mls(MlsError::Yourself))
    ));
    for name in ["", &"x".repeat(MAX_GROUP_NAME + 1)] {
        assert!(matches!(alice.create_group(name).await, Err(Error::GroupName { .. })));
    }
    let group = alice.create_group("alone").await.unwrap();
    assert!(matches!(alice.send(group, "anyone?").await, Err(Error::Mls(MlsError::Alone))));
    assert!(matches!(bob.send(group, "hm").await, Err(Error::NoSuchConversation)));
}

#[tokio::test]
async fn a_user_without_key_packages_cannot_be_reached_yet() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    server
        .client()
        .register(
            &username("bob"),
            &crate::harness::password(),
            &qpq_client::Identity::generate(),
            None,
        )
        .await
        .unwrap();
    let with_bob = dm(&alice, "bob").await;
    let refused = alice.send(with_bob, "hello?").await.unwrap_err();
    assert!(matches!(refused, Error::NoKeys(_)), "{refused:?}");
}

#[tokio::test]
async fn key_packages_are_filled_up_when_few_are_left() {
    let server = Server::start().await;
    let [alice, bob] = server.users(["alice", "bob"]).await;
    let count =
        || bob.client().call::<methods::CountKeyPackages>(v1::CountKeyPackagesRequest::default());
    let left = count().await.unwrap();
    assert_eq!((left.available, left.has_last_resort), (20, true));
    for _ in 0..11 {
        let request = v1::FetchKeyPackageRequest {
            identity_key: bob.profile().identity.as_bytes().to_vec().into(),
            ..Default::default()
        };
        alice.client().call::<methods::FetchKeyPackage>(request).await.unwrap();
    }
    alice.send(dm(&alice, "bob").await, "the twelfth").await.unwrap();
    assert_eq!(count().await.unwrap().available, 8);
    assert_eq!(read(&bob).await, ["alice: the twelfth"]);
    assert_eq!(count().await.unwrap().available, 20);
}

#[tokio::test]
async fn a_listener_receives_new_entries_across_a_restart_of_the_server() {
    let mut server = Server::start().await;
    let [alice, bob] = server.users(["alice", "bob"]).await;
    let with_bob = dm(&alice, "bob").await;
    alice.send(with_bob, "before").await.unwrap();
    let mut listener = bob.listen();
    let mut hear = async || line(&soon(listener.next()).await.unwrap().unwrap());
    assert_eq!(hear().await, "alice: before");
    alice.send(with_bob, "during").await.unwrap();
    assert_eq!(hear().await, "alice: during");
    server.stop().await;
    server.start_again().await;
    alice.send(with_bob, "after").await.unwrap();
    assert_eq!(hear().await, "alice: after");
    drop(listener);
    assert_eq!(read(&bob).await.len(), 3, "nothing was marked as seen");
}

#[tokio::test]
async fn a_listener_outlives_a_drain() {
    let mut server = Server::start().await;
    let [alice, bob] = server.users(["alice", "bob"]).await;
    let with_bob = dm(&alice, "bob").await;
    let mut listener = bob.listen();
    soon(server.drain()).await;
    server.start_again().await;
    alice.send(with_bob, "after").await.unwrap();
    let entry = soon(listener.next()).await.unwrap().unwrap();
    assert_eq!(line(&entry), "alice: after");
}

#[tokio::test]
async fn a_refused_message_is_reported_and_delays_no_other() {
    let server = Server::start_with(|config| config.delivery.max_payload.0 = 4096).await;
    let [alice, bob] = server.users(["alice", "bob"]).await;
    let with_bob = dm(&alice, "bob").await;
    let large = "x".repeat(5000);
    let sent = alice.send(with_bob, &large).await.unwrap();
    assert!(matches!(sent.outcome, SendOutcome::Refused), "{sent:?}");
    let entries = read(&alice).await;
    assert!(entries.len() == 1 && entries[0].starts_with("undeliverable to bob: "), "{entries:?}");
    assert!(matches!(alice.send(with_bob, "small").await.unwrap().outcome, SendOutcome::Sent));
    assert_eq!(read(&bob).await, ["alice: small"]);
    assert_eq!(history(&alice, with_bob).await[0], format!("me: {large} (Failed)"));
}

#[tokio::test]
async fn a_listener_ends_with_the_session() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let mut listener = alice.listen();
    let elsewhere = server.client();
    elsewhere.login(&username("alice"), &crate::harness::password()).await.unwrap();
    elsewhere.logout(qpq_client::LogoutScope::EverySession).await.unwrap();
    let error = soon(listener.next()).await.unwrap().unwrap_err();
    assert!(error.is_unauthorized(), "{error:?}");
    assert!(soon(listener.next()).await.is_none());
}

#[tokio::test]
async fn messages_written_while_the_server_is_down_are_sent_later() {
    let mut server = Server::start().await;
    let [alice, bob] = server.users(["alice", "bob"]).await;
    let with_bob = dm(&alice, "bob").await;
    alice.send(with_bob, "one").await.unwrap();
    let (dir, key) = (server.profile("alice"), alice.vault_key().await);
    server.stop().await;
    let waiting = tokio::spawn({
        let alice = alice.clone();
        async move { alice.send(with_bob, "two").await }
    });
    // The message is saved first, and then waits for the server; the program ends before the
    // server is back.
    soon(async {
        while history(&alice, with_bob).await.len() < 2 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    waiting.abort();
    assert!(waiting.await.unwrap_err().is_cancelled());
    assert_eq!(history(&alice, with_bob).await, ["me: one", "me: two (Queued)"]);
    drop(alice);
    server.start_again().await;
    let alice = crate::harness::reopen(&dir, &key).await;
    alice.flush().await.unwrap();
    assert_eq!(read(&bob).await, ["alice: one", "alice: two"]);
    assert_eq!(history(&alice, with_bob).await, ["me: one", "me: two"]);
}

#[tokio::test]
async fn messages_for_a_full_inbox_are_sent_later_in_order() {
    let server = Server::start_with(|config| {
        config.delivery.max_messages = 3;
        config.delivery.sender_share = 1;
    })
    .await;
    let [alice, bob] = server.users(["alice", "bob"]).await;
    let with_bob = dm(&alice, "bob").await;
    let mut outcomes = Vec::new();
    for n in 0..4 {
        outcomes.push(alice.send(with_bob, &n.to_string()).await.unwrap().outcome);
    }
    // The Welcome and two messages fit.
    assert!(matches!(
        outcomes[..],
        [
            SendOutcome::Sent,
            SendOutcome::Sent,
            SendOutcome::Queued(None),
            SendOutcome::Queued(None)
        ]
    ));
    assert_eq!(read(&bob).await, ["alice: 0", "alice: 1"]);
    alice.flush().await.unwrap();
    assert_eq!(read(&bob).await, ["alice: 2", "alice: 3"]);
}

#[tokio::test]
async fn several_streams_of_one_profile_each_have_every_message_once() {
    let server = Server::start().await;
    let [alice, bob] = server.users(["alice", "bob"]).await;
    let with_bob = dm(&alice, "bob").await;
    let mut streams = [bob.listen(), bob.listen(), bob.listen()];
    alice.send(with_bob, "first").await.unwrap();
    for stream in &mut streams {
        assert_eq!(line(&soon(stream.next()).await.unwrap().unwrap()), "alice: first");
    }
    let texts: Vec<_> = (0..30).map(|n| n.to_string()).collect();
    for text in &texts {
        alice.send(with_bob, text).await.unwrap();
    }
    // The first has shown everything before the others look.
    for stream in &mut streams {
        for text in &texts {
            let entry = soon(stream.next()).await.unwrap().unwrap();
            assert_eq!(line(&entry), format!("alice: {text}"));
            bob.mark_seen(&[entry.id]).await.unwrap();
        }
    }
    bob.send(dm(&bob, "alice").await, "an own message is not in the streams").await.unwrap();
    alice.send(with_bob, "last").await.unwrap();
    for stream in &mut streams {
        assert_eq!(line(&soon(stream.next()).await.unwrap().unwrap()), "alice: last");
    }
}
