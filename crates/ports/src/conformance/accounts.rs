//! Rules of [`crate::Accounts`].

use std::sync::Arc;

use qpq_domain::{IdentityKey, TokenHash, Username};
use tokio::task::JoinSet;

use super::{
    Factory,
    bench::{Bench, MINUTE, NOW, RegisteredAccount, new_account},
};
use crate::{
    NewAccount, NewSession, PasswordChange, PasswordChanged, Registration, Session, Stores,
};

fn token(n: u8) -> TokenHash {
    TokenHash::new([n; 32])
}

async fn open(stores: &Stores, n: u8, owner: RegisteredAccount) {
    let session = Session {
        account: owner.account,
        identity: owner.identity,
        device: None,
        authenticated_at: NOW,
        last_used_at: NOW,
        expires_at: NOW.plus(60 * MINUTE),
    };
    stores.sessions.create(NewSession { token: token(n), session }).await.expect("create");
}

async fn change(stores: &Stores, of: RegisteredAccount, by: u8, record: u8) -> PasswordChanged {
    let (account, session) = (of.account, token(by));
    let change = PasswordChange { account, session, opaque_record: vec![record; 192] };
    stores.accounts.change_password(change).await.expect("change")
}

async fn record(stores: &Stores, n: u8) -> u8 {
    let username = Username::parse(&format!("account{n}")).expect("a username");
    let credentials = stores.accounts.credentials(&username).await.expect("read");
    credentials.expect("there").opaque_record[0]
}

pub async fn a_registration_is_found_by_name_and_by_key(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let accounts = &bench.stores.accounts;
    let new = new_account("alice", 1, 7);
    let Ok(Registration::Registered(id)) = accounts.register(new.clone()).await else {
        panic!("alice is the first");
    };
    let credentials = accounts.credentials(&new.username).await.expect("read").expect("there");
    assert_eq!(
        (credentials.account, credentials.identity, &credentials.opaque_record),
        (id, new.identity, &new.opaque_record)
    );
    let by_name = accounts.by_username(&new.username).await.expect("read").expect("there");
    assert_eq!(
        (by_name.id, &by_name.username, by_name.identity, by_name.created_at),
        (id, &new.username, new.identity, NOW)
    );
    assert_eq!(accounts.by_identity(&new.identity).await.expect("read"), Some(by_name));

    let nobody = Username::parse("nobody").expect("a username");
    assert!(accounts.credentials(&nobody).await.expect("read").is_none());
    assert_eq!(accounts.by_username(&nobody).await.expect("read"), None);
    assert_eq!(accounts.by_identity(&IdentityKey::new([9; 32])).await.expect("read"), None);
}

pub async fn a_registration_never_overwrites(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let accounts = &bench.stores.accounts;
    let first = new_account("alice", 1, 1);
    accounts.register(first.clone()).await.expect("register");
    for (attempt, expected) in [
        (new_account("alice", 2, 2), Registration::UsernameTaken),
        (new_account("alice", 1, 2), Registration::UsernameTaken),
        (new_account("alice", 2, 1), Registration::UsernameTaken),
        (new_account("bob", 1, 1), Registration::IdentityTaken),
    ] {
        assert_eq!(accounts.register(attempt).await.expect("register"), expected);
    }
    let kept = accounts.credentials(&first.username).await.expect("read").expect("there");
    assert_eq!((kept.identity, kept.opaque_record), (first.identity, first.opaque_record));
    assert!(accounts.by_identity(&IdentityKey::new([2; 32])).await.expect("read").is_none());
    assert!(
        accounts.by_username(&new_account("bob", 1, 1).username).await.expect("read").is_none()
    );
}

pub async fn a_repeated_registration_is_recognised(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let accounts = &bench.stores.accounts;
    let new = new_account("alice", 1, 1);
    let Ok(Registration::Registered(id)) = accounts.register(new.clone()).await else {
        panic!("alice is the first");
    };
    let later = NewAccount { now: NOW.plus(MINUTE), ..new.clone() };
    assert_eq!(accounts.register(later).await.expect("register"), Registration::Repeated(id));
    let kept = accounts.by_identity(&new.identity).await.expect("read").expect("there");
    assert_eq!(kept.created_at, NOW);
}

