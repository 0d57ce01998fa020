//! Rules of [`crate::Bans`].

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use qpq_domain::{IdentityKey, TokenHash, UnixMillis};
use tokio::task::JoinSet;

use super::{
    Factory,
    bench::{Bench, MINUTE, NOW, RegisteredAccount, all},
    groups::{G, direct, to_others},
    maintenance::sweep_all,
};
use crate::{
    AuditAction, AuditActor, AuditEntry, AuditPage, Ban, BanEffects, BanRefusal, BanScope,
    Creation, GroupRefusal, ModerationRight, Moderator, NewBan, NewSession, Session,
    SessionCreation, Stores, Unban,
};

const SERVER: BanScope = BanScope::Server;
const GROUP: BanScope = BanScope::Group(G);
const DAY: Duration = Duration::from_secs(86_400);

fn moderator(account: RegisteredAccount, right: ModerationRight) -> Moderator {
    Moderator { account: account.account, identity: account.identity, right }
}

fn administrator(account: RegisteredAccount) -> Moderator {
    moderator(account, ModerationRight::Server)
}

fn group_admin(account: RegisteredAccount) -> Moderator {
    moderator(account, ModerationRight::Group)
}

/// Creates a permanent ban.
fn ban(scope: BanScope, moderator: Moderator, subject: RegisteredAccount) -> NewBan {
    NewBan {
        scope,
        subject: subject.identity,
        moderator,
        reason: "spam".into(),
        duration: None,
        now: NOW,
    }
}

fn unban(scope: BanScope, moderator: Moderator, subject: RegisteredAccount) -> Unban {
    Unban { scope, subject: subject.identity, moderator, now: NOW }
}

fn session(owner: RegisteredAccount, n: u8, now: UnixMillis) -> NewSession {
    let session = Session {
        account: owner.account,
        identity: owner.identity,
        device: None,
        authenticated_at: now,
        last_used_at: now,
        expires_at: now.plus(DAY),
    };
    NewSession { token: TokenHash::new([n; 32]), session }
}

impl Bench {
    async fn ban(&self, ban: NewBan) -> Result<BanEffects, BanRefusal> {
        self.stores.bans.ban(ban).await.expect("ban")
    }

    async fn unban(&self, unban: Unban) -> Result<bool, BanRefusal> {
        self.stores.bans.unban(unban).await.expect("unban")
    }

    async fn log_in(&self, owner: RegisteredAccount, n: u8, now: UnixMillis) -> SessionCreation {
        self.stores.sessions.create(session(owner, n, now)).await.expect("create")
    }

    async fn has_session(&self, n: u8) -> bool {
        self.stores.sessions.confirm(&TokenHash::new([n; 32])).await.expect("confirm").is_some()
    }

    async fn bans(
        &self,
        scope: BanScope,
        moderator: Moderator,
        now: UnixMillis,
    ) -> Result<Vec<Ban>, BanRefusal> {
        self.stores.bans.list(scope, moderator, 100, now).await.expect("list")
    }

    async fn audit(&self) -> Vec<AuditEntry> {
        let page = AuditPage { before: None, limit: 100 };
        self.stores.audit.list(page).await.expect("audit")
    }
}

pub async fn a_ban_of_the_server_ends_all_sessions_and_refuses_new_ones(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    let (root, bob, carol) =
        (bench.account(1).await, bench.account(2).await, bench.account(3).await);
    for (owner, n) in [(bob, 1), (bob, 2), (carol, 3)] {
        assert_eq!(bench.log_in(owner, n, NOW).await, SessionCreation::Created);
    }
    // The sessions are in caches.
    for n in 1..=3 {
        bench.stores.sessions.find(&TokenHash::new([n; 32])).await.expect("find").expect("alive");
    }
    let effects = bench.ban(ban(SERVER, administrator(root), bob)).await;
    assert_eq!(effects, Ok(BanEffects { ended_sessions: 2, was_member: false }));
    for (n, lives) in [(1, false), (2, false), (3, true)] {
        let found = bench.stores.sessions.find(&TokenHash::new([n; 32])).await.expect("find");
        assert_eq!((found.is_some(), bench.has_session(n).await), (lives, lives), "{n}");
    }
    assert_eq!(bench.log_in(bob, 4, NOW).await, SessionCreation::Banned);
    assert!(!bench.has_session(4).await);
    bench.crash().await;
    assert_eq!(bench.log_in(bob, 4, NOW.plus(100 * DAY)).await, SessionCreation::Banned);
    assert_eq!(bench.log_in(carol, 5, NOW).await, SessionCreation::Created);
    let listed = bench.bans(SERVER, administrator(root), NOW).await.expect("allowed");
    let expected =
        Ban { identity: bob.identity, reason: "spam".into(), banned_at: NOW, expires_at: None };
    assert_eq!(listed, [expected]);
}

