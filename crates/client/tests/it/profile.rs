//! Profiles on disk.

use std::fs;

use qpq_client::{
    AuthError, Error, LogoutScope, Messenger, Options, Password, Profile, ProfileError, Trust,
    VaultKey,
};
use qpq_runtime::config::Named;
use qpq_server::RegistrationMode;

use crate::harness::{PASSWORD, Server, dm, history, line, password, read, reopen, soon, username};

#[tokio::test]
async fn the_first_use_is_pinned_in_the_profile() {
    let server = Server::start().await;
    let dir = server.profile("alice");
    let options = Options::new(server.addr.to_string(), Trust::FirstUse);
    let alice =
        Messenger::register(&dir, options, &username("alice"), &password(), None).await.unwrap();
    let profile = Profile::read(&dir).unwrap();
    assert_eq!(&profile, alice.profile());
    assert_eq!(profile.trust, Trust::Pinned(server.fingerprint));
    assert_eq!(profile.username, username("alice"));
}

#[tokio::test]
async fn a_profile_opens_with_its_password_or_its_key_and_with_nothing_else() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let (dir, key) = (server.profile("alice"), alice.vault_key().await);
    drop(alice);
    let refused = Messenger::unlock(&dir, &Password::from("wrong")).await.unwrap_err();
    assert!(matches!(refused, Error::Auth(AuthError::WrongPassword)), "{refused:?}");
    let mut wrong = *key.to_bytes();
    wrong[0] ^= 1;
    let refused = Messenger::unlock_with_key(&dir, VaultKey::from_bytes(&wrong)).await.unwrap_err();
    assert!(matches!(refused, Error::Profile(ProfileError::WrongKey)), "{refused:?}");
    drop(reopen(&dir, &key).await);
    Messenger::unlock(&dir, &password()).await.unwrap().receive().await.unwrap();
}

#[tokio::test]
async fn unlocking_ends_the_previous_session_and_logout_ends_the_current_one() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let before = alice.client().session().unwrap();
    let key = alice.vault_key().await;
    drop(alice);
    let dir = server.profile("alice");
    let alice = Messenger::unlock(&dir, &password()).await.unwrap();
    let client = server.client();
    client.set_session(Some(before));
    let count =
        async || client.call::<qpq_client::methods::CountKeyPackages>(Default::default()).await;
    assert!(count().await.unwrap_err().is_unauthorized());
    client.set_session(alice.client().session());
    count().await.unwrap();
    assert_eq!(alice.logout(LogoutScope::ThisSession).await.unwrap(), 1);
    assert!(count().await.unwrap_err().is_unauthorized());
    let refused = reopen(&dir, &key).await.receive().await.unwrap_err();
    assert!(refused.is_unauthorized(), "{refused:?}");
}

#[tokio::test]
async fn a_profile_is_used_by_several_processes() {
    let server = Server::start().await;
    let [alice, bob] = server.users(["alice", "bob"]).await;
    let (dir, key) = (server.profile("alice"), alice.vault_key().await);
    let with_bob = dm(&alice, "bob").await;
    alice.send(with_bob, "first").await.unwrap();
    let mut others = Vec::new();
    for _ in 0..5 {
        others.push(reopen(&dir, &key).await);
    }
    let mut sending = tokio::task::JoinSet::new();
    for number in 0..20 {
        let other = others[number % others.len()].clone();
        sending.spawn(async move { other.send(with_bob, &number.to_string()).await.unwrap() });
    }
    soon(sending.join_all()).await;
    let mut read_by_bob = read(&bob).await;
    assert_eq!(read_by_bob.remove(0), "alice: first");
    let expected = history(&alice, with_bob).await.split_off(1);
    assert_eq!(expected.len(), 20);
    let expected: Vec<_> = expected.iter().map(|line| line.replace("me:", "alice:")).collect();
    assert_eq!(read_by_bob, expected, "each once, in the order in which they were saved");

    // One handle listens, another processes the new messages: the listener shows them too.
    let mut listener = alice.listen();
    bob.send(dm(&bob, "alice").await, "to all concerned").await.unwrap();
    others[0].catch_up().await.unwrap();
    assert_eq!(line(&soon(listener.next()).await.unwrap().unwrap()), "bob: to all concerned");
}

#[tokio::test]
async fn registering_over_a_profile_and_unlocking_a_missing_one_are_refused() {
    let server = Server::start().await;
    drop(server.user("alice").await);
    let dir = server.profile("alice");
    let again =
        Messenger::register(&dir, server.options(), &username("carol"), &password(), None).await;
    assert!(matches!(again, Err(Error::Profile(ProfileError::Exists(_)))), "{again:?}");
    let missing = Messenger::unlock(&server.profile("nobody"), &password()).await;
    assert!(matches!(missing, Err(Error::Profile(ProfileError::Missing(_)))), "{missing:?}");
    assert!(!server.profile("nobody").exists(), "asking leaves nothing behind");

    // After a refusal, another account can be registered in the same directory.
    let dir = server.profile("elsewhere");
    let taken =
        Messenger::register(&dir, server.options(), &username("alice"), &password(), None).await;
    assert!(matches!(taken, Err(Error::Auth(AuthError::UsernameTaken))), "{taken:?}");
    Messenger::register(&dir, server.options(), &username("dave"), &password(), None)
        .await
        .unwrap();
}

#[tokio::test]
async fn an_interrupted_registration_is_kept_when_its_continuation_needs_an_invite() {
    let mut server = Server::start().await;
    server.user("alice").await.client().close().await;
    server.stop().await;
    server.configure(|config| config.auth.registration = Named(RegistrationMode::Invite));
    server.start_again().await;
    // As after an end between the registration and the login.
    let dir = server.profile("alice");
    let path = dir.join("profile.json");
    let profile = fs::read_to_string(&path).unwrap();
    let unfinished = profile.replace("\"registered\"", "\"registering\"");
    assert_ne!(profile, unfinished);
    fs::write(&path, unfinished).unwrap();

    let register = |password: &'static str| {
        let (dir, options) = (dir.clone(), server.options());
        async move {
            let (name, password) = (username("alice"), Password::from(password));
            Messenger::register(&dir, options, &name, &password, None).await
        }
    };
    // With another password the account cannot be distinguished from a missing one.
    let refused = register("wrong").await;
    assert!(matches!(refused, Err(Error::Auth(AuthError::InviteRequired))), "{refused:?}");
    register(PASSWORD).await.expect("the account and its profile are still there");
}

#[tokio::test]
async fn files_on_disk_reveal_no_secret_and_no_text() {
    let server = Server::start().await;
    let [alice, _bob] = server.users(["alice", "bob"]).await;
    alice.send(dm(&alice, "bob").await, "a very secret sentence").await.unwrap();
    let token = alice.client().session().unwrap();
    let mut files = 0;
    for file in fs::read_dir(server.profile("alice")).unwrap() {
        let bytes = fs::read(file.unwrap().path()).unwrap();
        let holds = |needle: &[u8]| bytes.windows(needle.len()).any(|window| window == needle);
        assert!(!holds(b"a very secret sentence") && !holds(b"bob") && !holds(token.expose()));
        files += 1;
    }
    assert!(files > 4, "the profile, the database and its logs, the locks");
}
