//! Registration and login: 100 to 103.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use ed25519_dalek::SigningKey;
use futures_util::future::join_all;
use parking_lot::Mutex;
use qpq_domain::{AccountId, IdentityKey, UnixMillis, Username, UsernameScripts};
use qpq_ports::{
    Account, Accounts, Credentials, Deletion, Erasing, ErasureId, NewAccount, PasswordChange,
    PasswordChanged, Registration, StoreResult,
};
use qpq_proto::{
    Status,
    methods::{
        OpaqueLoginFinish, OpaqueLoginStart, OpaqueRegisterFinish, OpaqueRegisterStart, ResolveUser,
    },
    v1::{
        OpaqueLoginFinishRequest, OpaqueLoginStartRequest, OpaqueRegisterStartRequest,
        ResolveUserRequest,
    },
};
use qpq_rpc::{Config, IdentityProof};
use rand::rngs::OsRng;

use crate::harness::{Client, START, Server, code, identity_proof, new_identity, registration};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

async fn resolve(client: &Client, name: &str) -> Bytes {
    let request = ResolveUserRequest { username: name.into(), ..Default::default() };
    client.call::<ResolveUser>(request).await.expect("a session and a user").identity_key
}

#[tokio::test]
async fn a_registered_account_logs_in_and_is_found_by_its_key() {
    let server = Server::start().await;
    let client = server.connect();
    let identity = new_identity();
    client.register("alice", "password", &identity).await.expect("a free name");
    let session = client.log_in("alice", "password").await.expect("the right password");
    assert_eq!(session.session_token.len(), 32);
    assert_eq!(session.expires_at, START.plus(DAY * 30).0);
    assert_eq!(resolve(&client, "alice").await, &identity.as_bytes()[..]);
    let again = client.log_in("alice", "password").await.expect("the right password");
    assert_ne!(again.session_token, session.session_token);
}

#[tokio::test]
async fn a_wrong_password_and_an_unknown_username_have_the_same_answer() {
    let server = Server::start().await;
    let client = server.connect();
    client.register("alice", "password", &new_identity()).await.expect("a free name");
    let mut finishes = Vec::new();
    for (name, password) in [("alice", "wrong"), ("nobody", "password")] {
        let started = client.start_login(name, password).await.expect("an answer");
        assert_eq!(started.ke2.len(), 320);
        finishes.push(client.raw(103, prost::Message::encode_to_vec(&started.finish())).await);
    }
    assert_eq!(finishes[0].status, Status::Unauthorized.code());
    assert_eq!(finishes[0].payload, finishes[1].payload);
    assert_eq!(
        code(client.log_in("alice", "wrong").await),
        (Status::Unauthorized, "auth.failed".into())
    );
}

/// A port that records its calls in order.
struct Recorded {
    inner: Arc<dyn Accounts>,
    calls: Arc<Mutex<Vec<&'static str>>>,
}

#[async_trait]
impl Accounts for Recorded {
    async fn register(&self, account: NewAccount) -> StoreResult<Registration> {
        self.calls.lock().push("register");
        self.inner.register(account).await
    }

    async fn credentials(&self, username: &Username) -> StoreResult<Option<Credentials>> {
        self.calls.lock().push("credentials");
        self.inner.credentials(username).await
    }

    async fn change_password(&self, change: PasswordChange) -> StoreResult<PasswordChanged> {
        self.calls.lock().push("change_password");
        self.inner.change_password(change).await
    }

    async fn by_username(&self, username: &Username) -> StoreResult<Option<Account>> {
        self.calls.lock().push("by_username");
        self.inner.by_username(username).await
    }

    async fn by_identity(&self, identity: &IdentityKey) -> StoreResult<Option<Account>> {
        self.calls.lock().push("by_identity");
        self.inner.by_identity(identity).await
    }

    async fn delete(&self, account: AccountId, now: UnixMillis) -> StoreResult<Deletion> {
        self.calls.lock().push("delete");
        self.inner.delete(account, now).await
    }

    async fn erase(&self, erasure: ErasureId, now: UnixMillis) -> StoreResult<Erasing> {
        self.calls.lock().push("erase");
        self.inner.erase(erasure, now).await
    }
}