pub async fn a_ban_with_an_end_ends_by_itself(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let accounts = bench.group(2).await;
    let (alice, bob) = (accounts[0], accounts[1]);
    for scope in [SERVER, GROUP] {
        let brief = NewBan { duration: Some(5 * MINUTE), ..ban(scope, administrator(alice), bob) };
        bench.ban(brief).await.expect("allowed");
    }
    let (before, end) =
        (NOW.plus(5 * MINUTE).minus(Duration::from_millis(1)), NOW.plus(5 * MINUTE));
    let to_others = || to_others(bob, "hi");
    assert_eq!(bench.log_in(bob, 1, before).await, SessionCreation::Banned);
    assert_eq!(bench.send_to_group(to_others().at(before)).await, Err(GroupRefusal::Banned));
    assert_eq!(bench.log_in(bob, 1, end).await, SessionCreation::Created);
    assert_eq!(bench.send_to_group(to_others().at(end)).await, Err(GroupRefusal::NotMember));
    for scope in [SERVER, GROUP] {
        let listed = bench.bans(scope, administrator(alice), before).await.expect("allowed");
        assert_eq!(listed[0].expires_at, Some(end));
        assert_eq!(bench.bans(scope, administrator(alice), end).await, Ok(vec![]));
    }
    assert_eq!(sweep_all(&bench, before).await, 0);
    assert_eq!(sweep_all(&bench, end).await, 2);
    assert_eq!(bench.unban(unban(SERVER, administrator(alice), bob)).await, Ok(false));
}

pub async fn a_later_ban_replaces_the_reason_and_the_end(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let accounts = bench.group(2).await;
    let (alice, bob) = (accounts[0], accounts[1]);
    for scope in [SERVER, GROUP] {
        bench.ban(ban(scope, administrator(alice), bob)).await.expect("allowed");
        let later = NewBan {
            reason: "calmed down".into(),
            duration: Some(MINUTE),
            now: NOW.plus(MINUTE),
            ..ban(scope, administrator(alice), bob)
        };
        bench.ban(later).await.expect("allowed");
        let listed = bench.bans(scope, administrator(alice), NOW.plus(MINUTE)).await;
        let expected = Ban {
            identity: bob.identity,
            reason: "calmed down".into(),
            banned_at: NOW.plus(MINUTE),
            expires_at: Some(NOW.plus(2 * MINUTE)),
        };
        assert_eq!(listed, Ok(vec![expected]));
    }
    assert_eq!(bench.log_in(bob, 1, NOW.plus(2 * MINUTE)).await, SessionCreation::Created);
}

pub async fn an_unban_ends_a_ban(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let accounts = bench.group(2).await;
    let (alice, bob) = (accounts[0], accounts[1]);
    for scope in [SERVER, GROUP] {
        bench.ban(ban(scope, administrator(alice), bob)).await.expect("allowed");
        assert_eq!(bench.unban(unban(scope, administrator(alice), bob)).await, Ok(true));
        assert_eq!(bench.unban(unban(scope, administrator(alice), bob)).await, Ok(false));
        assert_eq!(bench.bans(scope, administrator(alice), NOW).await, Ok(vec![]));
    }
    assert_eq!(bench.log_in(bob, 1, NOW).await, SessionCreation::Created);
    assert_eq!(bench.add(alice, &[bob]).await, Ok(1));
}

