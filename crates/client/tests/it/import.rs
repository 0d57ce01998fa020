//! Profiles that an earlier release wrote. Their state is imported at the first unlock, also after
//! interruptions.

use std::{fs, path::Path};

use qpq_client::{ConversationKind, Error, Messenger, ProfileError, VaultKey};
use tempfile::TempDir;

use crate::harness::{history, line};

/// Returns a copy of a profile of that release, and its key.
pub(crate) fn fixture(name: &str) -> (TempDir, VaultKey) {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
    let to = tempfile::tempdir().unwrap();
    for file in ["profile.json", "state.vault"] {
        fs::copy(from.join(file), to.path().join(file)).unwrap();
    }
    let key = hex::decode(fs::read_to_string(from.join("key.hex")).unwrap().trim()).unwrap();
    (to, VaultKey::from_bytes(&key.try_into().unwrap()))
}

async fn assert_is_bobs(bob: &Messenger) {
    let conversations = bob.conversations().await.unwrap();
    let is_direct = |kind: &ConversationKind| matches!(kind, ConversationKind::Direct { .. });
    let direct = conversations.iter().find(|one| is_direct(&one.kind)).unwrap();
    let group = conversations.iter().find(|one| !is_direct(&one.kind)).unwrap();
    assert_eq!(
        history(bob, direct.id).await,
        ["alice: hello bob", "me: hello alice", "me: not shown yet"]
    );
    assert_eq!(history(bob, group.id).await, ["joined by alice", "alice: hello friends"]);
    assert!(bob.unseen().await.unwrap().is_empty());
    assert!(bob.client().session().is_some());
}

#[tokio::test]
async fn an_earlier_releases_profile_is_imported_and_its_file_removed() {
    let (dir, key) = fixture("bob");
    assert_is_bobs(&Messenger::unlock_with_key(dir.path(), key.clone()).await.unwrap()).await;
    assert!(!dir.path().join("state.vault").exists());
    assert_is_bobs(&Messenger::unlock_with_key(dir.path(), key).await.unwrap()).await;

    let (dir, key) = fixture("alice");
    let alice = Messenger::unlock_with_key(dir.path(), key).await.unwrap();
    let unseen: Vec<_> = alice.unseen().await.unwrap().iter().map(line).collect();
    assert_eq!(unseen, ["bob: hello alice", "bob: not shown yet"]);
    let with_bob = alice.unseen().await.unwrap()[0].conversation.unwrap();
    assert_eq!(history(&alice, with_bob).await[3], "me: still to be sent (Queued)");
}

#[tokio::test]
async fn an_import_that_was_interrupted_begins_again_or_is_complete() {
    // Interrupted while the new file was written, which is not a database yet.
    let (dir, key) = fixture("bob");
    fs::write(dir.path().join("state.db.new"), b"half of it").unwrap();
    fs::write(dir.path().join("state.db.new-journal"), b"half of it").unwrap();
    assert_is_bobs(&Messenger::unlock_with_key(dir.path(), key).await.unwrap()).await;
    assert!(!dir.path().join("state.db.new").exists());

    // Interrupted before the old file was removed: the database counts, with the changes since
    // then.
    let (dir, key) = fixture("bob");
    let vault = fs::read(dir.path().join("state.vault")).unwrap();
    let bob = Messenger::unlock_with_key(dir.path(), key.clone()).await.unwrap();
    let with_alice = bob.conversations().await.unwrap();
    let with_alice = with_alice
        .iter()
        .find(|one| matches!(one.kind, ConversationKind::Direct { .. }))
        .unwrap()
        .id;
    bob.queue(with_alice, "since then").await.unwrap();
    drop(bob);
    fs::write(dir.path().join("state.vault"), vault).unwrap();
    let bob = Messenger::unlock_with_key(dir.path(), key).await.unwrap();
    assert_eq!(history(&bob, with_alice).await[3], "me: since then (Queued)");
    assert!(!dir.path().join("state.vault").exists());
}

#[tokio::test]
async fn a_vault_that_cannot_be_read_stays_as_it_is() {
    let (dir, key) = fixture("bob");
    let path = dir.path().join("state.vault");
    let mut wrong = *key.to_bytes();
    wrong[0] ^= 1;
    let refused =
        Messenger::unlock_with_key(dir.path(), VaultKey::from_bytes(&wrong)).await.unwrap_err();
    assert!(matches!(refused, Error::Profile(ProfileError::WrongKey)), "{refused:?}");
    let vault = fs::read(&path).unwrap();
    fs::write(&path, b"rubbish").unwrap();
    let refused = Messenger::unlock_with_key(dir.path(), key.clone()).await.unwrap_err();
    assert!(matches!(refused, Error::Profile(ProfileError::Damaged { .. })), "{refused:?}");
    assert!(!dir.path().join("state.db").exists());
    fs::write(&path, vault).unwrap();
    assert_is_bobs(&Messenger::unlock_with_key(dir.path(), key).await.unwrap()).await;
}