pub async fn of_concurrent_registrations_one_wins(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let accounts = &bench.stores.accounts;
    for (same_name, loser) in
        [(true, Registration::UsernameTaken), (false, Registration::IdentityTaken)]
    {
        let mut attempts = JoinSet::new();
        for n in 0..16_u8 {
            let accounts = Arc::clone(accounts);
            let new = if same_name {
                new_account("same", 100 + n, n)
            } else {
                new_account(&format!("n{n}"), 50, n)
            };
            attempts.spawn(async move { (n, accounts.register(new).await.expect("register")) });
        }
        let outcomes = attempts.join_all().await;
        let (winners, losers): (Vec<_>, Vec<_>) = outcomes
            .into_iter()
            .partition(|(_, outcome)| matches!(outcome, Registration::Registered(_)));
        assert_eq!(winners.len(), 1);
        assert!(losers.iter().all(|(_, outcome)| *outcome == loser), "{losers:?}");
        let n = winners[0].0;
        let name = if same_name { "same".to_owned() } else { format!("n{n}") };
        let username = Username::parse(&name).expect("a username");
        let kept = accounts.credentials(&username).await.expect("read").expect("there");
        assert_eq!(kept.opaque_record, vec![n; 192]);
    }
}

pub async fn a_lookalike_of_a_taken_username_is_taken(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    let first = new_account("paypal", 1, 1);
    let accounts = &bench.stores.accounts;
    let Ok(Registration::Registered(id)) = accounts.register(first.clone()).await else {
        panic!("paypal is the first");
    };
    for crashed in [false, true] {
        let accounts = &bench.stores.accounts;
        for (attempt, expected) in [
            (new_account("paypa1", 2, 2), Registration::UsernameTaken),
            (new_account("\u{440}\u{430}ypal", 2, 2), Registration::UsernameTaken),
            // The username and the key are taken: the username is reported.
            (new_account("paypa1", 1, 1), Registration::UsernameTaken),
            (new_account("other", 1, 1), Registration::IdentityTaken),
            (first.clone(), Registration::Repeated(id)),
        ] {
            let registered = accounts.register(attempt).await.expect("register");
            assert_eq!(registered, expected, "after a crash: {crashed}");
        }
        assert!(accounts.by_identity(&IdentityKey::new([2; 32])).await.expect("read").is_none());
        bench.crash().await;
    }
}

pub async fn of_concurrent_lookalikes_one_wins(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let accounts = &bench.stores.accounts;
    // All have the skeleton "llll".
    let names: Vec<String> = (0..16_u8)
        .map(|n| (0..4).map(|bit| if n >> bit & 1 == 0 { 'l' } else { '1' }).collect())
        .collect();
    let mut attempts = JoinSet::new();
    for (n, name) in (1_u8..).zip(names) {
        let (accounts, new) = (Arc::clone(accounts), new_account(&name, n, n));
        attempts.spawn(async move { accounts.register(new).await.expect("register") });
    }
    let outcomes = attempts.join_all().await;
    let (winners, losers): (Vec<_>, Vec<_>) =
        outcomes.into_iter().partition(|outcome| matches!(outcome, Registration::Registered(_)));
    assert_eq!(winners.len(), 1);
    assert!(losers.iter().all(|outcome| *outcome == Registration::UsernameTaken), "{losers:?}");
}

pub async fn accounts_survive_a_crash(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    bench.crash().await;
    let kept =
        bench.stores.accounts.by_identity(&alice.identity).await.expect("read").expect("there");
    assert_eq!(kept.id, alice.account);
    let repeated =
        bench.stores.accounts.register(new_account("account1", 1, 1)).await.expect("register");
    assert_eq!(repeated, Registration::Repeated(alice.account));
}

