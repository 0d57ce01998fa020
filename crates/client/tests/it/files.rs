//! Files: sent encrypted, resumed after an interruption, saved and verified.

use std::{
    fs,
    sync::atomic::{AtomicU64, Ordering},
};

use qpq_client::{
    ConversationId, Error, Event, Existing, Messenger, NewFile, SendOutcome, SharedFile, methods,
    v1,
};
use tokio::sync::Notify;

use crate::harness::{Server, dm, read, username};

fn photo(size: usize) -> NewFile {
    NewFile {
        name: "photo.jpg".into(),
        mime: "image/jpeg".into(),
        picture: Some((640, 480)),
        content: (0..size).map(|n| (n / 7) as u8).collect(),
    }
}

const fn ignored(_: u64, _: u64) {}

/// Returns the newest file of a conversation.
async fn newest(messenger: &Messenger, conversation: ConversationId) -> SharedFile {
    let entries = messenger.history(conversation, 1).await.unwrap();
    match &entries[0].event {
        Event::Sent { file, .. } | Event::Received { file, .. } => file.clone().expect("a file"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_file_is_received_as_it_was_sent_and_the_server_sees_ciphertext() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    let with_bob = dm(&alice, "bob").await;
    for size in [2_500_000, 65_536, 1, 0] {
        let file = photo(size);
        let sent = alice.send_file(with_bob, file.clone(), ignored).await.unwrap();
        assert!(matches!(sent.outcome, SendOutcome::Sent), "{sent:?}");
        assert_eq!(read(&bob).await, ["alice: "]);
        let shared = newest(&bob, dm(&bob, "alice").await).await;
        assert_eq!(shared, newest(&alice, with_bob).await);
        assert_eq!((shared.name.as_str(), shared.size), ("photo.jpg", size as u64));
        assert_eq!((shared.mime.as_str(), shared.picture), ("image/jpeg", Some((640, 480))));
        let to = server.profile(&format!("saved-{size}"));
        bob.save_file(&shared, &to, Existing::Keep, ignored).await.unwrap();
        assert_eq!(fs::read(&to).unwrap(), file.content);

        let request =
            v1::DownloadBlobRequest { blob_id: shared.blob.to_vec().into(), ..Default::default() };
        let stored = alice.client().call::<methods::DownloadBlob>(request).await.unwrap();
        assert_eq!(stored.mime_type, "");
        if size > 100 {
            let begin = &file.content[..100];
            assert!(!stored.chunk.windows(100).any(|window| window == begin));
        }
    }
}

#[tokio::test]
async fn an_interrupted_upload_continues_also_after_a_restart_of_the_client() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    server.user("bob").await;
    let with_bob = dm(&alice, "bob").await;
    let file = photo(4_000_000);
    let (reached, interrupted) = (AtomicU64::new(0), Notify::new());
    let progress = |done: u64, _| {
        reached.fetch_max(done, Ordering::Relaxed);
        if done >= 2 << 20 {
            interrupted.notify_one();
        }
    };
    tokio::select! {
        sent = alice.send_file(with_bob, file.clone(), progress) => panic!("{sent:?}"),
        () = interrupted.notified() => {}
    }
    let reached = reached.into_inner();
    assert!((2 << 20..4_000_000).contains(&reached), "{reached}");
    let (dir, key) = (server.profile("alice"), alice.vault_key().await);
    drop(alice);

    let alice = crate::harness::reopen(&dir, &key).await;
    let first = AtomicU64::new(u64::MAX);
    let progress = |done: u64, _| {
        first.fetch_min(done, Ordering::Relaxed);
    };
    alice.send_file(with_bob, file, progress).await.unwrap();
    assert!(first.into_inner() >= reached, "it begins again at {reached}");
    let one = newest(&alice, with_bob).await;
    // Another message with the same content has another key.
    alice.send_file(with_bob, photo(4_000_000), ignored).await.unwrap();
    let two = newest(&alice, with_bob).await;
    assert!(one.key != two.key && one.blob != two.blob);
}

#[tokio::test]
async fn a_file_that_is_not_the_sent_one_is_not_saved() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    let with_bob = dm(&alice, "bob").await;
    alice.send_file(with_bob, photo(100_000), ignored).await.unwrap();
    let one = newest(&alice, with_bob).await;
    alice.send_file(with_bob, photo(100_001), ignored).await.unwrap();
    let two = newest(&alice, with_bob).await;
    let to = server.profile("saved");
    for forged in [
        SharedFile { key: two.key, ..one.clone() },
        SharedFile { blob: two.blob, ..one.clone() },
        SharedFile { size: one.size - 1, ..one.clone() },
        SharedFile { size: u64::MAX, ..one.clone() },
    ] {
        let refused = bob.save_file(&forged, &to, Existing::Keep, ignored).await;
        assert!(matches!(refused, Err(Error::FileForged)), "{refused:?}");
    }
    let unknown = SharedFile { blob: [9; 32], ..one.clone() };
    let refused = bob.save_file(&unknown, &to, Existing::Keep, ignored).await;
    assert!(matches!(refused, Err(Error::FileExpired)), "{refused:?}");
    assert!(!to.exists());
}

#[tokio::test]
async fn an_existing_file_is_replaced_only_on_request() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    server.user("bob").await;
    let with_bob = dm(&alice, "bob").await;
    alice.send_file(with_bob, photo(10), ignored).await.unwrap();
    let file = newest(&alice, with_bob).await;
    let to = server.profile("saved");
    fs::write(&to, "other").unwrap();
    let refused = alice.save_file(&file, &to, Existing::Keep, ignored).await;
    assert!(matches!(refused, Err(Error::FileExists(_))), "{refused:?}");
    assert_eq!(fs::read(&to).unwrap(), b"other");
    alice.save_file(&file, &to, Existing::Replace, ignored).await.unwrap();
    assert_eq!(fs::read(&to).unwrap(), photo(10).content);
}

#[tokio::test]
async fn a_file_that_is_too_large_is_refused_before_it_is_uploaded() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    server.user("bob").await;
    let with_bob = alice.conversation_with(&username("bob")).await.unwrap();
    let refused = alice.send_file(with_bob, photo(50 << 20), ignored).await;
    let Err(Error::FileTooLarge { max, .. }) = refused else { panic!("{refused:?}") };
    assert_eq!(max / 1_000_000, 52);
    assert!(alice.history(with_bob, 1).await.unwrap().is_empty());
}
