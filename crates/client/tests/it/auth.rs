//! Registration, login, sessions.

use qpq_client::{AuthError, CallError, Identity, LogoutScope, Password, Status, methods, v1};

use crate::harness::{Server, password, username};

#[tokio::test]
async fn who_registers_can_log_in_and_gets_the_same_export_key() {
    let server = Server::start().await;
    let client = server.client();
    let identity = Identity::generate();
    let registered =
        client.register(&username("alice"), &password(), &identity, None).await.unwrap();
    let session = server.client().login(&username("Alice"), &password()).await.unwrap();
    assert_eq!(registered.export_key.expose(), session.export_key.expose());
    assert!(session.expires_at.is_some());
}

#[tokio::test]
async fn a_wrong_password_and_an_unknown_user_are_told_alike() {
    let server = Server::start().await;
    let client = server.client();
    client.register(&username("alice"), &password(), &Identity::generate(), None).await.unwrap();
    for (name, password) in [("alice", Password::from("wrong")), ("nobody", password())] {
        let refused = client.login(&username(name), &password).await.unwrap_err();
        assert!(matches!(refused, AuthError::WrongPassword), "{refused:?}");
        assert_eq!(refused.to_string(), "wrong username or password");
    }
    assert!(client.session().is_none());
}

#[tokio::test]
async fn a_name_and_a_key_are_registered_once() {
    let server = Server::start().await;
    let client = server.client();
    let (alice, identity) = (username("alice"), Identity::generate());
    client.register(&alice, &password(), &identity, None).await.unwrap();
    let taken =
        client.register(&alice, &password(), &Identity::generate(), None).await.unwrap_err();
    assert!(matches!(taken, AuthError::UsernameTaken), "{taken:?}");
    let taken = client.register(&username("bob"), &password(), &identity, None).await.unwrap_err();
    assert!(matches!(taken, AuthError::IdentityTaken), "{taken:?}");
    // The first one's password still opens the account.
    client.login(&alice, &password()).await.unwrap();
}

#[tokio::test]
async fn finishing_a_registration_may_be_repeated() {
    let server = Server::start().await;
    let (client, identity) = (server.client(), Identity::generate());
    let pending = client.begin_registration(&username("alice"), &password()).await.unwrap();
    client.finish_registration(&pending, &identity, None).await.unwrap();
    client.finish_registration(&pending, &identity, None).await.unwrap();
}

#[tokio::test]
async fn a_session_that_was_ended_elsewhere_is_unauthorized() {
    let server = Server::start().await;
    let (here, there) = (server.client(), server.client());
    here.register(&username("alice"), &password(), &Identity::generate(), None).await.unwrap();
    here.login(&username("alice"), &password()).await.unwrap();
    there.login(&username("alice"), &password()).await.unwrap();
    let count = || here.call::<methods::CountKeyPackages>(v1::CountKeyPackagesRequest::default());
    count().await.unwrap();
    assert_eq!(there.logout(LogoutScope::EverySession).await.unwrap(), 2);
    let refused = count().await.unwrap_err();
    assert!(refused.is_unauthorized(), "{refused:?}");
    assert!(!refused.is_temporary());
}

#[tokio::test]
async fn a_call_without_a_session_is_refused_with_a_code() {
    let server = Server::start().await;
    let refused = server
        .client()
        .call::<methods::CountKeyPackages>(v1::CountKeyPackagesRequest::default())
        .await
        .unwrap_err();
    let CallError::Server(error) = refused else { panic!("{refused:?}") };
    assert_eq!(error.status, Status::Unauthorized);
    assert!(error.code.starts_with("auth."), "{error:?}");
}
