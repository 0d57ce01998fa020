//! Rules of [`crate::Sessions`].

use std::sync::Arc;

use qpq_domain::{DeviceId, TokenHash};

use super::{
    Factory,
    bench::{Bench, MINUTE, NOW, RegisteredAccount},
};
use crate::{NewSession, OldSessions, Session};

fn token(n: u8) -> TokenHash {
    TokenHash::new([n; 32])
}

fn session(owner: RegisteredAccount, device: Option<u8>) -> Session {
    Session {
        account: owner.account,
        identity: owner.identity,
        device: device.map(|n| DeviceId::new([n; 16])),
        authenticated_at: NOW,
        last_used_at: NOW,
        expires_at: NOW.plus(60 * MINUTE),
    }
}

async fn open(bench: &Bench, n: u8, owner: RegisteredAccount) -> Session {
    let session = session(owner, Some(n));
    let new = NewSession { token: token(n), session: session.clone() };
    bench.stores.sessions.create(new).await.expect("create");
    session
}

pub async fn a_session_is_found_until_it_is_revoked(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    let sessions = &bench.stores.sessions;
    assert_eq!(sessions.find(&token(1)).await.expect("find"), None);
    let bound = open(&bench, 1, alice).await;
    let free = session(alice, None);
    sessions.create(NewSession { token: token(2), session: free.clone() }).await.expect("create");
    for _ in 0..2 {
        assert_eq!(sessions.find(&token(1)).await.expect("find"), Some(bound.clone()));
        assert_eq!(sessions.find(&token(2)).await.expect("find"), Some(free.clone()));
        assert_eq!(sessions.confirm(&token(2)).await.expect("confirm"), Some(free.clone()));
    }
    assert_eq!(sessions.revoke(&token(1)).await.expect("revoke"), 1);
    assert_eq!(sessions.revoke(&token(1)).await.expect("revoke"), 0);
    assert_eq!(sessions.find(&token(1)).await.expect("find"), None);
    assert_eq!(sessions.confirm(&token(1)).await.expect("confirm"), None);
    assert_eq!(sessions.find(&token(2)).await.expect("find"), Some(free));
}

pub async fn a_touch_moves_the_expiry(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    let opened = open(&bench, 1, alice).await;
    bench.stores.sessions.find(&token(1)).await.expect("find");
    let (used, expires) = (NOW.plus(MINUTE), NOW.plus(90 * MINUTE));
    bench.stores.sessions.touch(&token(1), used, expires).await.expect("touch");
    let touched = Session { last_used_at: used, expires_at: expires, ..opened };
    assert_eq!(bench.stores.sessions.find(&token(1)).await.expect("find"), Some(touched.clone()));
    bench.crash().await;
    assert_eq!(bench.stores.sessions.find(&token(1)).await.expect("find"), Some(touched));
    bench
        .stores
        .sessions
        .touch(&token(9), used, expires)
        .await
        .expect("a missing session is not an error");
    assert_eq!(bench.stores.sessions.find(&token(9)).await.expect("find"), None);
}

pub async fn revoking_all_spares_other_accounts(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let (alice, bob) = (bench.account(1).await, bench.account(2).await);
    for n in 1..=3 {
        open(&bench, n, alice).await;
        bench.stores.sessions.find(&token(n)).await.expect("find");
    }
    let bobs = open(&bench, 4, bob).await;
    assert_eq!(bench.stores.sessions.revoke_all(alice.account).await.expect("revoke"), 3);
    assert_eq!(bench.stores.sessions.revoke_all(alice.account).await.expect("revoke"), 0);
    for n in 1..=3 {
        assert_eq!(bench.stores.sessions.find(&token(n)).await.expect("find"), None);
    }
    assert_eq!(bench.stores.sessions.find(&token(4)).await.expect("find"), Some(bobs));
}

/// Lookups race with the revocation, and none of them may leave the session in a cache.
pub async fn a_revoked_session_never_comes_back(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    for n in 0..100_u8 {
        open(&bench, n, alice).await;
        let finders: Vec<_> = (0..4)
            .map(|_| {
                let sessions = Arc::clone(&bench.stores.sessions);
                tokio::spawn(async move { sessions.find(&token(n)).await.expect("find") })
            })
            .collect();
        assert_eq!(bench.stores.sessions.revoke(&token(n)).await.expect("revoke"), 1);
        assert_eq!(bench.stores.sessions.find(&token(n)).await.expect("find"), None, "round {n}");
        for finder in finders {
            finder.await.expect("no panic");
        }
        assert_eq!(bench.stores.sessions.find(&token(n)).await.expect("find"), None, "round {n}");
    }
}

pub async fn sessions_survive_a_crash(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    let alice = bench.account(1).await;
    let kept = open(&bench, 1, alice).await;
    open(&bench, 2, alice).await;
    bench.stores.sessions.revoke(&token(2)).await.expect("revoke");
    bench.crash().await;
    assert_eq!(bench.stores.sessions.find(&token(1)).await.expect("find"), Some(kept));
    assert_eq!(bench.stores.sessions.find(&token(2)).await.expect("find"), None);
}

pub async fn a_new_history_ends_all_sessions_or_keeps_them(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    let (alice, bob) = (bench.account(1).await, bench.account(2).await);
    let (first, second) = (open(&bench, 1, alice).await, open(&bench, 2, bob).await);
    let begun = bench.stores.maintenance.begin_history(OldSessions::Keep).await.expect("begun");
    assert_eq!(begun.ended_sessions, 0);
    for (n, session) in [(1, &first), (2, &second)] {
        let found = bench.stores.sessions.find(&token(n)).await.expect("find");
        assert_eq!(found.as_ref(), Some(session));
    }
    let begun = bench.stores.maintenance.begin_history(OldSessions::End).await.expect("begun");
    assert_eq!(begun.ended_sessions, 2);
    for restarted in [false, true] {
        if restarted {
            bench.crash().await;
        }
        for n in [1, 2] {
            assert_eq!(bench.stores.sessions.find(&token(n)).await.expect("find"), None);
            assert_eq!(bench.stores.sessions.confirm(&token(n)).await.expect("confirm"), None);
        }
    }
    open(&bench, 3, alice).await;
    assert!(bench.stores.sessions.find(&token(3)).await.expect("find").is_some(), "a new login");
}
