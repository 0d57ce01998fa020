//! Groups.

use serde_json::json;

use crate::harness::World;

#[tokio::test]
async fn three_members_of_a_group_read_the_same_messages() {
    let world = World::new().await;
    let (alice, bob, carol) =
        (world.user("alice").await, world.user("bob").await, world.user("carol").await);
    let made = &alice.json(&["group", "create", "friends", "bob"]).await[0];
    assert_eq!((&made["event"], &made["added"]), (&json!("group_created"), &json!(["bob"])));
    let id = made["id"].as_str().unwrap();
    assert_eq!(alice.ok(&["group", "send", "friends", "hi"]).await, "Sent to friends.\n");
    assert_eq!(
        bob.ok(&["recv"]).await,
        "* alice wants to add you to the group friends: see `qpq requests`\n"
    );
    assert_eq!(
        bob.ok(&["accept", "friends"]).await,
        "You joined the group friends, created by alice.\n"
    );
    assert_eq!(
        bob.ok(&["recv"]).await,
        "* alice added you to the group friends\n[friends] alice: hi\n"
    );

    assert_eq!(
        alice.ok(&["group", "invite", &id[..8], "carol"]).await,
        "Added carol to friends.\n"
    );
    bob.ok(&["send", "friends", "welcome"]).await;
    assert_eq!(bob.ok(&["recv"]).await, "* [friends] carol joined\n");
    carol.ok(&["accept", "alice"]).await;
    assert_eq!(
        carol.ok(&["recv"]).await,
        "* alice added you to the group friends\n[friends] bob: welcome\n"
    );
    carol.ok(&["group", "send", "friends", "thanks"]).await;
    assert_eq!(alice.ok(&["recv"]).await, "[friends] bob: welcome\n[friends] carol: thanks\n");
    assert_eq!(bob.ok(&["recv"]).await, "[friends] carol: thanks\n");

    let listed = &carol.json(&["group", "list"]).await[0];
    assert_eq!(
        *listed,
        json!({
            "name": "friends", "id": id, "maker": "alice", "members": 3, "unseen": 0, "member": true
        })
    );
    let members = carol.json(&["group", "members", "friends"]).await;
    let mut names: Vec<_> =
        members.iter().map(|member| (&member["username"], &member["maker"])).collect();
    names.sort_by_key(|(name, _)| name.as_str());
    assert_eq!(
        names,
        [
            (&json!("alice"), &json!(true)),
            (&json!("bob"), &json!(false)),
            (&json!("carol"), &json!(false))
        ]
    );
}

#[tokio::test]
async fn adding_members_requires_an_admin_and_adding_a_member_again_fails() {
    let world = World::new().await;
    let (alice, bob, _carol) =
        (world.user("alice").await, world.user("bob").await, world.user("carol").await);
    alice.ok(&["group", "create", "friends", "bob"]).await;
    alice.fails(&["group", "add", "friends", "bob"], 1, "client.already_member").await;
    bob.ok(&["accept", "friends"]).await;
    bob.fails(&["group", "add", "friends", "carol"], 1, "client.not_admin").await;
    alice.fails(&["group", "create", "others", "bob", "nobody"], 1, "client.no_such_user").await;
    assert_eq!(alice.json(&["group", "list"]).await.len(), 1, "no half-made group");
    alice.fails(&["group", "create", ""], 1, "client.group_name").await;
}

#[tokio::test]
async fn a_group_named_like_a_user_receives_no_message_for_the_user() {
    let world = World::new().await;
    let (alice, bob, mallory) =
        (world.user("alice").await, world.user("bob").await, world.user("mallory").await);
    mallory.ok(&["group", "create", "bob", "alice"]).await;
    alice.ok(&["accept", "@mallory"]).await;
    alice.fails(&["send", "bob", "secret"], 1, "client.ambiguous_recipient").await;
    alice.ok(&["send", "@bob", "for you"]).await;
    alice.ok(&["group", "send", "bob", "for all"]).await;
    assert_eq!(bob.ok(&["recv"]).await, "alice: for you\n");
    assert_eq!(mallory.ok(&["recv"]).await, "[bob] alice: for all\n");
}

#[tokio::test]
async fn a_member_that_leaves_is_removed_and_can_be_added_again() {
    let world = World::new().await;
    let (alice, bob) = (world.user("alice").await, world.user("bob").await);
    let made = &alice.json(&["group", "create", "friends", "bob"]).await[0];
    bob.ok(&["accept", "friends"]).await;
    let left = &bob.json(&["group", "leave", "friends"]).await[0];
    assert_eq!(*left, json!({ "event": "group_left", "name": "friends", "id": made["id"] }));
    assert_eq!(alice.ok(&["recv"]).await, "* [friends] bob left\n");
    assert!(bob.json(&["recv"]).await.is_empty());
    bob.fails(&["group", "leave", "friends"], 1, "client.no_such_group").await;
    alice.ok(&["group", "add", "friends", "bob"]).await;
    assert_eq!(bob.ok(&["recv"]).await, "* alice added you to the group friends\n");
    assert_eq!(bob.ok(&["group", "leave", "friends"]).await, "You have left the group friends.\n");
}

#[tokio::test]
async fn requests_of_strangers_are_listed_accepted_and_declined() {
    let world = World::new().await;
    let [bob, mallory, eve] =
        [world.user("bob").await, world.user("mallory").await, world.user("eve").await];
    assert!(bob.json(&["requests"]).await.is_empty());
    let made = mallory.json(&["group", "create", "offers", "bob", "eve"]).await.remove(0);
    mallory.ok(&["group", "create", "more offers", "bob"]).await;
    eve.ok(&["group", "create", "offers", "bob"]).await;
    let listed = bob.json(&["requests"]).await;
    let names: Vec<_> =
        listed.iter().map(|request| (&request["from"]["username"], &request["name"])).collect();
    assert_eq!(
        names,
        [
            (&json!("mallory"), &json!("offers")),
            (&json!("mallory"), &json!("more offers")),
            (&json!("eve"), &json!("offers"))
        ]
    );
    let first = &listed[0];
    assert_eq!((&first["kind"], &first["members"]), (&json!("group"), &json!(2)));
    assert_eq!((&first["id"], &first["from"]["standing"]), (&made["id"], &json!("confirmed")));
    let shown = bob.ok(&["requests"]).await;
    let line = shown.lines().next().unwrap();
    assert!(
        line.starts_with("mallory wants to add you to the group offers, 2 members, "),
        "{line}"
    );

    bob.fails(&["accept", "offers"], 1, "client.ambiguous_request").await;
    bob.fails(&["accept", "nobody"], 1, "client.no_such_request").await;
    let id = made["id"].as_str().unwrap();
    assert_eq!(bob.ok(&["decline", &id[..8]]).await, "Declined the group offers of mallory.\n");
    bob.fails(&["group", "send", "offers", "hm"], 1, "client.no_such_group").await;
    let declined = bob.json(&["decline", "mallory"]).await;
    assert_eq!((declined.len(), &declined[0]["event"]), (1, &json!("declined")));
    let accepted = bob.json(&["accept", "offers"]).await;
    assert_eq!((accepted.len(), &accepted[0]["event"]), (1, &json!("accepted")));
    assert!(bob.json(&["requests"]).await.is_empty());
    bob.ok(&["group", "send", "offers", "hello"]).await;
    assert_eq!(eve.ok(&["recv"]).await.lines().last(), Some("[offers] bob: hello"));
}
