//! A large outbox: a client that sends still reads, and nothing of the backlog is lost, doubled or
//! out of order.

use qpq_client::{ConversationId, DeliveryState, Error, Event, MAX_TEXT, Messenger};
use qpq_runtime::config::{Flag, Sources, load};
use qpq_server::Config;

use crate::harness::{Server, dm, history, line, read, soon};

/// The number of messages that each client has still to send.
const BACKLOG: usize = 120;

fn texts(from: &str) -> impl Iterator<Item = String> {
    (0..BACKLOG).map(move |n| format!("{from} {n}"))
}

/// Returns the number of messages of ours that are not sent yet.
async fn unsent(messenger: &Messenger, conversation: ConversationId) -> usize {
    let entries = messenger.history(conversation, usize::MAX).await.unwrap();
    let is_queued =
        |event: &Event| matches!(event, Event::Sent { delivery: DeliveryState::Queued, .. });
    entries.iter().filter(|entry| is_queued(&entry.event)).count()
}

/// Listens until all messages of the other client have arrived, then sends the rest of ours.
/// Returns the received texts, each with the number of our messages that were unsent at that time.
async fn chat(messenger: &Messenger, conversation: ConversationId) -> Vec<(String, usize)> {
    let mut listener = messenger.listen();
    let mut received = Vec::new();
    while received.len() < BACKLOG {
        let entries = listener.next_all().await.unwrap().unwrap();
        let left = unsent(messenger, conversation).await;
        let shown: Vec<_> = entries.iter().map(|entry| entry.id).collect();
        messenger.mark_seen(&shown).await.unwrap();
        received.extend(entries.into_iter().filter_map(|entry| match entry.event {
            Event::Received { text, .. } => Some((text, left)),
            _ => None,
        }));
    }
    messenger.flush().await.unwrap();
    received
}

#[tokio::test]
async fn two_clients_with_large_outboxes_read_each_other_while_sending() {
    let server = Server::start().await;
    let [alice, bob] = server.users(["alice", "bob"]).await;
    let (with_bob, with_alice) = (dm(&alice, "bob").await, dm(&bob, "alice").await);
    for (messenger, conversation, name) in [(&alice, with_bob, "alice"), (&bob, with_alice, "bob")]
    {
        let entries = messenger.queue_all(conversation, texts(name).collect()).await.unwrap();
        assert_eq!(entries.len(), BACKLOG);
    }
    // A program that sends in addition to the listener.
    let (flushed_a, flushed_b) = (Box::pin(alice.flush()), Box::pin(bob.flush()));
    let (chat_a, chat_b) = (Box::pin(chat(&alice, with_bob)), Box::pin(chat(&bob, with_alice)));
    let (sent_a, sent_b, alice_received, bob_received) =
        soon(async { tokio::join!(flushed_a, flushed_b, chat_a, chat_b) }).await;
    sent_a.and(sent_b).expect("all are sent");
    for (received, from) in [(alice_received, "bob"), (bob_received, "alice")] {
        assert!(received.iter().map(|(text, _)| text.clone()).eq(texts(from)), "{received:?}");
        assert!(
            received[0].1 > BACKLOG / 2,
            "the first of {from} came when {} were left",
            received[0].1
        );
    }
    for (messenger, conversation, name) in [(&alice, with_bob, "alice"), (&bob, with_alice, "bob")]
    {
        let lines = history(messenger, conversation).await;
        let own = lines.into_iter().filter_map(|line| Some(line.strip_prefix("me: ")?.to_owned()));
        assert!(own.eq(texts(name)), "all are sent, in order");
    }
}

#[tokio::test]
async fn a_client_that_may_send_little_at_a_time_still_reads() {
    let limit = Flag { name: "--limit", path: "limits.send.account", value: "20 + 4/m".into() };
    let limited =
        load::<Config>(Sources { flags: vec![limit], ..Sources::default() }).unwrap().settings;
    let server = Server::start_with(|config| config.limits = limited.limits).await;
    let [alice, bob] = server.users(["alice", "bob"]).await;
    let (with_bob, with_alice) = (dm(&alice, "bob").await, dm(&bob, "alice").await);
    alice.queue_all(with_bob, texts("alice").take(60).collect()).await.unwrap();
    let mut listener = alice.listen();
    soon(async {
        while unsent(&alice, with_bob).await == 60 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    // Alice's sending waits for minutes now.
    bob.receive().await.unwrap();
    bob.send(with_alice, "hello").await.unwrap();
    let received = soon(listener.next()).await.unwrap().unwrap();
    assert_eq!(line(&received), "bob: hello");
    assert!(unsent(&alice, with_bob).await >= 30);
}

#[tokio::test]
async fn a_backlog_is_sent_up_to_the_given_message() {
    let server = Server::start().await;
    let [alice, bob] = server.users(["alice", "bob"]).await;
    let with_bob = dm(&alice, "bob").await;
    let entries = alice.queue_all(with_bob, texts("alice").take(40).collect()).await.unwrap();
    alice.flush_until(entries[19]).await.unwrap();
    assert_eq!(read(&bob).await.len(), 20);
    assert_eq!(unsent(&alice, with_bob).await, 20);
    alice.flush_until(entries[0]).await.unwrap();
    assert_eq!(
        unsent(&alice, with_bob).await,
        20,
        "what is sent already is not a reason to send more"
    );
    alice.flush().await.unwrap();
    assert_eq!(read(&bob).await.len(), 20);
}

#[tokio::test]
async fn many_texts_are_saved_all_or_none() {
    let server = Server::start().await;
    let [alice, _bob] = server.users(["alice", "bob"]).await;
    let with_bob = dm(&alice, "bob").await;
    let texts = vec!["short".to_owned(), "x".repeat(MAX_TEXT + 1)];
    let refused = alice.queue_all(with_bob, texts).await.unwrap_err();
    assert!(matches!(refused, Error::TextTooLong { .. }), "{refused:?}");
    assert!(history(&alice, with_bob).await.is_empty());
    assert!(alice.queue_all(with_bob, Vec::new()).await.unwrap().is_empty());
}
