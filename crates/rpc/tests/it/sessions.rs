//! Sessions: tokens, lifetimes, logout, and callers of which more is required than a session.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use prost::Message as _;
use qpq_domain::{AccountId, SessionToken, TokenHash, UnixMillis, Username};
use qpq_ports::{
    Clock as _, NewSession, Session, SessionCreation, Sessions, StoreError, StoreResult,
};
use qpq_proto::{
    Status, auth,
    methods::{Logout, ResolveUser},
    session::append_session_token,
    v1::{LogoutRequest, ResolveUserRequest},
};
use qpq_rpc::{Cx, Error, SessionLifetimes, auth::Authorize};

use crate::harness::{Client, Refused, START, Server, User, code};

const MINUTE: Duration = Duration::from_secs(60);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Makes a call that needs only a session.
async fn probe(client: &Client, token: &[u8]) -> Result<(), Refused> {
    let request = ResolveUserRequest { username: "alice".into(), ..Default::default() };
    client.call_with::<ResolveUser>(request, token).await.map(drop)
}

async fn logout(client: &Client, all_sessions: bool, token: &[u8]) -> Result<u32, Refused> {
    let request = LogoutRequest { all_sessions, ..Default::default() };
    client.call_with::<Logout>(request, token).await.map(|answer| answer.revoked)
}

fn expired() -> (Status, String) {
    (Status::Unauthorized, "auth.session_expired".into())
}

fn required() -> (Status, String) {
    (Status::Unauthorized, "auth.session_required".into())
}

#[tokio::test]
async fn a_token_works_on_any_connection_and_becomes_its_session() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    probe(&alice.client, &[]).await.expect("the login's connection");
    let elsewhere = server.connect();
    assert_eq!(code(probe(&elsewhere, &[]).await), required());
    probe(&elsewhere, &alice.token).await.expect("the token");
    probe(&elsewhere, &[]).await.expect("the connection's session");
}

#[tokio::test]
async fn invalid_tokens_have_one_answer_and_do_not_become_the_connections_session() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let revoked = server.user("revoked").await;
    logout(&revoked.client, false, &[]).await.expect("a session");
    let elsewhere = server.connect();
    let mut answers = Vec::new();
    for token in [&[7; 32][..], &[7; 31], &[7; 33], &revoked.token] {
        let mut payload =
            ResolveUserRequest { username: "alice".into(), ..Default::default() }.encode_to_vec();
        append_session_token(&mut payload, token);
        answers.push(elsewhere.raw(500, payload).await);
        assert_eq!(code(probe(&elsewhere, &[]).await), required());
    }
    assert_eq!(Status::from(answers[0].status), Status::Unauthorized);
    assert!(answers.iter().all(|answer| answer.payload == answers[0].payload));
    // With an invalid token the connection's session is neither used nor ended.
    assert_eq!(code(probe(&alice.client, &[7; 32]).await), expired());
    probe(&alice.client, &[]).await.expect("the connection's own session");
}

#[tokio::test]
async fn of_two_token_fields_the_last_counts_and_an_invalid_field_is_malformed() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let mut payload = ResolveUserRequest {
        username: "alice".into(),
        session_token: Bytes::from_static(&[7; 32]),
    }
    .encode_to_vec();
    append_session_token(&mut payload, &alice.token);
    assert_eq!(server.connect().raw(500, payload).await.status, Status::Ok.code());
    // Field 15 as a number, and field 15 with a length beyond the end.
    for payload in [&[0x78, 1][..], &[0x7a, 32, 1]] {
        let answer = alice.client.raw(500, Bytes::copy_from_slice(payload)).await;
        assert_eq!(Refused::new(&answer).code, "rpc.malformed");
    }
}

#[tokio::test]
async fn a_session_ends_thirty_days_after_its_last_use() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    server.clock.advance(DAY * 30 - Duration::from_millis(1));
    probe(&alice.client, &[]).await.expect("the last millisecond");
    server.clock.advance(DAY * 30 - Duration::from_millis(1));
    probe(&alice.client, &[]).await.expect("it was used");
    server.clock.advance(DAY * 30);
    assert_eq!(code(probe(&alice.client, &[]).await), expired());
    assert_eq!(code(probe(&server.connect(), &alice.token).await), expired());
}

