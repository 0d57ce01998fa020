//! The accounts of the tests.

use std::time::Duration;

use qpq_domain::{AccountId, IdentityKey, TokenHash, UnixMillis, Username};
use qpq_ports::{Admission, NewAccount, NewKeyPackage, NewSession, Registration, Session, Stores};

pub(crate) const NOW: UnixMillis = UnixMillis(1_800_000_000_000);
pub(crate) const HOUR: Duration = Duration::from_secs(60 * 60);

/// A registered account.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Person {
    pub(crate) account: AccountId,
    pub(crate) identity: IdentityKey,
}

pub(crate) fn new_account(name: &str, key: u8) -> NewAccount {
    NewAccount {
        username: Username::parse(name).expect("a username"),
        identity: IdentityKey::new([key; 32]),
        opaque_record: vec![1; 192],
        admission: Admission::Open,
        now: NOW,
    }
}

/// Registers the person with this number.
pub(crate) async fn person(stores: &Stores, n: u8) -> Person {
    let new = new_account(&format!("person{n}"), n);
    let identity = new.identity;
    match stores.accounts.register(new).await.expect("register") {
        Registration::Registered(account) => Person { account, identity },
        other => panic!("person {n}: {other:?}"),
    }
}

pub(crate) fn token(n: u8) -> TokenHash {
    TokenHash::new([n; 32])
}

/// Opens the session with this number.
pub(crate) async fn open(stores: &Stores, n: u8, person: Person) -> Session {
    let session = Session {
        account: person.account,
        identity: person.identity,
        device: None,
        authenticated_at: NOW,
        last_used_at: NOW,
        expires_at: NOW.plus(HOUR),
    };
    let new = NewSession { token: token(n), session: session.clone() };
    stores.sessions.create(new).await.expect("create");
    session
}

/// Returns the package with this number, valid for an hour.
pub(crate) fn package(n: u8) -> NewKeyPackage {
    NewKeyPackage {
        fingerprint: [n; 32],
        bytes: vec![n; 300],
        device: None,
        last_resort: false,
        not_before: NOW,
        not_after: NOW.plus(HOUR),
    }
}

pub(crate) fn last_resort(n: u8) -> NewKeyPackage {
    NewKeyPackage { last_resort: true, ..package(n) }
}
