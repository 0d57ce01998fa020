//! Registration, login, sessions.

use qpq_client::{
    AuthError, CallError, Client, Error, Identity, LogoutScope, Password, Status, methods, v1,
};

use opaque_ke::{
    CipherSuite, ClientRegistration, ClientRegistrationFinishParameters, RegistrationResponse,
    Ristretto255, TripleDh,
};
use qpq_client::{IdentityKey, Messenger, Options, Trust, VaultKey};
use qpq_mls::vault::{self, Salt};
use rand::rngs::OsRng;

use crate::harness::{Server, password, username};

#[tokio::test]
async fn a_registered_account_logs_in_with_the_same_export_key() {
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
async fn a_wrong_password_and_an_unknown_user_yield_the_same_error() {
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
async fn registering_a_used_name_or_key_is_refused() {
    let server = Server::start().await;
    let client = server.client();
    let (alice, identity) = (username("alice"), Identity::generate());
    client.register(&alice, &password(), &identity, None).await.unwrap();
    let taken =
        client.register(&alice, &password(), &Identity::generate(), None).await.unwrap_err();
    assert!(matches!(taken, AuthError::UsernameTaken), "{taken:?}");
    let taken = client.register(&username("bob"), &password(), &identity, None).await.unwrap_err();
    assert!(matches!(taken, AuthError::IdentityTaken), "{taken:?}");
    // The password of the first registration still opens the account.
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

/// `ä` as one character and as two.
const COMPOSED: &str = "k\u{e4}se und brot";
const DECOMPOSED: &str = "ka\u{308}se und brot";

#[tokio::test]
async fn a_password_is_the_same_however_its_characters_are_composed() {
    let server = Server::start().await;
    for (name, registered, typed) in
        [("alice", COMPOSED, DECOMPOSED), ("bob", DECOMPOSED, COMPOSED)]
    {
        let dir = tempfile::tempdir().unwrap();
        let options = Options::new(server.addr.to_string(), Trust::Pinned(server.fingerprint));
        let (password, name) = (Password::from(registered), username(name));
        let registering = Messenger::register(dir.path(), options, &name, &password, None);
        registering.await.unwrap().client().close().await;
        // Both the login and the key of the profile accept each form.
        for password in [typed, registered] {
            Messenger::unlock(dir.path(), &Password::from(password)).await.unwrap();
        }
        let refused = Messenger::unlock(dir.path(), &Password::from("kase und brot")).await;
        assert!(matches!(refused, Err(Error::Auth(AuthError::WrongPassword))));
    }
}

struct Suite;

impl CipherSuite for Suite {
    type OprfCs = Ristretto255;
    type KeyExchange = TripleDh<Ristretto255, sha2::Sha512>;
    type Ksf = argon2::Argon2<'static>;
}

/// Registers with the password as typed, as clients did before they prepared passwords.
async fn register_as_typed(client: &Client, name: &str, password: &str) {
    let started = ClientRegistration::<Suite>::start(&mut OsRng, password.as_bytes()).unwrap();
    let request = v1::OpaqueRegisterStartRequest {
        username: name.into(),
        request: started.message.serialize().to_vec().into(),
    };
    let answer = client.call::<methods::OpaqueRegisterStart>(request).await.unwrap();
    let finished = started
        .state
        .finish(
            &mut OsRng,
            password.as_bytes(),
            RegistrationResponse::deserialize(&answer.response).unwrap(),
            ClientRegistrationFinishParameters::default(),
        )
        .unwrap();
    let upload = finished.message.serialize().to_vec();
    let identity = Identity::generate();
    let message = IdentityKey::registration_message(&username(name), &upload);
    let request = v1::OpaqueRegisterFinishRequest {
        username: name.into(),
        upload: upload.into(),
        identity_key: identity.public().as_bytes().to_vec().into(),
        identity_proof: identity.sign(&message).to_vec().into(),
        ..Default::default()
    };
    client.call::<methods::OpaqueRegisterFinish>(request).await.unwrap();
}

#[tokio::test]
async fn an_account_registered_with_the_password_as_typed_still_logs_in() {
    let server = Server::start().await;
    let client = server.client();
    for (name, typed) in [("alice", DECOMPOSED), ("bob", "with\ttab")] {
        register_as_typed(&client, name, typed).await;
        client.login(&username(name), &Password::from(typed)).await.unwrap();
        let refused = client.login(&username(name), &Password::from(COMPOSED)).await.unwrap_err();
        assert!(matches!(refused, AuthError::WrongPassword), "{refused:?}");
    }
}

/// The profile is of an earlier release: its account and vault both have the password as typed.
#[tokio::test]
async fn a_vault_sealed_with_the_password_as_typed_still_opens() {
    let server = Server::start().await;
    let client = server.client();
    register_as_typed(&client, "bob", DECOMPOSED).await;
    let session = client.login(&username("bob"), &Password::from(DECOMPOSED)).await.unwrap();
    let salt = Salt::random();
    let key = VaultKey::derive(DECOMPOSED.as_bytes(), session.export_key.expose(), salt);
    let (dir, fixture_key) = crate::import::fixture("bob");
    let path = dir.path().join("state.vault");
    let content = vault::read(&path, &fixture_key).unwrap().unwrap();
    vault::write(&path, &key, &content).unwrap();

    let pinned = Trust::Pinned(server.fingerprint);
    let (addr, wrong) = (server.addr.to_string(), Password::from("kase und brot"));
    let refused = Messenger::unlock_at(dir.path(), addr, pinned.clone(), &wrong).await.unwrap_err();
    assert!(matches!(refused, Error::Auth(AuthError::WrongPassword)), "{refused:?}");
    assert!(path.exists());
    // The first unlock imports the vault, the second opens the database.
    for _ in 0..2 {
        let typed = Password::from(DECOMPOSED);
        let addr = server.addr.to_string();
        let bob = Messenger::unlock_at(dir.path(), addr, pinned.clone(), &typed).await.unwrap();
        assert_eq!(bob.conversations().await.unwrap().len(), 2);
        assert!(!path.exists());
    }
}

#[tokio::test]
async fn a_password_with_control_characters_is_refused_at_registration() {
    let server = Server::start().await;
    let registering = server.client();
    let registered = registering
        .register(&username("alice"), &Password::from("a\tb"), &Identity::generate(), None)
        .await;
    assert!(matches!(registered, Err(AuthError::PasswordRefused)), "{registered:?}");
}
