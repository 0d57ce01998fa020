//! Reports, bans and blocks (420 to 426).

use std::time::Duration;

use bytes::Bytes;
use qpq_domain::Username;
use qpq_ports::{AuditAction, AuditActor, AuditPage};
use qpq_proto::{Status, methods, v1};

use crate::{
    harness::{START, Server, User, code, new_identity},
    user::message,
    waiters::Waiters,
};

const GROUP: Bytes = Bytes::from_static(&[0xee; 16]);
const NOW: u64 = START.0 / 1_000;
const MINUTE: Duration = Duration::from_secs(60);

/// Starts a server whose administrator is named root.
async fn server() -> Server {
    let root = Username::parse("root").expect("a name");
    Server::with(|config| config.admins = [root].into()).await
}

/// Returns a permanent ban from the server.
fn ban(user: &User) -> v1::BanUserRequest {
    v1::BanUserRequest { identity_key: user.key(), reason: "spam".into(), ..Default::default() }
}

fn unban(user: &User) -> v1::UnbanUserRequest {
    v1::UnbanUserRequest { identity_key: user.key(), ..Default::default() }
}

fn ban_from_group(user: &User) -> v1::BanUserRequest {
    v1::BanUserRequest { channel_id: GROUP, ..ban(user) }
}

fn unban_from_group(user: &User) -> v1::UnbanUserRequest {
    v1::UnbanUserRequest { channel_id: GROUP, ..unban(user) }
}

fn of_group() -> v1::ListBannedRequest {
    v1::ListBannedRequest { channel_id: GROUP, ..Default::default() }
}

fn block(user: &User) -> v1::BlockUserRequest {
    v1::BlockUserRequest { identity_key: user.key(), ..Default::default() }
}

fn unblock(user: &User) -> v1::BlockUserRequest {
    v1::BlockUserRequest { unblock: true, ..block(user) }
}

fn report(text: &'static [u8]) -> v1::ReportMessageRequest {
    v1::ReportMessageRequest {
        encrypted_report: text.into(),
        conversation_id: Bytes::from_static(b"friends"),
        ..Default::default()
    }
}

fn to_members(payload: &'static [u8]) -> v1::BatchEnqueueRequest {
    v1::BatchEnqueueRequest {
        payload: payload.into(),
        channel_id: GROUP,
        to_members: true,
        ..Default::default()
    }
}

fn entry(user: &User, reason: &str, banned_at: u64, expires_at: u64) -> v1::BannedUserEntry {
    v1::BannedUserEntry { identity_key: user.key(), reason: reason.into(), banned_at, expires_at }
}

impl User {
    async fn banned(&self, request: v1::ListBannedRequest) -> Vec<v1::BannedUserEntry> {
        self.ok::<methods::ListBanned>(request).await.users
    }

    async fn blocked(&self) -> Vec<Bytes> {
        self.ok::<methods::ListBlocked>(v1::ListBlockedRequest::default()).await.identity_keys
    }

    /// Creates a group of the user, who is its admin, and the others.
    async fn group(&self, others: &[&Self]) {
        let request = v1::CreateChannelRequest {
            member_keys: others.iter().map(|user| user.key()).collect(),
            channel_id: GROUP,
            ..Default::default()
        };
        self.ok::<methods::CreateChannel>(request).await;
    }

    async fn peek(&self) -> Vec<Bytes> {
        let request = v1::PeekRequest { all_channels: true, ..Default::default() };
        let payloads = self.ok::<methods::Peek>(request).await.payloads;
        payloads.into_iter().map(|envelope| envelope.data).collect()
    }
}