/// The store calls of a login must not reveal whether the account exists. The tests of
/// `OpaqueServer` show the same for its computation.
#[tokio::test]
async fn a_login_makes_the_same_store_calls_whether_or_not_the_account_exists() {
    let calls = Arc::new(Mutex::new(Vec::new()));
    let recorded = Arc::clone(&calls);
    let server = Server::with_stores(
        |_| {},
        |mut stores| {
            stores.accounts = Arc::new(Recorded { inner: stores.accounts, calls: recorded });
            stores
        },
    )
    .await;
    let client = server.connect();
    client.register("alice", "password", &new_identity()).await.expect("a free name");
    assert_eq!(std::mem::take(&mut *calls.lock()), ["register"], "RegisterStart calls nothing");
    client.upload("alice", "password").await.expect("taken names have the same answer");
    assert!(calls.lock().is_empty());
    for name in ["alice", "nobody"] {
        let started = client.start_login(name, "wrong").await.expect("an answer");
        assert_eq!(std::mem::take(&mut *calls.lock()), ["credentials"], "{name}");
        client.call::<OpaqueLoginFinish>(started.finish()).await.expect_err("a wrong password");
        assert!(calls.lock().is_empty(), "{name}");
    }
}

#[tokio::test]
async fn the_responses_to_starts_do_not_reveal_whether_a_name_is_taken() {
    let server = Server::start().await;
    let client = server.connect();
    client.register("alice", "password", &new_identity()).await.expect("a free name");
    for name in ["alice", "nobody"] {
        // A valid point that blinds no password: the answer depends on the name alone.
        let point = hex::decode("e2f2ae0a6abc4e71a884a961c500515f58e30b6aa582dd8db6a65945e08d2d76")
            .expect("hex");
        let request = OpaqueRegisterStartRequest { username: name.into(), request: point.into() };
        let first =
            client.call::<OpaqueRegisterStart>(request.clone()).await.expect("an answer").response;
        let second = client.call::<OpaqueRegisterStart>(request).await.expect("an answer").response;
        assert_eq!((first.len(), &first), (64, &second), "{name}");
        let once = client.start_login(name, "password").await.expect("an answer").ke2;
        let twice = client.start_login(name, "password").await.expect("an answer").ke2;
        assert_eq!((once.len(), twice.len()), (320, 320), "{name}");
        assert_ne!(once[32..], twice[32..], "{name}: nonces are fresh");
    }
}

#[tokio::test]
async fn messages_of_a_wrong_length_are_malformed_and_change_nothing() {
    let server = Server::start().await;
    let client = server.connect();
    let upload = client.upload("alice", "password").await.expect("an upload");
    let identity = new_identity();
    let wrong = |bytes: &[u8]| {
        let longer = [bytes, &[0]].concat();
        [Bytes::copy_from_slice(&bytes[1..]), longer.into(), Bytes::new()]
    };
    let malformed = || (Status::BadRequest, "auth.malformed".to_owned());
    for request in wrong(&[1; 32]) {
        let request = OpaqueRegisterStartRequest { username: "alice".into(), request };
        assert_eq!(code(client.call::<OpaqueRegisterStart>(request).await), malformed());
    }
    for upload in wrong(&upload) {
        let request = registration("alice", &upload, &identity);
        assert_eq!(code(client.call::<OpaqueRegisterFinish>(request).await), malformed());
    }
    client.register("alice", "password", &identity).await.expect("the name is still free");
    for request in wrong(&[1; 96]) {
        let request = OpaqueLoginStartRequest { username: "alice".into(), request };
        assert_eq!(code(client.call::<OpaqueLoginStart>(request).await), malformed());
    }
    let finish = client.start_login("alice", "password").await.expect("an answer").finish();
    for finalization in wrong(&finish.finalization) {
        let request = OpaqueLoginFinishRequest { finalization, ..finish.clone() };
        let refused = client.call::<OpaqueLoginFinish>(request).await.expect_err("a wrong length");
        assert_eq!((refused.status, refused.code.as_str()), (Status::BadRequest, "auth.malformed"));
        assert_eq!(refused.field, "finalization");
    }
    client
        .call::<OpaqueLoginFinish>(finish)
        .await
        .expect("a malformed finish does not end the login");
}

