//! ChangePassword (105).

use std::time::Duration;

use qpq_domain::UsernameScripts;
use qpq_ports::Bucket;
use qpq_proto::{
    LimitClass, LimitSubject, Status,
    methods::{ChangePassword, OpaqueLoginFinish, ResolveUser},
    v1::{ChangePasswordRequest, ResolveUserRequest},
};
use qpq_rpc::{Config, RateLimits};

use crate::harness::{Client, Refused, Server, code, new_identity};

async fn change(client: &Client, upload: &[u8]) -> Result<u32, Refused> {
    let request = ChangePasswordRequest { upload: upload.to_vec().into(), ..Default::default() };
    client.call::<ChangePassword>(request).await.map(|answer| answer.revoked)
}

/// Makes a call that needs only a session.
async fn probe(client: &Client) -> Result<(), Refused> {
    let request = ResolveUserRequest { username: "alice".into(), ..Default::default() };
    client.call::<ResolveUser>(request).await.map(drop)
}

fn not_started() -> (Status, String) {
    (Status::Forbidden, "auth.registration_not_started".into())
}

fn failed() -> (Status, String) {
    (Status::Unauthorized, "auth.failed".into())
}

fn expired() -> (Status, String) {
    (Status::Unauthorized, "auth.session_expired".into())
}

#[tokio::test]
async fn after_a_change_only_the_new_password_works_and_only_the_callers_session_stays() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    let others = [server.connect(), server.connect()];
    for other in &others {
        other.log_in("alice", "password").await.expect("the right password");
    }
    let upload = alice.client.upload("alice", "new password").await.expect("an upload");
    assert_eq!(change(&alice.client, &upload).await, Ok(2));
    probe(&alice.client).await.expect("the caller's session stays");
    for other in &others {
        assert_eq!(code(probe(other).await), expired());
    }
    probe(&bob.client).await.expect("another account's session");
    let fresh = server.connect();
    assert_eq!(code(fresh.log_in("alice", "password").await), failed());
    fresh.log_in("alice", "new password").await.expect("the new password");
    fresh.log_in("bob", "password").await.expect("another account's password");
}

#[tokio::test]
async fn a_change_needs_a_started_registration_of_the_own_name_on_the_connection() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let elsewhere = server.connect();
    let upload = elsewhere.upload("alice", "new password").await.expect("an upload");
    assert_eq!(code(change(&alice.client, &upload).await), not_started(), "another connection");
    alice.client.upload("bob", "password").await.expect("an upload");
    assert_eq!(code(change(&alice.client, &upload).await), not_started(), "another name");
    alice.client.upload("alice", "password").await.expect("an upload");
    server.clock.advance(Duration::from_secs(60));
    assert_eq!(code(change(&alice.client, &upload).await), not_started(), "too late");
    // The name is compared in its canonical form.
    alice.client.upload("Alice", "new password").await.expect("an upload");
    change(&alice.client, &upload).await.expect("started");
    let other = elsewhere.upload("alice", "a third password").await.expect("an upload");
    assert_eq!(code(change(&alice.client, &other).await), not_started(), "used once");
    elsewhere.log_in("alice", "new password").await.expect("the new password");
}

#[tokio::test]
async fn a_repeat_of_the_last_change_is_answered_ok_and_changes_nothing() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let upload = alice.client.upload("alice", "new password").await.expect("an upload");
    change(&alice.client, &upload).await.expect("started");
    let phone = server.connect();
    let session = phone.log_in("alice", "new password").await.expect("the new password");
    let reconnected = server.connect();
    let request = ChangePasswordRequest {
        upload: upload.clone().into(),
        session_token: session.session_token,
    };
    let repeated = reconnected.call::<ChangePassword>(request).await.expect("a repeat");
    assert_eq!(repeated.revoked, 0);
    for client in [&alice.client, &phone] {
        probe(client).await.expect("a repeat ends no session");
    }
}

#[tokio::test]
async fn an_upload_that_is_no_record_is_malformed() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let upload = alice.client.upload("alice", "new password").await.expect("an upload");
    for bad in [&upload[..191], &[&upload[..], &[0]].concat(), &[0; 192], &[]] {
        let refused = change(&alice.client, bad).await.expect_err("malformed");
        assert_eq!((refused.code.as_str(), refused.field.as_str()), ("auth.malformed", "upload"));
    }
    change(&alice.client, &upload).await.expect("a malformed upload does not use the start");
}

#[tokio::test]
async fn a_change_needs_a_login_within_five_minutes() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    server.clock.advance(Duration::from_secs(5 * 60) + Duration::from_millis(1));
    let upload = alice.client.upload("alice", "new password").await.expect("an upload");
    assert_eq!(
        code(change(&alice.client, &upload).await),
        (Status::Unauthorized, "auth.fresh_login_required".into())
    );
    assert_eq!(
        code(change(&server.connect(), &upload).await),
        (Status::Unauthorized, "auth.session_required".into())
    );
    alice.client.log_in("alice", "password").await.expect("the password is unchanged");
}

#[tokio::test]
async fn a_login_that_started_with_the_old_password_fails_after_the_change() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let thief = server.connect();
    let started = thief.start_login("alice", "password").await.expect("the old record");
    let upload = alice.client.upload("alice", "new password").await.expect("an upload");
    assert_eq!(change(&alice.client, &upload).await, Ok(0));
    assert_eq!(code(thief.call::<OpaqueLoginFinish>(started.finish()).await), failed());
    assert_eq!(code(probe(&thief).await), (Status::Unauthorized, "auth.session_required".into()));
    // No session was left that the next change would end.
    let upload = alice.client.upload("alice", "a third password").await.expect("an upload");
    assert_eq!(change(&alice.client, &upload).await, Ok(0));
}

#[tokio::test]
async fn the_owner_of_a_name_that_new_accounts_cannot_have_changes_the_password() {
    let any = Server::with(|config| config.username_scripts = UsernameScripts::Any).await;
    let name = "\u{440}aypal";
    let client = any.connect();
    client.register(name, "password", &new_identity()).await.expect("any scripts");
    let strict = any.reconfigured(Config::default());
    let invalid = (Status::BadRequest, "auth.invalid_username".to_owned());
    assert_eq!(code(strict.upload(name, "new password").await), invalid);
    strict.log_in(name, "password").await.expect("the account keeps its name");
    let upload = strict.upload(name, "new password").await.expect("the own name");
    assert_eq!(change(&strict, &upload).await, Ok(0));
}

#[tokio::test]
async fn registrations_of_a_name_by_others_do_not_prevent_a_change_of_its_password() {
    let two = Bucket { burst: 2, per_second: 0.001 };
    let budget = ((LimitClass::Register, LimitSubject::Username), two);
    let limits = RateLimits { enabled: true, overrides: [budget].into() };
    let server = Server::with(|config| config.limits = limits).await;
    let alice = server.user("alice").await;
    let other = server.connect();
    let refused = other.upload("alice", "password").await.expect_err("the budget is exhausted");
    assert_eq!(refused.code, "rpc.rate_limited");
    let upload = alice.client.upload("alice", "new password").await.expect("the own name");
    assert_eq!(change(&alice.client, &upload).await, Ok(0));
}