#[tokio::test]
async fn a_session_ends_ninety_days_after_its_login_in_spite_of_uses() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    for _ in 0..89 {
        server.clock.advance(DAY);
        probe(&alice.client, &[]).await.expect("used daily");
    }
    server.clock.set(START.plus(DAY * 90 - Duration::from_millis(1)));
    probe(&alice.client, &[]).await.expect("the last millisecond");
    server.clock.set(START.plus(DAY * 90));
    assert_eq!(code(probe(&alice.client, &[]).await), expired());
}

#[tokio::test]
async fn lifetimes_are_configurable_and_short_ones_are_extended_by_uses() {
    let lifetimes = SessionLifetimes { idle: MINUTE, absolute: MINUTE * 5 };
    let server = Server::with(|config| config.sessions = lifetimes).await;
    let alice = server.user("alice").await;
    for _ in 0..9 {
        server.clock.advance(MINUTE / 2);
        probe(&alice.client, &[]).await.expect("used twice a minute");
    }
    server.clock.advance(MINUTE / 2);
    assert_eq!(code(probe(&alice.client, &[]).await), expired());
    let session = alice.client.log_in("alice", "password").await.expect("the right password");
    assert_eq!(session.expires_at, server.clock.now().plus(MINUTE).0);
    server.clock.advance(MINUTE);
    assert_eq!(code(probe(&alice.client, &[]).await), expired());
}

/// Counts the recorded uses. Recording fails if `fails` is set.
struct CountingSessions {
    inner: Arc<dyn Sessions>,
    touches: Arc<AtomicU32>,
    fails: bool,
}

#[async_trait]
impl Sessions for CountingSessions {
    async fn create(&self, session: NewSession) -> StoreResult<SessionCreation> {
        self.inner.create(session).await
    }

    async fn find(&self, token: &TokenHash) -> StoreResult<Option<Session>> {
        self.inner.find(token).await
    }

    async fn confirm(&self, token: &TokenHash) -> StoreResult<Option<Session>> {
        self.inner.confirm(token).await
    }

    async fn touch(
        &self,
        token: &TokenHash,
        now: UnixMillis,
        expires_at: UnixMillis,
    ) -> StoreResult<()> {
        self.touches.fetch_add(1, Ordering::SeqCst);
        if self.fails {
            return Err(StoreError::unavailable("the disk is full"));
        }
        self.inner.touch(token, now, expires_at).await
    }

    async fn revoke(&self, token: &TokenHash) -> StoreResult<u32> {
        self.inner.revoke(token).await
    }

    async fn revoke_all(&self, account: AccountId) -> StoreResult<u32> {
        self.inner.revoke_all(account).await
    }
}

#[tokio::test]
async fn a_use_is_recorded_every_ten_minutes_and_a_failure_refuses_no_call() {
    for fails in [false, true] {
        let touches = Arc::new(AtomicU32::new(0));
        let counter = Arc::clone(&touches);
        let server = Server::with_stores(
            |_| {},
            |mut stores| {
                stores.sessions =
                    Arc::new(CountingSessions { inner: stores.sessions, touches: counter, fails });
                stores
            },
        )
        .await;
        let alice = server.user("alice").await;
        for _ in 0..10 {
            probe(&alice.client, &[]).await.expect("a session");
        }
        assert_eq!(touches.load(Ordering::SeqCst), 0, "just created");
        server.clock.advance(MINUTE * 10 - Duration::from_millis(1));
        probe(&alice.client, &[]).await.expect("a session");
        assert_eq!(touches.load(Ordering::SeqCst), 0, "not yet");
        server.clock.advance(Duration::from_millis(1));
        for _ in 0..10 {
            probe(&alice.client, &[]).await.expect("a session");
        }
        assert_eq!(touches.load(Ordering::SeqCst), if fails { 10 } else { 1 });
    }
}