#[tokio::test]
async fn invalid_points_and_the_identity_are_malformed() {
    let server = Server::start().await;
    let client = server.connect();
    let malformed = || (Status::BadRequest, "auth.malformed".to_owned());
    for point in [[0; 32], [0xff; 32]] {
        let request =
            OpaqueRegisterStartRequest { username: "alice".into(), request: point.to_vec().into() };
        assert_eq!(code(client.call::<OpaqueRegisterStart>(request).await), malformed());
        let mut upload = client.upload("alice", "password").await.expect("an upload");
        upload[..32].copy_from_slice(&point);
        let request = registration("alice", &upload, &new_identity());
        assert_eq!(code(client.call::<OpaqueRegisterFinish>(request).await), malformed());
        let request = [&point[..], &[1; 32], &point].concat();
        let request = OpaqueLoginStartRequest { username: "alice".into(), request: request.into() };
        assert_eq!(code(client.call::<OpaqueLoginStart>(request).await), malformed());
    }
}

#[tokio::test]
async fn names_are_equal_across_case_and_width_and_invalid_ones_are_refused() {
    let server = Server::start().await;
    let client = server.connect();
    let identity = new_identity();
    client.register("Zoë", "password", &identity).await.expect("a free name");
    for same in ["zoë", "ZOË", "zoe\u{308}", "ｚｏë"] {
        client.log_in(same, "password").await.unwrap_or_else(|e| panic!("{same}: {e:?}"));
        let taken = client.register(same, "password", &new_identity()).await;
        assert_eq!(code(taken), (Status::Forbidden, "auth.username_taken".into()));
    }
    for bad in ["", "a@b", "a:b", "a/b", "a\0b", "a b", "a\u{202e}b", &"x".repeat(65)] {
        let invalid = || (Status::BadRequest, "auth.invalid_username".to_owned());
        assert_eq!(code(client.upload(bad, "password").await), invalid(), "{bad:?}");
        assert_eq!(code(client.log_in(bad, "password").await), invalid(), "{bad:?}");
        let finish = OpaqueLoginFinishRequest {
            username: bad.into(),
            finalization: vec![0; 64].into(),
            ..Default::default()
        };
        assert_eq!(code(client.call::<OpaqueLoginFinish>(finish).await), invalid(), "{bad:?}");
        let finish = registration(
            bad,
            &client.upload("zoe", "password").await.expect("an upload"),
            &identity,
        );
        assert_eq!(code(client.call::<OpaqueRegisterFinish>(finish).await), invalid(), "{bad:?}");
    }
}