pub async fn unknown_accounts_and_the_own_account_are_not_banned(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let accounts = bench.group(2).await;
    let alice = accounts[0];
    let nobody = RegisteredAccount { identity: IdentityKey::new([99; 32]), ..accounts[1] };
    for scope in [SERVER, GROUP] {
        for (subject, refusal) in
            [(nobody, BanRefusal::NoSuchAccount), (alice, BanRefusal::OwnAccount)]
        {
            assert_eq!(bench.ban(ban(scope, administrator(alice), subject)).await, Err(refusal));
        }
        let unbanned = bench.unban(unban(scope, administrator(alice), nobody)).await;
        assert_eq!(unbanned, Err(BanRefusal::NoSuchAccount));
    }
    assert_eq!(bench.log_in(alice, 1, NOW).await, SessionCreation::Created);
    assert_eq!(bench.roles(alice).await.len(), 2);
    assert_eq!(bench.audit().await, []);
}

pub async fn of_a_ban_and_concurrent_logins_no_session_remains(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let (root, bob) = (bench.account(1).await, bench.account(2).await);
    for round in 0..12_u8 {
        let mut logins = JoinSet::new();
        let banning = {
            let bans = Arc::clone(&bench.stores.bans);
            tokio::spawn(async move { bans.ban(ban(SERVER, administrator(root), bob)).await })
        };
        for n in 0..8 {
            let sessions = Arc::clone(&bench.stores.sessions);
            let new = session(bob, round * 8 + n, NOW);
            logins.spawn(async move { sessions.create(new).await.expect("create") });
        }
        logins.join_all().await;
        banning.await.expect("no panic").expect("ban").expect("allowed");
        for n in 0..8 {
            assert!(!bench.has_session(round * 8 + n).await, "round {round}, {n}");
        }
        assert_eq!(bench.unban(unban(SERVER, administrator(root), bob)).await, Ok(true));
    }
}

pub async fn a_ban_of_a_group_removes_the_member_and_refuses_its_messages(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    let accounts = bench.group(3).await;
    let [alice, bob, carol] = accounts[..] else { panic!("three") };
    let banned = bench.ban(ban(GROUP, group_admin(alice), bob)).await;
    assert_eq!(banned, Ok(BanEffects { ended_sessions: 0, was_member: true }));
    bench.crash().await;
    let members: BTreeSet<_> = bench.roles(alice).await.into_iter().map(|(name, _)| name).collect();
    assert_eq!(members, BTreeSet::from(["account1".to_owned(), "account3".to_owned()]));
    let commit = super::groups::commit(bob, "mine", 0);
    for message in [to_others(bob, "spam"), commit.clone(), commit.to(&[alice])] {
        assert_eq!(bench.send_to_group(message).await, Err(GroupRefusal::Banned));
    }
    assert_eq!(bench.waiting(all(alice)).await, [""; 0]);
    bench.send_to_group(to_others(carol, "quiet now")).await.expect("a member");
    assert_eq!(bench.waiting(all(bob)).await, [""; 0]);
    assert_eq!(bench.waiting(all(alice)).await, ["quiet now"]);
    // A ban of the last admin makes the oldest member an admin.
    let banned = bench.ban(ban(GROUP, administrator(bob), alice)).await;
    assert_eq!(banned, Ok(BanEffects { ended_sessions: 0, was_member: true }));
    assert_eq!(bench.add(carol, &[]).await, Ok(0));
    assert_eq!(bench.log_in(bob, 1, NOW).await, SessionCreation::Created);
}

pub async fn a_banned_account_is_not_added_to_the_group(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let accounts = bench.group(2).await;
    let [alice, bob] = accounts[..] else { panic!("two") };
    let stranger = bench.account(9).await;
    // An account may be banned before it is a member.
    let effects = bench.ban(ban(GROUP, group_admin(alice), stranger)).await;
    assert_eq!(effects, Ok(BanEffects::default()));
    bench.ban(ban(GROUP, group_admin(alice), bob)).await.expect("allowed");
    let carol = bench.account(3).await;
    for banned in [bob, stranger] {
        assert_eq!(bench.add(alice, &[carol, banned]).await, Err(GroupRefusal::Banned));
    }
    assert_eq!(bench.roles(alice).await.len(), 1, "all or none");
    assert_eq!(bench.unban(unban(GROUP, group_admin(alice), bob)).await, Ok(true));
    assert_eq!(bench.add(alice, &[carol, bob]).await, Ok(2));
}

