//! Data directories and profiles that are replaced by an older copy. Every message that was
//! reported as sent after that is shown.

use crate::harness::{Person, World};

/// Returns the output of two reads, as one text.
async fn two_reads(person: &Person) -> String {
    let mut shown = person.run(&["recv"]).await.out;
    shown += &person.run(&["recv"]).await.out;
    shown
}

async fn send_all(from: &Person, to: &str, texts: &[String]) {
    for text in texts {
        let ran = from.run(&["send", to, text]).await;
        assert_eq!((ran.code, ran.out.as_str()), (Some(0), "Sent to bob.\n"), "{ran:?}");
    }
}

fn texts(name: &str, count: usize) -> Vec<String> {
    (0..count).map(|number| format!("{name} {number}")).collect()
}

/// Checks that each text is shown once, and in order.
#[track_caller]
fn assert_shown_once(shown: &str, from: &str, texts: &[String]) {
    let expected: Vec<_> = texts.iter().map(|text| format!("{from}: {text}")).collect();
    let lines: Vec<_> =
        shown.lines().filter(|line| line.starts_with(&format!("{from}: "))).collect();
    assert_eq!(lines, expected, "{shown}");
}

#[tokio::test]
async fn messages_accepted_after_a_restore_of_the_server_are_shown() {
    let mut world = World::new().await;
    let (alice, bob) = (world.user("alice").await, world.user("bob").await);
    let (carol, dave) = (world.user("carol").await, world.user("dave").await);
    alice.ok(&["send", "bob", "hello"]).await;
    assert_eq!(bob.ok(&["recv"]).await, "alice: hello\n");
    let night = world.copy_data().await;
    send_all(&alice, "bob", &texts("before", 5)).await;
    bob.ok(&["recv"]).await;
    // This uses up a KeyPackage, which the restored server issues again.
    carol.ok(&["send", "bob", "carol says hello"]).await;
    assert_eq!(bob.ok(&["recv"]).await, "carol: carol says hello\n");
    world.restore_data(&night).await;

    let after = texts("after-the-restore", 8);
    send_all(&alice, "bob", &after).await;
    let shown = two_reads(&bob).await;
    assert_shown_once(&shown, "alice", &after);

    let first = texts("dave-writes", 4);
    send_all(&dave, "bob", &first).await;
    assert_shown_once(&two_reads(&bob).await, "dave", &first);
}

/// The message is the first one after the restore, before the recipient has replaced its
/// KeyPackages.
#[tokio::test]
async fn a_first_message_to_a_used_key_package_is_reported_and_repeated() {
    let mut world = World::new().await;
    let (bob, carol, dave) =
        (world.user("bob").await, world.user("carol").await, world.user("dave").await);
    let night = world.copy_data().await;
    carol.ok(&["send", "bob", "hi"]).await;
    assert_eq!(bob.ok(&["recv"]).await, "carol: hi\n");
    world.restore_data(&night).await;
    let first = texts("dave-writes", 4);
    send_all(&dave, "bob", &first).await;
    let shown = two_reads(&bob).await;
    assert!(shown.contains("dave"), "the sender is named: {shown}");
    // The sender's client repeats the messages that could not be read.
    dave.run(&["recv"]).await;
    assert_shown_once(&two_reads(&bob).await, "dave", &first);
}

#[tokio::test]
async fn messages_of_a_restored_profile_are_shown() {
    let world = World::new().await;
    let (alice, bob) = (world.user("alice").await, world.user("bob").await);
    alice.ok(&["send", "bob", "x"]).await;
    assert_eq!(bob.ok(&["recv"]).await, "alice: x\n");
    let night = alice.copy_profile();
    let day = texts("day", 3);
    send_all(&alice, "bob", &day).await;
    assert_shown_once(&bob.ok(&["recv"]).await, "alice", &day);
    alice.restore_profile(&night);
    let next = texts("next-day", 4);
    send_all(&alice, "bob", &next).await;
    assert_shown_once(&two_reads(&bob).await, "alice", &next);
}
