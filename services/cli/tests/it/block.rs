//! Users whose messages are refused.

use serde_json::json;

use crate::harness::World;

#[tokio::test]
async fn a_blocked_user_is_listed_and_its_messages_dropped_until_unblocking() {
    let mut world = World::new().await;
    let (bob, mallory) = (world.user("bob").await, world.user("mallory").await);
    let key = mallory.json(&["whoami"]).await[0]["identity"].clone();
    assert!(bob.json(&["blocked"]).await.is_empty());
    let person = json!({ "username": "mallory", "identity": key, "standing": "confirmed" });
    let mut blocked = person.clone();
    blocked["event"] = json!("blocked");
    blocked["at_server"] = json!(true);
    assert_eq!(bob.json(&["block", "mallory"]).await, [blocked]);
    assert_eq!(bob.json(&["blocked"]).await, [person]);
    assert_eq!(bob.ok(&["blocked"]).await, "mallory\n");

    mallory.fails(&["send", "bob", "buy this"], 1, "client.not_delivered").await;
    mallory.ok(&["group", "create", "offers", "bob"]).await;
    assert!(bob.json(&["recv"]).await.is_empty());
    assert!(bob.json(&["group", "list"]).await.is_empty());
    bob.fails(&["send", "mallory", "stop"], 1, "client.blocked").await;
    bob.fails(&["block", "bob"], 1, "client.yourself").await;
    bob.fails(&["block", "nobody"], 1, "client.no_such_user").await;
    bob.fails(&["block"], 2, "client.usage").await;
    bob.fails(&["block", "--key", "9f31"], 2, "client.usage").await;

    assert_eq!(bob.ok(&["unblock", "mallory"]).await, "mallory is not blocked any more.\n");
    bob.fails(&["unblock", "mallory"], 1, "client.not_blocked").await;

    // A key that is known can be blocked without the server.
    world.stop().await;
    let key = key.as_str().unwrap();
    assert_eq!(bob.json(&["block", "--key", key]).await[0]["at_server"], json!(false));
    bob.fails(&["block", "mallory"], 4, "client.unreachable").await;
    assert_eq!(bob.json(&["unblock", "--key", key]).await[0]["at_server"], json!(false));
    assert_eq!(bob.json(&["block", "--key", key]).await[0]["at_server"], json!(false));

    // The next read of the inbox informs the server of the last change.
    world.start_again().await;
    mallory.ok(&["send", "bob", "before the server knows"]).await;
    assert!(bob.json(&["recv"]).await.is_empty());
    mallory.fails(&["send", "bob", "buy this"], 1, "client.not_delivered").await;
    assert_eq!(bob.json(&["unblock", "mallory"]).await[0]["at_server"], json!(true));
    mallory.ok(&["send", "bob", "sorry"]).await;
}