#[tokio::test]
async fn a_registration_never_replaces_an_account() {
    let server = Server::start().await;
    let client = server.connect();
    let identity = new_identity();
    let upload = client.upload("alice", "password").await.expect("an upload");
    let request = registration("alice", &upload, &identity);
    for _ in 0..2 {
        let done =
            client.call::<OpaqueRegisterFinish>(request.clone()).await.expect("a repeat is Ok");
        assert!(done.success);
    }
    // The same name and key with another password, and the name with another key: both would take
    // over the account.
    for (password, key) in [("other", &identity), ("password", &new_identity())] {
        let refused = client.register("alice", password, key).await;
        assert_eq!(code(refused), (Status::Forbidden, "auth.username_taken".into()));
    }
    client.log_in("alice", "password").await.expect("the first record is unchanged");
    assert_eq!(code(client.log_in("alice", "other").await).0, Status::Unauthorized);
    // Another name with Alice's key.
    let refused = client.register("mallory", "password", &identity).await;
    assert_eq!(code(refused), (Status::Forbidden, "auth.identity_taken".into()));
    assert_eq!(code(client.log_in("mallory", "password").await).0, Status::Unauthorized);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_concurrent_registrations_of_one_name_exactly_one_wins() {
    let server = Server::start().await;
    let tries = join_all((0..16).map(|n| {
        let client = server.connect();
        async move {
            let identity = new_identity();
            let password = format!("password {n}");
            (client.register("alice", &password, &identity).await.is_ok(), password, identity)
        }
    }))
    .await;
    let winners: Vec<_> = tries.iter().filter(|(won, ..)| *won).collect();
    assert_eq!(winners.len(), 1);
    let (_, password, identity) = winners[0];
    let client = server.connect();
    client.log_in("alice", password).await.expect("the winner's password");
    assert_eq!(resolve(&client, "alice").await, &identity.as_bytes()[..]);
}

#[tokio::test]
async fn only_valid_signing_keys_are_accepted() {
    let server = Server::start().await;
    let client = server.connect();
    let upload = client.upload("alice", "password").await.expect("an upload");
    let mut neutral = [0; 32];
    neutral[0] = 1;
    // y = p + 1: another encoding of the neutral element.
    let mut non_canonical = [0xff; 32];
    non_canonical[0] = 0xee;
    non_canonical[31] = 0x7f;
    for key in [&neutral[..], &[0; 32], &non_canonical, &[2; 32], &[9; 31], &[9; 33], &[]] {
        let mut request = registration("alice", &upload, &new_identity());
        request.identity_key = Bytes::copy_from_slice(key);
        let refused = client.call::<OpaqueRegisterFinish>(request).await.expect_err("a bad key");
        assert_eq!(
            (refused.status, refused.code.as_str()),
            (Status::BadRequest, "auth.invalid_identity_key")
        );
        assert_eq!(refused.field, "identity_key");
    }
}

#[tokio::test]
async fn a_proof_is_always_checked_and_its_absence_refused_where_required() {
    let optional = Server::start().await;
    let required = Server::with(|config| config.identity_proof = IdentityProof::Required).await;
    for (server, demanded) in [(&optional, false), (&required, true)] {
        let client = server.connect();
        let signing = SigningKey::generate(&mut OsRng);
        let identity = IdentityKey::new(signing.verifying_key().to_bytes());
        let upload = client.upload("Alice", "password").await.expect("an upload");
        let plain = registration("Alice", &upload, &identity);
        let proof = identity_proof(&signing, "Alice", &upload);
        let another_key = identity_proof(&SigningKey::generate(&mut OsRng), "Alice", &upload);
        let another_name = identity_proof(&signing, "bob", &upload);
        let another_upload = identity_proof(&signing, "Alice", &[0; 192]);
        // S + L in place of S, with L the order of the group: a verifier that does not check S < L
        // (RFC 8032 §5.1.7) accepts it.
        let mut malleable = proof.to_vec();
        add_group_order(&mut malleable[32..]);
        let bad = [
            another_key,
            another_name,
            another_upload,
            malleable.into(),
            proof.slice(1..),
            vec![0; 64].into(),
        ];
        for identity_proof in bad {
            let mut request = plain.clone();
            request.identity_proof = identity_proof;
            let refused = client.call::<OpaqueRegisterFinish>(request).await;
            assert_eq!(code(refused), (Status::BadRequest, "auth.invalid_identity_proof".into()));
        }
        if demanded {
            let refused = client.call::<OpaqueRegisterFinish>(plain.clone()).await;
            assert_eq!(code(refused), (Status::BadRequest, "auth.identity_proof_required".into()));
        }
        let mut request = plain.clone();
        request.identity_proof = proof;
        client.call::<OpaqueRegisterFinish>(request).await.expect("a valid proof");
    }
    let client = optional.connect();
    client.register("bob", "password", &new_identity()).await.expect("a proof is optional");
}

/// Adds the order of the Ed25519 group to a little-endian scalar.
fn add_group_order(scalar: &mut [u8]) {
    let order = hex::decode("edd3f55c1a631258d69cf7a2def9de1400000000000000000000000000000010")
        .expect("hex");
    let mut carry = 0;
    for (byte, add) in scalar.iter_mut().zip(order) {
        let sum = u16::from(*byte) + u16::from(add) + carry;
        *byte = (sum & 0xff) as u8;
        carry = sum >> 8;
    }
}

#[tokio::test]
async fn a_login_cannot_be_disturbed_from_another_connection() {
    let server = Server::start().await;
    let (alice, mallory) = (server.connect(), server.connect());
    alice.register("alice", "password", &new_identity()).await.expect("a free name");
    let started = alice.start_login("alice", "password").await.expect("an answer");
    for _ in 0..8 {
        let theirs = mallory.start_login("alice", "guess").await.expect("an answer");
        mallory.call::<OpaqueLoginFinish>(theirs.finish()).await.expect_err("a wrong password");
    }
    alice.call::<OpaqueLoginFinish>(started.finish()).await.expect("her login is unaffected");
}

#[tokio::test]
async fn a_finalization_works_once_and_only_on_its_own_connection() {
    let server = Server::start().await;
    let (alice, elsewhere) = (server.connect(), server.connect());
    alice.register("alice", "password", &new_identity()).await.expect("a free name");
    let finish = alice.start_login("alice", "password").await.expect("an answer").finish();
    let failed = || (Status::Unauthorized, "auth.failed".to_owned());
    assert_eq!(code(elsewhere.call::<OpaqueLoginFinish>(finish.clone()).await), failed());
    elsewhere.start_login("alice", "password").await.expect("an answer");
    assert_eq!(code(elsewhere.call::<OpaqueLoginFinish>(finish.clone()).await), failed());
    alice.call::<OpaqueLoginFinish>(finish.clone()).await.expect("the right connection");
    assert_eq!(code(alice.call::<OpaqueLoginFinish>(finish).await), failed());
}

#[tokio::test]
async fn a_failed_finish_ends_the_login() {
    let server = Server::start().await;
    let client = server.connect();
    client.register("alice", "password", &new_identity()).await.expect("a free name");
    let finish = client.start_login("alice", "password").await.expect("an answer").finish();
    let guess = OpaqueLoginFinishRequest { finalization: vec![7; 64].into(), ..finish.clone() };
    for request in [guess, finish] {
        assert_eq!(code(client.call::<OpaqueLoginFinish>(request).await).1, "auth.failed");
    }
}

#[tokio::test]
async fn a_login_must_be_finished_within_a_minute() {
    let server = Server::start().await;
    let client = server.connect();
    client.register("alice", "password", &new_identity()).await.expect("a free name");
    let in_time = client.start_login("alice", "password").await.expect("an answer");
    server.clock.advance(Duration::from_millis(59_999));
    client.call::<OpaqueLoginFinish>(in_time.finish()).await.expect("just in time");
    let late = client.start_login("alice", "password").await.expect("an answer");
    server.clock.advance(Duration::from_secs(60));
    assert_eq!(code(client.call::<OpaqueLoginFinish>(late.finish()).await).1, "auth.failed");
}

#[tokio::test]
async fn a_fifth_unfinished_login_removes_the_oldest_of_its_connection() {
    let server = Server::start().await;
    let client = server.connect();
    let mut started = Vec::new();
    for n in 0..5 {
        let name = format!("user{n}");
        client.register(&name, "password", &new_identity()).await.expect("a free name");
        started.push(client.start_login(&name, "password").await.expect("an answer").finish());
    }
    let outcomes =
        join_all(started.into_iter().map(|finish| client.call::<OpaqueLoginFinish>(finish))).await;
    let succeeded: Vec<_> = outcomes.iter().map(Result::is_ok).collect();
    assert_eq!(succeeded, [false, true, true, true, true]);
}

#[tokio::test]
async fn a_second_login_of_one_name_on_a_connection_replaces_the_first() {
    let server = Server::start().await;
    let client = server.connect();
    client.register("alice", "password", &new_identity()).await.expect("a free name");
    let lost = client.start_login("alice", "password").await.expect("an answer");
    let kept = client.start_login("ALICE", "password").await.expect("an answer");
    client.call::<OpaqueLoginFinish>(kept.finish()).await.expect("the second login");
    assert_eq!(code(client.call::<OpaqueLoginFinish>(lost.finish()).await).1, "auth.failed");
}

#[tokio::test]
async fn a_session_is_never_bound_to_a_key_that_the_client_names() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let bob = server.user("bob").await;
    let finish = async |key: &[u8]| {
        let mut finish =
            bob.client.start_login("bob", "password").await.expect("an answer").finish();
        finish.identity_key = Bytes::copy_from_slice(key);
        bob.client.call::<OpaqueLoginFinish>(finish).await
    };
    assert_eq!(
        code(finish(alice.identity.as_bytes()).await),
        (Status::Unauthorized, "auth.failed".into())
    );
    assert_eq!(code(finish(&[1; 31]).await), (Status::BadRequest, "rpc.invalid_field".into()));
    finish(bob.identity.as_bytes()).await.expect("his own key");
    finish(&[]).await.expect("no key named");
}

