//! Rules of [`crate::Accounts`].

use std::sync::Arc;

use qpq_domain::{IdentityKey, Username};
use tokio::task::JoinSet;

use super::{
    Factory,
    bench::{Bench, NOW, new_account},
};
use crate::{NewAccount, Registration};

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
    let later = NewAccount { now: NOW.plus(super::bench::MINUTE), ..new.clone() };
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
