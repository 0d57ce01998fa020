//! Recovery bundles: stored by one device, kept up to date, opened by the password or the code.

use std::{path::Path, time::Duration};

use qpq_client::{
    AuthError, Error, Messenger, Password, PasswordChanged, RecoveryCheck, RecoveryCode,
};

use crate::harness::{
    PASSWORD, Server, accept_and_read, crash_after, dm, password, read, soon, username,
};

const NEW: &str = "new password";

async fn restore(
    server: &Server,
    dir: &str,
    password: &str,
    code: Option<&RecoveryCode>,
) -> Result<Messenger, Error> {
    let (dir, password) = (server.profile(dir), Password::from(password));
    let name = username("alice");
    Messenger::restore_account(&dir, server.options(), &name, &password, "new", code).await
}

/// Returns a device of the account that is linked to the first one.
async fn link(server: &Server, alice: &Messenger) -> Messenger {
    let (dir, name) = (server.profile("linked"), username("alice"));
    let linking =
        Messenger::link(&dir, server.options(), &name, &password(), "linked").await.unwrap();
    alice.receive().await.unwrap();
    let requests = alice.link_requests().await.unwrap();
    alice.approve_link(&requests[0], &password()).await.unwrap();
    linking.finish(Duration::from_secs(30)).await.unwrap()
}

#[tokio::test]
async fn a_restored_device_has_people_blocks_and_conversations_and_keeps_the_bundle() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    let carol = server.user("carol").await;
    alice.send(dm(&alice, "bob").await, "hi").await.unwrap();
    accept_and_read(&bob).await;
    let group = alice.create_group("friends").await.unwrap();
    alice.add(group, &username("bob")).await.unwrap();
    accept_and_read(&bob).await;
    alice.block(carol.profile().identity).await.unwrap();
    let refused = restore(&server, "early", PASSWORD, None).await;
    assert!(matches!(refused, Err(Error::NoRecovery)), "{refused:?}");
    let code = alice.create_recovery(&password()).await.unwrap();
    drop(alice);
    let restored = restore(&server, "new", PASSWORD, None).await.unwrap();
    read(&bob).await;
    let conversations = restored.conversations().await.unwrap();
    assert_eq!(conversations.len(), 2, "{conversations:?}");
    for conversation in conversations {
        restored.send(conversation.id, "back").await.unwrap();
    }
    let received = read(&bob).await;
    assert_eq!(received.iter().filter(|line| *line == "alice: back").count(), 2, "{received:?}");
    let blocked = restored.blocked().await.unwrap();
    assert_eq!(blocked.len(), 1);
    assert_eq!(blocked[0].identity, carol.profile().identity);
    // The restored device has stored the bundle again, which still opens with the code.
    let checked = restored.verify_recovery(&password(), &code).await.unwrap();
    assert_eq!(checked, RecoveryCheck::Opens);
    let status = restored.recovery_status().await.unwrap().unwrap();
    assert!(status.version >= 1);
}

#[tokio::test]
async fn a_bundle_under_an_earlier_password_opens_with_the_code_alone() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let linked = link(&server, &alice).await;
    let code = alice.create_recovery(&password()).await.unwrap();
    drop((alice, linked));
    let (old, new) = (password(), Password::from(NEW));
    // The linked device does not keep the bundle.
    let PasswordChanged { messenger: linked, .. } =
        Messenger::change_password(&server.profile("linked"), &old, &new).await.unwrap();
    let checked = linked.verify_recovery(&new, &code).await.unwrap();
    assert_eq!(checked, RecoveryCheck::OldPassword);
    let refused = restore(&server, "new", NEW, None).await;
    assert!(matches!(refused, Err(Error::RecoverySealed)), "{refused:?}");
    let refused = restore(&server, "new", "wrong", Some(&code)).await;
    assert!(matches!(refused, Err(Error::Auth(AuthError::WrongPassword))), "{refused:?}");
    let other = linked.create_recovery(&new).await.unwrap();
    let refused = restore(&server, "new", NEW, Some(&code)).await;
    assert!(refused.is_ok(), "the present password opens the bundle");
    drop(refused);
    let checked = linked.verify_recovery(&new, &other).await.unwrap();
    assert_eq!(checked, RecoveryCheck::Opens);
}