#[tokio::test]
async fn a_banned_user_is_logged_out_everywhere_and_cannot_log_in() {
    let server = server().await;
    let (root, bob, carol) =
        (server.admin("root").await, server.user("bob").await, server.user("carol").await);
    let elsewhere = bob.elsewhere(&server);
    bob.send(&bob, b"a note").await;
    assert!(root.ok::<methods::BanUser>(ban(&bob)).await.success);
    for device in [&bob, &elsewhere] {
        let refused = device.refused::<methods::Peek>(v1::PeekRequest::default()).await;
        refused.assert(Status::Unauthorized, "auth.session_expired");
    }
    let client = server.connect();
    let banned = || (Status::Forbidden, "auth.banned".to_owned());
    assert_eq!(code(client.log_in("bob", "password").await), banned());
    let failed = (Status::Unauthorized, "auth.failed".to_owned());
    assert_eq!(code(client.log_in("bob", "wrong").await), failed, "a wrong password tells nothing");
    carol.send(&bob, b"mail is accepted").await;
    assert_eq!(root.banned(v1::ListBannedRequest::default()).await, [entry(&bob, "spam", NOW, 0)]);

    assert!(root.ok::<methods::UnbanUser>(unban(&bob)).await.success);
    assert!(root.ok::<methods::UnbanUser>(unban(&bob)).await.success, "safe to repeat");
    assert_eq!(root.banned(v1::ListBannedRequest::default()).await, []);
    let bob = bob.again().await;
    assert_eq!(bob.peek().await, ["a note", "mail is accepted"]);
}

#[tokio::test]
async fn a_ban_ends_at_its_end_and_a_later_one_replaces_it() {
    let server = server().await;
    let (root, bob) = (server.admin("root").await, server.user("bob").await);
    root.ok::<methods::BanUser>(ban(&bob)).await;
    server.clock.advance(MINUTE);
    let later = v1::BanUserRequest { reason: "shorter".into(), duration_secs: 60, ..ban(&bob) };
    root.ok::<methods::BanUser>(later).await;
    let listed = root.banned(v1::ListBannedRequest::default()).await;
    assert_eq!(listed, [entry(&bob, "shorter", NOW + 60, NOW + 120)]);
    server.clock.advance(MINUTE - Duration::from_millis(1));
    let client = server.connect();
    assert_eq!(code(client.log_in("bob", "password").await).1, "auth.banned");
    server.clock.advance(Duration::from_millis(1));
    client.log_in("bob", "password").await.expect("the ban has ended");
    assert_eq!(root.banned(v1::ListBannedRequest::default()).await, []);
    // A duration beyond all times is a ban with an end.
    let endless = v1::BanUserRequest { duration_secs: u64::MAX, ..ban(&bob) };
    root.ok::<methods::BanUser>(endless).await;
    assert!(root.banned(v1::ListBannedRequest::default()).await[0].expires_at > NOW);
}

#[tokio::test]
async fn calls_that_wait_end_with_a_ban() {
    let root = Username::parse("root").expect("a name");
    let mut waiters = None;
    let server = Server::with_stores(
        |config| config.admins = [root].into(),
        |mut stores| {
            waiters = Some(Waiters::count(&mut stores));
            stores
        },
    )
    .await;
    let waiters = waiters.expect("the stores were wrapped");
    let (root, bob) = (server.admin("root").await, server.user("bob").await);
    let waiting = bob.elsewhere(&server);
    let waiting = tokio::spawn(async move {
        let request = v1::FetchWaitRequest { timeout_ms: 60_000, ..Default::default() };
        waiting.refused::<methods::FetchWait>(request).await
    });
    waiters.waited(1).await;
    root.ok::<methods::BanUser>(ban(&bob)).await;
    waiting.await.expect("no panic").assert(Status::Unauthorized, "auth.session_expired");
}

