//! DeleteAccount (950), and the answers of other calls about a deleted account.

use std::time::Duration;

use bytes::Bytes;
use qpq_ports::{CALLS_ENDED, ClaimRequest, Clock as _, ERASE, Erasing, ErasureId};
use qpq_proto::{
    Status, methods,
    v1::{
        CreateChannelRequest, DeleteAccountRequest, EnqueueRequest, FetchKeyPackageRequest,
        FetchWaitRequest, ListGroupMembersRequest, PeekRequest, ResolveIdentityRequest,
        ResolveUserRequest,
    },
};

use crate::{
    harness::{Server, User, code, new_identity},
    user::message,
};

impl User {
    async fn delete(&self) {
        let request = DeleteAccountRequest::default();
        assert!(self.ok::<methods::DeleteAccount>(request).await.success);
    }
}

/// Runs the stored erasures at the time of the server's clock. Returns their progress.
async fn erase(server: &Server) -> Vec<Erasing> {
    let (stores, now) = (server.store.stores(), server.clock.now());
    let lease = Duration::from_millis(1);
    let horizon = Duration::from_secs(3_600);
    let request = ClaimRequest { kind: ERASE, limit: 10, lease, horizon };
    let mut ended = Vec::new();
    for job in stores.jobs.claim(request, now).await.expect("claim") {
        let erasure = ErasureId::of_job(&job.payload).expect("an erasure");
        let mut progress = Erasing::More;
        while progress == Erasing::More {
            progress = stores.accounts.erase(erasure, now).await.expect("erase");
        }
        ended.push(progress);
    }
    ended
}

#[tokio::test]
async fn a_deleted_account_is_answered_like_one_that_never_existed() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    bob.ok::<methods::Enqueue>(message(&alice, b"hello")).await;
    alice.delete().await;
    for is_erased in [false, true] {
        let unknown = new_identity().as_bytes().to_vec();
        let (name, key) = ("alice".to_owned(), alice.key());
        for (username, identity_key) in [(name, key), ("nobody".to_owned(), unknown.into())] {
            let client = server.connect();
            let login = client.log_in(&username, "password").await;
            assert_eq!(code(login), (Status::Unauthorized, "auth.failed".into()));
            let request = ResolveUserRequest { username, ..Default::default() };
            let refused = bob.refused::<methods::ResolveUser>(request).await;
            refused.assert(Status::NotFound, "users.not_found");
            let request =
                ResolveIdentityRequest { identity_key: identity_key.clone(), ..Default::default() };
            let refused = bob.refused::<methods::ResolveIdentity>(request).await;
            refused.assert(Status::NotFound, "users.not_found");
            let request = EnqueueRequest {
                recipient_key: identity_key.clone(),
                payload: Bytes::from_static(b"hi"),
                ..Default::default()
            };
            let refused = bob.refused::<methods::Enqueue>(request).await;
            refused.assert(Status::NotFound, "delivery.no_such_recipient");
            let request =
                FetchKeyPackageRequest { identity_key: identity_key.clone(), ..Default::default() };
            let fetched = bob.ask::<methods::FetchKeyPackage>(request).await;
            assert_eq!(fetched.map(|fetched| fetched.response.package.len()).unwrap_or(0), 0);
            let request = CreateChannelRequest { peer_key: identity_key, ..Default::default() };
            let refused = bob.refused::<methods::CreateChannel>(request).await;
            assert_eq!(refused.status, Status::NotFound, "{is_erased}");
        }
        erase(&server).await;
        server.clock.advance(CALLS_ENDED + Duration::from_secs(1));
        erase(&server).await;
    }
}

#[tokio::test]
async fn a_deletion_ends_every_session_and_every_waiting_call() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let other = server.connect();
    let session = other.log_in("alice", "password").await.expect("the right password");
    let wait = FetchWaitRequest { timeout_ms: 60_000, ..Default::default() };
    let waiting = other.call::<methods::FetchWait>(wait);
    let (waited, ()) = tokio::join!(waiting, async {
        tokio::task::yield_now().await;
        alice.delete().await;
    });
    assert_eq!(code(waited), (Status::Unauthorized, "auth.session_expired".into()));
    for token in [&session.session_token, &alice.token] {
        let peek = other.call_with::<methods::Peek>(PeekRequest::default(), token).await;
        assert_eq!(code(peek), (Status::Unauthorized, "auth.session_expired".into()));
    }
    // A repeat is a call without a session.
    let repeat = alice.client.call::<methods::DeleteAccount>(DeleteAccountRequest::default()).await;
    assert_eq!(code(repeat).0, Status::Unauthorized);
}

#[tokio::test]
async fn a_deletion_needs_a_fresh_login() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    server.clock.advance(Duration::from_secs(5 * 60 + 1));
    let refused = alice.refused::<methods::DeleteAccount>(DeleteAccountRequest::default()).await;
    refused.assert(Status::Unauthorized, "auth.fresh_login_required");
    let session = alice.client.log_in("alice", "password").await.expect("the right password");
    User { token: session.session_token, ..alice }.delete().await;
}

#[tokio::test]
async fn a_login_that_began_before_the_deletion_fails() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    let client = server.connect();
    let login = client.start_login("alice", "password").await.expect("started");
    alice.delete().await;
    let finished = client.call::<methods::OpaqueLoginFinish>(login.finish()).await;
    assert_eq!(code(finished), (Status::Unauthorized, "auth.failed".into()));
}

#[tokio::test]
async fn key_and_name_of_a_deleted_account_are_refused() {
    let server = Server::start().await;
    let alice = server.user("alice").await;
    alice.delete().await;
    let client = server.connect();
    let by_name = client.register("alice", "password", &new_identity()).await;
    assert_eq!(code(by_name), (Status::Forbidden, "auth.username_taken".into()));
    let by_key = client.register("carol", "password", &alice.identity).await;
    assert_eq!(code(by_key), (Status::Forbidden, "auth.identity_taken".into()));
}

#[tokio::test]
async fn a_group_does_not_list_a_deleted_member() {
    let server = Server::start().await;
    let (alice, bob) = (server.user("alice").await, server.user("bob").await);
    let id = Bytes::from_static(&[7; 16]);
    let create = CreateChannelRequest {
        member_keys: vec![alice.key(), bob.key()],
        channel_id: id.clone(),
        ..Default::default()
    };
    bob.ok::<methods::CreateChannel>(create).await;
    alice.delete().await;
    let list = ListGroupMembersRequest { channel_id: id, ..Default::default() };
    let listed = bob.ok::<methods::ListGroupMembers>(list).await;
    let names: Vec<_> = listed.members.iter().map(|member| member.username.as_str()).collect();
    assert_eq!(names, ["bob"]);
}
