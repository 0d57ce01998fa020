//! Rules of [`crate::Invites`], and of registrations with an invite.

use std::{sync::Arc, time::Duration};

use qpq_domain::{InviteHash, UnixMillis, Username};
use tokio::task::JoinSet;

use super::{
    Factory,
    bench::{Bench, MINUTE, NOW, new_account},
};
use crate::{
    Admission, EXPIRED_INVITES, Invite, InviteRevocation, NewAccount, NewInvite, Registration,
};

fn code(n: u8) -> InviteHash {
    InviteHash::new([n; 32])
}

/// Returns an invite for any username, with a lifetime of an hour.
fn invite(n: u8, uses: u32) -> NewInvite {
    NewInvite {
        code: code(n),
        uses,
        lifetime: 60 * MINUTE,
        username: None,
        note: format!("note {n}"),
        now: NOW,
    }
}

fn invited(name: &str, key: u8, n: u8) -> NewAccount {
    NewAccount { admission: Admission::Invite(code(n)), ..new_account(name, key, key) }
}

impl Bench {
    async fn invite(&self, invite: NewInvite) -> Invite {
        self.stores.invites.create(invite).await.expect("create")
    }

    async fn enroll(&self, account: NewAccount) -> Registration {
        self.stores.accounts.register(account).await.expect("register")
    }

    async fn uses_left(&self) -> Vec<u32> {
        let listed = self.stores.invites.list(u32::MAX).await.expect("list");
        listed.iter().map(|invite| invite.uses_left).collect()
    }
}

pub async fn invites_are_listed_as_they_were_created_until_they_are_revoked(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    let first = bench.invite(invite(1, 3)).await;
    let expected = Invite {
        id: code(1).id(),
        uses: 3,
        uses_left: 3,
        username: None,
        note: "note 1".into(),
        created_at: NOW,
        expires_at: NOW.plus(60 * MINUTE),
    };
    assert_eq!(first, expected);
    let alice = Username::parse("alice").expect("a username");
    let named = NewInvite { username: Some(alice.clone()), now: NOW.plus(MINUTE), ..invite(2, 1) };
    let second = bench.invite(named).await;
    assert_eq!(second.username, Some(alice));
    bench.crash().await;
    let invites = &bench.stores.invites;
    assert_eq!(invites.list(9).await.expect("list"), [second.clone(), first.clone()]);
    assert_eq!(invites.list(1).await.expect("list"), [second]);
    // A repeat changes nothing.
    assert_eq!(bench.invite(NewInvite { uses: 9, ..invite(1, 9) }).await, first);
    for expected in [InviteRevocation::Revoked, InviteRevocation::NotFound] {
        assert_eq!(invites.revoke(code(2).id()).await.expect("revoke"), expected);
    }
    assert_eq!(invites.list(9).await.expect("list"), [first]);
}

pub async fn an_invite_allows_as_many_registrations_as_it_has_uses(factory: &dyn Factory) {
    let mut bench = Bench::new(factory).await;
    bench.invite(invite(1, 2)).await;
    let first = bench.enroll(invited("alice", 1, 1)).await;
    let Registration::Registered(alice) = first else { panic!("{first:?}") };
    bench.crash().await;
    assert!(matches!(bench.enroll(invited("bob", 2, 1)).await, Registration::Registered(_)));
    assert_eq!(bench.uses_left().await, [0]);
    assert_eq!(bench.enroll(invited("carol", 3, 1)).await, Registration::InviteInvalid);
    // A repeat needs no use, and uses nothing.
    assert_eq!(bench.enroll(invited("alice", 1, 1)).await, Registration::Repeated(alice));
    assert_eq!(bench.uses_left().await, [0]);
}

pub async fn a_refused_or_repeated_registration_uses_nothing(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    bench.invite(invite(1, 5)).await;
    let Registration::Registered(alice) = bench.enroll(invited("alice", 1, 1)).await else {
        panic!("alice is the first");
    };
    for (attempt, expected) in [
        (invited("alice", 1, 1), Registration::Repeated(alice)),
        (invited("alice", 2, 1), Registration::UsernameTaken),
        (invited("a1ice", 2, 1), Registration::UsernameTaken),
        (invited("bob", 1, 1), Registration::IdentityTaken),
    ] {
        assert_eq!(bench.enroll(attempt).await, expected);
        assert_eq!(bench.uses_left().await, [4]);
    }
    let open = new_account("bob", 2, 2);
    assert!(matches!(bench.enroll(open).await, Registration::Registered(_)));
    assert_eq!(bench.uses_left().await, [4], "an open registration uses no invite");
}