pub async fn a_change_of_the_password_replaces_the_record_and_ends_the_other_sessions(
    factory: &dyn Factory,
) {
    let mut bench = Bench::new(factory).await;
    let (alice, bob) = (bench.account(1).await, bench.account(2).await);
    for (n, owner) in [(1, alice), (2, alice), (3, alice), (4, bob)] {
        open(&bench.stores, n, owner).await;
        bench.stores.sessions.find(&token(n)).await.expect("find");
    }
    let changed = PasswordChanged::Changed { ended_sessions: 2 };
    assert_eq!(change(&bench.stores, alice, 1, 7).await, changed);
    let repeated = PasswordChanged::Changed { ended_sessions: 0 };
    assert_eq!(change(&bench.stores, alice, 1, 7).await, repeated);
    for crashed in [false, true] {
        if crashed {
            bench.crash().await;
        }
        let stores = &bench.stores;
        assert_eq!((record(stores, 1).await, record(stores, 2).await), (7, 2));
        for (n, stays) in [(1, true), (2, false), (3, false), (4, true)] {
            let found = stores.sessions.find(&token(n)).await.expect("find");
            assert_eq!(found.is_some(), stays, "session {n}, crashed: {crashed}");
        }
    }
}

pub async fn an_ended_session_and_another_accounts_session_change_no_password(
    factory: &dyn Factory,
) {
    let bench = Bench::new(factory).await;
    let (alice, bob) = (bench.account(1).await, bench.account(2).await);
    open(&bench.stores, 1, alice).await;
    open(&bench.stores, 2, alice).await;
    open(&bench.stores, 3, bob).await;
    bench.stores.sessions.revoke(&token(1)).await.expect("revoke");
    for by in [1, 3, 9] {
        assert_eq!(change(&bench.stores, alice, by, 7).await, PasswordChanged::SessionEnded);
    }
    assert_eq!(record(&bench.stores, 1).await, 1);
    for n in [2, 3] {
        assert!(bench.stores.sessions.find(&token(n)).await.expect("find").is_some());
    }
}

/// Of two sessions that change the password concurrently, the first one ends the other.
pub async fn of_concurrent_changes_of_a_password_one_wins(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    for round in 0..20_u8 {
        let (a, b) = (10 + 2 * round, 11 + 2 * round);
        open(&bench.stores, a, alice).await;
        open(&bench.stores, b, alice).await;
        let changes = [a, b].map(|n| {
            let stores = bench.stores.clone();
            tokio::spawn(async move { change(&stores, alice, n, n).await })
        });
        let mut winners = Vec::new();
        for (n, task) in [a, b].into_iter().zip(changes) {
            if task.await.expect("no panic") != PasswordChanged::SessionEnded {
                winners.push(n);
            }
        }
        let [winner] = winners[..] else { panic!("one of two wins: {winners:?}") };
        assert_eq!(record(&bench.stores, 1).await, winner);
        for n in [a, b] {
            let found = bench.stores.sessions.find(&token(n)).await.expect("find");
            assert_eq!(found.is_some(), n == winner);
        }
    }
}

/// A login reads the record again after it has created its session. If the record is the one with
/// which the login started, a change that follows ends the session.
pub async fn a_session_created_during_a_change_ends_or_its_login_sees_the_new_record(
    factory: &dyn Factory,
) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    open(&bench.stores, 1, alice).await;
    for round in 0..50_u8 {
        let (old, new) = (record(&bench.stores, 1).await, 100 + round);
        let stores = bench.stores.clone();
        let login = tokio::spawn(async move {
            open(&stores, 10 + round, alice).await;
            record(&stores, 1).await
        });
        let changed = change(&bench.stores, alice, 1, new).await;
        assert_ne!(changed, PasswordChanged::SessionEnded);
        let seen = login.await.expect("no panic");
        let found = bench.stores.sessions.confirm(&token(10 + round)).await.expect("confirm");
        assert!(seen == new || (seen == old && found.is_none()), "round {round}: {seen} {found:?}");
    }
}