#[tokio::test]
async fn the_code_restores_the_account_with_the_present_password() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let linked = link(&server, &alice).await;
    let code = alice.create_recovery(&password()).await.unwrap();
    let identity = alice.profile().identity;
    drop((alice, linked));
    let new = Password::from(NEW);
    drop(Messenger::change_password(&server.profile("linked"), &password(), &new).await.unwrap());
    let restored = restore(&server, "new", NEW, Some(&code)).await.unwrap();
    assert_eq!(restored.profile().identity, identity);
    // The bundle is sealed for the present password now.
    let checked = restored.verify_recovery(&new, &code).await.unwrap();
    assert_eq!(checked, RecoveryCheck::Opens);
    drop(restored);
    restore(&server, "newer", NEW, None).await.unwrap();
}

#[tokio::test]
async fn of_two_devices_the_last_one_to_create_a_code_keeps_the_bundle() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let linked = link(&server, &alice).await;
    alice.create_recovery(&password()).await.unwrap();
    let code = linked.create_recovery(&password()).await.unwrap();
    // A change of the password makes a bundle due.
    let dir = server.profile("alice");
    drop(alice);
    let new = Password::from(NEW);
    let PasswordChanged { messenger: alice, .. } =
        Messenger::change_password(&dir, &password(), &new).await.unwrap();
    assert_eq!(alice.recovery_status().await.unwrap(), None, "the other device keeps it");
    assert!(linked.recovery_status().await.unwrap().is_some());
    let checked = alice.verify_recovery(&new, &code).await.unwrap();
    assert_eq!(checked, RecoveryCheck::OldPassword, "the other device has not logged in yet");
    let (dir, kept) = (server.profile("linked"), linked.vault_key().await);
    drop(linked);
    let linked = Messenger::unlock_or_reseal(&dir, &new, Some(kept)).await.unwrap();
    linked.receive().await.unwrap();
    let checked = alice.verify_recovery(&new, &code).await.unwrap();
    assert_eq!(checked, RecoveryCheck::Opens);
}

/// Waits until a crashed process has ended.
async fn end_of_crash(dir: &Path) {
    let lock = std::fs::File::open(dir.join("lock")).unwrap();
    tokio::task::spawn_blocking(move || lock.lock()).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_crash_during_a_change_of_the_password_does_not_end_the_keeping_of_the_bundle() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let code = alice.create_recovery(&password()).await.unwrap();
    let (dir, mut current) = (server.profile("alice"), PASSWORD.to_owned());
    drop(alice);
    for polls in (1..1_000).step_by(5) {
        let next = format!("password {polls}");
        let (old, new) = (Password::from(current.as_str()), Password::from(next.as_str()));
        let change = Messenger::change_password(&dir, &old, &new);
        let is_over = soon(crash_after(polls, change)).await.is_some();
        end_of_crash(&dir).await;
        let (opened, password) = match Messenger::unlock(&dir, &new).await {
            Ok(opened) => {
                current = next;
                (opened, new)
            }
            Err(_) => (Messenger::unlock(&dir, &old).await.unwrap(), old),
        };
        opened.receive().await.unwrap();
        let status = opened.recovery_status().await.unwrap();
        assert!(status.is_some_and(|status| !status.is_outdated), "{polls} polls: {status:?}");
        if is_over {
            let checked = opened.verify_recovery(&password, &code).await.unwrap();
            assert_eq!(checked, RecoveryCheck::Opens);
            return;
        }
    }
    panic!("the change never ended");
}