pub async fn an_invalid_invite_reveals_no_username(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    bench.account(1).await;
    bench.invite(invite(1, 1)).await;
    bench.invite(invite(2, 1)).await;
    bench.enroll(invited("used", 2, 1)).await;
    bench.stores.invites.revoke(code(2).id()).await.expect("revoke");
    let late = NOW.plus(60 * MINUTE);
    bench.invite(invite(3, 1)).await;
    for (n, now) in [(1, NOW), (2, NOW), (3, late), (9, NOW)] {
        for name in ["account1", "free"] {
            let attempt = NewAccount { now, ..invited(name, 3, n) };
            assert_eq!(bench.enroll(attempt).await, Registration::InviteInvalid, "{n} {name}");
        }
    }
    let just = UnixMillis(late.0 - 1);
    let attempt = NewAccount { now: just, ..invited("free", 3, 3) };
    assert!(matches!(bench.enroll(attempt).await, Registration::Registered(_)));
}

pub async fn a_named_invite_allows_its_username_alone(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    let root = Username::parse("root").expect("a username");
    bench.invite(NewInvite { username: Some(root), ..invite(1, 1) }).await;
    bench.invite(invite(2, 1)).await;
    let reserved =
        |n| NewAccount { admission: Admission::NamedInvite(code(n)), ..new_account("root", 1, 1) };
    assert_eq!(bench.enroll(invited("other", 2, 1)).await, Registration::InviteInvalid);
    assert_eq!(bench.enroll(reserved(2)).await, Registration::UsernameTaken);
    assert_eq!(bench.enroll(reserved(9)).await, Registration::InviteInvalid);
    let Registration::Registered(id) = bench.enroll(reserved(1)).await else {
        panic!("the invite names the username");
    };
    for n in [1, 2] {
        assert_eq!(bench.enroll(reserved(n)).await, Registration::Repeated(id));
    }
    let uses: u32 = bench.uses_left().await.iter().sum();
    assert_eq!(uses, 1, "that of the invite without a name");
}

pub async fn concurrent_registrations_use_an_invite_exactly_as_often_as_it_allows(
    factory: &dyn Factory,
) {
    let bench = Bench::new(factory).await;
    bench.invite(invite(1, 3)).await;
    let mut attempts = JoinSet::new();
    for n in 0..32_u8 {
        let accounts = Arc::clone(&bench.stores.accounts);
        let new = invited(&format!("name{n}"), 100 + n, 1);
        attempts.spawn(async move {
            let outcome = accounts.register(new.clone()).await.expect("register");
            // The answer was lost.
            let repeated = accounts.register(new).await.expect("register");
            (outcome, repeated)
        });
    }
    let mut registered = 0;
    for (outcome, repeated) in attempts.join_all().await {
        match outcome {
            Registration::Registered(id) => {
                registered += 1;
                assert_eq!(repeated, Registration::Repeated(id));
            }
            outcome => assert_eq!([outcome, repeated], [Registration::InviteInvalid; 2]),
        }
    }
    assert_eq!((registered, bench.uses_left().await), (3, vec![0]));
}

pub async fn an_invite_is_removed_some_time_after_it_has_expired(factory: &dyn Factory) {
    let bench = Bench::new(factory).await;
    bench.invite(invite(1, 1)).await;
    let removed_at = NOW.plus(60 * MINUTE).plus(EXPIRED_INVITES);
    for (now, left) in [(removed_at.minus(Duration::from_millis(1)), 1), (removed_at, 0)] {
        bench.backend.set_clock(now).await;
        while bench.stores.maintenance.sweep(now).await.expect("sweep").rows > 0 {}
        assert_eq!(bench.uses_left().await.len(), left);
    }
}
