//! Changing the password: the profile opens with the password that the server has, whatever fails.

use std::path::Path;

use qpq_client::{AuthError, Error, Messenger, Password, PasswordChanged, ProfileError};

use crate::harness::{
    PASSWORD, Server, accept_and_read, crash_after, dm, history, password, read, soon,
};

/// More polls than a change takes.
const MANY: usize = 1_000;

async fn unlock(dir: &Path, password: &str) -> Result<Messenger, Error> {
    Messenger::unlock(dir, &Password::from(password)).await
}

async fn change(dir: &Path, old: &str, new: &str) -> Result<PasswordChanged, Error> {
    Messenger::change_password(dir, &Password::from(old), &Password::from(new)).await
}

fn is_wrong_password<T>(result: &Result<T, Error>) -> bool {
    matches!(result, Err(Error::Auth(AuthError::WrongPassword)))
}

#[tokio::test]
async fn after_a_change_only_the_new_password_opens_the_profile_and_nothing_is_lost() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    let with_bob = dm(&alice, "bob").await;
    alice.send(with_bob, "before").await.unwrap();
    let (dir, old_key) = (server.profile("alice"), alice.vault_key().await);
    drop(alice);
    let PasswordChanged { messenger: alice, ended_sessions } =
        change(&dir, PASSWORD, "new password").await.unwrap();
    assert_eq!(ended_sessions, Some(1), "the session of the registration");
    alice.send(with_bob, "after").await.unwrap();
    assert_eq!(accept_and_read(&bob).await.last().unwrap(), "alice: after");
    drop(alice);
    assert!(is_wrong_password(&unlock(&dir, PASSWORD).await));
    let opened = Messenger::unlock_with_key(&dir, old_key).await;
    assert!(matches!(opened, Err(Error::Profile(ProfileError::WrongKey))), "{opened:?}");
    let alice = unlock(&dir, "new password").await.unwrap();
    assert_eq!(history(&alice, with_bob).await, ["me: before", "me: after"]);
    bob.send(dm(&bob, "alice").await, "hello").await.unwrap();
    assert_eq!(read(&alice).await, ["bob: hello"]);
}

#[tokio::test]
async fn a_wrong_password_and_a_forbidden_new_one_change_nothing() {
    let server = Server::start().await;
    drop(server.user("alice").await);
    let dir = server.profile("alice");
    assert!(is_wrong_password(&change(&dir, "wrong", "new password").await));
    let refused = change(&dir, PASSWORD, "tab\tin it").await;
    assert!(matches!(refused, Err(Error::Auth(AuthError::PasswordRefused))), "{refused:?}");
    let alice = unlock(&dir, PASSWORD).await.unwrap();
    // While the profile is in use, its password cannot be changed.
    let refused = change(&dir, PASSWORD, "new password").await;
    assert!(matches!(refused, Err(Error::Profile(ProfileError::InUse(_)))), "{refused:?}");
    drop(alice);
    unlock(&dir, PASSWORD).await.unwrap();
}

/// Waits until a crashed process has ended.
async fn end_of_crash(dir: &Path) {
    let lock = std::fs::File::open(dir.join("lock")).unwrap();
    tokio::task::spawn_blocking(move || lock.lock()).await.unwrap().unwrap();
}

#[tokio::test]
async fn after_a_crash_at_any_point_the_profile_opens_with_the_servers_password() {
    let server = Server::start().await;
    let (alice, _bob) = (server.user("alice").await, server.user("bob").await);
    let with_bob = dm(&alice, "bob").await;
    alice.send(with_bob, "first").await.unwrap();
    drop(alice);
    let dir = server.profile("alice");
    let (mut current, mut kept, mut changed) = (PASSWORD.to_owned(), 0, 0);
    for polls in (1..MANY).step_by(3) {
        let next = format!("password {polls}");
        let survived = soon(crash_after(polls, change(&dir, &current, &next))).await;
        let is_over = survived.is_some();
        if let Some(survived) = survived {
            survived.unwrap();
        }
        end_of_crash(&dir).await;
        let opened = match unlock(&dir, &next).await {
            Ok(opened) => {
                changed += 1;
                current = next;
                opened
            }
            refused => {
                assert!(is_wrong_password(&refused), "after {polls} polls: {refused:?}");
                kept += 1;
                unlock(&dir, &current).await.unwrap()
            }
        };
        assert_eq!(history(&opened, with_bob).await, ["me: first"], "after {polls} polls");
        drop(opened);
        if is_over {
            assert!(kept > 0 && changed > 0, "crashes before and after the change");
            return;
        }
    }
    panic!("the change never ended");
}

#[tokio::test]
async fn an_unreachable_server_changes_nothing() {
    let mut server = Server::start().await;
    drop(server.user("alice").await);
    let dir = server.profile("alice");
    server.stop().await;
    let refused = soon(change(&dir, PASSWORD, "new password")).await;
    assert!(refused.is_err());
    server.start_again().await;
    unlock(&dir, PASSWORD).await.unwrap();
}

#[tokio::test]
async fn another_device_logs_in_with_the_new_password_while_it_keeps_its_key() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let with_alice = alice.profile().username.clone();
    let laptop = server.profile("alice-laptop");
    let linking = Messenger::link(&laptop, server.options(), &with_alice, &password(), "laptop")
        .await
        .unwrap();
    alice.receive().await.unwrap();
    let requests = alice.link_requests().await.unwrap();
    alice.approve_link(&requests[0], &password()).await.unwrap();
    let linked = linking.finish(std::time::Duration::from_secs(30)).await.unwrap();
    let kept = linked.vault_key().await;
    drop((alice, linked));
    let PasswordChanged { messenger: alice, .. } =
        change(&server.profile("alice"), PASSWORD, "new password").await.unwrap();
    let refused = unlock(&laptop, "new password").await;
    assert!(matches!(refused, Err(Error::Profile(ProfileError::WrongKey))), "{refused:?}");
    let new = Password::from("new password");
    drop(Messenger::unlock_or_reseal(&laptop, &new, Some(kept)).await.unwrap());
    let linked = unlock(&laptop, "new password").await.unwrap();
    assert_eq!(linked.profile().identity, alice.profile().identity);
}