#[tokio::test]
async fn logout_ends_the_session_everywhere_and_only_that() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let phone = server.connect();
    phone.log_in("alice", "password").await.expect("the right password");
    let elsewhere = server.connect();
    probe(&elsewhere, &alice.token).await.expect("a session");
    assert_eq!(logout(&alice.client, false, &[]).await, Ok(1));
    assert_eq!(code(probe(&alice.client, &[]).await), required(), "the connection has no session");
    assert_eq!(code(probe(&elsewhere, &[]).await), expired(), "bound before it ended");
    assert_eq!(code(probe(&server.connect(), &alice.token).await), expired());
    assert_eq!(code(logout(&elsewhere, false, &[]).await), expired());
    probe(&phone, &[]).await.expect("another session of the same account");
}

#[tokio::test]
async fn logout_of_all_ends_every_session_of_the_account_and_of_no_other() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let bob = server.user("bob").await;
    let others = [server.connect(), server.connect()];
    for other in &others {
        other.log_in("alice", "password").await.expect("the right password");
    }
    // The token is of another session than the connection's. Both sessions end.
    assert_eq!(logout(&others[0], true, &alice.token).await, Ok(3));
    for client in [&alice.client, &others[1]] {
        assert_eq!(code(probe(client, &[]).await), expired());
    }
    probe(&bob.client, &[]).await.expect("another account's session");
    alice.client.log_in("alice", "password").await.expect("the account is unchanged");
}

fn payload(token: &Bytes) -> Vec<u8> {
    let mut payload = Vec::new();
    append_session_token(&mut payload, token);
    payload
}

/// Authenticates and authorizes a request of `user`.
async fn admit<A: Authorize<()>>(server: &Server, user: &User) -> Result<A::Caller, Error> {
    let cx = Cx { app: server.rpc.app(), conn: &user.client.conn, now: server.clock.now() };
    let principal = A::authenticate(cx, &payload(&user.token)).await?;
    A::authorize(cx, principal, &()).await
}

#[tokio::test]
async fn a_caller_has_the_account_and_device_of_its_session() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let caller = admit::<auth::Session>(&server, &alice).await.expect("a session");
    let token = SessionToken::try_from(&alice.token[..]).expect("32 bytes");
    assert_eq!(
        (caller.identity, caller.device, caller.token),
        (alice.identity, None, token.hash())
    );
    let shown = format!("{caller:?}");
    assert!(
        !shown.contains(&hex::encode(&alice.token))
            && !shown.contains(&hex::encode(token.hash().as_bytes()))
    );
}

#[tokio::test]
async fn a_login_is_fresh_for_five_minutes() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    server.clock.advance(MINUTE * 5);
    let fresh = admit::<auth::Fresh>(&server, &alice).await.expect("exactly five minutes");
    assert_eq!(fresh.caller().identity, alice.identity);
    server.clock.advance(Duration::from_millis(1));
    let refused = admit::<auth::Fresh>(&server, &alice).await.expect_err("too old");
    assert_eq!(refused.code().as_str(), "auth.fresh_login_required");
    assert_eq!(refused.code().status(), Status::Unauthorized);
    // A use of the session does not make it fresh, a login does.
    admit::<auth::Session>(&server, &alice).await.expect("still a session");
    admit::<auth::Fresh>(&server, &alice).await.expect_err("still too old");
    let token =
        alice.client.log_in("alice", "password").await.expect("the right password").session_token;
    admit::<auth::Fresh>(&server, &User { token, ..alice }).await.expect("just logged in");
}

#[tokio::test]
async fn administrators_are_the_accounts_in_the_configuration() {
    let root = Username::parse("Root").expect("a name");
    let server = Server::with(|config| config.admins = [root].into()).await;
    let (root, alice) = (server.admin("ROOT").await, server.user("alice").await);
    let admin = admit::<auth::Admin>(&server, &root).await.expect("an administrator");
    assert_eq!(admin.caller().identity, root.identity);
    let refused = admit::<auth::Admin>(&server, &alice).await.expect_err("another account");
    assert_eq!(
        (refused.code().status(), refused.code().as_str()),
        (Status::Forbidden, "auth.admin_required")
    );
    logout(&root.client, false, &[]).await.expect("a session");
    let refused = admit::<auth::Admin>(&server, &root).await.expect_err("no session");
    assert_eq!(refused.code().as_str(), "auth.session_expired");

    let without = Server::start().await;
    let root = without.user("root").await;
    admit::<auth::Admin>(&without, &root).await.expect_err("no administrator is configured");
}