#[tokio::test]
async fn only_administrators_moderate_the_server() {
    let server = server().await;
    let (root, bob, carol) =
        (server.admin("root").await, server.user("bob").await, server.user("carol").await);
    let refused = [
        bob.refused::<methods::BanUser>(ban(&carol)).await,
        bob.refused::<methods::UnbanUser>(unban(&carol)).await,
        bob.refused::<methods::ListBanned>(v1::ListBannedRequest::default()).await,
        bob.refused::<methods::ListReports>(v1::ListReportsRequest::default()).await,
    ];
    for refused in refused {
        refused.assert(Status::Forbidden, "auth.admin_required");
    }
    // Nor does the admin of a group.
    bob.group(&[&carol]).await;
    bob.refused::<methods::BanUser>(ban(&carol))
        .await
        .assert(Status::Forbidden, "auth.admin_required");
    let anyone = server.connect();
    let required = (Status::Unauthorized, "auth.session_required".to_owned());
    assert_eq!(code(anyone.call::<methods::BanUser>(ban(&carol)).await), required);
    assert_eq!(root.banned(v1::ListBannedRequest::default()).await, []);
    let none = Server::start().await;
    let alice = none.user("root").await;
    alice
        .refused::<methods::BanUser>(v1::BanUserRequest {
            identity_key: carol.key(),
            ..Default::default()
        })
        .await
        .assert(Status::Forbidden, "auth.admin_required");
}

#[tokio::test]
async fn unknown_keys_own_keys_and_administrators_are_not_banned() {
    let admins = ["root", "toor"].map(|name| Username::parse(name).expect("a name"));
    let server = Server::with(|config| config.admins = admins.into()).await;
    let (root, toor) = (server.admin("root").await, server.admin("toor").await);
    let unknown = Bytes::copy_from_slice(new_identity().as_bytes());
    let nobody = v1::BanUserRequest { identity_key: unknown.clone(), ..Default::default() };
    root.refused::<methods::BanUser>(nobody).await.assert(Status::NotFound, "users.not_found");
    let nobody = v1::UnbanUserRequest { identity_key: unknown, ..Default::default() };
    root.refused::<methods::UnbanUser>(nobody).await.assert(Status::NotFound, "users.not_found");
    root.refused::<methods::BanUser>(ban(&root))
        .await
        .assert(Status::Forbidden, "moderation.own_account");
    root.refused::<methods::BanUser>(ban(&toor))
        .await
        .assert(Status::Forbidden, "moderation.administrator");
    toor.peek().await;
    let malformed = v1::BanUserRequest { identity_key: Bytes::new(), ..Default::default() };
    root.refused::<methods::BanUser>(malformed).await.assert_field("identity_key");
    let long = v1::BanUserRequest { reason: "r".repeat(1_025), ..ban(&toor) };
    root.refused::<methods::BanUser>(long).await.assert_field("reason");
    let channel = v1::BanUserRequest { channel_id: Bytes::from_static(b"short"), ..ban(&toor) };
    root.refused::<methods::BanUser>(channel).await.assert_field("channel_id");
}

#[tokio::test]
async fn an_admin_of_a_group_bans_a_member_from_it() {
    let server = server().await;
    let (root, alice, bob, carol) = (
        server.admin("root").await,
        server.user("alice").await,
        server.user("bob").await,
        server.user("carol").await,
    );
    alice.group(&[&bob, &carol]).await;
    bob.refused::<methods::BanUser>(ban_from_group(&carol))
        .await
        .assert(Status::Forbidden, "group.admin_required");
    bob.refused::<methods::ListBanned>(of_group())
        .await
        .assert(Status::Forbidden, "group.admin_required");
    assert!(alice.ok::<methods::BanUser>(ban_from_group(&bob)).await.success);
    let banned = (Status::Forbidden, "group.banned");
    bob.refused::<methods::BatchEnqueue>(to_members(b"spam")).await.assert(banned.0, banned.1);
    let commit = v1::BatchEnqueueRequest { commit: true, ..to_members(b"commit") };
    bob.refused::<methods::BatchEnqueue>(commit).await.assert(banned.0, banned.1);
    let add = v1::AddMembersRequest {
        channel_id: GROUP,
        member_keys: vec![bob.key()],
        ..Default::default()
    };
    alice.refused::<methods::AddMembers>(add.clone()).await.assert(banned.0, banned.1);
    bob.refused::<methods::BanUser>(ban_from_group(&carol))
        .await
        .assert(Status::Forbidden, "group.not_member");
    // The ban is of the group alone.
    bob.send(&alice, b"why?").await;
    assert_eq!(alice.banned(of_group()).await, [entry(&bob, "spam", NOW, 0)]);
    assert_eq!(root.banned(of_group()).await.len(), 1);
    assert_eq!(root.banned(v1::ListBannedRequest::default()).await, []);
    alice
        .refused::<methods::ListBanned>(v1::ListBannedRequest::default())
        .await
        .assert(Status::Forbidden, "auth.admin_required");

    alice.ok::<methods::UnbanUser>(unban_from_group(&bob)).await;
    bob.refused::<methods::BatchEnqueue>(to_members(b"hi"))
        .await
        .assert(Status::Forbidden, "group.not_member");
    assert_eq!(alice.ok::<methods::AddMembers>(add).await.added, 1);
    bob.ok::<methods::BatchEnqueue>(to_members(b"hi")).await;
    assert_eq!(carol.peek().await, ["hi"]);
    // An administrator of the server needs no membership.
    root.ok::<methods::BanUser>(ban_from_group(&bob)).await;
    let unknown =
        v1::ListBannedRequest { channel_id: Bytes::from_static(&[1; 16]), ..Default::default() };
    for user in [&root, &alice] {
        user.refused::<methods::ListBanned>(unknown.clone())
            .await
            .assert(Status::NotFound, "group.not_found");
    }
}