#[tokio::test]
async fn a_device_id_is_empty_or_sixteen_bytes() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    for (device, good) in
        [(vec![], true), (vec![5; 16], true), (vec![5; 15], false), (vec![5; 17], false)]
    {
        let mut finish =
            alice.client.start_login("alice", "password").await.expect("an answer").finish();
        finish.device_id = device.into();
        let outcome = alice.client.call::<OpaqueLoginFinish>(finish).await;
        match outcome {
            Ok(_) => assert!(good),
            Err(refused) => {
                assert!(!good);
                assert_eq!(
                    (refused.code.as_str(), refused.field.as_str()),
                    ("rpc.invalid_field", "device_id")
                );
            }
        }
    }
}

#[tokio::test]
async fn unfinished_logins_end_with_their_connection() {
    let server = Server::start().await;
    let client = server.connect();
    client.register("alice", "password", &new_identity()).await.expect("a free name");
    let started = client.start_login("alice", "password").await.expect("an answer");
    server.rpc.disconnected(&client.conn);
    assert_eq!(code(client.call::<OpaqueLoginFinish>(started.finish()).await).1, "auth.failed");
}

#[tokio::test]
async fn new_usernames_that_look_like_another_are_refused() {
    let server = Server::start().await;
    let client = server.connect();
    for name in ["alice", "admin"] {
        client.register(name, "password", &new_identity()).await.expect("registered");
    }
    let invalid = (Status::BadRequest, "auth.invalid_username".to_owned());
    for name in [
        "\u{430}lice",
        "\u{430}dmin",
        "al\u{456}ce",
        "al\u{200d}ice",
        "\u{301}",
        "*",
        "क\u{94d}\u{200d}ष",
    ] {
        let refused = client.register(name, "password", &new_identity()).await;
        assert_eq!(code(refused), invalid, "{name:?}");
        // OpaqueRegisterFinish refuses the name, too.
        let upload = client.upload("alice", "password").await.expect("an upload");
        let request = registration(name, &upload, &new_identity());
        let refused = client.call::<OpaqueRegisterFinish>(request).await;
        assert_eq!(code(refused), invalid, "{name:?}");
    }
    // A name in one script that looks like a taken name is refused by OpaqueRegisterFinish.
    let upload = client.upload("a1ice", "password").await.expect("an upload");
    let request = registration("a1ice", &upload, &new_identity());
    let refused = client.call::<OpaqueRegisterFinish>(request).await;
    assert_eq!(code(refused), (Status::Forbidden, "auth.username_taken".into()));
    for name in ["Алиса", "山田太郎", "o'brien"] {
        client.register(name, "password", &new_identity()).await.expect("one script");
    }
}

#[tokio::test]
async fn an_older_account_with_a_name_that_is_refused_now_logs_in() {
    let any = Server::with(|config| config.username_scripts = UsernameScripts::Any).await;
    let client = any.connect();
    for name in ["\u{430}lice", "*"] {
        client.register(name, "password", &new_identity()).await.expect("any script");
    }
    let client = any.reconfigured(Config::default());
    for name in ["\u{430}lice", "*"] {
        client.log_in(name, "password").await.expect("it exists");
    }
    let refused = client.register("\u{430}dmin", "password", &new_identity()).await;
    assert_eq!(code(refused), (Status::BadRequest, "auth.invalid_username".into()));
}