pub async fn a_direct_group_does_not_get_back_a_banned_member(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let (alice, bob) = (bench.account(1).await, bench.account(2).await);
    let Ok(Creation::Created(id)) = bench.create(direct(alice, 1, bob)).await else {
        panic!("a new group")
    };
    bench.ban(ban(BanScope::Group(id), group_admin(alice), bob)).await.expect("allowed");
    assert_eq!(bench.create(direct(bob, 2, alice)).await, Err(GroupRefusal::Banned));
    assert_eq!(bench.create(direct(alice, 3, bob)).await, Ok(Creation::Existed(id)));
    let roles = bench.stores.groups.role(id, bob.account).await.expect("role");
    assert_eq!(roles, Ok(None));
}

pub async fn only_admins_of_a_group_ban_from_it(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let accounts = bench.group(3).await;
    let [alice, bob, carol] = accounts[..] else { panic!("three") };
    let stranger = bench.account(9).await;
    for (actor, refusal) in [(bob, GroupRefusal::NotAdmin), (stranger, GroupRefusal::NotMember)] {
        let refusal = BanRefusal::Group(refusal);
        assert_eq!(bench.ban(ban(GROUP, group_admin(actor), carol)).await, Err(refusal));
        assert_eq!(bench.unban(unban(GROUP, group_admin(actor), carol)).await, Err(refusal));
        assert_eq!(bench.bans(GROUP, group_admin(actor), NOW).await, Err(refusal));
    }
    let elsewhere = BanScope::Group(qpq_domain::GroupId::new([1; 16]));
    let not_found = BanRefusal::Group(GroupRefusal::NotFound);
    for moderator in [group_admin(alice), administrator(stranger)] {
        assert_eq!(bench.ban(ban(elsewhere, moderator, carol)).await, Err(not_found));
        assert_eq!(bench.unban(unban(elsewhere, moderator, carol)).await, Err(not_found));
        assert_eq!(bench.bans(elsewhere, moderator, NOW).await, Err(not_found));
    }
    assert_eq!(bench.roles(alice).await.len(), 3);
    let banned = bench.ban(ban(GROUP, administrator(stranger), carol)).await;
    assert_eq!(banned.map(|effects| effects.was_member), Ok(true));
    assert_eq!(bench.bans(GROUP, group_admin(alice), NOW).await.map(|bans| bans.len()), Ok(1));
    assert_eq!(bench.bans(SERVER, administrator(stranger), NOW).await, Ok(vec![]));
}

pub async fn a_group_that_is_removed_takes_its_bans_along(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let accounts = bench.group(2).await;
    let [alice, bob] = accounts[..] else { panic!("two") };
    bench.ban(ban(GROUP, group_admin(alice), bob)).await.expect("allowed");
    bench.ban(ban(GROUP, administrator(bob), alice)).await.expect("allowed");
    let refused = bench.bans(GROUP, administrator(alice), NOW).await;
    assert_eq!(refused, Err(BanRefusal::Group(GroupRefusal::NotFound)), "no member was left");
    let again = bench.stores.groups.role(G, alice.account).await.expect("role");
    assert_eq!(again, Err(GroupRefusal::NotFound));
}

pub async fn of_a_ban_and_concurrent_additions_the_ban_wins(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let accounts = bench.group(2).await;
    let [alice, bob] = accounts[..] else { panic!("two") };
    for round in 0..12 {
        let mut tasks = JoinSet::new();
        for _ in 0..4 {
            let groups = Arc::clone(&bench.stores.groups);
            tasks.spawn(async move {
                let role = qpq_domain::Role::Member;
                let added = groups.add_members(G, alice.account, vec![bob.identity], role, NOW);
                let added = added.await.expect("add");
                assert!(matches!(added, Ok(_) | Err(GroupRefusal::Banned)), "{added:?}");
            });
        }
        bench.ban(ban(GROUP, group_admin(alice), bob)).await.expect("allowed");
        tasks.join_all().await;
        let role = bench.stores.groups.role(G, bob.account).await.expect("role");
        assert_eq!(role, Ok(None), "round {round}");
        bench.unban(unban(GROUP, group_admin(alice), bob)).await.expect("allowed");
    }
}

