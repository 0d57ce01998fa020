//! Bans of the server and of groups, and reports.

use serde_json::json;

use crate::harness::World;

#[tokio::test]
async fn an_administrator_bans_a_user_until_the_ban_is_ended() {
    let world = World::with(|config| config.admin.usernames = vec!["root".into()]).await;
    let (root, bob) = (world.admin("root").await, world.user("bob").await);
    let key = bob.json(&["whoami"]).await[0]["identity"].clone();
    bob.fails(&["moderate", "bans"], 1, "auth.admin_required").await;
    bob.fails(&["moderate", "ban", "root"], 1, "auth.admin_required").await;
    assert!(root.json(&["moderate", "bans"]).await.is_empty());
    let banned = root.json(&["moderate", "ban", "bob", "--reason", "spam", "--for", "7d"]).await;
    let account = json!({ "event": "user_banned", "username": "bob", "identity": key });
    assert_eq!(banned, [account]);
    let listed = &root.json(&["moderate", "bans"]).await[0];
    assert_eq!((&listed["username"], &listed["reason"]), (&json!("bob"), &json!("spam")));
    let [at, until] = ["banned_at", "expires_at"].map(|key| listed[key].as_u64().unwrap());
    assert_eq!(until - at, 7 * 24 * 60 * 60 * 1_000);
    assert!(root.ok(&["moderate", "bans"]).await.starts_with("bob  until "));

    bob.fails(&["send", "root", "hello"], 3, "auth.session_expired").await;
    bob.fails(&["login"], 1, "auth.banned").await;
    root.ok(&["send", "bob", "calm down"]).await;
    root.fails(&["moderate", "ban", "root"], 1, "moderation.own_account").await;
    root.fails(&["moderate", "ban", "nobody"], 1, "client.no_such_user").await;
    root.fails(&["moderate", "ban", "bob", "--for", "7"], 2, "client.usage").await;

    assert_eq!(
        root.ok(&["moderate", "unban", "--key", key.as_str().unwrap()]).await,
        "bob is not banned from the server.\n"
    );
    bob.ok(&["login"]).await;
    assert_eq!(bob.ok(&["recv"]).await, "root: calm down\n");
    assert!(root.json(&["moderate", "reports"]).await.is_empty());
}

#[tokio::test]
async fn an_admin_of_a_group_bans_a_member_from_it() {
    let world = World::new().await;
    let (alice, bob, carol) =
        (world.user("alice").await, world.user("bob").await, world.user("carol").await);
    let made = alice.json(&["group", "create", "friends", "bob", "carol"]).await.remove(0);
    bob.ok(&["accept", "friends"]).await;
    carol.ok(&["accept", "friends"]).await;
    bob.fails(&["group", "ban", "friends", "carol"], 1, "client.not_admin").await;
    bob.fails(&["group", "bans", "friends"], 1, "group.admin_required").await;
    let banned = alice.json(&["group", "ban", "friends", "bob", "--reason", "spam"]).await;
    let expected = json!({
        "event": "member_banned", "name": "friends", "id": made["id"], "members": ["bob"]
    });
    assert_eq!(banned, [expected]);
    assert_eq!(alice.ok(&["group", "bans", "friends"]).await, "bob  permanent  spam\n");
    assert_eq!(alice.json(&["group", "members", "friends"]).await.len(), 2);
    alice.fails(&["group", "invite", "friends", "bob"], 1, "group.banned").await;
    alice.ok(&["group", "send", "friends", "quiet now"]).await;
    let shown = carol.ok(&["recv"]).await;
    assert!(shown.ends_with("[friends] alice: quiet now\n"), "{shown}");
    assert!(!bob.ok(&["recv"]).await.contains("quiet now"));
    // A repeat replaces the end, although the user is no member any more.
    alice.ok(&["group", "ban", "friends", "bob", "--for", "1h"]).await;
    assert!(alice.ok(&["group", "bans", "friends"]).await.starts_with("bob  until "));

    assert_eq!(
        alice.ok(&["group", "unban", "friends", "bob"]).await,
        "bob is not banned from friends.\n"
    );
    alice.ok(&["group", "invite", "friends", "bob"]).await;
    bob.ok(&["group", "send", "friends", "sorry"]).await;
    assert!(alice.ok(&["recv"]).await.ends_with("[friends] bob: sorry\n"));
}