#[tokio::test]
async fn reports_reach_the_administrators_newest_first() {
    let server = server().await;
    let (root, bob, carol) =
        (server.admin("root").await, server.user("bob").await, server.user("carol").await);
    for (user, text) in [(&bob, b"one"), (&carol, b"two"), (&bob, b"one")] {
        assert!(user.ok::<methods::ReportMessage>(report(text)).await.accepted);
        server.clock.advance(MINUTE);
    }
    let all = root.ok::<methods::ListReports>(v1::ListReportsRequest::default()).await.reports;
    let short: Vec<_> = all
        .iter()
        .map(|one| (&one.encrypted_report[..], one.reporter_identity.clone(), one.timestamp))
        .collect();
    assert_eq!(short, [(&b"two"[..], carol.key(), NOW + 60), (&b"one"[..], bob.key(), NOW)]);
    assert_eq!(&all[0].conversation_id[..], b"friends");
    let second = v1::ListReportsRequest { limit: 1, offset: 1, ..Default::default() };
    let page = root.ok::<methods::ListReports>(second).await.reports;
    assert_eq!(page, all[1..]);
    let page = AuditPage { before: None, limit: 10 };
    let audit = server.rpc.app().stores.audit.list(page).await.expect("audit");
    assert_eq!(audit.len(), 2);
    for entry in audit {
        assert_eq!(entry.action, AuditAction::ReadReports);
        assert_eq!(entry.actor, AuditActor::Account(root.identity));
    }
}

#[tokio::test]
async fn a_page_of_the_largest_reports_fits_an_answer() {
    let server = server().await;
    let (root, bob) = (server.admin("root").await, server.user("bob").await);
    let largest = |n: u8| v1::ReportMessageRequest {
        encrypted_report: vec![n; 32 << 10].into(),
        conversation_id: vec![n; 64].into(),
        ..Default::default()
    };
    for n in 0..120 {
        bob.ok::<methods::ReportMessage>(largest(n)).await;
    }
    let mut seen = Vec::new();
    loop {
        let offset = u32::try_from(seen.len()).expect("few");
        let request = v1::ListReportsRequest { limit: 1_000, offset, ..Default::default() };
        let page = root.ok::<methods::ListReports>(request).await.reports;
        if page.is_empty() {
            break;
        }
        seen.extend(page.into_iter().map(|report| report.encrypted_report[0]));
    }
    assert_eq!(seen, (0..120).rev().collect::<Vec<_>>());
}

#[tokio::test]
async fn reports_that_are_empty_or_too_large_are_refused() {
    let server = server().await;
    let bob = server.user("bob").await;
    bob.refused::<methods::ReportMessage>(report(b"")).await.assert_field("encrypted_report");
    let large = v1::ReportMessageRequest {
        encrypted_report: vec![1; (32 << 10) + 1].into(),
        ..report(b"")
    };
    bob.refused::<methods::ReportMessage>(large).await.assert_field("encrypted_report");
    let long = v1::ReportMessageRequest { conversation_id: vec![1; 65].into(), ..report(b"x") };
    bob.refused::<methods::ReportMessage>(long).await.assert_field("conversation_id");
}