pub async fn a_ban_during_sends_lets_no_later_message_through(factory: &dyn Factory) {
    async fn send(stores: Stores, from: RegisteredAccount, round: usize) -> usize {
        let mut accepted = 0;
        for n in 0..200 {
            match stores.groups.send(to_others(from, &format!("{round}.{n}"))).await {
                Ok(Ok(_)) => accepted += 1,
                Ok(Err(GroupRefusal::Banned)) => return accepted,
                other => panic!("{other:?}"),
            }
        }
        accepted
    }
    let bench = Bench::new(factory).await;
    let accounts = bench.group(3).await;
    let [alice, bob, carol] = accounts[..] else { panic!("three") };
    for round in 0..6 {
        let sending = tokio::spawn(send(bench.stores.clone(), bob, round));
        for _ in 0..round * 3 {
            tokio::task::yield_now().await;
        }
        bench.ban(ban(GROUP, group_admin(alice), bob)).await.expect("allowed");
        let refused = bench.send_to_group(to_others(bob, "late")).await;
        assert_eq!(refused, Err(GroupRefusal::Banned));
        let accepted = sending.await.expect("no panic");
        for member in [alice, carol] {
            assert_eq!(bench.drain(all(member)).await.len(), accepted, "all or nothing");
        }
        bench.unban(unban(GROUP, group_admin(alice), bob)).await.expect("allowed");
        assert_eq!(bench.add(alice, &[bob]).await, Ok(1));
    }
}

pub async fn every_ban_and_unban_is_in_the_audit_trail(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    let accounts = bench.group(2).await;
    let [alice, bob] = accounts[..] else { panic!("two") };
    for scope in [SERVER, GROUP] {
        bench.ban(ban(scope, administrator(alice), bob)).await.expect("allowed");
        bench.unban(unban(scope, administrator(alice), bob)).await.expect("allowed");
        bench.unban(unban(scope, administrator(alice), bob)).await.expect("allowed");
    }
    bench.crash().await;
    let entries = bench.audit().await;
    let short: Vec<_> =
        entries.iter().map(|entry| (entry.action, entry.group, &*entry.reason)).collect();
    let expected = [
        (AuditAction::Unban, Some(G), ""),
        (AuditAction::Ban, Some(G), "spam"),
        (AuditAction::Unban, None, ""),
        (AuditAction::Ban, None, "spam"),
    ];
    assert_eq!(short, expected);
    for entry in &entries {
        assert_eq!(entry.actor, AuditActor::Account(alice.identity));
        assert_eq!((entry.subject, entry.at), (Some(bob.identity), NOW));
    }
    assert!(entries.is_sorted_by(|newer, older| newer.id > older.id));
    let page = AuditPage { before: Some(entries[0].id), limit: 2 };
    assert_eq!(bench.stores.audit.list(page).await.expect("audit"), entries[1..3]);
}

pub async fn a_clock_that_is_ahead_ends_no_ban(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    bench.backend.set_clock(NOW).await;
    let (root, bob) = (bench.account(1).await, bench.account(2).await);
    let brief = NewBan { duration: Some(DAY), ..ban(SERVER, administrator(root), bob) };
    bench.ban(brief).await.expect("allowed");
    let ahead = NOW.plus(100 * DAY);
    assert_eq!(sweep_all(&bench, ahead).await, 0);
    assert_eq!(bench.log_in(bob, 1, ahead).await, SessionCreation::Banned);
    let listed = bench.bans(SERVER, administrator(root), ahead).await;
    assert_eq!(listed.map(|bans| bans.len()), Ok(1));
}