#[tokio::test]
async fn an_account_has_a_budget_of_reports() {
    let server = Server::with(|config| config.limits.enabled = true).await;
    let bob = server.user("bob").await;
    let numbered =
        |n: u8| v1::ReportMessageRequest { encrypted_report: vec![n].into(), ..Default::default() };
    for n in 0..20 {
        bob.ok::<methods::ReportMessage>(numbered(n)).await;
    }
    bob.refused::<methods::ReportMessage>(numbered(20))
        .await
        .assert(Status::RateLimited, "rpc.rate_limited");
}

#[tokio::test]
async fn a_blocked_sender_is_refused_in_every_form_of_a_message() {
    let server = server().await;
    let (alice, bob, mallory) =
        (server.user("alice").await, server.user("bob").await, server.user("mallory").await);
    let with_id = |payload: &'static [u8], n: u8| v1::EnqueueRequest {
        message_id: vec![n; 16].into(),
        ..message(&bob, payload)
    };
    let first = mallory.ok::<methods::Enqueue>(with_id(b"before", 1)).await;
    assert!(bob.ok::<methods::BlockUser>(block(&mallory)).await.success);
    assert!(bob.ok::<methods::BlockUser>(block(&mallory)).await.success, "safe to repeat");
    assert_eq!(bob.blocked().await, [mallory.key()]);

    let refused = (Status::Forbidden, "delivery.refused");
    mallory.refused::<methods::Enqueue>(message(&bob, b"spam")).await.assert(refused.0, refused.1);
    let again = mallory.ok::<methods::Enqueue>(with_id(b"before", 1)).await;
    assert_eq!((again.seq, again.duplicate), (first.seq, true));
    let batch = v1::BatchEnqueueRequest {
        recipient_keys: vec![alice.key(), bob.key()],
        payload: Bytes::from_static(b"fan-out"),
        ..Default::default()
    };
    let results = mallory.ok::<methods::BatchEnqueue>(batch).await.results;
    let short: Vec<_> = results.iter().map(|one| (one.status, &*one.code, one.seq)).collect();
    assert_eq!(short, [(0, "", 1), (3, "delivery.refused", 0)]);

    mallory.group(&[&alice, &bob]).await;
    let sent = mallory.ok::<methods::BatchEnqueue>(to_members(b"to all")).await;
    assert_eq!((sent.results[0].status, &*sent.results[0].code), (0, "delivery.partial"));
    assert_eq!(bob.peek().await, ["before"]);
    assert_eq!(alice.peek().await, ["fan-out", "to all"]);

    assert!(bob.ok::<methods::BlockUser>(unblock(&mallory)).await.success);
    assert!(bob.ok::<methods::BlockUser>(unblock(&mallory)).await.success, "safe to repeat");
    assert_eq!(bob.blocked().await, [] as [Bytes; 0]);
    mallory.send(&bob, b"sorry").await;
    assert_eq!(bob.peek().await, ["before", "sorry"]);
}

#[tokio::test]
async fn unknown_keys_and_the_own_key_are_not_blocked() {
    let server = server().await;
    let bob = server.user("bob").await;
    let unknown = v1::BlockUserRequest {
        identity_key: Bytes::copy_from_slice(new_identity().as_bytes()),
        ..Default::default()
    };
    for unblock in [false, true] {
        bob.refused::<methods::BlockUser>(v1::BlockUserRequest { unblock, ..unknown.clone() })
            .await
            .assert(Status::NotFound, "users.not_found");
    }
    bob.refused::<methods::BlockUser>(block(&bob))
        .await
        .assert(Status::Forbidden, "moderation.own_account");
    let malformed =
        v1::BlockUserRequest { identity_key: Bytes::from_static(&[1; 31]), ..Default::default() };
    bob.refused::<methods::BlockUser>(malformed).await.assert_field("identity_key");
}
